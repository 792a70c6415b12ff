"""These tests want Intel's Triton compiler, in a process that compiles: tox leg `intel`. Elsewhere none is there."""

from __future__ import annotations

import os
import tempfile

from intel.toolchain import problem

# A run of these tests alone then finds none, which is an error to pytest.
if problem():
    collect_ignore_glob = ["test_*.py"]
# What one process of pytest-xdist has compiled the others need not, and no test is answered by an earlier run.
elif "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="xpu-lora-intel-", ignore_cleanup_errors=True)
    os.environ["TRITON_CACHE_DIR"] = _CACHE.name


def pytest_report_header() -> str | None:
    """Say why there is nothing to collect."""
    return f"tests/intel: not collected, as {problem()}" if problem() else None
