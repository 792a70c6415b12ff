"""Bytes of a file to CUDA memory, in the order of a stream of their own.

    file, mapped into memory -> pinned memory, two pieces in turn -> one block on the device

A few cores copy one piece while the device fetches the other. Nearly all of the time is in calls of torch that let go
of the interpreter's lock, so that a thread that serves goes on. Pinned memory and events are those of torch's pools.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from xpu_lora_compile.adapters.checkpoint import DTYPES
from xpu_lora_compile.adapters.cores import with_few_cores
from xpu_lora_compile.adapters.files import TensorFile
from xpu_lora_compile.errors import AdapterFileError

# In bytes: so few pieces that Python takes no time, and little memory that stays pinned.
_PIECE = 8 * 2**20
# Of the start of each run, in bytes.
_ALIGNMENT = 16


@dataclass
class Run:
    """Tensors of one dtype that lie side by side in a file.

    Args:
        dtype: as safetensors calls it.
        start: where they begin in the file, in bytes.
        at: where they begin in the block.
        size: of all, in bytes.
        keys: their names, in the file's order.
        sizes: the number of values of each.
    """

    dtype: str
    start: int
    at: int
    size: int = 0
    keys: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def runs_of(file: TensorFile, keys: Iterable[str]) -> list[Run]:
    """Find the places of some tensors of a file: as few runs as there can be.

    Raises:
        AdapterFileError: a tensor has another size than its shape says.
    """
    runs: list[Run] = []
    spans = {key: file.span(key) for key in keys}
    for key, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        last = runs[-1] if runs else None
        dtype, size = file.dtype(key), math.prod(file.shape(key))
        if end - start != size * DTYPES[dtype].itemsize:
            remedy = "Load it again."
            raise AdapterFileError(str(file.path), "a file that stays the same", "one that is being changed", remedy)
        if last is None or last.start + last.size != start or last.dtype != dtype:
            used = last.at + last.size if last else 0
            last = Run(dtype, start, -(-used // _ALIGNMENT) * _ALIGNMENT)
            runs.append(last)
        last.size += end - start
        last.keys.append(key)
        last.sizes.append(size)
    return runs


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which adapters come to a device."""
    return torch.cuda.Stream(device)


def upload(file: TensorFile, runs: list[Run], device: torch.device) -> Tensor:
    """Copy runs of a file to a device, on its stream for loading.

    Args:
        file: that is open.
        runs: as `runs_of` gives them.
        device: of CUDA.

    Returns:
        uint8, of which each run takes the part from `at` on.

    Raises:
        AdapterFileError: the file is shorter than its header says.
    """
    return with_few_cores(_upload, file, runs, device)


def _upload(file: TensorFile, runs: list[Run], device: torch.device) -> Tensor:
    size = runs[-1].at + runs[-1].size if runs else 0
    turn = 0
    with torch.cuda.stream(side_stream(device)):
        block = torch.empty(size, dtype=torch.uint8, device=device)
        pinned = torch.empty(2, min(size, _PIECE), dtype=torch.uint8, device="cpu", pin_memory=True)
        copied = torch.cuda.Event(), torch.cuda.Event()
        for run in runs:
            for done in range(0, run.size, _PIECE):
                count = min(_PIECE, run.size - done)
                piece = pinned[turn][:count]
                # At first there is nothing to wait for.
                copied[turn].synchronize()
                piece.copy_(file.bytes_of(run.start + done, run.start + done + count))
                block[run.at + done : run.at + done + count].copy_(piece, non_blocking=True)
                copied[turn].record()
                turn = 1 - turn
    return block
