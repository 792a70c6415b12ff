"""The double of vllm-xpu-kernels (`support/xpu_c.py`) against the code in the released wheel: see `vendor`.

Operands are small whole numbers, whose sums are exact in any order: so results are compared to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from intel import vendor
from kernels import test_vendor as of_the_double
from passes import test_cross_compiled as of_graphs
from support import xpu_c
from support.cases import BF16, F16, F32, same_bits
from torch import Tensor

pytestmark = pytest.mark.skipif(bool(vendor.problem()), reason=vendor.problem())

NAMES = [*xpu_c.BGMV, *xpu_c.LORA]
T, K = 7, 3
# A slot of each row, -1, and two numbers that are no slots.
INDICES = (0, 2, -1, 1, K, 2, K + 5)


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the wheel's kernels run where the double would."""
    for name in NAMES:
        monkeypatch.setattr(xpu_c, name, getattr(vendor, name))


# What is read in the wheel.


@pytest.mark.parametrize("name", NAMES)
def test_the_schemas_are_those_of_the_wheel(name: str) -> None:
    assert f"\0{name}{(xpu_c.BGMV | xpu_c.LORA)[name]}\0".encode() in vendor.library()


MESSAGES = sorted({message for *_, message in of_the_double.BROKEN if "refuses" not in message})
# Of torch's, which the op asks for the address of a tensor of another dtype.
MESSAGES.remove("expected scalar type ")


@pytest.mark.parametrize("message", MESSAGES)
def test_what_the_double_says_of_a_broken_rule_is_in_the_wheel(message: str) -> None:
    assert message.encode() in vendor.library()


def test_the_kernels_are_there_for_the_dtypes_that_the_double_takes_and_no_others() -> None:
    dtypes = list(product(xpu_c.FLOATS, xpu_c.FLOATS, xpu_c.HALF))
    wanted = {
        vendor.symbol(kernel, dtypes_of_one, vector)
        for kernel in ("bgmv_shrink_kernel", "bgmv_expand_slice_kernel", "lora_shrink_kernel")
        for dtypes_of_one, vector in product(dtypes, (1, 2, 4, 8))
    }
    wanted |= {vendor.symbol("lora_expand_kernel", *given) for given in product(dtypes, (1, 2, 4, 8), (False, True))}
    assert set(vendor.entries()) == wanted


# What is run.


