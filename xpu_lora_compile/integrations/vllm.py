"""A plugin of vLLM: after `pip install`, a server with `--enable-lora` adds LoRA with our ops.

vLLM calls `register` in each of its processes, before it makes a configuration. What it changes is one object, vLLM's
`current_platform`, whose class becomes a subclass of the one it had: see `vllm_platform.py`. Where the plugin is on,
the layers' `set_mapping` does one thing more, too: see `vllm_punica.py`. No file of vLLM's is touched. Releases that
were not tested are compared with what the plugin expects first: see `vllm_versions.py`.

XPU_LORA_VLLM=0 keeps the plugin out; 1 has it run on CUDA, too, where it has not been measured.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from xpu_lora_compile.errors import OptionError
from xpu_lora_compile.integrations.vllm_versions import RELEASES, differences

SWITCH = "XPU_LORA_VLLM"

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
    if switch == "0":
        logger.info("xpu_lora_compile: off, as %s=0 asks; LoRA is vLLM's own.", SWITCH)
    elif platform.device_type not in DEVICES and switch != "1":
        logger.info("xpu_lora_compile: off on %s unless %s=1; LoRA is vLLM's own.", platform.device_type, SWITCH)
    elif _is_as_expected(vllm, logger):
        importlib.import_module("xpu_lora_compile.integrations.vllm_platform").take_over(platform)


def _is_as_expected(vllm: Any, logger: Any) -> bool:
    """Whether the plugin was tested with this release, or finds there what it uses; it warns if it was not."""
    version = vllm.__version__.split("+")[0]
    if version in RELEASES:
        return True
    tested = ", ".join(RELEASES)
    found = differences(Path(vllm.__file__).parent, version)
    if found:
        logger.warning(
            "xpu_lora_compile: off, as vLLM %s is not as it expects: %s. LoRA is vLLM's own. Tested are vLLM %s.",
            version,
            "; ".join(found),
            tested,
        )
    else:
        logger.warning(
            "xpu_lora_compile: not tested with vLLM %s, but with %s; all that it uses is as it expects.",
            version,
            tested,
        )
    return not found
