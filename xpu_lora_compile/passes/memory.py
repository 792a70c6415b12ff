"""Which memory the nodes of a graph share, read and write: what a pass asks before it moves or drops a call.

Graphs of Dynamo and of `torch.export` are not functional yet. What two nodes share is read from the fake tensors that
they stand for: a view shares its storage there too. What an op writes is read from its schema; one whose schema nobody
knows counts as writing all that it is given.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.ops import LORA_LINEAR
from xpu_lora_compile.passes.editing import value_of
from xpu_lora_compile.torch_internals import hint_of, is_composite, is_known

# Methods and functions that use a tensor's shape or dtype alone; and conversions that ATen has no op for.
_QUESTIONS = {"size", "dim", "numel", "stride", "is_contiguous", "nelement", "ndimension", "element_size"}
_QUESTIONS |= {"new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like"}
_CONVERSIONS = {"float", "half", "bfloat16", "double", "int", "long", "bool", "cpu", "cuda", "xpu", "type"}
# Ops that may change running statistics, though their schema does not say so.
_WRITES_UNSAID = {"batch_norm", "instance_norm"}
# Python's operators that write into their first argument.
_WRITING = {vars(operator)[name] for name in ("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv")}
_TAKES_OVER = (LORA_LINEAR, LORA_LINEAR.overloadpacket)
_WRITING |= {vars(operator)[name] for name in ("imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift")}


class Region(NamedTuple):
    """The elements of a tensor in memory; nodes of equal regions hold the same elements in the same order."""

    storage: int
    dtype: torch.dtype
    shape: tuple[str, ...]
    stride: tuple[str, ...]
    offset: str


def region_of(tensor: Tensor) -> Region:
    """The region of a fake tensor; sizes are compared as expressions, without a guard."""
    return Region(
        storage_of(tensor),
        tensor.dtype,
        tuple(map(str, tensor.shape)),
        tuple(map(str, tensor.stride())),
        str(tensor.storage_offset()),
    )


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def storages_of(node: Node) -> set[int]:
    """The memory of all tensors that a node stands for."""
    return {storage_of(tensor) for tensor in _tensors_in(value_of(node))}


def knows_its_views(graph: Graph) -> bool:
    """Whether the graph's values share memory as its tensors will; those of an unpickled ExportedProgram do not."""
    for node in graph.nodes:
        tensors = [item for item in _flat(value_of(node)) if isinstance(item, Tensor)]
        if not all(tensor.layout is torch.strided and _has_storage(tensor) for tensor in tensors):
            return False
        if isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
            source = node.all_input_nodes[0]
            if value_of(source) is None or value_of(node) is None:
                return False
            if not storages_of(node) <= storages_of(source) and not _copies(node):
                return False
    return True


def _copies(node: Node) -> bool:
    """Whether a call of `reshape`, `to` and the like, which return a view where they can, has to copy."""
    if not is_composite(node.target):
        return False
    # Torch 2.8 cannot reshape what has symbolic sizes outside of a trace.
    examples = {operand: _with_hints(value_of(operand)) for operand in node.all_input_nodes}
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), examples.__getitem__)
    again = node.target(*args, **kwargs)  # type: ignore[operator]
    return storage_of(again) != storage_of(examples[node.all_input_nodes[0]])


def _with_hints(value: Any) -> Any:
    """The value, or one like it for the sizes that the graph was traced with."""
    if isinstance(value, torch.SymInt):
        return hint_of(value)
    if not isinstance(value, Tensor) or all(isinstance(size, int) for size in (*value.shape, *value.stride())):
        return value
    return value.new_empty_strided(list(map(hint_of, value.shape)), list(map(hint_of, value.stride())))


def written_by(node: Node) -> set[int]:
    """The memory that a node changes, or whose content it replaces: a `lora_linear` may stand for its base."""
    written: set[int] = storages_of(node) if node.target in _TAKES_OVER else set()
    for operand in _written_operands(node):
        written |= storages_of(operand)
    return written


def read_by(node: Node) -> set[int]:
    """The memory whose content a node uses; a view or a question about shape uses none."""
    given = set().union(*map(storages_of, node.all_input_nodes))
    if node.op == "output":
        return given
    if _name_of(node) in _QUESTIONS or node.target is torch.ops.aten.sym_size.int:
        return set()
    gives = storages_of(node)
    return set() if gives and gives <= given and not written_by(node) else given


