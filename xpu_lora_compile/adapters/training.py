"""Adapters of a bank that are trained: their parameters, which are views of their slots, and the folders of both kinds.

    bank.trainable([...]) -> TrainedSlots of each layer, read by its forward -> gradients -> any optimizer -> the slots

A slot holds B with the scaling of its adapter multiplied in. One that is trained holds B as PEFT does, and the op
multiplies by the scaling, so that an optimizer takes the same steps as with PEFT.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import WEIGHTS_FILE, Checkpoint, Extras, ModuleSizes, Pair
from xpu_lora_compile.adapters.config import CONFIG_FILE, is_targeted
from xpu_lora_compile.adapters.files import few
from xpu_lora_compile.adapters.names import PREFIX, parse_key
from xpu_lora_compile.errors import AdapterError, UnsupportedAdapterError
from xpu_lora_compile.torch_internals import queue_after_backward

# Fields of adapter_config.json for which a slot holds more than A and B.
_MORE_THAN_A_AND_B = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens")
_PARTS = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}


@dataclass(frozen=True)
class _Member:
    """An adapter in a slot that is trained: its name, and its A `[r, D]` and B `[W, r]`, views of the slot."""

    name: str
    slot: int
    a: nn.Parameter
    b: nn.Parameter


class _Shared:
    """What the layers of a bank share.

    Attributes:
        named: the adapters of the innermost `use` block, or of the last one.
    """

    def __init__(self) -> None:
        self.named: Collection[str | None] = ()
        self._tensors: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()
        # Parts that adapters get which the block does not name, each with whether it is more than zeros.
        self._others: list[tuple[_Part, Tensor, Tensor]] = []

    def __reduce__(self) -> tuple[type[_Shared], tuple[()]]:
        # A copy shares nothing with what it was made from.
        return _Shared, ()

    def tensor(self, values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """One tensor of these values for all that ask, which nobody changes."""
        key = values, dtype, device
        found = self._tensors.get(key)
        if found is None:
            found = self._tensors[key] = torch.tensor(values, dtype=dtype, device=device)
        return found

    def give_later(self, part: _Part, gradient: Tensor, has_some: Tensor) -> None:
        """Give a parameter its gradient at the end of the backward pass, unless that is all zeros.

        Args:
            part: of a leaf's gradient.
            gradient: of the adapter.
            has_some: whether it is more than zeros: read once for all, since a read waits for a GPU.
        """
        self._others.append((part, gradient, has_some))

    def give_now(self) -> None:
        """Do what `give_later` has put off."""
        others, self._others = self._others, []
        for device in {gradient.device for _, gradient, _ in others}:
            mine = [other for other in others if other[1].device == device]
            flags = torch.stack([has_some for *_, has_some in mine]).tolist()
            for (part, gradient, _), has_some in zip(mine, flags, strict=True):
                if has_some:
                    part.give(gradient, copies=True)


class TrainedSlots:
    """The slots of one layer that are trained.

    The parameters of an adapter are views of its slot, and no part of any graph. The gradients of all adapters come to
    two leaves, and are handed out from there: one leaf for each parameter would take autograd longer than the layer.

    Args:
        stacks: A `[K, R, D]` and B `[K, W, R]` of the layer.
        shared: with the other layers.

    Attributes:
        slots: `[n]`, their numbers.
        leaf_a: `[n, R, D]`, without memory of its own, which autograd gives the gradients of A.
        leaf_b: likewise `[n, R, W]` those of B.
        scalings: `[K]`, float32: the scaling of each slot that is trained, and 1 of all others, which B has in it.
            Layers with the same values share one tensor, so that a compiler sees that they are the same. So of `slots`.
        rates: of dropout, each once; none where nothing is dropped.
    """

    slots: Tensor
    leaf_a: Tensor
    leaf_b: Tensor
    scalings: Tensor

    def __init__(self, stacks: tuple[Tensor, Tensor], shared: _Shared) -> None:
        self._stacks = stacks
        self._shared = shared
        self._members: tuple[_Member, ...] = ()
        self._factors = (1.0,) * len(stacks[0])
        self.rates: tuple[float, ...] = ()
        # Position of each slot's rate, or -1.
        self._rate = torch.full((len(stacks[0]),), -1, device=stacks[0].device)
        self._have((), self._factors)

    def __len__(self) -> int:
        return len(self._members)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: it computes the same, and gives no gradients to parameters that are not its own."""
        return vars(self) | {"leaf_a": self.leaf_a.detach(), "leaf_b": self.leaf_b.detach()}

    def fits(self, lora_a: Tensor, columns: int) -> bool:
        """Whether its leaves are those of a call with this A and so many columns."""
        of_a = self.leaf_a.dtype == lora_a.dtype and self.leaf_a.device == lora_a.device
        return of_a and self.leaf_b.shape[2] == columns

    def is_of(self, a: Tensor, b: Tensor) -> bool:
        """Whether these are its stacks."""
        return self._stacks[0] is a and self._stacks[1] is b

    def add(self, name: str, slot: int, a: Tensor, b: Tensor, scaling: float, rate: float) -> tuple[nn.Parameter, ...]:
        """Train a slot, whose A and B these are, and which has not been trained yet; return its parameters."""
        member = _Member(name, slot, nn.Parameter(a.detach()), nn.Parameter(b.detach()))
        if rate:
            self.rates = tuple(dict.fromkeys((*self.rates, rate)))
            self._rate[slot] = self.rates.index(rate)
        self._have((*self._members, member), self._factors_with(slot, scaling))
        return member.a, member.b

    def remove(self, slot: int) -> None:
        """Train a slot no more."""
        self._rate[slot] = -1
        members = tuple(member for member in self._members if member.slot != slot)
        self._have(members, self._factors_with(slot, 1.0))

    def _factors_with(self, slot: int, scaling: float) -> tuple[float, ...]:
        return tuple(scaling if at == slot else factor for at, factor in enumerate(self._factors))

    def _have(self, members: tuple[_Member, ...], factors: tuple[float, ...]) -> None:
        stack_a, stack_b = self._stacks
        (_, rank, features), width, count = stack_a.shape, stack_b.shape[1], len(members)
        self._members, self._factors = members, factors
        self.slots = self._shared.tensor(tuple(member.slot for member in members), torch.int64, stack_a.device)
        self.scalings = self._shared.tensor(self._factors, torch.float32, stack_a.device)
        self.leaf_a = nn.Parameter(stack_a.new_empty(1).expand(count, rank, features), bool(count))
        self.leaf_b = nn.Parameter(stack_b.new_empty(1).expand(count, rank, width), bool(count))
        if not count:
            return
        # The hooks hold no leaf: Python does not see the way from a leaf to its hooks, and would never free them.
        for leaf, is_b in ((self.leaf_a, False), (self.leaf_b, True)):
            parts = [_Part.of(member.name, member.b if is_b else member.a, is_b, leaf) for member in members]
            leaf.register_post_accumulate_grad_hook(partial(_hand_out, self._shared, parts, is_b))

    def dropped(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Rows `[T, D]` with some elements of those of trained slots set to 0, as PEFT does before A."""
        rate_of = torch.where(indices >= 0, self._rate[indices.clamp(min=0)], -1)[:, None]
        for position, rate in enumerate(self.rates):
            rows = torch.where(rate_of == position, nn.functional.dropout(rows, rate), rows)
        return rows


class _Part(NamedTuple):
    """Which part of a leaf's gradient goes to a parameter.

    Attributes:
        name: of the adapter.
        parameter: A `[r, D]` or B `[W, r]`.
        cut: of the adapter's `[R, D]` or `[W, R]`; None for all.
        is_laid_otherwise: whether its elements lie in another order than the parameter's.
    """

    name: str
    parameter: nn.Parameter
    cut: tuple[slice, ...] | None
    is_laid_otherwise: bool

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter, is_b: bool, leaf: Tensor) -> _Part:
        """The part of a parameter, of B in a leaf that has it turned."""
        _, rank, length = leaf.shape
        whole, strides = ((length, rank), (1, length)) if is_b else ((rank, length), (length, 1))
        cut = None if parameter.shape == whole else tuple(map(slice, parameter.shape))
        return cls(name, parameter, cut, parameter.stride() != strides)

    def give(self, gradient: Tensor, *, copies: bool) -> None:
        """Add an adapter's gradient to the parameter's, as autograd would, and run the hooks that wait for it.

        Args:
            gradient: of A `[R, D]`, or of B `[W, R]`.
            copies: whether the parameter gets memory of its own: a part keeps that of all adapters.
        """
        parameter = self.parameter
        if parameter._backward_hooks:
            check_has_no_hook(f"{self.name!r}", parameter)
        mine = gradient if self.cut is None else gradient[self.cut]
        if parameter.grad is not None:
            parameter.grad.add_(mine)
        elif self.is_laid_otherwise:
            # Optimizers that read both in one order (`fused=True`) want one layout.
            parameter.grad = mine.contiguous()
        else:
            parameter.grad = mine.clone() if copies else mine
        for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
            hook(parameter)


def _hand_out(shared: _Shared, parts: list[_Part], is_b: bool, leaf: Tensor) -> None:
    """Give each adapter's parameter its part of the gradient that has come to a leaf, as autograd would.

    An adapter that the block does not name has no rows, and gets no zeros, with which an optimizer would do a step. But
    what a block around it, or one before it, has computed reaches its adapters.
    """
    whole, leaf.grad = leaf.grad, None
    if whole is None:
        return
    gradients = (whole.transpose(1, 2) if is_b else whole).unbind()
    are_named = [part.name in shared.named for part in parts]
    has_some = () if all(are_named) else whole.flatten(1).any(1).unbind()
    for at, (part, gradient, is_named) in enumerate(zip(parts, gradients, are_named, strict=True)):
        if is_named and part.parameter.requires_grad:
            part.give(gradient, copies=bool(has_some))
        elif part.parameter.requires_grad:
            shared.give_later(part, gradient, has_some[at])
    if has_some:
        # For each leaf, since a backward pass that fails calls nothing.
        queue_after_backward(shared.give_now)


def check_has_no_hook(where: str, parameter: Tensor) -> None:
    """Refuse a parameter with a hook that nobody would run.

    Raises:
        AdapterError: it has one.
    """
    if parameter._backward_hooks:
        remedy = "Use register_post_accumulate_grad_hook, or change the gradient after backward."
        wanted, got = "a parameter without hooks of register_hook, which is no part of a graph", "one with such a hook"
        raise AdapterError(f"bank.trainable: {where}", wanted, got, remedy)


class TrainableLayer(Protocol):
    """What a layer offers whose slots may be trained."""

    lora_site: ModuleSizes
    lora_a: Tensor
    lora_b: Tensor
    lora_training: TrainedSlots | None

    def places(
        self, slot_a: Tensor, slot_b: Tensor, shape_a: tuple[int, int], shape_b: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Views of one slot's memory that an adapter's A and B of these shapes fill."""


@dataclass(frozen=True)
class Loaded:
    """What was in the folder of an adapter besides the values.

    Args:
        values: of adapter_config.json.
        pairs: the A and B of each module, by the module's name.
        extras: what it has of modules besides.
        experts: the parameters of experts that it has LoRA on.
    """

    values: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    extras: Mapping[str, Extras]
    experts: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, checkpoint: Checkpoint) -> Loaded:
        """Remember a folder that has been checked."""
        values = json.loads((folder / CONFIG_FILE).read_bytes())
        return cls(values, dict(checkpoint.pairs), dict(checkpoint.extras), tuple(checkpoint.experts))

    @property
    def dropout(self) -> float:
        """How much of what comes to A is dropped while training."""
        return float(self.values.get("lora_dropout") or 0.0)

    def check_is_plain(self, where: str, what: str) -> None:
        """Refuse an adapter that has more than A and B.

        Raises:
            UnsupportedAdapterError: it has.
        """
        more = [f"{name}={self.values[name]!r}" for name in _MORE_THAN_A_AND_B if self.values.get(name)]
        if self.values.get("bias", "none") != "none":
            more.append(f"bias={self.values['bias']!r}")
        if any(pair.scaling == 0 for pair in self.pairs.values()):
            more.append("lora_alpha=0, with which a slot holds no B")
        if self.experts:
            more.append(f"LoRA on the experts' {few(self.experts)}")
        if more:
            remedy = "Use PEFT for it, or train an adapter without these."
            raise UnsupportedAdapterError(where, f"an adapter of A and B alone, to {what}", ", ".join(more), remedy)


