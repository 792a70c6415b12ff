"""An artifact of `xlc.export` in C++ and in Python: the same numbers as the compiled model's, and the same refusals.

On the device that XPU_LORA_TEST_DEVICE names.
"""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import serve_pt2
import torch
from safetensors.torch import load_file, save_file
from support.artifacts import Tagger, edited, made_once, save_files, save_plain_adapter
from support.cases import DEVICE
from support.peft_folders import CASES, quiet, save_adapter
from torch import Tensor, nn
from torch.export import Dim

import xpu_lora_compile as xlc
from xpu_lora_compile.artifacts import manifest
from xpu_lora_compile.errors import ArtifactError
from xpu_lora_compile.kernels import native, preferred_on

pytestmark = [
    pytest.mark.skipif(bool(native.problem()), reason="a C++ compiler is wanted"),
    pytest.mark.skipif(not preferred_on(DEVICE.type).ops_without_python, reason=f"no kernel for it on {DEVICE.type}"),
]

# Of PEFT's folders those that the bank of the example has modules for.
COVERED = {name: lora for name, lora in CASES.items() if "embedding" not in name}


def attached_llama() -> tuple[nn.Module, xlc.AdapterBank]:
    model = serve_pt2.tiny_llama().to(DEVICE)
    return model, xlc.attach(model, slots=4, max_rank=8, target_modules=serve_pt2.MODULES)


def attached_tagger() -> tuple[nn.Module, xlc.AdapterBank]:
    model = Tagger().eval().requires_grad_(False).to(DEVICE, torch.bfloat16)
    names = ["words", "hidden", "scores", "summary"]
    return model, xlc.attach(model, slots=3, max_rank=6, target_modules=names)


def tagger_inputs(batch: int) -> dict[str, Tensor]:
    words, features = torch.randint(0, 30, (batch, 6)), torch.randn(batch, 6, 3)
    return {"words": words.to(DEVICE), "features": features.to(DEVICE, torch.bfloat16)}


def compiled_here(model: nn.Module) -> Any:
    """The model as Python runs it, with the kernels that are in the file."""
    return torch.compile(model, backend="xpu_lora", options={"xpu_lora.launch": "inductor"})


def is_same(got: Tensor, expected: Tensor) -> bool:
    """On a CPU to the bit. On a GPU Inductor sums in an order that depends on the batch that it was first given."""
    if DEVICE.type == "cpu":
        return torch.equal(got, expected)
    # Another adapter is off by much more than rounding.
    return bool((got - expected).abs().max() <= 1e-3 * expected.abs().max())


def tokens_for(rows: list[Any]) -> Tensor:
    return serve_pt2.batch_of(rows).to(DEVICE)


def export_tagger(path: Path) -> None:
    batch = {0: Dim("batch", max=32)}
    model, _ = attached_tagger()
    shapes = ({"words": batch, "features": batch},)
    # What `torch.compile` has returned, too: the model inside is exported.
    compiled = torch.compile(model, backend="xpu_lora")
    xlc.export(compiled, path, (tagger_inputs(3),), {"scale": 0.5}, dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "llama.pt2", lambda path: serve_pt2.make_artifact(attached_llama()[0], path))


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "tagger.pt2", export_tagger)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with quiet():
        yield


def random_plan(rng: random.Random, folders: dict[str, Path], slots: int, batches: int) -> Iterator[tuple[str, Any]]:
    """Loads, drops and batches, as many adapters at a time as there are slots."""
    held: list[str] = []
    for number in range(batches):
        if not held or rng.random() < 0.5:
            if len(held) == slots or (held and rng.random() < 0.3):
                yield "drop", held.pop(rng.randrange(len(held)))
            held.append(rng.choice(sorted(folders.keys() - set(held))))
            yield "load", held[-1]
        # The first two sizes settle what the compiler makes: a number, and then any.
        size = (3, 5)[number] if number < 2 else rng.choice([1, 2, 3, 5, 8])
        yield "rows", [rng.choice([None, *held]) for _ in range(size - 1)] + [None if number < 2 else held[0]]


