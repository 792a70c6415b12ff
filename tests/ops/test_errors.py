"""A call that breaks the contract: which error, with which words, and that nothing was written."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.cases import DEVICE, EXPAND, EXPAND_SLICE, LORA_LINEAR, MUTATING, OPS, SHRINK, Call, Case, build, same_bits
from torch import Tensor

# The only tests of the fakes alone: no public name of torch makes fake tensors.
from torch._subclasses.fake_tensor import FakeTensorMode

from xpu_lora_compile import ops
from xpu_lora_compile.errors import (
    ContractError,
    DeviceError,
    DtypeError,
    LoraError,
    LostGradientError,
    ShapeError,
    SliceError,
)

Edit = Callable[[Any], Any]


@dataclass(frozen=True)
class Mistake:
    """One call that breaks the contract: which argument is edited, how, and what the error says.

    Attributes:
        what: a few words for the test's id.
        op: the op that is called.
        argument: the argument's name; in a list of tensors the first is edited.
        edit: makes the wrong argument of the right one.
        error: the class of the error.
        where: the argument as the error names it.
        says: the rest of the message, from "wanted" on; shortened to what matters here.
    """

    what: str
    op: str
    argument: str
    edit: Edit
    error: type[ContractError]
    where: str
    says: str

    def __str__(self) -> str:
        return f"{self.op}-{self.where.removeprefix(self.op).strip(': ')}-{self.what}".replace(" ", "_")

    def call(self) -> Call:
        """The wrong call; T5-D7-R3-K4-W8-H10."""
        call = build(self.op, Case(H=10))
        if self.argument == "ranks":
            call.args["ranks"] = torch.tensor([3, 0, 3, 1], dtype=torch.int32, device=DEVICE)
        right = call.args[self.argument]
        is_list_of_tensors = isinstance(right, list) and isinstance(right[0], Tensor)
        call.args[self.argument] = [self.edit(right[0]), *right[1:]] if is_list_of_tensors else self.edit(right)
        return call


def _mistakes_in(
    op: str, argument: str, where: str, *edits: tuple[str, Edit, type[ContractError], str]
) -> list[Mistake]:
    return [Mistake(what, op, argument, edit, error, f"{op}: {where}", says) for what, edit, error, says in edits]


_ROWS = "T = 5 rows, as lora_indices_tensor has; got shape"
_MATRIX = (
    ("one dimension", lambda x: x[0], ShapeError, "[T, columns]; got shape ["),
    ("three dimensions", lambda x: x[None], ShapeError, "[T, columns]; got shape [1, 5, "),
    ("too few rows", lambda x: x[:4], ShapeError, f"{_ROWS} [4, "),
    ("too many rows", lambda x: torch.cat([x, x]), ShapeError, f"{_ROWS} [10, "),
    ("integers", lambda x: x.int(), DtypeError, "float32, bfloat16 or float16; got int32"),
    ("complex numbers", lambda x: x.cfloat(), DtypeError, "float32, bfloat16 or float16; got complex64"),
    ("another device", lambda x: x.to("meta"), DeviceError, "all tensors on one device"),
)

_INDICES = (
    ("no dimension", lambda i: i[0], ShapeError, "one index a row: [T]; got shape []"),
    ("two dimensions", lambda i: i[:, None], ShapeError, "one index a row: [T]; got shape [5, 1]"),
    ("floats", lambda i: i.float(), DtypeError, "int32 or int64; got float32"),
    ("int16", lambda i: i.short(), DtypeError, "int32 or int64; got int16"),
    ("bool", lambda i: i.bool(), DtypeError, "int32 or int64; got bool"),
    ("another device", lambda i: i.to("meta"), DeviceError, f"all tensors on one device, here {DEVICE}"),
)


def _weights(columns: int) -> list[tuple[str, Edit, type[ContractError], str]]:
    shapes = "[K, rows, columns] or [K, 1, rows, columns]"
    return [
        ("two dimensions", lambda w: w[0], ShapeError, f"{shapes}; got shape ["),
        ("five dimensions", lambda w: w[None, None], ShapeError, f"{shapes}; got shape [1, 1, 4, "),
        ("two in second place", lambda w: torch.stack([w, w], 1), ShapeError, f"{shapes}; got shape [4, 2, "),
        ("no slots", lambda w: w[:0], ShapeError, "at least one slot; got shape [0, "),
        ("too few columns", lambda w: w[..., :-1], ShapeError, f"{columns} columns, to multiply what comes in; got"),
        ("integers", lambda w: w.long(), DtypeError, "float32, bfloat16 or float16; got int64"),
        ("float8", lambda w: w.to(torch.float8_e4m3fn), DtypeError, "float32, bfloat16 or float16; got float8_e4m3fn"),
        ("another device", lambda w: w.to("meta"), DeviceError, "all tensors on one device"),
    ]


_RANKS = (
    ("no dimension", lambda r: r[0], ShapeError, "one rank a slot: [4]; got shape []"),
    ("two dimensions", lambda r: r[:, None], ShapeError, "one rank a slot: [4]; got shape [4, 1]"),
    ("fewer slots", lambda r: r[:3], ShapeError, "one rank a slot: [4]; got shape [3]"),
    ("more slots", lambda r: torch.cat([r, r]), ShapeError, "one rank a slot: [4]; got shape [8]"),
    ("floats", lambda r: r.float(), DtypeError, "int32 or int64; got float32"),
    ("int16", lambda r: r.short(), DtypeError, "int32 or int64; got int16"),
    ("bool", lambda r: r.bool(), DtypeError, "int32 or int64; got bool"),
    ("another device", lambda r: r.to("meta"), DeviceError, "all tensors on one device"),
)
_TOO_WIDE = ("too wide", lambda w: torch.cat([w, w], -2), SliceError, "a slice inside the output's 10 columns; got")
_ONE_EACH = "for each slice one A, one B and one offset, and at least one slice; got"


def _mistakes() -> Iterator[Mistake]:
    for op, weights, columns in (
        (SHRINK, "lora_a_weights", 7),
        (EXPAND, "lora_b_weights", 3),
        (EXPAND_SLICE, "lora_b_weights", 3),
    ):
        yield from _mistakes_in(op, "output_tensor", "output_tensor", *_MATRIX)
        yield from _mistakes_in(op, "inputs", "inputs", *_MATRIX)
        yield from _mistakes_in(op, weights, weights, *_weights(columns))
        yield from _mistakes_in(op, "lora_indices_tensor", "lora_indices_tensor", *_INDICES)
    yield from _mistakes_in(
        SHRINK,
        "output_tensor",
        "output_tensor",
        ("narrower than the rank", lambda x: x[:, :2], ShapeError, "at least R = 3 columns; got shape [5, 2]"),
    )
    for what, edit in (("an end", lambda size: size + 1), ("too small", lambda size: size - 1), ("zero", lambda _: 0)):
        error = (what, edit, SliceError, "8, the number of rows of lora_b_weights; got")
        yield from _mistakes_in(EXPAND_SLICE, "slice_size", "slice_size", error)
    for offset in (3, 10, -1, -8, 2**40):
        error = (f"offset {offset}", lambda _, o=offset: o, SliceError, f"offset {offset} and size 8")
        yield from _mistakes_in(EXPAND_SLICE, "slice_offset", f"slice {offset}:{offset + 8}", error)
        error = (f"offset {offset}", lambda _, o=offset: [o], SliceError, f"offset {offset} and size 8")
        yield from _mistakes_in(LORA_LINEAR, "slice_offsets", f"slice {offset}:{offset + 8}", error)
    yield from _mistakes_in(LORA_LINEAR, "base", "base", *_MATRIX)
    yield from _mistakes_in(LORA_LINEAR, "inputs", "inputs", *_MATRIX)
    yield from _mistakes_in(LORA_LINEAR, "lora_a", "lora_a[0]", *_weights(7))
    yield from _mistakes_in(LORA_LINEAR, "lora_b", "lora_b[0]", *_weights(3))
    yield from _mistakes_in(LORA_LINEAR, "lora_indices_tensor", "lora_indices_tensor", *_INDICES)
    yield from _mistakes_in(LORA_LINEAR, "lora_b", "slice 1:17", _TOO_WIDE)
    fewer = ("fewer slots", lambda b: b[:2], ShapeError, "A and B over the same number K of adapters; got")
    yield from _mistakes_in(LORA_LINEAR, "lora_b", "slice 0", fewer)
    yield from _mistakes_in(LORA_LINEAR, "ranks", "ranks", *_RANKS)
    for what, offsets in (("no slices", []), ("two offsets", [0, 0])):
        says = f"{_ONE_EACH} 1 A, 1 B and {len(offsets)} offsets"
        yield Mistake(what, LORA_LINEAR, "slice_offsets", lambda _, o=offsets: o, ShapeError, LORA_LINEAR, says)


MISTAKES = tuple(_mistakes())
every_mistake = pytest.mark.parametrize("mistake", MISTAKES, ids=str)


@pytest.mark.sweep
@every_mistake
def test_the_error_names_the_argument_and_says_what_was_wanted_and_what_came(mistake: Mistake) -> None:
    error = _error_of(mistake.call().run)
    assert type(error) is mistake.error
    assert str(error).startswith(f"{mistake.where}: wanted ")
    assert mistake.says in str(error)
    assert re.search(r"; got .+\. [A-Z].+\.$", str(error)), "a remedy ends the message"


@pytest.mark.sweep
@every_mistake
def test_nothing_is_written_when_an_error_is_raised(mistake: Mistake) -> None:
    call = mistake.call()
    before = call.buffer.clone()
    _error_of(call.run)
    assert same_bits(call.buffer, before)


@pytest.mark.sweep
@every_mistake
def test_the_fake_raises_the_same_error_with_the_same_words(mistake: Mistake) -> None:
    call = mistake.call()
    eager = _error_of(call.run)
    with FakeTensorMode() as mode:
        call.args = {name: _fake(mode, arg) for name, arg in call.args.items()}
        fake = _error_of(call.run)
    assert (type(fake), str(fake)) == (type(eager), str(eager))


# One a class and op: what is checked here is how Dynamo passes the message on.
@pytest.mark.parametrize(
    "mistake", {(mistake.op, mistake.error): mistake for mistake in reversed(MISTAKES)}.values(), ids=str
)
def test_torch_compile_shows_the_message_of_the_error(mistake: Mistake) -> None:
    call = mistake.call()
    message = f"{mistake.error.__name__}: {_error_of(call.run)}"
    before = call.buffer.clone()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        _compiled(mistake.op)(**call.args)
    assert same_bits(call.buffer, before)


@pytest.mark.parametrize("op", OPS)
def test_an_error_is_raised_for_symbolic_sizes_too(op: str) -> None:
    call = build(op, Case(H=10))
    call.args["inputs"] = call.args["inputs"][:4]
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=rf"ShapeError: {op}: inputs: wanted T = \w+ rows"):
        torch.compile(getattr(ops, op), backend="eager", fullgraph=True, dynamic=True)(**call.args)


def test_every_op_has_an_error_for_every_one_of_its_arguments() -> None:
    defaults = {"scaling", "add_inputs"}
    for op in OPS:
        arguments = set(build(op, Case()).args) - defaults | ({"ranks"} if op == LORA_LINEAR else set())
        assert {mistake.argument for mistake in MISTAKES if mistake.op == op} == arguments


def test_every_contract_error_is_seen() -> None:
    assert {mistake.error for mistake in MISTAKES} == set(ContractError.__subclasses__())


@pytest.mark.parametrize(("error", "builtin"), [(ContractError, ValueError), (DtypeError, TypeError)])
def test_errors_can_be_caught_as_the_builtin_that_they_resemble(error: type, builtin: type) -> None:
    assert issubclass(error, builtin)
    assert issubclass(error, LoraError)
    assert issubclass(LostGradientError, RuntimeError)


def test_an_error_survives_a_process_boundary() -> None:
    error = _error_of(MISTAKES[0].call().run)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), str(copy)) == (type(error), str(error))


def test_the_whole_message_of_one_error() -> None:
    call = build(EXPAND, Case())
    call.args["inputs"] = call.args["inputs"][:4]
    assert str(_error_of(call.run)) == (
        "bgmv_expand: inputs: wanted T = 5 rows, as lora_indices_tensor has; got shape [4, 3]. "
        "Give each row its index; cut an index buffer that is longer than the batch."
    )


losing = pytest.mark.parametrize("position", [1, 2], ids=["inputs", "weights"])
mutating = pytest.mark.parametrize("op", MUTATING)


@mutating
@losing
@pytest.mark.parametrize("spelling", ["function", "packet", "overload", "overload by name"])
def test_a_mutating_op_refuses_operands_that_need_a_gradient(op: str, position: int, spelling: str) -> None:
    call, argument = _needing_gradient(op, position)
    before = call.buffer.clone()
    error = _error_of(lambda: _spelled(op, spelling, call.args))
    assert type(error) is LostGradientError
    assert str(error).startswith(f"{op}: {argument}: wanted ")
    assert "`lora_linear`" in str(error)
    assert same_bits(call.buffer, before)


@mutating
@losing
def test_a_mutating_op_refuses_operands_that_need_a_gradient_under_torch_compile(op: str, position: int) -> None:
    call, argument = _needing_gradient(op, position)
    before = call.buffer.clone()
    with pytest.raises(RuntimeError, match=rf"LostGradientError: {op}: {argument}: wanted .*`lora_linear`"):
        _compiled(op)(**call.args)
    assert same_bits(call.buffer, before)


@mutating
@losing
def test_a_mutating_op_refuses_what_was_computed_from_a_parameter(op: str, position: int) -> None:
    call, _ = _needing_gradient(op, position)
    name = list(call.args)[position]
    call.args[name] = call.args[name] * 1.0
    assert type(_error_of(call.run)) is LostGradientError


@mutating
@losing
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_mutating_op_takes_parameters_where_no_gradient_is_recorded(
    op: str, position: int, mode: Callable[[], AbstractContextManager[None]], compiled: bool
) -> None:
    call, _ = _needing_gradient(op, position)
    wanted = build(op, Case(H=10)).run()
    with mode():
        (_compiled(op) if compiled else getattr(ops, op))(**call.args)
    assert same_bits(call.output, wanted)


@pytest.mark.parametrize("op", [EXPAND, EXPAND_SLICE])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gradient_flows_through_an_output_that_is_added_to(op: str, compiled: bool) -> None:
    gradient, weight = _gradient_through_output(op, Case(H=10), compiled)
    assert torch.equal(gradient, 2 * weight)


@pytest.mark.parametrize("op", MUTATING)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_output_that_needs_a_gradient_and_is_replaced_is_refused(op: str, compiled: bool) -> None:
    with pytest.raises(RuntimeError, match="tensor that is replaced"):
        _gradient_through_output(op, Case(H=10, add=False), compiled)


@mutating
def test_a_leaf_that_needs_a_gradient_is_not_changed_in_place(op: str) -> None:
    call = build(op, Case(H=10))
    leaf = call.args["output_tensor"] = torch.zeros(5, 10, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        call.run()
    assert torch.count_nonzero(leaf) == 0


@pytest.mark.parametrize("op", [EXPAND, EXPAND_SLICE])
def test_changing_what_a_backward_pass_needs_is_noticed(op: str) -> None:
    call = build(op, Case(H=10))
    saved = torch.zeros(5, 10, device=DEVICE, requires_grad=True).exp()
    call.args["output_tensor"] = saved
    call.run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def _gradient_through_output(op: str, case: Case, compiled: bool) -> tuple[Tensor, Tensor]:
    """The gradient to what the output was computed from, and the weights of the sum that it is of."""
    args = build(op, case).args
    source = torch.zeros(case.T, case.H, device=DEVICE, requires_grad=True)
    weight = torch.arange(1.0, 1 + case.T * case.H, device=DEVICE).reshape(case.T, case.H)

    def total(source: Tensor) -> Tensor:
        output = 2 * source
        getattr(ops, op)(**{**args, "output_tensor": output})
        return (output * weight).sum()

    (torch.compile(total, backend="aot_eager", fullgraph=True) if compiled else total)(source).backward()
    assert source.grad is not None
    return source.grad, weight


def _needing_gradient(op: str, position: int) -> tuple[Call, str]:
    call = build(op, Case(H=10))
    call.args[list(call.args)[position]].requires_grad_()
    return call, ("inputs", "weights")[position - 1]


def _spelled(op: str, spelling: str, args: dict[str, Any]) -> None:
    packet = getattr(torch.ops.xpu_lora, op)
    if spelling == "overload by name":
        packet.default(**args)
    else:
        {"function": getattr(ops, op), "packet": packet, "overload": packet.default}[spelling](*args.values())


def _compiled(op: str) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(getattr(ops, op), backend="eager", fullgraph=True)


def _fake(mode: FakeTensorMode, arg: Any) -> Any:
    if isinstance(arg, list):
        return [_fake(mode, item) for item in arg]
    return mode.from_tensor(arg) if isinstance(arg, Tensor) else arg


def _error_of(function: Callable[[], object]) -> LoraError:
    with pytest.raises(LoraError) as caught:
        function()
    return caught.value


@mutating
def test_an_output_whose_elements_share_memory_is_refused(op: str) -> None:
    call = build(op, Case(H=10))
    call.args["output_tensor"] = torch.zeros(1, 10, device=DEVICE).expand(5, 10)
    with pytest.raises(ShapeError, match=r"output_tensor: wanted .* own memory"):
        call.run()


@mutating
def test_a_sparse_operand_is_refused(op: str) -> None:
    call = build(op, Case(H=10))
    call.args["inputs"] = call.args["inputs"].float().to_sparse()
    with pytest.raises(ContractError, match="inputs: wanted a dense tensor"):
        call.run()


@mutating
def test_a_view_of_a_leaf_that_needs_a_gradient_is_not_changed_in_place(op: str) -> None:
    call = build(op, Case(H=10))
    leaf = torch.zeros(5, 10, device=DEVICE, requires_grad=True)
    call.args["output_tensor"] = leaf.view(5, 10)
    with pytest.raises(LostGradientError, match="leaf"):
        call.run()
    assert torch.count_nonzero(leaf) == 0


@pytest.mark.parametrize(
    "ranks", [torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0]), [1, 2]], ids=["K", "float", "list"]
)
def test_ranks_are_checked_where_no_kernel_asks_for_them(ranks: Any) -> None:
    a, b = torch.ones(2, 3, 4, device=DEVICE), torch.ones(2, 4, 3, device=DEVICE)
    given = ranks.to(DEVICE) if isinstance(ranks, torch.Tensor) else ranks
    with torch.no_grad(), pytest.raises(LoraError, match=r"lora_linear: ranks"):
        ops.lora_linear(
            torch.zeros(1, 4, device=DEVICE),
            torch.ones(1, 4, device=DEVICE),
            [a],
            [b],
            torch.tensor([0], device=DEVICE),
            [0],
            ranks=given,
        )
