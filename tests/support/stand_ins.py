"""Stand-ins for linear layers of libraries that may not be there, or run on no CPU: the same attributes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as f


class StandInForBitsAndBytes(nn.Linear):
    """A weight of int8 with a scale, and no dtype to compute in until it is called."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.compute_dtype = None
        self.scale = self.weight.detach().abs().max() / 127
        whole = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return f.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class StandInForHqq(nn.Module):
    """No `weight` at all."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.W_q = nn.Parameter(
            torch.randint(-9, 9, (out_features, in_features), dtype=torch.int8), requires_grad=False
        )
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return f.linear(x, self.W_q.to(x.dtype) / 9, self.bias)


class StandInForFp8(nn.Linear):
    """A weight of float8, and the argument is called `input`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return f.linear(input, self.weight.to(input.dtype), self.bias)


class StandInForBaseQuantLinear(nn.Module):
    """Packed buffers."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.randint(-9, 9, (in_features, out_features), dtype=torch.int32))
        self.bias = nn.Parameter(torch.randn(out_features))


class StandInForGptq(StandInForBaseQuantLinear):
    """A kernel of it: the result is a view of a wider product."""

    def forward(self, x: Tensor) -> Tensor:
        product = x.reshape(-1, x.shape[-1]) @ f.pad(self.qweight, (0, 3)).to(x.dtype) / 9
        return (product[:, : self.out_features] + self.bias).reshape(*x.shape[:-1], self.out_features)


BY_HOST: dict[str, type[nn.Module]] = {
    "bitsandbytes": StandInForBitsAndBytes,
    "HQQ": StandInForHqq,
    "FP8 of transformers": StandInForFp8,
    "GPTQ and AWQ of gptqmodel": StandInForGptq,
}
