"""A `use` block belongs to one thread or task, which runs the backward pass in it, and says whose the rows are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.errors import BatchError, OutsideBlockError, UnprovedRowsError, own_error

EXECUTIONS = pytest.mark.parametrize("execution", ["eager", "compiled"])
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def loaded(model: nn.Module, folder: Path, **options: Any) -> xlc.AdapterBank:
    """A bank with the adapters "a" and "b", whose weights are random."""
    bank = xlc.attach(model, max_rank=2, **options)
    for seed, name in enumerate("ab"):
        (folder / name).mkdir()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            write_adapter(folder / name, bank.sites, 2)
        bank.load(name, folder / name)
    return bank


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)))


@pytest.fixture
def bank(model: nn.Module, tmp_path: Path) -> Iterator[xlc.AdapterBank]:
    bank = loaded(model, tmp_path)
    yield bank
    # Whatever a test has done, the bank serves as before.
    assert not bank._blocks
    assert_serves(model, bank)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def answers(model: nn.Module, bank: xlc.AdapterBank, x: Tensor = X) -> dict[str | None, Tensor]:
    """What all rows are with each adapter."""
    found = {None: model(x)}
    for name in "ab":
        with bank.use([name] * len(x)):
            found[name] = model(x)
    return found


def assert_serves(model: nn.Module, bank: xlc.AdapterBank) -> None:
    wanted = answers(model, bank)
    assert not torch.allclose(wanted["a"], wanted["b"], atol=1e-2)
    with bank.use(["b", "a"]):
        got = model(X)
    torch.testing.assert_close(got, torch.stack([wanted["b"][0], wanted["a"][1]]))


def compiled_or_not(model: nn.Module, execution: str) -> Callable[..., Tensor]:
    return torch.compile(model, backend="eager") if execution == "compiled" else model


def error_of(call: Callable[[], object]) -> BaseException | None:
    """Our own error, also where Dynamo has wrapped it."""
    try:
        call()
    except BaseException as error:
        return own_error(error) or error
    return None


def in_a_thread(call: Callable[[], Any]) -> Any:
    """The result of a call, or its error, from a thread of its own."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(own_error(error) or error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def is_outside(error: object) -> bool:
    """Whether it is an OutsideBlockError, or Dynamo's with the text of one."""
    return isinstance(error, OutsideBlockError) or (
        isinstance(error, Exception) and "a call from the thread or task that opened the `use` block" in str(error)
    )


# Threads and tasks.


@EXECUTIONS
def test_a_thread_without_a_block_cannot_call_the_model_during_anothers(
    model: nn.Module, bank: xlc.AdapterBank, execution: str
) -> None:
    run = compiled_or_not(model, execution)
    with bank.use(["a", None]):
        assert is_outside(in_a_thread(lambda: run(X)))
        assert is_outside(in_a_thread(lambda: run(X)))


def test_the_error_that_dynamo_raises_for_it_leads_to_ours(model: nn.Module, bank: xlc.AdapterBank) -> None:
    run = torch.compile(model, backend="eager")
    with bank.use(["a", None]):
        assert isinstance(in_a_thread(lambda: run(X)), OutsideBlockError)


@EXECUTIONS
def test_a_thread_without_a_block_cannot_call_what_the_block_has_compiled(
    model: nn.Module, bank: xlc.AdapterBank, execution: str
) -> None:
    run = compiled_or_not(model, execution)
    with bank.use(["a", None]):
        before = run(X)
        assert is_outside(in_a_thread(lambda: run(X)))
        assert torch.equal(run(X), before)


@EXECUTIONS
def test_a_block_of_the_base_model_is_not_open_to_others_either(
    model: nn.Module, bank: xlc.AdapterBank, execution: str
) -> None:
    run = compiled_or_not(model, execution)
    with bank.use([None, None]):
        assert is_outside(in_a_thread(lambda: run(X)))


