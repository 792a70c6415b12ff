"""`xpu-lora bench ops`: shrink and expand alone, at many sizes, against other forms of the same and a floor."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.bench import forms
from xpu_lora_compile.bench.measure import (
    BEYOND_CACHES,
    Timing,
    check_error,
    geometric_mean,
    machine,
    measure,
    without_stderr,
)
from xpu_lora_compile.inspect.operands import RandomOperands
from xpu_lora_compile.kernels import native
from xpu_lora_compile.ops.internal import ADD_LORA
from xpu_lora_compile.ops.reference import lora_linear as reference

# Layers in a step, each on what the one before has put out, as in a model, so that no compiler merges them. A step is
# what is timed: no call pays alone for entering a graph, or for a Python that others have pushed out of the caches.
LAYERS = 8
OURS = ("ours, compiled", "ours, eager")
# What plain PyTorch can do: each compiled by Inductor or not, whichever is its better way.
# What several adapters a row add.
SEVERAL = "ours, compiled, M="
PLAIN = ("gather, Inductor", "dense", "loop as PEFT's")


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement; widths are those of the slices, together no less than the features."""

    dtype: str
    rows: int
    features: int
    widths: tuple[int, ...]
    rank: int
    slots: int

    def __str__(self) -> str:
        widths = "+".join(map(str, self.widths))
        return f"{self.dtype} {self.features}x{widths} R{self.rank} K{self.slots} T{self.rows}"


@dataclass(frozen=True)
class Result:
    """What was measured at a point."""

    point: Point
    timings: dict[str, Timing]
    # Bytes a second at which memory was read, between the runs of the others.
    bandwidth: float
    # Microseconds that memory takes at this rate to hand over what the call must read and write.
    floor: float
    # Of one call of ours, besides its operands: bytes.
    peak_memory: int


def suite(name: str, dtypes: Sequence[str], rows: Sequence[int]) -> list[Point]:
    """The points of "main" (one size) or "wide" (ranks, numbers of slots, sizes, and qkv slices)."""
    if name == "main":
        return [Point(dtype, t, 4096, (4096,), 16, 8) for dtype, t in product(dtypes, rows)]
    shapes = [(576, (576,)), (576, (1536,)), (2048, (2048,)), (4096, (14336,)), (4096, (4096, 1024, 1024))]
    return [
        Point(dtype, t, features, widths, rank, slots)
        for dtype, (features, widths), (rank, slots), t in product(
            dtypes, shapes, [(8, 2), (64, 2), (8, 64), (64, 64)], rows
        )
    ]


@dataclass(frozen=True)
class OpsRun:
    """All that one run measured, and where."""

    machine: str
    summary: dict[str, float]
    results: list[Result]


def run(
    points: Sequence[Point],
    device: str,
    seconds: float,
    on_done: Callable[[str], None],
    adapters_per_row: int = 1,
) -> OpsRun:
    """Measure each point.

    Args:
        points: what to measure.
        device: "cpu", "cuda" or "xpu".
        seconds: for each contender at each point.
        on_done: told of each point that was measured.
        adapters_per_row: M; with more than 1 also what M adapters a row add, each with a weight: in one call, and in M.

    Raises:
        BenchError: a contender computes something else than the reference, and was not timed.
    """
    results = []
    for point in points:
        with torch.no_grad():
            results.append(_measure(point, device, seconds, adapters_per_row))
        torch.compiler.reset()
        on_done(str(point))
    return OpsRun(machine(device), summary(results) | overheads(device), results)


def summary(results: Sequence[Result]) -> dict[str, float]:
    """Geometric means of how many times slower than ours the others are, and the worst point against plain forms."""
    ratios: dict[str, list[float]] = {}
    for result in results:
        times = {name: timing.median for name, timing in result.timings.items()}
        ours = min(times[name] for name in OURS)
        for name in times:
            if name.startswith(SEVERAL):
                ratios.setdefault(f"{name} / one, compiled", []).append(times[name] / times[OURS[0]])
            elif name not in OURS:
                ratios.setdefault(f"{name} / ours", []).append(times[name] / ours)
        ratios.setdefault("best plain form / ours", []).append(
            min(times[name] for name in PLAIN if name in times) / ours
        )
        ratios.setdefault("ours / floor", []).append(ours / result.floor)
    found = {name: geometric_mean(each) for name, each in ratios.items()}
    return found | {"best plain form / ours, at the worst point": min(ratios["best plain form / ours"])}


def overheads(device: str) -> dict[str, float]:
    """Microseconds of an eager call whose products take no time, beside an `add_` of PyTorch's."""
    hidden, inputs, output = (torch.ones(1, columns, device=device) for columns in (1, 16, 16))
    a, b = torch.ones(2, 1, 16, device=device), torch.ones(2, 16, 1, device=device)
    indices = torch.zeros(1, dtype=torch.int64, device=device)
    calls: dict[str, Callable[[], object]] = {
        "bgmv_shrink": lambda: xlc.bgmv_shrink(hidden, inputs, a, indices),
        "bgmv_expand": lambda: xlc.bgmv_expand(output, hidden, b, indices),
        "lora_linear": lambda: xlc.lora_linear(output, inputs, [a], [b], indices, [0]),
        "add_ of PyTorch": lambda: output.add_(inputs),
    }

    def often(call: Callable[[], object]) -> Callable[[int], None]:
        def run(_: int) -> None:
            for _ in range(100):
                call()

        return run

    with torch.no_grad():
        timings = measure({name: often(call) for name, call in calls.items()}, device, 0.05)
    return {f"an eager call, smallest sizes, us: {name}": timing.median / 100 for name, timing in timings.items()}


