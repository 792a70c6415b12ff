"""Adapters of mixtures of experts, in each form that vLLM reads them, as vLLM's layers take them.

    ...experts.base_layer.lora_A.weight [E r, D], lora_B.weight [W, r E]    PEFT's, of a parameter with all experts
    ...experts.lora_A.weight                                                the same of the parameter wrapped last
    ...experts.3.gate_proj.lora_A.weight [r, D], lora_B.weight [I, r]       of each expert; Mixtral's are w1, w2 and w3

In PEFT's the expert is the slowest index of A's rows, and the fastest of B's columns. Which parameter a pair is of is
not in the file: its sizes say so. vLLM itself takes the first form of few models, or with an option and a mark at each
request; it takes no adapter that lacks an expert or one of the products. What lacks here is zeros.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.errors import AdapterShapeError, RankError, UnmatchedTensorError

# What an expert's layers are called, and which product that is.
_PRODUCTS = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down",
}  # fmt: skip
_OF_EXPERT = re.compile(rf"(\d{{1,6}})\.({'|'.join(_PRODUCTS)})")
# A `[E, R, D]` and B `[E, W, R]`, with scaling folded into B.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Mixture:
    """The sizes of vLLM's layer for a mixture of experts, all of them on this device.

    Args:
        where: the adapter and the module, for errors.
        experts: E.
        hidden: D.
        intermediate: I, of all processes.
        max_rank: R.
    """

    where: str
    experts: int
    hidden: int
    intermediate: int
    max_rank: int

    def sizes(self, product: str) -> tuple[int, int]:
        """Input features and output columns of one expert's product."""
        if product == "down":
            return self.intermediate, self.hidden
        return self.hidden, self.intermediate * (2 if product == "gate and up" else 1)


def gather_experts(manager: Any, adapter: Any, name: str) -> list[str]:
    """Replace an adapter's tensors of experts by what vLLM's `FusedMoEWithLoRA.set_lora` takes.

    Left alone are experts that are shared among processes, shared factors, experts without a gate, and those whose gate
    and up lie in turn.

    Args:
        manager: vLLM's `LoRAModelManager`.
        adapter: what vLLM read, a `LoRAModel`, by names of the model's modules; it is changed.
        name: of the adapter, for errors.

    Returns:
        The adapter's names of the mixtures whose parameters are not those for which vLLM takes them by their names.

    Raises:
        AdapterShapeError: a tensor does not fit the experts.
        RankError: a rank is higher than `max_lora_rank`.
        UnmatchedTensorError: A or B is missing, or a name is of no product of an expert.
    """
    layers: Any = importlib.import_module("vllm.lora.layers")
    packed: Any = importlib.import_module("vllm.lora.lora_weights").PackedLoRALayerWeights
    taken_for_others = []
    for module, layer in manager.modules.items():
        if not isinstance(layer, layers.FusedMoEWithLoRA) or _is_left_to_vllm(manager, layer):
            continue
        owners = _owners(manager, module)
        _rename_router(manager, adapter, owners)
        owner = next((owner for owner in owners if _of(adapter, owner)), None)
        if owner is None:
            continue
        mixture = Mixture(
            f"adapter {name}, {owner}",
            layer.global_num_experts,
            layer.hidden_size,
            layer.moe_config.intermediate_size,
            manager.lora_config.max_lora_rank,
        )
        found = {key.removeprefix(owner).removeprefix("."): adapter.loras.pop(key) for key in _of(adapter, owner)}
        pairs = _pairs(mixture, found)
        if not any(_OF_EXPERT.fullmatch(suffix) for suffix in found) and _are_taken_for_others(mixture, found):
            taken_for_others.append(owner)
        products = ["gate and up", "down"] if isinstance(layer, layers.FusedMoE3DWithLoRA) else ["gate", "down", "up"]
        ordered = [_product(mixture, pairs, product) for product in products]
        rank = max(a.shape[1] for a, _ in ordered)
        a, b, ones = [a for a, _ in ordered], [b for _, b in ordered], [1] * len(ordered)
        adapter.loras[module] = packed(module, rank, ones, a, b, scaling=ones)
    return taken_for_others


def check_patterns(folder: Path, owners: list[str], name: str) -> None:
    """Compare an adapter's config with experts whose parameters vLLM takes for others, and so their ranks and alphas.

    Raises:
        UnmatchedTensorError: it gives one of these parameters a rank or alpha of its own.
    """
    if not owners:
        return
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(option) or {}:
            parameters = [f"{owner}{part}" for owner in owners for part in ("", ".gate_up_proj", ".down_proj")]
            matched = [parameter for parameter in parameters if re.fullmatch(rf"(.*\.)?({pattern})", parameter)]
            if matched:
                raise UnmatchedTensorError(
                    f"adapter {name}, {matched[0]}",
                    "the rank and alpha of all other modules",
                    f"{option} {pattern!r}",
                    "Train experts with one rank and one alpha, or export them expert by expert.",
                )


def _is_left_to_vllm(manager: Any, layer: Any) -> bool:
    return (
        layer.use_ep
        or manager._enable_moe_shared_loras
        or not layer.moe_config.is_act_and_mul
        or layer.moe_config.activation.value == "swigluoai"
    )


def _owners(manager: Any, module: str) -> list[str]:
    """What an adapter may call a mixture: as the model does, or as transformers 5 calls that of every model."""
    shorter: Callable[[str], list[str]] = getattr(manager, "_get_text_lora_names", lambda _: [])
    names = [module, *shorter(module)]
    if manager.is_pooling_model:
        names.append(module.removeprefix("model."))
    above = [name.split(".")[:-2] for name in names]
    return [*names, *(".".join([*parts, "mlp", "experts"]) for parts in above)]


