"""What happens to a graph, in order."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any, cast, get_args

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from xpu_lora_compile.errors import ContractError, OptionError
from xpu_lora_compile.passes.decisions import Decision, record_decisions
from xpu_lora_compile.passes.editing import graphs_of
from xpu_lora_compile.passes.find_sites import find_sites
from xpu_lora_compile.passes.fuse_base import fuse_base
from xpu_lora_compile.passes.fuse_lora import fuse_lora
from xpu_lora_compile.passes.graph import Launch, Rewrite
from xpu_lora_compile.passes.lower import lower
from xpu_lora_compile.passes.resolve_width import resolve_width
from xpu_lora_compile.passes.share_input import share_input
from xpu_lora_compile.passes.share_routing import share_routing
from xpu_lora_compile.passes.text import as_text

PIPELINE = (
    find_sites,
    resolve_width,
    fuse_lora,
    share_routing,
    share_input,
    lower,
    fuse_base,
)

# For whoever looks for a wrong rewrite: how many rewrites each program gets, and where to write its graphs.
FUEL, DUMP = "XPU_LORA_FUEL", "XPU_LORA_DUMP"

_programs = itertools.count()


def rewrite(
    program: GraphModule | ExportedProgram,
    *,
    keep_bases: bool = False,
    launch: Launch = "auto",
    without_python: bool = False,
) -> list[Decision]:
    """Run the passes over a graph and its subgraphs, in place; what the graph computes stays the same.

    The environment variable `XPU_LORA_FUEL=n` stops after n rewrites of each program, and `XPU_LORA_DUMP=folder`
    writes the graph before and after each pass there.

    Args:
        program: what Dynamo gives a backend, or what `torch.export.export` returns. An exported program is decided
            by constants alone, since nobody would check a guard when it runs.
        keep_bases: leave base products as they are, so that what LoRA is added to can be looked at.
        launch: who launches the Triton kernels on a GPU: "inductor", to which they are visible; "op", an opaque op;
            "auto" has Inductor launch them on XPU, and in an exported program.
        without_python: take the kernels of this machine that a process without Python can run, for a program that
            leaves this one; what no such kernel takes is left alone.

    Returns:
        The decisions taken, in the order of the graph; none for a graph without shapes, which is left as it is.

    Raises:
        ContractError: something that holds no graph.
        OptionError: an unknown `launch`; XPU_LORA_FUEL is no number, or XPU_LORA_DUMP cannot be made.
    """
    checked_launch(launch)
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    if not isinstance(module, GraphModule):
        raise ContractError(
            "rewrite", "a GraphModule or an ExportedProgram", type(module).__name__, "Compile or export the model."
        )
    folder = _dump_folder()
    run = Rewrite(fuel(), keep_bases, launch, without_python)
    graphs = list(graphs_of(module))
    for position, transform in enumerate(PIPELINE):
        name = f"{position}-{transform.__name__}"
        _dump(folder, f"{name}-before.txt", module)
        for graph in graphs:
            transform(graph, run)
        _dump(folder, f"{name}-after.txt", module)
    for graph in graphs:
        graph.lint()
    for child in module.modules():
        if isinstance(child, GraphModule):
            child.recompile()
    if isinstance(program, ExportedProgram):
        _rename_outputs(program)
    return run.decisions


def checked_launch(launch: str) -> Launch:
    """Return who is to launch the Triton kernels; OptionError for an unknown name."""
    if launch not in get_args(Launch):
        names = ", ".join(map(repr, get_args(Launch)))
        raise OptionError("launch", f"one of {names}", repr(launch), "Leave it out for 'auto'.")
    return cast("Launch", launch)


def _rename_outputs(program: ExportedProgram) -> None:
    """Have the signature call the outputs what they are called now."""
    (results,) = program.graph.output_node().args
    for spec, node in zip(program.graph_signature.output_specs, cast("tuple[Any, ...]", results), strict=True):
        if isinstance(node, Node):
            spec.arg = dataclasses.replace(cast("Any", spec.arg), name=node.name)


def fuel() -> int | None:
    """How many rewrites each program gets; None is without limit."""
    value = os.environ.get(FUEL, "")
    if not value:
        return None
    if not value.isdecimal():
        raise OptionError(
            FUEL, "a number of rewrites, 0 or more", repr(value), "Give a number of rewrites, 0 or more, or unset it."
        )
    return int(value)


def check_environment() -> None:
    """Raise OptionError for variables of the environment that `rewrite` would stumble over."""
    fuel()
    _dump_root()


def _dump_root() -> Path | None:
    root = os.environ.get(DUMP, "")
    if not root:
        return None
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            DUMP, "a folder that can be made", str(error), "Name a folder you may write to, or unset it."
        ) from error
    return Path(root)


def _dump_folder() -> Path | None:
    """A new folder for one program, inside the one that the environment names."""
    root = _dump_root()
    if root is None:
        return None
    folder = root / f"{os.getpid()}-{next(_programs)}"
    folder.mkdir(exist_ok=True)
    return folder


def _dump(folder: Path | None, name: str, module: GraphModule) -> None:
    if folder is not None:
        (folder / name).write_text(as_text(module) + "\n")


__all__ = [
    "PIPELINE",
    "Decision",
    "Launch",
    "check_environment",
    "checked_launch",
    "fuel",
    "record_decisions",
    "rewrite",
]
