"""Which kernel runs a call: one pure function over one table of measurements.

Asked when an op runs (an answer is remembered, and then costs about a microsecond), and by whoever explains a graph:
so a compiled graph holds no guard on T, and each T still gets the kernel that is best for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from xpu_lora_compile.errors import KernelError

KERNELS = ("native", "triton", "gather", "grouped", "dense", "ipex")
TABLE = Path(__file__).with_name("measured.json")


class Call(NamedTuple):
    """What a choice depends on."""

    # The type of device: "cpu", "cuda", "xpu".
    device: str
    # Of the weights; "float64" as soon as one operand is.
    dtype: str
    # T, K, R.
    rows: int
    slots: int
    rank: int
    # D, and the columns of all slices together; 0 for a call that only expands, or only shrinks.
    features: int
    width: int
    # How many slices there are.
    slices: int = 1


@dataclass(frozen=True)
class Choice:
    """A kernel, why it was taken, and why each of the others was not."""

    kernel: str
    because: str
    others: Mapping[str, str]


@lru_cache(maxsize=4096)
def choose(
    call: Call,
    native_problem: str = "",
    forced: str | None = None,
    triton_problem: str = "",
    ipex_problem: str = "",
) -> Choice:
    """The kernel for a call: of those that can run it, the fastest at the nearest point of the table.

    Args:
        call: the sizes.
        native_problem: why the native kernel cannot run on this machine, if it cannot.
        forced: a kernel that is to be taken, whatever the table says.
        triton_problem: why Triton kernels cannot run on this device, if they cannot.
        ipex_problem: why IPEX's kernels cannot run this call, if they cannot.

    Raises:
        KernelError: there is no kernel of the forced name, or it cannot run this call.
    """
    problems = {"native": native_problem, "triton": triton_problem, "ipex": ipex_problem}
    refused = {kernel: why for kernel in KERNELS if (why := _refusal(kernel, call, problems))}
    if forced is not None:
        _check_forced(forced, refused)
        rest = {kernel: refused.get(kernel, "another was forced") for kernel in KERNELS if kernel != forced}
        return Choice(forced, "it was forced", rest)
    refused.setdefault("ipex", "it rounds oftener than the contract allows: it has to be forced")
    able = [kernel for kernel in KERNELS if kernel not in refused]
    point = _nearest_point(call)
    if point is None:
        few = call.rows <= call.slots
        kernel = next(one for one in ("native", "triton", "gather" if few else "grouped", "dense") if one in able)
        because = f"nothing was measured on {call.device}; T = {call.rows} {'<=' if few else '>'} K = {call.slots}"
        return Choice(kernel, because, {other: refused.get(other, because) for other in KERNELS if other != kernel})
    times = {kernel: time for kernel, time in point["us"].items() if kernel in able}
    kernel = min(times, key=lambda one: times[one])
    where = "T = {rows}, K = {slots}, R = {rank}, D = {features}, W = {width}, {dtype}".format(**point)
    others = {
        other: refused.get(other) or f"{times[other] / times[kernel]:.1f} times slower there"
        if other in times
        else refused.get(other, "not measured there")
        for other in KERNELS
        if other != kernel
    }
    return Choice(kernel, f"measured fastest at the nearest point, {where}", others)


@cache
def wins_everywhere(kernel: str, device: str) -> bool:
    """Whether a kernel was the fastest at every point that was measured on a device."""
    points = _points(device)
    return bool(points) and all(min(point["us"], key=point["us"].get) == kernel for point in points)


# Read once: asking the environment takes longer than all else that a choice costs.
_FORCED: ContextVar[str | None] = ContextVar("forced", default=os.environ.get("XPU_LORA_KERNEL") or None)

forced_kernel = _FORCED.get


@contextmanager
def force_kernel(kernel: str) -> Iterator[None]:
    """Have calls in the block run on one kernel; the environment variable XPU_LORA_KERNEL does it for a process.

    Those that run eagerly, or that are compiled in the block. Code that was compiled before may keep its kernel, as
    nothing guards this: compile in the block, or set the variable.

    Args:
        kernel: "native", "triton", "gather", "grouped", "dense" or "ipex".

    Raises:
        KernelError: there is no such kernel. A call that it cannot run raises it, too.
    """
    check_name(kernel)
    token = _FORCED.set(kernel)
    try:
        yield
    finally:
        _FORCED.reset(token)


def _refusal(kernel: str, call: Call, problems: Mapping[str, str]) -> str:
    if kernel in ("native", "grouped", "ipex") and call.device != "cpu":
        return f"it is for a CPU, not for {call.device}"
    if kernel in ("native", "triton") and call.dtype == "float64":
        return "it computes in float32"
    return problems.get(kernel, "")


def _check_forced(forced: str, refused: Mapping[str, str]) -> None:
    check_name(forced)
    if forced in refused:
        able = ", ".join(kernel for kernel in KERNELS if kernel not in refused)
        got = f"{forced!r}, which cannot: {refused[forced]}"
        raise KernelError("forced kernel", "one that can run this call", got, f"Force none, or one of {able}.")


def check_name(kernel: str) -> None:
    """Raise a KernelError if there is no kernel of this name."""
    if kernel not in KERNELS:
        raise KernelError("forced kernel", f"one of {', '.join(KERNELS)}", repr(kernel), "Correct the name.")


@cache
def _points(device: str) -> list[dict[str, Any]]:
    return [point for point in json.loads(TABLE.read_text(encoding="utf-8"))["points"] if point["device"] == device]


def _nearest_point(call: Call) -> dict[str, Any] | None:
    """The measured call with the least distance, in octaves, from this one; another dtype counts as four."""

    def distance(point: dict[str, Any]) -> float:
        octaves: Iterator[float] = (
            math.log2((1 + getattr(call, size)) / (1 + point[size]))
            for size in ("rows", "slots", "rank", "features", "width")
        )
        other_dtype: bool = point["dtype"] != call.dtype
        return sum(step * step for step in octaves) + 16 * other_dtype

    return min(_points(call.device), key=distance, default=None)
