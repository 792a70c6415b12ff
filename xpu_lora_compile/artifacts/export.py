"""`export`: a model with a bank -> one file that serves any adapter to any row, without Python.

model, example inputs --follow--> layouts of rows --trace--> ExportedProgram, whose slots are an input
ExportedProgram --rewrite--> ops without Python --AOTInductor--> served.pt2, then manifest, weights and library in it
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from xpu_lora_compile.adapters.bank import NO_ADAPTER, Block, Rows
from xpu_lora_compile.adapters.files import few
from xpu_lora_compile.adapters.names import BaseModel, plain_name
from xpu_lora_compile.artifacts.manifest import (
    DTYPES,
    RANKS,
    SLOTS,
    Base,
    Input,
    Manifest,
    Module,
    Stack,
    capability_of,
    folder_of,
    name_of_dtype,
)
from xpu_lora_compile.errors import ArtifactError, BankInUseError
from xpu_lora_compile.kernels import preferred_on
from xpu_lora_compile.kernels.call import Kernel
from xpu_lora_compile.layers import HOSTS
from xpu_lora_compile.layers.host import LoraLayer
from xpu_lora_compile.layers.targets import carriers_in
from xpu_lora_compile.passes import Decision, rewrite
from xpu_lora_compile.rows.given import GivenRows
from xpu_lora_compile.rows.inputs import named_inputs
from xpu_lora_compile.rows.layout import Layout
from xpu_lora_compile.rows.routing import BatchRouting
from xpu_lora_compile.torch_internals import (
    before_each_op,
    fresh_compilation,
    memory_of,
    name_of,
    open_guards,
    written_by,
)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: dict[str, Any] | None = None,
) -> Path:
    """Write a model that LoRA is attached to into one file, to be served with other adapters by C++ or Python.

    The file holds the compiled code and the base weights. Its loader makes room for as many adapters as the bank has
    slots, of ranks up to its `max_rank`; adapters that are in the bank now stay there. An input of the code says which
    row uses which slot. Runs the model twice with the example inputs, on a machine like the one that will serve. Runs
    it again with inputs cut to the size 1 where `dynamic_shapes` allows that size, and compares the trace with it.

    Args:
        model: what `attach` was given, or a module that holds it: then the example inputs are of that module.
        path: the file to write; its name ends with `.pt2`. One that is there is replaced when all has succeeded.
        args: example inputs: tensors, contiguous, on the model's device; or lists, tuples and dicts of such; other
            values become constants of the code. The first dimension of the first tensor is the batch, of at least two
            sequences.
        kwargs: the same, by name.
        dynamic_shapes: as `torch.export.export` takes it. Where it makes the batch dynamic, `lora_slots` is, too.
        options: further options of Inductor.

    Returns:
        The path.

    Raises:
        ArtifactError: the model has no bank, is in training mode, carries gradients, is itself the one layer, or
            returns something else than tensors of different names; it writes into its buffers, weights or inputs; its
            trace does not hold for all sizes that `dynamic_shapes` allows; the inputs are no tensors; nothing can be
            written at `path`; or there is no kernel that runs without Python.
        BankInUseError: a `use` block is open.
        UnprovedRowsError: a layer's rows come from the sequences in a way that cannot be told.
        BatchError: the inputs hold another number of sequences than the first of them.
    """
    with fresh_compilation(model) as plain:
        return _export(plain, Path(path), tuple(args), dict(kwargs or {}), dynamic_shapes, options or {})


def _export(
    model: nn.Module,
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    options: dict[str, Any],
) -> Path:
    folder = folder_of(path)
    layers = _layers_of(model)
    first = next(iter(layers.values()))
    kernel = _kernel_on(first.lora_a.device)
    inputs = _checked_inputs(model, args, kwargs)
    own = _own_inputs(first.lora_a, inputs, kernel)
    specs = _specs(model, args, kwargs, dynamic_shapes)
    # Loads Inductor, and therefore waits until it is called.
    from xpu_lora_compile.artifacts.package import compile_into, load_package

    with torch.no_grad():
        layouts = _follow(model, layers, args, kwargs, inputs)
        program, result, outputs = _traced(model, layers, layouts, (args, kwargs), own, inputs, specs)
        _check_size_one(program, model, args, kwargs, own, inputs)
        decisions = rewrite(program, without_python=True)
        _check_guards(program, own, inputs)
        _check_ops(program, kernel, decisions)
        library = kernel.library()
        weights = {**program.state_dict, **program.constants}
        modules = {plain_name(layer.lora_name): _module(name, layer) for name, layer in layers.items()}
        stacks = [stack.constant for module in modules.values() for stack in (module.a, module.b)]
        manifest = Manifest(
            slots=len(first.lora_a),
            max_rank=first.lora_b.shape[2],
            modules=modules,
            base=_base(model, layers),
            inputs=_inputs(program, own, inputs),
            ranks=RANKS in own,
            sizes=_sizes(program),
            aliases={},
            strides={},
            outputs=outputs,
            result=result,
            device=first.lora_a.device.type,
            capability=capability_of(first.lora_a.device),
            library=None if library is None else f"native{library.suffix}",
        )
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as aside:
            made = compile_into(Path(aside) / path.name, program, options)
            read = set(load_package(made).get_constant_fqns())
            _check_constants(read, stacks, weights)
            base = {name: weights[name] for name in sorted(read - set(stacks))}
            _check_devices(base, first.lora_a.device)
            manifest = dataclasses.replace(manifest, aliases=_aliases(base), strides=_strides(base))
            manifest.add_to(made, base, library)
            return made.replace(path)


def _layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers by their names inside of `model`, which may hold the one that LoRA was attached to."""
    where, remedy = "export: model", "Call xlc.attach(model) first, and pass the model, or a module that holds it."
    if not isinstance(model, nn.Module):
        raise ArtifactError(where, "a torch.nn.Module that LoRA is attached to", type(model).__name__, remedy)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ArtifactError(where, "a model that LoRA is attached to", "a plain model", remedy)
    if any(not plain_name(layer.lora_name) for layer in layers.values()):
        remedy = "Put the layer into a module, nn.Sequential(layer) for example, and attach LoRA to that module."
        raise ArtifactError(where, "layers with LoRA that have names", "a model that is itself the one layer", remedy)
    routings = {id(layer.lora_routing): layer.lora_routing for layer in layers.values()}
    (routing, *others) = routings.values()
    if others or not isinstance(routing, BatchRouting):
        got = "one whose parts have had names of their own" if others else "a copy of one, which no bank knows"
        remedy = "Attach LoRA anew: bank.detach(), or xlc.detach(copy), and xlc.attach(model)."
        raise ArtifactError(where, "a model with one bank, and one row of slots", got, remedy)
    if routing.sequence_slots is not None:
        raise BankInUseError("export", "a bank that is not in use", "a `use` block", "Leave the block first.")
    if model.training:
        raise ArtifactError(where, "a model in evaluation mode", "one in training mode", "Call model.eval() first.")
    trained = [name for name, layer in layers.items() if layer.lora_a.requires_grad or layer.lora_b.requires_grad]
    if trained:
        remedy = "Save the adapter, load it into a bank, and export the model of that bank."
        raise ArtifactError(where, "adapters that carry no gradients", f"some that do, of {few(trained)}", remedy)
    return layers


