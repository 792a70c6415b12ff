"""AOTInductor: a program into a file, and a file into code that runs. Importing this loads Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from xpu_lora_compile.backend import inductor_config
from xpu_lora_compile.inductor_internals import aoti_compile_and_package, aoti_load_package, get_cpp_compiler
from xpu_lora_compile.kernels.compiled import SHARED_CXX_LIBRARY, links_its_own_cxx_library

# Inductor's option for what the code is linked with.
_LIBRARIES = "aot_inductor.custom_op_libs"


def compile_into(path: Path, program: ExportedProgram, options: dict[str, Any]) -> Path:
    """Compile a program that has been rewritten into a file, and return its path.

    Raises:
        OptionError: an option that Inductor does not know, or a value of the wrong type.
    """
    config = inductor_config(options)
    if links_its_own_cxx_library((get_cpp_compiler(),)):
        config[_LIBRARIES] = [*(config.get(_LIBRARIES) or ()), SHARED_CXX_LIBRARY]
    with _quiet():
        return Path(aoti_compile_and_package(program, package_path=str(path), inductor_configs=config))


def load_package(path: Path) -> Any:
    """Return the code of a file, to be called with tensors."""
    with _quiet():
        return aoti_load_package(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch says of itself: that it uses what it will no longer have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
