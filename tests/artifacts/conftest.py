"""What the tests of artifacts share."""

from __future__ import annotations

from pathlib import Path

import pytest
import serve_pt2
from support.artifacts import made_once


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's program in C++."""
    return made_once(tmp_path_factory, "serve_pt2", serve_pt2.make_program)
