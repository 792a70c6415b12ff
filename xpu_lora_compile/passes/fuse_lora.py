"""shrink and expand calls over a rank buffer -> one functional lora_linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.ops import LORA_LINEAR
from xpu_lora_compile.passes.decisions import decisions_on, note, set_decisions
from xpu_lora_compile.passes.editing import insert_before, may_rewrite, size_of, value_of
from xpu_lora_compile.passes.memory import (
    input_storages,
    is_barrier,
    knows_its_views,
    read_by,
    storage_of,
    storages_of,
    written_by,
)
from xpu_lora_compile.passes.rank_buffers import Expand, RankBuffers, find_expands, same_elements


def fuse_lora(graph: Graph) -> None:
    """Make one functional `lora_linear` of every chain that carries rows through a rank buffer of its own.

    Before, for one slice or several, in one buffer or one for each:
        hidden = zeros(S, T, R)
        shrink(hidden[s], inputs, a[s], indices, scaling)                   for each slice s
        expand_slice(output, hidden[s], b[s], indices, offset[s], W[s])     for each slice s
        use(output)

    After:
        result = lora_linear(output, inputs, a, b, indices, offset, scaling)
        use(result)

    Where an alias of the output may be seen that is not the same elements (the output is an input of the graph, say),
    `copy_(output, result)` follows instead, and `use(output)` stays.

    Left alone, with the reason in the decision: a buffer that anybody else reads or writes; an output or operand that
    is changed or read between the calls; a call that replaces its columns instead of adding; different indices; an
    expand whose width is undecided.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    if not knows_its_views(graph):
        return
    buffers = RankBuffers(graph)
    expands = find_expands(graph, buffers)
    for expand in expands.values():
        if expand.refusal:
            note(expand.call, f"not fused: {expand.refusal}")
    nodes = _Nodes(graph)
    for chain in _find_chains(graph, {call: one for call, one in expands.items() if not one.refusal}, buffers):
        if not may_rewrite(chain.members[-1][0].call):
            break
        _fuse(chain, nodes)
    buffers.erase_unused()


@dataclass(eq=False)
class _Chain:
    """Expands that become one call in the place of the last of them, each with its offset in the columns of `base`."""

    base: Node
    members: list[tuple[Expand, int | Node]]

    @property
    def operands(self) -> set[int]:
        """The memory of all that is read besides the output."""
        return set().union(*(expand.operands for expand, _ in self.members))

    def takes(self, expand: Expand, base: Node) -> bool:
        """Whether the expand reads what the others read, and writes to the same output."""
        ours, its = self.members[0][0].shrink, expand.shrink
        return (
            ours is not None
            and its is not None
            and same_elements(self.base, base)
            and same_elements(ours.inputs, its.inputs)
            and same_elements(ours.indices, its.indices)
            and ours.scaling == its.scaling
        )


def _find_chains(graph: Graph, expands: dict[Node, Expand], buffers: RankBuffers) -> list[_Chain]:
    """Group the expands of one output between which nothing reads it, and nothing changes what they read."""
    chains: list[_Chain] = []
    open_chains: dict[int, _Chain] = {}
    matrices: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(value_of(node), Tensor) and value_of(node).dim() == 2:
            matrices.setdefault(storage_of(value_of(node)), []).append(node)
        if node not in expands:
            written, touched = written_by(node), read_by(node) | written_by(node)
            for storage, chain in list(open_chains.items()):
                if storage in touched or chain.operands & written or is_barrier(node):
                    del open_chains[storage]
            continue
        expand = expands[node]
        for storage, chain in list(open_chains.items()):
            if storage in expand.operands or expand.writes in chain.operands:
                del open_chains[storage]
        base, offset = _place(expand, matrices[expand.writes])
        present = open_chains.get(expand.writes)
        if present is None or not present.takes(expand, base):
            present = open_chains[expand.writes] = _Chain(base, [])
            chains.append(present)
        present.members.append((expand, offset))
    return chains


def _place(expand: Expand, matrices: list[Node]) -> tuple[Node, int | Node]:
    """The widest matrix whose columns the output is, and the offset of the expand in it."""
    output = value_of(expand.output)
    base, offset = expand.output, expand.offset
    for candidate in matrices:
        whole = value_of(candidate)
        sizes = (output.storage_offset(), whole.storage_offset(), output.shape[1], whole.shape[1], expand.offset)
        if not all(isinstance(size, int) for size in sizes) or whole.dtype != output.dtype:
            continue
        shift = output.storage_offset() - whole.storage_offset()
        same_rows = (str(output.shape[0]), str(output.stride())) == (str(whole.shape[0]), str(whole.stride()))
        inside = shift >= 0 and shift + output.shape[1] <= whole.shape[1]
        if same_rows and whole.stride(1) == 1 and inside and whole.shape[1] > value_of(base).shape[1]:
            base, offset = candidate, expand.offset + shift
    return base, offset