def _kernel_on(device: torch.device) -> Kernel:
    """The kernel that the file will use."""
    kernel = preferred_on(device.type)
    why = kernel.problem(device.type) if kernel.ops_without_python else "its ops are written in Python"
    if why:
        remedy = "Move the model to the CPU." if device.type != "cpu" else "Force no kernel, and install g++."
        wanted = f"a kernel for {device.type} that runs without Python"
        raise ArtifactError("export: model", wanted, f"{kernel.name}: {why}", remedy)
    return kernel


# What is in the inputs.


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif not (value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)):
        raise ArtifactError(
            "export: inputs",
            "tensors, numbers, and lists, tuples and dicts of such",
            f"a {type(value).__name__}",
            "Export a module of your own that takes its tensors one by one, and calls the model.",
        )


def _with_tensors(value: Any, tensors: Iterator[Any]) -> Any:
    """The same with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Mapping):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_with_tensors(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _checked_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the example inputs, by name and in order."""
    names = {id(value): name for name, value in named_inputs(model, args, kwargs)}
    found: dict[str, Tensor] = {}
    device = next(module.lora_a.device for module in model.modules() if isinstance(module, LoraLayer))
    for tensor in _tensors((args, kwargs)):
        name = names[id(tensor)].replace(" ", "_")
        problem = (
            "a tensor that came before"
            if name in found
            else f"one on {tensor.device}"
            if tensor.device != device
            else "one that is not contiguous"
            if not tensor.is_contiguous()
            else "one that requires grad"
            if tensor.requires_grad
            else f"one of {tensor.dtype}"
            if tensor.dtype not in DTYPES.values()
            else ""
        )
        if problem:
            remedy = "Pass tensor.detach().to(device).contiguous(), and each tensor once."
            raise ArtifactError(f"export: input {name}", f"a contiguous tensor on {device}", problem, remedy)
        found[name] = tensor
    first = next(iter(found.values()), None)
    if first is None or not first.dim() or len(first) < 2:
        got = "no tensor" if first is None else f"a first tensor of shape {list(first.shape)}"
        remedy = "Pass inputs of two sequences or more: with one, nobody could tell whose rows are whose."
        raise ArtifactError("export: inputs", "a batch of at least two sequences", got, remedy)
    return found


