"""A compiled layer with LoRA on an Intel GPU, executed: our passes, Inductor's code, Intel's compiler (`inductor`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from intel import inductor, opencl, vendor
from support import xpu_c
from support.visible_driver import written
from torch import Tensor
from torch.nn.functional import linear, silu

import xpu_lora_compile as xlc

F32, BF16 = torch.float32, torch.bfloat16
T, D, INNER, R, K = 7, 64, 96, 4, 3
# Of q, k and v, which are packed; of gate, up and down.
WIDTHS = (32, 16, 16, INNER, INNER, D)


def layer(
    x: Tensor, qkv: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    aq: Tensor, ak: Tensor, av: Tensor, ag: Tensor, au: Tensor, ad: Tensor,
    bq: Tensor, bk: Tensor, bv: Tensor, bg: Tensor, bu: Tensor, bd: Tensor, ranks: Tensor, i: Tensor,
) -> Tensor:  # fmt: skip
    """A packed product with three slices, two products of one input and one more, with reductions between."""

    def add(product: Tensor, rows: Tensor, a: list[Tensor], b: list[Tensor], offsets: list[int]) -> Tensor:
        return xlc.lora_linear(product, rows, a, b, i, offsets, 0.5, ranks)

    wide = x.float() if x.dtype == BF16 else x
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    packed = add(linear(normed, qkv), normed, [aq, ak, av], [bq, bk, bv], [0, 32, 48])
    y = x + torch.softmax(packed, -1)
    inner = silu(add(linear(y, gate), y, [ag], [bg], [0])) * add(linear(y, up), y, [au], [bu], [0])
    return x + add(linear(inner, down), inner, [ad], [bd], [0])


def operands(dtype: torch.dtype, rows: int = T, *, by_rank: bool = True) -> list[Tensor]:
    """Seeded; no row uses slot 1, and NaN is what lies there and beyond the rank of a slot."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.tensor([R, R, 2], dtype=torch.int32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def stack(*shape: int) -> Tensor:
        made = 0.3 * random(K, R, *shape)
        made[1] = torch.nan
        made[2, 2:] = torch.nan if by_rank else 0.0
        return made

    inputs = [D] * 5 + [INNER]
    a = [stack(features) for features in inputs]
    b = [stack(width).transpose(1, 2) for width in WIDTHS]
    weights = [0.2 * random(*shape) for shape in ((D, D), (INNER, D), (INNER, D), (D, INNER))]
    indices = torch.tensor([0, 2, -1, 2, K, 0, 0])[:rows]
    b = b if by_rank else [stack.contiguous() for stack in b]
    return [random(T, D)[:rows], *weights, *a, *b, ranks, indices]


def empty_like(values: list[Tensor], device: str) -> list[Tensor]:
    return [torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device) for value in values]


def named(values: list[Tensor]) -> dict[str, Tensor | int]:
    names = layer.__code__.co_varnames[: layer.__code__.co_argcount]
    return {**dict(zip(names, values, strict=True)), "size().0": len(values[0])}


def check(got: Tensor, values: list[Tensor]) -> None:
    """Nearly as exact as the same code run eagerly, against float64: sums are taken in another order."""
    # Zeros beyond the rank of a slot, as was promised; of slot 1 nothing is read.
    known = [value.nan_to_num() for value in values]
    eager = layer(*known)
    exact = layer(*(value.double() if value.is_floating_point() else value for value in known))
    error, of_eager = ((result.double() - exact).abs() for result in (got, eager))
    assert float(error.max()) <= 3 * float(of_eager.max())
    assert float(error.mean()) <= 2 * float(of_eager.mean())


def check_kernels() -> None:
    """Ours, and Inductor's own between them."""
    ours = [name.split("_")[0] for name in opencl.launched if name.endswith("_flat")]
    assert ours == ["route", *["shrink", "expand"] * 3]
    assert any(name.startswith("triton_") for name in opencl.launched)


def test_a_layer_computes_what_it_does_eagerly(tmp_path: Path) -> None:
    """In the sizes for Intel GPUs, with 2-D block loads."""
    values = operands(BF16)
    with inductor.executing():
        code = written("xpu", False, layer, partial(empty_like, values))
        module = inductor.loaded(code, tmp_path)
        opencl.launched.clear()
        (got,) = inductor.run(module, code, named(values))
    check(got, values)
    check_kernels()
    assert "make_block_ptr" in code.code


def test_a_layer_of_any_number_of_rows_computes_what_it_does_eagerly(tmp_path: Path) -> None:
    """In float32."""
    with inductor.executing():
        code = written("xpu", True, layer, partial(empty_like, operands(F32)))
        module = inductor.loaded(code, tmp_path)
        for rows in (T, 3):
            values = operands(F32, rows)
            opencl.launched.clear()
            (got,) = inductor.run(module, code, named(values))
            check(got, values)
            check_kernels()


@pytest.mark.skipif(bool(vendor.problem()), reason=vendor.problem())
@pytest.mark.parametrize("groups", [xpu_c.LORA, xpu_c.BGMV], ids=["new", "old"])
def test_a_layer_on_the_vendors_ops_computes_what_it_does_eagerly(
    groups: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor calls them as they are, and fuses the conversion of the indices: all of it is the wheel's or its own."""
    for name in groups:
        monkeypatch.setattr(xpu_c, name, getattr(vendor, name))
    values = operands(BF16, by_rank=False)
    calls: list[str] = []
    with inductor.executing(), xpu_c.installed(groups, calls=calls):
        code = written("xpu", False, layer, partial(empty_like, values))
        module = inductor.loaded(code, tmp_path)
        opencl.launched.clear()
        (got,) = inductor.run(module, code, named(values))
    check(got, values)
    assert all(name.startswith("triton_") for name in opencl.launched)
    # Of six slices of three inputs, into four outputs.
    new, old = ["lora_shrink"] * 3 + ["lora_expand"] * 4, ["bgmv_shrink", "bgmv_expand_slice"] * 6
    assert sorted(calls) == sorted(new if groups is xpu_c.LORA else old)
