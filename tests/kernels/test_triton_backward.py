"""The Triton kernels of gradients: compiled where XPU_LORA_TEST_DEVICE names a GPU, interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from kernels.test_visible import said_by_the_driver
from support.cases import BF16, DEVICE, F16, F32, F64, I32, I64, same_bits
from support.poison import poison_new_memory
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from xpu_lora_compile import lora_linear
from xpu_lora_compile.kernels import force_kernel, takes_triton_backward, triton_gradients, triton_launch
from xpu_lora_compile.ops import TRAINED_LINEAR, TRITON_TRAINING_TILES, reference
from xpu_lora_compile.ops.internal import TRITON_BACKWARD
from xpu_lora_compile.ops.lora_linear import LORA_LINEARS

pytestmark = pytest.mark.skipif(
    bool(triton_launch.problem(DEVICE.type)), reason=f"no Triton: {triton_launch.problem(DEVICE.type)}"
)

EPS = {F32: 2.0**-23, BF16: 2.0**-8, F16: 2.0**-10}


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_memory(monkeypatch)


@dataclass(frozen=True)
class Shape:
    """A call.

    Attributes:
        T: rows.
        D: input features.
        slices: for each its output, its first column there, W and R.
        K: slots.
        inputs: dtype of the rows.
        weights: dtypes of A and B.
        output: dtype of the outputs and their gradients.
        index: dtype of the indices.
        layout: how the weights lie: "contiguous", "by_rank" for B with the columns of a rank side by side, or
            "strided" with gaps; the latter also of rows and gradients.
        with_slice_dim: whether weights have vLLM's extra 1 in second place.
    """

    T: int = 9
    D: int = 20
    slices: tuple[tuple[int, int, int, int], ...] = ((0, 0, 13, 3),)
    K: int = 2
    inputs: torch.dtype = F32
    weights: tuple[torch.dtype, torch.dtype] = (F32, F32)
    output: torch.dtype = F32
    index: torch.dtype = I64
    layout: str = "contiguous"
    with_slice_dim: bool = False


LOW = {"inputs": BF16, "weights": (BF16, BF16), "output": BF16}
SHAPES = {
    "float32": Shape(),
    "bfloat16": Shape(**LOW),
    "float16": Shape(inputs=F16, weights=(F16, F16), output=F16),
    "mixed-dtypes": Shape(inputs=BF16, weights=(F32, F16), output=F32),
    "float32-weights": Shape(inputs=BF16, weights=(F32, F32), output=BF16),
    "several-steps": Shape(T=140, K=1, **LOW),
    "several-steps-float32": Shape(T=80, K=1),
    "several-blocks": Shape(D=131, slices=((0, 0, 70, 35),), K=2, **LOW),
    "several-sums": Shape(T=3, D=1100, slices=((0, 0, 600, 3),), K=2, **LOW),
    "more-slices-than-a-launch-takes": Shape(T=3, slices=tuple((0, 2 * s, 2, 1) for s in range(9)), K=2, **LOW),
    "no-rows": Shape(T=0, with_slice_dim=True),
    "one-of-each": Shape(T=1, D=1, slices=((0, 0, 1, 1),), K=1),
    "unused-slots": Shape(T=2, K=4, index=I32),
    "by-rank": Shape(layout="by_rank", **LOW),
    "strided": Shape(layout="strided", with_slice_dim=True, **LOW),
    "slices-that-share-columns": Shape(slices=((0, 2, 9, 3), (0, 5, 7, 2))),
    "two-outputs": Shape(slices=((0, 2, 9, 3), (1, 0, 17, 5), (1, 3, 2, 1)), **LOW),
}


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers, no two of which are neighbours; NaN between them."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def routed(rows: int, slots: int, dtype: torch.dtype = I64) -> Tensor:
    """Slots, and every kind of index that is none."""
    none = [-1, slots, torch.iinfo(dtype).max, torch.iinfo(dtype).min]
    mixed = [(t * 7 + t // 3) % (slots + 1) for t in range(rows)]
    return torch.tensor([none[t % 4] if i == slots else i for t, i in enumerate(mixed)], dtype=dtype, device=DEVICE)


class Call:
    """The operands of `lora_linears` and of its gradients; weights of slots that no row uses are NaN."""

    def __init__(self, shape: Shape) -> None:
        dim = (1,) if shape.with_slice_dim else ()
        edit = with_gaps if shape.layout == "strided" else lambda tensor: tensor
        widths = {o: max(at + w for p, at, w, _ in shape.slices if p == o) + 2 for o, *_ in shape.slices}
        self.indices = routed(shape.T, shape.K, shape.index)
        self.x = edit(numbers(shape.T, shape.D, seed=1, dtype=shape.inputs))
        self.bases = [torch.zeros(shape.T, width, dtype=shape.output, device=DEVICE) for width in widths.values()]
        self.grads = [edit(numbers(*base.shape, seed=2 + o, dtype=shape.output)) for o, base in enumerate(self.bases)]
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []
        for s, (*_, width, rank) in enumerate(shape.slices):
            a = numbers(shape.K, *dim, rank, shape.D, seed=5 + s, dtype=shape.weights[0])
            b = numbers(shape.K, *dim, width, rank, seed=9 + s, dtype=shape.weights[1])
            if shape.layout == "by_rank":
                b = b.transpose(-1, -2).contiguous().transpose(-1, -2)
            for slot in {*range(shape.K)} - {*self.indices.tolist()}:
                a[slot], b[slot] = torch.nan, torch.nan
            self.a.append(edit(a))
            self.b.append(edit(b))
        self.places = [o for o, *_ in shape.slices], [at for _, at, *_ in shape.slices]

    def gradients(self, *, inputs: bool = True, weights: bool = True) -> list[Tensor]:
        """Those of the rows, of each A and each B, as far as they are wanted."""
        operands = self.grads, self.x, self.a, self.b, self.indices, *self.places, 0.75
        made: list[Tensor] = TRITON_BACKWARD(*operands, None, None, inputs, weights)
        return made

    def wanted(self, edit: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Tensor]:
        """The same in float64, by autograd through the reference."""
        leaves = [edit(t.detach().cpu().double().nan_to_num()).requires_grad_() for t in (self.x, *self.a, *self.b)]
        x, a, b = leaves[0], leaves[1 : 1 + len(self.a)], leaves[1 + len(self.a) :]
        # Without rows, too, all have a gradient.
        total = sum((leaf.sum() * 0 for leaf in leaves), torch.zeros((), dtype=F64))
        for o, grad in enumerate(self.grads):
            mine = [s for s, to in enumerate(self.places[0]) if to == o]
            base, offsets = torch.zeros(grad.shape, dtype=F64), [self.places[1][s] for s in mine]
            operands = [a[s] for s in mine], [b[s] for s in mine], self.indices.cpu(), offsets, 0.75
            total = total + (reference.lora_linear(base, x, *operands) * edit(grad.cpu().double())).sum()
        return list(torch.autograd.grad(total, leaves))


def check(got: Sequence[Tensor], right: Sequence[Tensor], magnitudes: Sequence[Tensor], terms: int) -> None:
    """Each of the sums rounds once a term, and what is returned is rounded once more."""
    for mine, exact, most in zip(got, right, magnitudes, strict=True):
        allowed = most * 2.0**-23 * terms + exact.abs() * EPS[mine.dtype] + torch.finfo(mine.dtype).tiny
        assert mine.shape == exact.shape
        assert ((mine.cpu().double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_gradients_are_those_of_float64_but_for_rounding(shape: Shape) -> None:
    call = Call(shape)
    got = call.gradients()
    terms = shape.T + shape.D + sum(w + r for *_, w, r in shape.slices)
    check(got, call.wanted(), call.wanted(torch.abs), terms)
    assert [made.dtype for made in got] == [call.x.dtype, *(stack.dtype for stack in (*call.a, *call.b))]


@pytest.mark.parametrize("layer", ["lora_linears", "trained_linear"])
def test_autograd_takes_the_kernels_and_not_plain_products(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    real = triton_gradients.backward

    def noted(launch: Callable[..., None], *args: Any) -> list[Tensor]:
        def launch_noted(kernel: str, *operands: Any, **options: Any) -> None:
            launched.append(kernel)
            launch(kernel, *operands, **options)

        return real(launch_noted, *args)

    monkeypatch.setattr(triton_gradients, "backward", noted)
    # Of a D that is summed in two parts.
    call = Call(Shape(T=3, K=2, D=600))
    leaves = [tensor.requires_grad_() for tensor in (call.x, *call.a, *call.b)]
    with force_kernel("triton"):
        if layer == "lora_linears":
            outputs = LORA_LINEARS(call.bases, call.x, call.a, call.b, call.indices, *call.places, 0.75)
            expected = call.gradients()
        else:
            one = torch.full((2,), 0.75, device=DEVICE)
            slot = torch.tensor([1], device=DEVICE)
            views = [stack[1:2].detach().requires_grad_() for stack in (call.a[0], call.b[0].transpose(1, 2))]
            tiles = TRITON_TRAINING_TILES(call.indices, 2)
            given = call.indices, one, slot, views[:1], views[1:], tiles
            (outputs, *_) = TRAINED_LINEAR(call.bases, call.x, call.a, call.b, *given)
            added = call.x, call.a, call.b, call.indices, call.places[1], 0.75
            torch.testing.assert_close(outputs, reference.lora_linear(call.bases[0], *added))
            leaves = [call.x, *views]
            of_x, of_a, of_b = call.gradients()
            expected = [of_x, of_a[1:2], of_b[1:2].transpose(1, 2)]
        launched.clear()
        got = torch.autograd.grad(outputs, leaves, call.grads)
    torch.testing.assert_close(got, tuple(expected))
    # What the forward pass has need not be computed again.
    first, sums = ["route_kernel", "shrink_kernel", "shrink_kernel"], ["weights_gradient_kernel"] * 2
    if layer == "trained_linear":
        # Both gradients lie alike there.
        first, sums = ["shrink_kernel"], ["weights_gradient_kernel"]
    assert launched == [*first, *sums, "inputs_gradient_kernel"]


def test_a_graph_of_the_backward_pass_has_one_call() -> None:
    texts: list[str] = []

    def noted(module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        texts.append(str(module.graph))
        return make_boxed_func(module.forward)

    def function(base: Tensor, x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        return lora_linear(base, x, [a], [b], indices, [0], 0.75)

    torch._dynamo.reset()
    call = Call(Shape(T=3))
    leaves = [tensor.requires_grad_() for tensor in (call.x, *call.a, *call.b)]
    with force_kernel("triton"):
        compiled: Any = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=noted))
        got = torch.autograd.grad(compiled(call.bases[0], *leaves, call.indices), leaves, call.grads)
    torch.testing.assert_close(got, tuple(call.gradients()))
    # On a GPU AOT has put the launches in its place.
    assert [text.count("xpu_lora.triton_backward") for text in texts] == [0, int(triton_launch.is_interpreting())]


def test_what_the_kernels_cannot_compute_is_left_to_plain_products() -> None:
    ones = partial(torch.ones, device=DEVICE)
    grad, x, a, b = ones(2, 5), ones(2, 3), ones(4, 1, 3), ones(4, 5, 1)
    # Nobody waits for the interpreter who has not asked for it.
    assert takes_triton_backward([grad], x, [a], [b]) == (DEVICE.type != "cpu")
    with force_kernel("gather"):
        assert not takes_triton_backward([grad], x, [a], [b])
    with force_kernel("triton"):
        assert takes_triton_backward([grad], x, [a], [b])
        assert not takes_triton_backward([grad.double()], x, [a], [b])
        # Of two K, there is no one routing.
        assert not takes_triton_backward([grad], x, [a, a[:2]], [b, b[:2]])


# Trained slots.


def mixed(rows: int = 20, dtype: torch.dtype = BF16) -> list[Tensor]:
    """Inputs, gradient, A, B and indices of a batch of five adapters; B as a bank stores it."""
    x, grad = numbers(rows, 20, seed=1, dtype=dtype), numbers(rows, 13, seed=2, dtype=dtype)
    a, b = numbers(5, 4, 20, seed=3, dtype=dtype), numbers(5, 4, 13, seed=4, dtype=dtype).transpose(1, 2)
    return [x, grad, a, b, routed(rows, 5)]


SCALINGS = [0.5, 2.0, -1.5, 1.0, 0.25]


def trained(
    x: Tensor, grad: Tensor, a: Tensor, b: Tensor, indices: Tensor, slots: list[int], *others: float
) -> list[Tensor]:
    """The gradients of the inputs, and of A and B of each of these slots."""
    scalings = torch.tensor(others or SCALINGS, device=DEVICE)
    call = [grad], x, [a], [b], indices, [0], [0], 1.0
    of_x, of_a, of_b = TRITON_BACKWARD(*call, scalings, torch.tensor(slots, device=DEVICE), True, True)
    return [of_x, *of_a, *of_b.transpose(1, 2)]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_trained_slots_alone_get_gradients_each_of_its_own_scaling(dtype: torch.dtype) -> None:
    x, grad, a, b, indices = mixed(dtype=dtype)
    slots = [0, 4, 2]
    got = trained(x, grad, a, b, indices, slots)
    wide = [tensor.cpu().double() for tensor in (x, grad, a, b)]

    def wanted(edit: Callable[[Tensor], Tensor]) -> list[Tensor]:
        rows, of_rows, stack_a, stack_b = map(edit, wide)
        of_x, of_a, of_b = torch.zeros_like(rows), torch.zeros_like(stack_a), torch.zeros_like(stack_b)
        for t, slot in enumerate(indices.tolist()):
            if 0 <= slot < 5:
                scaling = edit(torch.tensor(SCALINGS[slot]))
                of_hidden = scaling * stack_b[slot].t() @ of_rows[t]
                of_x[t] = stack_a[slot].t() @ of_hidden
                of_a[slot] += of_hidden[:, None] * rows[t]
                of_b[slot] += of_rows[t][:, None] * (scaling * stack_a[slot] @ rows[t])
        return [of_x, *(of_a[slot] for slot in slots), *(of_b[slot] for slot in slots)]

    check(got, wanted(lambda tensor: tensor), wanted(torch.abs), 20 + 20 + 13 + 4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_adapter_has_the_same_gradients_alone_as_with_others(dtype: torch.dtype) -> None:
    """Of 70 rows, more than one step of the sums takes, and of tiles of other heights in the forward pass."""
    x, grad, a, b, _ = mixed(88, dtype)
    indices = torch.tensor([3 if t % 5 else t % 4 - 1 for t in range(88)], device=DEVICE)
    of_x, *of_weights = trained(x, grad, a, b, indices, [1, 3])
    for position, slot in enumerate((1, 3)):
        mine = indices == slot
        alone = trained(x[mine], grad[mine], a, b, indices[mine], [slot])
        assert same_bits(alone[1], of_weights[position])
        assert same_bits(alone[2], of_weights[2 + position])
        # numpy's sums depend on the shape of a product.
        torch.testing.assert_close(alone[0], of_x[mine])


def test_nan_of_another_tenant_reaches_nothing() -> None:
    x, grad, a, b, indices = mixed(12)
    # Slot 0 is where a kernel would look for a row without an adapter.
    slots, others = [1, 2], (indices != 0) & (indices >= 0) & (indices < 5)
    clean = trained(x, grad, a, b, indices, slots)
    # Rows of one adapter, and such as have none, have NaN; and so have weights and scaling of the adapter.
    for rows in (x, grad):
        rows[~others] = torch.nan
    a[0], b[0] = torch.nan, torch.nan
    got = trained(x, grad, a, b, indices, slots, torch.nan, *SCALINGS[1:])
    assert same_bits(got[0][others], clean[0][others])
    assert not got[0][(indices < 0) | (indices >= 5)].any()
    assert all(map(same_bits, got[1:], clean[1:]))


def test_a_trained_slot_without_rows_gets_zeros() -> None:
    x, grad, a, b, indices = mixed(6)
    indices[indices == 1] = -1
    a[1], b[1] = torch.nan, torch.nan
    _, of_a, of_b = trained(x, grad, a, b, indices, [1], SCALINGS[0], torch.nan, *SCALINGS[2:])
    assert not of_a.any()
    assert not of_b.any()


@pytest.mark.parametrize("wanted", ["inputs", "weights"])
def test_only_what_is_wanted_is_computed(wanted: str) -> None:
    call = Call(Shape(T=5, K=2))
    whole, got = call.gradients(), call.gradients(**{"inputs": False, "weights": False, wanted: True})
    assert len(got) == (1 if wanted == "inputs" else 2)
    assert all(map(same_bits, got, whole[:1] if wanted == "inputs" else whole[1:]))


@pytest.mark.parametrize("slots", [None, [1, 2]])
def test_the_op_is_what_its_schema_says(slots: list[int] | None) -> None:
    call = Call(Shape(T=5, K=3, with_slice_dim=not slots, layout="by_rank"))
    chosen = None if slots is None else torch.tensor(slots, device=DEVICE)
    operands = call.grads, call.x, call.a, call.b, call.indices, *call.places, 0.75, None, chosen
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(TRITON_BACKWARD, (*operands, True, True), test_utils=tests)


# What Inductor makes of the op, without a GPU.


def test_inductor_launches_the_kernels_and_copies_nothing(tmp_path: Path) -> None:
    """Where the number of rows is symbolic."""
    report = said_by_the_driver("cuda", tmp_path, "gradients")
    # The routing, two shrinks a slice, dA of both, dB of both, dX. Of trained slots: the routing; both ways together; a
    # shrink a slice, all dA and dB, dX.
    assert report["launches"] == report["runs"] == (1 + 2 * 2 + 2 + 1) + (1 + 2 + 2 + 1 + 1)
    assert report["python"] == report["copies"] == []
    assert sorted(report["compiled"]) == [
        "expand_kernel_0_1_without_ranks_flat",
        "inputs_gradient_kernel_0_1_flat",
        "inputs_gradient_kernel_0_1_without_scalings_flat",
        "route_kernel_flat",
        "shrink_kernel_0_1_without_ranks_flat",
        "shrink_kernel_0_without_ranks_flat",
        "weights_gradient_kernel_0_1_0_0_without_trained_without_scalings_flat",
        "weights_gradient_kernel_0_1_2_3_0_1_0_3_flat",
        "weights_gradient_kernel_0_1_without_trained_without_scalings_flat",
    ]
    assert all(report["compiled"].values())


def test_without_features_there_are_no_gradients_of_them() -> None:
    x, a, b = torch.ones(3, 0, device=DEVICE), torch.ones(2, 2, 0, device=DEVICE), torch.ones(2, 4, 2, device=DEVICE)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    with force_kernel("triton"):
        result = lora_linear(torch.ones(3, 4, device=DEVICE), x, [a], [b], torch.tensor([0, 1, -1], device=DEVICE), [0])
        of_x, of_a, of_b = torch.autograd.grad(result.sum(), leaves)
    assert (of_x.shape, of_a.shape, of_b.tolist()) == (x.shape, a.shape, torch.zeros(2, 4, 2).tolist())
