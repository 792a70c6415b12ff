"""Classes of which the caller says that they are linear layers: where their weight is, and how they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import AttachError

D = 4


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = D


class Computed(Sized):
    """Its weight is a property."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.randn(D, D))

    @property
    def weight(self) -> Tensor:
        return 2 * self.stored

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Plain(Sized):
    """Its weight is a plain attribute, which no move takes along."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(D, D)
        # It says where the module computes, and nothing of the weight.
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Around(Sized):
    """Its weight is another module's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Without(Sized):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Scaled(Sized):
    """It takes more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(D, D))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x @ self.table.t() * scale


class Caller(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(x, *args, **kwargs)  # type: ignore[no-any-return]


def attached(layer: nn.Module) -> xlc.AdapterBank:
    model = Caller(layer).requires_grad_(False)
    bank = xlc.attach(model, slots=1, max_rank=2, linear_classes=[type(layer)], target_modules=["layer"])
    bank._slots[0] = "a"
    for carrier in bank._layers.values():
        carrier.lora_a.normal_()
        carrier.lora_b.normal_()
    return bank


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("kind", [Computed, Around, Scaled])
def test_a_weight_may_be_of_any_kind(kind: type[Sized], way: str) -> None:
    torch._dynamo.reset()
    layer, x = kind(), torch.randn(2, 3, D)
    base = layer(x)
    bank = attached(layer)
    run = bank._model if way == "eager" else torch.compile(bank._model, backend="eager", fullgraph=True)
    carrier = bank._layers["layer"]
    with torch.no_grad(), bank.use(["a", None]):
        got = run(x)
    wanted = torch.stack([base[0] + x[0] @ carrier.lora_a[0].t() @ carrier.lora_b[0].t(), base[1]])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("args", "kwargs"), [((2.0,), {}), ((), {"scale": 2.0})], ids=["position", "keyword"])
def test_a_call_with_more_than_the_input_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bank = attached(Scaled())
    message = (
        r"layer: wanted calls of a linear layer with its input alone, x; got one with 2 arguments\. Have its parent"
    )
    with bank.use([None]), pytest.raises(AttachError, match=message):
        bank._model(torch.ones(1, 1, D), *args, **kwargs)


@pytest.mark.parametrize("kind", [Without, Plain])
def test_a_module_that_does_not_say_where_it_computes_is_refused(kind: type[Sized]) -> None:
    with pytest.raises(AttachError, match="Register its weight as a parameter or buffer"):
        attached(kind())
