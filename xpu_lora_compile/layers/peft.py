"""A model that PEFT has loaded: its layers of LoRA stay, and calls of the model run on the bank's.

    PeftModel.forward, .generate --Live.open--> slots of the adapters of this call --PEFT's layer--> its base layer

`attach` puts LoRA on the modules inside of PEFT's layers. A call of the model looks at PEFT's state, outside of
compiled code: which adapters are active, or named by `adapter_names`, and whether their weights and scaling are still
what their slots hold. Then it opens a block of the bank. In a block a layer of PEFT's calls the module inside, and
outside of all blocks it computes as before. So what a bank does not do (training, merged adapters) PEFT does itself.
"""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Token
from operator import attrgetter, is_
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from xpu_lora_compile.adapters.bank import AdapterBank, Block, Rows, device_of
from xpu_lora_compile.adapters.checkpoint import opened_checkpoint
from xpu_lora_compile.adapters.files import few
from xpu_lora_compile.adapters.live import SAVE_AND_ATTACH, adapter_in, factors, has_tokens, is_in
from xpu_lora_compile.adapters.names import BaseModel
from xpu_lora_compile.adapters.needs import naming
from xpu_lora_compile.errors import AdapterError, AttachError, LoraError, UnknownAdapterError
from xpu_lora_compile.layers import HOSTS, host_of
from xpu_lora_compile.layers.declared import Declared
from xpu_lora_compile.layers.host import full_name, have_hook_call, routing_of
from xpu_lora_compile.rows.inputs import leaves
from xpu_lora_compile.rows.routing import Entry
from xpu_lora_compile.torch_internals import look_again, look_away, prepare_for_tracing, run_by_python

_PEFT_MODEL, _LORA_MODEL = "peft.peft_model.PeftModel", "peft.tuners.lora.model.LoraModel"
_TUNER_LAYER, _LORA_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer", "peft.tuners.lora.layer.LoraLayer"
_WRAPPER = "peft.utils.other.AuxiliaryTrainingWrapper"
# As PEFT calls a row without an adapter.
_BASE = "__base__"
# A block of one call, and what ends it.
Opened: TypeAlias = tuple[Block, Token[Any]]
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def _is_a(module: object, name: str) -> bool:
    return any(full_name(kind) == name for kind in type(module).__mro__)


def is_peft_model(model: object) -> bool:
    """Whether a model is one of PEFT's, with whatever kind of adapters."""
    return _is_a(model, _PEFT_MODEL)


# Classes that calls of PEFT's modules go through: made once for each class of PEFT's.
_TAKEN: dict[type[nn.Module], type[nn.Module]] = {}


class _Taken(nn.Module):
    """A module of PEFT's while a bank serves its model; a copy, or what is unpickled, is PEFT's own again."""

    lora_live: Live
    # What an object has besides what PEFT has given it.
    _own = ("lora_live", "lora_routing", "lora_entry")

    def __reduce_ex__(self, protocol: Any) -> Any:
        found: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = found
        state = {name: value for name, value in state.items() if name not in self._own}
        return _new, (_plain_class(type(self)),), state, *rest


def _new(kind: type[nn.Module]) -> nn.Module:
    """Make an object of a class of PEFT's; pickled files name this function."""
    return kind.__new__(kind)


class _TakenLayer(_Taken):
    """A layer of PEFT's around a module with LoRA."""

    lora_routing: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In a block the module's output with LoRA of the bank; else what PEFT computes."""
        if routing_of(self).sequence_slots is None:
            return super().forward(x, *args, **kwargs)
        return self.lora_inside()(x)

    def lora_inside(self) -> nn.Module:
        """The module that PEFT has wrapped."""
        return cast("nn.Module", self._modules["base_layer"])

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT does; that changes no weights."""
        with self.lora_live.unchanged():
            super().set_adapter(*args, **kwargs)  # type: ignore[misc]

    def enable_adapters(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT does; that changes no weights."""
        with self.lora_live.unchanged():
            super().enable_adapters(*args, **kwargs)  # type: ignore[misc]


def _noted(name: str) -> property:
    """A dictionary of an adapter's weights: code that asks for it may change them in ways that leave no trace."""

    def get(self: Any) -> Any:
        if not is_compiling():
            self.lora_live.note_touch()
        return self._modules[name]

    return property(get)


