"""Base product, then LoRA added to it -> one call that computes both."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.kernels import kernel_named
from xpu_lora_compile.ops import ADD_LORA, LINEAR_LORA, ROUTE_TILES
from xpu_lora_compile.passes.calls import LoraNode
from xpu_lora_compile.passes.decisions import decisions_on, note, set_decisions
from xpu_lora_compile.passes.editing import calls_to, insert_before, is_subgraph, may_rewrite, value_of
from xpu_lora_compile.passes.memory import is_barrier, knows_its_views, region_of, storage_of, storages_of, written_by
from xpu_lora_compile.torch_internals import is_known, is_wrapper

_LINEAR = (torch.nn.functional.linear, torch.ops.aten.linear.default)

_KEEPS: ContextVar[bool] = ContextVar("keeps", default=False)


@contextmanager
def keep_bases() -> Iterator[None]:
    """Leave base products as they are in this block: for whoever looks at what LoRA is added to."""
    token = _KEEPS.set(True)
    try:
        yield
    finally:
        _KEEPS.reset(token)


def fuse_base(graph: Graph) -> None:
    """Let the Triton kernels compute the base products that they add LoRA to, where they share one input.

    Before:
        q = linear(x, wq, bias);    k = linear(x, wk)
        add_lora([q, k], x, a, b, [indices, route_tiles(indices, K)], outputs, offsets, scaling)
        use(q, k)

    After:
        q, k = linear_lora(x, [wq, wk], [bias, None], a, b, [indices, …], outputs, offsets, scaling)
        use(q, k)

    For few rows that is one kernel, with LoRA in the epilogue of the product; for more, the shrink runs on a second
    stream beside the product; for many, LoRA is written first, and the product added to it.

    Left alone: an output that is no `linear` of the same input, that is looked at before LoRA is added, or whose
    operands are written to in between; a change of autocast or grad mode in between; products in another dtype than
    their input's (autocast), of a weight that is a subclass (quantized), or with another bias than one a column. All on
    devices for which this was not measured.

    Runs on: graphs of Dynamo, before functionalization, after `lower`.
    """
    calls = [call for call in calls_to(graph, ADD_LORA) if _wants(call)]
    if not calls or _KEEPS.get() or is_subgraph(graph) or not knows_its_views(graph):
        return
    for call in calls:
        lora = LoraNode(call)
        outputs, inputs = lora.outputs, lora.inputs
        places = lora.slice_outputs, lora.slice_offsets
        rest = [lora.lora_a, lora.lora_b, lora.routing, *places, lora.scaling]
        products = [_product(output, inputs, call) for output in outputs]
        if None in products:
            note(call, "fuse_base: left alone, since an output is not just a linear of the same input")
        elif may_rewrite(call):
            _fuse(call, outputs, inputs, products, rest)


def _wants(call: Node) -> bool:
    lora = LoraNode(call)
    return (
        value_of(lora.inputs).device.type in kernel_named("triton").computes_base_on
        and any(node.target is ROUTE_TILES for node in lora.routing)
        and all(isinstance(offset, int) for offset in lora.slice_offsets)
    )


def _product(output: Node, inputs: Node, call: Node) -> tuple[Node, Node | None] | None:
    """Weight and bias of the linear that an output is; None if it is more than that."""
    if output.target not in _LINEAR or output.op != "call_function":
        return None
    given: dict[str, Any] = {**dict(zip(("input", "weight", "bias"), output.args, strict=False)), **output.kwargs}
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    operands = [x, weight, *([bias] if bias is not None else [])]
    value = value_of(output)
    if not all(isinstance(one, Node) and isinstance(value_of(one), Tensor) for one in operands):
        return None
    # What stands for other tensors, as a quantized weight does, has a product of its own.
    if any(is_wrapper(value_of(one)) for one in operands):
        return None
    if value.dim() != 2 or value.requires_grad or any(value_of(one).dtype != value.dtype for one in operands):
        return None
    # Of one bias a column: `linear` takes whatever can be expanded to its result.
    if bias is not None and not (value_of(bias).dim() == 1 and is_known(value_of(bias).shape[0] == value.shape[1])):
        return None
    if region_of(value_of(x)) != region_of(value_of(inputs)):
        return None
    read = set().union(*map(storages_of, operands))
    # Of the graph as it is now: a call before this one may have become another.
    node = output.next
    while node is not call:
        seen = any(storage_of(value) in storages_of(one) for one in (node, *node.all_input_nodes))
        if node.op == "root" or is_barrier(node) or seen or written_by(node) & read:
            return None
        node = node.next
    return weight, bias


def _fuse(call: Node, outputs: list[Node], inputs: Node, products: list[Any], rest: list[Any]) -> None:
    weights, biases = [weight for weight, _ in products], [bias for _, bias in products]
    values = [value_of(output) for output in outputs]
    fused = insert_before(call, LINEAR_LORA, (inputs, weights, biases, *rest), values)
    set_decisions(fused, decisions_on(call))
    note(fused, "fuse_base: computed with its base product")
    for at, output in enumerate(outputs):
        result = insert_before(call, operator.getitem, (fused, at), values[at])
        output.replace_all_uses_with(result, delete_user_cb=lambda user: user is not call)
    graph = call.graph
    graph.erase_node(call)
    for output in outputs:
        graph.erase_node(output)
