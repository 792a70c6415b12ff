"""`xpu-lora bench gpu`: layers in a CUDA graph, base product and LoRA, against plain forms, peers and launch floors.

A graph of 12 layers with distinct weights is replayed: so the host's time does not count, and no base weight is still
in the caches (in the graphs without base products, the smaller stacks of LoRA may be). The routing is computed before,
as once a model. "in situ" is the base product with LoRA, "alone" is LoRA.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from xpu_lora_compile.bench import forms, peers
from xpu_lora_compile.bench.measure import Timing, check_error, geometric_mean, machine, timing_of
from xpu_lora_compile.errors import BenchError
from xpu_lora_compile.inspect.operands import RandomOperands
from xpu_lora_compile.ops import ADD_LORA, LINEAR_WITH_LORA, ROUTE_TILES
from xpu_lora_compile.ops.reference import lora_linear as reference

LAYERS = 12
OUTPUTS = {"a": (4096,), "b": (4096, 1024, 1024), "c": (14336, 14336)}
# K and R; the last is of adapters of ranks 8 to 64.
BANKS = ((8, (16,)), (32, (16,)), (8, (64,)), (64, (8, 16, 32, 64)))
BASE, OURS, ALONE = "base", "ours", "ours, alone"

Layer = Callable[[int], Tensor]


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement, in bfloat16 with D = 4096."""

    output: str
    slots: int
    # Of the slots, in turn.
    ranks: tuple[int, ...]
    rows: int

    def __str__(self) -> str:
        return (
            f"{self.output} K{self.slots} R{'-'.join(map(str, sorted({self.ranks[0], self.ranks[-1]})))} T{self.rows}"
        )


@dataclass(frozen=True)
class Result:
    """Microseconds a layer of each contender at a point."""

    point: Point
    timings: dict[str, Timing]


@dataclass(frozen=True)
class GpuRun:
    """All that one run measured, and where."""

    machine: str
    # Microseconds of one kernel that does nothing, and of two that depend on each other, in such a graph.
    launch_floors: tuple[float, float]
    summary: dict[str, float]
    results: list[Result]


def suite(outputs: Sequence[str], banks: Sequence[int], rows: Sequence[int]) -> list[Point]:
    """The points of these outputs ("a", "b", "c"), banks (positions in BANKS) and numbers of rows."""
    chosen = product(outputs, (BANKS[bank] for bank in banks), rows)
    return [Point(output, slots, ranks, t) for output, (slots, ranks), t in chosen]


def run(
    points: Sequence[Point],
    folder: Path | None,
    names: Sequence[str],
    plain: bool,
    rounds: int,
    on_done: Callable[[str], None],
) -> GpuRun:
    """Measure each point.

    Args:
        points: what to measure.
        folder: with the sources of peers, if any is to be measured.
        names: which peers; all that are in the folder where it is empty.
        plain: whether plain PyTorch forms are measured, which takes Inductor some seconds a point.
        rounds: how often each graph is replayed, in a random order.
        on_done: told of each point that was measured.

    Raises:
        BenchError: there is no such GPU or peer, or a contender computes something else than the reference.
    """
    found = peers.peers_of(folder) if folder is not None else {}
    if unknown := [name for name in names if name not in found]:
        known = ", ".join(found) or "no name without --peers"
        remedy = "Leave out --peer, or name a peer whose sources are in the folder of --peers."
        raise BenchError("bench gpu: --peer", known, str(unknown), remedy)
    if not torch.cuda.is_available():
        raise BenchError("bench gpu", "a CUDA device", "none", "Run it on a machine that has one.")
    chosen = {name: peer for name, peer in found.items() if not names or name in names}
    results = []
    with torch.no_grad():
        floors = _launch_floors(rounds)
        for point in points:
            results.append(Result(point, _measure(point, chosen, plain, rounds)))
            torch.compiler.reset()
            torch.cuda.empty_cache()
            on_done(str(point))
    return GpuRun(machine("cuda"), floors, summary(results, floors), results)


