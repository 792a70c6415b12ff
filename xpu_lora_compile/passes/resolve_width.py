"""bgmv_expand -> the one node that the relation of its two widths needs."""

from __future__ import annotations

import torch
from torch.fx import Graph

from xpu_lora_compile.ops import BGMV_EXPAND, EXPAND, EXPAND_SLICE
from xpu_lora_compile.passes.calls import lora_calls
from xpu_lora_compile.passes.decisions import Relation
from xpu_lora_compile.passes.editing import insert_before, replace, size_of, value_of
from xpu_lora_compile.passes.find_sites import decision_of
from xpu_lora_compile.passes.graph import Rewrite
from xpu_lora_compile.torch_internals import is_guarded, is_known


def resolve_width(graph: Graph, rewrite: Rewrite) -> None:
    """Settle every `bgmv_expand` while compiling, so that nothing is decided when it runs.

    Before:
        bgmv_expand(output, inputs, b, indices, add)

    After, by the relation of W (rows of an adapter's B) to H (columns of the output):
        W == H    expand(output, inputs, b, indices, add)
        W <  H    expand_slice(output, inputs, b, indices, 0, W, add)
        W >  H    view = b[..., :H, :]                                    a view, never a copy
                  expand_slice(output, inputs, view, indices, 0, H, add)

    Left alone: a call whose relation is not known for all inputs that the graph is for. That is a size which
    depends on data, or, in an exported program, a dynamic size; `bgmv_expand` then takes the smaller when it runs.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    for call in lora_calls(graph, BGMV_EXPAND):
        (output,), (weights,) = call.outputs, call.lora_b
        decision = decision_of(call)
        decision.relation, decision.guard = _relation(value_of(weights).shape[-2], value_of(output).shape[1])
        if decision.relation == "undecided" or not rewrite.takes_fuel(call.node):
            continue
        if decision.relation == "equal":
            replace(call.node, EXPAND, (output, call.inputs, weights, call.indices, call.add))
            continue
        if decision.relation == "narrower":
            columns = size_of(weights, -2, call.node)
        else:
            columns = size_of(output, 1, call.node)
            leading_rows = value_of(weights).narrow(-2, 0, value_of(output).shape[1])
            args = (weights, -2, 0, columns)
            weights = insert_before(call.node, torch.ops.aten.slice.Tensor, args, leading_rows)
        replace(call.node, EXPAND_SLICE, (output, call.inputs, weights, call.indices, 0, columns, call.add))


def _relation(width: int | torch.SymInt, columns: int | torch.SymInt) -> tuple[Relation, str | None]:
    """The relation of W to H, and the guard that it rests on."""
    relations: tuple[tuple[Relation, bool | torch.SymBool], ...] = (
        ("equal", width == columns),
        ("narrower", width < columns),
        ("wider", width > columns),
    )
    for settles, leaves_a_guard in ((is_known, False), (is_guarded, True)):
        for relation, condition in relations:
            if settles(condition):
                return relation, str(condition) if leaves_a_guard else None
    return "undecided", None
