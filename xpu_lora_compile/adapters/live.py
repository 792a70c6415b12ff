"""An adapter of a model that PEFT has loaded, in the form in which a bank takes adapters: a config and named tensors.

    layers of PEFT --adapter_in--> LiveConfig and TensorsInMemory --opened_checkpoint--> checks, staging, a slot

Ranks and scaling are those that the layers have now, and not those of the adapter's config: PEFT changes them while it
serves. All else is checked as that of a file. Nothing of PEFT is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.adapters.checkpoint import DTYPES
from xpu_lora_compile.adapters.config import AdapterConfig
from xpu_lora_compile.adapters.files import TensorFile, few
from xpu_lora_compile.adapters.names import MAGNITUDE, PREFIX, ROWS_OF_TOKENS
from xpu_lora_compile.errors import UnsupportedAdapterError

# Kinds of LoRA that compute `B @ A @ x`, and DoRA; PEFT has classes for others.
_VARIANTS = {"MiCALinearVariant", "MiCAEmbeddingVariant"}
_DORA = {"DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv2dVariant"}
# What to do with an adapter that a bank takes from a folder alone.
SAVE_AND_ATTACH = "Save it with peft_model.save_pretrained(folder), and attach to the plain model: adapters=."
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LiveConfig(AdapterConfig):
    """What adapters of a live model target, as its layers say.

    Args:
        ranks: by the names of the modules with LoRA.
        scalings: likewise.
        saved: the modules for which there is a weight of its own.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    scalings: Mapping[str, float] = field(default_factory=dict)
    saved: frozenset[str] = frozenset()

    def targets(self, name: str, *, plain_linear: bool = True) -> bool:
        """As `AdapterConfig.targets`."""
        return name in self.ranks

    def saves(self, name: str) -> bool:
        """As `AdapterConfig.saves`."""
        return name in self.saved

    def rank(self, name: str) -> int:
        """As `AdapterConfig.rank`."""
        return self.ranks[name]

    def scaling(self, name: str) -> float:
        """As `AdapterConfig.scaling`."""
        return self.scalings[name]


class TensorsInMemory(TensorFile):
    """Tensors by the names that a file would have for them.

    Args:
        path: what errors call the file.
        tensors: of any device.
    """

    in_memory = True

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self._tensors = tensors

    def keys(self) -> list[str]:
        """As `TensorFile.keys`."""
        return list(self._tensors)

    def shape(self, key: str) -> list[int]:
        """As `TensorFile.shape`."""
        return list(self._tensors[key].shape)

    def dtype(self, key: str) -> str:
        """As `TensorFile.dtype`."""
        dtype = self._tensors[key].dtype
        return _NAMES.get(dtype, str(dtype))

    def part(self, key: str) -> Tensor:
        """As `TensorFile.part`."""
        return self._tensors[key].detach()

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """As `TensorFile.tensor`."""
        return self._tensors[key].detach().reshape(-1)


def is_in(layer: Any, name: str) -> bool:
    """Whether an adapter has LoRA on a layer of PEFT's."""
    modules = layer._modules
    return name in modules["lora_A"]._modules or name in modules["lora_embedding_A"]._parameters


def factors(layer: Any, name: str) -> tuple[str, Tensor, Tensor, Tensor | None]:
    """A and B of an adapter in a layer of PEFT's, which is "linear" or an "embedding", and what B adds."""
    modules = layer._modules
    a = modules["lora_A"]._modules.get(name)
    if a is not None:
        b = modules["lora_B"]._modules[name]
        return "linear", a._parameters["weight"], b._parameters["weight"], b._parameters.get("bias")
    tables = modules["lora_embedding_A"]._parameters, modules["lora_embedding_B"]._parameters
    return "embedding", tables[0][name], tables[1][name], None


