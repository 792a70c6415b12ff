"""Loads the few modules of vLLM, SGLang and LMDeploy that the peers call, from folders into which wheels were unpacked.

They are the files themselves, run as they are. All else of these packages is stood in for, so that nothing that they
depend on need be installed, and is infrastructure: loggers, questions about the platform, the registration of custom
ops, types that appear in annotations. Where that could make a difference:

- no op is registered, and SGLang's kernels go through Triton's own launcher: on each call, Python takes other times;
- SGLang's routes for more than 512 rows are built by its Triton kernels, not by the CUDA ones that it compiles with
  tvm-ffi: the same but for the order of an adapter's rows, and outside of what is timed;
- where pydantic is missing, SGLang's tables of plans are read without being validated.
"""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from xpu_lora_compile.errors import BenchError

_QUIET = dict.fromkeys(("debug", "info", "info_once", "warning", "warning_once"), lambda *_, **__: None)
OTHER_VERSION = (
    "Give the sources of vLLM 0.32.0 (for experts 0.33.0), SGLang 0.5.23 or LMDeploy 0.18.0: "
    "others may be laid out differently."
)

# Of a module, by its name.
Load = Callable[[str], Any]


@functools.cache
def vllm(folder: Path) -> Load:
    """What loads a module of the vLLM whose package is in the folder."""
    real = ("envs", "utils.math_utils", "utils.multi_stream_utils", "lora.ops.triton_ops", "lora.layers.base_linear")
    wrappers = ("lora.punica_wrapper.punica_gpu", "lora.punica_wrapper.punica_base")
    triton: Any = _checked("vllm", folder, (*real, *wrappers))
    platform = {
        "is_cuda": torch.cuda.is_available,
        "has_device_capability": lambda at_least: torch.cuda.get_device_capability() >= divmod(at_least, 10),
        "can_update_inplace": lambda: True,
    }
    known: dict[str, dict[str, Any]] = {
        "vllm.triton_utils": {"triton": triton, "tl": triton.language, "HAS_TRITON": True},
        "vllm.logger": {"init_logger": lambda _: SimpleNamespace(**_QUIET)},
        "vllm.platforms": {"current_platform": SimpleNamespace(**platform)},
        "vllm.utils.torch_utils": {
            # Where no op has been registered, vLLM calls its functions plainly.
            "direct_register_custom_op": lambda **_: None,
            "async_tensor_h2d": lambda data, device, dtype: torch.tensor(data, device=device, dtype=dtype),
        },
        "vllm.lora.utils": {"get_captured_lora_counts": lambda *_: []},
        "vllm.compilation.breakable_cudagraph": {"BreakableCUDAGraphCapture": SimpleNamespace(is_active=lambda: False)},
    }
    return _loader("vllm", folder, (*real, *wrappers), known)


@functools.cache
def sglang(folder: Path) -> Load:
    """What loads a module of the SGLang whose package is in the folder."""
    lora = ("srt.lora.utils", "srt.lora.workspace", "srt.lora.dense", "srt.lora.backend")
    real = ("srt.environ", *lora, "kernels.ops.lora.common", "kernels.ops.lora.dense")
    _checked("sglang", folder, real)
    known: dict[str, dict[str, Any]] = {
        "sglang.srt.utils": {
            # What it saves is time of Triton's launcher, of which a CUDA graph has none.
            "cached_triton_kernel": lambda _: lambda kernel: kernel,
            "get_device_name": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: False},
    }
    return _loader("sglang", folder, real, known)


@functools.cache
def vllm_experts(folder: Path) -> Load:
    """What loads a module of vLLM's LoRA on experts."""
    real = ("envs", "utils.math_utils", "lora.ops.triton_ops.fused_moe_lora_op", "lora.ops.triton_ops.utils")
    triton: Any = _checked("vllm", folder, real)
    platform = {
        "is_cuda_alike": torch.cuda.is_available,
        "is_xpu": lambda: False,
        "num_compute_units": lambda index=0: (
            torch.cuda.get_device_properties(index or 0).multi_processor_count if torch.cuda.is_available() else 1
        ),
        "has_device_capability": lambda at_least: torch.cuda.get_device_capability() >= divmod(at_least, 10),
    }
    known: dict[str, dict[str, Any]] = {
        "vllm.triton_utils": {"triton": triton, "tl": triton.language, "HAS_TRITON": True},
        "vllm.logger": {"init_logger": lambda _: SimpleNamespace(**_QUIET)},
        "vllm.platforms": {"current_platform": SimpleNamespace(**platform)},
        # What a block of Hopper's or Ampere's multiprocessors may take is beyond what is asked for.
        "vllm.utils.mem_utils": {"get_max_shared_memory_bytes": lambda _: 1 << 17},
        "vllm.utils.torch_utils": {
            "direct_register_custom_op": lambda **_: None,
            "async_tensor_h2d": lambda data, device, dtype: torch.tensor(data, device=device, dtype=dtype),
        },
    }
    return _loader("vllm", folder, real, known)


@functools.cache
def sglang_experts(folder: Path) -> Load:
    """What loads a module of SGLang's LoRA on experts."""
    lora = ("srt.lora.utils", "srt.lora.workspace", "srt.lora.moe.plan", "srt.lora.moe.runner", "srt.lora.moe.routing")
    kernels = ("common", "moe.lora_b", "moe.activation")
    real = ("srt.environ", *lora, *(f"kernels.ops.lora.{name}" for name in kernels))
    _checked("sglang", folder, real)
    known: dict[str, dict[str, Any]] = {
        "sglang.srt.utils": {
            "cached_triton_kernel": lambda _: lambda kernel: kernel,
            "get_device_name": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: False},
    }
    return _loader("sglang", folder, real, known)


