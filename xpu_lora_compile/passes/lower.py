"""The ops of the contract -> their internal twins, in place where nobody sees the difference."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.kernels import KERNELS, choice_for, forced_kernel, refusal_of, vendor
from xpu_lora_compile.kernels.call import Kernel, LoraCall
from xpu_lora_compile.ops import (
    BGMV_EXPAND_SLICE,
    BGMV_SHRINK,
    EXPAND_SLICE,
    LORA_LINEAR,
    LORA_LINEARS,
    NATIVE_ADD_LORA,
    ROUTE,
    SHRINK,
    VALID_SLOTS,
    VENDOR_ADD_LORA,
)
from xpu_lora_compile.passes.calls import LoraNode
from xpu_lora_compile.passes.decisions import decisions_on, note, set_decisions
from xpu_lora_compile.passes.editing import (
    arguments_of,
    calls_to,
    insert_before,
    is_subgraph,
    may_rewrite,
    replace,
    size_of,
    value_of,
)
from xpu_lora_compile.passes.memory import input_storages, knows_its_views, overlap, storage_of, storages_of, written_by
from xpu_lora_compile.torch_internals import is_compiling_for_this_process, is_guarded, is_known


def lower(graph: Graph) -> None:
    """Replace what is left of the contract's ops by internal ones: their fakes checked each call while tracing.

    Before:
        result = lora_linear(base, inputs, a, b, indices, offsets, scaling)
        one, two = lora_linears([base_1, base_2], inputs, a, b, indices, outputs, offsets, scaling)
        bgmv_shrink(output, inputs, a, indices, scaling)
        bgmv_expand_slice(output, inputs, b, indices, offset, size, add)

    After:
        routing = [indices, *route(indices, K)]                             once for all calls on these indices
        add_lora([base], inputs, a, b, routing, [0], offsets, scaling)      the base itself is the result
        add_lora([base_1, base_2], inputs, a, b, routing, outputs, offsets, scaling)
        shrink(output, inputs, a, indices, scaling)
        expand_slice(output, inputs, b, indices, offset, size, add)

    On a CPU whose native kernel is the one to choose, `native_add_lora` stands for `add_lora`, and gets the indices
    alone: it sorts rows in less time than an op takes to call. Where they are the first of a longer tensor it gets that
    one, since code that Inductor generates makes a view anew for each call. Where A and B are the columns of one tensor
    it gets that one, too: the fewer operands, the less a call takes.

    Where the Triton kernels are, `route_tiles` stands for `route`, and the ranks of the slots, if given, go with its
    result.

    On an Intel GPU with vllm-xpu-kernels, whose rules hold, `vendor_add_lora` stands for `add_lora`, and gets
    `valid_slots(indices, K, narrow)`, once for all calls: the vendor's ops want their own type of integer.

    A base that is seen again afterwards, that is an input of the graph, or that shares memory with another operand, is
    cloned first.

    Left alone: `bgmv_expand` that `resolve_width` could not settle; a `lora_linear` that carries gradients, or whose
    slices have different numbers of slots, or inside `cond` and the like, which refuse ops that write to a list.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    for public, internal in ((BGMV_SHRINK, SHRINK), (BGMV_EXPAND_SLICE, EXPAND_SLICE)):
        for call in calls_to(graph, public):
            if may_rewrite(call):
                replace(call, internal, tuple(arguments_of(call, public)))
    single, several = set(calls_to(graph, LORA_LINEAR)), set(calls_to(graph, LORA_LINEARS))
    if not (single or several):
        return
    nodes = _Nodes(graph)
    for node in [node for node in graph.nodes if node in single | several]:
        # Read here: a call before it may have become another.
        lora = LoraNode(node)
        refusal = "a higher-order op cannot look into lists" if is_subgraph(graph) else _refusal(lora)
        if refusal:
            note(lora.node, f"lower: left functional, since {refusal}")
        elif may_rewrite(lora.node):
            _lower(lora, nodes)


