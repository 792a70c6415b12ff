"""Random operands: the same each time, with every kind of row, and with what a wrong kernel stumbles over."""

from __future__ import annotations

import torch

from xpu_lora_compile.inspect.operands import RandomOperands, every_kind_of_index, poison_unused_slots


def test_the_same_seed_draws_the_same_numbers_in_every_dtype() -> None:
    first, second = RandomOperands(3).normal(4, 5), RandomOperands(3).normal(4, 5, dtype=torch.bfloat16, scale=0.5)
    assert torch.equal(second, (first / 2).to(torch.bfloat16))
    assert not torch.equal(first, RandomOperands(4).normal(4, 5))


def test_stacks_are_zero_beyond_the_rank_of_each_slot_alone() -> None:
    a, b_by_rank = RandomOperands(0).stacks(7, (8, 5), (3, 1), torch.float32)
    assert [list(stack.shape) for stack in a + b_by_rank] == [[2, 3, 7], [2, 3, 7], [2, 3, 8], [2, 3, 5]]
    for stack in a + b_by_rank:
        assert (stack != 0).any(-1).tolist() == [[True, True, True], [True, False, False]]


def test_some_rows_have_no_adapter_but_the_first_has_one() -> None:
    for seed in range(20):
        indices = RandomOperands(seed).indices(100, 4)
        assert indices[0] >= 0
        assert set(indices.tolist()) == {-1, 0, 1, 2, 3}
        assert 1 <= (indices < 0).sum() <= 30


def test_indices_are_of_every_kind() -> None:
    assert every_kind_of_index(3, 4) == (3, -1, 0)
    assert set(every_kind_of_index(9, 4, torch.int32)) == {0, 2, 3, -1, 4, 5, 2**31 - 1, -(2**31)}


def test_slots_that_no_row_uses_are_nan_and_the_others_stay() -> None:
    stack = torch.ones(4, 2, 3)
    poison_unused_slots(stack, (2, -1, 0, 7))
    assert stack.isnan().all(-1).all(-1).tolist() == [False, True, False, True]
    assert (stack[[0, 2]] == 1).all()