@EXECUTIONS
def test_after_the_block_a_thread_gets_the_base_model(model: nn.Module, bank: xlc.AdapterBank, execution: str) -> None:
    run = compiled_or_not(model, execution)
    base = run(X)
    with bank.use(["a", None]):
        run(X)
        in_a_thread(lambda: run(X))
    assert torch.equal(in_a_thread(lambda: run(X)), base)
    assert torch.equal(run(X), base)


@EXECUTIONS
def test_a_task_without_a_block_cannot_call_the_model_during_anothers(
    model: nn.Module, bank: xlc.AdapterBank, execution: str
) -> None:
    run = compiled_or_not(model, execution)
    base = run(X)

    async def with_block(opened: asyncio.Event, done: asyncio.Event) -> Tensor:
        with bank.use(["a", "b"]):
            opened.set()
            await done.wait()
            return run(X)

    async def without(opened: asyncio.Event, done: asyncio.Event) -> Any:
        await opened.wait()
        error = error_of(lambda: run(X))
        done.set()
        return error

    async def both() -> list[Any]:
        events = asyncio.Event(), asyncio.Event()
        results = await asyncio.gather(with_block(*events), without(*events))
        return [*results, run(X)]

    served, error, after = asyncio.run(both())
    assert is_outside(error)
    wanted = answers(model, bank)
    torch.testing.assert_close(served, torch.stack([wanted["a"][0], wanted["b"][1]]))
    assert torch.equal(after, base)


@EXECUTIONS
def test_a_thread_with_the_blocks_own_context_may_call_the_model(
    model: nn.Module, bank: xlc.AdapterBank, execution: str
) -> None:
    """`asyncio.to_thread` runs in the context of its task."""
    run = compiled_or_not(model, execution)

    async def serve() -> Tensor:
        with bank.use(["a", "b"]):
            return await asyncio.to_thread(run, X)

    wanted = answers(model, bank)
    torch.testing.assert_close(asyncio.run(serve()), torch.stack([wanted["a"][0], wanted["b"][1]]))


# Interruptions.


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(x)


