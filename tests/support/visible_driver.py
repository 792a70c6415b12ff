"""What Inductor writes for LoRA on a GPU that is not there: `python visible_driver.py cuda` prints a report as JSON.

A process of its own, without Triton's interpreter: Triton compiles for a GPU by name, tensors are fake, and torch is
told that there is a device. Nothing is launched.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch._dynamo.device_interface as interfaces
from torch import Tensor
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import tracing
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import post_grad
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule
from torch.nn.functional import linear, silu
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import xpu_lora_compile as xlc
from xpu_lora_compile.torch_internals import source_of, without_memory

TARGET = GPUTarget("cuda", 90, 32)


class Driver:
    """Enough of a driver to compile for a GPU that is not there."""

    launcher_cls = utils = None

    def get_current_target(self) -> Any:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, _type: str) -> str:
        return "x"


def pretend(put: Callable[[Any, str, Any], object] = setattr, capability: Any = 90) -> None:
    """Have Inductor find a device.

    Args:
        put: what sets an attribute.
        capability: what Triton's backend is told of the device.
    """
    properties = SimpleNamespace(
        name="absent", multi_processor_count=64, total_memory=1 << 34, major=9, minor=0, gcnArchName="",
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, warp_size=32,
        max_work_group_size=1024, gpu_subslice_count=20, gpu_eu_count=160, has_fp64=True,
        max_num_sub_groups=64, sub_group_sizes=[16, 32],
    )  # fmt: skip
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda _=None: properties,
        "get_compute_capability": lambda _=None: capability,
        "synchronize": lambda _=None: None,
        "is_bf16_supported": lambda *_, **__: True,
        "is_triton_capable": lambda _=None: True,
        "raise_if_triton_unavailable": lambda _=None: None,
        "maybe_exchange_device": lambda device: device,
        "exchange_device": lambda device: device,
    }
    for interface in (interfaces.CudaInterface, interfaces.XpuInterface):
        for name, answer in answers.items():
            put(interface, name, staticmethod(answer))
        put(interface.Worker, "get_device_properties", staticmethod(answers["get_device_properties"]))
    # It would allocate there.
    put(fake_tensor, "init_gpu_context", lambda _: None)
    put(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    for name in ("is_available", "device_count", "current_device", "get_device_properties", "synchronize"):
        put(torch.xpu, name, answers[name])
    put(torch.xpu, "get_device_capability", lambda _=None: {})
    put(torch.xpu, "get_rng_state", lambda _=None: torch.zeros(1))
    put(torch.xpu, "set_rng_state", lambda *_: None)


T, D, INNER, R, K = 7, 64, 96, 4, 3


def layers(
    x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], ranks: Tensor, i: Tensor
) -> Any:
    """A packed product with three slices, two products of one input, and one more."""
    packed, gate, up, down = weights
    q = xlc.lora_linear(linear(x, packed), x, a[:3], b[:3], i, [0, 16, 32], 0.5, ranks)
    y = torch.relu(q)
    one = xlc.lora_linear(linear(y, gate), y, [a[3]], [b[3]], i, [0], 0.5, ranks)
    other = xlc.lora_linear(linear(y, up), y, [a[4]], [b[4]], i, [0], 0.5, ranks)
    z = silu(one) * other
    return xlc.lora_linear(linear(z, down), z, [a[5]], [b[5]], i, [0], 0.5, ranks)


def operands(device: str) -> list[Any]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    weights = [empty(D, D), empty(INNER, D), empty(INNER, D), empty(D, INNER)]
    a = [empty(K, R, D) for _ in range(5)] + [empty(K, R, INNER)]
    b = [empty(K, R, width).transpose(1, 2) for width in (16, 16, 32, INNER, INNER, D)]
    ranks, indices = empty(K, dtype=torch.int32), empty(T, dtype=torch.int64)
    return [empty(T, D), weights, a, b, ranks, indices]


class Written(NamedTuple):
    """What Inductor made of a function.

    Attributes:
        module: the graph that it generated code for.
        code: that code.
        inputs: where the inputs come from, by the function's names.
    """

    module: GraphModule
    code: str
    inputs: list[str]


def written(device: str, dynamic: bool, function: Callable[..., Any] = layers, make: Any = None) -> Written:
    """Compile a function for a device, with the kernels visible.

    Args:
        device: the device's type.
        dynamic: whether the number of rows, those of the first and the last argument, is symbolic.
        function: what is compiled.
        make: its arguments on a device; those of `layers` where it is None.
    """
    found: list[tuple[GraphModule, str]] = []
    sources: list[str] = []

    def finish(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        mode = detect_fake_mode(inputs)
        with V.set_fake_mode(mode):
            post_grad.remove_noop_ops(module.graph)
            reinplace_inplaceable_ops_core(module.graph)
            post_grad.decompose_triton_kernel_wrapper_functional(module.graph)
            post_grad.decompose_auto_functionalized(module.graph)
        module.recompile()
        lowering = GraphLowering(module, example_inputs=inputs, shape_env=mode.shape_env)
        quiet = config.patch(compile_threads=1, force_disable_caches=True)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()), V.set_fake_mode(mode), quiet:
            lowering.run(*inputs)
            made: Any = lowering.codegen()[0]
        found.append((module, getattr(made, "value", made)))
        return module.forward

    def backend(module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        xlc.rewrite(module, launch="inductor")
        placeholders = module.graph.find_nodes(op="placeholder")
        sources.extend(map(source_of, placeholders))
        inputs = [node.meta["example_value"] for node in placeholders]
        with unset_fake_temporarily(), tracing(None):
            table = select_decomp_table()
            compiled: Any = aot_module_simplified(module, inputs, fw_compiler=finish, decompositions=table)
        return compiled

    # Or sizes that differ from those of an earlier call would be symbols.
    torch._dynamo.reset()
    with without_memory():
        given = (make or operands)(device)
        if dynamic:
            torch._dynamo.mark_dynamic(given[0], 0)
            torch._dynamo.mark_dynamic(given[-1], 0)
        torch.compile(function, backend=backend, fullgraph=True)(*given)
    (only,) = found
    return Written(*only, sources)


def kernels_in(code: str) -> dict[str, str]:
    """The text of each kernel of ours that Inductor copied, without its own decorator."""
    texts = re.findall(r"^(\w+) = async_compile\.triton\('(\w+_flat)', '''(.*?)'''", code, re.S | re.M)
    return {
        name: re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", "", text, flags=re.S)
        for _, name, text in texts
    }


def compiles(name: str, text: str, folder: Path) -> bool:
    """Whether Triton compiles the copied text of a kernel, as it would with these arguments' types."""
    file = folder / f"{name}.py"
    file.write_text(text.replace("triton_helpers.set_driver_to_gpu()", ""))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, name)
    # bfloat16 for what is not said otherwise.
    types = {"tiles": torch.int32, "ranks": torch.int32, "indices": torch.int64, "trained": torch.int64}
    types |= {"hidden": torch.float32, "scalings": torch.float32}
    values: dict[str, Any] = {
        "BY_ROW": False, "CHUNK": 64, "BM": 16, "BR": 16, "BK": 64, "BN": 64, "STAGES": 2,
        "PIECE": 256, "PIECES": 1, "EACH": 1, "PUBLIC": False, "EVEN": False, "PDL": False, "SLICES": 3, "GROUP": 1,
        "SUMS": 1, "PAIRS": False, "SCALE": True, "ADD": True, "FILL": False,
        "ONE_BLOCK": True, "PER": 1, "scaling": 0.5, "SCAN": 64, "SOME": "trained" in kernel.arg_names,
        "HAS_RANKS": "ranks" in kernel.arg_names, "HAS_SCALINGS": "scalings" in kernel.arg_names,
    }  # fmt: skip
    arguments = []
    for parameter in kernel.arg_names:
        stem = re.sub(r"_\d+$", "", parameter)
        if stem in values:
            arguments.append(values[stem])
        elif stem in (*types, "x", "a", "b", "outputs", "gradient", "target"):
            arguments.append(torch.empty(1, dtype=types.get(stem, torch.bfloat16)))
        else:
            arguments.append(16)
    return "ptx" in kernel.warmup(*arguments, grid=(1,)).asm


