"""Intel's Triton compiler (`triton-xpu` 3.3.0b1) without a GPU, a driver or SYCL's headers: kernels to SPIR-V.

That release belongs to torch 2.7. Two things of it differ from those that torch 2.8 and later bring, and are mended
here: it knows no `a and b and c`, and it declares all arithmetic `fast`.
"""

from __future__ import annotations

import ast
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from xpu_lora_compile.kernels import triton_gradients, triton_launch
from xpu_lora_compile.kernels.sizes import Sizes

# What torch.xpu.get_device_properties() says, as far as Triton asks. `architecture` 0: it then asks no ocloc.
_XE_HPC = {
    "name": "Intel(R) Data Center GPU Max 1550",
    "platform_name": "Intel(R) oneAPI Unified Runtime over Level-Zero",
    "vendor": "Intel(R) Corporation",
    "version": "12.60.7",
    "architecture": 0,
    "gpu_eu_count": 512,
    "gpu_subslice_count": 64,
    "max_work_group_size": 1024,
    "max_num_sub_groups": 64,
    "sub_group_sizes": [16, 32],
    "has_fp64": True,
    "has_subgroup_matrix_multiply_accumulate": True,
    "has_subgroup_matrix_multiply_accumulate_tensor_float32": True,
    "has_subgroup_2d_block_io": True,
    "has_bfloat16_conversions": True,
}
_XE2 = _XE_HPC | {
    "name": "Intel(R) Arc(TM) B580 Graphics",
    "version": "20.1.0",
    "gpu_eu_count": 160,
    "gpu_subslice_count": 20,
    "has_subgroup_matrix_multiply_accumulate_tensor_float32": False,
}
DEVICES: dict[str, dict[str, Any]] = {
    "pvc": _XE_HPC,
    "bmg": _XE2,
    "lnl": _XE2
    | {"name": "Intel(R) Arc(TM) 140V GPU", "version": "20.4.4", "gpu_eu_count": 64, "gpu_subslice_count": 8},
    "dg2": _XE_HPC
    | {
        "name": "Intel(R) Arc(TM) A770 Graphics",
        "version": "12.55.8",
        "gpu_eu_count": 512,
        "gpu_subslice_count": 32,
        "max_num_sub_groups": 128,
        "sub_group_sizes": [8, 16, 32],
        "has_fp64": False,
        "has_subgroup_matrix_multiply_accumulate_tensor_float32": False,
        "has_subgroup_2d_block_io": False,
    },
}


@cache
def problem() -> str:
    """Why the toolchain cannot be used in this process; empty where it can."""
    if sys.version_info[:2] != (3, 11):
        return f"triton-xpu 3.3.0b1 is for Python 3.11, not for {platform.python_version()}"
    if platform.machine() != "x86_64":
        return f"triton-xpu 3.3.0b1 is for x86-64, not for {platform.machine()}"
    found = find_spec("triton")
    folders = [] if found is None else found.submodule_search_locations or []
    if not any(Path(folder, "backends", "intel").is_dir() for folder in folders):
        return "triton-xpu 3.3.0b1 is not installed"
    if triton_launch.is_interpreting():
        return "TRITON_INTERPRET=1 has Triton interpret kernels: set TRITON_INTERPRET=0"
    return ""


