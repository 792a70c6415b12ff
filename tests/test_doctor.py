"""`xpu-lora doctor`: a real examination of the device of the tests, and what it says where something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from support import xpu_c, xpu_card
from support.cases import DEVICE
from support.documents import ROOT, blocks_of

import xpu_lora_compile as xlc
from xpu_lora_compile import kernels, ops
from xpu_lora_compile.errors import DeviceError, KernelError, OptionError
from xpu_lora_compile.inspect import doctor, predicted
from xpu_lora_compile.inspect.doctor import Diagnosis, Finding
from xpu_lora_compile.kernels import force_kernel, ipex

INTEL_PAGE = ROOT / "docs" / "intel-gpu.md"


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    told: list[str] = []
    found = doctor.examine(DEVICE.type, told.append)
    assert told == list(found.findings)
    return found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xpu_lora_compile.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603


def test_all_is_right_here(diagnosis: Diagnosis) -> None:
    assert diagnosis.is_right, str(diagnosis)
    assert str(diagnosis).endswith(f"verdict\n    All 10 checks passed on {DEVICE.type}.")


def test_it_says_what_is_installed_and_what_is_not(diagnosis: Diagnosis) -> None:
    found = {finding.what: finding.text for finding in diagnosis.findings["installed"]}
    assert found["torch"] == torch.__version__
    assert found["vllm-xpu-kernels"] == "not installed"
    # A distribution may spell its name with underscores.
    assert (found["intel-extension-for-pytorch"] == "not installed") is (find_spec(ipex.PACKAGE) is None)
    assert found["_xpu_C.lora_shrink (lora)"] == "vllm-xpu-kernels is not installed"


def test_it_says_which_kernel_and_why_not_the_others(diagnosis: Diagnosis) -> None:
    (title,) = (title for title in diagnosis.findings if title.startswith("what will be used"))
    for finding in diagnosis.findings[title]:
        assert "Not " in finding.text
        assert "gather: " in finding.text


def test_every_contract_op_is_swept_with_nan_in_unused_slots(diagnosis: Diagnosis) -> None:
    checks = diagnosis.findings["ops against the float64 reference"]
    assert [finding.what for finding in checks] == ["float32", "bfloat16", "float16"]
    assert all(int(finding.text.split()[0]) >= 400 for finding in checks)


def test_a_wrong_op_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = xlc.bgmv_expand

    def forgets_rows_without_an_adapter(output_tensor: torch.Tensor, *args: object, **kwargs: object) -> None:
        right(output_tensor, *args, **kwargs)  # type: ignore[arg-type]
        output_tensor[kwargs["lora_indices_tensor"] < 0] = 0  # type: ignore[operator]

    monkeypatch.setattr(ops, "bgmv_expand", forgets_rows_without_an_adapter)
    assert not any(finding.is_right for finding in doctor.sweep(DEVICE.type))


def test_what_a_part_raises_is_a_failed_check() -> None:
    def look(_: str) -> Iterator[Finding]:
        yield Finding("first", "fine", is_right=True)
        raise RuntimeError("no such op")

    found = Diagnosis("cpu", {"part": list(doctor._guarded("part", look, "cpu"))})
    assert [finding.is_right for finding in found.findings["part"]] == [True, False]
    assert "RuntimeError: no such op" in str(found)
    assert found.verdict == "1 of 2 checks failed on cpu: part."


def test_a_device_that_is_not_there_is_said_plainly(tmp_path: Path) -> None:
    missing = next(kind for kind in ("xpu", "cuda") if not torch.get_device_module(kind).is_available())
    report = tmp_path / "report.txt"
    ran = run("--device", missing, "--report", str(report))
    assert ran.returncode == 1
    # What is installed is what one asks for then.
    text = " ".join(report.read_text().split())
    assert f"torch: {torch.__version__}" in text
    assert f"device: none that PyTorch {torch.__version__} can use: no device, no driver" in text
    assert text.endswith(f"verdict 1 of 1 checks failed on {missing}: device.")
    with pytest.raises(DeviceError, match=r"wanted cpu, cuda or xpu; got 'tpu'\. Choose one of these"):
        doctor.examine("tpu")


def test_the_command_writes_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from xpu_lora_compile.cli import app

    for is_right, status in ((True, 0), (False, 1)):
        found = Diagnosis("cpu", {"ops": [Finding("float32", "480 calls", is_right)]})
        monkeypatch.setattr(doctor, "examine", lambda *_, found=found: found)
        report = tmp_path / f"{status}.txt"
        result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--report", str(report)])
        assert result.exit_code == status
        assert report.read_text() == f"{found}\n"
        assert found.verdict in result.stdout


def test_a_forced_kernel_that_cannot_run_is_said_in_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise KernelError("forced kernel", "one that can run this call", "'ipex', which cannot", "Force none.")

    # Bare, inside an error of opcheck's, and inside one of Dynamo's.
    monkeypatch.setattr(kernels, "kernel_for", refuse)
    parts = (doctor.sweep, doctor.opchecks, doctor.speed)
    with force_kernel("gather"):
        found = [finding for look in parts for finding in doctor._guarded("part", look, DEVICE.type)]
    wanted = "forced kernel: wanted one that can run this call; got 'ipex', which cannot. Force none."
    assert [finding.what for finding in found] == ["float32", "bfloat16", "float16", "part", "part"]
    assert {finding.text for finding in found} == {wanted}
    assert not any(finding.is_right for finding in found)


def test_the_compiler_is_the_one_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler() -> str:
        return next(finding.text for finding in doctor.installed("cpu") if finding.what == "C++ compiler")

    monkeypatch.setenv("CXX", "clang++ -O1")
    assert compiler() == "'clang++ -O1', from CXX"
    monkeypatch.delenv("CXX")
    assert "CXX" not in compiler()


@pytest.mark.parametrize(
    ("name", "problem"),
    [("nowhere/report.txt", "in a folder that does not exist. Make"), ("", "which is a folder. Name a file in it.")],
    ids=["no-folder", "a-folder"],
)
def test_a_report_that_cannot_be_written_is_said_before_anything_runs(name: str, problem: str, tmp_path: Path) -> None:
    ran = run("--device", "cpu", "--report", str(tmp_path / name))
    assert ran.returncode == 2
    assert ran.stdout == ""
    said = " ".join(ran.stderr.split())
    assert said.startswith("doctor: --report: wanted a file that can be written; got ")
    assert problem in said


def test_a_report_that_may_not_be_written_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doctor.check_report(tmp_path / "report.txt")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    with pytest.raises(OptionError, match=r"which may not be written\. Name another"):
        doctor.check_report(tmp_path / "report.txt")


@pytest.mark.parametrize("end", [RuntimeError("no device"), SystemExit(127)], ids=["raises", "exits"])
def test_an_ipex_that_cannot_be_imported_does_not_end_the_examination(
    end: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_name: str) -> None:
        raise end

    monkeypatch.setattr(doctor, "_version", lambda _package: torch.__version__)
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = {finding.what for finding in doctor.installed("cpu")}
    assert "_xpu_C.lora_expand (lora)" in found


# On an Intel GPU, as far as there is one: see `support.xpu_card`.

NEEDS_TRITON = pytest.mark.skipif(
    DEVICE.type != "cpu" or find_spec("triton") is None,
    reason="Triton's interpreter runs kernels of the double's machine",
)


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SIZES", ((5,), (4,), (3,), (7,), (8,)))


def masked(text: str) -> str:
    """A report without what differs between machines: versions, errors, and times of a device."""
    by_machine = "torch|Python|[\\w-]*triton[\\w-]*|intel-extension-for-pytorch|transformers|C\\+\\+ compiler"
    text = re.sub(rf"^(    ({by_machine})): .*$", r"\1: ...", text, flags=re.MULTILINE)
    text = re.sub(r"[\d.]+(\s+(?:calls|us|GB/s|times its)\b)", r"...\1", text)
    text = re.sub(r"((?:error is|differ by|launch|memory)\s+)[\d.e+-]+\d", r"\1...", text)
    # What follows from times.
    return re.sub(r"((?:the cost model|together are faster with):) .*(\n      .*)*", r"\1 ...", text)


@NEEDS_TRITON
def test_a_healthy_report_of_an_intel_gpu_is_the_one_in_the_docs(
    few_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    with xpu_card.machine(xpu_c.LORA, xpu_c.BGMV) as device:
        monkeypatch.setattr(predicted, "DeviceClock", lambda _: xpu_card.ClockOf(400, 5, 1.5, 1.2))
        found = doctor.examine(device)
    (shown,) = (block.code for block in blocks_of(INTEL_PAGE.read_text()) if block.code.startswith("installed\n"))
    assert masked(f"{found}\n") == shown
    assert found.is_right


@NEEDS_TRITON
def test_a_wrong_op_of_the_vendor_is_found_and_what_still_works(
    few_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = xpu_c.lora_expand

    def adds_twice(*operands: Any) -> None:
        right(*operands)
        right(*operands)

    monkeypatch.setattr(xpu_c, "lora_expand", adds_twice)
    with xpu_card.machine(xpu_c.LORA) as device:
        found = Diagnosis("xpu", {"ops": list(doctor.sweep(device))})
        assert [finding.is_right for finding in found.findings["ops"]] == [True, False, False, True, True]
        assert found.verdict == "2 of 5 checks failed on xpu: bfloat16, float16."
        report, remedy = doctor._next_steps(found, device)
    assert report.text == (
        "attach this report to an issue of the project. What is marked !! is wrong here: do not serve with it"
    )
    remedies = "XPU_LORA_KERNEL=triton, then with XPU_LORA_KERNEL=gather"
    assert remedy.text == f"run `doctor` with {remedies}; serve with the first that passes"


@NEEDS_TRITON
def test_an_owner_without_the_wheel_is_told_of_it() -> None:
    with xpu_card.machine() as device:
        wheel, *others = doctor._next_steps(Diagnosis("xpu", {"ops": [Finding("float32", "480 calls", True)]}), device)
    problem = "vllm-xpu-kernels is not installed"
    assert wheel.text == f"{problem}. Install its release for this PyTorch: its ops come first then"
    assert [finding.what for finding in others] == ["use it", "report"]


def test_a_wrong_kernel_on_another_device_has_a_remedy_too() -> None:
    found = Diagnosis("cpu", {"ops": [Finding("float32", "480 calls", is_right=False)]})
    assert "with XPU_LORA_KERNEL=gather;" in [*doctor._next_steps(found, "cpu")][1].text
    assert not [*doctor._next_steps(Diagnosis("cpu"), "cpu")]
