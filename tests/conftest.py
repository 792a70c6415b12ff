"""Caches of compiled code start empty, so that no test is answered by an earlier run."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

# Before torch is imported; the folder goes away with the process. Those that pytest-xdist starts share their parent's:
# precompiled headers and what the compiler says of the processor take as long to make as ten graphs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="xpu-lora-tests-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
# Where there is no GPU to run them, Triton's interpreter runs the kernels. It is asked for as Triton is imported; a
# process that a test starts sees it, too. The leg `intel` has it 0.
if os.environ.get("XPU_LORA_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Where IPEX is, everything is tested beside it: importing it exchanges some of PyTorch's own kernels.
if find_spec("intel_extension_for_pytorch") is not None:
    import intel_extension_for_pytorch  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-case-in", type=int, default=1, help="of each sweep run the first case, and every nth after it"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each test that is marked as a sweep, leave out the cases that the option --one-case-in leaves out."""
    every, cases = config.getoption("--one-case-in"), Counter[str]()
    left_out: list[pytest.Item] = []
    for item in items:
        if item.get_closest_marker("sweep"):
            test = item.nodeid.split("[", 1)[0]
            if cases[test] % every:
                left_out.append(item)
            cases[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        out = set(left_out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors here are tiny, and the cores are shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def without_caches() -> Iterator[None]:
    """Inductor compiles every graph anew, and so runs every pass."""
    import torch._functorch.config
    import torch._inductor.config

    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