def summary(results: Sequence[Result], floors: tuple[float, float]) -> dict[str, float]:
    """Medians of what LoRA adds to the base product, and geometric means of how many times more others add."""
    found: dict[str, float] = {}
    for rows in sorted({result.point.rows for result in results}):
        for bank in ("R 16", "all"):
            mine = [at for at in results if at.point.rows == rows and (bank == "all" or at.point.ranks == (16,))]
            if mine:
                added = median(_added(result, OURS) / result.timings[BASE].median for result in mine)
                found[f"T = {rows}, {bank}: added to the base product, median, %"] = 100 * added
    others = sorted({name for result in results for name in result.timings} - {BASE, OURS, ALONE})
    for other in (name for name in others if not name.endswith(", alone")):
        mine = [result for result in results if other in result.timings]
        # What costs nothing counts as a kernel that does nothing.
        ratios = [max(_added(result, other), floors[0]) / max(_added(result, OURS), floors[0]) for result in mine]
        found[f"{other}: adds so many times what ours does (geometric mean)"] = geometric_mean(ratios)
        whole = [result.timings[other].median / result.timings[OURS].median for result in mine]
        found[f"{other}: base with LoRA / ours"] = geometric_mean(whole)
        found[f"{other}: base with LoRA / ours, worst point"] = min(whole)
        if all(f"{other}, alone" in result.timings for result in mine):
            alone = [result.timings[f"{other}, alone"].median / result.timings[ALONE].median for result in mine]
            found[f"{other}: alone / ours alone"] = geometric_mean(alone)
    few = [at.timings[ALONE].median for at in results if at.point.rows <= 8 and at.point.output == "a"]
    if few:
        found["ours alone, one slice, T <= 8 / floor of two launches, worst"] = max(few) / floors[1]
    return found


def _added(result: Result, name: str) -> float:
    return result.timings[name].median - result.timings[BASE].median


class Operands:
    """Random operands of a point, for all layers."""

    def __init__(self, point: Point) -> None:
        draw = RandomOperands(0, "cuda", drawn_on="cuda")
        normal = partial(draw.normal, dtype=torch.bfloat16)
        features, widths = 4096, OUTPUTS[point.output]
        self.ranks = [point.ranks[slot % len(point.ranks)] for slot in range(point.slots)]
        self.offsets = [sum(widths[:s]) for s in range(len(widths))]
        self.inputs = normal(point.rows, features)
        self.base = [normal(sum(widths), features, scale=features**-0.5) for _ in range(LAYERS)]
        self.outputs = [torch.empty(point.rows, sum(widths), dtype=torch.bfloat16, device="cuda") for _ in self.base]
        stacks = [draw.stacks(features, widths, self.ranks, torch.bfloat16) for _ in self.base]
        self.a, self.b_by_rank = map(list, zip(*stacks, strict=True))
        self.indices = draw.indices(point.rows, point.slots)

    def b(self) -> list[list[Tensor]]:
        """B, `[K, W, R]`: views."""
        return [[stack.transpose(1, 2) for stack in slices] for slices in self.b_by_rank]


def _measure(point: Point, found: Mapping[str, peers.Peer], plain: bool, rounds: int) -> dict[str, Timing]:
    operands = Operands(point)
    contenders = _contenders(operands, found, plain)
    exact = _exact(operands)
    graphs = {}
    for name, (layer, is_alone) in contenders.items():
        if is_alone:
            for at, output in enumerate(operands.outputs):
                torch.mm(operands.inputs, operands.base[at].t(), out=output)
        result = layer(0)
        if name != BASE:
            _check(name, point, result, exact)
        graphs[name] = _captured(layer)
    return _timed(graphs, rounds)


