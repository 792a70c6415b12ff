"""LoRA on the experts of a mixture: on a CPU the whole of the experts' forward, elsewhere the two products of LoRA.

    gate and up = experts(x) + LoRA  ->  activation  ->  down = experts(y) + LoRA  ->  times the router's weight, summed

A row of a product is a pair of a token and one of its experts. vLLM's stacks are `[K, E, R, D]` and `[K, E, W, R]`; to
our op they are `K * E` slots, and the index of a pair is `slot * E + expert`, or -1 without an adapter.

vLLM 0.32 and 0.33 take Triton's experts for every model with LoRA, which a CPU does not have, so that no mixture starts
there. Its own experts for CPUs are one kernel, in which LoRA has no place before the activation.

| changed in vLLM | what it does more |
|---|---|
| `RoutedExperts._get_quant_method` | on a CPU, refuses experts that ours cannot compute |
| `select_unquantized_moe_backend` | on a CPU, takes `CpuLoraExperts` where experts are to have LoRA |
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xpu_lora_compile.errors import AttachError
from xpu_lora_compile.integrations.vllm_changes import change

_FUSED = "vllm.model_executor.layers.fused_moe"
# What the experts of a deployment must not be, by an attribute of vLLM's `FusedMoEParallelConfig`.
_UNSHARED = {
    "use_ep": "expert parallelism",
    "is_sequence_parallel": "sequence parallelism",
    "use_all2all_kernels": "experts that tokens are sent to",
}
_REMEDY = "Or leave the experts without LoRA: `--lora-target-modules` with the names of the attention's layers."
_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: functional.silu(gate) * up,
    "gelu": lambda gate, up: functional.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
}


def take_over_experts() -> None:
    """Change what vLLM chooses for the experts of a model with LoRA on a CPU."""
    routed: Any = importlib.import_module(f"{_FUSED}.routed_experts").RoutedExperts
    change(routed, "_get_quant_method", _refusing)
    for module in ("unquantized_fused_moe_method", "oracle.unquantized"):
        chooser: Any = importlib.import_module(f"{_FUSED}.{module}")
        change(chooser, "select_unquantized_moe_backend", _choosing)


def hand_routers_on(manager: Any) -> None:
    """Have whatever calls a router call the one with LoRA.

    vLLM (0.32, 0.33) puts it in the place of the router in the block of a mixture. But of some models, such as
    Qwen3-MoE, the experts call the router themselves, and keep the one without.

    Args:
        manager: vLLM's `LoRAModelManager`, whose layers have LoRA.
    """
    layers = {id(layer.base_layer): layer for layer in manager.modules.values() if hasattr(layer, "base_layer")}
    for module in list(manager.model.modules()):
        layer = layers.get(id(module._modules.get("gate")))
        if layer is not None:
            module._modules["gate"] = layer


def _refusing(own: Any) -> Any:
    def _get_quant_method(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled or not _is_cpu():
            return own(self, prefix, quant_config, moe_config)
        config: Any = importlib.import_module("vllm.config").get_current_vllm_config()
        if not _are_targeted(prefix, config.lora_config.target_modules):
            # As in a model without LoRA: vLLM's own experts for CPUs, of any kind.
            moe_config.is_lora_enabled = False
            return own(self, prefix, quant_config, moe_config)
        _refuse(prefix, moe_config, config)
        try:
            method = own(self, prefix, quant_config, moe_config)
        except Exception as error:
            if quant_config is None:
                raise
            raise _quantized(prefix, f"{type(quant_config).__name__}, of which vLLM says: {error}") from error
        if getattr(method, "experts_cls", None) is not cpu_lora_experts():
            raise _quantized(prefix, type(method).__name__)
        return method

    return _get_quant_method


def _choosing(own: Any) -> Any:
    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        if moe_config.is_lora_enabled and _is_cpu():
            backend: Any = importlib.import_module(f"{_FUSED}.oracle.unquantized").UnquantizedMoeBackend
            return backend.CPU, cpu_lora_experts()
        return own(moe_config)

    return select_unquantized_moe_backend


def _is_cpu() -> bool:
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


def _are_targeted(prefix: str, targets: Sequence[str] | None) -> bool:
    """Whether a deployment gives these experts LoRA."""
    return targets is None or any(f".{prefix}".endswith(f".{name}") or "experts" in name.split(".") for name in targets)


def _refuse(prefix: str, moe: Any, config: Any) -> None:
    """Fail where the experts of this deployment cannot have LoRA on a CPU.

    Raises:
        AttachError: they are shared among processes, not gated, or their LoRA is to be in another form.
    """
    parallel, lora = moe.moe_parallel_config, config.lora_config
    found = [text for name, text in _UNSHARED.items() if getattr(parallel, name)]
    found += [f"{kind} parallelism" for kind in ("data", "tensor") if getattr(parallel, f"{kind[0]}p_size") > 1]
    if found:
        raise AttachError(
            prefix, "a CPU's experts in one process", found[0],
            f"Start vLLM without it. {_REMEDY}",
        )  # fmt: skip
    for option in ("fully_sharded_loras", "enable_moe_shared_loras"):
        if getattr(lora, option):
            flag = "--" + option.replace("_", "-")
            raise AttachError(prefix, "LoRA of each expert, whole", flag, f"Start vLLM without {flag}. {_REMEDY}")
    if not moe.is_act_and_mul or moe.activation.value not in _ACTIVATIONS or moe.swiglu_limit is not None:
        limited = "" if moe.swiglu_limit is None else f" with a limit of {moe.swiglu_limit}"
        raise AttachError(
            prefix,
            f"gated experts with {', '.join(_ACTIVATIONS)}",
            f"{moe.activation.value}{limited}",
            f"Serve this model on another device. {_REMEDY}",
        )


def _quantized(prefix: str, got: str) -> AttachError:
    remedy = f"Serve a checkpoint whose experts are not quantized. {_REMEDY}"
    return AttachError(prefix, "experts in float32, bfloat16 or float16", got, remedy)


def _products(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each row by its expert's weight.

    Args:
        rows: `[P, D]`, those of the first expert first.
        weight: `[E, W, D]`.
        ends: `[E]`, where each expert's rows end.

    Returns:
        `[P, W]`.
    """
    result = rows.new_empty(rows.shape[0], weight.shape[1])
    first = 0
    for expert, end in enumerate(ends.tolist()):
        if end > first:
            torch.mm(rows[first:end], weight[expert].t(), out=result[first:end])
        first = end
    return result


