"""`Manifest`: what a loader must know of an artifact, as JSON inside of it; `xpu_lora_served.h` reads the same."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from xpu_lora_compile.adapters.config import rules_for_readers
from xpu_lora_compile.errors import ArtifactError

# Whatever changes what a loader must do raises it, here and in xpu_lora_served.h.
FORMAT = 2
# Beside torch's own folders in the archive, none of which is named so.
FOLDER, MANIFEST, WEIGHTS = "xpu_lora", "manifest.json", "weights.safetensors"
SLOTS, RANKS = "lora_slots", "lora_ranks"

DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_SAFETENSORS = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}
_SAFETENSORS |= {"I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_SAFETENSORS |= {"F64": torch.float64}
_WANTED = "a file that xlc.export wrote"
_COPY_AGAIN = "Give the path that was given to xlc.export; copy the file again."
_EXPORT_AGAIN = "Export the model again, with the versions and on a machine of the kind that it is to be served with."


@dataclass(frozen=True)
class Stack:
    """The weights of all slots of one module: A or B.

    Args:
        constant: its name in the compiled code.
        shape: `[K, R, D]`, `[K, V, R]` of an embedding's A, or `[K, W, R]`.
        stride: of the same, in elements; the compiled code is for these alone.
    """

    constant: str
    shape: Sequence[int]
    stride: Sequence[int]


@dataclass(frozen=True)
class Module:
    """A module that carries LoRA: `adapters.checkpoint.ModuleSizes`, and its stacks."""

    kind: Literal["linear", "embedding"]
    in_features: int
    out_features: int
    padded: bool
    dtype: str
    a: Stack
    b: Stack


@dataclass(frozen=True)
class Base:
    """What adapters' files may say of the rest of the model.

    Args:
        output_embedding: the name of the layer that makes the logits, if it has LoRA.
        others: modules that could carry LoRA and do not, each with its kind.
        tied: names of modules that share their weight with an embedding, one list for each.
        constants: what stands before the names of the model's weights in those of the code's constants.
        prefix: as `adapters.names.BaseModel.prefix`.
        old_rules: likewise.
    """

    constants: str
    output_embedding: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    tied: Sequence[Sequence[str]] = ()
    prefix: str = ""
    old_rules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """A tensor that the compiled code is given: a size is a number, or the name of one in `Manifest.sizes`."""

    name: str
    dtype: str
    shape: Sequence[int | str]


@dataclass(frozen=True)
class Manifest:
    """The whole of it.

    Args:
        slots: K.
        max_rank: R.
        modules: those that carry LoRA, by name without wrappers.
        base: the rest of the model.
        inputs: in order; the first is `lora_slots`, int32, the slot of each sequence, or token of a packed batch.
        ranks: whether the second is `lora_ranks`, int32 `[K]`, the highest rank of each slot's adapter.
        rows: whether sequences are packed: under "" in the model's inputs; then under the name of each part that has
            rows of its own, whose slots are further inputs, `lora_slots.<part>`.
        sizes: least and greatest value of each size that is no number; null for no limit.
        aliases: constants that are the same memory as another one, whose name follows.
        strides: of those constants in `weights.safetensors` that do not lie in memory as they do in the file.
        outputs: names of the tensors that the code returns, in order.
        result: what the model returned: a number for the output at that place, a list, a tuple or a dict of such.
        device: the type of the device.
        capability: of the GPU, as "9.0"; null for a CPU. The kernels are compiled for it alone.
        library: the file beside this one with the kernels' ops; null where they need none.
        fields: of `adapter_config.json`; see `adapters.config.rules_for_readers`.
        torch: the version of torch that compiled it.
        package: the version of this package.
        machine: of the processor, as `platform.machine()`.
        instructions: that the processor must have.
        format: of this record.
    """

    slots: int
    max_rank: int
    modules: Mapping[str, Module]
    base: Base
    inputs: Sequence[Input]
    ranks: bool
    rows: Mapping[str, bool]
    sizes: Mapping[str, tuple[int, int | None]]
    aliases: Mapping[str, str]
    strides: Mapping[str, Sequence[int]]
    outputs: Sequence[str]
    result: Any
    device: str
    capability: str | None
    library: str | None
    fields: Mapping[str, Sequence[str]] = field(default_factory=rules_for_readers)
    torch: str = torch.__version__
    package: str = field(default_factory=lambda: version("xpu-lora-compile"))
    machine: str = field(default_factory=platform.machine)
    instructions: Sequence[str] = field(default_factory=lambda: instructions())
    format: int = FORMAT

    @property
    def own(self) -> Sequence[Input]:
        """The inputs that a loader adds."""
        return self.inputs[: len(self.rows) + self.ranks]

    @property
    def asked(self) -> Sequence[Input]:
        """The inputs that a caller passes."""
        return self.inputs[len(self.own) :]

    def add_to(self, path: Path, weights: Mapping[str, Tensor], library: Path | None) -> None:
        """Add the record, the base weights, and the library that the record names to an archive of torch's."""
        with zipfile.ZipFile(path, "a") as archive:
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{root}/{FOLDER}/{MANIFEST}", json.dumps(asdict(self), indent=1))
            with archive.open(f"{root}/{FOLDER}/{WEIGHTS}", "w", force_zip64=True) as file:
                _write_weights(file, {name: weights[name] for name in weights if name not in self.aliases})
            if library is not None:
                archive.write(library, f"{root}/{FOLDER}/{self.library}")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read it from an archive.

        Raises:
            ArtifactError: the file cannot be read or was not made by `export`, or was made for something else than this
                process has: another torch, package, processor or GPU.
        """
        values = _checked(path, json.loads(read_record(path, MANIFEST)))
        modules = {
            name: Module(**{**module, "a": Stack(**module["a"]), "b": Stack(**module["b"])})
            for name, module in values.pop("modules").items()
        }
        base, inputs = Base(**values.pop("base")), [Input(**given) for given in values.pop("inputs")]
        return cls(modules=modules, base=base, inputs=inputs, **values)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; what is wrong with it is an ArtifactError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise ArtifactError(str(path), _WANTED, str(error), _COPY_AGAIN) from error


@contextmanager
def opened_record(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file that `export` has put into an archive; at its end it is compared with its checksum.

    Raises:
        ArtifactError: the archive cannot be read, or does not hold it; or it is damaged.
    """
    with _opened(path) as archive:
        entries = [entry for entry in archive.namelist() if entry.endswith(f"/{FOLDER}/{name}")]
        if not entries:
            raise ArtifactError(str(path), _WANTED, f"an archive without {FOLDER}/{name}", _COPY_AGAIN)
        with archive.open(entries[0]) as file:
            yield file


