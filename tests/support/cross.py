"""Graphs for an Intel GPU, traced where there is none: what our passes make of a call, and what is left after AOT."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import xpu_c
from torch import Tensor
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.fx_passes import post_grad
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core
from torch._inductor.virtualized import V
from torch.fx import GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.passes.decisions import Decision
from xpu_lora_compile.passes.text import as_text
from xpu_lora_compile.torch_internals import compiled_after_aot, source_of, without_memory

# What is no work for a device.
NO_WORK = ("aten.t", "aten.view", "aten.slice.Tensor", "aten.select.int", "aten.as_strided", "aten.reshape", "getitem")
# Questions that the host answers.
NO_WORK += ("aten.sym_size.int", "aten.sym_storage_offset")
# What has the host wait for the device, or the device for another stream: no graph that is captured may do so.
WAITS = ("item", "_local_scalar_dense", "nonzero", "unique", "record_event", "wait_event", "wait_stream", "synchronize")
# Which operand each of the vendor's ops writes to.
WRITTEN = {"lora_shrink": 2, "lora_expand": 2, "bgmv_shrink": 0, "bgmv_expand_slice": 0}
# Of the conversion of indices, which is one kernel after Inductor has fused it.
CONVERSION = ("aten.lt.", "aten.ge.", "aten.bitwise_or.", "aten.masked_fill.", "aten._to_copy")


@dataclass
class Traced:
    """What became of the one graph of a call.

    Attributes:
        module: the graph of Dynamo, after our passes.
        decisions: what they decided.
        text: that graph.
        after_aot: the graph that Inductor generates code for, ops in place where it has found that they may be.
    """

    module: GraphModule
    decisions: list[Decision]
    text: str
    after_aot: str = ""

    @property
    def calls(self) -> list[str]:
        """Of the graph after AOT what a device does, without views and the base products: one line a call."""
        lines = [
            line for line in self.after_aot.split("\n") if not re.search(r"= input$|^return|aten\.(mm|addmm)\(", line)
        ]
        return [line for line in lines if not re.search(rf"(?:^|= )({'|'.join(map(re.escape, NO_WORK))})\(", line)]

    @property
    def kernels(self) -> list[str]:
        """The calls by name, with the conversion of the indices as one."""
        names = [re.sub(r"^.*?= ", "", line).split("(")[0] for line in self.calls]
        # In its order: a comparison starts one.
        joined = [
            "index conversion" if name.startswith("aten.lt.") else name
            for at, name in enumerate(names)
            if not (_is_conversion(names, at) and not name.startswith("aten.lt."))
        ]
        return [
            name.removeprefix("_xpu_C.").removeprefix("aten.")
            for name in joined
            if not name.startswith("aten.new_empty")
        ]

    def run_on(self, groups: Sequence[dict[str, str]], named: Mapping[str, Tensor | int]) -> Any:
        """Run the rewritten graph with the double on a CPU, on tensors and sizes by the names of Dynamo's sources."""
        inputs = [named[source_of(node)] for node in self.module.graph.nodes if node.op == "placeholder"]
        self.module.recompile()
        with torch.no_grad(), xpu_c.installed(*groups):
            return self.module(*inputs)


def _is_conversion(names: list[str], at: int) -> bool:
    """Whether a call belongs to a run of elementwise calls that a comparison with 0 starts."""
    while at >= 0 and any(names[at].startswith(one) for one in CONVERSION):
        if names[at].startswith("aten.lt."):
            return True
        at -= 1
    return False


def for_intel(
    function: Callable[..., Any],
    make: Callable[[str], Sequence[Any]],
    groups: Sequence[dict[str, str]],
    *,
    after_aot: bool = True,
    passes: Callable[[GraphModule], list[Decision]] = xlc.rewrite,
    **options: Any,
) -> Traced:
    """Compile a call for device `xpu` with fake tensors, where these ops of the wheel are there, into one graph.

    Args:
        function: what is compiled.
        make: its arguments on a device.
        groups: of `xpu_c`, the ops that are there.
        after_aot: whether to go on from our passes to what Inductor generates code for.
        passes: what rewrites the graph.
        options: of `torch.compile`.
    """
    traced: list[Traced] = []

    def finish(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with V.set_fake_mode(detect_fake_mode(inputs)):
            # Of Inductor's step the part that finds what may be written in place; the rest of it copies fake tensors,
            # which for a device that torch was built without it cannot.
            reinplace_inplaceable_ops_core(module.graph)
            post_grad.decompose_auto_functionalized(module.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        traced[-1].after_aot = as_text(module)
        return module.forward

    def backend(module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        decisions = passes(module)
        # AOT may change the graph that it is given.
        traced.append(Traced(module, decisions, as_text(module)))
        compiled: Callable[..., Any] = compiled_after_aot(module, finish) if after_aot else module.forward
        return compiled

    torch._dynamo.reset()
    with xpu_c.installed(*groups), without_memory():
        args = make("xpu")
        torch.compile(function, backend=backend, fullgraph=True, **options)(*args)
    (only,) = traced
    can_be_captured(only.after_aot)
    return only


def can_be_captured(text: str) -> None:
    """Fail on a graph that waits, or hands the vendor's ops a view to write to: that has lost devices (vLLM #47944)."""
    made = dict(re.findall(r"^(%\d+): .*? = (\S+?)\(", text, re.MULTILINE))
    for op, operands in re.findall(r"_xpu_C\.(\w+)\((.*)\)$", text, re.MULTILINE):
        # Operands that are lists count as one.
        written = re.sub(r"\(.*?\)", "()", operands).split(", ")[WRITTEN[op]]
        assert not made.get(written, "").startswith(NO_WORK), f"{op} writes to {written}, a view:\n{text}"
    for name in made.values():
        assert not {*name.split(".")} & {*WAITS}, f"{name} waits:\n{text}"
