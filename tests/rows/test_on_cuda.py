"""Rows on a GPU: what is captured while all sequences have one adapter must serve others in its replays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.folders import write_adapter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NAMES = ["a", None, "b"]


class Flattened(nn.Module):
    """A layer that sees tokens of all sequences in one dimension, and one that has them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, 32]`, to `[batch, tokens, 16]`."""
        rows = self.first(x.flatten(0, 1)).relu()
        return self.second(rows.view(x.shape))


@pytest.fixture
def bank(tmp_path: Path) -> xlc.AdapterBank:
    torch.manual_seed(0)
    model = Flattened().cuda().requires_grad_(False)
    bank = xlc.attach(model, max_rank=8)
    for name in "ab":
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, bank.sites, 8)
        bank.load(name, tmp_path / name)
    return bank


def alone(bank: xlc.AdapterBank, x: Tensor) -> Tensor:
    """Each row as its adapter answers it with the whole batch."""
    rows = []
    for row, name in enumerate(NAMES):
        with bank.use([name] * 3):
            rows.append(bank._model(x)[row])
    return torch.stack(rows)


@torch.no_grad()
def test_each_row_has_its_own_adapter(bank: xlc.AdapterBank) -> None:
    for tokens in (1, 3, 5):
        x = torch.randn(3, tokens, 32, device="cuda")
        wanted = alone(bank, x)
        with bank.use(NAMES):
            torch.testing.assert_close(bank._model(x), wanted, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("first", [["a"] * 3, [None] * 3, NAMES], ids=["one adapter", "none", "mixed"])
def test_a_graph_that_is_captured_serves_other_names(bank: xlc.AdapterBank, first: list[str | None]) -> None:
    x = torch.randn(3, 5, 32, device="cuda")
    wanted = alone(bank, x)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with bank.use(first):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            bank._model(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            result = bank._model(x)
    with bank.use(NAMES):
        graph.replay()
        torch.testing.assert_close(result, wanted, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_serves_all_names(bank: xlc.AdapterBank, mode: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 5, 32, device="cuda")
    wanted = alone(bank, x)
    compiled = torch.compile(bank._model, backend="xpu_lora", mode=mode, fullgraph=True)
    for names in ([None] * 3, ["a"] * 3, NAMES, NAMES, NAMES):
        with bank.use(names):
            result = compiled(x).clone()
    torch.testing.assert_close(result, wanted, atol=1e-3, rtol=1e-3)
