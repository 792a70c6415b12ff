"""lora_linear and trained_linear calls on one input -> one call with several outputs."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
from torch.fx import Graph, Node

from xpu_lora_compile.ops import LORA_LINEAR, LORA_LINEARS, TRAINED_LINEAR
from xpu_lora_compile.passes.calls import LoraNode, lora_calls
from xpu_lora_compile.passes.decisions import decisions_on, note, set_decisions
from xpu_lora_compile.passes.editing import insert_before, value_of
from xpu_lora_compile.passes.graph import Rewrite
from xpu_lora_compile.passes.memory import (
    is_barrier,
    is_pure,
    knows_its_views,
    read_by,
    region_of,
    storages_of,
    written_by,
)


def share_input(graph: Graph, rewrite: Rewrite) -> None:
    """Make one call of the `lora_linear`s that read the same input with the same indices and scaling.

    Before:
        q = linear(x, wq);    q_1 = lora_linear(q, x, [aq], [bq], indices, [0], scaling);    use(q_1)
        k = linear(x, wk);    k_1 = lora_linear(k, x, [ak], [bk], indices, [0], scaling);    use(k_1)

    After:
        q = linear(x, wq)
        k = linear(x, wk)
        q_1, k_1 = lora_linears([q, k], x, [aq, ak], [bq, bk], indices, [0, 1], [0, 0], scaling)
        use(q_1)
        use(k_1)

    Of layers that are trained, where the same slots are, with the same scalings:
        q_1 = trained_linear([q], x, [aq], [bq], indices, scalings, slots, [leaf_aq], [leaf_bq])[0]
        k_1 = trained_linear([k], x, [ak], [bk], indices, scalings, slots, [leaf_ak], [leaf_bk])[0]
    become
        q_1, k_1 = trained_linear([q, k], x, [aq, ak], [bq, bk], indices, scalings, slots, [leaf_aq, leaf_ak], …)

    What the later bases are computed from moves up to the first call. The base linears stay as they are.

    Left alone: a base that cannot move, because it depends on the first call or on something that is written to in
    between, or because calls on its way are not known to be pure; the decision says so. Calls on two sides of a change
    of autocast or grad mode.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    if not knows_its_views(graph):
        return
    for group in _find_groups(graph):
        members = group[:1]
        for call in group[1:]:
            moves = _moves(call, group[0])
            if moves is None:
                note(call, "share_input: left alone, since its base cannot move up to the first call on this input")
            elif rewrite.takes_fuel(call):
                for node in moves:
                    group[0].prepend(node)
                members.append(call)
        if len(members) > 1:
            _merge(members)


def _find_groups(graph: Graph) -> list[list[Node]]:
    """Calls on the same input, indices, weights and scaling, between which nothing writes to those."""
    groups: list[list[Node]] = []
    opened: dict[Any, tuple[set[int], list[Node]]] = {}
    calls = {call.node: call for call in lora_calls(graph, LORA_LINEAR, TRAINED_LINEAR)}
    for node in graph.nodes:
        written = written_by(node)
        if is_barrier(node):
            opened.clear()
        for key, (read, _) in list(opened.items()) if written else ():
            if read & written:
                del opened[key]
        if node in calls:
            call = calls[node]
            operands = call.inputs, call.indices, call.ranks, call.adapter_weights, call.scalings, call.trained_slots
            # The same elements, detached, get no gradient.
            key = (
                *(node and (region_of(value_of(node)), value_of(node).requires_grad) for node in operands),
                call.scaling,
                call.op,
            )
            if key not in opened:
                opened[key] = set().union(*(storages_of(node) for node in operands if node)), []
                groups.append(opened[key][1])
            opened[key][1].append(node)
    return groups


def _moves(call: Node, first: Node) -> list[Node] | None:
    """The nodes between `first` and `call` that `call` is computed from, in order; None if one of them has to stay."""
    between: list[Node] = []
    node = first.next
    while node is not call:
        between.append(node)
        node = node.next
    needed: set[Node] = set(call.all_input_nodes)
    for node in reversed(between):
        if node in needed:
            needed.update(node.all_input_nodes)
    moves: list[Node] = []
    # The memory that changes between the first call and the place where a node stands now.
    changed: set[int] = set()
    for node in between:
        if node in needed:
            reads = read_by(node) | storages_of(node)
            if first in node.all_input_nodes or not is_pure(node) or reads & changed:
                return None
            moves.append(node)
        changed |= written_by(node)
    read = set().union(*map(storages_of, call.all_input_nodes))
    return None if first in needed or read & changed else moves


def _merge(members: list[Node]) -> None:
    """Put one call in the place of the first; its results in the place of theirs."""
    first = members[0]
    calls = [LoraNode(call) for call in members]
    op, args = _merged(calls)
    values = [value_of(call) for call in members]
    is_list = op is TRAINED_LINEAR
    merged = insert_before(first, op, args, [value[0] for value in values] if is_list else values)
    places = ", ".join(dict.fromkeys(decision.place for call in members for decision in decisions_on(call)))
    set_decisions(merged, [decision for call in members for decision in decisions_on(call)])
    note(merged, f"share_input: one call for {places}")
    # A call that returns a list is followed by its only element.
    replaced = [list(call.users) if is_list else [call] for call in members]
    for position, (value, nodes) in enumerate(zip(value_of(merged), replaced, strict=True)):
        result = insert_before(first, operator.getitem, (merged, position), value)
        for node in nodes:
            node.replace_all_uses_with(result)
    for node in [*chain(*replaced), *(members if is_list else ())]:
        node.graph.erase_node(node)


def _merged(calls: list[LoraNode]) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The op that computes several calls, each of one output, and its arguments."""
    first = calls[0]
    bases = [base for call in calls for base in call.outputs]
    lora_a = [a for call in calls for a in call.lora_a]
    lora_b = [b for call in calls for b in call.lora_b]
    operands = bases, first.inputs, lora_a, lora_b, first.indices
    if first.op is TRAINED_LINEAR:
        trained = ([node for call in calls for node in call.trained[part]] for part in (0, 1))
        return TRAINED_LINEAR, (*operands, first.scalings, first.trained_slots, *trained)
    optional = [first.ranks, first.adapter_weights]
    while optional and optional[-1] is None:
        optional.pop()
    outputs = [position for position, call in enumerate(calls) for _ in call.lora_a]
    offsets = [offset for call in calls for offset in call.slice_offsets]
    return LORA_LINEARS, (*operands, outputs, offsets, first.scaling, *optional)