def test_a_thousand_random_swaps_and_batches_in_cpp_give_no_wrong_row(
    llama: Path, program: Path, tmp_path: Path
) -> None:
    folders = {
        name: save_adapter(tmp_path / name, model=serve_pt2.tiny_llama(), **lora) for name, lora in COVERED.items()
    }
    model, bank = attached_llama()
    served, compiled = xlc.load_artifact(llama), compiled_here(model)
    plan: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    differ = batches = 0
    for step, what in random_plan(random.Random(0), folders, 4, 1000):
        if step == "load":
            bank.load(what, folders[what])
            served.load(what, folders[what])
            plan.append({"load": [what, str(folders[what])]})
            continue
        if step == "drop":
            bank.drop(what)
            served.drop(what)
            plan.append({"drop": what})
            continue
        tokens = tokens_for(what)
        with torch.no_grad(), bank.use(what):
            logits = compiled(input_ids=tokens).logits
        answer = served(tokens, adapters=what)["logits"]
        differ += sum(not is_same(*pair) for pair in zip(answer, logits, strict=True))
        plan.append({"rows": what})
        tensors |= {f"{batches}.input_ids": tokens, f"{batches}.logits": answer.contiguous()}
        batches += 1
    status, said = serve_pt2.run_program(program, llama, plan, tensors)
    assert (differ, status) == (0, 0), said
    assert "1000 batches, 0 of " in said
    assert sum("load" in step for step in plan) > 400


