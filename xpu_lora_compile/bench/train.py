"""`xpu-lora bench train`: a step of training: the base model, PEFT's one adapter, and several of ours in one batch."""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.bench.gpu_model import SHAPES
from xpu_lora_compile.bench.measure import WRONG_NUMBERS, ModelRun, machine, timing_of
from xpu_lora_compile.bench.model import TARGETS
from xpu_lora_compile.errors import BenchError

BASE, PEFT = "base model", "PEFT, one adapter"
# The greatest error of an adapter's gradient by its length, against float64.
ALLOWED = {"float32": 1e-3, "bfloat16": 1.5e-1, "float16": 5e-2}


def run(
    shape: str,
    dtype: str,
    device: str,
    batch: int,
    tokens: int,
    rank: int,
    slots: list[int],
    adapters: list[int],
    layers: int,
    rounds: int,
    on_done: Callable[[str], None],
) -> ModelRun:
    """Time forward and backward of a model with a frozen base, each contender compiled.

    Args:
        shape: one of SHAPES.
        dtype: of the model and the adapters.
        device: "cpu" or "cuda".
        batch: sequences; with n adapters, each nth part of them has one.
        tokens: of each sequence.
        rank: R of all adapters.
        slots: K; with several, the most adapters are trained in a bank of each.
        adapters: how many are trained in one batch, a contender for each number.
        layers: of the model; 0 for all.
        rounds: how often each step is taken, in a random order.
        on_done: told of each step.

    Raises:
        BenchError: a gradient is not that of float64, no such shape, or transformers or PEFT is missing.
    """
    if shape not in SHAPES:
        raise BenchError("bench train: --shape", ", ".join(SHAPES), repr(shape), "Choose one of these.")
    if max(adapters) > min(slots):
        raise BenchError(
            "bench train: --slots", f"at least {max(adapters)}", str(min(slots)), "Give a slot to each adapter."
        )
    ours = {_ours(count): (count, slots[0]) for count in adapters}
    ours |= {f"{_ours(max(adapters))}, K{count}": (max(adapters), count) for count in slots[1:]}
    try:
        from peft import PeftModel
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        raise BenchError("bench train", "transformers and peft", str(missing), "pip install them.") from missing
    torch.manual_seed(0)
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    with torch.device(device):
        made: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    model = made.to(getattr(torch, dtype)).eval().requires_grad_(False)
    ids = torch.randint(0, sizes["vocab_size"], (batch, tokens), device=device)
    names = [f"adapter-{number}" for number in range(max(adapters))]
    steps: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        sites = xlc.attach(twin(model), slots=1, max_rank=1, target_modules=TARGETS).sites
        for name in names:
            (root / name).mkdir()
            write_adapter(root / name, sites, rank)
        steps[BASE] = _base_step(model, ids)
        given: dict[str, Any] = {"is_trainable": True, "autocast_adapter_dtype": False}
        theirs = PeftModel.from_pretrained(twin(model), root / names[0], **given)
        steps[PEFT] = _pefts_step(_in_dtype(theirs, model.dtype), ids)
        for name, (count, of_bank) in ours.items():
            steps[name] = _our_step(twin(model), root, names[:count], ids, rank, of_bank)
        firsts, gradients = {}, {}
        for name, step in steps.items():
            start = time.perf_counter()
            gradients[name] = {key: gradient.clone() for key, gradient in step().items()}
            firsts[name] = time.perf_counter() - start
            on_done(f"compiled: {name}")
        errors = {}
        wide = twin(model, share=False).to(torch.float64)
        for name, (count, _) in ours.items():
            errors[name] = _error(wide, root, names[:count], ids, gradients[name])
            on_done(f"compared: {name}")
        errors[PEFT] = _error(wide, root, [], ids, gradients[PEFT])
        del wide
    for name, error in errors.items():
        if not error <= ALLOWED[dtype]:
            wanted = f"gradients of float64 to within {ALLOWED[dtype]:.0e}"
            raise BenchError(f"bench train: {name}", wanted, f"{error:.1e}", WRONG_NUMBERS)
    gradients.clear()
    memory = {name: _memory(step) for name, step in steps.items()} if device == "cuda" else {}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)  # noqa: S311
    for number in range(rounds + 2):
        for name in order.sample(list(steps), len(steps)):
            seconds = _seconds(steps[name], device)
            if number > 1:
                taken[name].append(seconds)
        on_done(f"round {number + 1} of {rounds + 2}")
    timings = {name: timing_of(times) for name, times in taken.items()}
    summary = {"tokens/s of PEFT's one adapter": batch * tokens / timings[PEFT].median * 1e6}
    for name in steps:
        if name != PEFT:
            summary[f"time of {name} / PEFT's one adapter"] = timings[name].median / timings[PEFT].median
    summary |= {f"{name}: error of gradients against float64": error for name, error in errors.items()}
    summary |= {f"{name}: peak memory, GB": size / 1e9 for name, size in memory.items()}
    what = f"{shape}, {sizes['num_hidden_layers']} layers, {dtype}, {batch} x {tokens} tokens, R{rank} K{slots[0]}"
    return ModelRun(machine(device), what, timings, summary)