def _refusal(call: LoraNode) -> str:
    operands = (*call.outputs, call.inputs, *call.lora_a, *call.lora_b)
    if any(value_of(operand).requires_grad for operand in operands):
        return "it carries gradients"
    slots = [value_of(a).shape[0] for a in call.lora_a]
    if not all(is_guarded(count == slots[0]) for count in slots):
        return f"its slices must have the same number of slots, and have {', '.join(map(str, slots))}"
    return ""


class _Nodes:
    """What `lower` asks of a graph: the order of its nodes, and who has which memory."""

    def __init__(self, graph: Graph) -> None:
        self.order: dict[Node, float] = {node: at for at, node in enumerate(graph.nodes)}
        self.inputs = input_storages(graph) if knows_its_views(graph) else None
        self.has_gradients = any(
            isinstance(value_of(node), Tensor) and value_of(node).requires_grad
            for node in graph.nodes
            if node.op.startswith("call")
        )
        self.aliases: dict[int, list[Node]] = {}
        self.writes: dict[int, list[float]] = {}
        for node in graph.nodes:
            for storage in storages_of(node):
                self.aliases.setdefault(storage, []).append(node)
            for storage in written_by(node):
                self.writes.setdefault(storage, []).append(self.order[node])

    def add(self, node: Node, call: Node) -> None:
        """Take note of a new node in front of `call`."""
        self.order[node] = self.order[call] - 0.5
        for storage in storages_of(node):
            self.aliases.setdefault(storage, []).append(node)

    def unite(self, base: Node, result: Tensor) -> None:
        """Take note that the memory of `base` is now that of `result`, too."""
        mine, its = storage_of(value_of(base)), storage_of(result)
        if mine != its:
            self.aliases[mine] = self.aliases[its] = [*self.aliases[mine], *self.aliases.get(its, [])]

    def is_unchanged(self, tensor: Node, since: Node, until: Node) -> bool:
        """Whether nothing writes to a tensor between two nodes."""
        if self.inputs is None:
            return False
        writes = [at for storage in storages_of(tensor) for at in self.writes.get(storage, [])]
        return not any(self.order[since] < at < self.order[until] for at in writes)

    def is_seen_after(self, base: Node, call: Node) -> bool:
        """Whether the content that the base has now may be seen after the call."""
        value, at = value_of(base), self.order[call]
        # What autograd has saved is seen by a backward pass that is not in the graph yet.
        if self.has_gradients:
            return True
        if self.inputs is None or storage_of(value) in self.inputs or not value.is_contiguous():
            return True
        results = {call, *(user for user in call.users if user.target is operator.getitem)}
        return any(
            self.order.get(user, -1) > at
            for alias in self.aliases[storage_of(value)]
            if alias not in results and self.order[alias] < at
            for user in alias.users
        )


