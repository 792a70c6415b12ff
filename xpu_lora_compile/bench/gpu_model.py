"""`xpu-lora bench gpu-model`: a step of a whole model on a GPU in one of several modes, with mixed adapters or none."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.bench import quantized
from xpu_lora_compile.bench.measure import WRONG_NUMBERS, ModelRun, machine, timing_of, without_stderr
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

CAPTURED, EAGER = "captured", "eager"
# What `torch.compile` is given. Of a step captured into a CUDA graph the device's time is taken, else the host's.
MODES: dict[str, dict[str, Any]] = {
    CAPTURED: {"dynamic": False},
    "default": {"dynamic": False},
    "dynamic": {"dynamic": True},
    "reduce-overhead": {"dynamic": False, "mode": "reduce-overhead"},
    "cpp-wrapper": {"dynamic": False, "options": {"cpp_wrapper": True}},
    EAGER: {},
}


def run(
    shape: str,
    mode: str,
    batch: int,
    tokens: int,
    rank: int,
    slots: int,
    rounds: int,
    device: str,
    base: str,
    on_done: Callable[[str], None],
) -> ModelRun:
    """Time a step of the base model and of mixed adapters in turn, both run in the same way.

    Args:
        shape: one of SHAPES.
        mode: one of MODES.
        batch: rows; each has another adapter or none, in turn.
        tokens: of each row: 1 for a step of decoding, more for a prompt.
        rank: R of all adapters.
        slots: K, as many adapters.
        rounds: how often each step is taken, in a random order.
        device: "cuda".
        base: how the linear layers but the head are stored: one of `quantized.BASES`.
        on_done: told of each step.

    Raises:
        BenchError: no such shape, mode or device, the logits are not the eager ones, or transformers is missing.
    """
    for option, value, known in (("shape", shape, SHAPES), ("mode", mode, MODES), ("base", base, quantized.BASES)):
        if value not in known:
            raise BenchError(f"bench gpu-model: --{option}", ", ".join(known), repr(value), "Choose one of these.")
    if device != "cuda" or not torch.cuda.is_available():
        raise BenchError("bench gpu-model", "a CUDA device", "none", "Run it on a machine that has one.")
    model, bank, chosen = prepare(SHAPES[shape], batch, rank, slots, device, base)
    step = Step(model, batch, tokens, device)
    compiled = model if mode == EAGER else torch.compile(model, backend="xpu_lora", fullgraph=True, **MODES[mode])

    # Entered once for many steps, as a user would.
    blocks: dict[str, Callable[[], AbstractContextManager[Any]]] = {BASE: nullcontext, MIXED: lambda: bank.use(chosen)}

    def contender() -> Tensor:
        return step.forward(compiled)

    with torch.no_grad():
        plain = step(model).clone()
        with bank.use(chosen):
            eager = step(model).clone()
        on_done("eager")
        launches, graphs, error, frames = {}, {}, 0.0, 0
        for name, block in blocks.items():
            with block():
                for _ in range(3):
                    step.rewind()
                    logits = contender()
                on_done(f"{mode}: {name}")
                launches[name] = _launches(contender, step)
                if mode == CAPTURED:
                    graphs[name], logits = step.captured(contender)
                    step.rewind()
                    graphs[name].replay()
                    on_done(f"captured: {name}")
                if name == MIXED:
                    error = _difference(logits, eager)
                    frames = _own_frames(contender, step)
        # Rounded to bfloat16 in every layer, at other places; without LoRA they are off by much more.
        if not error <= 1e-1 < 3e-1 < _difference(plain, eager):
            wanted = "the eager model's to within 1e-1"
            raise BenchError("bench gpu-model: logits", wanted, f"{error:.1e}", WRONG_NUMBERS)
        taken: dict[str, list[float]] = {BASE: [], MIXED: []}
        order = random.Random(0)  # noqa: S311
        for number in range(rounds + 2):
            for name in order.sample(list(blocks), len(blocks)):
                step.rewind()
                with blocks[name]():
                    seconds = _device_seconds(graphs[name]) if mode == CAPTURED else _host_seconds(contender)
                if number > 1:
                    taken[name].append(seconds)
    timings = {name: timing_of(times) for name, times in taken.items()}
    layers = SHAPES[shape]["num_hidden_layers"]
    summary = {
        "tokens/s of the base model": batch * tokens / timings[BASE].median * 1e6,
        "mixed adapters' tokens/s / base model's": timings[BASE].median / timings[MIXED].median,
        "kernel launches a layer of the base model": launches[BASE] / layers,
        "kernel launches a layer with mixed adapters": launches[MIXED] / layers,
        "logits: greatest difference from the eager model's / greatest logit": error,
    }
    if mode != EAGER:
        summary["Python frames of this package during a step"] = float(frames)
    stored = quantized.described(base)
    what = f"{shape}, {layers} layers, bfloat16, {stored}{mode}, batch {batch}, {tokens} tokens a row, R{rank} K{slots}"
    return ModelRun(machine("cuda"), what, timings, summary)


def prepare(
    sizes: dict[str, Any], batch: int, rank: int, slots: int, device: str, base: str = quantized.PLAIN
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
    quantized.quantize(model, base)
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
    """Some tokens for each row: one, on a cache that holds some, or the first."""

    LENGTH, POSITION = 256, 128

    def __init__(self, model: Any, batch: int, tokens: int, device: str) -> None:
        from transformers import StaticCache

        self.tokens = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
        self.start = self.POSITION if tokens == 1 else 0
        self.position = torch.arange(self.start, self.start + tokens, device=device)
        self.cache: Any = StaticCache(config=model.config, max_cache_len=max(self.LENGTH, tokens))
        heads, width = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
        # Its memory is taken before anything is captured.
        self.cache.early_initialization(batch, heads, width, torch.bfloat16, torch.device(device))

    def rewind(self) -> None:
        """Have the cache hold what it held at first: it counts each step."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)

    def __call__(self, model: Any) -> Tensor:
        """The logits of each row's last token."""
        self.rewind()
        return self.forward(model)

    def forward(self, model: Any) -> Tensor:
        """The same, for the position at which the cache is."""
        logits: Tensor = model(
            input_ids=self.tokens,
            past_key_values=self.cache,
            position_ids=self.position[None].expand(len(self.tokens), -1),
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits

    def captured(self, contender: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a graph, and where it leaves the logits."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.rewind()
                contender()
        self.rewind()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if self.start == 0:
                # A prompt fills the cache: the next replay begins anew.
                self.rewind()
            logits = contender()
        return graph, logits


def _difference(left: Tensor, right: Tensor) -> float:
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


def _device_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / 5


def _host_seconds(contender: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    contender()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _launches(contender: Callable[[], object], step: Step) -> int:
    """How many kernels one step has the device run."""
    step.rewind()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with without_stderr(), torch.profiler.profile(activities=activities) as profile:
        contender()
        torch.cuda.synchronize()
    kinds = ("Memcpy", "Memset")
    on_device = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return sum(not event.name.startswith(kinds) for event in on_device)


def _own_frames(contender: Callable[[], object], step: Step) -> int:
    """How many functions of this package Python calls during a step."""
    step.rewind()
    package, called = str(Path(xlc.__file__).parent), [0]

    def count(frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(package) and "/bench/" not in file:
            called[0] += 1

    sys.setprofile(count)
    try:
        contender()
    finally:
        sys.setprofile(None)
    return called[0]
