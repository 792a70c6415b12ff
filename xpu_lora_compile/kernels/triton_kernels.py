"""The Triton kernels: what runs on CUDA and XPU, and in Triton's interpreter on a CPU. Launched by `triton_launch`.

Nothing here depends on the host knowing the indices: grids come from shapes, so that a captured graph replays with
other rows and other adapters. No kernel uses atomics, and a row's sums are always taken in the same order: in each of
the pieces of D that `piece_of` cuts 16 columns at a time, then over each pair of pieces, then over the pairs; and over
the rank 16 at a time. How many pieces one program takes (1, 2 or all), and which rows share a tile, changes no bit.

Tiles are what `route_kernel` writes, int32: for each of G tiles its slot (-1 for rows without an adapter, -2 where
there is no tile), then for each its BM rows (-1 where there is none).
"""

# Triton ships no types, and its language is not Python's: what a kernel takes are pointers, tuples and constants.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, union-attr, assignment"

from __future__ import annotations

import inspect
import os

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    # A Triton for Intel GPUs alone may come without; 3.3 has none yet. Triton looks names up even where it skips calls.
    gdc_launch_dependents = gdc_wait = None

# Whether this Triton can say that a kernel may start before the one in front of it has ended: 3.6 can; 3.4 has the
# functions, but written for an older compiler of its own.
CAN_OVERLAP = gdc_wait is not None and "_semantic" in inspect.signature(gdc_wait).parameters

