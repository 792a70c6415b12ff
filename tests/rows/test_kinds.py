"""What one call has shown holds for calls of its kind, and for no others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import AttachError, BatchError, UnprovedRowsError

D = 4
NAMES = ["a", None, "c"]


def attached(model: nn.Module) -> xlc.AdapterBank:
    """A bank with adapters of random weights."""
    bank = xlc.attach(model.eval().requires_grad_(False), slots=3, max_rank=2)
    bank._slots[:] = ["a", "b", "c"]
    for layer in bank._layers.values():
        layer.lora_a.normal_()
        layer.lora_b.normal_()
    return bank


def assert_right_or_refused(
    run: Callable[[], Tensor], bank: xlc.AdapterBank, names: list[str | None], **use: Any
) -> bool:
    """Each row is what it is where all have its adapter, or the call is refused; returns whether it was right."""
    try:
        with bank.use(names, **use):
            got = run()
    except UnprovedRowsError:
        return False
    for row, name in enumerate(names):
        with bank.use([name] * len(names), **use):
            torch.testing.assert_close(got[row], run()[row], atol=1e-4, rtol=1e-4)
    return True


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)

    def turned(self, x: Tensor, turn: bool) -> Tensor:
        """The layer on the sequences as they come, or the last one first."""
        return self.lin(x.flip(0)).flip(0) if turn else self.lin(x)


class Unpads(OneLayer):
    """As models for flash attention do it."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        if attention_mask.all():
            return self.lin(flat).view(x.shape)
        places = attention_mask.flatten().nonzero().flatten()
        return torch.zeros_like(flat).index_copy(0, places, self.lin(flat[places])).view(x.shape)


