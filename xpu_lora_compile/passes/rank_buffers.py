"""What the rank buffers of a graph hold: which shrink filled them for which expand, and who else uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.ops import BGMV_EXPAND, BGMV_EXPAND_SLICE, BGMV_SHRINK, EXPAND, EXPAND_SLICE, SHRINK
from xpu_lora_compile.passes.editing import arguments_of, calls_to, erase_unused, value_of
from xpu_lora_compile.passes.memory import (
    Region,
    input_storages,
    is_barrier,
    overlap,
    read_by,
    region_of,
    storage_of,
    storages_of,
    written_by,
)
from xpu_lora_compile.torch_internals import is_guarded

OpOverload: TypeAlias = torch._ops.OpOverload


@dataclass(eq=False)
class Shrink:
    """One call of shrink, and the memory of the buffers that its result has been written to."""

    call: Node
    op: OpOverload
    buffers: set[int]
    # The memory of what it reads.
    operands: set[int]

    # Read from the call each time: fusing one chain changes the arguments of the next.
    @property
    def inputs(self) -> Node:
        """The rows, `[T, D]`."""
        return cast("Node", arguments_of(self.call, self.op)[1])

    @property
    def a(self) -> Node:
        """A, `[K, R, D]`."""
        return cast("Node", arguments_of(self.call, self.op)[2])

    @property
    def indices(self) -> Node:
        """The indices, `[T]`."""
        return cast("Node", arguments_of(self.call, self.op)[3])

    @property
    def scaling(self) -> float:
        """The factor on the result."""
        return cast("float", arguments_of(self.call, self.op)[4])


@dataclass(eq=False)
class Expand:
    """One call of expand with its shrink, or with the reason why it is left alone."""

    call: Node
    output: Node
    hidden: Node
    b: Node
    indices: Node
    offset: int | Node
    adds: bool
    shrink: Shrink | None = None
    refusal: str = ""

    @property
    def writes(self) -> int:
        """The memory of its output."""
        return storage_of(value_of(self.output))

    @property
    def operands(self) -> set[int]:
        """The memory of what the fused call will read besides its output."""
        return storages_of(self.b) | storages_of(self.indices) | (self.shrink.operands if self.shrink else set())


class RankBuffers:
    """The memory that calls of shrink write to, and who uses it besides the calls that this pass knows."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.shrinks = {call: op for op in (BGMV_SHRINK, SHRINK) for call in calls_to(graph, op)}
        self.storages = {storage_of(value_of(arguments_of(call, op)[0])) for call, op in self.shrinks.items()}
        self.strangers: dict[int, str] = dict.fromkeys(
            input_storages(graph), "the rank buffer is an input of the graph"
        )
        # The calls that only fill buffers: they go when their buffers go.
        self.fills: dict[Node, set[int]] = {}

    def used_by(self, node: Node, storages: set[int]) -> None:
        """Take note of a call that this pass does not know."""
        for storage in storages:
            self.strangers.setdefault(storage, f"the rank buffer is used by {_name(node)}, too")

    def erase_unused(self) -> None:
        """Erase the buffers that no call reads any more, and what filled them."""
        read = {
            storage
            for op, position in ((EXPAND, 1), (EXPAND_SLICE, 1), (BGMV_EXPAND_SLICE, 1), (BGMV_EXPAND, 1))
            for call in calls_to(self.graph, op)
            for storage in storages_of(arguments_of(call, op)[position])
        }
        unused = self.storages - read - set(self.strangers)
        doomed = []
        for node in self.graph.nodes:
            own = storages_of(node)
            if (own and own <= unused) or (node in self.fills and self.fills[node] <= unused):
                doomed.append(node)
        erase_unused(doomed)