NO_TILE: tl.constexpr = tl.constexpr(-2)
# Triton's interpreter (3.6) multiplies the bits of bfloat16 as if they were integers, and cuts a float32 off to one.
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _open_group(
    tiles, tile_count, group, code, before, mine, BM: tl.constexpr, BY_ROW: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Write the codes of a group's tiles, and which rows the last one lacks; return the first, and their distance."""
    lanes = tl.arange(0, CHUNK)
    first = before if BY_ROW else before // BM + group
    end = before + mine if BY_ROW else (before + mine) // BM + group + 1
    step: tl.constexpr = BM if BY_ROW else 1
    for start in range(first, end, CHUNK):
        tile = start + lanes
        is_used = ((tile - first) % step == 0) & ((tile - first) // step * BM < mine)
        tl.store(tiles + tile, tl.where(is_used, code, NO_TILE), mask=tile < end)
    # One comparison: Triton's interpreter (3.9) makes no mask of a scalar one.
    lacking = (BM - mine % BM) % BM
    lane = tl.arange(0, BM)
    last = first + (mine // BM) * step
    tl.store(tiles + tile_count + last * BM + lane, -1, mask=lane >= BM - lacking)
    return first, step


@triton.jit(do_not_specialize=["rows", "slots", "tile_count"])
def route_kernel(
    indices, index_stride, tiles, rows, slots, tile_count, BM: tl.constexpr, BY_ROW: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Program g finds the rows of slot g (g = K: of none), in order, and writes them into the tiles that are g's.

    With BY_ROW a tile has the number of its first row in the order of slots; without it, group g starts at tile
    `before // BM + g`, where `before` rows belong to earlier groups: no two groups meet, and some tiles stay empty.
    """
    group = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    before = 0
    mine = 0
    for start in range(0, rows, CHUNK):
        t = start + lanes
        index = tl.load(indices + t.to(tl.int64) * index_stride, mask=t < rows, other=-1)
        slot = tl.where((index >= 0) & (index < slots), index, slots).to(tl.int32)
        before += tl.sum(((t < rows) & (slot < group)).to(tl.int32))
        mine += tl.sum(((t < rows) & (slot == group)).to(tl.int32))
    code = tl.where(group == slots, -1, group)
    first, step = _open_group(tiles, tile_count, group, code, before, mine, BM, BY_ROW, CHUNK)
    table = tiles + tile_count
    found = 0
    for start in range(0, rows, CHUNK):
        t = start + lanes
        index = tl.load(indices + t.to(tl.int64) * index_stride, mask=t < rows, other=-1)
        slot = tl.where((index >= 0) & (index < slots), index, slots).to(tl.int32)
        is_mine = (t < rows) & (slot == group)
        at = found + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(table + (first + at // BM * step) * BM + at % BM, t, mask=is_mine)
        found += tl.sum(is_mine.to(tl.int32))


@triton.jit(do_not_specialize=["slots", "tile_count"])
def route_sorted_kernel(
    order, ends, codes, tiles, slots, tile_count, BM: tl.constexpr, BY_ROW: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Program g writes the rows of group g into its tiles, as `route_kernel` does, from rows that lie group by group.

    Args:
        order: the rows in the order of their groups; None where all lie in it.
        ends: where each group ends in it.
        codes: the index of each group; None where group g is that of slot g, and the last is of none.
    """
    group = tl.program_id(0)
    before = tl.load(ends + tl.maximum(group - 1, 0)).to(tl.int32)
    before = tl.where(group == 0, 0, before)
    mine = tl.load(ends + group).to(tl.int32) - before
    code = group if codes is None else tl.load(codes + group)
    code = tl.where((code >= 0) & (code < slots), code, -1).to(tl.int32)
    first, step = _open_group(tiles, tile_count, group, code, before, mine, BM, BY_ROW, CHUNK)
    table = tiles + tile_count
    lanes = tl.arange(0, CHUNK)
    for start in range(0, mine, CHUNK):
        at = start + lanes
        t = before + at
        if order is not None:
            t = tl.load(order + t, mask=at < mine, other=0).to(tl.int32)
        tl.store(table + (first + at // BM * step) * BM + at % BM, t, mask=at < mine)


@triton.jit(do_not_specialize=["rows", "slots"])
def route_alone_kernel(indices, index_stride, tiles, rows, slots, BM: tl.constexpr, CHUNK: tl.constexpr):
    """Write a tile for each row: for slots so many that hardly two rows share one."""
    t = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    is_row = t < rows
    index = tl.load(indices + t.to(tl.int64) * index_stride, mask=is_row, other=-1)
    tl.store(tiles + t, tl.where((index >= 0) & (index < slots), index, -1).to(tl.int32), mask=is_row)
    lane = tl.arange(0, BM)[None, :]
    members = tl.where(lane == 0, t[:, None], -1)
    tl.store(tiles + rows + t[:, None] * BM + lane, members, mask=is_row[:, None] & (lane >= 0))


@triton.jit
def _rank_of(ranks, slot, rank, HAS_RANKS: tl.constexpr):
    """The rank of a slot: beyond it, its rows of A and columns of B are zeros that nobody needs to read."""
    if HAS_RANKS:
        return tl.minimum(tl.load(ranks + slot), rank).to(tl.int32)
    return rank


@triton.jit
def _product(left, right, total):
    """`total + left @ right` of two tiles as stored: exact products, fp32 sums."""
    if left.dtype == right.dtype and left.dtype != tl.float32 and not INTERPRETED:
        return tl.dot(left, right, total)
    return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _cut(number):
    """The first 8 bits of a finite fp32 number's 24, in fp32: what bfloat16 holds of it.

    By a mask: compilers with fast math take a cast to bfloat16 and back for nothing at all.
    """
    return (number.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _rank_product(hidden, b, total):
    """`total + hidden @ b` with fp32 `hidden`: on the tensor cores, as three bfloat16 parts that hold all of its bits.

    A float16 `b` is two such parts. The small ones go first.
    """
    # No early return: Triton reads on behind one.
    if b.dtype == tl.float32 or hidden.dtype != tl.float32:
        total = _product(hidden, b, total)
    else:
        # Of an infinite number nothing is left over, and of a NaN its first bits may be those of an infinite one.
        is_finite = (hidden.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
        high = tl.where(is_finite, _cut(hidden), hidden)
        rest = tl.where(is_finite, hidden - high, 0.0)
        middle = _cut(rest)
        low = (rest - middle).to(tl.bfloat16)
        middle = middle.to(tl.bfloat16)
        high = high.to(tl.bfloat16)
        b_high = b
        if b.dtype == tl.float16:
            whole = b.to(tl.float32)
            b_low = (whole - _cut(whole)).to(tl.bfloat16)
            b_high = _cut(whole).to(tl.bfloat16)
            total = _product(low, b_low, total)
            total = _product(middle, b_low, total)
            total = _product(high, b_low, total)
        total = _product(low, b_high, total)
        total = _product(middle, b_high, total)
        total = _product(high, b_high, total)
    return total


@triton.jit
def _rounded(total, dtype: tl.constexpr):
    """To nearest, ties to even, on every device."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = total.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        upper = tl.where(total == total, nearest, bits | 0x400000) >> 16
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return total.to(dtype)


@triton.jit
def _pick(values, which):
    """The element of a tuple whose number is known as the program runs."""
    value = values[0]
    for s in tl.static_range(1, len(values)):
        value = tl.where(which == s, values[s], value)
    return value


@triton.jit
def _a_tile(a, a_rank, a_column, r, rank, column, is_in, EVEN: tl.constexpr):
    """Columns of one slot's A, `[R, columns]`; zero from the rank of the slot on."""
    place = a + r.to(tl.int64)[:, None] * a_rank + column[None, :] * a_column
    mask = (r < rank)[:, None]
    return tl.load(place, mask=mask if EVEN else mask & is_in[None, :], other=0.0)


@triton.jit
def _block_of(matrix, row_stride, row, column, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """`[HEIGHT, WIDTH]` of one slot's A or B, whose columns lie side by side: zero outside of `[rows, columns]`.

    Intel's compiler makes 2-D block loads of it, which go from memory to where the matrix engine reads: no address for
    each lane, no way through shared memory.
    """
    block = tl.make_block_ptr(matrix, (rows, columns), (row_stride, 1), (row, column), (HEIGHT, WIDTH), (1, 0))
    return tl.load(block, boundary_check=(0, 1), padding_option="zero")


@triton.jit
def _close(part, pair, total, ends, closes, EACH: tl.constexpr):
    """The sums of the piece, the pair and all, once a piece ends and once it closes a pair; one piece may be all."""
    if EACH == 1:
        return part, pair, part
    if EACH == 2:
        return tl.where(ends, 0.0, part), pair, tl.where(ends, total + part, total)
    pair = tl.where(ends, pair + part, pair)
    total = tl.where(closes, total + pair, total)
    return tl.where(ends, 0.0, part), tl.where(closes, 0.0, pair), total


@triton.jit
def _store_hidden(output, out_row, out_column, total, slot, rows, r, limit, scaling, SCALE: tl.constexpr):
    if SCALE:
        # Without an adapter it is 0, whatever that is scaled by.
        total = tl.where(slot < 0, 0.0, total * scaling)
    at = tl.where(rows >= 0, rows, 0).to(tl.int64)
    place = output + at[None, :] * out_row + r.to(tl.int64)[:, None] * out_column
    tl.store(place, _rounded(total, output.dtype.element_ty), mask=(rows >= 0)[None, :] & (r < limit)[:, None])


@triton.jit(do_not_specialize=["count", "tile_count"])
def shrink_kernel(
    hidden, h_row, h_column, x, x_row, x_column, count, a, a_slot, a_rank, a_column,
    tiles, tile_count, ranks, rank, features, rank_blocks, scaling,
    HAS_RANKS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EACH: tl.constexpr, PUBLIC: tl.constexpr,
    EVEN: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile, EACH pieces, group of slices and block of ranks): one tile's rows through A of 1 to 3 slices.

    Computed as `A[slot] @ x[rows].T`: so the long side of a product is that of the rows, of which a tile may have many.

    Args:
        hidden: fp32 `[PIECES / EACH, slices, T, R]`; with PUBLIC scaled, and zero for rows without an adapter: so, with
            EACH = PIECES, the output of `bgmv_shrink`.
        a: one stack a slice, with its strides and its rank beside it; the last stride is that of all. With BLOCKS the
            last is 1, all have the first slice's stride from rank to rank, and GROUP is 1.
    """
    if PDL:
        # First the end of whatever came before; then the kernel after this one may start, and read all but `hidden`.
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    piece = tl.program_id(1)
    which = tl.program_id(2)
    slot = tl.load(tiles + tile)
    rows = tl.load(tiles + tile_count + tile * BM + tl.arange(0, BM))
    if slot < (-1 if PUBLIC else 0):
        return
    # The last group may be cut short; its slices beyond the end are those of the one before, again.
    s = which // rank_blocks * GROUP
    s_1 = tl.minimum(s + 1, SLICES - 1)
    s_2 = tl.minimum(s + 2, SLICES - 1)
    r = which % rank_blocks * BR + tl.arange(0, BR)
    # A row without an adapter is here for the public op alone, which wants a zero; it reads no weights.
    known = tl.maximum(slot, 0)
    used = tl.where(slot < 0, 0, _rank_of(ranks, known, _pick(rank, s), HAS_RANKS))
    used_1 = _rank_of(ranks, known, _pick(rank, s_1), HAS_RANKS)
    used_2 = _rank_of(ranks, known, _pick(rank, s_2), HAS_RANKS)
    a_0 = _pick(a, s) + known.to(tl.int64) * _pick(a_slot, s)
    a_1 = _pick(a, s_1) + known.to(tl.int64) * _pick(a_slot, s_1)
    a_2 = _pick(a, s_2) + known.to(tl.int64) * _pick(a_slot, s_2)
    k = tl.arange(0, BK)
    x_tile = x + tl.where(rows >= 0, rows, 0).to(tl.int64)[None, :] * x_row
    total = tl.zeros([BR, BM], tl.float32)
    part = tl.zeros([BR, BM], tl.float32)
    pair = tl.zeros([BR, BM], tl.float32)
    total_1 = tl.zeros([BR, BM], tl.float32)
    part_1 = tl.zeros([BR, BM], tl.float32)
    pair_1 = tl.zeros([BR, BM], tl.float32)
    total_2 = tl.zeros([BR, BM], tl.float32)
    part_2 = tl.zeros([BR, BM], tl.float32)
    pair_2 = tl.zeros([BR, BM], tl.float32)
    most = tl.maximum(used, used_1) if GROUP > 1 else used
    most = tl.maximum(most, used_2) if GROUP > 2 else most
    # A program whose ranks are all beyond those of the slot has nothing to do.
    per: tl.constexpr = PIECE // BK
    steps = tl.where(which % rank_blocks * BR < most, tl.minimum(EACH, PIECES - piece * EACH) * per, 0)
    for step in tl.range(0, steps, num_stages=STAGES):
        column = (piece * EACH * PIECE + step * BK + k).to(tl.int64)
        is_in = column < features
        mask = (rows >= 0)[None, :] if EVEN else (rows >= 0)[None, :] & is_in[:, None]
        right = tl.load(x_tile + column[:, None] * x_column, mask=mask, other=0.0)
        if BLOCKS:
            # Of a stride that it picks the compiler would not know that it is a multiple of 16.
            first_column = piece * EACH * PIECE + step * BK
            left = _block_of(a_0, a_rank[0], which % rank_blocks * BR, first_column, used, features, BR, BK)
        else:
            left = _a_tile(a_0, _pick(a_rank, s), a_column, r, used, column, is_in, EVEN)
        part = _product(left, right, part)
        # The end of a piece, and of a pair.
        ends = (step + 1) % per == 0
        closes = ((step + 1) % (2 * per) == 0) | (step + 1 == steps)
        part, pair, total = _close(part, pair, total, ends, closes, EACH)
        if GROUP > 1:
            left_1 = _a_tile(a_1, _pick(a_rank, s_1), a_column, r, used_1, column, is_in, EVEN)
            part_1 = _product(left_1, right, part_1)
            part_1, pair_1, total_1 = _close(part_1, pair_1, total_1, ends, closes, EACH)
        if GROUP > 2:
            left_2 = _a_tile(a_2, _pick(a_rank, s_2), a_column, r, used_2, column, is_in, EVEN)
            part_2 = _product(left_2, right, part_2)
            part_2, pair_2, total_2 = _close(part_2, pair_2, total_2, ends, closes, EACH)
    place = hidden + (piece * SLICES + s).to(tl.int64) * count * h_row
    # The public op writes zeros, too; the expand reads none.
    _store_hidden(place, h_row, h_column, total, slot, rows, r, _pick(rank, s) if PUBLIC else used, scaling, PUBLIC)
    if GROUP > 1:
        place = hidden + (piece * SLICES + s_1).to(tl.int64) * count * h_row
        _store_hidden(place, h_row, h_column, total_1, slot, rows, r, used_1, scaling, PUBLIC)
    if GROUP > 2:
        place = hidden + (piece * SLICES + s_2).to(tl.int64) * count * h_row
        _store_hidden(place, h_row, h_column, total_2, slot, rows, r, used_2, scaling, PUBLIC)


@triton.jit
def _hidden_tile(
    hidden, h_piece, h_row, h_column, at, r, mask, scaling, SUMS: tl.constexpr, PAIRS: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """`[rows, R]` of the rank vectors: SUMS pieces summed in pairs, or with PAIRS the SUMS pairs."""
    place = hidden + at[:, None] * h_row + r.to(tl.int64)[None, :] * h_column
    total = tl.load(place, mask=mask, other=0.0)
    step: tl.constexpr = 1 if PAIRS else 2
    if not PAIRS and SUMS > 1:
        total += tl.load(place + h_piece, mask=mask, other=0.0)
    for piece in tl.static_range(step, SUMS, step):
        some = tl.load(place + piece * h_piece, mask=mask, other=0.0)
        if not PAIRS and piece + 1 < SUMS:
            some += tl.load(place + (piece + 1) * h_piece, mask=mask, other=0.0)
        total += some
    if SCALE:
        # The padding stays 0, whatever it is scaled by.
        total = tl.where(mask, total * scaling, 0.0)
    return total


@triton.jit
def _b_tile(b, b_width, b_rank, n, width, r, rank):
    """`[R, columns]` of one slot's B; zero from the rank of the slot on."""
    place = b + n.to(tl.int64)[None, :] * b_width + r.to(tl.int64)[:, None] * b_rank
    return tl.load(place, mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=["count", "tile_count"])
def expand_kernel(
    outputs, out_row, out_column, hidden, h_row, h_column, count, b, b_slot, b_width, b_rank,
    tiles, tile_count, block_count, ranks, rank, width, scaling,
    HAS_RANKS: tl.constexpr, SUMS: tl.constexpr, PAIRS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr,
    FILL: tl.constexpr, ONE_BLOCK: tl.constexpr, AHEAD: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
    PER: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (PER blocks of columns of one slice, a tile): its rows through one slot's B.

    With ADD the products are added to what is there; with FILL rows without an adapter become zero.

    Args:
        outputs: for each slice, the columns that it adds to, `[T, W]`, with their strides.
        hidden: `[SUMS, slices, T, R]`, of which the pieces, or with PAIRS the pairs of pieces, are summed here.
        b: one stack a slice, with its strides, its rank and its width beside it.
    """
    slices: tl.constexpr = len(b)
    # Neighbours work on the same rows; all along one axis, since the others of CUDA's grids end at 65535.
    tile = tl.program_id(0) // block_count
    slot = tl.load(tiles + tile)
    rows = tl.load(tiles + tile_count + tile * BM + tl.arange(0, BM))
    if slot < (-1 if FILL else 0):
        # Not before the shrink has ended: whatever comes after this kernel waits for it alone.
        if PDL:
            gdc_wait()
        return
    # Which slice, and where in it.
    block = tl.program_id(0) % block_count
    s = 0
    first = block
    passed = 0
    for earlier in tl.static_range(slices - 1):
        passed += tl.cdiv(width[earlier], BN * PER)
        s = tl.where(block >= passed, earlier + 1, s)
        first = tl.where(block >= passed, block - passed, first)
    # A row without an adapter reads no weights.
    known = tl.maximum(slot, 0)
    used = tl.where(slot < 0, 0, _rank_of(ranks, known, _pick(rank, s), HAS_RANKS))
    limit = _pick(width, s)
    row_of_b = _pick(b_rank, s)
    mine = _pick(b, s) + known.to(tl.int64) * _pick(b_slot, s)
    r = tl.arange(0, BR)
    n = first * (BN * PER) + tl.arange(0, BN)
    is_row = rows >= 0
    at = tl.where(is_row, rows, 0).to(tl.int64)
    target = _pick(outputs, s) + at[:, None] * _pick(out_row, s)
    h_slice = tl.cast(count, tl.int64) * h_row
    source = hidden + s * h_slice
    h_piece = slices * h_slice
    if ONE_BLOCK and not AHEAD:
        if PDL:
            gdc_wait()
        mask = is_row[:, None] & (r < used)[None, :]
        left = _hidden_tile(source, h_piece, h_row, h_column, at, r, mask, scaling, SUMS, PAIRS, SCALE)
        for block in range(PER):
            if BLOCKS:
                right = _block_of(mine, b_rank[0], 0, first * (BN * PER) + block * BN, used, limit, BR, BN)
            else:
                right = _b_tile(mine, b_width, row_of_b, n, limit, r, used)
            total = _rank_product(left, right, tl.zeros([BM, BN], tl.float32))
            place = target + n.to(tl.int64)[None, :] * out_column
            is_in = is_row[:, None] & (n < limit)[None, :]
            if ADD:
                total += tl.load(place, mask=is_in, other=0.0).to(tl.float32)
            tl.store(place, _rounded(total, place.dtype.element_ty), mask=is_in)
            n += BN
    elif ONE_BLOCK:
        # Each block's memory is read one block ahead, and the first before the shrink has ended.
        right = _b_tile(mine, b_width, row_of_b, n, limit, r, used)
        place = target + n.to(tl.int64)[None, :] * out_column
        is_in = is_row[:, None] & (n < limit)[None, :]
        old = tl.load(place, mask=is_in, other=0.0) if ADD else 0.0
        if PDL:
            gdc_wait()
        mask = is_row[:, None] & (r < used)[None, :]
        left = _hidden_tile(source, h_piece, h_row, h_column, at, r, mask, scaling, SUMS, PAIRS, SCALE)
        for block in range(PER):
            next_n = n + BN
            is_next_in = is_row[:, None] & (next_n < limit)[None, :] & (block + 1 < PER)
            next_place = target + next_n.to(tl.int64)[None, :] * out_column
            next_right = right
            next_old = old
            if PER > 1:
                next_right = _b_tile(mine, b_width, row_of_b, next_n, tl.where(block + 1 < PER, limit, 0), r, used)
                next_old = tl.load(next_place, mask=is_next_in, other=0.0) if ADD else 0.0
            total = _rank_product(left, right, tl.zeros([BM, BN], tl.float32))
            if ADD:
                total += old.to(tl.float32)
            tl.store(place, _rounded(total, place.dtype.element_ty), mask=is_in)
            n = next_n
            right = next_right
            old = next_old
            place = next_place
            is_in = is_next_in
    else:
        if PDL:
            gdc_wait()
        for _block in range(PER):
            total = tl.zeros([BM, BN], tl.float32)
            for start in range(0, used, BR):
                some = start + r
                right = _b_tile(mine, b_width, row_of_b, n, limit, some, used)
                mask = is_row[:, None] & (some < used)[None, :]
                left = _hidden_tile(source, h_piece, h_row, h_column, at, some, mask, scaling, SUMS, PAIRS, SCALE)
                total = _rank_product(left, right, total)
            place = target + n.to(tl.int64)[None, :] * out_column
            is_in = is_row[:, None] & (n < limit)[None, :]
            if ADD:
                total += tl.load(place, mask=is_in, other=0.0).to(tl.float32)
            tl.store(place, _rounded(total, place.dtype.element_ty), mask=is_in)
            n += BN


@triton.jit(do_not_specialize=["count", "slots"])
def linear_kernel(
    outputs, x, x_row, weights, w_row, biases, features, count, widths,
    hidden, h_row, indices, index_stride, slots, ranks, scaling,
    b, b_slot, b_width, b_rank, rank, start, width, product,
    HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    SUMS: tl.constexpr, PAIRS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (block of columns of all base products, block of rows): a base product, and LoRA in its epilogue.

    For few rows, where a linear layer takes the time of reading its weights: the shrink runs beside that. Each block
    of columns has one slice or none: slices start at multiples of BN, and share no columns.

    Args:
        outputs: contiguous, of each base product, like weights, biases and widths.
        hidden: fp32 `[SUMS, slices, T, R]`, unscaled; pieces, or with PAIRS pairs of them.
        b, start, width, product: of each slice; start and width are columns of the product that it adds to.
    """
    slices: tl.constexpr = len(b)
    products: tl.constexpr = len(weights)
    block = tl.program_id(0)
    # Which product, and where in it.
    p = 0
    mine = block
    passed = 0
    for earlier in tl.static_range(products - 1):
        passed += tl.cdiv(widths[earlier], BN)
        p = tl.where(block >= passed, earlier + 1, p)
        mine = tl.where(block >= passed, block - passed, mine)
    columns = _pick(widths, p)
    # Which slice, if any.
    s = 0
    has_slice = False
    for candidate in tl.static_range(slices):
        covers = (
            (p == product[candidate])
            & (mine * BN >= start[candidate])
            & (mine * BN < start[candidate] + width[candidate])
        )
        s = tl.where(covers, candidate, s)
        has_slice = has_slice | covers
    t = tl.program_id(1) * BM + tl.arange(0, BM)
    is_row = t < count
    at = tl.where(is_row, t, 0).to(tl.int64)
    n = mine * BN + tl.arange(0, BN)
    is_column = n < columns
    index = tl.load(indices + at * index_stride, mask=is_row & has_slice, other=-1)
    has_adapter = (index >= 0) & (index < slots)
    slot = tl.where(has_adapter, index, 0).to(tl.int64)
    every = tl.arange(0, BR)
    k = tl.arange(0, BK)
    x_tile = x + at[:, None] * x_row + k[None, :]
    w_tile = _pick(weights, p) + tl.where(is_column, n, 0).to(tl.int64)[None, :] * _pick(w_row, p) + k[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    for first in tl.range(0, features, BK, num_stages=STAGES):
        if EVEN:
            left = tl.load(x_tile + first, mask=is_row[:, None], other=0.0)
            right = tl.load(w_tile + first)
        else:
            left = tl.load(x_tile + first, mask=is_row[:, None] & (first + k < features)[None, :], other=0.0)
            right = tl.load(w_tile + first, mask=(first + k < features)[:, None], other=0.0)
        total = _product(left, right, total)
    if HAS_BIAS:
        total += tl.load(_pick(biases, p) + n, mask=is_column, other=0.0).to(tl.float32)[None, :]
    column = n - _pick(start, s)
    is_in = column < _pick(width, s)
    used = tl.where(has_adapter, _pick(rank, s), 0)
    if HAS_RANKS:
        used = tl.minimum(used, tl.load(ranks + slot, mask=has_adapter, other=0)).to(tl.int32)
    row_of_b = _pick(b_rank, s)
    b_tile = _pick(b, s) + slot[:, None] * _pick(b_slot, s) + tl.where(is_in, column, 0).to(tl.int64)[None, :] * b_width
    # The first of B before the shrink has ended.
    rows_of_b = ()
    for r in tl.static_range(16):
        mask = (r < used)[:, None] & is_in[None, :]
        rows_of_b = rows_of_b + (tl.load(b_tile + r * row_of_b, mask=mask, other=0.0),)
    if PDL:
        gdc_wait()
    h_slice = tl.cast(count, tl.int64) * h_row
    mask = every[None, :] < used[:, None]
    source = hidden + s * h_slice
    hiddens = _hidden_tile(source, slices * h_slice, h_row, 1, at, every, mask, scaling, SUMS, PAIRS, True)
    added = tl.zeros([BM, BN], tl.float32)
    # In order of the rank, 0 to R.
    for r in tl.static_range(16):
        left = tl.sum(tl.where(every[None, :] == r, hiddens, 0.0), 1)
        added += left[:, None] * rows_of_b[r].to(tl.float32)
    for first in range(16, tl.max(used), 16):
        for step in tl.static_range(16):
            later = first + step
            left = tl.sum(tl.where(every[None, :] == later, hiddens, 0.0), 1)
            later_mask = (later < used)[:, None] & is_in[None, :]
            right = tl.load(b_tile + later.to(tl.int64) * row_of_b, mask=later_mask, other=0.0)
            added += left[:, None] * right.to(tl.float32)
    # Where there is no adapter, no zero is added either: -0 stays what it is.
    total = tl.where(has_adapter[:, None] & is_in[None, :], total + added, total)
    output = _pick(outputs, p)
    target = output + at[:, None] * columns + n.to(tl.int64)[None, :]
    tl.store(target, _rounded(total, output.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