class SortsByLength(OneLayer):
    """As before `pack_padded_sequence`."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = attention_mask.sum(1)
        if bool((lengths[1:] <= lengths[:-1]).all()):
            return self.lin(x)
        order = lengths.argsort(descending=True)
        return self.lin(x[order])[order.argsort()]


FULL = torch.ones(2, 4, dtype=torch.bool)
PADDED = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])


@pytest.mark.parametrize(
    ("kind", "masks"),
    [(Unpads, [FULL, PADDED]), (SortsByLength, [FULL, PADDED, PADDED.flip(0)])],
    ids=["unpads", "sorts"],
)
def test_a_mask_that_code_looks_at_is_part_of_the_kind(kind: type[OneLayer], masks: list[Tensor]) -> None:
    model, x = kind(), torch.randn(2, 4, D)
    bank = attached(model)
    right = [assert_right_or_refused(lambda mask=mask: model(x, mask), bank, ["a", "b"]) for mask in masks]
    assert all(right)
    # Followed again, and remembered.
    for _ in range(2):
        assert assert_right_or_refused(lambda: model(x, masks[0]), bank, ["b", None])
    assert bank._routing._watch is None
    assert bank._routing._proofs


LOOKS: dict[str, Callable[[Tensor], bool]] = {
    "equal": lambda t: torch.equal(t, t.abs()),
    "allclose": lambda t: torch.allclose(t, t.abs()),
    "how many": lambda t: len(t[t > 0]) == len(t),
    "nonzero": lambda t: t.gt(0).nonzero().numel() == len(t),
    "unique": lambda t: len(t.gt(0).unique()) == 1 and bool(t[0] > 0),
    "repeat": lambda t: len(t.repeat_interleave(t.gt(0).long())) == len(t),
    "text": lambda t: "-" not in repr(t),
    "dlpack": lambda t: bool((torch.from_dlpack(t.contiguous()).clone().numpy() > 0).all()),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_model_that_looks_at_values_is_followed_each_time(look: str) -> None:
    class Looks(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.turned(x, LOOKS[look](x[:, 0, 0]))

    model = Looks()
    bank = attached(model)
    negative = -torch.rand(3, 2, D) - 0.1
    assert assert_right_or_refused(lambda: model(negative), bank, NAMES)
    assert assert_right_or_refused(lambda: model(-negative), bank, NAMES)


class Order(Enum):
    AS_IT_IS = 1
    TURNED = 2


class Options:
    def __init__(self, *, turned: bool) -> None:
        self.turned = turned


OPTIONS: dict[str, tuple[Any, Any]] = {
    "enum": (Order.AS_IT_IS, Order.TURNED),
    "object": (Options(turned=False), Options(turned=True)),
    "slice": (slice(0), slice(1)),
    "set": ({0}, {1}),
    "range": (range(1), range(2)),
    "bytes": (b"0", b"1"),
    "nested": ([[[[[0]]]]], [[[[[1]]]]]),
    "function": (abs, round),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_inputs_that_are_no_tensors_are_part_of_the_kind(name: str) -> None:
    plain, other = OPTIONS[name]

    def is_other(option: Any) -> bool:
        return option.turned if isinstance(option, Options) else option == other

    class Told(OneLayer):
        def forward(self, x: Tensor, option: Any) -> Tensor:
            return self.turned(x, is_other(option))

    model, x = Told(), torch.randn(3, 5, D)
    bank = attached(model)
    assert assert_right_or_refused(lambda: model(x, plain), bank, NAMES)
    assert assert_right_or_refused(lambda: model(x, other), bank, NAMES)


def test_after_a_call_of_the_model_a_layer_alone_is_refused_as_before_it() -> None:
    class TimeFirst(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.transpose(0, 1)).transpose(0, 1)

    model, x = TimeFirst(), torch.randn(3, 3, D)
    bank = attached(model)
    with bank.use(NAMES):
        model(x)
        for direct in (lambda: model.lin(x), lambda: model.forward(x)):
            with pytest.raises(UnprovedRowsError, match="it was not called by the model"):
                direct()


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_tokens_that_become_one_row_belong_to_one_sequence(execution: str) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.merge = nn.Linear(2 * D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.merge(x.reshape(1, -1, 2 * D))

    model, x = Pairs(), torch.randn(1, 8, D)
    bank = attached(model)
    torch._dynamo.reset()
    run = model if execution == "eager" else torch.compile(model, backend="eager")
    for lengths in ([4, 4], [2, 6]):
        with bank.use(["a", "b"], lengths=lengths):
            got = run(x)[0].split([length // 2 for length in lengths])
        for at, name in enumerate(("a", "b")):
            with bank.use([name] * 2, lengths=lengths):
                alone = run(x)[0].split([length // 2 for length in lengths])
            torch.testing.assert_close(got[at], alone[at])
    with bank.use(["a", "b"], lengths=[3, 5]), pytest.raises(UnprovedRowsError):
        run(x)


def test_lengths_are_those_of_one_row() -> None:
    class Plain(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)

    model = Plain()
    bank = attached(model)
    with bank.use(["a", "b"], lengths=[1, 2]), pytest.raises(BatchError, match="Pass the lengths"):
        model(torch.randn(3, 5, D))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lin = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, *, turned: bool = False) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.lin(x.flip(0)).flip(0) if turned else self.lin(x)


def test_behind_a_break_of_the_graph_only_calls_that_an_eager_call_has_shown_run() -> None:
    torch._dynamo.reset()
    model, x = Broken(), torch.randn(3, 5, D)
    bank = attached(model)
    compiled = torch.compile(model, backend="eager")
    assert not assert_right_or_refused(lambda: compiled(x), bank, NAMES)
    assert assert_right_or_refused(lambda: model(x), bank, NAMES)
    for _ in range(2):
        assert assert_right_or_refused(lambda: compiled(x), bank, NAMES)
        assert not assert_right_or_refused(lambda: compiled(x, turned=True), bank, NAMES)
    # Other sizes are the same to it.
    longer = torch.randn(3, 7, D)
    assert assert_right_or_refused(lambda: compiled(longer), bank, NAMES)


def test_an_eager_call_before_the_model_is_given_to_the_compiler_shows_it_too() -> None:
    torch._dynamo.reset()
    model, x = Broken(), torch.randn(3, 5, D)
    bank = attached(model)
    assert assert_right_or_refused(lambda: model(x), bank, NAMES)
    compiled = torch.compile(model, backend="eager")
    assert assert_right_or_refused(lambda: compiled(x), bank, NAMES)


class Checkpointed(nn.Module):
    """A layer behind a checkpoint, which changes the order of the tokens or that of the sequences."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.first, self.lin, self.dimension = nn.Linear(D, D), nn.Linear(D, D), dimension

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda rows: self.first(rows).flip(self.dimension), x, use_reentrant=False)
        return self.lin(x).flip(self.dimension)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dimension", "is_right"), [(1, True), (0, False)])
