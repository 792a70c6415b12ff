"""A second start takes the compiled model that the first one has saved.

vLLM saves it under VLLM_CACHE_ROOT, and reads it at the next start. Where a model is traced once, as on a CPU, what it
reads is a function. vLLM 0.32 and 0.33 then call its `finalize_loading`, which only what they save in another
mode has; they log that "'function' object has no attribute 'finalize_loading'", and compile again. The function needs
nothing finalized: it is whole as it is read.

The key of what is saved has vLLM's configuration, and with it our passes, the sources of our package and of the model.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any
from unittest.mock import patch

import torch


def take_what_the_first_start_has_saved() -> None:
    """Change vLLM's function that reads it. A second call changes nothing."""
    decorators: Any = importlib.import_module("vllm.compilation.decorators")
    own = decorators._try_load_aot_compiled_fn
    if hasattr(own, "__wrapped__"):
        return

    @functools.wraps(own)
    def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any:
        with patch.object(torch.compiler, "load_compiled_function", _load_whole(torch.compiler.load_compiled_function)):
            return own(model, aot_compilation_path)

    decorators._try_load_aot_compiled_fn = _try_load_aot_compiled_fn


def _load_whole(own: Any) -> Any:
    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = own(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda _: None
        return loaded

    return load_compiled_function
