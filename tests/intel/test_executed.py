"""The Triton kernels as Intel's compiler makes them for a Data Center GPU Max, executed: see `opencl`.

The tests are those of `tests/kernels`, called with cases that take all paths through the kernels and few minutes of the
compiler. Triton compiles a kernel once more for other dtypes, for strides of 1, and for sizes that 16 divides.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from intel import opencl
from intel.toolchain import compiling_for
from kernels import test_every_kernel, test_triton, test_visible
from kernels.test_triton import QKV, RANKED, Layer, Operands, _new_memory_is_poisoned, check  # noqa: F401
from support.cases import BF16, F16, F32, F64, OPS, Case, cases_of, same_bits

from xpu_lora_compile.kernels import triton_launch
from xpu_lora_compile.kernels.sizes import Sizes, sizes_for

# As for Intel GPUs, but small tiles, which are compiled faster.
SMALL = sizes_for(64, 16, 64, "xpu")._replace(
    block_loads=False, expand_columns=32, shrink_columns=32, shrink_warps=4, linear_rows=0, linear_rows_if_small=0
)


@pytest.fixture(autouse=True)
def _executed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_launch, "problem", lambda _device: "")
    test_triton.use(SMALL, monkeypatch)
    opencl.launched.clear()
    with compiling_for("pvc", driver=opencl.Driver, fast_math="fast_math" in request.fixturenames):
        yield


@pytest.fixture
def fast_math() -> None:
    """Have the compiler do arithmetic as fast as it may, which it does not do by itself."""


# The contract.


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op}-{case}")
        for op in OPS
        for case in cases_of(op)
        if F64 not in (case.inputs, case.weights, case.output)
    ],
)
def test_values_are_within_the_budget_and_nothing_else_is_written(op: str, case: Case) -> None:
    test_every_kernel.test_values_are_within_the_budget_and_nothing_else_is_written("triton", op, case)
    assert bool(opencl.launched) == (case.T > 0)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -1.0])
def test_a_rank_vector_without_an_adapter_is_0_however_it_is_scaled(scaling: float) -> None:
    test_every_kernel.test_a_rank_vector_without_an_adapter_is_0_however_it_is_scaled("triton", scaling)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    test_every_kernel.test_a_row_is_the_same_in_every_batch("triton", dtype)


@pytest.mark.usefixtures("fast_math")
def test_fast_math_takes_nothing_from_the_sums() -> None:
    """Which folds casts there and back: of the three parts of a rank vector one would be left."""
    case = Case(T=9, D=129, R=17, W=33, H=35, inputs=F32, weights=BF16, output=F32)
    for op in ("bgmv_expand", "lora_linear"):
        test_every_kernel.test_values_are_within_the_budget_and_nothing_else_is_written("triton", op, case)


# Routing, ranks, pieces of D, sizes of tiles.


@pytest.mark.parametrize("slots", [1, 3, 64])
@pytest.mark.parametrize("rows", [1, 17, 65, 300])
def test_every_row_is_in_one_tile_of_its_slot(rows: int, slots: int) -> None:
    test_triton.test_every_row_is_in_one_tile_of_its_slot(rows, slots)


@pytest.mark.parametrize("layer", [RANKED[0], RANKED[3], RANKED[5]], ids=str)
def test_nothing_beyond_the_rank_of_a_slot_is_read_where_lora_is_added(layer: Layer) -> None:
    test_triton.test_nothing_beyond_the_rank_of_a_slot_is_read_where_lora_is_added(layer)


@pytest.mark.parametrize("layer", [Layer(T=17, dtype=F16), Layer(T=40, **QKV)], ids=str)
def test_what_is_added_to_a_product_is_within_the_budget(layer: Layer) -> None:
    operands = Operands.of(layer)
    bases = operands.bases()
    check(operands.add_lora([base.clone() for base in bases]), operands, bases)


@pytest.mark.parametrize("features", [300, 600, 1100])
def test_a_shrink_sums_all_pieces_of_a_long_row(features: int) -> None:
    test_triton.test_a_shrink_sums_all_pieces_of_a_long_row(features)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_the_sizes_for_intel_gpus_have_the_bits_of_small_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2-D block loads among them, which read A of bfloat16."""
    operands = Operands.of(Layer(T=5, D=96, dtype=dtype, ranks=(1, 0, 3, 2)))
    (base,) = operands.bases()
    small = operands.add_lora([base.clone()])

    def for_xpu(rows: int, rank: int, width: int, _device: str = "", kind: str = "plain", _slots: int = 1) -> Sizes:
        return sizes_for(rows, rank, width, "xpu", kind)

    monkeypatch.setattr(triton_launch, "sizes_for", for_xpu)
    (got,) = operands.add_lora([base.clone()])
    check([got], operands, [base])
    assert same_bits(got, small[0])


def test_no_size_of_a_tile_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = test_triton.SETTINGS | {"shrink_columns": [32, 64, 32], "expand_columns": [32, 16, 64]}
    monkeypatch.setattr(test_triton, "SETTINGS", settings)
    monkeypatch.setattr(test_triton, "SIZES", SMALL)
    test_triton.test_no_size_of_a_tile_changes_a_bit(20, 16, monkeypatch, [])


# Edges.


def test_an_infinite_rank_vector_stays_infinite() -> None:
    test_triton.test_an_infinite_rank_vector_stays_infinite()


def test_without_features_nothing_is_read() -> None:
    test_triton.test_without_features_nothing_is_read()


def test_numbers_that_are_negated_when_read_are_negated() -> None:
    test_triton.test_numbers_that_are_negated_when_read_are_negated("triton")


# What Inductor launches.


@pytest.mark.parametrize(("shape", "tuned"), [("three-of-one", "T"), ("four-of-two", "many"), ("shared-columns", "T")])
def test_flat_forms_have_the_bits_of_the_opaque_op(shape: str, tuned: str) -> None:
    test_visible.test_flat_forms_have_the_bits_of_the_opaque_op(test_visible.SHAPES[shape], tuned)