class _TakenHead(_TakenLayer):
    """PEFT's wrapper of a module that adapters have a weight of their own for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `_TakenLayer.forward`."""
        if routing_of(self).sequence_slots is None:
            return super(_TakenLayer, self).forward(*args, **kwargs)
        return self.lora_inside()(*args, **kwargs)

    def lora_inside(self) -> nn.Module:
        """As `_TakenLayer.lora_inside`."""
        return cast("nn.Module", self._modules["original_module"])


class _TakenTokens(_TakenHead):
    """PEFT's wrapper of an embedding of which adapters have rows of their own."""

    def lora_inside(self) -> nn.Module:
        """As `_TakenLayer.lora_inside`."""
        return cast("nn.Module", cast("nn.Module", self._modules["token_adapter"])._modules["base_layer"])


class _TakenHolder(_Taken):
    """A module of PEFT's that holds the whole model."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As that of any module; whoever asks may change them in ways that leave no trace."""
        self.lora_live.note_touch()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As that of any module; whoever asks may change the values in ways that leave no trace."""
        self.lora_live.note_touch()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As that of any module, which may exchange parameters."""
        self.lora_live.note_touch()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As that of any module, which may exchange parameters."""
        self.lora_live.note_touch()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


class _TakenModel(_TakenHolder):
    """A PeftModel, of which `forward` and `generate` open a block of the bank."""

    @run_by_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, with the rows of the batch on slots of the bank.

        PEFT's own code asks for names of adapters, on which graphs would depend: Dynamo sees the base model alone.
        """
        if is_compiling():
            # Traced as a part of other code, where no block can be opened.
            return super().forward(*args, **kwargs)
        opened: list[Opened] = []
        live, sight = self.lora_live, look_away()
        try:
            if not live.open(opened, args, kwargs):
                look_again(sight)
                return super().forward(*args, **kwargs)
            kwargs.pop("adapter_names", None)
            if live.calls_base_model:
                look_again(sight)
                return live.base(*args, **kwargs)
            live.sights.append(sight)
            return super().forward(*args, **kwargs)
        finally:
            look_away()
            live.sights.clear()
            live.close(opened)
            look_again(sight)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; what changes an adapter meanwhile counts from the next call on."""
        opened: list[Opened] = []
        with torch.no_grad():
            is_ours = self.lora_live.open(opened, args, kwargs)
        try:
            if is_ours:
                kwargs.pop("adapter_names", None)
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.lora_live.close(opened)

    def get_model_status(self) -> Any:
        """As PEFT's, which looks at all layers and changes none."""
        with self.lora_live.unchanged():
            return super().get_model_status()  # type: ignore[misc]

    def get_layer_status(self) -> Any:
        """As PEFT's, which looks at all layers and changes none."""
        with self.lora_live.unchanged():
            return super().get_layer_status()  # type: ignore[misc]


class _TakenTuner(_TakenHolder):
    """What a PeftModel calls with the inputs of the base model, and what calls its forward past the hooks."""

    lora_entry: Entry

    @run_by_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; in a block of the bank the beginning and the end of a call."""
        if is_compiling():
            return super().forward(*args, **kwargs)
        live, result = self.lora_live, None
        sight = live.sights.pop() if live.sights else None
        if sight is not None:
            look_again(sight)
        self.lora_entry.before(live.base, args, kwargs)
        try:
            # All that PEFT does; it is the base model's code that Dynamo sees, whoever calls it.
            result = live.base.forward(*args, **kwargs)
        finally:
            self.lora_entry.after(live.base, args, result)
            if sight is not None:
                look_away()
        return result


# Where each kind keeps weights of adapters.
_VALUES: dict[type[_Taken], tuple[str, ...]] = {
    _TakenLayer: _FACTORS,
    _TakenHead: ("modules_to_save",),
    _TakenTokens: ("token_adapter",),
}


def _taken_class(kind: type[nn.Module], mixin: type[_Taken]) -> type[nn.Module]:
    """Return the class that modules of a class of PEFT's get."""
    if kind not in _TAKEN:
        members: dict[str, Any] = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        }
        for name in _VALUES.get(mixin, ()):
            members[name] = _noted(name)
        # Of the same metaclass as PEFT's, which has abstract classes.
        _TAKEN[kind] = cast("Any", type(kind))(kind.__name__, (mixin, kind), members)
    return _TAKEN[kind]


