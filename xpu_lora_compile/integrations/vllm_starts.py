"""What a start says and takes: the first one compiles, which takes minutes; the next takes what the first has saved.

vLLM saves the compiled model under VLLM_CACHE_ROOT, and reads it at the next start. Where a model is traced once, as on
a CPU, what it reads is a function. vLLM 0.32 and 0.33 then call its `finalize_loading`, which only what they save in
another mode has; they log that "'function' object has no attribute 'finalize_loading'", and compile again. The function
needs nothing finalized: it is whole as it is read.

The key of what is saved has vLLM's configuration, and with it our passes, the sources of our package and of the model.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
from typing import Any

import torch

from xpu_lora_compile.integrations.vllm_changes import change, replaced
from xpu_lora_compile.kernels import native

# How often vLLM says that it waits for a process, which a compilation keeps busy; in seconds, 60 unless set.
WAITING = "VLLM_RINGBUFFER_WARNING_INTERVAL"
QUIET = "600"

# On two cores of an EPYC, for each layer with LoRA.
SECONDS_A_LAYER = 1.0

# Between two lines that say that it still compiles.
INTERVAL = 60.0


def say_less_of_waiting() -> None:
    """Have vLLM's processes say that they wait for a longer one each ten minutes, unless the environment says when.

    A compilation of minutes is no fault, and `say_that_it_compiles` says what is done meanwhile. vLLM starts its
    processes after it has settled its configuration, and each reads the variable as it starts.
    """
    os.environ.setdefault(WAITING, QUIET)


def make_the_kernel_meanwhile() -> threading.Thread | None:
    """Have the first of vLLM's processes compile our C++ kernel, once a machine, while it starts the others.

    The process that compiles the model needs the kernel a minute later. vLLM keeps that one to fewer cores.

    Returns:
        The thread that does it; None in the other processes.
    """
    if multiprocessing.parent_process() is not None:
        return None
    thread = threading.Thread(target=native.problem, daemon=True)
    thread.start()
    return thread


def say_that_it_compiles() -> None:
    """Change vLLM's method that compiles a model, to log before, meanwhile and after."""
    wrapper: Any = importlib.import_module("vllm.compilation.wrapper").TorchCompileWithNoGuardsWrapper
    change(wrapper, "aot_compile", _logging)


def _logging(own: Any) -> Any:
    def aot_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer: Any = importlib.import_module("vllm.lora.layers.base").BaseLayerWithLoRA
        layers = sum(isinstance(module, layer) for module in self.modules())
        envs: Any = importlib.import_module("vllm.envs")
        logger: Any = importlib.import_module("vllm.logger").init_logger("vllm.plugins.xpu_lora_compile")
        kept = "not saved, as VLLM_DISABLE_COMPILE_CACHE asks"
        if not envs.VLLM_DISABLE_COMPILE_CACHE:
            kept = f"the next start with the same model and options takes it from {envs.VLLM_CACHE_ROOT}"
        logger.info(
            "xpu_lora_compile: compiling the model, %d layers of it with LoRA: about %d min on two cores; %s.",
            layers,
            max(1, round(layers * SECONDS_A_LAYER / 60)),
            kept,
        )
        started, done = time.monotonic(), threading.Event()

        def report() -> None:
            while not done.wait(INTERVAL):
                logger.info("xpu_lora_compile: still compiling, for %.0f s now.", time.monotonic() - started)

        threading.Thread(target=report, daemon=True).start()
        try:
            compiled = own(self, *args, **kwargs)
        finally:
            done.set()
        logger.info("xpu_lora_compile: compiled the model in %.0f s.", time.monotonic() - started)
        return compiled

    return aot_compile


def take_what_the_first_start_has_saved() -> None:
    """Change vLLM's module that reads it."""
    decorators: Any = importlib.import_module("vllm.compilation.decorators")
    change(decorators, "_try_load_aot_compiled_fn", _loading_whole)


def _loading_whole(own: Any) -> Any:
    def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any:
        read = torch.compiler.load_compiled_function

        def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
            loaded: Any = read(*args, **kwargs)
            compiled = loaded._artifacts.compiled_fn
            if not hasattr(compiled, "finalize_loading"):
                compiled.finalize_loading = lambda _: None
            return loaded

        with replaced(torch.compiler, "load_compiled_function", load_compiled_function):
            return own(model, aot_compilation_path)

    return _try_load_aot_compiled_fn
