"""A compiled call that looks like the last one is only looked at, and is as right as the first."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
import torch
from support.frames import frames_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import BatchError, OutsideBlockError, UnprovedRowsError

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
    return filled_bank(Turning())


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
        # Guards ask who calls, and for the routing of all layers.
        looks = [
            "before",
            "out_of_sight",
            "enter",
            "_looks_of",
            "is_mine",
            "all_have_it",
            "after",
            "out_of_sight",
            "leave",
        ]
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


class State:
    """An input whose flag decides the order of rows."""

    def __init__(self, *, turned: bool) -> None:
        self.turned = turned


class Flipping(nn.Module):
    """A flag, or the mode, that decides the order of rows, and is another one when Python gets to the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.turned = False

    def forward(self, x: Tensor, state: State, breaks: bool = False) -> Tensor:
        x = self.first(x)
        turned = self.turned or state.turned or not torch.is_grad_enabled()
        if not breaks:
            return self.rest(x, turned)
        if torch.is_grad_enabled():
            self.turned, state.turned = not self.turned, not state.turned
        with torch.no_grad():
            return self.in_python(x, turned)

    def rest(self, x: Tensor, turned: bool) -> Tensor:
        lines = x.transpose(0, 1) if turned else x
        result = self.second(lines.reshape(-1, D)).view(lines.shape)
        return result.transpose(0, 1) if turned else result

    @torch.compiler.disable
    def in_python(self, x: Tensor, turned: bool) -> Tensor:
        return self.rest(x, turned)


def filled_bank(model: nn.Module) -> xlc.AdapterBank:
    # What other tests have compiled of the class counts towards a limit.
    torch.compiler.reset()
    bank = xlc.attach(model.eval().requires_grad_(False), slots=2, max_rank=2)
    bank._slots[:] = ["a", "b"]
    for layer in bank._layers.values():
        layer.lora_a.normal_()
        layer.lora_b.normal_()
    return bank


@pytest.mark.parametrize("where", ["module", "input", "mode"])
def test_what_decides_the_order_is_taken_as_it_was_when_the_call_began(where: str) -> None:
    bank = filled_bank(Flipping())
    model: Any = bank._model

    def call(run: Any, turned: bool, breaks: bool) -> Any:
        model.turned = turned and where == "module"
        with torch.set_grad_enabled(not (turned and where == "mode")):
            return run(X, State(turned=turned and where == "input"), breaks=breaks)

    run = torch.compile(model, backend="xpu_lora")
    calls = [(turned, breaks) for turned in (False, True) for breaks in (False, True)]
    want = {}
    for kind in calls:
        rows = []
        for row, name in enumerate(NAMES):
            with bank.use([name] * len(NAMES)):
                rows.append(call(model, *kind)[row])
        want[kind] = torch.stack(rows)
        with bank.use(NAMES):
            torch.testing.assert_close(call(model, *kind), want[kind], atol=1e-4, rtol=1e-4)
    for kind in calls:
        for _ in range(3):
            with bank.use(NAMES):
                torch.testing.assert_close(call(run, *kind), want[kind], atol=1e-4, rtol=1e-4)


class Debugged(Turning):
    """A flag of it, which no input shows, has its second layer be left to Python, and decides the order there."""

    def __init__(self) -> None:
        super().__init__()
        self.debug, self.how = False, ""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        turn, self.debug = self.debug, False
        return super().forward(x, turn, self.how if turn else "")


@pytest.mark.parametrize("how", ["a break", "Python"])
def test_the_first_layer_that_is_left_out_of_a_call_like_the_last_is_refused_once(how: str) -> None:
    bank = filled_bank(Debugged())
    model: Any = bank._model
    model.how = how
    run = torch.compile(model, backend="xpu_lora")

    def call(function: Any, *, debug: bool) -> Any:
        model.debug = debug
        return function(X)

    with torch.no_grad():
        want = {}
        for debug in (False, True):
            rows = []
            for row, name in enumerate(NAMES):
                with bank.use([name] * len(NAMES)):
                    rows.append(call(model, debug=debug)[row])
            want[debug] = torch.stack(rows)
            with bank.use(NAMES):
                call(model, debug=debug)
        with bank.use(NAMES):
            for _ in range(3):
                torch.testing.assert_close(call(run, debug=False), want[False], atol=1e-4, rtol=1e-4)
            with pytest.raises(UnprovedRowsError, match="Call the model again"):
                call(run, debug=True)
            for debug in (True, False, True, True):
                torch.testing.assert_close(call(run, debug=debug), want[debug], atol=1e-4, rtol=1e-4)


def test_a_layer_called_by_itself_after_it_is_refused(bank: xlc.AdapterBank) -> None:
    run, model = torch.compile(bank._model, backend="xpu_lora"), bank._model
    with torch.no_grad(), bank.use(NAMES):
        model(X)
        run(X)
        # It may be given rows in any order.
        with pytest.raises(UnprovedRowsError, match="it was not called by the model"):
            model.second(X)  # type: ignore[operator]


class Recomputed(nn.Module):
    """A part that the compiler leaves to Python, and a backward pass runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.in_python(self.first(x))

    @torch.compiler.disable
    def in_python(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)  # type: ignore[no-any-return]

    def part(self, x: Tensor) -> Tensor:
        return self.second(x.transpose(0, 1)).transpose(0, 1).sin()


def test_a_part_that_a_backward_pass_runs_again_gets_its_rows_again() -> None:
    bank = filled_bank(Recomputed())
    run = torch.compile(bank._model, backend="xpu_lora")

    def gradient(names: list[str | None], model: Any) -> Tensor:
        x = X.clone().requires_grad_()
        with bank.use(names):
            model(x).sum().backward()
        assert x.grad is not None
        return x.grad

    want = torch.stack([gradient([name] * len(NAMES), bank._model)[row] for row, name in enumerate(NAMES)])
    with torch.no_grad(), bank.use(NAMES):
        bank._model(X)
    for _ in range(3):
        torch.testing.assert_close(gradient(NAMES, run), want, atol=1e-4, rtol=1e-4)


class Waiting(Turning):
    """Its second layer is Python's, and waits until another thread has been refused."""

    def __init__(self) -> None:
        super().__init__()
        self.is_inside, self.may_go_on = threading.Event(), threading.Event()

    @torch.compiler.disable
    def in_python(self, x: Tensor) -> Tensor:
        self.is_inside.set()
        assert self.may_go_on.wait(60)
        return self.second(x)


def test_a_thread_that_is_refused_leaves_the_call_of_the_other_as_it_was() -> None:
    bank = filled_bank(Waiting())
    model: Any = bank._model
    model.may_go_on.set()
    run = torch.compile(model, backend="xpu_lora")
    with torch.no_grad():
        want = wanted(bank, turn=True, breaks="Python")
        assert_right(model, bank, want, turn=True, breaks="Python")
        assert_right(run, bank, want, turn=True, breaks="Python")
        model.is_inside.clear()
        model.may_go_on.clear()
        with bank.use(NAMES), ThreadPoolExecutor(1) as pool:
            # In the block of this thread, as `asyncio.to_thread` has it.
            first = pool.submit(copy_context().run, torch.no_grad()(run), X, turn=True, breaks="Python")
            assert model.is_inside.wait(60)
            with pytest.raises(OutsideBlockError, match="another thread runs the model"):
                run(X)
            model.may_go_on.set()
            torch.testing.assert_close(first.result(60), want, atol=1e-4, rtol=1e-4)