@pytest.mark.parametrize("followed", [False, True], ids=["first-call", "later-call"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_an_interrupted_call_leaves_a_bank_that_works(
    error: type[BaseException], followed: bool, tmp_path: Path
) -> None:
    model = seeded(Failing)
    bank = loaded(model, tmp_path)
    with bank.use(["a", None]):
        if followed:
            model(X)
        model.error = error()
        with pytest.raises(error):
            model(X)
        model.error = None
        within = model(X)
    assert not torch.overrides._get_current_function_mode_stack()
    with bank.use(["a", None]):
        assert torch.equal(model(X), within)
    assert_serves(model, bank)


class Turning(Failing):
    """Its second layer gets the rows of a sequence one after another, or those of a time."""

    def forward(self, x: Tensor, by_time: bool = False) -> Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        x = x.transpose(0, 1) if by_time else x
        y = self.second(x.reshape(-1, 4)).view(x.shape)
        return y.transpose(0, 1) if by_time else y


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_call_after_an_interrupted_one_has_rows_of_its_own(error: type[BaseException], tmp_path: Path) -> None:
    model = seeded(Turning)
    bank = loaded(model, tmp_path)
    inputs = torch.randn(2, 3, 4)
    with bank.use(["a", None]):
        wanted = model(inputs, by_time=True)
        model(inputs)
        model.error = error()
        with pytest.raises(error):
            model(inputs)
        model.error = None
        torch.testing.assert_close(model(inputs, by_time=True), wanted)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_block_that_an_error_ends_is_closed(error: type[BaseException], tmp_path: Path) -> None:
    model = seeded(Failing)
    bank = loaded(model, tmp_path)
    base = model(X)
    model.error = error()
    with pytest.raises(error), bank.use(["a", "b"]):
        model(X)
    model.error = None
    assert torch.equal(model(X), base)
    assert_serves(model, bank)


# Nesting.


@EXECUTIONS
def test_the_inner_block_counts_and_the_outer_one_comes_back(
    model: nn.Module, bank: xlc.AdapterBank, execution: str
) -> None:
    run = compiled_or_not(model, execution)
    wanted = answers(model, bank)
    with bank.use(["a", None]):
        for names in (["b", "a"], ["b", "b"], [None, None]):
            with bank.use(names):
                got = run(X)
            torch.testing.assert_close(got, torch.stack([wanted[name][row] for row, name in enumerate(names)]))
        torch.testing.assert_close(run(X), torch.stack([wanted["a"][0], wanted[None][1]]))
    assert torch.equal(run(X), wanted[None])


def test_a_thread_cannot_open_a_block_in_anothers(model: nn.Module, bank: xlc.AdapterBank) -> None:
    with bank.use(["a", None]):
        assert "another thread or task" in str(in_a_thread(lambda: bank.use(["a"]).__enter__()))


# Backward passes.


def gradient_through(model: nn.Module, reentrant: bool) -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    return x, checkpoint(model, x, use_reentrant=reentrant).sum()


@REENTRANT
def test_backward_inside_the_block_is_right(model: nn.Module, bank: xlc.AdapterBank, reentrant: bool) -> None:
    plain = X.clone().requires_grad_()
    with bank.use(["a", "b"]):
        model(plain).sum().backward()
        x, loss = gradient_through(model, reentrant)
        loss.backward()
    torch.testing.assert_close(x.grad, plain.grad)


@REENTRANT
def test_backward_after_the_block_is_an_error(model: nn.Module, bank: xlc.AdapterBank, reentrant: bool) -> None:
    with bank.use(["a", "b"]):
        _, loss = gradient_through(model, reentrant)
    with pytest.raises(OutsideBlockError, match=r"Call backward\(\) before the block ends"):
        loss.backward()


@REENTRANT
def test_backward_in_another_block_is_an_error(model: nn.Module, bank: xlc.AdapterBank, reentrant: bool) -> None:
    with bank.use(["a", "b"]):
        _, loss = gradient_through(model, reentrant)
    with bank.use(["b", "a"]), pytest.raises(OutsideBlockError):
        loss.backward()


@REENTRANT
def test_the_losses_of_two_blocks_cannot_go_backward_together(
    model: nn.Module, bank: xlc.AdapterBank, reentrant: bool
) -> None:
    with bank.use(["a", "b"]):
        _, first = gradient_through(model, reentrant)
    with bank.use(["b", "a"]):
        _, second = gradient_through(model, reentrant)
        with pytest.raises(OutsideBlockError):
            (first + second).backward()


@REENTRANT
def test_two_losses_of_one_block_go_backward_together(model: nn.Module, bank: xlc.AdapterBank, reentrant: bool) -> None:
    plain = X.clone().requires_grad_()
    with bank.use(["a", "b"]):
        (2 * model(plain).sum()).backward()
        x, first = gradient_through(model, reentrant)
        y, second = gradient_through(model, reentrant)
        (first + second).backward()
    torch.testing.assert_close(x.grad + y.grad, plain.grad)


@REENTRANT
def test_training_of_the_base_model_after_a_block_is_no_error(
    model: nn.Module, bank: xlc.AdapterBank, reentrant: bool
) -> None:
    with bank.use(["a", "b"]):
        model(X)
    x, loss = gradient_through(model, reentrant)
    loss.backward()
    plain = X.clone().requires_grad_()
    model(plain).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_backward_without_a_checkpoint_may_follow_the_block(model: nn.Module, bank: xlc.AdapterBank) -> None:
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with bank.use(["a", "b"]):
        model(x).sum().backward()
        loss = model(y).sum()
    loss.backward()
    torch.testing.assert_close(y.grad, x.grad)


# Models that mix sequences, and models whose rows cannot be told.


class AttendsAcross(nn.Module):
    """Attention that wants the time first, and is given the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Statistics(nn.Module):
    """A layer that looks at all sequences together, beside what becomes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.statistics = self.layer(x.mean(0))
        return x


class Reversed(nn.Module):
    """Rows in an order that is no layout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flip(0)).flip(0)


class Images(nn.Module):
    """An input that is not one a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        return self.head(x) + self.tower(images).mean()


@EXECUTIONS
@pytest.mark.parametrize("length", [3, 5], ids=["as-many-tokens-as-sequences", "more-tokens"])
def test_sequences_that_attend_to_each_other_are_refused(length: int, execution: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = seeded(AttendsAcross)
    bank = loaded(model, tmp_path, target_modules=["linear1", "linear2"])
    run = compiled_or_not(model, execution)
    with bank.use(["a", None, "b"]):
        assert isinstance(error_of(lambda: run(torch.randn(3, length, 8))), UnprovedRowsError)


@pytest.mark.parametrize("length", [3, 5], ids=["as-many-tokens-as-sequences", "more-tokens"])
def test_their_advice_makes_them_right(length: int, tmp_path: Path) -> None:
    """`batch_first=True`, for one."""
    x = torch.randn(3, length, 8)
    model = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True))
    bank = loaded(model, tmp_path, target_modules=["linear1", "linear2"])
    wanted = answers(model, bank, x)
    with bank.use(["a", None, "b"]):
        got = model(x)
    for row, name in enumerate(["a", None, "b"]):
        torch.testing.assert_close(got[row], wanted[name][row], atol=1e-5, rtol=1e-5)


CANNOT_BE_TOLD = [
    pytest.param(Reversed, (torch.randn(3, 2, 8),), id="reversed"),
    pytest.param(Images, (torch.randn(3, 2, 8), torch.randn(5, 8)), id="images"),
    pytest.param(AttendsAcross, (torch.randn(3, 3, 8),), id="attends-across"),
]


@EXECUTIONS
@pytest.mark.parametrize(("kind", "inputs"), CANNOT_BE_TOLD)
def test_the_base_model_alone_runs_on_any_model(
    kind: type[nn.Module], inputs: tuple[Tensor, ...], execution: str, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    model = seeded(kind)
    bank = loaded(model, tmp_path, exclude_modules=["out_proj"])
    base = model(*inputs)
    run = compiled_or_not(model, execution)
    with bank.use([None] * 3):
        torch.testing.assert_close(run(*inputs), base, atol=1e-6, rtol=1e-5)


@EXECUTIONS
@pytest.mark.parametrize(("kind", "inputs"), CANNOT_BE_TOLD)
def test_one_adapter_for_all_runs_where_rows_cannot_be_told(
    kind: type[nn.Module], inputs: tuple[Tensor, ...], execution: str, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    model = seeded(kind)
    bank = loaded(model, tmp_path, exclude_modules=["out_proj"])
    base = model(*inputs)
    run = compiled_or_not(model, execution)
    results = {}
    for name in ("a", "b", "a"):
        with bank.use([name] * 3):
            results[name] = run(*inputs)
    for layer in bank._layers.values():
        layer.lora_b[1] = layer.lora_b[0]
        layer.lora_a[1] = layer.lora_a[0]
    with bank.use(["b"] * 3):
        torch.testing.assert_close(run(*inputs), results["a"])
    assert not torch.allclose(results["a"], results["b"], atol=1e-2)
    assert not torch.allclose(results["a"], base, atol=1e-2)


@EXECUTIONS
def test_different_adapters_after_one_for_all_are_refused_there(execution: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = seeded(AttendsAcross)
    bank = loaded(model, tmp_path, exclude_modules=["out_proj"])
    run = compiled_or_not(model, execution)
    x = torch.randn(3, 3, 8)
    with bank.use(["a"] * 3):
        run(x)
    with bank.use(["a", "b", None]):
        assert isinstance(error_of(lambda: run(x)), UnprovedRowsError)


# Batches that do not fit, and what the errors advise.


@EXECUTIONS
@pytest.mark.parametrize("names", [["a"], ["a", "b", None], ["a"] * 4], ids=str)
def test_a_wrong_number_of_names_is_a_batch_error(
    model: nn.Module, bank: xlc.AdapterBank, names: list[str | None], execution: str
) -> None:
    run = compiled_or_not(model, execution)
    with bank.use(names):
        error = error_of(lambda: run(X))
    assert isinstance(error, BatchError)
    assert f"{'1 name' if len(names) == 1 else f'{len(names)} names'} for a batch of 2" in str(error)
    assert "for every sequence" in str(error)


@EXECUTIONS
def test_a_wrong_number_of_names_after_a_right_one_is_a_batch_error(
    model: nn.Module, bank: xlc.AdapterBank, execution: str
) -> None:
    run = compiled_or_not(model, execution)
    with bank.use(["a", "b"]):
        run(X)
    with bank.use(["a", "b", None]):
        assert isinstance(error_of(lambda: run(X)), BatchError)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, images: Tensor | None = None) -> Tensor:
        x = self.head(x)
        return x if images is None else x + self.tower(images).sum()


@pytest.mark.parametrize(
    "lengths",
    [[2], [1, 2, 3], [0, 5], [-1, 6], [2.0, 3.0], "23", 5, [True, 4]],
    ids=str,
)
def test_lengths_that_do_not_fit_the_names_are_a_batch_error(
    model: nn.Module, bank: xlc.AdapterBank, lengths: object
) -> None:
    with (
        pytest.raises(BatchError, match="2 numbers of tokens, one for each name, of at least 1"),
        bank.use(["a", "b"], lengths=lengths),
    ):
        pass


@EXECUTIONS
def test_lengths_of_another_sum_are_a_batch_error(tmp_path: Path, execution: str) -> None:
    torch._dynamo.reset()
    model = seeded(Packed)
    bank = loaded(model, tmp_path)
    run = compiled_or_not(model, execution)
    with bank.use(["a", "b"], lengths=[2, 4]):
        error = error_of(lambda: run(torch.randn(1, 5, 4)))
    assert isinstance(error, BatchError)


@EXECUTIONS
@pytest.mark.parametrize("lengths", [[2, 3], (2, 3), torch.tensor([2, 3])], ids=["list", "tuple", "tensor"])
def test_lengths_give_each_token_its_adapter(tmp_path: Path, lengths: Any, execution: str) -> None:
    torch._dynamo.reset()
    model = seeded(Packed)
    bank = loaded(model, tmp_path)
    run = compiled_or_not(model, execution)
    x = torch.randn(1, 5, 4)
    wanted = {}
    for name in ("a", "b"):
        with bank.use([name]):
            wanted[name] = model(x)[0]
    with bank.use(["a", "b"], lengths=lengths):
        got = run(x)[0]
    torch.testing.assert_close(got, torch.cat([wanted["a"][:2], wanted["b"][2:]]))


def test_leaving_out_sequences_without_tokens_works_as_advised(tmp_path: Path) -> None:
    model = seeded(Packed)
    bank = loaded(model, tmp_path)
    with (
        pytest.raises(BatchError, match="leave out a name without tokens"),
        bank.use(["a", None, "b"], lengths=[2, 0, 3]),
    ):
        pass
    with bank.use(["a", "b"], lengths=[2, 3]):
        model(torch.randn(1, 5, 4))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["tower"], "a mapping from names of modules"),
        ({0: ["a"]}, "a mapping from names of modules"),
        ({"": ["a"]}, "a mapping from names of modules"),
        ({"nowhere": ["a"]}, r"parts\['nowhere'\]: .*one that no module has. See model.named_modules"),
        ({"tower": "a"}, r"parts\['tower'\]: .*a list with a name, or None, for each sequence"),
        ({"tower": []}, r"parts\['tower'\]: .*a list with a name"),
        ({"tower": (["a"], [2, 3])}, r"parts\['tower'\]: lengths"),
        ({"0": ["a"]}, r"Pass the whole name: one\.0, two\.0"),
    ],
    ids=["list", "number", "whole-model", "nowhere", "string", "empty", "lengths", "ambiguous"],
)
def test_parts_that_are_wrong_are_a_batch_error(parts: Any, message: str, tmp_path: Path) -> None:
    model = seeded(Packed)
    model.one, model.two = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    bank = loaded(model, tmp_path)
    with pytest.raises(BatchError, match=message), bank.use(["a", "b"], parts=parts):
        pass
    assert not bank._blocks
    with bank.use(["a", "b"], parts={"one.0": ["a"], "tower": (["b", "a"], [1, 2])}):
        pass


