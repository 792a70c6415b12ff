"""No size of an Intel GPU spills: what IGC, Intel's compiler, says of the native code that it makes of our kernels."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from intel.calls import DTYPES, ROUTING, every_launch, lora_call
from intel.native import Native, Tools, found_tools, native
from intel.toolchain import Launch, compiling_for, launches_of

from benchmarks import intel_sizes
from xpu_lora_compile.inspect.predicted import MESSAGES
from xpu_lora_compile.kernels.sizes import Sizes
from xpu_lora_compile.kernels.triton_launch import Triton

GROUPS = every_launch()
# float16 for one of the two, since it takes minutes.
TRIED = [(device, group) for device in ("pvc", "bmg") for group in GROUPS if (device, group[-4:]) != ("pvc", "fp16")]
INTEL_PAGE = (Path(__file__).parents[2] / "docs" / "intel-gpu.md").read_text(encoding="utf-8")
# With more than this a vector engine runs four threads instead of eight.
REGISTERS = 128


@pytest.fixture(scope="session")
def tools() -> Tools:
    """Beside Triton's cache, which goes away with the tests."""
    found = found_tools(Path(os.environ["TRITON_CACHE_DIR"], "ocloc"))
    if isinstance(found, str):
        pytest.skip(f"native code: {found}")
    return found


def native_of(launch: Launch, device: str, tools: Tools) -> Native:
    with compiling_for(device):
        return native(tools, launch.compiled().asm["spv"], device)


@pytest.mark.parametrize(("device", "group"), TRIED)
def test_no_size_spills(device: str, group: str, tools: Tools) -> None:
    for launch in GROUPS[group]:
        made = native_of(launch, device, tools)
        assert (made.spilled, made.registers) == (0, REGISTERS), launch.constants()
        if "fp32" not in group and launch.kernel not in ROUTING:
            assert made.dpas, launch.constants()
        if launch.constants().get("BLOCKS") and launch.constants().get("ONE_BLOCK", True):
            assert made.blocks, launch.constants()


@pytest.mark.parametrize("group", GROUPS)
def test_no_size_spills_on_lunar_lake(group: str, tools: Tools) -> None:
    for launch in GROUPS[group][::10]:
        made = native_of(launch, "lnl", tools)
        assert (made.spilled, made.registers) == (0, REGISTERS), launch.constants()


# Bytes a thread that an expand spills with B `[K, W, R]`, by T and R; docs/intel-gpu.md says why it is left so.
SPILLED = {
    ("bmg", "bf16"): {(8, 32): 384, (300, 32): 192},
    ("pvc", "bf16"): {(8, 32): 384, (300, 32): 1088},
    ("bmg", "fp32"): {(300, 16): 768, (300, 32): 768},
    ("pvc", "fp32"): {(300, 16): 1024, (300, 32): 1024},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["bmg", "pvc"])
def test_what_spills_with_b_as_a_bank_stores_it(device: str, dtype: str, tools: Tools) -> None:
    found = {}
    for rows, rank in itertools.product((8, 300), (16, 32)):
        call = lora_call(rows, rank, DTYPES[dtype])
        call = replace(call, lora_b=[b.contiguous() for b in call.lora_b])
        made = native_of(launches_of(partial(Triton().add_lora, call))[-1], device, tools)
        assert made.registers == REGISTERS
        found[rows, rank] = made.spilled
    assert {point: spilled for point, spilled in found.items() if spilled} == SPILLED.get((device, dtype), {})


def test_the_messages_that_doctor_knows_are_those_of_the_compiler(tools: Tools) -> None:
    assert intel_sizes.messages("bmg", tools) == MESSAGES
    other = intel_sizes.messages("pvc", tools)
    assert all(1 <= other[point] / messages < 1.04 for point, messages in MESSAGES.items())


def test_the_table_of_the_docs_says_what_the_compiler_does(tools: Tools) -> None:
    """With B as a bank stores it, of which some sizes spill; none takes more registers."""
    lines = [re.split(r" ?\| ?", line)[1:-1] for line in INTEL_PAGE.splitlines() if re.match(r"\| (bmg|pvc) \|", line)]
    assert len(lines) == 2 * len(MESSAGES)
    for device, rows, rank, kernel, *said in lines:
        (each,) = (each for each in intel_sizes.compiled(device, int(rows), int(rank), tools) if each.kernel == kernel)
        made, (*_, memory, messages, _) = each.made, intel_sizes.line_of(device, int(rows), int(rank), each)
        counts = made.registers, made.spilled, made.dpas, made.sends
        # What was before comes after a comma or a semicolon.
        assert [int(cell.split(",")[0]) for cell in said[:4]] == [*counts]
        assert int(said[3].split(";")[0].split(",")[1]) == made.repeated
        assert made.registers == REGISTERS
        assert [float(cell.split(",")[0]) for cell in said[4:]] == pytest.approx(
            [float(memory), float(messages)], abs=0.5
        )


def test_the_report_sees_a_size_that_spills(tools: Tools) -> None:
    """Those of an H100."""
    call = lora_call(2048, 16, torch.bfloat16)
    sizes = Sizes(expand_columns=256, expand_blocks=2, expand_warps=8)
    launches = launches_of(lambda: Triton().add_lora(call), sizes)
    assert native_of(launches[-1], "bmg", tools).spilled > 16384
