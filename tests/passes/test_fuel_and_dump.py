"""`XPU_LORA_FUEL` and `XPU_LORA_DUMP`, with which a wrong rewrite is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import DEVICE
from support.snapshot import as_text, compiled_with, graphs_of_compiling
from torch import Tensor
from torch.fx import GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.passes import DUMP, FUEL, PIPELINE

T, D, R, K, H = 3, 4, 2, 2, 8
_generator = torch.Generator().manual_seed(0)
X, Y, A, B = (torch.randn(shape, generator=_generator).to(DEVICE) for shape in ((T, D), (T, H), (K, R, D), (K, H, R)))
INDICES = torch.tensor([0, -1, 1], device=DEVICE)


def every_pass_has_work(x: Tensor, y: Tensor) -> Any:
    """A rewrite for each of resolve_width, fuse_lora, share_routing and share_input, and two for lower."""
    hidden, output = x.new_zeros(T, R), y * 2
    xlc.bgmv_shrink(hidden, x, A, INDICES)
    xlc.bgmv_expand(output, hidden, B, INDICES)
    others = [xlc.lora_linear(y + 1, x, [A], [B], INDICES + 1, [0]) for _ in range(2)]
    return output, *others


ENOUGH = 6


def texts_with(fuel: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(FUEL, "" if fuel is None else str(fuel))
    (text,) = graphs_of_compiling(every_pass_has_work, X, Y)
    return text


@pytest.mark.parametrize("fuel", range(ENOUGH + 1))
def test_numbers_are_right_at_every_stop(fuel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FUEL, str(fuel))
    with torch.no_grad():
        got, expected = compiled_with(xlc.rewrite, every_pass_has_work)(X, Y), every_pass_has_work(X, Y)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_every_unit_of_fuel_is_one_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    untouched = graphs_of_compiling(every_pass_has_work, X, Y, passes=lambda _module: None)
    stops = [texts_with(fuel, monkeypatch) for fuel in range(ENOUGH + 1)]
    assert stops[0] == untouched[0]
    assert len(set(stops)) == ENOUGH + 1


def test_much_fuel_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = texts_with(None, monkeypatch)
    assert texts_with(ENOUGH, monkeypatch) == unlimited
    assert texts_with(1000, monkeypatch) == unlimited
    assert texts_with(ENOUGH - 1, monkeypatch) != unlimited


def test_fuel_is_for_each_program_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts_with(2, monkeypatch) == texts_with(2, monkeypatch)


@pytest.mark.parametrize("value", ["-1", "1.5", "all", " "])
def test_fuel_that_is_no_number_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FUEL, value)
    with pytest.raises(xlc.LoraError, match="XPU_LORA_FUEL: wanted a number of rewrites"):
        xlc.rewrite(torch.fx.symbolic_trace(torch.nn.Identity()))


def test_the_graph_is_written_before_and_after_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DUMP, str(tmp_path / "new"))
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        texts.append(as_text(module))
        xlc.rewrite(module)
        texts.append(as_text(module))

    with torch.no_grad():
        compiled_with(passes, every_pass_has_work)(X, Y)
    (folder,) = (tmp_path / "new").iterdir()
    names = [f"{at}-{each.__name__}-{when}.txt" for at, each in enumerate(PIPELINE) for when in ("after", "before")]
    assert sorted(file.name for file in folder.iterdir()) == sorted(names)
    assert (folder / names[1]).read_text() == texts[0] + "\n"
    assert (folder / names[-2]).read_text() == texts[1] + "\n"
    for earlier, later in zip(names[::2], names[3::2], strict=False):
        assert (folder / earlier).read_text() == (folder / later).read_text()


def test_each_program_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DUMP, str(tmp_path))
    for _ in range(2):
        graphs_of_compiling(every_pass_has_work, X, Y)
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DUMP, raising=False)
    graphs_of_compiling(every_pass_has_work, X, Y)
    assert list(tmp_path.iterdir()) == []
