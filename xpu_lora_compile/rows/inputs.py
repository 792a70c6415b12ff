"""Which of a module's inputs hold the batch, and along which dimension."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from xpu_lora_compile.errors import BatchError

# Beside a text these are one for each image, clip or sound, and a sequence may have several of them, or none.
_MEDIA = (
    "pixel_",
    "image_",
    "images",
    "video_",
    "audio_",
    "input_features",
    "input_values",
    "vision_",
    "flattened_patches",
)
_TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The inputs of a call by name, with what lists, tuples and dictionaries among them hold."""
    names = parameters(type(module)) if args else ()
    found: list[tuple[str, Any]] = []
    for position, value in enumerate(args):
        found += _flat(names[position] if position < len(names) else f"input {position}", value, 0)
    for name, value in kwargs.items():
        found += _flat(name, value, 0)
    return found


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and mappings hold, in order; they may hold each other."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def batch_error(got: str, *, part: str, packed: bool) -> BatchError:
    """The error for inputs that hold another number of sequences than there are names.

    Args:
        got: what came.
        part: the part of the model that has names of its own; empty for the model.
        packed: whether lengths were given.
    """
    if packed:
        remedy = "Pass the lengths of all sequences of the row; their sum is the number of its tokens."
        wanted = "lengths whose sum is that of the rows"
    elif part:
        wanted = "one name for each row of the part: for each image, say"
        remedy = f"Name an adapter, or None, for each; where the rows are packed: parts={{{part!r}: (names, lengths)}}."
    else:
        wanted = "one name for each sequence of the batch, the first dimension of the model's inputs"
        remedy = (
            "Name an adapter, or None, for every sequence. `generate` repeats the names itself for beams and several "
            "samples. Where sequences are packed in one row, pass lengths=, too."
        )
    return BatchError(f"bank.use: parts[{part!r}]" if part else "bank.use", wanted, got, remedy)


def may_hold_the_batch(name: str, dimensions: int) -> bool:
    """Whether the first dimension of an input can be the batch: of a list's items each may be a sequence of its own."""
    if name == "position_ids" and dimensions == 3:
        # Qwen2-VL's, of time, height and width.
        return False
    return "[" not in name or name.startswith("encoder_outputs")


def is_media(name: str, inputs: list[tuple[str, Any]], main_input: str | None) -> bool:
    """Whether an input is not one a sequence: images of a model that reads text."""
    if not name.startswith(_MEDIA):
        return False
    if main_input is not None:
        return name != main_input
    return any(other in _TEXT for other, _ in inputs)


def _flat(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor) or depth == 8:
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item, depth + 1)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _flat(f"{name}[{position}]", item, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _flat(f"{name}.{field.name}", getattr(value, field.name), depth + 1)
    else:
        yield name, value


def described(value: Any) -> Hashable:
    """What two inputs that are no tensors have in common if they are the same to a model."""
    if value is None or isinstance(value, bool | str | int | float | complex | bytes | range | Enum | frozenset):
        return value
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    if isinstance(value, set):
        return frozenset(value)
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):
        # numpy's.
        return type(value), value.shape, value.tobytes()
    if isinstance(value, type | torch.dtype | torch.device) or callable(value):
        return value  # type: ignore[no-any-return]
    # Of an object its flags; numbers by powers of two, since they count what is in a cache, say.
    flags = (
        [
            (name, described(item) if not isinstance(item, int) or isinstance(item, bool) else item.bit_length())
            for name, item in vars(value).items()
            if isinstance(item, bool | str | int | float | Enum)
        ]
        if hasattr(value, "__dict__")
        else []
    )
    return type(value), tuple(flags)


def shape_of_mask(mask: Tensor) -> Hashable:
    """What code learns from a mask that it looks at: whether all counts, which rows are cut where, their order.

    Not how long they are: that changes with each step of decoding.
    """
    seen = mask.detach() != 0
    if not mask.dim() or bool(seen.all()):
        return bool(seen.all())
    rows = seen.reshape(seen.shape[0], -1) if seen.dim() > 1 else seen[None]
    lengths = rows.sum(1)
    order, ends = lengths.argsort(stable=True), rows[:, [0, -1]]
    return tuple(order.tolist()), tuple(lengths[order].diff().bool().tolist()), tuple(map(tuple, ends.tolist()))


def _may_hold_more(kind: type[Any]) -> bool:
    """Whether an input of this class may hold tensors that are inputs, too, or compute something."""
    is_called = any("__call__" in vars(base) for base in kind.__mro__)
    return is_called or issubclass(kind, list | tuple | dict) or dataclasses.is_dataclass(kind)


def _parameters(kind: type[Any]) -> tuple[str, ...]:
    """The names of what a module's forward takes."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


# Asked at each call of a model. (The type of a cache takes no class of modules.)
may_hold_more: Callable[[type[Any]], bool] = cast("Any", cache)(_may_hold_more)
parameters: Callable[[type[Any]], tuple[str, ...]] = cast("Any", cache)(_parameters)
