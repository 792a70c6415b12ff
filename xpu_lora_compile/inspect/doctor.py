"""`xpu-lora doctor`: what is installed, what will therefore be used, and whether it computes what it should here."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xpu_lora_compile import ops
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.errors import DeviceError, OptionError, counted, own_error
from xpu_lora_compile.inspect import predicted
from xpu_lora_compile.inspect.operands import RandomOperands, every_kind_of_index, poison_unused_slots
from xpu_lora_compile.inspect.verify import verify
from xpu_lora_compile.kernels import (
    choice_for,
    compiled,
    force_kernel,
    forced_kernel,
    ipex,
    replay,
    rounds_before_adding,
    triton_launch,
    vendor,
)
from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.layers.attach import attach
from xpu_lora_compile.ops import BGMV_EXPAND, BGMV_EXPAND_SLICE, BGMV_SHRINK, LORA_LINEAR
from xpu_lora_compile.ops.budget import budget_of
from xpu_lora_compile.terminal import wrapped
from xpu_lora_compile.torch_internals import name_of, without_memory

# T, K, R, D and W of the sweep over all ops.
_SIZES = ((1, 5, 40), (1, 4), (3, 16), (7, 96), (8, 33))
_PACKAGES = (vendor.PACKAGE, "intel-extension-for-pytorch", "transformers")


@dataclass
class Finding:
    """One thing that was looked at; `is_right` is None where there is nothing to be right or wrong."""

    what: str
    text: str
    is_right: bool | None = None

    def __str__(self) -> str:
        mark = {None: " ", True: "ok", False: "!!"}[self.is_right]
        # A traceback keeps its lines.
        return "\n".join(wrapped(line, indent=6) for line in f"{mark:>2}  {self.what}: {self.text}".split("\n"))


@dataclass
class Diagnosis:
    """What the doctor found, in the order in which it looked."""

    device: str
    findings: dict[str, list[Finding]] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether nothing was wrong."""
        return all(found.is_right is not False for part in self.findings.values() for found in part)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        checks = [found for part in self.findings.values() for found in part if found.is_right is not None]
        wrong = [check.what for check in checks if not check.is_right]
        if wrong:
            return f"{len(wrong)} of {len(checks)} checks failed on {self.device}: {', '.join(wrong)}."
        return f"All {len(checks)} checks passed on {self.device}."

    def __str__(self) -> str:
        parts = [f"{title}\n" + "\n".join(map(str, each)) for title, each in self.findings.items()]
        return "\n\n".join([*parts, f"verdict\n{wrapped('    ' + self.verdict, indent=4)}"])


def check_report(file: Path) -> None:
    """Check that a report could be written to a file; nothing is written.

    Raises:
        OptionError: it could not.
    """
    if not file.parent.is_dir():
        problem, remedy = f"{file}, in a folder that does not exist", "Make the folder first."
    elif file.is_dir():
        problem, remedy = f"{file}, which is a folder", "Name a file in it."
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        problem, remedy = f"{file}, which may not be written", "Name another with --report."
    else:
        return
    raise OptionError("doctor: --report", "a file that can be written", problem, remedy)


