"""A plugin of vLLM: after `pip install`, `vllm serve MODEL --enable-lora` adds LoRA with our ops.

vLLM calls `register` in each of its processes, before it makes a configuration. What it changes is one object, vLLM's
`current_platform`, whose class becomes a subclass of the one it had: see `vllm_platform.py`. Where the plugin is on,
the layers' `set_mapping` does one thing more, too: see `vllm_punica.py`. No file of vLLM's is touched.

XPU_LORA_VLLM=0 keeps the plugin out; 1 has it run on CUDA, too, where it has not been measured.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from xpu_lora_compile.errors import OptionError

SWITCH = "XPU_LORA_VLLM"

# The releases that tests/integrations was run with. On others vLLM's own code runs, and a warning says so.
TESTED = ("0.32.0",)

# Where it is on without being asked for.
DEVICES = ("cpu", "xpu")


def register() -> None:
    """Take over vLLM's LoRA in this process, or say why not. A second call changes nothing.

    Raises:
        OptionError: the environment variable has a value that it does not know.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise OptionError(SWITCH, "0 or 1", repr(switch), "Leave it unset for CPU and XPU.")
    vllm: Any = importlib.import_module("vllm")
    # vLLM prints what its own loggers say; before it has read its own configuration, warnings alone.
    logger = importlib.import_module("vllm.logger").init_logger("vllm.plugins.xpu_lora_compile")
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    version = vllm.__version__.split("+")[0]
    if switch == "0":
        logger.info("xpu_lora_compile: off, as %s=0 asks; LoRA is vLLM's own.", SWITCH)
    elif version not in TESTED:
        tested = ", ".join(TESTED)
        logger.warning("xpu_lora_compile: tested with vLLM %s, not with %s; LoRA is vLLM's own.", tested, version)
    elif platform.device_type not in DEVICES and switch != "1":
        logger.info("xpu_lora_compile: off on %s unless %s=1; LoRA is vLLM's own.", platform.device_type, SWITCH)
    else:
        importlib.import_module("xpu_lora_compile.integrations.vllm_platform").take_over(platform)
