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

# What `bias` may be: the first is the default.
BIASES = ("none", "lora_only", "all")

# A string is a regular expression for the whole name; a list holds names, or their last parts.
Rule: TypeAlias = str | Collection[str]

MERGE = (
    "Let PEFT make a model of its own from it: PeftModel.from_pretrained(model, folder).merge_and_unload(); or train "
    "the adapter again without this."
)
SERVE_WITH_PEFT = (
    "Serve it with PEFT: PeftModel.from_pretrained(model, folder); or train the adapter again without this."
)

_CONVERT_KIND = (
    "Make LoRA of it, where PEFT can: xlc.convert(model, folder, out, rank), which says how close it comes. Or do this:"
)
_CONVERT = (
    "Where it was trained, save_pretrained(path_initial_model_for_weight_conversion=...) writes it as plain LoRA."
)
_TRAIN_AGAIN = "Train the adapter again with init_lora_weights=True."
# PEFT repeats the first two from the base weights as it loads an adapter; the others need the training's data.
_INITS = {"pissa": f"{MERGE} {_CONVERT}", "olora": f"{MERGE} {_CONVERT}", "corda": _CONVERT, "lora_ga": _CONVERT}
_UNKNOWN = (
    "PEFT 0.21 does not know it and ignores it. If it only says how the adapter was trained, remove it from "
    "adapter_config.json; if a newer PEFT gives it a meaning, serve the adapter with that PEFT."
)

# Kilobytes in practice; a list of every module of a large model is a megabyte.
_LARGEST_CONFIG = 16 * 2**20