def test_the_cpp_program_notices_a_wrong_row(llama: Path, program: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", model=serve_pt2.tiny_llama(), target_modules=["q_proj"])
    tokens = tokens_for(["a", None, "a"])
    served = xlc.load_artifact(llama)
    served.load("a", folder)
    logits = served(tokens, adapters=["a", None, "a"])["logits"].contiguous()
    plan = [{"load": ["a", str(folder)]}, {"rows": [None, None, "a"]}]
    status, said = serve_pt2.run_program(program, llama, plan, {"0.input_ids": tokens, "0.logits": logits})
    assert (status, "1 of 3 rows wrong" in said) == (1, True)


def test_a_model_that_is_no_transformer_is_served(tagger: Path, program: Path, tmp_path: Path) -> None:
    rank = {"r": 4, "lora_alpha": 6}
    folders = {
        "all": save_plain_adapter(
            tmp_path / "all",
            {"words": ((4, 30), (12, 4)), "hidden": ((4, 15), (20, 4)), "scores": ((4, 20), (7, 4))},
            **rank,
        ),
        "wide": save_plain_adapter(tmp_path / "wide", {"summary": ((6, 20), (5, 6))}, r=6, use_rslora=True, seed=1),
        "few words": save_plain_adapter(tmp_path / "few", {"words": ((2, 11), (12, 2))}, r=2, seed=2),
    }
    model, bank = attached_tagger()
    served, compiled = xlc.load_artifact(tagger), compiled_here(model)
    plan: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for name, folder in folders.items():
        bank.load(name, folder)
        served.load(name, folder)
        plan.append({"load": [name, str(folder)]})
    batches = [["all", None, "wide"], ["few words", "all", None, "wide", "all"], ["wide", "few words"], ["all"] * 4]
    for number, rows in enumerate(batches):
        inputs = tagger_inputs(len(rows))
        with torch.no_grad(), bank.use(rows):
            scores, more = compiled(inputs, scale=0.5)
        answer = served(*inputs.values(), adapters=rows)
        assert torch.equal(answer[0], scores)
        assert torch.equal(answer[1]["summary"], more["summary"])
        plan.append({"rows": rows})
        tensors |= {f"{number}.inputs.{name}": tensor for name, tensor in inputs.items()}
        tensors |= {f"{number}.0": scores.contiguous(), f"{number}.1.summary": more["summary"].contiguous()}
    status, said = serve_pt2.run_program(program, tagger, plan, tensors)
    assert (status, "4 batches, 0 of 14 rows wrong" in said) == (0, True), said


def test_the_example_serves_without_a_wrong_row(
    llama: Path, program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What takes a minute has been made by the functions that the example calls.
    monkeypatch.setattr(serve_pt2, "make_artifact", lambda *_: llama)
    monkeypatch.setattr(serve_pt2, "make_program", lambda _: program)
    assert serve_pt2.main() == 0
    assert "3 batches, 0 of 9 rows wrong" in capsys.readouterr().out


# What is wrong with an adapter, and a word of what C++ says about it.
def _wrong(folder: Path, change: Any = None, **config: Any) -> Path:
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
        for layer in (0, 1)
        for part, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    first = next(iter(tensors))
    if change is not None:
        change(tensors, first)
    return save_files(folder, tensors, {"target_modules": ["q_proj"], **config})


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a rank above R": (None, {"r": 9}, "a rank of at most 8"),
    "a width that is not the module's": (lambda t, k: t.update({k: torch.ones(4, 65)}), {}, "of shape [4, 64]"),
    "a rank that is not the config's": (lambda t, k: t.update({k: torch.ones(3, 64)}), {}, "of shape [4, 64]"),
    "a module that there is not": (
        lambda t, k: t.update({k.replace("q_proj", "qq_proj"): t.pop(k)}),
        {},
        "names of modules that the model has",
    ),
    "a module that is not targeted": (None, {"target_modules": ["v_proj"]}, "A and B for every targeted module"),
    "a tensor that is missing": (lambda t, k: t.pop(k), {}, "A and B for every targeted module"),
    "integers": (lambda t, k: t.update({k: torch.ones(4, 64, dtype=torch.int32)}), {}, "F32, BF16 or F16"),
    "no number": (lambda t, k: t[k].fill_(float("nan")), {}, "finite values"),
    "another layer by the config": (None, {"layers_to_transform": [1]}, "only modules that the adapter targets"),
    "DoRA": (None, {"use_dora": True}, "use_dora"),
    "a trained bias": (None, {"bias": "all"}, "bias"),
    "a field of the future": (None, {"new_feature": 3}, "new_feature"),
    "another kind": (None, {"peft_type": "LOHA"}, "peft_type"),
    "an alpha that is no number": (None, {"lora_alpha": "6"}, "a finite number"),
    "a weight of the base model that differs": (
        lambda t, k: t.update({"base_model.model.lm_head.weight": torch.ones(96, 64)}),
        {},
        "a copy of the model's own weight",
    ),
    "a key of no model": (lambda t, k: t.update({"q_proj.lora_A.weight": t.pop(k)}), {}, "keys that begin with"),
    "a key that begins with a dot": (lambda t, k: t.update({f".{k}": t.pop(k)}), {}, "keys that begin with"),
    "a key that ends with a dot": (lambda t, k: t.update({f"{k}.": t.pop(k)}), {}, "only lora_A and lora_B"),
    "a key with two dots": (
        lambda t, k: t.update({k.replace(".q_proj", "..q_proj"): t.pop(k)}),
        {},
        "names of modules that the model has",
    ),
    "layers: true": (None, {"layers_to_transform": True}, "layers_to_transform: wanted an integer, or a list"),
    "layers: a text": (None, {"layers_to_transform": "1"}, "layers_to_transform: wanted an integer, or a list"),
    "layers: a list with true": (None, {"layers_to_transform": [True]}, "layers_to_transform: wanted an integer, or a"),
    "layers: a fraction": (None, {"layers_to_transform": [1.0]}, "layers_to_transform: wanted an integer, or a list"),
    "layers: an object": (None, {"layers_to_transform": {"0": 1}}, "layers_to_transform: wanted an integer, or a list"),
    "exclude: a number": (None, {"exclude_modules": 5}, "exclude_modules: wanted a list of names"),
    "exclude: nought": (None, {"exclude_modules": 0}, "exclude_modules: wanted a list of names"),
    "exclude: numbers": (None, {"exclude_modules": [5]}, "exclude_modules: wanted a list of names"),
    "exclude: true": (None, {"exclude_modules": True}, "exclude_modules: wanted a list of names"),
    "targets: a number": (None, {"target_modules": 5}, "target_modules: wanted a list of names"),
    "targets: null in a list": (None, {"target_modules": ["q_proj", None]}, "target_modules: wanted a list of names"),
    "layers_pattern: a number": (
        None,
        {"layers_to_transform": [0], "layers_pattern": 5},
        "layers_pattern: wanted a name or a list of names",
    ),
    "a pattern that ends before the number": (
        None,
        {"layers_to_transform": [0], "layers_pattern": ["model|h"], "target_modules": ["q_proj"]},
        "an adapter for modules of this artifact",
    ),
    "ranks: a list": (None, {"rank_pattern": ["q_proj"]}, "rank_pattern: wanted an object"),
    "a module to save: null": (None, {"modules_to_save": [None]}, "modules_to_save=a list"),
    "DoRA: a text": (None, {"use_dora": "none"}, 'use_dora="none"'),
    "a field of the future, nought": (None, {"new_feature": 0}, "new_feature=0"),
}


def _check_refusals(program: Path, artifact: Path, words: dict[Path, str]) -> None:
    """Have C++ refuse each folder; what it says must hold the words."""
    plan = [{"refused": ["wrong", str(folder)]} for folder in words]
    status, said = serve_pt2.run_program(program, artifact, plan, {"0.x": torch.ones(1)})
    assert status == 0, said
    missed = [
        (wanted, line) for wanted, line in zip(words.values(), said.splitlines(), strict=False) if wanted not in line
    ]
    assert not missed
    assert len(said.splitlines()) == len(words) + 1


def test_cpp_and_python_refuse_the_same_adapters(llama: Path, program: Path, tmp_path: Path) -> None:
    served = xlc.load_artifact(llama)
    wanted = {}
    for at, (change, config, words) in enumerate(WRONG.values()):
        folder = _wrong(tmp_path / str(at), change, **config)
        with pytest.raises(xlc.LoraError):
            served.load("wrong", folder)
        wanted[folder] = words
    _check_refusals(program, llama, wanted)
    assert served.names == ()


# The data of a file: what stands in its header about the first two tensors, and what comes after the data.
def _move(header: dict[str, Any], by: int) -> None:
    for entry in list(header.values())[1:]:
        entry["data_offsets"] = [end + by for end in entry["data_offsets"]]


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(iter(header.values()))  # type: ignore[no-any-return]


def _last(header: dict[str, Any]) -> dict[str, Any]:
    return max(header.values(), key=lambda entry: entry["data_offsets"])  # type: ignore[no-any-return]


def _overlap(header: dict[str, Any]) -> None:
    _last(header)["data_offsets"] = _first(header)["data_offsets"]


DAMAGED_FILES: dict[str, tuple[Callable[[dict[str, Any]], object], bytes, str]] = {
    "overlap": (_overlap, b"", "wanted data of its own; got that of another tensor"),
    "half an overlap": (lambda header: _move(header, -8), b"", "where the last end; got data from byte"),
    "a gap": (lambda header: _move(header, 8), b"\0" * 8, "where the last end; got data from byte"),
    "bytes at the end": (lambda _: None, b"\0", "wanted data up to the end, byte "),
    "beyond the end": (lambda header: _move(header, 8), b"", "wanted data inside of the file"),
    "a size of 4.9": (lambda header: _first(header).update(shape=[4.9, 64]), b"", "of whole numbers"),
    "a negative size": (lambda header: _first(header).update(shape=[-4, -64]), b"", "of whole numbers"),
    "a size as a text": (lambda header: _first(header).update(shape=["4", 64]), b"", "of whole numbers"),
    "no shape": (lambda header: _first(header).pop("shape"), b"", "of whole numbers"),
    "a dtype that is none": (lambda header: _first(header).update(dtype="F33"), b"", "one that PyTorch has"),
}


def test_cpp_and_python_refuse_files_whose_tensors_do_not_cover_them(
    llama: Path, program: Path, tmp_path: Path
) -> None:
    served = xlc.load_artifact(llama)
    wanted = {}
    for at, (change, more, words) in enumerate(DAMAGED_FILES.values()):
        file = _wrong(tmp_path / str(at)) / "adapter_model.safetensors"
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end]).items()
        header = dict(sorted(entries, key=lambda item: item[1]["data_offsets"]))
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:] + more)
        with pytest.raises(xlc.LoraError):
            served.load("wrong", file.parent)
        wanted[file.parent] = words
    _check_refusals(program, llama, wanted)