def _contenders(operands: Operands, found: Mapping[str, peers.Peer], plain: bool) -> dict[str, tuple[Layer, bool]]:
    """By name: a function of a layer's number; and whether it adds to the outputs, instead of computing them."""
    b, offsets = operands.b(), operands.offsets
    prepared = {
        "tiles": ROUTE_TILES(operands.indices, len(operands.ranks)),
        "ranks": torch.tensor(operands.ranks, dtype=torch.int32, device="cuda"),
    }
    slices = [0] * len(offsets)

    def base(layer: int) -> Tensor:
        return torch.mm(operands.inputs, operands.base[layer].t(), out=operands.outputs[layer])

    def ours(layer: int) -> Tensor:
        weights = [operands.base[layer]]
        arguments = (operands.a[layer], b[layer], operands.indices, slices, offsets, 1.0)
        (result,) = LINEAR_WITH_LORA(operands.inputs, weights, [None], *arguments, **prepared)
        return cast("Tensor", result)

    def alone(layer: int) -> Tensor:
        output = operands.outputs[layer]
        arguments = (operands.a[layer], b[layer], operands.indices, slices, offsets, 1.0)
        ADD_LORA([output], operands.inputs, *arguments, **prepared)
        return output

    def with_base(form: Any, stacks: Any, layer: int) -> Tensor:
        output = base(layer)
        form(output, operands.inputs, operands.a[layer], stacks[layer], operands.indices, offsets)
        return output

    contenders: dict[str, tuple[Layer, bool]] = {BASE: (base, False), OURS: (ours, False), ALONE: (alone, True)}
    by_row = [[stack.contiguous() for stack in slices] for slices in b]
    given = peers.Operands(operands.inputs, operands.outputs, operands.a, by_row, operands.indices, operands.ranks)
    suited = {name: peer for name, peer in found.items() if len(operands.inputs) <= peer.most_rows}
    for name, peer in suited.items():
        contenders[name] = peer.prepare_in_situ(given, base), False
        contenders[f"{name}, alone"] = peer.prepare(given), True
    if plain:
        contenders["dense, plain PyTorch"] = partial(with_base, forms.dense, operands.b_by_rank), False
        # Beyond, it copies weights for minutes.
        if len(operands.inputs) <= 32:
            gather = torch.compile(forms.gather, fullgraph=True, dynamic=False)
            contenders["gather, Inductor"] = partial(with_base, gather, by_row), False
    return contenders


def _exact(operands: Operands) -> Tensor:
    """The first rows of the first layer, in float64."""
    rows = operands.inputs[:64].double()
    a, b = ([stack.double() for stack in layers[0]] for layers in (operands.a, operands.b()))
    product = rows @ operands.base[0].double().t()
    return reference(product, rows, a, b, operands.indices[:64], operands.offsets)


def _check(name: str, point: Point, result: Tensor, exact: Tensor) -> None:
    # Others round in between; a wrong row or column is off by far more.
    allowed = 2e-2 * exact.abs().max().item()
    error = (result[: len(exact)].double() - exact).abs().max().item()
    check_error(f"bench: {name} at {point}", error, allowed)


def _captured(layer: Layer) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """All layers as a graph, and what must live as long."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(0)
        layer(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [layer(number) for number in range(LAYERS)]
    return graph, kept


def timed_in_graphs(layers: Mapping[str, Layer], rounds: int) -> dict[str, Timing]:
    """Microseconds a layer of each, in a graph of LAYERS."""
    return _timed({name: _captured(layer) for name, layer in layers.items()}, rounds)


def _timed(graphs: Mapping[str, tuple[torch.cuda.CUDAGraph, Any]], rounds: int) -> dict[str, Timing]:
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    order = random.Random(0)  # noqa: S311
    for number in range(rounds + 1):
        for name in order.sample(list(graphs), len(graphs)):
            graph, _ = graphs[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The first replay has the second start as it would in a row of steps.
            graph.replay()
            start.record()
            graph.replay()
            graph.replay()
            end.record()
            end.synchronize()
            if number > 0:
                taken[name].append(start.elapsed_time(end) / 1e3 / 2 / LAYERS)
    return {name: timing_of(times) for name, times in taken.items()}


def _launch_floors(rounds: int) -> tuple[float, float]:
    """Microseconds that one kernel, and two that depend on each other, take in a graph if they have nothing to do."""
    number = torch.zeros(1, device="cuda")

    def launch(times: int, _: int) -> Tensor:
        for _ in range(times):
            number.add_(1)
        return number

    first, second = timed_in_graphs({str(times): partial(launch, times) for times in (1, 2)}, rounds).values()
    return first.median, second.median
