"""What the rank buffers of a graph hold: which shrink filled them for which expand, and who else uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.ops import BGMV_EXPAND
from xpu_lora_compile.passes.calls import EXPANDS, SHRINKS, LoraNode, lora_calls
from xpu_lora_compile.passes.editing import erase_unused, value_of
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


@dataclass(eq=False)
class Shrink:
    """One call of shrink, and the memory of the buffers that its result has been written to."""

    node: Node
    buffers: set[int]
    # The memory of what it reads.
    operands: set[int]

    @property
    def lora(self) -> LoraNode:
        """The call, read from its node each time: fusing one chain changes the arguments of the next."""
        return LoraNode(self.node)


@dataclass(eq=False)
class Expand:
    """One call of expand with its shrink, or with the reason why it is left alone."""

    lora: LoraNode
    shrink: Shrink | None = None
    refusal: str = ""

    @property
    def call(self) -> Node:
        """Its node."""
        return self.lora.node

    @property
    def output(self) -> Node:
        """The columns that it adds to."""
        return self.lora.outputs[0]

    @property
    def b(self) -> Node:
        """B, `[K, W, R]`."""
        return self.lora.lora_b[0]

    @property
    def indices(self) -> Node:
        """The indices, `[T]`."""
        return self.lora.indices

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
        self.shrinks = {call.node: call for call in lora_calls(graph, *SHRINKS)}
        self.storages = {storage_of(value_of(call.outputs[0])) for call in self.shrinks.values()}
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
        read = {storage for call in lora_calls(self.graph, *EXPANDS) for storage in storages_of(call.inputs)}
        unused = self.storages - read - set(self.strangers)
        doomed = []
        for node in self.graph.nodes:
            own = storages_of(node)
            if (own and own <= unused) or (node in self.fills and self.fills[node] <= unused):
                doomed.append(node)
        erase_unused(doomed)


def find_expands(graph: Graph, buffers: RankBuffers) -> dict[Node, Expand]:
    """Every expand with its shrink, found by following what each region of the buffers holds from call to call."""
    expands = {call.node: Expand(call) for call in lora_calls(graph, *EXPANDS)}
    for expand in expands.values():
        if expand.lora.op is BGMV_EXPAND:
            expand.refusal = "its width is decided when it runs"
    # Before regions are compared: the guard on a rank may give the same size another name.
    targets = {node: _hidden_of(call) for node, call in buffers.shrinks.items()}
    # What each region of the buffers holds, and the tensor that it was written as.
    content: dict[Region, tuple[Tensor, Shrink]] = {}
    for node in graph.nodes:
        written: set[int] = set()
        target: Tensor | None = None
        if node in buffers.shrinks:
            call, target = buffers.shrinks[node], targets[node]
            operands = storages_of(call.inputs) | storages_of(call.lora_a[0]) | storages_of(call.indices)
            source = Shrink(node, {storage_of(target)}, operands)
            buffers.used_by(node, source.operands)
        elif (copied := _copied(node, content)) is not None:
            target, source = copied
            source.buffers.add(storage_of(target))
            buffers.storages.add(storage_of(target))
        elif node in expands:
            expand = expands[node]
            _, expand.shrink = content.get(region_of(value_of(expand.lora.inputs)), (None, None))
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


def _hidden_of(call: LoraNode) -> Tensor:
    """What a shrink writes to: the first R columns of its output, which has no more in most graphs."""
    whole: Tensor = value_of(call.outputs[0])
    rank = value_of(call.lora_a[0]).shape[-2]
    return whole if is_guarded(whole.shape[1] == rank) else whole.narrow(1, 0, rank)


def _copied(node: Node, content: dict[Region, tuple[Tensor, Shrink]]) -> tuple[Tensor, Shrink] | None:
    """The tensor that a `copy_` fills with what a shrink computed, and that shrink."""
    is_copy = node.target == "copy_" if node.op == "call_method" else node.target is torch.ops.aten.copy_.default
    operands = node.args[:2]
    if not is_copy or len(operands) < 2 or not all(isinstance(operand, Node) for operand in operands):
        return None
    target, source = (value_of(operand) for operand in operands if isinstance(operand, Node))
    if not (isinstance(target, Tensor) and isinstance(source, Tensor) and target.is_floating_point()):
        return None
    _, shrink = content.get(region_of(source), (None, None))
    # Otherwise it broadcasts.
    return (target, shrink) if shrink is not None and _sizes(target) == _sizes(source) else None


def _refusal(expand: Expand) -> str:
    shrink = expand.shrink
    if shrink is None:
        return "its input is not, whole and unchanged, what a bgmv_shrink of this graph wrote"
    if not expand.lora.add:
        return "it replaces its columns instead of adding to them"
    if not same_elements(shrink.lora.indices, expand.indices):
        return "shrink and expand have different indices"
    of_a, of_b = value_of(shrink.lora.lora_a[0]).shape[0], value_of(expand.b).shape[0]
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
            strangers = [buffers.strangers[memory] for memory in expand.shrink.buffers if memory in buffers.strangers]
            if strangers:
                expand.refusal, changed = strangers[0], True
                _keep(expand, buffers)


def _keep(expand: Expand, buffers: RankBuffers) -> None:
    shared = storages_of(expand.lora.inputs) | (expand.shrink.buffers if expand.shrink else set())
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
