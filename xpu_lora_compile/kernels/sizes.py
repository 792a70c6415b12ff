"""How large the tiles of the Triton kernels are, by T; none of it changes a bit of the results.

Found on an H200 (torch 2.11, Triton 3.6, bfloat16, D = 4096, K = 8 and 32, R = 16) with `xpu-lora bench gpu`, settings
against each other in one run.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Tiles, warps and stages of each kernel; the defaults are those of few rows."""

    # Columns of D that one step of the shrink takes.
    shrink_columns: int = 128
    # With two warps a program instead of four, the shrink of 32 and 128 rows takes 0.8 of the time.
    shrink_warps: int = 2
    shrink_stages: int = 4
    # How many slices one program takes, 1 to 3: together they read the rows once.
    shrink_slices: int = 1
    # Whether one program takes all pieces of D.
    shrink_together: bool = False
    # Columns of a block, and how many blocks one program takes.
    expand_columns: int = 64
    expand_blocks: int = 1
    expand_warps: int = 2
    # At most so many registers a thread, on CUDA; 0 is as many as the compiler likes.
    expand_registers: int = 0
    # Up to how many rows, columns of all base products, and ranks LoRA is in the epilogue of the product. Beyond, the
    # product's own kernel, with the shrink beside it, is as fast or faster.
    linear_rows: int = 8
    linear_width: int = 4096
    linear_rank: int = 64
    # Columns of a tile, and columns of D that one step takes.
    linear_columns: int = 32
    linear_depth: int = 128
    linear_warps: int = 4
    linear_stages: int = 7


def sizes_for(rows: int) -> Sizes:
    """The sizes for T rows."""
    if rows >= 512:
        return Sizes(
            shrink_warps=4,
            shrink_slices=3,
            expand_columns=128,
            expand_blocks=4,
            expand_warps=8,
            expand_registers=64,
        )
    return Sizes(expand_blocks=4) if rows > 64 else Sizes()