NO_JSON = {
    "a number with a nought before it": b'{"r": 01}',
    "a number with a plus": b'{"r": +1}',
    "a number without digits after the point": b'{"r": 1.}',
    "a number without digits before the point": b'{"r": .5}',
    "a number without an exponent": b'{"r": 1e}',
    "an unknown escape": rb'{"r": "\q"}',
    "an escape of no number": rb'{"r": "\u00zz"}',
    "a line break in a text": b'{"r": "\n"}',
    "a NUL after the end": b'{"r": 4}\0',
    "more after the end": b'{"r": 4} {}',
    "a comma at the end": b'{"r": 4,}',
    "no end": b'{"r": [4',
    "bytes that are no UTF-8": b'{"r": "\xff"}',
    "UTF-8 of more bytes than are needed": b'{"r": "\xc0\x80"}',
    "a single quote": b"{'r': 4}",
    "nothing": b"",
}


def test_cpp_and_python_refuse_configs_that_are_no_json(llama: Path, program: Path, tmp_path: Path) -> None:
    served = xlc.load_artifact(llama)
    wanted = {}
    for at, text in enumerate(NO_JSON.values()):
        folder = _wrong(tmp_path / str(at))
        (folder / "adapter_config.json").write_bytes(text)
        with pytest.raises(xlc.LoraError):
            served.load("wrong", folder)
        wanted[folder] = "adapter_config.json: wanted JSON; got "
    _check_refusals(program, llama, wanted)