def _own_inputs(stack: Tensor, inputs: Mapping[str, Tensor], kernel: Kernel) -> dict[str, Tensor]:
    """What the program is given besides the model's inputs, for rows without an adapter."""
    batch = len(next(iter(inputs.values())))
    own = {SLOTS: torch.full((batch,), NO_ADAPTER, dtype=torch.int32, device=stack.device)}
    if kernel.reads_ranks:
        own[RANKS] = torch.zeros(len(stack), dtype=torch.int32, device=stack.device)
    return own


def _specs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> list[Any]:
    """What `dynamic_shapes` says of each tensor."""
    if hasattr(given, "dynamic_shapes"):
        given = given.dynamic_shapes(model, args, kwargs)
    if given is None:
        given = {}
    if isinstance(given, list | tuple):
        given = dict(enumerate(given[: len(args)])) | dict(zip(kwargs, given[len(args) :], strict=False))
    names = [name for name, _ in named_inputs(model, tuple(object() for _ in args), {})]
    by_position = [given.get(at, given.get(name)) for at, name in enumerate(names)]

    def of(value: Any, spec: Any) -> Iterator[Any]:
        if isinstance(value, Tensor):
            yield spec
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from of(item, spec.get(key) if isinstance(spec, Mapping) else None)
        elif isinstance(value, list | tuple):
            for at, item in enumerate(value):
                yield from of(item, spec[at] if isinstance(spec, list | tuple) else None)

    return [*of(args, by_position), *of(kwargs, given)]


def _of_batch(spec: Any) -> Any:
    """What the spec of a tensor says of its first dimension, as the spec of `lora_slots`."""
    first = spec.get(0) if isinstance(spec, Mapping) else spec[0] if isinstance(spec, list | tuple) and spec else None
    return None if first is None else {0: first}


# Following and tracing.


def _follow(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Mapping[str, Tensor],
) -> dict[tuple[str, int], Layout]:
    """Call the model once, and return the layout of each layer's rows."""
    routing = next(iter(layers.values())).lora_routing
    first = next(iter(inputs.values()))
    # Every other sequence has an adapter: the call is followed, and its result is of no interest.
    block = Block({"": Rows(tuple(None if row % 2 else "first" for row in range(len(first))))})
    block.resolve(lambda _: 0)
    token = routing.mine.set(block)
    try:
        slots = torch.tensor(block.slots_of(""), device=first.device)
        routing.point(slots, block)
        with _unchanged(model, inputs):
            model(*args, **kwargs)
        shown, unreached = dict(routing._shown), routing.unreached(block)
    finally:
        routing.point(None)
        routing.mine.reset(token)
    if missed := [name for name, layer in layers.items() if layer.lora_name not in block.called or name in unreached]:
        raise ArtifactError(
            "export: model",
            "a call of each module that carries LoRA",
            f"a call that leaves out {few(missed)}",
            "Leave them out with exclude_modules of xlc.attach, or pass inputs for which they are called.",
        )
    return {key: layout for key, layout in shown.items() if layout is not None}


