"""`xpu-lora bench moe --device cuda`: experts in CUDA graphs, with LoRA and without, and LoRA alone next to others'.

A graph has 12 layers that take turns with two layers' weights, of more than the caches hold: so the host's time does
not count. "alone" is LoRA alone, on both products. Ours then makes a table of tiles in each layer, as its layers do.
How rows are sorted is computed before, and not timed: ours by expert and slot, instead of by expert as the base layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.bench import moe, peers
from xpu_lora_compile.bench.gpu import timed_in_graphs
from xpu_lora_compile.bench.measure import Timing, check_error, geometric_mean, machine
from xpu_lora_compile.bench.moe import BASE, COMPILED, COMPILED_BASE, DOWN, EAGER, GATE_UP, Draw, Sizes
from xpu_lora_compile.errors import BenchError
from xpu_lora_compile.inspect.operands import RandomOperands
from xpu_lora_compile.ops import ADD_LORA, ROUTE_TILES

ALONE = "ours, alone"
# With weights of their own.
LAYERS = 2
# How many rows are compared with float64.
CHECKED = 16

Call = Callable[[int], Tensor]


class Layer:
    """One layer: without LoRA, and with a bank of random adapters, on the same weights."""

    def __init__(self, sizes: Sizes, folder: Path, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.base = moe.mixture(sizes, device)
        self.served = moe.mixture(sizes, device, like=self.base)
        # Of rank 1, which is soon read: then the pages of all experts get numbers of rank R.
        adapters = moe.write_adapters(folder, replace(sizes, rank=1), sizes.slots)
        self.bank: AdapterBank = xlc.attach(self.served, adapters=adapters, slots=sizes.slots, max_rank=sizes.rank)
        self.experts: Any = self.served.experts
        for name, (_, features) in sizes.shapes().items():
            a, b = self.stacks(name)
            a.normal_(std=features**-0.5)
            b.normal_(std=0.5 * sizes.rank**-0.5)

    def stacks(self, name: str) -> tuple[Tensor, Tensor]:
        """A `[P, R, D]` and B `[P, W, R]` of a parameter."""
        a, b = (self.experts.get_buffer(f"lora_{factor}_{name}") for factor in "ab")
        return a, b

    def of_slots(self, name: str, slots: int) -> tuple[Tensor, Tensor]:
        """The same by slot and expert, `[K, E, R, D]` and `[K, E, W, R]`, contiguous."""
        pages = self.experts.lora_pages[:slots]
        a, b = self.stacks(name)
        return a[pages].contiguous(), b[pages].contiguous()


def run(
    sizes: Sizes, rows: Sequence[int], folder: Path | None, rounds: int, on_done: Callable[[str], None]
) -> moe.MoeRun:
    """Time the experts at each T.

    Args:
        sizes: of the layer and the adapters.
        rows: each T.
        folder: with the sources of peers, if any is to be measured.
        rounds: how often each graph is replayed, in a random order.
        on_done: told of each T.

    Raises:
        BenchError: there is no such GPU or peer, or a contender computes something else than float64.
    """
    found = peers.experts_peers_of(folder) if folder is not None else {}
    if not torch.cuda.is_available():
        raise BenchError("bench moe", "a CUDA device", "none", "Run it on a machine that has one.")
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        layers = [Layer(sizes, _made(Path(place) / str(number)), number, "cuda") for number in range(LAYERS)]
        results = []
        for count in rows:
            results.append(moe.MoeResult(count, _measure(layers, sizes, count, found, rounds)))
            torch.compiler.reset()
            torch.cuda.empty_cache()
            on_done(f"T{count}")
    return moe.MoeRun(machine("cuda"), f"a layer in a CUDA graph; {sizes}", summary(results), results)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def summary(results: Sequence[moe.MoeResult]) -> dict[str, float]:
    """Ratios at each T, and geometric means of how many times more time others take."""
    found: dict[str, float] = {}
    for result in results:
        times = {name: timing.median for name, timing in result.timings.items()}
        fastest = min(times[BASE], times[COMPILED_BASE])
        found |= {
            f"T = {result.rows}: speed of ours, eager / base": times[BASE] / times[EAGER],
            f"T = {result.rows}: speed of ours, compiled / base, compiled": times[COMPILED_BASE] / times[COMPILED],
            f"T = {result.rows}: speed of ours, the faster / the faster base": (
                fastest / min(times[EAGER], times[COMPILED])
            ),
        }
    others = {name for result in results for name in result.timings if name.endswith(", alone")} - {ALONE}
    for other in sorted(others):
        ratios = [
            result.timings[other].median / result.timings[ALONE].median for result in results if other in result.timings
        ]
        found[f"{other} / {ALONE}"] = geometric_mean(ratios)
        found[f"{other} / {ALONE}, at the worst T"] = min(ratios)
    return found


def _measure(
    layers: Sequence[Layer], sizes: Sizes, rows: int, found: Mapping[str, peers.ExpertsPeer], rounds: int
) -> dict[str, Timing]:
    inputs = moe.draw(sizes, rows, "cuda")
    slots = RandomOperands(2, "cuda", drawn_on="cuda").indices(rows, sizes.slots)
    with serving(layers, slots):
        calls = contenders(layers, inputs, slots) | contenders_alone(layers, sizes, inputs, slots, found)
        return timed_in_graphs(calls, rounds)


@contextmanager
def serving(layers: Sequence[Layer], slots: Tensor) -> Iterator[None]:
    """Have each token answered by the adapter of its slot, in all layers."""
    chosen = [f"adapter_{slot}" if slot >= 0 else None for slot in slots.tolist()]
    with ExitStack() as blocks:
        for layer in layers:
            blocks.enter_context(layer.bank.use(chosen))
        yield


def contenders(layers: Sequence[Layer], inputs: Draw, slots: Tensor) -> dict[str, Call]:
    """The experts without LoRA and with it, eager and compiled, checked against float64, by name.

    Args:
        layers: that serve these slots.
        inputs: of all.
        slots: `[T]`, of each row.
    """
    compiled = partial(torch.compile, dynamic=False)
    calls: dict[str, Call] = {
        BASE: _turns([layer.base for layer in layers], inputs),
        COMPILED_BASE: _turns([compiled(layer.base) for layer in layers], inputs),
        EAGER: _turns([layer.served for layer in layers], inputs),
        COMPILED: _turns([compiled(layer.served, backend="xpu_lora") for layer in layers], inputs),
    }
    nobody = torch.full_like(slots, -1)
    for number, layer in enumerate(layers):
        exact = {True: _exact(layer, inputs, slots), False: _exact(layer, inputs, nobody)}
        for name, call in calls.items():
            # The first call is followed op by op, and may take other ways.
            call(number)
            result = call(number)[:CHECKED]
            check(f"{name} at T{len(slots)}", result, exact[name in (EAGER, COMPILED)])
    return calls


def _turns(models: Sequence[Any], inputs: Draw) -> Call:
    return lambda number: cast("Tensor", models[number % len(models)](*inputs.arguments()))


def contenders_alone(
    layers: Sequence[Layer], sizes: Sizes, inputs: Draw, slots: Tensor, found: Mapping[str, peers.ExpertsPeer]
) -> dict[str, Call]:
    """LoRA alone on both products: ours, and others', checked against float64, by name.

    Args:
        layers: with their adapters.
        sizes: of all.
        inputs: of the layers.
        slots: `[T]`, of each row.
        found: the others.
    """
    rows, count = inputs.index.shape
    pairs, dtype, device = rows * count, sizes.torch_dtype, inputs.hidden.device
    activated = RandomOperands(3, device, drawn_on=device).normal(pairs, sizes.inner, dtype=dtype)
    # Whose pages the layer knows: any of them has as many slots.
    groups, order = layers[0].experts.sorted_groups(inputs.index, slots)
    ends = layers[0].experts.ends_of(groups)
    sorted_hidden, sorted_activated = inputs.hidden[order // count], activated[order]
    outputs = {
        name: torch.zeros(pairs, width, dtype=dtype, device=device) for name, (width, _) in sizes.shapes().items()
    }

    def ours(number: int) -> Tensor:
        layer = layers[number % len(layers)]
        codes = layer.experts.page_of_group()
        pages = codes[groups]
        tiles = ROUTE_TILES(pages, layer.stacks(GATE_UP)[0].shape[0], ends=ends, codes=codes)
        for name, rows_in in ((GATE_UP, sorted_hidden), (DOWN, sorted_activated)):
            a, b = layer.stacks(name)
            ADD_LORA([outputs[name]], rows_in, [a], [b], pages, [0], [0], 1.0, tiles=tiles)
        return outputs[DOWN]

    exact = [_exact_alone(layer, inputs, activated, slots) for layer in layers]
    for number in range(len(layers)):
        for output in outputs.values():
            output.zero_()
        ours(number)
        for name, output in outputs.items():
            unsorted = torch.empty_like(output)
            unsorted[order] = output
            check(f"{ALONE}, {name} at T{rows}", unsorted[: CHECKED * count], exact[number][name])
    stacks = [{name: layer.of_slots(name, sizes.slots) for name in sizes.shapes()} for layer in layers] if found else []
    given = peers.ExpertsOperands(
        inputs.hidden,
        activated,
        inputs.index.int(),
        inputs.weights.float(),
        slots.int(),
        [layer[GATE_UP] for layer in stacks],
        [layer[DOWN] for layer in stacks],
    )
    calls: dict[str, Call] = {ALONE: ours}
    for name, peer in found.items():
        bound = peer.prepare(given)
        for number in range(len(layers)):
            up, down = bound(number)
            weights = inputs.weights[:CHECKED].reshape(-1, 1).double() if peer.weighs_down else 1.0
            where = f"{name}, alone, at T{rows}"
            check(f"{where}: {GATE_UP}", up[: CHECKED * count], exact[number][GATE_UP])
            check(f"{where}: {DOWN}", down[: CHECKED * count], exact[number][DOWN] * weights)
            # Some add to what is there.
            up.zero_()
            down.zero_()
        calls[f"{name}, alone"] = partial(_second, bound)
    return calls


def _second(bound: peers.ExpertsCall, number: int) -> Tensor:
    return bound(number)[1]


def check(where: str, result: Tensor, exact: Tensor) -> None:
    """Compare with float64. Others round in between; a wrong row is off by far more."""
    allowed = 3e-2 * exact.abs().max().item()
    check_error(f"bench moe: {where}", (result.double() - exact).abs().max().item(), allowed)


def _exact(layer: Layer, inputs: Draw, slots: Tensor) -> Tensor:
    """The outputs of the first rows in float64."""
    results = []
    for row in range(min(CHECKED, len(inputs.hidden))):
        total = torch.zeros(inputs.hidden.shape[1], dtype=torch.float64, device=slots.device)
        for expert, weight in zip(inputs.index[row].tolist(), inputs.weights[row].double(), strict=True):
            up = _product(layer, GATE_UP, expert, slots[row], inputs.hidden[row], with_base=True)
            gate, linear = up.chunk(2)
            activated = torch.nn.functional.silu(gate) * linear
            total += weight * _product(layer, DOWN, expert, slots[row], activated, with_base=True)
        results.append(total)
    return torch.stack(results)


def _exact_alone(layer: Layer, inputs: Draw, activated: Tensor, slots: Tensor) -> dict[str, Tensor]:
    """What LoRA adds to both products of the first rows, pairs in the order of their tokens, in float64."""
    rows, count = min(CHECKED, len(inputs.hidden)), inputs.index.shape[1]
    pairs = [(row, place, expert) for row in range(rows) for place, expert in enumerate(inputs.index[row].tolist())]
    return {
        GATE_UP: torch.stack(
            [_product(layer, GATE_UP, expert, slots[row], inputs.hidden[row]) for row, _, expert in pairs]
        ),
        DOWN: torch.stack(
            [_product(layer, DOWN, expert, slots[row], activated[row * count + place]) for row, place, expert in pairs]
        ),
    }


def _product(layer: Layer, name: str, expert: int, slot: Tensor, row: Tensor, *, with_base: bool = False) -> Tensor:
    weight = getattr(layer.base.experts, name)[expert].double()
    row = row.double()
    result = weight @ row if with_base else torch.zeros_like(weight[:, 0])
    page = layer.experts.lora_pages[slot, expert]
    if page >= 0:
        a, b = layer.stacks(name)
        result = result + b[page].double() @ (a[page].double() @ row)
    return result
