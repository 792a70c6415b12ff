"""`xpu-lora bench load`: how fast an adapter comes into the bank, and how long a decoding loop waits for it."""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.adapters.checkpoint import WEIGHTS_FILE, read_checkpoint
from xpu_lora_compile.adapters.config import read_config
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.adapters.names import BaseModel
from xpu_lora_compile.bench.gpu_model import SHAPES, Step, prepare
from xpu_lora_compile.bench.measure import WRONG_NUMBERS, ModelRun, machine, timing_of
from xpu_lora_compile.errors import BenchError
from xpu_lora_compile.layers import HOSTS

STEP, STEP_MEANWHILE = "a decoding step", "the same while adapters are loaded"
LOAD, LOAD_MEANWHILE, DROP = "load", "load while it decodes", "drop"
_NAME = "loaded again and again"


def run(
    shape: str,
    dtype: str,
    batch: int,
    rank: int,
    slots: int,
    loads: int,
    device: str,
    on_done: Callable[[str], None],
) -> ModelRun:
    """Load and drop an adapter again and again, alone and while another thread decodes with others.

    On CUDA a step is the replay of a graph and the wait for it; on a CPU it is a call of the compiled model. Each has a
    `use` block of its own. The file is read from the page cache.

    Args:
        shape: one of SHAPES.
        dtype: of the adapter's file; the model is bfloat16.
        batch: rows; each has another adapter or none, in turn.
        rank: R of all adapters.
        slots: K, of which one is free.
        loads: how many, alone and again while it decodes.
        device: "cuda" or "cpu".
        on_done: told of each step.

    Raises:
        BenchError: no such shape or device, the bank holds other values than the file, or the loop computed something
            else meanwhile, or transformers is missing.
    """
    if shape not in SHAPES:
        raise BenchError("bench load: --shape", ", ".join(SHAPES), repr(shape), "Choose one of these.")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise BenchError("bench load: --device", "cpu, or cuda where there is one", repr(device), "Choose another.")
    if slots < 2:
        raise BenchError("bench load: --slots", "at least 2", str(slots), "One is for the adapter that is loaded.")
    model, bank, chosen = prepare(SHAPES[shape], batch, rank, slots, device)
    spare = bank.names[-1]
    bank.drop(spare)
    chosen = [None if name == spare else name for name in chosen]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder, bank.sites, rank, getattr(torch, dtype))
        size = (folder / WEIGHTS_FILE).stat().st_size
        _check_values(model, bank, folder, rank)
        on_done("checked")
        step, logits = _decoding(model, bank, chosen, batch, device)
        step()
        before = logits().clone()
        on_done("compiled")
        with _no_collections():
            alone, drops = _load_often(bank, folder, loads)
            on_done("loaded alone")
            with _Loop(step) as quiet:
                time.sleep(max(1.0, sum(alone)))
            on_done("decoded alone")
            with _Loop(step) as busy:
                meanwhile, _ = _load_often(bank, folder, loads)
        if not torch.equal(before, logits()):
            error = float((before.float() - logits().float()).abs().max())
            raise BenchError("bench load: logits", "the same while adapters are loaded", f"{error:.1e}", WRONG_NUMBERS)
    taken = {STEP: quiet.seconds, STEP_MEANWHILE: busy.seconds}
    taken |= {LOAD: alone, LOAD_MEANWHILE: meanwhile, DROP: drops}
    timings = {name: timing_of(seconds) for name, seconds in taken.items()}
    usual = timings[STEP].median / 1e6
    summary = {
        "load: GB/s": size / timings[LOAD].median / 1e3,
        "load, the slowest: GB/s": size / max(alone) / 1e9,
        "load while it decodes: GB/s": size / timings[LOAD_MEANWHILE].median / 1e3,
        "the longest wait of the loop, ms": max(0.0, max(busy.seconds) - usual) * 1e3,
        "the same without loads, ms": max(0.0, max(quiet.seconds) - usual) * 1e3,
        "steps while adapters are loaded": float(len(busy.seconds)),
    }
    layers = SHAPES[shape]["num_hidden_layers"]
    what = f"{shape}, {layers} layers, batch {batch}, R{rank} K{slots}, {size / 1e6:.0f} MB of {dtype}"
    return ModelRun(machine(device), what, timings, summary)


def _load_often(bank: AdapterBank, folder: Path, loads: int) -> tuple[list[float], list[float]]:
    """Seconds of each load, and of each drop."""
    taken: list[float] = []
    dropped: list[float] = []
    for _ in range(loads):
        start = time.perf_counter()
        bank.load(_NAME, folder)
        middle = time.perf_counter()
        bank.drop(_NAME)
        taken.append(middle - start)
        dropped.append(time.perf_counter() - middle)
    return taken, dropped


def _check_values(model: nn.Module, bank: AdapterBank, folder: Path, rank: int) -> None:
    """Check that the bank holds what the file says, bit by bit, in another way than `load` goes."""
    bank.load(_NAME, folder)
    slot = len(bank.names) - 1
    wanted = read_checkpoint(folder, read_config(folder), bank.sites, BaseModel.of(model, HOSTS), rank)
    for name, weights in wanted.items():
        layer: Any = model.get_submodule(name)
        for stack, weight in ((layer.lora_a, weights.a), (layer.lora_b, weights.b)):
            if not torch.equal(stack[slot].cpu(), weight.to(stack.dtype)):
                raise BenchError(f"bench load: {name}", "the values of the file", "others", WRONG_NUMBERS)
    bank.drop(_NAME)


def _decoding(
    model: Any, bank: AdapterBank, chosen: list[str | None], batch: int, device: str
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """A step of the loop, and what gives the logits of the last one."""
    step = Step(model, batch, 1, device)
    compiled = torch.compile(model, backend="xpu_lora", fullgraph=True, dynamic=False)
    if device == "cpu":
        last: list[Tensor] = []

        def call() -> None:
            with torch.no_grad(), bank.use(chosen):
                last[:] = [step(compiled)]

        call()
        return call, lambda: last[0]
    with torch.no_grad(), bank.use(chosen):
        # The graph rewinds the cache itself.
        graph, logits = step.captured(lambda: step(compiled))

    # The graph reads the tokens and the cache of the step, and does not keep them alive.
    def replay(_kept: Step = step) -> None:
        with torch.no_grad(), bank.use(chosen):
            graph.replay()
            torch.cuda.current_stream().synchronize()

    return replay, lambda: logits


@contextmanager
def _no_collections() -> Iterator[None]:
    """Leave what there is out of Python's garbage collections: one of all objects stops all threads for 0.3 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Loop:
    """A thread that takes one step after another while the block is open, and notes how long each took."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self._step, self._ends = step, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failed: list[BaseException] = []

    def __enter__(self) -> _Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        if self._failed:
            raise self._failed[0]

    def _run(self) -> None:
        try:
            # A thread has things to set up when it first calls torch.
            for _ in range(3):
                self._step()
            while not self._ends.is_set() or len(self.seconds) < 3:
                start = time.perf_counter()
                self._step()
                self.seconds.append(time.perf_counter() - start)
        except BaseException as error:  # Raised where the block ends.
            self._failed.append(error)