def test_naming_a_part_works_as_advised(tmp_path: Path) -> None:
    model = seeded(Images)
    bank = loaded(model, tmp_path)
    x, images = torch.randn(2, 3, 8), torch.randn(5, 8)
    with bank.use(["a", "b"]), pytest.raises(UnprovedRowsError, match=r"parts=\{'tower': names_of_its_rows\}"):
        model(x, images)
    names = ["a", "a", "b", None, "b"]
    outputs = []
    model.tower.register_forward_hook(lambda _, __, output: outputs.append(output))
    for part in (names, *([name] * 5 for name in ("a", "b", None))):
        with bank.use(["a", "b"], parts={"tower": part}):
            model(x, images)
    mixed, wanted = outputs[0], dict(zip(["a", "b", None], outputs[1:], strict=True))
    torch.testing.assert_close(mixed, torch.stack([wanted[name][row] for row, name in enumerate(names)]))


def test_leaving_the_module_out_works_as_advised(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(Statistics(), nn.Linear(8, 8)))
    bank = loaded(model, tmp_path)
    x = torch.randn(2, 3, 8)
    with bank.use(["a", "b"]), pytest.raises(UnprovedRowsError, match="Leave the module out with exclude_modules"):
        model(x)
    bank.detach()
    (tmp_path / "again").mkdir()
    bank = loaded(model, tmp_path / "again", exclude_modules=["0.layer"])
    with bank.use(["a", "b"]):
        model(x)