_READ = {"peft_type", "target_modules", "exclude_modules", "r", "lora_alpha", "use_rslora", "ensure_weight_tying"}
_READ |= {"layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
# These say where the adapter came from or how it was trained, or refine a feature that is refused when it is on.
_WITHOUT_EFFECT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
_WITHOUT_EFFECT |= {"runtime_config", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
_WITHOUT_EFFECT |= {"megatron_core", "qalora_group_size"}
# PEFT ignores it for all modules but Conv1D, where it sets it itself; A and B have the same shapes either way.
_WITHOUT_EFFECT |= {"fan_in_fan_out"}
# Of ms-swift, and of PEFT before 0.3: dtypes and learning rates of the training, merging while evaluating.
_WITHOUT_EFFECT |= {"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "merge_weights"}
# What PEFT can merge into the weights of any model, and what it cannot, or not into all.
_MERGEABLE = {"use_bdlora", "kasa_config", "velora_config", "monteclora_config"}
_NOT_MERGEABLE = {"arrow_config", "layer_replication", "use_qalora"}
_NOT_MERGEABLE |= {"megatron_config"}
# What a bank takes that was made with room for it, and a file of `export` does not.
_IN_BANKS = {"target_parameters", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"}
_IN_BANKS |= {"alora_invocation_tokens"}
_MERGEABLE_TYPES = {"ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA", "HRA", "FOURIERFT"}
# The other initialisations (pissa, olora, corda, loftq, lora_ga) change the base weights too, so that the adapter is
# wrong on the plain model. PEFT sets the field back to true where it has converted such an adapter while saving it.
_INITS_THAT_LEAVE_THE_BASE_ALONE = {"gaussian", "eva", "orthogonal", "mica"}


def rules_for_readers() -> dict[str, list[str]]:
    """Return what a reader of configs in another language must know of their fields, beside the code below.

    `read`: fields with a meaning. `ignored`: those without. `inits`: values of `init_lora_weights` for plain adapters.
    `refused`: those that PEFT asks whether they are true.
    """
    return {
        "read": sorted(_READ),
        "ignored": sorted(_WITHOUT_EFFECT),
        "inits": sorted(_INITS_THAT_LEAVE_THE_BASE_ALONE),
        "refused": sorted(_MERGEABLE | _NOT_MERGEABLE | _IN_BANKS),
    }


def matches(rule: Rule, name: str) -> bool:
    """Whether a rule names the module: a string as a regular expression, a list by whole name or by last parts."""
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return name in rule or name.endswith(tuple([f".{part}" for part in rule]))


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
    """What an adapter targets and how strongly; every field is checked, and named as in PEFT.

    `part` is of our own: the name that the model has inside of the one that the adapter was trained on, or "".
    """

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] = ()
    target_parameters: tuple[str, ...] = ()
    alora_invocation_tokens: tuple[int, ...] = ()
    part: str = ""

    def targets(self, name: str, *, plain_linear: bool = True) -> bool:
        """Whether the adapter targets the module; see `is_targeted` for `plain_linear`."""
        name = self._full(name)
        if any(re.match(_saved_pattern(saved), name) for saved in self.modules_to_save):
            return False
        # PEFT takes the weight of a plain layer for that of one expert.
        if _names_parameter(self.target_parameters, f"{name}.weight"):
            return True
        if not is_targeted(name, self.target_modules, self.exclude_modules, plain_linear=plain_linear):
            return False
        # As in PEFT, a module that the list names in full is targeted in whatever layer it is.
        return not self.layers_to_transform or name in self.target_modules or self._in_chosen_layer(name)

    def targets_parameter(self, name: str) -> bool:
        """Whether the adapter targets the parameter by its own name: PEFT asks how names end, and nothing else."""
        return _names_parameter(self.target_parameters, self._full(name))

    def saves(self, name: str) -> bool:
        """Whether the adapter has weights of its own in the place of the module's: PEFT asks how names end."""
        parts = self._full(name).split(".")
        paths = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return any(path.endswith(saved) for saved in self.modules_to_save for path in paths)

    def rank(self, name: str) -> int:
        """Return the rank of the module's A and B."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, self._full(name)), self.r)

    def scaling(self, name: str) -> float:
        """Return what multiplies B @ A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, self._full(name)), self.lora_alpha)
        rank = self.rank(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _full(self, name: str) -> str:
        return f"{self.part}.{name}" if self.part else name

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
    if unsupported := dict(_unsupported(values)):
        got = ", ".join(f"{name if len(name) < 100 else shown(name)}={shown(values.get(name))}" for name in unsupported)
        remedies = " ".join(
            f"{', '.join(name for name, its in unsupported.items() if its == remedy)}: {remedy}"
            if len(set(unsupported.values())) > 1
            else remedy
            for remedy in dict.fromkeys(unsupported.values())
        )
        raise UnsupportedAdapterError(str(path), "a plain LoRA adapter", got, remedies)
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
        ensure_weight_tying=fields.switch("ensure_weight_tying"),
        use_dora=fields.switch("use_dora"),
        lora_bias=fields.switch("lora_bias"),
        bias=fields.choice("bias", BIASES),
        modules_to_save=fields.saved("modules_to_save"),
        trainable_token_indices=fields.tokens("trainable_token_indices"),
        target_parameters=fields.saved("target_parameters"),
        alora_invocation_tokens=fields.invocation("alora_invocation_tokens"),
    )
    if config.alora_invocation_tokens:
        _check_activated(path, config, values)
    if config.use_dora and config.lora_bias:
        raise fields.refusal("lora_bias", "false, where use_dora is true")
    if config.layers_to_transform and isinstance(config.target_modules, str):
        raise fields.refusal("layers_to_transform", "no layers, where target_modules is one string")
    if config.layers_pattern and not config.layers_to_transform:
        raise fields.refusal("layers_pattern", "no pattern, where layers_to_transform is not set")
    return config


def _check_activated(path: Path, config: AdapterConfig, values: Mapping[str, Any]) -> None:
    """Refuse an aLoRA that PEFT never activates, or that changes rows before its invocation, too.

    Raises:
        UnsupportedAdapterError: it is no language model's, or has more than A and B.
    """
    more = [name for name in sorted(_IN_BANKS) if getattr(config, name) and name != "alora_invocation_tokens"]
    got = [f"{name}={shown(values.get(name))}" for name in (*more, *(["bias"] if config.bias != "none" else []))]
    if values.get("task_type") != "CAUSAL_LM":
        got.append(f"task_type={values.get('task_type')!r}, with which PEFT does not look for the tokens")
    if got:
        wanted = "an aLoRA of A and B alone, with task_type='CAUSAL_LM'"
        raise UnsupportedAdapterError(str(path), wanted, ", ".join(got), SERVE_WITH_PEFT)


def check_is_plain(folder: Path, config: AdapterConfig) -> None:
    """Refuse what only a bank with room for it takes, as a file of `export` has to.

    Raises:
        UnsupportedAdapterError: the config names such a feature.
    """
    given = {name: getattr(config, name) for name in sorted(_IN_BANKS)}
    given["bias"] = config.bias if config.bias != "none" else ""
    if got := ", ".join(f"{name}={shown(value)}" for name, value in given.items() if value):
        remedy = "Serve it from Python: a bank of xlc.attach takes it, and a file of xlc.export does not."
        raise UnsupportedAdapterError(str(folder / CONFIG_FILE), "a plain LoRA adapter", got, remedy)


@dataclass(frozen=True)
class _Fields:
    """The fields that are read, each checked for what PEFT takes; bool is never taken for a number."""

    path: Path
    values: dict[str, Any]

    def refusal(self, name: str, wanted: str, got: object = None) -> AdapterFileError:
        got = self.values.get(name) if got is None else got
        remedy = "Write such a value into the field, or save the adapter again where it was trained."
        return AdapterFileError(f"{self.path}: {name}", wanted, shown(got), remedy)

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
        if not value or value is True:
            return bool(value)
        raise self.refusal(name, "true or false")

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.values.get(name)
        if not value:
            return choices[0]
        if isinstance(value, str) and value in choices:
            return value
        raise self.refusal(name, f"one of {', '.join(choices)}")

    def saved(self, name: str) -> tuple[str, ...]:
        names = self._tuple(name, str, "a list of names")
        for saved in names:
            self._check_pattern(name, saved, _saved_pattern(saved))
        # An empty name is the end of each.
        if "" in names:
            raise self.refusal(name, "names of modules")
        return names

    def tokens(self, name: str) -> tuple[int, ...]:
        """The tokens of one embedding; which one it is, the keys of the weights say, too."""
        value = self.values.get(name)
        if isinstance(value, dict):
            if len(value) > 1:
                raise self.refusal(name, "the tokens of one embedding")
            return _Fields(self.path, {name: next(iter(value.values()), None)}).tokens(name)
        tokens: tuple[int, ...] = self._tuple(name, int, "a list of tokens, or an object with one")
        if any(not 0 <= token < 2**31 for token in tokens) or len(set(tokens)) < len(tokens):
            raise self.refusal(name, "different tokens, from 0 on")
        return tokens

    def invocation(self, name: str) -> tuple[int, ...]:
        tokens: tuple[int, ...] = self._tuple(name, int, "a list of tokens")
        if any(not 0 <= token < 2**31 for token in tokens):
            raise self.refusal(name, "tokens, from 0 on")
        return tokens

    def _tuple(self, name: str, of: type, wanted: str) -> tuple[Any, ...]:
        value = self.values.get(name)
        value = [] if not value and type(value) is not int else value
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


def _unsupported(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field that asks for something else than plain LoRA, with what can be done about it."""
    for name, value in {"peft_type": None, "target_modules": None, **values}.items():
        if name == "peft_type":
            if value != "LORA":
                merges = isinstance(value, str) and value in _MERGEABLE_TYPES
                yield name, f"{_CONVERT_KIND} {MERGE if merges else SERVE_WITH_PEFT}"
        elif name == "target_modules":
            # PEFT would look the modules up by the model's architecture; its own files hold them resolved.
            if value is None and not values.get("target_parameters"):
                yield name, "Write a list of the modules' names, as the keys of the weights name them, into the field."
        elif name == "init_lora_weights":
            known = isinstance(value, str) and value.lower() in _INITS_THAT_LEAVE_THE_BASE_ALONE
            if value and value is not True and not known:
                method = value.lower() if isinstance(value, str) else ""
                yield name, next((remedy for start, remedy in _INITS.items() if method.startswith(start)), _TRAIN_AGAIN)
        elif name in _MERGEABLE or name in _NOT_MERGEABLE:
            # PEFT asks whether they are true.
            if value:
                yield name, MERGE if name in _MERGEABLE else SERVE_WITH_PEFT
        elif not (name in _READ or name in _IN_BANKS or name in _WITHOUT_EFFECT or _is_unset(value)):
            yield name, _UNKNOWN


def _is_unset(value: object) -> bool:
    """Whether a field that PEFT does not know says nothing: trainers write those of their own with empty values."""
    if isinstance(value, str):
        return value.lower() in ("", "none", "null")
    if isinstance(value, dict | list):
        return all(_is_unset(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None or value is False


def _names_parameter(targets: Collection[str], name: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _name_pattern(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _saved_pattern(name: str) -> str:
    return rf"(^|.*\.){name}($|\..*)"


def _layer_pattern(pattern: str | None) -> str:
    # Lazy, so that the first number counts: an expert's number in "layers.1.experts.0" is not the layer's.
    return r".*?\.[^.]*\.(?P<idx>\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _first_match(patterns: Mapping[str, object], name: str) -> str:
    return next((key for key in patterns if re.match(_name_pattern(key), name)), name)
