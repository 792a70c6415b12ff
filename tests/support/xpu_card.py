"""A machine with an Intel GPU, for `doctor`: a CPU that is taken for one, with the double of the vendor's ops.

`xpu-lora doctor` asks it what it asks a real one. Its tensors lie on the CPU. Eager calls and rewritten graphs run
there, on the double where its rules hold and on the CPU's own kernel elsewhere; no code is generated.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from intel.toolchain import DEVICES
from support import xpu_c
from torch import Tensor
from torch.compiler import is_compiling

from xpu_lora_compile import backend, kernels
from xpu_lora_compile.inspect import doctor, predicted
from xpu_lora_compile.kernels.vendor import Vendor
from xpu_lora_compile.layers import host
from xpu_lora_compile.ops import lora_linear

B580 = SimpleNamespace(
    **DEVICES["bmg"], total_memory=12216 << 20, driver_version="1.6.33578", last_level_cache_size=18 << 20
)
# What such a machine has installed, and this one has not.
VERSIONS = {"vllm-xpu-kernels": "0.1.16.2"}


class Xpu(str):
    """A name of a device: PyTorch reads "cpu", everything else "xpu"."""

    __slots__ = ()

    def __new__(cls) -> Xpu:
        return str.__new__(cls, "cpu")

    def __eq__(self, other: object) -> bool:
        return other == str.__str__("xpu")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash("xpu")

    def __str__(self) -> str:
        return "xpu"

    def __format__(self, _spec: str) -> str:
        return "xpu"


class ClockOf:
    """A clock that says what it is told to, of a copy, of next to nothing, and then of each contender at each point.

    Args:
        copy: GB/s.
        nothing: microseconds.
        contenders: at each point, how many times its bound they take, in their order.
        runs: whether to run once what is timed.
    """

    def __init__(self, copy: float, nothing: float, *contenders: float, runs: bool = False) -> None:
        self.late, self.runs = 0, runs
        self.answers = self._answers(copy, nothing, contenders)

    def __call__(self, run: Callable[[int], object], _calls: int) -> float:
        if self.runs:
            run(0)
        return next(self.answers)

    def _answers(self, copy: float, nothing: float, contenders: Sequence[float]) -> Iterator[float]:
        yield 2 * predicted.BEYOND_CACHES / copy / 1e3
        yield nothing
        for (rows, rank), kernel in itertools.product(predicted.POINTS, ("shrink", "expand")):
            messages = predicted.message_time(predicted.MESSAGES[kernel, rows, rank], predicted.card_of(B580))
            bound = max(nothing, predicted.bytes_of(kernel, rows, rank) / copy / 1e3, messages)
            yield from (times * bound for times in contenders)


@contextmanager
def machine(*groups: dict[str, str], properties: Any = B580) -> Iterator[Xpu]:
    """Be on such a machine in the block: with these of the vendor's ops, and a card of these properties."""
    real, version_of = torch.get_device_module, doctor._version
    card = SimpleNamespace(
        is_available=lambda: True, get_device_properties=lambda _: properties, synchronize=lambda: None
    )
    with pytest.MonkeyPatch.context() as patch, xpu_c.installed(*groups):
        patch.setattr(
            torch, "get_device_module", wraps(real)(lambda device=None: card if device == "xpu" else real(device))
        )
        # Before the CPU's own kernels.
        patch.setattr(Vendor, "devices", ("xpu", "cpu"))
        patch.setattr(Vendor, "ranks_of_b_together_on", ("xpu", "cpu"))
        for name in ("bgmv", "lora_linear"):
            module = importlib.import_module(f"xpu_lora_compile.ops.{name}")
            patch.setattr(module, "takes_native", lambda _: False)
        patch.setattr(host, "add_lora_eagerly", _add_lora_eagerly)
        patch.setattr(backend, "generate_code", lambda graph_module, *_: graph_module.forward)
        installed = VERSIONS if groups else {}
        patch.setattr(doctor, "_version", lambda name: installed.get(name) or version_of(name))
        # It needs no memory, and so no CPU.
        patch.setattr(doctor, "choices", lambda _, choices=doctor.choices: choices("xpu"))
        patch.setattr(doctor, "verify", partial(doctor.verify, generate_code=False))
        patch.setattr(predicted, "BEYOND_CACHES", 1)
        kernels._candidates.cache_clear()
        try:
            yield Xpu()
        finally:
            kernels._candidates.cache_clear()


def _add_lora_eagerly(
    output: Tensor,
    inputs: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    indices: Tensor,
    columns: int,
    ranks: Tensor | None,
    tiles: Tensor | None = None,
) -> bool:
    """Add a layer's LoRA by one whole call, as on all accelerators; on a CPU it may be a shrink and an expand."""
    if is_compiling():
        return False
    output.copy_(lora_linear(output, inputs, [lora_a], [lora_b[:, :columns]], indices, [0], ranks=ranks))
    return True
