"""What Intel's compilers make of our kernels at the sizes that an Intel GPU is given, and how long that may take there.

No GPU: Triton's backend compiles to SPIR-V, and Intel's offline compiler to native code, whose registers, spills and
instructions are counted (`tests/intel`). The tox leg `intel` has all that it needs:

    python3 -m tox exec -e intel -- python benchmarks/intel_sizes.py
    python3 -m tox exec -e intel -- python benchmarks/intel_sizes.py --nvidia    # with the sizes of an H100

A call adds LoRA to q, k and v of Llama 8B, bfloat16, for 8 adapters in use. The times are a lower bound by three
quantities, each on its own; docs/intel-gpu.md says what they leave out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["TRITON_INTERPRET"] = "0"

import torch
from intel.calls import lora_call
from intel.native import Native, Tools, found_tools, native
from intel.toolchain import DEVICES, Launch, compiling_for, launches_of, problem

from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.sizes import sizes_for
from xpu_lora_compile.kernels.triton_launch import Triton

FEATURES, WIDTHS, SLOTS = 4096, (4096, 1024, 1024), 8
# Clocks that the load and store unit of a Xe core takes for a message: 64 bytes each, of one to four such lines.
CLOCKS = 2.0
# Microseconds from a step's loads to their data, in which a thread does nothing else.
LATENCY = 0.5


@dataclass(frozen=True)
class Card:
    """Published figures: GHz, and GB/s of memory; Xe cores are those of `toolchain.DEVICES`."""

    clock: float
    bandwidth: float


# A Max 1550 is two of these.
CARDS = {"bmg": Card(2.67, 456.0), "pvc": Card(1.6, 1638.0)}


@dataclass(frozen=True)
class Work:
    """Of a launch: programs that have rows, warps of each, steps of their loops, and bytes to and from memory."""

    programs: int
    warps: int
    steps: int
    bytes: int


def work_of(launch: Launch, call: LoraCall) -> Work:
    """What a launch does for rows that 8 adapters share evenly."""
    constants, rows = launch.constants(), len(call.inputs)
    rank, slices, used = call.lora_a[0].shape[1], len(call.lora_a), min(SLOTS, rows)
    tiles = used * -(-rows // used // constants["BM"])
    hidden = rows * rank * slices * 4
    if launch.kernel == "shrink_kernel":
        _, pieces, groups = launch.grid
        read = rows * FEATURES + used * slices * rank * FEATURES
        steps = constants["EACH"] * constants["PIECE"] // constants["BK"]
        return Work(tiles * pieces * groups, launch.options["num_warps"], steps, 2 * read + pieces * hidden)
    moved = 2 * (2 * rows + used * rank) * sum(WIDTHS) + constants["SUMS"] * hidden
    steps = constants["PER"] * max(1, rank // constants["BR"])
    return Work(tiles * launch.operand("block_count"), launch.options["num_warps"], steps, moved)


def bounds(work: Work, made: Native, device: str) -> tuple[float, float, float]:
    """Microseconds: of memory, of messages, and of waiting for memory where too few threads take turns."""
    card, cores = CARDS[device], DEVICES[device]["gpu_subslice_count"]
    messages = made.sends - made.repeated + made.repeated * work.steps
    threads = work.programs * work.warps
    # Eight threads on each of eight vector engines.
    rounds = -(-threads // (cores * 64 * 128 // made.registers))
    return (
        work.bytes / card.bandwidth / 1e3,
        threads * messages * CLOCKS / (cores * card.clock * 1e3),
        rounds * (work.steps + 1) * LATENCY,
    )


def rows_of(device: str, rows: int, rank: int, on_nvidia: bool, tools: Tools) -> list[list[Any]]:
    """A line of the table for each kernel of a call."""
    call = lora_call(rows, rank, torch.bfloat16, FEATURES, WIDTHS, slots=SLOTS)
    sizes = sizes_for(rows, rank, sum(WIDTHS)) if on_nvidia else None
    lines: list[list[Any]] = []
    for launch in launches_of(lambda: Triton().add_lora(call), sizes):
        if launch.kernel == "route_kernel":
            continue
        with compiling_for(device):
            made = native(tools, launch.compiled().asm["spv"], device)
        constants = launch.constants()
        long = constants["BK"] if launch.kernel == "shrink_kernel" else constants["BN"]
        tile = f"{constants['BM']} x {constants['BR']} x {long}, {constants['num_warps']} warps"
        memory, messages, waiting = bounds(work_of(launch, call), made, device)
        line = [device, rows, rank, launch.kernel.removesuffix("_kernel"), tile, made.registers, made.spilled]
        line += [made.dpas, made.sends, made.repeated, made.blocks]
        lines.append([*line, *(f"{bound:.1f}" for bound in (memory, messages, waiting))])
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvidia", action="store_true", help="the sizes of an H100, not those of Intel GPUs")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 512, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    given = parser.parse_args(arguments)
    if problem():
        raise SystemExit(f"Intel's Triton: {problem()}. The tox leg `intel` has it.")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        tools = found_tools(Path(folder, "ocloc"))
        if isinstance(tools, str):
            raise SystemExit(tools)
        print(f"ocloc {tools.version}, bfloat16, D = {FEATURES}, W = {WIDTHS}, {SLOTS} adapters")
        heads = ["device", "T", "R", "kernel", "tile: rows x R x columns", "registers", "spilled", "DPAS", "messages"]
        heads += ["in loops", "2-D", "memory us", "messages us", "waiting us"]
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for device in CARDS:
            for rank in given.ranks:
                for rows in given.rows:
                    for line in rows_of(device, rows, rank, given.nvidia, tools):
                        print("| " + " | ".join(map(str, line)) + " |", flush=True)


if __name__ == "__main__":
    main()