class Numbers:
    """Seeded whole numbers, small enough for each to be a float16 and a bfloat16; what is added to a half rarely is."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype, most: int = 4) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=self.generator).to(dtype)


def call_of(
    name: str, dtypes: Sequence[torch.dtype], reduced: int, *, add: bool = True, widths: tuple[int, ...] = (24, 5, 40)
) -> tuple[list[Any], int]:
    """The arguments of an op, and which of them is its output.

    Args:
        name: the op.
        dtypes: of output, inputs and weights.
        reduced: D of a shrink, R of an expand.
        add: whether an expand adds to its output.
        widths: of the slices of an expand; R of a shrink is the first.
    """
    numbers, (output, inputs, weights) = Numbers(), dtypes
    indices = torch.tensor(INDICES)
    if name.startswith("bgmv_expand"):
        # The original reads past the weights.
        indices = torch.where(indices < K, indices, -1)
    rank, width = widths[0], sum(widths) + 9
    x = numbers(T, reduced, dtype=inputs, most=200)
    stacks = [numbers(K, 1, size, reduced, dtype=weights) for size in widths]
    there = numbers(T, width, dtype=output, most=250)
    if name == "bgmv_shrink":
        return [there[:, :rank].contiguous(), x, stacks[0].squeeze(1), indices, 0.75], 0
    if name == "lora_shrink":
        same = [numbers(K, 1, rank, reduced, dtype=weights) for _ in widths]
        return [x, same, torch.full((len(widths), T, rank), torch.nan, dtype=output), indices.int(), 0.75], 2
    if name == "bgmv_expand":
        return [there[:, :rank].contiguous(), x, stacks[0], indices, add], 0
    if name == "bgmv_expand_slice":
        return [there, x, stacks[0], indices, 7, rank, add], 0
    hidden = numbers(len(widths), T, reduced, dtype=inputs, most=200)
    return [hidden, stacks, there, indices.int(), 3, add], 2


def copied(args: list[Any]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


# A sum in fp32 of a half, of what was fp32, and of both kinds of half.
DTYPES = [(F32, BF16, BF16), (BF16, F32, BF16), (F16, F16, F16), (BF16, F32, F16)]
# Rows that are read 8, 4, 2 and 1 number at a time: 16 bytes at most.
LENGTHS = (40, 12, 6, 7)
CALLS = [(name, DTYPES[0], length, True) for name in NAMES for length in LENGTHS]
CALLS += [(name, dtypes, 16, True) for name in NAMES for dtypes in DTYPES[1:]]
CALLS += [(name, DTYPES[1], 16, False) for name in NAMES if "expand" in name]
# Longer than what all threads of a group read at once; and more groups than one.
CALLS += [("bgmv_shrink", DTYPES[0], 5000, True), ("lora_shrink", DTYPES[0], 5000, True)]


def spelled(name: str, dtypes: Sequence[torch.dtype], length: int, add: bool) -> str:
    short = {F32: "fp32", BF16: "bf16", F16: "fp16"}
    return f"{name}-{'.'.join(short[dtype] for dtype in dtypes)}-{length}{'' if add else '-replace'}"


@pytest.mark.parametrize(
    ("name", "dtypes", "length", "add"), [pytest.param(*call, id=spelled(*call)) for call in CALLS]
)
def test_the_double_has_the_bits_of_the_original(
    name: str, dtypes: Sequence[torch.dtype], length: int, add: bool
) -> None:
    args, at = call_of(name, dtypes, length, add=add)
    got, wanted = copied(args), copied(args)
    getattr(xpu_c, name)(*got)
    getattr(vendor, name)(*wanted)
    assert same_bits(got[at], wanted[at])
    # Rows without an adapter have kept their values, or are 0: so other rows differ.
    assert not same_bits(wanted[at], args[at])


@pytest.mark.parametrize("name", NAMES)
def test_the_original_computes_the_formula_of_numbers_that_are_not_whole(name: str) -> None:
    args, at = call_of(name, (F32, F32, BF16), 64)
    args = [0.3 * arg if isinstance(arg, Tensor) and arg.dtype == F32 else arg for arg in args]
    got, wanted = copied(args), copied(args)
    getattr(xpu_c, name)(*got)
    getattr(vendor, name)(*wanted)
    torch.testing.assert_close(got[at], wanted[at], rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("original")
class TestTheOriginal:
    """What is asserted of the double is true of the original."""

    def test_bgmv_shrink_adds_to_what_is_there(self) -> None:
        of_the_double.test_bgmv_shrink_adds_to_what_is_there()

    def test_lora_shrink_zeroes_first_and_then_writes(self) -> None:
        of_the_double.test_lora_shrink_zeroes_first_and_then_writes()

    @pytest.mark.parametrize("add", [True, False])
    @pytest.mark.parametrize("name", ["bgmv_expand", "bgmv_expand_slice", "lora_expand"])
    def test_rows_without_an_adapter_keep_their_value_also_when_not_adding(self, name: str, add: bool) -> None:
        of_the_double.test_rows_without_an_adapter_keep_their_value_also_when_not_adding(name, add)

    @pytest.mark.parametrize("name", ["bgmv_shrink", "lora_shrink", "lora_expand"])
    def test_an_index_past_the_slots_is_skipped_by_the_others(self, name: str) -> None:
        of_the_double.test_an_index_past_the_slots_is_skipped_by_the_others(name)

    def test_lora_expand_takes_weights_that_are_narrower_than_the_output(self) -> None:
        of_the_double.test_lora_expand_takes_weights_that_are_narrower_than_the_output()

    @pytest.mark.parametrize("name", ["bgmv_shrink", "bgmv_expand", "bgmv_expand_slice", "lora_expand"])
    def test_what_is_added_to_a_half_is_rounded_before_and_after(self, name: str) -> None:
        of_the_double.test_what_is_added_to_a_half_is_rounded_before_and_after(name)


GROUPS = pytest.mark.parametrize("groups", [(xpu_c.LORA,), (xpu_c.BGMV,)], ids=["new", "old"])


@GROUPS
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("width", [of_graphs.H, of_graphs.H + 2], ids=["equal", "wider"])
@pytest.mark.usefixtures("original")
def test_a_graph_that_our_passes_made_computes_the_contract_on_the_original(
    groups: tuple[dict[str, str], ...], dtype: torch.dtype, width: int
) -> None:
    of_graphs.test_one_slice_computes_what_the_contract_says(groups, dtype, dtype, width)


@GROUPS
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.usefixtures("original")
def test_a_graph_of_three_slices_computes_the_contract_on_the_original(
    groups: tuple[dict[str, str], ...], is_packed: bool
) -> None:
    of_graphs.test_qkv_computes_what_the_contract_says(groups, BF16, BF16, is_packed)
