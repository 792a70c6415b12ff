"""Has ops on CUDA launch again what their Python has launched for operands of the same shapes, without the Python.

To find sizes of tiles, strides and grids, and to have Triton launch, takes 100 to 400 us of the host's time, and all
of it depends on shapes, strides, dtypes and alignment alone. So the first call with these is recorded (a `Tape`), and
`replay.cpp`, which is compiled when first needed, plays it for all others: some 10 us. Captured graphs are made by the
Python, since what that does besides launching costs nothing when a graph is replayed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xpu_lora_compile.kernels import compiled

_EMPTY, _LINEAR, _ADD_PRODUCT, _LAUNCH = range(4)
_VALUE, _NONE = -1, -1
_aten = torch.ops.aten


class _CannotRecordError(Exception):
    """A call does what a recording cannot say."""


class Tape(TorchDispatchMode):
    """What one call allocates, multiplies and launches, as `replay.cpp` reads it: 64-bit words.

    Tensors are numbered: those that the op was given, in their order, then those made. All else that is done to a
    tensor, but for taking views, cannot be recorded.

    Args:
        operands: the tensors that the op was given.
    """

    def __init__(self, operands: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.problem = ""
        self._tensors = list(operands)
        self._steps: list[list[int]] = []
        # By identity: number, bytes from its first element, and whether it is all of it (""), its transpose or a part.
        self._known = {id(tensor): (number, 0, "") for number, tensor in enumerate(operands)}
        # Kept, so that no other gets the identity of one that is gone.
        self._views: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in (_aten.empty.memory_format, _aten.new_empty.default):
            self._steps.append([_EMPTY, _SCALAR_TYPES[result.dtype], result.dim(), *result.shape])
            if not result.is_contiguous():
                self._refuse("it allocates with other strides")
            self._add(result)
        # What `linear` is where autograd looks at calls, and where it does not.
        elif op is _aten.mm.default:
            self._linear(result, args[0], self._whole(args[1], "t"))
        elif op is _aten.addmm.default and not kwargs:
            self._linear(result, args[1], self._whole(args[2], "t"), args[0])
        elif op is _aten.linear.default:
            self._linear(result, args[0], self._whole(args[1]), *args[2:])
        elif op is _aten.addmm.out and kwargs and kwargs["out"] is args[0]:
            self._steps.append([_ADD_PRODUCT, self._whole(args[0]), self._whole(args[1]), self._whole(args[2], "t")])
        elif isinstance(result, Tensor) and isinstance(args[0], Tensor) and not op._schema.is_mutable:
            self._view(op, result, args[0])
        else:
            self._refuse(f"it calls {op}")
        return result

    def _refuse(self, why: str) -> None:
        self.problem = self.problem or why

    def _add(self, tensor: Tensor) -> None:
        self._known[id(tensor)] = (len(self._tensors), 0, "")
        self._tensors.append(tensor)

    def _view(self, op: Any, view: Tensor, of: Tensor) -> None:
        self._views.append(view)
        if view.untyped_storage()._cdata != of.untyped_storage()._cdata or id(of) not in self._known:
            self._refuse(f"it calls {op}")
            return
        number, offset, how = self._known[id(of)]
        if how or _layout(view) != _layout(of):
            how = "t" if op is _aten.t.default and not how else "view"
        self._known.setdefault(id(view), (number, offset + view.data_ptr() - of.data_ptr(), how))

    def _linear(self, result: Tensor, inputs: Tensor, weight: int, bias: Tensor | None = None) -> None:
        self._steps.append([_LINEAR, self._whole(inputs), weight, _NONE if bias is None else self._whole(bias)])
        self._add(result)

    def _whole(self, tensor: Tensor, how: str = "") -> int:
        """The number of a tensor, which must be that itself, or its transpose."""
        number, _, is_known_as = self._known.get(id(tensor), (_NONE, 0, None))
        if is_known_as != how:
            self._refuse("it multiplies parts of its operands")
        return number

    def launch(self, kernel: Any, grid: Sequence[int], operands: Sequence[Any]) -> None:
        """Note a launch.

        Args:
            kernel: what Triton has compiled and launched.
            grid: its grid.
            operands: its arguments in the order of its parameters, constants included.
        """
        try:
            self._steps.append(self._launch(kernel, grid, operands))
        except _CannotRecordError as error:
            self._refuse(str(error))

    def _launch(self, kernel: Any, grid: Sequence[int], operands: Sequence[Any]) -> list[int]:
        about = kernel.metadata
        scratch = [getattr(about, name, 0) for name in ("global_scratch_size", "profile_scratch_size")]
        if any(scratch) or about.num_ctas != 1 or getattr(about, "launch_cooperative_grid", False):
            raise _CannotRecordError("a kernel wants more than its arguments")
        kinds = list(_leaves(kernel.src.signature.values()))
        values = list(_leaves(operands))
        if len(kinds) != len(values):
            raise _CannotRecordError("Triton has another signature than the call")
        parameters = [
            (*self._parameter(kind, value), 8 if kind.startswith("*") else _BYTES.get(kind, 0))
            for kind, value in zip(kinds, values, strict=True)
            if kind != "constexpr"
        ]
        # Then Triton's own, pointers to nothing here: one or two, by its version.
        size_of = library().xpu_lora_parameter_bytes
        sizes = list(itertools.takewhile(bool, (size_of(kernel.function, index) for index in itertools.count())))
        wanted = [size for *_, size in parameters]
        own = sizes[len(wanted) :]
        if sizes[: len(wanted)] != wanted or any(size != 8 for size in own) or len(sizes) > 256:
            raise _CannotRecordError("the kernel has other parameters than its signature")
        _KEPT[kernel.function] = kernel
        words = [parameter[:2] for parameter in parameters] + [(_VALUE, 0)] * len(own)
        threads, pdl = about.num_warps * about.target.warp_size, getattr(about, "launch_pdl", False)
        lengths = [*grid, 1, 1][:3]
        return [
            *(_LAUNCH, kernel.function, *lengths, threads, about.shared, int(pdl), len(words)),
            *itertools.chain.from_iterable(words),
        ]

    def _parameter(self, kind: str, value: Any) -> tuple[int, int]:
        if isinstance(value, Tensor):
            if id(value) not in self._known:
                raise _CannotRecordError("a kernel gets a tensor from elsewhere")
            number, offset, _ = self._known[id(value)]
            return number, offset
        if kind in ("fp32", "f32"):
            return _VALUE, struct.unpack("<i", struct.pack("<f", value))[0]
        if kind not in _BYTES:
            raise _CannotRecordError(f"a kernel gets a {kind}")
        return _VALUE, int(value)

    def words(self, result: Any) -> list[int]:
        """All of it, and which tensors the op returns; none at all if it cannot be played.

        Args:
            result: None, a tensor or a list of tensors.
        """
        returned = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
        numbers = [self._whole(tensor) for tensor in returned]
        if self.problem or not self._steps:
            return []
        steps = itertools.chain.from_iterable(self._steps)
        return [len(self._steps), *steps, int(isinstance(result, list)), len(numbers), *numbers]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()


# The bytes of what Triton calls by these names.
_BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "f32": 4}


# The kernels of recordings, which hold but their addresses.
_KEPT: dict[int, Any] = {}


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


# As c10::ScalarType counts them.
_SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}

_TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)

# The tape of the call that runs, if it is recorded.
current_tape = _TAPE.get


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the implementation of an op, which is recorded when `replay.cpp` has asked it to be."""

    @wraps(function)
    def run(*args: Any) -> Any:
        library = library_for(args)
        if library is None or not library.xpu_lora_is_wanted():
            return function(*args)
        tape = Tape([value for value in _leaves(args) if isinstance(value, Tensor)])
        token = _TAPE.set(tape)
        try:
            with tape:
                result = function(*args)
        finally:
            _TAPE.reset(token)
        words = tape.words(result)
        library.xpu_lora_keep((ctypes.c_int64 * len(words))(*words), len(words))
        return result

    return run