def _rename_router(manager: Any, adapter: Any, owners: list[str]) -> None:
    """Call the router of a mixture as the model does, which may call the block otherwise than transformers 5."""
    own, *others = [f"{owner.rpartition('.')[0]}.gate" for owner in owners]
    for name in others:
        if own in manager.modules and name not in manager.modules and name in adapter.loras:
            weights = adapter.loras[own] = adapter.loras.pop(name)
            weights.module_name = own


def _of(adapter: Any, owner: str) -> list[str]:
    return [name for name in adapter.loras if name == owner or name.startswith(f"{owner}.")]


def _pairs(mixture: Mixture, found: Mapping[str, Any]) -> dict[str, Pair]:
    """By product, the pairs of a mixture; `found` has vLLM's weights by the rest of their names."""
    single: dict[str, dict[int, Pair]] = {}
    pairs: dict[str, Pair] = {}
    for suffix, weights in found.items():
        a, b = weights.lora_a, weights.lora_b
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            raise UnmatchedTensorError(
                f"{mixture.where}: {suffix}", "both lora_A and lora_B", "one of them",
                "Export the adapter again, with all its tensors.",
            )  # fmt: skip
        of_expert = _OF_EXPERT.fullmatch(suffix)
        if of_expert is not None and int(of_expert[1]) < mixture.experts:
            product = _PRODUCTS[of_expert[2]]
            _check(mixture, suffix, (a, b), (product,), 1)
            single.setdefault(product, {})[int(of_expert[1])] = a, b * weights.scaling
        elif not suffix.replace("base_layer", "").strip("."):
            product = _check(mixture, suffix, (a, b), ("gate and up", "down"), mixture.experts)
            if product in pairs or a.shape[0] != weights.rank * mixture.experts:
                raise AdapterShapeError(
                    mixture.where,
                    f"one pair of rank {weights.rank} for each parameter of {mixture.experts} experts",
                    f"lora_A {list(a.shape)} of {product}",
                    "Train experts with the rank of the config, and one LoRA for each parameter.",
                )
            by_expert = a.reshape(mixture.experts, -1, a.shape[1])
            columns = b.reshape(b.shape[0], -1, mixture.experts).permute(2, 0, 1)
            pairs[product] = by_expert, columns * weights.scaling
        else:
            raise UnmatchedTensorError(
                mixture.where,
                f"tensors of a parameter, or of {mixture.experts} experts' {', '.join(_PRODUCTS)}",
                suffix,
                "Compare its names with the model's.",
            )
    if pairs and single:
        raise UnmatchedTensorError(
            mixture.where, "experts in one form", "some as parameters, and some expert by expert",
            "Export them in one form.",
        )  # fmt: skip
    return pairs or {product: _stacked(mixture, product, experts) for product, experts in single.items()}


def _check(mixture: Mixture, suffix: str, pair: Pair, products: tuple[str, ...], experts: int) -> str:
    """Which of these products a pair is of."""
    a, b = pair
    if a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] and a.shape[0] % experts == 0:
        for product in products:
            if (a.shape[1], b.shape[0]) == mixture.sizes(product):
                rank = a.shape[0] // experts
                if rank > mixture.max_rank:
                    remedy = f"Start vLLM with a --max-lora-rank of at least {rank}."
                    raise RankError(mixture.where, f"a rank up to {mixture.max_rank}", str(rank), remedy)
                return product
    rows = "R" if experts == 1 else f"{experts} R"
    wanted = [f"lora_A [{rows}, {d}] and lora_B [{w}, {rows}]" for d, w in map(mixture.sizes, products)]
    raise AdapterShapeError(
        f"{mixture.where}: {suffix or 'the parameter wrapped last'}",
        ", or ".join(wanted),
        f"{list(a.shape)} and {list(b.shape)}",
        "Load an adapter that was trained for this model.",
    )


def _are_taken_for_others(mixture: Mixture, found: Mapping[str, Any]) -> bool:
    """Whether vLLM gave a parameter the rank and alpha of another: it takes the one wrapped last for that of down."""
    products = {
        suffix: _check(mixture, suffix, (weights.lora_a, weights.lora_b), ("gate and up", "down"), mixture.experts)
        for suffix, weights in found.items()
    }
    return any(product != ("gate and up" if suffix else "down") for suffix, product in products.items())


def _stacked(mixture: Mixture, product: str, experts: Mapping[int, Pair]) -> Pair:
    """The pairs of experts in one tensor each; an expert without, and columns past an expert's own rank, are zeros."""
    features, width = mixture.sizes(product)
    rank = max(a.shape[0] for a, _ in experts.values())
    first = next(iter(experts.values()))[0]
    a = torch.zeros(mixture.experts, rank, features, dtype=first.dtype)
    b = torch.zeros(mixture.experts, width, rank, dtype=first.dtype)
    for expert, (own_a, own_b) in experts.items():
        a[expert, : own_a.shape[0]] = own_a
        b[expert, :, : own_b.shape[1]] = own_b
    return a, b


def _product(mixture: Mixture, pairs: Mapping[str, Pair], product: str) -> Pair:
    """The pair of one product of vLLM's layer, whose stacks are of gate, down and up, or of gate and up in one."""
    if product in pairs:
        return pairs[product]
    if product in ("gate", "up") and "gate and up" in pairs:
        a, b = pairs["gate and up"]
        half = slice(0, mixture.intermediate) if product == "gate" else slice(mixture.intermediate, None)
        return a, b[:, half]
    features, width = mixture.sizes(product)
    like = next(iter(pairs.values()))[0]
    return like.new_zeros(mixture.experts, 1, features), like.new_zeros(mixture.experts, width, 1)
