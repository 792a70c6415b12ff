"""Whose rows the layers of an encoder see: of audio, images and video, and of the cross attention that reads them.

vLLM maps the tokens of a batch to adapters. An encoder sees other rows: frames, patches, queries, in a layout of its
own. No layout is read here. vLLM encodes the items of the requests that it scheduled in one call. Where these requests
have several adapters, the call is split by adapter, and every row that a layer sees within one call belongs to that
adapter. A cross attention's K and V see what the encoder returned, one item after another: their rows are mapped from
the lengths of those items and the requests that they came from. What was encoded for one adapter is not taken from the
cache for another: see `vllm_platform.py`.

| changed in vLLM | what it does more |
|---|---|
| `LoRAModelManager._create_lora_modules` | gives a cross attention's K and V a wrapper of their own |
| `GPUModelRunner._execute_mm_encoder` | one call an adapter; maps the rows of the cross attention |
| the model's `embed_multimodal` | all within it belongs to that call's adapter |
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import xpu_lora_compile
from xpu_lora_compile.errors import AttachError
from xpu_lora_compile.integrations.vllm_changes import change
from xpu_lora_compile.integrations.vllm_experts import hand_routers_on
from xpu_lora_compile.integrations.vllm_punica import XpuLoraPunicaWrapper


class CrossAttentionWrapper(XpuLoraPunicaWrapper):
    """The wrapper of layers that see an encoder's rows inside the decoder; vLLM runs such steps eagerly."""

    def map_rows(self, slots: list[int], lengths: list[int]) -> None:
        """Note which slot the rows of each item belong to, -1 for none."""
        repeats = torch.tensor(lengths, device=self.device)
        self._token_lora_indices = torch.tensor(slots, device=self.device).repeat_interleave(repeats)
        self._mapped["_token_lora_indices"] = sum(lengths)
        self._any_adapter = any(slot >= 0 for slot in slots)

    def indices_of_rows(self, rows: int, stacks: Any) -> Tensor | None:
        """As the class above, for rows of the encoder."""
        if torch.compiler.is_compiling():
            raise self._unmapped(rows, stacks, "a step with an encoder's rows to run eagerly, as vLLM 0.32 does")
        return super().indices_of_rows(rows, stacks)


