"""A compiled call that looks like the last one is only looked at, and is as right as the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.frames import frames_of
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import BatchError

D = 4
NAMES = ["a", None, "b"]

# Whether the next call is to fail.
FAILS: list[bool] = []


@torch.library.custom_op("xpu_lora_tests::fail_if_asked", mutates_args=())
def fail_if_asked(x: Tensor) -> Tensor:
    if FAILS:
        FAILS.clear()
        raise ValueError("it was asked to fail")
    return x.clone()


@fail_if_asked.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Turning(nn.Module):
    """Two layers; the second may get the tokens of all sequences in turn, and be behind a break of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, turn: bool = False, breaks: str = "") -> Tensor:
        x = self.first(x)
        if breaks == "a break":
            torch._dynamo.graph_break()
        second = self.in_python if breaks == "Python" else self.second
        result = second(x.transpose(0, 1)).transpose(0, 1) if turn else second(x)
        return fail_if_asked(result)

    @torch.compiler.disable
    def in_python(self, x: Tensor) -> Tensor:
        return self.second(x)


@pytest.fixture
def bank() -> xlc.AdapterBank:
    # What other tests have compiled of the class counts towards a limit.
    torch.compiler.reset()
    bank = xlc.attach(Turning().eval().requires_grad_(False), slots=2, max_rank=2)
    bank._slots[:] = ["a", "b"]
    for layer in bank._layers.values():
        layer.lora_a.normal_()
        layer.lora_b.normal_()
    return bank


X = torch.randn(len(NAMES), 2, D)


def wanted(bank: xlc.AdapterBank, **options: Any) -> Tensor:
    """Each row as it is where all sequences have its adapter."""
    rows = []
    for row, name in enumerate(NAMES):
        with bank.use([name] * len(NAMES)):
            rows.append(bank._model(X, **options)[row])
    return torch.stack(rows)


def assert_right(run: Any, bank: xlc.AdapterBank, want: Tensor, **options: Any) -> None:
    """In two calls of a block, and in the first of another."""
    for calls in (2, 1):
        with bank.use(NAMES):
            for _ in range(calls):
                torch.testing.assert_close(run(X, **options), want, atol=1e-4, rtol=1e-4)


def test_it_costs_a_few_frames(bank: xlc.AdapterBank) -> None:
    x, run = torch.randn(len(NAMES), 2, D), torch.compile(bank._model, backend="xpu_lora", fullgraph=True)
    with torch.no_grad(), bank.use(NAMES):
        run(x)
        # Twice it is asked who calls: by the hook, and by a guard.
        looks = ["before", "out_of_sight", "enter", "is_mine", "_looks_of", "is_mine", "after", "out_of_sight", "leave"]
        assert frames_of(lambda: run(x)) == looks
    with torch.no_grad(), bank.use(NAMES[::-1]):
        assert frames_of(lambda: run(x)) == looks


def test_a_batch_of_another_size_after_it_is_refused(bank: xlc.AdapterBank) -> None:
    run = torch.compile(bank._model, backend="xpu_lora")
    with torch.no_grad():
        want = wanted(bank)
        assert_right(run, bank, want)
        for names, rows in ((NAMES, 2), (NAMES[:2], 3)):
            with bank.use(names), pytest.raises(BatchError, match=f"{len(names)} names for a batch of {rows}"):
                run(torch.randn(rows, 2, D))
            assert_right(run, bank, want)


@pytest.mark.parametrize("breaks", ["a break", "Python"])
def test_a_layer_left_out_of_the_graph_after_it_gets_its_own_rows(breaks: str, bank: xlc.AdapterBank) -> None:
    run = torch.compile(bank._model, backend="xpu_lora")
    calls = [(turn, how) for turn in (False, True) for how in ("", breaks)]
    with torch.no_grad():
        want = {call: wanted(bank, turn=call[0], breaks=call[1]) for call in calls}
        for turn in (False, True):
            assert_right(bank._model, bank, want[turn, breaks], turn=turn, breaks=breaks)
        # Calls of which the compiler leaves nothing out go before and between; the second time all is compiled.
        for stance in ("default", "fail_on_recompile"):
            for first in calls[::2]:
                for second in calls[1::2]:
                    bank._routing._asks.clear()
                    for turn, how in (first, second, first):
                        with torch.compiler.set_stance(stance):
                            assert_right(run, bank, want[turn, how], turn=turn, breaks=how)


def test_a_call_that_fails_leaves_nothing_behind(bank: xlc.AdapterBank) -> None:
    run = torch.compile(bank._model, backend="xpu_lora")
    with torch.no_grad():
        want = wanted(bank)
        assert_right(run, bank, want)
        FAILS.append(True)
        with bank.use(NAMES), pytest.raises(ValueError, match="asked to fail"):
            run(X)
        assert_right(run, bank, want)
