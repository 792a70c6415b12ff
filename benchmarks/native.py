"""The native CPU kernel by itself, as it is compiled here and for lesser processors: checked, then timed. Two threads.

Weights are bfloat16 and rotate through more memory than the caches hold. `--neighbour` runs an endless loop of another
process beside, and prints means: what counts there is how long a call waits for a thread that does not run.

    python benchmarks/native.py                # processor, tiles or not, microseconds a call
    python benchmarks/native.py --neighbour    # next to a product of PyTorch's on the same threads
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.native_driver import Driver

from xpu_lora_compile.bench.measure import BEYOND_CACHES, machine, measure
from xpu_lora_compile.inspect.operands import RandomOperands
from xpu_lora_compile.ops.budget import budget_of

# By name, flags after -march=native: those that leave out what the processor lacks change nothing.
KINDS = {"as compiled here": (), "without AMX": ("-mno-amx-bf16",), "without AVX-512": ("-mno-avx512f",)}
# D, W, K of a layer of Llama 8B, and of gate_proj of SmolLM2-135M; R is 16.
SIZES, RANK = {"4096x4096 K8": (4096, 4096, 8), "576x1536 K4": (576, 1536, 4)}, 16


def main() -> None:
    """Print what was measured, one line a size and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbour", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32, 256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(machine("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        drivers = {}
        for number, (kind, flags) in enumerate(KINDS.items()):
            (Path(folder) / str(number)).mkdir()
            drivers[kind] = Driver(Path(folder) / str(number), *flags)
            print(f"{kind}: {drivers[kind].lanes} lanes, {'tiles' if drivers[kind].has_tiles else 'no tiles'}")
        for size in SIZES:
            for rows in options.rows:
                time_one(drivers, size, rows, neighbour=options.neighbour)


def time_one(drivers: dict[str, Driver], size: str, rows: int, *, neighbour: bool) -> None:
    """Check and time all drivers at one size; next to a product of PyTorch's if there is a neighbour."""
    features, width, slots = SIZES[size]
    draw = RandomOperands(0)
    normal = partial(draw.normal, dtype=torch.bfloat16)
    count = 1 + BEYOND_CACHES // (2 * slots * RANK * (features + width))
    stacks = [
        (normal(slots, RANK, features), normal(slots, RANK, width).transpose(1, 2)) for _ in range(min(count, 60))
    ]
    inputs, base, indices = normal(rows, features), normal(rows, width), draw.indices(rows, slots).long()
    weight = normal(width, features)
    lora = {"lora_a": [stacks[0][0]], "lora_b": [stacks[0][1]], "lora_indices_tensor": indices, "slice_offsets": [0]}
    budget = budget_of("lora_linear", {"base": base, "inputs": inputs} | lora)
    for driver in drivers.values():
        output = base.clone()
        driver.add_lora(output, inputs, *stacks[0], indices)
        budget.check(output, torch.ones_like(base, dtype=torch.bool))
        alone = base[-1:].clone()
        driver.add_lora(alone, inputs[-1:].clone(), *stacks[0], indices[-1:].clone())
        if not torch.equal(alone, output[-1:]):
            raise AssertionError("a row alone has other bits than in its batch")
    output = torch.zeros_like(base)
    calls = {
        kind: lambda number, add=driver.add_lora: add(output, inputs, *stacks[number % len(stacks)], indices)
        for kind, driver in drivers.items()
    }
    if not neighbour:
        timings = measure(calls, "cpu", 0.5)
        print(
            size, f"T{rows}", *(f"{kind}: {t.median:.1f} us (+-{100 * t.spread:.0f} %)" for kind, t in timings.items())
        )
        return
    calls = {"PyTorch's product": lambda _: torch.mm(inputs, weight.t()), **calls}
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for name, call in calls.items():
            taken = []
            for number in range(300):
                start = time.perf_counter()
                call(number)
                taken.append(time.perf_counter() - start)
            print(size, f"T{rows}", f"{name}: mean {1e6 * statistics.fmean(taken):.0f} us, median", end=" ")
            print(f"{1e6 * statistics.median(taken):.0f} us, longest {1e3 * max(taken):.1f} ms")
    finally:
        beside.kill()


if __name__ == "__main__":
    main()
