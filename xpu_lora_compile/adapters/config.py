"""`adapter_config.json`, read as PEFT reads it: which modules the adapter targets, with which rank and scaling.

`is_targeted` is the one rule for `target_modules` and `exclude_modules`, of adapters and of `attach` alike. A field
that would change what the adapter computes, in a way that this package does not have, is refused; so is a field that
nobody here knows, if it is set, since a newer PEFT may have given it a meaning.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from xpu_lora_compile.adapters.files import regular_file, shown
from xpu_lora_compile.errors import AdapterFileError, UnsupportedAdapterError

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"

# A string is a regular expression for the whole name; a list holds names, or their last parts.
Rule: TypeAlias = str | Collection[str]

# Kilobytes in practice; a list of every module of a large model is a megabyte.
_LARGEST_CONFIG = 16 * 2**20

_READ = {"peft_type", "target_modules", "exclude_modules", "r", "lora_alpha", "use_rslora"}
_READ |= {"layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
# These say where the adapter came from or how it was trained, or refine a feature that is refused when it is on.
_WITHOUT_EFFECT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
_WITHOUT_EFFECT |= {"runtime_config", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
_WITHOUT_EFFECT |= {"megatron_core", "qalora_group_size"}
# The other initialisations (pissa, olora, corda, loftq, lora_ga) change the base weights too, so that the adapter is
# wrong on the plain model. PEFT sets the field back to true where it has converted such an adapter while saving it.
_INITS_THAT_LEAVE_THE_BASE_ALONE = {"gaussian", "eva", "orthogonal", "mica"}


def matches(rule: Rule, name: str) -> bool:
    """Whether a rule names the module: a string as a regular expression, a list by whole name or by last parts."""
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == part or name.endswith(f".{part}") for part in rule)


def is_targeted(name: str, target_modules: Rule, exclude_modules: Rule = (), *, plain_linear: bool = True) -> bool:
    """Whether PEFT would put LoRA on the module.

    Args:
        name: the module's name in the base model.
        target_modules: the rule; "all-linear", in any case, stands for every linear layer but the output embedding.
        exclude_modules: the rule for exceptions, in which "all-linear" means nothing special.
        plain_linear: whether the module is a linear layer other than the output embedding; only "all-linear" asks.
    """
    if exclude_modules and matches(exclude_modules, name):
        return False
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return plain_linear
    return matches(target_modules, name)


def pattern_problem(pattern: str) -> str | None:
    """Say what is wrong with a regular expression, or None where it compiles."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter targets and how strongly; every field is checked, and named as in PEFT."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def targets(self, name: str, *, plain_linear: bool = True) -> bool:
        """Whether the adapter targets the module; see `is_targeted` for `plain_linear`."""
        if not is_targeted(name, self.target_modules, self.exclude_modules, plain_linear=plain_linear):
            return False
        # As in PEFT, a module that the list names in full is targeted in whatever layer it is.
        return not self.layers_to_transform or name in self.target_modules or self._in_chosen_layer(name)

    def rank(self, name: str) -> int:
        """Return the rank of the module's A and B."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, name), self.r)

    def scaling(self, name: str) -> float:
        """Return what multiplies B @ A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, name), self.lora_alpha)
        rank = self.rank(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _in_chosen_layer(self, name: str) -> bool:
        for pattern in map(_layer_pattern, self.layers_pattern or (None,)):
            if match := re.match(pattern, name):
                index = match["idx"]
                # A hostile name may hold more digits than int() takes.
                return index is not None and len(index) < 10 and int(index) in self.layers_to_transform
        return False


def read_config(folder: Path) -> AdapterConfig:
    """Read and check the config of a PEFT folder.

    Raises:
        AdapterFileError: the file is missing or malformed, or a field has a value that PEFT does not take.
        UnsupportedAdapterError: the adapter uses features that this package does not have; all of them are named.
    """
    path = folder / CONFIG_FILE
    values = _read_object(path)
    if unsupported := list(_unsupported(values)):
        raise UnsupportedAdapterError(
            str(path),
            "a plain LoRA adapter",
            ", ".join(unsupported),
            "Merge this adapter into its model with PEFT's merge_and_unload(), or train it without these options.",
        )
    fields = _Fields(path, values)
    config = AdapterConfig(
        target_modules=fields.rule("target_modules"),
        exclude_modules=fields.rule("exclude_modules"),
        r=fields.rank("r", values.get("r", AdapterConfig.r)),
        lora_alpha=fields.number("lora_alpha", values.get("lora_alpha", AdapterConfig.lora_alpha)),
        use_rslora=fields.switch("use_rslora"),
        layers_to_transform=fields.layers("layers_to_transform"),
        layers_pattern=fields.layer_patterns("layers_pattern"),
        rank_pattern={key: fields.rank(f"rank_pattern[{key!r}]", value) for key, value in fields.items("rank_pattern")},
        alpha_pattern={
            key: fields.number(f"alpha_pattern[{key!r}]", value) for key, value in fields.items("alpha_pattern")
        },
    )
    if config.layers_to_transform and isinstance(config.target_modules, str):
        raise fields.refusal("layers_to_transform", "no layers, where target_modules is one string")
    if config.layers_pattern and not config.layers_to_transform:
        raise fields.refusal("layers_pattern", "no pattern, where layers_to_transform is not set")
    return config


@dataclass(frozen=True)
class _Fields:
    """The fields that are read, each checked for what PEFT takes; bool is never taken for a number."""

    path: Path
    values: dict[str, Any]

    def refusal(self, name: str, wanted: str, got: object = None) -> AdapterFileError:
        got = self.values.get(name) if got is None else got
        return AdapterFileError(f"{self.path}: {name}", wanted, shown(got), "Save the adapter again with PEFT.")

    def rule(self, name: str) -> str | tuple[str, ...]:
        value = self.values.get(name)
        if isinstance(value, str):
            self._check_pattern(name, value, value)
            return value
        return self._tuple(name, str, "a list of names, or a regular expression")

    def layers(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        return (value,) if type(value) is int else self._tuple(name, int, "an integer, or a list of integers")

    def layer_patterns(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name)
        patterns = (value,) if isinstance(value, str) and value else self._tuple(name, str, "a name or a list of names")
        for pattern in patterns:
            self._check_pattern(name, pattern, _layer_pattern(pattern))
        return patterns

    def items(self, name: str) -> Iterator[tuple[str, object]]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, "an object of names and numbers")
        for key, item in (value or {}).items():
            self._check_pattern(name, key, _name_pattern(key))
            yield key, item

    def rank(self, name: str, value: object) -> int:
        if type(value) is int and 0 < value < 2**31:
            return value
        raise self.refusal(name, "an integer of at least 1", value)

    def number(self, name: str, value: object) -> float:
        # An int compares with a float exactly, however long it is; a NaN compares with nothing.
        if type(value) in (int, float) and -1e300 < value < 1e300:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        raise self.refusal(name, "a finite number", value)

    def switch(self, name: str) -> bool:
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.refusal(name, "true or false")

    def _tuple(self, name: str, of: type, wanted: str) -> tuple[Any, ...]:
        value = self.values.get(name)
        value = [] if value in (None, "") else value
        if isinstance(value, list) and all(type(item) is of for item in value):
            return tuple(value)
        raise self.refusal(name, wanted)

    def _check_pattern(self, name: str, written: str, used: str) -> None:
        if problem := pattern_problem(used):
            raise self.refusal(name, "a regular expression", f"{written} ({problem})")


def _read_object(path: Path) -> dict[str, Any]:
    remedy = "Give the folder that PEFT's save_pretrained() wrote; for an adapter with a name, the folder of that name."
    size = regular_file(path, remedy).st_size
    if size > _LARGEST_CONFIG:
        raise AdapterFileError(str(path), f"at most {_LARGEST_CONFIG} bytes", f"{size}", remedy)
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(str(path), "JSON", str(error), remedy) from error
    if not isinstance(values, dict):
        raise AdapterFileError(str(path), "a JSON object", shown(values), remedy)
    return values


def _unsupported(values: dict[str, Any]) -> Iterator[str]:
    for name, value in {"peft_type": None, "target_modules": None, **values}.items():
        unset = value is None or value is False or value == [] or value == {}
        if name == "peft_type":
            accepted = value == "LORA"
        elif name == "target_modules":
            # PEFT would look the modules up by the model's architecture; its own files hold them resolved.
            accepted = value is not None
        elif name == "bias":
            accepted = unset or value == "none"
        elif name == "init_lora_weights":
            known = isinstance(value, str) and value.lower() in _INITS_THAT_LEAVE_THE_BASE_ALONE
            accepted = unset or value is True or known
        else:
            accepted = unset or name in _READ or name in _WITHOUT_EFFECT
        if not accepted:
            yield f"{name if len(name) < 100 else shown(name)}={shown(value)}"


def _name_pattern(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _layer_pattern(pattern: str | None) -> str:
    # Lazy, so that the first number counts: an expert's number in "layers.1.experts.0" is not the layer's.
    return r".*?\.[^.]*\.(?P<idx>\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _first_match(patterns: Mapping[str, object], name: str) -> str:
    return next((key for key in patterns if re.match(_name_pattern(key), name)), name)
