"""What every layer computes from the indices for itself -> computed once, where the first one did."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Graph, Node

from xpu_lora_compile.ops import LORA_LINEAR, LORA_LINEARS, TRAINED_LINEAR
from xpu_lora_compile.passes.calls import EXPANDS, SHRINKS, lora_calls
from xpu_lora_compile.passes.editing import erase_unused, value_of
from xpu_lora_compile.passes.graph import Rewrite
from xpu_lora_compile.passes.memory import input_storages, is_pure, read_by, storages_of, written_by


def share_routing(graph: Graph, rewrite: Rewrite) -> None:
    """Compute once what several layers compute from the same indices by the same calls.

    Before:
        rows = slots[:, None].expand(-1, 7).reshape(-1);       lora_linear(…, rows, …)
        rows_1 = slots[:, None].expand(-1, 7).reshape(-1);     lora_linear(…, rows_1, …)

    After:
        rows = slots[:, None].expand(-1, 7).reshape(-1);       lora_linear(…, rows, …)
                                                               lora_linear(…, rows, …)

    What kernels derive from the rows (`route`: masks, the order by slot, where each slot starts) is put in once a
    graph by `lower`, for all calls that have the same rows.

    The same of the weights of several adapters for a row, where the op that gives them reads the same tensors.

    Left alone: indices that are computed from floating point, whose memory something writes to, or that are returned.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    written = {storage for node in graph.nodes for storage in written_by(node)}
    # Of what is returned, the caller may write to one and not mean the other.
    returned = {storage for node in graph.nodes if node.op == "output" for storage in read_by(node)}
    returned -= input_storages(graph)
    wanted: set[Node] = set()
    for call in lora_calls(graph, *SHRINKS, *EXPANDS, LORA_LINEAR, LORA_LINEARS, TRAINED_LINEAR):
        wanted |= _ancestry(call.indices)
        if call.adapter_weights is not None and not value_of(call.adapter_weights).requires_grad:
            # What they are looked up from may be computed in any way.
            wanted.add(call.adapter_weights)
    first: dict[Hashable, Node] = {}
    doubles: list[Node] = []
    for node in graph.nodes:
        if node not in wanted or node.op.startswith("placeholder") or not is_pure(node):
            continue
        if storages_of(node) & written or any(storages_of(operand) & written for operand in node.all_input_nodes):
            continue
        original = first.setdefault(_what_it_computes(node), node)
        if original is not node and not storages_of(node) & returned and rewrite.takes_fuel(node):
            node.replace_all_uses_with(original)
            doubles.append(node)
    erase_unused(doubles)


def _ancestry(indices: Node) -> set[Node]:
    """All the tensors that indices are computed from; empty where that is more than integers and masks."""
    found: set[Node] = set()
    rest = [indices]
    while rest:
        node = rest.pop()
        if node not in found and isinstance(value_of(node), torch.Tensor):
            if value_of(node).is_floating_point():
                return set()
            found.add(node)
            rest += node.all_input_nodes
    return found


def _what_it_computes(node: Node) -> Hashable:
    """Equal for calls that compute the same; a size counts by its expression, whichever node says it."""
    return node.op, str(node.target), _spelled(node.args), _spelled(tuple(sorted(node.kwargs.items())))


def _spelled(argument: Any) -> Hashable:
    if isinstance(argument, Node):
        value = value_of(argument)
        return f"size {value}" if isinstance(value, int | torch.SymInt) else argument
    if isinstance(argument, tuple | list):
        return tuple(map(_spelled, argument))
    if isinstance(argument, slice):
        return "slice", _spelled(argument.start), _spelled(argument.stop), _spelled(argument.step)
    return str(argument)
