"""Where vLLM is changed: its platform object gets a class that answers three questions differently.

| question | answer |
|---|---|
| `get_punica_wrapper` | ours, a subclass of the platform's own: `vllm_punica.py` |
| `can_update_inplace` | no: vLLM's layers go on with what the wrapper returns, so that a graph holds functional calls |
| `check_and_update_config` | what it was, but a CPU's platform does not switch compilation off because of LoRA |

One thing more is done by the wrapper once it is made: vLLM's LoRA layers store B by rank on a CPU.
"""

from __future__ import annotations

import importlib
from typing import Any

from xpu_lora_compile.backend import inductor_options

WRAPPER = "xpu_lora_compile.integrations.vllm_punica.XpuLoraPunicaWrapper"


class LoraPlatform:
    """What comes before the platform's own class in the order of its methods."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """The qualified name of our wrapper."""
        return WRAPPER

    @classmethod
    def own_punica_wrapper(cls) -> str:
        """The qualified name of the wrapper that the platform itself would have taken."""
        name: str = super().get_punica_wrapper()  # type: ignore[misc]
        return name

    @classmethod
    def can_update_inplace(cls) -> bool:
        """Whether vLLM's layers ignore what the wrapper returns."""
        return False

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Let the platform settle its configuration, then compile a CPU's model with LoRA as it does one without.

        vLLM 0.32 sets the mode NONE (`vllm/platforms/cpu.py`, line 380) after it has settled all the rest for
        DYNAMO_TRACE_ONCE: its own LoRA cannot be traced. Ours can.
        """
        compilation = vllm_config.compilation_config
        modes = type(compilation.mode)
        before = compilation.mode
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if vllm_config.lora_config is None:
            return
        if compilation.mode == modes.NONE and before != modes.NONE:
            compilation.mode = modes.DYNAMO_TRACE_ONCE if before == modes.VLLM_COMPILE else before
        compiled = compilation.mode != modes.NONE
        if compiled:
            ours = inductor_options(compilation.inductor_compile_config)
            compilation.inductor_compile_config.update(ours)
        logger = importlib.import_module("vllm.logger").init_logger("vllm.plugins.xpu_lora_compile")
        logger.info(
            "LoRA of linear layers, embeddings, logits and classifiers runs on the ops of xpu_lora_compile, one call a "
            "layer, %s; that of mixtures of experts is vLLM's own.",
            "compiled with its passes" if compiled else "eagerly",
        )


def take_over(platform: Any) -> None:
    """Give a platform object its new class. A second call changes nothing."""
    own = type(platform)
    if not issubclass(own, LoraPlatform):
        platform.__class__ = type(f"XpuLora{own.__name__}", (LoraPlatform, own), {"__module__": __name__})


def own_punica_wrapper() -> Any:
    """The class of the wrapper that vLLM itself would have taken on this platform."""
    platform = importlib.import_module("vllm.platforms").current_platform
    resolve = importlib.import_module("vllm.utils.import_utils").resolve_obj_by_qualname
    asked = getattr(platform, "own_punica_wrapper", platform.get_punica_wrapper)
    return resolve(asked())
