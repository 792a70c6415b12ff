"""When the plugin takes over, and when it stays out and says so."""

from __future__ import annotations

import functools
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from xpu_lora_compile.errors import OptionError
from xpu_lora_compile.integrations import vllm as plugin
from xpu_lora_compile.integrations.vllm_platform import WRAPPER, LoraPlatform
from xpu_lora_compile.integrations.vllm_versions import INTERFACES, RELEASES, differences


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


def test_the_installed_release_was_tested_and_is_as_the_plugin_expects() -> None:
    import vllm
    from vllm.lora import layers

    version = vllm.__version__.split("+")[0]
    release = RELEASES[version]
    assert differences(Path(vllm.__file__).parent, version) == []
    assert {name for name in layers.__all__ if name.endswith("ClassificationHeadWithLoRA")} - {
        "BaseClassificationHeadWithLoRA"
    } == set(release.heads)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The files of the installed vLLM that the plugin compares, as those of a release after all that are known."""
    import vllm

    for file in {file for file, _ in INTERFACES}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(vllm.__file__).parent / file, tmp_path / file)
    # What releases up to the newest known one have and the installed one may not have yet.
    after = RELEASES[vllm.__version__.split("+")[0]]
    later = list(RELEASES.values())[list(RELEASES.values()).index(after) + 1 :]
    for release in later:
        for (file, owner), members in release.interfaces.items():
            for name, signature in members.items():
                edit(tmp_path / file, f"class {owner}:", f"class {owner}:\n    def {name}({signature}): ...\n")
    monkeypatch.setattr(vllm, "__version__", "9.1.0.dev3+cpu")
    monkeypatch.setattr(vllm, "__file__", str(tmp_path / "__init__.py"))
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_an_unknown_release_whose_interfaces_are_as_expected_is_taken_over(
    platform: Any, log: Log, newer: Path
) -> None:
    plugin.register()
    assert isinstance(platform, LoraPlatform)
    ((level, text),) = log.lines
    assert level == "warning"
    assert "not tested with vLLM 9.1.0.dev3, but with 0.32.0, 0.33.0; all that it uses is as it expects." in text


PUNICA = "lora/punica_wrapper/punica_base.py"
CHANGES = {
    "a signature": (
        "lora/worker_manager.py",
        "def _load_adapter(self, lora_request: LoRARequest)",
        "def _load_adapter(self, lora_request: LoRARequest, tag=None)",
        "WorkerLoRAManager._load_adapter takes (self, lora_request, tag=None), not (self, lora_request)",
    ),
    "a default": (
        "lora/punica_wrapper/punica_cpu.py",
        "offset_start: int = 0",
        "offset_start: int = 1",
        "PunicaWrapperCPU.add_expand takes (self, y, x, lora_b_stacked, output_slices, offset_start=1, add_inputs=",
    ),
    "a name": (
        PUNICA,
        "_embeddings_indices",
        "_embedded",
        f"vllm/{PUNICA} has no PunicaWrapperBase._embeddings_indices",
    ),
    "a class": (
        "forward_context.py",
        "class BatchDescriptor",
        "class Batch",
        "forward_context.py has no class BatchDescriptor",
    ),
    "what ends a request": (
        "v1/core/sched/scheduler.py",
        "def finish_requests(",
        "def end_requests(",
        "vllm/v1/core/sched/scheduler.py has no Scheduler.finish_requests",
    ),
    "one method more": (
        PUNICA,
        "class PunicaWrapperABC(ABC):",
        "class PunicaWrapperABC(ABC):\n    def add_lora_conv(self, y): ...\n",
        "the methods of PunicaWrapperABC are add_expand add_lora_conv add_lora_embedding",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_unknown_release_that_differs_keeps_it_out_and_the_warning_says_how(
    platform: Any, log: Log, newer: Path, kind: str
) -> None:
    file, old, new, said = CHANGES[kind]
    edit(newer / file, old, new)
    plugin.register()
    assert not isinstance(platform, LoraPlatform)
    ((level, text),) = log.lines
    assert level == "warning"
    assert said in text
    assert ";" not in text
    assert "off, as vLLM 9.1.0.dev3 is not as it expects" in text


def test_a_file_that_is_gone_keeps_it_out(platform: Any, log: Log, newer: Path) -> None:
    (newer / "forward_context.py").unlink()
    plugin.register()
    assert not isinstance(platform, LoraPlatform)
    assert "vllm/forward_context.py is not there" in log.lines[0][1]


def test_a_tested_release_is_not_compared(platform: Any, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__file__", "nowhere")
    for version in RELEASES:
        monkeypatch.setattr(vllm, "__version__", version)
        plugin.register()
    assert isinstance(platform, LoraPlatform)
    assert not log.lines


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


def test_a_function_of_vllms_is_changed_once_though_vllm_wraps_it_itself() -> None:
    from xpu_lora_compile.integrations.vllm_changes import change, replaced

    class Owner:
        @functools.lru_cache  # noqa: B019
        def asked(self) -> list[str]:
            return ["vLLM's"]

    def adding(own: Any) -> Any:
        return lambda self: [*own(self), "ours"]

    for _ in range(2):
        change(Owner, "asked", adding)
    assert Owner().asked() == ["vLLM's", "ours"]
    # What others make of it since is not changed again.
    Owner.asked = functools.wraps(Owner.asked)(lambda self, own=Owner.asked: [*own(self), "theirs"])  # type: ignore[method-assign]
    change(Owner, "asked", adding)
    owner = Owner()
    assert owner.asked() == ["vLLM's", "ours", "theirs"]
    for place in (owner, Owner):
        before = dict(vars(place))
        with replaced(place, "asked", lambda *_: []):
            assert owner.asked() == []
        assert dict(vars(place)) == before
