"""The Triton kernels of the gradients of LoRA, beside those of `triton_kernels`. Launched by `triton_gradients`.

With h = A[i] x and g = B[i]^T grad of each row, which the shrink kernel computes, and with the scaling in both:

    dX[t] = A[i]^T g          dA[i] = sum over its rows of g x^T          dB[i] = sum over its rows of grad h^T

No kernel uses atomics. Each element of a slot's dA or dB belongs to one program, which takes the slot's rows in the
order of the batch, CHUNK at a time from the slot's first on: the same bits whatever else is in the batch. Tiles have
one height for every T, so that a slot's rows lie side by side in the table.
"""

# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from xpu_lora_compile.kernels.triton_kernels import NO_TILE, _pick, _rank_product, _rounded


@triton.jit(do_not_specialize=["tile_count"])
def inputs_gradient_kernel(
    gradient, out_row, out_column, hidden, h_row, a, a_slot, a_rank, a_column,
    tiles, tile_count, block_count, rank, features, scalings,
    HAS_SCALINGS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (a tile, block of columns of D): dX of its rows, of all slices; zero in rows without an adapter.

    Args:
        gradient: `[T, D]`, written once, in its dtype.
        hidden: of each slice g, fp32 `[T, R]`, whose columns lie side by side.
        a: of each slice `[K, R, D]`, with its strides and its rank beside it.
        scalings: fp32 `[K]`, a factor of each slot; read with HAS_SCALINGS alone.
    """
    # Neighbours work on the same rows; all along one axis, since the others of CUDA's grids end at 65535.
    tile = tl.program_id(0) // block_count
    slot = tl.load(tiles + tile)
    rows = tl.load(tiles + tile_count + tile * BM + tl.arange(0, BM))
    if slot < -1:
        return
    is_row = rows >= 0
    at = tl.where(is_row, rows, 0).to(tl.int64)
    n = tl.program_id(0) % block_count * BN + tl.arange(0, BN)
    column = n.to(tl.int64)[None, :]
    # A row without an adapter reads no weights.
    known = tl.maximum(slot, 0)
    total = tl.zeros([BM, BN], tl.float32)
    for s in tl.static_range(len(a)):
        used = tl.where(slot < 0, 0, rank[s])
        mine = a[s] + known.to(tl.int64) * a_slot[s]
        for start in range(0, used, BR):
            r = start + tl.arange(0, BR)
            place = hidden[s] + at[:, None] * h_row[s] + r[None, :]
            left = tl.load(place, mask=is_row[:, None] & (r < used)[None, :], other=0.0)
            if HAS_SCALINGS:
                left *= tl.load(scalings + known)
            place = mine + r.to(tl.int64)[:, None] * a_rank[s] + column * a_column[s]
            right = tl.load(place, mask=(r < used)[:, None] & (n < features)[None, :], other=0.0)
            total = _rank_product(left, right, total)
    place = gradient + at[:, None] * out_row + column * out_column
    tl.store(place, _rounded(total, gradient.dtype.element_ty), mask=is_row[:, None] & (n < features)[None, :])


@triton.jit
def _members(members, start, end, CHUNK: tl.constexpr):
    """The next CHUNK rows of a slot; -1 beyond its end."""
    lane = start + tl.arange(0, CHUNK)
    return tl.load(members + lane, mask=lane < end, other=-1)


@triton.jit
def _factors(hidden, h_row, r, rank, x, x_row, x_column, n, columns, rows):
    """`[R, rows]` of the rank vectors, and `[rows, columns]` of what they are multiplied with; zero in no row."""
    is_row = rows >= 0
    at = tl.where(is_row, rows, 0).to(tl.int64)
    left = tl.load(hidden + r[:, None] + at[None, :] * h_row, mask=(r < rank)[:, None] & is_row[None, :], other=0.0)
    place = x + at[:, None] * x_row + n.to(tl.int64)[None, :] * x_column
    return left, tl.load(place, mask=is_row[:, None] & (n < columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tile_count"])
def weights_gradient_kernel(
    target, t_slot, t_rank, t_column, hidden, h_row, x, x_row, x_column,
    tiles, tile_count, first_block, block_count, trained, rank, columns, scalings,
    SOME: tl.constexpr, HAS_SCALINGS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, SCAN: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (a slot and a block of columns, a block of ranks): that part of the slot's dA or dB^T of one slice.

    `dA[r, n] = sum over the slot's rows t of hidden[t, r] x[t, n]`, and zero for a slot without rows. One launch takes
    several such sums: each alone has too few programs for a GPU.

    Args:
        target: of each sum `[n, rank, columns]` by its strides, with its rank and columns; the last stride is that of
            all.
        hidden: of each fp32 `[T, R]`, whose columns lie side by side: g for dA, h for dB.
        x: of each `[T, columns]`: the inputs for dA, the gradient of the outputs for dB; the last stride is of all.
        first_block: of each its first among the blocks of columns of all, which are `block_count`.
        trained: `[n]`, the slots that gradients are wanted of; read with SOME alone, without which it is all.
        scalings: as in `inputs_gradient_kernel`.
    """
    which = tl.program_id(0) // block_count
    slot = tl.load(trained + which) if SOME else which
    block = tl.program_id(0) % block_count
    s = -1
    for other in tl.static_range(len(target)):
        s += (block >= first_block[other]).to(tl.int32)
    # The tiles of a slot lie side by side.
    first = tile_count
    count = 0
    for start in range(0, tile_count, SCAN):
        tile = start + tl.arange(0, SCAN)
        is_mine = tl.load(tiles + tile, mask=tile < tile_count, other=NO_TILE) == slot
        first = tl.minimum(first, tl.min(tl.where(is_mine, tile, tile_count)))
        count += tl.sum(is_mine.to(tl.int32))
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    n = (block - _pick(first_block, s)) * BN + tl.arange(0, BN)
    left_of, left_row, used = _pick(hidden, s), _pick(h_row, s), _pick(rank, s)
    right_of, right_row, end_column = _pick(x, s), _pick(x_row, s), _pick(columns, s)
    members = tiles + tile_count + first * BM
    end = count * BM
    total = tl.zeros([BR, BN], tl.float32)
    # Rows are known two steps ahead, and what they hold is read one step ahead.
    rows = _members(members, 0, end, CHUNK)
    left, right = _factors(left_of, left_row, r, used, right_of, right_row, x_column, n, end_column, rows)
    rows = _members(members, CHUNK, end, CHUNK)
    for start in range(0, end, CHUNK):
        next_left, next_right = _factors(left_of, left_row, r, used, right_of, right_row, x_column, n, end_column, rows)
        rows = _members(members, start + 2 * CHUNK, end, CHUNK)
        total = _rank_product(left, right, total)
        left = next_left
        right = next_right
    if HAS_SCALINGS:
        # Without rows it is 0, whatever that is scaled by.
        total = tl.where(count == 0, 0.0, total * tl.load(scalings + slot))
    place = _pick(target, s) + which.to(tl.int64) * _pick(t_slot, s)
    place += r.to(tl.int64)[:, None] * _pick(t_rank, s) + n.to(tl.int64)[None, :] * t_column
    is_inside = (r < used)[:, None] & (n < end_column)[None, :]
    tl.store(place, _rounded(total, target[0].dtype.element_ty), mask=is_inside)