def test_rows_are_followed_through_a_checkpoint_of_a_compiled_graph(dimension: int, is_right: bool) -> None:
    torch._dynamo.reset()
    model, x = Checkpointed(dimension), torch.randn(3, 5, D)
    bank = attached(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert assert_right_or_refused(lambda: compiled(x), bank, NAMES) == is_right


class Swapped(nn.Module):
    """A checkpoint that changes the order of the sequences in place, of memory from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        def swapped(rows: Tensor) -> Tensor:
            first = rows[0].clone()
            rows[0] = rows[1]
            rows[1] = first
            return rows

        lines = x.clone()
        lines = checkpoint(lambda rows: swapped(self.lin(swapped(rows))), lines, use_reentrant=False)
        return self.last(lines)  # type: ignore[no-any-return]


def test_a_checkpoint_that_writes_to_memory_from_outside_is_right_or_refused() -> None:
    torch._dynamo.reset()
    model, x = Swapped(), torch.randn(2, 5, D)
    bank = attached(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert not assert_right_or_refused(lambda: compiled(x), bank, ["a", "b"])


class Turned(nn.Module):
    """A checkpoint whose graph breaks, of the tokens sequence by sequence or in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)

    def block(self, rows: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.sin(self.lin(rows))

    def forward(self, x: Tensor, *, turned: bool = False) -> Tensor:
        lines = x.transpose(0, 1) if turned else x
        result = checkpoint(self.block, lines.reshape(-1, D), use_reentrant=False).view(lines.shape)
        return result.transpose(0, 1) if turned else result  # type: ignore[no-any-return]


# Dynamo looks at it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("is_compiled", [True, False])
def test_what_a_checkpoint_runs_again_has_not_the_rows_of_the_last_call(is_compiled: bool) -> None:
    torch._dynamo.reset()
    model, x = Turned(), torch.randn(3, 5, D, requires_grad=True)
    bank = attached(model)
    for turned in (False, True):
        with bank.use(NAMES):
            model(x, turned=turned)
    run: Any = torch.compile(model, backend="eager") if is_compiled else model
    with bank.use(NAMES):
        results = [run(x, turned=turned) for turned in (False, True)]
        with pytest.raises(UnprovedRowsError, match="in several ways"):
            sum(result.sum() for result in results).backward()


class TurnedByValues(Broken):
    """Its layer behind the break gets the tokens of all sequences in turn, or sequence by sequence."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        turned, x = bool(x.sum() > 0), self.first(x)
        torch._dynamo.graph_break()
        lines = x.transpose(0, 1) if turned else x
        result = self.lin(lines.reshape(-1, D)).view(lines.shape)
        return result.transpose(0, 1) if turned else result


def test_compiled_code_is_not_used_once_a_followed_call_shows_other_rows_behind_a_break() -> None:
    torch._dynamo.reset()
    model = TurnedByValues()
    x = torch.rand(3, 5, D)
    bank = attached(model)
    compiled = torch.compile(model, backend="eager")
    assert assert_right_or_refused(lambda: model(x), bank, NAMES)
    assert assert_right_or_refused(lambda: compiled(x), bank, NAMES)
    assert assert_right_or_refused(lambda: model(-x), bank, NAMES)
    for values in (x, -x):
        with bank.use(NAMES), pytest.raises(UnprovedRowsError, match=r"in several ways\. Call the model without"):
            compiled(values)
        # Its advice.
        assert assert_right_or_refused(lambda values=values: model(values), bank, NAMES)  # type: ignore[misc]


def test_behind_a_break_of_the_graph_a_length_that_is_the_batchs_is_refused_and_the_advice_works() -> None:
    torch._dynamo.reset()
    model = Broken()
    bank = attached(model)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 3, D)
    assert assert_right_or_refused(lambda: model(x), bank, NAMES)
    with (
        bank.use(NAMES),
        pytest.raises(UnprovedRowsError, match=r"another size is the batch's.*or with another length"),
    ):
        compiled(x)
    longer = torch.randn(3, 4, D)
    assert assert_right_or_refused(lambda: compiled(longer), bank, NAMES)


class Unwrapped(nn.Module):
    """Its author does not call the module `self`."""

    def __init__(own) -> None:  # noqa: N805
        super().__init__()
        own.first, own.lin = nn.Linear(D, D), nn.Linear(D, D)

    def forward(own, x: Tensor) -> Tensor:  # noqa: N805
        return own.lin(own.first(x))


class Wrapped(Unwrapped):
    @functools.wraps(Unwrapped.forward)
    def forward(*args: Any) -> Tensor:
        return Unwrapped.forward(*args)


class BrokenUnwrapped(Unwrapped):
    def forward(own, x: Tensor) -> Tensor:  # noqa: N805
        x = own.first(x)
        torch._dynamo.graph_break()
        return own.lin(x)


@pytest.mark.parametrize("kind", [Unwrapped, Wrapped])
@pytest.mark.parametrize("calls", ["module", "function"])
def test_a_module_may_call_itself_by_any_name(kind: type[nn.Module], calls: str) -> None:
    torch._dynamo.reset()
    model, x = kind(), torch.randn(3, 5, D)
    bank = attached(model)
    compiled = torch.compile(model if calls == "module" else lambda x: model(x), backend="eager")
    assert assert_right_or_refused(lambda: compiled(x), bank, NAMES)


def test_a_module_by_any_name_is_known_behind_a_break_of_the_graph() -> None:
    torch._dynamo.reset()
    model, x = BrokenUnwrapped(), torch.randn(3, 5, D)
    bank = attached(model)
    compiled = torch.compile(model, backend="eager")
    assert not assert_right_or_refused(lambda: compiled(x), bank, NAMES)
    assert assert_right_or_refused(lambda: model(x), bank, NAMES)
    assert assert_right_or_refused(lambda: compiled(x), bank, NAMES)


def test_a_block_of_one_name_shows_nothing_and_the_advice_says_so() -> None:
    torch._dynamo.reset()
    model, x = Broken(), torch.randn(3, 5, D)
    bank = attached(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        with bank.use([None] * 3):
            model(x)
        with bank.use(NAMES), pytest.raises(UnprovedRowsError, match="`use` block with two different names"):
            compiled(x)


def test_a_call_that_fails_shows_nothing() -> None:
    class TextAndImages(OneLayer):
        main_input_name = "input_ids"

        def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
            torch._dynamo.graph_break()
            return self.between(input_ids, pixel_values)

        def between(self, x: Tensor, images: Tensor | None) -> Tensor:
            torch._dynamo.graph_break()
            x = self.lin(x)
            return x if images is None else x + self.lin(images).mean()

    torch._dynamo.reset()
    model, x, images = TextAndImages(), torch.randn(3, 5, D), torch.randn(3, 5, D)
    bank = attached(model)
    compiled = torch.compile(model, backend="eager")
    for run in (model, compiled, model, compiled):
        with bank.use(NAMES), pytest.raises(UnprovedRowsError):
            run(x, pixel_values=images)


class Tower(nn.Module):
    """A model of text whose `generate` calls tower and projector by themselves."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, D)
        self.tower, self.proj, self.head = nn.Sequential(), nn.Sequential(), nn.Linear(D, D)
        self.tower.fc, self.proj.fc = nn.Linear(D, D), nn.Linear(D, D)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.embed(input_ids)), features

    def generate_(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self(input_ids, self.proj(self.tower(pixel_values)))


def test_a_part_that_is_called_by_itself_has_to_be_named() -> None:
    model = Tower()
    bank = attached(model)
    ids, pixels, images = torch.randint(9, (2, 5)), torch.randn(2, 3, D), ["a", "a"]
    for parts, part in (({}, "tower"), ({"tower": images}, "proj")):
        with bank.use(["a", "b"], parts=parts), pytest.raises(UnprovedRowsError, match=rf"parts=\{{'{part}': names_of"):
            model.generate_(ids, pixels)
    with bank.use(["a", "b"], parts={"tower": images, "proj": images}):
        model.generate_(ids, pixels)


def test_a_part_may_lie_inside_of_another() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = nn.Sequential()
            self.outer.inner = nn.Sequential()
            self.outer.inner.fc = nn.Linear(D, D)
            self.outer.fc, self.fc = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, images: Tensor) -> Tensor:
            return self.fc(x) + self.outer(images).sum()

    model = Outer()
    bank = attached(model)
    outputs: list[Tensor] = []
    model.outer.inner.register_forward_hook(lambda _, __, output: outputs.append(output))
    x, images = torch.randn(2, 3, D), torch.randn(3, 2, D)
    mixed = ["a", "b", None]
    for inner in (mixed, ["a"] * 3, ["b"] * 3, [None] * 3):
        with bank.use(["c", None], parts={"outer": ["c"] * 3, "outer.inner": inner}):
            model(x, images)
    torch.testing.assert_close(outputs[0], torch.stack([outputs[1 + row][row] for row in range(3)]))