def adapter_in(
    layers: Mapping[str, Any], wrappers: Mapping[str, Any], names: Sequence[str], path: Path
) -> tuple[LiveConfig, TensorsInMemory]:
    """Read the sum of some adapters, which is usually one, from the layers of a live model.

    Args:
        layers: of PEFT's LoRA, by the names of their modules in the base model.
        wrappers: those of `modules_to_save` and of `trainable_token_indices`, likewise.
        names: of the adapters.
        path: what errors call the adapter.

    Raises:
        UnsupportedAdapterError: an adapter is no LoRA or DoRA; or there are several, and one is not plain LoRA.
    """
    _check_kinds(layers, wrappers, names, path)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scalings: dict[str, float] = {}
    use_dora = lora_bias = False
    for module, layer in layers.items():
        found = [(*factors(layer, name), float(layer.scaling[name])) for name in names if is_in(layer, name)]
        if not found:
            continue
        kind, a, b, shift, scaling = found[0]
        if len(found) > 1:
            a = torch.cat([a.detach() for _, a, _, _, _ in found])
            b = torch.cat([b.detach().to(torch.float32) * its for _, _, b, _, its in found], 1)
            scaling = 1.0
        parts = ("lora_A.weight", "lora_B.weight") if kind == "linear" else ("lora_embedding_A", "lora_embedding_B")
        key = f"{PREFIX}{module}."
        tensors |= {key + parts[0]: a, key + parts[1]: b}
        if shift is not None:
            tensors[f"{key}lora_B.bias"], lora_bias = shift, True
        magnitudes = layer._modules["lora_magnitude_vector"]._modules
        if names[0] in magnitudes:
            tensors[key + MAGNITUDE], use_dora = magnitudes[names[0]]._parameters["weight"], True
        ranks[module], scalings[module] = a.shape[0], scaling
    saved, tokens = _read_wrappers(wrappers, names[0], tensors)
    config = LiveConfig(
        target_modules=tuple(ranks),
        use_dora=use_dora,
        lora_bias=lora_bias,
        modules_to_save=tuple(sorted(saved)),
        trainable_token_indices=tokens,
        ranks=ranks,
        scalings=scalings,
        saved=frozenset(saved),
    )
    return config, TensorsInMemory(path, tensors)


def _read_wrappers(
    wrappers: Mapping[str, Any], name: str, tensors: dict[str, Tensor]
) -> tuple[set[str], tuple[int, ...]]:
    """Add what an adapter has of whole modules and of tokens; returns the modules, and the tokens."""
    saved: set[str] = set()
    tokens: tuple[int, ...] = ()
    for top, wrapper in wrappers.items():
        if has_tokens(wrapper):
            rows = wrapper.token_adapter
            if not rows.tied_adapter and name in rows.token_indices:
                tokens = tuple(int(token) for token in rows.token_indices[name])
                tensors[f"{PREFIX}{top}.{ROWS_OF_TOKENS}"] = rows.trainable_tokens_delta[name]
            continue
        own = wrapper._modules["modules_to_save"]._modules.get(name)
        for key, value in () if own is None else own.named_parameters():
            tensors[f"{PREFIX}{top}.{key}"] = value
            saved.add(f"{top}.{key}".rpartition(".")[0])
    return saved, tokens


def has_tokens(wrapper: Any) -> bool:
    """Whether a wrapper of PEFT's is for rows of tokens, and not for a whole module."""
    return "token_adapter" in wrapper._modules


def _check_kinds(layers: Mapping[str, Any], wrappers: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    kinds = {
        type(layer.lora_variant[name]).__name__
        for layer in layers.values()
        for name in names
        if name in layer.lora_variant
    } - _VARIANTS
    if strange := sorted(kinds - _DORA):
        remedy = "Serve it with PEFT, or train the adapter again without it."
        if all("ALora" in kind for kind in strange):
            remedy = SAVE_AND_ATTACH
        raise UnsupportedAdapterError(str(path), "LoRA or DoRA", few(strange), remedy)
    if len(names) < 2:
        return
    shifts = any(
        factors(layer, name)[3] is not None for layer in layers.values() for name in names if is_in(layer, name)
    )
    if kinds or shifts or any(name in wrapper._adapters for wrapper in wrappers.values() for name in names):
        got = f"the sum of {few(names)}, of which one has DoRA, biases, or weights or rows of its own"
        remedy = "Set one of them: peft_model.set_adapter(name)."
        raise UnsupportedAdapterError(str(path), "plain LoRA, where several adapters are active", got, remedy)
