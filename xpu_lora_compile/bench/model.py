"""`xpu-lora bench model`: a whole model, decoding with mixed adapters, against itself without LoRA and against PEFT."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.bench import quantized
from xpu_lora_compile.bench.layer import peft_adapters
from xpu_lora_compile.bench.measure import WRONG_NUMBERS, Timing, machine, timing_of
from xpu_lora_compile.errors import BenchError
from xpu_lora_compile.inductor_internals import fresh_cache

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# SmolLM2-135M, of which the weights make no difference to the speed: huggingface.co/HuggingFaceTB/SmolLM2-135M
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


BASE, MIXED, PEFT = "base model", "mixed adapters", "PEFT's adapter_names, eager"


@dataclass(frozen=True)
class ModelRun:
    """All that one run measured, and where."""

    machine: str
    what: str
    # Of one decoding step, a token for each row.
    timings: dict[str, Timing]
    # Of generating all tokens, prompt included, which nobody compiles.
    whole: dict[str, Timing]
    # Of the first call, from empty caches, less a later one.
    compile_seconds: dict[str, float]
    summary: dict[str, float]


class _Clock:
    """What `generate` streams its tokens to: it notes when each arrived."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        """The prompt, and then a token for each row."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """All is generated."""

    def steps(self) -> list[float]:
        """Seconds between tokens, without the first, for which the prompt was read."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times[1:])]


def run(
    dtype: str,
    batch: int,
    new_tokens: int,
    rank: int,
    slots: int,
    layers: int,
    runs: int,
    base: str,
    on_done: Callable[[str], None],
) -> ModelRun:
    """Generate greedily with a static cache and one compiled decoding step.

    Args:
        dtype: of the model and the adapters.
        batch: rows; each has another adapter or none, in turn.
        new_tokens: for each row, after a prompt of 8 tokens.
        rank: R of all adapters.
        slots: K, as many adapters.
        layers: of the model, 30 for all of SmolLM2-135M.
        runs: of each contender, interleaved.
        base: how the linear layers but the head are stored, for all contenders alike: one of `quantized.BASES`.
        on_done: told of each step.

    Raises:
        BenchError: our logits are not PEFT's, or a library is missing.
    """
    try:
        from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        raise BenchError("bench model", "transformers", "none", "pip install transformers peft.") from missing
    torch.manual_seed(0)
    model: Any = (
        LlamaForCausalLM(LlamaConfig(**(SMOLLM2 | {"num_hidden_layers": layers}))).to(getattr(torch, dtype)).eval()
    )
    quantized.quantize(model, base)
    model.requires_grad_(False)
    model.generation_config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as folder:
        names, peft = peft_adapters(model, Path(folder), TARGETS, rank, slots)
        bank = xlc.attach(model, slots=slots, max_rank=rank, target_modules=TARGETS)
        for name in names:
            bank.load(name, Path(folder) / name)
    voices: list[str | None] = [None, *names]
    chosen = [voices[row % len(voices)] for row in range(batch)]
    prompt = torch.randint(0, SMOLLM2["vocab_size"], (batch, 8))
    config = CompileConfig(backend="xpu_lora", fullgraph=True, mode="default")
    # transformers does so by itself on XPU and CUDA only.
    vars(config)["_compile_all_devices"] = True
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    static = {"cache_implementation": "static", "compile_config": config}
    by_name = {"adapter_names": [name or "__base__" for name in chosen]}

    def alone(clock: _Clock) -> object:
        return model.generate(prompt, **length, **static, streamer=clock)

    def mixed(clock: _Clock) -> object:
        with bank.use(chosen):
            return model.generate(prompt, **length, **static, streamer=clock)

    def theirs(clock: _Clock) -> object:
        return peft.generate(input_ids=prompt, **length, **by_name, streamer=clock)

    error = _compare(model, peft, bank, chosen, prompt, by_name, dtype)
    contenders = {BASE: alone, MIXED: mixed, PEFT: theirs}
    # What a process's first compilation sets up for all later ones is nobody's own.
    with fresh_cache():
        alone(_Clock())
    torch.compiler.reset()
    on_done("warm")
    firsts = {}
    for name in (BASE, MIXED):
        start = time.perf_counter()
        # Neither gets what the other has compiled: most of their code is the same.
        with fresh_cache():
            contenders[name](_Clock())
        firsts[name] = time.perf_counter() - start
        on_done(f"compiled: {name}")
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    whole: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)  # noqa: S311
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(runs):
            for name in order.sample(list(contenders), len(contenders)):
                clock, start = _Clock(), time.perf_counter()
                contenders[name](clock)
                whole[name].append(time.perf_counter() - start)
                steps[name] += clock.steps()
            on_done(f"run {number + 1} of {runs}")
    step, all_of_it = ({name: timing_of(each) for name, each in seconds.items()} for seconds in (steps, whole))
    compile_seconds = {name: first - all_of_it[name].median / 1e6 for name, first in firsts.items()}
    summary = {
        "decoding: tokens/s of the base model": batch / step[BASE].median * 1e6,
        "decoding: mixed adapters' tokens/s / base model's": step[BASE].median / step[MIXED].median,
        "decoding: mixed adapters' tokens/s / PEFT's": step[PEFT].median / step[MIXED].median,
        "with the prompt: mixed adapters' tokens/s / base model's": all_of_it[BASE].median / all_of_it[MIXED].median,
        "with the prompt: mixed adapters' tokens/s / PEFT's": all_of_it[PEFT].median / all_of_it[MIXED].median,
        "cold compilation, seconds, base model": compile_seconds[BASE],
        "cold compilation, mixed adapters / base model": compile_seconds[MIXED] / compile_seconds[BASE],
        "logits: greatest difference from PEFT's / greatest logit": error,
    }
    shown = f"{layers} layer{'s' * (layers > 1)}, batch {batch}, {new_tokens} tokens, R{rank} K{slots}"
    what = f"{dtype}, {quantized.described(base)}{shown}"
    return ModelRun(machine("cpu"), what, step, all_of_it, compile_seconds, summary)


def _compare(
    model: Any, peft: Any, bank: Any, chosen: list[str | None], prompt: Tensor, by_name: dict[str, Any], dtype: str
) -> float:
    with torch.no_grad():
        wanted = peft(input_ids=prompt, **by_name).logits.float()
        with bank.use(chosen):
            ours = model(prompt).logits.float()
        without = model(prompt).logits.float()
    scale = wanted.abs().max()
    error = float((ours - wanted).abs().max() / scale)
    allowed = 1e-4 if dtype == "float32" else 5e-2
    if not error <= allowed or float((without - wanted).abs().max() / scale) < allowed:
        raise BenchError("bench model: logits", f"PEFT's to within {allowed:.0e}", f"{error:.1e}", WRONG_NUMBERS)
    return error
