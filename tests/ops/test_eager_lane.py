"""What an eager call costs on a CPU besides its products, without a clock: Python frames of ours, and ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cases import DEVICE
from support.frames import frames_of
from torch import nn

import xpu_lora_compile as xlc

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the lane is the native kernel's, on a CPU")


def ops_of(call: Callable[[], object]) -> list[str]:
    """The ops that the dispatcher sees in one call."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return [event.name for event in profile.function_events]


A, B = torch.ones(2, 3, 8), torch.ones(2, 5, 3)
INDICES = torch.tensor([0, -1, 1, 0])


def calls() -> dict[str, Callable[[], object]]:
    x, hidden, output = torch.ones(4, 8), torch.ones(4, 3), torch.ones(4, 5)
    return {
        "bgmv_shrink": lambda: xlc.bgmv_shrink(hidden, x, A, INDICES),
        "bgmv_expand": lambda: xlc.bgmv_expand(output, hidden, B, INDICES),
        "bgmv_expand_slice": lambda: xlc.bgmv_expand_slice(output, hidden, B, INDICES, 0, 5),
        "lora_linear": lambda: xlc.lora_linear(output, x, [A], [B], INDICES, [0]),
    }


# What adds a layer's LoRA to its product.
ADDS = ["added_in_place", "add_lora_eagerly"]
# Whether anything looks at calls of ops, and whether the native kernel takes it.
QUESTIONS = ["runs_plainly", "takes_native"]
FRAMES = {
    "bgmv_shrink": QUESTIONS,
    "bgmv_expand": [*QUESTIONS, "_expand_natively"],
    "bgmv_expand_slice": [*QUESTIONS, "_expand_slice_natively"],
    "lora_linear": QUESTIONS,
}


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("name", FRAMES)
@torch.no_grad()
def test_a_public_op_is_one_call_of_the_native_kernel(name: str) -> None:
    call = calls()[name]
    call()
    assert frames_of(call) == [name, *FRAMES[name]]
    ops = [op for op in ops_of(call) if op.startswith("xpu_lora::")]
    assert len(ops) == 1
    assert ops[0].startswith("xpu_lora::native_try_")


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@torch.no_grad()
def test_a_layer_is_one_call_of_the_native_kernel() -> None:
    model = nn.Sequential(nn.Linear(8, 5))
    bank = xlc.attach(model, slots=2, max_rank=3)
    bank._slots[0] = "a"
    x = torch.ones(3, 8)
    with bank.use(["a", None, "a"]):
        model(x)
        assert [op for op in ops_of(lambda: model(x)) if "xpu_lora" in op] == ["xpu_lora::native_try_add_lora"]
        frames = frames_of(lambda: model(x))
    # Of the hooks of the model, which tell where a call begins and ends, there is one pair a call.
    of_layer = frames[frames.index("forward") : frames.index("after")]
    assert of_layer == ["forward", "read", "rows_of", "_note_call", "without_lora", *ADDS, *QUESTIONS]
    with bank.use([None] * 3):
        model(x)
        base = frames_of(lambda: model(x))
    of_layer = base[base.index("forward") : base.index("after")]
    assert of_layer == ["forward", "read", "rows_of", "_note_call", "_check_device", "without_lora"]
