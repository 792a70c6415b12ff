"""All surgery on graphs: finding calls, reading their arguments and values, putting new nodes in their place.

Graphs come from Dynamo (values under `example_value`) or from `torch.export` (under `val`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xpu_lora_compile.passes.decisions import decisions_on, set_decisions
from xpu_lora_compile.torch_internals import path_of

# What of a node's meta tells where it comes from. Never the rest: Inductor keeps notes there that belong to the
# arguments of the old node, and fails on a new node that carries them.
_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
_VALUES = ("example_value", "val")
# The key of a module's meta that says whether it is a subgraph.
_SUBGRAPH = "xpu_lora_subgraph"


def graphs_of(module: torch.nn.Module) -> Iterator[Graph]:
    """The module's graph, and those of the subgraphs that its higher-order ops call."""
    for child in module.modules():
        if isinstance(child, GraphModule):
            child.meta[_SUBGRAPH] = child is not module
            _hand_values_down(child)
            yield child.graph


def is_subgraph(graph: Graph) -> bool:
    """Whether a higher-order op of another graph calls this one."""
    module = graph.owning_module
    return module is not None and bool(module.meta.get(_SUBGRAPH))


def calls_to(graph: Graph, op: torch._ops.OpOverload) -> list[Node]:
    """The graph's calls to `op`, spelled as overload or as packet, whose operands' shapes are known."""
    spellings = (op, op.overloadpacket)
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node.target in spellings
        and all(value_of(operand) is not None for operand in node.all_input_nodes)
    ]


def arguments_of(call: Node, op: torch._ops.OpOverload) -> list[Any]:
    """All arguments in the order of the schema, whether passed by position, by name or by default."""
    return [
        call.args[position]
        if position < len(call.args)
        else call.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
        for position, argument in enumerate(op._schema.arguments)
    ]


def value_of(node: Node) -> Any:
    """The fake tensor or the size that the node stands for; None where the graph does not say."""
    for key in _VALUES:
        if key in node.meta:
            return node.meta[key]
    if node.op == "get_attr":
        value: Any = node.graph.owning_module
        for name in str(node.target).split("."):
            value = getattr(value, name, None)
        return value if isinstance(value, Tensor) else None
    return None


def size_of(tensor: Node, dim: int, before: Node) -> int | Node:
    """One size of a tensor, to be used as an argument: a plain integer, or a node where it is symbolic."""
    size: int | torch.SymInt = value_of(tensor).shape[dim]
    if isinstance(size, int):
        return size
    return insert_before(before, torch.ops.aten.sym_size.int, (tensor, dim), size)


def insert_before(node: Node, op: Any, args: tuple[Any, ...], value: Any, **kwargs: Any) -> Node:
    """A new call in front of `node` that comes from the same source line and stands for `value`."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(op, args, kwargs)
    new.meta.update({key: node.meta[key] for key in _ORIGIN if key in node.meta})
    key = "val" if "val" in node.meta else "example_value"
    new.meta[key] = value
    return new


def replace(node: Node, op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Node:
    """Put a call of a mutating op in the place of `node`, which returns nothing either; the decisions stay with it."""
    new = insert_before(node, op, args, None)
    set_decisions(new, decisions_on(node))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def erase_unused(nodes: list[Node]) -> None:
    """Erase those of the nodes that nothing uses, users before what they use."""
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)


def _hand_values_down(module: GraphModule) -> None:
    """Tell the inputs of subgraphs what they stand for, as newer versions of torch do themselves (2.8 does not).

    Only of higher-order ops that hand their operands on as they are; a `map` hands on slices of them.
    """
    ops = torch.ops.higher_order
    plain = (ops.cond, ops.while_loop, ops.invoke_subgraph, ops.tag_activation_checkpoint)
    for node in module.graph.nodes:
        child = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if not isinstance(child, GraphModule):
            continue
        inputs = [inner for inner in child.graph.nodes if inner.op == "placeholder"]
        for call in node.users:
            # The operands come last, singly or as a tuple.
            operands = list(_nodes_in(call.args))[-len(inputs) :] if call.target in plain else []
            for placeholder, operand in zip(inputs, operands, strict=False):
                for key in _VALUES:
                    if key in operand.meta:
                        placeholder.meta.setdefault(key, operand.meta[key])


def _nodes_in(args: Any) -> Iterator[Node]:
    for arg in args:
        if isinstance(arg, Node):
            yield arg
        elif isinstance(arg, tuple | list):
            yield from _nodes_in(arg)


def origin_of(node: Node) -> tuple[str, str]:
    """The source line (`file.py:12`) and the path of the module (`model.lm_head`) that made a call.

    The line is the innermost one outside this package, whose own wrappers tell nobody anything.
    """
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [f"{file}:{line}" for file, line in frames if not file.startswith(_PACKAGE)]
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path = path_of(str(modules[-1][0])) if modules else ""
    return outside[-1] if outside else "", path


_PACKAGE = str(Path(__file__).parents[1])
