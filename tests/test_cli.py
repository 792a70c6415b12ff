from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import xpu_lora_compile as xlc
from xpu_lora_compile.cli import app

MODELS = """
from contextlib import contextmanager

import torch
import xpu_lora_compile as xlc


def model():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


@contextmanager
def served():
    tiny = model()
    with xlc.attach(tiny, slots=2, max_rank=2).use([None, None, None]):
        yield tiny, (torch.ones(3, 8),)


def pruned():
    tiny = model()
    xlc.attach(tiny, slots=2, max_rank=2)
    return tiny, [torch.ones(3, 8)], {}


def nothing():
    return None


def failing():
    raise xlc.LoraError("the factory", "luck", "none", "Try again.")


number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "served_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    # The command puts the current folder there, and a module that another test imported must not be found.
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("served_models", None)


def call(*args: str) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(args))
    return result.exit_code, result.stdout, result.stderr


def test_explain_prints_the_table_and_writes_page_and_json(folder: Path) -> None:
    args = ("--html", "page.html", "--json", "report.json", "--bandwidth", "20")
    code, out, _ = call("explain", "served_models:served", *args)
    assert code == 0
    assert "2 sites became 2 calls" in out
    assert "20 GB/s (as told)" in out
    assert [site["module"] for site in json.loads((folder / "report.json").read_text())["sites"]] == ["0", "2"]
    assert (folder / "page.html").read_text().startswith("<!doctype html>")


def test_explain_of_a_dead_adapter_shows_the_report_and_fails(folder: Path) -> None:
    code, out, err = call("explain", "served_models:pruned", "--json", "report.json")
    assert code == 1
    assert "No call that adds LoRA in 1 graph." in out
    assert "none for 0, 2" in " ".join(err.split())
    assert json.loads((folder / "report.json").read_text())["sites"] == []


def test_verify_prints_the_errors_of_the_sites() -> None:
    code, out, _ = call("verify", "served_models:served", "--no-generate-code", "--seed", "1")
    assert code == 0
    assert "2 sites, 2 of them right" in out


def test_grad_mode_is_off_unless_asked_for() -> None:
    for args, op in (((), "bgmv_expand"), (("--grad",), "lora_linear")):
        assert call("explain", "served_models:served", "--json", "report.json", *args)[0] == 0
        assert {site["op"] for site in json.loads(Path("report.json").read_text())["sites"]} == {op}


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("served_models", "wanted MODULE:FACTORY"),
        ("missing_models:served", "No module named 'missing_models'"),
        ("served_models:missing", "wanted a function of served_models"),
        ("served_models:number", "wanted a function of served_models"),
        ("served_models:nothing", "wanted (model, args)"),
        ("served_models:failing", "wanted luck"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "verify"])
def test_a_factory_that_gives_no_model_is_an_error_without_a_traceback(command: str, factory: str, said: str) -> None:
    code, _, err = call(command, factory)
    assert code == 2
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def test_a_file_that_cannot_be_written_is_an_error_without_a_traceback() -> None:
    code, out, err = call("explain", "served_models:served", "--json", "missing/report.json")
    assert code == 2
    assert "the folder of missing/report.json does not exist" in err
    # Found out before the work is done.
    assert not out


def test_an_error_of_ours_that_dynamo_wraps_is_said_without_a_traceback() -> None:
    with xlc.force_kernel("ipex"):
        code, _, err = call("explain", "served_models:served", "--bandwidth", "20")
    assert code == 2
    assert err.startswith("forced kernel: wanted")
    assert "Traceback" not in err


def test_help_lists_the_commands() -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert "explain" in out
    assert "verify" in out


@pytest.mark.parametrize("factory", ["served_models:raising", "served_models:needing", "broken_models:served"])
def test_an_error_of_the_factory_is_shown_whole_and_is_no_verdict(factory: str, folder: Path) -> None:
    with (folder / "served_models.py").open("a") as file:
        file.write("\n\ndef raising():\n    raise ZeroDivisionError\n\n\ndef needing(one):\n    pass\n")
    (folder / "broken_models.py").write_text("def served(:\n")
    code, _, err = call("explain", factory)
    assert code == 2
    assert "Traceback" in err
