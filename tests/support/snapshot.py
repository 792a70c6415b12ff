"""The graphs that a compiler is given for a real call, as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.structure import check_structure
from torch.fx import Graph, GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.passes.editing import graphs_of
from xpu_lora_compile.passes.graph import Rewrite
from xpu_lora_compile.passes.text import as_text


def graphs_of_compiling(
    function: Callable[..., Any], *args: Any, passes: Callable[[GraphModule], Any] = xlc.rewrite, **options: Any
) -> list[str]:
    """Compile and call the function; return the text of each graph that the compiler was given, after the passes."""
    texts: list[str] = []

    def backend(module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        passes(module)
        texts.append(as_text(module))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, **options)(*args)
    return texts


def only(*transforms: Callable[[Graph, Rewrite], None]) -> Callable[[GraphModule], None]:
    """These passes alone, over a module's graph and its subgraphs."""

    def run(module: GraphModule) -> None:
        graphs = list(graphs_of(module))
        for transform in transforms:
            for graph in graphs:
                transform(graph, Rewrite())
                check_structure(graph)

    return run


def compiled_with(passes: Callable[[GraphModule], Any], function: Callable[..., Any], **options: Any) -> Any:
    """The function, compiled by a backend that runs the passes and then what they left of the graph."""

    def backend(module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        passes(module)
        module.recompile()
        return module.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def calls_in(text: str, op: str) -> int:
    """How often a graph's text calls one of our ops."""
    return text.count(f"xpu_lora.{op}(")
