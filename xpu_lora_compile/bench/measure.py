"""How everything here is timed: contenders take turns, each round in a random order; medians, with their spread."""

from __future__ import annotations

import itertools
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from xpu_lora_compile.errors import BenchError

# What to do where a contender's numbers are wrong: it is not timed.
WRONG_NUMBERS = "Run `xpu-lora doctor` to see which of our ops are wrong here, and attach its report to an issue."

# More than the caches hold: weights are rotated through at least so much memory.
BEYOND_CACHES = 1 << 27


@dataclass(frozen=True)
class Timing:
    """Of one contender: the median of its runs, and how far they spread."""

    # Microseconds.
    median: float
    # Half the distance between the quartiles, by the median.
    spread: float
    runs: int


@dataclass(frozen=True)
class ModelRun:
    """All that one run of a whole model measured, and where."""

    machine: str
    what: str
    timings: dict[str, Timing]
    summary: dict[str, float]


def measure(
    contenders: Mapping[str, Callable[[int], object]],
    device: str,
    seconds: float = 0.5,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time functions that take the number of the call, for rotating what they work on: no call gets what the one
    before it has left in the caches.

    Every contender runs twice before it counts, and then in each round once, until each has had its share of time: 3 to
    200 runs.

    Args:
        contenders: by name.
        device: that they run on; its queue is empty before a clock is read.
        seconds: the share of each.
        before: called in front of each run, and not timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    calls = itertools.count()

    def run(name: str) -> float:
        if before is not None:
            before()
        return _timed(contenders[name], next(calls), device)

    for name in contenders:
        for _ in range(2):
            taken[name] = [run(name)]
    limits = {name: min(200, max(3, int(seconds / warm[0]))) for name, warm in taken.items()}
    for runs in taken.values():
        runs.clear()
    order = random.Random(0)  # noqa: S311
    for number in range(max(limits.values())):
        # Never the same neighbours: what one leaves in the caches, or has its threads do, must not always be another's.
        for name in order.sample(list(contenders), len(contenders)):
            if number < limits[name]:
                taken[name].append(run(name))
    return {name: timing_of(runs) for name, runs in taken.items()}


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Have PyTorch use so many threads, on as many of the CPUs that this process may use, until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # Linux alone has it. A thread inherits the CPUs of the one that starts it.
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    try:
        if cpus:
            os.sched_setaffinity(0, sorted(cpus)[:threads])
        yield
    finally:
        torch.set_num_threads(before)
        if cpus:
            os.sched_setaffinity(0, cpus)


@contextmanager
def without_stderr() -> Iterator[None]:
    """Drop what is written to the process's stderr: PyTorch's profiler (2.13) notes there that it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def timing_of(runs: list[float]) -> Timing:
    """Of two or more runs, in seconds."""
    median = statistics.median(runs)
    first, _, third = statistics.quantiles(runs, n=4)
    return Timing(median * 1e6, (third - first) / 2 / median, len(runs))


def check_error(where: str, error: float, allowed: float) -> None:
    """Check that a contender computes what it should.

    Raises:
        BenchError: the error is more than what is allowed, or NaN.
    """
    if not error <= allowed:
        raise BenchError(where, f"an error of at most {allowed:.1e}", f"{error:.1e}", WRONG_NUMBERS)


def geometric_mean(values: Iterable[float]) -> float:
    """Of ratios."""
    return math.exp(statistics.fmean(map(math.log, values)))


def machine(device: str) -> str:
    """What this ran on, as a line."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{name}{threads}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    name = next((value.strip() for key, value in facts.items() if key.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _timed(function: Callable[[int], object], number: int, device: str) -> float:
    _finish(device)
    start = time.perf_counter()
    function(number)
    _finish(device)
    return time.perf_counter() - start


def _finish(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()
