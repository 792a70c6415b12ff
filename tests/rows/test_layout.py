"""`fit` finds the order that rows lie in from their owners, and `Layout.rows` gives each row its slot, in any size."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from xpu_lora_compile.rows.layout import UNSAID, Layout, Picked, fit
from xpu_lora_compile.rows.owners import GUESS, MIXED, SHARED, UNKNOWN, along, compress, constant

BATCH_FIRST = Layout(0, 1, 1)
EXAMPLES = int(os.environ.get("XPU_LORA_TEST_EXAMPLES", "200"))
thoroughly = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
# Each sequence has an adapter of its own, so that a row says whose it is.
SLOTS = torch.tensor([7, 5, 9])


def owners_of(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def rows(layout: Layout | Picked, *shape: int, slots: Tensor = SLOTS) -> list[int]:
    return layout.rows(slots, shape).tolist()


# Orders that are found.


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_batch_first(tokens: int) -> None:
    assert fit(along(0, 2, 3), [3, tokens], 3) == BATCH_FIRST
    assert rows(BATCH_FIRST, 3, tokens) == [7] * tokens + [5] * tokens + [9] * tokens


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_time_first(tokens: int) -> None:
    layout = fit(along(1, 2, 3), [tokens, 3], 3)
    assert layout == Layout(1, 1, 1)
    assert rows(layout, tokens, 3) == [7, 5, 9] * tokens


def test_batch_in_the_middle() -> None:
    layout = fit(along(1, 3, 3), [2, 3, 2], 3)
    assert layout == Layout(1, 1, 1)
    assert rows(layout, 2, 3, 2) == [7, 7, 5, 5, 9, 9] * 2


@pytest.mark.parametrize("times", [2, 3, 5])
def test_flattened_or_repeated(times: int) -> None:
    layout = fit(along(0, 1, 3).repeat_interleave(times), [3 * times], 3)
    assert layout == Layout(0, 1, 0)
    assert rows(layout, 3 * times) == [7] * times + [5] * times + [9] * times


@pytest.mark.parametrize("times", [2, 3, 5])
def test_tiled(times: int) -> None:
    layout = fit(along(0, 1, 3).repeat(times), [3 * times], 3)
    assert layout == Layout(0, 0, 1)
    assert rows(layout, 3 * times) == [7, 5, 9] * times


def test_doubled_and_then_flattened() -> None:
    layout = fit(along(0, 1, 3).repeat_interleave(2).repeat(2), [12], 3)
    assert layout == Layout(0, 2, 2)
    assert rows(layout, 12) == [7, 7, 5, 5, 9, 9] * 2


def test_windows_of_each_sequence() -> None:
    layout = fit(along(0, 1, 3).repeat_interleave(4).view(12, 1), [12, 5], 3)
    assert layout == Layout(0, 1, 0)
    assert rows(layout, 12, 5) == [7] * 20 + [5] * 20 + [9] * 20


def test_tiled_along_another_dimension() -> None:
    layout = fit(along(0, 1, 3).repeat(2).view(1, 6), [2, 6], 3)
    assert layout == Layout(1, 0, 1)
    assert rows(layout, 2, 6) == [7, 5, 9] * 4


# Packed batches: one slot for each token.

LENGTHS = [2, 4, 2]
TOKENS = torch.tensor([7, 7, 5, 5, 5, 5, 9, 9])
OF_TOKENS = owners_of(0, 0, 1, 1, 1, 1, 2, 2)


@pytest.mark.parametrize("shape", [[8], [1, 8], [8, 1]], ids=str)
def test_packed_tokens(shape: list[int]) -> None:
    layout = fit(OF_TOKENS.view(shape), shape, 3, LENGTHS)
    assert layout == Layout(shape.index(8), 1, 1)
    assert layout.takes(8, 8)
    assert rows(layout, *shape, slots=TOKENS) == TOKENS.tolist()


def test_several_rows_a_token() -> None:
    layout = fit(OF_TOKENS.repeat_interleave(3), [24], 3, LENGTHS)
    assert layout == Layout(0, 1, 3)
    assert layout.takes(24, 8)
    assert rows(layout, 24, slots=TOKENS) == TOKENS.repeat_interleave(3).tolist()


def test_several_tokens_a_row() -> None:
    layout = fit(OF_TOKENS[::2], [4], 3, LENGTHS)
    assert layout == Layout(0, 1, -2)
    assert layout.takes(4, 8)
    assert not layout.takes(8, 8)
    assert rows(layout, 4, slots=TOKENS) == [7, 5, 5, 9]
    assert rows(layout, 4, 2, slots=TOKENS) == [7, 7, 5, 5, 5, 5, 9, 9]


# Orders that hold for one call alone.


def test_packed_tokens_that_were_dropped_or_changed_places_are_picked() -> None:
    for line in (OF_TOKENS[1:], OF_TOKENS.flip(0), OF_TOKENS[[0, 3, 5, 7, 6, 1]]):
        layout = fit(line, [len(line)], 3, LENGTHS)
        assert isinstance(layout, Picked)
        assert rows(layout, len(line), slots=TOKENS) == [[7, 5, 9][owner] for owner in line]


@pytest.mark.parametrize(
    "line",
    [
        [0, 2, 1],
        [2, 1, 0],
        [0, 0, 1, 2],
        [0, 1, 2, 2],
        [0, 1],
        [0, 1, 1],
        [0, 1, 2, 0],
        [0, 0, 1, 1],
        [0, 1, 2, 2, 1, 0],
    ],
    ids=str,
)
def test_rows_in_an_irregular_order_are_picked(line: list[int]) -> None:
    layout = fit(owners_of(*line), [len(line)], 3)
    assert isinstance(layout, Picked)
    assert layout.why == "the sequences lie in no regular order"
    assert rows(layout, len(line)) == [[7, 5, 9][owner] for owner in line]


def test_rows_that_values_order_are_picked_even_where_they_lie_well() -> None:
    layout = fit(along(0, 2, 3), [3, 2], 3, by_data=True)
    assert isinstance(layout, Picked)
    assert rows(layout, 3, 2) == [7, 7, 5, 5, 9, 9]


def test_a_diagonal_order_is_picked() -> None:
    diagonal = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]], dtype=torch.int32)
    assert rows(fit(diagonal, [3, 3], 3), 3, 3) == [7, 5, 9, 5, 9, 7, 9, 7, 5]


def test_rows_of_one_sequence_alone_are_picked() -> None:
    assert rows(fit(constant(1, 2), [3, 3], 3), 3, 3) == [5] * 9


# What is refused.


def test_one_mixed_row_is_enough_to_be_refused() -> None:
    assert fit(owners_of(0, MIXED, 2), [3], 3) == "several sequences are mixed in a row"


@pytest.mark.parametrize("size", [3, 6, 12])
def test_a_size_that_happens_to_fit_says_nothing(size: int) -> None:
    assert fit(constant(UNKNOWN, 1), [size], 3) == UNSAID
    assert fit(constant(SHARED, 1), [size], 3) == "these rows belong to no sequence: all share them"


def test_one_row_of_nobody_leaves_the_order_unknown() -> None:
    assert isinstance(fit(owners_of(0, SHARED, 2), [3], 3), str)
    assert isinstance(fit(owners_of(0, UNKNOWN, 2), [3], 3), str)


# Columns that are not known, and guesses.


@pytest.mark.parametrize("stranger", [UNKNOWN, SHARED])
def test_columns_of_nobody_belong_to_the_sequence_of_their_row(stranger: int) -> None:
    owners = along(0, 2, 3).repeat(1, 4)
    owners[:, 1] = stranger
    assert fit(owners, [3, 4], 3) == BATCH_FIRST


def test_a_guess_is_taken_where_all_else_is_shared() -> None:
    assert fit(along(0, 2, 3) + GUESS, [3, 4], 3) == BATCH_FIRST


def test_a_guess_is_not_taken_beside_what_nobody_said() -> None:
    owners = (along(0, 2, 3) + GUESS).repeat(1, 2)
    owners[:, 1] = UNKNOWN
    assert fit(owners, [3, 2], 3) == UNSAID


# Other sizes.


def test_a_layout_holds_for_other_sizes() -> None:
    layout = fit(along(0, 1, 3).repeat_interleave(5), [15], 3)
    assert layout.takes(8, 2)
    assert rows(layout, 8, slots=torch.tensor([4, 6])) == [4] * 4 + [6] * 4


@pytest.mark.parametrize(
    ("layout", "size", "fits"),
    [
        (BATCH_FIRST, 3, True),
        (BATCH_FIRST, 6, False),
        (Layout(0, 1, 0), 6, True),
        (Layout(0, 1, 0), 7, False),
        (Layout(0, 0, 1), 9, True),
        (Layout(0, 0, 1), 8, False),
        (Layout(0, 2, 2), 12, True),
        (Layout(0, 2, 2), 24, False),
        (Layout(1, 1, 2), 6, True),
        (Layout(1, 1, 2), 3, False),
    ],
    ids=str,
)
def test_a_layout_takes_the_sizes_that_it_was_found_for(layout: Layout, size: int, fits: bool) -> None:
    assert layout.takes(size, 3) is fits


@pytest.mark.parametrize("times", [2, 4])
def test_what_stays_the_same_does_not_fit_a_size_of_another_multiple(times: int) -> None:
    """Only one number may grow: twice the batch, in pairs, is not four times the batch."""
    layout = fit(along(0, 1, 3).repeat_interleave(2).repeat(2), [12], 3)
    assert not layout.takes(12 * times, 3)


# Any arrangement.


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[int, int, int, int, list[int]]:
    """The number of sequences, their dimension, `outer`, `inner`, and the sizes of the other dimensions."""
    others = draw(st.lists(st.integers(1, 4), max_size=2))
    batch, dimension = draw(st.integers(2, 5)), draw(st.integers(0, len(others)))
    return batch, dimension, draw(st.integers(1, 4)), draw(st.integers(1, 4)), others


def arranged(line: Tensor, dimension: int, others: list[int]) -> tuple[Tensor, list[int]]:
    shape = [*others[:dimension], len(line), *others[dimension:]]
    view = [len(line) if at == dimension else 1 for at in range(len(shape))]
    return line.view(view).expand(shape), shape


@thoroughly
@given(arrangements(), st.booleans())
def test_random_owners_in_a_regular_order_are_found_again(
    arrangement: tuple[int, int, int, int, list[int]], laid_out: bool
) -> None:
    batch, dimension, outer, inner, others = arrangement
    line = torch.arange(batch, dtype=torch.int32).repeat_interleave(inner).repeat(outer)
    owners, shape = arranged(line, dimension, others)
    layout = fit(owners.contiguous() if laid_out else compress(owners), shape, batch)
    assert isinstance(layout, Layout)
    assert layout.takes(shape[layout.dimension], batch)
    assert layout.rows(torch.arange(batch), shape).tolist() == owners.reshape(-1).tolist()


@thoroughly
@given(st.integers(2, 4), st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_whatever_is_found_gives_every_row_to_its_owner(batch: int, line: list[int]) -> None:
    assume(max(line) < batch)
    owners = owners_of(*line)
    for by_data in (False, True):
        layout = fit(owners, [len(line)], batch, by_data=by_data)
        if min(line) < 0:
            assert isinstance(layout, str)
        else:
            assert layout.rows(torch.arange(batch), [len(line)]).tolist() == line


@thoroughly
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(1, 3), st.integers(1, 2))
def test_random_packed_owners_are_found_again(lengths: list[int], rows_a_token: int, tokens_a_row: int) -> None:
    lengths = [length * tokens_a_row for length in lengths]
    sequences = torch.arange(len(lengths), dtype=torch.int32)
    line = sequences.repeat_interleave(torch.tensor(lengths))[::tokens_a_row].repeat_interleave(rows_a_token)
    layout = fit(line, [len(line)], len(lengths), lengths)
    if tokens_a_row == 2 and rows_a_token == 3:
        # Three rows for two tokens.
        assert isinstance(layout, Picked)
        return
    assert isinstance(layout, Layout)
    assert layout.takes(len(line), sum(lengths))
    of_tokens = sequences.repeat_interleave(torch.tensor(lengths))
    assert layout.rows(of_tokens, [len(line)]).tolist() == line.tolist()