def examine(device: str, on_done: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Look at everything, on one device; takes a minute or two, most of it compilation.

    Where there is no such device, at what is installed alone.

    Args:
        device: "cpu", "cuda" or "xpu".
        on_done: told of each part.

    Raises:
        DeviceError: another type of device.
    """
    if device not in ("cpu", "cuda", "xpu"):
        raise DeviceError("doctor: device", "cpu, cuda or xpu", repr(device), "Choose one of these.")
    diagnosis = Diagnosis(device)
    parts: dict[str, Callable[[str], Iterator[Finding]]] = {
        "installed": installed,
        "what will be used, D = W = 4096, K = 8, R = 16": choices,
        "ops against the float64 reference": sweep,
        "ops against PyTorch's opcheck": opchecks,
        "a model": compiled_model,
        "speed": speed,
    }
    if device == "xpu":
        parts["measured beside predicted: q, k and v of Llama 8B, bfloat16, 8 adapters"] = beside_bounds
    parts["what to do now"] = partial(_next_steps, diagnosis)
    for title, look in parts.items():
        found = list(_guarded(title, look, device))
        if found:
            diagnosis.findings[title] = found
            on_done(title)
        if not _is_there(device):
            break
    return diagnosis


def _is_there(device: str) -> bool:
    return device == "cpu" or bool(torch.get_device_module(device).is_available())


def _guarded(title: str, look: Callable[[str], Iterator[Finding]], device: str) -> Iterator[Finding]:
    """What a part finds; what it raises is a finding, too."""
    try:
        yield from look(device)
    except Exception as error:
        # What we raise on purpose says all that there is to say.
        yield Finding(title, str(own_error(error) or traceback.format_exc().strip()), is_right=False)


def installed(device: str) -> Iterator[Finding]:
    """Versions, the device, compilers, and which of the vendor's ops are there."""
    yield Finding("xpu-lora-compile", version("xpu-lora-compile"))
    yield Finding("torch", torch.__version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")
    # Its distribution has had several names.
    made_by = importlib.metadata.packages_distributions().get("triton", ["triton"])
    for package in dict.fromkeys((*made_by, *_PACKAGES)):
        yield Finding(package, _version(package))
    if device == "cpu":
        yield Finding("device", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    elif not _is_there(device):
        problem = f"none that PyTorch {torch.__version__} can use: no device, no driver, or a PyTorch built without it"
        remedy = f"Install PyTorch's {device} build and the driver; `--device cpu` examines the rest."
        if device == "xpu":
            remedy += " docs/intel-gpu.md has the commands. On Linux your user must be in the group `render`."
        yield Finding("device", f"{problem}. {remedy}", is_right=False)
    else:
        properties = torch.get_device_module(device).get_device_properties(0)
        known = getattr(properties, "driver_version", None)
        driver = f"driver {known}" if known else f"runtime {torch.version.cuda or torch.version.xpu}"
        yield Finding("device", f"{properties.name}, {properties.total_memory >> 20} MiB, {driver}")
    yield Finding("C++ compiler", _compiler())
    if device == "cuda" and _is_there(device):
        launched = "without Python, once it has launched for such shapes"
        yield Finding("kernels are launched", f"by Python: {replay.problem()}" if replay.problem() else launched)
    if device == "cpu":
        if _has_imported_ipex():
            yield Finding(ipex.PACKAGE, "imported: what follows has PyTorch's own kernels as it exchanges them")
        for name in ipex.OPS:
            yield Finding(f"torch_ipex.{name}", ipex.problem_of(name) or "there, with the known schema")
    for family, members in vendor.FAMILIES.items():
        for name in members:
            problem = vendor.problem_of(name).replace("it ", f"{vendor.PACKAGE} ", 1)
            yield Finding(f"_xpu_C.{name} ({family})", problem or "there, with the known schema")


def _compiler() -> str:
    """As the kernels find it."""
    named = os.environ.get("CXX")
    if named is not None:
        return f"{named!r}, from CXX"
    return next(filter(None, map(shutil.which, compiled.found_compiler())), "none")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _has_imported_ipex() -> bool:
    """Whether IPEX is there, was made for this PyTorch (with another it ends the process), and could be imported."""
    if _version("intel-extension-for-pytorch").split(".")[:2] == torch.__version__.split(".")[:2]:
        # Without the instructions that it needs it ends the process.
        with suppress(Exception, SystemExit):
            importlib.import_module(ipex.PACKAGE)
    return ipex.PACKAGE in sys.modules


def choices(device: str) -> Iterator[Finding]:
    """For two dtypes and a few numbers of rows: which kernel, why, and why not the others."""
    for dtype in (torch.bfloat16, torch.float32):
        rows_of: dict[str, list[str]] = {}
        for rows in (1, 32, 1024):
            rows_of.setdefault(_choice(device, dtype, rows), []).append(str(rows))
        for text, alike in rows_of.items():
            yield Finding(f"{_named(dtype)}, T = {', '.join(alike)}", text)


def _choice(device: str, dtype: torch.dtype, rows: int) -> str:
    empty = partial(torch.empty, device=device, dtype=dtype)
    with without_memory():
        a, b = empty(8, 16, 4096), empty(8, 4096, 16)
        outputs, inputs = [empty(rows, 4096)], empty(rows, 4096)
        indices = torch.empty(rows, dtype=torch.int64, device=device)
        choice = choice_for(LoraCall(outputs, inputs, [a], [b], RowRouting(indices, 8)))
    others = "; ".join(f"{name}: {why}" for name, why in choice.others.items())
    name = f"vendor (the ops of {vendor.PACKAGE})" if choice.kernel.name == "vendor" else choice.kernel.name
    return f"{name}, {choice.because}. Not {others}"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sweep(device: str) -> Iterator[Finding]:
    """Every op, with rows that have no adapter, unused slots of NaN, and every relation of widths.

    Where the vendor's ops run what they take, Triton runs it once more: an owner may set XPU_LORA_KERNEL.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # A forced kernel may take one of them alone.
        yield from _guarded(_named(dtype), partial(_sweep, dtype), device)
    if forced_kernel() is None and vendor.Vendor().problem(device) == triton_launch.problem(device) == "":
        with force_kernel("triton"):
            found = [
                finding
                for dtype in (torch.bfloat16, torch.float16)
                for finding in _guarded(_named(dtype), partial(_sweep, dtype), device)
            ]
        yield from (replace(finding, what=f"{finding.what}, XPU_LORA_KERNEL=triton") for finding in found)


def _sweep(dtype: torch.dtype, device: str) -> Iterator[Finding]:
    worst, cases = 0.0, 0
    for rows, slots, rank, features, width in itertools.product(*_SIZES):
        operands = _Operands(rows, slots, rank, features, width, dtype, device)
        for columns in {width, width + 5, max(1, width - 3)}:
            for op, call in operands.calls(columns):
                worst, cases = max(worst, _excess(op, call)), cases + 1
    text = f"{counted(cases, 'call')}, the worst error is {worst:.2f} of what rounding allows"
    yield Finding(_named(dtype), text, worst <= 1)


class _Operands:
    """Random operands of the sizes in the letters of the contract; each kind of row without an adapter among them."""

    def __init__(
        self, rows: int, slots: int, rank: int, features: int, width: int, dtype: torch.dtype, device: str
    ) -> None:
        self.normal = partial(RandomOperands(rows + slots, device).normal, dtype=dtype)
        routing = every_kind_of_index(rows, slots)
        self.indices = torch.tensor(routing, device=device)
        self.inputs, self.hidden = self.normal(rows, features), self.normal(rows, rank)
        self.a = poison_unused_slots(self.normal(slots, rank, features, scale=0.5), routing)
        self.b = poison_unused_slots(self.normal(slots, width, rank, scale=0.5), routing)

    def calls(self, columns: int) -> Iterator[tuple[str, dict[str, Any]]]:
        rows, width = len(self.inputs), self.b.shape[1]
        indices = {"lora_indices_tensor": self.indices}
        rank_vectors = {"output_tensor": self.normal(rows, self.a.shape[1]), "inputs": self.inputs}
        yield "bgmv_shrink", rank_vectors | {"lora_a_weights": self.a} | indices | {"scaling": 0.5}
        outputs = {"output_tensor": self.normal(rows, columns), "inputs": self.hidden, "lora_b_weights": self.b}
        yield "bgmv_expand", outputs | indices | {"add_inputs": True}
        if columns >= width:
            where = {"slice_offset": columns - width, "slice_size": width}
            yield "bgmv_expand_slice", outputs | indices | where | {"add_inputs": False}
            of_layer = {"base": outputs["output_tensor"], "inputs": self.inputs, "lora_a": [self.a], "lora_b": [self.b]}
            yield "lora_linear", of_layer | indices | {"slice_offsets": [columns - width], "scaling": 0.5}


def _excess(op: str, arguments: dict[str, Any]) -> float:
    """The worst error of a call in units of its budget; untouched elements have none if they are untouched."""
    first = next(iter(arguments))
    rounds_early = rounds_before_adding(arguments[first].device.type)
    budget = budget_of(op, arguments, rounds_before_adding=rounds_early)
    given = arguments | {first: arguments[first].clone()}
    with torch.no_grad():
        result = getattr(ops, op)(**given)
    excess = budget.excess(given[first] if result is None else result)
    return float(excess.max()) if excess.numel() else 0.0


def opchecks(device: str) -> Iterator[Finding]:
    """Schema, fake and dispatch of each public op."""
    operands = _Operands(5, 4, 3, 7, 8, torch.float32, device)
    handles = {name_of(op): op for op in (BGMV_SHRINK, BGMV_EXPAND, BGMV_EXPAND_SLICE, LORA_LINEAR)}
    for op, arguments in operands.calls(10):
        with torch.no_grad():
            result = torch.library.opcheck(handles[op], tuple(arguments.values()))
        yield Finding(op, ", ".join(result), all(said == "SUCCESS" for said in result.values()))


class _Block(nn.Module):
    """Attention's and the MLP's linears, without what lies between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]`, as it comes."""
        x = x + self.o(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x))
        added: Tensor = self.down(torch.relu(self.up(x)))
        return x + added


def compiled_model(device: str) -> Iterator[Finding]:
    """Two blocks with adapters, compiled: each call against its exact value, and twenty batches without recompiling.

    In float32, which the vendor's ops do not take; on an Intel GPU in bfloat16, too.
    """
    yield from _compiled_model(torch.float32, device)
    if device == "xpu":
        yield from _guarded("bfloat16", partial(_compiled_model, torch.bfloat16), device)


def _compiled_model(dtype: torch.dtype, device: str) -> Iterator[Finding]:
    # What this process has compiled before counts against the limit of recompilations.
    torch.compiler.reset()
    torch.manual_seed(0)
    suffix = "" if dtype == torch.float32 else f", {_named(dtype)}"
    model = nn.Sequential(*(_Block(64) for _ in range(2))).requires_grad_(False).to(device, dtype)
    bank = attach(model, slots=3, max_rank=8)
    x = torch.randn(4, 3, 64, device=device, dtype=dtype)
    with torch.no_grad():
        found = verify(model)(x)
        worst = max(max(site.rewritten, site.compiled or 0.0) for site in found.sites)
        text = f"{counted(len(found.sites), 'site')}, the worst error is {worst:.2f} of what rounding allows"
        yield Finding(f"compiled code{suffix}", text, all(site.is_right for site in found.sites))
        names: list[str | None] = ["one", "two"]
        for name in ("one", "two"):
            with tempfile.TemporaryDirectory() as folder:
                write_adapter(Path(folder), bank.sites, 8)
                bank.load(name, folder)
        compiled = torch.compile(model, backend="xpu_lora", fullgraph=True)
        error = 0.0
        for number in range(20):
            chosen = [[*names, None][(number + row) % 3] for row in range(4)]
            with bank.use(chosen):
                expected = model(x)
                with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
                    error = max(error, float((compiled(x) - expected).abs().max() / expected.abs().max()))
        yield Finding(f"adapters changed in 20 batches{suffix}", "compiled once", is_right=True)
        # Between two calls generated code rounds less often than eager code.
        allowed = 1e-3 if dtype == torch.float32 else 5e-2
        yield Finding(f"compiled against eager{suffix}", f"differ by {error:.1e} of the largest value", error < allowed)


def speed(device: str) -> Iterator[Finding]:
    """A linear layer of 2048 with LoRA for 16 rows, compiled, beside the layer alone: a first impression."""
    torch.compiler.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer = nn.Sequential(nn.Linear(2048, 2048, bias=False, device=device, dtype=dtype)).requires_grad_(False)
    bank = attach(layer, slots=8, max_rank=16)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), bank.sites, 16)
        bank.load("one", folder)
    x = torch.randn(16, 2048, device=device, dtype=dtype)
    compiled = torch.compile(layer, backend="xpu_lora", fullgraph=True)
    with torch.no_grad():
        base, mixed = [], []
        # By turns, and after a first one that does not count: a machine that others share changes its pace.
        for turn in range(4):
            taken = _microseconds(lambda: compiled(x), device)
            base += taken if turn else []
            with bank.use(["one", None] * 8):
                taken = _microseconds(lambda: compiled(x), device)
            mixed += taken if turn else []
    us = f"{statistics.median(base):.0f} us alone, {statistics.median(mixed):.0f} us with LoRA"
    if device != "cpu":
        us += ", with the host's time"
    if device == "cuda":
        us += ', which a CUDA graph (mode="reduce-overhead") would not take'
    yield Finding("16 rows through 2048x2048", us)


def beside_bounds(device: str, clock: predicted.Clock | None = None) -> Iterator[Finding]:
    """How long the kernels of an Intel GPU take, beside the cost model of docs/intel-gpu.md; nothing fails."""
    try:
        card = predicted.card_of(torch.get_device_module(device).get_device_properties(0))
        about, points = predicted.measured_beside_bounds(device, card, clock or predicted.DeviceClock(device))
    except Exception as error:
        yield Finding("not measured", f"{type(error).__name__}: {error}. Report this; no check depends on it.")
        return
    yield Finding("this device", about)
    for point in points:
        yield Finding(str(point), point.text)
    yield from (Finding(title, text) for title, text in predicted.verdicts(points))


def _next_steps(diagnosis: Diagnosis, device: str) -> Iterator[Finding]:
    """What an owner can do: where a check failed, and on an Intel GPU."""
    report = "attach this report to an issue of the project"
    if not diagnosis.is_right:
        others = ["triton", "gather"] if device == "xpu" else ["gather"]
        again = ", then with ".join(f"XPU_LORA_KERNEL={name}" for name in others)
        yield Finding("report", f"{report}. What is marked !! is wrong here: do not serve with it")
        yield Finding("until it is mended", f"run `doctor` with {again}; serve with the first that passes")
    elif device == "xpu":
        if why := vendor.Vendor().problem(device):
            yield Finding(vendor.PACKAGE, f"{why}. Install its release for this PyTorch: its ops come first then")
        yield Finding("use it", 'move the model to "xpu", attach, and compile with backend="xpu_lora"')
        yield Finding("report", f"{report}, please: no run on an Intel GPU is known to the project yet")


def _microseconds(call: Callable[[], object], device: str) -> list[float]:
    finish = (lambda: None) if device == "cpu" else torch.get_device_module(device).synchronize
    times = []
    for _ in range(20):
        finish()
        start = time.perf_counter()
        call()
        finish()
        times.append(time.perf_counter() - start)
    return [1e6 * seconds for seconds in times]
