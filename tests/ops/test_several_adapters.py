"""`lora_linear` with `adapter_weights`: several adapters for a row, on every kernel, in every pass, with gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    FLOAT32_KERNELS,
    I32,
    KERNELS_HERE,
    LORA_LINEAR,
    Call,
    Case,
    build,
    same_bits,
)
from torch import Tensor
from torch.library import opcheck

import xpu_lora_compile as xlc
from xpu_lora_compile import ops
from xpu_lora_compile.errors import ContractError, DeviceError, DtypeError, KernelError, LostGradientError, ShapeError
from xpu_lora_compile.inspect.operands import every_kind_of_index, poison_unused_slots
from xpu_lora_compile.kernels import KERNELS, choice_for, force_kernel
from xpu_lora_compile.kernels.call import Kernel, LoraCall
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.ops import ADD_LORA, LORA_LINEARS, NATIVE_ADD_LORA
from xpu_lora_compile.ops.budget import budget_of
from xpu_lora_compile.passes import record_decisions

# T, M and what they are of: odd sizes, every relation of W and H that the op takes, each dtype in each place.
CASES = (
    (1, Case()),
    (2, Case()),
    (3, Case(T=9, D=129, R=17, K=3, W=65, H=67)),
    (2, Case(T=0, H=10)),
    (2, Case(T=1, K=1)),
    (2, Case(T=3, H=10, index=I32)),
    (3, Case(T=300, D=40, R=5, W=600, H=610)),
    (2, Case(H=10, inputs=BF16, weights=BF16, output=BF16)),
    (3, Case(T=9, D=129, R=17, W=33, H=35, inputs=F16, weights=F16, output=F16)),
    (2, Case(T=150, D=33, R=9, W=70, H=70, inputs=BF16, weights=BF16, output=BF16)),
    (2, Case(H=10, inputs=F16, weights=F32, output=BF16, second=BF16)),
    (2, Case(H=10, inputs=F64, weights=F64, output=F64)),
    (2, Case(H=10, layout="transposed", window="rows")),
    (2, Case(H=10, layout="strided", window="transposed", with_slice_dim=True)),
    (2, Case(H=10, slices=2)),
    (3, Case(T=9, D=129, R=17, W=33, H=35, slices=2, inputs=BF16, weights=BF16, output=BF16)),
    (2, Case(scaling=-2.5)),
)


def several(count: int, case: Case) -> Call:
    """A call with so many adapters a row, and random weights; NaN where a place has no adapter."""
    call = build(LORA_LINEAR, case)
    kinds = every_kind_of_index(case.T * count, case.K, case.index)
    indices = torch.tensor(kinds, dtype=case.index, device=DEVICE).view(case.T, count)
    if case.T:
        indices[0] = -1
    is_slot = (indices >= 0) & (indices < case.K)
    weights = torch.randn(case.T, count, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    covered = call.written.any(0)
    call.written = is_slot.any(1, keepdim=True).cpu() & covered
    # Slots that no row of the built case uses are NaN: those that are used here get numbers.
    used = set(indices[is_slot].tolist())
    draw = torch.Generator().manual_seed(2)
    for stacks in (call.args["lora_a"], call.args["lora_b"]):
        for stack in stacks:
            if case.layout != "expanded":
                stack.copy_(torch.randn(stack.shape, generator=draw).to(stack))
                poison_unused_slots(stack, used)
    call.args |= {
        "lora_indices_tensor": indices,
        "ranks": None,
        "adapter_weights": torch.where(is_slot, weights, torch.nan),
    }
    return call


every_case = pytest.mark.parametrize(("count", "case"), CASES, ids=lambda value: str(value))


@pytest.mark.parametrize("kernel", KERNELS_HERE)
@every_case
def test_values_are_within_the_budget_and_nothing_else_is_written(kernel: str, count: int, case: Case) -> None:
    if kernel in FLOAT32_KERNELS and F64 in (case.inputs, case.weights, case.output):
        pytest.skip("it computes in float32")
    call = several(count, case)
    budget, outside, before = budget_of(LORA_LINEAR, call.args), call.outside(), call.buffer.clone()
    with force_kernel(kernel), torch.no_grad():
        result = call.run()
    budget.check(result, call.written)
    assert same_bits(call.buffer[outside], before[outside])
    keep = ~call.written.to(DEVICE)
    assert same_bits(result[keep], call.output[keep])


@every_case
def test_the_eager_call_takes_the_same_values_and_returns_a_new_tensor(count: int, case: Case) -> None:
    call = several(count, case)
    budget = budget_of(LORA_LINEAR, call.args)
    result = call.run()
    budget.check(result, call.written)
    assert (result.shape, result.dtype, result.is_contiguous()) == (call.output.shape, case.output, True)
    assert result.untyped_storage().data_ptr() != call.buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize("kernel", KERNELS_HERE)
def test_a_row_with_one_adapter_of_weight_one_gets_what_it_gets_without_weights(kernel: str) -> None:
    call = build(LORA_LINEAR, Case(T=9, D=129, R=17, W=33, H=35, inputs=BF16, weights=BF16, output=BF16))
    indices = call.args["lora_indices_tensor"]
    with force_kernel(kernel), torch.no_grad():
        plain = call.run()
        call.args["lora_indices_tensor"] = torch.stack([torch.full_like(indices, -1), indices], 1)
        assert same_bits(ops.lora_linear(**call.args, adapter_weights=torch.ones(9, 2, device=DEVICE)), plain)


@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.parametrize("rows", [3, 40, 130])
def test_a_row_has_the_same_bits_whatever_the_other_rows_have(kernel: str, rows: int) -> None:
    case = Case(T=rows, D=129, R=17, W=65, H=65, inputs=BF16, weights=BF16, output=BF16)
    call = several(3, case)
    with force_kernel(kernel), torch.no_grad():
        call.args["lora_indices_tensor"][1] = torch.tensor([2, 0, 1], device=DEVICE)
        call.args["adapter_weights"][1] = torch.tensor([0.5, -1.0, 2.0], device=DEVICE)
        for stack in (*call.args["lora_a"], *call.args["lora_b"]):
            stack.nan_to_num_()
        first = call.run()[1].clone()
        others = torch.arange(rows, device=DEVICE) != 1
        call.args["lora_indices_tensor"][others] = call.args["lora_indices_tensor"][others].roll(1, 1)
        call.args["adapter_weights"][others] = 3.0
        assert same_bits(call.run()[1], first)


@pytest.mark.parametrize("kernel", KERNELS_HERE)
def test_a_not_a_number_in_one_adapter_stays_in_the_rows_that_have_it(kernel: str) -> None:
    call = several(2, Case(T=4, K=4, H=10))
    indices = torch.tensor([[0, 1], [1, 2], [0, -1], [-1, -1]], device=DEVICE)
    call.args |= {"lora_indices_tensor": indices, "adapter_weights": torch.ones(4, 2, device=DEVICE)}
    for stack in (*call.args["lora_a"], *call.args["lora_b"]):
        stack.nan_to_num_(1.0)
        stack[2:] = torch.nan
    call.args["base"].nan_to_num_()
    with force_kernel(kernel), torch.no_grad():
        result = call.run()
    assert result.isfinite().all(1).tolist() == [True, False, True, True]


def test_a_kernel_that_takes_one_adapter_refuses() -> None:
    matrix = torch.ones(2, 3, device=DEVICE)
    indices, weights = torch.zeros(2, 2, dtype=I32, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    stacks = [torch.ones(1, 3, 3, device=DEVICE)]
    call = LoraCall([matrix], matrix, stacks, stacks, RowRouting(indices, 1, adapter_weights=weights))
    choice = choice_for(call)
    assert choice.kernel.takes_several
    refusing = [kernel for kernel in KERNELS if not kernel.takes_several]
    assert refusing
    for kernel in refusing:
        assert kernel.problem(DEVICE.type) or choice.others[kernel.name] == "it takes one adapter for a row"
    assert not Kernel.takes_several


# Errors.


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"adapter_weights": torch.ones(5)}, ShapeError, "a weight for each index"),
        ({"adapter_weights": torch.ones(5, 3)}, ShapeError, "a weight for each index"),
        ({"adapter_weights": torch.ones(4, 2)}, ShapeError, "a weight for each index"),
        ({"adapter_weights": torch.ones(5, 2, dtype=torch.int64)}, DtypeError, "adapter_weights"),
        ({"adapter_weights": torch.ones(5, 2).to_sparse()}, ContractError, "a dense tensor"),
        ({"adapter_weights": torch.ones(5, 2, device="meta")}, DeviceError, "adapter_weights"),
        ({"adapter_weights": [[1.0, 1.0]] * 5}, ShapeError, "torch.tensor"),
        ({"adapter_weights": None}, ShapeError, "one index a row"),
        ({"lora_indices_tensor": torch.zeros(5, dtype=torch.int64)}, ShapeError, "M indices a row"),
        ({"lora_indices_tensor": torch.zeros(5, 2)}, DtypeError, "int32 or int64"),
        (
            {"lora_indices_tensor": torch.zeros(5, 0, dtype=torch.int64), "adapter_weights": torch.ones(5, 0)},
            ShapeError,
            "at least one a row",
        ),
        (
            {"lora_indices_tensor": torch.zeros(4, 2, dtype=torch.int64), "adapter_weights": torch.ones(4, 2)},
            ShapeError,
            "T = 4 rows",
        ),
    ],
)
@pytest.mark.parametrize("way", ["eager", "fake"])
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception], text: str, way: str) -> None:
    if way == "fake" and isinstance(changes.get("adapter_weights"), list):
        pytest.skip("Dynamo takes no lists of lists for a tensor")
    call = several(2, Case(H=10))
    args = call.args | {
        name: value.to(DEVICE) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in changes.items()
    }
    if way == "fake":
        args = {name: _meta(value) for name, value in args.items()}
        # A tensor that was elsewhere has to be so here, too.
        if error is DeviceError:
            args["adapter_weights"] = torch.ones(5, 2)
    with pytest.raises(error, match=text):
        (ops.lora_linear if way == "eager" else torch.ops.xpu_lora.lora_linear.default)(**args)


def _meta(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [item.to("meta") for item in value]
    return value.to("meta") if isinstance(value, Tensor) else value


# Dispatch and gradients.


@pytest.mark.parametrize(("count", "case"), [CASES[3], CASES[13]], ids=lambda value: str(value))
def test_the_ops_pass_opcheck(count: int, case: Case) -> None:
    call = several(count, replace(case, H=10))
    opcheck(torch.ops.xpu_lora.lora_linear.default, (), call.args)
    base, inputs, a, b, indices, _, scaling, _, weights = call.args.values()
    outputs = [base.contiguous(), base.clone()]
    places = ([0, 0, 1], [0, 1, 0], scaling)
    opcheck(LORA_LINEARS, (outputs, inputs, a * 3, b * 3, indices, *places, None, weights))
    opcheck(ADD_LORA, (outputs, inputs, a * 3, b * 3, indices, *places), {"adapter_weights": weights})


def test_the_op_passes_opcheck_where_all_operands_need_gradients() -> None:
    for case in (Case(), Case(T=3, H=10, slices=2, with_slice_dim=True, inputs=BF16)):
        args = several(2, case).args
        for name in ("base", "inputs", "adapter_weights"):
            args[name] = args[name].detach().nan_to_num().requires_grad_()
        for name in ("lora_a", "lora_b"):
            args[name] = [weights.nan_to_num().detach().requires_grad_() for weights in args[name]]
        opcheck(torch.ops.xpu_lora.lora_linear.default, (), args)


def _as_function(count: int, case: Case) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    args = several(count, case).args
    slices = len(args["lora_a"])
    indices, offsets, scaling = (args[name] for name in ("lora_indices_tensor", "slice_offsets", "scaling"))

    def function(base: Tensor, inputs: Tensor, factors: Tensor, *weights: Tensor) -> Tensor:
        a, b = weights[:slices], weights[slices:]
        return xlc.lora_linear(base, inputs, a, b, indices, offsets, scaling, adapter_weights=factors)

    operands = [args["base"], args["inputs"], args["adapter_weights"].double(), *args["lora_a"], *args["lora_b"]]
    return function, tuple(operand.detach().nan_to_num().requires_grad_() for operand in operands)


SMALL = {"T": 5, "D": 3, "R": 2, "K": 2, "W": 3, "H": 5, "inputs": F64, "weights": F64, "output": F64}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("case", [Case(**SMALL), Case(**SMALL, slices=2, scaling=-0.5)], ids=str)
def test_gradients_are_right(case: Case, compiled: bool) -> None:
    torch.compiler.reset()
    function, operands = _as_function(3, case)
    called = torch.compile(function, fullgraph=True, backend="inductor") if compiled else function
    assert torch.autograd.gradcheck(called, operands)


def test_one_adapter_of_weight_one_has_the_gradients_of_a_call_without_weights() -> None:
    function, operands = _as_function(1, Case(T=5, H=10, inputs=F64, weights=F64, output=F64))
    args = several(1, Case(T=5, H=10, inputs=F64, weights=F64, output=F64)).args
    base, inputs, factors, a, b = operands
    with torch.no_grad():
        factors.fill_(1.0)
    got = torch.autograd.grad(function(*operands).square().sum(), (base, inputs, a, b))
    plain = xlc.lora_linear(base, inputs, [a], [b], args["lora_indices_tensor"][:, 0], args["slice_offsets"], 0.75)
    for grad, wanted in zip(got, torch.autograd.grad(plain.square().sum(), (base, inputs, a, b)), strict=True):
        assert torch.equal(grad, wanted)


def test_weights_of_places_without_an_adapter_get_no_gradient_and_give_none() -> None:
    function, operands = _as_function(2, Case(T=5, H=10, inputs=F64, weights=F64, output=F64))
    indices = several(2, Case(T=5, H=10)).args["lora_indices_tensor"]
    with torch.no_grad():
        operands[2][(indices < 0) | (indices >= 4)] = torch.nan
    _, grad_inputs, grad_factors, *grads = torch.autograd.grad(function(*operands).sum(), operands)
    assert torch.equal(grad_factors != 0, (indices >= 0) & (indices < 4))
    assert all(grad.isfinite().all() for grad in (grad_inputs, *grads))


def test_an_op_in_place_refuses_weights_that_want_a_gradient() -> None:
    base, inputs, a, b, indices, offsets, scaling, _, weights = several(2, Case(H=10)).args.values()
    with pytest.raises(LostGradientError):
        ADD_LORA(
            [base], inputs, a, b, indices, [0], offsets, scaling, adapter_weights=weights.detach().requires_grad_()
        )


# Compiled.


def _query_and_key(x: Tensor, wq: Tensor, wk: Tensor, args: dict[str, Any], index: Tensor, weights: Tensor) -> Any:
    (a,), (b,) = args["lora_a"], args["lora_b"]
    q, k = torch.nn.functional.linear(x, wq), torch.nn.functional.linear(x, wk)
    # Looked up twice, as two layers do.
    q = xlc.lora_linear(q, x, [a], [b], index[:, :2], [0], adapter_weights=weights[:, :2])
    k = xlc.lora_linear(k, x, [a], [b], index[:, :2], [0], adapter_weights=weights[:, :2])
    return q.sin(), k.cos()


@pytest.mark.parametrize("options", [{"xpu_lora.execute": "eager"}, {}], ids=["rewritten", "generated"])
def test_compiled_calls_on_one_input_are_one_call_and_right(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    call = several(3, Case(T=6, W=8, H=8))
    x, index, weights = (call.args[name] for name in ("inputs", "lora_indices_tensor", "adapter_weights"))
    wq, wk = (torch.randn(8, 7, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (1, 2))
    with torch.no_grad(), record_decisions() as decisions:
        wanted = _query_and_key(x, wq, wk, call.args, index, weights)
        compiled: Any = torch.compile(_query_and_key, backend="xpu_lora", fullgraph=True, options=options)
        got = compiled(x, wq, wk, call.args, index, weights)
    torch.testing.assert_close(got, wanted)
    notes = list(itertools.chain.from_iterable(decision.notes for decision in decisions))
    assert any(note.startswith("share_input: one call") for note in notes)


def test_calls_with_other_weights_are_not_shared() -> None:
    torch.compiler.reset()
    call = several(2, Case(T=6, W=8, H=8))
    base, x, a, b, index, *_, weights = call.args.values()

    def run(one: Tensor, other: Tensor) -> Any:
        q = xlc.lora_linear(base.sin(), x, a, b, index, [0], adapter_weights=one)
        k = xlc.lora_linear(base.cos(), x, a, b, index, [0], adapter_weights=other)
        return q.sin(), k.sin()

    with torch.no_grad():
        other = weights * 3
        wanted = run(weights, other)
        compiled: Any = torch.compile(run, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
        torch.testing.assert_close(compiled(weights, other), wanted)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for CPUs")
def test_the_native_op_is_what_is_lowered_to_and_gives_the_op_without_python_to_inductor() -> None:
    base, inputs, a, b, indices, offsets, scaling, _, weights = several(2, Case(H=10)).args.values()
    wanted = xlc.lora_linear(base, inputs, a, b, indices, offsets, scaling, adapter_weights=weights)
    output = base.clone()
    NATIVE_ADD_LORA([output], inputs, a, b, indices, [0], offsets, scaling, adapter_weights=weights)
    assert same_bits(output, wanted)


def test_a_forced_kernel_that_takes_one_adapter_says_so() -> None:
    refusing = [kernel.name for kernel in KERNELS if not kernel.takes_several and not kernel.problem(DEVICE.type)]
    if not refusing:
        pytest.skip("all kernels here take several")
    call = several(2, Case(H=10))
    with force_kernel(refusing[0]), pytest.raises(KernelError, match="one adapter for a row"):
        call.run()