def test_cpp_reads_json_as_python_does(llama: Path, program: Path, tmp_path: Path) -> None:
    folder = _wrong(tmp_path / "a")
    text = r'{"peft_type": "LORA", "target_modules": ["q\u005fproj"], "r": 4, "lora_alpha": -6.0E-1, "revision": "%s"}'
    (folder / "adapter_config.json").write_text(
        text % (r"\ud83d\ude00 \" \\ \/ \b\f\n\r\t" + " é€😀"), encoding="utf-8"
    )
    xlc.load_artifact(llama).load("a", folder)
    status, said = serve_pt2.run_program(program, llama, [{"load": ["a", str(folder)]}], {"0.x": torch.ones(1)})
    assert status == 0, said


# Each names q_proj in Python, or could; ECMAScript has another meaning for it, or none.
READ_OTHERWISE = [
    r"(?i).*Q_PROJ",
    r"(?P<name>.*)q_proj",
    r".*(?<=_attn\.)q_proj",
    r".*(?=q_proj).*",
    r"(?>.*\.)q_proj",
    r"(.*)(?#comment)q_proj",
    r".*q_proj\Z",
    r"\A.*q_proj",
    r"[^]x]*q_proj",
    r"[]q].*|.*q_proj",
    r".*+|.*q_proj",
    r".?+.*q_proj",
    r".{0,9}+.*q_proj",
    r".{,90}q_proj",
    r"x{a}|.*q_proj",
    r"x{|.*q_proj",
    r"x}|.*q_proj",
    r"[[:alpha:]]|.*q_proj",
    r"[a-c--b]|.*q_proj",
    r"[\w-z]|.*q_proj",
    r"(.)\1|.*q_proj",
    r"\x41|.*q_proj",
    r"é|.*q_proj",
]
# As people write them.
READ_ALIKE = [
    r".*q_proj",
    r"^.*\.(q_proj|v_proj)$",
    r"(?:.*?(?:self_attn|attn).*?(?:q_proj|k_proj)).*?",
    r"model\.layers\.[0-9]+\.self_attn\.q_proj",
    r"model\.layers\.(?:[0-9]|1[0-9])\.[\w.-]+q_proj",
    r"(model\.)?layers\.\d{1,2}\..*q_proj|.*\bq_proj",
    r"[^ ]*[-._a-z]q_proj",
    r".+?\.[^.]{9}\.q\_proj",
]


def test_cpp_refuses_a_pattern_that_it_would_read_otherwise(llama: Path, program: Path, tmp_path: Path) -> None:
    words = "target_modules: wanted a regular expression that std::regex reads as Python does; got "
    wanted = {
        _wrong(tmp_path / str(at), target_modules=pattern): words + pattern for at, pattern in enumerate(READ_OTHERWISE)
    }
    folder = _wrong(tmp_path / "ranks", rank_pattern={r"q_proj\Z": 4})
    _check_refusals(program, llama, wanted | {folder: "rank_pattern: wanted a regular expression"})


