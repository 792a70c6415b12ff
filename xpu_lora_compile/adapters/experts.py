"""LoRA on the experts of a mixture, in the forms in which files have it.

    ...experts.base_layer.lora_A.weight [E r, D], lora_B.weight [W, r E]    PEFT's, of a parameter with all experts
    ...experts.lora_A.weight                                                the same of the parameter wrapped last
    ...experts.3.gate_proj.lora_A.weight [r, D], lora_B.weight [I, r]       of each expert, as transformers 4 had them
    ...experts.gate_up_proj.lora_A.weight [E or 1, r, D]                    of all experts, or of all the same

In PEFT's the expert is the slowest index of A's rows, and the fastest of B's columns. Which parameter a pair is of is
not in the file: its sizes say so. Gate and up are two halves of one parameter here: where each has an A of its own,
they are joined to one pair of twice the rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from xpu_lora_compile.adapters.files import few, shown
from xpu_lora_compile.adapters.names import BaseModel, Key
from xpu_lora_compile.errors import AdapterShapeError, UnmatchedTensorError

_INNER = re.compile(r"(?P<owner>.+?)(?P<depth>(\.base_layer)*)")
# What a projection is called, and which parameter and half of it that is.
_PROJECTIONS = {
    "gate_proj": ("gate_up_proj", "gate"),
    "w1": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
    "w3": ("gate_up_proj", "up"),
    "gate_up_proj": ("gate_up_proj", ""),
    "down_proj": ("down_proj", ""),
    "w2": ("down_proj", ""),
}
_OF_EXPERTS = re.compile(rf"(?P<owner>.+?)(?:\.(?P<expert>\d{{1,6}}))?\.(?P<projection>{'|'.join(_PROJECTIONS)})")
_FACTORS = ("lora_A.weight", "lora_B.weight")


class ExpertsSite(Protocol):
    """The sizes of a parameter with the weights of all experts: see `checkpoint.ModuleSizes`."""

    @property
    def in_features(self) -> int:
        """D."""

    @property
    def out_features(self) -> int:
        """W."""

    @property
    def experts(self) -> int:
        """E."""

    @property
    def halves(self) -> str:
        """How the rows of gate and up lie, or ""."""

    @property
    def swaps(self) -> bool:
        """Whether PEFT's A is of what the experts give, and B of what they take."""


@dataclass(frozen=True)
class Piece:
    """A and B in the file, of one expert or of all.

    Args:
        key_a: the name of A in the file.
        key_b: the name of B.
        form: "fused", PEFT's; "single", of one expert; "stacked", three dimensions.
        rank: r.
        scaling: what B is still to be multiplied by.
        expert: its number, where it is one.
        half: "gate" or "up", where it is of half of the rows.
    """

    key_a: str
    key_b: str
    form: str
    rank: int
    scaling: float
    expert: int | None = None
    half: str = ""


@dataclass(frozen=True)
class ExpertsPair:
    """LoRA on one parameter of a mixture.

    Args:
        site: the sizes of the parameter.
        pieces: all that the file has of it.
        rank: what a page must have room for: that of gate and of up together, where each has an A.
    """

    site: ExpertsSite
    pieces: tuple[Piece, ...]
    rank: int


class File(Protocol):
    """What is asked of a file of tensors."""

    @property
    def path(self) -> object:
        """Where it lies."""

    def shape(self, key: str) -> list[int]:
        """The shape of a tensor."""


class Config(Protocol):
    """What is asked of an adapter's config."""

    def targets(self, name: str, *, plain_linear: bool = True) -> bool:
        """Whether the adapter targets a module."""

    def targets_parameter(self, name: str) -> bool:
        """Whether it targets a parameter."""

    def rank(self, name: str) -> int:
        """The rank of a module's or parameter's A and B."""

    def scaling(self, name: str) -> float:
        """What multiplies B @ A."""


