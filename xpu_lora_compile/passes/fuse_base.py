"""Base product, then LoRA added to it -> one call that computes both."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.kernels import computes_base
from xpu_lora_compile.ops import ADD_LORA, LINEAR_WITH_LORA
from xpu_lora_compile.passes.calls import LoraNode, lora_calls
from xpu_lora_compile.passes.decisions import decisions_on, note, set_decisions
from xpu_lora_compile.passes.editing import insert_before, is_subgraph, value_of
from xpu_lora_compile.passes.graph import Rewrite
from xpu_lora_compile.passes.memory import is_barrier, knows_its_views, region_of, storage_of, storages_of, written_by
from xpu_lora_compile.torch_internals import is_known, is_wrapper

_LINEAR = (torch.nn.functional.linear, torch.ops.aten.linear.default)


def fuse_base(graph: Graph, rewrite: Rewrite) -> None:
    """Let the Triton kernels compute the base products that they add LoRA to, where they share one input.

    Before:
        q = linear(x, wq, bias);    k = linear(x, wk)
        add_lora([q, k], x, a, b, indices, outputs, offsets, scaling, tiles=route_tiles(indices, K))
        use(q, k)

    After:
        q, k = linear_with_lora(x, [wq, wk], [bias, None], a, b, indices, outputs, offsets, scaling, tiles=…)
        use(q, k)

    For few rows that is one kernel, with LoRA in the epilogue of the product; for more, the shrink runs on a second
    stream beside the product; for many, LoRA is written first, and the product added to it.

    Left alone: an output that is no `linear` of the same input, that is looked at before LoRA is added, or whose
    operands are written to in between; a change of autocast or grad mode in between; products in another dtype than
    their input's (autocast), of a weight that is a subclass (quantized), or with another bias than one a column. All on
    devices for which this was not measured.

    Runs on: graphs of Dynamo, before functionalization, after `lower`.
    """
    calls = [call for call in lora_calls(graph, ADD_LORA) if _wants(call)]
    if not calls or rewrite.keeps_bases or is_subgraph(graph) or not knows_its_views(graph):
        return
    for node in [call.node for call in calls]:
        # Read here: a call before it may have taken its input's place.
        call = LoraNode(node)
        products = [_product(output, call.inputs, node) for output in call.outputs]
        if None in products:
            note(node, "fuse_base: left alone, since an output is not just a linear of the same input")
        elif rewrite.takes_fuel(node):
            _fuse(call, products)


def _wants(call: LoraNode) -> bool:
    return (
        computes_base(value_of(call.inputs).device.type)
        and call.adapter_weights is None
        and "tiles" in call.prepared
        and all(isinstance(offset, int) for offset in call.slice_offsets)
    )


def _product(output: Node, inputs: Node, call: Node) -> tuple[Node, Node | None] | None:
    """Weight and bias of the linear that an output is; None if it is more than that."""
    if output.target not in _LINEAR or output.op != "call_function":
        return None
    given: dict[str, Any] = {**dict(zip(("input", "weight", "bias"), output.args, strict=False)), **output.kwargs}
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    operands = [x, weight, *([bias] if bias is not None else [])]
    value = value_of(output)
    if not all(isinstance(operand, Node) and isinstance(value_of(operand), Tensor) for operand in operands):
        return None
    # What stands for other tensors, as a quantized weight does, has a product of its own.
    if any(is_wrapper(value_of(operand)) for operand in operands):
        return None
    if value.dim() != 2 or value.requires_grad or any(value_of(operand).dtype != value.dtype for operand in operands):
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
        seen = any(storage_of(value) in storages_of(near) for near in (node, *node.all_input_nodes))
        if node.op == "root" or is_barrier(node) or seen or written_by(node) & read:
            return None
        node = node.next
    return weight, bias


def _fuse(call: LoraNode, products: list[Any]) -> None:
    node, outputs = call.node, call.outputs
    weights, biases = [weight for weight, _ in products], [bias for _, bias in products]
    values = [value_of(output) for output in outputs]
    args = (call.inputs, weights, biases, call.lora_a, call.lora_b, call.indices)
    places = call.slice_outputs, call.slice_offsets, call.scaling
    fused = insert_before(node, LINEAR_WITH_LORA, (*args, *places), values, **call.prepared)
    set_decisions(fused, decisions_on(node))
    note(fused, "fuse_base: computed with its base product")
    for position, output in enumerate(outputs):
        result = insert_before(node, operator.getitem, (fused, position), values[position])
        output.replace_all_uses_with(result, delete_user_cb=lambda user: user is not node)
    graph = node.graph
    graph.erase_node(node)
    for output in outputs:
        graph.erase_node(output)