def test_cpp_takes_patterns_as_people_write_them(llama: Path, program: Path, tmp_path: Path) -> None:
    served = xlc.load_artifact(llama)
    for at, pattern in enumerate(READ_ALIKE):
        folder = _wrong(tmp_path / str(at), target_modules=pattern)
        try:
            served.load("a", folder)
            served.drop("a")
            taken = True
        except xlc.LoraError:
            taken = False
        status, said = serve_pt2.run_program(program, llama, [{"load": ["a", str(folder)]}], {"0.x": torch.ones(1)})
        assert (status == 0) == taken, f"{pattern}: {said}"
        assert "a regular expression" not in said, said


def damaged_copies(artifact: Path, copy: Path) -> Iterator[str]:
    """Write one copy after the other, each with a bit of one record changed; yields the record's name."""
    content = artifact.read_bytes()
    with zipfile.ZipFile(artifact) as archive:
        entries = archive.infolist()
    for entry in entries:
        names = sum(struct.unpack_from("<HH", content, entry.header_offset + 26))
        place = entry.header_offset + 30 + names + entry.file_size // 2
        copy.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        yield entry.filename


def test_cpp_says_which_part_of_an_artifact_is_damaged(tagger: Path, program: Path, tmp_path: Path) -> None:
    damaged, names = tmp_path / "damaged.pt2", set()
    for entry in damaged_copies(tagger, damaged):
        status, said = serve_pt2.run_program(program, damaged, [], {"0.x": torch.ones(1)})
        record = entry.split("/", 1)[1]
        assert (status, f"{record}: wanted the bytes that were written" in said) == (2, True), said
        names.add(Path(entry).name)
    wanted = {"weights.safetensors", "manifest.json", *(["native.so"] if DEVICE.type == "cpu" else [])}
    assert wanted <= names


