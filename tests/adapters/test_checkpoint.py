"""`read_checkpoint` against PEFT: the same A and scaled B, and a named culprit for every file that is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peft_folders import (
    CASES,
    edit_config,
    edited_weights,
    loaded_by_peft,
    lora_layers,
    save_adapter,
    sites_of,
    tiny_llama,
)
from torch import Tensor

from xpu_lora_compile.adapters import checkpoint
from xpu_lora_compile.adapters.checkpoint import WEIGHTS_FILE, LoraWeights, ModuleSizes, read_checkpoint
from xpu_lora_compile.adapters.config import read_config
from xpu_lora_compile.adapters.files import PICKLE_FILE
from xpu_lora_compile.adapters.names import BaseModel
from xpu_lora_compile.errors import (
    AdapterError,
    AdapterFileError,
    AdapterShapeError,
    NonFiniteWeightError,
    RankError,
    UnmatchedTensorError,
    UnsupportedAdapterError,
)
from xpu_lora_compile.layers import HOSTS

MODEL = tiny_llama()
SITES = sites_of(MODEL)
BASE = BaseModel.of(MODEL, HOSTS)

Q0 = "model.layers.0.self_attn.q_proj"
A0 = f"base_model.model.{Q0}.lora_A.weight"
B0 = f"base_model.model.{Q0}.lora_B.weight"
HEAD_COPY = "base_model.model.lm_head.base_layer.weight"


def read(
    folder: Path,
    sites: Mapping[str, ModuleSizes] = SITES,
    base: BaseModel = BASE,
    max_rank: int = 8,
    **options: Any,
) -> dict[str, LoraWeights]:
    return read_checkpoint(folder, read_config(folder), sites, base, max_rank, **options)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("pristine"), target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="session")
def pristine_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("vocabulary"), target_modules=["embed_tokens", "lm_head"])


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """An adapter on q_proj and v_proj of both layers, rank 4, to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "adapter"))


@pytest.fixture
def vocabulary(pristine_vocabulary: Path, tmp_path: Path) -> Path:
    """An adapter on embed_tokens and lm_head, with PEFT's copies of their base weights, to spoil."""
    return Path(shutil.copytree(pristine_vocabulary, tmp_path / "vocabulary"))


@pytest.mark.parametrize("case", CASES)
def test_a_and_scaled_b_are_those_of_peft(case: str, tmp_path: Path) -> None:
    weights = read(save_adapter(tmp_path, **CASES[case]))
    layers = lora_layers(loaded_by_peft(tmp_path))
    assert weights.keys() == layers.keys()
    for name, layer in layers.items():
        if SITES[name].kind == "embedding":
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(weights[name].a, a), name
        assert torch.equal(weights[name].b, layer.scaling["default"] * b), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_widened_before_it_is_scaled(folder: Path, dtype: torch.dtype) -> None:
    with edited_weights(folder) as tensors:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})
        expected = tensors[B0].float() * 1.5
    assert torch.equal(read(folder)[Q0].b, expected)


def test_the_tensors_are_no_views_of_the_file(folder: Path) -> None:
    weights = read(folder)[Q0]
    a, b = weights.a.clone(), weights.b.clone()
    path = folder / WEIGHTS_FILE
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(weights.a, a)
    assert torch.equal(weights.b, b)


def test_sites_that_the_adapter_does_not_target_get_nothing(folder: Path) -> None:
    assert sorted(read(folder)) == sorted(name for name in SITES if name.endswith(("q_proj", "v_proj")))


def test_all_linear_needs_no_weights_for_the_vocabulary(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules="all-linear")
    edit_config(tmp_path, target_modules="all-linear")
    assert read(tmp_path).keys() == SITES.keys() - {"lm_head", "model.embed_tokens"}


