"""Modules of plain PyTorch, each with one way to lay out or to reorder the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.utils.checkpoint import checkpoint

from .family import BATCH, Family, Rows, batch_first, time_first

D = 16
Step = Callable[[nn.Linear, Tensor], Tensor]


class Around(nn.Module):
    """Two layers that see the batch as usual, around a step that calls the third in its own way."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.before, self.inner, self.after = (nn.Linear(D, D) for _ in range(3))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, T, D]` to `[batch, T, D]`."""
        hidden: Tensor = self.after(torch.tanh(self.step(self.inner, torch.tanh(self.before(x)))))
        return hidden


class Experts(nn.Module):
    """A mixture of experts, each a Linear that gets the tokens which hashing sends to it, in the router's order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, T, D]` to `[batch, T, D]`: a third of the tokens for each expert."""
        tokens = x.reshape(-1, D)
        output = torch.empty_like(tokens)
        for expert, chosen in zip(self.experts, self.order.chunk(3), strict=True):
            output[chosen] = torch.tanh(expert(tokens[chosen]))
        mixed: Tensor = self.head(output.view(x.shape))
        return mixed


class Recurrent(nn.Module):
    """An LSTM and a Linear head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.before, self.lstm, self.head = nn.Linear(D, D), nn.LSTM(D, D, **options), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output for all steps."""
        output: Tensor = self.head(self.lstm(self.before(x))[0])
        return output


class Queries(nn.Module):
    """Learned queries, as many as sequences, that go through a Linear before they meet the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(BATCH, D))
        self.q_proj, self.k_proj = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores `[batch, queries, T]`."""
        return torch.einsum("qd,btd->bqt", self.q_proj(self.queries), self.k_proj(x))


