"""Where vLLM is changed: its platform object gets a class that answers three questions differently.

| question | answer |
|---|---|
| `get_punica_wrapper` | ours, a subclass of the platform's own: `vllm_punica.py` |
| `can_update_inplace` | no: vLLM's layers go on with what the wrapper returns, so that a graph holds functional calls |
| `check_and_update_config` | what it was, but a CPU's platform does not switch compilation off because of LoRA |

The last also has `InputProcessor._get_mm_identifier` name the adapter, so that what the encoders returned for one
adapter is not taken for another's, and the engine tell an adapter's loads apart: `vllm_loads.py`. It has vLLM's
processes say less often that they wait for a compilation, and our kernel compiled where it is not there yet: see
`vllm_starts.py`. For a mixture of experts it changes which experts a CPU takes, before they are made:
`vllm_experts.py`. What the wrapper changes, once it is made: see `vllm_punica.py`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from xpu_lora_compile.backend import inductor_options
from xpu_lora_compile.integrations.vllm_changes import change
from xpu_lora_compile.integrations.vllm_experts import take_over_experts
from xpu_lora_compile.integrations.vllm_starts import make_the_kernel_meanwhile, say_less_of_waiting

WRAPPER = "xpu_lora_compile.integrations.vllm_punica.XpuLoraPunicaWrapper"


class LoraPlatform:
    """What comes before the platform's own class in the order of its methods."""

    # The platform's own class says it.
    device_type: str

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

        vLLM sets the mode NONE (`vllm/platforms/cpu.py`, line 380 in 0.32, 397 in 0.33) after it has settled all the
        rest for DYNAMO_TRACE_ONCE: its own LoRA cannot be traced. Ours can.
        """
        compilation = vllm_config.compilation_config
        modes = type(compilation.mode)
        before = compilation.mode
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if vllm_config.lora_config is None:
            return
        _cache_encoders_by_adapter()
        importlib.import_module("xpu_lora_compile.integrations.vllm_loads").tell_loads_apart()
        if vllm_config.model_config is not None and vllm_config.model_config.is_moe:
            take_over_experts()
        if cls.device_type == "cpu":
            make_the_kernel_meanwhile()
        if compilation.mode == modes.NONE and before != modes.NONE:
            compilation.mode = modes.DYNAMO_TRACE_ONCE if before == modes.VLLM_COMPILE else before
        if compilation.mode != modes.NONE:
            ours = inductor_options(compilation.inductor_compile_config)
            compilation.inductor_compile_config.update(ours)
            say_less_of_waiting()


def take_over(platform: Any) -> None:
    """Give a platform object its new class. A second call changes nothing."""
    own = type(platform)
    if not issubclass(own, LoraPlatform):
        platform.__class__ = type(f"XpuLora{own.__name__}", (LoraPlatform, own), {"__module__": __name__})
    # A process that runs an engine alone, or a part of the model, is given its configuration as it is.
    if "vllm.v1.engine.core" in sys.modules:
        importlib.import_module("xpu_lora_compile.integrations.vllm_loads").tell_loads_apart()
    if {"vllm.v1.engine.core", "vllm.v1.worker.worker_base"} & sys.modules.keys():
        take_over_experts()


def _cache_encoders_by_adapter() -> None:
    """Have vLLM keep apart what the encoders returned for each adapter.

    It does so with `enable_tower_connector_lora` alone, although models without `get_mm_mapping` have LoRA in their
    encoders as well.
    """
    processor: Any = importlib.import_module("vllm.v1.engine.input_processor").InputProcessor
    change(processor, "_get_mm_identifier", _by_adapter)


def _by_adapter(own: Any) -> Any:
    def _get_mm_identifier(self: Any, mm_hash: str, lora_request: Any) -> str:
        identifier: str = own(self, mm_hash, lora_request)
        if lora_request is None or identifier != mm_hash:
            return identifier
        model = importlib.import_module("vllm.model_executor.model_loader").get_model_cls(self.model_config)
        return identifier if hasattr(model, "get_mm_mapping") else f"{lora_request.lora_name}:{mm_hash}"

    return _get_mm_identifier


def own_punica_wrapper() -> Any:
    """The class of the wrapper that vLLM itself would have taken on this platform."""
    platform = importlib.import_module("vllm.platforms").current_platform
    resolve = importlib.import_module("vllm.utils.import_utils").resolve_obj_by_qualname
    asked = getattr(platform, "own_punica_wrapper", platform.get_punica_wrapper)
    return resolve(asked())
