"""The cost model of docs/intel-gpu.md beside measurements: how long our kernels take at least, and how long they take.

A call adds LoRA to q, k and v of Llama 8B, in bfloat16, for 8 adapters that share its rows evenly. Two bounds, each on
its own: the bytes that any kernel must move, and the messages to memory that ours send.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from xpu_lora_compile.errors import counted
from xpu_lora_compile.kernels import forced_kernel, triton_launch, vendor
from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.routing import RowRouting

FEATURES, WIDTHS, SLOTS = 4096, (4096, 1024, 1024), 8
# T and R.
POINTS = ((8, 16), (8, 64), (2048, 16), (2048, 64))
# Messages of all warps of a launch on Battlemage, with B as a bank stores it there. Intel's compilers count them:
# `benchmarks/intel_sizes.py --messages` prints them, and `tests/intel` fails if they are others. A Data Center GPU Max
# has up to 4 % more.
MESSAGES = {
    ("shrink", 8, 16): 71040,
    ("expand", 8, 16): 556032,
    ("shrink", 8, 64): 228864,
    ("expand", 8, 64): 1363968,
    ("shrink", 2048, 16): 1035264,
    ("expand", 2048, 16): 5136384,
    ("shrink", 2048, 64): 2168832,
    ("expand", 2048, 64): 11747328,
}
# Clocks that the load and store unit of a Xe core takes for a message: 64 bytes each, of one to four such lines.
CLOCKS = 2.0
# GHz: the highest that is published for a family, since PyTorch does not tell. A lower clock makes the bound higher.
CLOCK, CLOCK_OF_MAX = 2.67, 1.6
# Up to so many times its bound a kernel is as expected. A line to report by, no measurement.
EXPECTED = 3.0
OURS, THEIRS = "Triton", vendor.PACKAGE
# What sets of operands take together, at least.
BEYOND_CACHES = 1 << 28


def bytes_of(kernel: str, rows: int, rank: int) -> int:
    """Return the bytes of rows, weights in use, rank vectors and outputs, once each.

    Args:
        kernel: "shrink" or "expand".
        rows: T.
        rank: R.
    """
    used, hidden = min(SLOTS, rows), 4 * len(WIDTHS) * rows * rank
    if kernel == "shrink":
        return 2 * FEATURES * (rows + used * len(WIDTHS) * rank) + hidden
    # Outputs are read and written.
    return 2 * sum(WIDTHS) * (2 * rows + used * rank) + hidden


class Card(NamedTuple):
    """A device, as far as the bounds depend on it.

    Attributes:
        name: as the driver says it.
        cores: Xe cores; 0 where no messages were counted for such a device.
        clock: GHz.
        cache: bytes of its last cache; 0 where PyTorch does not tell.
    """

    name: str
    cores: int = 0
    clock: float = CLOCK
    cache: int = 0


def card_of(properties: Any) -> Card:
    """Return the card that has these properties, which are those of `torch.xpu.get_device_properties`."""
    cache = getattr(properties, "last_level_cache_size", 0)
    # Older Intel GPUs have Xe cores of another make.
    if not getattr(properties, "has_subgroup_2d_block_io", False):
        return Card(properties.name, cache=cache)
    cores = getattr(properties, "gpu_subslice_count", 0) or properties.gpu_eu_count // 8
    return Card(properties.name, cores, CLOCK_OF_MAX if " Max " in properties.name else CLOCK, cache)


def message_time(messages: int, card: Card) -> float:
    """Return the microseconds that a launch takes at least for so many messages of all its warps."""
    return messages * CLOCKS / (card.cores * card.clock * 1e3)


@dataclass
class Point:
    """A kernel at one T and R: its bounds, and what was measured.

    Attributes:
        kernel: "shrink" or "expand".
        rows: T.
        rank: R.
        bounds: microseconds, by what they are bounds of: "launch", "memory" for any kernel; "messages" for Triton's.
        measured: microseconds, medians, by OURS and THEIRS.
    """

    kernel: str
    rows: int
    rank: int
    bounds: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        """The highest bound of our kernel."""
        return max(self.bounds.values())

    @property
    def ratio(self) -> float:
        """What ours takes, in units of its bound; NaN where it did not run."""
        return self.measured.get(OURS, math.nan) / self.bound

    @property
    def text(self) -> str:
        """What was measured, and the bounds, in words."""
        times = [f"{name} {us:.1f} us" for name, us in self.measured.items()]
        if OURS in self.measured:
            times[0] += f", {self.ratio:.1f} times its bound"
        bounds = ", ".join(f"{name} {us:.1f}" for name, us in self.bounds.items())
        return f"{'; '.join(times) or 'not measured, as no kernel for it is installed'}. Bounds: {bounds}"

    def __str__(self) -> str:
        return f"{self.kernel}, T = {self.rows}, R = {self.rank}"


class Clock(Protocol):
    """What times.

    Attributes:
        late: how often the host could not keep ahead of the device, so that its time counts, too.
    """

    late: int

    def __call__(self, run: Callable[[int], object], calls: int) -> float:
        """Return the microseconds of one call of a function of the call's number: the median of a few rounds."""
        ...


