"""The bank: slots for adapters, their names, and which row of the batch uses which."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from types import MethodType
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import ModuleSizes, opened_checkpoint
from xpu_lora_compile.adapters.config import is_targeted, read_config
from xpu_lora_compile.adapters.files import few, shown
from xpu_lora_compile.adapters.names import BaseModel, Host, plain_name
from xpu_lora_compile.adapters.needs import folder_path
from xpu_lora_compile.adapters.staging import PagedLayer, StackedLayer, Staged, Staging, clear, short_turns
from xpu_lora_compile.adapters.training import (
    Loaded,
    TrainableLayer,
    Training,
    fresh_tensors,
    save_adapter,
    shortest_rule,
    write_folder,
)
from xpu_lora_compile.errors import (
    AdapterError,
    BankInUseError,
    BatchError,
    DuplicateAdapterError,
    NoFreeSlotError,
    UnknownAdapterError,
    UnreachedLayerError,
    UnsupportedAdapterError,
    counted,
)
from xpu_lora_compile.kernels import reads_ranks
from xpu_lora_compile.rows.routing import BatchRouting, Entry
from xpu_lora_compile.terminal import wrapped
from xpu_lora_compile.torch_internals import is_capturing

NO_ADAPTER = -1
# More tokens than a call has.
ALL_TOKENS = 2**62
_LARGEST_WEIGHT = torch.finfo(torch.float32).max

# Adapters of one row, each with its weight: a number, or a tensor of one. As `use` has checked it.
Mix: TypeAlias = tuple[tuple[str, float | Tensor], ...]
# What `use` takes for a sequence.
Name: TypeAlias = str | Mapping[str, float | Tensor] | None


class Layer(Protocol):
    """What a layer that carries LoRA offers to its bank: it is a `StackedLayer`, or a `PagedLayer`."""

    lora_name: str
    lora_routing: Any
    # Every module has them.
    _buffers: dict[str, Tensor | None]

    @property
    def lora_stacks(self) -> Mapping[str, Tensor]:
        """All memory for adapters, by the name of the buffer."""

    def restore(self) -> None:
        """Become again the module it was before LoRA."""


@dataclass(frozen=True)
class Rows:
    """An adapter's name, or None, for each sequence, and how many tokens each has where they lie packed in one row.

    Where a row may have several adapters, in the place of a name there may be a `Mix`.
    """

    names: tuple[str | Mix | None, ...]
    lengths: tuple[int, ...] | None = None


class Block:
    """One `use` block that is open: the rows of the model, under the name "", and of its parts."""

    def __init__(self, rows: dict[str, Rows], adapters_per_row: int = 1) -> None:
        self.rows = rows
        self.adapters_per_row = adapters_per_row
        # With several, slots are numbers of these, for each part: slots with weights.
        self.mixes: dict[str, list[tuple[tuple[int, Any], ...]]] = {}
        # As `slots_of`, where `generate` has more sequences than the block has names.
        self.times = self.first_times = 1
        self._slots: dict[str, list[int]] = {}
        # Of each sequence: how many of its last tokens its adapter counts for. None where no adapter of the bank ever
        # had invocation tokens.
        self.counts: tuple[int, ...] = ()
        # The same of each row, on the device; None of a packed batch, too, which has no such adapters.
        self.active_tokens: Tensor | None = None
        # The prompts, where some adapter does not change all of their tokens, and how many tokens they have.
        self.prompts: Tensor | None = None
        self.prompt: int | None = None
        # Names of layers.
        self.called: set[str] = set()
        self.read: set[str] = set()

    @property
    def parts(self) -> tuple[str, ...]:
        """The model, "", and the parts of it that have names of their own."""
        return tuple(sorted(self.rows))

    @cached_property
    def names(self) -> set[str | None]:
        """All adapters that the block uses."""
        given = [name for rows in self.rows.values() for name in rows.names]
        return {name for entry in given for name in ([n for n, _ in entry] if isinstance(entry, tuple) else [entry])}

    def resolve(self, slot_of: Callable[[str], int]) -> None:
        """Find the slots of all names."""
        for part, rows in self.rows.items():
            if self.adapters_per_row == 1:
                self._slots[part] = [NO_ADAPTER if name is None else slot_of(cast("str", name)) for name in rows.names]
                continue
            numbers: dict[Any, int] = {}
            self._slots[part] = []
            for entry in rows.names:
                pairs: Any = entry if isinstance(entry, tuple) or entry is None else ((entry, 1.0),)
                # By slot, so that a sum does not depend on the order of the names.
                mix = pairs and tuple(sorted(((slot_of(name), weight) for name, weight in pairs), key=itemgetter(0)))
                self._slots[part].append(numbers.setdefault(mix, len(numbers)) if mix else NO_ADAPTER)
            self.mixes[part] = list(numbers)

    def slots_of(self, part: str) -> list[int]:
        """The slot of each sequence; the number of its mix where it may have several adapters."""
        slots = self._slots[part]
        return [slot for slot in slots for _ in range(self.times)] if part == "" else slots

    def slots_of_tokens(self, part: str) -> list[int]:
        """The slot of each sequence; of a packed batch, of each token."""
        lengths = self.rows[part].lengths
        slots = self.slots_of(part)
        return slots if lengths is None else [s for s, n in zip(slots, lengths, strict=True) for _ in range(n)]


class AdapterBank:
    """The adapters of one model: loaded, dropped and put to use while it serves, without recompiling.

    Made by `xpu_lora_compile.attach`. A call that fails leaves the bank as it was. Adapters may be loaded and dropped
    by threads while another is inside a `use` block: a name is there when all of its adapter is. On CUDA a slot changes
    only after the work that `use` blocks have left on the streams on which they ended: `load` waits for that, and the
    block does not wait for `load`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        routing: BatchRouting,
        slots: int,
        max_rank: int,
        hosts: Sequence[Host],
        undo: list[Callable[[], None]] | None = None,
        adapters_per_row: int = 1,
    ) -> None:
        self._model = model
        self._adapters_per_row = routing.adapters_per_row = adapters_per_row
        self._layers = dict(layers)
        # Of the model, under the name "", and of the parts that a block has named.
        self._routings = {"": routing}
        self._hosts = hosts
        self._undo = [] if undo is None else undo
        self._edges = _edges(model, self._layers)
        # Of modules that something had given one when LoRA was attached, and that calls the forward of the class.
        self._forwards = {name: vars(layer).get("forward") for name, layer in self._layers.items()}
        self._slots: list[str | None] = [None] * slots
        self._ranks = [0] * slots
        # How many modules the adapter of each slot has LoRA on; of no meaning where the slot is empty.
        self._counts = [0] * slots
        # Tokens from whose last occurrence on the adapter of each slot counts; none where it counts for all.
        self._invocations: list[tuple[int, ...]] = [()] * slots
        self._max_rank = max_rank
        self._staging = Staging()
        self._loaded: dict[str, Loaded] = {}
        self._training = Training(cast("Mapping[str, TrainableLayer]", self._stacked))
        # Slots that are being filled, and the name that each will have.
        self._filling: dict[int, str] = {}
        # Those of the layers, when an adapter was last loaded.
        self._devices: set[torch.device] = set()
        # On CUDA, for each stream that read the stacks: the end of what blocks have left on it.
        self._readers: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        # One tensor for each size of batch, so that its address stays the same for captured graphs.
        self._batches: dict[tuple[str, int, torch.device], Tensor] = {}
        # Likewise, where rows may have several adapters: slots and weights of mixes.
        self._mixes: dict[tuple[str, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._blocks: list[Block] = []
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        held = ", ".join(self.names) or "empty"
        slots = f"{len(self.names)} of {len(self._slots)} slots taken"
        several = f"adapters_per_row={self._adapters_per_row}, " if self._adapters_per_row > 1 else ""
        size = f"max_rank={self._max_rank}, {several}{counted(len(self.sites), 'module')}, {self._memory()}"
        lines = [wrapped(f"AdapterBank({held}; {slots}, {size})", indent=4, width=80)]
        width = max(map(len, self.names), default=0)
        for name, rank, modules in zip(self._slots, self._ranks, self._counts, strict=True):
            if name is not None:
                lines.append(f"  {name:{width}}  rank {rank} on {counted(modules, 'module')}")
        return "\n".join(lines)

    def _memory(self) -> str:
        """Memory of the stacks, which all slots take from the start."""
        size = sum(stack.nbytes for layer in self._layers.values() for stack in layer.lora_stacks.values())
        text = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
        if not self._mixtures:
            return text
        pages = [(int((layer.lora_pages >= 0).sum()), layer.page_count) for layer in self._mixtures.values()]
        taken, count = map(sum, zip(*pages, strict=True))
        return f"{text}, {taken} of {count} pages of experts taken"

    @property
    def _mixtures(self) -> dict[str, PagedLayer]:
        """The mixtures of experts, by plain name."""
        return {
            plain_name(name): cast("PagedLayer", layer)
            for name, layer in self._layers.items()
            if hasattr(layer, "lora_pages")
        }

    @property
    def _stacked(self) -> dict[str, StackedLayer]:
        """All other layers, by plain name."""
        return {
            plain_name(name): cast("StackedLayer", layer)
            for name, layer in self._layers.items()
            if not hasattr(layer, "lora_pages")
        }

    @property
    def _routing(self) -> BatchRouting:
        return self._routings[""]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the bank, in the order of their slots."""
        return tuple(name for name in self._slots if name is not None)

    @property
    def sites(self) -> dict[str, ModuleSizes]:
        """The modules that carry LoRA, by name without wrappers, with the sizes that an adapter must fit.

        Of experts it is their parameters that carry it.
        """
        sites: dict[str, ModuleSizes] = {}
        for name, layer in self._layers.items():
            name = plain_name(name)
            if parameters := getattr(layer, "lora_parameters", {}):
                sites |= {f"{name}.{parameter}": site for parameter, site in parameters.items()}
            else:
                sites[name] = cast("StackedLayer", layer).lora_site
        return sites

    def load(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Put the adapter of a PEFT folder into a free slot.

        Args:
            name: how `use` and `drop` will call it.
            folder: with `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            AdapterError: the name is taken or no slot is free, or the adapter does not fit; the subclass says which.
        """
        path = folder_path(name, folder)
        # The lock is held for moments: a thread that opens a block would wait for it.
        with short_turns():
            with self._lock:
                self._free_slot(name)
                layers, mixtures = self._stacked, self._mixtures
                self._devices = {device_of(layer) for layer in self._layers.values()}
            # Everything that can be wrong is found here, before anything changes.
            base = BaseModel.of(self._model, self._hosts)
            config = read_config(path)
            if config.alora_invocation_tokens and self._adapters_per_row > 1:
                got, remedy = "alora_invocation_tokens", "Attach without adapters_per_row."
                wanted = "adapters for all tokens, where a row may have several"
                raise UnsupportedAdapterError(str(path), wanted, got, remedy)
            with (
                opened_checkpoint(path, config, self.sites, base, self._max_rank) as checkpoint,
                self._staging.staged(checkpoint, layers, mixtures) as staged,
            ):
                self._store(name, staged, Loaded.of(path, checkpoint), config.alora_invocation_tokens)

    def add(
        self,
        name: str,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        target_modules: str | Collection[str] | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        """Put a new adapter into a free slot, which changes nothing until it is trained: A is random, and B zeros.

        Args:
            name: how `use`, `trainable` and `drop` will call it.
            r: its rank. This and the next four are PEFT's names.
            lora_alpha: its strength: what A and B make is multiplied by `lora_alpha / r`.
            target_modules: which modules of the bank, by PEFT's rules; by default all linear ones, but for the output
                embedding.
            lora_dropout: how much of what comes to A is dropped while the model is in training mode.
            use_rslora: multiply by `lora_alpha / sqrt(r)`.

        Raises:
            AdapterError: as `load`; or no module of the bank matches.
        """
        rule = "all-linear" if target_modules is None else target_modules
        sites = self.sites
        chosen = [module for module, site in sites.items() if is_targeted(module, rule, plain_linear=site.is_plain)]
        if not chosen or any(sites[module].kind != "linear" or sites[module].kernel for module in chosen):
            got = f"{target_modules!r}, which matches {few(chosen) if chosen else 'none of them'}"
            wanted = f"names of linear modules of the bank, such as {few(list(sites))}"
            remedy = "Pass some of these names, or attach with more target_modules."
            raise AdapterError(f"add {name!r}: target_modules", wanted, got, remedy)
        if not 0 < r <= self._max_rank:
            remedy = "Pass another r, or attach with a higher max_rank."
            raise AdapterError(f"add {name!r}: r", f"1 to {self._max_rank}, the bank's max_rank", str(r), remedy)
        others = (plain_name(other) for other, _ in self._model.named_modules())
        values = {
            "peft_type": "LORA",
            "base_model_name_or_path": getattr(self._model, "name_or_path", "") or None,
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "target_modules": shortest_rule(chosen, (other for other in others if other not in chosen)),
        }
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), values, fresh_tensors(dict.fromkeys(chosen, r), sites))
            self.load(name, folder)

    def save(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write an adapter as PEFT does, with `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            name: of the adapter.
            folder: made if it is not there.

        Raises:
            UnknownAdapterError: the bank has no such adapter.
            UnsupportedAdapterError: it has more than A and B, such as DoRA or biases.
        """
        with self._lock:
            slot = self._slot_of(name)
            self._training.check()
            layers = cast("Mapping[str, TrainableLayer]", self._stacked)
            is_scaled = not self._training.is_trained(name)
            save_adapter(Path(folder), self._loaded_as(name), slot, layers, is_scaled=is_scaled)

    def trainable(self, names: Sequence[str]) -> None:
        """Train these adapters, and no others: `parameters` has what an optimizer takes.

        The parameters of an adapter that is trained already stay the same. The base model's are left as they are: call
        `model.requires_grad_(False)` if these are not to be trained, too. The graphs of a compiled model depend on
        how many adapters are trained in each module.

        Args:
            names: of adapters in the bank, of A and B of linear layers alone; none to end all training.

        Raises:
            UnknownAdapterError: the bank has no adapter of a name.
            UnsupportedAdapterError: an adapter has more than A and B of linear layers, such as DoRA or LoRA on
                embeddings, or is one of a PeftModel; or the bank has several adapters for a row.
            AdapterError: no list of names; or a module has been replaced, or its forward hooked, since `attach`.
            BankInUseError: a `use` block is open.
        """
        if isinstance(names, str):
            raise AdapterError("trainable", "a list of names", repr(names), f"Write trainable([{names!r}]).")
        if names and self._adapters_per_row > 1:
            got, remedy = f"adapters_per_row={self._adapters_per_row}", "Attach without adapters_per_row to train."
            raise UnsupportedAdapterError("trainable", "a bank with one adapter for a row", got, remedy)
        with self._lock:
            self._check_modules()
            if self._blocks:
                raise BankInUseError(
                    "trainable", "a bank that is not in use", "a `use` block", "Leave the block first."
                )
            slots = {name: self._slot_of(name) for name in names}
            for name in slots:
                self._training.check_can_be_trained(name, self._loaded_as(name))
            self._training.drop_stale()
            for name in self._training.names:
                if name not in slots:
                    self._training.stop(name)
            for name, slot in slots.items():
                if not self._training.is_trained(name):
                    self._training.start(name, slot, self._loaded[name])

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of an adapter that is trained: A and B of each module, as PEFT has them.

        Each is a view of the adapter's slot. An optimizer of its own for each adapter gives each its own learning rate
        and state; `clip_grad_norm_` clips each alone. An adapter that no row of a `use` block names gets no gradient
        there: its `grad` stays as it was.

        Raises:
            AdapterError: the adapter is not trained.
        """
        return list(self._training.parameters_of(name).values())

    def named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return the same, by PEFT's names, such as `base_model.model.….q_proj.lora_A.weight`."""
        return dict(self._training.parameters_of(name))

    def _loaded_as(self, name: str) -> Loaded:
        """What was in the folder of an adapter."""
        if name not in self._loaded:
            remedy = "Train and save it with PEFT: peft_model.save_pretrained(folder)."
            raise UnsupportedAdapterError(
                f"adapter {name!r}", "one that this bank has loaded", "one of a PeftModel", remedy
            )
        return self._loaded[name]

    def _store(self, name: str, staged: Staged, loaded: Loaded | None, invocation: tuple[int, ...] = ()) -> None:
        """Fill a free slot, and give it its name once all is there; `loaded` is None for an adapter of a PeftModel."""
        slot = None
        try:
            with self._lock:
                # Another thread may have been faster.
                slot = self._free_slot(name)
                self._filling[slot] = name
                self._ranks[slot] = staged.rank
                ranks, readers = self._routing.ranks, list(self._readers.values())
            staged.store(slot, ranks, readers)
            with self._lock:
                self._check_attached()
                self._slots[slot], self._counts[slot], self._invocations[slot] = name, staged.modules, invocation
                self._routing.activates |= bool(invocation)
                if loaded is not None:
                    self._loaded[name] = loaded
        except BaseException:
            if slot is not None:
                with self._lock:
                    self._clear(slot)
                    self._note_readers()
            raise
        finally:
            with self._lock:
                self._filling.pop(-1 if slot is None else slot, None)

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
            # What blocks have left on other streams may still read the slot.
            for stream, event in self._readers.items():
                torch.cuda.current_stream(stream.device).wait_event(event)
            if self._training.is_trained(name):
                self._training.stop(name)
            self._loaded.pop(name, None)
            self._clear(slot)
            self._note_readers()
            self._slots[slot], self._invocations[slot] = None, ()

    @contextmanager
    def use(
        self,
        names: Sequence[Name],
        *,
        lengths: Sequence[int] | None = None,
        parts: Mapping[str, Sequence[Name] | tuple[Sequence[Name], Sequence[int]]] | None = None,
        input_ids: Tensor | None = None,
    ) -> Iterator[None]:
        """Have each sequence of the batch answered by its own adapter while the block is open.

        The model belongs to the block: run it from this thread or asyncio task alone, and run a backward pass before
        the block ends. Blocks may be nested; the inner one counts. The first call with inputs of a new kind is followed
        op by op, to know how the rows of each layer come from the sequences; `generate` may make of each sequence
        several, as beams or samples.

        Args:
            names: for each sequence of the batch (the first dimension of the model's inputs) an adapter's name, or
                None for the base model; or, up to `adapters_per_row` of `attach`, several names with weights, as
                `{"pirate": 0.7, "haiku": 0.3}`: then what these adapters add is summed, each times its weight. A weight
                is a finite number, or a tensor of one, which gets a gradient if it requires one.
            lengths: for a packed batch, whose sequences lie one after another in one row `[1, sum of the lengths]`: how
                many tokens each has.
            parts: names for parts of the model whose rows are not the sequences of the batch, by the part's name: those
                of a vision tower are its images, `{"vision_tower": ["pirate", "pirate", None]}`. Where they are packed,
                names and lengths: `{"visual": (names, lengths)}`.
            input_ids: `[batch, tokens]`, the prompts that the model is called with in the block. Adapters with
                `alora_invocation_tokens` need them: one counts for the tokens from the last occurrence of its
                invocation tokens in the prompt on, with all that is generated then; and for none without an occurrence.

        Raises:
            UnknownAdapterError: the bank has no adapter of a name.
            BankInUseError: another thread or task is inside a `use` block.
            BatchError: no list, or an empty one; more names for a sequence than `attach` was told, none, or a weight
                that is no finite number; lengths that do not fit the names; no such part. The model raises it
                too, where the batch has another size, or is on another device than the model was.
            UnprovedRowsError: by the model: a layer's rows come from the sequences in a way that cannot be told.
            OutsideBlockError: by the model: another thread or task calls it, or a checkpoint recomputes a layer after
                the block.
            UnreachedLayerError: when the block ends: a layer was left out, since its weight was read and it was not
                called.
            AdapterError: a module has been replaced, or its forward hooked, since `attach`.
        """
        block = self._open(names, lengths, parts or {}, input_ids)
        token = self._routing.mine.set(block)
        unreached: list[str] = []
        try:
            yield
            traced = set().union(*(routing.traced_calls for routing in self._routings.values()))
            found = set().union(*(routing.unreached(block) for routing in self._routings.values()))
            unreached = sorted(found - traced)
        finally:
            self._close(block)
            # A generator may be closed in another context than the one it was started in.
            with suppress(ValueError):
                self._routing.mine.reset(token)
        if unreached:
            raise self._unreached(unreached)

    def detach(self) -> None:
        """Take LoRA out of the model, which is then as it was before `attach`; the bank is empty afterwards.

        Raises:
            BankInUseError: a `use` block is open.
            AdapterError: the forward of a module has been hooked since `attach`.
        """
        with self._lock:
            if self._blocks:
                raise BankInUseError("detach", "a bank that is not in use", "a `use` block", "Leave the block first.")
            self._check_modules(for_detach=True)
            for name in self._training.names:
                self._training.stop(name)
            for layer in self._layers.values():
                layer.restore()
            for undo in self._undo:
                undo()
            self._layers.clear()
            self._staging = Staging()
            self._slots = [None] * len(self._slots)
            self._ranks = [0] * len(self._slots)
            self._routing.ranks = None

    def _open(self, names: Any, lengths: Any, parts: Any, input_ids: Any) -> Block:
        with self._lock:
            self._check_modules()
            self._training.check()
            self._training.check_hooks()
            rows = {"": _checked_rows("use", names, lengths, self._adapters_per_row)}
            for part, given in _checked_parts(parts).items():
                name = self._name_of_part(part)
                packed = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], list | tuple)
                self._check_part(part, name)
                entries, its_lengths = given if packed else (given, None)
                rows[name] = _checked_rows(f"use: parts[{part!r}]", entries, its_lengths, self._adapters_per_row)
            block = self._enter(rows, input_ids)
            self._training.name(block.names)
            return block

    def _enter(self, rows: dict[str, Rows], input_ids: Any = None) -> Block:
        """Open a block, whose names have been checked."""
        if self._blocks and self._blocks[-1] is not self._routing.mine.get():
            raise BankInUseError(
                "use",
                "a bank that nobody else uses",
                "a `use` block of another thread or task",
                "Wait for its end.",
            )
        block = Block(rows, self._adapters_per_row)
        block.resolve(self._slot_of)
        self._activate(block, input_ids)
        self._route(block)
        self._blocks.append(block)
        return block

    def _activate(self, block: Block, input_ids: Any) -> None:
        """Find out for which tokens of each sequence its adapter counts.

        Raises:
            BatchError: that cannot be known.
        """
        if not self._routing.activates:
            return
        wanted = {
            part: [self._invocations[slot] if slot >= 0 else () for slot in block.slots_of(part)] for part in block.rows
        }
        remedy = "Open the block with bank.use(names, input_ids=input_ids)."
        block.counts = (ALL_TOKENS,) * len(wanted[""])
        if not any(map(any, wanted.values())):
            return
        if len(wanted) > 1 or block.rows[""].lengths is not None:
            got = "parts" if len(wanted) > 1 else "packed ones"
            raise BatchError("use", "sequences one below the other, for adapters with invocation tokens", got, remedy)
        batch = len(wanted[""])
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not _is_integer(input_ids):
            is_tensor = isinstance(input_ids, Tensor)
            got = f"{input_ids.dtype} {list(input_ids.shape)}" if is_tensor else f"{type(input_ids).__name__}"
            wish = f"the prompts, a tensor of integers [{batch}, tokens], since an adapter has invocation tokens"
            raise BatchError("use: input_ids", wish, got, remedy)
        if len(input_ids) != batch:
            raise BatchError("use: input_ids", f"{batch} prompts, one for each name", str(len(input_ids)), remedy)
        # A copy, which a later change of the caller's tensor does not reach.
        block.prompts, block.prompt = input_ids.detach().clone(), input_ids.shape[1]
        prompts = zip(input_ids.tolist(), wanted[""], strict=True)
        block.counts = tuple(_count_from(prompt, tokens) if tokens else ALL_TOKENS for prompt, tokens in prompts)

    def check_activates_nothing(self, where: str, got: str, remedy: str) -> None:
        """Refuse what cannot be done with adapters that have invocation tokens, where the open block has such.

        Raises:
            BatchError: it has.
        """
        if self._blocks and self._blocks[-1].prompt is not None:
            raise BatchError(where, "one row for each prompt, for adapters with invocation tokens", got, remedy)

    def _close(self, block: Block) -> None:
        with self._lock:
            self._note_readers()
            self._blocks.remove(block)
            self._route(self._blocks[-1] if self._blocks else None)
            if self._blocks:
                self._training.name(self._blocks[-1].names)

    def _route(self, block: Block | None) -> None:
        """Point the layers at the slots of a block; None outside all blocks."""
        if block is None:
            for routing in self._routings.values():
                routing.point(None)
                # Weights with gradients keep all that they were computed from.
                routing.mix_slots = routing.mix_weights = None
            return
        if len(self._routings) > 1 or len(block.rows) > 1:
            self._share(set(block.rows))
        slots = {part: self._slots_on_device(part, block.slots_of_tokens(part)) for part in block.rows}
        if block.counts and block.rows[""].lengths is None:
            counts = [count for count in block.counts for _ in range(block.times)]
            block.active_tokens = self._slots_on_device("active tokens", counts)
        for part, routing in self._routings.items():
            if part in slots:
                routing.point(slots[part], block, block.rows[part].lengths)
                self._route_ranks(routing, slots[part].device)
                if block.adapters_per_row > 1:
                    mixes = self._mixes_on_device(part, block.mixes[part], *slots[part].shape)
                    routing.mix_slots, routing.mix_weights = mixes
            else:
                routing.point(None)

    def repeat(self, times: int | None) -> None:
        """Have each sequence of the open block be so many rows in the model's inputs from now on.

        Args:
            times: how many; 1 at the end of `generate`, None for as many as when a search begins.
        """
        with self._lock:
            block = self._routing.block
            if isinstance(block, Block):
                if times == 1:
                    block.first_times = 1
                times = block.first_times if times is None else times
                if block.times != times:
                    if times != 1:
                        remedy = "Generate one answer for each, without beams."
                        self.check_activates_nothing("generate", f"{times} for each", remedy)
                    block.times = times
                    self._route(block)

    def times(self) -> int:
        """How many rows of the model's inputs each sequence of the open block is now."""
        return self._blocks[-1].times if self._blocks else 1

    def start_from(self) -> None:
        """Have each search of `generate` begin with as many rows as now."""
        if self._blocks:
            self._blocks[-1].first_times = self._blocks[-1].times

    def names_in_use(self) -> list[str | Mix | None] | None:
        """The names of the open block, one for each sequence; None outside of all blocks."""
        return list(self._blocks[-1].rows[""].names) if self._blocks else None

    @contextmanager
    def step(self, names: Sequence[str | Mix | None], lengths: Sequence[int]) -> Iterator[None]:
        """Have this thread run a packed batch of sequences of the open block, which another thread may have opened.

        Args:
            names: for each sequence, as `names_in_use` gives them.
            lengths: how many tokens each has.
        """
        with self._lock:
            block = Block({"": Rows(tuple(names), tuple(lengths))}, self._adapters_per_row)
            block.resolve(self._slot_of)
            self._activate(block, None)
            outer = self._blocks[-1]
            self._blocks.append(block)
            self._route(block)
        token = self._routing.mine.set(block)
        try:
            yield
        finally:
            self._routing.mine.reset(token)
            with self._lock:
                self._note_readers()
                outer.called |= block.called
                outer.read |= block.read
                self._blocks.remove(block)
                self._route(outer)

    def _share(self, parts: set[str]) -> None:
        """Give each layer the routing of the innermost of these parts that it lies in."""
        for part in parts - self._routings.keys():
            routing = BatchRouting(part=part)
            routing.entries = {part: self._model.get_submodule(part)}
            routing.mine, routing.main = self._routing.mine, self._routing
            self._routings[part] = routing
            handles = Entry(part, routing).hook(self._model.get_submodule(part))
            self._undo += [handle.remove for handle in handles]
        for name, layer in self._layers.items():
            inside = [part for part in parts if not part or name == part or name.startswith(f"{part}.")]
            routing = self._routings[max(inside, key=len)]
            if layer.lora_routing is not routing:
                layer.lora_routing = routing

    def _slots_on_device(self, part: str, wanted: list[int]) -> Tensor:
        device = device_of(next(iter(self._layers.values())))
        # A tensor made in inference mode could not be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            slots = torch.tensor(wanted, device="cpu")
            batch = self._batches.get((part, len(wanted), device))
            if batch is None:
                batch = torch.empty_like(slots, device=device)
            # CUDA has read them by the time that it returns, and does not wait for what it was given before.
            batch.copy_(slots, non_blocking=device.type == "cuda")
        if type(batch) is not Tensor:
            raise AdapterError(
                "use", "real tensors", type(batch).__name__, "Enter the block outside of torch.export and fake modes."
            )
        self._batches[part, len(wanted), device] = batch
        return batch

    def _mixes_on_device(
        self, part: str, mixes: Sequence[tuple[tuple[int, Any], ...]], batch: int
    ) -> tuple[Tensor, Tensor]:
        """Slots and weights of these mixes, `[batch + 1, M]`: as many as there could be, and that of the base model."""
        device = device_of(next(iter(self._layers.values())))
        several = self._adapters_per_row
        rows = [[*mix, *[(NO_ADAPTER, 0.0)] * (several - len(mix))] for mix in mixes]
        weights = [weight for row in rows for _, weight in row]
        with torch.inference_mode(False), torch.no_grad():
            known = self._mixes.get((part, batch, device))
            if known is None:
                slots = torch.full((batch + 1, several), NO_ADAPTER, device=device)
                known = self._mixes[part, batch, device] = slots, torch.zeros(batch + 1, several, device=device)
            if rows:
                made = torch.tensor([[slot for slot, _ in row] for row in rows])
                known[0][: len(rows)].copy_(made, non_blocking=device.type == "cuda")
        if not any(isinstance(weight, Tensor) for weight in weights):
            if rows:
                with torch.inference_mode(False), torch.no_grad():
                    factors = torch.tensor(weights, dtype=torch.float32).view(len(rows), several)
                    known[1][: len(rows)].copy_(factors, non_blocking=device.type == "cuda")
            return known
        tensors = [torch.as_tensor(weight, dtype=torch.float32, device=device).reshape(()) for weight in weights]
        factors = torch.stack(tensors).view(len(rows), several)
        if factors.requires_grad:
            # In the place of what is kept, which has no gradient.
            return known[0], torch.cat([factors, factors.new_zeros(batch + 1 - len(rows), several)])
        with torch.inference_mode(False), torch.no_grad():
            known[1][: len(rows)].copy_(factors)
        return known

    def _route_ranks(self, routing: BatchRouting, device: torch.device) -> None:
        main = self._routing
        if not reads_ranks(device.type):
            routing.ranks = None
        elif main.ranks is None or main.ranks.device != device:
            with torch.inference_mode(False):
                main.ranks = torch.tensor(self._ranks, dtype=torch.int32, device=device)
        if routing is not main:
            routing.ranks = main.ranks

    def _name_of_part(self, part: str) -> str:
        names = [name for name, _ in self._model.named_modules() if name]
        found = [part] if part in names else [name for name in names if name.endswith(f".{part}")]
        if len(found) != 1:
            raise BatchError(
                f"use: parts[{part!r}]",
                "the name of one module of the model, or the end of its name",
                f"one that {len(found)} modules have" if found else "one that no module has",
                f"Pass the whole name: {', '.join(found[:3])}." if found else "See model.named_modules().",
            )
        return found[0]

    def _check_part(self, part: str, name: str) -> None:
        """Refuse a part that shares a layer with the rest of the model: its rows cannot be told apart."""
        paths: dict[int, list[str]] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)
        for layer_name, layer in self._layers.items():
            inside = [path == name or path.startswith(f"{name}.") for path in paths[id(layer)]]
            if any(inside) and not all(inside):
                raise BatchError(
                    f"use: parts[{part!r}]",
                    "a part with layers of its own",
                    f"one that shares a layer with another part: {' is '.join(paths[id(layer)])}",
                    f"Leave the layer out with exclude_modules=[{layer_name!r}].",
                )

    def _unreached(self, names: list[str]) -> UnreachedLayerError:
        parents = {name: self._model.get_submodule(name.rpartition(".")[0]) for name in names}
        places = [f"{name} (in {type(parents[name]).__name__})" for name in names]
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        return UnreachedLayerError(
            "bank.use",
            "a call of each layer whose weight is used",
            f"weights that were read by a parent, which left LoRA out: {', '.join(places[:5])}{more}",
            "Have the parent call the module, or leave it out with exclude_modules.",
        )

    def _set_rank(self, slot: int, rank: int) -> None:
        self._ranks[slot] = rank
        if self._routing.ranks is not None:
            # In place, where captured graphs read it.
            with torch.no_grad():
                self._routing.ranks[slot].fill_(rank)

    def _clear(self, slot: int) -> None:
        with torch.no_grad():
            clear(self._stacked.values(), self._mixtures.values(), slot)
        self._set_rank(slot, 0)

    def _note_readers(self) -> None:
        """Have later changes of a slot wait for all that this thread has launched."""
        for device in self._devices:
            if device.type == "cuda" and not is_capturing(device):
                stream = torch.cuda.current_stream(device)
                self._readers.setdefault(stream, torch.cuda.Event()).record(stream)

    def _free_slot(self, name: str) -> int:
        """The slot that an adapter of this name would take."""
        self._check_modules()
        if not isinstance(name, str) or not name:
            raise AdapterError("load", "a name for the adapter", repr(name), "Pass a string that is not empty.")
        if name in self._slots or name in self._filling.values():
            raise DuplicateAdapterError(
                f"load {name!r}", "a name that is free", "one in the bank", "Drop it first, or choose another."
            )
        free = [slot for slot, holder in enumerate(self._slots) if holder is None and slot not in self._filling]
        if not free:
            raise NoFreeSlotError(
                f"load {name!r}",
                "a free slot",
                f"{len(self._slots)} slots, all taken by {', '.join((*self.names, *self._filling.values()))}",
                "Drop an adapter, or attach with more slots.",
            )
        return free[0]

    def _slot_of(self, name: str) -> int:
        if name not in self._slots or name is None:
            wanted = f"one of {', '.join(self.names)}" if self.names else "a loaded adapter; the bank is empty"
            remedy = "Name one that is loaded, or load it first: bank.load(name, folder)."
            raise UnknownAdapterError(f"adapter {name!r}", wanted, repr(name), remedy)
        return self._slots.index(name)

    def _check_attached(self) -> None:
        if not self._layers:
            raise AdapterError("bank", "a model it is attached to", "a bank that was detached", "Call xlc.attach().")

    def _check_modules(self, *, for_detach: bool = False) -> None:
        self._check_attached()
        replaced = [path for parent, key, child, path in self._edges if parent._modules.get(key) is not child]
        for name, layer in self._layers.items():
            if replaced and not for_detach and any(name == path or name.startswith(f"{path}.") for path in replaced):
                raise AdapterError(
                    f"bank: {name}",
                    "the module that LoRA was attached to",
                    "another one, which took its place since",
                    "Put the module back; or call bank.detach(), and attach and load again.",
                )
            forward = vars(layer).get("forward")
            if forward is not self._forwards[name] and (for_detach or not _calls_own_forward(layer, forward)):
                raise AdapterError(
                    f"bank: {name}",
                    "the module that LoRA was attached to",
                    "one whose forward was replaced since",
                    "Take that forward off: del module.forward. Change a model first, and then attach.",
                )
            if any(stack is not None and stack.is_meta for stack in layer._buffers.values()):
                raise AdapterError(f"bank: {name}", "weights that have memory", "meta tensors", "Load the model first.")


def _calls_own_forward(layer: Layer, forward: Any) -> bool:
    """A hook of accelerate's calls the layer's own forward, and puts that in its place when it is removed."""
    return "_hf_hook" in vars(layer) or forward == MethodType(cast("Any", type(layer)).forward, layer)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _count_from(prompt: list[int], tokens: tuple[int, ...]) -> int:
    """How many tokens a prompt has from the last occurrence of these on; 0 without one."""
    length = len(tokens)
    starts = (start for start in reversed(range(len(prompt))) if prompt[start : start + length] == [*tokens])
    return len(prompt) - next(starts, len(prompt))


def device_of(layer: Layer) -> torch.device:
    """Return the device of a layer's memory for adapters."""
    return next(iter(layer.lora_stacks.values())).device


def _edges(model: nn.Module, layers: Mapping[str, Layer]) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """Each step on the way from the model to its layers: a parent, its child's name in it, the child, and its path."""
    edges: dict[str, tuple[nn.Module, str, nn.Module, str]] = {}
    for name in layers:
        parent, path = model, ""
        for key in name.split(".") if name else ():
            path = f"{path}.{key}" if path else key
            if path not in edges:
                edges[path] = parent, key, parent._modules[key], path  # type: ignore[assignment]
            parent = edges[path][2]
    return list(edges.values())


def _checked_rows(where: str, names: Any, lengths: Any, adapters_per_row: int) -> Rows:
    if not isinstance(names, list | tuple) or not names:
        raise BatchError(
            where, "a list with a name, or None, for each sequence", repr(names), "Write `use(['pirate'])`."
        )
    if adapters_per_row > 1 or any(isinstance(name, Mapping) for name in names):
        names = [_checked_mix(f"{where}: {at}", name, adapters_per_row) for at, name in enumerate(names)]
    if lengths is None:
        return Rows(tuple(names))
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    if (
        not isinstance(lengths, list | tuple)
        or len(lengths) != len(names)
        or not all(type(length) is int and length > 0 for length in lengths)
    ):
        raise BatchError(
            f"{where}: lengths",
            f"{len(names)} numbers of tokens, one for each name, of at least 1",
            repr(lengths),
            "Give each name its sequence's number of tokens, 1 or more; leave out a name without tokens.",
        )
    return Rows(tuple(names), tuple(lengths))


def _checked_mix(where: str, entry: Any, adapters_per_row: int) -> Any:
    """A name or None as it is; of a mapping the `Mix`."""
    if isinstance(entry, list | tuple) and adapters_per_row > 1:
        remedy = 'Write {"pirate": 0.7, "haiku": 0.3}.'
        raise BatchError(where, "a name, None, or a mapping from names to weights", repr(entry), remedy)
    if not isinstance(entry, Mapping):
        return entry
    if adapters_per_row == 1:
        remedy = f"Pass adapters_per_row={max(2, len(entry))} to attach."
        raise BatchError(where, "a name, or None, since this bank has one adapter for a row", repr(dict(entry)), remedy)
    if not 0 < len(entry) <= adapters_per_row:
        remedy = f"Pass adapters_per_row={len(entry)} to attach." if entry else "Write None for the base model."
        raise BatchError(where, f"1 to {adapters_per_row} names, each with a weight", repr(dict(entry)), remedy)
    for name, weight in entry.items():
        if isinstance(weight, Tensor):
            # On an accelerator to ask for the number would be to wait for it.
            is_one = weight.numel() == 1 and weight.is_floating_point()
            is_right = is_one and (weight.device.type != "cpu" or bool(weight.detach().float().isfinite().all()))
        else:
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            # As they are stored; a NaN is no number that compares.
            is_right = is_number and abs(weight) <= _LARGEST_WEIGHT
        if not is_right:
            remedy = 'Write numbers, as {"pirate": 0.7, "haiku": 0.3}, or float tensors of one element.'
            wanted = "a number that float32 holds"
            raise BatchError(f"{where}: weight of {name!r}", wanted, shown(weight), remedy)
    return tuple((name, weight if isinstance(weight, Tensor) else float(weight)) for name, weight in entry.items())


def _checked_parts(parts: Any) -> dict[str, Any]:
    if isinstance(parts, Mapping) and all(isinstance(part, str) and part for part in parts):
        return dict(parts)
    raise BatchError(
        "use: parts",
        "a mapping from names of modules to names of adapters",
        repr(parts),
        'Write {"vision_tower": [...]}.',
    )
