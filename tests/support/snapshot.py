"""The graphs that a compiler is given for a real call, as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

import xpu_lora_compile as xlc
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
