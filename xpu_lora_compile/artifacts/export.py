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
    slots_of,
)
from xpu_lora_compile.errors import ArtifactError, BankInUseError
from xpu_lora_compile.kernels import preferred_on
from xpu_lora_compile.kernels.call import Kernel
from xpu_lora_compile.layers import HOSTS
from xpu_lora_compile.layers.host import LoraLayer
from xpu_lora_compile.layers.targets import carriers_in
from xpu_lora_compile.passes import Decision, rewrite
from xpu_lora_compile.rows.given import GivenRows
from xpu_lora_compile.rows.inputs import leaves, named_inputs
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

    Where a call of the model needs `lengths` or `parts`, call this inside of a `use` block that gives them for the
    example inputs: the loader asks for such, too. The names of that block do not matter.

    Args:
        model: what `attach` was given, or a module that holds it: then the example inputs are of that module.
        path: the file to write; its name ends with `.pt2`. One that is there is replaced when all has succeeded.
        args: example inputs: tensors, contiguous, on the model's device; or lists, tuples and dicts of such; other
            values become constants of the code. The first dimension of the first tensor is the batch, of at least two
            sequences.
        kwargs: the same, by name.
        dynamic_shapes: as `torch.export.export` takes it. Where it makes the batch dynamic, or the rows of a part,
            so are their slots.
        options: further options of Inductor.

    Returns:
        The path.

    Raises:
        ArtifactError: the model has no bank, is in training mode, carries gradients, is itself the one layer, or
            returns something else than tensors of different names; it writes into its buffers, weights or inputs; its
            trace does not hold for all sizes that `dynamic_shapes` allows; the inputs are no tensors; nothing can be
            written at `path`; or there is no kernel that runs without Python.
        BankInUseError: another thread or task has a `use` block open.
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
    # The block is set aside below.
    block = _example_block(first.lora_routing.main.block, layers, inputs)
    own = _own_inputs(first.lora_a, block, kernel)
    specs = _specs(model, args, kwargs, dynamic_shapes)
    # Loads Inductor, and therefore waits until it is called.
    from xpu_lora_compile.artifacts.package import compile_into, load_package

    with torch.no_grad(), _set_aside(layers):
        layouts = _follow(model, layers, block, args, kwargs, inputs)
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
            rows={plain_name(part): rows.lengths is not None for part, rows in block.rows.items()},
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
    if not isinstance(routing, BatchRouting):
        remedy = "Attach LoRA to the copy: xlc.detach(copy), and xlc.attach(copy)."
        raise ArtifactError(where, "a model that belongs to a bank", "a copy of one, which no bank knows", remedy)
    if not routing.main.is_mine():
        got = "a `use` block of another thread or task"
        raise BankInUseError("export", "a bank that nobody else uses", got, "Wait for its end.")
    if routing.main.block is None and (others or routing is not routing.main):
        remedy = "Export inside of bank.use(names, parts=...), or of bank.use(names) where no part is to have its own."
        raise ArtifactError(where, "one row of slots", "parts that have had names of their own", remedy)
    if model.training:
        raise ArtifactError(where, "a model in evaluation mode", "one in training mode", "Call model.eval() first.")
    if mixtures := [name for name, layer in layers.items() if hasattr(layer, "lora_pages") or layer.lora_site.by_name]:
        remedy = "Serve adapters on these from Python, with bank.use; or attach without them, and export that."
        got = f"LoRA on experts, routers or convolutions, {few(mixtures)}"
        raise ArtifactError(where, "slots for A and B of single modules", got, remedy)
    if roomy := [name for name, layer in layers.items() if layer.lora_extras]:
        got = f"a bank with room for more, on {few(roomy)}"
        remedy = (
            "Attach without use_dora, lora_bias, bias, modules_to_save and trainable_token_indices, and export that; "
            "serve adapters with these from Python, with bank.use."
        )
        raise ArtifactError(where, "slots for A and B alone, the only thing that a file holds", got, remedy)
    if routing.main.activates:
        remedy = "Make a bank of other adapters, and export that; serve those with such tokens from Python."
        raise ArtifactError(where, "adapters for all tokens", "a bank with alora_invocation_tokens", remedy)
    if routing.main.adapters_per_row > 1:
        got = f"a bank with adapters_per_row={routing.main.adapters_per_row}"
        remedy = "Attach without adapters_per_row and export that; serve several adapters for a row from Python."
        raise ArtifactError(where, "one adapter for a row, the only thing that a file holds", got, remedy)
    trained = [
        name
        for name, layer in layers.items()
        if layer.lora_training or layer.lora_a.requires_grad or layer.lora_b.requires_grad
    ]
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
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif not (leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device)):
            raise ArtifactError(
                "export: inputs",
                "tensors, numbers, and lists, tuples and dicts of such",
                f"a {type(leaf).__name__}",
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
    return found


def _example_block(given: Block | None, layers: Mapping[str, LoraLayer], inputs: Mapping[str, Tensor]) -> Block:
    """A block for the example inputs in which every other sequence has an adapter, whatever has names of its own.

    Args:
        given: the block that is open here, if any.
        layers: of them those parts count that have any.
        inputs: of the model; the first holds the batch where no block says how large it is.
    """
    first = next(iter(inputs.values()), None)
    remedy = "Pass inputs of two sequences or more: with one, all rows are its own."
    if first is None or not first.dim() or (given is None and len(first) < 2):
        got = "no tensor" if first is None else f"a first tensor of shape {list(first.shape)}"
        raise ArtifactError("export: inputs", "a batch of at least two sequences", got, remedy)
    rows = {"": Rows((None,) * len(first))} if given is None else given.rows
    parts = {"", *(layer.lora_routing.part for layer in layers.values())}
    # The model first, as its slots are.
    rows = {part: rows[part] for part in sorted(parts)}
    if alone := [part for part, row in rows.items() if len(row.names) < 2]:
        got = f"one for {alone[0]}" if alone[0] else "a `use` block of one"
        raise ArtifactError("export: inputs", "names for at least two sequences", got, remedy)
    block = Block(
        {
            part: Rows(tuple(None if at % 2 else "first" for at in range(len(row.names))), row.lengths)
            for part, row in rows.items()
        }
    )
    block.resolve(lambda _: 0)
    return block


@contextmanager
def _set_aside(layers: Mapping[str, LoraLayer]) -> Iterator[None]:
    """Have the model be outside of the `use` block that is open here, if any."""
    before = [(routing, routing.sequence_slots, routing.block, routing.lengths) for routing in _routings(layers)]
    for routing, *_ in before:
        routing.point(None)
    try:
        yield
    finally:
        for routing, slots, block, lengths in before:
            routing.point(slots, block, lengths)


def _routings(layers: Mapping[str, LoraLayer]) -> list[BatchRouting]:
    """The routings of the layers, and the model's first."""
    found = [layer.lora_routing for layer in layers.values()]
    return list({id(routing): routing for routing in (found[0].main, *found)}.values())


def _own_inputs(stack: Tensor, block: Block, kernel: Kernel) -> dict[str, Tensor]:
    """What the program is given besides the model's inputs, for rows without an adapter."""

    def slots(part: str) -> Tensor:
        return torch.full((len(block.slots_of_tokens(part)),), NO_ADAPTER, dtype=torch.int32, device=stack.device)

    own = {SLOTS: slots("")}
    if kernel.reads_ranks:
        own[RANKS] = torch.zeros(len(stack), dtype=torch.int32, device=stack.device)
    return own | {slots_of(plain_name(part)): slots(part) for part in block.rows if part}


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


def _own_specs(own: Mapping[str, Tensor], inputs: Mapping[str, Tensor], specs: list[Any]) -> list[Any]:
    """The specs of what the program is given besides the model's inputs; torch finds out those of parts."""
    of_batch = _of_dimension(specs[0], _batch_dimension(own, inputs))

    def of(name: str, size: int) -> Any:
        if name in (SLOTS, RANKS):
            return of_batch if name == SLOTS else None
        # Where one size alone can be that of the part's rows, they are as many; torch would not let it be 1.
        same = [
            _of_dimension(spec, dimension)
            for tensor, spec in zip(inputs.values(), specs, strict=True)
            for dimension, length in enumerate(tensor.shape)
            if length == size and _of_dimension(spec, dimension) is not None
        ]
        return same[0] if same and all(spec == same[0] for spec in same) else {0: torch.export.Dim.AUTO}

    return [of(name, len(tensor)) for name, tensor in own.items()]


def _of_dimension(spec: Any, dimension: int) -> dict[int, Any] | None:
    """What the spec of a tensor says of one of its dimensions, as the spec of a tensor that has no other."""
    said = dict(enumerate(spec)) if isinstance(spec, list | tuple) else spec if isinstance(spec, Mapping) else {}
    return None if said.get(dimension) is None else {0: said[dimension]}


def _batch_dimension(own: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> int:
    """The dimension of the model's first input that holds the batch: 1 for a row of packed sequences."""
    first = next(iter(inputs.values()))
    return int(first.dim() > 1 and first.shape[0] != len(own[SLOTS]))


# Following and tracing.


def _follow(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    block: Block,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Mapping[str, Tensor],
) -> dict[tuple[str, int], Layout]:
    """Call the model once in a block, and return the layout of each layer's rows. The result is of no interest."""
    routings = _routings(layers)
    token = routings[0].mine.set(block)
    try:
        for routing in routings:
            slots = torch.tensor(block.slots_of_tokens(routing.part), device=next(iter(inputs.values())).device)
            routing.point(slots, block, block.rows[routing.part].lengths)
        with _unchanged(model, inputs):
            model(*args, **kwargs)
        shown = {key: layout for routing in routings for key, layout in routing._shown.items()}
        unreached = {name for routing in routings for name in routing.unreached(block)}
    finally:
        for routing in routings:
            routing.point(None)
        routings[0].mine.reset(token)
    if missed := [name for name, layer in layers.items() if layer.lora_name not in block.called or name in unreached]:
        raise ArtifactError(
            "export: model",
            "a call of each module that carries LoRA",
            f"a call that leaves out {few(missed)}",
            "Leave them out with exclude_modules of xlc.attach, or pass inputs for which they are called.",
        )
    if merged := [name for (name, _), layout in shown.items() if layout is not None and layout.inner < 0]:
        got = f"several tokens of a packed row in one row of {few(merged)}"
        remedy = "Pass the sequences as a batch, without lengths, or leave the module out with exclude_modules."
        raise ArtifactError("export: model", "a row for each token of a packed batch", got, remedy)
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
        self,
        model: nn.Module,
        given: Mapping[str, GivenRows],
        result: _Result,
        arguments: tuple[Any, ...],
        own: Sequence[str],
    ) -> None:
        super().__init__()
        self.model = model
        self._given, self._result, self._own = given, result, own
        # Hidden from the tracer, which looks for tensors in attributes.
        self._arguments: Callable[[], tuple[Any, ...]] = lambda: arguments

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Run the model."""
        own = dict(zip(self._own, tensors, strict=False))
        for part, given in self._given.items():
            given.sequence_slots, given.ranks = own[slots_of(plain_name(part))], own.get(RANKS)
        args, kwargs = _with_tensors(self._arguments(), iter(tensors[len(own) :]))
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
    routings = {name: layer.lora_routing for name, layer in layers.items()}
    given, result = {routing.part: GivenRows(layouts) for routing in routings.values()}, _Result()
    tensors = *own.values(), *inputs.values()
    is_dynamic = any(spec is not None for spec in specs)
    shapes = ((*_own_specs(own, inputs, specs), *specs),) if is_dynamic else None
    wrapper: nn.Module = _WithSlots(model, given, result, arguments, list(own))
    wrapper.eval()
    try:
        for name, layer in layers.items():
            layer.lora_routing = cast("BatchRouting", given[routings[name].part])
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
        mine = [_cut(tensor, given[name], sizes) for name, tensor in own.items()]
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
                got = cast("Callable[..., list[Tensor]]", run)(*mine, *tensors)
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
        (
            f"{shape.index(size)} of {name}"
            for name, shape in shapes.items()
            if not name.startswith(SLOTS) and size in shape
        ),
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
    sizes = {key: getattr(layer.lora_site, key) for key in ("kind", "in_features", "out_features", "padded")}
    return Module(**sizes, dtype=name_of_dtype(layer.lora_a.dtype), a=a, b=b)


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
    dimension = _batch_dimension(own, inputs)
    slots, sequences = found[0].shape[0], found[len(own)].shape[dimension]
    if slots != sequences:
        got = f"{slots} slots for {sequences} sequences"
        remedy = f"Make dimension {dimension} of the first tensor dynamic, or none; it has to hold the batch."
        raise ArtifactError("export: dynamic_shapes", "a slot for each sequence of the batch", got, remedy)
    return found


def _sizes(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    limits = {str(symbol): limit for symbol, limit in program.range_constraints.items()}
    # Beyond any size there is: torch's own infinity.
    return {
        name: (int(of.lower) if of.lower > 1 else 1, int(of.upper) if of.upper < 2**62 else None)
        for name, of in limits.items()
    }


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
