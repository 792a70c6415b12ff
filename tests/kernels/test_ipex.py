"""IPEX's kernels as one of ours: only when forced, only where their rules hold, and visible to the compiler.

All but the first tests need the real package, with the torch that it was made for: tox leg `ipex`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, EXPAND, F16, I32, LORA_LINEAR, OPS, Case, build, cases_of, same_bits
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels import choice_for, force_kernel, ipex, kernel_for
from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.ops import reference
from xpu_lora_compile.ops.budget import budget_of

needs_ipex = pytest.mark.skipif(
    DEVICE.type != "cpu" or find_spec(ipex.PACKAGE) is None,
    reason=f"{ipex.PACKAGE} is not installed: tox leg ipex",
)


def is_for_ipex(op: str, case: Case) -> bool:
    """Whether its rules hold: one dtype of 16 bits, contiguous weights, and outputs as wide as B for what is a view."""
    dtypes = {case.inputs, case.weights, case.output, case.second or case.weights}
    is_view = op == EXPAND and case.W > case.H
    shares_columns = case.slices > 1
    return dtypes in ({BF16}, {F16}) and case.layout == "contiguous" and not is_view and not shares_columns


MORE = (
    Case(T=9, H=10, inputs=BF16, weights=BF16, output=BF16),
    Case(T=5, H=10, inputs=F16, weights=F16, output=F16, add=False, index=I32),
    Case(T=0, H=9, inputs=BF16, weights=BF16, output=BF16),
    Case(T=3, indices=(-1, -1, 4), inputs=BF16, weights=BF16, output=BF16),
    Case(T=4, indices=(0, 1, 2, 3), window="rows", inputs=BF16, weights=BF16, output=BF16),
    Case(T=4, indices=(0, 3, 2, 0), D=576, R=16, W=576, H=576, inputs=BF16, weights=BF16, output=BF16),
    Case(T=2, H=10, with_slice_dim=True, inputs=F16, weights=F16, output=F16),
    Case(T=40, D=300, R=64, W=131, H=192, inputs=BF16, weights=BF16, output=BF16),
)


def call() -> LoraCall:
    x, a, b = torch.zeros(2, 4, dtype=BF16), torch.zeros(3, 2, 4, dtype=BF16), torch.zeros(3, 5, 2, dtype=BF16)
    return LoraCall([torch.zeros(2, 5, dtype=BF16)], x, [a], [b], RowRouting(torch.zeros(2, dtype=torch.int64), 3))


def test_it_is_chosen_by_force_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipex, "problem", lambda: "")
    choice = choice_for(call())
    assert choice.kernel.name != "ipex"
    assert choice.others["ipex"] == "it rounds more often than the contract allows: it has to be forced"
    with force_kernel("ipex"):
        assert choice_for(call()).kernel.name == "ipex"
    assert ipex.Ipex().problem("cuda") == "it is for cpu, not for cuda"


def test_its_schemas_are_looked_up_only_where_a_kernel_is_forced_or_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    monkeypatch.setitem(ipex.sys.modules, ipex.PACKAGE, ipex)
    monkeypatch.setattr(ipex, "schema_of", looked_up.append)
    kernel_for(call())
    assert looked_up == []
    with force_kernel("ipex"), pytest.raises(KernelError, match="it has no punica_bgmv_shrink"):
        kernel_for(call())
    assert looked_up == [f"torch_ipex::{name}" for name in ipex.OPS]


def test_whose_float32_it_is_that_nobody_passed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipex, "problem", lambda: "")
    x, weights = torch.zeros(2, 4, dtype=BF16), torch.zeros(3, 2, 4, dtype=BF16)
    wanted = "all operands must be bfloat16, or all float16, not"
    mixed = ipex.refusal([torch.zeros(2, 2)], x, [weights])
    assert mixed.startswith(f"{wanted} bfloat16, float32 (the rank vector of an attached layer is float32 ")
    assert mixed.endswith('compile with backend="xpu_lora")')
    assert ipex.refusal([torch.zeros(2, 2)], x.float(), [weights.float()]) == f"{wanted} float32"


@pytest.mark.skipif(DEVICE.type != "cpu" or find_spec(ipex.PACKAGE) is not None, reason="it is installed, or no CPU's")
def test_forced_where_it_is_not_installed_it_is_an_error() -> None:
    call = build(LORA_LINEAR, Case(H=10, inputs=BF16, weights=BF16, output=BF16))
    with (
        force_kernel("ipex"),
        torch.no_grad(),
        pytest.raises(KernelError, match="cannot: intel_extension_for_pytorch is not installed"),
    ):
        call.run()


@needs_ipex
def test_an_op_with_another_schema_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ipex.problem() == ""
    monkeypatch.setitem(ipex.OPS, "punica_bgmv_shrink", "(Tensor(a!) _0) -> ()")
    assert "its punica_bgmv_shrink has another schema: torch_ipex::punica_bgmv_shrink(" in ipex.problem()
    monkeypatch.setitem(ipex.OPS, "punica_bgmv_shrunk", "")
    assert "it has no punica_bgmv_shrunk" in ipex.problem()
    monkeypatch.delitem(ipex.sys.modules, ipex.PACKAGE)
    assert ipex.problem() == "intel_extension_for_pytorch is not imported"


@needs_ipex
@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op}-{case}")
        for op in OPS
        for case in cases_of(op, (*MORE, *cases_of(op)))
        if is_for_ipex(op, case)
    ],
)
def test_values_are_as_near_as_its_roundings_allow_and_nothing_else_is_written(op: str, case: Case) -> None:
    call = build(op, case)
    budget, outside, before = budget_of(op, call.args), call.outside(), call.buffer.clone()
    # The rank vector and the product are rounded, each by half an eps of what they are at most.
    budget.allowed += torch.finfo(case.output).eps * magnitude_of(op, call.args)
    with force_kernel("ipex"), torch.no_grad():
        result = call.run()
    budget.check(result, call.written)
    assert same_bits(call.buffer[outside], before[outside])


def magnitude_of(op: str, args: dict[str, Any]) -> Tensor:
    """The sum of the absolute values of all products, float64."""

    def positive(value: Any) -> Any:
        if isinstance(value, list):
            return [positive(one) for one in value]
        is_float = isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
        return abs(value.double() if isinstance(value, Tensor) else value) if is_float else value

    result: Tensor = getattr(reference, op)(*map(positive, args.values()))
    return result.nan_to_num()


@needs_ipex
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "all operands must be bfloat16, or all float16, not float32"),
        ({"inputs": BF16, "weights": BF16}, "must be bfloat16, or all float16, not bfloat16, float32"),
        ({"inputs": BF16, "weights": F16, "output": BF16}, "not bfloat16, float16"),
        ({"inputs": BF16, "weights": BF16, "output": BF16, "layout": "transposed"}, "weights must be contiguous"),
    ],
    ids=["float32", "mixed", "two-halves", "strided"],
)
@pytest.mark.parametrize("op", OPS)
def test_a_call_that_breaks_a_rule_is_an_error_and_not_a_silent_nothing(
    op: str, change: dict[str, Any], message: str
) -> None:
    call = build(op, Case(H=10, **change))
    before = call.buffer.clone()
    with force_kernel("ipex"), torch.no_grad(), pytest.raises(KernelError, match=message):
        call.run()
    assert same_bits(call.buffer, before)


def operands() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = ((4, 40), (4, 24), (3, 8, 24), (3, 40, 8))
    return (*(torch.randn(shape, generator=random).to(BF16) for shape in shapes), torch.tensor([2, 0, 1, 2]))


def theirs(base: Tensor, x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    output, hidden = base * 1, x.new_zeros(len(x), a.shape[1])
    torch.ops.torch_ipex.punica_bgmv_shrink(hidden, x, a, indices, 1.0)
    torch.ops.torch_ipex.punica_bgmv_expand(output, hidden, b, indices, True)
    return output


def ours(base: Tensor, x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    output, hidden = base * 1, x.new_zeros(len(x), a.shape[1])
    xlc.bgmv_shrink(hidden, x, a, indices, 1.0)
    xlc.bgmv_expand(output, hidden, b, indices, True)
    return output


@needs_ipex
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "xpu_lora"])
@torch.no_grad()
def test_compiled_its_own_ops_lose_what_they_wrote_and_ours_keep_it(backend: str) -> None:
    given = operands()
    expected = theirs(*given)
    assert not same_bits(expected, given[0])
    torch.compiler.reset()
    lost = torch.compile(theirs, backend=backend)(*given)
    assert same_bits(lost, given[0]), "its mutation is seen now: the wrapper has done its work"
    with force_kernel("ipex"):
        assert same_bits(ours(*given), expected)
        assert same_bits(torch.compile(ours, backend=backend)(*given), expected)


@needs_ipex
@torch.no_grad()
def test_a_row_without_an_adapter_is_never_shown_to_it() -> None:
    base, x, a, b, _ = operands()
    indices = torch.tensor([-1, 1, 3, 1])
    for unused in (0, 2):
        a[unused], b[unused] = torch.nan, torch.nan
    x[[0, 2]] = torch.nan
    with force_kernel("ipex"):
        got = ours(base, x, a, b, indices)
    assert same_bits(got[[0, 2]], base[[0, 2]])
    assert same_bits(got[[1, 3]], theirs(base[[1, 3]], x[[1, 3]], a, b, indices[[1, 3]]))


@needs_ipex
@torch.no_grad()
def test_a_bank_made_while_it_is_forced_stores_b_as_it_reads_it() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False, dtype=BF16)).requires_grad_(False)
    with force_kernel("ipex"):
        xlc.attach(layer, slots=3, max_rank=8)
        _, x, a, b, indices = operands()
        layer[0].lora_a.copy_(a)
        layer[0].lora_b.copy_(b)
        assert layer[0].lora_b.is_contiguous()
        base = torch.nn.functional.linear(x, layer[0].weight)
        got = xlc.lora_linear(base, x, [layer[0].lora_a], [layer[0].lora_b], indices, [0])
    assert same_bits(got, theirs(base, x, a, b, indices))


@needs_ipex
@torch.no_grad()
def test_an_output_may_be_the_memory_of_the_inputs() -> None:
    """As in every other kernel: all is read before anything is written."""
    random = torch.Generator().manual_seed(0)
    square = torch.randn(3, 8, 8, generator=random).to(BF16)
    for indices in (torch.tensor([2, -1, 0, 1]), torch.tensor([2, 0, 0, 1])):
        x = torch.randn(4, 8, generator=random).to(BF16)
        apart, together = torch.zeros(4, 8, dtype=BF16), x.clone()
        with force_kernel("ipex"):
            xlc.bgmv_shrink(apart, x, square, indices)
            xlc.bgmv_shrink(together, together, square, indices)
            assert same_bits(apart, together)
            apart, together = x.clone(), x.clone()
            xlc.bgmv_expand(apart, x, square, indices)
            xlc.bgmv_expand(together, together, square, indices)
            assert same_bits(apart, together)


@needs_ipex
def test_a_backward_pass_is_an_error_that_says_so() -> None:
    base, x, a, b, indices = operands()
    x.requires_grad_()
    with force_kernel("ipex"):
        result = xlc.lora_linear(base, x, [a], [b], indices, [0])
        with pytest.raises(KernelError, match="wanted one that computes gradients; got 'ipex'"):
            result.sum().backward()
