"""What a call has launched is launched again without its Python: on a CPU, with a double of CUDA's driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In a process of its own, since the library answers for ops of the CPU there."""
    folder = tmp_path_factory.mktemp("replay")
    command = [sys.executable, str(SUPPORT / "replay_double.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ("Python runs once for operands alike", "1 of 4 calls"),
        ("results are those of the operands given", "True"),
        ("views keep their place in operands whose memory they share", "True"),
        ("a base product is recorded with its bias", "1 of 3 calls, True"),
        ("a product is added to what was written", "1 of 3 calls, True"),
        ("a list of tensors comes back", "1 of 3 calls, [(3, 5), (3, 4)]"),
        ("a tensor that was allocated comes back", "recorded"),
        ("one tensor in two places", "True"),
        ("another number of rows", "recorded"),
        ("other strides", "recorded"),
        ("another alignment", "recorded"),
        ("another factor", "recorded"),
        ("another dtype", "recorded"),
        ("none in place of a tensor", "recorded"),
        ("an op that is not recorded", "4 of 4 calls, True"),
        ("an error", "raised, and the next call is right: True"),
        ("while a graph is captured", "2 of 2 calls"),
        ("in a block that wants Python", "2 of 2 calls"),
        ("operands with gradients", "2 of 2 calls"),
        ("a kernel with other parameters", "2 of 2 calls"),
        ("four threads", "True"),
        ("more shapes than are kept", "True, at most 4096"),
        ("after forget", "recorded"),
    ],
)
def test_fact(answers: dict[str, str], fact: str, expected: str) -> None:
    assert answers[fact] == expected
