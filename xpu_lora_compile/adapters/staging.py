"""An adapter on its way from its file into the stacks of a bank: in memory of its own, and then all at once.

    file -> Staged: one block a device and dtype, laid out as one slot of all stacks -> `Staged.store`: a slot

The block holds what the slot will hold, scaled, padded with zeros and in the stacks' order. So all values are checked
before a stack changes, whatever was in the slot before is gone afterwards, and a stack takes one copy.

On CUDA the block is made on the device: the file's bytes go there as they are, as `upload` says, and are converted
there, on a stream of its own. Elsewhere each tensor is converted as it is copied. The block stays for the next load:
its memory and its views take longer to make than to fill.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from xpu_lora_compile.adapters.checkpoint import DTYPES, Checkpoint, ModuleSizes, Pair, are_finite
from xpu_lora_compile.adapters.cores import with_few_cores
from xpu_lora_compile.adapters.extras import EMPTY, HEAD_SLOTS, HEADS, RoomyLayer, values_of
from xpu_lora_compile.adapters.upload import runs_of, side_stream, upload
from xpu_lora_compile.errors import AdapterFileError
from xpu_lora_compile.torch_internals import copy_each, multiply_each, zero_each

# In seconds. A decoding step takes the lock some twenty times, and Python's own turn is 5 ms.
_TURN = 5e-5
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


class StackedLayer(Protocol):
    """What a layer offers that is to take an adapter."""

    lora_site: ModuleSizes
    lora_a: Tensor
    lora_b: Tensor

    @property
    def lora_extras(self) -> Mapping[str, Tensor]:
        """What each slot has besides A and B: see `adapters.extras`."""

    def places(
        self, slot_a: Tensor, slot_b: Tensor, shape_a: tuple[int, int], shape_b: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Views of one slot's memory of the shapes of an adapter's A and B, which these fill."""