class _Operands:
    """Random operands of a point, as many sets as go beyond the caches."""

    def __init__(self, point: Point, device: str) -> None:
        draw = RandomOperands(0, device, drawn_on=device)
        dtype = getattr(torch, point.dtype)
        size = sum(point.slots * point.rank * (point.features + width) * dtype.itemsize for width in point.widths)
        self.sets = min(16, -(-BEYOND_CACHES // (LAYERS * size))) * LAYERS
        self.offsets = [sum(point.widths[:s]) for s in range(len(point.widths))]
        self.inputs = draw.normal(point.rows, point.features, dtype=dtype)
        # What the layers' base products would be: added to, and the next layer's input from its first columns on.
        self.bases = [draw.normal(point.rows, sum(point.widths), dtype=dtype) for _ in range(LAYERS)]
        self.outputs = [base.clone() for base in self.bases]
        self.indices = draw.indices(point.rows, point.slots)
        self.draw, self.slots = draw, point.slots
        ranks = [point.rank] * point.slots
        stacks = [draw.stacks(point.features, point.widths, ranks, dtype) for _ in range(self.sets)]
        self.a, self.b_by_rank = map(list, zip(*stacks, strict=True))

    def reset(self) -> None:
        """Have the outputs be as the base products have just left them."""
        torch._foreach_copy_(self.outputs, self.bases)

    def several(self, count: int) -> tuple[Tensor, Tensor]:
        """Indices and weights, `[T, count]`: of rows with an adapter so many different ones, the first as before."""
        further = (self.indices[:, None] + torch.arange(count, device=self.indices.device)) % self.slots
        indices = torch.where(self.indices[:, None] < 0, -1, further)
        return indices, self.draw.normal(*indices.shape)

    def bytes_moved(self) -> int:
        """What one call must read and write at least: each used slot's weights, inputs, and outputs both ways."""
        used = [slot for slot in self.indices.unique().tolist() if slot >= 0]
        weights: int = sum(stack[used].nbytes for stack in (*self.a[0], *self.b_by_rank[0]))
        return weights + self.inputs.nbytes + 2 * self.outputs[0].nbytes


def _measure(point: Point, device: str, seconds: float, adapters_per_row: int) -> Result:
    operands = _Operands(point, device)
    b = [[stack.transpose(1, 2) for stack in slices] for slices in operands.b_by_rank]
    by_row = [[stack.contiguous() for stack in slices] for slices in b]
    # Some need a slot of zeros for rows without an adapter.
    with_zeros = [
        [[torch.cat([stack, torch.zeros_like(stack[:1])]) for stack in slices] for slices in layers]
        for layers in (operands.a, by_row)
    ]
    contenders: dict[str, Callable[[int], object]] = {
        OURS[0]: _call(_step(_ours, {"backend": "xpu_lora"}), operands, operands.a, b),
        OURS[1]: _call(_step(_ours), operands, operands.a, b),
        PLAIN[0]: _call(_step(forms.gather, {}), operands, operands.a, by_row),
        PLAIN[2]: _call(_step(forms.loop), operands, operands.a, by_row),
    }
    # Some 4 GFLOP, where a CPU without bfloat16 products takes seconds, and where dense is tens of times slower.
    if point.rows * point.slots * point.rank * (point.features + sum(point.widths)) <= 1 << 31:
        contenders[PLAIN[1]] = _call(_step(forms.dense), operands, operands.a, operands.b_by_rank)
    # A copy of [T, W, R] that would not fit is left out.
    if point.rows * point.rank * max(point.features, *point.widths) <= 1 << 28:
        contenders["vLLM's form"] = _call(_step(forms.vllm), operands, with_zeros[0], with_zeros[1])
    if device == "cpu" and point.dtype != "float32" and importlib.util.find_spec("intel_extension_for_pytorch"):
        importlib.import_module("intel_extension_for_pytorch")
        indices = torch.where(operands.indices < 0, point.slots, operands.indices)
        contenders["IPEX"] = _call(_step(forms.ipex), operands, with_zeros[0], with_zeros[1], indices)
    _check(point, operands, b, contenders)
    if adapters_per_row > 1:
        given: Any = operands.several(adapters_per_row)
        forms_of_several = {"": _together, " by as many calls": _one_by_one}
        more = {
            f"{SEVERAL}{adapters_per_row}{name}": _call(
                _step(form, {"backend": "xpu_lora"}), operands, operands.a, b, given
            )
            for name, form in forms_of_several.items()
        }
        _check(point, operands, b, more, *given)
        contenders |= more
    # On a machine that others share, a bandwidth from before or after would be of another machine.
    memory = torch.ones(BEYOND_CACHES // 4, device=device)
    steps = measure(contenders | {"memory": lambda _: memory.sum()}, device, seconds, before=operands.reset)
    speed = memory.nbytes / (steps.pop("memory").median / 1e6)
    timings = {name: Timing(step.median / LAYERS, step.spread, step.runs) for name, step in steps.items()}
    return Result(point, timings, speed, operands.bytes_moved() / speed * 1e6, _peak_memory(operands, b))


def _ours(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
) -> None:
    for a, b, offset in zip(lora_a, lora_b, offsets, strict=True):
        hidden = inputs.new_empty(inputs.shape[0], a.shape[1], dtype=torch.float32)
        xlc.bgmv_shrink(hidden, inputs, a, indices)
        xlc.bgmv_expand_slice(output, hidden, b, indices, offset, b.shape[1])


def _together(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Any,
    offsets: Sequence[int],
) -> None:
    """The sum of several adapters; indices are a pair of those and weights."""
    indices, weights = indices
    output.copy_(xlc.lora_linear(output, inputs, lora_a, lora_b, indices, offsets, adapter_weights=weights))


def _one_by_one(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Any,
    offsets: Sequence[int],
) -> None:
    """The same in a call for each, in the way that takes no further op."""
    indices, weights = indices
    for a, b, offset in zip(lora_a, lora_b, offsets, strict=True):
        for which in range(indices.shape[1]):
            hidden = inputs.new_empty(inputs.shape[0], a.shape[1], dtype=torch.float32)
            xlc.bgmv_shrink(hidden, inputs, a, indices[:, which])
            hidden = hidden * weights[:, which : which + 1]
            xlc.bgmv_expand_slice(output, hidden, b, indices[:, which], offset, b.shape[1])


def _step(form: forms.Form, compile_options: dict[str, Any] | None = None) -> Callable[..., object]:
    """The form for each layer, one after the other, as a model calls it; compiled as one graph, if asked."""

    def step(
        outputs: list[Tensor], inputs: Tensor, a: list[Any], b: list[Any], indices: Tensor, offsets: Sequence[int]
    ) -> None:
        rows = inputs
        for output, layer_a, layer_b in zip(outputs, a, b, strict=True):
            form(output, rows, layer_a, layer_b, indices, offsets)
            rows = output[:, : inputs.shape[1]]

    # Dynamo keeps what it compiled by code object: on one that all share, each would pay for the guards of the others.
    step.__code__ = step.__code__.replace(co_name=f"step_of_{form.__name__}")
    return step if compile_options is None else torch.compile(step, fullgraph=True, dynamic=False, **compile_options)


def _call(
    step: Callable[..., object], operands: _Operands, a: Any, b: Any, indices: Any = None
) -> Callable[[int], object]:
    """A step on the layers whose turn it is."""
    given = operands.indices if indices is None else indices

    def call(number: int) -> object:
        first = number % (len(a) // LAYERS) * LAYERS
        turn = slice(first, first + LAYERS)
        return step(operands.outputs, operands.inputs, a[turn], b[turn], given, operands.offsets)

    return call


def _check(
    point: Point,
    operands: _Operands,
    b: Any,
    contenders: dict[str, Callable[[int], object]],
    indices: Tensor | None = None,
    adapter_weights: Tensor | None = None,
) -> None:
    """Compare every contender with the reference in float64, once."""
    exact, rows = [], operands.inputs.double()
    indices = operands.indices if indices is None else indices
    for base, a, layer_b in zip(operands.bases, operands.a[:LAYERS], b[:LAYERS], strict=True):
        exact_a, exact_b = ([stack.double() for stack in slices] for slices in (a, layer_b))
        places = indices, operands.offsets
        exact.append(reference(base.double(), rows, exact_a, exact_b, *places, adapter_weights=adapter_weights))
        rows = exact[-1][:, : point.features]
    # Others round in between; a wrong row or column is off by far more.
    allowed = max(output.abs().max().item() for output in exact) * (1e-4 if point.dtype == "float32" else 5e-2)
    for name, contender in contenders.items():
        operands.reset()
        contender(0)
        error = max(
            (output.double() - right).abs().max().item() for output, right in zip(operands.outputs, exact, strict=True)
        )
        check_error(f"bench: {name} at {point}", error, allowed)


def _peak_memory(operands: _Operands, b: Any) -> int:
    """Bytes that one call of ours holds at most beside its operands: the allocator's, and the native kernel's own."""
    arguments = (operands.outputs[:1], operands.inputs, operands.a[0], b[0], operands.indices)
    with without_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        ADD_LORA(*arguments, [0] * len(b[0]), operands.offsets, 1.0)
    held = peak = 0
    for event in profile.events():
        held += event.self_cpu_memory_usage + event.self_device_memory_usage
        peak = max(peak, held)
    ranks = [stack.shape[1] for stack in operands.a[0]]
    return int(peak) + native.scratch_bytes(len(operands.indices), sum(ranks), max(ranks))
