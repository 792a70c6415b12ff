"""Ops of other libraries that have a rule by name, and functions with a backward pass of their own: stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import UnprovedRowsError

LIBRARY = torch.library.Library("mslk", "FRAGMENT")
# By name one that has a rule, and one that has none.
for _name in ("bf16i4bf16_rowwise", "stand_in"):
    LIBRARY.define(f"{_name}(Tensor x, Tensor weight) -> Tensor")
    for _key in ("CompositeExplicitAutograd",):
        LIBRARY.impl(_name, lambda x, weight: x @ weight.mT, _key)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.saved_tensors[0], None


class Mixing(Function):
    """Gives each sequence what the one before it has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x @ weight.mT).sum(0, keepdim=True).expand(x.shape[0], -1, -1)


PRODUCTS = {
    "an op with a rule": torch.ops.mslk.bf16i4bf16_rowwise,
    "an op without one": torch.ops.mslk.stand_in,
    "a function": Function.apply,
    "a function that mixes": Mixing.apply,
}


class Model(nn.Module):
    """A product of someone else's between two layers."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.product = product
        self.kept = nn.Parameter(torch.randn(4, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(PRODUCTS[self.product](self.first(x), self.kept))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad-mode"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_are_followed_through_what_is_known_and_refused_behind_the_rest(
    product: str, way: str, grad: bool
) -> None:
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Model(product), torch.randn(3, 2, 4, requires_grad=grad)
    bank = xlc.attach(model, slots=2, max_rank=2)
    for slot in range(2):
        for layer in (model.first, model.last):
            layer.store(slot, torch.ones(2, 4) * (slot + 1), torch.ones(4, 2))
    bank._slots[:] = ["a", "b"]
    run: Any = model
    if way == "compiled":
        run = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    with torch.set_grad_enabled(grad):
        if product in ("an op with a rule", "a function"):
            wanted = []
            for name in ("a", None, "b"):
                with bank.use([name] * 3):
                    wanted.append(model(x)[len(wanted)])
            with bank.use(["a", None, "b"]):
                torch.testing.assert_close(run(x), torch.stack(wanted))
        else:
            with (
                bank.use(["a", None, "b"]),
                pytest.raises(Exception, match="last: wanted rows") as error,
            ):
                run(x)
            assert isinstance(xlc.errors.own_error(error.value), UnprovedRowsError)