def sort_experts(
    file: File, keys: Mapping[str, Key], config: Config, base: BaseModel
) -> tuple[dict[str, ExpertsPair], dict[str, Key]]:
    """Return LoRA on experts, by the name of the parameter, and the keys of all else.

    Raises:
        AdapterShapeError: a tensor has another shape than its parameter takes, or it cannot be told which that is.
        UnmatchedTensorError: A or B is missing, or the config does not account for a tensor.
    """
    if not base.parameter_sites:
        return {}, dict(keys)
    owners = {name.rpartition(".")[0] for name in base.parameter_sites}
    fused: dict[str, dict[int, dict[str, str]]] = {}
    others: dict[tuple[str, int | None, str], dict[str, str]] = {}
    rest: dict[str, Key] = {}
    for key, parsed in keys.items():
        if not parsed.is_lora or parsed.part not in _FACTORS:
            rest[key] = parsed
        elif (found := _INNER.fullmatch(parsed.module)) and (owner := _owner(found["owner"], parsed, base, owners)):
            depth = found["depth"].count(".")
            _put(file, fused.setdefault(owner, {}).setdefault(depth, {}), parsed.part, key)
        elif (found := _OF_EXPERTS.fullmatch(parsed.module)) and (
            owner := _owner(found["owner"], parsed, base, owners)
        ):
            expert = None if found["expert"] is None else int(found["expert"])
            _put(file, others.setdefault((owner, expert, found["projection"]), {}), parsed.part, key)
        else:
            rest[key] = parsed
    pieces: dict[str, list[Piece]] = {}
    for owner, depths in fused.items():
        for name, piece in _fused(file, owner, depths, config, base):
            pieces.setdefault(name, []).append(piece)
    for (owner, expert, projection), pair in others.items():
        name, piece = _other(file, owner, expert, projection, pair, config, base)
        pieces.setdefault(name, []).append(piece)
    return {name: _pair(file, name, found, base.parameter_sites[name]) for name, found in pieces.items()}, rest


def _put(file: File, pair: dict[str, str], part: str, key: str) -> None:
    if part in pair:
        remedy = "Leave one of them out of the file, or save the adapter again with PEFT's save_pretrained()."
        raise UnmatchedTensorError(str(file.path), "one tensor for each factor", few([pair[part], key]), remedy)
    pair[part] = key


def _owner(name: str, parsed: Key, base: BaseModel, owners: set[str]) -> str | None:
    found = base.module_of(replace(parsed, module=name))
    return found if found in owners else None


def _keys(file: File, pair: Mapping[str, str]) -> tuple[str, str]:
    if missing := [part for part in _FACTORS if part not in pair]:
        got, remedy = f"no {missing[0]} beside {few(pair.values())}", "The file is incomplete: copy it again."
        raise UnmatchedTensorError(str(file.path), "A and B of each expert", got, remedy)
    return pair[_FACTORS[0]], pair[_FACTORS[1]]


def _fused(
    file: File, owner: str, depths: Mapping[int, Mapping[str, str]], config: Config, base: BaseModel
) -> Iterator[tuple[str, Piece]]:
    """Tell by the sizes which parameter each pair of PEFT's is of."""
    sites = {name: site for name, site in base.parameter_sites.items() if name.rpartition(".")[0] == owner}
    fits: dict[int, list[str]] = {}
    for depth, pair in depths.items():
        key_a, key_b = _keys(file, pair)
        shapes = file.shape(key_a), file.shape(key_b)
        fits[depth] = [name for name, site in sites.items() if shapes == _fused_shapes(site, config.rank(name))]
        if not fits[depth]:
            wanted = " or ".join(
                f"{shown(a)} and {shown(b)} of {name}"
                for name, site in sites.items()
                for a, b in [_fused_shapes(site, config.rank(name))]
            )
            remedy = "The rank is that of adapter_config.json. Use the base model that the adapter was trained on."
            got = f"{shown(shapes[0])} and {shown(shapes[1])}"
            raise AdapterShapeError(f"{file.path}: {key_a}", f"shapes {wanted}", got, remedy)
    for depth, names in fits.items():
        key_a, key_b = _keys(file, depths[depth])
        wanted_names = [name for name in names if config.targets_parameter(name)] or names
        if len(wanted_names) > 1:
            remedy = (
                "The file does not say which it is of. Write it with the names of single experts: "
                "experts.0.up_proj.lora_A.weight and so on."
            )
            raise AdapterShapeError(f"{file.path}: {key_a}", "sizes of one parameter", few(wanted_names), remedy)
        (name,) = wanted_names
        if not config.targets_parameter(name):
            remedy = "PEFT would not use them: name the parameter in target_parameters of adapter_config.json."
            raise UnmatchedTensorError(str(file.path), "target_parameters of the config", few([key_a, key_b]), remedy)
        yield name, Piece(key_a, key_b, "fused", config.rank(name), config.scaling(name))


