"""Which module of a model each key of a checkpoint means.

    base_model.model.<module>.lora_A.weight                         as PEFT writes it
    _orig_mod.base_model.model.module.<module>.lora_A.weight        saved from inside wrappers
    base_model.model.<module>.lora_A.default.weight                 with the adapter's name, as in a live model
    base_model.model.<former name of the module>.lora_A.weight      saved by an older version of transformers

A spelling counts where it leads to a module that the model has. The rules for former names are those of the model's own
library, as PEFT applies them; a model of another library has none.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

from torch import Tensor, nn

PREFIX = "base_model.model."

# Parts of a module's LoRA beside A and B: the bias of B, and the row norms of DoRA.
LORA_BIAS, MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
# Rows of an embedding that an adapter has in the place of the model's.
ROWS_OF_TOKENS = "trainable_tokens_delta"

# What torch.compile, FSDP, checkpoint_wrapper and Lightning put into names. DDP's "module" may be a name of the user's.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
_WRAPPED = re.compile("|".join(sorted(_WRAPPERS)))
_DDP = "module"

# A name longer than this belongs to no module, and would be slow to match against the rules.
_LONGEST_NAME = 1000
_LORA_KEY = re.compile(
    rf"(?P<module>.{{1,{_LONGEST_NAME}}}?)\."
    r"(?:(?P<linear>lora_[AB])(?:\.(?P<of_linear>[^.]+))?\.weight|(?P<embedding>lora_embedding_[AB])(?:\.(?P<of_table>[^.]+))?"
    rf"|lora_B(?:\.(?P<of_bias>[^.]+))?\.(?P<bias>bias)"
    rf"|(?P<magnitude>{MAGNITUDE})(?:\.(?P<of_magnitude>(?!weight$)[^.]+))?(?:\.weight)?)"
)
_BASE_LAYER = re.compile(r"(^|\.)base_layer\.")


def plain_name(name: str) -> str:
    """Return the name without what wrappers put into it."""
    if not _WRAPPED.search(name):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class Key:
    """A key of a checkpoint, taken apart.

    Args:
        module: the name of the module, as the file spells it.
        part: which tensor of the module: `lora_A.weight`, `lora_embedding_A`, `lora_B.bias`, `lora_magnitude_vector`,
            or a parameter such as `bias`.
        is_lora: whether the part is of LoRA, and no parameter of the base model's.
        adapter: the adapter's name inside the key, or None.
        has_prefix: whether PEFT's prefix stands before the module's name.
    """

    module: str
    part: str
    is_lora: bool
    adapter: str | None
    has_prefix: bool


def parse_key(key: str) -> Key:
    """Take a key apart; every key has a module and a part, which may be empty."""
    return _parse_again(key) if len(key) <= _LONGEST_NAME else _parse(key)


def _parse(key: str) -> Key:
    name = plain_name(key)
    while name.startswith(f"{_DDP}."):
        if PREFIX not in name:
            break
        name = name.removeprefix(f"{_DDP}.")
    has_prefix = name.startswith(PREFIX)
    name = name.removeprefix(PREFIX)
    if match := _LORA_KEY.fullmatch(name):
        linear = match["linear"] and f"{match['linear']}.weight"
        part = linear or match["embedding"] or match["magnitude"] or LORA_BIAS
        adapter = next(filter(None, (match[of] for of in ("of_linear", "of_table", "of_bias", "of_magnitude"))), None)
        return Key(match["module"], part, True, adapter, has_prefix)
    module, _, part = _BASE_LAYER.sub(r"\1", name.replace(".token_adapter.", ".")).rpartition(".")
    return Key(module, part, False, None, has_prefix)


# The adapters of a model have the same keys.
_parse_again = lru_cache(maxsize=2**13)(_parse)


class Host(Protocol):
    """A kind of module that can carry LoRA, as far as errors speak of it; `layers.HOSTS` has all of them."""

    name: str

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Whether modules of exactly this class are of this kind."""

    def parameter_sites(self, module: nn.Module) -> Mapping[str, Any]:
        """The sizes of parameters of a module that carry LoRA each for themselves, by name."""


