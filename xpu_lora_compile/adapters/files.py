"""Files that may be missing, damaged or hostile: opened with care, and every failure an `AdapterFileError`."""

from __future__ import annotations

import json
import mmap
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xpu_lora_compile.errors import AdapterFileError

PICKLE_FILE = "adapter_model.bin"

# 200,000 tensors; safetensors itself takes 100 MB, and seconds to read them.
_LARGEST_HEADER = 32 * 2**20


def regular_file(path: Path, remedy: str) -> os.stat_result:
    """Stop unless `path` is a regular file: a pipe would be waited for without end, and a device has no end."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        # A symbolic link to itself, and a NUL in the name, are told apart by the text of the error.
        got = error.strerror if isinstance(error, OSError) else None
        raise AdapterFileError(str(path), "a file that can be read", got or str(error), remedy) from error
    if not stat.S_ISREG(status.st_mode):
        raise AdapterFileError(str(path), "a regular file", stat.filemode(status.st_mode), remedy)
    return status


def shown(value: object) -> str:
    """Return the value as it would be written in Python, cut short: a file may hold anything."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


class TensorFile:
    """A safetensors file that is open, its header checked; values are read when they are asked for."""

    # Whether the tensors lie in memory already, and there is no file.
    in_memory = False

    def __init__(
        self, path: Path, raw: FileIO, opened: Any, mapped: Tensor, header: Mapping[str, Any], start: int
    ) -> None:
        self.path = path
        self._raw, self._opened, self._mapped, self._header, self._start = raw, opened, mapped, header, start

    def keys(self) -> list[str]:
        """The names of all tensors."""
        names: list[str] = self._opened.keys()
        return names

    def shape(self, key: str) -> list[int]:
        """The sizes of a tensor."""
        shape: list[int] = self._header[key]["shape"]
        return shape

    def dtype(self, key: str) -> str:
        """The dtype of a tensor, as safetensors calls it: "F32", "BF16", "F16"."""
        dtype: str = self._header[key]["dtype"]
        return dtype

    def part(self, key: str) -> Any:
        """A tensor of which only the rows are read that it is indexed with."""
        with reading(self.path):
            return self._opened.get_slice(key)

    def span(self, key: str) -> tuple[int, int]:
        """Where the values of a tensor begin in the file, and where they end, in bytes."""
        first, last = self._header[key]["data_offsets"]
        return self._start + first, self._start + last

    def bytes_of(self, start: int, end: int) -> Tensor:
        """A part of the file, mapped into memory: to be read only, and copied soon."""
        # What was cut off since cannot be read: the process would end.
        there = min(len(self._mapped), os.fstat(self._raw.fileno()).st_size)
        if end > there:
            raise AdapterFileError(
                str(self.path), f"at least {end} bytes", f"{there}", "Copy or download the file again."
            )
        return self._mapped[start:end]

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """The values of a tensor, flat, which may be the file itself: to be read only, and copied soon."""
        start, end = self.span(key)
        values = self.bytes_of(start, end)
        # safetensors itself writes no such file.
        values = values.clone() if start % dtype.itemsize else values
        return values.view(dtype)


@contextmanager
def opened_safetensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file lazily, having checked its header: no lies about sizes, no name twice."""
    _check_is_there(path)
    with ExitStack() as stack:
        with reading(path):
            raw = stack.enter_context(path.open("rb", buffering=0))
            length = int.from_bytes(raw.read(8), "little")
            # A shorter file, and a length beyond the file's end, are refused by safetensors below.
            if length > _LARGEST_HEADER:
                raise ValueError(f"its header claims {length} bytes; at most {_LARGEST_HEADER} are read")
            opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            # The header is JSON now, of safe depth. Where a name comes twice, readers differ in which they take.
            pairs: list[tuple[str, Any]] = json.loads(_whole(raw, length), object_pairs_hook=list)
            header = dict(pairs)
            if len(header) < len(pairs):
                repeated = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
                raise ValueError(f"these names come more than once: {few(repeated)}")
            header.pop("__metadata__", None)
            # Private pages, which can be written to but are not, since torch warns of those that cannot.
            mapped = torch.frombuffer(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
            file = TensorFile(
                path, raw, opened, mapped, {name: dict(facts) for name, facts in header.items()}, 8 + length
            )
        yield file


def _whole(raw: FileIO, length: int) -> bytes:
    """So many bytes of the file; one call may return fewer."""
    parts = []
    while length and (part := raw.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever reading from the file raises into an `AdapterFileError`."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        remedy = "Copy or download the file again; it is damaged, or not what PEFT wrote."
        raise AdapterFileError(str(path), "a well-formed safetensors file", str(error), remedy) from error


def _check_is_there(path: Path) -> None:
    remedy = "Give the folder that PEFT's save_pretrained() wrote."
    if (path.parent / PICKLE_FILE).exists() and not path.exists():
        remedy = (
            f"There is only {PICKLE_FILE}, a pickle, which can run any code when it is read, so it is not. "
            "If you trust it: load it with PEFT's PeftModel.from_pretrained() and call save_pretrained()."
        )
    regular_file(path, remedy)


def few(names: Iterable[str]) -> str:
    """Name the first three, and count the rest."""
    names = list(names)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name if len(name) < 200 else shown(name) for name in names[:3]) + rest
