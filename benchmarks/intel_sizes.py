"""What Intel's compilers make of our kernels at the sizes that an Intel GPU is given, and how long that may take there.

No GPU: Triton's backend compiles to SPIR-V, and Intel's offline compiler to native code, whose registers, spills and
instructions are counted (`tests/intel`). The tox leg `intel` has all that it needs:

    python3 -m tox exec -e intel -- python benchmarks/intel_sizes.py
    python3 -m tox exec -e intel -- python benchmarks/intel_sizes.py --nvidia    # with the sizes of an H100
    python3 -m tox exec -e intel -- python benchmarks/intel_sizes.py --messages    # what `doctor` knows of them

A call adds LoRA to q, k and v of Llama 8B, bfloat16, for 8 adapters in use, with B as a bank stores it on an Intel GPU.
The times are a lower bound by three quantities, each on its own; docs/intel-gpu.md says what they leave out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["TRITON_INTERPRET"] = "0"

import torch
from intel.calls import lora_call
from intel.native import Native, Tools, found_tools, native
from intel.toolchain import DEVICES, Launch, compiling_for, launches_of, problem

from xpu_lora_compile.inspect import predicted
from xpu_lora_compile.inspect.predicted import FEATURES, SLOTS, WIDTHS, Card
from xpu_lora_compile.kernels.sizes import sizes_for
from xpu_lora_compile.kernels.triton_launch import Triton

# Microseconds from a step's loads to their data, in which a thread does nothing else.
LATENCY = 0.5
# GB/s of memory, as published; a Max 1550 is two of these.
BANDWIDTH = {"bmg": 456.0, "pvc": 1638.0}
CARDS = {device: predicted.card_of(SimpleNamespace(**DEVICES[device])) for device in BANDWIDTH}


@dataclass(frozen=True)
class Compiled:
    """A launch, what Intel's compilers make of it, and what it does for rows that 8 adapters share evenly.

    Attributes:
        launch: as asked for.
        made: its native code.
        threads: warps of all programs that have rows.
        steps: of each program's loop.
    """

    launch: Launch
    made: Native
    threads: int
    steps: int

    @property
    def kernel(self) -> str:
        """Its name: shrink or expand."""
        return self.launch.kernel.removesuffix("_kernel")

    @property
    def messages(self) -> int:
        """Of all warps."""
        return self.threads * (self.made.sends + self.made.repeated * (self.steps - 1))

    def waiting(self, card: Card) -> float:
        """Microseconds of waiting for memory where too few threads take turns."""
        # Eight threads on each of eight vector engines.
        rounds = -(-self.threads // (card.cores * 64 * 128 // self.made.registers))
        return rounds * (self.steps + 1) * LATENCY


def compiled(
    device: str, rows: int, rank: int, tools: Tools, *, by_rank: bool = False, on_nvidia: bool = False
) -> Iterator[Compiled]:
    """Yield the shrink and the expand of a call."""
    call = lora_call(rows, rank, torch.bfloat16, FEATURES, WIDTHS, slots=SLOTS)
    if not by_rank:
        call = replace(call, lora_b=[b.contiguous() for b in call.lora_b])
    used = min(SLOTS, rows)
    for launch in launches_of(
        lambda: Triton().add_lora(call), sizes_for(rows, rank, sum(WIDTHS)) if on_nvidia else None
    ):
        if launch.kernel == "route_kernel":
            continue
        with compiling_for(device):
            made = native(tools, launch.compiled().asm["spv"], device)
        constants = launch.constants()
        if launch.kernel == "shrink_kernel":
            blocks = launch.grid[1] * launch.grid[2]
            steps = constants["EACH"] * constants["PIECE"] // constants["BK"]
        else:
            blocks = launch.operand("block_count")
            steps = constants["PER"] * max(1, rank // constants["BR"])
        tiles = used * -(-rows // used // constants["BM"])
        yield Compiled(launch, made, tiles * blocks * constants["num_warps"], steps)


def messages(device: str, tools: Tools) -> dict[tuple[str, int, int], int]:
    """Return what `predicted.MESSAGES` says for Battlemage, of a device."""
    found = {(rows, rank): compiled(device, rows, rank, tools) for rows, rank in predicted.POINTS}
    return {(each.kernel, *point): each.messages for point, both in found.items() for each in both}


def line_of(device: str, rows: int, rank: int, each: Compiled) -> list[Any]:
    """A line of the table."""
    card, constants, made = CARDS[device], each.launch.constants(), each.made
    long = constants["BK"] if each.kernel == "shrink" else constants["BN"]
    tile = f"{constants['BM']} x {constants['BR']} x {long}, {constants['num_warps']} warps"
    memory = predicted.bytes_of(each.kernel, rows, rank) / BANDWIDTH[device] / 1e3
    times = memory, predicted.message_time(each.messages, card), each.waiting(card)
    counts = made.registers, made.spilled, made.dpas, made.sends, made.repeated, made.blocks
    return [device, rows, rank, each.kernel, tile, *counts, *(f"{microseconds:.1f}" for microseconds in times)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvidia", action="store_true", help="the sizes of an H100, not those of Intel GPUs")
    parser.add_argument("--by-rank", action="store_true", help="B stored [K, R, W], as a bank does elsewhere")
    parser.add_argument("--messages", action="store_true", help="print predicted.MESSAGES, and no table")
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
        if given.messages:
            for point, count in messages("bmg", tools).items():
                print(f"    {point}: {count},".replace("'", '"'))
            return
        print(f"ocloc {tools.version}, bfloat16, D = {FEATURES}, W = {WIDTHS}, {SLOTS} adapters")
        heads = ["device", "T", "R", "kernel", "tile: rows x R x columns", "registers", "spilled", "DPAS", "messages"]
        heads += ["in loops", "2-D", "memory us", "messages us", "waiting us"]
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for device in CARDS:
            for rank in given.ranks:
                for rows in given.rows:
                    for each in compiled(device, rows, rank, tools, by_rank=given.by_rank, on_nvidia=given.nvidia):
                        line = line_of(device, rows, rank, each)
                        print("| " + " | ".join(map(str, line)) + " |", flush=True)


if __name__ == "__main__":
    main()
