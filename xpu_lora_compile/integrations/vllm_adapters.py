"""Adapters that vLLM would load although they give wrong answers are refused as they are loaded.

vLLM compares the last part of each name with the layers that it knows, and the rank with `max_lora_rank`. It takes
weights that are not finite, which spread to other requests' rows. It takes tensors of modules that the model does not
have, and ignores them. It takes tensors that are smaller than their layer, and writes them into a corner. It takes
those of `kv_b_proj`, and leaves them out: its attention has that weight in two others. This check runs after vLLM has
read the file and cast it to its own dtype, and before vLLM gives up another adapter for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from xpu_lora_compile.errors import (
    AdapterShapeError,
    NonFiniteWeightError,
    RankError,
    UnmatchedTensorError,
)
from xpu_lora_compile.integrations.vllm_changes import change, replaced
from xpu_lora_compile.integrations.vllm_expert_adapters import check_patterns, gather_experts


def refuse_wrong_adapters() -> None:
    """Change vLLM's class that loads them."""
    worker: Any = importlib.import_module("vllm.lora.worker_manager").WorkerLoRAManager
    change(worker, "_load_adapter", _checking)


def _checking(own: Any) -> Any:
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        manager, name = self._adapter_manager, f"{lora_request.lora_name} ({lora_request.lora_path})"
        # It refuses forms of experts that are gathered here, and is asked again after that.
        with replaced(manager, "_validate_moe_lora_format", lambda _: None):
            adapter = own(self, lora_request)
        taken_for_others = gather_experts(manager, adapter, name)
        folder = importlib.import_module("vllm.lora.utils").get_adapter_absolute_path(lora_request.lora_path)
        check_patterns(Path(folder), taken_for_others, name)
        manager._validate_moe_lora_format(adapter)
        check_adapter(manager, adapter, name)
        return adapter

    return _load_adapter


def check_adapter(manager: Any, adapter: Any, name: str) -> None:
    """Compare an adapter with the model that it is loaded for.

    Args:
        manager: vLLM's `LoRAModelManager`.
        adapter: what vLLM read, a `LoRAModel`, by names of the model's modules.
        name: of the adapter, for errors.

    Raises:
        UnmatchedTensorError: a module of the adapter is not in the model or cannot have LoRA, or has one half of it; or
            vLLM would leave it out.
        AdapterShapeError: a tensor does not fit its module.
        RankError: a module's rank is higher than `max_lora_rank`.
        NonFiniteWeightError: a weight is NaN or infinite.
    """
    for module, weights in adapter.modules_to_save.items():
        for tensor in filter(_is_tensor, (weights.weight, weights.bias)):
            _check_finite(name, module, tensor)
    layers, experts = _layers(manager, adapter.loras)
    absorbed = _absorbed(manager.model)
    matched, unmatched = bool(adapter.modules_to_save), []
    for module, weights in adapter.loras.items():
        pair = (weights.lora_a, weights.lora_b)
        # Of a mixture of experts they are lists.
        for tensor in filter(_is_tensor, chain.from_iterable(p if isinstance(p, list) else [p] for p in pair)):
            _check_finite(name, module, tensor)
        if any(module == expert or module.startswith(f"{expert}.") for expert in experts):
            matched = True
        elif (layer := layers.get(module) or layers.get(f"model.{module}" if manager.is_pooling_model else "")) is None:
            # What adds nothing may be missing: vLLM leaves layers out whose output a model does not read.
            if not _is_tensor(weights.lora_b) or weights.lora_b.any():
                unmatched.append(module)
        else:
            matched = True
            _check_shapes(name, module, pair, layer, manager.lora_config.max_lora_rank)
            if not absorbed.isdisjoint((id(layer[0]), id(getattr(layer[0], "base_layer", None)))) and pair[1].any():
                raise UnmatchedTensorError(
                    f"adapter {name}, {module}",
                    "LoRA on layers that vLLM's attention calls",
                    "LoRA on one whose weight it multiplies into others as the model is loaded",
                    "Train without it: exclude_modules=['kv_b_proj']. xlc.attach serves this adapter without vLLM.",
                )
    # Other processes may have them, or `target_modules` leaves them out on purpose.
    elsewhere = importlib.import_module("vllm.distributed").get_pp_group().world_size > 1
    unknown = [module for module in unmatched if manager._match_target_modules(module) and not elsewhere]
    if unknown or not (matched or elsewhere):
        listed = ", ".join((unknown or unmatched)[:3]) or "no tensor at all"
        raise UnmatchedTensorError(
            f"adapter {name}",
            f"tensors of modules that can have LoRA in {type(manager.model).__name__}",
            f"{len(unknown or unmatched)} of other modules: {listed}",
            "Compare its names with the model's; an encoder's need `enable_tower_connector_lora`, where it has that.",
        )


