"""The bank: slots for adapters, their names, and which row of the batch uses which."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import Site, read_checkpoint
from xpu_lora_compile.adapters.config import read_config
from xpu_lora_compile.adapters.names import BaseModel, plain_name
from xpu_lora_compile.adapters.needs import folder_path
from xpu_lora_compile.errors import (
    AdapterError,
    BankInUseError,
    BatchError,
    DuplicateAdapterError,
    NoFreeSlotError,
    UnknownAdapterError,
)

NO_ADAPTER = -1


class Routing:
    """The slot of each sequence in the batch; all layers of a model share one.

    Attributes:
        slots: `[batch]`, int64, `NO_ADAPTER` for the base model; None outside a `bank.use` block.
        ranks: `[K]`, int32: the highest rank of each slot's adapter, 0 where it is empty; None on a CPU, whose kernel
            asks for none.
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self.ranks: Tensor | None = None

    def rows_of(self, inputs: Tensor, features: int) -> Tensor | None:
        """The slot of each row of a layer's inputs, `[batch, ..., *features]` flattened but for the features.

        Raises:
            BatchError: the batch has another size than `bank.use` was told, or the model has been moved since.
        """
        if self.slots is None:
            return None
        if inputs.shape[0] != self.slots.shape[0]:
            raise BatchError(
                "bank.use",
                "one name a sequence of the batch",
                f"{self.slots.shape[0]} names for a batch of {inputs.shape[0]}",
                "Name an adapter, or None, for every sequence; with beams or several samples repeat the name.",
            )
        if inputs.device != self.slots.device:
            raise BatchError(
                "bank.use",
                f"a batch on {self.slots.device}, where the model was when the block was entered",
                f"one on {inputs.device}",
                "Move the model before the block.",
            )
        repeats = math.prod(inputs.shape[1 : inputs.dim() - features])
        return self.slots.unsqueeze(1).expand(-1, repeats).reshape(-1)


