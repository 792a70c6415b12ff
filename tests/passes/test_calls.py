"""`LoraNode` reads each op that adds LoRA, and knows them all."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph

from xpu_lora_compile.kernels import KERNELS
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.ops import LORA_LINEAR
from xpu_lora_compile.passes.calls import EXPANDS, LORA_OPS, ROUTINGS, SHRINKS, WHOLE, LoraNode
from xpu_lora_compile.torch_internals import name_of, schemas_of

# Parts of kernels, which no graph of our passes has: what a composite op becomes, what eager calls try, gradients.
PARTS = {
    "native_add_slices",
    "native_add_packed",
    "native_add_several",
    "slot_products",
    "outer_by_slot",
    "native_backward",
    "triton_backward",
    # What `lower` takes out again.
    "sorted_indices",
}


def test_every_op_that_adds_lora_is_known_to_whoever_reads_graphs() -> None:
    ops = {name for name in schemas_of("xpu_lora") if not name.startswith("native_try_")} - PARTS
    assert ops == {name_of(op) for op in (*LORA_OPS, *ROUTINGS)}
    prepares = {name for kernel in KERNELS for name in (kernel.prepares, kernel.visible_prepares) if name}
    assert {name_of(op) for op in ROUTINGS} == {*prepares, "triton_training_tiles"}
    visible = {name for kernel in KERNELS for name in kernel.visible_ops.values()}
    assert visible <= {name_of(op) for op in LORA_OPS}


@pytest.mark.parametrize("op", LORA_OPS, ids=lambda op: op._schema.name.split("::")[1])
def test_operands_are_read_by_name_whichever_op_it_is(op: torch._ops.OpOverload) -> None:
    graph = Graph()
    given = {argument.name: graph.placeholder(argument.name) for argument in op._schema.arguments}
    lists = [
        argument.name for argument in op._schema.arguments if "[]" in str(argument.type) or "List" in str(argument.type)
    ]
    by_name = {name: [node] if name in lists else node for name, node in given.items()}
    call = LoraNode(graph.call_function(op, (), by_name))
    assert call.inputs is given["inputs"]
    assert len(call.lora_a) == (op not in EXPANDS)
    assert len(call.lora_b) == (op not in SHRINKS)
    assert call.indices.name in ("lora_indices_tensor", "indices", "valid")
    if op in WHOLE:
        assert (call.lora_a, call.lora_b) == ([given["lora_a"]], [given["lora_b"]])
        assert call.scaling == given.get("scaling", 1.0)
    assert call.prepared == {name: given[name] for name in RowRouting.PREPARED if name in given}
    assert (call.scalings, call.trained[1]) == (given.get("scalings"), [given[n] for n in ["trained_b"] if n in given])
    outputs = {node.name for node in call.outputs}
    assert outputs <= {"outputs", "bases", "output", "output_tensor", "base"}
    assert bool(outputs) == ("weights" not in given or op not in WHOLE)


def test_arguments_that_are_left_out_have_their_defaults() -> None:
    graph = Graph()
    base, x, a, b, indices = (graph.placeholder(name) for name in ("base", "x", "a", "b", "indices"))
    call = LoraNode(graph.call_function(LORA_LINEAR.overloadpacket, (base, x, [a], [b], indices, [3])))
    assert (call.op, call.outputs, call.slice_outputs, call.slice_offsets) == (LORA_LINEAR, [base], [0], [3])
    assert (call.scaling, call.ranks, call.prepared, call.indices) == (1.0, None, {}, indices)