def check_records(path: Path) -> None:
    """Compare the records of an archive with their checksums, but for the weights, which are when they are read.

    Raises:
        ArtifactError: one of them is damaged.
    """
    with _opened(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(f"/{FOLDER}/{WEIGHTS}"):
                with archive.open(entry) as file:
                    while file.read(1 << 20):
                        pass


def read_record(path: Path, name: str) -> bytes:
    """Read it as a whole."""
    with opened_record(path, name) as file:
        return file.read()


def _write_weights(file: IO[bytes], weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, one tensor at a time, and without numpy, which safetensors would load for it."""
    names = {dtype: name for name, dtype in _SAFETENSORS.items()}
    header, end = {}, 0
    for name, tensor in weights.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in weights.values():
        plain = tensor.detach().cpu().contiguous()
        if plain.nbytes:
            file.write((ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()))


def read_weights(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the base weights of an archive, by the names of the constants; each takes its memory once."""
    found: dict[str, Tensor] = {}
    with opened_record(path, WEIGHTS) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensor = torch.empty(entry["shape"], dtype=_SAFETENSORS[entry["dtype"]])
            if tensor.nbytes:
                file.readinto((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))  # type: ignore[attr-defined]
            if name in manifest.strides:
                tensor = torch.empty_strided(tensor.shape, manifest.strides[name], dtype=tensor.dtype).copy_(tensor)
            found[name] = tensor.to(manifest.device)
    return found | {name: found[other] for name, other in manifest.aliases.items()}


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    if values.get("format") != FORMAT:
        got = f"one of format {values.get('format')}"
        raise ArtifactError(str(path), f"an artifact of format {FORMAT}", got, _EXPORT_AGAIN)
    here = {"torch": torch.__version__, "package": version("xpu-lora-compile"), "machine": platform.machine()}
    for name, mine in here.items():
        if values[name] != mine:
            got = f"one made with {name} {values[name]}"
            raise ArtifactError(str(path), f"an artifact for {name} {mine}", got, _EXPORT_AGAIN)
    if missing := sorted(set(values["instructions"]) - set(instructions())):
        got = f"one that needs {', '.join(missing)}"
        raise ArtifactError(str(path), "an artifact for this processor", got, _EXPORT_AGAIN)
    _check_device(path, values["device"], values["capability"])
    return values


def _check_device(path: Path, device: str, capability: str | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        got = f"one for {device}, of which this process has none"
        remedy = "Load it where torch.cuda.is_available(), or export the model on a CPU."
        raise ArtifactError(str(path), "an artifact for a device of this process", got, remedy)
    if capability != (here := capability_of(torch.device(device))):
        wanted = f"an artifact for {device}" if here is None else f"an artifact for the compute capability {here}"
        got = f"one made for {'none' if capability is None else f'the compute capability {capability}'}"
        remedy = "Export the model again on such a GPU, or make a GPU of that capability the current one."
        raise ArtifactError(str(path), wanted, got, remedy)


def capability_of(device: torch.device) -> str | None:
    """Return the compute capability of a GPU, of the current one where there is no index; None for a CPU."""
    return ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else None


def instructions() -> list[str]:
    """Return the processor's extensions that compilers make use of; none where Linux has no list of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return sorted({flag for flag in listed.split(":", 1)[1].split() if _is_instruction(flag)})


def _is_instruction(flag: str) -> bool:
    starts = ("avx", "sse", "ssse", "amx", "fma", "f16c", "bmi", "asimd", "sve", "fp", "neon")
    return flag.startswith(starts) and flag != "fpu"


def slots_of(part: str) -> str:
    """Return the name of the input with the slots of a part's rows; of the model's own for ""."""
    return f"{SLOTS}.{part}" if part else SLOTS


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype, as the manifest writes it."""
    return str(dtype).removeprefix("torch.")


def folder_of(path: Path) -> Path:
    """Return the folder that a file is to be written to.

    Raises:
        ArtifactError: nobody can write there, or the file has another ending than `.pt2`.
    """
    if path.suffix != ".pt2":
        raise ArtifactError("export: path", "a file whose name ends with .pt2", str(path), "Name it served.pt2, say.")
    folder = path.absolute().parent
    if path.is_dir() or not os.access(folder, os.W_OK):
        got = "a folder of that name" if path.is_dir() else f"{folder}, where this process cannot write"
        raise ArtifactError("export: path", "a file that can be written", got, "Give a path in a folder of your own.")
    return folder