class Driver:
    """Enough of a Triton driver to compile for a device that is not there.

    Args:
        properties: of the device, as in DEVICES.
    """

    launcher_cls: Any = None
    utils: Any = None

    def __init__(self, properties: dict[str, Any]) -> None:
        self.properties = properties

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("xpu", self.properties, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by this number.
        return _number_of(str(sorted(self.properties.items())))

    def get_current_stream(self, _device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.xpu

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, _type: str) -> str:
        return "x"


_NUMBERS: dict[str, int] = {}
_FAST_MATH = [False]


def _number_of(text: str) -> int:
    return _NUMBERS.setdefault(text, len(_NUMBERS))


@contextmanager
def compiling_for(device: str, *, fast_math: bool = False, driver: type[Driver] = Driver) -> Iterator[Driver]:
    """Have Triton compile for a device in the block, and launch by a driver.

    Args:
        device: a name in DEVICES.
        fast_math: whether all arithmetic is `fast`, as this release of Triton would have it.
        driver: what Triton asks for its target, and launches with.
    """
    from triton.runtime.driver import driver as drivers

    mend_compiler()
    properties = DEVICES[device]
    if fast_math:
        # The name is part of what Triton's caches know a kernel by.
        properties = properties | {"name": f"{properties['name']} with fast math"}
    active, earlier, was_fast = driver(properties), drivers.active, _FAST_MATH[0]
    drivers.set_active(active)
    _FAST_MATH[0] = fast_math
    try:
        yield active
    finally:
        drivers.set_active(earlier)
        _FAST_MATH[0] = was_fast


@cache
def mend_compiler() -> None:
    """Mend what keeps this release from compiling our kernels as later ones do; once a process."""
    from triton.backends import backends
    from triton.compiler.code_generator import CodeGenerator, _is_triton_tensor

    # Triton loads the backend's compiler by path: its names are not those of a module that can be imported.
    names = backends["intel"].compiler.__init__.__globals__
    # It would compile C++ with SYCL's headers, to turn a number of SYCL's into the name that ocloc is asked by.
    names["compile_module_from_src"] = lambda *_: SimpleNamespace(parse_device_arch=lambda _: "")
    set_fast_math = names["intel"].set_fast_math
    names["intel"].set_fast_math = lambda module: set_fast_math(module) if _FAST_MATH[0] else None

    def visit_bool_op(self: Any, node: ast.BoolOp) -> Any:
        """`a and b and c`, of Python's own booleans too."""
        result = self.visit(node.values[0])
        for value in node.values[1:]:
            if _is_triton_tensor(result):
                method = self._method_name_for_bool_op[type(node.op)]
                result = self._apply_binary_method(method, result, self.visit(value))
            elif bool(getattr(result, "value", result)) == isinstance(node.op, ast.And):
                result = self.visit(value)
            else:
                return result
        return result

    CodeGenerator.visit_BoolOp = visit_bool_op


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch of one of our kernels that was asked for, and not made."""

    kernel: str
    grid: tuple[int, ...]
    operands: tuple[Any, ...]
    options: dict[str, Any]

    def operand(self, name: str) -> Any:
        """The argument of a parameter of the kernel."""
        return self.operands[triton_launch.kernel_named(self.kernel).arg_names.index(name)]

    def constants(self) -> dict[str, Any]:
        """What is compiled into the kernel, by name: its constexprs and Triton's options."""
        function = triton_launch.kernel_named(self.kernel)
        names = [function.arg_names[at] for at in function.constexprs]
        return {name: self.operand(name) for name in names} | self.options

    def compiled(self) -> Any:
        """Triton's compiled kernel, for the device of the block that this is called in."""
        return triton_launch.kernel_named(self.kernel).warmup(*self.operands, grid=self.grid, **self.options)


@contextmanager
def sized_for_xpu(sizes: Sizes | None = None) -> Iterator[None]:
    """Have tensors on a CPU be given the sizes of tiles that those on an Intel GPU are given, or these."""
    real, real_of_gradients = triton_launch.sizes_for, triton_gradients.gradient_sizes_for

    def sizes_for(rows: int, rank: int, width: int, _device: str = "", kind: str = "plain", _slots: int = 1) -> Sizes:
        return sizes or real(rows, rank, width, "xpu", kind)

    triton_launch.sizes_for = sizes_for
    triton_gradients.gradient_sizes_for = lambda _device, dtype: real_of_gradients("xpu", dtype)
    try:
        yield
    finally:
        triton_launch.sizes_for, triton_gradients.gradient_sizes_for = real, real_of_gradients


def launches_of(run: Callable[[], object], sizes: Sizes | None = None) -> list[Launch]:
    """The launches that a function of tensors on a CPU would ask for on an Intel GPU; none is made."""
    noted: list[Launch] = []
    real = triton_launch._launch
    triton_launch._launch = lambda kernel, grid, *operands, **options: noted.append(
        Launch(kernel, grid, operands, options)
    )
    try:
        with sized_for_xpu(sizes):
            run()
    finally:
        triton_launch._launch = real
    return noted
