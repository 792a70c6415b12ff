"""`read_config` against PEFT: the same targets, ranks and scalings, and nothing ignored that PEFT would apply."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from support.peft_folders import CASES, edit_config, loaded_by_peft, lora_layers, save_adapter
from torch import nn

from xpu_lora_compile.adapters.config import (
    CONFIG_FILE,
    AdapterConfig,
    is_targeted,
    matches,
    pattern_problem,
    read_config,
)
from xpu_lora_compile.errors import AdapterError, AdapterFileError, UnsupportedAdapterError

PLAIN = {"peft_type": "LORA", "target_modules": ["q_proj"]}


def written(folder: Path, **fields: Any) -> Path:
    (folder / CONFIG_FILE).write_text(json.dumps({**PLAIN, **fields}))
    return folder


def assert_as_peft(folder: Path) -> None:
    """Compare every module of the model with what PEFT makes of the same folder."""
    config, peft_model = read_config(folder), loaded_by_peft(folder)
    layers, model = lora_layers(peft_model), peft_model.base_model.model
    names = {name.replace(".base_layer", "") for name, _ in model.named_modules() if name and ".lora_" not in name}
    assert layers
    for name in names:
        base = getattr(model.get_submodule(name), "base_layer", model.get_submodule(name))
        plain_linear = isinstance(base, nn.Linear) and name != "lm_head"
        assert config.targets(name, plain_linear=plain_linear) == (name in layers), name
    for name, layer in layers.items():
        assert (config.rank(name), config.scaling(name)) == (layer.r["default"], layer.scaling["default"]), name


@pytest.mark.parametrize("case", CASES)
def test_targets_ranks_and_scalings_are_those_of_peft(case: str, tmp_path: Path) -> None:
    assert_as_peft(save_adapter(tmp_path, **CASES[case]))


@pytest.mark.parametrize("rule", ["all-linear", "ALL-Linear"])
def test_all_linear_left_unresolved_in_the_file_covers_what_peft_covers(rule: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules="all-linear")
    edit_config(tmp_path, target_modules=rule, exclude_modules=["up_proj"])
    assert_as_peft(tmp_path)


def test_missing_rank_and_alpha_take_the_defaults_of_peft(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], r=8, lora_alpha=8)
    edit_config(tmp_path, r=..., lora_alpha=...)
    assert_as_peft(tmp_path)


def test_all_linear_means_nothing_special_among_exceptions() -> None:
    assert is_targeted("model.up_proj", "all-linear", "all-linear")


def test_a_list_matches_whole_names_and_last_parts_only() -> None:
    assert [matches(["up_proj"], name) for name in ("up_proj", "mlp.up_proj", "mlp.gate_up_proj")] == [
        True,
        True,
        False,
    ]


def test_a_string_is_a_pattern_for_the_whole_name() -> None:
    assert [matches(r".*\.q", name) for name in ("a.q", "a.q_proj", "q")] == [True, False, False]


PARTS = st.sampled_from(["layers", "h", "blocks", "0", "1", "12", "experts", "q", "v", "proj"])
NAMES = st.lists(PARTS, min_size=1, max_size=7).map(".".join)
RULES = st.lists(st.lists(PARTS, min_size=1, max_size=3).map(".".join), min_size=1, max_size=3)
REGEXES = st.sampled_from([r".*q", r".*\.(q|v)", "q|v", r"layers\.\d+\..*", r"(layers|h).*proj", "all", ""])
LAYER_PATTERNS = st.sampled_from([None, "", [], "layers", ["layers"], ["h", "layers"], "layers|h", r"la\w+", "experts"])


@settings(max_examples=400, deadline=None, database=None)
@given(
    NAMES,
    RULES,
    st.none() | RULES | REGEXES,
    st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12)),
    LAYER_PATTERNS,
)
def test_lists_with_layer_rules_target_what_peft_targets(
    tmp_path_factory: pytest.TempPathFactory, name: str, targets: Any, exclude: Any, layers: Any, pattern: Any
) -> None:
    if layers in (None, []):
        # PEFT refuses the first, and takes the second for no rule.
        pattern = None
    folder = tmp_path_factory.getbasetemp()
    fields = {"exclude_modules": exclude, "layers_to_transform": layers, "layers_pattern": pattern}
    config = read_config(written(folder, target_modules=targets, **fields))
    peft_config = LoraConfig(target_modules=targets, **fields)
    assert config.targets(name) == bool(check_target_module_exists(peft_config, name))


LAYERED_NAMES = [
    "model.layers.1.q",
    "model.h.1.q",
    "layers.1.q",
    "h.1.q",
    "model.layers.1.experts.0.q",
    "model.layers.0.experts.1.q",
    "model.layers.12.q",
    "model.layers.q",
    "model.1.q",
    "q",
]


@pytest.mark.parametrize("layers", [1, [0], [0, 12]], ids=str)
@pytest.mark.parametrize("pattern", [None, "", [], "layers", ["h", "layers"], "layers|h", r"la\w+", "experts"], ids=str)
def test_layer_rules_choose_the_layers_that_peft_chooses(layers: Any, pattern: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["q"], "layers_to_transform": layers, "layers_pattern": pattern}
    config, peft_config = read_config(written(tmp_path, **fields)), LoraConfig(**fields)
    chosen = {name for name in LAYERED_NAMES if check_target_module_exists(peft_config, name)}
    assert {name for name in LAYERED_NAMES if config.targets(name)} == chosen


@settings(max_examples=100, deadline=None, database=None)
@given(NAMES, REGEXES, st.none() | RULES | REGEXES)
def test_regexes_target_what_peft_targets(name: str, targets: str, exclude: Any) -> None:
    peft_config = LoraConfig(target_modules=targets, exclude_modules=exclude)
    assert is_targeted(name, targets, exclude or ()) == bool(check_target_module_exists(peft_config, name))


def test_a_name_with_endless_digits_is_in_no_layer() -> None:
    config = AdapterConfig(("q_proj",), layers_to_transform=(1,))
    assert not config.targets(f"model.layers.{'1' * 5000}.q_proj")


REFUSED: dict[str, Any] = {
    "peft_type": "LOHA",
    "target_modules": None,
    "layer_replication": [[0, 4], [2, 5]],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "velora_config": {"num_groups": 64},
    "monteclora_config": {"num_samples": 8},
    "megatron_config": {"hidden_size": 32},
    "a_feature_of_next_year": "on",
    "a_count_of_next_year": 0,
}


@pytest.mark.parametrize("field", REFUSED)
def test_an_unsupported_field_is_refused_with_its_value(field: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_config(written(tmp_path, **{field: REFUSED[field]}))
    assert caught.value.args[2].startswith(f"{field}=")


def test_every_field_that_peft_calls_a_variant_of_lora_is_refused_when_set(tmp_path: Path) -> None:
    for name, declared in LoraConfig.__dataclass_fields__.items():
        if declared.metadata.get("is_lora_variant"):
            # DoRA is a switch, and no value but true turns it on; aLoRA a list of tokens.
            taken = name in ("use_dora", "alora_invocation_tokens")
            with pytest.raises(AdapterFileError if taken else UnsupportedAdapterError, match=name):
                read_config(written(tmp_path, **{name: {"some": "value"}}))


def test_invocation_tokens_may_repeat_and_are_tokens(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, alora_invocation_tokens=[5, 9, 5], task_type="CAUSAL_LM"))
    assert config.alora_invocation_tokens == (5, 9, 5)
    # To PEFT this is plain LoRA.
    assert read_config(written(tmp_path, alora_invocation_tokens=[])).alora_invocation_tokens == ()
    with pytest.raises(AdapterFileError, match="tokens, from 0 on"):
        read_config(written(tmp_path, alora_invocation_tokens=[-1], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", "true", 1])
def test_an_initialisation_that_changes_the_base_weights_is_refused(method: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"init_lora_weights={method!r}"):
        read_config(written(tmp_path, init_lora_weights=method))


@pytest.mark.parametrize("method", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_weights_alone_is_fine(method: Any, tmp_path: Path) -> None:
    assert read_config(written(tmp_path, init_lora_weights=method)).r == 8


def test_all_unsupported_fields_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_config(written(tmp_path, use_qalora=True, arrow_config={"top_k": 3}))
    assert caught.value.args[2].startswith("use_qalora=True, arrow_config=")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "some"),
        ("bias", 1),
        ("use_dora", "yes"),
        ("lora_bias", 1),
        ("modules_to_save", "score"),
        ("modules_to_save", ["score", ""]),
        ("modules_to_save", ["("]),
        ("trainable_token_indices", 3),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", {"a": [1], "b": [2]}),
        ("trainable_token_indices", {"a": ["1"]}),
    ],
)
def test_a_value_that_peft_does_not_take_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=field):
        read_config(written(tmp_path, **{field: value}))


def test_dora_and_biases_of_b_exclude_each_other_as_in_peft(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="lora_bias"):
        read_config(written(tmp_path, use_dora=True, lora_bias=True))


def test_a_module_that_is_saved_is_not_targeted(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, target_modules=["dense", "score"], modules_to_save=["classifier", "score"]))
    names = ["encoder.dense", "classifier.dense", "score", "subclassifier.dense"]
    assert [config.targets(name) for name in names] == [True, False, False, True]
    # PEFT compares the ends of names, and not their parts.
    assert [config.saves(name) for name in names] == [False, True, True, True]


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_an_unknown_field_that_is_not_set_is_harmless(value: Any, tmp_path: Path) -> None:
    assert read_config(written(tmp_path, a_feature_of_next_year=value)) == AdapterConfig(("q_proj",))


def test_fields_about_training_and_origin_are_harmless(tmp_path: Path) -> None:
    origin = {"task_type": "CAUSAL_LM", "revision": "main", "inference_mode": True, "base_model_name_or_path": "x/y"}
    training = {"lora_dropout": 0.1, "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}}
    others = {
        "runtime_config": {"a": 1},
        "peft_version": "9",
        "auto_mapping": {"a": "b"},
        "megatron_core": "megatron.core",
    }
    assert read_config(written(tmp_path, **origin, **training, **others)) == AdapterConfig(("q_proj",))


MALFORMED: dict[str, dict[str, Any]] = {
    "r-string": {"r": "8"},
    "r-null": {"r": None},
    "r-zero": {"r": 0},
    "r-negative": {"r": -4},
    "r-float": {"r": 8.0},
    "r-true": {"r": True},
    "r-endless": {"r": 10**400},
    "lora_alpha-string": {"lora_alpha": "16"},
    "lora_alpha-true": {"lora_alpha": True},
    "lora_alpha-nan": {"lora_alpha": float("nan")},
    "lora_alpha-infinity": {"lora_alpha": float("inf")},
    "lora_alpha-endless": {"lora_alpha": 10**400},
    "use_rslora-string": {"use_rslora": "false"},
    "use_rslora-number": {"use_rslora": 1},
    "target_modules-number": {"target_modules": 3},
    "target_modules-of-numbers": {"target_modules": [3]},
    "target_modules-regex": {"target_modules": "(q_proj"},
    "target_modules-endless-repeat": {"target_modules": "a{99999999999999999999}"},
    "exclude_modules-number": {"exclude_modules": 3},
    "exclude_modules-regex": {"exclude_modules": "*q"},
    "layers_to_transform-true": {"layers_to_transform": True},
    "layers_to_transform-strings": {"layers_to_transform": ["1"]},
    "layers_to_transform-with-regex": {"layers_to_transform": [1], "target_modules": ".*q"},
    "layers_pattern-number": {"layers_pattern": 3, "layers_to_transform": [1]},
    "layers_pattern-regex": {"layers_pattern": "(", "layers_to_transform": [1]},
    "layers_pattern-taken-group": {"layers_pattern": "(?P<idx>h)", "layers_to_transform": [1]},
    "layers_pattern-alone": {"layers_pattern": "layers"},
    "rank_pattern-list": {"rank_pattern": ["q_proj"]},
    "rank_pattern-zero": {"rank_pattern": {"q_proj": 0}},
    "rank_pattern-true": {"rank_pattern": {"q_proj": True}},
    "rank_pattern-regex": {"rank_pattern": {"[q": 8}},
    "alpha_pattern-string": {"alpha_pattern": {"q_proj": "8"}},
    "alpha_pattern-regex": {"alpha_pattern": {"(?P<q": 8}},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_value_that_peft_does_not_take_is_refused_by_the_name_of_its_field(case: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read_config(written(tmp_path, **MALFORMED[case]))
    assert case.partition("-")[0] in caught.value.args[0]


CONTENTS = {
    "empty": b"",
    "not-json": b"{'r': 8}",
    "truncated": b'{"peft_type": "LORA", "r":',
    "list": b"[1]",
    "null": b"null",
    "not-text": b"\xff\x00\xfe",
    "nested-too-deeply": b"[" * 200_000,
    "number-too-long": b'{"r": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_is_no_json_object_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(CONTENTS[case])
    with pytest.raises(AdapterFileError, match=CONFIG_FILE):
        read_config(tmp_path)


def test_a_config_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / CONFIG_FILE).open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(AdapterFileError, match="at most 16777216 bytes"):
        read_config(tmp_path)


def test_a_missing_config_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=str(tmp_path / CONFIG_FILE)):
        read_config(tmp_path)


def test_a_directory_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).mkdir()
    with pytest.raises(AdapterFileError, match="a regular file"):
        read_config(tmp_path)


def test_a_pipe_in_its_place_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CONFIG_FILE)
    with pytest.raises(AdapterFileError, match="a regular file"):
        read_config(tmp_path)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).symlink_to(tmp_path / CONFIG_FILE)
    with pytest.raises(AdapterFileError, match="symbolic links"):
        read_config(tmp_path)


def test_a_folder_whose_name_no_system_takes_is_refused() -> None:
    with pytest.raises(AdapterFileError, match="null byte"):
        read_config(Path("nul\0"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted(LoraConfig.__dataclass_fields__)) | st.text(max_size=6)


@settings(max_examples=150, deadline=None, database=None)
@given(st.dictionaries(FIELDS, JSON, max_size=5))
def test_any_values_give_a_config_or_an_adapter_error(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    try:
        config = read_config(written(tmp_path_factory.getbasetemp(), **fields))
    except AdapterError:
        return
    assert isinstance(config.targets("model.layers.0.q_proj"), bool)
    assert isinstance(config.scaling("model.layers.0.q_proj"), float)


def test_a_pattern_that_compiles_has_no_problem() -> None:
    assert (pattern_problem("a|b"), pattern_problem("(")) == (None, "missing ), unterminated subpattern at position 0")
