"""`LoraNode`: the one reader of calls of our ops in a graph, by the names of their schemas."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.ops import (
    ADD_LORA,
    BGMV_EXPAND,
    BGMV_EXPAND_SLICE,
    BGMV_SHRINK,
    EXPAND,
    EXPAND_SLICE,
    LINEAR_WITH_LORA,
    LORA_LINEAR,
    LORA_LINEARS,
    NATIVE_ADD_LORA,
    NATIVE_EXPAND,
    NATIVE_SHRINK,
    ROUTE,
    ROUTE_TILES,
    SHRINK,
    TRAINED_LINEAR,
    TRITON_ADD_LORA,
    TRITON_EXPAND_SLICE,
    TRITON_ROUTE_TILES,
    TRITON_SHRINK,
    TRITON_TRAINING_TILES,
    VALID_SLOTS,
    VENDOR_ADD_LORA,
)
from xpu_lora_compile.ops.checks import without_slice_dim
from xpu_lora_compile.passes.editing import arguments_of, calls_to, value_of
from xpu_lora_compile.torch_internals import name_of

SHRINKS = (BGMV_SHRINK, SHRINK, NATIVE_SHRINK, TRITON_SHRINK)
EXPANDS = (BGMV_EXPAND, BGMV_EXPAND_SLICE, EXPAND, EXPAND_SLICE, NATIVE_EXPAND, TRITON_EXPAND_SLICE)
# Those that both shrink and expand, of one slice or several.
WHOLE = (
    LORA_LINEAR,
    LORA_LINEARS,
    ADD_LORA,
    NATIVE_ADD_LORA,
    VENDOR_ADD_LORA,
    TRITON_ADD_LORA,
    LINEAR_WITH_LORA,
    TRAINED_LINEAR,
)
LORA_OPS = (*SHRINKS, *EXPANDS, *WHOLE)
# Those that compute from the indices what several calls share.
ROUTINGS = (ROUTE, ROUTE_TILES, TRITON_ROUTE_TILES, TRITON_TRAINING_TILES, VALID_SLOTS)


def lora_calls(graph: Graph, *ops: torch._ops.OpOverload) -> list[LoraNode]:
    """Return the graph's calls of these ops whose operands' shapes are known, in the order of the graph."""
    calls = {node for op in ops for node in calls_to(graph, op)}
    return [LoraNode(node) for node in graph.nodes if node in calls]


class LoraNode:
    """One call of an op of `LORA_OPS`, whichever it is.

    Attributes:
        node: the call.
        op: its overload.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.op: torch._ops.OpOverload = overload_of(node)
        names = [argument.name for argument in self.op._schema.arguments]
        self._given = dict(zip(names, arguments_of(node, self.op), strict=True))

    @property
    def name(self) -> str:
        """The op's name without its namespace."""
        return name_of(self.op)

    def _first(self, *names: str, default: Any = None) -> Any:
        return next((self._given[name] for name in names if name in self._given), default)

    @property
    def outputs(self) -> list[Node]:
        """What LoRA is added to, `[T, H]` each, in place or not; none of a call that computes the base products."""
        found = self._first("outputs", "bases", "output", "output_tensor", "base", default=[])
        return list(found) if isinstance(found, list | tuple) else [found]

    @property
    def inputs(self) -> Node:
        """The rows, `[T, D]`; of an expand the rank vectors, `[T, R]`."""
        return cast("Node", self._given["inputs"])

    @property
    def lora_a(self) -> list[Node]:
        """A of each slice; none of an expand."""
        if self.op in SHRINKS:
            return [self._first("lora_a_weights", "weights")]
        return list(self._given.get("lora_a", ()))

    @property
    def lora_b(self) -> list[Node]:
        """B of each slice; none of a shrink."""
        if self.op in EXPANDS:
            return [self._first("lora_b_weights", "weights")]
        return list(self._given.get("lora_b", ()))

    @property
    def indices(self) -> Node:
        """The slot of each row, `[T]`, or `[T, M]`: as they came, or as the vendor's ops want them."""
        return cast("Node", self._first("lora_indices_tensor", "indices", "valid"))

    @property
    def prepared(self) -> dict[str, Node]:
        """What was computed from the indices once for all calls, and the ranks, by the names of `RowRouting`."""
        return {name: self._given[name] for name in RowRouting.PREPARED if self._given.get(name) is not None}

    @property
    def slice_outputs(self) -> list[int]:
        """The position of each slice's output."""
        if self.op is TRAINED_LINEAR:
            return list(range(len(self.lora_b)))
        return list(self._given.get("slice_outputs") or [0] * max(1, len(self.lora_b)))

    @property
    def slice_offsets(self) -> list[Any]:
        """The first column of each slice, an int or a node."""
        if self.op is TRAINED_LINEAR:
            return [0] * len(self.lora_b)
        if self.op in WHOLE:
            return list(self._given["slice_offsets"])
        return [self._first("slice_offset", "offset", default=0)]

    @property
    def scaling(self) -> float:
        """The factor on what A makes of the inputs."""
        return cast("float", self._given.get("scaling", 1.0))

    @property
    def add(self) -> bool:
        """Whether an expand adds to its columns; if not, it replaces them."""
        return cast("bool", self._first("add_inputs", "add", default=True))

    @property
    def adapter_weights(self) -> Node | None:
        """The factor of each of a row's adapters, `[T, M]`; None where a row has one adapter at most."""
        return self._given.get("adapter_weights")

    @property
    def scalings(self) -> Node | None:
        """The factor of each slot, `[K]`, of a call that trains some."""
        return self._given.get("scalings")

    @property
    def trained_slots(self) -> Node | None:
        """The slots that a call trains, `[n]`."""
        return self._given.get("slots") if self.op is TRAINED_LINEAR else None

    @property
    def trained(self) -> tuple[list[Node], list[Node]]:
        """Of a call that trains slots, of each slice the leaves that get the gradients of A and of B."""
        return list(self._given.get("trained_a", ())), list(self._given.get("trained_b", ()))

    @property
    def ranks(self) -> Node | None:
        """The rank of each slot's adapter, if the call says it."""
        return self._given.get("ranks")

    def call(self, slices: slice = slice(None), outputs: list[Node] | None = None) -> LoraCall:
        """Return the call with fake tensors, to ask kernels about.

        Args:
            slices: which of the slices.
            outputs: what stands for the outputs.
        """
        a, b = (
            [without_slice_dim(cast("Tensor", value_of(weights))) for weights in stacks[slices]]
            for stacks in (self.lora_a, self.lora_b)
        )
        slots = (a or b)[0].shape[0]
        targets, inputs = [value_of(output) for output in outputs or self.outputs], value_of(self.inputs)
        places = self.slice_outputs[slices], self.slice_offsets[slices]
        weights = None if self.adapter_weights is None else value_of(self.adapter_weights)
        routing = RowRouting(value_of(self.indices), slots, adapter_weights=weights)
        return LoraCall(targets, inputs, a, b, routing, *places, self.scaling)


def overload_of(node: Node) -> torch._ops.OpOverload:
    """Return the overload that a node calls, also where it names the packet."""
    target: Any = node.target
    return cast("torch._ops.OpOverload", target if isinstance(target, torch._ops.OpOverload) else target.default)