class PagedLayer(Protocol):
    """What a mixture of experts offers that is to take an adapter."""

    lora_pages: Tensor

    @property
    def page_count(self) -> int:
        """How many pages it has, one for an expert of an adapter."""

    @property
    def lora_parameters(self) -> Mapping[str, ModuleSizes]:
        """The parameters that carry LoRA, with their sizes."""

    @property
    def lora_stacks(self) -> Mapping[str, Tensor]:
        """All memory for adapters."""

    def fill(self, slot: int, experts: list[int], weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give a slot pages for some experts, and fill them with A `[n, r, D]` and B `[n, W, r]` of each parameter."""

    def clear(self, slot: int) -> None:
        """Empty a slot."""


@dataclass(frozen=True)
class _Pages:
    """The LoRA of an adapter on one mixture: the experts that it changes, and the weights of each parameter."""

    layer: PagedLayer
    experts: list[int]
    weights: Mapping[str, tuple[Tensor, Tensor]]

    def store(self, slot: int) -> None:
        """Fill a slot."""
        self.layer.fill(slot, self.experts, self.weights)


def _pages_of(checkpoint: Checkpoint, name: str, layer: PagedLayer) -> _Pages:
    """Read what the file has for a mixture, by the mixture's name."""
    found: dict[str, tuple[list[int], Tensor, Tensor]] = {}
    for parameter in layer.lora_parameters:
        if f"{name}.{parameter}" in checkpoint.experts:
            dtype = layer.lora_stacks[f"lora_a_{parameter}"].dtype
            found[parameter] = checkpoint.read_experts(f"{name}.{parameter}", dtype)
    experts = sorted({expert for numbers, _, _ in found.values() for expert in numbers})
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for parameter, (numbers, a, b) in found.items():
        if numbers == experts:
            weights[parameter] = a, b
            continue
        at = torch.tensor([experts.index(expert) for expert in numbers], dtype=torch.int64)
        all_a, all_b = (values.new_zeros(len(experts), *values.shape[1:]) for values in (a, b))
        all_a[at], all_b[at] = a, b
        weights[parameter] = all_a, all_b
    return _Pages(layer, experts, weights)


class _Block:
    """Memory for one slot of all stacks of a device and dtype.

    Attributes:
        stacks: A and B of each layer, which the block does not keep alive.
        flat: the values, one stack after another.
        slots: views of `flat`, each with the sizes of one slot of its stack, and in the order in which its values lie.
    """

    def __init__(self, stacks: list[Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.stacks = [weakref.ref(stack) for stack in stacks]
        sizes = [math.prod(stack.shape[1:]) for stack in stacks]
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self.slots = []
        for stack, values in zip(stacks, self.flat.split(sizes), strict=True):
            _, rows, columns = stack.shape
            _, of_row, of_column = stack.stride()
            self.slots.append(values.view(columns, rows).t() if of_row < of_column else values.view(rows, columns))
        # The module and the shapes of each pair that the block was last filled with, and where they went.
        self._filled: list[tuple[str, tuple[int, int], tuple[int, int]]] = []
        self._places: list[Tensor] = []

    def is_for(self, stacks: list[Tensor]) -> bool:
        """Whether it was made for these stacks."""
        return len(stacks) == len(self.stacks) and all(
            ref() is stack for ref, stack in zip(self.stacks, stacks, strict=True)
        )

    def places(self, pairs: Mapping[str, Pair], layers: Mapping[str, StackedLayer]) -> list[Tensor]:
        """Where each pair's A and B go, in turn; all else is zeros.

        Args:
            pairs: of these layers.
            layers: those of the stacks, in their order.
        """
        wanted = [(name, pair.shape_a, pair.shape_b) for name, pair in pairs.items()]
        if wanted != self._filled:
            self._filled, self._places = [], []
            self.flat.zero_()
            slots = dict(zip(layers, zip(self.slots[::2], self.slots[1::2], strict=True), strict=True))
            for name, shape_a, shape_b in wanted:
                self._places += layers[name].places(*slots[name], shape_a, shape_b)
            self._filled = wanted
        return self._places


@dataclass(frozen=True)
class _Extra:
    """What one slot of a buffer of `adapters.extras` is to hold.

    Args:
        name: of the buffer.
        stack: the buffer.
        value: of the slot, but for `HEAD_SLOTS`, which hold their own numbers; None for what an empty slot holds.
    """

    name: str
    stack: Tensor
    value: Tensor | None

    def store(self, slot: int) -> None:
        """Fill a slot: all of it, so that nothing of another adapter stays."""
        if self.value is None:
            self.stack[slot].fill_(EMPTY[self.name])
        elif self.name == HEAD_SLOTS:
            self.stack[slot].fill_(slot)
        else:
            self.stack[slot].copy_(self.value)


def _extras_of(checkpoint: Checkpoint, name: str, layer: StackedLayer) -> list[_Extra]:
    extras = layer.lora_extras
    values = values_of(checkpoint, name, cast("RoomyLayer", layer)) if extras else {}
    if HEADS in values:
        values[HEAD_SLOTS] = values[HEADS]
    return [_Extra(key, stack, values.get(key)) for key, stack in extras.items()]


class Staged:
    """An adapter whose values have been checked, ready to be stored.

    Attributes:
        rank: the highest rank of its modules.
        modules: how many it has LoRA on.
    """

    def __init__(
        self,
        blocks: Mapping[torch.device, list[tuple[list[Tensor], _Block]]],
        extras: Mapping[torch.device, list[_Extra | _Pages]],
        checkpoint: Checkpoint,
    ) -> None:
        self._blocks = blocks
        self._extras = extras
        self.rank = checkpoint.rank
        self.modules = len(checkpoint.pairs) + len(checkpoint.experts)

    def store(self, slot: int, ranks: Tensor | None, readers: Iterable[torch.cuda.Event]) -> None:
        """Fill a slot, which no row uses, and return when all that is launched from now on sees it filled.

        Args:
            slot: of the bank.
            ranks: the rank of each slot's adapter, `[K]`, or None.
            readers: on CUDA, what must have passed before the slot may change, besides the current stream.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():
                for device in self._extras:
                    blocks = self._blocks.get(device, [])
                    run = with_few_cores if device.type == "cpu" else _here
                    with _aside(device, readers):
                        for stacks, block in blocks:
                            run(copy_each, [stack[slot] for stack in stacks], block.slots)
                        for extra in self._extras[device]:
                            extra.store(slot)
                        if ranks is not None and ranks.device == device:
                            ranks[slot].fill_(self.rank)
        finally:
            for device in self._extras:
                if device.type == "cuda":
                    side_stream(device).synchronize()


def _here(function: Callable[..., Any], *arguments: object) -> Any:
    """As `with_few_cores`, in this thread."""
    return function(*arguments)


def _aside(device: torch.device, readers: Iterable[torch.cuda.Event]) -> AbstractContextManager[object]:
    """Run what follows on the stream for loading, after the current one and the readers."""
    if device.type != "cuda":
        return nullcontext()
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    for event in readers:
        stream.wait_event(event)
    return torch.cuda.stream(stream)


class _Turns:
    """How long Python's threads hold the interpreter's lock while another waits: shorter while adapters are loaded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loads = 0
        self._before = self._set = 0.0

    def shorten(self) -> None:
        """Begin a load."""
        with self._lock:
            self._loads += 1
            if self._loads == 1:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, _TURN))
                self._set = sys.getswitchinterval()

    def restore(self) -> None:
        """End a load; the last one sets what was, unless somebody has set something else since."""
        with self._lock:
            self._loads -= 1
            if self._loads == 0 and sys.getswitchinterval() == self._set:
                sys.setswitchinterval(self._before)


_TURNS = _Turns()


@contextmanager
def short_turns() -> Iterator[None]:
    """Keep the threads that serve from waiting for the interpreter's lock for longer than a decoding step can bear."""
    _TURNS.shorten()
    try:
        yield
    finally:
        _TURNS.restore()


def clear(layers: Iterable[StackedLayer], mixtures: Iterable[PagedLayer], slot: int) -> None:
    """Empty a slot, on the current stream of each device."""
    for mixture in mixtures:
        mixture.clear(slot)
    blocks: dict[torch.device, list[Tensor]] = {}
    for layer in layers:
        for stack in (layer.lora_a, layer.lora_b):
            blocks.setdefault(stack.device, []).append(stack[slot])
        for name, stack in layer.lora_extras.items():
            stack[slot].fill_(EMPTY[name])
    for slots in blocks.values():
        zero_each(slots)


class Staging:
    """The memory through which the adapters of one bank come: a slot's, kept from load to load."""

    def __init__(self) -> None:
        # Threads load at once: one takes a block while another puts its own back.
        self._lock = threading.Lock()
        self._idle: dict[tuple[torch.device, torch.dtype], _Block] = {}

    @contextmanager
    def staged(
        self, checkpoint: Checkpoint, layers: Mapping[str, StackedLayer], mixtures: Mapping[str, PagedLayer]
    ) -> Iterator[Staged]:
        """Read the values of an adapter, convert and check them; its memory is the adapter's until the block ends.

        Args:
            checkpoint: the file.
            layers: all layers of the bank, by the names that the checkpoint gives them.
            mixtures: all of its mixtures of experts.

        Raises:
            AdapterFileError: the file cannot be read.
            NonFiniteWeightError: a weight is NaN, infinite, or infinite once it is scaled and stored.
        """
        groups: dict[tuple[torch.device, torch.dtype], dict[str, StackedLayer]] = {}
        for name, layer in layers.items():
            stack = layer.lora_a
            groups.setdefault((stack.device, stack.dtype), {})[name] = layer
        taken: dict[tuple[torch.device, torch.dtype], _Block] = {}
        ready: dict[torch.device, list[tuple[list[Tensor], _Block]]] = {}
        extras: dict[torch.device, list[_Extra | _Pages]] = {device: [] for device, _ in groups}
        try:
            # A tensor made in inference mode could not be changed outside of it.
            with torch.inference_mode(False), torch.no_grad():
                for (device, dtype), members in groups.items():
                    fill = (
                        _fill_on_cuda if device.type == "cuda" and not checkpoint.file.in_memory else _fill_one_by_one
                    )
                    if device.type == "cuda" and checkpoint.file.in_memory:
                        side_stream(device).wait_stream(torch.cuda.current_stream(device))
                    run = with_few_cores if device.type == "cpu" else _here
                    stacks = [stack for layer in members.values() for stack in (layer.lora_a, layer.lora_b)]
                    with torch.cuda.stream(side_stream(device)) if device.type == "cuda" else nullcontext():
                        with self._lock:
                            block = self._idle.pop((device, dtype), None)
                        if block is None or not block.is_for(stacks):
                            block = _Block(stacks, device, dtype)
                        taken[device, dtype] = block
                        run(fill, block, checkpoint, members)
                        run(_check, checkpoint, members, block.flat)
                        for name, layer in members.items():
                            if not layer.lora_extras:
                                continue
                            extras[device] += run(_extras_of, checkpoint, name, layer)
                    ready.setdefault(device, []).append((stacks, block))
                for name, mixture in mixtures.items():
                    extras.setdefault(mixture.lora_pages.device, []).append(_pages_of(checkpoint, name, mixture))
        except BaseException:
            # Whatever it was made under, or holds, is not for the next load.
            self._keep({}, groups)
            raise
        try:
            yield Staged(ready, extras, checkpoint)
        finally:
            self._keep(taken, groups)

    def _keep(
        self, blocks: Mapping[tuple[torch.device, torch.dtype], _Block], wanted: Container[tuple[Any, Any]]
    ) -> None:
        """Keep these for the next load: of two loads at once the last one's, and none for where a model was before."""
        with self._lock:
            self._idle = {key: block for key, block in self._idle.items() if key in wanted} | dict(blocks)


def _fill_one_by_one(block: _Block, checkpoint: Checkpoint, layers: Mapping[str, StackedLayer]) -> None:
    pairs = {name: checkpoint.pairs[name] for name in layers if name in checkpoint.pairs}
    places = block.places(pairs, layers)
    for pair, place_a, place_b in zip(pairs.values(), places[::2], places[1::2], strict=True):
        place_a.copy_(checkpoint.tensor(pair.key_a, pair.shape_a))
        b = checkpoint.tensor(pair.key_b, pair.shape_b)
        # Rounded once, whatever the file's dtype.
        place_b.copy_(b if pair.scaling == 1 else b.to(torch.float32).mul(_factor(pair.scaling)))


def _fill_on_cuda(block: _Block, checkpoint: Checkpoint, layers: Mapping[str, StackedLayer]) -> None:
    pairs = {name: checkpoint.pairs[name] for name in layers if name in checkpoint.pairs}
    runs = runs_of(checkpoint.file, [key for pair in pairs.values() for key in (pair.key_a, pair.key_b)])
    read = upload(checkpoint.file, runs, block.flat.device)
    values: dict[str, Tensor] = {}
    for run in runs:
        flat = read[run.at : run.at + run.size].view(DTYPES[run.dtype])
        # What is multiplied must not be rounded before it is.
        flat = flat if flat.dtype in (block.flat.dtype, torch.float32) else flat.to(torch.float32)
        values |= zip(run.keys, flat.split(run.sizes), strict=True)
    sources: list[Tensor] = []
    for pair in pairs.values():
        sources += values[pair.key_a].view(pair.shape_a), values[pair.key_b].view(pair.shape_b)
    if any(pair.scaling != 1 for pair in pairs.values()):
        multiply_each(sources[1::2], [_factor(pair.scaling) for pair in pairs.values()])
    if sources:
        copy_each(block.places(pairs, layers), sources)


def _factor(scaling: float) -> float:
    """What to multiply by in float32; what float32 cannot hold is infinite there."""
    return scaling if abs(scaling) <= _LARGEST_FLOAT32 else math.copysign(math.inf, scaling)


def _check(checkpoint: Checkpoint, layers: Mapping[str, StackedLayer], flat: Tensor) -> None:
    if are_finite(flat):
        return
    # Which one it is, and why, is found by reading one after another.
    for name in checkpoint.pairs:
        if name in layers:
            checkpoint.read(name, flat.dtype)
    path = str(checkpoint.file.path)
    raise AdapterFileError(path, "a file that stays the same", "one that changed while it was read", "Load it again.")
