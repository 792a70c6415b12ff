"""What `explain` found: as a table for a terminal, as JSON, and as a page to look at."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

from xpu_lora_compile.passes.calls import ROUTINGS
from xpu_lora_compile.terminal import FirstThatFits, plain_table, terminal_width, wrapped
from xpu_lora_compile.torch_internals import name_of

_SIZES = "T x D -> R -> W in H"
# The columns of the widest table: the facts that each one holds, in lines of a cell.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "sites": ("sites",),
    "where": ("module", "source"),
    _SIZES: (_SIZES,),
    "K": ("K",),
    "dtypes": ("dtypes",),
    "widths": ("widths", "guard"),
    "becomes": ("becomes",),
    "kernel": ("kernel",),
    "floor": ("floor",),
}
# What is done, step by step, to a table that is too wide. None moves a column's facts below the table.
_NARROWER: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("becomes", None),
    ("where", ("name",)),
    ("widths", ("widths",)),
    ("dtypes", None),
    ("K", None),
    ("kernel", None),
    ("widths", None),
    (_SIZES, None),
    ("where", None),
)
# What stands in front of a fact below the table.
_LABELS = {"module": "", "source": "", "guard": "guarded by ", _SIZES: f"{_SIZES}: "}
# How many lines of 80 columns the reasons for a kernel have.
_REASON_LINES = 2
# Columns beside the numbers of rows, in a terminal of 80.
_PATH_WIDTH = 76


@dataclass
class SiteReport:
    """One call that adds LoRA to an output.

    Attributes:
        module: path of the module that made the call; empty outside modules.
        source: `file:line` of the call.
        op: the public op that was called.
        shapes: the letters T, D, R, K, W, H, each with its size; a symbolic size as `s77 (here 5)`. Of several slices,
            R and W of each, separated by `+`.
        dtypes: of output, inputs, A and B.
        relation: of W to H: equal, narrower, wider, slice or undecided.
        guard: the condition under which the compiled graph is kept; None where the sizes are constants.
        call: the call of the final graph that does this site's work; sites of one call were fused.
        fused_with: the other sites of that call.
        kernel: which kernel runs it, at the number of rows of this run.
        because: why.
        others: why each of the other kernels does not.
        bytes: moved by this site at the least: the weights of the adapters that its rows can use, its columns of the
            output read and written, and its share of the input.
        floor_us: microseconds that these bytes take at the report's bandwidth.
        reaches_output: whether data flows from the call to what the graph returns.
        notes: what each pass did, or why it left the call alone.
    """

    module: str
    source: str
    op: str
    shapes: dict[str, str]
    dtypes: dict[str, str]
    relation: str
    guard: str | None
    call: str
    fused_with: list[str]
    kernel: str
    because: str
    others: dict[str, str]
    bytes: int
    floor_us: float
    reaches_output: bool
    notes: list[str]

    @property
    def place(self) -> str:
        """The module, or the source line outside of modules."""
        return self.module or self.source


@dataclass
class NodeReport:
    """One node of a graph.

    Attributes:
        type: dtype and shape, `f32[4, 576]`.
        text: the call.
        kind: "input", "lora", "routing", "view", "output" or "other".
        module: path of the module that made the call; of an input, where it comes from.
        subgraph: the subgraph that holds it, of a `cond` for example; empty in the graph itself.
        inputs: positions of the nodes whose values it takes.
        roles: what an op of this package calls each of them (`lora_a`); empty for other ops.
        writes: those of `inputs` that it changes in place.
        after: positions of the nodes that wrote, last before it, what it reads in memory.
        sites: positions, in the report, of the sites whose work it does.
    """

    name: str
    type: str
    text: str
    kind: str
    module: str
    subgraph: str
    inputs: list[int]
    roles: list[str]
    writes: list[int]
    after: list[int]
    sites: list[int]


@dataclass
class GraphReport:
    """One graph that Dynamo captured, before and after the passes."""

    before: list[NodeReport]
    after: list[NodeReport]
    calls_before: dict[str, int]
    calls_after: dict[str, int]


@dataclass
class Report:
    """What the compiler made of a model's LoRA; `str(report)` is a table.

    Attributes:
        sites: one for each call that adds LoRA.
        graphs: what was captured, before and after.
        bandwidth: GB/s at which the floors are stated.
        bandwidth_source: where that figure comes from.
        passes_seconds: what all passes took together.
        first_call_seconds: of the first call: capturing, the passes, compiling and one run.
        generated_code: whether Inductor compiled it; otherwise the rewritten graph ran operation by operation.
        problem: what `explain` raised about adapters without influence; empty if all is well.
        by_python: layers that ran outside of all graphs, since Dynamo left them to Python.
    """

    sites: list[SiteReport]
    graphs: list[GraphReport]
    bandwidth: float
    bandwidth_source: str
    passes_seconds: float
    first_call_seconds: float
    generated_code: bool
    versions: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    by_python: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Sites, the calls they became, and routing computations."""
        after = [graph.calls_after for graph in self.graphs]
        return {
            "sites": len(self.sites),
            "calls": len({site.call for site in self.sites}),
            "routings": sum(calls.get(name_of(op), 0) for calls in after for op in ROUTINGS),
            "graphs": len(self.graphs),
        }

    def to_json(self) -> str:
        """Everything, as JSON; `groups` holds the positions of like sites."""
        position = {id(site): at for at, site in enumerate(self.sites)}
        groups = [
            {"place": _family(group[0].place), "sites": [position[id(site)] for site in group]}
            for group in self.groups()
        ]
        return json.dumps({"format": 1, **asdict(self), "counts": self.counts, "groups": groups}, ensure_ascii=False)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs nothing else: the table, and the graphs before and after, drawn."""
        page = (files("xpu_lora_compile.inspect") / "report.html").read_text(encoding="utf-8")
        # "</script>" or "<!--" inside the data would change where the script ends.
        data = self.to_json().replace("<", "\\u003c")
        Path(path).write_text(page.replace("/*REPORT*/null", data), encoding="utf-8")

    def __str__(self) -> str:
        from rich.console import Console

        buffer = StringIO()
        width = terminal_width()
        console = Console(file=buffer, width=width, no_color=True, highlight=False, emoji=False, markup=False)
        for part in self.parts():
            console.print(part)
        return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))

    def parts(self) -> list[Any]:
        """What a terminal shows, for `rich.console.Console.print`: like sites of different layers as one row.

        Where the table is too wide for the terminal, it has fewer columns, and their facts stand below it.
        """
        return [*([FirstThatFits(self._layouts)] if self.sites else []), *self.summary()]

    def _layouts(self) -> Iterator[tuple[Any, Sequence[Any]]]:
        """The table with what stands below it, from the widest to the narrowest."""
        rows = [_facts(group) for group in self.groups()]
        columns = dict(_COLUMNS)
        yield _layout(rows, columns)
        for heading, facts in _NARROWER:
            if facts is None:
                del columns[heading]
            else:
                columns[heading] = facts
            yield _layout(rows, columns)

    def groups(self) -> list[list[SiteReport]]:
        """The sites, those together that differ in nothing but numbers in their modules' names."""
        groups: dict[Any, list[SiteReport]] = {}
        for site in self.sites:
            fused = tuple(_family(place) for place in site.fused_with)
            call = site.call.rsplit(" ", 1)[0]
            key = (_family(site.module), site.source, str(site.shapes), str(site.dtypes), site.relation, site.guard)
            groups.setdefault((*key, fused, call, site.kernel, site.reaches_output), []).append(site)
        return list(groups.values())

    def summary(self) -> list[str]:
        """The sentences below the table."""
        counts, total = self.counts, sum(site.floor_us for site in self.sites)
        how = "with Inductor" if self.generated_code else "without generating code"
        share = f"{100 * self.passes_seconds / self.first_call_seconds:.2g} %" if self.first_call_seconds else "-"
        dead = [site.place for site in self.sites if not site.reaches_output]
        graphs = _number(counts["graphs"], "graph")
        if not self.sites:
            return [f"No call that adds LoRA in {graphs}."]
        became = f"{_number(counts['sites'], 'site')} became {_number(counts['calls'], 'call')}"
        routings = f", with {_number(counts['routings'], 'routing computation')}" if counts["routings"] else ""
        took = f"The passes took {self.passes_seconds:.3g} s of {self.first_call_seconds:.3g} s for the first call"
        lines = [
            f"{became}{routings}, in {graphs}.",
            f"NOT REACHED, what its graph returns: {', '.join(dead)}."
            if dead
            else "Every site reaches the output of its graph.",
            f"Floor of all LoRA: {total:.3g} us, at {self.bandwidth:.3g} GB/s ({self.bandwidth_source}).",
            f"{took}, {how}: {share}.",
        ]
        if self.by_python:
            families = ", ".join(dict.fromkeys(_family(name) for name in self.by_python))
            lines.append(f"Not compiled, since Dynamo left it to Python, and right: {families}.")
        lines += self._reasons()
        kept: dict[str, dict[str, None]] = {}
        for site in self.sites:
            for note in site.notes:
                if any(word in note for word in ("not fused", "not used", "left", "launches")):
                    place = _family(site.module) or _short(site.source)
                    kept.setdefault(note, {})[place] = None
        return [*lines, *(f"{note}: {', '.join(places)}." for note, places in kept.items())]

    def _reasons(self) -> Iterator[str]:
        """Why each kernel runs or does not: two lines of 80 columns each. The JSON has every reason."""
        used = dict.fromkeys(site.kernel for site in self.sites)
        for kernel in dict.fromkeys((*used, *(name for site in self.sites for name in site.others))):
            runs = _merged(site.because for site in self.sites if site.kernel == kernel)
            others = _merged(site.others[kernel] for site in self.sites if kernel in site.others)
            yield _reason(kernel, runs, others)


