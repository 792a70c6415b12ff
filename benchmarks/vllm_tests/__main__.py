"""Runs vLLM's own LoRA tests, release by release: see the package."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .adapt import EVERY, RESULTS
from .release import importable, installed, sources

# Of `tests/lora`: those that need no GPU and no model of the hub.
FILES = ["layers", "layers_utils", "lora_manager", "lora_utils", "lora_weights", "peft_helper", "punica_ops"]
FILES += ["resolver", "utils", "worker"]

Outcomes = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tests of each release, and print a table."""
    parser = argparse.ArgumentParser(description="Run vLLM's own LoRA tests on the plugin's wrapper.")
    parser.add_argument("folder", type=Path, help="for what is got from the registry; it is kept")
    parser.add_argument("versions", nargs="+", help="releases of vLLM")
    parser.add_argument("--every", type=int, default=1, help="run each nth case of test_layers and test_punica_ops")
    parser.add_argument("--files", nargs="*", default=FILES, help=f"of {', '.join(FILES)}")
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print("| vLLM | test file | passed | failed | of these without the plugin, too | skipped |")
    print("|---|---|---|---|---|---|")
    for version in options.versions:
        files = [f"tests/lora/test_{name}.py" for name in options.files]
        outcomes = _run(version, files, folder, options.every)
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        stock = _run(version, failed, folder, options.every, XPU_LORA_VLLM="0") if failed else {}
        for file in files:
            count = Counter(outcome for test, outcome in outcomes.items() if test.startswith(file))
            too = sum(test.startswith(file) and outcome == "failed" for test, outcome in stock.items())
            cells = (version, Path(file).name, count["passed"], count["failed"], too, count["skipped"])
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _run(version: str, tests: list[str], folder: Path, every: int, **environment: str) -> Outcomes:
    """What became of each test, in a process of its own."""
    # The tests import `tests.utils`: a folder that has them and not the sources of vLLM beside them.
    root = folder / f"tests-{version}"
    root.mkdir(exist_ok=True)
    if not (root / "tests").exists():
        (root / "tests").symlink_to(sources(version, folder) / "tests")
    paths = [str(root), str(Path(__file__).parents[2])]
    if version != _installed_version():
        paths.insert(0, str(importable(version, folder)))
    log = folder / f"log-{version}{'-stock' if environment else ''}.txt"
    with tempfile.TemporaryDirectory() as scratch, log.open("a") as file:
        results = Path(scratch, "results.json")
        environment |= {"PYTHONPATH": os.pathsep.join(paths), RESULTS: str(results), EVERY: str(every)}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": scratch}
        environment["TMPDIR"] = scratch
        plugins = ["-p", "no:cacheprovider", "-p", f"{__package__}.adapt"]
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(root), *plugins, *tests]
        done = subprocess.run(command, cwd=root, env=os.environ | environment, stdout=file, stderr=file)  # noqa: S603
        if not results.exists():
            raise SystemExit(f"benchmarks.vllm_tests: pytest ended with {done.returncode}: read {log}.")
        outcomes: Outcomes = json.loads(results.read_text())
        return outcomes


def _installed_version() -> str:
    text = (installed() / "_version.py").read_text()
    return text.split("__version__ = version = '")[1].split("'")[0]


if __name__ == "__main__":
    main()
