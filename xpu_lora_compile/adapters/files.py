"""Files that may be missing, damaged or hostile: opened with care, and every failure an `AdapterFileError`."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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
        raise AdapterFileError(str(path), "a file that can be read", str(error), remedy) from error
    if not stat.S_ISREG(status.st_mode):
        raise AdapterFileError(str(path), "a regular file", stat.filemode(status.st_mode), remedy)
    return status


def shown(value: object) -> str:
    """Return the value as it would be written in Python, cut short: a file may hold anything."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


@contextmanager
def opened_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file lazily, having checked its header: no lies about sizes, no name twice."""
    _check_is_there(path)
    with reading(path), path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        # A shorter file, and a length beyond the file's end, are refused by safetensors below.
        if length > _LARGEST_HEADER:
            raise ValueError(f"its header claims {length} bytes; at most {_LARGEST_HEADER} are read")
        file = safe_open(path, framework="pt", device="cpu")
        # The header is JSON now, of safe depth. Where a name comes twice, readers differ in which tensor they take.
        names = json.loads(raw.read(length), object_pairs_hook=lambda pairs: [name for name, _ in pairs])
        if repeated := [name for name, times in Counter(names).items() if times > 1]:
            raise ValueError(f"these names come more than once: {few(repeated)}")
    with file as opened:
        yield opened


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever reading from the file raises into an `AdapterFileError`."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
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