def _fused_shapes(site: ExpertsSite, rank: int) -> tuple[list[int], list[int]]:
    taken, given = (site.in_features, site.out_features)[:: -1 if site.swaps else 1]
    return [site.experts * rank, taken], [given, rank * site.experts]


def _other(
    file: File,
    owner: str,
    expert: int | None,
    projection: str,
    pair: Mapping[str, str],
    config: Config,
    base: BaseModel,
) -> tuple[str, Piece]:
    key_a, key_b = _keys(file, pair)
    parameter, half = _PROJECTIONS[projection]
    name = f"{owner}.{parameter}"
    if name not in base.parameter_sites:
        # Of a mixture without gates.
        name, half = f"{owner}.{projection}", ""
    site = base.parameter_sites.get(name)
    if site is None or (expert is not None and expert >= site.experts):
        known = [other for other in base.parameter_sites if other.rpartition(".")[0] == owner]
        experts = base.parameter_sites[known[0]].experts
        remedy = "Use the base model that the adapter was trained on."
        raise UnmatchedTensorError(str(file.path), f"{experts} experts with {few(known)}", few([key_a]), remedy)
    in_file = ".".join(part for part in (owner, None if expert is None else str(expert), projection) if part)
    if not (config.targets(in_file) or config.targets_parameter(name) or config.targets_parameter(in_file)):
        remedy = "PEFT would not use them: name them in target_modules or target_parameters of adapter_config.json."
        raise UnmatchedTensorError(str(file.path), "modules that the config targets", few([key_a, key_b]), remedy)
    rows = site.out_features // 2 if half else site.out_features
    rank = config.rank(in_file)
    shapes = file.shape(key_a), file.shape(key_b)
    if expert is None:
        # The same A or B for all experts is there once.
        fits = (
            all(len(shape) == 3 and shape[0] in (1, site.experts) for shape in shapes)
            and shapes[0][1:] == [rank, site.in_features]
            and shapes[1][1:] == [rows, rank]
        )
        wanted = f"[{site.experts} or 1, {rank}, {site.in_features}] and [{site.experts} or 1, {rows}, {rank}]"
    else:
        fits = shapes == ([rank, site.in_features], [rows, rank])
        wanted = f"[{rank}, {site.in_features}] and [{rows}, {rank}]"
    if not fits:
        remedy = "The rank is that of adapter_config.json. Use the base model that the adapter was trained on."
        got = f"{shown(shapes[0])} and {shown(shapes[1])}"
        raise AdapterShapeError(f"{file.path}: {key_a}", f"shapes {wanted}", got, remedy)
    form = "stacked" if expert is None else "single"
    return name, Piece(key_a, key_b, form, rank, config.scaling(in_file), expert, half)