def _fake_products(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


torch.library.custom_op("xpu_lora_vllm::expert_products", _products, mutates_args=())
torch.library.register_fake("xpu_lora_vllm::expert_products", _fake_products)
_PRODUCTS = torch.ops.xpu_lora_vllm.expert_products.default


@functools.cache
def cpu_lora_experts() -> Any:
    """The class of vLLM's experts that computes both products itself, with LoRA after each.

    It is a graph of plain ops, one op for each product of the experts, and one for each product of LoRA.
    """
    punica: Any = importlib.import_module("xpu_lora_compile.integrations.vllm_punica")
    own: Any = importlib.import_module(f"{_FUSED}.experts.cpu_moe").CPUUnquantizedExperts
    mixin: Any = importlib.import_module(f"{_FUSED}.experts.lora_experts_mixin").LoRAExpertsMixin

    class CpuLoraExperts(mixin, own):  # type: ignore[misc]
        """vLLM's experts in floating numbers on a CPU, whose weights stay as they were read."""

        def process_weights_after_loading(self, layer: Any) -> None:
            """Leave them: vLLM's own packs them for its kernel."""

        def set_lora_context(self, ctx: Any) -> None:
            """Take the stacks, as slots of one expert each."""
            super().set_lora_context(ctx)
            self._stacks = [
                [stack.flatten(0, 1) for stack in stacks]
                for stacks in (
                    ctx.w13_lora_a_stacked,
                    ctx.w13_lora_b_stacked,
                    ctx.w2_lora_a_stacked,
                    ctx.w2_lora_b_stacked,
                )
            ]

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activation: Any,
            *_: Any,
            apply_router_weight_on_input: bool,
            **__: Any,
        ) -> None:
            """Write the sum of each token's experts.

            Args:
                output: `[T, D]`.
                hidden_states: `[T, D]`.
                w1: `[E, 2 I, D]`, of gate and of up.
                w2: `[E, D, I]`.
                topk_weights: `[T, k]`, the router's.
                topk_ids: `[T, k]`.
                activation: vLLM's `MoEActivation`.
                apply_router_weight_on_input: the router's weights are in `hidden_states` already.
            """
            count, number = topk_ids.shape[1], w1.shape[0]
            experts, order = topk_ids.reshape(-1).sort(stable=True)
            ends = torch.searchsorted(experts, torch.arange(number, dtype=experts.dtype), right=True)
            tokens = order // count
            pairs = self._pairs(hidden_states.shape[0], tokens, experts, number)
            rows = hidden_states[tokens]
            halves = self._product(rows, w1, self.w1_bias, ends, experts, pairs, 0)
            rows = _ACTIVATIONS[activation.value](*halves.chunk(2, -1))
            result = self._product(rows, w2, self.w2_bias, ends, experts, pairs, 2)
            if not apply_router_weight_on_input:
                result = result * topk_weights.reshape(-1)[order].unsqueeze(-1)
            summed = result[order.argsort()].view(-1, count, result.shape[-1]).sum(1)
            output.copy_(summed)

        def _pairs(self, count: int, tokens: Tensor, experts: Tensor, number: int) -> Tensor | None:
            """The index of each pair among the slots of one expert; None where, eagerly, none has an adapter."""
            if self._lora_context is None:
                return None
            slots = self._lora_context.punica_wrapper.indices_of_rows(count, self._lora_context.w13_lora_a_stacked)
            return None if slots is None else punica.pair_indices(slots[:count][tokens], experts, number)

        def _product(
            self,
            rows: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            ends: Tensor,
            experts: Tensor,
            pairs: Tensor | None,
            first: int,
        ) -> Tensor:
            result: Tensor = _PRODUCTS(rows, weight, ends)
            if bias is not None:
                result = result + bias[experts]
            if pairs is None:
                return result
            a, b = self._stacks[first], self._stacks[first + 1]
            offsets = [0, b[0].shape[1]][: len(b)]
            added: Tensor = punica.added(result, rows, a, b, 1.0, offsets, pairs)
            return added

    return CpuLoraExperts