def test_a_part_that_shares_a_layer_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.vision = nn.Sequential(nn.Sequential(nn.Linear(D, D))), nn.Sequential()
            self.vision.append(self.text[0])

    model = Tied()
    bank = attached(model)
    message = r"text\.0\.0 is vision\.0\.0.*exclude_modules=\['text\.0\.0'\]"
    with pytest.raises(BatchError, match=message), bank.use(["a"], parts={"vision": ["b"]}):
        pass


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("batch", [2, 3])
def test_a_checkpoint_of_a_part_runs_with_the_rows_of_the_forward_pass(batch: int, reentrant: bool) -> None:
    class TimeFirst(nn.Module):
        is_saved = False

        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential()
            self.block.fc = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.transpose(0, 1)
            run = (lambda rows: checkpoint(self.block, rows, use_reentrant=reentrant)) if self.is_saved else self.block
            return run(rows).tanh().transpose(0, 1)

    model = TimeFirst()
    bank = attached(model)
    grads = []
    for model.is_saved in (False, True):
        x = torch.linspace(-1, 1, batch * 3 * D).view(batch, 3, D).requires_grad_()
        with bank.use(NAMES[:batch]):
            model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "prune"])
def test_a_weight_that_is_computed_is_refused_and_the_advice_works(how: str) -> None:
    import torch.nn.utils.prune as pruning

    model = nn.Sequential(nn.Linear(D, D))
    if how == "prune":
        pruning.l1_unstructured(model[0], "weight", amount=0.5)
    else:
        torch.nn.utils.weight_norm(model[0])
    with pytest.raises(AttachError, match="whose weight is computed from others"):
        xlc.attach(model)
    if how == "prune":
        pruning.remove(model[0], "weight")
    else:
        torch.nn.utils.remove_weight_norm(model[0])
    bank = attached(model)
    with bank.use(["a", "b"]):
        model(torch.randn(2, D))