def _pair(file: File, name: str, pieces: Sequence[Piece], site: ExpertsSite) -> ExpertsPair:
    ranks: dict[int | None, dict[str, int]] = {}
    for piece in pieces:
        halves = ranks.setdefault(piece.expert, {})
        if piece.half in halves or (halves and "" in (piece.half, *halves)):
            remedy = "Leave one of them out of the file."
            raise UnmatchedTensorError(str(file.path), f"one form of LoRA on {name}", few([piece.key_a]), remedy)
        halves[piece.half] = piece.rank
    every = set().union(*ranks.values())
    if torn := [expert for expert, halves in ranks.items() if set(halves) != every]:
        got = f"{' and '.join(sorted(ranks[torn[0]]))} alone of expert {torn[0]}"
        remedy = "The file is incomplete: copy it again."
        raise UnmatchedTensorError(
            str(file.path), f"{' and '.join(sorted(every))} of each expert, of {name}", got, remedy
        )
    if len(ranks) > 1 and None in ranks:
        remedy = "Leave one of them out of the file."
        got = "LoRA on single experts, and on all"
        raise UnmatchedTensorError(str(file.path), f"one form of LoRA on {name}", got, remedy)
    return ExpertsPair(site, tuple(pieces), max(sum(halves.values()) for halves in ranks.values()))


def join(pair: ExpertsPair, read: Callable[[str, tuple[int, ...], float], Tensor]) -> tuple[list[int], Tensor, Tensor]:
    """Read what the file has of one parameter.

    Args:
        pair: of the parameter.
        read: returns a tensor of the file as float32, by its key, its shape, and what it is to be multiplied by.

    Returns:
        The numbers of the n experts of which neither A nor B is all zeros, A `[n, r, D]` and B `[n, W, r]`.
    """
    site = pair.site
    groups: dict[int | None, list[Piece]] = {}
    for piece in pair.pieces:
        groups.setdefault(piece.expert, []).append(piece)
    numbers: list[int] = []
    found_a: list[Tensor] = []
    found_b: list[Tensor] = []
    for expert, pieces in groups.items():
        count = site.experts if expert is None else 1
        a = torch.zeros(count, pair.rank, site.in_features)
        b = torch.zeros(count, site.out_features, pair.rank)
        first = 0
        for piece in pieces:
            ranks = slice(first, first + piece.rank)
            first += piece.rank
            its_a, its_b = _of_all(piece, site, count, read)
            a[:, ranks] = its_a
            b[:, _rows(piece.half, site), ranks] = its_b
        used = (a.flatten(1).any(1) & b.flatten(1).any(1)).nonzero().flatten()
        numbers += used.tolist() if expert is None else [expert] * len(used)
        found_a.append(a[used])
        found_b.append(b[used])
    return numbers, torch.cat(found_a), torch.cat(found_b)


def _of_all(
    piece: Piece, site: ExpertsSite, count: int, read: Callable[[str, tuple[int, ...], float], Tensor]
) -> tuple[Tensor, Tensor]:
    rank, rows = piece.rank, site.out_features // 2 if piece.half else site.out_features
    if piece.form == "fused" and site.swaps:
        a = read(piece.key_a, (count, rank, rows), piece.scaling).transpose(1, 2)
        return read(piece.key_b, (site.in_features, rank, count), 1.0).permute(2, 1, 0), a
    if piece.form == "fused":
        a = read(piece.key_a, (count, rank, site.in_features), 1.0)
        return a, read(piece.key_b, (rows, rank, count), piece.scaling).permute(2, 0, 1)
    if piece.form == "single":
        return read(piece.key_a, (1, rank, site.in_features), 1.0), read(piece.key_b, (1, rows, rank), piece.scaling)
    # One for all experts is broadcast.
    return read(piece.key_a, (-1, rank, site.in_features), 1.0), read(piece.key_b, (-1, rows, rank), piece.scaling)


def _rows(half: str, site: ExpertsSite) -> slice:
    if not half:
        return slice(None)
    if site.halves == "in turn":
        return slice(0 if half == "gate" else 1, None, 2)
    middle = site.out_features // 2
    return slice(0, middle) if half == "gate" else slice(middle, None)
