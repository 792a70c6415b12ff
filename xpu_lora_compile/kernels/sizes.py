"""How large the tiles of the Triton kernels are, by T, which changes no bit of the results; and whether LoRA is added
in the kernel of the base product (`linear_*`), after it, or before it (`delta_first`), which may.

Found on an H200 and an H100 (torch 2.11, Triton 3.6, bfloat16, D = 4096) at points of `xpu-lora bench gpu`, settings
against each other in one run. Those for Intel GPUs were found without one, by what Intel's compilers say of registers
and messages: `benchmarks/intel_sizes.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from xpu_lora_compile.torch_internals import is_guarded, number_of

# From so many slots on they are taken to be pages of experts: hardly two of few rows have the same.
SLOTS_OF_PAGES = 512
# What a graph for every T is tuned for: up to FEW rows for FEW, beyond for MANY.
FEW, MANY = 64, 1024


class Sizes(NamedTuple):
    """Tiles, warps and stages of each kernel; the defaults are those of few rows."""

    # How many ranks a product of the shrink and of the expand takes at most.
    shrink_ranks: int = 64
    expand_ranks: int = 64
    # Whether A and B are read by Intel's 2-D block loads where these can read them.
    block_loads: bool = False
    # Columns of D that one step of the shrink takes.
    shrink_columns: int = 128
    # With two warps a program instead of four, the shrink of 32 and 128 rows takes 0.8 of the time.
    shrink_warps: int = 2
    shrink_stages: int = 4
    # How many slices of ranks up to 16 one program takes, 1 to 3: together they read the rows once.
    shrink_slices: int = 1
    # From how many programs on each takes two pieces of D, which the expand then reads as one: it reads half as much.
    shrink_programs: int = 256
    # Columns of a block, and how many blocks one program takes.
    expand_columns: int = 256
    expand_blocks: int = 1
    expand_warps: int = 4
    # Whether a program reads the rank vectors once, and B and outputs one block ahead: that takes registers.
    expand_ahead: bool = True
    # Whether LoRA comes first, and the base product is added to it: what is only written, and read by a product that
    # has time for it, takes less time than what is read, added to and written.
    delta_first: bool = False
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


class GradientSizes(NamedTuple):
    """Tiles of the kernels of gradients, of one size for every T and K.

    Of seven choices, timed on an H200 at bfloat16 and R 16, the fastest for eight adapters. For one, sums of twice the
    rows a step take an eighth less time.
    """

    # How many ranks a product takes at most.
    ranks: int = 32
    # Columns of a tile of dX, and of one of dA or dB, whose sums take so many rows a step.
    columns: int = 128
    sum_columns: int = 64
    sum_rows: int = 64
    warps: int = 4


def gradient_sizes_for(device: str, dtype: torch.dtype) -> GradientSizes:
    """The sizes by what is multiplied by rank vectors: A, the inputs or the gradients."""
    if device == "xpu":
        # As `_xpu_sizes`: all is to stay in 128 registers.
        sizes = GradientSizes(ranks=16, columns=64, sum_columns=32, sum_rows=16)
        return sizes._replace(columns=32, warps=8) if dtype == torch.float32 else sizes
    return GradientSizes(sum_rows=16) if dtype == torch.float32 else GradientSizes()


# Each call asks four times.
@lru_cache(maxsize=4096)
def sizes_for(rows: int, rank: int, width: int, device: str = "cuda", kind: str = "plain", slots: int = 1) -> Sizes:
    """The sizes for T rows, the highest R, and W of all slices together; those of the shrink do not depend on W.

    Args:
        rows: T, or what a graph for every T is tuned for.
        rank: R.
        width: W.
        device: the type of the device.
        kind: of dtypes, for Intel GPUs: "plain", "mixed" where outputs or rank vectors are of others than usual, or
            "float32" where products are.
        slots: K, or P where slots are pages of experts.
    """
    if device == "xpu":
        return _xpu_sizes(rows, rank, kind)
    is_low, is_wide = rank <= 16, width > 8192
    if rows <= 64:
        # A program takes 16 rows of a linear, and these columns: narrow ones while there are too few programs.
        sizes = Sizes(linear_columns=32 if width * -(-rows // 16) > 4096 else 16)
        if is_wide and not is_low:
            return sizes._replace(expand_columns=128, expand_blocks=4 if rows <= 16 else 8)
        return sizes._replace(expand_columns=256 if width > 4096 or not is_low else 128)
    if rows < 512:
        if is_low:
            return Sizes()
        return Sizes(expand_columns=128, expand_blocks=8) if is_wide else Sizes(expand_blocks=2, expand_warps=8)
    is_small = rows * width <= 1 << 22
    if not is_low:
        sizes = Sizes(shrink_columns=64, shrink_warps=4, expand_columns=128, delta_first=rows >= 2048)
        return sizes._replace(expand_blocks=4 if is_small else 8)
    if slots >= SLOTS_OF_PAGES:
        # Tiles are hardly full, and each has weights of its own.
        return Sizes(shrink_warps=4, shrink_columns=64, shrink_slices=3, expand_columns=64, expand_blocks=8)
    slices = 3 if rows >= 2048 else 1
    sizes = Sizes(shrink_warps=4, shrink_stages=5, shrink_slices=slices, expand_warps=8)
    if is_small:
        return sizes._replace(expand_blocks=2)
    blocks = 4 if rows * width <= 1 << 24 else 8
    return sizes._replace(expand_columns=128, expand_blocks=blocks, delta_first=True)


def _xpu_sizes(rows: int, rank: int, kind: str) -> Sizes:
    """The largest that keep all in 128 registers: with 256, half as many threads would hide the time of memory."""
    sizes = Sizes(shrink_ranks=32, expand_ranks=16, expand_ahead=False)
    if kind == "float32":
        # Without the matrix engine, which multiplies no float32 exactly, a product takes more registers.
        return sizes._replace(shrink_ranks=16, shrink_columns=16, shrink_warps=8, expand_columns=32, expand_warps=8)
    # 16 rows and 16 ranks are two tiles of the matrix engine: work for two warps.
    shrink_warps, expand_warps = 2 if rows <= 64 and rank <= 16 else 4, 8 if kind == "mixed" else 4
    sizes = sizes._replace(block_loads=True, shrink_columns=64, shrink_warps=shrink_warps)
    return sizes._replace(expand_columns=64, expand_warps=expand_warps)


def tuned_rows_for(rows: int | torch.SymInt) -> int:
    """For how many rows the sizes of a graph are chosen: for T, or if it is symbolic for FEW or MANY, by one guard."""
    known = number_of(rows)
    return known if known is not None else FEW if is_guarded(rows <= FEW) else MANY
