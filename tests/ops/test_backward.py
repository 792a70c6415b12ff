"""The backward kernels: numbers, bits, what they read and write, and `trained_linear`, which trains slots."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, F16, F32, F64, LORA_LINEAR, Case, build, same_bits
from torch import Tensor
from torch.library import opcheck

from xpu_lora_compile.errors import DeviceError, ShapeError
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.kernels.native import NATIVE_BACKWARD
from xpu_lora_compile.ops import TRAINED_LINEAR, lora_linear

on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for CPUs")
EPS = {F32: 2.0**-23, BF16: 2.0**-8, F16: 2.0**-10}


def _random_case(seed: int) -> Case:
    pick = random.Random(seed)
    size = lambda most: pick.choice([1, 2, 3, pick.randint(1, most)])  # noqa: E731
    width = size(70)
    return Case(
        T=pick.choice([0, 1, 2, pick.randint(3, 60), pick.randint(100, 300)]),
        D=size(90),
        R=size(20),
        K=size(9),
        W=width,
        H=width + pick.choice([0, 0, 1, 5]),
        inputs=pick.choice([F32, F32, BF16, F16]),
        weights=pick.choice([F32, F32, BF16, F16]),
        output=pick.choice([F32, F32, BF16]),
        second=pick.choice([None, None, F32]),
        index=pick.choice([torch.int64, torch.int32]),
        layout=pick.choice(["contiguous", "transposed", "strided"]),
        with_slice_dim=pick.random() < 0.3,
        scaling=pick.choice([1.0, 0.75, -2.0]),
        slices=pick.choice([1, 1, 2]),
    )


def _operands(case: Case, seed: int = 0) -> dict[str, Any]:
    """Of `lora_linear`; its weights are finite in all slots, and everything needs gradients."""
    args = build(LORA_LINEAR, case, seed=seed).args
    for name in ("base", "inputs"):
        args[name] = args[name].detach().requires_grad_()
    for name in ("lora_a", "lora_b"):
        args[name] = [weights.nan_to_num().detach().requires_grad_() for weights in args[name]]
    return args


def _gradients(args: dict[str, Any], grad: Tensor) -> list[Tensor]:
    leaves = [args["inputs"], *args["lora_a"], *args["lora_b"]]
    return list(torch.autograd.grad(lora_linear(**args), leaves, grad))


def _wanted(args: dict[str, Any], grad: Tensor, *, magnitude: bool) -> list[Tensor]:
    """The gradients in float64, row by row; or the sums of the absolute values of their terms."""
    wide = lambda tensor: tensor.detach().double().abs() if magnitude else tensor.detach().double()  # noqa: E731
    x, grad = wide(args["inputs"]), wide(grad)
    scaling = abs(args["scaling"]) if magnitude else args["scaling"]
    of_x = torch.zeros_like(x)
    of_a = [torch.zeros_like(wide(a)) for a in args["lora_a"]]
    of_b = [torch.zeros_like(wide(b)) for b in args["lora_b"]]
    for s, offset in enumerate(args["slice_offsets"]):
        a, b = wide(args["lora_a"][s]).flatten(0, -3), wide(args["lora_b"][s]).flatten(0, -3)
        for t, slot in enumerate(args["lora_indices_tensor"].tolist()):
            if 0 <= slot < len(a):
                of_row = grad[t, offset : offset + b.shape[1]]
                of_hidden = scaling * b[slot].t() @ of_row
                of_x[t] += a[slot].t() @ of_hidden
                of_a[s].flatten(0, -3)[slot] += of_hidden[:, None] * x[t]
                of_b[s].flatten(0, -3)[slot] += of_row[:, None] * (scaling * a[slot] @ x[t])
    return [of_x, *of_a, *of_b]


@pytest.mark.parametrize("block", range(20))
def test_two_hundred_random_contracts_agree_with_float64(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        case = _random_case(seed)
        args = _operands(case, seed)
        grad = torch.randn(args["base"].shape, generator=torch.Generator().manual_seed(seed)).to(args["base"])
        terms = case.D + case.W + case.R + case.T
        wanted = _wanted(args, grad, magnitude=False)
        sums = _wanted(args, grad, magnitude=True)
        for got, right, most in zip(_gradients(args, grad), wanted, sums, strict=True):
            # Each of the sums rounds once a term, and what is returned is rounded once more.
            allowed = most * 2.0**-23 * terms + right.abs() * EPS[got.dtype] + torch.finfo(got.dtype).tiny
            assert ((got.double() - right).abs() <= allowed).all(), (seed, str(case))


def _mixed(
    rows: int = 96, *, dtype: torch.dtype = F32, slots: int = 8, features: int = 100, width: int = 70
) -> list[Tensor]:
    """Inputs, gradient, A, B and indices of a batch whose rows belong to eight adapters, in no order."""
    generator, rank = torch.Generator().manual_seed(rows + slots), 12
    x, grad = (torch.randn(rows, size, generator=generator).to(dtype) for size in (features, width))
    a, b = (torch.randn(slots, *size, generator=generator) for size in ((rank, features), (width, rank)))
    return [x, grad, a.to(dtype), b.to(dtype), torch.randint(-1, min(8, slots), (rows,), generator=generator)]


def _leaves(stacks_a: list[Tensor], stacks_b: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """What gets the gradients of so many trained slots, without memory."""
    shapes_a = [(a, (count, *a.shape[1:])) for a in stacks_a]
    shapes_b = [(b, (count, b.shape[2], b.shape[1])) for b in stacks_b]
    return tuple(
        [of.new_empty(1).expand(shape).requires_grad_() for of, shape in some] for some in (shapes_a, shapes_b)
    )


def _trained(
    x: Tensor,
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    indices: Tensor,
    slots: list[int],
    scalings: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of the inputs, and of A and B of each of these slots."""
    x = x.detach().clone().requires_grad_()
    leaves_a, leaves_b = _leaves([a], [b], len(slots))
    if scalings is None:
        scalings = torch.linspace(0.5, 2.0, len(a), device=a.device)
    chosen = torch.tensor(slots, device=a.device)
    operands = [torch.zeros_like(grad)], x, [a], [b], indices, scalings, chosen, leaves_a, leaves_b
    of_x, of_a, of_b = torch.autograd.grad(TRAINED_LINEAR(*operands)[0], [x, *leaves_a, *leaves_b], grad)
    return [of_x, *of_a, *of_b.transpose(1, 2)]


