"""What an Intel GPU would be given, printed on any laptop: one packed qkv layer, and logits of a padded vocabulary.

Nothing here runs on an Intel GPU, and nothing is computed at all. Both are traced with fake tensors on device `xpu`,
which have shapes and no numbers; the ops of vllm-xpu-kernels are declared by their published schemas, without kernels.
Of the calls for the device views are left out, which copy nothing; that is why some numbers appear only where they are
read. Inductor makes one kernel of the five aten calls that ask which indices are slots. What a GPU makes of it all only
a GPU can tell: `xpu-lora doctor` asks it. Run this with `python examples/cross_compile_xpu.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import linear

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import forced_kernel, vendor
from xpu_lora_compile.passes.text import as_text
from xpu_lora_compile.torch_internals import compiled_after_aot, without_memory

ROWS, FEATURES, RANK, SLOTS = 32, 4096, 16, 8
QKV = (4096, 1024, 1024)
VOCABULARY, PADDED = 51865, 51904

# As vllm-xpu-kernels 0.1.16.2 publishes them.
SCHEMAS = {
    "lora_shrink": "Tensor inputs, Tensor[] lora_a_weights, Tensor! output_tensor, Tensor lora_indices, float scaling",
    "lora_expand": "Tensor inputs, Tensor[] lora_b_weights, Tensor! output_tensor, Tensor lora_indices, "
    "int offset_start, bool add_inputs",
}


def block(
    hidden: Tensor, last: Tensor, qkv: Tensor, head: Tensor, a: list[Tensor], b: list[Tensor], slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of one product, and logits that are wider than what the adapters were trained with."""
    offsets = [0, QKV[0], QKV[0] + QKV[1]]
    attention = xlc.lora_linear(linear(hidden, qkv), hidden, a[:3], b[:3], slots, offsets)
    logits, rank_vectors = linear(last, head), last.new_empty(ROWS, RANK, dtype=torch.float32)
    xlc.bgmv_shrink(rank_vectors, last, a[3], slots)
    xlc.bgmv_expand(logits, rank_vectors, b[3], slots)
    return attention, logits


def operands() -> tuple[Any, ...]:
    """The block's arguments, on a device that need not be there."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="xpu")

    a = [empty(SLOTS, RANK, FEATURES) for _ in range(4)]
    b = [empty(SLOTS, width, RANK) for width in (*QKV, VOCABULARY)]
    hidden, last = empty(ROWS, FEATURES), empty(ROWS, FEATURES)
    slots = torch.empty(ROWS, dtype=torch.int64, device="xpu")
    return hidden, last, empty(sum(QKV), FEATURES), empty(PADDED, FEATURES), a, b, slots


@contextmanager
def wheel() -> Iterator[None]:
    """The ops of vllm-xpu-kernels, as far as a compiler sees them; where the package is installed they are there."""
    library = torch.library.Library("_xpu_C", "FRAGMENT")
    try:
        for name, arguments in SCHEMAS.items():
            if vendor.problem_of(name):
                library.define(f"{name}({arguments}) -> ()")
        yield
    finally:
        library._destroy()


def show(module: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend that prints what the passes do, and what is left for the device after AOT; it runs nothing."""
    print("\nbefore", _without_inputs(as_text(module)), sep="\n")
    decisions = xlc.rewrite(module)
    print("\nafter the passes", _without_inputs(as_text(module)), sep="\n")
    for decision in decisions:
        print(decision, *(f"    {note}" for note in decision.notes), sep="\n")

    def print_calls(after_aot: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        print("\ncalls for the device, after AOT, without views", *_device_calls(as_text(after_aot)), sep="\n")
        return after_aot.forward

    compiled: Callable[..., Any] = compiled_after_aot(module, print_calls)
    return compiled


def _without_inputs(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.endswith("= input"))


def _device_calls(text: str) -> Iterator[str]:
    """The lines that are no views; an op that writes in place is wrapped by AOT, and Inductor unwraps it again."""
    views = r"= input$|^return|getitem\(|aten\.(t|slice\.Tensor|select\.int|as_strided|view)\("
    for line in text.split("\n"):
        if not re.search(views, line):
            yield re.sub(r"^.*auto_functionalized_v2\((\w+\.\w+)\.default, (.*)\)$", r"\1(\2)", line)


def main() -> int:
    """Print both; 0 if the wheel's ops are what is left for the device where they are there."""
    print("Nothing of this has run on an Intel GPU: these are graphs, traced with fake tensors on device xpu.")
    # XPU_LORA_KERNEL keeps them out.
    may_run = forced_kernel() is None
    is_installed = bool(vendor.family()[0])
    decisions: list[xlc.Decision]
    with xlc.record_decisions() as decisions, without_memory():
        print("\n== with vllm-xpu-kernels, of which lora_shrink and lora_expand are declared, by schema alone")
        with wheel():
            torch.compile(block, backend=show, fullgraph=True)(*operands())
        torch.compiler.reset()
        print("\n== with what is installed: `add_lora` is Triton's kernels where Triton is, else plain PyTorch")
        torch.compile(block, backend=show, fullgraph=True)(*operands())
        torch.compiler.reset()
    used = [not any("kernel vendor is not used" in note for note in one.notes) for one in decisions]
    agrees = used == [may_run, may_run, may_run and is_installed, may_run and is_installed]
    print("\nthe vendor's ops are called exactly where they are there, and no kernel is forced:", agrees)
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
