"""`BatchRouting`: the slot of each row that a layer is given.

All layers of a model share one, or those of a part of the model.

Eagerly the first call of a model with inputs of a new kind is followed by a `Watch`; what it learns about each layer
holds for later calls of that kind. In compiled code Dynamo asks while it traces: see `tracing.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from xpu_lora_compile.errors import BatchError, CopiedModelError, OutsideBlockError, UnprovedRowsError, counted
from xpu_lora_compile.rows import tracing
from xpu_lora_compile.rows.bytecode import only_looks
from xpu_lora_compile.rows.inputs import (
    batch_error,
    is_media,
    may_hold_more,
    may_hold_the_batch,
    named_inputs,
    parameters,
    shape_of_mask,
)
from xpu_lora_compile.rows.inputs import described as described_as
from xpu_lora_compile.rows.layout import UNSAID, Layout, Picked
from xpu_lora_compile.rows.owners import GUESS, UNKNOWN, along, constant
from xpu_lora_compile.rows.watch import Watch
from xpu_lora_compile.torch_internals import (
    current_backward,
    is_capturing,
    is_vmapped,
    out_of_sight,
    run_by_python,
)

# `BatchRouting.running` of a call that was looked at, and no closer.
GLANCED_AT = -2
# So many kinds of calls are remembered.
MOST_PROOFS = 1024
# Of such a class are the flags of a module.
_FLAGS = {bool, int, str}
# What a layer's rows are while every sequence has the same adapter: any layout gives the same.
UNIFORM = Layout(-1, 0, 0)
_PLACES_WANTED = "an adapter of the bank has invocation tokens, for which inputs [batch, tokens, features] are needed"


class BatchRouting:
    """The slot of each sequence in the batch.

    Attributes:
        sequence_slots: `[batch]`, int64, -1 for the base model; of a packed batch one for each token. None outside of
            all blocks.
        adapters_per_row: M, how many adapters a row may have.
        mix_slots: `[N, M]`, int64, where rows have several adapters: the slots of each mix, -1 where it has fewer; the
            last is that of the base model. The slots of sequences are then numbers of mixes, -1 for the base model.
        mix_weights: `[N, M]`, float32: the weights of the same.
        ranks: `[K]`, int32: the highest rank of each slot's adapter, 0 where it is empty; None on a CPU, whose kernel
            asks for none.
        block: the `use` block that says so. It notes the layers that were `called`, and those whose weight was `read`.
        uniform: whether all sequences have the same adapter, or none.
        named: whether any has one.
        lengths: of the sequences of a packed batch, in tokens; else None.
        main_input: the model's main input, where the model says so.
        mine: the innermost block of this thread or asyncio task; others start without one.
        serves_all: whether what is compiled in a block whose sequences have the same adapter is to serve all blocks.
        main: the model's, where this is that of a part.
        activates: whether an adapter of the bank has, or had, invocation tokens: it counts for some tokens alone.
        active_tokens: `[batch]`, int64, then: how many of the last tokens of each sequence its adapter counts for.
    """

    def __init__(self, main_input: str | None = None, part: str = "") -> None:
        self.sequence_slots: Tensor | None = None
        # What two blocks have in common in which calls that look alike are alike.
        self._pointed_at: Hashable = None
        self.adapters_per_row = 1
        self.mix_slots: Tensor | None = None
        self.mix_weights: Tensor | None = None
        self.ranks: Tensor | None = None
        self.activates = False
        self.active_tokens: Tensor | None = None
        self.block: Any = None
        self.uniform = self.named = self.serves_all = False
        self.lengths: tuple[int, ...] | None = None
        self.main_input = main_input
        self.part = part
        self.main = self
        # Modules that can be named as parts: none of them reads the text.
        self.parts: list[str] = []
        self.mine: ContextVar[Any] = ContextVar("mine", default=None)
        # How deep in modules that `Entry` hooks the current call is, and what is known of its rows.
        self._depth = 0
        self._outermost: nn.Module | None = None
        self._watch: Watch | None = None
        self._entered: tuple[Hashable, Hashable, nn.Module] | None = None
        # Its arguments.
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        # Whether what earlier calls have shown is still to be looked up for the current one, if a layer asks.
        self._late = False
        # Whether a compiled call has ever asked for what earlier calls have shown: for a layer that is left to Python,
        # or that lies behind a break of the graph. Until then most of what a call was given need not be looked at.
        self._asked = False
        # What the last compiled call looked like, and what was found out of it: `running` and `_entered`.
        self._looked_at: Hashable = None
        self._seen: tuple[int, tuple[Hashable, Hashable, nn.Module] | None] = -1, None
        self._compiled = False
        self._thread = 0
        # The modules that `Entry` hooks, by name.
        self.entries: dict[str, nn.Module] = {}
        self._proof: dict[tuple[str, int], Layout] = {}
        self._proofs: dict[Hashable, dict[tuple[str, int], Layout]] = {}
        # What the call that is followed has shown so far, by layer and the dimensions of its rows.
        self._found: dict[tuple[str, int], Layout] = {}
        # In this block: layers whose rows the model picks, and in the call that is followed, as `_found`.
        self._picked: set[str] = set()
        self._picked_now: set[tuple[str, int]] = set()
        # The same of all calls that have succeeded, by what they had in common, as a number, or whatever they had (-1);
        # None where two disagree.
        self._anywhere: dict[tuple[int, str, int], Layout | None] = {}
        # By number: of how many layers such calls have disagreed. Code that relies on what they have shown asks for it.
        self.doubts: dict[int, int] = {}
        self._numbers: dict[Hashable, int] = {}
        # The number of the call that is running, which compiled code writes, too.
        self.running = -1
        # Kinds of calls in which the model's Python looks at masks: there a kind holds for masks that look alike.
        self._kinds_that_look: set[Hashable] = set()
        # What the calls of this block have shown, for checkpoints that run parts again; None where two disagree.
        self._shown: dict[tuple[str, int], Layout | None] = {}
        # What calls of a kind have shown, which must be followed again.
        self._stale: dict[Hashable, dict[tuple[str, int], Layout]] = {}
        # On a CPU, for this block: the rows of layers that were asked for before, for each kind of call.
        self._rows: dict[Hashable, dict[Any, Tensor]] = {}
        self._rows_of_call: dict[Any, Tensor] = {}
        # By layer: the block in which it ran last, how often, and what backward passes ran again.
        self.called: dict[str, Any] = {}
        # Layers whose weight something else than the layer read in compiled code, for good, with the node of the weight
        # in its graph; and those that it called.
        self.traced_reads: dict[str, Any] = {}
        self.traced_calls: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> LostRouting:
        return LostRouting()

    def __reduce__(self) -> Any:
        return LostRouting, ()

    def point(self, slots: Tensor | None, block: Any = None, lengths: tuple[int, ...] | None = None) -> None:
        """Have layers use these slots from now on; None outside of all blocks."""
        self._abandon()
        self._rows, self._rows_of_call, self._shown, self._picked = {}, {}, {}, set()
        self.block, self.lengths = block, lengths
        self.uniform = slots is not None and len(set(block.slots_of(self.part))) == 1
        self.named = slots is not None and any(slot >= 0 for slot in block.slots_of(self.part))
        self.active_tokens = block.active_tokens if slots is not None and not self.part else None
        if slots is not None and len(slots) > 1 and block.prompt is not None:
            # Tokens of one sequence differ.
            self.uniform = False
        self.sequence_slots = slots
        self._pointed_at = slots is not None and (slots.shape, slots.device, lengths is None, self.uniform, block.parts)

    def is_mine(self) -> bool:
        """Whether the block that is open was opened by this thread or task."""
        return self.block is None or self.block is self.mine.get()

    def rows_of(self, layer: Any, inputs: Tensor, features: int) -> Tensor | None:
        """The slot of each row of a layer's inputs; None where the base model is asked for.

        Args:
            layer: with its name in `lora_name`.
            inputs: `[..., *features]`.
            features: how many of its last dimensions are no rows.

        Raises:
            BatchError: nobody knows whose rows these are, or the model has been moved since the block was entered.
            OutsideBlockError: another thread or task has a block open, or a backward pass has left its block.
        """
        slots = self.sequence_slots
        if slots is None:
            if not is_compiling() and self.called:
                self._note_call_without_block(layer)
            return None
        if is_compiling():
            return self._traced_rows_of(layer, inputs, features, slots)
        if self.block is not self.mine.get():
            self.check_caller()
        self._note_call(layer)
        if self._compiled:
            self._asked = True
        if not self.named and slots.device.type == "cpu":
            # Elsewhere a graph that is captured now may be replayed for others.
            self._check_device(inputs, slots)
            return None
        if self._late:
            self.note_question(layer, inputs)
            self._look_up()
        shape = inputs.shape[: inputs.dim() - features]
        rows = self._rows_of_call.get((layer.lora_name, shape))
        if rows is not None and self._watch is None and inputs.device == slots.device:
            return rows
        self._check_device(inputs, slots)
        if not shape.numel():
            return slots[:0]
        if is_vmapped():
            raise self.unproved(
                layer.lora_name, inputs, "torch.func or vmap hides a dimension", "Call the model on the whole batch."
            )
        layout = self._layout(layer, inputs, features)
        if isinstance(layout, Picked):
            if self.block.prompt is not None and layer.lora_site.has_tokens:
                raise self.unproved(
                    layer.lora_name, inputs, _PLACES_WANTED, "Leave the module out with exclude_modules."
                )
            return layout.rows(slots, shape)
        if layout is not UNIFORM:
            self._check_fits(layout, slots, shape, layer)
        rows = self._rows_by(layout, slots, shape, layer)
        # On other devices graphs may be captured, which must compute the rows anew in each replay.
        if slots.device.type == "cpu":
            self._rows_of_call[layer.lora_name, shape] = rows
        return rows

    def mixes_of(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The slots and the weights of rows, `[T, M]` each, of which `rows_of` gave the numbers."""
        assert self.mix_slots is not None  # noqa: S101 - for the type checker
        assert self.mix_weights is not None  # noqa: S101
        return self.mix_slots[numbers], self.mix_weights[numbers]

    def owners_of(self, layer: Any, inputs: Tensor, features: int) -> Tensor | None:
        """The number of each row's sequence; None where all have the same adapter, so that nobody asked."""
        if self._late:
            self.note_question(layer, inputs)
            self._look_up()
        layout = None if self.sequence_slots is None else self._layout(layer, inputs, features)
        if layout is None or layout is UNIFORM:
            return None
        assert self.sequence_slots is not None  # noqa: S101 - for the type checker
        numbers = torch.arange(len(self.sequence_slots)) if self.lengths is None else self.owners(0, 1).long()
        return layout.rows(numbers, inputs.shape[: inputs.dim() - features])

    def enter(
        self, module: nn.Module, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
    ) -> None:
        """A module that holds layers is called: find out, or remember, how the rows of its layers come about."""
        if self._depth and module is self._outermost and self._thread == get_ident() and not _is_nested(module):
            # An interrupt (KeyboardInterrupt) ended the call without `leave`.
            self._abandon()
        self._depth += 1
        if self._depth == 1:
            self._outermost = module
        if self._depth > 1 or self.sequence_slots is None:
            if self._entered is not None and self._thread != get_ident():
                # `leave` is called all the same.
                self.raise_for_caller("one while another thread runs the model in the same block")
            return
        self._thread = get_ident()
        if prefix and self.is_inside_another(module):
            # Of a call whose beginning was compiled.
            return
        if self.block is not self.mine.get():
            self.check_caller()
        if not self.named and self.sequence_slots.device.type == "cpu" and not (compiled and self.serves_all):
            return
        if torch.is_grad_enabled() and current_backward() is not None:
            # A checkpoint runs a part of the model again: its layers get their rows as they did before.
            self._entered = None, (), module
            self._proof = {key: layout for key, layout in self._shown.items() if layout is not None}
            return
        if self.block.prompts is not None:
            self._check_prompts(named_inputs(module, args, kwargs), self.block.prompts)
        looks = self._looks_of(module, prefix, args, kwargs) if compiled else None
        if looks is not None and looks == self._looked_at:
            self.running, self._entered = self._seen
            if self._entered is not None:
                self._late, self._given = True, (args, kwargs)
                if not self._asked:
                    self.running = GLANCED_AT
            return
        self._looked_at = None
        self._begin(module, prefix, args, kwargs, compiled)
        if self._entered is None or not self._looks_at_masks(self._entered[0]):
            self._looked_at, self._seen = looks, (self.running, self._entered)

    def _check_prompts(self, inputs: list[tuple[str, Any]], prompts: Tensor) -> None:
        """Refuse other prompts than those that say from where on adapters count, and steps of several tokens.

        Raises:
            BatchError: these are others.
        """
        tokens = next((value for name, value in inputs if name == "input_ids" and isinstance(value, Tensor)), None)
        if tokens is None or tokens.dim() != 2 or tokens.shape[1] == 1 or is_capturing(tokens.device):
            return
        if tokens.shape != prompts.shape or not torch.equal(tokens, prompts.to(tokens.device, tokens.dtype)):
            wanted = "the prompts of the block, or one token of each behind them, for adapters with invocation tokens"
            got = "others" if tokens.shape == prompts.shape else f"input_ids {list(tokens.shape)}"
            remedy = "Open a block with the input_ids that the model is called with, and generate without chunks."
            raise BatchError("bank.use: input_ids", wanted, got, remedy)

    def _begin(
        self, module: nn.Module, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
    ) -> None:
        assert self.sequence_slots is not None  # noqa: S101 - for the type checker
        inputs = named_inputs(module, args, kwargs)
        self.running = self.number_of(module, inputs)
        batched = self._batched(module, inputs)
        if not batched and not (self.uniform and self._may_be_batch(inputs)):
            self._raise_batch_size(module, inputs)
        serves_others = self._must_serve_others(self.sequence_slots.device) or (compiled and self.serves_all)
        if self.uniform and not serves_others:
            return
        kind = self._kind(module, prefix, inputs, batched)
        sizes = tuple(tuple(value.shape) for _, value in inputs if isinstance(value, Tensor))
        self._entered, self._given = (kind, sizes, module), (args, kwargs)
        is_known = self._look_up()
        self._compiled = compiled
        if is_known or compiled:
            # Where Dynamo is at work, the graph shows what a watch would.
            return
        self._proof, self._found, self._picked_now = dict(self._stale.get(kind, {})), {}, set()
        self._watch = Watch(len(self.lengths or self.sequence_slots), self.lengths)
        self._mark(self._watch, inputs, batched)
        self._watch.start()

    def _look_up(self) -> bool:
        """Look up what earlier calls of the kind that was entered have shown, and whether they have shown anything."""
        assert self._entered is not None  # noqa: S101 - for the type checker
        kind, sizes, _ = self._entered
        self._rows_of_call = {} if kind is None else self._rows.setdefault((kind, sizes), {})
        # Where a dimension holds more than the sequences, calls of other sizes are followed, too.
        known = self._proofs.get((kind, sizes)) or self._proofs.get(kind)
        self._proof, self._late, self._compiled = known or {}, False, True
        return known is not None

    def note_question(self, layer: Any, inputs: Any) -> int:
        """A layer asks for what earlier calls have shown, in compiled code; returns the number of the running call."""
        self._asked = True
        if self.running == GLANCED_AT:
            why = "no layer has asked in a compiled call before, so that how this one began was not looked at closely"
            raise self.unproved(layer.lora_name, inputs, why, "Call the model again: from now on it is.")
        return self.number_of_running()

    def number_of_running(self) -> int:
        """The number of the call that runs; in a backward pass -1, as a checkpoint may run any call's part again."""
        return -1 if torch.is_grad_enabled() and current_backward() is not None else self.running

    def _looks_of(self, module: nn.Module, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """All that `_begin` goes by, as it is when the call begins; None where that takes more than a look.

        While nobody has `asked`, only what the batch and the sizes are checked by.
        """
        looks: list[Hashable] = [prefix, id(module), self._pointed_at]
        if self._asked:
            looks += torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self._flags()
        for values in (enumerate(args), kwargs.items()):
            for name, value in values:
                if isinstance(value, Tensor):
                    looks.append((name, value.shape, value.dtype))
                elif value is None or value.__class__ in _FLAGS:
                    looks.append((name, value))
                elif may_hold_more(value.__class__):
                    return None
                else:
                    looks.append((name, described_as(value) if self._asked else value.__class__))
        return tuple(looks) if not args or len(args) <= len(parameters(type(module))) else None

    def leave(self, result: Any, _: bool) -> None:
        """The call has ended; with None where it failed."""
        if self._depth:
            self._depth -= 1
        if self._depth or self._entered is None:
            return
        watch, (kind, sizes, module), (args, kwargs) = self._watch, self._entered, self._given
        self._entered, self._given = None, ((), {})
        if self._late:
            self._late = False
            return
        self._stop_watching()
        self._rows_of_call = {}
        if result is not None:
            for key, layout in self._proof.items():
                if self._shown.setdefault(key, layout) != layout:
                    self._shown[key] = None
        if watch is not None:
            try:
                if result is not None:
                    self._check_result(watch, module, result)
                    if watch.looked_at_masks and isinstance(kind, tuple) and not self._looks_at_masks(kind):
                        # Else it says already what its masks look like.
                        self._kinds_that_look.add(kind)
                        self._looked_at = None
                        kind = kind, _masks_of(named_inputs(module, args, kwargs))
                    if kind is not None and not watch.looked_at_values and not self._picked_now:
                        is_open = any(layout[1:] != (1, 1) for layout in self._proof.values())
                        if len(self._proofs) >= MOST_PROOFS:
                            self._proofs.clear()
                        self._proofs[(kind, sizes) if is_open else kind] = self._proof
                    for (name, rows), layout in self._found.items():
                        for number in {self.running, -1}:
                            if self._anywhere.setdefault((number, name, rows), layout) not in (layout, None):
                                self._doubt(number, name, rows)
                    for name, rows in self._picked_now:
                        for number in {self.running, -1}:
                            self._doubt(number, name, rows)
            finally:
                watch.forget()
        # What follows is no part of this call.
        self._proof = {}

    def _doubt(self, number: int, name: str, rows: int) -> None:
        """Calls of a number give a layer rows in several ways: code that relies on one of them is not used again."""
        if self._anywhere.get((number, name, rows), UNIFORM) is not None:
            self._anywhere[number, name, rows] = None
            self.doubts[number] = self.doubts.get(number, 0) + 1

    def note_read(self, layer: Any) -> None:
        """The weight of a layer is read in eager code, by the layer or by something else."""
        name = layer.lora_name
        if (
            self.named
            and name not in self.block.called
            and name not in self.block.read
            and not only_looks(sys._getframe(2))
        ):
            self.block.read.add(name)

    def unreached(self, block: Any) -> Any:
        """Layers that were left out of a block: their weight was read, and they were not called."""
        traced = {name for name, node in self.traced_reads.items() if not node._erased and node.users}
        return (block.read - block.called | traced) - self.traced_calls

    def _abandon(self) -> None:
        """Whatever an interrupted call has left behind."""
        watch = self._watch
        self._stop_watching()
        if watch is not None:
            watch.forget()
        self._depth, self._entered, self._late, self._proof, self._given = 0, None, False, {}, ((), {})

    def _stop_watching(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    # Eager calls.

    def _layout(self, layer: Any, inputs: Tensor, features: int) -> Layout | Picked:
        key = layer.lora_name, inputs.dim()
        if self._watch is not None:
            found = self._watch.layout_of(inputs, features)
            if isinstance(found, str):
                if self.uniform:
                    return UNIFORM
                raise self.unproved(layer.lora_name, inputs, found)
            if isinstance(found, Picked):
                self._picked.add(layer.lora_name)
                self._picked_now.add((layer.lora_name, inputs.dim() - features))
                # A checkpoint that runs the layer again cannot know which of them it gets.
                self._shown[key] = None
                return found
            if self._proof.setdefault(key, found) != found:
                raise self.unproved(layer.lora_name, inputs, "one call of the model gives it rows in two orders")
            self._found[layer.lora_name, inputs.dim() - features] = found
            return found
        if self.uniform and not self._must_serve_others(inputs.device):
            return UNIFORM
        known = self._proof.get(key)
        if known is None and self._depth == 0 and torch.is_grad_enabled() and current_backward() is not None:
            # A checkpoint runs a part again that no `Entry` hooks, as a block of a list of blocks.
            known = self._shown.get(key)
        # Not of a layer that is called by itself afterwards.
        compiled = self._compiled and (self._depth > 0 or current_backward() is not None)
        if known is None and compiled:
            rows = inputs.shape[: inputs.dim() - features]
            known = self.known_anywhere(layer.lora_name, rows, self.number_of_running())
        if known is not None:
            return known
        if self.uniform and not is_capturing(inputs.device):
            return UNIFORM
        if compiled:
            why = "torch.compile left it to Python, and no call that was followed has reached it"
            number = self.number_of_running()
            raise self.unproved(layer.lora_name, inputs, *self.why_unknown(layer.lora_name, rows, number, why))
        if layer.lora_name in self._picked and torch.is_grad_enabled() and current_backward() is not None:
            why = "the model picks its rows by values, and a checkpoint runs it again"
            raise self.unproved(layer.lora_name, inputs, why, "Switch gradient checkpointing off for this model.")
        if key in self._shown and torch.is_grad_enabled() and current_backward() is not None:
            why = "calls of this block gave it rows in several ways, and a checkpoint runs one of them again"
            raise self.unproved(
                layer.lora_name, inputs, why, "Give each call and its backward pass a block of their own."
            )
        if self._entered is not None:
            self._follow_again()
            why = "earlier calls with such inputs did not reach it, so that their rows were not followed to it"
            raise self.unproved(layer.lora_name, inputs, why, "Call the model again: that call is followed.")
        why = "it was not called by the model, or by a part of it that is followed"
        part = f"use(..., parts={{{layer.lora_name!r}: names}})"
        raise self.unproved(layer.lora_name, inputs, why, f"Call the model, or name it as a part: {part}.")

    def _must_serve_others(self, device: torch.device) -> bool:
        """Whether what runs now may be captured, and replayed when sequences have different adapters."""
        return device.type != "cpu" and self.sequence_slots is not None and len(self.sequence_slots) > 1

    def _rows_by(self, layout: Layout, slots: Tensor, shape: torch.Size, layer: Any) -> Tensor:
        """The slot of each row: -1, too, of tokens for which the adapter of their sequence does not count."""
        rows = slots[:1].expand(shape.numel()) if layout.dimension < 0 else layout.rows(slots, shape)
        counts, batch = self.active_tokens, slots.shape[0]
        if counts is None or not layer.lora_site.has_tokens or (layout.dimension < 0 and batch > 1):
            return rows
        if not is_compiling() and self.block.prompt is None and slots.device.type == "cpu":
            # Elsewhere a graph that is captured now may be replayed for others.
            return rows
        # As PEFT goes by the last tokens of what a layer is given, so that its rows have to be those of the prompts.
        if not (
            len(shape) in (1, 2) and shape[0] == batch and (batch == 1 or (layout.dimension, layout.outer) == (0, 1))
        ):
            raise self.unproved(layer.lora_name, shape, _PLACES_WANTED, "Leave the module out with exclude_modules.")
        tokens = shape[1] if len(shape) == 2 else 1
        if not is_compiling() and self.block.prompt is not None and tokens > self.block.prompt:
            got = f"{tokens} tokens, where the prompts have {self.block.prompt}"
            remedy = "Open the block with the input_ids that the model is called with, and generate with a cache."
            raise BatchError("bank.use: input_ids", "calls with the prompts, or with tokens behind them", got, remedy)
        places = torch.arange(tokens, device=slots.device)
        is_active = places >= tokens - counts.unsqueeze(1)
        return torch.where(is_active.view(-1), rows, -1)

    def _check_fits(self, layout: Layout, slots: Tensor, shape: Sequence[int], layer: Any) -> None:
        if not (layout.takes(shape[layout.dimension], slots.shape[0]) and self.keeps_apart(layout)):
            self._follow_again(keep=False)
            why = "earlier calls with such inputs gave it rows in another way"
            raise self.unproved(layer.lora_name, shape, why, "Call the model again: that call is followed.")

    def keeps_apart(self, layout: Layout) -> bool:
        """Whether no row has tokens of two sequences, where several tokens of a packed batch become one row."""
        return layout.inner >= 0 or not any(length % -layout.inner for length in self.lengths or ())

    def _follow_again(self, *, keep: bool = True) -> None:
        """Have the next call of this kind be followed."""
        if self._entered is not None and self._entered[0] is not None:
            kind, sizes, _ = self._entered
            known = {**self._proofs.pop(kind, {}), **self._proofs.pop((kind, sizes), {})}
            self._stale[kind] = known if keep else {}

    def _may_be_batch(self, inputs: list[tuple[str, Any]]) -> bool:
        """Whether some input may hold as many sequences as there are names, in whatever way."""
        assert self.sequence_slots is not None  # noqa: S101 - for the type checker
        size = self.sequence_slots.shape[0]
        tensors = [value for _, value in inputs if isinstance(value, Tensor) and value.dim()]
        # The last dimension holds features, but for tokens.
        shapes = [tensor.shape[:-1] if tensor.is_floating_point() else tensor.shape for tensor in tensors]
        return not tensors or (size > 1 and (any(size in shape for shape in shapes) or len(tensors) == size))

    def _batched(self, module: nn.Module, inputs: list[tuple[str, Any]]) -> dict[str, int]:
        """The inputs that hold the batch, and along which dimension."""
        assert self.sequence_slots is not None  # noqa: S101 - for the type checker
        found = {}
        for name, value in inputs:
            if isinstance(value, Tensor):
                dimension = self.batch_dimension(module, name, value.shape, inputs, self.sequence_slots.shape[0])
                if dimension is not None:
                    found[name] = dimension
        return found

    def batch_dimension(
        self, module: nn.Module, name: str, shape: Sequence[Any], inputs: list[tuple[str, Any]], size: Any
    ) -> int | None:
        """The dimension of an input that holds the batch, or the tokens of a packed one; None where no one does.

        Args:
            module: that was called.
            name: of the input.
            shape: of the same. While Dynamo traces, a symbolic size is settled by a guard.
            inputs: all of the call.
            size: the number of sequences; of a packed batch that of tokens.
        """
        if not shape or not may_hold_the_batch(name, len(shape)) or is_media(name, inputs, self.own_main_input()):
            return None
        if self.own_main_input() not in (None, name) and self._part_of(module):
            # A tower or a projector that is called by itself, as `generate` does, may get anything.
            return None
        packed = self.lengths is not None
        is_row = packed and len(shape) > 2 and (not self.part or bool(shape[0] == 1))
        if bool(shape[0] == size) and not is_row:
            return 0
        return 1 if packed and len(shape) > 1 and bool(shape[1] == size) else None

    def _part_of(self, module: nn.Module) -> str:
        """The name of a module that reads no text, and that can be named as a part; empty for others."""
        return next((part for part in self.parts if self.entries.get(part) is module), "")

    def own_main_input(self) -> str | None:
        """The model's main input, where that says which other inputs are media; None for a part."""
        # What a user has named a part of the model is told whose its inputs are.
        return None if self.part else self.main_input

    def _mark(self, watch: Watch, inputs: list[tuple[str, Any]], batched: dict[str, int]) -> None:
        for name, value in inputs:
            if not isinstance(value, Tensor):
                continue
            mask = "mask" in name
            if name in batched:
                watch.own(value, self.owners(batched[name], value.dim()), mask=mask)
            else:
                cause = f"from the input {name} {list(value.shape)}"
                watch.own(value, constant(UNKNOWN, value.dim()), cause, mask=mask)

    def entered_inputs(self, module: nn.Module | None) -> dict[int, tuple[int | None, str]]:
        """The inputs of a module that was entered eagerly, by identity: along which dimension they hold the batch."""
        if module is None or self._entered is None or self._entered[2] is not module:
            return {}
        inputs = named_inputs(module, *self._given)
        batched = self._batched(module, inputs)
        return {id(value): (batched.get(name), name) for name, value in inputs if isinstance(value, Tensor)}

    def is_inside_another(self, module: nn.Module) -> bool:
        """Whether the inputs of another module say whose rows these are: one that holds this one and is running.

        Or this one lies in a part that has names of its own in this block.
        """
        prefix = next((name for name, entry in self.entries.items() if entry is module), "")
        parts = () if self.block is None else self.block.parts
        inner = [part for part in parts if part != self.part and _is_within(part, self.part)]
        if any(prefix == part or _is_within(prefix, part) for part in inner):
            return True
        holders = [entry for name, entry in self.entries.items() if prefix and _is_within(prefix, name)]
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and ("forward" in code.co_name or "_call_impl" in code.co_name):
                # Whatever the method calls its object.
                running = frame.f_locals.get("self", frame.f_locals.get(code.co_varnames[0]))
                if any(running is holder for holder in holders):
                    return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def known_anywhere(self, name: str, shape: Sequence[int], number: int) -> Layout | None:
        """What eager calls have shown of a layer, if all of them agree and nothing else is as long as the batch.

        Args:
            name: of the layer.
            shape: of its input without the features.
            number: of the calls, see `number_of`.
        """
        layout = self._anywhere.get((number, name, len(shape)))
        return None if self._is_ambiguous(layout, shape) else layout

    def _is_ambiguous(self, layout: Layout | None, shape: Sequence[int]) -> bool:
        """Whether another dimension is as long as the batch."""
        assert self.sequence_slots is not None  # noqa: S101 - for the type checker
        others = [size for at, size in enumerate(shape) if layout is not None and at != layout.dimension]
        return any(bool(size == self.sequence_slots.shape[0]) for size in others)

    def why_unknown(self, name: str, shape: Sequence[int], number: int, otherwise: str) -> tuple[str, str]:
        """Say why `known_anywhere` knows nothing, and what to do.

        Args:
            name: of the layer.
            shape: of its input without the features.
            number: of the calls.
            otherwise: why the rows are asked for, where no call has shown anything.
        """
        key = number, name, len(shape)
        if key not in self._anywhere:
            return otherwise, tracing.CALL_ONCE
        if name in self._picked:
            why = "the model picks its rows by values, as a router picks those of an expert"
            return why, "Call this model without torch.compile, or give all sequences the same adapter."
        several = self._anywhere[key] is None
        why = "calls without torch.compile gave it rows in several ways" if several else "another size is the batch's"
        remedy = (
            f"Call the model without torch.compile for such inputs{'' if several else ', or with another length'}; or "
            "leave the module out with exclude_modules, or give all sequences the same adapter."
        )
        return why, remedy

    def number_of(self, module: nn.Module, inputs: list[tuple[str, Any]]) -> int:
        """A number for all calls that differ in nothing but sizes, dtypes and modes; -1 where that is not known.

        By it, code that was compiled behind a break of the graph knows what eager calls have shown.
        """
        described = [
            (name, value.dim() if isinstance(value, Tensor) else described_as(value)) for name, value in inputs
        ]
        kind: Hashable = type(module), tuple(self.block.parts), self.lengths is None, self._flags(), tuple(described)
        try:
            return self._numbers.setdefault(kind, len(self._numbers))
        except TypeError:
            return -1

    def _flags(self) -> Hashable:
        """The flags of the modules that people call; those inside of them are not looked at."""
        flags: list[Hashable] = []
        for prefix, entry in self.entries.items():
            found = ((name, value) for name, value in vars(entry).items() if value.__class__ in _FLAGS)
            # That it was given to `torch.compile` changes no row.
            flags += [(prefix, name, value) for name, value in found if name != "_is_torch_compile"]
        return tuple(flags)

    def _looks_at_masks(self, kind: Hashable) -> bool:
        """Whether a kind says what masks look like."""
        return isinstance(kind, tuple) and kind[0] in self._kinds_that_look

    def owners(self, dimension: int, dimensions: int) -> Tensor:
        """The owners of an input that holds the batch along a dimension."""
        assert self.sequence_slots is not None  # noqa: S101 - for the type checker
        if self.lengths is None:
            owners = along(dimension, dimensions, self.sequence_slots.shape[0])
            # One number for each of as many things as sequences may be something else: positions of tokens.
            return owners + GUESS if dimensions == 1 else owners
        sequences = torch.arange(len(self.lengths), dtype=torch.int32).repeat_interleave(torch.tensor(self.lengths))
        return sequences.view([-1 if at == dimension else 1 for at in range(dimensions)])

    def _kind(self, module: nn.Module, prefix: str, inputs: list[tuple[str, Any]], batched: dict[str, int]) -> Hashable:
        """What two calls have in common whose rows come about in the same way: all but how long things are.

        None where something else is as long as the batch: such a call has nothing in common with others.
        """
        assert self.sequence_slots is not None  # noqa: S101 - for the type checker
        size = self.sequence_slots.shape[0]
        described: list[Hashable] = []
        for name, value in inputs:
            if isinstance(value, Tensor):
                # Lengths by powers of two, since a model may do something else with long inputs.
                sizes = tuple("batch" if length == size else length.bit_length() for length in value.shape)
                if sizes.count("batch") > (name in batched):
                    return None
                described.append((name, sizes, value.dtype))
            else:
                described.append((name, described_as(value)))
        modes: tuple[Hashable, ...] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        modes = *modes, self._flags()
        kind = prefix, tuple(self.block.parts), self.lengths is None, modes, tuple(described)
        try:
            hash(kind)
        except TypeError:
            # An input that is like no other.
            return None
        return (kind, _masks_of(inputs)) if kind in self._kinds_that_look else kind

    def _check_result(self, watch: Watch, module: nn.Module, result: Any) -> None:
        """A model whose results all mix the sequences was not given the batch as it was said."""
        tensors = [value for _, value in named_inputs(module, (), {"result": result}) if isinstance(value, Tensor)]
        large = [tensor for tensor in tensors if tensor.dim() > 2 and watch.known(tensor) is not None]
        if large and all(watch.is_mixed(tensor) for tensor in large):
            raise UnprovedRowsError(
                f"bank.use: {type(module).__name__}",
                "a model that keeps the sequences of the batch apart",
                "one whose results mix what was said to be different sequences",
                "The batch must be the first dimension of the inputs: give the model, or its layers, batch_first=True.",
            )

    def _note_call(self, layer: Any) -> None:
        self.block.called.add(layer.lora_name)
        last = self.called.get(layer.lora_name)
        if torch.is_grad_enabled() and (task := current_backward()) is not None:
            # A checkpoint runs the layer again, as often as the block has run it.
            if last is None or last[0] is not self.block:
                raise _outside_backward(layer)
            again = last[3] + 1 if last[2] == task else 1
            if again > last[1]:
                raise _outside_backward(layer)
            self.called[layer.lora_name] = last[0], last[1], task, again
        else:
            count = last[1] + 1 if last is not None and last[0] is self.block else 1
            self.called[layer.lora_name] = self.block, count, None, 0

    def _note_call_without_block(self, layer: Any) -> None:
        if torch.is_grad_enabled() and current_backward() is not None:
            if layer.lora_name in self.called:
                raise _outside_backward(layer)
        else:
            self.called.pop(layer.lora_name, None)

    def check_caller(self) -> None:
        """Raise OutsideBlockError for a call from a thread or task without a block, unless it is a backward pass's."""
        # The threads of autograd have no context of their own.
        if current_backward() is not None:
            return
        self.raise_for_caller("one from another, which has none")

    def raise_for_caller(self, got: str) -> None:
        """Raise OutsideBlockError."""
        raise OutsideBlockError(
            "bank.use",
            "a call from the thread or task that opened the `use` block",
            got,
            "Run the model in the thread or task of the block, or wait for its end.",
        )

    def _check_device(self, inputs: Tensor, slots: Tensor) -> None:
        if inputs.device != slots.device:
            raise BatchError(
                "bank.use",
                f"a batch on {slots.device}, where the model was when the block was entered",
                f"one on {inputs.device}",
                "Move the model before the block.",
            )

    def _raise_batch_size(self, module: nn.Module, inputs: list[tuple[str, Any]]) -> None:
        if part := self._part_of(module):
            shape = next((value.shape for _, value in inputs if isinstance(value, Tensor)), ())
            raise self.unproved(part, shape, f"{UNSAID}, since the part was called by itself")
        tensors = [(name, value) for name, value in inputs if isinstance(value, Tensor) and value.dim()]
        shown = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors[:4])
        batch = tensors[0][1].shape[0] if tensors else 0
        raise self.batch_error(f"{self._mismatch(batch)}: {shown or 'no tensor'}")

    def batch_error(self, got: str) -> BatchError:
        """The error for inputs that hold another number of sequences than this has names for."""
        return batch_error(got, part=self.part, packed=self.lengths is not None)

    def _mismatch(self, batch: Any) -> str:
        if self.sequence_slots is None:
            return f"a batch of {batch}"
        if self.lengths is not None:
            return f"lengths of {self.sequence_slots.shape[0]} in all for inputs of other sizes"
        return f"{counted(self.sequence_slots.shape[0], 'name')} for a batch of {batch}"

    def unproved(self, name: str, inputs: Any, why: str, remedy: str | None = None) -> UnprovedRowsError:
        """The error for a layer whose rows nobody can tell."""
        shape = list(inputs.shape if isinstance(inputs, Tensor) else inputs)
        number = (
            ""
            if self.sequence_slots is None
            else f" of {counted(len(self.lengths or self.sequence_slots), 'sequence')}"
        )
        inside = [part for part in self.parts if name == part or name.startswith(f"{part}.")]
        part = min(inside, key=len, default=name)
        if why.startswith(UNSAID) and self.part:
            say = f"Say how many rows each of these names has: use(..., parts={{{self.part!r}: (names, lengths)}})"
        elif why.startswith(UNSAID):
            say = f"Say whose rows that part of the model has: use(names, parts={{{part!r}: names_of_its_rows}})"
        else:
            say = "Leave the module out with exclude_modules"
        return UnprovedRowsError(
            f"bank.use: {name}",
            f"rows that are known to be those{number}",
            f"an input of shape {shape}: {why}",
            remedy or f"{say}, or give all sequences the same adapter.",
        )

    # While Dynamo traces.

    def _traced_rows_of(self, layer: Any, inputs: Tensor, features: int, slots: Tensor) -> Tensor:
        if inputs.device != slots.device:
            self._check_device(inputs, slots)
        dimension, outer, inner = tracing.layout_of(self, layer, inputs, features)
        shape = inputs.shape[: inputs.dim() - features]
        layout = Layout(dimension, outer, inner)
        if dimension >= 0 and not layout.takes(shape[dimension], slots.shape[0]):
            raise self.batch_error(self._mismatch(shape[0]))
        return self._rows_by(layout, slots, shape, layer)


def _masks_of(inputs: list[tuple[str, Any]]) -> Hashable:
    """What the masks among a call's inputs look like."""
    return tuple((name, shape_of_mask(value)) for name, value in inputs if "mask" in name and isinstance(value, Tensor))


def _is_nested(module: nn.Module) -> bool:
    """Whether a call of a module, which begins now, lies in another call of it."""
    calls, frame = 0, sys._getframe(1)
    while frame is not None and calls < 2:
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1


def _is_within(name: str, holder: str) -> bool:
    return name != holder and (not holder or name.startswith(f"{holder}."))


def _outside_backward(layer: Any) -> OutsideBlockError:
    return OutsideBlockError(
        f"bank.use: {layer.lora_name}",
        "a backward pass inside the `use` block of its forward pass",
        "one that recomputes the layer outside of it",
        "Call backward() before the block ends: a checkpoint runs the model again, with the adapters of that moment.",
    )


class LostRouting:
    """What a copied or unpickled layer has in the place of its routing: no bank sets it."""

    slots = ranks = None

    def rows_of(self, layer: Any, inputs: Tensor, features: int) -> Tensor | None:
        """Say so.

        Raises:
            CopiedModelError: always.
        """
        raise CopiedModelError(
            f"xlc: {layer.lora_name}",
            "a model that belongs to a bank",
            "a copy of one, which no bank knows",
            "Call xlc.attach(copy) for a bank of its own, or xlc.detach(copy) for the plain model.",
        )

    def note_read(self, layer: Any) -> None:
        """Nothing: a copy may be looked at."""

    def enter(self, *_: Any) -> None:
        """Nothing: the first layer says what is wrong."""

    def leave(self, *_: Any) -> None:
        """Nothing."""


class Entry:
    """Hooks of a module that people call: they tell its routing where a call begins and ends."""

    def __init__(self, prefix: str, routing: Any) -> None:
        self.prefix = prefix
        self.routing = routing

    @run_by_python
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook, with keywords."""
        if not is_compiling():
            out_of_sight(self.routing.enter, module, self.prefix, args, kwargs)
        elif self.routing.sequence_slots is not None:
            number = tracing.enter(self.routing, self.routing.sequence_slots, module, args, kwargs)
            if number is not None:
                # Where the graph breaks, Dynamo has this written before it goes on.
                self.routing.running = number

    @run_by_python
    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """A forward hook that is called after failures, too."""
        if not is_compiling():
            out_of_sight(self.routing.leave, result)
        elif self.routing.sequence_slots is not None:
            tracing.leave(self.routing)

    def hook(self, module: nn.Module) -> list[Any]:
        """Register both; returns their handles."""
        return [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]
