"""`Rewrite` and `Memory`: what the passes ask of one run and of one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.snapshot import graphs_of_compiling
from torch import Tensor
from torch.fx import Graph, GraphModule

from xpu_lora_compile.passes.decisions import Decision, record_decisions, set_decisions
from xpu_lora_compile.passes.editing import calls_to
from xpu_lora_compile.passes.graph import Memory, Rewrite


def captured(function: Callable[..., Any], *args: Tensor) -> Graph:
    """The graph that Dynamo makes of a function."""
    modules: list[GraphModule] = []
    graphs_of_compiling(function, *args, passes=modules.append)
    return modules[0].graph


def test_fuel_is_used_up_and_the_decision_says_so() -> None:
    graph = Graph()
    node, decision = graph.placeholder("x"), Decision("lora_linear", "", "", "4", "4")
    set_decisions(node, [decision])
    rewrite = Rewrite(fuel=1)
    assert [rewrite.takes_fuel(node) for _ in range(3)] == [True, False, False]
    assert decision.notes == ["left as it is: XPU_LORA_FUEL has run out"]
    assert all(Rewrite().takes_fuel(node) for _ in range(3))


def test_a_decision_is_kept_once_and_given_to_every_open_block() -> None:
    decision, rewrite = Decision("lora_linear", "", "", "4", "4"), Rewrite()
    with record_decisions() as outer, record_decisions() as inner:
        rewrite.record(decision)
        rewrite.record(decision)
    assert outer == inner == rewrite.decisions == [decision]


def test_a_write_between_two_nodes_is_known_through_any_view() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.ops.aten.mul.Tensor(x, 2.0)
        first = torch.ops.aten.neg.default(rows)
        torch.ops.aten.zero_.default(torch.ops.aten.slice.Tensor(rows, 0, 0, 1))
        return first, torch.ops.aten.abs.default(rows)

    graph = captured(function, torch.ones(2, 3))
    memory = Memory(graph)
    (rows,), (first,), (last,) = (
        calls_to(graph, op)
        for op in (torch.ops.aten.mul.Tensor, torch.ops.aten.neg.default, torch.ops.aten.abs.default)
    )
    assert memory.is_unchanged(rows, rows, first)
    assert not memory.is_unchanged(rows, first, last)
    assert memory.is_seen_after(rows, first)
    assert not memory.is_seen_after(rows, last)
    assert memory.is_before(first, last)


def test_what_comes_from_outside_is_always_seen() -> None:
    graph = captured(lambda x: torch.ops.aten.neg.default(x), torch.ones(2, 3))
    memory, (call,) = Memory(graph), calls_to(graph, torch.ops.aten.neg.default)
    assert memory.is_seen_after(call.all_input_nodes[0], call)


def test_a_node_that_a_pass_adds_takes_its_place_in_the_order() -> None:
    graph = captured(lambda x: torch.ops.aten.abs.default(torch.ops.aten.neg.default(x)), torch.ones(2, 3))
    memory = Memory(graph)
    (first,), (last,) = (calls_to(graph, op) for op in (torch.ops.aten.neg.default, torch.ops.aten.abs.default))
    with graph.inserting_before(last):
        made = graph.call_function(torch.ops.aten.clone.default, (first,))
    made.meta.update(first.meta)
    memory.add(made, last)
    assert memory.is_before(first, made)
    assert memory.is_before(made, last)
