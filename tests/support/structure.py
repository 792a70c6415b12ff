"""What has to hold of a graph between any two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from xpu_lora_compile import ops
from xpu_lora_compile.passes.editing import value_of

OURS = {getattr(ops, name) for name in ops.__all__ if name.isupper()}


def check_structure(graph: Graph) -> None:
    """Assert that a graph is well-formed, and that its values are those that our ops' fakes compute."""
    graph.lint()
    alive = set(graph.nodes)
    for node in graph.nodes:
        assert set(node.all_input_nodes) <= alive, f"{node} uses a node that is gone"
        assert set(node.users) <= alive, f"{node} is used by a node that is gone"
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _check_value(node)


def _check_value(node: Node) -> None:
    value = value_of(node)
    if node.target._schema.returns:
        assert value is not None, f"{node}: no value"
    operands: Any = map_arg((node.args, node.kwargs), value_of)
    if node.target in OURS and all(value_of(operand) is not None for operand in node.all_input_nodes):
        args, kwargs = operands
        with torch.no_grad():
            computed = node.target(*args, **kwargs)
        assert _form_of(computed) == _form_of(value), f"{node}: {_form_of(value)}, computed {_form_of(computed)}"


def _form_of(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_form_of(one) for one in value]
    return (str(list(value.shape)), value.dtype, value.device) if isinstance(value, Tensor) else None