@functools.cache
def lmdeploy(folder: Path) -> Load:
    """What loads a module of the LMDeploy whose package is in the folder."""
    real = ("pytorch.kernels.cuda.fused_lora", "pytorch.backends.lora", "pytorch.backends.cuda.lora")
    _checked("lmdeploy", folder, real)
    # What a class derives from, with the kind of op in brackets.
    spec = type("BuildSpec", (), {"__class_getitem__": classmethod(lambda cls, _: cls)})
    return _loader("lmdeploy", folder, real, {"lmdeploy.pytorch.backends.base": {"BuildSpec": spec}})


def _checked(package: str, folder: Path, real: Sequence[str]) -> ModuleType:
    """Triton, if it and the modules are there, and the package is not yet."""
    where = f"bench: --peers: {package}"
    paths = [folder.joinpath(package, *name.split(".")) for name in real]
    missing = [str(path) for path in paths if not (path.is_dir() or path.with_suffix(".py").is_file())]
    if missing:
        raise BenchError(where, ", ".join(missing), "a folder without these", OTHER_VERSION)
    if package in sys.modules:
        remedy = "Give one folder to a process, and import the package nowhere else in it."
        raise BenchError(where, f"the one in {folder}", "another that is already imported", remedy)
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise BenchError(where, "Triton", "none", "pip install triton.") from error


def _loader(package: str, folder: Path, real: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> Load:
    finder = _Finder(package, folder, [f"{package}.{name}" for name in real], known)
    sys.meta_path.insert(0, finder)

    def load(name: str) -> ModuleType:
        try:
            with _third_parties():
                return importlib.import_module(name)
        # What another version has moved, renamed or come to need.
        except (ImportError, AttributeError, TypeError) as error:
            where = f"bench: --peers: {name}"
            raise BenchError(where, "a module that loads", str(error), OTHER_VERSION) from error

    return load


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the modules named `real`, and what is below them, from the folder; makes a `_StandIn` of any other."""

    def __init__(self, package: str, folder: Path, real: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> None:
        self._package, self._folder, self._real, self._known = package, folder, real, known

    def find_spec(self, fullname: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        """Of a module of the package, the file that holds it, or nothing but its name."""
        if fullname.split(".")[0] != self._package:
            return None
        if not self.is_real(fullname):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        path = self._folder.joinpath(*fullname.split("."))
        if path.is_dir():
            # Not every folder has one.
            if not (path / "__init__.py").is_file():
                return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
            return importlib.util.spec_from_file_location(fullname, path / "__init__.py")
        file = path.with_suffix(".py")
        return importlib.util.spec_from_file_location(fullname, file) if file.is_file() else None

    def is_real(self, fullname: str) -> bool:
        """Whether it is one of those named, or below one."""
        return any(f"{fullname}.".startswith(f"{name}.") for name in self._real)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """A stand-in with what is known of it."""
        module = _StandIn(spec.name)
        module.finder = self
        module.__dict__.update(self._known.get(spec.name, {}))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing."""


class _StandIn(ModuleType):
    """A module of names that are imported, but not used by what we call: each is a class without content."""

    finder: _Finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.finder.is_real(f"{self.__name__}.{name}"):
            return importlib.import_module(f"{self.__name__}.{name}")
        return type(name, (), {})


@contextmanager
def _third_parties() -> Iterator[None]:
    """Stand in, for as long as modules are loaded, for what their files use of packages that are not installed."""
    stand_ins: dict[str, dict[str, Any]] = {
        "msgspec": {"Struct": _Struct},
        "pydantic": {
            "BaseModel": _Model,
            "ConfigDict": dict,
            "Field": lambda default=None, default_factory=None, **_: default_factory or default,
            "model_validator": lambda **_: lambda method: method,
        },
        "pydantic.dataclasses": {"dataclass": lambda config, **options: dataclass(**options)},
        "transformers": {"PreTrainedConfig": object},
    }
    packages = {name: name.split(".")[0] for name in stand_ins}
    missing = [name for name, of in packages.items() if of not in sys.modules and importlib.util.find_spec(of) is None]
    for name in missing:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(stand_ins[name])
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


class _Struct:
    """`msgspec.Struct`, of which a dataclass does as well."""

    def __init_subclass__(cls, **options: bool) -> None:
        dataclass(**options)(cls)


class _Model:
    """`pydantic.BaseModel`, as far as reading a file takes it: enums, models in models, and defaults."""

    @classmethod
    def model_validate(cls, raw: Mapping[str, Any]) -> Any:
        """The model of a parsed JSON object."""
        model = cls()
        for name, hint in typing.get_type_hints(cls).items():
            default = getattr(cls, name, None)
            fallback = default() if callable(default) else default
            setattr(model, name, _converted(hint, raw[name]) if name in raw else fallback)
        return model

    def model_dump(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


def _converted(hint: Any, value: Any) -> Any:
    # `X | None`, `list[X]`, `dict[str, X]`, or a class.
    inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if isinstance(value, list):
        (of,) = typing.get_args(inner[0]) or inner
        return [_converted(of, item) for item in value]
    kind = hint if isinstance(hint, type) else inner[0]
    if isinstance(kind, type) and issubclass(kind, _Model) and isinstance(value, dict):
        return kind.model_validate(value)
    return kind(value) if isinstance(kind, type) and issubclass(kind, enum.Enum) and value is not None else value
