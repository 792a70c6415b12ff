"""What `doctor` measures on an Intel GPU beside the cost model: with a clock that is handed in, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from intel.toolchain import DEVICES
from support import xpu_c, xpu_card
from support.cases import DEVICE
from support.xpu_card import B580, ClockOf, Xpu

from xpu_lora_compile.inspect import doctor, predicted
from xpu_lora_compile.inspect.predicted import OURS, THEIRS, Card, DeviceClock, Operands, Point
from xpu_lora_compile.kernels import force_kernel

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="it takes the CPU for an Intel GPU"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton's interpreter runs the kernels"),
]

FAMILIES = pytest.mark.parametrize("groups", [(xpu_c.LORA, xpu_c.BGMV), (xpu_c.BGMV,)], ids=["new", "old"])


@pytest.fixture
def card() -> Iterator[Xpu]:
    with xpu_card.machine(xpu_c.LORA, xpu_c.BGMV) as device:
        yield device


def said(device: Xpu, clock: Any) -> dict[str, str]:
    return {finding.what: finding.text for finding in doctor.beside_bounds(device, clock)}


def test_every_point_has_its_bounds_and_the_times_of_both_kernels(card: Xpu) -> None:
    text = said(card, ClockOf(400, 5, 1.5, 1.2))
    assert_expected_inline(
        "\n".join(f"{what}: {text[what]}" for what in [*text][:3]),
        """\
