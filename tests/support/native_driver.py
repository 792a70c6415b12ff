"""The native kernel compiled by itself, for any of the machine's instruction sets: `native_driver.cpp`, by ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from torch import Tensor

from xpu_lora_compile.kernels import compiled, native

DTYPES = ["float32", "bfloat16", "float16"]


class Driver:
    """The kernel as the package compiles it, but for some more flags."""

    def __init__(self, folder: Path, *flags: str) -> None:
        kernels, made = Path(native.__file__).parent, folder / "driver.so"
        source = Path(__file__).with_suffix(".cpp")
        command = [*compiled.found_compiler(), *native._FLAGS, *compiled.FLAGS, *flags, f"-I{kernels}"]
        command += ["-o", str(made), str(source)]
        subprocess.run(command, check=True)  # noqa: S603
        library = ctypes.CDLL(str(made))
        self.lanes: int = library.lanes()
        self.has_tiles = bool(library.tiles() & 1)
        self.threads = library.threads
        self.threads.argtypes = [ctypes.c_int64] * 3
        self._add_lora = library.add_lora
        self._add_lora.argtypes = [*[ctypes.c_int64] * 6, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2]
        self._add_lora.argtypes += [ctypes.c_void_p] * 2
        self._add_lora.restype = None

    def add_lora(self, output: Tensor, inputs: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> None:
        """output[t] += B[i] @ (A[i] @ inputs[t]), in place."""
        assert all(tensor.is_contiguous() for tensor in (output, inputs, a, indices))
        (slots, rank, features), width = a.shape, b.shape[1]
        assert b.stride(0) == rank * width
        sizes = (len(inputs), features, slots, rank, width, DTYPES.index(str(output.dtype).removeprefix("torch.")))
        operands = (inputs.data_ptr(), a.data_ptr(), b.data_ptr(), *b.stride()[1:], indices.data_ptr())
        self._add_lora(*sizes, *operands, output.data_ptr())