def _lower(lora: LoraNode, nodes: _Nodes) -> None:
    call, bases, inputs, a, b, indices = lora.node, lora.outputs, lora.inputs, lora.lora_a, lora.lora_b, lora.indices
    outputs: list[Node] = []
    is_single = lora.op is LORA_LINEAR
    results: list[Tensor] = [value_of(call)] if is_single else value_of(call)
    written_back = _written_back(call, bases)
    if nodes.inputs is None or _share_memory(bases[0], (inputs, *a, *b, indices)):
        written_back = None
    for base, result in zip(bases, results, strict=True):
        target = base
        is_seen = written_back is None and nodes.is_seen_after(base, call)
        if is_seen or _share_memory(base, (inputs, *a, *b, indices, *outputs)):
            target = insert_before(call, torch.ops.aten.clone.default, (base,), result)
            target.kwargs = {"memory_format": torch.contiguous_format}
            nodes.add(target, call)
            note(call, "lower: on a copy of the base, which is seen again")
        else:
            nodes.unite(base, result)
        outputs.append(target)
    asked = lora.call(outputs=outputs)
    kernel = _kernel_for(call, asked, b)
    op: Any = getattr(torch.ops.xpu_lora, kernel.op if kernel else "add_lora").default
    more: list[Any] = []
    routing: Node | list[Node]
    if op is VENDOR_ADD_LORA:
        kind = vendor.family()[0]
        (routing,) = _shared(VALID_SLOTS, indices, a[0], call, nodes, kind == "lora")
        more = [kind]
    elif op is NATIVE_ADD_LORA:
        routing, packed = _whole(indices), _packed(a, asked)
        more = [packed] if packed is not None else []
    else:
        prepares = getattr(torch.ops.xpu_lora, kernel.prepares).default if kernel else ROUTE
        routing = [indices, *_shared(prepares, indices, a[0], call, nodes)]
        routing += [lora.ranks] if kernel and kernel.reads_ranks and lora.ranks is not None else []
    places = lora.slice_outputs, lora.slice_offsets
    lowered = insert_before(call, op, (outputs, inputs, a, b, routing, *places, lora.scaling, *more), None)
    set_decisions(lowered, decisions_on(call))
    if written_back is not None:
        call.graph.erase_node(written_back)
    if is_single:
        call.replace_all_uses_with(outputs[0])
    else:
        for user in list(call.users):
            user.replace_all_uses_with(outputs[cast("int", user.args[1])])
            user.graph.erase_node(user)
    call.graph.erase_node(call)


def _kernel_for(node: Node, call: LoraCall, lora_b: list[Node]) -> Kernel | None:
    """The first kernel that takes a call for all sizes of the graph; None where what it is shall be seen as it runs."""
    # A program to be saved may run where there are other kernels.
    if not is_compiling_for_this_process():
        return None
    forced = forced_kernel()
    # That it cannot run the call is an error.
    chosen = None if forced is None else choice_for(call).kernel
    for kernel in KERNELS:
        why = kernel.by_force_alone if forced is None else "" if kernel is chosen else f"{forced} was forced"
        why = why or refusal_of(kernel, call) or _refusal_in_graph(kernel, call, lora_b)
        if not why:
            return kernel
        # What is worth a word: a kernel for this device that comes first.
        if kernel.op != "add_lora" and call.device in kernel.devices:
            note(node, f"lower: kernel {kernel.name} is not used: {why}")
    return None


def _refusal_in_graph(kernel: Kernel, call: LoraCall, lora_b: list[Node]) -> str:
    """Which rule of the op that a kernel is called by a call breaks; empty if none."""
    if kernel.needs_plain_slices:
        if not all(isinstance(offset, int) for offset in call.slice_offsets):
            return "offsets must be known while compiling"
        if call.shared_outputs():
            return "slices must not share columns"
    if kernel.needs_whole_stacks and not all(map(_is_stored, lora_b, call.lora_b)):
        return "B must be contiguous, or the leading rows of a stack that is contiguous in the graph"
    return ""


def _is_stored(node: Node, stack: Tensor) -> bool:
    """Whether the rows of B's slots lie in memory for certain: contiguous, or all inside a contiguous stack.

    That stack has to be in the graph. Of a view that comes in from outside only its own sizes and strides are guarded:
    another one with the same may lie where its memory ends.
    """
    if stack.is_contiguous():
        return True
    for whole in _viewed(node):
        owner = value_of(whole)
        start, end = stack.storage_offset(), stack.storage_offset() + stack.shape[0] * stack.stride(0)
        inside = owner.storage_offset() <= start, end <= owner.storage_offset() + owner.numel()
        if owner.is_contiguous() and all(map(is_known, inside)):
            return True
    return False


def _viewed(view: Node) -> Iterator[Node]:
    """The tensors that a view was made of, further and further up in the graph."""
    storage, node = storage_of(value_of(view)), view
    while above := [one for one in node.all_input_nodes if storage in storages_of(one)]:
        node = above[0]
        if isinstance(value_of(node), Tensor):
            yield node


