"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ["ops.bgmv", "ops.lora_linear", "ops.moe", "passes.decisions", "backend", "inspect.explain", "inspect.verify"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"xpu_lora_compile.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