class Encoders:
    """The encoders of one model, and for which adapter they run.

    Args:
        manager: vLLM's `LoRAModelManager`, with its modules.
        cross_attention: the wrapper of the cross attention's K and V; None where the model has none.
    """

    def __init__(self, manager: Any, cross_attention: CrossAttentionWrapper | None) -> None:
        self.manager, self.cross_attention = manager, cross_attention
        wrappers = {id(wrapper): wrapper for wrapper in manager.punica_wrapper_mapping.values()}
        self.wrappers: list[XpuLoraPunicaWrapper] = list(wrappers.values())
        # The slot of the adapter whose items are encoded now.
        self._slot: int | None = None

    def slot(self, adapter: int) -> int:
        """The slot of an adapter's number; -1 for 0, which is none."""
        if not adapter:
            return -1
        if adapter not in self.manager.lora_index_to_id:
            raise AttachError(
                f"adapter {adapter}",
                "an active adapter for the items that the encoder is to run",
                f"active ones {self.manager.lora_index_to_id}",
                "Run the encoder in the process that runs the language model.",
            )
        slot: int = self.manager.lora_index_to_id.index(adapter)
        return slot

    @contextmanager
    def encoding(self, adapter: int) -> Iterator[None]:
        """What is encoded inside belongs to this adapter."""
        self._slot = self.slot(adapter)
        try:
            yield
        finally:
            self._slot = None

    def embedding(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The model's `embed_multimodal`, with its rows mapped."""

        @functools.wraps(own)
        def embed_multimodal(*args: Any, **kwargs: Any) -> Any:
            # A profile, before any adapter is there, or a runner that does not tell.
            nothing = None if any(self.manager.lora_index_to_id) else -1
            for wrapper in self.wrappers:
                wrapper.enter_encoder(nothing if self._slot is None else self._slot)
            try:
                return own(*args, **kwargs)
            finally:
                for wrapper in self.wrappers:
                    wrapper.leave_encoder()

        return embed_multimodal


def tell_whose_rows_encoders_see() -> None:
    """Change the classes of vLLM that know it."""
    manager: Any = importlib.import_module("vllm.lora.model_manager").LoRAModelManager
    runner: Any = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    change(manager, "_create_lora_modules", _finding_encoders)
    change(runner, "_execute_mm_encoder", _encoding_by_adapter)


def _finding_encoders(own: Callable[[Any], None]) -> Callable[[Any], None]:
    def _create_lora_modules(manager: Any) -> None:
        own(manager)
        wrappers = list(manager.punica_wrapper_mapping.values())
        if not all(isinstance(wrapper, XpuLoraPunicaWrapper) for wrapper in wrappers):
            return
        hand_routers_on(manager)
        _say_what_was_taken_over(manager)
        cross_attention = _cross_attention(manager)
        for wrapper in [*wrappers, *([cross_attention] if cross_attention else [])]:
            for name, layer in manager.modules.items():
                for stacks in ("lora_a_stacked", "lora_b_stacked", "w13_lora_a_stacked"):
                    wrapper.names[id(vars(layer).get(stacks))] = name
        # Where a model has `get_mm_mapping`, vLLM gives its encoders LoRA when asked for it alone.
        has_lora = not manager.supports_mm or manager.supports_tower_connector_lora
        has_encoder = has_lora and hasattr(manager.model, "embed_multimodal")
        if has_encoder or cross_attention is not None:
            _refuse_the_second_runner(type(manager.model).__name__)
        if has_encoder:
            _refuse_graphs_of_encoders(type(manager.model).__name__)
            manager.encoders = encoders = Encoders(manager, cross_attention)
            manager.model.embed_multimodal = encoders.embedding(manager.model.embed_multimodal)

    return _create_lora_modules


def _refuse_the_second_runner(model: str) -> None:
    """Refuse vLLM's Model Runner V2, which runs encoders in a way that nothing here is told of.

    Raises:
        AttachError: the configuration asks for it.
    """
    config: Any = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    if config is not None and config.use_v2_model_runner:
        raise AttachError(
            model,
            "vLLM's first model runner, where an encoder or a cross attention has LoRA",
            "Model Runner V2",
            "Set VLLM_USE_V2_MODEL_RUNNER=0.",
        )


def _refuse_graphs_of_encoders(model: str) -> None:
    """Refuse CUDA graphs of encoders, which do not say whose items they encode.

    Raises:
        AttachError: the configuration asks for them.
    """
    config: Any = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    if config is not None and config.compilation_config.cudagraph_mm_encoder:
        raise AttachError(
            model,
            "an encoder with LoRA that runs without CUDA graphs of its own",
            "cudagraph_mm_encoder",
            "Leave it out: --compilation-config '{\"cudagraph_mm_encoder\": false}'.",
        )


def _say_what_was_taken_over(manager: Any) -> None:
    """Log it in one line, which comes after all that vLLM says of the model's weights."""
    vllm: Any = importlib.import_module("vllm")
    layers: Any = importlib.import_module("vllm.lora.layers")
    config: Any = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    compiled = config is not None and config.compilation_config.mode != type(config.compilation_config.mode).NONE
    kinds = {
        layers.FusedMoEWithLoRA: "experts",
        layers.VocabParallelEmbeddingWithLoRA: "embedding",
        layers.LogitsProcessorWithLoRA: "logits",
        # Since 0.33 there are two of them.
        getattr(layers, "BaseClassificationHeadWithLoRA", layers.ClassificationHeadWithLoRA): "classifier",
        layers.BaseLayerWithLoRA: "linear",
    }
    # A layer may have several names.
    found = {id(layer): layer for layer in manager.modules.values()}.values()
    left = [layer for layer in found if isinstance(layer, layers.FusedMoEWithLoRA) and _is_vllms_own(layer)]
    count = Counter(
        next(name for kind, name in kinds.items() if isinstance(layer, kind)) for layer in found if layer not in left
    )
    logger = importlib.import_module("vllm.logger").init_logger("vllm.plugins.xpu_lora_compile")
    logger.info(
        "xpu_lora_compile %s runs the LoRA of %d layers (%s) of vLLM %s on %s, one call a layer, %s%s.",
        xpu_lora_compile.__version__,
        sum(count.values()),
        ", ".join(f"{number} {name}" for name, number in count.most_common()),
        vllm.__version__,
        torch.device(manager.device).type,
        "compiled with its passes" if compiled else "eagerly",
        f"; that of {len(left)} mixtures of experts is vLLM's own" if left else "",
    )


def _is_vllms_own(experts: Any) -> bool:
    """Whether the wrapper hands LoRA of a mixture on to vLLM's own: see its `add_lora_w13`."""
    return bool(experts.use_ep or experts.fully_sharded or experts.enable_moe_shared_loras)


def _cross_attention(manager: Any) -> CrossAttentionWrapper | None:
    """Give the K and V of Whisper's cross attention a wrapper of their own; None where the model is no encoder-decoder.

    Raises:
        AttachError: it is another encoder-decoder, of whose layers it is not known which see the encoder's rows.
    """
    if not getattr(manager.model.config, "is_encoder_decoder", False):
        return None
    whisper: Any = importlib.import_module("vllm.model_executor.models.whisper")
    decoder: Any = importlib.import_module("vllm.v1.attention.backend").AttentionType.ENCODER_DECODER
    attentions = {
        name: module for name, module in manager.model.named_modules() if getattr(module, "attn_type", None) == decoder
    }
    known = [name for name, module in attentions.items() if isinstance(module, whisper.WhisperCrossAttention)]
    others = [
        name
        for name in attentions
        if not any(name == known_name or name.startswith(f"{known_name}.") for known_name in known)
    ]
    if others or not known:
        module: nn.Module = manager.model
        raise AttachError(
            others[0] if others else type(module).__name__,
            "an encoder-decoder with the cross attention of Whisper",
            f"{type(attentions[others[0]]).__name__ if others else 'none that is known'} in {type(module).__name__}",
            "Serve this model without --enable-lora, or without this package: its rows could get wrong adapters.",
        )
    wrapper = CrossAttentionWrapper(8, manager.max_num_seqs, device=manager.device, lora_config=manager.lora_config)
    for name in known:
        layer = manager.modules.get(f"{name}.kv_proj")
        if layer is not None:
            layer.set_mapping(wrapper)
    return wrapper


def _encoding_by_adapter(own: Callable[[Any, Any], list[Tensor]]) -> Callable[[Any, Any], list[Tensor]]:
    def _execute_mm_encoder(runner: Any, scheduler_output: Any) -> list[Tensor]:
        manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
        encoders: Encoders | None = getattr(manager, "encoders", None)
        if encoders is None or not scheduler_output.scheduled_encoder_inputs:
            return own(runner, scheduler_output)
        requests: dict[int, dict[str, list[int]]] = {}
        for request, inputs in scheduler_output.scheduled_encoder_inputs.items():
            requests.setdefault(_adapter_of(runner, request), {})[request] = inputs
        outputs: dict[tuple[str, int], Tensor] = {}
        for adapter, items in requests.items():
            part = copy.copy(scheduler_output)
            part.scheduled_encoder_inputs = items
            with encoders.encoding(adapter):
                outputs.update(zip(_items(runner, part), own(runner, part), strict=True))
        # As vLLM orders them, for the cross attention.
        order = _items(runner, scheduler_output)
        if encoders.cross_attention is not None:
            slots = [encoders.slot(_adapter_of(runner, request)) for request, _ in order]
            encoders.cross_attention.map_rows(slots, [outputs[item].shape[0] for item in order])
        return [outputs[item] for item in order]

    return _execute_mm_encoder


def _adapter_of(runner: Any, request: str) -> int:
    """The number of a request's adapter; 0 for none."""
    lora_request = runner.requests[request].lora_request
    return int(lora_request.lora_int_id) if lora_request else 0


def _items(runner: Any, scheduler_output: Any) -> list[tuple[str, int]]:
    """Request and item of each output of the encoder, in vLLM's order."""
    _, inputs, places = runner._batch_mm_inputs_from_scheduler(scheduler_output)
    return [
        (request, id(place))
        for (modality, _), (request, place) in zip(inputs, places, strict=True)
        if modality != "prompt_embeds"
    ]
