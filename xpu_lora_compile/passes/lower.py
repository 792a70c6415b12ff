"""The ops of the contract -> their internal twins, in place where nobody sees the difference."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.kernels import KERNELS, choice_for, forced_kernel, refusal_of, takes_triton_backward
from xpu_lora_compile.kernels.call import Kernel, LoraCall
from xpu_lora_compile.kernels.triton_gradients import empty_kept, keeps_hidden
from xpu_lora_compile.ops import (
    BGMV_EXPAND_SLICE,
    BGMV_SHRINK,
    EXPAND,
    EXPAND_SLICE,
    LORA_LINEAR,
    LORA_LINEARS,
    SHRINK,
    SORTED_INDICES,
    TRAINED_LINEAR,
    TRITON_TRAINING_TILES,
)
from xpu_lora_compile.passes.calls import LoraNode, lora_calls
from xpu_lora_compile.passes.decisions import decisions_on, note, set_decisions
from xpu_lora_compile.passes.editing import (
    arguments_of,
    calls_to,
    insert_before,
    is_subgraph,
    replace,
    size_of,
    value_of,
)
from xpu_lora_compile.passes.graph import Launch, Memory, Rewrite
from xpu_lora_compile.passes.memory import overlap, storage_of, storages_of
from xpu_lora_compile.torch_internals import is_compiling_for_this_process, is_guarded, is_known


def lower(graph: Graph, rewrite: Rewrite) -> None:
    """Replace what is left of the contract's ops by internal ones: their fakes checked each call while tracing.

    Before:
        result = lora_linear(base, inputs, a, b, indices, offsets, scaling)
        one, two = lora_linears([base_1, base_2], inputs, a, b, indices, outputs, offsets, scaling)
        bgmv_shrink(output, inputs, a, indices, scaling)
        bgmv_expand_slice(output, inputs, b, indices, offset, size, add)

    After:
        slot, has_adapter, order, starts = route(indices, K)                once for all calls on these indices
        add_lora([base], inputs, a, b, indices, [0], offsets, scaling, slot=slot, …)      the base is the result
        add_lora([base_1, base_2], inputs, a, b, indices, outputs, offsets, scaling, slot=slot, …)
        shrink(output, inputs, a, indices, scaling)
        expand_slice(output, inputs, b, indices, offset, size, add)

    On a CPU whose native kernel is the one to choose, `native_add_lora` stands for `add_lora`, and gets the indices
    alone: it sorts rows in less time than an op takes to call. Where they are the first of a longer tensor it gets that
    one, since code that Inductor generates makes a view anew for each call. Where A and B are the columns of one tensor
    it gets that one, too: the fewer operands, the less a call takes.

    Where the Triton kernels are, `route_tiles` stands for `route`, and the ranks of the slots, if given, go with its
    result. Where Inductor is to launch them (`_why_opaque` decides), `triton_route_tiles`, `triton_add_lora`,
    `triton_shrink` and `triton_expand_slice` stand for the ops above: AOT replaces them by their launches.

    On an Intel GPU with vllm-xpu-kernels, whose rules hold, `vendor_add_lora` stands for `add_lora`, and gets
    `valid_slots(indices, K, narrow)`, once for all calls: the vendor's ops want their own type of integer.

    A base that is seen again afterwards, that is an input of the graph, or that shares memory with another operand, is
    cloned first.

    A `trained_linear` that the Triton kernels are to run gets `triton_training_tiles(indices, K)`, once for all calls.

    Of indices that are `sorted_indices(groups, codes, ends)`, `route_tiles` and `triton_route_tiles` get codes and
    ends, and so need not sort rows again; `codes[groups]` stands for the indices afterwards.

    Left alone: `bgmv_expand` that `resolve_width` could not settle; a `lora_linear` that carries gradients, or whose
    slices have different numbers of slots, or inside `cond` and the like, which refuse ops that write to a list.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    _lower_calls(graph, rewrite)
    for node in calls_to(graph, SORTED_INDICES):
        groups, codes, _ = node.args
        node.target, node.args = torch.ops.aten.index.Tensor, (codes, [groups])


