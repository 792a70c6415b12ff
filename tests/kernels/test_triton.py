"""The Triton kernels: compiled where XPU_LORA_TEST_DEVICE names a GPU, in Triton's interpreter on a CPU."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, F16, F32, I32, I64, Case, build, same_bits
from support.poison import poison_new_memory
from torch import Tensor

from xpu_lora_compile import lora_linear
from xpu_lora_compile.inspect.operands import RandomOperands
from xpu_lora_compile.kernels import force_kernel, triton_launch
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.sizes import Sizes, sizes_for
from xpu_lora_compile.ops import ADD_LORA, LINEAR_WITH_LORA, ROUTE_TILES, SORTED_INDICES, reference
from xpu_lora_compile.ops.budget import Budget, _gamma, _half_ulp, budget_of

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# The rows of a layer up to which the product has LoRA in its epilogue, here: whatever is fastest elsewhere.
SIZES = Sizes()._replace(linear_rows=16, linear_rows_if_small=16, linear_rank=64)
NO_TILE = -2


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_memory(monkeypatch)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each linear_with_lora that runs, whether one kernel computed base products and LoRA."""
    answers: list[bool] = []
    real = triton_launch._fits_linears

    def fits(*args: Any) -> bool:
        answers.append(real(*args))
        return answers[-1]

    monkeypatch.setattr(triton_launch, "_fits_linears", fits)
    use(SIZES, monkeypatch)
    return answers


def use(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "sizes_for", lambda *_: sizes)


# The table of tiles.


def mix(rows: int, slots: int, dtype: torch.dtype = I64) -> Tensor:
    """Slots and every kind of index that is none, shuffled."""
    generator = torch.Generator().manual_seed(rows + slots)
    none = torch.tensor([-1, slots, slots + 7, torch.iinfo(dtype).max, torch.iinfo(dtype).min], dtype=dtype)
    which = torch.randint(slots + 2, (rows,), generator=generator)
    return torch.where(which < slots, which, none[torch.arange(rows) % 5]).to(dtype=dtype, device=DEVICE)


def tiles_of(table: Tensor, rows: int, slots: int) -> list[tuple[int, list[int]]]:
    """Slot and rows of each tile of a table."""
    height, count = triton_launch.tile_rows(rows, slots), triton_launch.tile_count(rows, slots)
    assert count * (1 + height) <= len(table) == triton_launch.table_length(rows, slots + 1)
    codes, table = table[:count].tolist(), table[count : count * (1 + height)].reshape(count, height)
    return list(zip(codes, table.tolist(), strict=True))


def check_tiles(indices: Tensor, slots: int) -> None:
    """Each row in one tile, which is of its slot; rows in order, tiles full but for the last of a slot."""
    rows = len(indices)
    tiles = tiles_of(ROUTE_TILES(indices, slots), rows, slots)
    found: dict[int, list[list[int]]] = {}
    for code, members in tiles:
        if code != NO_TILE:
            found.setdefault(code, []).append(members)
    wanted: dict[int, list[int]] = {}
    for t, index in enumerate(indices.tolist()):
        wanted.setdefault(index if 0 <= index < slots else -1, []).append(t)
    height = triton_launch.tile_rows(rows, slots)
    assert found.keys() == wanted.keys()
    for code, members in found.items():
        mine = wanted[code]
        assert [t for tile in members for t in tile] == mine + [-1] * (-len(mine) % height)


@pytest.mark.sweep
@pytest.mark.parametrize("slots", [1, 3, 10, 64])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 300])
def test_every_row_is_in_one_tile_of_its_slot(rows: int, slots: int) -> None:
    check_tiles(mix(rows, slots), slots)


def test_every_height_of_tiles_is_seen() -> None:
    sizes = [(rows, slots) for rows in (1, 65, 300) for slots in (1, 3, 10, 64)]
    assert {triton_launch.tile_rows(rows, slots) for rows, slots in sizes} == {16, 32}