def find_expands(graph: Graph, buffers: RankBuffers) -> dict[Node, Expand]:
    """Every expand with its shrink, found by following what each region of the buffers holds from call to call."""
    expands: dict[Node, Expand] = {}
    for op in (EXPAND, EXPAND_SLICE, BGMV_EXPAND_SLICE, BGMV_EXPAND):
        for call in calls_to(graph, op):
            output, hidden, b, indices, *rest = arguments_of(call, op)
            expands[call] = Expand(call, output, hidden, b, indices, rest[0] if len(rest) == 3 else 0, rest[-1])
            if op is BGMV_EXPAND:
                expands[call].refusal = "its width is decided when it runs"
    # Before regions are compared: the guard on a rank may give the same size another name.
    targets = {call: _hidden_of(call, op) for call, op in buffers.shrinks.items()}
    # What each region of the buffers holds, and the tensor that it was written as.
    content: dict[Region, tuple[Tensor, Shrink]] = {}
    for node in graph.nodes:
        written: set[int] = set()
        target: Tensor | None = None
        if node in buffers.shrinks:
            _, inputs, a, indices, _ = arguments_of(node, buffers.shrinks[node])
            target = targets[node]
            operands = storages_of(inputs) | storages_of(a) | storages_of(indices)
            source = Shrink(node, buffers.shrinks[node], {storage_of(target)}, operands)
            buffers.used_by(node, source.operands)
        elif (copied := _copied(node, content)) is not None:
            target, source = copied
            source.buffers.add(storage_of(target))
            buffers.storages.add(storage_of(target))
        elif node in expands:
            expand = expands[node]
            _, expand.shrink = content.get(region_of(value_of(expand.hidden)), (None, None))
            expand.refusal = expand.refusal or _refusal(expand)
            written = {expand.writes}
            buffers.used_by(node, storages_of(expand.b) | storages_of(expand.indices) | written)
        else:
            written = written_by(node)
            buffers.used_by(node, read_by(node) | written)
        if target is not None:
            written = buffers.fills[node] = {storage_of(target)}
        if is_barrier(node):
            content.clear()
        for region, (held, shrink) in list(content.items()) if written else ():
            overwritten = region.storage in written and (target is None or overlap(held, target))
            if overwritten or shrink.operands & written:
                del content[region]
        if target is not None:
            content[region_of(target)] = target, source
    _refuse_shared(expands, buffers)
    return expands


def _hidden_of(call: Node, op: OpOverload) -> Tensor:
    """What a shrink writes to: the first R columns of its output, which has no more in most graphs."""
    output, _, a, *_ = arguments_of(call, op)
    whole: Tensor = value_of(output)
    rank = value_of(a).shape[-2]
    return whole if is_guarded(whole.shape[1] == rank) else whole.narrow(1, 0, rank)


def _copied(node: Node, content: dict[Region, tuple[Tensor, Shrink]]) -> tuple[Tensor, Shrink] | None:
    """The tensor that a `copy_` fills with what a shrink computed, and that shrink."""
    is_copy = node.target == "copy_" if node.op == "call_method" else node.target is torch.ops.aten.copy_.default
    operands = node.args[:2]
    if not is_copy or len(operands) < 2 or not all(isinstance(one, Node) for one in operands):
        return None
    target, source = (value_of(one) for one in operands if isinstance(one, Node))
    if not (isinstance(target, Tensor) and isinstance(source, Tensor) and target.is_floating_point()):
        return None
    _, shrink = content.get(region_of(source), (None, None))
    # Otherwise it broadcasts.
    return (target, shrink) if shrink is not None and _sizes(target) == _sizes(source) else None


def _refusal(expand: Expand) -> str:
    shrink = expand.shrink
    if shrink is None:
        return "its input is not, whole and unchanged, what a bgmv_shrink of this graph wrote"
    if not expand.adds:
        return "it replaces its columns instead of adding to them"
    if not same_elements(shrink.indices, expand.indices):
        return "shrink and expand have different indices"
    of_a, of_b = value_of(shrink.a).shape[0], value_of(expand.b).shape[0]
    if not is_guarded(of_a == of_b):
        return f"A and B must have the same number of slots, and have {of_a} and {of_b}"
    return ""


def _refuse_shared(expands: dict[Node, Expand], buffers: RankBuffers) -> None:
    """Refuse whoever reads a buffer that has to stay, until nothing changes: each refusal makes its buffers stay."""
    for expand in expands.values():
        if expand.refusal:
            _keep(expand, buffers)
    changed = True
    while changed:
        changed = False
        for expand in expands.values():
            if expand.shrink is None or expand.refusal:
                continue
            strangers = [buffers.strangers[one] for one in expand.shrink.buffers if one in buffers.strangers]
            if strangers:
                expand.refusal, changed = strangers[0], True
                _keep(expand, buffers)


def _keep(expand: Expand, buffers: RankBuffers) -> None:
    shared = storages_of(expand.hidden) | (expand.shrink.buffers if expand.shrink else set())
    for storage in shared:
        buffers.strangers.setdefault(
            storage, f"the rank buffer is read by a call that cannot be fused: {expand.refusal}"
        )


def same_elements(left: Node, right: Node) -> bool:
    """Whether two nodes are the same elements in memory, in the same order."""
    return left is right or region_of(value_of(left)) == region_of(value_of(right))


def _sizes(tensor: Tensor) -> list[str]:
    return [str(size) for size in tensor.shape]


def _name(node: Node) -> str:
    return "the result of the graph" if node.op == "output" else getattr(node.target, "__name__", str(node.target))
