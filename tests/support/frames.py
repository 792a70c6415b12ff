"""What a call costs in Python, without a clock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import xpu_lora_compile as xlc

ROOT = str(Path(xlc.__file__).parent)


def frames_of(call: Callable[[], object]) -> list[str]:
    """The functions of the package that one call enters, by name."""
    names: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # A loop in an expression is a frame in some versions of Python.
        if event == "call" and code.co_filename.startswith(ROOT) and not code.co_name.startswith("<"):
            names.append(code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names
