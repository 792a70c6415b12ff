"""`adapter_model.safetensors`, checked against the modules that it is for, as plain tensors with the scaling in B.

    names -> which module, and A or B -> shapes and dtypes, from the header -> values, one tensor at a time

Each step checks the whole file before the next begins, so that a wrong file is refused before its data is read. Nothing
here knows the bank: a load that fails has touched nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xpu_lora_compile.adapters.config import AdapterConfig
from xpu_lora_compile.adapters.files import few, opened_safetensors, reading, shown
from xpu_lora_compile.errors import (
    AdapterShapeError,
    NonFiniteWeightError,
    RankError,
    UnmatchedTensorError,
    UnsupportedAdapterError,
)

WEIGHTS_FILE = "adapter_model.safetensors"

_DTYPES = ("F32", "BF16", "F16")
_PARTS = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}
_BASE_PARTS = ("weight", "base_layer.weight")
# A name longer than this belongs to no module, and would be slow to match against the rules.
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.{1,1000}?)\."
    r"(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.weight|weight)"
)
_KEY_OF_A_LIVE_MODEL = re.compile(r".*\.lora_([AB]\.[^.]+\.weight|embedding_[AB]\.[^.]+)")
_BASE_VALUES_AT_ONCE = 2**22

_SAVE_AGAIN = "Save the adapter again with PEFT's save_pretrained()."
_DIVERGED = "The training diverged, or the file is damaged: use an earlier checkpoint."
_GATHER = "Use the base model it was trained on; if it was trained in shards (ZeRO-3, FSDP), gather before saving."


@dataclass(frozen=True)
class Site:
    """A module that carries LoRA, as far as an adapter must fit it.

    Args:
        kind: a linear layer, or an embedding, where A is looked up by token.
        in_features: D; for an embedding, the rows of the table that LoRA covers.
        out_features: W, the rows of B in the bank.
        padded: whether an adapter may have fewer rows along the vocabulary (lm_head, embedding).
    """

    kind: Literal["linear", "embedding"]
    in_features: int
    out_features: int
    padded: bool


@dataclass(frozen=True)
class LoraWeights:
    """The weights of one module, float32 on the CPU: `delta = b @ a`, with the scaling already in b.

    Args:
        a: `[r, D]`; for an embedding `[r, V]`, a column for each token.
        b: `[W, r]`.
    """

    a: Tensor
    b: Tensor


def read_checkpoint(
    folder: Path,
    config: AdapterConfig,
    sites: Mapping[str, Site],
    base_weights: Mapping[str, Tensor],
    max_rank: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, LoraWeights]:
    """Read the weights of a PEFT folder, for every site that the config targets.

    Args:
        folder: what PEFT's `save_pretrained` wrote.
        config: the config of the same folder.
        sites: the modules that the bank covers, by name.
        base_weights: the model's own embedding and lm_head weights, by module name. PEFT saves them along with an
            adapter on these modules; a copy that equals its first rows is ignored.
        max_rank: the highest rank that the bank has room for.
        dtype: the bank's dtype, in which no weight may become infinite.

    Raises:
        AdapterFileError: the file is missing, unreadable, truncated or malformed.
        RankError: a module's rank is above `max_rank`.
        UnmatchedTensorError: a tensor belongs to no site that is targeted, or such a site lacks a tensor.
        UnsupportedAdapterError: the file holds an embedding or lm_head other than the model's.
        AdapterShapeError: a tensor has another shape or dtype than its module takes.
        NonFiniteWeightError: a weight is NaN, infinite, or infinite once it is scaled and stored in `dtype`.
    """
    targeted = {name: site for name, site in sites.items() if config.targets(name, plain_linear=_is_plain(site))}
    path = folder / WEIGHTS_FILE
    _check_ranks(path, config, targeted, max_rank)
    with opened_safetensors(path) as file:
        keys, base_copies = _sorted_by_module(path, file.keys(), config, sites, targeted, base_weights)
        for name, site in targeted.items():
            _check_shapes(path, file, keys[name], site, config.rank(name))
        for key, name in base_copies.items():
            _check_base_copy(path, file, key, base_weights[name])
        return {
            name: LoraWeights(
                _read_finite(path, file, key_a, 1.0, dtype),
                _read_finite(path, file, key_b, config.scaling(name), dtype),
            )
            for name, (key_a, key_b) in keys.items()
        }


def _is_plain(site: Site) -> bool:
    # What "all-linear" covers: PEFT leaves out the output embedding, the one linear layer along the vocabulary.
    return site.kind == "linear" and not site.padded


def _check_ranks(path: Path, config: AdapterConfig, targeted: Iterable[str], max_rank: int) -> None:
    ranks = {name: config.rank(name) for name in targeted}
    if too_high := [f"{name} (rank {rank})" for name, rank in ranks.items() if rank > max_rank]:
        highest = max(ranks.values())
        remedy = f"Give the bank max_rank={highest}, or train the adapter with a lower rank."
        raise RankError(str(path.parent), f"a rank of at most {max_rank}", few(too_high), remedy)


def _sorted_by_module(
    path: Path,
    keys: Iterable[str],
    config: AdapterConfig,
    sites: Mapping[str, Site],
    targeted: Mapping[str, Site],
    base_weights: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the keys of A and B by module, and the module of each copied base weight by key."""
    found: dict[tuple[str, str], str] = {}
    base_copies: dict[str, str] = {}
    strangers: dict[str, str] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        name, part = (match["module"], match["part"]) if match else ("", "")
        if name in targeted and part in _PARTS[targeted[name].kind]:
            found[name, part] = key
        elif name in base_weights and part in _BASE_PARTS:
            base_copies[key] = name
        else:
            strangers[key] = "" if part in _BASE_PARTS else name
    if strangers:
        raise _unmatched(path, strangers, config, sites)
    if not targeted:
        remedy = "Attach the bank to the modules of the adapter: xlc.attach(model, target_modules=...)."
        raise UnmatchedTensorError(str(path), "an adapter for modules of this bank", "one for none of them", remedy)
    wanted = [(name, part) for name, site in targeted.items() for part in _PARTS[site.kind]]
    if missing := [f"{name}.{part}" for name, part in wanted if (name, part) not in found]:
        remedy = f"adapter_config.json targets these modules, so the file is incomplete. {_SAVE_AGAIN}"
        raise UnmatchedTensorError(str(path), "A and B for every targeted module", f"no {few(missing)}", remedy)
    parts = {name: tuple(found[name, part] for part in _PARTS[site.kind]) for name, site in targeted.items()}
    return parts, base_copies