def _lower_calls(graph: Graph, rewrite: Rewrite) -> None:
    for public, internal in ((BGMV_SHRINK, SHRINK), (BGMV_EXPAND_SLICE, EXPAND_SLICE)):
        for call in lora_calls(graph, public):
            if rewrite.takes_fuel(call.node):
                replace(call.node, internal, tuple(arguments_of(call.node, public)))
    # An op that allocates may not be inside `cond` and the like.
    halves = (
        [] if is_subgraph(graph) and not rewrite.without_python else lora_calls(graph, SHRINK, EXPAND, EXPAND_SLICE)
    )
    memory = Memory(graph) if halves else None
    for call in halves:
        if rewrite.without_python:
            _lower_half(call, rewrite, cast("Memory", memory))
        else:
            _make_visible(call, rewrite, cast("Memory", memory))
    calls = [call.node for call in lora_calls(graph, LORA_LINEAR, LORA_LINEARS)]
    trained = [call for call in lora_calls(graph, TRAINED_LINEAR) if not call.prepared and _runs_triton(call)]
    if not calls and not trained:
        return
    memory = Memory(graph)
    for call in trained:
        if rewrite.takes_fuel(call.node):
            _give_tiles(call, _prepared(TRITON_TRAINING_TILES, call, {}, memory)["tiles"])
    for node in calls:
        # Read here: a call before it may have become another.
        call = LoraNode(node)
        refusal = "a higher-order op cannot look into lists" if is_subgraph(graph) else _refusal(call)
        if refusal:
            note(node, f"lower: left functional, since {refusal}")
        elif rewrite.takes_fuel(node):
            _lower(call, rewrite, memory)


def _lower_half(lora: LoraNode, rewrite: Rewrite, memory: Memory) -> None:
    """Have a shrink or an expand alone run without Python, if a kernel can."""
    kernel = _kernel_for(lora.node, lora.call(), lora.lora_b, without_python=True)
    if kernel.visible_ops and not is_subgraph(lora.node.graph):
        _make_visible(lora, rewrite, memory)
        return
    (output,), (weights,) = lora.outputs, lora.lora_a or lora.lora_b
    operands = output, lora.inputs, weights, lora.indices
    if not {kernel.shrink_op, kernel.expand_op} <= kernel.ops_without_python:
        return
    if lora.op is SHRINK:
        replace(lora.node, _op(kernel.shrink_op), (*operands, lora.scaling))
    else:
        columns = value_of(weights).shape[-2]
        replace(lora.node, _op(kernel.expand_op), (*operands, lora.slice_offsets[0], columns, lora.add))


def _runs_triton(call: LoraNode) -> bool:
    lists = ([value_of(node) for node in nodes] for nodes in (call.lora_a, call.lora_b))
    return takes_triton_backward([value_of(base) for base in call.outputs], value_of(call.inputs), *lists)


def _give_tiles(call: LoraNode, tiles: Node) -> None:
    """Hand the table of tiles to a call, which then returns its rank vectors, too."""
    node = call.node
    lora_a, lora_b = ([value_of(stack) for stack in stacks] for stacks in (call.lora_a, call.lora_b))
    kept = [empty_kept(value_of(call.inputs), lora_a)] if keeps_hidden(lora_a, lora_b) else []
    told = insert_before(node, TRAINED_LINEAR, (*node.args, tiles), [*value_of(node), *kept])
    set_decisions(told, decisions_on(node))
    node.replace_all_uses_with(told)
    node.graph.erase_node(node)


def _refusal(call: LoraNode) -> str:
    operands = (*call.outputs, call.inputs, *call.lora_a, *call.lora_b, *_weights_of(call))
    if any(value_of(operand).requires_grad for operand in operands):
        return "it carries gradients"
    slots = [value_of(a).shape[0] for a in call.lora_a]
    if not all(is_guarded(count == slots[0]) for count in slots):
        return f"its slices must have the same number of slots, and have {', '.join(map(str, slots))}"
    return ""


def _weights_of(call: LoraNode) -> tuple[Node, ...]:
    return () if call.adapter_weights is None else (call.adapter_weights,)


def _lower(lora: LoraNode, rewrite: Rewrite, memory: Memory) -> None:
    node, bases = lora.node, lora.outputs
    others = (lora.inputs, *lora.lora_a, *lora.lora_b, lora.indices, *_weights_of(lora))
    is_single = lora.op is LORA_LINEAR
    results: list[Tensor] = [value_of(node)] if is_single else value_of(node)
    written_back = _written_back(node, bases)
    if not memory.knows_views or _share_memory(bases[0], others):
        written_back = None
    outputs: list[Node] = []
    for base, result in zip(bases, results, strict=True):
        is_seen = written_back is None and memory.is_seen_after(base, node)
        if is_seen or _share_memory(base, (*others, *outputs)):
            target = insert_before(node, torch.ops.aten.clone.default, (base,), result)
            target.kwargs = {"memory_format": torch.contiguous_format}
            memory.add(target, node)
            note(node, "lower: on a copy of the base, which is seen again")
        else:
            target = base
            memory.unite(base, result)
        outputs.append(target)
    lowered = _emit(lora, outputs, rewrite, memory)
    set_decisions(lowered, decisions_on(node))
    if written_back is not None:
        node.graph.erase_node(written_back)
    if is_single:
        node.replace_all_uses_with(outputs[0])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(outputs[cast("int", user.args[1])])
            user.graph.erase_node(user)
    node.graph.erase_node(node)