def _reason(kernel: str, runs: list[str], others: list[str]) -> str:
    """The sentences on a kernel, with as many of the reasons as have room in two lines."""
    text = ""
    for kept in range(max(len(runs), len(others)), 0, -1):
        lead = "Not at every site" if runs else f"Not on {kernel}"
        said = [(f"Runs on kernel {kernel}", runs), (lead, others)]
        text = " ".join(f"{start}: {_first(kept, reasons)}." for start, reasons in said if reasons)
        if len(wrapped(text, width=80).split("\n")) <= _REASON_LINES:
            return text
    return wrapped(text, lines=_REASON_LINES, width=80).replace("\n", " ")


def _first(kept: int, reasons: list[str]) -> str:
    return "; ".join([*reasons[:kept], *([f"and {len(reasons) - kept} more"] if kept < len(reasons) else [])])


def _facts(group: list[SiteReport]) -> dict[str, str]:
    """What the row of a group says, by names of `_COLUMNS`; empty where there is nothing to say."""
    site = group[0]
    sizes = site.shapes
    place = _family(site.module) or _short(site.source)
    return {
        "sites": str(len(group)),
        "name": _short_module(place),
        "module": _family(site.module),
        "source": _short(site.source),
        _SIZES: f"{sizes['T']} x {sizes['D']} -> {sizes['R']} -> {sizes['W']} in {sizes['H']}".replace("x - ", ""),
        "K": sizes["K"],
        "dtypes": "/".join(dict.fromkeys(site.dtypes.values())),
        "widths": site.relation,
        "guard": site.guard or "",
        "becomes": _becomes(site),
        "kernel": site.kernel,
        "floor": f"{site.floor_us:.3g} us",
    }


