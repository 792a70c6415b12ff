"""shrink and expand calls over a rank buffer -> one functional lora_linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.ops import (
    BGMV_EXPAND,
    BGMV_EXPAND_SLICE,
    BGMV_SHRINK,
    EXPAND,
    EXPAND_SLICE,
    LORA_LINEAR,
    SHRINK,
)
from xpu_lora_compile.passes.decisions import decisions_on, note, set_decisions
from xpu_lora_compile.passes.editing import (
    arguments_of,
    calls_to,
    erase_unused,
    insert_before,
    may_rewrite,
    size_of,
    value_of,
)
from xpu_lora_compile.passes.memory import (
    Region,
    input_storages,
    is_barrier,
    knows_its_views,
    overlap,
    read_by,
    region_of,
    storage_of,
    storages_of,
    written_by,
)

OpOverload: TypeAlias = torch._ops.OpOverload


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
    buffers = _RankBuffers(graph)
    expands = _find_expands(graph, buffers)
    for expand in expands.values():
        if expand.refusal:
            note(expand.call, f"not fused: {expand.refusal}")
    nodes = _Nodes(graph)
    for chain in _find_chains(graph, {call: one for call, one in expands.items() if not one.refusal}, buffers):
        if not may_rewrite():
            break
        _fuse(chain, nodes)
    buffers.erase_unused()


@dataclass(eq=False)
class _Shrink:
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
class _Expand:
    """One call of expand with its shrink, or with the reason why it is left alone."""

    call: Node
    output: Node
    hidden: Node
    b: Node
    indices: Node
    offset: int | Node
    adds: bool
    shrink: _Shrink | None = None
    refusal: str = ""

    @property
    def writes(self) -> int:
        """The memory of its output."""
        return storage_of(value_of(self.output))

    @property
    def operands(self) -> set[int]:
        """The memory of what the fused call will read besides its output."""
        return storages_of(self.b) | storages_of(self.indices) | (self.shrink.operands if self.shrink else set())


@dataclass(eq=False)
class _Chain:
    """Expands that become one call in the place of the last of them, each with its offset in the columns of `base`."""

    base: Node
    members: list[tuple[_Expand, int | Node]]

    @property
    def operands(self) -> set[int]:
        """The memory of all that is read besides the output."""
        return set().union(*(expand.operands for expand, _ in self.members))

    def takes(self, expand: _Expand, base: Node) -> bool:
        """Whether the expand reads what the others read, and writes to the same output."""
        ours, its = self.members[0][0].shrink, expand.shrink
        return (
            ours is not None
            and its is not None
            and _same(self.base, base)
            and _same(ours.inputs, its.inputs)
            and _same(ours.indices, its.indices)
            and ours.scaling == its.scaling
        )


class _RankBuffers:
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


def _find_expands(graph: Graph, buffers: _RankBuffers) -> dict[Node, _Expand]:
    """Every expand with its shrink, found by following what each region of the buffers holds from call to call."""
    expands: dict[Node, _Expand] = {}
    for op in (EXPAND, EXPAND_SLICE, BGMV_EXPAND_SLICE, BGMV_EXPAND):
        for call in calls_to(graph, op):
            output, hidden, b, indices, *rest = arguments_of(call, op)
            expands[call] = _Expand(call, output, hidden, b, indices, rest[0] if len(rest) == 3 else 0, rest[-1])
            if op is BGMV_EXPAND:
                expands[call].refusal = "the relation of its widths is not known while compiling"
    # What each region of the buffers holds, and the tensor that it was written as.
    content: dict[Region, tuple[Tensor, _Shrink]] = {}
    for node in graph.nodes:
        written: set[int] = set()
        target: Tensor | None = None
        if node in buffers.shrinks:
            output, inputs, a, indices, _ = arguments_of(node, buffers.shrinks[node])
            target = value_of(output).narrow(1, 0, value_of(a).shape[-2])
            operands = storages_of(inputs) | storages_of(a) | storages_of(indices)
            source = _Shrink(node, buffers.shrinks[node], {storage_of(target)}, operands)
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


def _copied(node: Node, content: dict[Region, tuple[Tensor, _Shrink]]) -> tuple[Tensor, _Shrink] | None:
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


def _refusal(expand: _Expand) -> str:
    shrink = expand.shrink
    if shrink is None:
        return "its input is not, whole and unchanged, what a bgmv_shrink of this graph wrote"
    if not expand.adds:
        return "it replaces its columns instead of adding to them"
    if not _same(shrink.indices, expand.indices):
        return "shrink and expand have different indices"
    if str(value_of(shrink.a).shape[0]) != str(value_of(expand.b).shape[0]):
        return "A and B have different numbers of slots"
    return ""


def _refuse_shared(expands: dict[Node, _Expand], buffers: _RankBuffers) -> None:
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


def _keep(expand: _Expand, buffers: _RankBuffers) -> None:
    shared = storages_of(expand.hidden) | (expand.shrink.buffers if expand.shrink else set())
    for storage in shared:
        buffers.strangers.setdefault(
            storage, f"the rank buffer is read by a call that cannot be fused: {expand.refusal}"
        )


def _find_chains(graph: Graph, expands: dict[Node, _Expand], buffers: _RankBuffers) -> list[_Chain]:
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


def _place(expand: _Expand, matrices: list[Node]) -> tuple[Node, int | Node]:
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
        if _same(base, result):
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
            fresh = result if _same(alias, base) else nodes.add(_viewed_as(alias, result, last), last)
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


def _same(left: Node, right: Node) -> bool:
    return left is right or region_of(value_of(left)) == region_of(value_of(right))


def _sizes(tensor: Tensor) -> list[str]:
    return [str(size) for size in tensor.shape]


def _name(node: Node) -> str:
    return "the result of the graph" if node.op == "output" else getattr(node.target, "__name__", str(node.target))
