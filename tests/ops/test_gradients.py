"""Gradients of the functional op, and what training with it changes and leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, F16, F64, I32, LORA_LINEAR, Case, build, same_bits
from torch import Tensor, nn

from xpu_lora_compile.ops import lora_linear

ALL_F64 = {"inputs": F64, "weights": F64, "output": F64}


def _gradcheck_cases() -> Iterator[Case]:
    small = {"D": 3, "R": 2, "K": 2, "W": 3, "H": 5, **ALL_F64}
    mix = (0, -1, 1, 2, 0)
    yield Case(T=5, indices=mix, scaling=1.0, **small)
    yield Case(T=5, indices=mix, scaling=-0.5, index=I32, slices=2, with_slice_dim=True, layout="transposed", **small)
    yield Case(T=5, indices=mix, scaling=-0.5, slices=2, **small)
    yield Case(T=2, indices=(1, -1), scaling=1.0, with_slice_dim=True, **small)


GRADCHECK_CASES = tuple(_gradcheck_cases())


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradients_are_right_in_eager_mode(case: Case) -> None:
    function, operands = _as_function(case)
    assert torch.autograd.gradcheck(function, operands)


# A compilation costs seconds: the first two cases have everything between them.
@pytest.mark.parametrize("case", GRADCHECK_CASES[:2], ids=str)
def test_gradients_are_right_under_inductor(case: Case) -> None:
    function, operands = _as_function(case)
    assert torch.autograd.gradcheck(torch.compile(function, fullgraph=True, backend="inductor"), operands)


@pytest.mark.parametrize("case", [Case(T=0, H=10, **ALL_F64), Case(T=1, H=10, indices=(-1,), **ALL_F64)], ids=str)
def test_gradients_are_zero_where_no_row_has_an_adapter(case: Case) -> None:
    function, operands = _as_function(case)
    grad_base, *others = torch.autograd.grad(function(*operands).sum(), operands)
    assert torch.equal(grad_base, torch.ones_like(grad_base))
    assert all(torch.count_nonzero(grad) == 0 for grad in others)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_gradients_have_the_dtypes_and_shapes_of_their_operands(dtype: torch.dtype) -> None:
    case = Case(H=10, inputs=dtype, weights=torch.float32, output=dtype, second=dtype, with_slice_dim=True, slices=2)
    function, operands = _as_function(case)
    grads = torch.autograd.grad(function(*operands).sum(), operands)
    assert [(g.dtype, g.shape) for g in grads] == [(o.dtype, o.shape) for o in operands]


@pytest.mark.parametrize("rows", [2, 5], ids=["T<=K", "T>K"])
def test_second_derivatives_are_an_error_and_never_silently_zero(rows: int) -> None:
    function, operands = _as_function(Case(T=rows, H=10, indices=(0, 1, 2, 3, 0)[:rows], **ALL_F64))
    with pytest.raises(RuntimeError, match="first derivatives; got create_graph=True"):
        torch.autograd.grad(function(*operands).square().sum(), operands, create_graph=True)


def test_operands_that_need_no_gradient_get_none() -> None:
    function, operands = _as_function(Case(H=10))
    for frozen in operands[:2]:
        frozen.requires_grad_(False)
    function(*operands).sum().backward()
    assert [operand.grad is None for operand in operands] == [True, True, False, False]


def test_rows_without_an_adapter_give_no_gradient_to_their_input() -> None:
    case = Case(T=9, H=10, **ALL_F64)
    _, grad_inputs, *_ = _gradients(case)
    assert [bool(row.any()) for row in grad_inputs] == case.has_adapter


def test_slots_that_no_row_uses_get_a_gradient_of_zero() -> None:
    _, _, grad_a, grad_b = _gradients(Case(T=5, H=10, indices=(0, -1, 2, 4, 2), **ALL_F64))
    for grad in (grad_a, grad_b):
        assert [bool(slot.any()) for slot in grad] == [True, False, True, False]


@pytest.mark.parametrize("backend", [None, "aot_eager", "xpu_lora"])
def test_ranks_change_no_gradient(backend: str | None) -> None:
    """Beyond the rank of a slot weights are zeros, but they may learn."""
    base, inputs, (a,), (b,), indices, offsets, scaling = build(LORA_LINEAR, Case(H=10)).args.values()
    ranks = torch.tensor([3, 0, 1, 2], dtype=torch.int32, device=DEVICE)
    a, b = a.nan_to_num(), b.nan_to_num()
    for slot, rank in enumerate(ranks.tolist()):
        a[slot, rank:], b[slot, :, rank:] = 0.0, 0.0

    def total(given: Tensor | None, *operands: Tensor) -> Tensor:
        base, inputs, a, b = operands
        return lora_linear(base, inputs, [a], [b], indices, offsets, scaling, given).square().sum()

    gradients = []
    for given in (None, ranks):
        operands = [one.detach().clone().requires_grad_() for one in (base, inputs, a, b)]
        called = total if backend is None else torch.compile(total, backend=backend, fullgraph=True)
        gradients.append(torch.autograd.grad(called(given, *operands), operands))
    for got, wanted in zip(*gradients, strict=True):
        assert same_bits(got, wanted)
    assert gradients[0][3].any()


@pytest.mark.parametrize("rows", [3, 5], ids=["T<=K", "T>K"])
@pytest.mark.parametrize("poisoned", ["inputs", "grad"])
@pytest.mark.parametrize("owner", [1, -1], ids=["another adapter", "no adapter"])
def test_nan_in_one_row_never_reaches_the_gradient_of_another_adapter(rows: int, poisoned: str, owner: int) -> None:
    case = Case(T=rows, H=10, indices=(0, owner, 0, 2, 0)[:rows], **ALL_F64)
    function, operands = _as_function(case)
    clean = torch.autograd.grad(function(*operands), operands, torch.ones(rows, 10, dtype=F64, device=DEVICE))
    grad = torch.ones(rows, 10, dtype=F64, device=DEVICE)
    (operands[1].detach() if poisoned == "inputs" else grad)[1] = torch.nan
    _, grad_inputs, *grads = torch.autograd.grad(function(*operands), operands, grad)
    others = [t for t in range(rows) if t != 1]
    assert same_bits(grad_inputs[others], clean[1][others])
    for dirty, wanted in zip(grads, clean[2:], strict=True):
        assert same_bits(dirty[[0, 2, 3]], wanted[[0, 2, 3]])
        assert dirty[1].isnan().any() == (owner == 1)


@pytest.mark.parametrize("rows", [3, 5], ids=["T<=K", "T>K"])
def test_nan_in_the_weights_of_unused_slots_never_reaches_a_gradient(rows: int) -> None:
    call = build(LORA_LINEAR, Case(T=rows, H=10, indices=(1, -1, 1, 2**40, 1)[:rows], **ALL_F64))
    (a,), (b,) = call.args["lora_a"], call.args["lora_b"]
    assert all(weights[[0, 2, 3]].isnan().all() for weights in (a, b))
    operands = [call.output.clone(), call.args["inputs"], a, b]
    for operand in operands:
        operand.requires_grad_()
    result = lora_linear(operands[0], operands[1], [a], [b], *list(call.args.values())[4:])
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(result.sum(), operands))


def test_a_bank_that_serves_and_trains_side_by_side_gives_the_gradients_of_each_adapter_alone() -> None:
    case = Case(T=5, H=10, indices=(0, 1, 0, -1, 1), **ALL_F64)
    function, operands = _as_function(case)
    together = torch.autograd.grad(function(*operands).square().sum(), operands)
    for adapter in (0, 1):
        call = build(LORA_LINEAR, case)
        mine = call.args["lora_indices_tensor"] == adapter
        alone = lora_linear(
            operands[0][mine],
            operands[1][mine],
            [operands[2][adapter : adapter + 1]],
            [operands[3][adapter : adapter + 1]],
            torch.zeros(int(mine.sum()), dtype=torch.int64, device=DEVICE),
            *list(call.args.values())[5:],
        )
        for grad, wanted in zip(torch.autograd.grad(alone.square().sum(), operands[2:]), together[2:], strict=True):
            torch.testing.assert_close(grad[adapter], wanted[adapter])


def test_a_new_number_of_rows_does_not_recompile_a_training_step() -> None:
    adapters = _Adapters()
    step = torch.compile(_training_loss, fullgraph=True, backend="inductor")
    # The second number of rows makes the size symbolic.
    for rows in (4, 6):
        step(adapters, *_batch(rows)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 3, 9, 17):
            adapters.zero_grad()
            step(adapters, *_batch(rows)).backward()
            eager = torch.autograd.grad(_training_loss(adapters, *_batch(rows)), [adapters.a, adapters.b])
            torch.testing.assert_close((adapters.a.grad, adapters.b.grad), eager)


optimizers = pytest.mark.parametrize(
    "optimizer",
    [lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9), lambda weights: torch.optim.Adam(weights, 0.05)],
    ids=["sgd", "adam"],
)
compiled_or_not = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])


@optimizers
@compiled_or_not
def test_two_adapters_learn_in_one_batch_and_nothing_else_changes(
    optimizer: Callable[..., Any], compiled: bool
) -> None:
    adapters = _Adapters()
    inputs, target, indices = _batch(12)
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    first = adapters(inputs, indices).detach()
    losses = _train(adapters, optimizer, (inputs, target, indices), compiled)
    last = adapters(inputs, indices).detach()
    assert losses[-1] < 0.5 * losses[0]
    assert same_bits(adapters.base.weight, before["base.weight"])
    without = (indices < 0) | (indices >= 3)
    assert without.any()
    assert same_bits(last[without], first[without])
    for name in ("a", "b"):
        changed = [not same_bits(now, then) for now, then in zip(getattr(adapters, name), before[name], strict=True)]
        assert changed == [True, True, False]


@optimizers
@compiled_or_not
def test_training_the_rows_of_one_adapter_leaves_the_other_as_it_is(
    optimizer: Callable[..., Any], compiled: bool
) -> None:
    adapters = _Adapters()
    inputs, target, indices = _batch(12)
    before = [adapters.a.detach().clone(), adapters.b.detach().clone()]
    losses = _train(adapters, optimizer, (inputs, target, torch.where(indices == 1, -1, indices)), compiled)
    assert losses[-1] < losses[0]
    for now, then in zip((adapters.a, adapters.b), before, strict=True):
        assert not same_bits(now[0], then[0])
        assert same_bits(now[1:], then[1:])


class _Adapters(nn.Module):
    """A frozen linear layer, and three adapters for it."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.base = nn.Linear(8, 6, bias=False).requires_grad_(False)
        self.base.weight.copy_(torch.randn(6, 8, generator=random))
        self.a = nn.Parameter(torch.randn(3, 2, 8, generator=random) / 4)
        self.b = nn.Parameter(torch.randn(3, 6, 2, generator=random) / 4)
        self.to(DEVICE)

    def forward(self, inputs: Tensor, indices: Tensor) -> Tensor:
        return lora_linear(self.base(inputs), inputs, [self.a], [self.b], indices, [0])