def gradients(
    x: Tensor, grad: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scalings: Tensor, i: Tensor
) -> list[Tensor]:
    """Those of two slices of one output; and both passes of a call that trains the slots `i[:2]` in two slices."""
    # Where autograd's formulas call it; autograd itself knows no device that is not there.
    ops: Any = torch.ops.xpu_lora
    whole = ops.triton_backward([grad], x, a, b, i, [0, 0], [0, 50], 0.5, None, None, True, True)
    b = [stack.flatten(0, -3) for stack in b]
    a = [stack.flatten(0, -3) for stack in a]
    bases = [linear(x, x.new_empty(INNER, D)) for _ in b]
    slots, tiles = i.narrow(0, 0, 2), ops.triton_training_tiles(i, K)
    leaves = [[x.new_empty(2, R, stack.shape[size]) for stack in some] for some, size in ((a, 2), (b, 1))]
    *results, kept = ops.trained_linear(bases, x, a, b, i, scalings, slots, *leaves, tiles)
    given = results, x, a, b, i, [0, 1], [0, 0], 1.0, scalings, slots, True, True, tiles, kept
    return [made * 2 for made in (*whole, *results, *ops.triton_backward(*given))]


def operands_of_gradients(device: str) -> list[Any]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    a, b = [empty(K, R, D), empty(K, 1, R, D)], [empty(K, 40, R), empty(K, 1, 30, R)]
    rows, indices = empty(T, D), empty(T, dtype=torch.int64)
    return [rows, empty(T, D + INNER), a, b, empty(K, dtype=torch.float32), indices]