@contextmanager
def _unchanged(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop a call of the model before it writes into a tensor of the model or of the inputs.

    A buffer that the call has replaced by one of other values is put back before the error is raised.
    """
    held = [
        (module, values, f"{name}.{key}".strip("."), key, value)
        for name, module in model.named_modules()
        for values in (module._parameters, module._buffers, vars(module))
        for key, value in values.items()
        if isinstance(value, Tensor)
    ]
    kept = {memory_of(value): f"{name} of the model" for _, _, name, _, value in held}
    kept |= {memory_of(tensor): f"the input {name}" for name, tensor in inputs.items()}
    kept.pop(None, None)
    with before_each_op(functools.partial(_check_writes, kept)):
        yield
    replaced = [entry for entry in held if entry[1].get(entry[3]) is not entry[4]]
    changed = []
    for _, values, name, key, value in replaced:
        new = values.get(key)
        if not (isinstance(new, Tensor) and new.dtype == value.dtype and torch.equal(new, value)):
            changed.append(name)
            values[key] = value
    if changed:
        raise _written(f"{few(changed)} of the model")


def _check_writes(kept: Mapping[int | None, str], op: Any, args: Any, kwargs: Any) -> None:
    for tensor in written_by(op, args, kwargs):
        if (memory := memory_of(tensor)) in kept:
            raise _written(kept[memory])


def _written(what: str) -> ArtifactError:
    wanted = "a model that writes into none of its buffers, weights and inputs"
    remedy = "A file has no state: return the new value as a result, and take the old one as an input."
    return ArtifactError("export: model", wanted, f"one that changes {what}", remedy)


@dataclasses.dataclass
class _Result:
    """What the model returned while it was traced: the names of its tensors, and how they lay in it."""

    names: list[str] = dataclasses.field(default_factory=list)
    structure: Any = None

    def take_apart(self, value: Any) -> list[Tensor]:
        """Return the tensors in it."""
        found: dict[str, tuple[str, Tensor]] = {}
        self.structure = self._plain(value, "", "", found)
        self.names = list(found)
        return [tensor for _, tensor in found.values()]

    def _plain(self, value: Any, name: str, where: str, found: dict[str, tuple[str, Tensor]]) -> Any:
        """The structure of a value, whose tensors it adds to `found`; `where` is how Python reaches the value."""
        if isinstance(value, Tensor):
            name = name or "output"
            if name in found:
                raise _same_name(name, found[name][0], where)
            found[name] = where, value
            return len(found) - 1
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            # transformers leaves what a model does not return as None.
            present = {key: item for key, item in value.items() if item is not None}
            keys: dict[str, Any] = {}
            for key in present:
                if keys.setdefault(str(key), key) is not key:
                    raise _same_name(str(key), f"{where}[{keys[str(key)]!r}]", f"{where}[{key!r}]")
            return {
                str(key): self._plain(item, f"{name}.{key}".strip("."), f"{where}[{key!r}]", found)
                for key, item in present.items()
            }
        if isinstance(value, list | tuple):
            return [
                self._plain(item, f"{name}.{at}".strip("."), f"{where}[{at}]", found) for at, item in enumerate(value)
            ]
        raise ArtifactError(
            f"export: what the model returns{name and f', {name}'}",
            "tensors, and lists, tuples and dicts of tensors",
            f"a {type(value).__name__}",
            "Pass use_cache=False to a transformer, or export a module of your own that returns tensors.",
        )


def _same_name(name: str, first: str, second: str) -> ArtifactError:
    return ArtifactError(
        "export: what the model returns",
        "a name of its own for each tensor",
        f"{first} and {second}, which are both named {name!r}",
        "Give them other keys, in a module of your own that calls the model.",
    )


class _WithSlots(nn.Module):
    """The model as a function of tensors alone, what `_own_inputs` names first, that returns a list of tensors."""

    def __init__(
        self, model: nn.Module, given: GivenRows, result: _Result, arguments: tuple[Any, ...], reads_ranks: bool
    ) -> None:
        super().__init__()
        self.model = model
        self._given, self._result, self._reads_ranks = given, result, reads_ranks
        # Hidden from the tracer, which looks for tensors in attributes.
        self._arguments: Callable[[], tuple[Any, ...]] = lambda: arguments

    def forward(self, lora_slots: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Run the model."""
        self._given.sequence_slots = lora_slots
        if self._reads_ranks:
            self._given.ranks, *tensors = tensors  # type: ignore[assignment]
        args, kwargs = _with_tensors(self._arguments(), iter(tensors))
        return self._result.take_apart(self.model(*args, **kwargs))


def _traced(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    layouts: Mapping[tuple[str, int], Layout],
    arguments: tuple[Any, ...],
    own: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    specs: list[Any],
) -> tuple[ExportedProgram, Any, list[str]]:
    """The program, what the model returned in terms of its outputs, and the names of these."""
    given, result = GivenRows(layouts), _Result()
    routings = {name: layer.lora_routing for name, layer in layers.items()}
    tensors = *own.values(), *inputs.values()
    fixed = [None] * (len(own) - 1)
    shapes = (_of_batch(specs[0]), (*fixed, *specs)) if any(spec is not None for spec in specs) else None
    wrapper: nn.Module = _WithSlots(model, given, result, arguments, RANKS in own)
    wrapper.eval()
    try:
        for layer in layers.values():
            layer.lora_routing = cast("BatchRouting", given)
        program = torch.export.export(wrapper, tensors, dynamic_shapes=shapes, strict=False)
    finally:
        for name, layer in layers.items():
            layer.lora_routing = routings[name]
    return program, result.structure, result.names


def _check_size_one(
    program: ExportedProgram,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    own: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> None:
    """Compare the program with the model at the size 1, which torch takes for allowed and traces as if it were not.

    The base model is compared, without adapters: once for each size that may be 1, and with all of these at 1.
    """
    given = {entry.name: entry.shape for entry in _inputs(program, own, inputs)}
    # Whoever names no least size in `dynamic_shapes` has allowed 1.
    used = {size for shape in given.values() for size in shape}
    small = [size for size, (low, _) in _sizes(program).items() if low == 1 and size in used]
    run = program.module() if small else None
    for sizes in [*([size] for size in small), *([small] if len(small) > 1 else [])]:
        tensors = [_cut(tensor, given[name], sizes) for name, tensor in inputs.items()]
        slots, *more = (_cut(tensor, given[name], sizes) for name, tensor in own.items())
        where = ", ".join(f"{size} = 1, size {_place(size, given)}" for size in sizes)
        remedy = "Say in dynamic_shapes that the size is at least 2: torch.export.Dim(name, min=2)."
        wanted = "a trace that computes what the model does at every size that dynamic_shapes allows"
        try:
            cut_args, cut_kwargs = _with_tensors((args, kwargs), iter(tensors))
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                expected = _Result().take_apart(model(*cut_args, **cut_kwargs))
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                got = cast("Callable[..., list[Tensor]]", run)(slots, *more, *tensors)
        except Exception as error:
            said = f"{type(error).__name__} with the example inputs cut to {where}: {str(error).strip()[:200]}"
            raise ArtifactError("export: dynamic_shapes", wanted, said, remedy) from error
        if len(got) != len(expected) or not all(map(_is_close, got, expected)):
            said = f"other results with the example inputs cut to {where}"
            raise ArtifactError("export: dynamic_shapes", wanted, said, remedy)


def _cut(tensor: Tensor, shape: Sequence[int | str], sizes: Collection[str]) -> Tensor:
    """The tensor's first entries along each dimension whose size is one of these."""
    for dim, size in enumerate(shape):
        if size in sizes:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.clone(memory_format=torch.contiguous_format)


def _place(size: str, shapes: Mapping[str, Sequence[int | str]]) -> str:
    """Where a size is found first: the dimension and the input."""
    return next(
        (f"{shape.index(size)} of {name}" for name, shape in shapes.items() if name != SLOTS and size in shape),
        "of none",
    )


def _is_close(got: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not expected.dtype.is_floating_point:
        return torch.equal(got, expected)
    finite = expected.nan_to_num(0, 0, 0).abs()
    allowed = 32 * torch.finfo(expected.dtype).eps * (float(finite.max()) if finite.numel() else 0.0)
    return torch.allclose(got, expected, rtol=0, atol=allowed, equal_nan=True)


def _check_guards(program: ExportedProgram, own: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
    """Stop where the program is right for some of the sizes alone that the manifest would allow."""
    if guards := open_guards(program.graph):
        shapes = {entry.name: entry.shape for entry in _inputs(program, own, inputs)}
        symbols = [size for size in _sizes(program) if any(size in re.findall(r"\w+", guard) for guard in guards)]
        where = ", ".join(f"{size} is size {_place(size, shapes)}" for size in symbols)
        raise ArtifactError(
            "export: dynamic_shapes",
            "a trace that holds for every size in the range",
            f"one that holds only if {' and '.join(guards)}{where and f', where {where}'}",
            "Fix that size, limit it with torch.export.Dim(name, min=, max=), or take the condition out of the model.",
        )


def _check_ops(program: ExportedProgram, kernel: Kernel, decisions: list[Decision]) -> None:
    """Stop where an op of ours is left that needs Python."""
    left = [
        node
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if getattr(node.target, "namespace", "") == "xpu_lora" and name_of(node.target) not in kernel.ops_without_python
    ]
    if left:
        said = [note for decision in decisions for note in decision.notes if "not" in note or "left" in note]
        raise ArtifactError(
            "export: model",
            f"LoRA that the kernel {kernel.name} computes",
            f"{few(str(node.target) for node in left)}{': ' if said else ''}{few(said)}",
            "Keep LoRA out of torch.cond and the like, its widths fixed, and its weights in 16 or 32 bits.",
        )


# The manifest.


def _module(name: str, layer: LoraLayer) -> Module:
    stacks = []
    for buffer in ("lora_a", "lora_b"):
        stack: Tensor = getattr(layer, buffer)
        constant = ".".join(filter(None, ("model", name, buffer)))
        stacks.append(Stack(constant, list(stack.shape), list(stack.stride())))
    a, b = stacks
    return Module(**dataclasses.asdict(layer.lora_site), dtype=name_of_dtype(layer.lora_a.dtype), a=a, b=b)


def _base(model: nn.Module, layers: Mapping[str, LoraLayer]) -> Base:
    # The module that LoRA was attached to: the names of its layers are the ends of theirs in `model`.
    name, layer = next(iter(layers.items()))
    inside = name.removesuffix(layer.lora_name).rstrip(".")
    attached = model.get_submodule(inside)
    base = BaseModel.of(attached, HOSTS)
    covered = {plain_name(layer.lora_name) for layer in layers.values()}
    plain = {plain_name(name): host.site(module).kind for name, (host, module) in carriers_in(attached).items()}
    return Base(
        constants=".".join(filter(None, ("model", inside))) + ".",
        output_embedding=base.output_embedding,
        others={name: kind for name, kind in plain.items() if name not in covered},
        tied=[sorted(group) for group in base.tied],
        prefix=base.prefix,
        old_rules=dict(base.old_rules),
    )


def _inputs(program: ExportedProgram, own: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Input]:
    wanted = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.find_nodes(op="placeholder") if node.name in wanted]
    found = []
    for name, node in zip([*own, *inputs], nodes, strict=True):
        value: Tensor = node.meta["val"]
        shape = [size if isinstance(size, int) else str(size) for size in value.shape]
        if derived := [size for size in shape if isinstance(size, str) and not size.isidentifier()]:
            remedy = "Give the dimension a name of its own in dynamic_shapes, and check the relation yourself."
            raise ArtifactError(f"export: input {name}", "sizes that are free or fixed", f"{derived[0]}", remedy)
        found.append(Input(name, name_of_dtype(value.dtype), shape))
    slots, sequences = (entry.shape[0] for entry in (found[0], found[len(own)]))
    if slots != sequences:
        got = f"{slots} slots for {sequences} sequences"
        remedy = "Make the first dimension of the first tensor dynamic, or none."
        raise ArtifactError("export: dynamic_shapes", "a slot for each sequence of the batch", got, remedy)
    return found


def _sizes(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    limits = {str(symbol): limit for symbol, limit in program.range_constraints.items()}
    # Beyond any size there is: torch's own infinity.
    return {name: (max(1, int(of.lower)), int(of.upper) if of.upper < 2**62 else None) for name, of in limits.items()}


def _check_constants(read: Collection[str], stacks: list[str], weights: Collection[str]) -> None:
    """Stop where the compiled code has lost a stack, or reads what the program does not hold."""
    lost = [name for name in stacks if name not in read]
    made = [name for name in read if name not in weights]
    if lost or made:
        got = f"code that does not read {few(lost)}" if lost else f"code that reads {few(made)}, too"
        remedy = "Export without constant folding or freezing, and without modules whose result is not used."
        raise ArtifactError("export", "code that reads the adapters of each module, and the weights", got, remedy)


def _check_devices(weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Stop where the code reads what is on another device than the adapters."""
    if elsewhere := [name for name, tensor in weights.items() if tensor.device != device]:
        got = f"{few(elsewhere)} on {weights[elsewhere[0]].device}"
        raise ArtifactError("export: model", f"all weights on {device}", got, "Move them: model.to(device).")


def _aliases(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The first of the names of each tensor that has several."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in weights.items():
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if tensor.numel() and first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def _strides(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.stride()) for name, tensor in weights.items() if not tensor.is_contiguous()}
