"""What a pass may ask about memory: who shares, reads and writes it, and what cannot be known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import DEVICE
from support.snapshot import compiled_with
from torch import Tensor
from torch.fx import GraphModule, Node

import xpu_lora_compile as xlc
from xpu_lora_compile.passes.editing import value_of
from xpu_lora_compile.passes.memory import (
    is_barrier,
    is_pure,
    knows_its_views,
    overlap,
    read_by,
    region_of,
    storages_of,
    written_by,
)

X = torch.arange(12.0, device=DEVICE).view(3, 4)
INDICES = torch.tensor([0, -1, 0], device=DEVICE)
A, B = torch.ones(1, 2, 4, device=DEVICE), torch.ones(1, 4, 2, device=DEVICE)


def nodes_of(function: Callable[..., Any], *args: Tensor) -> list[Node]:
    """The calls that the function is traced to."""
    found: list[Node] = []
    keep: list[GraphModule] = []

    def look(module: GraphModule) -> None:
        keep.append(module)
        found.extend(node for node in module.graph.nodes if node.op.startswith("call"))

    with torch.no_grad():
        compiled_with(look, function)(*(one.clone() for one in args))
    return found


# Each on x of its own, with what it does to the memory of x: it reads, it writes, and it does nothing else.
CALLS: dict[str, tuple[Callable[[Tensor], Any], bool, bool, bool]] = {
    "function": (lambda x: torch.sin(x), True, False, True),
    "method": (lambda x: x.sin(), True, False, True),
    "operator": (lambda x: x * 2, True, False, True),
    "functional": (lambda x: torch.nn.functional.silu(x), True, False, True),
    "view": (lambda x: x.view(4, 3), False, False, True),
    "getitem": (lambda x: x[:, 1:], False, False, True),
    "zeros_like": (lambda x: torch.zeros_like(x), False, False, True),
    "new_empty": (lambda x: x.new_zeros(2), False, False, True),
    "conversion": (lambda x: x.bfloat16(), True, False, True),
    "method-in-place": (lambda x: x.add_(1), True, True, False),
    "operator-in-place": (lambda x: x.__iadd__(1), True, True, False),
    "functional-in-place": (lambda x: torch.nn.functional.relu(x, inplace=True), True, True, False),
    "random": (lambda x: torch.bernoulli(x), True, False, False),
    "ours": (lambda x: torch.ops.xpu_lora.bgmv_expand_slice(x, x[:, :2], B, INDICES, 0, 4), True, True, False),
    "ours-functional": (lambda x: xlc.lora_linear(x, x, [A], [B], INDICES, [0]), True, False, True),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_reads_and_writes_what_it_says(name: str) -> None:
    call, reads, writes, pure = CALLS[name]

    def function(x: Tensor) -> Any:
        x = x / 2
        result = call(x)
        return x if result is None else result

    made, *_, last = nodes_of(function, X.clamp(0, 1) if name == "random" else X)
    assert [storages_of(made) <= read_by(last), storages_of(made) <= written_by(last)] == [reads, writes]
    assert is_pure(last) is pure
    assert not is_barrier(last)


def test_an_argument_named_out_is_written() -> None:
    def function(x: Tensor) -> Tensor:
        y = x / 2
        torch.add(x, 1, out=y)
        return y

    nodes = nodes_of(function, X)
    assert any(storages_of(nodes[0]) <= written_by(node) for node in nodes[1:])


def test_what_is_returned_is_read() -> None:
    seen: list[Node] = []
    with torch.no_grad():
        compiled_with(lambda module: seen.extend(module.graph.nodes), lambda x: (x / 2).view(-1))(X)
    *_, view, output = seen
    assert storages_of(view) <= read_by(output)


def test_both_ends_of_an_autocast_region_are_barriers() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = x @ x.t()
        return y.float()

    assert [is_barrier(node) for node in nodes_of(function, X)].count(True) == 2


def test_both_ends_of_a_grad_mode_are_barriers() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x @ x.t()
        return y + 1

    assert [is_barrier(node) for node in nodes_of(function, X)].count(True) == 2


def test_a_view_shares_its_region_only_if_it_is_the_same_elements() -> None:
    def function(x: Tensor) -> Any:
        x = x / 2
        return x.view(3, 4), x.view(4, 3), x.view(torch.int32), x[:2], x / 2

    base, *others = nodes_of(function, X)
    assert [region_of(value_of(base)) == region_of(value_of(one)) for one in others] == [True] + [False] * 4
    assert [storages_of(base) == storages_of(one) for one in others] == [True] * 4 + [False]


@pytest.mark.parametrize("dynamic", [False, True])
def test_parts_of_a_buffer_do_not_overlap_whatever_its_size(dynamic: bool) -> None:
    parts: list[Node] = []

    def function(x: Tensor) -> Any:
        buffer = x.new_zeros(2, x.shape[0], 5)
        return buffer[0] + 1, buffer[1] + 1, buffer[1, 1:] + 1

    def look(module: GraphModule) -> None:
        nodes = [node for node in module.graph.nodes if isinstance(value_of(node), Tensor)]
        parts.extend(node for node in nodes if getattr(node.target, "__name__", "") == "getitem")
        first, second, inside = (value_of(part) for part in parts)
        assert not overlap(first, second)
        assert not overlap(second, first)
        assert overlap(second, inside)
        assert overlap(inside, second)

    with torch.no_grad():
        compiled_with(look, function, dynamic=dynamic)(X)
    assert len(parts) == 3


@pytest.mark.parametrize(
    ("left", "right", "apart"),
    [((0, 2), (2, 5), True), ((2, 5), (0, 2), True), ((0, 3), (2, 5), False), ((1, 2), (4, 5), True)],
)
def test_different_columns_of_a_matrix_do_not_overlap(
    left: tuple[int, int], right: tuple[int, int], apart: bool
) -> None:
    for matrix in (torch.zeros(3, 5), torch.zeros(40)[7:27].view(4, 5)):
        assert overlap(matrix[:, slice(*left)], matrix[:, slice(*right)]) is not apart
    # Rows of another length interleave.
    assert overlap(matrix[:, slice(*left)], matrix[:2].reshape(-1).as_strided((3, 2), (3, 1), 7))


class Flat(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).view(-1)


def test_an_unpickled_program_does_not_know_its_views(tmp_path) -> None:
    program = torch.export.export(Flat(), (X,))
    assert knows_its_views(program.graph_module.graph)
    torch.export.save(program, tmp_path / "program.pt2")
    assert not knows_its_views(torch.export.load(tmp_path / "program.pt2").graph_module.graph)


class Copies(torch.nn.Module):
    """Calls of ops that return a view where they can, and cannot here."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y.t().reshape(-1), y.to(torch.float64)