def report(device: str) -> dict[str, Any]:
    """What the test looks at."""
    return {"dynamic" if dynamic else "static": report_of(*written(device, dynamic)[:2]) for dynamic in (False, True)}


def report_of(module: GraphModule, code: str) -> dict[str, Any]:
    """The same of one graph, and of what Inductor made of it."""
    launches = [node for node in module.graph.nodes if "triton_kernel_wrapper_mutation" in str(node.target)]
    texts = kernels_in(code)
    with tempfile.TemporaryDirectory() as folder:
        compiled = {name: compiles(name, text, Path(folder)) for name, text in texts.items()}
    return {
        "launches": len(launches),
        "grids": [str(node.kwargs["grid"]) for node in launches],
        "copies": [
            str(node.target) for node in module.graph.nodes if "clone" in str(node.target) or "copy" in str(node.target)
        ],
        "allocations": len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.empty.memory_format)),
        "python": re.findall(r"torch\.ops\.xpu_lora\.\w+", code),
        "runs": len(re.findall(r"_flat\w*\.run\(", code)),
        "compiled": compiled,
    }


def without_overlap() -> dict[str, bool]:
    """Whether the kernels compile by a Triton that has no functions for CUDA's dependent launches."""
    from xpu_lora_compile.kernels import triton_kernels, triton_visible
    from xpu_lora_compile.kernels.triton_flat import flat_form

    triton_kernels.gdc_wait = triton_kernels.gdc_launch_dependents = None
    made: dict[str, bool] = {}

    def compile_only(kernel: str, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
        shapes, arguments = triton_visible._flattened(given)
        made[kernel] = "ptx" in flat_form(kernel, shapes).warmup(*arguments, grid=grid, **options).asm

    x, a, b = torch.empty(T, D), [torch.empty(K, R, D)], [torch.empty(K, D, R)]
    indices = torch.zeros(T, dtype=torch.int64)
    tiles = triton_visible.route_tiles(indices, K, T, compile_only)
    call = triton_visible.called([torch.empty(T, D)], x, a, b, indices, tiles, None)
    triton_visible.add_lora(call, T, compile_only)
    return made


if __name__ == "__main__":
    driver.set_active(Driver())
    pretend()
    match sys.argv[1:]:
        case ["without_overlap"]:
            said = without_overlap()
        case [device, "gradients"]:
            said = report_of(*written(device, True, gradients, operands_of_gradients)[:2])
        case [device]:
            said = report(device)
    json.dump(said, sys.stdout)