def _wanted_of_slots(
    x: Tensor, grad: Tensor, a: Tensor, b: Tensor, indices: Tensor, slots: list[int], scalings: Tensor
) -> list[Tensor]:
    """What `_trained` returns, slot by slot, in the dtype of the operands."""
    of_x, of_a, of_b = torch.zeros_like(x), torch.zeros_like(a), torch.zeros_like(b)
    for slot in range(len(a)):
        mine, scaling = indices == slot, scalings[slot]
        of_hidden = scaling * grad[mine] @ b[slot]
        of_x[mine] = of_hidden @ a[slot]
        of_a[slot] = of_hidden.t() @ x[mine]
        of_b[slot] = grad[mine].t() @ (scaling * x[mine] @ a[slot].t())
    return [of_x, *of_a[slots], *of_b[slots]]


@pytest.mark.parametrize("block", range(4))
def test_two_hundred_random_contracts_of_trained_slots_agree_with_float64(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        pick = random.Random(seed)
        rows, slots, dtype = pick.choice([1, 2, 17, 90]), pick.choice([1, 3, 8, 20]), pick.choice([F32, BF16, F16])
        features, width = pick.choice([1, 33, 100]), pick.choice([1, 31, 70])
        operands = [
            tensor.to(DEVICE) for tensor in _mixed(rows, dtype=dtype, slots=slots, features=features, width=width)
        ]
        chosen = pick.sample(range(slots), pick.randint(1, slots))
        scalings = torch.tensor([pick.uniform(-2, 2) for _ in range(slots)], device=DEVICE)
        x, grad, a, b, indices = (tensor.double() if tensor.is_floating_point() else tensor for tensor in operands)
        wanted = _wanted_of_slots(x, grad, a, b, indices, chosen, scalings.double())
        most = _wanted_of_slots(x.abs(), grad.abs(), a.abs(), b.abs(), indices, chosen, scalings.double().abs())
        terms = features + width + a.shape[1] + rows
        for got, right, size in zip(_trained(*operands, chosen, scalings), wanted, most, strict=True):
            allowed = size * 2.0**-23 * terms + right.abs() * EPS[got.dtype] + torch.finfo(got.dtype).tiny
            assert ((got.double() - right).abs() <= allowed).all(), seed


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_adapter_has_the_same_gradients_alone_as_with_seven_others(dtype: torch.dtype, threads: int) -> None:
    x, grad, a, b, indices = (tensor.to(DEVICE) for tensor in _mixed(dtype=dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        of_x, *of_weights = _trained(x, grad, a, b, indices, list(range(8)))
        for slot in range(8):
            mine = indices == slot
            alone = _trained(x[mine], grad[mine], a, b, indices[mine], [slot])
            assert same_bits(alone[0], of_x[mine])
            assert same_bits(alone[1], of_weights[slot])
            assert same_bits(alone[2], of_weights[8 + slot])
    finally:
        torch.set_num_threads(before)


@on_cpu
def test_the_number_of_threads_changes_no_bit() -> None:
    operands = _mixed(400, features=300, width=200)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_trained(*operands, list(range(8))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(same_bits(left, right) for left, right in zip(found[0], other, strict=True))


@pytest.mark.parametrize("poisoned", ["inputs", "gradient", "A", "B", "scaling"])
def test_nan_of_another_tenant_reaches_nothing(poisoned: str) -> None:
    x, grad, a, b, indices = (tensor.to(DEVICE) for tensor in _mixed())
    scalings = torch.linspace(0.5, 2.0, len(a), device=a.device)
    clean = _trained(x, grad, a, b, indices, list(range(8)), scalings)
    if poisoned in ("inputs", "gradient"):
        (x if poisoned == "inputs" else grad)[indices == 3] = torch.nan
    else:
        {"A": a, "B": b, "scaling": scalings}[poisoned][3] = torch.nan
    of_x, *of_weights = _trained(x, grad, a, b, indices, list(range(8)), scalings)
    assert any(gradient.isnan().any() for gradient in (of_x, *of_weights))
    assert same_bits(of_x[indices != 3], clean[0][indices != 3])
    for position, (got, wanted) in enumerate(zip(of_weights, clean[1:], strict=True)):
        if position % 8 != 3:
            assert same_bits(got, wanted)


def test_only_trained_slots_get_gradients() -> None:
    operands = [tensor.to(DEVICE) for tensor in _mixed(slots=64)]
    whole = _trained(*operands, list(range(64)))
    of_x, *of_weights = _trained(*operands, [5, 2])
    assert same_bits(of_x, whole[0])
    assert all(map(same_bits, of_weights, (whole[1 + at] for at in (5, 2, 64 + 5, 64 + 2))))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_without_trained_slots_inputs_alone_get_gradients(dtype: torch.dtype) -> None:
    # Of float64 by plain products.
    x, grad, a, b, indices = (tensor.to(DEVICE) for tensor in _mixed())
    x, grad, a, b = (tensor.to(dtype) for tensor in (x, grad, a, b))
    wanted = _trained(x, grad, a, b, indices, [1])[0]
    x.requires_grad_()
    leaves = [[leaf.detach() for leaf in some] for some in _leaves([a], [b], 0)]
    scalings, nobody = torch.linspace(0.5, 2.0, len(a), device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    result = TRAINED_LINEAR([torch.zeros_like(grad)], x, [a], [b], indices, scalings, nobody, *leaves)[0]
    assert same_bits(torch.autograd.grad(result, x, grad)[0], wanted)


def test_slices_of_one_call_get_what_each_gets_alone() -> None:
    x, grad, a, b, indices = (tensor.to(DEVICE) for tensor in _mixed())
    stacks_a, stacks_b, grads = [a, 2 * a], [b, b[:, :9]], [grad, grad[:, :9]]
    scalings, slots = torch.linspace(0.5, 2.0, 8, device=DEVICE), torch.tensor([1, 4, 7], device=DEVICE)
    x.requires_grad_()
    leaves_a, leaves_b = _leaves(stacks_a, stacks_b, 3)
    bases = [torch.randn_like(grad), torch.randn_like(grads[1])]

    def call(part: slice) -> tuple[list[Tensor], list[Tensor]]:
        given = bases[part], x, stacks_a[part], stacks_b[part], indices, scalings, slots
        results = TRAINED_LINEAR(*given, leaves_a[part], leaves_b[part])[: len(bases[part])]
        return results, list(torch.autograd.grad(results, [x, *leaves_a[part], *leaves_b[part]], grads[part]))

    results, (of_x, *of_leaves) = call(slice(2))
    for s in range(2):
        (alone,), (x_alone, *leaves_alone) = call(slice(s, s + 1))
        torch.testing.assert_close(results[s], alone)
        of_x = of_x - x_alone
        assert same_bits(of_leaves[s], leaves_alone[0])
        assert same_bits(of_leaves[2 + s], leaves_alone[1])
    torch.testing.assert_close(of_x, torch.zeros_like(of_x), rtol=0, atol=1e-2)


def test_a_slot_that_no_row_uses_gets_zeros() -> None:
    x, grad, a, b, indices = (tensor.to(DEVICE) for tensor in _mixed(slots=10))
    a[9], b[9] = torch.nan, torch.nan
    _, of_a, of_b = _trained(x, grad, a, b, indices, [9])
    assert not of_a.any()
    assert not of_b.any()


@on_cpu
@pytest.mark.parametrize("by_rank", [False, True])
def test_plain_products_agree_with_the_native_kernel(by_rank: bool) -> None:
    operands = _mixed()
    if by_rank:
        operands[3] = operands[3].transpose(1, 2).contiguous().transpose(1, 2)
    native = _trained(*operands, [0, 2, 7])
    with force_kernel("gather"):
        plain = _trained(*operands, [0, 2, 7])
    for got, wanted in zip(native, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_trained_slots_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    base, x, a, b = (
        torch.randn(shape, generator=generator, dtype=F64).to(DEVICE)
        for shape in ((6, 5), (6, 4), (3, 2, 4), (3, 5, 2))
    )
    indices, scalings = torch.tensor([0, 2, -1, 1, 2, 0], device=DEVICE), torch.tensor([0.5, 2.0, -1.5], device=DEVICE)

    slots = torch.tensor([0, 2], device=DEVICE)

    def of(base: Tensor, x: Tensor, some_a: Tensor, some_b: Tensor) -> Tensor:
        stack_a = torch.stack([some_a[0], a[1], some_a[1]]).detach()
        stack_b = torch.stack([some_b[0].t(), b[1], some_b[1].t()]).detach()
        return TRAINED_LINEAR([base], x, [stack_a], [stack_b], indices, scalings, slots, [some_a], [some_b])[0]

    operands = base, x, a[slots], b[slots].transpose(1, 2)
    # What the stacks are made of gets the gradient through the leaves alone.
    assert torch.autograd.gradcheck(of, [tensor.contiguous().requires_grad_() for tensor in operands])


def test_trained_linear_passes_opcheck() -> None:
    x, grad, a, b, indices = (tensor.to(DEVICE) for tensor in _mixed(9))
    scalings, slots = torch.ones(8, device=DEVICE), torch.tensor([1, 4], device=DEVICE)
    leaves = [torch.zeros(2, *shape, device=DEVICE).requires_grad_() for shape in (a.shape[1:], b[0].t().shape)]
    operands = [torch.zeros_like(grad)], x.requires_grad_(), [a], [b], indices, scalings, slots, leaves[:1], leaves[1:]
    opcheck(TRAINED_LINEAR, operands)


@on_cpu
@pytest.mark.parametrize("slots", [None, [1, 4]])
def test_the_backward_op_passes_opcheck(slots: list[int] | None) -> None:
    x, grad, a, b, indices = _mixed(9)
    chosen = None if slots is None else torch.tensor(slots)
    opcheck(NATIVE_BACKWARD, ([grad], x, [a], [b], indices, [0], [0], 1.0, None, chosen, True, True))


@on_cpu
def test_operands_that_do_not_fit_are_refused() -> None:
    x, grad, a, b, indices = _mixed(9)
    with pytest.raises(RuntimeError, match="do not fit together"):
        NATIVE_BACKWARD([grad[:5]], x, [a], [b], indices, [0], [0], 1.0, None, None, True, True)
    with pytest.raises(RuntimeError, match="do not fit together"):
        NATIVE_BACKWARD([grad], x, [a], [b], indices, [0], [0], 1.0, None, torch.tensor([8]), True, True)
    one, operands = torch.tensor([1]), ([grad], x, [a], [b], indices)
    leaves_a, leaves_b = _leaves([a], [b], 1)
    with pytest.raises(ShapeError, match="trained_linear: slice 0"):
        TRAINED_LINEAR(*operands, torch.ones(8), torch.tensor([1, 2]), leaves_a, leaves_b)
    with pytest.raises(ShapeError, match="trained_linear: wanted for each slice"):
        TRAINED_LINEAR(*operands, torch.ones(8), one, leaves_a, [])
    with pytest.raises(ShapeError, match="slots: wanted int64"):
        TRAINED_LINEAR(*operands, torch.ones(8), one.float(), leaves_a, leaves_b)
    with pytest.raises(DeviceError, match="scalings and slots: wanted on cpu, as the stacks; got cpu and meta"):
        TRAINED_LINEAR(*operands, torch.ones(8), one.to("meta"), leaves_a, leaves_b)
    with pytest.raises(ShapeError, match="scalings: wanted float32"):
        TRAINED_LINEAR(*operands, torch.ones(7), one, leaves_a, leaves_b)