def _ours(count: int) -> str:
    return f"ours, {count} adapter{'s mixed' if count > 1 else ''}"


def twin(model: Any, *, share: bool = True) -> Any:
    """Copy a model; its weights are the same memory, if they are to be shared."""
    return copy.deepcopy(model, {id(value): value for value in model.parameters()} if share else {})


def _in_dtype(peft: Any, dtype: torch.dtype) -> Any:
    for weight in peft.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    return peft


def _base_step(model: Any, ids: Tensor) -> Callable[[], Mapping[str, Tensor]]:
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    compiled: Any = torch.compile(model)

    def step() -> Mapping[str, Tensor]:
        embedded.grad = None
        _backward(compiled(inputs_embeds=embedded, labels=ids, use_cache=False).loss)
        return {}

    return step


def _pefts_step(peft: Any, ids: Tensor) -> Callable[[], Mapping[str, Tensor]]:
    trained = {name: weight for name, weight in peft.named_parameters() if weight.requires_grad}
    compiled: Any = torch.compile(peft)

    def step() -> Mapping[str, Tensor]:
        for weight in trained.values():
            weight.grad = None
        _backward(compiled(input_ids=ids, labels=ids, use_cache=False).loss)
        return {name.replace(".default", ""): _gradient(weight) for name, weight in trained.items()}

    return step


def _our_step(
    model: Any, root: Path, names: list[str], ids: Tensor, rank: int, slots: int
) -> Callable[[], Mapping[str, Tensor]]:
    bank = xlc.attach(model, slots=slots, max_rank=rank, target_modules=TARGETS)
    for name in names:
        bank.load(name, root / name)
    bank.trainable(names)
    trained = {f"{name}: {key}": weight for name in names for key, weight in bank.named_parameters(name).items()}
    compiled: Any = torch.compile(model, backend="xpu_lora")
    chosen = [names[row * len(names) // len(ids)] for row in range(len(ids))]

    def step() -> Mapping[str, Tensor]:
        for weight in trained.values():
            weight.grad = None
        with bank.use(chosen):
            _backward(compiled(input_ids=ids, labels=ids, use_cache=False).loss)
        return {name: _gradient(weight) for name, weight in trained.items() if weight.grad is not None}

    return step


def _backward(loss: Tensor) -> None:
    torch.autograd.backward(loss)


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise BenchError("bench train", "a gradient of each parameter", "none", WRONG_NUMBERS)
    return weight.grad


def _error(wide: Any, root: Path, names: list[str], ids: Tensor, found: Mapping[str, Tensor]) -> float:
    """The greatest error of an adapter's gradients by their length, against PEFT's in float64, one adapter at a time.

    Args:
        wide: the base model in float64.
        root: with the adapters' folders.
        names: of adapters that share the batch; none for PEFT's own gradients of one adapter.
        ids: the batch.
        found: the gradients.
    """
    from peft import PeftModel

    worst = 0.0
    for number, name in enumerate(names or ["adapter-0"]):
        mine = [row for row in range(len(ids)) if not names or row * len(names) // len(ids) == number]
        if not mine:
            continue
        peft = PeftModel.from_pretrained(twin(wide), root / name, is_trainable=True, autocast_adapter_dtype=False)
        peft = _in_dtype(peft, torch.float64)
        rows = ids[mine]
        loss = peft(input_ids=rows, labels=rows, use_cache=False).loss * len(mine) / len(ids)
        loss.backward()
        right, got = [], []
        for key, weight in peft.named_parameters():
            if weight.requires_grad:
                right.append(_gradient(weight).flatten())
                key = key.replace(".default", "")
                got.append(found[f"{name}: {key}" if names else key].double().flatten())
        wanted = torch.cat(right)
        worst = max(worst, float((torch.cat(got) - wanted).norm() / wanted.norm()))
    return worst


def _seconds(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _memory(step: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()