class Packed(nn.Module):
    """Attention over one row that holds all sequences, with a block-diagonal mask."""

    lengths = (2, 3, 4)

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[1, sum of lengths, D]` to the same shape."""
        owner = torch.repeat_interleave(torch.arange(BATCH), torch.tensor(self.lengths))
        mask = owner[:, None] == owner
        return F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), mask)

    def rows(self, output: Tensor) -> Rows:
        """Read the output, sequence by sequence."""
        return [[part] for part in output[0].split(self.lengths)]


def batch(*shape: int) -> Callable[[], dict[str, Tensor]]:
    """Return a maker of `x`, `[3, *shape, D]`; three steps unless told."""
    return lambda: {"x": torch.randn(BATCH, *(shape or (BATCH,)), D)}


def way(name: str, step: Step, *shape: int, note: str = "") -> Family:
    """Return the family of one way to call a Linear."""
    return Family(name, lambda: Around(step), batch(*shape), batch_first(), note=note)


def sorted_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """Call the layer on the rows in another order, as code does that sorts by length."""
    order = torch.tensor([2, 0, 1])
    return layer(x[order])[order.argsort()]


def sorted_tokens(layer: nn.Linear, x: Tensor) -> Tensor:
    """Call the layer on all tokens, sorted by the expert that each belongs to."""
    order = torch.arange(x[..., 0].numel()).flip(0)
    return layer(x.reshape(-1, D)[order])[order.argsort()].view(x.shape)


def windows_first(layer: nn.Linear, x: Tensor) -> Tensor:
    """Call the layer on `[windows, batch * width, D]`, with as many windows as sequences."""
    windows = x.view(BATCH, BATCH, -1, D).transpose(0, 1)
    return layer(windows.reshape(BATCH, -1, D)).view(windows.shape).transpose(0, 1).reshape(x.shape)


def windows(layer: nn.Linear, x: Tensor) -> Tensor:
    """Call the layer on `[batch * windows, width, D]`, as Swin does."""
    return layer(x.view(-1, 2, D)).view(x.shape)


def guided(layer: nn.Linear, x: Tensor) -> Tensor:
    """Call the layer on twice the batch, as classifier-free guidance does."""
    plain, other = layer(torch.cat([x, -x])).chunk(2)
    return plain + 2 * (plain - other)


def encoder(name: str, read: Any, **options: Any) -> Family:
    """Return the family of PyTorch's own encoder, which in eval mode takes a fast path that calls no Linear."""

    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 24, dropout=0.0, **options), 1)

    return Family(name, build, lambda: {"src": torch.randn(BATCH, BATCH, D)}, read, targets=["linear1", "linear2"])


def decoder(name: str, read: Any, **options: Any) -> Family:
    """Return the family of PyTorch's own decoder."""

    def build() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, 24, dropout=0.0, **options), 1)

    def inputs() -> dict[str, Tensor]:
        return {"tgt": torch.randn(BATCH, BATCH, D), "memory": torch.randn(BATCH, BATCH, D)}

    return Family(name, build, inputs, read, targets=["linear1", "linear2"])


class Attention(nn.Module):
    """PyTorch's own attention, which reads the weight of its output layer without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to itself."""
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


FAMILIES = [
    encoder("nn.TransformerEncoder", batch_first(), batch_first=True),
    encoder("nn.TransformerEncoder (time first)", time_first),
    decoder("nn.TransformerDecoder", batch_first(), batch_first=True),
    decoder("nn.TransformerDecoder (time first)", time_first),
    Family("nn.MultiheadAttention", Attention, batch(), batch_first(), targets=["out_proj"]),
    Family("nn.LSTM", lambda: Recurrent(batch_first=True), batch(), batch_first()),
    Family("nn.LSTM (time first)", Recurrent, batch(), time_first),
    Family(
        "experts", lambda: Experts([0, 1, 8, 2, 4, 3, 7, 5, 6]), batch(), batch_first(), note="three tokens an expert"
    ),
    Family(
        "experts (six tokens each)",
        lambda: Experts([0, 1, 8, 9, 2, 4, 3, 10, 16, 17, 7, 5, 6, 11, 12, 13, 14, 15]),
        batch(6),
        batch_first(),
    ),
    Family("learned queries", Queries, batch(), batch_first()),
    Family("packed batch", Packed, lambda: {"x": torch.randn(1, sum(Packed.lengths), D)}, Packed().rows),
    way("plain", lambda layer, x: layer(x)),
    way("no time", lambda layer, x: layer(x[:, 0])[:, None]),
    way("one token of each", lambda layer, x: layer(x), 1),
    way("two dimensions of time", lambda layer, x: layer(x), BATCH, BATCH),
    way("time first", lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1)),
    way("time first (five steps)", lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1), 5),
    way("flattened", lambda layer, x: layer(x.flatten(0, 1)).view(x.shape)),
    way("flattened, one token of each", lambda layer, x: layer(x.flatten(0, 1)).view(x.shape), 1),
    way("flattened, time first", lambda layer, x: layer(x.transpose(0, 1).flatten(0, 1)).view(x.shape).transpose(0, 1)),
    way("sorted rows", sorted_rows),
    way("sorted tokens", sorted_tokens),
    way("sorted tokens, one of each", sorted_tokens, 1),
    way("windows", windows, 4),
    way("windows first", windows_first, 6),
    way("guidance", guided),
    way("guidance by turns", lambda layer, x: layer(x.repeat_interleave(2, 0))[::2]),
    way("three streams", lambda layer, x: layer(torch.stack([x, -x, 2 * x])).sum(0)),
    way("loop over sequences", lambda layer, x: torch.stack([layer(row) for row in x])),
    way("loop over steps", lambda layer, x: torch.stack([layer(step) for step in x.unbind(1)], 1)),
    way("chunks of the batch", lambda layer, x: torch.cat([layer(part) for part in x.split([2, 1])])),
    way("vmap over sequences", lambda layer, x: torch.vmap(layer)(x)),
    way("weight in F.linear", lambda layer, x: F.linear(x, layer.weight, layer.bias)),
    way("weight in a product", lambda layer, x: x @ layer.weight.T + layer.bias),
    way("forward called by name", lambda layer, x: layer.forward(x)),
    way("checkpoint", lambda layer, x: checkpoint(layer, x, use_reentrant=False)),
    way("called twice", lambda layer, x: layer(torch.tanh(layer(x)))),
]