def _plain_class(kind: type[Any]) -> type[Any]:
    return kind.__bases__[-1] if issubclass(kind, _Taken) else kind


class _Held:
    """What an adapter was when its slot was filled. Each call asks whether it is so still: the loops are C's.

    Whether PEFT holds the same tensors still is not asked: to exchange one, code asks a layer for its dictionary, or
    gives the adapter another config, or calls a method of the model; all three are noted.
    """

    def __init__(
        self, layers: Iterable[Any], wrappers: Iterable[Any], names: Sequence[str], configs: Sequence[Any]
    ) -> None:
        self.configs = configs
        self.touches = 0
        self._owners: list[Any] = []
        self._scalings: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._tensors: list[Tensor] = []
        # Where each of them is kept.
        self._homes: list[dict[str, Any]] = []
        self._keys: list[str] = []
        for layer in layers:
            for name in names:
                if is_in(layer, name):
                    self._owners.append(layer)
                    self._scalings.append(layer.scaling)
                    self._names.append(name)
                    for part in _FACTORS:
                        self._note(layer._modules[part], name)
        for wrapper in wrappers:
            modules = wrapper._modules
            has_rows = has_tokens(wrapper)
            holder = modules["token_adapter"].trainable_tokens_delta if has_rows else modules["modules_to_save"]
            for name in names:
                self._note(holder, name)
        self._factors = list(map(_GET, self._scalings, self._names))
        self._parameters = list(self._tensors)
        # Scaling that is a tensor may change in place.
        self._tensors += [factor for factor in self._factors if isinstance(factor, Tensor)]
        # Those that were made in inference mode have no version.
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions, self._places = self._now()

    def _note(self, holder: nn.Module, name: str) -> None:
        if (value := holder._parameters.get(name)) is not None:
            self._note_parameter(holder, name, value)
        elif (module := holder._modules.get(name)) is not None:
            for inner in module.modules() if module._modules else (module,):
                for key, value in inner._parameters.items():
                    if value is not None:
                        self._note_parameter(inner, key, value)

    def _note_parameter(self, module: nn.Module, key: str, value: Tensor) -> None:
        self._tensors.append(value)
        self._homes.append(module._parameters)
        self._keys.append(key)

    def _now(self) -> tuple[list[int], list[int]]:
        # In place a change counts; where `data` is replaced, the memory is another.
        return list(map(_VERSION, self._counted)), list(map(Tensor.data_ptr, self._tensors))

    def is_current(self) -> bool:
        """Whether it is the same still, but for changes that leave no trace."""
        return (
            all(map(is_, map(_SCALING, self._owners), self._scalings))
            and all(map(is_, map(_GET, self._scalings, self._names), self._factors))
            and all(map(is_, map(_GET, self._homes, self._keys), self._parameters))
            and self._now() == (self._versions, self._places)
        )


_VERSION, _SCALING, _GET = attrgetter("_version"), attrgetter("scaling"), dict.get


