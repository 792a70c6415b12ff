"""The server while its adapters change; `benchmarks/vllm_soak.py` runs for as long as one likes."""

from __future__ import annotations

import pytest

from benchmarks import vllm_soak


def test_every_answer_is_whole_that_of_an_adapter_which_its_name_had(capsys: pytest.CaptureFixture[str]) -> None:
    status = vllm_soak.main(["--seconds", "120", "--names", "40", "--", "--enforce-eager"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    counts = dict(line.split(": ") for line in printed.splitlines() if line.count(": ") == 1)
    assert all(int(counts[what]) > 0 for what in ("answers", "loads in place", "unloads", "broken adapters refused"))
