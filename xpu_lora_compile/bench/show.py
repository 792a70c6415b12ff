"""What the benchmarks print, save and draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from xpu_lora_compile.bench.measure import Timing, geometric_mean
from xpu_lora_compile.command import print_parts
from xpu_lora_compile.errors import BenchError
from xpu_lora_compile.kernels import forced_kernel, kernel_named
from xpu_lora_compile.terminal import FirstThatFits, plain_table

# From where on a median says little.
MOST_SPREAD = 0.25
DTYPES = ("float32", "bfloat16", "float16")


def check(device: str, dtypes: Sequence[str], sizes: Sequence[int], *files: Path | None) -> None:
    """Check what a command was told, before anything runs.

    Raises:
        BenchError: a dtype or size that cannot be, a device that is not there, or a folder that does not exist.
        KernelError: XPU_LORA_KERNEL names no kernel.
    """
    if (forced := forced_kernel()) is not None:
        kernel_named(forced)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise BenchError("bench: dtype", ", ".join(DTYPES), repr(dtype), "Choose one of these with --dtype.")
    if any(size < 1 for size in sizes):
        raise BenchError("bench", "sizes of at least 1", str(list(sizes)), "Give 1 or more for each.")
    if device not in ("cpu", "cuda", "xpu") or not (device == "cpu" or torch.get_device_module(device).is_available()):
        raise BenchError("bench: device", "cpu, or cuda or xpu where there is one", repr(device), "Choose another.")
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise BenchError("bench", "a folder that exists", str(file.parent), "Make it first.")


@contextmanager
def progress(total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; call what it gives with what was just done."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=total)

        def advance(what: str) -> None:
            bar.update(task, advance=1, description=what)

        yield advance


def print_run(
    run: Any,
    title: str,
    first: str,
    ours: str,
    places: Mapping[str, Mapping[str, Timing]],
    file: Path | None,
    ours_is_faster: bool = False,
) -> None:
    """Print what was measured, with its machine and its summary, and write it as JSON if a file is given.

    Args:
        run: one of the benchmarks' runs.
        title: what was timed.
        first: what a place is.
        ours: the contender of whose time the other times are multiples.
        places: the timings of each contender at each place.
        file: where the JSON goes.
        ours_is_faster: whether "ours" in the summary is the faster of two ways to call ours.
    """
    print_parts(timings_table(f"{title}; {run.machine}", first, ours, places))
    if summary := getattr(run, "summary", None):
        print_parts(summary_table(summary, ours_is_faster))
    print_parts(noise(places.values()))
    save(run, file)


def timings_table(title: str, first: str, ours: str, rows: Mapping[str, Mapping[str, Timing]]) -> FirstThatFits:
    """Each contender's median, spread, and time as a multiple of `ours`, at each place that was measured.

    A place is a row where that is no wider than the terminal, and else has a row for each contender.
    """
    names = list(dict.fromkeys(name for timings in rows.values() for name in timings))
    caption = f"median ± half the distance between quartiles = time as a multiple of: {ours}"

    def layouts() -> Iterator[tuple[Table, tuple[Any, ...]]]:
        cells = [[place, *(_timing(timings, name, ours) for name in names)] for place, timings in rows.items()]
        wide = plain_table((first, *(f"{name}, us" for name in names)), cells)
        yield wide, (Text(title), Text(), wide, Text(), Text(caption), Text())
        parts: list[Any] = [Text(title)]
        for place, timings in rows.items():
            narrow = Table.grid(padding=(0, 2, 0, 0))
            # Of one width, so that the figures of all places are one column.
            narrow.add_column(min_width=max(map(len, names)) + 2)
            for name in names:
                narrow.add_row(*map(Text, (f"  {name}", _timing(timings, name, ours))))
            parts += [Text(), Text(place), narrow]
        yield narrow, (*parts, Text(), Text(f"us, {caption}"), Text())

    return FirstThatFits(layouts)


def _timing(timings: Mapping[str, Timing], name: str, ours: str) -> str:
    timing = timings.get(name)
    if timing is None:
        return "-"
    ratio = "" if name == ours else f" = {timing.median / timings[ours].median:.2f}x"
    return f"{_figures(timing.median)} ±{timing.spread:.0%}{ratio}"


def _figures(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def noise(timings: Iterable[Mapping[str, Timing]]) -> str:
    """A warning, if what was measured cannot be relied on; empty otherwise."""
    widest = max(timing.spread for each in timings for timing in each.values())
    if widest <= MOST_SPREAD:
        return ""
    return f"Spread up to {widest:.0%}: something else was running. On an idle machine the figures would be others."


def save(run: object, file: Path | None) -> None:
    """Write what was measured as JSON, if a file is given."""
    if file is not None:
        data = asdict(run) if is_dataclass(run) and not isinstance(run, type) else run
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def summary_table(summary: Mapping[str, float], ours_is_faster: bool = False) -> Table:
    """What it comes to; whether "ours" in it is the faster of two ways to call ours."""
    heading = "summary (ours: the faster of compiled and eager)" if ours_is_faster else "summary"
    table = Table(heading, Column("", no_wrap=True), box=box.SIMPLE_HEAD, show_edge=False)
    for name, value in summary.items():
        table.add_row(Text(name), f"{value:.3g}")
    return table


def plot(results: Sequence[Any], file: Path) -> None:
    """Draw time against T for each contender, a panel for each size, with the floor; geometric means over the rest.

    Raises:
        BenchError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise BenchError("bench: --plot", "matplotlib", "none", "pip install matplotlib.") from missing
    panels: dict[tuple[str, int, tuple[int, ...]], dict[int, list[Any]]] = {}
    for result in results:
        point = result.point
        panels.setdefault((point.dtype, point.features, point.widths), {}).setdefault(point.rows, []).append(result)
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for number, ((dtype, features, widths), by_rows) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        rows = sorted(by_rows)
        for name in dict.fromkeys(name for each in by_rows.values() for result in each for name in result.timings):
            at = [t for t in rows if all(name in result.timings for result in by_rows[t])]
            medians = [geometric_mean(result.timings[name].median for result in by_rows[t]) for t in at]
            axes.plot(at, medians, "o-", label=name)
        floor = [geometric_mean(result.floor for result in by_rows[t]) for t in rows]
        axes.plot(rows, floor, "k--", label="floor by bandwidth")
        axes.set(xscale="log", yscale="log", xlabel="T, rows", ylabel="microseconds a call")
        axes.set_title(f"{dtype}, {features} to {'+'.join(map(str, widths))}")
        axes.set_xticks(rows, [str(t) for t in rows])
    figure.axes[0].legend()
    figure.savefig(file, dpi=120)
