"""shrink and expand calls over a rank buffer -> one functional lora_linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.ops import LORA_LINEAR
from xpu_lora_compile.passes.decisions import decisions_on, note, set_decisions
from xpu_lora_compile.passes.editing import insert_before, size_of, value_of
from xpu_lora_compile.passes.graph import Memory, Rewrite
from xpu_lora_compile.passes.memory import is_barrier, read_by, storage_of, written_by
from xpu_lora_compile.passes.rank_buffers import Expand, RankBuffers, find_expands, same_elements


def fuse_lora(graph: Graph, rewrite: Rewrite) -> None:
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
    memory = Memory(graph)
    if not memory.knows_views:
        return
    buffers = RankBuffers(graph)
    expands = find_expands(graph, buffers)
    for expand in expands.values():
        if expand.refusal:
            note(expand.call, f"not fused: {expand.refusal}")
    taken = _Taken(memory)
    fusible = {call: expand for call, expand in expands.items() if not expand.refusal}
    for chain in _find_chains(graph, fusible, buffers):
        if not rewrite.takes_fuel(chain.members[-1][0].call):
            break
        _fuse(chain, taken)
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
        first = self.members[0][0].shrink
        if first is None or expand.shrink is None:
            return False
        ours, its = first.lora, expand.shrink.lora
        return (
            same_elements(self.base, base)
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
    base, own_offset = expand.output, expand.lora.slice_offsets[0]
    offset: int | Node = own_offset
    for candidate in matrices:
        whole = value_of(candidate)
        sizes = (output.storage_offset(), whole.storage_offset(), output.shape[1], whole.shape[1], own_offset)
        if not all(isinstance(size, int) for size in sizes) or whole.dtype != output.dtype:
            continue
        shift = output.storage_offset() - whole.storage_offset()
        same_rows = (str(output.shape[0]), str(output.stride())) == (str(whole.shape[0]), str(whole.stride()))
        inside = shift >= 0 and shift + output.shape[1] <= whole.shape[1]
        if same_rows and whole.stride(1) == 1 and inside and whole.shape[1] > value_of(base).shape[1]:
            base, offset = candidate, own_offset + shift
    return base, offset


class _Taken:
    """The memory that fused calls have taken over, while the chains of a graph are fused, the first one first."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        # The fused call that has taken over each memory last.
        self.newest: dict[int, Node] = {}

    def current(self, base: Node, last: Node) -> Node | None:
        """Return what stands for `base` just before `last`; None if a fused call took over more than is in `base`."""
        result = self.newest.get(storage_of(value_of(base)))
        if result is None or base is result or self.memory.is_before(result, base):
            return base
        if same_elements(base, result):
            return result
        whole = _is_whole(value_of(base), value_of(result))
        return self.memory.add(_viewed_as(base, result, last), last) if whole else None


def _fuse(chain: _Chain, taken: _Taken) -> None:
    """Put one `lora_linear` in the place of the chain's last expand."""
    last, memory = chain.members[-1][0].call, taken.memory
    base = taken.current(chain.base, last)
    if base is None:
        note(last, "not fused: its output was seen in another form before")
        return
    shrinks = [expand.shrink.lora for expand, _ in chain.members if expand.shrink]
    value, storage = value_of(base), storage_of(value_of(base))
    later = memory.users_after(last, storage)
    hand_on = value.is_contiguous() and storage not in memory.inputs
    hand_on = hand_on and all(_is_whole(value_of(alias), value) for alias in later)
    # Written in place without a gradient, a tensor keeps the gradient that it had; handed on, it would lose it.
    hand_on = hand_on and not (memory.has_barriers and any(value_of(alias).requires_grad for alias in (base, *later)))
    hand_on = hand_on and all(value_of(alias).requires_grad == value.requires_grad for alias in later)
    args = (
        base,
        shrinks[0].inputs,
        [shrink.lora_a[0] for shrink in shrinks],
        [expand.b for expand, _ in chain.members],
        shrinks[0].indices,
        [offset for _, offset in chain.members],
        shrinks[0].scaling,
    )
    # Handed on, it stands for the memory that the output had: nobody sees the old one any more.
    result = insert_before(last, LORA_LINEAR, args, value if hand_on else torch.empty_like(value))
    memory.add(result, last)
    set_decisions(result, [decision for expand, _ in chain.members for decision in decisions_on(expand.call)])
    note(result, f"fuse_lora: {len(shrinks)} shrink and {len(shrinks)} expand became one lora_linear")
    if hand_on:
        for alias, users in later.items():
            fresh = result if same_elements(alias, base) else memory.add(_viewed_as(alias, result, last), last)
            for user in users:
                user.replace_input_with(alias, fresh)
        taken.newest[storage] = result
    else:
        memory.add(insert_before(last, torch.ops.aten.copy_.default, (base, result), value), last)
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