def _layout(rows: list[dict[str, str]], columns: dict[str, tuple[str, ...]]) -> tuple[Any, list[Any]]:
    """The table with these columns, and after it the facts that have no column: the common ones once, then by row."""
    from rich.table import Table
    from rich.text import Text

    shown = {fact for facts in columns.values() for fact in facts}
    below = [fact for fact in rows[0] if fact not in shown and fact != "name"]
    same = [fact for fact in below if len(rows) > 1 and fact != "module" and len({row[fact] for row in rows}) == 1]
    common = [_said(fact, rows[0]) for fact in same if rows[0][fact]]
    own = [
        [
            _said(fact, row)
            for fact in below
            if fact not in same and row[fact] and not ("name" in shown and row[fact] == row["name"])
        ]
        for row in rows
    ]
    is_numbered = len(rows) > 1 and any(own)
    numbers = [[str(number)] if is_numbered else [] for number in range(1, len(rows) + 1)]
    cells = [
        [*number, *("\n".join(_in_cell(fact, row) for fact in facts if row[fact]) for facts in columns.values())]
        for number, row in zip(numbers, rows, strict=True)
    ]
    table = plain_table([*(["#"] if is_numbered else []), *columns], cells)
    details = Table.grid(padding=(0, 2, 0, 0))
    for number, said in zip(numbers, own, strict=True):
        if said:
            details.add_row(*map(Text, (*number, ", ".join(said).replace(", becomes ", ",\nbecomes "))))
    parts: list[Any] = [table, Text()]
    if common:
        parts.append(Text(f"In every row: {', '.join(common)}."))
    return table, [*parts, *([details, Text()] if any(own) else [])]


def _in_cell(fact: str, row: dict[str, str]) -> str:
    return f"if {row[fact]}" if fact == "guard" else row[fact].replace(" + ", "\n+ ")


def _said(fact: str, row: dict[str, str]) -> str:
    return f"{_LABELS.get(fact, fact + ' ')}{_path(row[fact]) if fact in ('module', 'source') else row[fact]}"


def _path(path: str) -> str:
    """The path, in several lines where it is longer than one: they end where a name ends."""
    lines = [""]
    for name in re.split(r"(?<=[./])", path):
        if lines[-1] and len(lines[-1] + name) > _PATH_WIDTH:
            lines.append("")
        lines[-1] += name
    return "\n".join(lines)


# A number that stands by itself: not that of `float32` or of a version.
_FIGURE = r"(?<![\w.])\d+(?:\.\d+)?(?!\.?\w)"


def _merged(reasons: Iterable[str]) -> list[str]:
    """The different reasons. Those that differ in numbers alone are one, with the least and the largest number."""
    alike: dict[str, list[str]] = {}
    for reason in dict.fromkeys(reasons):
        alike.setdefault(re.sub(_FIGURE, "#", reason), []).append(reason)
    merged = []
    for same in alike.values():
        figures = [
            sorted(set(each), key=float) for each in zip(*(re.findall(_FIGURE, line) for line in same), strict=True)
        ]
        ranges = iter([each[0] if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in figures])
        merged.append(re.sub(_FIGURE, lambda _, ranges=ranges: next(ranges), same[0]))  # type: ignore[misc]
    return merged


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _becomes(site: SiteReport) -> str:
    name = site.call.rsplit(" ", 1)[0]
    return name + "".join(f" + {_short_module(_family(place))}" for place in site.fused_with)


def _family(place: str) -> str:
    """A module's path with the numbers of layers left open: model.layers.*.mlp."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", place) if "/" not in place else place


def _short_module(place: str) -> str:
    return place.rsplit(".", 1)[-1] if "/" not in place else _short(place)


def _short(source: str) -> str:
    return "/".join(Path(source).parts[-2:]) if source else ""