def _tops(base: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """PEFT's layers and wrappers in a model, but for what is inside of them: name, parent, key and module of each."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", base)]
    while stack:
        path, parent = stack.pop()
        for key, child in parent._modules.items():
            if child is None or id(child) in seen:
                continue
            seen.add(id(child))
            name = f"{path}.{key}" if path else key
            if _is_a(child, _TUNER_LAYER) or _is_a(child, _WRAPPER):
                yield name, parent, key, child
            else:
                stack.append((name, child))


class _LeftToPeft(Exception):  # noqa: N818 - no error, but the reason of a choice
    """Why a call is PEFT's: an argument for the user, or None where no one needs to hear of it."""


class Live:
    """A PeftModel that a bank serves."""

    def __init__(self, peft_model: Any) -> None:
        self.model = peft_model
        self.tuner: Any = peft_model.base_model
        self.base: nn.Module = self.tuner.model
        self.layers, self.wrappers, self._places = self._found()
        self.bank: LiveBank = None  # type: ignore[assignment]
        self.plain: BaseModel = None  # type: ignore[assignment]
        self.undo: list[Callable[[], None]] = []
        # Of a model without a kind of task PEFT calls the base model, and of others the tuner.
        self.calls_base_model = full_name(type(peft_model)) == _PEFT_MODEL
        # How Dynamo looked when the call of the model began, until the base model is called.
        self.sights: list[Any] = []
        # How often weights may have been changed in ways that leave no trace.
        self._touches = 0
        self._is_touching = True
        # What the adapters in the slots were when they came there; and those that do not fit, with the reason.
        self._held: dict[str, _Held] = {}
        self._refused: dict[str, tuple[_Held, LoraError]] = {}
        self._warned: set[str] = set()
        # Of all adapters of the model, when its modules were last looked through.
        self._configs: list[Any] = []
        self._strangers: list[str] = []

    def _found(self) -> tuple[dict[str, Any], dict[str, Any], list[tuple[nn.Module, str, nn.Module, nn.Module]]]:
        """PEFT's layers and wrappers by name; and for each its parent, its key, itself, and what it has wrapped."""
        layers: dict[str, Any] = {}
        wrappers: dict[str, Any] = {}
        places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        for name, parent, key, child in _tops(self.base):
            if _is_a(child, _TUNER_LAYER):
                layers[name] = child
                inside = child._modules["base_layer"]
            else:
                wrappers[name] = child
                inside = child.token_adapter.base_layer if has_tokens(child) else child.original_module
            places.append((parent, key, child, inside))
        return layers, wrappers, places

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Take PEFT's layers out of the base model for a moment, which then looks as it did before PEFT."""
        config = vars(self.base).pop("peft_config", None)
        for parent, key, _, inside in self._places:
            parent._modules[key] = inside
        try:
            yield
        finally:
            for parent, key, wrapper, _ in self._places:
                parent._modules[key] = wrapper
            if config is not None:
                vars(self.base)["peft_config"] = config

    def take(self, bank: AdapterBank) -> LiveBank:
        """Have calls of the model run on a bank, which is attached to its base model."""
        bank.__class__ = LiveBank
        self.bank = cast("LiveBank", bank)
        self.bank.live = self
        with self.unwrapped():
            plain = BaseModel.of(self.base, bank._hosts)
            # The names of today, all of them.
            self.plain = BaseModel(
                plain.modules, plain.hosts, dict(plain.parameters), plain.output_embedding, plain.tied
            )
        for name, wrapper in (*self.layers.items(), *self.wrappers.items()):
            mixin = _TakenLayer if name in self.layers else _TakenTokens if has_tokens(wrapper) else _TakenHead
            self._become(wrapper, mixin)
            vars(wrapper)["lora_routing"] = bank._routing
        self._become(self.model, _TakenModel)
        bank._edges = [
            (parent, key, cast("nn.Module", parent._modules[key]), path) for parent, key, _, path in bank._edges
        ]
        self._become(self.tuner, _TakenTuner)
        vars(self.tuner)["lora_entry"] = Entry("", bank._routing)
        bank._routing.serves_all = True
        self._configs = self._configs_now()
        prepare_for_tracing()
        return self.bank

    def _become(self, module: Any, mixin: type[_Taken]) -> None:
        kind = type(module)
        module.__class__ = _taken_class(kind, mixin)
        vars(module)["lora_live"] = self
        have_hook_call(module)

        def back() -> None:
            module.__class__ = kind
            for name in _Taken._own:
                vars(module).pop(name, None)
            have_hook_call(module)

        self.undo.append(back)

    def give_back(self) -> None:
        """Make PEFT's model what it was."""
        for undo in self.undo:
            undo()
        self.undo.clear()
        self._held.clear()

    # What PEFT does meanwhile.

    def note_touch(self) -> None:
        """Weights may change now in ways that leave no trace: slots are filled again before they are used."""
        if self._is_touching:
            self._touches += 1

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Code that looks at weights, and does not change them."""
        before, self._is_touching = self._is_touching, False
        try:
            yield
        finally:
            self._is_touching = before

    def _configs_now(self) -> list[Any]:
        return [*self.tuner.peft_config.values()]

    # A call of the model.

    def open(self, opened: list[Opened], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A call begins: open a block for it, unless it is inside of one; returns whether the call is the bank's.

        Raises:
            AdapterError: it names adapters inside of a block, and is PEFT's.
            BankInUseError: another thread or task is inside of a block.
        """
        is_in_block = self.bank.is_in_block()
        if is_in_block and kwargs.get("adapter_names") is None:
            return True
        try:
            rows = self._rows(args, kwargs)
            self._fill([name for name in dict.fromkeys(rows) if name is not None])
        except _LeftToPeft as reason:
            if is_in_block:
                got = reason.args[0] or "names, a mode or arguments that only PEFT takes"
                remedy = "Name the adapters in `use`, or call the model outside of the block."
                raise AdapterError("adapter_names in a `use` block", "what the bank serves", got, remedy) from None
            self._warn(reason.args[0])
            return False
        opened.append(self.bank.open_for_call(rows))
        return True

    def close(self, opened: list[Opened]) -> None:
        """The call has ended."""
        for block, token in opened:
            self.bank.close_after_call(block, token)

    def _warn(self, reason: str | None) -> None:
        if reason is not None and reason not in self._warned:
            self._warned.add(reason)
            text = f"xpu_lora_compile leaves calls of the model to PEFT, which computes the same without it: {reason}"
            warnings.warn(text, stacklevel=2)

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str | None]:
        """For each sequence what PEFT would give it: an adapter, the sum of some, or none."""
        if any(layer.training for layer in self.layers.values()) or kwargs.get("alora_offsets") is not None:
            raise _LeftToPeft(None)
        # Dropout alone may be in training mode, to draw several answers. Without dropout PEFT has an Identity here, in
        # training mode in each adapter that it adds.
        drops = (layer._modules["lora_dropout"]._modules.values() for layer in self.layers.values())
        if any(drop.training and not isinstance(drop, nn.Identity) for of_layer in drops for drop in of_layer):
            raise _LeftToPeft("dropout of an adapter is in training mode. Call peft_model.eval().")
        if any(parent._modules.get(key) is not wrapper for parent, key, wrapper, _ in self._places):
            raise _LeftToPeft("some of its layers have been replaced since `attach`. Call bank.detach().")
        configs = self._configs_now()
        if len(configs) != len(self._configs) or any(a is not b for a, b in zip(configs, self._configs, strict=True)):
            self._configs = configs
            self._look_for_strangers()
        if self._strangers:
            raise _LeftToPeft(
                f"it has put layers around {few(self._strangers)} since `attach`. Call bank.detach(), and attach again."
            )
        active = self.tuner.active_adapters
        is_disabled = self._state(active)
        names = kwargs.get("adapter_names")
        if names is None:
            count, name = _batch_size(args, kwargs, self.base), None if is_disabled else self._together(active)
            rows = [name] * count
        elif not (names and isinstance(names, list | tuple)) or any(
            name != _BASE and name not in self.tuner.peft_config for name in names
        ):
            # PEFT says what is wrong.
            raise _LeftToPeft(None)
        else:
            rows = [None if is_disabled or name == _BASE else name for name in names]
        if torch.is_grad_enabled() and any(self._trains(name) for name in set(rows) - {None}):
            raise _LeftToPeft(
                "an adapter that requires grad is used in grad mode. Call the model under torch.no_grad(), or freeze "
                "the adapter: peft_model.set_requires_grad(name, False)."
            )
        return rows

    def _state(self, active: list[str]) -> bool:
        """Whether adapters are disabled, having checked that all layers agree with the model."""
        for layer in self.layers.values():
            if layer.merged_adapters:
                raise _LeftToPeft("adapters are merged into the weights. Call peft_model.unmerge_adapter().")
        flags = {wrapper._disable_adapters for wrapper in (*self.layers.values(), *self.wrappers.values())}
        if len(flags) > 1:
            raise _LeftToPeft("adapters are disabled in some layers alone.")
        if True in flags:
            return True
        for layer in self.layers.values():
            its = layer._active_adapter
            if its != active and self._in(layer, its) != self._in(layer, active):
                raise _LeftToPeft("adapters are active in some layers alone.")
        for wrapper in self.wrappers.values():
            its = [wrapper._active_adapter] if isinstance(wrapper._active_adapter, str) else wrapper._active_adapter
            if [name for name in its if name in wrapper._adapters] != [
                name for name in active if name in wrapper._adapters
            ]:
                raise _LeftToPeft("adapters are active in some layers alone.")
        return False

    def _in(self, layer: Any, names: str | list[str]) -> list[str]:
        return [name for name in ([names] if isinstance(names, str) else names) if is_in(layer, name)]

    def _together(self, active: list[str]) -> str | None:
        """What the bank calls the sum of these adapters: by names that are told apart, whatever they hold."""
        if len(active) < 2:
            return active[0] if active else None
        return " + ".join(map(repr, active))

    def _apart(self, name: str) -> list[str]:
        """The adapters of such a name."""
        configs = self.tuner.peft_config
        return [name] if name in configs else list(self.tuner.active_adapters)

    def _trains(self, name: str | None) -> bool:
        if name is None:
            return False
        names = set(self._apart(name))
        return any(
            parameter.requires_grad
            for module in (*self.layers.values(), *self.wrappers.values())
            for part, child in module._modules.items()
            if child is not None and part not in ("base_layer", "original_module")
            for path, parameter in child.named_parameters()
            if not names.isdisjoint(path.split("."))
        )

    def _look_for_strangers(self) -> None:
        """Find layers that PEFT has made since `attach`."""
        known = {id(wrapper) for _, _, wrapper, _ in self._places}
        self._strangers = [name for name, _, _, module in _tops(self.base) if id(module) not in known]

    # Slots.

    def _fill(self, names: list[str]) -> None:
        """Have the slots of these adapters hold what PEFT's layers hold.

        Raises:
            _LeftToPeft: they do not fit.
        """
        self.bank.forget(name for name in self.bank.names if any(its not in self._known() for its in self._parts(name)))
        try:
            self.bank.make_room(names)
            for name in names:
                self.follow(name)
        except LoraError as error:
            raise _LeftToPeft(str(error)) from error

    def _known(self) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self.tuner.peft_config)

    def _parts(self, name: str) -> Sequence[str]:
        held = self._held.get(name)
        return [] if held is None else [its for its, _ in held.configs]

    def follow(self, name: str) -> None:
        """Have an adapter be in a slot as PEFT's layers have it now.

        Raises:
            AdapterError: it does not fit.
        """
        held = self._held.get(name) if name in self.bank.names else None
        if held is not None and held.touches == self._touches and self._is_same(held):
            return
        refused = self._refused.get(name)
        if refused is not None and refused[0].touches == self._touches and self._is_same(refused[0]):
            raise refused[1]
        names = self._apart(name)
        now = _Held(
            self.layers.values(), self.wrappers.values(), names, [(its, self._known().get(its)) for its in names]
        )
        now.touches = self._touches
        try:
            path = Path(f"peft_model, adapter {' + '.join(map(repr, names))}", "its layers")
            with naming(name):
                config, tensors = adapter_in(self.layers, self.wrappers, names, path)
                self.bank.fill(name, config, tensors)
        except LoraError as error:
            self._refused[name] = now, error
            self._held.pop(name, None)
            raise
        self._refused.pop(name, None)
        self._held[name] = now

    def _is_same(self, held: _Held) -> bool:
        known = self._known()
        return all(known.get(name) is config for name, config in held.configs) and held.is_current()