class Training:
    """Which adapters of a bank are trained.

    Args:
        layers: of the bank, by plain name.
    """

    def __init__(self, layers: Mapping[str, TrainableLayer]) -> None:
        self._layers = layers
        self._shared = _Shared()
        # Of each adapter the parameters, by PEFT's names.
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._loaded: dict[str, tuple[int, Loaded]] = {}
        # The stacks that the parameters are views of, and where each parameter lies.
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._places: dict[str, list[int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are trained."""
        return tuple(self._parameters)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters of an adapter, by PEFT's names.

        Raises:
            AdapterError: it is not trained.
        """
        if name not in self._parameters:
            got = f"one that is not; trained are {', '.join(self.names) or 'none'}"
            raise AdapterError(f"parameters of {name!r}", "an adapter that is trained", got, "Call bank.trainable().")
        return self._parameters[name]

    def check_can_be_trained(self, name: str, loaded: Loaded) -> None:
        """Raise UnsupportedAdapterError where an adapter has more than A and B of linear layers."""
        where = f"train {name!r}"
        loaded.check_is_plain(where, "be trained")
        tables = [module for module in loaded.pairs if self._layers[module].lora_site.kind == "embedding"]
        if tables:
            remedy = "Train an adapter without LoRA on embeddings, or this one with PEFT."
            raise UnsupportedAdapterError(where, "LoRA on linear layers", few(tables), remedy)
        # Their layers add LoRA in a way of their own, and know nothing of slots without scaling.
        if others := [module for module in loaded.pairs if self._layers[module].lora_site.by_name]:
            remedy = "Train an adapter without LoRA on routers and convolutions, or this one with PEFT."
            raise UnsupportedAdapterError(where, "LoRA on linear layers", few(others), remedy)

        for module, pair in loaded.pairs.items():
            layer = self._layers[module]
            _, b = layer.places(layer.lora_a[0], layer.lora_b[0], pair.shape_a, pair.shape_b)
            if b.device.type == "cpu" and _has_gaps(b):
                wanted = "B without gaps in memory, which torch's fused optimizers for CPUs would write into"
                got = f"one {list(b.shape)} in a slot {list(layer.lora_b.shape[1:])}"
                remedy = f"Attach with vocab_size={b.shape[0]} if it is that of a vocabulary, or max_rank={b.shape[1]}."
                raise UnsupportedAdapterError(f"{where}: {module}", wanted, got, remedy)

    def start(self, name: str, slot: int, loaded: Loaded) -> None:
        """Train an adapter, which can be and is not trained yet."""
        parameters: dict[str, nn.Parameter] = {}
        # A parameter that is made in inference mode could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            if not self._parameters:
                for layer in filter(_can_be_trained, self._layers.values()):
                    layer.lora_training = TrainedSlots((layer.lora_a, layer.lora_b), self._shared)
            for module, pair in loaded.pairs.items():
                layer = self._layers[module]
                stacks = self._stacks[module] = layer.lora_a, layer.lora_b
                training = layer.lora_training
                if training is None or not (len(training) or training.is_of(*stacks)):
                    training = layer.lora_training = TrainedSlots(stacks, self._shared)
                a, b = layer.places(layer.lora_a[slot], layer.lora_b[slot], pair.shape_a, pair.shape_b)
                b.copy_(_unscaled(b, pair.scaling))
                made = training.add(name, slot, a, b, pair.scaling, loaded.dropout)
                parameters |= zip(_keys(pair, "linear"), made, strict=True)
        self._parameters[name], self._loaded[name] = parameters, (slot, loaded)
        self._places[name] = [parameter.data_ptr() for parameter in parameters.values()]

    def stop(self, name: str) -> None:
        """Train an adapter no more: its B gets its scaling again."""
        slot, loaded = self._loaded.pop(name)
        for parameter in self._parameters.pop(name).values():
            parameter.grad = None
        del self._places[name]
        with torch.inference_mode(False), torch.no_grad():
            for module, pair in loaded.pairs.items():
                layer = self._layers[module]
                _, b = layer.places(layer.lora_a[slot], layer.lora_b[slot], pair.shape_a, pair.shape_b)
                b.copy_(b.to(torch.float32) * pair.scaling)
                training = layer.lora_training
                if training is not None:
                    training.remove(slot)
                    if not len(training):
                        self._stacks.pop(module, None)
        if not self._parameters:
            for layer in filter(_can_be_trained, self._layers.values()):
                layer.lora_training = None

    def check(self) -> None:
        """Raise AdapterError where parameters are no longer what the layers read: the model has been moved, say."""
        for module, (a, b) in self._stacks.items():
            layer = self._layers[module]
            if layer.lora_a is not a or layer.lora_b is not b:
                raise _moved(module, "a model that stays where it is while adapters are trained", "one that was moved")
        for name, parameters in self._parameters.items():
            # Each `use` comes here: all at once, and one by one where something is wrong.
            places = [parameter.data_ptr() for parameter in parameters.values()]
            if places != self._places[name]:
                pairs = zip(parameters, places, self._places[name], strict=True)
                key = next(key for key, place, its_place in pairs if place != its_place)
                raise _moved(f"{name!r}: {key}", "a parameter that is a view of its slot", "other memory")

    def check_hooks(self) -> None:
        """Raise AdapterError where a parameter has a hook that would not run."""
        for name, parameters in self._parameters.items():
            if any(parameter._backward_hooks for parameter in parameters.values()):
                for key, parameter in parameters.items():
                    check_has_no_hook(f"{name!r}: {key}", parameter)

    def name(self, named: Collection[str | None]) -> None:
        """Have these adapters take gradients, and others where there are some."""
        self._shared.named = named

    def drop_stale(self) -> None:
        """Train nothing where `check` would raise."""
        try:
            self.check()
        except AdapterError:
            for name in self.names:
                self.stop(name)

    def is_trained(self, name: str) -> bool:
        """Whether an adapter is trained, so that its B is without scaling."""
        return name in self._parameters


def _can_be_trained(layer: TrainableLayer) -> bool:
    """Whether slots of a layer may be trained: those of others it adds in a way of its own."""
    return layer.lora_site.kind == "linear" and not layer.lora_site.by_name


def _moved(where: str, wanted: str, got: str) -> AdapterError:
    remedy = "Call bank.trainable() again, and make new optimizers of the parameters that it gives."
    return AdapterError(f"bank.trainable: {where}", wanted, got, remedy)


def _has_gaps(tensor: Tensor) -> bool:
    """Whether memory between its elements is not its own."""
    return (
        sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1 != tensor.numel()
    )


def _unscaled(b: Tensor, scaling: float) -> Tensor:
    return b if scaling in (0, 1) else b.to(torch.float32) / scaling


def _keys(pair: Pair, kind: str) -> list[str]:
    """The names that PEFT gives to A and B of a module, which it may have called otherwise in the file."""
    return [
        f"{PREFIX}{parse_key(key).module}.{part}"
        for key, part in zip((pair.key_a, pair.key_b), _PARTS[kind], strict=True)
    ]


def save_adapter(
    folder: Path, loaded: Loaded, slot: int, layers: Mapping[str, TrainableLayer], *, is_scaled: bool
) -> None:
    """Write the adapter of a slot as PEFT does.

    Args:
        folder: made if it is not there.
        loaded: of the adapter, of A and B alone.
        slot: that it is in.
        layers: of the bank, by plain name.
        is_scaled: whether B has the scaling in it.

    Raises:
        UnsupportedAdapterError: it has more than A and B.
    """
    loaded.check_is_plain(f"save {folder}", "be saved")
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for module, pair in loaded.pairs.items():
            layer = layers[module]
            a, b = layer.places(layer.lora_a[slot], layer.lora_b[slot], pair.shape_a, pair.shape_b)
            b = _unscaled(b, pair.scaling).to(b.dtype) if is_scaled else b
            site = layer.lora_site
            if site.kernel:
                shape_a, shape_b = site.shapes_in_file(pair.rank)
                a, b = a.reshape(shape_a), b.reshape(shape_b)
            for key, value in zip(_keys(pair, site.kind), (a, b), strict=True):
                tensors[key] = value.detach().cpu().contiguous().clone()
    write_folder(folder, loaded.values, tensors)


def write_folder(folder: Path, values: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files of a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(dict(values), indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def fresh_tensors(ranks: Mapping[str, int], sites: Mapping[str, ModuleSizes]) -> dict[str, Tensor]:
    """A and B of an adapter that changes nothing yet, as PEFT makes them: A uniform, B zeros.

    Args:
        ranks: of each module that gets LoRA.
        sites: of the bank.
    """
    tensors: dict[str, Tensor] = {}
    for module, rank in ranks.items():
        a = torch.empty(rank, sites[module].in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(sites[module].out_features, rank)
    return tensors


def shortest_rule(modules: Sequence[str], others: Iterator[str]) -> list[str]:
    """Return target_modules that name these modules and none of the others: the ends of their names, if that does."""
    ends = sorted({module.rpartition(".")[2] for module in modules})
    return sorted(modules) if any(is_targeted(other, ends) for other in others) else ends
