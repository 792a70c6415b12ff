"""What a set of adapters needs of a bank, read from their configs and the headers of their weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from xpu_lora_compile.adapters.checkpoint import HEAD, SCALE, SHIFT, TOKENS, ModuleSizes, modules_in_checkpoint
from xpu_lora_compile.adapters.config import AdapterConfig, read_config
from xpu_lora_compile.adapters.names import BaseModel
from xpu_lora_compile.errors import AdapterError, LoraError, UnmatchedTensorError


@dataclass(frozen=True)
class Needs:
    """What a bank must have to hold some adapters.

    Args:
        modules: the names of the modules that any of them has LoRA on.
        max_rank: the highest rank of all.
        parameters: the names of parameters of experts that any of them has LoRA on.
        experts_ranks: the highest rank on these by a parameter's own name, of gate and up together.
        rows: for each module the most rows that a B has.
        use_dora: whether any has DoRA, and so on by the names of PEFT's fields.
        lora_bias: likewise.
        bias: the first that is not "none", if any.
        modules_to_save: the names of the modules for which any has weights of its own.
        trainable_token_indices: the most tokens for which one has rows of its own.
    """

    modules: tuple[str, ...]
    max_rank: int
    parameters: tuple[str, ...]
    experts_ranks: Mapping[str, int]
    rows: Mapping[str, int]
    use_dora: bool
    lora_bias: bool
    bias: str
    modules_to_save: tuple[str, ...]
    trainable_token_indices: int


def needs_of(
    adapters: Mapping[str, str | os.PathLike[str]], sites: Mapping[str, ModuleSizes], base: BaseModel
) -> Needs:
    """Read the folders of these adapters, but not their weights.

    Args:
        adapters: the folder of each adapter, by the adapter's name.
        sites: every module of the model that could carry LoRA.
        base: the model.

    Raises:
        AdapterError: an adapter cannot be read, or has LoRA on other modules; the error names it.
    """
    rows: dict[str, int] = {}
    heads: set[str] = set()
    experts: dict[str, int] = {}
    configs: list[AdapterConfig] = []
    max_rank = 1
    sites = {name: replace(site, room=frozenset((SCALE, SHIFT, HEAD, TOKENS))) for name, site in sites.items()}
    for name, folder in adapters.items():
        with naming(name):
            path = folder_path(name, folder)
            config = read_config(path)
            contents = modules_in_checkpoint(path, config, sites, base)
            heads.update(contents.heads)
            configs.append(config)
            for parameter, rank in contents.experts.items():
                experts[parameter] = max(experts.get(parameter, 0), rank)
            if not (contents.rows or contents.experts):
                remedy = "Leave the adapter out, or save it again: it changes nothing."
                raise UnmatchedTensorError(str(path), "LoRA on modules of the model", "a file without any", remedy)
            for module, its_rows in contents.rows.items():
                rows[module] = max(rows.get(module, 0), its_rows)
                max_rank = max(max_rank, config.rank(module))
    experts_ranks: dict[str, int] = {}
    for parameter, rank in experts.items():
        own_name = parameter.rpartition(".")[2]
        experts_ranks[own_name] = max(experts_ranks.get(own_name, 0), rank)
    # In the order of the model.
    return Needs(
        tuple(module for module in sites if module in rows),
        max_rank,
        tuple(parameter for parameter in base.parameter_sites if parameter in experts),
        experts_ranks,
        rows,
        use_dora=any(config.use_dora for config in configs),
        lora_bias=any(config.lora_bias for config in configs),
        bias=next((config.bias for config in configs if config.bias != "none"), "none"),
        modules_to_save=tuple(module for module in sites if module in heads),
        trainable_token_indices=max((len(config.trainable_token_indices) for config in configs), default=0),
    )


def folder_path(name: str, folder: object) -> Path:
    """Return the path of an adapter's folder.

    Raises:
        AdapterError: it is no path.
    """
    if not isinstance(folder, str | os.PathLike):
        raise AdapterError(f"load {name!r}", "the path of a PEFT folder", repr(folder), "Pass a string or a Path.")
    return Path(folder)


@contextmanager
def naming(adapter: str) -> Iterator[None]:
    """Put the adapter's name into an error that does not have it."""
    try:
        yield
    except LoraError as error:
        where, *others = error.args
        if repr(adapter) not in where:
            error.args = (f"adapter {adapter!r}, {where}", *others)
        raise