# An exported program has no guards: it serves blocks of all names, whichever block it was exported in.


@pytest.mark.parametrize("names", [["a", "a"], ["a", None]], ids=["one-adapter", "two"])
def test_a_program_that_torch_exports_serves_other_names(
    model: nn.Module, bank: xlc.AdapterBank, names: list[str | None]
) -> None:
    with (
        bank.use(names),
        pytest.raises(UnprovedRowsError, match=r"torch\.export does not follow .* before torch\.export"),
    ):
        torch.export.export(model, (X,), strict=False)
    with bank.use(["a", None]):
        model(X)
    with bank.use(names):
        program = torch.export.export(model, (X,), strict=False)
    xlc.rewrite(program)
    with bank.use([None, "b"]), torch.no_grad():
        torch.testing.assert_close(program.module()(X), model(X))


class Sorted(nn.Sequential):
    """The order of the sequences depends on their values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[x.sum(1).argsort()])


@pytest.mark.parametrize("strict", [False, True])
def test_rows_in_an_unknown_order_are_not_exported_with_one_adapter_for_all(strict: bool, tmp_path: Path) -> None:
    model = seeded(lambda: Sorted(nn.Linear(4, 4)))
    with loaded(model, tmp_path).use(["a", "a"]), pytest.raises(Exception, match="rows that are known") as failure:
        torch.export.export(model, (X,), strict=strict)
    assert isinstance(own_error(failure.value), UnprovedRowsError)