class DeviceClock:
    """The clock of an accelerator. Its queue has other work first, so that the host's time to launch does not count.

    Args:
        device: its type.
    """

    def __init__(self, device: str) -> None:
        self.module: Any = torch.get_device_module(device)
        self.source, self.target = torch.empty(2, BEYOND_CACHES, dtype=torch.uint8, device=device)
        self.late = 0
        self._fill(2)
        self.module.synchronize()
        start = time.perf_counter()
        self._fill(8)
        self.module.synchronize()
        self.fill_time = (time.perf_counter() - start) / 8

    def __call__(self, run: Callable[[int], object], calls: int) -> float:
        """As `Clock`."""
        # The first compiles.
        run(0)
        self.module.synchronize()
        start = time.perf_counter()
        for number in range(calls):
            run(number)
        self.module.synchronize()
        # So many copies take twice as long as the host.
        copies = 1 + math.ceil(2 * (time.perf_counter() - start) / self.fill_time)
        times, late = [], False
        for _ in range(5):
            first, last = (self.module.Event(enable_timing=True) for _ in range(2))
            self._fill(copies)
            first.record()
            for number in range(calls):
                run(number)
            last.record()
            late |= first.query()
            last.synchronize()
            times.append(1e3 * float(first.elapsed_time(last)) / calls)
        self.late += late
        return statistics.median(times)

    def _fill(self, copies: int) -> None:
        for _ in range(copies):
            self.target.copy_(self.source)


def measured_beside_bounds(device: str, card: Card, clock: Clock) -> tuple[str, list[Point]]:
    """Return what the bounds rest on, in words, and all points with their bounds and what was measured.

    Args:
        device: the type of the device.
        card: the same device.
        clock: what times.
    """
    source, target = torch.empty(2, BEYOND_CACHES, dtype=torch.uint8, device=device)
    bandwidth = 2 * len(source) / clock(lambda _: target.copy_(source), 8) / 1e3
    number = torch.zeros(1, device=device)
    floor = clock(lambda _: number.add_(1), 64)
    points = []
    for rows, rank in POINTS:
        operands = Operands(device, rows, rank, max(BEYOND_CACHES, 2 * card.cache))
        for kernel in ("shrink", "expand"):
            memory = bytes_of(kernel, rows, rank) / bandwidth / 1e3
            point = Point(kernel, rows, rank, {"launch": floor, "memory": memory})
            if card.cores:
                point.bounds["messages"] = message_time(MESSAGES[kernel, rows, rank], card)
            for name, run in operands.contenders(kernel).items():
                point.measured[name] = clock(run, max(16, len(operands.calls)))
            points.append(point)
    about = f"a copy moves {bandwidth:.0f} GB/s, a kernel that does next to nothing takes {floor:.1f} us, "
    about += f"{card.cores} Xe cores, {card.clock} GHz" if card.cores else "no messages were counted for such a GPU"
    if clock.late:
        about += f". The host was too slow: {counted(clock.late, 'time')} below have its time in them"
    return about, points


