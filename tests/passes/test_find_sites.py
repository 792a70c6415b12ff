"""`find_sites`: which calls get a decision, what it says, and that nothing else happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import DEVICE
from support.snapshot import as_text, compiled_with, graphs_of_compiling, only
from torch import Tensor
from torch.fx import GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.passes import find_sites
from xpu_lora_compile.passes.decisions import decisions_on
from xpu_lora_compile.torch_internals import path_of

found = only(find_sites)

INDICES = torch.tensor([0, -1], device=DEVICE)
OUTPUT, X, A, B = (torch.ones(shape, device=DEVICE) for shape in ((2, 8), (2, 4), (1, 3, 4), (1, 5, 3)))


def three_sites(output: Tensor, x: Tensor) -> Any:
    hidden, output = x.new_zeros(2, 3), output * 2
    xlc.bgmv_shrink(hidden, x, A, INDICES)
    xlc.bgmv_expand(output, hidden, B, INDICES)
    xlc.bgmv_expand_slice(output, hidden, B, INDICES, 1, 5)
    return xlc.lora_linear(output, x, [A, A], [B, B[:, :2]], INDICES, [0, 5])


def test_each_call_that_adds_gets_a_decision_in_the_order_of_the_graph() -> None:
    with xlc.record_decisions() as decisions:
        graphs_of_compiling(three_sites, OUTPUT, X, passes=found)
    assert [(one.op, one.width, one.columns) for one in decisions] == [
        ("bgmv_expand", "5", "8"),
        ("bgmv_expand_slice", "5", "8"),
        ("lora_linear", "7", "8"),
    ]
    first = three_sites.__code__.co_firstlineno
    assert [one.source for one in decisions] == [f"{__file__}:{first + line}" for line in (3, 4, 5)]


def test_the_graph_stays_as_it_is() -> None:
    before = graphs_of_compiling(three_sites, OUTPUT, X, passes=lambda _module: None)
    assert graphs_of_compiling(three_sites, OUTPUT, X, passes=found) == before


def test_a_symbolic_size_is_said_by_its_name() -> None:
    output = OUTPUT.clone()
    torch._dynamo.mark_dynamic(output, 1)
    with xlc.record_decisions() as decisions:
        graphs_of_compiling(three_sites, output, X, passes=found)
    assert {one.columns for one in decisions} == {decisions[0].columns}
    assert decisions[0].columns.startswith("s")


def test_calls_inside_cond_are_found() -> None:
    def branch(output: Tensor, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, three_sites, lambda output, _x: output + 1, (output, x))

    with xlc.record_decisions() as decisions:
        graphs_of_compiling(branch, OUTPUT, X, passes=found)
    assert len(decisions) == 3


def test_a_call_keeps_the_decision_of_an_earlier_run() -> None:
    seen: list[list[int]] = []

    def twice(module: GraphModule) -> None:
        for _ in range(2):
            found(module)
            seen.append([id(one) for node in module.graph.nodes for one in decisions_on(node)])

    graphs_of_compiling(three_sites, OUTPUT, X, passes=twice)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


def test_every_decision_survives_all_passes_and_says_what_they_did() -> None:
    kept: list[Any] = []

    def passes(module: GraphModule) -> None:
        decisions = xlc.rewrite(module)
        on_nodes = [one for node in module.graph.nodes for one in decisions_on(node)]
        assert {id(one) for one in on_nodes} == {id(one) for one in decisions}
        assert "bgmv" not in as_text(module)
        kept.extend(decisions)

    with torch.no_grad():
        torch.testing.assert_close(compiled_with(passes, three_sites)(OUTPUT, X), three_sites(OUTPUT, X))
    assert [one.relation for one in kept] == ["narrower", "slice", "slice"]
    assert all(one.notes for one in kept[:2])


@pytest.mark.parametrize(
    "source",
    [
        "L['self'].layers[0].head",
        "L['self'].layers.0.head",
        "L['args'][0].layers[0].head",
        "L['fn']._modules['layers']._modules['0']._modules['head']",
    ],
)
def test_a_module_has_one_name_in_every_version_of_torch(source: str) -> None:
    assert path_of(source) == "layers.0.head"
    assert path_of(source.split(".")[0]) == ""