def _emit(lora: LoraNode, outputs: list[Node], rewrite: Rewrite, memory: Memory) -> Node:
    """Put the op of the first kernel that takes the call in front of it: its schema names what it wants."""
    call = lora.call(outputs=outputs)
    kernel = _kernel_for(lora.node, call, lora.lora_b, without_python=rewrite.without_python)
    given: dict[str, Any] = {
        "outputs": outputs,
        "inputs": lora.inputs,
        "lora_a": lora.lora_a,
        "lora_b": lora.lora_b,
        "indices": lora.indices,
        "slice_outputs": lora.slice_outputs,
        "slice_offsets": lora.slice_offsets,
        "scaling": lora.scaling,
        "ranks": lora.ranks if kernel.reads_ranks else None,
        "adapter_weights": lora.adapter_weights,
    }
    if _is_visible(kernel, lora.node, call, rewrite):
        op, prepares, options = kernel.visible_ops["add_lora"], kernel.visible_prepares, kernel.visible_options(call)
    else:
        op, prepares, options = kernel.op, kernel.prepares, kernel.options()
    given |= options
    # What is prepared, and what reaches further than the call, is of one adapter a row.
    if prepares and lora.adapter_weights is None:
        given |= _prepared(_op(prepares), lora, options, memory)
    if kernel.takes_wholes and lora.adapter_weights is None:
        given |= {"indices": _whole(lora.indices), "packed": _packed(lora.lora_a, call)}
    return _insert(lora.node, op, given)


def _insert(node: Node, op: str, given: dict[str, Any]) -> Node:
    """Put a call of an op in front of a node, with those of the arguments that its schema names."""
    args, optional = [], {}
    arguments = _op(op)._schema.arguments
    if given.get("adapter_weights") is not None and all(argument.name != "adapter_weights" for argument in arguments):
        raise AssertionError(f"{op} has no adapter_weights: a kernel that takes_several needs such an op")
    for argument in arguments:
        if not argument.has_default_value():
            args.append(given[argument.name])
        elif given.get(argument.name) is not None:
            optional[argument.name] = given[argument.name]
    return insert_before(node, _op(op), tuple(args), None, **optional)


def _make_visible(lora: LoraNode, rewrite: Rewrite, memory: Memory) -> None:
    """Put the op that a compiler can look into in the place of a shrink or an expand, if it is to."""
    call = lora.call()
    kernel = _visible_kernel_for(call) if not is_compiling_for_this_process() else _first_kernel_for(call)
    if lora.name not in kernel.visible_ops or not _is_visible(kernel, lora.node, call, rewrite):
        return
    if not rewrite.takes_fuel(lora.node):
        return
    options = kernel.visible_options(call)
    given = {
        "output": lora.outputs[0],
        "inputs": lora.inputs,
        "weights": (lora.lora_a or lora.lora_b)[0],
        "indices": lora.indices,
        "offset": lora.slice_offsets[0],
        "scaling": lora.scaling,
        "add": lora.add,
        **options,
        **_prepared(_op(kernel.visible_prepares), lora, options, memory),
    }
    visible = _insert(lora.node, kernel.visible_ops[lora.name], given)
    set_decisions(visible, decisions_on(lora.node))
    lora.node.replace_all_uses_with(visible)
    lora.node.graph.erase_node(lora.node)


def _is_visible(kernel: Kernel, node: Node, call: LoraCall, rewrite: Rewrite) -> bool:
    """Whether the compiler is to launch a kernel of this call; the decisions on the node say why."""
    if not kernel.visible_ops:
        return False
    why = _why_opaque(call.device, rewrite.launch) or kernel.visible_refusal(call)
    note(node, f"lower: an op launches its kernels: {why}" if why else "lower: Inductor launches its kernels")
    return not why


def _why_opaque(device: str, launch: Launch) -> str:
    """Why an op launches the kernels of a type of device; empty if Inductor does: the one place that decides it."""
    if launch != "auto":
        return "" if launch == "inductor" else "it was asked for"
    # A program to be saved may run where there is no Python.
    if device == "xpu" or (device == "cuda" and not is_compiling_for_this_process()):
        return ""
    return f"on {device} Inductor does under cpp_wrapper, in an exported program, or where it is asked to"


def _op(name: str) -> torch._ops.OpOverload:
    op: torch._ops.OpOverload = getattr(torch.ops.xpu_lora, name).default
    return op


# Stands for the kernels whose op chooses one of them when it runs.
_ANY = Kernel()