@pytest.mark.sweep
@pytest.mark.parametrize("index", [-1, 0, 6, 7, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("rows", [5, 70, 300])
def test_rows_that_are_all_alike_share_tiles(rows: int, index: int) -> None:
    check_tiles(torch.full((rows,), index, device=DEVICE), 7)


@pytest.mark.parametrize(
    "indices",
    [
        mix(70, 5, I32),
        mix(140, 5)[::2],
        mix(140, 5, I32)[1::2],
        mix(35, 5)[:1].expand(70),
        torch.tensor([2**32, -(2**32) + 1, 2**62], device=DEVICE),
    ],
    ids=["int32", "strided", "int32-strided", "expanded", "lower-half-is-a-slot"],
)
def test_indices_of_any_dtype_and_stride_are_routed(indices: Tensor) -> None:
    check_tiles(indices, 5)


@pytest.mark.parametrize("dtype", [I64, I32])
@pytest.mark.parametrize(("rows", "slots"), [(40, 3), (300, 10), (20, 64), (5, 1)])
def test_rows_that_are_sorted_first_get_the_same_tiles(
    rows: int, slots: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    indices = mix(rows, slots, dtype)
    expected = tiles_of(ROUTE_TILES(indices, slots), rows, slots)
    monkeypatch.setattr(triton_launch, "READS_OF_SORTED", 0)
    check_tiles(indices, slots)
    found = tiles_of(ROUTE_TILES(indices, slots), rows, slots)
    assert [tile for tile in found if tile[0] != NO_TILE] == [tile for tile in expected if tile[0] != NO_TILE]


def test_rows_among_many_more_pages_are_sorted_by_numbers_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = 1 << 15
    monkeypatch.setattr(triton_launch, "SLOTS_OF_PAGES", slots + 1)
    order, ends = triton_launch._sorted(mix(50, slots), slots)
    assert len(ends) == slots + 1
    assert sorted(order.tolist()) == list(range(50))
    assert int(ends[-1]) == 50


@pytest.mark.parametrize("dtype", [I64, I32])
@pytest.mark.parametrize(("rows", "slots", "sizes"), [(300, 5, 60), (300, 40, 60), (20, 5, 60), (9, 600, 700)])
def test_rows_that_lie_group_by_group_are_not_sorted_again(
    rows: int, slots: int, sizes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some groups have no adapter, some the slot of another group, and most no rows.
    codes = torch.tensor([-2, *mix(sizes - 1, slots, dtype).tolist()], dtype=dtype, device=DEVICE)
    groups = torch.randint(sizes, (rows,), generator=torch.Generator().manual_seed(rows)).sort().values.to(DEVICE)
    ends = torch.searchsorted(groups, torch.arange(sizes, device=DEVICE), right=True, out_int32=True)
    indices = SORTED_INDICES(groups, codes, ends)
    assert indices.tolist() == [codes.tolist()[group] for group in groups.tolist()]
    # Which would be sorted if nobody said how they lie.
    monkeypatch.setattr(triton_launch, "READS_OF_SORTED", 0)
    monkeypatch.setattr(triton_launch, "_sorted", None)
    table = ROUTE_TILES(indices, slots, ends=ends, codes=codes)
    assert len(table) == triton_launch.table_length(rows, sizes)
    height, count = triton_launch._tiling(rows, RowRouting(indices, slots, tiles=table))
    members = table[count : count * (1 + height)].view(count, height)
    found = [
        (code, [t for t in tile if t >= 0])
        for code, tile in zip(table[:count].tolist(), members.tolist(), strict=True)
        if code != NO_TILE
    ]
    wanted = [index if 0 <= index < slots else -1 for index in indices.tolist()]
    assert sorted(t for _, tile in found for t in tile) == list(range(rows))
    assert all(wanted[t] == code for code, tile in found for t in tile)
    draw = RandomOperands(0, DEVICE)
    a, b, base = draw.normal(slots, 4, 33), draw.normal(slots, 40, 4), draw.normal(rows, 40)
    inputs = draw.normal(rows, 33)
    result = base.clone()
    with force_kernel("triton"):
        ADD_LORA([result], inputs, [a], [b], indices, [0], [0], 1.0, tiles=table)
    expected = reference.lora_linear(base.double(), inputs.double(), [a.double()], [b.double()], indices, [0])
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [I64, I32])
@pytest.mark.parametrize("rows", [1, 17, 256])
def test_few_rows_among_many_pages_have_tiles_of_their_own(rows: int, dtype: torch.dtype) -> None:
    slots = 512
    indices = mix(rows, slots, dtype)
    tiles = tiles_of(ROUTE_TILES(indices, slots), rows, slots)
    codes = [index if 0 <= index < slots else -1 for index in indices.tolist()]
    assert tiles == [(code, [t] + [-1] * 15) for t, code in enumerate(codes)]


@pytest.mark.parametrize("reads", [0, 1 << 24], ids=["sorted", "in-place"])
@pytest.mark.parametrize(("rows", "slots"), [(30, 600), (200, 100)])
def test_pages_of_experts_add_what_slots_do(rows: int, slots: int, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = RandomOperands(0, DEVICE)
    a, b = draw.normal(slots, 4, 33), draw.normal(slots, 40, 4)
    inputs, base, indices = draw.normal(rows, 33), draw.normal(rows, 40), mix(rows, slots)
    monkeypatch.setattr(triton_launch, "READS_OF_SORTED", reads)
    with force_kernel("triton"):
        result = lora_linear(base, inputs, [a], [b], indices, [0])
    expected = reference.lora_linear(base.double(), inputs.double(), [a.double()], [b.double()], indices, [0])
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-4)


def test_no_rows_have_no_tiles() -> None:
    assert tiles_of(ROUTE_TILES(mix(0, 3), 3), 0, 3) == []


# What the kernels compute.


@dataclass(frozen=True)
class Layer:
    """Base products of one input, and slices that are added to them.

    Attributes:
        T: rows.
        D: input features.
        widths: columns of each product.
        slices: for each its product, its first column, W and R.
        K: slots.
        biases: which products have a bias.
        dtype: of everything but the indices.
        ranks: of each slot; None where nobody says.
    """

    T: int = 5
    D: int = 70
    widths: tuple[int, ...] = (70,)
    slices: tuple[tuple[int, int, int, int], ...] = ((0, 0, 70, 3),)
    K: int = 4
    biases: tuple[bool, ...] = (False,)
    dtype: torch.dtype = BF16
    ranks: tuple[int, ...] | None = None

    def __str__(self) -> str:
        dtype = {BF16: "bf16", F16: "fp16", F32: "fp32"}[self.dtype]
        products = "+".join(f"{w}{'b' if b else ''}" for w, b in zip(self.widths, self.biases, strict=True))
        slices = "+".join(f"p{p}@{at}:{w}r{r}" for p, at, w, r in self.slices)
        ranks = "" if self.ranks is None else "-ranks" + ",".join(map(str, self.ranks))
        return f"T{self.T}-D{self.D}-H{products}-{slices}-{dtype}{ranks}"


@dataclass
class Operands:
    """The tensors of a layer; what no kernel may read is NaN."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    a: list[Tensor]
    b: list[Tensor]
    indices: Tensor
    ranks: Tensor | None
    products: list[int]
    offsets: list[int]
    scaling: float = 0.75

    @classmethod
    def of(cls, layer: Layer) -> Operands:
        random = partial(RandomOperands(0, DEVICE).normal, dtype=layer.dtype, scale=0.5)
        indices = mix(layer.T, layer.K)
        a = [random(layer.K, r, layer.D) for *_, r in layer.slices]
        # As the bank stores them.
        b = [random(layer.K, r, w).transpose(1, 2) for *_, w, r in layer.slices]
        for slot in range(layer.K):
            for s in range(len(a)):
                unused = slot not in indices.tolist()
                first = 0 if unused else layer.ranks[slot] if layer.ranks else a[s].shape[1]
                a[s][slot, first:] = torch.nan
                b[s][slot, :, first:] = torch.nan
        return cls(
            random(layer.T, layer.D),
            [random(w, layer.D) for w in layer.widths],
            [random(w) if has else None for w, has in zip(layer.widths, layer.biases, strict=True)],
            a,
            b,
            indices,
            None if layer.ranks is None else torch.tensor(layer.ranks, dtype=I32, device=DEVICE),
            [p for p, *_ in layer.slices],
            [at for _, at, *_ in layer.slices],
        )

    def prepared(self) -> dict[str, Tensor | None]:
        return {"tiles": ROUTE_TILES(self.indices, len(self.a[0])), "ranks": self.ranks}

    def linear_with_lora(self) -> list[Tensor]:
        lora = (self.a, self.b, self.indices, self.products, self.offsets, self.scaling)
        with torch.no_grad(), force_kernel("triton"):
            results: list[Tensor] = LINEAR_WITH_LORA(self.x, self.weights, self.biases, *lora, **self.prepared())
        return results

    def bases(self) -> list[Tensor]:
        pairs = zip(self.weights, self.biases, strict=True)
        return [torch.nn.functional.linear(self.x, *pair) for pair in pairs]

    def add_lora(self, outputs: list[Tensor]) -> list[Tensor]:
        lora = (self.a, self.b, self.indices, self.products, self.offsets, self.scaling)
        with torch.no_grad(), force_kernel("triton"):
            ADD_LORA(outputs, self.x, *lora, **self.prepared())
        return outputs

    def _exact(self, product: int, base: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        mine = [s for s, p in enumerate(self.products) if p == product]
        # Zeros beyond the rank of a slot, as was promised.
        a, b = ([edit(stack[s].cpu().double().nan_to_num()) for s in mine] for stack in (self.a, self.b))
        offsets, x = [self.offsets[s] for s in mine], edit(self.x.cpu().double())
        return reference.lora_linear(base, x, a, b, self.indices.cpu(), offsets, self.scaling)

    def budget(self, product: int, base: Tensor | None, rounded: str) -> Budget:
        """Of one output: of LoRA on a base, or where that is None, on the product, too.

        Rounded is the sum alone (""), or before it the "base", or the "delta".
        """
        x, weight, bias = self.x.cpu().double(), self.weights[product].cpu().double(), self.biases[product]
        columns = self.x.shape[1]
        n = columns + 2 + max(a.shape[1] for a in self.a) + len(self.a)
        if base is None:
            base = x @ weight.t() + (0 if bias is None else bias.cpu().double())
            magnitude = x.abs() @ weight.t().abs() + (0 if bias is None else bias.cpu().double().abs())
            n += columns + 1
        else:
            base = base.cpu().double()
            magnitude = base.abs()
        exact, magnitude = self._exact(product, base, lambda one: one), self._exact(product, magnitude, torch.abs)
        accumulated, dtype = _gamma(n, F32) * magnitude, self.weights[product].dtype
        allowed = accumulated + _half_ulp(exact.abs() + accumulated, dtype)
        first = {"": torch.zeros_like(base), "base": base, "delta": exact - base}[rounded]
        return Budget(exact, allowed + (_half_ulp(first.abs() + accumulated, dtype) if rounded else 0))


def check(results: Sequence[Tensor], operands: Operands, bases: Sequence[Tensor] | None, rounded: str = "") -> None:
    for p, result in enumerate(results):
        budget = operands.budget(p, None if bases is None else bases[p], rounded)
        budget.check(result, torch.ones(result.shape, dtype=torch.bool))


PACKED = {"widths": (134,), "slices": ((0, 0, 40, 3), (0, 64, 32, 5), (0, 96, 33, 3))}
QKV = {"widths": (70, 33, 33), "slices": ((0, 0, 70, 3), (1, 0, 33, 5), (2, 0, 33, 3)), "biases": (False,) * 3}
# What one kernel computes, and what is computed side by side: longer batches, other dtypes, slices at other columns,
# and a bias on some products alone.
TOGETHER = (
    Layer(T=1),
    Layer(T=5, biases=(True,)),
    Layer(T=16, dtype=F16),
    Layer(T=5, D=300, widths=(35,), slices=((0, 0, 35, 17),)),
    Layer(T=5, widths=(70,), slices=((0, 32, 20, 3),)),
    Layer(T=5, widths=(70, 33), slices=((1, 0, 33, 3),), biases=(False, False)),
    Layer(T=5, **PACKED),
    Layer(T=16, **QKV),
    Layer(T=5, **{**QKV, "biases": (True,) * 3}),
)
APART = (
    Layer(T=17),
    Layer(T=40, biases=(True,)),
    Layer(T=40, **QKV),
    Layer(T=40, **PACKED),
    Layer(T=5, dtype=F32),
    Layer(T=5, widths=(70,), slices=((0, 3, 20, 3),)),
    Layer(T=5, **{**QKV, "biases": (True, False, True)}),
    Layer(T=0),
)


@pytest.mark.sweep
@pytest.mark.parametrize("layer", [*TOGETHER, *APART], ids=str)
def test_linear_lora_is_a_linear_with_lora(layer: Layer, fused: list[bool]) -> None:
    operands = Operands.of(layer)
    results = operands.linear_with_lora()
    assert fused == [layer in TOGETHER]
    check(results, operands, None, "" if layer in TOGETHER else "base")


# LoRA first: all columns are written before the product is added to them.
FIRST = (
    Layer(T=40),
    Layer(T=20, **QKV),
    Layer(T=40, widths=(70, 33), slices=((0, 30, 40, 3), (1, 0, 33, 5), (0, 0, 30, 3)), biases=(False, False)),
    Layer(T=40, slices=((0, 0, 70, 3),), ranks=(1, 0, 3, 2)),
    Layer(T=1, dtype=F32),
)
NOT_FIRST = (
    Layer(T=40, biases=(True,)),
    Layer(T=40, **PACKED),
    Layer(T=0),
    # LoRA alone may overflow where its sum with the product does not.
    Layer(T=20, dtype=F16, **QKV),
)


@pytest.mark.parametrize("layer", [*FIRST, *NOT_FIRST], ids=str)
def test_a_product_is_added_to_lora_of_all_columns(
    layer: Layer, fused: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(SIZES._replace(linear_rows=0, linear_rows_if_small=0, delta_first=True), monkeypatch)
    operands = Operands.of(layer)
    added: list[bool] = []
    real = triton_launch.expand_all
    monkeypatch.setattr(triton_launch, "expand_all", lambda *a, **k: (added.append(k.get("add", True)), real(*a, **k)))
    results = operands.linear_with_lora()
    assert added == ([] if layer.T == 0 else [layer not in FIRST])
    check(results, operands, None, "delta" if layer in FIRST else "base")


RANKED = (
    Layer(T=16, slices=((0, 0, 70, 3),), ranks=(1, 0, 3, 2)),
    Layer(T=16, widths=(40,), slices=((0, 0, 40, 33),), ranks=(1, 0, 33, 17)),
    Layer(T=16, widths=(40,), slices=((0, 0, 40, 70),), ranks=(70, 0, 1, 65)),
    Layer(T=5, **QKV, ranks=(1, 0, 3, 2)),
    Layer(T=40, **PACKED, ranks=(1, 0, 3, 2)),
    Layer(T=40, D=300, widths=(40,), slices=((0, 0, 40, 70),), ranks=(70, 0, 1, 65)),
)
ranked = pytest.mark.parametrize("layer", RANKED, ids=str)


@ranked
def test_nothing_beyond_the_rank_of_a_slot_is_read_beside_a_product(layer: Layer, fused: list[bool]) -> None:
    operands = Operands.of(layer)
    results = operands.linear_with_lora()
    # A rank above 64 is not for the one kernel.
    assert fused == [layer.T <= 16 and max(layer.ranks or ()) <= 64]
    check(results, operands, None, "" if fused[0] else "base")


@ranked
def test_nothing_beyond_the_rank_of_a_slot_is_read_where_lora_is_added(layer: Layer) -> None:
    operands = Operands.of(layer)
    bases = operands.bases()
    check(operands.add_lora([base.clone() for base in bases]), operands, bases)


@ranked
def test_nothing_beyond_the_rank_of_a_slot_is_read_by_the_public_op(layer: Layer) -> None:
    operands = Operands.of(layer)
    bases = operands.bases()
    results = []
    for p, base in enumerate(bases):
        mine = [s for s, product in enumerate(operands.products) if product == p]
        a, b, offsets = ([of_slice[s] for s in mine] for of_slice in (operands.a, operands.b, operands.offsets))
        lora = (a, b, operands.indices, offsets, operands.scaling, operands.ranks)
        with torch.no_grad(), force_kernel("triton"):
            results.append(lora_linear(base, operands.x, *lora))
    check(results, operands, bases)


@pytest.mark.sweep
@pytest.mark.parametrize("layer", [RANKED[3], RANKED[4]], ids=str)
@pytest.mark.parametrize(
    "ranks",
    [
        torch.tensor([5, 100, 2**31 - 1, 6], dtype=I32),
        torch.tensor([5, 2**32, 2**62, 6]),
        torch.tensor([5, 0, 7, 0, 9, 0, 5, 0], dtype=I32)[::2],
        torch.tensor([9]).expand(4),
    ],
    ids=["int32", "int64", "strided", "expanded"],
)
def test_a_rank_above_that_of_the_stack_counts_as_its_own(ranks: Tensor, layer: Layer, fused: list[bool]) -> None:
    operands = Operands.of(replace(layer, ranks=None))
    exact = operands.linear_with_lora()
    whole = ranks if ranks._base is None else ranks._base
    operands.ranks = whole.to(DEVICE).as_strided(ranks.shape, ranks.stride())
    for got, wanted in zip(operands.linear_with_lora(), exact, strict=True):
        assert same_bits(got, wanted)


def covered_by(layer: Layer, result: Tensor) -> Tensor:
    """Which columns of a layer's only product slices cover."""
    covered = torch.zeros(result.shape[1], dtype=torch.bool)
    for _, at, width, _ in layer.slices:
        covered[at : at + width] = True
    return covered


@pytest.mark.parametrize("layer", [TOGETHER[1], TOGETHER[6], APART[1], APART[3]], ids=str)
def test_rows_without_an_adapter_have_the_bits_of_a_run_without_any(layer: Layer, fused: list[bool]) -> None:
    operands = Operands.of(layer)
    without = [not 0 <= i < layer.K for i in operands.indices.tolist()]
    assert any(without)
    results = operands.linear_with_lora()
    operands.indices = torch.full_like(operands.indices, -1)
    for got, plain in zip(results, operands.linear_with_lora(), strict=True):
        assert same_bits(got[without], plain[without])
        # Columns that no slice covers, in all rows.
        covered = covered_by(layer, got)
        assert same_bits(got[:, ~covered], plain[:, ~covered])
        assert not same_bits(got, plain)


@pytest.mark.sweep
@pytest.mark.parametrize("layer", [TOGETHER[6], TOGETHER[8], APART[2], APART[3], RANKED[1]], ids=str)
def test_nan_in_one_slot_stays_in_its_rows_and_columns(layer: Layer, fused: list[bool]) -> None:
    operands = Operands.of(layer)
    clean = operands.linear_with_lora()
    slot = max(i for i in operands.indices.tolist() if 0 <= i < layer.K)
    for stack in (*operands.a, *operands.b):
        stack[slot] = torch.nan
    mine = operands.indices == slot
    for dirty, wanted in zip(operands.linear_with_lora(), clean, strict=True):
        assert same_bits(dirty[~mine], wanted[~mine])
        covered = covered_by(layer, dirty)
        assert dirty[mine][:, covered].isnan().all()
        assert same_bits(dirty[:, ~covered], wanted[:, ~covered])


def _mixed_dtypes(operands: Operands) -> None:
    operands.a[0], operands.b[1] = operands.a[0].float(), operands.b[1].half()


def _other_strides_of_a(operands: Operands) -> None:
    operands.a[1] = operands.a[1].transpose(1, 2).contiguous().transpose(1, 2)


def _other_strides_of_b(operands: Operands) -> None:
    operands.b[0] = operands.b[0].contiguous()


def _other_strides_of_x(operands: Operands) -> None:
    operands.x = operands.x.t().contiguous().t()


def _other_strides_of_a_weight(operands: Operands) -> None:
    operands.weights[1] = operands.weights[1].t().contiguous().t()


@pytest.mark.sweep
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize(
    "edit",
    [_mixed_dtypes, _other_strides_of_a, _other_strides_of_b, _other_strides_of_x, _other_strides_of_a_weight],
    ids=lambda edit: edit.__name__.strip("_"),
)
def test_operands_that_are_not_stored_alike_are_read_rightly(
    edit: Callable[[Operands], None], rows: int, fused: list[bool]
) -> None:
    operands = Operands.of(Layer(T=rows, **QKV))
    edit(operands)
    check(operands.linear_with_lora(), operands, None, "base")
    assert fused == [False]
    bases = operands.bases()
    check(operands.add_lora([base.clone() for base in bases]), operands, bases)


# Three pieces of D; a group of three slices that is cut short; blocks of columns that end with a slice, and do not.
TUNED = {
    "D": 600,
    "K": 2,
    "widths": (130, 64),
    "slices": ((0, 0, 64, 16), (0, 64, 66, 3), (1, 0, 33, 5), (1, 33, 31, 3)),
    "biases": (False, False),
}
SETTINGS: dict[str, list[Any]] = {
    "shrink_programs": [1, 1 << 30],
    "shrink_slices": [1, 2, 3],
    "shrink_columns": [64, 128, 256],
    "expand_columns": [32, 64, 128],
    "expand_blocks": [1, 2, 4],
    "linear_depth": [32, 64, 128],
    "linear_columns": [32, 64],
}


def _settings() -> Iterator[Sizes]:
    """The first, second and third of each; on a GPU also each alone, and what shrinks with what."""
    for at in range(3):
        yield SIZES._replace(**{name: values[at % len(values)] for name, values in SETTINGS.items()})
    if DEVICE.type != "cpu":
        yield from (SIZES._replace(**{name: value}) for name, values in SETTINGS.items() for value in values)
        for programs, slices in itertools.product(SETTINGS["shrink_programs"], SETTINGS["shrink_slices"]):
            yield SIZES._replace(shrink_programs=programs, shrink_slices=slices)


@pytest.mark.sweep
@pytest.mark.parametrize("rank", [16, 40])
@pytest.mark.parametrize("rows", [6, 20])
def test_no_size_of_a_tile_changes_a_bit(
    rows: int, rank: int, monkeypatch: pytest.MonkeyPatch, fused: list[bool]
) -> None:
    """Where they are compiled; in the interpreter numpy's sums depend on the shape of a product."""
    slices = TUNED["slices"] if rows > SIZES.linear_rows else TUNED["slices"][:3]
    slices = tuple((p, at, width, rank if r == TUNED["slices"][0][3] else r) for p, at, width, r in slices)
    operands = Operands.of(Layer(T=rows, **{**TUNED, "slices": slices}))
    first: list[Tensor] | None = None
    bases = operands.bases()
    for sizes in _settings():
        use(sizes, monkeypatch)
        results = operands.linear_with_lora() + operands.add_lora([base.clone() for base in bases])
        check(results[:2], operands, None, "base")
        check(results[2:], operands, bases)
        first = first or results
        if not triton_launch.is_interpreting():
            assert all(map(same_bits, results, first)), sizes
    assert all(fused) if rows <= SIZES.linear_rows else not any(fused)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("features", [600, 608], ids=["lane by lane", "block loads"])
@pytest.mark.parametrize(("rows", "rank"), [(6, 16), (70, 40)])
def test_the_sizes_of_intel_gpus_compute_the_same(
    rows: int, rank: int, features: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2-D block loads of A, which want a stride that is a multiple of 16, and 16 ranks at a time."""
    slices = ((0, 0, 64, rank), (0, 64, 66, 3), (1, 0, 64, 5))
    layer = Layer(T=rows, D=features, K=2, widths=(130, 64), slices=slices, biases=(False, False), dtype=dtype)
    operands = Operands.of(layer)
    use(sizes_for(rows, rank, 0, "xpu", "float32" if dtype == F32 else "plain"), monkeypatch)
    bases = operands.bases()
    check(operands.add_lora([base.clone() for base in bases]), operands, bases)
    assert triton_launch._fits_block_loads(operands.a, 1, 2) == (features == 608 and dtype != F32)


@pytest.mark.parametrize("features", [300, 600, 1100])
def test_a_shrink_sums_all_pieces_of_a_long_row(features: int) -> None:
    """Two, three and five of them, which one program of the public op sums in pairs."""
    call = build("bgmv_shrink", Case(T=5, D=features, R=5, H=10))
    budget, outside, before = budget_of("bgmv_shrink", call.args), call.outside(), call.buffer.clone()
    with torch.no_grad(), force_kernel("triton"):
        budget.check(call.run(), call.written)
    assert same_bits(call.buffer[outside], before[outside])


# What a compiler for a GPU makes of them.

CROSS_COMPILE = '''
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class Driver:
    """Enough of a driver to compile for a GPU that is not there."""

    launcher_cls = utils = None

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return None

    def map_python_to_cpp_type(self, type):
        return "x"


driver.set_active(Driver())
from dataclasses import replace
from xpu_lora_compile.kernels import triton_gradients, triton_kernels, triton_launch
from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.sizes import Sizes, sizes_for

made = {}


real = triton_launch.kernel_named


class Compiled:
    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        def compile(*args, **kwargs):
            kernel = real(self.name).warmup(*args, grid=grid, **kwargs)
            made.setdefault(self.name, []).append((kernel.asm["ptx"], kernel.metadata.shared))

        return compile


triton_launch.kernel_named = Compiled
triton_launch._has_pdl = lambda device: int(sys.argv[1]) >= 90 and triton_kernels.CAN_OVERLAP

def compile_all(rows, dtype, R, widths, has_base):
    K, D, slices = 8, 1024, list(range(len(widths)))
    x, indices = torch.empty(rows, D, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    a = [torch.empty(K, R, D, dtype=dtype) for _ in widths]
    b = [torch.empty(K, R, w, dtype=dtype).transpose(1, 2) for w in widths]
    routing = RowRouting(indices, K, torch.full((K,), R, dtype=torch.int32))
    outputs = [torch.empty(rows, w, dtype=dtype) for w in widths]
    call, kernel = LoraCall(outputs, x, a, b, routing, slices, [0] * len(widths), 0.5), triton_launch.Triton()
    kernel.add_lora(call)
    kernel.shrink(LoraCall([torch.empty(rows, R)], x, a[:1], [], routing))
    for hidden in {torch.float32, dtype}:
        kernel.expand(LoraCall(outputs[:1], torch.empty(rows, R, dtype=hidden), [], b[:1], routing))
    if has_base:
        weights = [torch.empty(w, D, dtype=dtype) for w in widths]
        kernel.linear_with_lora(replace(call, outputs=()), weights, [None] * len(widths))
        operands = outputs[:1], x, a[:1], b[:1], indices, [0], [0], 0.5
        triton_gradients.backward(triton_launch._launch, *operands, None, None, True, True)


for rows, dtype, *rest in json.loads(sys.argv[2]):
    compile_all(rows, getattr(torch, dtype), *rest)
# Pages of experts: for few rows and for many.
for rows in (256, 32768):
    triton_launch.route(torch.zeros(rows, dtype=torch.int64), 1024)
json.dump(made, sys.stdout)
'''


def cross_compiled(capability: int, calls: list[tuple[Any, ...]], cache: Path) -> dict[str, list[tuple[str, int]]]:
    """The code of each kernel, made without a GPU, and its shared memory in bytes; in a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", CROSS_COMPILE, str(capability), json.dumps(calls)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert ran.returncode == 0, ran.stderr
    made: dict[str, list[tuple[str, int]]] = json.loads(ran.stdout)
    return made


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For an H100."""
    packed = (1024, 256, 256)
    calls = [(8, "bfloat16", 16, packed, True), (2048, "bfloat16", 16, packed, False)]
    made = cross_compiled(90, calls, tmp_path_factory.mktemp("triton"))
    return {name: [code for code, _ in codes] for name, codes in made.items()}


@pytest.mark.sweep
@pytest.mark.parametrize(
    "call",
    [(300, "float32", 64, (1024,)), (2048, "float32", 64, (16384,)), (2048, "float32", 16, (1024, 256, 256))],
    ids=["R64", "R64, wide", "three slices"],
)
def test_float32_fits_the_shared_memory_of_smaller_gpus(call: tuple[Any, ...], tmp_path: Path) -> None:
    """Compute capabilities 8.6, 8.9 and 12.0 have 99 KB: CUDA C++ Programming Guide."""
    for name, codes in cross_compiled(89, [(*call, False)], tmp_path).items():
        assert max(shared for _, shared in codes) <= 99 * 1024, name


def test_all_kernels_compile_for_a_gpu(ptx: dict[str, list[str]]) -> None:
    numbers = {name: len(codes) for name, codes in ptx.items()}
    routes = {"route_kernel": 3, "route_alone_kernel": 1, "route_sorted_kernel": 1}
    gradients = {"inputs_gradient_kernel": 1, "weights_gradient_kernel": 1}
    assert numbers == {**routes, **gradients, "shrink_kernel": 7, "expand_kernel": 6, "linear_kernel": 1}


def test_no_kernel_has_atomic_instructions(ptx: dict[str, list[str]]) -> None:
    """So that sums are always taken in the same order."""
    for codes in ptx.values():
        for code in codes:
            assert not re.search(r"\b(atom|red)\.(global|shared|async|relaxed|add)", code)


def test_tensor_cores_sum_in_one_order_whatever_the_tile(ptx: dict[str, list[str]]) -> None:
    for name in ("shrink_kernel", "expand_kernel", "inputs_gradient_kernel", "weights_gradient_kernel"):
        for code in ptx[name]:
            assert "mma.sync" in code
            assert "wgmma" not in code


def test_expand_moves_sixteen_bytes_at_a_time(ptx: dict[str, list[str]]) -> None:
    for code in ptx["expand_kernel"]:
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", code)
        assert re.search(r"st\.global[\w.:]*\.v4\.b32", code)


def test_the_interpreter_is_what_runs_here_and_only_here() -> None:
    """A process that is to compile, on a machine with a GPU, must not be told to interpret."""
    assert (os.environ.get("TRITON_INTERPRET") == "1") == (DEVICE.type == "cpu")
    assert "TRITON_INTERPRET" in (Path(__file__).parents[1] / "conftest.py").read_text()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_infinite_rank_vector_stays_infinite() -> None:
    x = torch.ones(2, 4, dtype=BF16, device=DEVICE)
    x[0, 0] = torch.inf
    a, b = (torch.ones(1, *shape, dtype=BF16, device=DEVICE) for shape in ((1, 4), (2, 1)))
    with force_kernel("triton"), torch.no_grad():
        result = lora_linear(x.new_zeros(2, 2), x, [a], [b], torch.tensor([0, 0], device=DEVICE), [0])
    assert result.tolist() == [[torch.inf] * 2, [4.0] * 2]


def test_without_features_nothing_is_read() -> None:
    a, b = torch.ones(2, 2, 0, device=DEVICE), torch.ones(2, 4, 2, device=DEVICE)
    with force_kernel("triton"), torch.no_grad():
        result = lora_linear(
            torch.ones(3, 4, device=DEVICE),
            torch.ones(3, 0, device=DEVICE),
            [a],
            [b],
            torch.tensor([0, 1, -1], device=DEVICE),
            [0],
        )
    assert result.tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize("kernel", ["native", "triton"] if DEVICE.type == "cpu" else ["triton"])
def test_numbers_that_are_negated_when_read_are_negated(kernel: str) -> None:
    x = torch.complex(torch.zeros(3, 5, device=DEVICE), torch.ones(3, 5, device=DEVICE)).conj().imag
    assert x.is_neg()
    a, b = torch.ones(2, 2, 5, device=DEVICE), torch.ones(2, 4, 2, device=DEVICE)
    with force_kernel(kernel), torch.no_grad():
        result = lora_linear(
            torch.zeros(3, 4, device=DEVICE), x, [a], [b], torch.tensor([0, 1, -1], device=DEVICE), [0]
        )
    assert result.tolist() == [[-10.0] * 4, [-10.0] * 4, [0.0] * 4]
