"""`adapter_model.safetensors`, checked against the modules that it is for, as plain tensors with the scaling in B.

    names -> which module, and A or B -> shapes and dtypes, from the header -> `Checkpoint` -> values

Each step checks the whole file before the next begins, so that a wrong file is refused before its data is read. Nothing
here knows the bank: a load that fails has touched nothing. `staging` brings the values to the bank; `read_checkpoint`
gives them as plain tensors, for all who have time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xpu_lora_compile.adapters.config import MERGE, SERVE_WITH_PEFT, AdapterConfig
from xpu_lora_compile.adapters.experts import ExpertsPair, join, sort_experts
from xpu_lora_compile.adapters.files import TensorFile, few, opened_safetensors, reading, shown
from xpu_lora_compile.adapters.names import LORA_BIAS, MAGNITUDE, PREFIX, ROWS_OF_TOKENS, BaseModel, Key, parse_key
from xpu_lora_compile.errors import (
    AdapterShapeError,
    NonFiniteWeightError,
    RankError,
    UnmatchedTensorError,
    UnsupportedAdapterError,
)

WEIGHTS_FILE = "adapter_model.safetensors"

# As safetensors calls them.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PARTS = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}
# What a module may have room for besides A and B: see `layers.extras`.
SCALE, SHIFT, HEAD, TOKENS = "scale", "shift", "head", "tokens"
_EXPERT = re.compile(r"(.*\.)?experts\.\d+\..*")
_BASE_VALUES_AT_ONCE = 2**22

_SAVE_AGAIN = "Save the adapter again with PEFT's save_pretrained()."
_DIVERGED = "The training diverged, or the file is damaged: use an earlier checkpoint."
_GATHER = "Use the base model it was trained on; if it was trained in shards (ZeRO-3, FSDP), gather before saving."
_NOT_USED = "adapter_config.json does not account for them, so PEFT would not use them."
_REWRITE = "read the file with safetensors.torch.load_file(), and write it with save_file()."


@dataclass(frozen=True)
class ModuleSizes:
    """A module that carries LoRA, as far as an adapter must fit it.

    Args:
        kind: a linear layer; an embedding, where A is looked up by token; or a parameter with the weights of experts.
        in_features: D; for an embedding, the rows of the table that LoRA covers.
        out_features: W, the rows of B in the bank.
        padded: whether an adapter may have fewer rows along the vocabulary (lm_head, embedding).
        room: what each slot has besides A and B: `SCALE`, for DoRA; `SHIFT`, for biases; `HEAD`, for its own weight;
            `TOKENS`, for rows of some tokens.
        experts: E, where it is a parameter of experts.
        swaps: whether PEFT's A is of what the experts give, and B of what they take.
        by_name: whether "all-linear" leaves it out.
        kernel: of a convolution, kh and kw; D is then C * kh * kw.
        most_rank: R of its pages in the bank, where that is known.
        halves: how the rows of gate and up lie in it, "one after the other" or "in turn"; or "" where it has one alone.
    """

    kind: Literal["linear", "embedding", "experts"]
    in_features: int
    out_features: int
    padded: bool
    room: frozenset[str] = frozenset()
    experts: int = 0
    halves: str = ""
    swaps: bool = False
    by_name: bool = False
    kernel: tuple[int, ...] = ()
    most_rank: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether "all-linear" covers it: PEFT leaves out the output embedding, the one along the vocabulary."""
        return self.kind == "linear" and not self.padded and not self.by_name

    @property
    def has_tokens(self) -> bool:
        """Whether its rows are tokens, of which an aLoRA changes some: PEFT has it on linear layers alone."""
        return self.kind == "linear" and not self.by_name

    def shapes_in_file(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B as PEFT writes them, of a linear layer or a convolution."""
        channels, ones = self.in_features // math.prod(self.kernel), (1,) * len(self.kernel)
        return (rank, channels, *self.kernel), (self.out_features, rank, *ones)


@dataclass(frozen=True)
class LoraWeights:
    """The weights of one module, float32 on the CPU: `delta = b @ a`, with the scaling already in b.

    Args:
        a: `[r, D]`; for an embedding `[r, V]`, a column for each token.
        b: `[W, r]`.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Pair:
    """A and B of one module in the file, their sizes checked.

    Args:
        key_a: the name of A in the file.
        key_b: the name of B.
        shape_a: `[r, D]`; for an embedding `[r, V]`, a column for each token.
        shape_b: `[W, r]`.
        scaling: what B is still to be multiplied by, in float32.
    """

    key_a: str
    key_b: str
    shape_a: tuple[int, int]
    shape_b: tuple[int, int]
    scaling: float

    @property
    def rank(self) -> int:
        """The rank of the module's A and B."""
        return self.shape_a[0]


@dataclass(frozen=True)
class Extras:
    """What the file has of one module besides A and B: the names of tensors whose sizes are checked, or None.

    Args:
        magnitude: of DoRA, `[W]`.
        lora_bias: what B adds, `[W]`, to be multiplied by the scaling.
        bias: in the place of the module's, of its shape.
        weight: in the place of the module's, of its shape.
        token_rows: in the place of the rows of the tokens, `[n, D]`.
        tokens: n of them.
    """

    magnitude: str | None = None
    lora_bias: str | None = None
    bias: str | None = None
    weight: str | None = None
    token_rows: str | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A file that is open, of which all has been checked but the values.

    Args:
        file: the file.
        pairs: the A and B of each module that the adapter has LoRA on, by the module's name.
        extras: what it has of modules besides.
        experts: LoRA on parameters with the weights of experts, by the parameter's name.
    """

    file: TensorFile
    pairs: Mapping[str, Pair]
    extras: Mapping[str, Extras] = field(default_factory=dict)
    experts: Mapping[str, ExpertsPair] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The highest rank of all modules."""
        ranks = [pair.rank for pair in self.pairs.values()] + [pair.rank for pair in self.experts.values()]
        return max(ranks, default=0)

    def tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """A or B, which may be the file itself, mapped into memory: to be read only, and copied soon."""
        return self.file.tensor(key, DTYPES[self.file.dtype(key)]).view(shape)

    def read(self, name: str, dtype: torch.dtype) -> LoraWeights:
        """Read the weights of one module.

        Raises:
            AdapterFileError: the file cannot be read.
            NonFiniteWeightError: a weight is NaN, infinite, or infinite once it is scaled and stored in `dtype`.
        """
        pair = self.pairs[name]
        return LoraWeights(
            self._read_finite(pair.key_a, pair.shape_a, 1.0, dtype),
            self._read_finite(pair.key_b, pair.shape_b, pair.scaling, dtype),
        )

    def read_experts(self, name: str, dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor]:
        """Read the weights of one parameter with those of all experts, as `experts.join`.

        Raises:
            AdapterFileError: the file cannot be read.
            NonFiniteWeightError: as `read`.
        """

        def read(key: str, shape: tuple[int, ...], scaling: float) -> Tensor:
            return self._read_finite(key, shape, scaling, dtype)

        return join(self.experts[name], read)

    def read_extra(self, key: str, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
        """Read a tensor of `extras`, on the CPU: a copy in this dtype.

        Raises:
            AdapterFileError: the file cannot be read.
            NonFiniteWeightError: a value is NaN, infinite, or infinite once it is scaled and stored in `dtype`.
        """
        return self._read_finite(key, tuple(self.file.shape(key)), scaling, dtype).to(dtype)

    def _read_finite(self, key: str, shape: tuple[int, ...], scaling: float, dtype: torch.dtype) -> Tensor:
        tensor = self.tensor(key, shape).to("cpu", torch.float32, copy=True)
        where = f"{self.file.path}: {key}"
        if not are_finite(tensor):
            raise NonFiniteWeightError(where, "finite values", "NaN or infinity", _DIVERGED)
        tensor *= scaling
        if not are_finite(tensor.to(dtype)):
            got = f"infinity in {dtype} after scaling by {scaling:g}"
            remedy = "Use a bank with a wider dtype, such as torch.bfloat16, or train with a smaller lora_alpha."
            raise NonFiniteWeightError(where, f"values that {dtype} can hold", got, remedy)
        return tensor


def read_checkpoint(
    folder: Path,
    config: AdapterConfig,
    sites: Mapping[str, ModuleSizes],
    base: BaseModel,
    max_rank: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, LoraWeights]:
    """Read the weights of a PEFT folder, for every site that the config targets.

    Args:
        folder: as `opened_checkpoint`, and so are the others.
        config: of the adapter.
        sites: of the bank.
        base: the model.
        max_rank: of the bank.
        dtype: the bank's dtype, in which no weight may become infinite.

    Raises:
        AdapterError: as `opened_checkpoint` and `Checkpoint.read`.
    """
    with opened_checkpoint(folder, config, sites, base, max_rank) as checkpoint:
        return {name: checkpoint.read(name, dtype) for name in checkpoint.pairs}


@contextmanager
def opened_checkpoint(
    folder: Path | TensorFile, config: AdapterConfig, sites: Mapping[str, ModuleSizes], base: BaseModel, max_rank: int
) -> Iterator[Checkpoint]:
    """Open the weights of a PEFT folder, for every site that the config targets.

    Args:
        folder: what PEFT's `save_pretrained` wrote; or the tensors of an adapter, by the names that PEFT would write.
        config: the config of the same adapter.
        sites: the modules that the bank covers, by name.
        base: the model. PEFT saves copies of its embedding and lm_head along with an adapter on these modules, and
            trainers add others; a copy that equals the first rows of the model's own is ignored.
        max_rank: the highest rank that the bank has room for.

    Raises:
        AdapterFileError: the file is missing, unreadable, truncated or malformed.
        RankError: a module's rank is above `max_rank`.
        UnmatchedTensorError: a tensor belongs to no site that is targeted, or such a site lacks a tensor.
        UnsupportedAdapterError: the file holds another weight of the base model than the model's own, or something else
            for which the sites have no room.
        AdapterShapeError: a tensor has another shape or dtype than its module takes.
    """
    path = folder / WEIGHTS_FILE if isinstance(folder, Path) else folder.path
    parameters = {name: site for name, site in sites.items() if site.kind == "experts"}
    sites = {name: site for name, site in sites.items() if site.kind != "experts"}
    targeted = _targeted(config, sites, base)
    _check_ranks(path, config, targeted, max_rank)
    _check_room(path, config, sites, targeted)
    with opened_safetensors(path) if isinstance(folder, Path) else nullcontext(folder) as file:
        parsed = {key: parse_key(key) for key in file.keys()}  # noqa: SIM118 - no dictionary
        if part := base.part_of(parsed.values()):
            config = replace(config, part=part)
            targeted = _targeted(config, sites, base)
            _check_ranks(path, config, targeted, max_rank)
            _check_room(path, config, sites, targeted)
        experts, parsed = sort_experts(file, parsed, config, base)
        _check_experts(file, config, experts, parameters, base)
        _check_activated(path, config, [*(name for name, site in targeted.items() if not site.has_tokens), *experts])
        found, base_copies = _sorted_by_module(path, parsed, config, sites, targeted, base)
        _share_tokens(path, found, config, sites, targeted, base)
        keys = _complete(path, found, config, sites, targeted, base) if targeted or not experts else {}
        pairs = {
            name: Pair(*keys[name], *_checked_shapes(file, keys[name], site, config.rank(name)), config.scaling(name))
            for name, site in targeted.items()
        }
        extras = _checked_extras(file, found, pairs, sites, config.trainable_token_indices, base)
        for key, parameter in base_copies.items():
            _check_base_copy(file, key, base.parameters[parameter], _remedy_for(parameter, config, sites, base))
        yield Checkpoint(file, pairs, extras, experts)


def _check_experts(
    file: TensorFile,
    config: AdapterConfig,
    experts: Mapping[str, ExpertsPair],
    parameters: Mapping[str, ModuleSizes],
    base: BaseModel,
) -> None:
    """Check that the bank has room for the LoRA on experts, and the file all that its config names."""
    path = file.path
    if experts and (config.use_dora or config.lora_bias):
        got = "use_dora" if config.use_dora else "lora_bias"
        raise UnsupportedAdapterError(
            str(path.parent), "plain LoRA on experts, as PEFT has it", got, "Train the adapter again without it."
        )
    for pair in experts.values():
        for piece in pair.pieces:
            _check_dtype(file, piece.key_a)
            _check_dtype(file, piece.key_b)
    if uncovered := [name for name in experts if name not in parameters]:
        raise UnmatchedTensorError(
            str(path),
            "LoRA on what this bank covers",
            f"LoRA on the experts' {few(uncovered)}",
            "Attach to them, too, after bank.detach(): xlc.attach(model, target_parameters="
            f"{sorted({name.rpartition('.')[2] for name in uncovered})!r}, ...); or with "
            'xlc.attach(model, adapters={"name": folder}), which covers what the adapters need.',
        )
    too_high = {
        name: pair.rank for name, pair in experts.items() if pair.rank > (parameters[name].most_rank or pair.rank)
    }
    if too_high:
        most = min(parameters[name].most_rank for name in too_high)
        remedy = f"Attach with max_rank={max(too_high.values())}, or train the adapter with a lower rank."
        got = few([f"{name} (rank {rank})" for name, rank in too_high.items()])
        raise RankError(str(path.parent), f"a rank of at most {most} for experts, of gate and up together", got, remedy)
    if missing := [name for name in base.parameter_sites if config.targets_parameter(name) and name not in experts]:
        remedy = "By adapter_config.json they should be there, so the file is incomplete: copy or download it again."
        raise UnmatchedTensorError(str(path), "A and B for every targeted parameter", f"none of {few(missing)}", remedy)


def _check_activated(path: Path, config: AdapterConfig, others: list[str]) -> None:
    if config.alora_invocation_tokens and others:
        raise UnsupportedAdapterError(str(path.parent), "aLoRA on linear layers", few(others), SERVE_WITH_PEFT)


@dataclass(frozen=True)
class Contents:
    """What a file is for, by its header.

    Args:
        rows: the modules that it has LoRA for, with the rows of B.
        heads: those of which it has the weight.
        experts: the parameters of experts that it has LoRA for, with the rank that a page must have room for.
    """

    rows: dict[str, int]
    heads: list[str]
    experts: dict[str, int]


def modules_in_checkpoint(
    folder: Path, config: AdapterConfig, sites: Mapping[str, ModuleSizes], base: BaseModel
) -> Contents:
    """Read from the header which of the sites the file holds LoRA for.

    Raises:
        AdapterFileError: the file is missing, unreadable or malformed.
        UnmatchedTensorError: a tensor belongs to no site that is targeted.
    """
    path = folder / WEIGHTS_FILE
    rows: dict[str, int] = {}
    heads: list[str] = []
    with opened_safetensors(path) as file:
        parsed = {key: parse_key(key) for key in file.keys()}  # noqa: SIM118 - no dictionary
        if part := base.part_of(parsed.values()):
            config = replace(config, part=part)
        experts, parsed = sort_experts(file, parsed, config, base)
        found, _ = _sorted_by_module(path, parsed, config, sites, _targeted(config, sites, base), base)
        for (name, part), key in found.items():
            shape, parts = file.shape(key), _PARTS[sites[name].kind]
            if part in parts:
                rows[name] = max(rows.get(name, 0), shape[0] if part == parts[1] and shape else 0)
            elif part == "weight":
                heads.append(name)
    return Contents(rows, heads, {name: pair.rank for name, pair in experts.items()})


def _targeted(config: AdapterConfig, sites: Mapping[str, ModuleSizes], base: BaseModel) -> dict[str, ModuleSizes]:
    return {name: site for name, site in sites.items() if _targets(config, name, site.is_plain, base)}


def _targets(config: AdapterConfig, name: str, plain_linear: bool, base: BaseModel) -> bool:
    if config.targets(name, plain_linear=plain_linear):
        return True
    # PEFT ties LoRA as the weights are tied, and takes the other module out of target_modules as it saves.
    return config.ensure_weight_tying and any(
        name in group and any(config.targets(other, plain_linear=False) for other in group) for group in base.tied
    )


def _saves(config: AdapterConfig, name: str, base: BaseModel) -> bool:
    if config.saves(name):
        return True
    # As `_targets`: PEFT names the embedding alone as it saves.
    return config.ensure_weight_tying and any(
        name in group and any(config.saves(other) for other in group) for group in base.tied
    )


def _check_ranks(path: Path, config: AdapterConfig, targeted: Iterable[str], max_rank: int) -> None:
    ranks = {name: config.rank(name) for name in targeted}
    if too_high := [f"{name} (rank {rank})" for name, rank in ranks.items() if rank > max_rank]:
        highest = max(ranks.values())
        remedy = f"Give the bank max_rank={highest}, or train the adapter with a lower rank."
        raise RankError(str(path.parent), f"a rank of at most {max_rank}", few(too_high), remedy)


def _check_room(
    path: Path, config: AdapterConfig, sites: Mapping[str, ModuleSizes], targeted: Mapping[str, ModuleSizes]
) -> None:
    wanted = {
        "use_dora=True": [name for name, site in targeted.items() if config.use_dora and SCALE not in site.room],
        "lora_bias=True": [
            name
            for name, site in targeted.items()
            if config.lora_bias and site.kind == "linear" and SHIFT not in site.room
        ],
    }
    if config.trainable_token_indices and not any(TOKENS in site.room for site in sites.values()):
        wanted[f"trainable_token_indices={len(config.trainable_token_indices)}"] = ["the embedding"]
    missing = {option: names for option, names in wanted.items() if names}
    if missing:
        got = " and ".join(f"{option} on {few(names)}" for option, names in missing.items())
        raise UnsupportedAdapterError(
            str(path.parent), "plain LoRA, the only thing there is room for", got, room_for(*missing)
        )


def room_for(*options: str) -> str:
    """Say how to make room for what an adapter has."""
    return (
        f"After bank.detach(), attach with {', '.join(options)}: xlc.attach(model, {', '.join(options)}, ...); or with "
        'xlc.attach(model, adapters={"name": folder}), which reads it from the folders. A file of xlc.export has no '
        "room for it."
    )


def _sorted_by_module(
    path: Path,
    keys: Mapping[str, Key],
    config: AdapterConfig,
    sites: Mapping[str, ModuleSizes],
    targeted: Mapping[str, ModuleSizes],
    base: BaseModel,
) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """Return the key of each tensor by module and part, and the parameter that each other key is a copy of."""
    found: dict[tuple[str, str], str] = {}
    base_copies: dict[str, str] = {}
    adapters: dict[str, str] = {}
    strangers: dict[str, Key] = {}
    for key, parsed in keys.items():
        name = base.module_of(parsed)
        parameter = parsed.part if name == "" else f"{name}.{parsed.part}"
        if name is not None and name in sites and _has_place(name, parsed, config, sites[name], name in targeted, base):
            if (twin := found.get((name, parsed.part))) is not None:
                remedy = "Leave one of them out of the file, or save the adapter again with PEFT's save_pretrained()."
                raise UnmatchedTensorError(str(path), f"one tensor for {name}", f"{few([twin, key])}", remedy)
            found[name, parsed.part] = key
        elif name is not None and not parsed.is_lora and parameter in base.parameters:
            base_copies[key] = parameter
        else:
            strangers[key] = parsed
        if parsed.adapter is not None:
            adapters.setdefault(parsed.adapter, key)
    if strangers:
        raise _unmatched(path, strangers, config, sites, base)
    if len(adapters) > 1:
        remedy = "Save each into a folder of its own: peft_model.save_pretrained(folder, selected_adapters=[name])."
        raise UnmatchedTensorError(str(path), "the weights of one adapter", f"those of {few(adapters)}", remedy)
    return found, base_copies


def _share_tokens(
    path: Path,
    found: dict[tuple[str, str], str],
    config: AdapterConfig,
    sites: Mapping[str, ModuleSizes],
    targeted: Mapping[str, ModuleSizes],
    base: BaseModel,
) -> None:
    """Give rows of tokens to the modules that are tied to their embedding, as PEFT does, which saves them once."""
    for (name, part), key in list(found.items()):
        if part != ROWS_OF_TOKENS:
            continue
        users = next((group for group in base.tied if name in group), frozenset((name,)))
        if both := sorted(user for user in users if user in targeted):
            got = f"both on {few(both)}"
            wanted = "LoRA or trainable_token_indices of a module"
            raise UnsupportedAdapterError(str(path), wanted, got, "Train the adapter again with one of them.")
        if strangers := sorted(user for user in users if user not in sites or TOKENS not in sites[user].room):
            option = f"trainable_token_indices={len(config.trainable_token_indices)}"
            wanted = "room for tokens in all modules that share the embedding"
            raise UnsupportedAdapterError(str(path), wanted, f"none in {few(strangers)}", room_for(option))
        found.update({(user, ROWS_OF_TOKENS): key for user in users})
    if config.trainable_token_indices and not any(part == ROWS_OF_TOKENS for _, part in found):
        remedy = "The file is incomplete: copy or download it again."
        raise UnmatchedTensorError(str(path), "rows of trainable_token_indices", f"no {ROWS_OF_TOKENS}", remedy)


def _has_place(
    name: str, key: Key, config: AdapterConfig, site: ModuleSizes, is_targeted: bool, base: BaseModel
) -> bool:
    """Whether a tensor has a place in the slot of its module, which is one of the bank's."""
    if key.is_lora:
        parts = _PARTS[site.kind] + (MAGNITUDE,) * config.use_dora + (LORA_BIAS,) * config.lora_bias
        return is_targeted and key.part in parts
    if key.part == "bias":
        # As PEFT loads it, whatever the config says of biases.
        return SHIFT in site.room and f"{name}.bias" in base.parameters
    if key.part == ROWS_OF_TOKENS:
        return TOKENS in site.room and bool(config.trainable_token_indices)
    return key.part == "weight" and HEAD in site.room and _saves(config, name, base)


def _complete(
    path: Path,
    found: Mapping[tuple[str, str], str],
    config: AdapterConfig,
    sites: Mapping[str, ModuleSizes],
    targeted: Mapping[str, ModuleSizes],
    base: BaseModel,
) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B by module, having checked that each module has all that the config says."""
    if not targeted:
        remedy = "Attach the bank to the modules of the adapter: xlc.attach(model, target_modules=...)."
        raise UnmatchedTensorError(str(path), "an adapter for modules of this bank", "one for none of them", remedy)
    wanted = [(name, part) for name, site in targeted.items() for part in _PARTS[site.kind]]
    wanted += [(name, MAGNITUDE) for name in targeted if config.use_dora]
    wanted += [(name, LORA_BIAS) for name, site in targeted.items() if config.lora_bias and site.kind == "linear"]
    wanted += [(name, "weight") for name, site in sites.items() if HEAD in site.room and _saves(config, name, base)]
    if missing := [pair for pair in wanted if pair not in found]:
        named = few(f"{name}.{part}" for name, part in missing)
        held = {name for name, _ in found}
        remedy = "By adapter_config.json they should be there, so the file is incomplete: copy or download it again."
        if any(name not in held and part != "weight" for name, part in missing):
            remedy += " If the adapter was trained without them, name them in exclude_modules of adapter_config.json."
        raise UnmatchedTensorError(
            str(path), "A and B for every targeted module, and what else its config names", f"no {named}", remedy
        )
    parts = {name: _PARTS[site.kind] for name, site in targeted.items()}
    return {name: (found[name, part_a], found[name, part_b]) for name, (part_a, part_b) in parts.items()}


def _unmatched(
    path: Path, strangers: Mapping[str, Key], config: AdapterConfig, sites: Mapping[str, ModuleSizes], base: BaseModel
) -> UnmatchedTensorError | UnsupportedAdapterError:
    """Say why these tensors have no place: the first reason that holds, for all the tensors that it holds for."""
    wanted = "only lora_A and lora_B of modules that the adapter targets and the bank covers"
    names = {key: base.module_of(parsed) for key, parsed in strangers.items()}
    lora = {key: parsed for key, parsed in strangers.items() if parsed.is_lora}

    if experts := {key: parsed for key, parsed in lora.items() if names[key] is None and _EXPERT.match(parsed.module)}:
        return UnsupportedAdapterError(
            str(path),
            wanted,
            few(experts),
            "They are LoRA on single experts, which this model holds in a form that takes no LoRA here; experts as "
            f"transformers 5 stores them do. {MERGE}",
        )
    if uncovered := {
        name: base.modules[name]
        for key in lora
        if (name := names[key]) is not None
        and name not in sites
        and _targets(config, name, name != base.output_embedding, base)
    }:
        other = [
            f"{name} ({kind.__name__})"
            for name, kind in uncovered.items()
            if not any(host.takes_class(kind) for host in base.hosts)
        ]
        if other:
            kinds = " and ".join(host.name for host in base.hosts)
            return UnsupportedAdapterError(str(path), f"LoRA on {kinds} modules", f"LoRA on {few(other)}", MERGE)
        return UnmatchedTensorError(
            str(path),
            wanted,
            few(key for key in lora if names[key] in uncovered),
            f"The adapter targets {few(uncovered)}, which this bank does not cover: attach to them too, after "
            "bank.detach(), with xlc.attach(model, target_modules=...), or with "
            'xlc.attach(model, adapters={"name": folder}), which covers what the adapters need.',
        )
    if bare := [key for key, parsed in lora.items() if not parsed.has_prefix and base.rename is None]:
        change = "Cut off what stands before it" if all(PREFIX in key for key in bare) else "Put it in front of each"
        remedy = f"PEFT does not use keys that begin otherwise for this model. {change}: {_REWRITE}"
        return UnmatchedTensorError(str(path), f"keys that begin with {PREFIX!r}", few(bare), remedy)
    if unknown := list(dict.fromkeys(parsed.module for key, parsed in lora.items() if names[key] is None)):
        remedy = "Use the model that the adapter was trained on."
        if base.prefix and all(f"{base.prefix}.{name}" in base.modules for name in unknown):
            remedy = (
                f"It was trained on model.{base.prefix} alone: attach to that, with xlc.attach(model.{base.prefix})."
            )
        elif similar := base.similar(unknown[0]):
            remedy += f" If it is {similar} that the file means by {unknown[0]}, rename the keys: {_REWRITE}"
        return UnmatchedTensorError(str(path), "names of modules that the model has", f"LoRA on {few(unknown)}", remedy)
    # What is left has a module without LoRA by the config, or is no part of plain LoRA.
    nameable = any(not _targets(config, names[key] or "", True, base) for key in lora)
    remedy = "Name their modules in its target_modules, or leave" if nameable else "Leave"
    return UnmatchedTensorError(str(path), wanted, few(strangers), f"{_NOT_USED} {remedy} them out: {_REWRITE}")


def _checked_shapes(
    file: TensorFile, keys: tuple[str, str], site: ModuleSizes, rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    # Tokens are the columns of an embedding's A, and the rows of lm_head's B.
    tokens_in_a, tokens_in_b = (1, None) if site.kind == "embedding" else (None, 0)
    shape_a, shape_b = site.shapes_in_file(rank)
    return (
        _checked_shape(file, keys[0], shape_a, rank, tokens_in_a if site.padded else None),
        _checked_shape(file, keys[1], shape_b, rank, tokens_in_b if site.padded else None),
    )


def _checked_extras(
    file: TensorFile,
    found: Mapping[tuple[str, str], str],
    pairs: Mapping[str, Pair],
    sites: Mapping[str, ModuleSizes],
    tokens: tuple[int, ...],
    base: BaseModel,
) -> dict[str, Extras]:
    """Return what the file has besides A and B, by module, having checked the sizes."""
    fields = {MAGNITUDE: "magnitude", LORA_BIAS: "lora_bias", "bias": "bias", "weight": "weight"}
    fields[ROWS_OF_TOKENS] = "token_rows"
    extras: dict[str, Extras] = {}
    for (name, part), key in found.items():
        if part not in fields:
            continue
        if part == "weight" and name in pairs:
            # PEFT copies the module with its LoRA, which is then another one.
            raise UnsupportedAdapterError(
                f"{file.path}: {key}", "LoRA or a weight of its own for a module", f"both on {name}", SERVE_WITH_PEFT
            )
        if part in (MAGNITUDE, LORA_BIAS):
            wanted = list(pairs[name].shape_b[:1])
            if part == MAGNITUDE and sites[name].kernel:
                wanted = [1, *wanted, 1, 1]
        elif part == ROWS_OF_TOKENS:
            rows, features = base.parameters[f"{name}.weight"].shape
            wanted = [len(tokens), features]
            if beyond := [token for token in tokens if token >= rows]:
                remedy = f"Use the model it was trained on, or call model.resize_token_embeddings({max(beyond) + 1})."
                raise AdapterShapeError(f"{file.path}: {key}", f"tokens up to {rows - 1}", f"{max(beyond)}", remedy)
        else:
            wanted = list(base.parameters[f"{name}.{part}"].shape)
        if part == "weight" and base.parameters[f"{name}.{part}"].dtype not in DTYPES.values():
            got = f"a weight for {name}, whose own is {base.parameters[f'{name}.{part}'].dtype}"
            raise UnsupportedAdapterError(
                f"{file.path}: {key}", "weights of modules that are not quantized", got, MERGE
            )
        if (shape := file.shape(key)) != wanted:
            remedy = _GATHER
            if part == "weight" and len(shape) == 2 and shape[0] > wanted[0] and shape[1] == wanted[1]:
                remedy += f" If its vocabulary was resized, call model.resize_token_embeddings({shape[0]}) first."
            raise AdapterShapeError(f"{file.path}: {key}", f"shape {shown(wanted)}", f"shape {shown(shape)}", remedy)
        _check_dtype(file, key)
        given: dict[str, Any] = {fields[part]: key} | ({"tokens": tokens} if part == ROWS_OF_TOKENS else {})
        extras[name] = replace(extras.get(name, Extras()), **given)
    return extras


def _checked_shape(
    file: TensorFile, key: str, wanted: tuple[int, ...], rank: int, token_axis: int | None
) -> tuple[int, int]:
    where = f"{file.path}: {key}"
    shape = file.shape(key)
    fits = tuple(shape) == wanted or (
        len(shape) == len(wanted)
        and all(
            got == size or (axis == token_axis and 0 < got < size)
            for axis, (got, size) in enumerate(zip(shape, wanted, strict=True))
        )
    )
    if not fits:
        text = ", ".join(f"at most {size}" if axis == token_axis else str(size) for axis, size in enumerate(wanted))
        remedy = f"The rank, by adapter_config.json, is {rank}. {_GATHER}"
        raise AdapterShapeError(where, f"shape [{text}]", f"shape {shown(shape)}", remedy)
    _check_dtype(file, key)
    return shape[0], math.prod(shape[1:])


def _check_dtype(file: TensorFile, key: str) -> None:
    if (dtype := file.dtype(key)) not in DTYPES:
        remedy = "Save the adapter in one of these dtypes: model.to(torch.bfloat16), then save_pretrained()."
        raise AdapterShapeError(f"{file.path}: {key}", f"dtype {' or '.join(DTYPES)}", f"dtype {dtype}", remedy)


def _remedy_for(parameter: str, config: AdapterConfig, sites: Mapping[str, ModuleSizes], base: BaseModel) -> str:
    """Say what to do where an adapter has another value for a parameter of the base model."""
    name, _, part = parameter.rpartition(".")
    if _saves(config, name, base):
        saved = [saved for saved in config.modules_to_save if replace(config, modules_to_save=(saved,)).saves(name)]
        return room_for(f"modules_to_save={saved or [name]!r}")
    if part == "bias" and name in sites:
        return room_for(f"bias={config.bias if config.bias != 'none' else 'lora_only'!r}")
    if part == "bias" and any(host.takes_class(base.modules[name]) for host in base.hosts):
        end = name.rpartition(".")[2]
        return f"{room_for(f'bias={config.bias!r}')} Name {end!r} among target_modules, too."
    return f"The adapter was trained with this weight changed, which a bank of many adapters cannot hold. {MERGE}"


def _check_base_copy(file: TensorFile, key: str, weight: Tensor, remedy: str) -> None:
    shape, dtype, own_shape = file.shape(key), file.dtype(key), list(weight.shape)
    if _is_copy(file, key, shape, weight):
        return
    # PEFT loads any parameter that a file holds into the model, for whatever adapter runs.
    if shape != own_shape:
        remedy = "Use the base model that the adapter was trained on."
        if len(shape) == 2 == len(own_shape) and shape[0] > own_shape[0] and shape[1] == own_shape[1]:
            remedy += f" If its vocabulary was resized, call model.resize_token_embeddings({shape[0]}) first."
    elif weight.is_meta:
        remedy = "The model has no values to compare with: load its weights first."
    raise UnsupportedAdapterError(
        f"{file.path}: {key}",
        f"a copy of the model's own weight, {weight.dtype} of shape {shown(own_shape)}",
        f"other values, or a size that does not fit: {dtype} of shape {shown(shape)}",
        remedy,
    )


def _is_copy(file: TensorFile, key: str, shape: list[int], weight: Tensor) -> bool:
    """Whether the file holds the first rows of the model's own weight."""
    if len(shape) != weight.dim() or shape[1:] != list(weight.shape[1:]) or weight.is_meta:
        return False
    copy = file.part(key)
    if not shape:
        with reading(file.path):
            return _are_equal(copy[...], weight.detach())
    # An embedding may be gigabytes: some rows at a time, and none after the first that differ.
    step = max(1, _BASE_VALUES_AT_ONCE // max(1, weight[:1].numel()))
    for start in range(0, shape[0], step):
        with reading(file.path):
            rows = copy[start : start + step]
        if not _are_equal(rows, weight.detach()[start : start + len(rows)]):
            return False
    return True


def _are_equal(rows: Tensor, own: Tensor) -> bool:
    rows = rows.to(own.device)
    if rows.is_floating_point() != own.is_floating_point():
        return False
    # Either may have been rounded to the other's dtype; more rows than the model has are never equal.
    return torch.equal(rows.to(own.dtype), own) or torch.equal(rows, own.to(rows.dtype))


def are_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; the tensor must not be empty."""
    # One pass without a copy: on a CPU in a fortieth of the time of `isfinite().all()`. NaN is the greatest, too.
    lowest, highest = torch.aminmax(tensor)
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())