def test_fewer_tokens_than_the_bank_covers_are_fine(vocabulary: Path) -> None:
    padded = {
        "lm_head": replace(SITES["lm_head"], out_features=128),
        "model.embed_tokens": replace(SITES["model.embed_tokens"], in_features=128),
    }
    weights = read(vocabulary, sites=padded)
    assert weights["lm_head"].b.shape == (70, 4)
    assert weights["model.embed_tokens"].a.shape == (4, 70)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_more_tokens_than_the_bank_covers_are_refused(vocabulary: Path, name: str) -> None:
    small = {"lm_head": {"out_features": 64}, "model.embed_tokens": {"in_features": 64}}[name]
    with pytest.raises(AdapterShapeError, match=rf"{name}\.lora_.*at most 64.*70"):
        read(vocabulary, sites={**SITES, name: replace(SITES[name], **small)})


@pytest.mark.parametrize(
    ("part", "shape"), [("lm_head.lora_B.weight", (0, 4)), ("model.embed_tokens.lora_embedding_A", (4, 0))]
)
def test_no_tokens_at_all_are_refused(vocabulary: Path, part: str, shape: tuple[int, int]) -> None:
    with edited_weights(vocabulary) as tensors:
        tensors[f"base_model.model.{part}"] = torch.ones(shape)
    with pytest.raises(AdapterShapeError, match=part):
        read(vocabulary)


def test_an_embedding_of_another_width_is_refused(vocabulary: Path) -> None:
    sites = {**SITES, "model.embed_tokens": replace(SITES["model.embed_tokens"], out_features=64)}
    with pytest.raises(AdapterShapeError, match=r"lora_embedding_B: wanted shape \[64, 4\]; got shape \[32, 4\]"):
        read(vocabulary, sites=sites)


def test_copies_of_base_weights_that_are_not_targeted_are_ignored(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], save_embedding_layers=True)
    assert all(name.endswith("q_proj") for name in read(tmp_path))


