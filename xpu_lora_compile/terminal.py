"""How text and tables are laid out for a terminal: for its width, and with every word whole."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

# The width where there is no terminal, in a file for example.
NO_TERMINAL = 140


def terminal_width() -> int:
    """Columns of the terminal, or what the variable COLUMNS says."""
    return shutil.get_terminal_size((NO_TERMINAL, 24)).columns


def wrapped(text: str, indent: int = 0, lines: int | None = None, width: int | None = None) -> str:
    """Break a text between words, for the terminal's width.

    Args:
        text: one paragraph.
        indent: spaces in front of every line but the first.
        lines: how many lines there may be; what is left out ends in an ellipsis.
        width: columns; by default those of the terminal.
    """
    return textwrap.fill(
        text,
        width or terminal_width(),
        subsequent_indent=" " * indent,
        max_lines=lines,
        placeholder=" …",
        break_long_words=False,
        break_on_hyphens=False,
    )


def plain_table(headings: Iterable[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Any:
    """A table without vertical lines. Its cells are never wrapped; a cell may have several lines of its own."""
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    columns = (Column(Text(heading), no_wrap=True) for heading in headings)
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for cells in rows:
        # As `Text`, a bracket or a colon in a name has no meaning to rich.
        table.add_row(*map(Text, cells))
    return table


class FirstThatFits:
    """The first of several layouts whose table is no wider than the terminal; else the last one.

    Args:
        layouts: returns the layouts, the widest first. Each one is its table, and what stands around the table.
    """

    def __init__(self, layouts: Callable[[], Iterable[tuple[Any, Sequence[Any]]]]) -> None:
        self.layouts = layouts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Yield what rich prints."""
        from rich.measure import Measurement

        unlimited = options.update(width=10_000)
        chosen: Sequence[Any] = ()
        for table, parts in self.layouts():
            chosen = parts
            if Measurement.get(console, unlimited, table).maximum <= options.max_width:
                break
        yield from chosen