def _training_loss(adapters: _Adapters, inputs: Tensor, target: Tensor, indices: Tensor) -> Tensor:
    has_adapter = ((indices >= 0) & (indices < 3))[:, None]
    return torch.where(has_adapter, adapters(inputs, indices) - target, 0.0).square().mean()


def _batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets that differ from what the base gives by the same vector in each row, and indices."""
    inputs = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    adapters = _Adapters()
    shift = inputs[:, :1] * torch.arange(1.0, 7.0, device=DEVICE)
    indices = torch.tensor([0, 1, -1, 3], device=DEVICE).repeat(rows)[:rows]
    return inputs, adapters.base(inputs) + shift, indices


def _train(
    adapters: _Adapters, optimizer: Callable[..., Any], batch: tuple[Tensor, Tensor, Tensor], compiled: bool
) -> list[float]:
    loss_of = torch.compile(_training_loss, fullgraph=True, backend="inductor") if compiled else _training_loss
    steps, losses = optimizer([adapters.a, adapters.b]), []
    for _ in range(25):
        steps.zero_grad()
        loss = loss_of(adapters, *batch)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


def _as_function(case: Case) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """`lora_linear` of base, inputs, then every A, then every B, and such operands; a scaling of 1 is left out."""
    base, inputs, lora_a, lora_b, indices, offsets, scaling = build(LORA_LINEAR, case).args.values()
    slices = len(lora_a)
    named = {} if scaling == 1.0 else {"scaling": scaling}

    def function(base: Tensor, inputs: Tensor, *weights: Tensor) -> Tensor:
        return lora_linear(base, inputs, weights[:slices], weights[slices:], indices, offsets, **named)

    operands = [base, inputs, *lora_a, *lora_b]
    return function, tuple(operand.detach().nan_to_num().requires_grad_() for operand in operands)


def _gradients(case: Case) -> tuple[Tensor, ...]:
    function, operands = _as_function(case)
    return torch.autograd.grad(function(*operands).sum(), operands)
