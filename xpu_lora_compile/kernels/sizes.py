"""How large the tiles of the Triton kernels are, by T and K; none of it changes a bit of the results."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Tiles, warps and stages of each kernel."""

    # Columns of D that one step of the shrink takes: where a program takes all of D, and where it takes one piece.
    shrink_columns: int = 256
    piece_columns: int = 256
    shrink_warps: int = 4
    shrink_stages: int = 3
    # Whether one program takes all pieces of D.
    shrink_together: bool = False
    # How many slices one program takes, 1 to 3.
    shrink_slices: int = 1
    expand_columns: int = 128
    # How many blocks of columns one program takes.
    expand_blocks: int = 1
    expand_warps: int = 4
    # Of the base product with LoRA in its epilogue: up to how many rows, columns of all products, and ranks it is used.
    linear_rows: int = 16
    linear_width: int = 8192
    linear_rank: int = 64
    # Columns of a tile, and columns of D that one step takes.
    linear_columns: int = 32
    linear_depth: int = 128
    linear_warps: int = 4
    linear_stages: int = 7


def sizes_for(rows: int, slots: int, device: str) -> Sizes:
    """The sizes for T rows and K slots."""
    if rows >= 1024:
        return Sizes(shrink_columns=128, shrink_together=True, shrink_slices=3, expand_blocks=4)
    return Sizes()
