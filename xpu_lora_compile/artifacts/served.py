"""`Served`: an artifact in this process, with a bank of its own for adapters."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xpu_lora_compile.adapters.config import check_is_plain, read_config
from xpu_lora_compile.adapters.names import plain_name
from xpu_lora_compile.adapters.needs import folder_path
from xpu_lora_compile.artifacts.manifest import (
    DTYPES,
    RANKS,
    Base,
    Input,
    Manifest,
    Stack,
    check_records,
    read_record,
    read_weights,
    slots_of,
)
from xpu_lora_compile.errors import ArtifactError, BatchError, DtypeError, ShapeError, counted
from xpu_lora_compile.kernels import native
from xpu_lora_compile.layers.attach import attach
from xpu_lora_compile.layers.host import LoraLayer


def load_artifact(path: str | os.PathLike[str]) -> Served:
    """Load a file that `export` wrote, with its code and base weights, and room for adapters.

    Example:
        served = xlc.load_artifact("served.pt2")
        served.load("pirate", "adapters/pirate")
        result = served(input_ids=tokens, adapters=["pirate", None])

    Raises:
        ArtifactError: the file cannot be read, or was made for another version of torch or of this package, or for
            another kind of processor or GPU.
    """
    return Served(Path(path))


class Served:
    """Compiled code that gives each row its own adapter. Calls from several threads wait for each other.

    Attributes:
        manifest: what the artifact says of itself.
    """

    def __init__(self, path: Path) -> None:
        self.manifest = Manifest.read(path)
        check_records(path)
        if self.manifest.library is not None:
            _load_library(read_record(path, self.manifest.library), Path(self.manifest.library).suffix)
        # Loads Inductor.
        from xpu_lora_compile.artifacts.package import load_package

        self._code = load_package(path)
        constants = read_weights(path, self.manifest)
        shell = _shell(self.manifest, constants)
        self._bank = attach(
            shell,
            slots=self.manifest.slots,
            max_rank=self.manifest.max_rank,
            target_modules="|".join(map(re.escape, self.manifest.modules)),
            dtype=self._dtype(),
        )
        self._layers: dict[str, LoraLayer] = {}
        for name, module in self.manifest.modules.items():
            layer = shell.get_submodule(name)
            assert isinstance(layer, LoraLayer)  # noqa: S101 - for the type checker
            self._layers[name] = layer
            constants[module.a.constant] = _as_compiled(path, layer.lora_a, module.a)
            constants[module.b.constant] = _as_compiled(path, layer.lora_b, module.b)
        # The code reads the bank's own memory: what is loaded there is served.
        self._code.load_constants(constants, check_full_update=True, user_managed=True)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        inputs = ", ".join(f"{given.name} {given.dtype}{list(given.shape)}" for given in self.manifest.asked)
        return f"Served({inputs} -> {', '.join(self.manifest.outputs)}; {self._bank!r})"

    def _dtype(self) -> torch.dtype | None:
        """The dtype of all stacks; None where each has that of its module's weight."""
        dtypes = {module.dtype for module in self.manifest.modules.values()}
        return DTYPES[dtypes.pop()] if len(dtypes) == 1 else None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded."""
        return self._bank.names

    def load(self, name: str, folder: str | os.PathLike[str]) -> None:
        """As `AdapterBank.load`: put the adapter of a PEFT folder into a free slot.

        Raises:
            AdapterError: the name is taken or no slot is free, or the adapter does not fit; the subclass says which.
        """
        path = folder_path(name, folder)
        check_is_plain(path, read_config(path))
        self._bank.load(name, folder)

    def drop(self, name: str) -> None:
        """As `AdapterBank.drop`: empty the slot of an adapter.

        Raises:
            UnknownAdapterError: there is no such adapter.
            BankInUseError: a call is running that uses it.
        """
        self._bank.drop(name)

    def __call__(
        self,
        *tensors: Tensor,
        adapters: Sequence[str | None],
        lengths: Sequence[int] | None = None,
        parts: Mapping[str, Any] | None = None,
        **named: Tensor,
    ) -> Any:
        """Run the code.

        Args:
            tensors: the inputs that `export` was given, in the same order, without what was no tensor.
            adapters: for each sequence of the batch the name of its adapter, or None for the base model.
            lengths: as of `AdapterBank.use`, where the model was exported in a block with some.
            parts: likewise.
            named: inputs by the names that `manifest.inputs` has. One that is named like an argument goes by position.

        Returns:
            What the model returned: a tensor, or lists and dicts of tensors.

        Raises:
            UnknownAdapterError: there is no adapter of a name.
            BatchError: `adapters` are more or fewer than the sequences; or lengths or parts are not those that the file
                asks for.
            ShapeError: an input has another shape than the code is for; DtypeError: another dtype.
        """
        inputs = self._checked(tensors, named)
        sizes = _check_shapes(self.manifest, inputs)
        with self._lock, self._bank.use(adapters, lengths=lengths, parts=parts):
            found = [layer.lora_routing for layer in self._layers.values()]
            routings = {plain_name(routing.part): routing for routing in (found[0].main, *found)}
            _check_rows(self.manifest, {part: routing.lengths is not None for part, routing in routings.items()})
            own = {RANKS: found[0].ranks}
            for part, routing in routings.items():
                own[slots_of(part)] = slots = routing.sequence_slots
                assert slots is not None  # noqa: S101 - for the type checker
                _check_count(self.manifest, part, len(slots), sizes)
                own[slots_of(part)] = slots.to(torch.int32)
            mine = [own[given.name] for given in self.manifest.own]
            outputs = self._code(*mine, *(tensor.contiguous() for tensor in inputs))
        return _shaped(self.manifest.result, outputs)

    def _checked(self, tensors: tuple[Tensor, ...], named: dict[str, Tensor]) -> list[Tensor]:
        wanted = [given.name for given in self.manifest.asked]
        inputs = dict(zip(wanted, tensors, strict=False)) | named
        if len(tensors) > len(wanted) or set(inputs) != set(wanted) or len(inputs) < len(tensors) + len(named):
            got = ", ".join([f"{len(tensors)} by position", *named])
            remedy = "Pass each of them once; other arguments of the model are constants of the code."
            raise ShapeError("served", f"the inputs {', '.join(wanted)}", got, remedy)
        return [inputs[name] for name in wanted]


def _check_rows(manifest: Manifest, given: Mapping[str, bool]) -> None:
    """Stop where other parts have names than in the block of the export, or sequences are packed elsewhere."""
    if given != manifest.rows:
        remedy = "Pass those, as to bank.use; or export in a `use` block with others."
        raise BatchError("served", _said_of(manifest.rows), _said_of(given), remedy)


def _said_of(rows: Mapping[str, bool]) -> str:
    names = {part: f"parts[{part!r}]" if part else "adapters" for part in sorted(rows)}
    return ", ".join(f"{name} with lengths" if rows[part] else name for part, name in names.items())


def _check_count(manifest: Manifest, part: str, count: int, sizes: dict[str, int]) -> None:
    """Stop where a part has more or fewer slots than rows."""
    (size,) = next(given.shape for given in manifest.own if given.name == slots_of(part))
    if isinstance(size, str):
        low, high = manifest.sizes[size]
        # No input of the model need be as long as the rows of a part.
        size = sizes.get(size, min(max(count, low), count if high is None else high))
    if count != size:
        what = "token" if manifest.rows[part] else "name"
        got = f"{counted(count, what)} for a batch of {size}"
        where = f"parts[{part!r}]" if part else "adapters"
        remedy = "Name an adapter, or None, for every sequence of the batch. Lengths have to add up to its size."
        raise BatchError(f"served: {where}", "one name for each sequence", got, remedy)


def _check_shapes(manifest: Manifest, inputs: list[Tensor]) -> dict[str, int]:
    """Return the value of each size that is no number; the code itself checks nothing."""
    sizes: dict[str, int] = {}
    for given, tensor in zip(manifest.asked, inputs, strict=True):
        fits = isinstance(tensor, Tensor) and tensor.device.type == manifest.device
        if not fits or tensor.dtype != DTYPES[given.dtype]:
            got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = f"a tensor of {given.dtype} on {manifest.device}"
            raise DtypeError(f"served: {given.name}", wanted, got, "Convert it: tensor.to(device, dtype).")
        if not _fits(given, tensor, manifest, sizes):
            limits = [f"{name} from {low} to {high or 'any'}" for name, (low, high) in manifest.sizes.items()]
            wanted = f"shape {list(given.shape)}{' with ' if limits else ''}{', '.join(limits)}"
            known = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name in given.shape)
            got = f"{list(tensor.shape)}{' with ' if known else ''}{known}"
            raise ShapeError(f"served: {given.name}", wanted, got, "Pass such a tensor, or export with other sizes.")
    return sizes


def _fits(given: Input, tensor: Tensor, manifest: Manifest, sizes: dict[str, int]) -> bool:
    if tensor.dim() != len(given.shape):
        return False
    for wanted, size in zip(given.shape, tensor.shape, strict=True):
        if isinstance(wanted, int):
            if size != wanted:
                return False
            continue
        low, high = manifest.sizes[wanted]
        if size < low or (high is not None and size > high) or sizes.setdefault(wanted, size) != size:
            return False
    return True


def _shaped(result: Any, outputs: Sequence[Tensor]) -> Any:
    """What the model returned, with these tensors."""
    if isinstance(result, int):
        return outputs[result]
    if isinstance(result, Mapping):
        return {key: _shaped(item, outputs) for key, item in result.items()}
    return [_shaped(item, outputs) for item in result]


def _load_library(content: bytes, suffix: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=suffix, prefix="xpu-lora-") as file:
        file.write(content)
        file.flush()
        native.load_library(Path(file.name))


def _as_compiled(path: Path, stack: Tensor, wanted: Stack) -> Tensor:
    if (list(stack.shape), list(stack.stride())) != (list(wanted.shape), list(wanted.stride)):
        raise ArtifactError(
            f"{path}: {wanted.constant}",
            f"stacks of shape {list(stack.shape)} and strides {list(stack.stride())}",
            f"code for shape {list(wanted.shape)} and strides {list(wanted.stride)}",
            "Export the model again with this version, and without forcing a kernel here or there.",
        )
    return stack


def _shell(manifest: Manifest, constants: Mapping[str, Tensor]) -> nn.Module:
    """A model that computes nothing, of the names, sizes and weights of the one that was exported, for `attach`."""
    shell = nn.Module()
    kinds = {name: (module.kind, module.out_features, module.in_features) for name, module in manifest.modules.items()}
    kinds |= {name: (kind, 1, 1) for name, kind in manifest.base.others.items() if name not in kinds}  # type: ignore[misc]
    for name, (kind, rows, columns) in kinds.items():
        is_embedding = kind == "embedding"
        module = nn.Embedding(columns, rows, device="meta") if is_embedding else nn.Linear(columns, rows, device="meta")
        module._parameters.clear()
        path, _, last = name.rpartition(".")
        _module_at(shell, path).add_module(last, module)
    weights = {
        name.removeprefix(manifest.base.constants): nn.Parameter(tensor, requires_grad=False)
        for name, tensor in constants.items()
        if name.startswith(manifest.base.constants)
    }
    for names in manifest.base.tied:
        # The code may know the weight by one of its names alone.
        known = next((weights[f"{name}.weight"] for name in names if f"{name}.weight" in weights), None)
        weights |= {} if known is None else dict.fromkeys((f"{name}.weight" for name in names), known)
    device = next((tensor.device for tensor in constants.values()), torch.device(manifest.device))
    for name, carrier in manifest.modules.items():
        if f"{name}.weight" not in weights:
            # A weight that the code knows by the name of another module: here it says dtype and device alone.
            sizes = carrier.out_features, carrier.in_features
            sizes = sizes[::-1] if carrier.kind == "embedding" else sizes
            stand_in = torch.zeros((), dtype=DTYPES[carrier.dtype], device=device).expand(sizes)
            weights[f"{name}.weight"] = nn.Parameter(stand_in, requires_grad=False)
    for name, weight in weights.items():
        path, _, last = name.rpartition(".")
        _module_at(shell, path).register_parameter(last, weight)
    _say(shell, manifest.base)
    return shell


def _module_at(shell: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in shell._modules:
            shell.add_module(part, nn.Module())
        shell = shell.get_submodule(part)
    return shell


def _say(shell: nn.Module, base: Base) -> None:
    """Have a shell answer what the model would, when adapters ask."""
    shell.base_model_prefix = base.prefix  # type: ignore[assignment]
    shell._checkpoint_conversion_mapping = dict(base.old_rules)  # type: ignore[assignment]
    head = base.output_embedding
    if head is not None and (module := dict(shell.named_modules()).get(head)) is not None:
        shell.get_output_embeddings = lambda: module  # type: ignore[assignment]