def _unmatched(
    path: Path, strangers: Mapping[str, str], config: AdapterConfig, sites: Mapping[str, Site]
) -> UnmatchedTensorError:
    uncovered = [name for name in strangers.values() if name and name not in sites and config.targets(name)]
    if uncovered:
        remedy = (
            f"The adapter targets {few(dict.fromkeys(uncovered))}, which this bank does not cover: "
            "attach it to them too with xlc.attach(model, target_modules=...), or use the model it was trained on."
        )
    elif any(_KEY_OF_A_LIVE_MODEL.fullmatch(key) for key in strangers):
        # PEFT reads these where the name happens to be the one it loads the adapter under, and else drops them.
        remedy = f"The adapter's name, as in lora_A.default.weight, is part of a live model only. {_SAVE_AGAIN}"
    else:
        remedy = f"adapter_config.json does not account for them, so PEFT would not use them. {_SAVE_AGAIN}"
    wanted = "only lora_A and lora_B of modules that the adapter targets and the bank covers"
    return UnmatchedTensorError(str(path), wanted, few(strangers), remedy)


def _check_shapes(path: Path, file: Any, keys: tuple[str, ...], site: Site, rank: int) -> None:
    # Tokens are the columns of an embedding's A, and the rows of lm_head's B.
    tokens_in_a, tokens_in_b = (1, None) if site.kind == "embedding" else (None, 0)
    for key, wanted, token_axis in (
        (keys[0], (rank, site.in_features), tokens_in_a),
        (keys[1], (site.out_features, rank), tokens_in_b),
    ):
        _check_shape(path, file, key, wanted, rank, token_axis if site.padded else None)


def _check_shape(path: Path, file: Any, key: str, wanted: tuple[int, int], rank: int, token_axis: int | None) -> None:
    where = f"{path}: {key}"
    with reading(path):
        header = file.get_slice(key)
        shape, dtype = header.get_shape(), header.get_dtype()
    text = ", ".join(f"at most {size}" if axis == token_axis else str(size) for axis, size in enumerate(wanted))
    fits = len(shape) == 2 and all(
        got == size or (axis == token_axis and 0 < got < size)
        for axis, (got, size) in enumerate(zip(shape, wanted, strict=True))
    )
    if not fits:
        remedy = f"The rank, by adapter_config.json, is {rank}. {_GATHER}"
        raise AdapterShapeError(where, f"shape [{text}]", f"shape {shown(shape)}", remedy)
    if dtype not in _DTYPES:
        remedy = "Save the adapter in one of these dtypes: model.to(torch.bfloat16), then save_pretrained()."
        raise AdapterShapeError(where, f"dtype {' or '.join(_DTYPES)}", f"dtype {dtype}", remedy)


def _check_base_copy(path: Path, file: Any, key: str, weight: Tensor) -> None:
    with reading(path):
        copy = file.get_slice(key)
        shape, dtype = copy.get_shape(), copy.get_dtype()
    fits = len(shape) == 2 and shape[1] == weight.shape[1] and dtype in _DTYPES
    # An embedding may be gigabytes: some rows at a time, and none after the first that differ.
    step = max(1, _BASE_VALUES_AT_ONCE // weight.shape[1])
    for start in range(0, shape[0] if fits else 0, step):
        with reading(path):
            rows = copy[start : start + step]
        own = weight.detach()[start : start + len(rows)]
        rows = rows.to(own.device)
        # Either may have been rounded to the other's dtype; more rows than the model has are never equal.
        fits = torch.equal(rows.to(own.dtype), own) or torch.equal(rows, own.to(rows.dtype))
        if not fits:
            break
    if not fits:
        raise UnsupportedAdapterError(
            f"{path}: {key}",
            f"a copy of the model's own weight, {weight.dtype} of shape {shown(list(weight.shape))}",
            f"other values, or a size that does not fit: {dtype} of shape {shown(shape)}",
            "The adapter was trained on another model, or with this layer retrained or resized, which a bank cannot "
            "hold: merge it into the model with PEFT's merge_and_unload().",
        )


def _read_finite(path: Path, file: Any, key: str, scaling: float, dtype: torch.dtype) -> Tensor:
    with reading(path):
        # A copy, even of float32: what safetensors returns may be the file itself, mapped into memory.
        tensor: Tensor = file.get_tensor(key).to(torch.float32, copy=True)
    where = f"{path}: {key}"
    if not tensor.isfinite().all():
        raise NonFiniteWeightError(where, "finite values", "NaN or infinity", _DIVERGED)
    tensor *= scaling
    if not tensor.to(dtype).isfinite().all():
        got = f"infinity in {dtype} after scaling by {scaling:g}"
        remedy = "Use a bank with a wider dtype, such as torch.bfloat16, or train with a smaller lora_alpha."
        raise NonFiniteWeightError(where, f"values that {dtype} can hold", got, remedy)
    return tensor