this device: a copy moves 400 GB/s, a kernel that does next to nothing takes 5.0 us, 20 Xe cores, 2.67 GHz
shrink, T = 8, R = 16: Triton 12.0 us, 1.5 times its bound; vllm-xpu-kernels 9.6 us. Bounds: launch 5.0, memory 8.0, messages 2.7
expand, T = 8, R = 16: Triton 31.2 us, 1.5 times its bound; vllm-xpu-kernels 25.0 us. Bounds: launch 5.0, memory 4.4, messages 20.8""",  # noqa: E501
    )
    assert len(text) == 1 + 2 * len(predicted.POINTS) + 2


def test_no_time_fails_a_check(card: Xpu) -> None:
    for times in (0.1, 1.0, 1000.0):
        assert {finding.is_right for finding in doctor.beside_bounds(card, ClockOf(400, 5, times, times))} == {None}


def test_a_clock_that_fails_is_said_and_fails_nothing(card: Xpu) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("no timing events")

    (finding,) = doctor.beside_bounds(card, broken)  # type: ignore[arg-type]
    assert (finding.what, finding.is_right) == ("not measured", None)
    assert finding.text == "RuntimeError: no timing events. Report this; no check depends on it."


def points(ratios: dict[tuple[str, int, int], tuple[float, float]]) -> list[Point]:
    """All points, of a bound of 10 us: what both kernels take, in units of it; 2 and 2 where nothing is said."""
    found = []
    for rows, rank in predicted.POINTS:
        for kernel in ("shrink", "expand"):
            times = ratios.get((kernel, rows, rank), (2.0, 2.0))
            measured = dict(zip((OURS, THEIRS), (10 * number for number in times), strict=True))
            found.append(Point(kernel, rows, rank, {"launch": 1.0, "memory": 10.0, "messages": 5.0}, measured))
    return found


def test_what_is_not_as_predicted_is_to_be_reported() -> None:
    model, _ = predicted.verdicts(points({("expand", 2048, 16): (3.1, 2.0), ("shrink", 8, 16): (0.9, 2.0)}))
    assert_expected_inline(
        model[1],
        """6 of 8 times are 1 to 3 times their bound, as expected. expand, T = 2048, R = 16 takes 3.1 times its bound; shrink, T = 8, R = 16 takes less than its bound: please report this.""",  # noqa: E501
    )
    as_expected, _ = predicted.verdicts(points({}))
    assert as_expected[1] == "8 of 8 times are 1 to 3 times their bound, as expected."


def test_the_faster_kernel_is_named_and_how_to_have_it() -> None:
    _, (title, text) = predicted.verdicts(points({("shrink", 8, 16): (1.0, 2.0), ("expand", 2048, 64): (9.0, 1.0)}))
    assert title == "shrink and expand together are faster with"
    assert_expected_inline(
        text,
        """vllm-xpu-kernels at T = 8, R = 64 and at T = 2048, R = 16 and at T = 2048, R = 64; Triton at T = 8, R = 16. vllm-xpu-kernels comes first. If most of your calls are like those of Triton, set XPU_LORA_KERNEL=triton.""",  # noqa: E501
    )
    _, (_, text) = predicted.verdicts(points({}))
    assert text == "vllm-xpu-kernels at all points. vllm-xpu-kernels comes first, so there is nothing to set."
    with force_kernel("triton"):
        _, (_, text) = predicted.verdicts(points({}))
    assert text.endswith("XPU_LORA_KERNEL=triton is set, whatever is faster.")


def test_without_the_wheel_triton_alone_is_measured() -> None:
    with xpu_card.machine() as device:
        text = said(device, ClockOf(400, 5, 1.5))
    assert text["shrink, T = 8, R = 16"].startswith("Triton 12.0 us, 1.5 times its bound. Bounds")
    assert "shrink and expand together are faster with" not in text


@FAMILIES
@pytest.mark.parametrize("name", [OURS, THEIRS])
def test_what_is_timed_is_the_kernels(groups: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted, "FEATURES", 96)
    monkeypatch.setattr(predicted, "WIDTHS", (48, 16, 16))
    with xpu_card.machine(*groups) as device:
        operands = Operands(device, 9, 4, 3 * (predicted.bytes_of("shrink", 9, 4) + predicted.bytes_of("expand", 9, 4)))
        assert len(operands.calls) == 3
        # The last set, so that they are taken in turn.
        call = operands.calls[2]
        wanted = [(a[call.routing.indices].float() @ call.inputs[:, :, None].float())[:, :, 0] for a in call.lora_a]
        # Every number once, so that a slice that takes another one's vectors is wrong.
        monkeypatch.setattr(
            torch.Tensor, "normal_", lambda out: out.copy_(torch.arange(out.numel()).view(out.shape) % 61)
        )
        shrink, expand = (operands.contenders(kernel)[name] for kernel in ("shrink", "expand"))
        monkeypatch.undo()
        made: Any = shrink(5)
        vectors = made.sums.sum(0).view(3, 9, -1)[:, :, :4] if name == OURS else torch.stack([*made])
        torch.testing.assert_close(vectors, torch.stack(wanted), rtol=1e-4, atol=1e-3)
        before = call.outputs[0].clone()
        expand(5)
        # Triton's rows of rank vectors have room for 16 ranks.
        width = 16 if name == OURS else 4
        hidden = (torch.arange(3 * 9 * width).view(3, 9, width) % 61).float()[:, :, :4]
        added = [(b[call.routing.indices].float() @ hidden[s, :, :, None])[:, :, 0] for s, b in enumerate(call.lora_b)]
        torch.testing.assert_close(call.outputs[0].float(), before + torch.cat(added, 1), rtol=2e-2, atol=0.5)


def test_a_card_is_what_pytorch_tells_of_it() -> None:
    assert predicted.card_of(B580) == Card("Intel(R) Arc(TM) B580 Graphics", 20, 2.67, 18 << 20)
    assert predicted.card_of(SimpleNamespace(**DEVICES["pvc"])) == Card("Intel(R) Data Center GPU Max 1550", 64, 1.6)
    # torch 2.8 tells of neither Xe cores nor the cache.
    old = {name: value for name, value in DEVICES["bmg"].items() if name != "gpu_subslice_count"}
    assert predicted.card_of(SimpleNamespace(**old)).cores == 20
    assert predicted.card_of(SimpleNamespace(**DEVICES["dg2"])).cores == 0


def test_where_no_messages_were_counted_memory_is_the_bound() -> None:
    alchemist = SimpleNamespace(**DEVICES["dg2"], total_memory=1 << 34)
    with xpu_card.machine(properties=alchemist) as device:
        text = said(device, clock_of(10.0))
    assert "10.0 us, no messages were counted for such a GPU" in text["this device"]
    assert "messages" not in text["shrink, T = 8, R = 16"]


def clock_of(microseconds: float) -> Any:
    class Clock:
        late = 3

        def __call__(self, *_: object) -> float:
            return microseconds

    return Clock()


def test_times_with_the_hosts_in_them_are_said(card: Xpu) -> None:
    assert said(card, clock_of(10.0))["this device"].endswith("too slow: 3 times below have its time in them")


class Queue:
    """A device that takes 1 us for what is queued: an event knows how much was queued before it."""

    def __init__(self, is_done: bool) -> None:
        self.queued, self.is_done = 0, is_done

    def synchronize(self) -> None:
        pass

    def Event(self, *, enable_timing: bool) -> Any:  # noqa: N802 - as torch.xpu has it
        assert enable_timing
        event = SimpleNamespace(query=lambda: self.is_done, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.queued)
        event.elapsed_time = lambda other: (other.at - event.at) / 1e3
        return event


@pytest.mark.parametrize("is_done", [False, True], ids=["ahead", "behind"])
def test_the_clock_counts_what_the_device_does_behind_a_full_queue(
    is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, filled = Queue(is_done), []
    monkeypatch.setattr(predicted, "BEYOND_CACHES", 16)
    monkeypatch.setattr(torch, "get_device_module", lambda _: queue)
    fill: Callable[..., None] = DeviceClock._fill
    monkeypatch.setattr(DeviceClock, "_fill", lambda self, copies: (filled.append(copies), fill(self, copies)))
    clock = DeviceClock("cpu")
    asked: list[int] = []

    def run(number: int) -> None:
        asked.append(number)
        queue.queued += 7

    assert clock(run, 4) == 7
    assert asked == [0, *[0, 1, 2, 3] * 6]
    # First to see how long a copy takes, and then for as long as the host needs.
    assert len(filled) == 2 + 5
    assert min(filled[2:]) >= 2
    assert clock.late == is_done