class LiveBank(AdapterBank):
    """The bank of a model that PEFT has loaded: its adapters are PEFT's, by PEFT's names.

    Slots hold those that were used last. Adapters come and go by PEFT's own methods.
    """

    live: Live

    def load(self, name: str, folder: Any) -> None:
        """Say that PEFT loads adapters.

        Raises:
            AdapterError: always.
        """
        remedy = "Call peft_model.load_adapter(folder, name); `use` then knows it."
        raise AdapterError(f"load {name!r}", "adapters that PEFT has loaded", f"{folder!r}", remedy)

    def drop(self, name: str) -> None:
        """Say that PEFT deletes adapters.

        Raises:
            AdapterError: always.
        """
        remedy = "Call peft_model.delete_adapter(name)."
        raise AdapterError(f"drop {name!r}", "adapters that PEFT has loaded", "a call of the bank", remedy)

    def detach(self) -> None:
        """Give back PEFT's model, as it was before `attach`; the bank is empty afterwards."""
        super().detach()
        self.live.give_back()

    def refresh(self) -> None:
        """Fill slots again before they are used: after weights were changed through `.data`, which leaves no trace."""
        self.live._touches += 1

    def _open(self, names: Any, lengths: Any, parts: Any, input_ids: Any) -> Block:
        given = parts.values() if isinstance(parts, Mapping) else ()
        wanted = [
            *leaves(names),
            *leaves([its[0] if isinstance(its, tuple) and len(its) == 2 else its for its in given]),
        ]
        adapters = list(dict.fromkeys(name for name in wanted if isinstance(name, str)))
        known = self.live._known()
        for name in adapters:
            if name not in known:
                remedy = "Load it: peft_model.load_adapter(folder, name)."
                if name == _BASE:
                    remedy = "Write None for rows without an adapter."
                raise UnknownAdapterError(f"adapter {name!r}", f"one of {', '.join(known)}", repr(name), remedy)
        if any(layer.merged_adapters for layer in self.live.layers.values()):
            remedy = "Call peft_model.unmerge_adapter()."
            raise AdapterError("use", "weights without adapters", "adapters that are merged into them", remedy)
        self.make_room(adapters)
        for name in adapters:
            self.live.follow(name)
        return super()._open(names, lengths, parts, input_ids)

    # Of `Live`.

    def is_in_block(self) -> bool:
        """Whether this thread or task is inside a block."""
        return self._routing.mine.get() is not None and self._routing.mine.get() in self._blocks

    def open_for_call(self, names: list[str | None]) -> Opened:
        """Open a block for one call of the model, as `use` does."""
        with self._lock:
            block = self._enter({"": Rows(tuple(names))})
            return block, self._routing.mine.set(block)

    def close_after_call(self, block: Block, token: Token[Any]) -> None:
        """Close it."""
        self._close(block)
        self._routing.mine.reset(token)

    def forget(self, names: Iterable[str]) -> None:
        """Empty the slots of adapters that are no more."""
        for name in list(names):
            with self._lock:
                if not any(name in block.names for block in self._blocks):
                    super().drop(name)
                    self.live._held.pop(name, None)

    def make_room(self, names: list[str]) -> None:
        """Empty so many slots as these adapters need, which are not there; those first that were not used for longest.

        Raises:
            NoFreeSlotError: there are not so many.
        """
        with self._lock:
            in_use = set(names).union(*(block.names for block in self._blocks))
            missing = [name for name in names if name not in self._slots]
            idle = [name for name in self.live._held if name in self._slots and name not in in_use]
            free = self._slots.count(None)
            self.forget(idle[: max(0, len(missing) - free)])
            for name in names:
                # In the order of their last use.
                if name in self.live._held:
                    self.live._held[name] = self.live._held.pop(name)

    def fill(self, name: str, config: Any, tensors: Any) -> None:
        """Fill the slot of an adapter, or a free one.

        Raises:
            AdapterError: it does not fit, no slot is free, or a block is using it.
        """
        with (
            opened_checkpoint(tensors, config, self.sites, self.live.plain, self._max_rank) as checkpoint,
            self._staging.staged(checkpoint, self._stacked, {}) as staged,
        ):
            self._devices = {device_of(layer) for layer in self._layers.values()}
            if name in self._slots:
                with self._lock:
                    super().drop(name)
            self._store(name, staged, None)


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], model: nn.Module) -> int:
    """The number of sequences of a call, by its first input with a batch."""
    main = getattr(model, "main_input_name", None)
    found = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs", main) if name]
    tensors = [value for value in leaves([found, args, kwargs]) if isinstance(value, Tensor) and value.dim()]
    return tensors[0].shape[0] if tensors else 1