def verdicts(points: Sequence[Point]) -> Iterator[tuple[str, str]]:
    """Yield what follows from the points, as a title and sentences: for the model, and for the choice of a kernel."""
    ours = [point for point in points if OURS in point.measured]
    if ours:
        odd = [f"{point} takes {point.ratio:.1f} times its bound" for point in ours if point.ratio > EXPECTED]
        odd += [f"{point} takes less than its bound" for point in ours if point.ratio < 1]
        fine = f"{len(ours) - len(odd)} of {len(ours)} times are 1 to {EXPECTED:.0f} times their bound, as expected"
        # No failed check: a bound may be wrong, and the numbers are right.
        yield "the cost model", f"{fine}. {'; '.join(odd)}: please report this." if odd else f"{fine}."
    both = [point for point in ours if THEIRS in point.measured]
    if not both:
        return
    faster: dict[str, list[str]] = {THEIRS: [], OURS: []}
    for rows, rank in POINTS:
        here = [point for point in both if (point.rows, point.rank) == (rows, rank)]
        best = min(faster, key=lambda name: sum(point.measured[name] for point in here))
        faster[best].append(f"T = {rows}, R = {rank}")
    wins = {name: where for name, where in faster.items() if where}
    text = "; ".join(f"{name} at {' and at '.join(where)}" for name, where in wins.items())
    if len(wins) == 1:
        (text,) = (f"{name} at all points" for name in wins)
    if forced_kernel() is not None:
        remedy = f"XPU_LORA_KERNEL={forced_kernel()} is set, whatever is faster"
    elif faster[OURS]:
        remedy = f"{THEIRS} comes first. If most of your calls are like those of Triton, set XPU_LORA_KERNEL=triton"
    else:
        remedy = f"{THEIRS} comes first, so there is nothing to set"
    yield "shrink and expand together are faster with", f"{text}. {remedy}."


class Operands:
    """Operands of one T and R, in as many sets as no cache holds.

    Args:
        device: the type of the device.
        rows: T.
        rank: R.
        enough: bytes of all sets, at least.
    """

    def __init__(self, device: str, rows: int, rank: int, enough: int) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()

        ranks = torch.full((SLOTS,), rank, dtype=torch.int32, device=device)
        routing = RowRouting(torch.arange(rows, device=device) % SLOTS, SLOTS, ranks)
        self.calls = [
            LoraCall(
                [normal(rows, sum(WIDTHS))],
                normal(rows, FEATURES),
                [normal(SLOTS, rank, FEATURES) for _ in WIDTHS],
                # As a bank stores it on an Intel GPU.
                [normal(SLOTS, width, rank) for width in WIDTHS],
                routing,
                (0,) * len(WIDTHS),
                tuple(sum(WIDTHS[:s]) for s in range(len(WIDTHS))),
            )
            for _ in range(-(-enough // (bytes_of("shrink", rows, rank) + bytes_of("expand", rows, rank))))
        ]

    def contenders(self, kernel: str) -> dict[str, Callable[[int], object]]:
        """Return what runs here, by name: functions of a call's number, which take the sets in turn."""
        calls, device = self.calls, self.calls[0].device
        found: dict[str, Callable[[int], object]] = {}
        if not triton_launch.problem(device):
            if kernel == "shrink":
                found[OURS] = lambda n: _shrunk(calls[n % len(calls)])
            else:
                hidden = triton_launch.empty_hidden(calls[0].inputs, calls[0].lora_a, calls[0].routing)
                hidden.sums.normal_()
                found[OURS] = lambda n: _expand(calls[n % len(calls)], hidden)
        kind, _ = vendor.family()
        if kind:
            slots = vendor.valid_slots(calls[0].routing.indices, SLOTS, kind == "lora")
            if kernel == "shrink":
                found[THEIRS] = lambda n: _shrunk_by_vendor(kind, calls[n % len(calls)], slots)
            else:
                rows, rank = len(slots), calls[0].lora_a[0].shape[1]
                vectors = torch.empty(len(WIDTHS), rows, rank, device=slots.device).normal_()
                found[THEIRS] = lambda n: _expand_by_vendor(kind, calls[n % len(calls)], vectors, slots)
        return found


def _shrunk(call: LoraCall) -> triton_launch.Hidden:
    return triton_launch.shrink_all(call.inputs, call.lora_a, call.routing)


def _expand(call: LoraCall, hidden: triton_launch.Hidden) -> None:
    triton_launch.expand_all(call.columns, hidden, call.lora_b, call.routing, call.scaling)


def _shrunk_by_vendor(kind: str, call: LoraCall, slots: Tensor) -> Tensor | list[Tensor]:
    return vendor.shrunk(kind, call.inputs, call.lora_a, slots, call.scaling)


def _expand_by_vendor(kind: str, call: LoraCall, hidden: Tensor, slots: Tensor) -> None:
    if kind == "lora":
        vendor.expand(kind, call.outputs[0], hidden, call.lora_b, slots, 0)
        return
    for s, offset in enumerate(call.slice_offsets):
        vendor.expand(kind, call.outputs[0], hidden[s : s + 1], call.lora_b[s : s + 1], slots, offset)
