"""When the plugin takes over, and when it stays out and says so."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import pytest

from xpu_lora_compile.errors import OptionError
from xpu_lora_compile.integrations import vllm as plugin
from xpu_lora_compile.integrations.vllm_platform import WRAPPER, LoraPlatform


class Log:
    """What vLLM's logger was told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def info(self, text: str, *values: object) -> None:
        self.lines.append(("info", text % values))

    def warning(self, text: str, *values: object) -> None:
        self.lines.append(("warning", text % values))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    import vllm.logger

    log = Log()
    monkeypatch.setattr(vllm.logger, "init_logger", lambda _: log)
    return log


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A platform of our own in the place of vLLM's, as it is without the plugin."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    platform = CpuPlatform()
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    return platform


def test_vllm_finds_it() -> None:
    found = {one.name: one.load() for one in entry_points(group="vllm.general_plugins")}
    assert found["xpu_lora"] is plugin.register


def test_it_takes_over_once(platform: Any, log: Log) -> None:
    from vllm.platforms.cpu import CpuPlatform

    plugin.register()
    plugin.register()
    assert isinstance(platform, CpuPlatform)
    assert type(platform).__mro__.count(LoraPlatform) == 1
    assert platform.get_punica_wrapper() == WRAPPER
    assert platform.own_punica_wrapper() == CpuPlatform().get_punica_wrapper() != WRAPPER
    assert not platform.can_update_inplace()
    assert not log.lines


def test_the_switch_keeps_it_out(platform: Any, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.SWITCH, "0")
    plugin.register()
    assert not isinstance(platform, LoraPlatform)
    assert log.lines == [("info", "xpu_lora_compile: off, as XPU_LORA_VLLM=0 asks; LoRA is vLLM's own.")]


def test_an_untested_version_keeps_it_out_with_a_warning(
    platform: Any, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0+cpu")
    plugin.register()
    assert not isinstance(platform, LoraPlatform)
    ((level, text),) = log.lines
    assert level == "warning"
    assert "tested with vLLM 0.32.0, not with 0.33.0" in text


@pytest.mark.parametrize(("switch", "taken"), [("", False), ("1", True)])
def test_cuda_has_to_be_asked_for(
    platform: Any, log: Log, monkeypatch: pytest.MonkeyPatch, switch: str, taken: bool
) -> None:
    monkeypatch.setattr(type(platform), "device_type", "cuda")
    monkeypatch.setenv(plugin.SWITCH, switch)
    plugin.register()
    assert isinstance(platform, LoraPlatform) == taken
    assert any("off on cuda unless XPU_LORA_VLLM=1" in text for _, text in log.lines) != taken


def test_a_value_that_it_does_not_know_is_an_error(platform: Any, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.SWITCH, "yes")
    with pytest.raises(OptionError, match="wanted 0 or 1; got 'yes'"):
        plugin.register()
