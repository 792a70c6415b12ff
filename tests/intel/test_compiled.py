"""Every kernel, size and dtype that an Intel GPU can be asked for compiles, by Intel's Triton."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from intel.calls import ROUTING, every_launch, lora_call
from intel.toolchain import DEVICES, Launch, compiling_for, launches_of

from xpu_lora_compile.kernels.triton_launch import Triton

GROUPS = every_launch()
# float16 for one of the two, since it takes minutes.
TRIED = [(device, group) for device in ("pvc", "bmg") for group in GROUPS if (device, group[-4:]) != ("pvc", "fp16")]
# Triton (3.3) makes no use of the matrix engine of a device whose sub-groups may be of 8.
WITH_MATRIX_ENGINE = ("pvc", "bmg", "lnl")


def compiled(launch: Launch, device: str, **options: Any) -> dict[str, Any]:
    """What Triton makes of it, by stage: "ttgir", "llir", "spv"."""
    with compiling_for(device, **options):
        stages: dict[str, Any] = launch.compiled().asm
    return stages


def test_every_kernel_is_asked_for() -> None:
    multiplying = "expand_kernel", "shrink_kernel", "inputs_gradient_kernel", "weights_gradient_kernel"
    kernels = [*ROUTING, *(f"{name}, {of}" for name in multiplying for of in ("bf16", "fp16", "fp32"))]
    assert sorted(GROUPS) == sorted(kernels)


@pytest.mark.parametrize(("device", "group"), TRIED)
def test_every_size_compiles(device: str, group: str) -> None:
    for launch in GROUPS[group]:
        stages = compiled(launch, device)
        assert stages["spv"][:4] == b"\x03\x02\x23\x07", launch.constants()
        # Sums are always taken in the same order.
        assert "atomicrmw" not in stages["llir"], launch.constants()
        if "fp32" not in group and launch.kernel not in ROUTING:
            assert "matrix_mad" in stages["llir"], launch.constants()


@pytest.mark.parametrize("group", GROUPS)
def test_lunar_lake_gets_the_code_of_battlemage(group: str) -> None:
    """So that what is said of one holds for both; a tenth of the sizes, since it takes as long again."""
    for launch in GROUPS[group][::10]:
        assert compiled(launch, "lnl")["spv"] == compiled(launch, "bmg")["spv"]


@pytest.mark.parametrize("group", GROUPS)
def test_alchemist_is_compiled_for(group: str) -> None:
    for launch in GROUPS[group][::10]:
        assert "matrix_mad" not in compiled(launch, "dg2")["llir"]


@pytest.mark.parametrize(
    "group", ["shrink_kernel, bf16", "shrink_kernel, fp16", "expand_kernel, bf16", "expand_kernel, fp16"]
)
def test_a_and_b_are_loaded_in_blocks(group: str) -> None:
    """Wherever their strides allow it, not one load for each lane, and nowhere else; B only where R is 16 at most."""
    answers = [launch.constants() for launch in GROUPS[group]]
    wanted = [constants["BLOCKS"] and constants.get("ONE_BLOCK", True) for constants in answers]
    assert {*wanted} == {True, False}
    for launch, has_blocks in zip(GROUPS[group], wanted, strict=True):
        assert ("2d_block_read" in compiled(launch, "bmg")["llir"]) == has_blocks, launch.constants()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fast_math_leaves_the_parts_of_a_rank_vector_alone(dtype: torch.dtype) -> None:
    """This release folds a cast to bfloat16 and back, and what is subtracted from itself then leaves no second part."""
    call = lora_call(8, 16, dtype, widths=(64,))
    expand = launches_of(lambda: Triton().add_lora(call))[-1]
    code = compiled(expand, "pvc", fast_math=True)["llir"]
    subtractions = re.findall(r"fsub (?:\w+ )*float (%\w+), (%\w+)", code)
    assert subtractions
    assert not [names for names in subtractions if names[0] == names[1]]


def test_the_base_product_with_lora_compiles() -> None:
    """No Intel GPU is asked for it: the base product is left to oneDNN."""
    call = lora_call(8, 16, torch.bfloat16, widths=(1024,))
    weight = torch.empty(1024, 4096, dtype=torch.bfloat16)
    launch = launches_of(lambda: Triton().linear_with_lora(call, [weight], [None]))[-1]
    assert launch.kernel == "linear_kernel"
    assert "matrix_mad" in compiled(launch, "bmg")["llir"]


def test_every_device_is_tried() -> None:
    assert set(DEVICES) == {*WITH_MATRIX_ENGINE, "dg2"}