def test_python_says_which_part_of_an_artifact_is_damaged(tagger: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pt2"
    for entry in damaged_copies(tagger, damaged):
        with pytest.raises(ArtifactError, match=f"CRC.*{re.escape(entry)}.*copy the file again"):
            xlc.load_artifact(damaged)


def test_cpp_refuses_a_file_that_is_no_artifact(tagger: Path, program: Path, tmp_path: Path) -> None:
    content = tagger.read_bytes()
    for name, part in {"text": b"no archive", "half": content[:10000], "less": content[:-3000], "empty": b""}.items():
        (tmp_path / f"{name}.pt2").write_bytes(part)
        status, said = serve_pt2.run_program(program, tmp_path / f"{name}.pt2", [], {"0.x": torch.ones(1)})
        assert (status, f"{name}.pt2: wanted a file that xlc.export wrote; got " in said) == (2, True), said


def test_cpp_refuses_steps_that_cannot_be_taken(llama: Path, program: Path, tmp_path: Path) -> None:
    folder = str(_wrong(tmp_path / "a"))
    tokens = tokens_for([None] * 3)
    steps = {
        "one of an adapter that is loaded": [{"load": ["a", folder]}, {"load": ["a", folder]}],
        "4, all taken": [{"load": [name, folder]} for name in "abcde"],
        "one that is loaded": [{"rows": ["a", None, None]}],
        "adapters: wanted one name for each sequence; got 2 for a batch of 3": [{"rows": [None, None]}],
        "a file that can be read": [{"load": ["a", str(tmp_path / "nowhere")]}],
    }
    for words, plan in steps.items():
        status, said = serve_pt2.run_program(program, llama, plan, {"0.input_ids": tokens})
        assert (status, words in said) == (2, True), said
    for wrong in (tokens.int(), tokens[:, :5].clone(), tokens[0]):
        status, said = serve_pt2.run_program(program, llama, [{"rows": [None] * 3}], {"0.input_ids": wrong})
        assert (status, "the dtype and shape that the manifest says" in said) == (2, True), said


def test_loads_get_their_turn_beside_calls_without_a_pause(
    tagger: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    source = Path(__file__).with_name("load_beside_calls.cpp")
    program = made_once(tmp_path_factory, source.stem, lambda path: serve_pt2.make_program(path, source))
    folder = save_plain_adapter(tmp_path / "a", {"hidden": ((4, 15), (20, 4)), "summary": ((4, 20), (5, 4))})
    inputs = {f"inputs.{name}": tensor.cpu() for name, tensor in tagger_inputs(3).items()}
    save_file(inputs, tmp_path / "inputs.safetensors")
    command = [program, tagger, folder, tmp_path / "inputs.safetensors"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)  # noqa: S603
    assert (done.returncode, "0 threads were done before, 0 wrong" in done.stdout) == (0, True), done


def test_an_adapter_saved_with_copies_of_the_embeddings_is_taken(llama: Path, program: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", model=serve_pt2.tiny_llama(), target_modules=["q_proj", "lm_head"])
    assert any("lora_" not in key for key in load_file(folder / "adapter_model.safetensors"))
    xlc.load_artifact(llama).load("a", folder)
    status, said = serve_pt2.run_program(program, llama, [{"load": ["a", str(folder)]}], {"0.x": torch.ones(1)})
    assert status == 0, said


def test_inputs_that_the_code_is_not_for_are_refused(tagger: Path) -> None:
    served = xlc.load_artifact(tagger)
    words, features = tagger_inputs(3).values()
    with pytest.raises(
        xlc.LoraError, match=r"adapters: wanted one name for each sequence; got 2 names for a batch of 3"
    ):
        served(words, features, adapters=[None, None])
    with pytest.raises(
        xlc.LoraError, match=rf"inputs.words: wanted a tensor of int64 on {DEVICE.type}; got torch.int32"
    ):
        served(words.int(), features, adapters=[None] * 3)
    with pytest.raises(xlc.LoraError, match=r"inputs.words: wanted shape \[.*, 6\].*; got \[3, 5\]"):
        served(words[:, :5], features, adapters=[None] * 3)
    with pytest.raises(xlc.LoraError, match=r"inputs.features: wanted shape .*; got \[2, 6, 3\] with .* = 3"):
        served(words, features[:2], adapters=[None] * 3)
    with pytest.raises(xlc.LoraError, match=r"wanted the inputs inputs.words, inputs.features; got 1 by position"):
        served(words, adapters=[None] * 3)
    with pytest.raises(xlc.LoraError, match="'nobody'"):
        served(words, features, adapters=["nobody", None, None])
    big = words.new_zeros(33, 6), features.new_zeros(33, 6, 3)
    with pytest.raises(xlc.LoraError, match=r"from \d to 32.*; got \[33, 6\]"):
        served(*big, adapters=[None] * 33)


def test_linear_layers_that_share_a_weight_are_served(program: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)).eval().requires_grad_(False).to(DEVICE)
    model[2].weight = model[0].weight
    bank = xlc.attach(model, slots=2, max_rank=4)
    shapes = ((2, 5), (5, 2))
    folder = save_plain_adapter(tmp_path / "a", {"0": shapes, "2": shapes}, r=2)
    file = xlc.export(model, tmp_path / "a.pt2", (torch.randn(3, 5, device=DEVICE),))
    served = xlc.load_artifact(file)
    x, rows = torch.randn(3, 5, device=DEVICE), ["a", None, "a"]
    bank.load("a", folder)
    served.load("a", folder)
    with torch.no_grad(), bank.use(rows):
        torch.testing.assert_close(served(x, adapters=rows), model(x))
    tensors = {"0.input": x, "0.output": served(x, adapters=rows)}
    plan: list[dict[str, Any]] = [{"load": ["a", str(folder)]}, {"rows": rows}]
    status, said = serve_pt2.run_program(program, file, plan, tensors)
    assert (status, "1 batches, 0 of 3 rows wrong" in said) == (0, True), said


def test_inputs_in_any_memory_are_taken(tagger: Path) -> None:
    served = xlc.load_artifact(tagger)
    words, features = tagger_inputs(3).values()
    wanted = served(words, features, adapters=[None] * 3)[0]
    turned = features.transpose(0, 2).contiguous().transpose(0, 2)
    assert not turned.is_contiguous()
    assert torch.equal(served(words, turned, adapters=[None] * 3)[0], wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "2.1.0"}, "one made with torch 2.1.0"),
        ({"package": "0.0.1"}, "one made with package 0.0.1"),
        ({"machine": "riscv64"}, "one made with machine riscv64"),
        ({"format": 99}, "one of format 99"),
        ({"instructions": ["avx9000"]}, "one that needs avx9000"),
        ({"capability": "1.3"}, "one made for the compute capability 1.3"),
    ],
    ids=["torch", "package", "machine", "format", "processor", "capability"],
)
def test_an_artifact_for_something_else_is_refused(
    tagger: Path, program: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    other = edited(tagger, tmp_path / "other.pt2", **change)
    with pytest.raises(xlc.LoraError, match=words):
        xlc.load_artifact(other)
    # C++ has no version of this package.
    if "package" not in change:
        status, said = serve_pt2.run_program(program, other, [], {"0.x": torch.ones(1)})
        assert (status, words in said) == (2, True), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is wanted")
def test_an_artifact_for_a_gpu_is_refused_where_there_is_none(tagger: Path, program: Path, tmp_path: Path) -> None:
    other = edited(tagger, tmp_path / "other.pt2", device="cuda", capability="9.0")
    with pytest.raises(xlc.LoraError, match=r"a device of this process; got one for cuda"):
        xlc.load_artifact(other)
    status, said = serve_pt2.run_program(program, other, [], {"0.x": torch.ones(1)})
    assert status == 2
    assert "cuda; got one that is linked without it" in said or "for cuda; got none" in said


@pytest.mark.parametrize(("made", "here"), [("9.0", "8.6"), (None, "9.0"), ("9.0", "9.0")])
def test_a_gpu_of_another_compute_capability_is_refused(
    monkeypatch: pytest.MonkeyPatch, made: str | None, here: str
) -> None:
    major, minor = map(int, here.split("."))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
    if made == here:
        manifest._check_device(Path("a.pt2"), "cuda", made)
        return
    with pytest.raises(xlc.LoraError, match=f"an artifact for the compute capability {here}; got one made for "):
        manifest._check_device(Path("a.pt2"), "cuda", made)


def test_a_file_that_is_no_artifact_is_refused(tmp_path: Path, tagger: Path) -> None:
    (tmp_path / "text.pt2").write_text("no archive")
    (tmp_path / "half.pt2").write_bytes(tagger.read_bytes()[:10000])
    for path in (tmp_path / "text.pt2", tmp_path / "half.pt2", tmp_path / "nothing.pt2"):
        with pytest.raises(xlc.LoraError, match=r"wanted a file that xlc\.export wrote"):
            xlc.load_artifact(path)


def test_a_file_may_be_loaded_by_several_at_once_and_go_away(tagger: Path, program: Path, tmp_path: Path) -> None:
    artifact, plan, tensors = (tmp_path / name for name in ("a.pt2", "plan.json", "tensors.safetensors"))
    artifact.write_bytes(tagger.read_bytes())
    folder = save_plain_adapter(tmp_path / "a", {"summary": ((4, 20), (5, 4))})
    inputs, rows = tagger_inputs(3), ["a", None, "a"]
    plan.write_text(json.dumps([{"load": ["a", str(folder)]}, {"rows": rows}]))
    save_file({f"0.inputs.{name}": tensor.cpu() for name, tensor in inputs.items()}, tensors)
    command = [str(part) for part in (program, artifact, plan, tensors)]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # noqa: S603
    served = xlc.load_artifact(artifact)
    for process in programs:
        said, _ = process.communicate()
        assert (process.returncode, "1 batches, 0 of 3 rows wrong" in said) == (0, True), said
    before = served(*inputs.values(), adapters=[None] * 3)[1]["summary"]
    artifact.unlink()
    served.load("a", folder)
    after = served(*inputs.values(), adapters=rows)[1]["summary"]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [False, True, False]


def test_slots_without_an_adapter_take_no_room_in_the_file(tagger: Path) -> None:
    said = manifest.Manifest.read(tagger)
    stacks = {stack.constant for module in said.modules.values() for stack in (module.a, module.b)}
    stored = manifest.read_weights(tagger, said)
    assert not stacks & stored.keys()
    assert {"model.words.weight", "model.mix.weight", "model.hidden.bias"} <= stored.keys()


def test_the_bank_of_an_artifact_is_a_bank(tagger: Path, tmp_path: Path) -> None:
    folder = save_plain_adapter(tmp_path / "a", {"summary": ((4, 20), (5, 4))})
    served = xlc.load_artifact(tagger)
    served.load("a", folder)
    assert served.names == ("a",)
    assert "inputs.words int64" in repr(served)
    with pytest.raises(xlc.LoraError, match="a name that is free"):
        served.load("a", folder)
    served.drop("a")
    with pytest.raises(xlc.LoraError, match="'a'"):
        served.drop("a")
