"""The bank: slots for adapters, their names, and which row of the batch uses which."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import Site, read_checkpoint
from xpu_lora_compile.adapters.config import read_config
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
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None

    def rows_of(self, inputs: Tensor, features: int) -> Tensor | None:
        """The slot of each row of a layer's inputs, `[batch, ..., *features]` flattened but for the features.

        Raises:
            BatchError: the batch has another size than `bank.use` was told.
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
        repeats = math.prod(inputs.shape[1 : inputs.dim() - features])
        return self.slots[:, None].expand(-1, repeats).reshape(-1)


class Layer(Protocol):
    """What a layer that carries LoRA offers to its bank."""

    site: Site
    lora_a: Tensor
    lora_b: Tensor

    def store(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Copy one adapter's weights into an empty slot."""

    def restore(self) -> None:
        """Become again the module it was before LoRA."""


class AdapterBank:
    """The adapters of one model: loaded, dropped and put to use while it serves, without recompiling.

    Made by `xpu_lora_compile.attach`. A call that fails leaves the bank as it was. Adapters may be loaded and dropped
    by one thread while another is inside a `use` block; only one thread at a time can be.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        embeddings: Mapping[str, nn.Embedding | nn.Linear],
        routing: Routing,
        slots: int,
        max_rank: int,
    ) -> None:
        self._layers = dict(layers)
        # The model's input and output embeddings: PEFT saves copies of them beside an adapter.
        self._embeddings = dict(embeddings)
        self._routing = routing
        self._slots: list[str | None] = [None] * slots
        self._max_rank = max_rank
        # One tensor for each size of batch, so that its address stays the same for captured graphs.
        self._batches: dict[tuple[int, torch.device], Tensor] = {}
        self._in_use: list[Sequence[str | None]] = []
        self._user: int | None = None
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the bank, in the order of their slots."""
        return tuple(name for name in self._slots if name is not None)

    @property
    def sites(self) -> dict[str, Site]:
        """The modules that carry LoRA, by name, with the sizes that an adapter must fit."""
        return {name: layer.site for name, layer in self._layers.items()}

    def load(self, name: str, folder: str | Path) -> None:
        """Put the adapter of a PEFT folder into a free slot.

        Args:
            name: how `use` and `drop` will call it.
            folder: with `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            AdapterError: the name is taken or no slot is free, or the adapter does not fit; the subclass says which.
        """
        with self._lock:
            self._check_attached()
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
            slot = self._slots.index(None)
            # Everything that can be wrong is found while reading; only then is the slot written.
            stored_in = {layer.lora_a.dtype for layer in self._layers.values()}
            weights = read_checkpoint(
                Path(folder),
                read_config(Path(folder)),
                self.sites,
                {path: embedding.weight for path, embedding in self._embeddings.items()},
                self._max_rank,
                min(stored_in, key=lambda dtype: torch.finfo(dtype).max),
            )
            with torch.no_grad():
                for site, pair in weights.items():
                    self._layers[site].store(slot, pair.a, pair.b)
            self._slots[slot] = name

    def drop(self, name: str) -> None:
        """Empty the slot of an adapter.

        Raises:
            UnknownAdapterError: the bank has no such adapter.
            BankInUseError: a `use` block that is running names it.
        """
        with self._lock:
            slot = self._slot_of(name)
            if any(name in names for names in self._in_use):
                raise BankInUseError(
                    f"drop {name!r}", "an adapter that is not in use", "one that is", "Drop it after the `use` block."
                )
            with torch.no_grad():
                for layer in self._layers.values():
                    layer.lora_a[slot].zero_()
                    layer.lora_b[slot].zero_()
            self._slots[slot] = None

    @contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """Have each sequence of the batch answered by its own adapter while the block runs.

        Args:
            names: for each sequence of the batch (the first dimension of the model's inputs) an adapter's name, or
                None for the base model.

        Raises:
            UnknownAdapterError: the bank has no adapter of a name.
            BankInUseError: another thread is inside a `use` block.
            BatchError: no names; and, when the model runs, as many names as there are sequences are wanted.
        """
        with self._lock:
            self._check_attached()
            if isinstance(names, str) or not names:
                raise BatchError(
                    "use", "a list with a name, or None, for each sequence", repr(names), "Write `use(['pirate'])`."
                )
            if self._user not in (None, threading.get_ident()):
                raise BankInUseError(
                    "use", "a bank that no other thread uses", "a `use` block in another thread", "Wait for its end."
                )
            names = list(names)
            for name in names:
                if name is not None:
                    self._slot_of(name)
            self._in_use.append(names)
            self._user = threading.get_ident()
            self._route()
        try:
            yield
        finally:
            with self._lock:
                self._in_use.pop()
                self._route()
                if not self._in_use:
                    self._user = None

    def detach(self) -> None:
        """Take LoRA out of the model, which is then as it was before `attach`; the bank is empty afterwards."""
        with self._lock:
            if self._in_use:
                raise BankInUseError("detach", "a bank that is not in use", "a `use` block", "Leave the block first.")
            for layer in self._layers.values():
                layer.restore()
            self._layers.clear()
            self._slots = [None] * len(self._slots)

    def _route(self) -> None:
        """Point the layers at the slots of the innermost `use` block."""
        if not self._in_use:
            self._routing.slots = None
            return
        names = self._in_use[-1]
        device = next(iter(self._layers.values())).lora_a.device
        # A tensor made in inference mode could not be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            slots = torch.tensor([NO_ADAPTER if name is None else self._slot_of(name) for name in names])
            batch = self._batches.setdefault((len(names), device), slots.to(device))
            batch.copy_(slots)
        self._routing.slots = batch

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
