"""`generate` and `generate_batch` of transformers, with names given for each input sequence.

| method of the model | what is told to the bank |
|---|---|
| `_expand_inputs_for_generation` | each sequence becomes several rows: beams, or samples |
| `_expand_variables_for_generation` | the same, by Whisper |
| `_prepare_model_inputs` | a search begins, with each sequence once again |
| `generate` | when that ends |
| `init_continuous_batching` | which request each token of a packed step belongs to |

A model gets these as attributes of its own, which call those of its class. Nothing of transformers is imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from xpu_lora_compile.errors import BatchError, counted


class Bank(Protocol):
    """What is needed of the bank."""

    def repeat(self, times: int | None) -> None:
        """Have each sequence be so many rows from now on; None is as many as when a search begins."""

    def times(self) -> int:
        """How many rows each sequence is now."""

    def start_from(self) -> None:
        """Have searches begin with as many rows as now."""

    def step(self, names: list[Any], lengths: list[int]) -> Any:
        """Have a packed step be run by this thread, inside the block of another one."""

    def check_activates_nothing(self, where: str, got: str, remedy: str) -> None:
        """Refuse what cannot be done with adapters that have invocation tokens."""

    def names_in_use(self) -> list[Any] | None:
        """The names of the open block, one or several for each sequence; None outside of all."""

    @property
    def sites(self) -> dict[str, Any]:
        """The modules that carry LoRA."""


def follow_generation(model: nn.Module, bank: Bank) -> list[Callable[[], None]]:
    """Put the methods on the model, and on the parts of it that generate; returns what takes them off."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        for name, kind in _METHODS.items():
            if hasattr(type(module), name) and name not in vars(module):
                object.__setattr__(module, name, kind(module, bank))
                undo.append(functools.partial(_take_off, module, name))
    return undo


def _bound(module: nn.Module, name: str) -> Any:
    """A method of the module's class, which in some releases is static."""
    return inspect.getattr_static(type(module), name).__get__(module, type(module))


def generating_methods(module: nn.Module) -> list[str]:
    """The methods that a copied module has from the model that it is a copy of."""
    return [name for name in _METHODS if name in vars(module)]


def _take_off(module: nn.Module, name: str) -> None:
    vars(module).pop(name, None)


class _Method:
    """A method of a module's class, with something before or after it."""

    def __init__(self, module: nn.Module, bank: Any) -> None:
        self.module = module
        self.bank = bank

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Of a copied model, which no bank knows.
        copy = memo.get(id(self.module))
        return self if copy is None else _bound(copy, self.name)

    def __reduce__(self) -> Any:
        return _bound, (self.module, self.name)

    name = ""

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """What the class does."""
        return _bound(self.module, self.name)(*args, **kwargs)


class _Expand(_Method):
    name = "_expand_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Expand the inputs, and have the names go with them."""
        result = self.own(*args, **kwargs)
        before, after = _rows_of(args, kwargs), _rows_of((), {"found": result})
        names = self.bank.names_in_use()
        # Whoever names every row already, as was needed once, has as many names as there are rows.
        rows = None if names is None else len(names) * self.bank.times()
        if before and after and before == rows and after > before:
            self.bank.repeat(after // before * self.bank.times())
        return result


class _ExpandVariables(_Expand):
    """Whisper's, which makes a row of each sample before it generates."""

    name = "_expand_variables_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Expand, and have each call of `generate` inside begin with as many rows."""
        result = super().__call__(*args, **kwargs)
        self.bank.start_from()
        return result


class _Prepare(_Method):
    name = "_prepare_model_inputs"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A search begins: no sequence has been expanded for it yet."""
        self.bank.repeat(None)
        return self.own(*args, **kwargs)


class _Generate(_Method):
    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; afterwards each name is one row again."""
        config = kwargs.get("generation_config") or getattr(self.module, "generation_config", None)
        if kwargs.get("use_cache", getattr(config, "use_cache", True)) is False:
            self.bank.check_activates_nothing("generate", "no cache", "Pass use_cache=True.")
        try:
            return self.own(*args, **kwargs)
        finally:
            self.bank.repeat(1)


class _Batch(_Method):
    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make a manager; inside a block it takes as many requests as the block has names, in their order."""
        remedy = "Call generate."
        self.bank.check_activates_nothing("generate_batch", "packed rows", remedy)
        manager = self.own(*args, **kwargs)
        names = self.bank.names_in_use()
        if names is not None and any(name is not None for name in names):
            _Requests(manager, self.bank, names)
        return manager


_METHODS: dict[str, type[_Method]] = {
    kind.name: kind for kind in (_Expand, _ExpandVariables, _Prepare, _Generate, _Batch)
}


class _Requests:
    """The requests of one manager of continuous batching, and the adapter of each."""

    def __init__(self, manager: Any, bank: Bank, names: list[Any]) -> None:
        self.bank = bank
        self.names = names
        self.adapters: dict[str, Any] = {}
        self.in_step: list[tuple[str, int]] = []
        if manager.continuous_batching_config.allow_block_sharing:
            # What is cached of a prompt for one adapter is not another's.
            manager.continuous_batching_config.allow_block_sharing = False
            manager._use_prefix_sharing = False
        own = manager.add_requests
        make = manager._create_batch_processor

        def add_requests(inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            first = manager._request_counter
            if len(inputs) != len(names):
                raise BatchError(
                    "generate_batch",
                    "one name for each request",
                    f"{counted(len(names), 'name')} for {counted(len(inputs), 'request')}",
                    "Name an adapter, or None, for every request.",
                )
            self.adapters.update({f"req_{first + at}": name for at, name in enumerate(names)})
            return own(inputs, *args, **kwargs)

        def create_batch_processor() -> Any:
            return self.follow(make())

        manager.add_requests = add_requests
        manager._create_batch_processor = create_batch_processor

    def follow(self, processor: Any) -> Any:
        """Have each step of a processor tell the bank whose its tokens are."""
        runner = processor.model_runner
        if runner.pad_inputs:
            raise BatchError(
                "generate_batch",
                "steps of as many tokens as the requests have",
                "padded ones, for captured or compiled steps",
                "Pass continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False), without compiling.",
            )
        prepare, step = processor.inputs_and_outputs.prepare_batch_tensors, processor._generation_step
        if any(name.rsplit(".", 1)[-1] in ("lm_head", "embed_out", "output") for name in self.bank.sites):
            # An index into the rows before the last layer would hide whose they are.
            runner.supports_logits_to_keep = lambda _: False

        def prepare_batch_tensors(requests_in_batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.in_step = [(request.state.request_id, request.query_length) for request in requests_in_batch]
            return prepare(requests_in_batch, *args, **kwargs)

        def generation_step(model: nn.Module) -> Any:
            names = [self.adapters[request.split("__child#")[0]] for request, _ in self.in_step]
            with self.bank.step(names, [length for _, length in self.in_step]):
                return step(model)

        processor.inputs_and_outputs.prepare_batch_tensors = prepare_batch_tensors
        processor._generation_step = generation_step
        return processor


def _rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many rows the first tensor has, of the tokens or of another input."""
    stack = [*args, *([kwargs["input_ids"]] if "input_ids" in kwargs else []), *kwargs.values()]
    while stack:
        value = stack.pop(0)
        if hasattr(value, "dim") and value.dim():
            return int(value.shape[0])
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
    return None