def _whole(indices: Node) -> Node:
    """The tensor of which `[T]` indices are the first elements, as far up as the graph has it."""
    value, found = value_of(indices), indices
    for node in _viewed(indices):
        whole = value_of(node)
        if whole.dim() == 1 and whole.dtype == value.dtype and whole.is_neg() == value.is_neg():
            rules = value.stride(0) == 1, whole.stride(0) == 1, whole.storage_offset() == value.storage_offset()
            found = node if all(map(is_known, (*rules, value.shape[0] <= whole.shape[0]))) else found
    return found


def _packed(lora_a: list[Node], call: LoraCall) -> Node | None:
    """The tensor whose columns are all A and then all B of a call to one output, as `native_add_packed` reads it."""
    widths = [b.shape[1] for b in call.lora_b]
    starts = accumulate(widths, initial=0)
    side_by_side = [at == before for at, before in zip(call.slice_offsets, starts, strict=False)]
    if (
        any(call.slice_outputs)
        or len(widths) > 3
        or not all(map(is_known, (*side_by_side, *(one > 0 for one in widths))))
    ):
        return None
    by_rank = [*call.lora_a, *(b.transpose(1, 2) for b in call.lora_b)]
    return next((node for node in _viewed(lora_a[0]) if _are_columns(by_rank, value_of(node))), None)


def _are_columns(stacks: list[Tensor], whole: Tensor) -> bool:
    """Whether stacks `[K, R, columns]` are in turn all columns of `[K, R, columns]`, perhaps with vLLM's 1."""
    if whole.dim() != 3 and not (whole.dim() == 4 and is_known(whole.shape[1] == 1)):
        return False
    if len({(storage_of(one), one.dtype, one.is_neg()) for one in (whole, *stacks)}) > 1:
        return False
    (slots, *_, ranks, columns), (of_slot, *_, of_rank, of_column) = whole.shape, whole.stride()
    starts = list(accumulate((stack.shape[2] for stack in stacks), initial=0))
    rules = [starts[-1] == columns]
    for stack, start in zip(stacks, starts, strict=False):
        rules += [stack.shape[0] == slots, stack.shape[1] == ranks]
        rules += [left == right for left, right in zip(stack.stride(), (of_slot, of_rank, of_column), strict=True)]
        rules += [stack.storage_offset() == whole.storage_offset() + start * of_column]
    return all(map(is_known, rules))


def _written_back(call: Node, bases: list[Node]) -> Node | None:
    """The `copy_` of the result into its base that follows the call, if that is all it is used for."""
    after = call.next
    is_copy = after.target is torch.ops.aten.copy_.default and after.args == (bases[0], call)
    return after if is_copy and len(call.users) == 1 and not after.users else None


def _share_memory(base: Node, others: tuple[Node, ...]) -> bool:
    return any(overlap(value_of(base), value_of(other)) for other in others)


def _shared(
    op: torch._ops.OpOverload, indices: Node, weights: Node, before: Node, nodes: _Nodes, *more: bool
) -> list[Node]:
    """What the one call of `op` for these indices and this number of slots returns, made if there is none."""
    slots = value_of(weights).shape[0]
    for user in indices.users:
        same = user.target is op and user.args[2:] == more and is_guarded(slots == _size(user.args[1]))
        if same and nodes.is_unchanged(indices, user, before):
            return _results(user)
    value = op(value_of(indices), slots, *more)
    made = insert_before(before, op, (indices, size_of(weights, 0, before), *more), value)
    nodes.add(made, before)
    if isinstance(value, tuple | list):
        for at, one in enumerate(value):
            insert_before(before, operator.getitem, (made, at), one)
    return _results(made)


def _results(made: Node) -> list[Node]:
    if isinstance(value_of(made), Tensor):
        return [made]
    return sorted(made.users, key=lambda one: cast("int", one.args[1]))


def _size(size: Any) -> int | torch.SymInt:
    return cast("int | torch.SymInt", value_of(size) if isinstance(size, Node) else size)