class Layer(Protocol):
    """What a layer that carries LoRA offers to its bank."""

    lora_site: Site
    lora_a: Tensor
    lora_b: Tensor

    def store(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Copy one adapter's weights into an empty slot."""

    def restore(self) -> None:
        """Become again the module it was before LoRA."""


class Block:
    """One `use` block that is open: the names for the batch."""

    def __init__(self, names: list[str | None]) -> None:
        self.names = names


class AdapterBank:
    """The adapters of one model: loaded, dropped and put to use while it serves, without recompiling.

    Made by `xpu_lora_compile.attach`. A call that fails leaves the bank as it was. Adapters may be loaded and dropped
    by one thread while another is inside a `use` block.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        routing: Routing,
        slots: int,
        max_rank: int,
    ) -> None:
        self._model = model
        self._layers = dict(layers)
        self._routing = routing
        self._slots: list[str | None] = [None] * slots
        self._ranks = [0] * slots
        # How many modules the adapter of each slot has LoRA on; of no meaning where the slot is empty.
        self._modules = [0] * slots
        self._max_rank = max_rank
        # One tensor for each size of batch, so that its address stays the same for captured graphs.
        self._batches: dict[tuple[int, torch.device], Tensor] = {}
        self._blocks: list[Block] = []
        # The innermost block of this thread or asyncio task; others start without one.
        self._mine: ContextVar[Block | None] = ContextVar("mine", default=None)
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        held = ", ".join(self.names) or "empty"
        slots = f"{len(self.names)} of {len(self._slots)} slots taken"
        size = f"max_rank={self._max_rank}, {len(self._layers)} modules, {self._memory()}"
        lines = [f"AdapterBank({held}; {slots}, {size})"]
        width = max(map(len, self.names), default=0)
        for name, rank, modules in zip(self._slots, self._ranks, self._modules, strict=True):
            if name is not None:
                lines.append(f"  {name:{width}}  rank {rank} on {modules} modules")
        return "\n".join(lines)

    def _memory(self) -> str:
        """Memory of the stacks, which all slots take from the start."""
        size = sum(stack.nbytes for layer in self._layers.values() for stack in (layer.lora_a, layer.lora_b))
        return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the bank, in the order of their slots."""
        return tuple(name for name in self._slots if name is not None)

    @property
    def sites(self) -> dict[str, Site]:
        """The modules that carry LoRA, by name, with the sizes that an adapter must fit."""
        return {name: layer.lora_site for name, layer in self._layers.items()}

    def load(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Put the adapter of a PEFT folder into a free slot.

        Args:
            name: how `use` and `drop` will call it.
            folder: with `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            AdapterError: the name is taken or no slot is free, or the adapter does not fit; the subclass says which.
        """
        path = folder_path(name, folder)
        with self._lock:
            self._free_slot(name)
        # Everything that can be wrong is found while reading, when nobody waits for the lock.
        dtypes = {layer.lora_a.dtype for layer in self._layers.values()}
        weights = read_checkpoint(
            path,
            read_config(path),
            self.sites,
            BaseModel.of(self._model),
            self._max_rank,
            min(dtypes, key=lambda dtype: torch.finfo(dtype).max),
        )
        with self._lock:
            # Another thread may have been faster.
            slot = self._free_slot(name)
            # First, since an earlier load may have been interrupted half-way.
            self._clear(slot)
            with torch.no_grad():
                for site, pair in weights.items():
                    self._layers[site].store(slot, pair.a, pair.b)
            self._slots[slot] = name
            self._modules[slot] = len(weights)
            self._set_rank(slot, max((pair.a.shape[0] for pair in weights.values()), default=0))

    def drop(self, name: str) -> None:
        """Empty the slot of an adapter.

        Raises:
            UnknownAdapterError: the bank has no such adapter.
            BankInUseError: a `use` block that is open names it.
        """
        with self._lock:
            slot = self._slot_of(name)
            if any(name in block.names for block in self._blocks):
                raise BankInUseError(
                    f"drop {name!r}", "an adapter that is not in use", "one that is", "Drop it after the `use` block."
                )
            self._clear(slot)
            self._slots[slot] = None

    @contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """Have each sequence of the batch answered by its own adapter while the block is open.

        The model belongs to the block: run it from this thread or asyncio task alone, and run a backward pass before
        the block ends. Blocks may be nested; the inner one counts.

        Args:
            names: for each sequence of the batch (the first dimension of the model's inputs) an adapter's name, or
                None for the base model.

        Raises:
            UnknownAdapterError: the bank has no adapter of a name.
            BankInUseError: another thread or task is inside a `use` block.
            BatchError: no list, or an empty one. The model raises it too, where the batch has another size, or is on
                another device than the model was.
        """
        block = self._open(names)
        token = self._mine.set(block)
        try:
            yield
        finally:
            with self._lock:
                self._blocks.remove(block)
                self._route(self._blocks[-1].names if self._blocks else None)
            # A generator may be closed in another context than the one it was started in.
            with suppress(ValueError):
                self._mine.reset(token)

    def detach(self) -> None:
        """Take LoRA out of the model, which is then as it was before `attach`; the bank is empty afterwards.

        Raises:
            BankInUseError: a `use` block is open.
            AdapterError: a module has been replaced, or its forward hooked, since `attach`.
        """
        with self._lock:
            if self._blocks:
                raise BankInUseError("detach", "a bank that is not in use", "a `use` block", "Leave the block first.")
            self._check_modules()
            for layer in self._layers.values():
                layer.restore()
            self._layers.clear()
            self._slots = [None] * len(self._slots)
            self._ranks = [0] * len(self._slots)
            self._routing.ranks = None

    def _open(self, names: Sequence[str | None]) -> Block:
        with self._lock:
            self._check_attached()
            if not isinstance(names, list | tuple) or not names:
                raise BatchError(
                    "use", "a list with a name, or None, for each sequence", repr(names), "Write `use(['pirate'])`."
                )
            if self._blocks and self._blocks[-1] is not self._mine.get():
                raise BankInUseError(
                    "use",
                    "a bank that nobody else uses",
                    "a `use` block of another thread or task",
                    "Wait for its end.",
                )
            block = Block(list(names))
            self._route(block.names)
            self._blocks.append(block)
            return block

    def _route(self, names: list[str | None] | None) -> None:
        """Point the layers at the slots of these names; None outside all blocks."""
        if names is None:
            self._routing.slots = None
            return
        wanted = [NO_ADAPTER if name is None else self._slot_of(name) for name in names]
        device = next(iter(self._layers.values())).lora_a.device
        # A tensor made in inference mode could not be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            slots = torch.tensor(wanted, device="cpu")
            batch = self._batches.get((len(names), device))
            if batch is None:
                batch = torch.empty_like(slots, device=device)
            # CUDA has read them by the time that it returns, and does not wait for what it was given before.
            batch.copy_(slots, non_blocking=device.type == "cuda")
        if type(batch) is not Tensor:
            raise AdapterError(
                "use", "real tensors", type(batch).__name__, "Enter the block outside of torch.export and fake modes."
            )
        self._batches[len(names), device] = self._routing.slots = batch
        if device.type == "cpu":
            self._routing.ranks = None
        elif self._routing.ranks is None or self._routing.ranks.device != device:
            with torch.inference_mode(False):
                self._routing.ranks = torch.tensor(self._ranks, dtype=torch.int32, device=device)

    def _set_rank(self, slot: int, rank: int) -> None:
        self._ranks[slot] = rank
        if self._routing.ranks is not None:
            # In place, where captured graphs read it.
            with torch.no_grad():
                self._routing.ranks[slot].fill_(rank)

    def _clear(self, slot: int) -> None:
        with torch.no_grad():
            for layer in self._layers.values():
                layer.lora_a[slot].zero_()
                layer.lora_b[slot].zero_()
        self._set_rank(slot, 0)

    def _free_slot(self, name: str) -> int:
        """The slot that an adapter of this name would take."""
        self._check_modules()
        if not isinstance(name, str) or not name:
            raise AdapterError("load", "a name for the adapter", repr(name), "Pass a string that is not empty.")
        if name in self._slots:
            raise DuplicateAdapterError(
                f"load {name!r}", "a name that is free", "one in the bank", "Drop it first, or choose another."
            )
        if None not in self._slots:
            raise NoFreeSlotError(
                f"load {name!r}",
                "a free slot",
                f"{len(self._slots)} slots, all taken by {', '.join(self.names)}",
                "Drop an adapter, or attach with more slots.",
            )
        return self._slots.index(None)

    def _slot_of(self, name: str) -> int:
        if name not in self._slots or name is None:
            raise UnknownAdapterError(
                f"adapter {name!r}",
                f"one of {', '.join(self.names) or 'none: the bank is empty'}",
                repr(name),
                "Load it first: bank.load(name, folder).",
            )
        return self._slots.index(name)

    def _check_attached(self) -> None:
        if not self._layers:
            raise AdapterError("bank", "a model it is attached to", "a bank that was detached", "Call xlc.attach().")

    def _check_modules(self) -> None:
        self._check_attached()
        present = {plain_name(name): module for name, module in self._model.named_modules()}
        for name, layer in self._layers.items():
            if present.get(name) is not layer or "forward" in vars(layer):
                raise AdapterError(
                    f"bank: {name}",
                    "the module that LoRA was attached to",
                    "another one, or one whose forward was replaced since",
                    "Change the model first, and then attach.",
                )
            if layer.lora_a.is_meta:
                raise AdapterError(f"bank: {name}", "weights that have memory", "meta tensors", "Load the model first.")