def test_an_exported_program_that_copies_knows_its_views() -> None:
    program = torch.export.export(Copies(), (X,))
    assert knows_its_views(program.graph_module.graph)


class Repeats(torch.nn.Module):
    """Each head's keys twice, as attention does where two queries share them."""

    def forward(self, x: Tensor) -> Tensor:
        heads = (x * 2).view(-1, 5, 2, 3).transpose(1, 2)
        return heads[:, :, None].expand(-1, 2, 2, 5, 3).reshape(x.shape[0], 4, 5, 3)


def test_a_copy_of_a_symbolic_size_is_known() -> None:
    batch = {0: torch.export.Dim("batch", max=64)}
    program = torch.export.export(Repeats(), (torch.ones(3, 5, 6),), dynamic_shapes=(batch,))
    assert knows_its_views(program.graph_module.graph)


@pytest.mark.parametrize(("name", "writes"), [("__getitem__", False), ("__eq__", False), ("__setitem__", True)])
def test_operators_spelled_as_methods_are_known(name: str, writes: bool) -> None:
    graph = torch.fx.Graph()
    tensor = graph.placeholder("tensor")
    tensor.meta["example_value"] = torch.zeros(3)
    call = graph.call_method(name, (tensor, 0, 1.0) if writes else (tensor, 0))
    assert written_by(call) == (storages_of(tensor) if writes else set())
    assert is_pure(call) is not writes


def written_in(function: Callable[..., Any], *args: Tensor) -> list[str]:
    """The names of the arguments that a call of the function writes to."""
    names: list[str] = []

    def look(module: GraphModule) -> None:
        written = {one for node in module.graph.nodes for one in written_by(node)}
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        names.extend(node.name for node in inputs if storages_of(node) & written)

    with torch.no_grad():
        compiled_with(look, function)(*args)
    return names


def test_outputs_in_a_tuple_are_written() -> None:
    def sort(x: Tensor, values: Tensor, order: Tensor) -> Any:
        return torch.sort(x, 1, out=(values, order))

    assert len(written_in(sort, X.clone(), X.clone(), torch.zeros(3, 4, dtype=torch.int64, device=DEVICE))) >= 2


def test_running_statistics_and_rescaled_weights_are_written() -> None:
    def norm(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, mean, variance, training=True)

    def look_up(index: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.embedding(index, weight, max_norm=1.0)

    ones = torch.ones(4, device=DEVICE)
    assert len(written_in(norm, X.clone(), ones.clone(), ones.clone())) >= 2
    index = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in ("index", "weight")]
    for node, value in zip(nodes, (index, X.clone()), strict=True):
        node.meta["example_value"] = value
    for norm_limit, written in ((1.0, True), (None, False)):
        call = graph.call_function(torch.nn.functional.embedding, tuple(nodes), {"max_norm": norm_limit})
        assert bool(storages_of(nodes[1]) & written_by(call)) is written


def test_graphs_inside_transforms_of_torch_func_are_left_alone() -> None:
    def gradient(x: Tensor) -> Any:
        return torch.func.grad(lambda one: (one * 2).sum())(x)

    got = torch.compile(gradient, backend="xpu_lora", options={"xpu_lora.execute": "eager"})(X)
    assert torch.equal(got, torch.full_like(X, 2.0))