def _kernel_for(node: Node, call: LoraCall, lora_b: list[Node], *, without_python: bool) -> Kernel:
    """The first kernel that takes a call for all sizes of the graph; `_ANY` where the op has to choose as it runs."""
    # What leaves this process brings the kernel along that it is to run, or its op chooses one there.
    if not (is_compiling_for_this_process() or without_python):
        return _visible_kernel_for(call)
    forced = forced_kernel()
    # That it cannot run the call is an error.
    chosen = None if forced is None else choice_for(call).kernel
    for kernel in KERNELS:
        why = kernel.by_force_alone if forced is None else "" if kernel is chosen else f"{forced} was forced"
        if without_python and not kernel.ops_without_python:
            why = why or "its op is written in Python, which the program has to do without"
        why = why or refusal_of(kernel, call) or _refusal_in_graph(kernel, call, lora_b)
        if not why:
            return kernel
        # What is worth a word: a kernel for this device that comes first.
        if kernel.op != "add_lora" and call.device in kernel.devices:
            note(node, f"lower: kernel {kernel.name} is not used: {why}")
    return _ANY


def _visible_kernel_for(call: LoraCall) -> Kernel:
    """The kernel of a program to be saved, which may run where there are others: what Inductor launches goes along."""
    forced = forced_kernel()
    visible = (kernel for kernel in KERNELS if kernel.visible_ops and call.device in kernel.devices)
    return next((kernel for kernel in visible if forced in (None, kernel.name) and not refusal_of(kernel, call)), _ANY)


def _first_kernel_for(call: LoraCall) -> Kernel:
    """The kernel that an op for a shrink or an expand alone chooses when it runs; `_ANY` if none takes the call."""
    forced = forced_kernel()
    allowed = (kernel for kernel in KERNELS if kernel.name == forced or (forced is None and not kernel.by_force_alone))
    return next((kernel for kernel in allowed if not refusal_of(kernel, call)), _ANY)


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
    while above := [source for source in node.all_input_nodes if storage in storages_of(source)]:
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
        or not all(map(is_known, (*side_by_side, *(width > 0 for width in widths))))
    ):
        return None
    by_rank = [*call.lora_a, *(b.transpose(1, 2) for b in call.lora_b)]
    return next((node for node in _viewed(lora_a[0]) if _are_columns(by_rank, value_of(node))), None)


def _are_columns(stacks: list[Tensor], whole: Tensor) -> bool:
    """Whether stacks `[K, R, columns]` are in turn all columns of `[K, R, columns]`, perhaps with vLLM's 1."""
    if whole.dim() != 3 and not (whole.dim() == 4 and is_known(whole.shape[1] == 1)):
        return False
    if len({(storage_of(tensor), tensor.dtype, tensor.is_neg()) for tensor in (whole, *stacks)}) > 1:
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


def _prepared(op: torch._ops.OpOverload, lora: LoraNode, options: dict[str, Any], memory: Memory) -> dict[str, Node]:
    """Results of the one call of `op` for these indices and this number of slots, by name; made if there is none."""
    stack = (lora.lora_a or lora.lora_b)[0]
    indices, slots = lora.indices, value_of(stack).shape[0]
    more = tuple(options[argument.name] for argument in op._schema.arguments[2:] if not argument.has_default_value())
    groups = _groups_of(indices, op, lora.node, memory)
    names = [result.name for result in op._schema.returns]
    for user in indices.users:
        same = user.target is op and user.args[2:] == more and is_guarded(slots == _size(user.args[1]))
        if same and memory.is_unchanged(indices, user, lora.node):
            return dict(zip(names, _results(user), strict=True))
    value = op(value_of(indices), slots, *more, **{name: value_of(node) for name, node in groups.items()})
    made = insert_before(lora.node, op, (indices, size_of(stack, 0, lora.node), *more), value, **groups)
    memory.add(made, lora.node)
    if isinstance(value, tuple | list):
        for position, tensor in enumerate(value):
            insert_before(lora.node, operator.getitem, (made, position), tensor)
    return dict(zip(names, _results(made), strict=True))


def _groups_of(indices: Node, op: torch._ops.OpOverload, call: Node, memory: Memory) -> dict[str, Node]:
    """How rows lie that are sorted, for an op that asks for it; nothing if that may have changed since."""
    if indices.target is not SORTED_INDICES or all(argument.name != "ends" for argument in op._schema.arguments):
        return {}
    codes, ends = cast("list[Node]", indices.args[1:])
    is_as_it_was = all(memory.is_unchanged(node, indices, call) for node in (codes, ends))
    return {"ends": ends, "codes": codes} if is_as_it_was else {}


def _results(made: Node) -> list[Node]:
    if isinstance(value_of(made), Tensor):
        return [made]
    return sorted(made.users, key=lambda user: cast("int", user.args[1]))


def _size(size: Any) -> int | torch.SymInt:
    return cast("int | torch.SymInt", value_of(size) if isinstance(size, Node) else size)
