"""Every pass that a test here runs leaves a well-formed graph behind."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from support.structure import check_structure
from torch.fx import Graph

from xpu_lora_compile import passes
from xpu_lora_compile.passes.graph import Rewrite


@pytest.fixture(autouse=True)
def _structure_is_checked_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PIPELINE", tuple(map(_checked, passes.PIPELINE)))


def _checked(transform: Callable[[Graph, Rewrite], None]) -> Callable[[Graph, Rewrite], None]:
    @functools.wraps(transform)
    def run(graph: Graph, rewrite: Rewrite) -> None:
        transform(graph, rewrite)
        check_structure(graph)

    return run