def _absorbed(model: Any) -> set[int]:
    """The layers, by `id`, whose weights the attention of DeepSeek's models has in two other tensors (vLLM #48974)."""
    mla: Any = importlib.import_module("vllm.model_executor.layers.attention.mla_attention").MLAAttention
    return {id(module.kv_b_proj) for module in model.modules() if isinstance(module, mla)}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _check_finite(name: str, module: str, tensor: Tensor) -> None:
    if not tensor.float().isfinite().all():
        raise NonFiniteWeightError(
            f"adapter {name}, {module}",
            f"finite weights in {tensor.dtype}",
            "NaN or infinity",
            "Train or export it again; they would spread to other requests.",
        )


def _layers(manager: Any, names: Collection[str]) -> tuple[dict[str, tuple[Any, int | None]], list[str]]:
    """By an adapter's name of a module: vLLM's layer and which of its slices, None for all; and mixtures of experts.

    From 0.33 on an adapter may have the names of a language model alone for a model that sees images, too: vLLM looks
    for these names where the adapter, whose names are `names`, lacks those of the whole model.
    """
    moe: Any = importlib.import_module("vllm.lora.layers").FusedMoEWithLoRA
    layers: dict[str, tuple[Any, int | None]] = {}
    for module, layer in manager.modules.items():
        if module in manager.packed_modules:
            layers |= {part: (layer, number) for number, part in enumerate(manager.packed_modules[module])}
        else:
            layers[module] = (layer, None)
    experts = [module for module, layer in manager.modules.items() if isinstance(layer, moe)]
    shorter: Callable[[str], list[str]] = getattr(manager, "_get_text_lora_names", lambda _: [])
    for module in [module for module in layers if module not in names]:
        layers |= {name: layers[module] for name in shorter(module) if name in names and name not in layers}
    return layers, experts + [name for module in experts for name in shorter(module)]


def _check_shapes(name: str, module: str, pair: tuple[Any, Any], layer: tuple[Any, int | None], max_rank: int) -> None:
    where = f"adapter {name}, {module}"
    a, b = pair
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        raise UnmatchedTensorError(
            where, "both lora_A and lora_B", "one of them", "Export the adapter again, with all its tensors."
        )
    features, width = _sizes(*layer)
    logits: Any = importlib.import_module("vllm.lora.layers").LogitsProcessorWithLoRA
    if isinstance(layer[0], logits) and b.shape[0] < (width or 0):
        # The model has got more tokens since, as padding adds them: theirs come last, and have no LoRA.
        width = b.shape[0]
    fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
    if not fits or (features or a.shape[1]) != a.shape[1] or (width or b.shape[0]) != b.shape[0]:
        raise AdapterShapeError(
            where,
            f"lora_A [R, {features or 'D'}] and lora_B [{width or 'W'}, R]",
            f"{list(a.shape)} and {list(b.shape)}",
            "Load an adapter that was trained for this model.",
        )
    if a.shape[0] > max_rank:
        remedy = f"Start vLLM with a --max-lora-rank of at least {a.shape[0]}."
        raise RankError(where, f"a rank up to {max_rank}", str(a.shape[0]), remedy)


def _sizes(layer: Any, part: int | None) -> tuple[int | None, int | None]:
    """Input features and output columns of a whole layer or of one of its slices; None where they are not known."""
    layers: Any = importlib.import_module("vllm.lora.layers")
    linear: Any = importlib.import_module("vllm.model_executor.layers.linear")
    if isinstance(layer, layers.VocabParallelEmbeddingWithLoRA):
        return layer.lora_a_stacked.shape[1], layer.lora_b_stacked.shape[-2]
    if isinstance(layer, layers.LogitsProcessorWithLoRA):
        return layer.lora_a_stacked.shape[-1], layer.lora_b_stacked.shape[-2]
    base = layer.base_layer
    if not isinstance(base, linear.LinearBase):
        return None, None
    if isinstance(base, linear.QKVParallelLinear):
        keys = base.total_num_kv_heads * base.head_size
        widths = [base.total_num_heads * base.head_size, keys, base.total_num_kv_heads * base.v_head_size]
    else:
        widths = list(getattr(base, "output_sizes", [base.output_size]))
    if part is None:
        return base.input_size, sum(widths)
    # Some layers have more slices than an adapter has modules for them.
    count = len(getattr(layer, "lora_b_stacked", ()))
    return base.input_size, widths[part] if count == len(widths) else None