def library_for(args: Sequence[Any]) -> Any:
    """Return the library that plays recordings, compiled if it is not there yet; None where calls run their Python.

    Args:
        args: of an op; the first is a tensor, or a list of tensors.
    """
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return library() if first.device.type == "cuda" and not warned_problem() else None


def problem() -> str:
    """Return why ops on CUDA run their Python at each call; empty where they do not. Compiles for 15 s at first."""
    return str(_opened()[1])


@cache
def warned_problem() -> str:
    """Return the same, for good, with a warning."""
    why = problem()
    if why:
        warnings.warn(f"xpu_lora: each launch on CUDA runs Python, some 0.3 ms: {why}.", stacklevel=2)
    return why


def library() -> Any:
    """Return the library, or None."""
    return _opened()[0]


def forget() -> None:
    """Have every call be recorded anew."""
    if (opened := library()) is not None:
        opened.xpu_lora_forget()


def count() -> int:
    """Return how many recordings there are."""
    opened = library()
    return 0 if opened is None else int(opened.xpu_lora_count())


# How many blocks want their Python to run, read by `replay.cpp`; a kernel that is forced for the process is one.
_PAUSES = ctypes.c_int32(bool(os.environ.get("XPU_LORA_KERNEL")))
_COUNTING = threading.Lock()


@contextmanager
def paused() -> Iterator[None]:
    """Have all calls of the process run their Python in the block."""
    with _COUNTING:
        _PAUSES.value += 1
    try:
        yield
    finally:
        with _COUNTING:
            _PAUSES.value -= 1


@cache
def _opened() -> tuple[Any, str]:
    loaded = compiled.load("replay", (Path(__file__).with_suffix(".cpp"),), ("-O2",), os.environ.get("CXX"))
    if loaded.path is None:
        return None, loaded.problem
    opened = open_library(loaded.path)
    if not opened.xpu_lora_can_replay():
        return None, "the driver of CUDA, or torch, lacks a function (CUDA 12.4 has all)"
    return opened, ""


def open_library(path: Path) -> Any:
    """Return the functions of a library that plays recordings, which from now on takes calls."""
    opened = ctypes.CDLL(str(path))
    opened.xpu_lora_parameter_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    opened.xpu_lora_parameter_bytes.restype = opened.xpu_lora_count.restype = ctypes.c_int64
    opened.xpu_lora_keep.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    opened.xpu_lora_pauses.argtypes = [ctypes.POINTER(ctypes.c_int32)]
    opened.xpu_lora_pauses(ctypes.byref(_PAUSES))
    return opened