def is_barrier(node: Node) -> bool:
    """Whether nothing may be moved across a node: it has no values, and may switch autocast or the grad mode."""
    known = [value_of(operand) is not None for operand in (node, *node.all_input_nodes)]
    return node.op.startswith("call") and not any(known) and _schemas(node) is None


def is_pure(node: Node) -> bool:
    """Whether a call's result follows from its operands, and it does nothing else."""
    schemas = _schemas(node)
    if schemas is None:
        known = node.target in _QUESTIONS | _CONVERSIONS if node.op == "call_method" else False
        return known or (_operator(node) is not None and _operator(node) not in _WRITING)
    tags = set().union(*(op.tags for op in schemas))
    return not _written_operands(node) and torch.Tag.nondeterministic_seeded not in tags


def input_storages(graph: Graph) -> set[int]:
    """The memory of the graph's inputs and constants, which others see too."""
    return {storage for node in graph.nodes if node.op in ("placeholder", "get_attr") for storage in storages_of(node)}


def overlap(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors may share elements; no only where that is certain of all sizes that the graph is for."""
    if storage_of(left) != storage_of(right):
        return False
    if left.dtype != right.dtype:
        return True
    (start, end), (other_start, other_end) = _bounds(left), _bounds(right)
    return not (is_known(end < other_start) or is_known(other_end < start) or _are_columns_apart(left, right))


def _are_columns_apart(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are different columns of one matrix."""
    sizes = [left.storage_offset(), right.storage_offset(), *left.shape[1:], *right.shape[1:], *left.stride()]
    is_static = left.dim() == right.dim() == 2 and all(isinstance(size, int) for size in sizes)
    if not is_static or left.stride() != right.stride() or left.stride(1) != 1 or left.stride(0) == 0:
        return False
    row = left.stride(0)
    columns_between = (right.storage_offset() - left.storage_offset()) % row
    return columns_between >= left.shape[1] and columns_between + right.shape[1] <= row


def _bounds(tensor: Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """The first and the last element."""
    start = tensor.storage_offset()
    return start, start + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _written_operands(node: Node) -> list[Node]:
    if node.op not in ("call_function", "call_method"):
        return []
    into = any(isinstance(operand, Node) for operand in _flat(node.kwargs.get("out")))
    if into or _is_asked_to_write(node) or _name_of(node) in _WRITES_UNSAID:
        return node.all_input_nodes
    if _operator(node) is not None:
        first = node.args[0] if node.args else None
        return [first] if _operator(node) in _WRITING and isinstance(first, Node) else []
    schemas = _schemas(node)
    if schemas is None:
        known = node.op == "call_method" and node.target in _QUESTIONS | _CONVERSIONS
        return [] if known else node.all_input_nodes
    written: list[Node] = []
    for op in schemas:
        for position, argument in enumerate(op._schema.arguments):
            # An overload with `out` is another function's.
            if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out:
                value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                written += [operand for operand in _flat(value) if isinstance(operand, Node)]
    return written


def _operator(node: Node) -> Any:
    """Python's operator that a call is, as a function or as a method (`__getitem__`); None if it is something else."""
    if node.op == "call_method":
        name = str(node.target)
        return getattr(operator, name, None) if name.startswith("__") else None
    return node.target if getattr(node.target, "__module__", None) == "_operator" else None


def _name_of(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "").split(".")[0]


def _is_asked_to_write(node: Node) -> bool:
    """Whether a function of `torch.nn.functional` is called with `inplace=True`, or with the weights' `max_norm`."""
    if not isinstance(node.target, FunctionType):
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return True
    return bool(bound.arguments.get("inplace")) or bound.arguments.get("max_norm") is not None


def _schemas(node: Node) -> list[torch._ops.OpOverload] | None:
    """The ops of PyTorch's dispatcher that a call may mean; None where it is not known to mean any."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return [target]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _overloads(target)
    if node.op == "call_method":
        name = str(target)
    elif node.op == "call_function" and torch.overrides.resolve_name(target) is not None:
        # A function of torch bears the name of its op.
        name = target.__name__
    else:
        return None
    packet = getattr(torch.ops.aten, name, None)
    return _overloads(packet) if isinstance(packet, torch._ops.OpOverloadPacket) else None


@cache
def _overloads(packet: torch._ops.OpOverloadPacket) -> list[torch._ops.OpOverload]:
    return [getattr(packet, name) for name in packet.overloads()]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    for tensor in _flat(value):
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and _has_storage(tensor):
            yield tensor


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own to ask for; those inside `torch.func.grad` and `vmap` have not."""
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value
