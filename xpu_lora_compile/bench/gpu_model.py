"""`xpu-lora bench gpu-model`: a decoding step of a whole model in a CUDA graph, with mixed adapters and without."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.bench.measure import WRONG_NUMBERS, Timing, machine, timing_of
from xpu_lora_compile.bench.model import BASE, MIXED, SMOLLM2, TARGETS
from xpu_lora_compile.errors import BenchError

# The second's sizes are those of huggingface.co/meta-llama/Llama-3.1-8B (8 of 32 layers); weights are random, and make
# no difference to the speed.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": SMOLLM2,
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


@dataclass(frozen=True)
class GpuModelRun:
    """All that one run measured, and where."""

    machine: str
    what: str
    # Of one decoding step, a token for each row.
    timings: dict[str, Timing]
    summary: dict[str, float]


def run(
    shape: str, batch: int, rank: int, slots: int, rounds: int, device: str, on_done: Callable[[str], None]
) -> GpuModelRun:
    """Capture a compiled decoding step of both into a CUDA graph each, and replay these in turn.

    Args:
        shape: one of SHAPES.
        batch: rows; each has another adapter or none, in turn.
        rank: R of all adapters.
        slots: K, as many adapters.
        rounds: how often each graph is replayed, in a random order.
        device: "cuda".
        on_done: told of each step.

    Raises:
        BenchError: no such shape or device, the compiled logits are not the eager ones, or transformers is missing.
    """
    if shape not in SHAPES:
        raise BenchError("bench gpu-model: --shape", ", ".join(SHAPES), repr(shape), "Choose one of these.")
    if device != "cuda" or not torch.cuda.is_available():
        raise BenchError("bench gpu-model", "a CUDA device", "none", "Run it on a machine that has one.")
    model, bank, chosen = prepare(SHAPES[shape], batch, rank, slots, device)
    step = Step(model, batch, device)
    with torch.no_grad():
        with bank.use(chosen):
            eager = step(model)
        plain = step(model)
        on_done("eager")
        compiled = torch.compile(model, backend="xpu_lora", fullgraph=True, dynamic=False)
        with bank.use(chosen):
            mixed, mixed_logits = step.captured(compiled)
        on_done(f"captured: {MIXED}")
        base, _ = step.captured(compiled)
        on_done(f"captured: {BASE}")
        step.rewind()
        mixed.replay()
        error = _difference(mixed_logits, eager)
        # Rounded to bfloat16 in every layer, at other places; without LoRA they are off by much more.
        if not error <= 1e-1 < 3e-1 < _difference(plain, eager):
            wanted = "the eager model's to within 1e-1"
            raise BenchError("bench gpu-model: logits", wanted, f"{error:.1e}", WRONG_NUMBERS)
        taken: dict[str, list[float]] = {BASE: [], MIXED: []}
        graphs = {BASE: base, MIXED: mixed}
        order = random.Random(0)  # noqa: S311
        for number in range(rounds + 2):
            for name in order.sample(list(graphs), len(graphs)):
                step.rewind()
                seconds = _seconds(graphs[name])
                if number > 1:
                    taken[name].append(seconds)
    timings = {name: timing_of(times) for name, times in taken.items()}
    summary = {
        "tokens/s of the base model": batch / timings[BASE].median * 1e6,
        "mixed adapters' tokens/s / base model's": timings[BASE].median / timings[MIXED].median,
        "logits: greatest difference from the eager model's / greatest logit": error,
    }
    what = f"{shape}, {SHAPES[shape]['num_hidden_layers']} layers, bfloat16, batch {batch}, R{rank} K{slots}"
    return GpuModelRun(machine("cuda"), what, timings, summary)


def prepare(
    sizes: dict[str, Any], batch: int, rank: int, slots: int, device: str
) -> tuple[Any, AdapterBank, list[str | None]]:
    """A model of these sizes with as many adapters as slots, and a name or None for each row."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        raise BenchError("bench gpu-model", "transformers", "none", "pip install transformers.") from missing
    torch.manual_seed(0)
    with torch.device(device):
        made: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    model = made.to(torch.bfloat16).eval()
    model.requires_grad_(False)
    bank = xlc.attach(model, slots=slots, max_rank=rank, target_modules=TARGETS)
    names = [f"adapter-{number}" for number in range(slots)]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), bank.sites, rank)
            bank.load(name, folder)
    voices: list[str | None] = [*names, None]
    return model, bank, [voices[row % len(voices)] for row in range(batch)]


class Step:
    """One token for each row, on a cache that holds some."""

    LENGTH, POSITION = 256, 128

    def __init__(self, model: Any, batch: int, device: str) -> None:
        from transformers import StaticCache

        self.tokens = torch.randint(0, model.config.vocab_size, (batch, 1), device=device)
        self.position = torch.tensor([self.POSITION], device=device)
        self.cache: Any = StaticCache(config=model.config, max_cache_len=self.LENGTH)
        heads, width = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
        # Its memory is taken before anything is captured.
        self.cache.early_initialization(batch, heads, width, torch.bfloat16, torch.device(device))

    def rewind(self) -> None:
        """Have the cache hold POSITION tokens again: it counts each step."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.POSITION)

    def __call__(self, model: Any) -> Tensor:
        """The logits of the token."""
        self.rewind()
        return self.forward(model)

    def forward(self, model: Any) -> Tensor:
        """The same, for the position at which the cache is."""
        logits: Tensor = model(
            input_ids=self.tokens,
            past_key_values=self.cache,
            position_ids=self.position[None].expand(len(self.tokens), -1),
            use_cache=True,
        ).logits
        return logits

    def captured(self, model: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a graph, and where it leaves the logits."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self(model)
        self.rewind()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.forward(model)
        return graph, logits


def _difference(left: Tensor, right: Tensor) -> float:
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / 5
