"""Layouts for a terminal of 80 columns: words stay whole, and where there is room there are fewer lines."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from xpu_lora_compile.bench.measure import Timing
from xpu_lora_compile.bench.show import timings_table
from xpu_lora_compile.inspect.doctor import Finding
from xpu_lora_compile.inspect.verify import SiteError, Verification
from xpu_lora_compile.terminal import wrapped

NAMES = ("ours, compiled", "ours, eager", "gather, Inductor", "loop as PEFT's", "vLLM's, Inductor")


def timings_at(width: int) -> str:
    timings = {name: Timing(100.0 * (at + 1), 0.04, 9) for at, name in enumerate(NAMES)}
    buffer = StringIO()
    table = timings_table("a step", "point", NAMES[0], {"float32 T1; floor 40 us": timings, "float32 T8": timings})
    Console(file=buffer, width=width).print(table)
    return buffer.getvalue()


def test_a_table_of_timings_keeps_every_contender_whole_at_80_columns() -> None:
    lines = timings_at(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines if "Inductor" in line] == [
        "gather, Inductor  300 ±4% = 3.00x",
        "vLLM's, Inductor  500 ±4% = 5.00x",
    ] * 2


def test_where_there_is_room_a_point_is_one_row() -> None:
    (row,) = [line for line in timings_at(140).splitlines() if line.startswith("float32 T8")]
    assert " ".join(row.split()).endswith("100 ±4% 200 ±4% = 2.00x 300 ±4% = 3.00x 400 ±4% = 4.00x 500 ±4% = 5.00x")


def test_text_is_broken_between_words_alone() -> None:
    text = wrapped(f"a bgmv-shrink of {'x' * 30}", indent=2, width=16)
    assert text == f"a bgmv-shrink of\n  {'x' * 30}"
    assert wrapped("one two three", lines=1, width=10) == "one two …"


@pytest.mark.parametrize(
    "text",
    [
        Verification(
            [SiteError(f"model.layers.{'long_name.' * 3}q_proj", 0.1, 2.0, False, (1, 2))], 0.5, 1, False, {"a": 1}
        ),
        Finding("T = 1", "native, measured fastest; " * 9, is_right=False),
    ],
)
def test_what_verify_and_doctor_say_fits_80_columns(text: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    wide = str(text)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, str(text).splitlines())) <= 80
    assert str(text).split() == wide.split()
