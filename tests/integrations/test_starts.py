"""What a start says while it compiles, and how often vLLM says that it waits."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from xpu_lora_compile.integrations import vllm_starts as starts


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What vLLM's logger was told, once vLLM is there."""
    import vllm.compilation.wrapper
    import vllm.envs
    import vllm.logger
    import vllm.lora.layers

    # An engine that ran in this process keeps what the environment said then.
    vllm.envs.disable_envs_cache()

    lines: list[str] = []

    class Log:
        def info(self, text: str, *values: object) -> None:
            lines.append(text % values)

    monkeypatch.setattr(vllm.logger, "init_logger", lambda _: Log())
    return lines


def compiling(monkeypatch: pytest.MonkeyPatch, own: Any) -> Any:
    """A model of three layers, one of them with LoRA, whose method compiles as `own` does; called, the method."""
    import torch
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
    from vllm.lora.layers.base import BaseLayerWithLoRA

    class Model(torch.nn.Module, TorchCompileWithNoGuardsWrapper):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.ReLU(), BaseLayerWithLoRA()])

    monkeypatch.setattr(TorchCompileWithNoGuardsWrapper, "aot_compile", own)
    starts.say_that_it_compiles()
    starts.say_that_it_compiles()
    return Model().aot_compile


def test_a_start_says_that_it_compiles_for_how_long_and_where_the_result_is(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/kept/here")
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "0")
    assert compiling(monkeypatch, lambda self, *args: args)(1, 2) == (1, 2)
    first, last = lines
    assert "compiling the model, 1 layers of it with LoRA: about 1 min on two cores; " in first
    assert first.endswith("; the next start with the same model and options takes it from /kept/here.")
    assert last == "xpu_lora_compile: compiled the model in 0 s."


def test_what_is_not_saved_is_not_promised(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    compiling(monkeypatch, lambda self: None)()
    assert lines[0].endswith("; not saved, as VLLM_DISABLE_COMPILE_CACHE asks.")


def test_it_goes_on_saying_so_until_it_is_done(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setattr(starts, "INTERVAL", 0.01)

    def own(self: Any) -> None:
        for _ in range(1000):
            if len(lines) > 2:
                return
            threading.Event().wait(0.01)

    compiling(monkeypatch, own)()
    assert lines[1] == lines[2] == "xpu_lora_compile: still compiling, for 0 s now."
    assert lines[-1] == "xpu_lora_compile: compiled the model in 0 s."


def test_a_compilation_that_fails_is_not_said_to_be_done(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    def own(self: Any) -> None:
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        compiling(monkeypatch, own)()
    assert len(lines) == 1


def test_vllm_says_each_ten_minutes_that_it_waits_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(starts.WAITING, raising=False)
    starts.say_less_of_waiting()
    assert starts.os.environ[starts.WAITING] == "600"
    monkeypatch.setenv(starts.WAITING, "5")
    starts.say_less_of_waiting()
    assert starts.os.environ[starts.WAITING] == "5"


def test_the_first_process_makes_the_kernel_while_it_starts_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[threading.Thread] = []
    monkeypatch.setattr(starts.native, "problem", lambda: made.append(threading.current_thread()))
    thread = starts.make_the_kernel_meanwhile()
    assert thread is not None
    thread.join()
    assert made == [thread]


def test_other_processes_do_not_make_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts.multiprocessing, "parent_process", object)
    assert starts.make_the_kernel_meanwhile() is None