def attach_live(peft_model: Any, attach: Callable[..., AdapterBank], **given: Any) -> LiveBank:
    """Have a bank serve a model that PEFT has loaded.

    Args:
        peft_model: a PeftModel with LoRA.
        attach: for the model inside.
        given: to `attach`.

    Raises:
        AttachError: PEFT has adapters of another kind in it, or on modules that carry none here.
    """
    for name in ("adapters", "target_modules", "exclude_modules", "vocab_size", "target_parameters", "expert_pages"):
        if given.pop(name):
            remedy = "Leave it out. Load adapters with peft_model.load_adapter(folder, name)."
            raise AttachError(f"attach: {name}", "nothing for a PeftModel, which has its own", "a value", remedy)
    if given.pop("adapters_per_row") != 1:
        remedy = "Leave it out: peft_model.set_adapter([...]) sums adapters. Or attach to the plain model."
        raise AttachError("attach: adapters_per_row", "1 for a PeftModel", "another number", remedy)
    live = checked_live(peft_model, given["linear_classes"])
    for name, value in _needs(live).items():
        given[name] = value if given.get(name) is None else given[name]
    with live.unwrapped():
        bank = attach(live.base, **given)
    return live.take(bank)


def taken_over(model: nn.Module) -> LiveBank | None:
    """Return the bank that serves a model of PEFT's; None for other models."""
    return model.lora_live.bank if isinstance(model, _TakenModel) else None


