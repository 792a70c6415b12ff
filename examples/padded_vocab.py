"""The failure that this project began with, in one call: a vocabulary of 51865 against logits padded to 51904.

A kernel that takes the whole output for its slice refuses it, and a wrapper that asks `if W < H` asks on every call.
Here the compiler asks once: the graph before and after is printed. Run it with `python examples/padded_vocab.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

import xpu_lora_compile as xlc

WIDTH, COLUMNS, RANK, SLOTS = 51865, 51904, 16, 3


def logits_with_lora(hidden: Tensor, head: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """`hidden @ head.T` plus each row's own adapter."""
    logits = hidden @ head.t()
    rank_vectors = hidden.new_empty(len(hidden), RANK)
    xlc.bgmv_shrink(rank_vectors, hidden, a, indices)
    xlc.bgmv_expand(logits, rank_vectors, b, indices)
    return logits


def show_and_run(module: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend that prints what the passes do and runs the result."""
    print("before:", module.graph, sep="\n")
    decisions = xlc.rewrite(module)
    print("after:", module.graph, *decisions, sep="\n")
    return module.forward


def main() -> int:
    """Compile, compare with plain PyTorch, and return 0 if they agree."""
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 64), torch.randn(COLUMNS, 64)
    a, b, indices = torch.randn(SLOTS, RANK, 64), torch.randn(SLOTS, WIDTH, RANK), torch.tensor([0, -1, 2, 1])
    try:
        xlc.bgmv_expand_slice(hidden @ head.t(), torch.ones(4, RANK), b, indices, 0, COLUMNS)
    except xlc.LoraError as error:
        print("what a kernel that wants equal widths says:", error, sep="\n")
    result = torch.compile(logits_with_lora, backend=show_and_run)(hidden, head, a, b, indices)
    expected = hidden @ head.t()
    for row, slot in ((0, 0), (2, 2), (3, 1)):
        expected[row, :WIDTH] += b[slot] @ (a[slot] @ hidden[row])
    agrees = torch.allclose(result, expected, atol=1e-3)
    print("equal to plain PyTorch:", agrees, "- padded columns untouched:", torch.equal(result[1], expected[1]))
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
