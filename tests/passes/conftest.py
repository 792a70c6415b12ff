"""Every pass that a test here runs leaves a well-formed graph behind."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from support.structure import check_structure
from torch.fx import Graph

from xpu_lora_compile import passes


@pytest.fixture(autouse=True)
def _structure_is_checked_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PIPELINE", tuple(map(_checked, passes.PIPELINE)))


def _checked(transform: Callable[[Graph], None]) -> Callable[[Graph], None]:
    @functools.wraps(transform)
    def run(graph: Graph) -> None:
        transform(graph)
        check_structure(graph)

    return run