# Models that the backend could not take over, for which it compiles what PEFT computes.
UNTAKEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def untaken_in_call() -> nn.Module | None:
    """Return the PeftModel with LoRA that is being called, if no bank serves it and nothing of it is being trained."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            model: Any = frame.f_locals.get("self")
            if is_peft_model(model) and not isinstance(model, _TakenModel):
                trains = model.training or (
                    torch.is_grad_enabled() and any(value.requires_grad for value in model.parameters())
                )
                is_lora = _is_a(model.base_model, _LORA_MODEL)
                return None if trains or not is_lora or model in UNTAKEN else cast("nn.Module", model)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def checked_live(peft_model: Any, linear_classes: Iterable[type[nn.Module]] = ()) -> Live:
    """Look through a PeftModel, and change nothing.

    Raises:
        AttachError: as `attach_live`.
    """
    if not _is_a(peft_model.base_model, _LORA_MODEL):
        got = f"one with {type(peft_model.base_model).__name__}"
        remedy = "Make LoRA of its adapters: xlc.convert(model, folder, out, rank); or take them off, with unload()."
        raise AttachError("attach: model", "a PeftModel with LoRA", got, remedy)
    live, classes = Live(peft_model), tuple(linear_classes)
    hosts = (*HOSTS, Declared(classes)) if classes else HOSTS
    if not live.layers:
        remedy = "Add or load an adapter first."
        raise AttachError("attach: model", "a PeftModel with layers of LoRA", "one without any", remedy)
    if experts := [name for name, layer in live.layers.items() if hasattr(layer, "parameter_name")]:
        got = f"LoRA on parameters of {few(experts)}"
        raise AttachError("attach: model", "LoRA on modules", got, SAVE_AND_ATTACH)
    strange = [
        f"{name} ({type(layer._modules['base_layer']).__name__})"
        for name, layer in live.layers.items()
        if not _is_a(layer, _LORA_LAYER) or host_of(layer._modules["base_layer"], hosts) is None
    ]
    if strange:
        names = " or ".join(host.name for host in hosts)
        remedy = "Serve this model with PEFT; or load its adapters into the plain model, with exclude_modules=."
        raise AttachError("attach: model", f"LoRA on {names} modules", f"LoRA on {few(strange)}", remedy)
    return live


def _needs(live: Live) -> dict[str, Any]:
    """Arguments of `attach` for all adapters that a model has."""
    names = list(live.model.base_model.peft_config)
    ranks, dtypes = [1], [torch.float32]
    use_dora = lora_bias = False
    for layer in live.layers.values():
        for name in names:
            if is_in(layer, name):
                _, a, _, shift = factors(layer, name)
                ranks.append(a.shape[0])
                dtypes.append(a.dtype)
                lora_bias |= shift is not None
                use_dora |= name in layer._modules["lora_magnitude_vector"]._modules
    tokens = [
        len(indices)
        for wrapper in live.wrappers.values()
        if has_tokens(wrapper)
        for indices in wrapper.token_adapter.token_indices.values()
    ]
    return {
        "slots": max(8, len(names)),
        "max_rank": max(ranks),
        "dtype": max(dtypes, key=dtypes.count),
        "target_modules": "|".join(map(re.escape, live.layers)),
        "use_dora": use_dora,
        "lora_bias": lora_bias,
        "modules_to_save": [name for name, wrapper in live.wrappers.items() if not has_tokens(wrapper)],
        "trainable_token_indices": max(tokens, default=0),
    }
