"""vLLM's punica wrapper, with our ops in its methods. Imported by vLLM, where it is installed, and by nothing else.

vLLM's stacks are A `[K, 1, R, D]` and B `[K, 1, W, R]`, scaling folded into B, and stay so for vLLM; on a CPU those of
a linear layer are views of one tensor, by rank, as our kernel reads them. Each method changes `y` in place where it
runs eagerly, and returns the result, which is what vLLM's layers go on with.

Which row has which adapter is known in three ways. In every other case an eager call fails with the layer's name:

| where the layer runs | its rows |
|---|---|
| the language model | the tokens that vLLM mapped; the buffers hold -1 past them, in every step |
| inside `embed_multimodal` | all of them belong to the one adapter whose items are encoded: `vllm_encoders.py` |
| a cross attention's K and V | the rows of the encoder's outputs, request by request: `vllm_encoders.py` |

The first wrapper changes nine functions of vLLM's: `BaseLayerWithLoRA.set_mapping` stores B by rank on a CPU;
`VocabParallelEmbeddingWithLoRA.forward` gets its tokens in one dimension, since it takes the first for their number;
`LoRAModelManager._create_lora_modules` and `GPUModelRunner._execute_mm_encoder` tell whose rows an encoder sees;
`WorkerLoRAManager._load_adapter` refuses adapters that would give wrong answers: `vllm_adapters.py`;
`LRUCacheWorkerLoRAManager._apply_adapters` keeps the adapters that a step needs, and `LoRAModelRunnerMixin.add_lora`
returns refusals: `vllm_loads.py`;
`_try_load_aot_compiled_fn` takes the compiled model that an earlier start has saved, and
`TorchCompileWithNoGuardsWrapper.aot_compile` says how long it takes: `vllm_starts.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from xpu_lora_compile.errors import BatchError
from xpu_lora_compile.integrations.vllm_changes import change
from xpu_lora_compile.integrations.vllm_platform import own_punica_wrapper
from xpu_lora_compile.ops import bgmv_expand, bgmv_expand_slice, bgmv_shrink, lora_linear
from xpu_lora_compile.ops.lora_linear import add_slices_eagerly
from xpu_lora_compile.torch_internals import writes_to

_Own: Any = own_punica_wrapper()


class XpuLoraPunicaWrapper(_Own):  # type: ignore[misc]
    """The platform's own wrapper, with its methods done by our ops."""

    # Whether any row of the batch has an adapter; read by eager code alone, never traced into a graph.
    _any_adapter = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's own, and have each layer that is given this wrapper store its weights as our kernel reads them."""
        super().__init__(*args, **kwargs)
        # For each stack, when it was looked through: its memory, how often it had been written to, whether it was 0.
        self._looked_through = WeakTensorKeyDictionary()
        # The module of each stack, by the stack's `id`: for errors.
        self.names: dict[int, str] = {}
        # vLLM does not initialise its buffers. Of each: what a row past the mapped ones reads, and how many are mapped.
        self._tails = {"_token_lora_indices": -1, "_sampler_indices": -1, "_embeddings_indices": 0}
        self._mapped: dict[str, int] = {}
        for name, nothing in self._tails.items():
            buffer: Tensor = getattr(self, name)
            buffer.fill_(nothing)
            self._mapped[name] = 0
        # Inside `embed_multimodal`: the slot of all rows, which a graph reads, and eager code's copy of it.
        self._encodes = False
        self._encoded_for: int | None = None
        self._slot_of_encoder = torch.full((1,), -1, dtype=torch.long, device=self.device)
        _change_vllm()

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        """Note which row has which adapter; rows past those of this batch have none."""
        super().update_metadata(mapping, *args, **kwargs)
        self._any_adapter = any(adapter > 0 for adapter in mapping.index_mapping)
        tokens, sampled = len(mapping.index_mapping), len(mapping.prompt_mapping)
        for name, rows in zip(self._tails, (tokens, sampled, tokens), strict=True):
            if rows < self._mapped[name]:
                buffer: Tensor = getattr(self, name)
                buffer[rows : self._mapped[name]] = self._tails[name]
            self._mapped[name] = rows

    def enter_encoder(self, slot: int | None) -> None:
        """From now on every row belongs to this adapter's slot, -1 for none; None where that is not known."""
        self._encodes, self._encoded_for = True, slot
        self._slot_of_encoder.fill_(-1 if slot is None else slot)

    def leave_encoder(self) -> None:
        """From now on rows are tokens again."""
        self._encodes = False

    def add_shrink(
        self, y: Sequence[Tensor] | Tensor, x: Tensor, lora_a_stacked: Sequence[Tensor], scale: float, **_: Any
    ) -> Sequence[Tensor] | Tensor:
        """Write `scale * A[i] @ x[t]` of each slice into its `y`.

        Args:
            y: for each slice `[T, R]`; rows without an adapter become 0.
            x: `[..., D]`, T rows in all.
            lora_a_stacked: for each slice `[K, 1, R, D]`.
            scale: factor on the result.
        """
        rows = x.reshape(-1, x.shape[-1])
        indices = self.indices_of_rows(rows.shape[0], lora_a_stacked)
        if indices is None:
            for hidden in y:
                hidden.zero_()
            return y
        for hidden, a in zip(y, lora_a_stacked, strict=True):
            bgmv_shrink(hidden.view(-1, hidden.shape[-1]), rows, a, indices[: rows.shape[0]], scale)
        return y

    def add_expand(
        self,
        y: Tensor,
        x: Sequence[Tensor] | Tensor,
        lora_b_stacked: Sequence[Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> Tensor:
        """Write or add `B[i] @ x[t]` of each slice to its columns of `y`.

        Args:
            y: `[..., H]`, T rows in all; rows without an adapter keep their value.
            x: for each slice `[T, R]`; columns beyond the rank of B, which a gather of tensor parallelism leaves, are
                not read.
            lora_b_stacked: for each slice `[K, 1, W, R]`.
            output_slices: for each slice W.
            offset_start: the first slice's first column.
            add_inputs: add to `y`; if false, replace it.
        """
        rows = y.view(-1, y.shape[-1])
        indices = self.indices_of_rows(rows.shape[0], lora_b_stacked)
        if indices is None:
            return y
        offsets = accumulate(output_slices, initial=offset_start)
        for hidden, b, offset, width in zip(x, lora_b_stacked, offsets, output_slices, strict=False):
            at = indices[: rows.shape[0]]
            bgmv_expand_slice(rows, hidden[:, : b.shape[-1]], b, at, offset, width, add_inputs)
        return y

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **_: Any
    ) -> Tensor:
        """Add `B[i] @ x[t]` to the embedded tokens.

        Args:
            y: `[T, W]`.
            x: `[T, R]`, what A has for each token.
            lora_b_stacked: `[K, 1, W, R]`.
            add_inputs: add to `y`; if false, replace it.
        """
        indices = self.indices_of_rows(x.shape[0], lora_b_stacked)
        if indices is None:
            return y
        if not is_compiling() and self._encodes:
            # What A has for each token was read by the mapping of the language model's tokens.
            if self._is_zero(lora_b_stacked):
                return y
            raise self._unmapped(x.shape[0], lora_b_stacked, "no LoRA of an embedding inside an encoder")
        bgmv_expand(y, x, lora_b_stacked, indices[: x.shape[0]], add_inputs)
        return y

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        *,
        add_inputs: bool = True,
        **_: Any,
    ) -> Tensor:
        """Add every slice's LoRA to a layer's output, in one call.

        Args:
            y: `[..., H]`, T rows in all.
            x: `[..., D]`, T rows.
            lora_a_stacked: for each slice `[K, 1, R, D]`.
            lora_b_stacked: for each slice `[K, 1, W, R]`.
            scale: factor on what is added.
            output_slices: for each slice W.
            add_inputs: if false, `y` holds zeros, as vLLM's second stream hands it over: adding replaces them.
        """
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        indices = self.indices_of_rows(rows.shape[0], lora_b_stacked)
        if indices is None:
            return y
        offsets = list(accumulate(output_slices, initial=0))[:-1]
        if is_compiling():
            lora_a_stacked, lora_b_stacked = _as_the_compiler_sees_them(lora_a_stacked, lora_b_stacked)
        return added(y, rows, lora_a_stacked, lora_b_stacked, scale, offsets, indices)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any
    ) -> Tensor:
        """Add LoRA to the logits, of which there may be more than B has rows: the padding keeps its value.

        Nothing is done while no adapter has any for the logits: a vocabulary makes B the largest of all to read.

        Args:
            y: `[S, H]`, one row for each token that is sampled; or for tokens of a prompt whose probabilities are
                asked for.
            x: `[S, D]`.
            lora_a_stacked: `[K, 1, R, D]`.
            lora_b_stacked: `[K, 1, W, R]`.
            scale: factor on what is added.
        """
        if not is_compiling() and (not self._any_adapter or self._is_zero(lora_b_stacked)):
            return y
        b = lora_b_stacked if lora_b_stacked.shape[-2] <= y.shape[-1] else lora_b_stacked[..., : y.shape[-1], :]
        return added(y, x, [lora_a_stacked], [b], scale, [0], self._indices_of_logits(x, lora_b_stacked))

    def apply_lora_full_linear(
        self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
    ) -> Tensor:
        """Put `weight[i] @ x[t] + bias[i]` in the place of the rows whose adapter brings a whole layer along.

        Args:
            y: `[S, W]`.
            x: `[S, D]`.
            weight_stacked: `[K, 1, W, D]`.
            bias_stacked: `[K, W]`.
            module_enabled: `[K]`, whether the adapter does.
        """
        result = torch.zeros(x.shape[0], weight_stacked.shape[-2], dtype=torch.float32, device=x.device)
        bgmv_shrink(result, x, weight_stacked, self.sampler_indices)
        return y.copy_(self._select_full_linear_output(y, result, bias_stacked, module_enabled))

    def add_lora_w13(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None,
        *rest: Any,
        token_lora_mapping: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Add LoRA to what a mixture's experts make of its input, before their activation.

        Experts and factors that are shared among processes, and factors that experts share, are vLLM's own.

        Args:
            y: `[T, k, H]`, changed.
            x: `[T, D]`.
            lora_a_stacked: for gate and for up, or for both in one, `[K, E, R, D]`.
            lora_b_stacked: for each of them `[K, E, W, R]`.
            topk_ids: `[T, k]`, the experts of each token.
            topk_weights: `[T, k]`, the router's.
            expert_map: where experts are shared among processes, which are here.
            rest: what vLLM's kernels are set up with.
            token_lora_mapping: where tokens came from other processes, their slots.
            options: as `rest`.

        Returns:
            What vLLM hands to `add_lora_w2`: `[T k]`, the index of each pair of token and expert, in the last place.
        """
        fully_sharded = rest[_FULLY_SHARDED]
        if (
            fully_sharded
            or expert_map is not None
            or token_lora_mapping is not None
            or lora_a_stacked[0].stride(1) == 0
        ):
            own = (y, x, lora_a_stacked, lora_b_stacked, topk_ids, topk_weights, expert_map, *rest)
            return super().add_lora_w13(*own, token_lora_mapping=token_lora_mapping, **options)  # type: ignore[no-any-return]
        tokens, count = topk_ids.shape
        # In a captured graph, batches follow that have adapters: whether this one has any is not asked.
        indices: Tensor = self._token_lora_indices
        if self._encodes or (
            self._any_adapter and tokens not in (self._mapped["_token_lora_indices"], _rows_with_padding())
        ):
            wanted = f"the {self._mapped['_token_lora_indices']} tokens of the batch, whose adapters vLLM has mapped"
            raise self._unmapped(tokens, lora_a_stacked, wanted)
        slots = indices[:tokens].repeat_interleave(count)
        pairs = pair_indices(slots, topk_ids.reshape(-1), lora_a_stacked[0].shape[1])
        rows = x.repeat_interleave(count, 0)
        output = y.view(-1, y.shape[-1])
        output.copy_(_with_experts(output, rows, lora_a_stacked, lora_b_stacked, pairs))
        return None, None, None, pairs

    def add_lora_w2(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        topk_weights: Tensor,
        sorted_token_ids_lora: Tensor | None,
        expert_ids_lora: Tensor | None,
        num_tokens_post_padded_lora: Tensor | None,
        token_lora_mapping: Tensor | None,
        *rest: Any,
        **options: Any,
    ) -> None:
        """Add LoRA, times the router's weight, to what a mixture's experts make of their activation.

        Args:
            y: `[T, k, H]`, with the router's weight in it; changed.
            x: `[T k, D]`.
            lora_a_stacked: one `[K, E, R, D]`.
            lora_b_stacked: one `[K, E, W, R]`.
            topk_weights: `[T, k]`.
            sorted_token_ids_lora: with the next three, what `add_lora_w13` returned.
            expert_ids_lora: as above.
            num_tokens_post_padded_lora: as above.
            token_lora_mapping: as above.
            rest: what vLLM's kernels are set up with.
            options: as `rest`.
        """
        if expert_ids_lora is not None or token_lora_mapping is None:
            routing = (sorted_token_ids_lora, expert_ids_lora, num_tokens_post_padded_lora, token_lora_mapping)
            super().add_lora_w2(y, x, lora_a_stacked, lora_b_stacked, topk_weights, *routing, *rest, **options)
            return
        output = y.view(-1, y.shape[-1])
        nothing = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
        delta = _with_experts(nothing, x, lora_a_stacked, lora_b_stacked, token_lora_mapping)
        output.add_(delta * topk_weights.reshape(-1, 1))

    def indices_of_rows(self, rows: int, stacks: Any) -> Tensor | None:
        """The slot of each row that a layer sees; None where, eagerly, there is nothing to add.

        Args:
            rows: how many rows the layer sees.
            stacks: what the layer handed over, which tells its name.

        Raises:
            BatchError: nothing tells to which requests the rows belong.
        """
        tokens: Tensor = self._token_lora_indices
        if is_compiling():
            # A view of all indices: rows past the mapped ones have -1, and graphs of language models see no others.
            return self._slot_of_encoder.expand(rows).contiguous() if self._encodes else tokens
        if self._encodes:
            if self._encoded_for is not None:
                return None if self._encoded_for < 0 else self._slot_of_encoder.expand(rows).contiguous()
            wanted = "a call of the encoder that vLLM's `_execute_mm_encoder` makes, which tells whose items it encodes"
        elif not self._any_adapter:
            return None
        elif rows in (self._mapped["_token_lora_indices"], _rows_with_padding()):
            return tokens[:rows]
        else:
            wanted = f"the {self._mapped['_token_lora_indices']} tokens of the batch, whose adapters vLLM has mapped"
        if all(self._is_zero(stack) for stack in ([stacks] if isinstance(stacks, Tensor) else stacks)):
            return None
        raise self._unmapped(rows, stacks, wanted)

    def _unmapped(self, rows: int, stacks: Any, wanted: str) -> BatchError:
        where = self.names.get(id(stacks), "a layer with LoRA")
        return BatchError(
            where,
            wanted,
            f"{rows} rows of which it is not known to which requests they belong",
            f"Use adapters without LoRA on `{where.rpartition('.')[2]}` of this module.",
        )

    def _is_zero(self, stack: Tensor) -> bool:
        """Whether a stack is all zeros; it is looked through again when it has been written to."""
        # An inference tensor does not count writes.
        if stack.is_inference():
            return False
        # An address repeats where memory is given out again. The name of a storage does not while it is referred to.
        state = StorageWeakRef(stack.untyped_storage()), writes_to(stack)
        known = self._looked_through.get(stack)
        if known is None or known[:2] != state:
            self._looked_through[stack] = known = (*state, not stack.any())
        return bool(known[2])

    def _indices_of_logits(self, x: Tensor, stack: Tensor) -> Tensor:
        """The adapter of each row of the hidden states that become logits.

        vLLM takes the rows to be those that are sampled, which it has gathered (`execute_model` of its
        `GPUModelRunner`). Where a prompt's probabilities are asked for they are some of the batch's tokens instead
        (`_get_prompt_logprobs_dict`), rows of a larger tensor, and of the indices of sampled rows those past their
        number are stale. Its second model runner says one adapter a request, also where a request has rows of drafts.
        """
        tokens: Tensor = self._token_lora_indices
        sampled: Tensor = self.sampler_indices
        rows, mapped = x.shape[0], self._mapped["_token_lora_indices"]
        is_whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        if is_compiling() or (is_whole and sampled.shape[0] == rows):
            return sampled[:rows]
        first = x.storage_offset() // x.stride(0)
        # What was gathered is some of the tokens, and nobody says which; only all of them are known.
        if first + rows > mapped or (is_whole and rows != mapped):
            raise self._unmapped(rows, stack, f"the {sampled.shape[0]} rows that are sampled, or tokens of the batch")
        return tokens[first : first + rows]


def _rows_with_padding() -> int | None:
    """How many rows the batch that runs has, with those that vLLM adds for its graphs."""
    context = importlib.import_module("vllm.forward_context")
    batch = context.get_forward_context().batch_descriptor if context.is_forward_context_available() else None
    return None if batch is None else int(batch.num_tokens)


# The place of `fully_sharded` among what `add_lora_w13` takes after `expert_map`.
_FULLY_SHARDED = 9


def _with_experts(
    output: Tensor, rows: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], pairs: Tensor
) -> Tensor:
    """The output with LoRA of each pair's expert; the stacks are `[K, E, ...]`."""
    a, b = ([stack.flatten(0, 1) for stack in stacks] for stacks in (lora_a, lora_b))
    offsets = list(accumulate((stack.shape[1] for stack in b), initial=0))[:-1]
    return added(output, rows, a, b, 1.0, offsets, pairs)


def pair_indices(slots: Tensor, experts: Tensor, number: int) -> Tensor:
    """The index of each pair of a token and an expert, among `K * E` slots of one expert.

    Args:
        slots: `[P]`, the token's slot, or -1.
        experts: `[P]`, the expert's number.
        number: E.
    """
    return torch.where(slots < 0, slots, slots * number + experts)


def added(
    y: Tensor,
    rows: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: float,
    offsets: list[int],
    indices: Tensor,
) -> Tensor:
    """`y` with every slice's LoRA; of the indices the first T count."""
    # In a graph, to ask `y` for its shape after the call is to see it again, and LoRA would be added to a copy.
    output = y if y.dim() == 2 else y.view(-1, y.shape[-1])
    indices = indices[: rows.shape[0]]
    if add_slices_eagerly(output, rows, lora_a, lora_b, indices, offsets, scale):
        return y
    added = lora_linear(output, rows, lora_a, lora_b, indices, offsets, scale)
    return added if y.dim() == 2 else added.view(y.shape)


def _change_vllm() -> None:
    """Change what vLLM's classes do, where it needs a wrapper of ours: see `vllm_changes.py`."""
    _have_layers_store_by_rank()
    _give_embeddings_one_dimension()
    importlib.import_module("xpu_lora_compile.integrations.vllm_encoders").tell_whose_rows_encoders_see()
    importlib.import_module("xpu_lora_compile.integrations.vllm_adapters").refuse_wrong_adapters()
    importlib.import_module("xpu_lora_compile.integrations.vllm_loads").change_workers()
    starts = importlib.import_module("xpu_lora_compile.integrations.vllm_starts")
    starts.take_what_the_first_start_has_saved()
    starts.say_that_it_compiles()


def _have_layers_store_by_rank() -> None:
    """Add that to what vLLM's LoRA layers do as they are given a wrapper of ours.

    vLLM makes a layer's stacks first, and `set_mapping` is all that it asks of every layer after that, and before it
    traces or runs one. `set_lora` and `reset_lora` write to the stacks as to any other: shapes stay what they were.
    """
    layers: Any = importlib.import_module("vllm.lora.layers.base").BaseLayerWithLoRA
    change(layers, "set_mapping", _storing_by_rank)


def _give_embeddings_one_dimension() -> None:
    embedding: Any = importlib.import_module("vllm.lora.layers.vocab_parallel_embedding").VocabParallelEmbeddingWithLoRA
    change(embedding, "forward", _flattening)


def _flattening(own: Any) -> Any:
    def forward(layer: Any, x: Tensor) -> Tensor:
        # vLLM's Transformers backend has a dimension for a batch of one: each row would get the first row's A.
        output: Tensor = own(layer, x.flatten())
        return output if x.dim() == 1 else output.view(*x.shape, -1)

    return forward


def _storing_by_rank(own: Any) -> Any:
    def set_mapping(layer: Any, punica_wrapper: Any) -> None:
        own(layer, punica_wrapper)
        stacks = vars(layer).get("lora_b_stacked")
        if isinstance(punica_wrapper, XpuLoraPunicaWrapper) and torch.device(punica_wrapper.device).type == "cpu":
            if isinstance(stacks, tuple):
                layer.lora_a_stacked, layer.lora_b_stacked = _stored_by_rank(layer.lora_a_stacked, stacks)
            elif isinstance(stacks, Tensor):
                layer.lora_b_stacked = _by_rank(stacks)
            elif "w13_lora_b_stacked" in vars(layer):
                _store_experts_by_rank(layer)

    return set_mapping


def _turned(b: Tensor) -> Tensor:
    return b.transpose(-1, -2)


def _by_rank(b: Tensor) -> Tensor:
    return _turned(_turned(b).contiguous())


def _store_experts_by_rank(layer: Any) -> None:
    """The same stacks of a mixture of experts; their list, from which vLLM takes sizes, has views of them."""
    layer.w13_lora_b_stacked = tuple(map(_by_rank, layer.w13_lora_b_stacked))
    layer.w2_lora_b_stacked = tuple(map(_by_rank, layer.w2_lora_b_stacked))
    if isinstance(vars(layer).get("lora_b_stacked"), list):
        gate, *up = layer.w13_lora_b_stacked
        slots, experts = gate.shape[:2]
        stacks = (gate, *layer.w2_lora_b_stacked, *up)
        layer.lora_b_stacked = [stack[i, e] for i in range(slots) for e in range(experts) for stack in stacks]


def _stored_by_rank(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The same stacks, with neighbours along W side by side, as views of one tensor that each of them names `packed`.

    It is `[K, 1, R, S D + W_1 + ... + W_S]`: A of the S slices, and then B.
    """
    by_rank = [*lora_a, *map(_turned, lora_b)]
    # Fully sharded layers have a part of the ranks in A.
    if len({(stack.dtype, stack.shape[:3]) for stack in by_rank}) > 1:
        return lora_a, tuple(_turned(b.contiguous()) for b in by_rank[len(lora_a) :])
    if _packed_as(lora_a, lora_b) is not None:
        return lora_a, lora_b
    packed = torch.cat(by_rank, -1)
    a, b = _unpacked(packed, lora_a, lora_b)
    for stack in (*a, *b):
        stack.packed = packed  # type: ignore[attr-defined]
    return tuple(a), tuple(b)


def _packed_as(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> Any:
    """The one tensor that these stacks, and no others, are views of; None where there is none."""
    packed = getattr(lora_a[0], "packed", None)
    columns = sum(a.shape[-1] for a in lora_a) + sum(b.shape[-2] for b in lora_b)
    named = [getattr(stack, "packed", None) is packed for stack in (*lora_a, *lora_b)]
    return packed if packed is not None and all(named) and packed.shape[-1] == columns else None


def _as_the_compiler_sees_them(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The same stacks; where they are one tensor, made from it in the graph."""
    packed = _packed_as(lora_a, lora_b)
    return (lora_a, lora_b) if packed is None else _unpacked(packed, lora_a, lora_b)


def _unpacked(
    packed: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Views of the tensor, of the sizes of these stacks."""
    columns = packed.split([a.shape[-1] for a in lora_a] + [b.shape[-2] for b in lora_b], -1)
    return columns[: len(lora_a)], [_turned(b) for b in columns[len(lora_a) :]]