class _Nodes:
    """The order and the memory of a graph's nodes while its chains are fused, the first one first."""

    def __init__(self, graph: Graph) -> None:
        self.order: dict[Node, float] = {node: at for at, node in enumerate(graph.nodes)}
        self.inputs = input_storages(graph)
        self.changes_modes = any(is_barrier(node) for node in graph.nodes)
        self.aliases: dict[int, list[Node]] = {}
        # The fused call that has taken over each memory.
        self.newest: dict[int, Node] = {}
        for node in graph.nodes:
            for storage in storages_of(node):
                self.aliases.setdefault(storage, []).append(node)

    def users_after(self, last: Node, storage: int) -> dict[Node, list[Node]]:
        """The aliases of that memory that exist at `last`, each with its users from there on."""
        at = self.order[last]
        return {
            alias: users
            for alias in self.aliases[storage]
            if self.order[alias] < at and (users := [user for user in alias.users if self.order.get(user, 0) > at])
        }

    def current(self, base: Node, last: Node) -> Node | None:
        """What stands for `base` just before `last`; None if a fused call has taken over more than is in `base`."""
        result = self.newest.get(storage_of(value_of(base)))
        if result is None or self.order[base] > self.order[result] or base is result:
            return base
        if same_elements(base, result):
            return result
        whole = _is_whole(value_of(base), value_of(result))
        return self.add(_viewed_as(base, result, last), last) if whole else None

    def add(self, node: Node, last: Node) -> Node:
        """Take note of a new node in front of `last`."""
        self.order[node] = self.order[last] - 0.5
        for storage in storages_of(node):
            self.aliases.setdefault(storage, []).append(node)
        return node


def _fuse(chain: _Chain, nodes: _Nodes) -> None:
    """Put one `lora_linear` in the place of the chain's last expand."""
    last = chain.members[-1][0].call
    base = nodes.current(chain.base, last)
    if base is None:
        note(last, "not fused: its output was seen in another form before")
        return
    shrinks = [expand.shrink for expand, _ in chain.members if expand.shrink]
    value, storage = value_of(base), storage_of(value_of(base))
    later = nodes.users_after(last, storage)
    hand_on = value.is_contiguous() and storage not in nodes.inputs
    hand_on = hand_on and all(_is_whole(value_of(alias), value) for alias in later)
    # Written in place without a gradient, a tensor keeps the gradient that it had; handed on, it would lose it.
    hand_on = hand_on and not (nodes.changes_modes and any(value_of(one).requires_grad for one in (base, *later)))
    hand_on = hand_on and all(value_of(alias).requires_grad == value.requires_grad for alias in later)
    args = (
        base,
        shrinks[0].inputs,
        [shrink.a for shrink in shrinks],
        [expand.b for expand, _ in chain.members],
        shrinks[0].indices,
        [offset for _, offset in chain.members],
        shrinks[0].scaling,
    )
    # Handed on, it stands for the memory that the output had: nobody sees the old one any more.
    result = insert_before(last, LORA_LINEAR, args, value if hand_on else torch.empty_like(value))
    nodes.add(result, last)
    set_decisions(result, [decision for expand, _ in chain.members for decision in decisions_on(expand.call)])
    note(result, f"fuse_lora: {len(shrinks)} shrink and {len(shrinks)} expand became one lora_linear")
    if hand_on:
        for alias, users in later.items():
            fresh = result if same_elements(alias, base) else nodes.add(_viewed_as(alias, result, last), last)
            for user in users:
                user.replace_input_with(alias, fresh)
        nodes.newest[storage] = result
    else:
        nodes.add(insert_before(last, torch.ops.aten.copy_.default, (base, result), value), last)
    for expand, _ in chain.members:
        last.graph.erase_node(expand.call)


def _viewed_as(alias: Node, result: Node, before: Node) -> Node:
    shape = [size_of(alias, dim, before) for dim in range(value_of(alias).dim())]
    return insert_before(before, torch.ops.aten.view.default, (result, shape), value_of(alias))


def _is_whole(alias: object, whole: Tensor) -> bool:
    """Whether an alias holds the same elements in the same order, in whatever shape."""
    return (
        isinstance(alias, Tensor)
        and alias.is_contiguous()
        and alias.dtype == whole.dtype
        and str(alias.storage_offset()) == str(whole.storage_offset())
        and str(alias.numel()) == str(whole.numel())
    )
