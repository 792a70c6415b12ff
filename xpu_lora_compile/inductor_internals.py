"""Every name of Inductor that is not public, with what differs between its versions.

Apart from `torch_internals`, so that importing the package does not load Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch._inductor import config, utils
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

# A context manager: what is compiled in it finds empty caches on disk, and leaves nothing there.
fresh_cache: Any = utils.fresh_cache

# A program into a file, and the file into something that is called with tensors.
aoti_compile_and_package: Any = torch._inductor.aoti_compile_and_package
aoti_load_package: Any = torch._inductor.aoti_load_package

GraphPass: TypeAlias = Callable[[Graph], None]

# Inductor learnt to take a list of passes in one slot with torch 2.12.
TAKES_LISTS = torch.__version__ >= "2.12"  # `torch.__version__` compares as a version, not as text.


def option_names() -> list[str]:
    """All options of Inductor."""
    return list(config.get_config_copy())


def mode_names() -> list[str]:
    """All values of `torch.compile(mode=...)`."""
    return list(torch._inductor.list_mode_options())


def config_of(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What Inductor's own backend makes of a mode or of options; RuntimeError for a value of the wrong type."""
    found: dict[str, Any] = torch._TorchCompileInductorWrapper(mode, options, None).config
    return found


def in_slot(slot: str, ours: CustomGraphPass, options: dict[str, Any]) -> Any:
    """Our pass in front of those that the user has in this slot, by option or by global configuration."""
    present = options.get(slot, getattr(config, slot))
    users = [] if present is None else list(present) if isinstance(present, (list, tuple)) else [present]
    if not users:
        return ours
    return (ours, *users) if TAKES_LISTS else InTurn(ours, *users)


def writes_no_python(options: dict[str, Any]) -> bool:
    """Whether the code that Inductor writes is C++ alone: by these options, or those in force; or ahead of time."""
    from torch._inductor.virtualized import V

    return bool(options.get("cpp_wrapper", config.cpp_wrapper)) or V.aot_compilation is True


class InTurn(CustomGraphPass):
    """Several passes in a slot that takes one; cached only if all of them can be."""

    def __init__(self, *passes: GraphPass) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        """Run each."""
        for transform in self.passes:
            transform(graph)

    def uuid(self) -> Any:
        """All identities together, or None, which keeps Inductor from caching."""
        uuids = [transform.uuid() if isinstance(transform, CustomGraphPass) else None for transform in self.passes]
        return None if None in uuids else tuple(uuids)


__all__ = [
    "CustomGraphPass",
    "InTurn",
    "aoti_compile_and_package",
    "aoti_load_package",
    "compile_fx",
    "config_of",
    "fresh_cache",
    "get_cpp_compiler",
    "in_slot",
    "mode_names",
    "option_names",
    "writes_no_python",
]