def test_a_copy_equals_the_first_rows_of_a_padded_base_weight(vocabulary: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    padded = {name: torch.cat([BASE.parameters[name], torch.ones(58, 32)]) for name in names}
    assert read(vocabulary, base=replace(BASE, parameters=padded))


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
def test_a_copy_may_be_rounded_to_another_dtype(vocabulary: Path, own: torch.dtype, saved: torch.dtype) -> None:
    with edited_weights(vocabulary) as tensors:
        tensors[HEAD_COPY] = tensors[HEAD_COPY].to(saved)
    parameters = {name: value.to(own) for name, value in BASE.parameters.items()}
    assert read(vocabulary, base=replace(BASE, parameters=parameters))


def test_a_retrained_base_weight_is_refused(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_BASE_VALUES_AT_ONCE", 100)
    with edited_weights(vocabulary) as tensors:
        tensors[HEAD_COPY][-1, -1] += 1
    with pytest.raises(UnsupportedAdapterError, match=HEAD_COPY):
        read(vocabulary)


@pytest.mark.parametrize(
    "copy",
    [torch.zeros(71, 32), torch.zeros(70, 31), torch.zeros(70), torch.zeros(70, 32, dtype=torch.int8)],
    ids=["more-rows", "narrower", "vector", "int8"],
)
def test_a_base_weight_of_another_size_or_kind_is_refused(vocabulary: Path, copy: Tensor) -> None:
    with edited_weights(vocabulary) as tensors:
        tensors[HEAD_COPY] = copy
    with pytest.raises(UnsupportedAdapterError, match=HEAD_COPY):
        read(vocabulary)


def test_a_base_weight_that_nobody_can_compare_is_refused(vocabulary: Path) -> None:
    with pytest.raises(UnmatchedTensorError, match=HEAD_COPY):
        read(vocabulary, base=replace(BASE, parameters={}))


def test_a_module_outside_the_bank_is_named_with_what_to_attach(folder: Path) -> None:
    sites = {name: site for name, site in SITES.items() if "v_proj" not in name}
    with pytest.raises(UnmatchedTensorError) as caught:
        read(folder, sites=sites)
    assert "model.layers.0.self_attn.v_proj.lora_A.weight" in caught.value.args[2]
    assert "model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj" in caught.value.args[3]
    assert "xlc.attach(model, target_modules=...)" in caught.value.args[3]


def test_an_adapter_for_none_of_the_modules_is_refused_even_when_it_is_empty(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors.clear()
    with pytest.raises(UnmatchedTensorError, match=r"xlc\.attach"):
        read(folder, sites={"lm_head": SITES["lm_head"]})


def test_a_tensor_of_a_module_that_the_config_does_not_target_is_refused(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj"])
    with pytest.raises(
        UnmatchedTensorError, match=r"got .*layers\.0\.self_attn\.v_proj\.lora_A\.weight.*does not account"
    ):
        read(folder)


def test_a_tensor_that_nobody_targets_is_no_reason_to_attach_more(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj"])
    with pytest.raises(UnmatchedTensorError) as caught:
        read(folder, sites={name: site for name, site in SITES.items() if "v_proj" not in name})
    assert "attach" not in caught.value.args[3]


@pytest.mark.parametrize("key", [A0, B0])
def test_a_targeted_module_without_a_or_without_b_is_refused(folder: Path, key: str) -> None:
    with edited_weights(folder) as tensors:
        del tensors[key]
    with pytest.raises(UnmatchedTensorError, match=f"got no {key.removeprefix('base_model.model.')}"):
        read(folder)


def test_a_targeted_module_without_any_tensor_is_refused(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj", "v_proj", "lm_head"])
    with pytest.raises(UnmatchedTensorError, match=r"got no lm_head\.lora_A\.weight, lm_head\.lora_B\.weight"):
        read(folder)


STRANGERS = {
    "dora": f"base_model.model.{Q0}.lora_magnitude_vector",
    "bias-of-B": f"base_model.model.{Q0}.lora_B.bias",
    "embedding-part-of-a-linear-layer": f"base_model.model.{Q0}.lora_embedding_A",
    "base-bias": f"base_model.model.{Q0}.base_layer.bias",
    "base-weight": f"base_model.model.{Q0}.base_layer.weight",
    "without-prefix": f"{Q0}.lora_A.weight",
    "no-name": "",
    "newline": f"base_model.model.{Q0}\n.lora_A.weight",
    "endless": f"base_model.model.{'layers.' * 20_000}lora_A.weight",
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_tensor_that_is_no_part_of_the_adapter_is_named(folder: Path, case: str) -> None:
    with edited_weights(folder) as tensors:
        tensors[STRANGERS[case]] = torch.ones(4, 32)
    with pytest.raises((UnmatchedTensorError, UnsupportedAdapterError)) as caught:
        read(folder)
    assert STRANGERS[case][:40] in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_many_strangers_are_counted(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors.update({f"stranger.{n}": torch.ones(1) for n in range(10)})
    with pytest.raises(UnmatchedTensorError, match=r"stranger\.0, stranger\.1, stranger\.2 and 7 more"):
        read(folder)


def test_a_rank_above_that_of_the_bank_is_refused_before_the_weights_are_read(folder: Path) -> None:
    edit_config(folder, rank_pattern={"layers.1.self_attn.q_proj": 32})
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(RankError, match=r"at most 8; got model\.layers\.1\.self_attn\.q_proj \(rank 32\).*max_rank=32"):
        read(folder)


def test_a_rank_other_than_the_configs_is_refused(folder: Path) -> None:
    edit_config(folder, rank_pattern={"layers.0.self_attn.q_proj": 3})
    with pytest.raises(AdapterShapeError, match=rf"{A0}: wanted shape \[3, 32\]; got shape \[4, 32\].* is 3"):
        read(folder)


def test_ranks_of_a_and_b_that_differ_are_refused(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors[B0] = torch.ones(32, 3)
    with pytest.raises(AdapterShapeError, match=rf"{B0}: wanted shape \[32, 4\]; got shape \[32, 3\]"):
        read(folder)


@pytest.mark.parametrize(("key", "shape"), [(A0, (4, 31)), (A0, (4, 33)), (B0, (31, 4)), (B0, (33, 4))], ids=str)
def test_an_input_or_output_of_another_size_is_refused(folder: Path, key: str, shape: tuple[int, int]) -> None:
    with edited_weights(folder) as tensors:
        tensors[key] = torch.ones(shape)
    with pytest.raises(AdapterShapeError, match=rf"{key}: .*got shape \[{shape[0]}, {shape[1]}\]"):
        read(folder)


@pytest.mark.parametrize("shape", [(), (0,), (128,), (4, 32, 1), (4, 0), (1,) * 70], ids=str)
def test_a_tensor_that_is_no_matrix_is_refused(folder: Path, shape: tuple[int, ...]) -> None:
    with edited_weights(folder) as tensors:
        tensors[A0] = torch.ones(shape)
    with pytest.raises(AdapterShapeError, match=rf"{A0}: wanted shape \[4, 32\]"):
        read(folder)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float64, "F64"), (torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
    ids=str,
)
def test_a_dtype_other_than_fp32_bf16_and_fp16_is_refused(folder: Path, dtype: torch.dtype, name: str) -> None:
    with edited_weights(folder) as tensors:
        tensors[A0] = torch.ones(4, 32).to(dtype)
    with pytest.raises(AdapterShapeError, match=f"{A0}: wanted dtype F32 or BF16 or F16; got dtype {name}"):
        read(folder)


@pytest.mark.parametrize("key", [A0, B0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(folder: Path, key: str, value: float) -> None:
    with edited_weights(folder) as tensors:
        tensors[key][-1, -1] = value
    with pytest.raises(NonFiniteWeightError, match=f"{key}: wanted finite values; got NaN or infinity"):
        read(folder)


def test_a_weight_that_scaling_makes_infinite_is_refused(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors[B0][0, 0] = 3e38
    with pytest.raises(NonFiniteWeightError, match=rf"{B0}: .*infinity in torch.float32 after scaling by 1.5"):
        read(folder)


def test_a_scaling_beyond_float32_is_refused(folder: Path) -> None:
    edit_config(folder, lora_alpha=1e299)
    with pytest.raises(NonFiniteWeightError, match=r"lora_B\.weight: .*after scaling by 2.5e\+298"):
        read(folder)


@pytest.mark.parametrize("key", [A0, B0])
def test_a_weight_beyond_the_banks_dtype_is_refused(folder: Path, key: str) -> None:
    with edited_weights(folder) as tensors:
        tensors[key][0, 0] = 70_000
    assert read(folder, dtype=torch.bfloat16)
    with pytest.raises(NonFiniteWeightError, match=rf"{key}: .*infinity in torch.float16"):
        read(folder, dtype=torch.float16)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def with_header(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


F4 = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven-bytes": b"\1" * 7,
    "length-of-the-header-beyond-the-end": with_header(b"{}", length=1000),
    "length-of-the-header-is-2**63": with_header(b"{}", length=2**63),
    "header-not-json": with_header(b"{'a'"),
    "header-a-list": with_header(b"[]"),
    "header-not-text": with_header(b'{"\xff": 1}'),
    "header-nested-too-deeply": with_header(b'{"a":' * 50_000),
    "unknown-field-nested-too-deeply": with_header(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
        b"1234",
    ),
    "the-same-name-twice": with_header(f'{{"a": {F4}, "a": {F4}}}'.encode(), b"1234"),
    "the-same-name-twice-once-escaped": with_header(f'{{"a": {F4}, "\\u0061": {F4}}}'.encode(), b"1234"),
    "offsets-outside": with_header({"a": entry("F32", [4], 0, 16)}, b"1234"),
    "offsets-reversed": with_header({"a": entry("F32", [1], 4, 0)}, b"1234"),
    "offsets-overlap": with_header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234"),
    "offsets-leave-a-hole": with_header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"1" * 12),
    "more-data-than-tensors": with_header({"a": entry("F32", [1], 0, 4)}, b"1" * 400),
    "shape-larger-than-data": with_header({"a": entry("F32", [2**40], 0, 4)}, b"1234"),
    "shape-overflows": with_header({"a": entry("F32", [2**62, 2**62], 0, 4)}, b"1234"),
    "shape-negative": with_header({"a": entry("F32", [-1], 0, 4)}, b"1234"),
    "dtype-unknown": with_header({"a": entry("F99", [1], 0, 4)}, b"1234"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malformed_file_is_refused(folder: Path, case: str) -> None:
    (folder / WEIGHTS_FILE).write_bytes(HOSTILE[case])
    with pytest.raises(AdapterFileError, match=WEIGHTS_FILE):
        read(folder)


def test_a_name_that_comes_twice_is_named(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(HOSTILE["the-same-name-twice"])
    with pytest.raises(AdapterFileError, match="more than once: a"):
        read(folder)


def test_a_huge_shape_without_values_allocates_nothing(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(with_header({A0: entry("F32", [2**62, 0, 2**62], 0, 0)}))
    edit_config(folder, target_modules=[Q0])
    with pytest.raises(UnmatchedTensorError, match=r"no .*lora_B"):
        read(folder)


def test_a_header_of_many_megabytes_is_not_read(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(struct.pack("<Q", 2**26))
        file.truncate(2**27)
    with pytest.raises(AdapterFileError, match="header claims 67108864 bytes"):
        read(folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 200, -1])
def test_a_truncated_file_is_refused(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterFileError, match=WEIGHTS_FILE):
        read(folder)


def test_a_missing_file_is_told_by_its_path(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterFileError, match=str(folder / WEIGHTS_FILE)):
        read(folder)


def test_a_pickle_is_not_read_and_the_way_out_is_told(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / PICKLE_FILE)
    with pytest.raises(AdapterFileError, match=rf"{PICKLE_FILE}, a pickle.*save_pretrained"):
        read(folder)


def test_a_directory_in_its_place_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()
    with pytest.raises(AdapterFileError, match="a regular file"):
        read(folder)


def test_a_pipe_in_its_place_is_refused_without_waiting(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)
    with pytest.raises(AdapterFileError, match="a regular file"):
        read(folder)


def test_a_link_to_itself_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).symlink_to(folder / WEIGHTS_FILE)
    with pytest.raises(AdapterFileError, match="symbolic links"):
        read(folder)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a regular file that even root cannot read")
def test_an_unreadable_file_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).symlink_to("/proc/self/mem")
    with pytest.raises(AdapterFileError, match="Input/output error"):
        read(folder)


def test_a_link_to_a_good_file_is_read(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "blob")
    (folder / WEIGHTS_FILE).symlink_to("blob")
    assert Q0 in read(folder)


SPOILS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None, database=None)
@given(st.booleans(), SPOILS, st.none() | st.floats(0, 1))
def test_any_spoiled_file_is_read_or_refused_with_an_adapter_error(
    pristine_vocabulary: Path,
    tmp_path_factory: pytest.TempPathFactory,
    in_header: bool,
    spoils: list[tuple[float, int]],
    kept: float | None,
) -> None:
    content = bytearray((pristine_vocabulary / WEIGHTS_FILE).read_bytes())
    # The header is a small part of the file, and the part with the traps.
    end = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    for place, value in spoils:
        content[int(place * end)] = value
    if kept is not None:
        del content[int(kept * len(content)) :]
    folder = tmp_path_factory.getbasetemp()
    (folder / WEIGHTS_FILE).write_bytes(content)
    try:
        weights = read_checkpoint(folder, read_config(pristine_vocabulary), SITES, BASE, 8)
    except AdapterError:
        return
    assert all(tensor.isfinite().all() for pair in weights.values() for tensor in (pair.a, pair.b))
