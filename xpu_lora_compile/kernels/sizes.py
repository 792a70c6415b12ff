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
    # How many pieces of D one program takes: 1, or 2, which the expand then reads as one.
    pieces_each: int = 1
    # Columns of a block, and how many blocks one program takes.
    expand_columns: int = 128
    expand_blocks: int = 1
    expand_warps: int = 4
    # At most so many registers a thread, on CUDA; 0 is as many as the compiler likes.
    expand_registers: int = 0
    # Up to how many rows, columns of all base products, and ranks LoRA is in the epilogue of the product. Beyond, the
    # product's own kernel, with the shrink beside it, is as fast or faster.
    linear_rows: int = 8
    linear_width: int = 4096
    # And up to so many rows, whatever the width, where all weights of the products are at most so many elements: then
    # it is launches that take the time.
    linear_rows_if_small: int = 64
    linear_small: int = 1 << 21
    linear_rank: int = 16
    # Columns of a tile, and columns of D that one step takes.
    linear_columns: int = 16
    linear_depth: int = 128
    linear_warps: int = 2
    linear_stages: int = 7


def sizes_for(rows: int, rank: int, width: int) -> Sizes:
    """The sizes for T rows, the highest R, and W of all slices together; those of the shrink do not depend on W."""
    if rows <= 64:
        # A program takes 16 rows of a linear, and these columns: narrow ones while there are too few programs.
        is_wide = width * -(-rows // 16) > 4096
        return Sizes(expand_columns=256 if width > 8192 else 128, linear_columns=32 if is_wide else 16)
    if rows < 512:
        return Sizes(expand_columns=64, expand_blocks=4, expand_warps=2)
    return Sizes(
        shrink_columns=64,
        shrink_warps=4,
        shrink_slices=3,
        pieces_each=2 if rows >= 2048 else 1,
        expand_blocks=8 if rows * width >= 1 << 24 else 2,
        expand_warps=8,
        # More programs at a time, until the ranks need the registers.
        expand_registers=64 if rank <= 16 else 0,
    )
