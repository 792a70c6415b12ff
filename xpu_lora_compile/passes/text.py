"""A graph as text that says what a reader needs and nothing that changes by itself.

One line a node: `%2: f32[T, 10] = linear(%0, %1)`. Inputs come in the order of their first use, since torch's own order
differs between its versions. Symbolic sizes are renamed by first use: T, S1, S2, ...; a subgraph
follows, indented. No node names, stack traces, devices or paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from xpu_lora_compile.passes.editing import value_of

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int64": "i64", "int32": "i32", "bool": "b8"}


def as_text(module: GraphModule) -> str:
    """The module's graph, then its subgraphs."""
    text = "\n".join(_lines(module, ""))
    symbols = dict.fromkeys(re.findall(r"\b[su]\d+\b", text))
    names = {symbol: "T" if order == 0 else f"S{order}" for order, symbol in enumerate(symbols)}
    return re.sub(r"\b[su]\d+\b", lambda match: names[match[0]], text)


def lines_of(module: GraphModule) -> Iterator[tuple[Node, str, str, str]]:
    """For each node of the module's own graph, and then of its subgraphs: its name here (`%3`), its type, its call."""
    nodes = _by_first_use(module)
    numbers = {node: f"%{position}" for position, node in enumerate(nodes)}
    for node in nodes:
        text = f"return {_show(node.args[0], numbers)}" if node.op == "output" else _call(node, numbers)
        yield node, numbers[node], _type(node), text
    for _, child in module.named_children():
        if isinstance(child, GraphModule):
            yield from lines_of(child)


def _lines(module: GraphModule, indent: str) -> Iterator[str]:
    own = set(module.graph.nodes)
    for node, name, type_, text in lines_of(module):
        if node not in own:
            break
        has_result = node.op != "output" and (type_ or node.op != "call_function")
        yield indent + (f"{name}{': ' if type_ else ''}{type_} = {text}" if has_result else text)
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            yield f"{indent}{name}:"
            yield from _lines(child, indent + "  ")


def _by_first_use(module: GraphModule) -> list[Node]:
    nodes = list(module.graph.nodes)
    used = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand.op == "placeholder")
    inputs = [node for node in nodes if node.op == "placeholder"]
    unused = [node for node in inputs if node not in used]
    return [*used, *unused, *nodes[len(inputs) :]]


def _call(node: Node, numbers: dict[Node, str]) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"attribute {node.target}" if isinstance(value_of(node), type(None)) else "constant"
    target = node.target
    name = (
        str(target).removesuffix(".default")
        if isinstance(target, torch._ops.OpOverload)
        else f".{target}"
        if node.op == "call_method"
        else getattr(target, "__name__", str(target))
    )
    args = [_show(arg, numbers) for arg in node.args]
    args += [f"{key}={_show(value, numbers)}" for key, value in node.kwargs.items() if key != "device"]
    return f"{name}({', '.join(args)})"


def _type(node: Node) -> str:
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return f"{dtype_of(value)}{_sizes(value.shape)}"
    return str(value) if isinstance(value, torch.SymInt) else ""


def dtype_of(tensor: torch.Tensor) -> str:
    """The dtype in short, `bf16`."""
    name = str(tensor.dtype).removeprefix("torch.")
    return DTYPES.get(name, name)


def _sizes(shape: Any) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _show(value: Any, numbers: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return numbers[value]
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_show(item, numbers) for item in value) + ")"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