class _Values(Mapping[str, Tensor]):
    """Parameters and buffers of a model, by plain name; found when one is asked for, since most adapters name none."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @cached_property
    def _found(self) -> dict[str, Tensor]:
        model = self._model
        values = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {plain_name(name): value for name, value in values}

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter is for, as far as its files name parts of it.

    Args:
        modules: the class of each module, by the module's plain name.
        hosts: the kinds of modules that can carry LoRA.
        parameters: parameters and buffers, by plain name.
        output_embedding: the name of the layer that makes the logits, where the model says which it is.
        tied: names of modules that share their weight with an embedding, one set for each embedding.
        prefix: the name under which a larger model holds one like this: "model" for a LlamaModel.
        old_rules: patterns and replacements for names of former times; models of transformers 4.52 to 4.57 have them.
        parameter_sites: the sizes of parameters that carry LoRA each for themselves, as those of experts do.
        rename: the name of today for one of former times, by transformers 5; None where it has no rules for the model.
            With rules PEFT also takes keys without `base_model.model.`.
    """

    modules: Mapping[str, type[nn.Module]]
    hosts: Sequence[Host]
    parameters: Mapping[str, Tensor]
    output_embedding: str | None = None
    tied: tuple[frozenset[str], ...] = ()
    prefix: str = ""
    old_rules: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] | None = None
    parameter_sites: Mapping[str, Any] = field(default_factory=dict)
    # By the module and the prefix of a key, as A and B of a module have them in common.
    _found: dict[tuple[str, bool], str | None] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module, hosts: Sequence[Host]) -> BaseModel:
        """Describe a model, which may hold wrapped modules."""
        modules = {plain_name(name): module for name, module in model.named_modules()}
        prefix = getattr(model, "base_model_prefix", "")
        rename = _rules_of_transformers_5(model)
        head = output_embedding(model)
        return cls(
            output_embedding=next((name for name, module in modules.items() if module is head), None),
            hosts=hosts,
            modules={name: type(module) for name, module in modules.items()},
            parameters=_Values(model),
            tied=tuple(_tied(modules)),
            prefix=prefix if isinstance(prefix, str) else "",
            old_rules=_rules_of_transformers_4(model),
            rename=rename,
            parameter_sites={
                f"{name}.{parameter}": site
                for name, module in modules.items()
                for host in hosts
                for parameter, site in host.parameter_sites(module).items()
            },
        )

    def module_of(self, key: Key) -> str | None:
        """Return the name of the module that the key means, or None where the model has no such module."""
        if not key.has_prefix and self.rename is None:
            return None
        asked = key.module, key.has_prefix
        if asked not in self._found:
            self._found[asked] = next((name for name in self._spellings(key) if name in self.modules), None)
        return self._found[asked]

    def part_of(self, keys: Iterable[Key]) -> str:
        """Return the name of this model inside of the one that the keys are of, or "" where they are of this one."""
        whole = f"{self.prefix}."
        for key in keys if self.prefix else ():
            name = self.module_of(key)
            if name is not None and not name.startswith(whole) and key.module.endswith(whole + name):
                return self.prefix
        return ""

    def similar(self, name: str) -> str | None:
        """Return the one module whose name has most of its last parts in common with this name."""
        ends = [name.split(".")[start:] for start in range(min(name.count("."), 20) + 1)]
        for end in map(".".join, ends):
            alike = [other for other in self.modules if other == end or other.endswith(f".{end}")]
            if alike:
                return alike[0] if len(alike) == 1 else None
        return None

    def _spellings(self, key: Key) -> Iterator[str]:
        name = key.module
        if len(name) > _LONGEST_NAME:
            return
        for pattern, replacement in self.old_rules.items():
            renamed, times = re.subn(pattern, replacement, name)
            if times:
                # The first rule that matches, as in PEFT.
                name = renamed
                break
        yield name
        while name.startswith((PREFIX, f"{_DDP}.")):
            name = name.removeprefix(PREFIX).removeprefix(f"{_DDP}.")
        yield name
        yield ".".join(part for part in name.split(".") if part != _DDP)
        if self.rename is not None:
            renamed = self.rename(name)
            # PEFT takes a new name that is the end of the whole key for one that nothing but its prefix was cut from.
            if not (key.has_prefix and f"{PREFIX}{name}".endswith(renamed)):
                yield renamed
        if self.prefix and self.prefix not in self.modules:
            # An adapter of the whole model, where this is the part without the output embedding.
            yield name.removeprefix(f"{self.prefix}.")


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes the logits, where the model is a transformer that says so."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    return head if isinstance(head, nn.Module) else None


def _tied(modules: Mapping[str, nn.Module]) -> Iterator[frozenset[str]]:
    users: dict[int, set[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight") if isinstance(module, nn.Embedding | nn.Linear) else None
        if weight is not None:
            users.setdefault(id(weight), set()).add(name)
    for names in users.values():
        if len(names) > 1 and any(isinstance(modules[name], nn.Embedding) for name in names):
            yield frozenset(names)


def _rules_of_transformers_4(model: nn.Module) -> Mapping[str, str]:
    rules = getattr(model, "_checkpoint_conversion_mapping", None)
    return rules if isinstance(rules, Mapping) else {}


def _rules_of_transformers_5(model: nn.Module) -> Callable[[str], str] | None:
    """Renaming by the rules that transformers 5 itself applies to checkpoints, where it has some for the model."""
    library = sys.modules.get("transformers.conversion_mapping")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if library is None or model_type is None or library.get_checkpoint_conversion_mapping(model_type) is None:
        return None
    # Rules that also change values, such as those for experts, are another class.
    rules = [rule for rule in library.get_model_conversion_mapping(model) if isinstance(rule, library.WeightRenaming)]
    ending = ".lora_A.default.weight"

    def rename(name: str) -> str:
        for rule in rules:
            renamed, _ = rule.rename_source_key(name + ending)
            # A rule for a key that LoRA does not have.
            name = renamed.removesuffix(ending) if renamed.endswith(ending) else name
        return name

    return rename
