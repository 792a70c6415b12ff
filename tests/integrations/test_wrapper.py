"""The wrapper's methods alone: the sizes of vLLM's own sweep, within its tolerance, and what that never tries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from torch import Tensor

from xpu_lora_compile.integrations.vllm_versions import RELEASES

# Every size of a layer that vLLM's tests/lora/test_punica_ops.py knows, before it divides them by 2, 8, 16 and 64; the
# smallest, the largest, and every sixth of the rest run here, divided by turns.
SIZES = [
    *(128, 1024, 1536, 2304, 2752, 3584, 4608, 5504, 6400, 7424, 9472, 13824, 15360, 24576, 29696, 32768),
    *(49152, 64000, 128000, 128256),
]
DIVISORS = (1, 2, 8, 16, 64)
RELEASE = RELEASES[vllm.__version__.split("+")[0]]
TOLERANCE = {"rtol": 6e-2, "atol": 6e-2}
ROWS = 128


@pytest.fixture(scope="module", autouse=True)
def _plugin() -> None:
    """The wrapper asks for the platform's own, which the plugin remembers."""
    from xpu_lora_compile.integrations.vllm import register

    register()


def wrapper_for(adapters: list[int], slots: int, sampled: list[int] | None = None, longest: int = 8192) -> Any:
    """A wrapper that was told of a batch: of each row the adapter's number from 1 on, or 0; all slots are taken."""
    from xpu_lora_compile.integrations.vllm_punica import XpuLoraPunicaWrapper

    made = XpuLoraPunicaWrapper(longest, 256, device="cpu", lora_config=SimpleNamespace(max_loras=slots))
    # What a larger batch before this one has left behind.
    tell(made, [1] * longest, slots, [1] * 256)
    tell(made, adapters, slots, sampled)
    return made


def tell(wrapper: Any, adapters: list[int], slots: int, sampled: list[int] | None = None) -> None:
    from vllm.lora.layers import LoRAMapping

    sampled = adapters if sampled is None else sampled
    wrapper.update_metadata(LoRAMapping(adapters, sampled, is_prefill=True), list(range(1, slots + 1)), slots, 512)


def products(x: Tensor, weights: Tensor, adapters: list[int]) -> Tensor:
    """Of each row with its own adapter, in float64; zeros without one."""
    weights = weights.double().squeeze(1)
    rows = [
        weights[one - 1] @ x[t].double() if one else x.new_zeros(weights.shape[1]) for t, one in enumerate(adapters)
    ]
    return torch.stack(rows)


def grouped_products(x: Tensor, weights: Tensor, adapters: list[int]) -> Tensor:
    """The same for many rows, adapter by adapter, in float32."""
    result = torch.zeros(len(x), weights.shape[2])
    for one in set(adapters) - {0}:
        mine = torch.tensor(adapters) == one
        result[mine] = x[mine].float() @ weights[one - 1, 0].float().T
    return result


def sweep(size: int, slices: int, dtype: torch.dtype, batches: int, slots: int, rank: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(dtype)

    adapters = torch.randint(1, slots + 1, (batches,), generator=generator).repeat_interleave(rows).tolist()
    wrapper = wrapper_for(adapters, slots)
    x = rand(len(adapters), size)
    a = [rand(slots, 1, rank, size) for _ in range(slices)]
    hidden = torch.zeros(slices, len(adapters), rank)
    wrapper.add_shrink(hidden, x, a, 0.5)
    for made, stack in zip(hidden, a, strict=True):
        torch.testing.assert_close(made, 0.5 * grouped_products(x, stack, adapters), **TOLERANCE)
    del a
    b = [rand(slots, 1, size, rank) for _ in range(slices)]
    hidden = torch.rand(slices, len(adapters), rank, generator=generator)
    y = rand(len(adapters), size * slices)
    wanted = y.float() + torch.cat([grouped_products(h, s, adapters) for h, s in zip(hidden, b, strict=True)], 1)
    wrapper.add_expand(y, hidden, b, (size,) * slices, add_inputs=True)
    torch.testing.assert_close(y.float(), wanted, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(SIZES)), ids=[f"size{size}" for size in SIZES])
def test_sizes_of_vllms_sweep(number: int) -> None:
    size = SIZES[number] // DIVISORS[number % 5]
    dtype = (torch.float16, torch.bfloat16)[number % 2]
    sweep(size, 1 + number % 3 if size < 20000 else 1, dtype, 4, 4, 32, ROWS if size < 5000 else 4)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 32, 64, 128, 256])
def test_ranks_batches_and_adapters_of_vllms_sweep(rank: int) -> None:
    turn = rank.bit_length()
    slots = (1, 8, 32, 128)[turn % 4] if rank < 128 else 8
    sweep(2049, 1 + turn % 3, (torch.float16, torch.bfloat16)[turn % 2], (1, 4, 16, 32)[turn % 4], slots, rank, 32)


MIXED = [2, 0, 1, 3, 0, 2, 3]


def stacks(widths: list[int], slots: int = 3, rank: int = 8, features: int = 24) -> tuple[list[Tensor], list[Tensor]]:
    a = [torch.randn(slots, 1, rank, features) for _ in widths]
    return a, [torch.randn(slots, 1, width, rank) for width in widths]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_an_adapter_keeps_its_value(dtype: torch.dtype) -> None:
    wrapper, (a, b) = wrapper_for(MIXED, 3), stacks([16, 8, 8])
    x, y = torch.randn(7, 24).to(dtype), torch.randn(7, 32).to(dtype)
    before = y.clone()
    result = wrapper.add_lora_linear(y, x, a, b, 1.0, (16, 8, 8))
    assert result is y
    assert torch.equal(y[1], before[1])
    assert torch.equal(y[4], before[4])
    wanted = torch.cat([products(products(x, p, MIXED), q, MIXED) for p, q in zip(a, b, strict=True)], 1)
    torch.testing.assert_close(
        y.double(), before.double() + wanted, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4
    )


@torch.no_grad()
def test_nan_of_a_slot_that_no_row_uses_stays_there() -> None:
    wrapper, (a, b) = wrapper_for([1, 0, 1], 3), stacks([16])
    a[0][1:], b[0][1:] = torch.nan, torch.nan
    y = torch.randn(3, 16)
    assert wrapper.add_lora_linear(y, torch.randn(3, 24), a, b, 1.0, (16,)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("columns", [51904, 51865, 51840], ids=["padded", "equal", "narrower"])
def test_logits_of_another_width_than_the_vocabulary(columns: int) -> None:
    # Two rows are sampled, of seven tokens.
    wrapper, (a, b) = wrapper_for(MIXED, 3, sampled=[3, 0]), stacks([51865])
    x, y = torch.randn(2, 24), torch.randn(2, columns)
    before = y.clone()
    wrapper.add_lora_logits(y, x, a[0], b[0], 1.0)
    wanted = before.double()
    width = min(columns, 51865)
    wanted[0, :width] += (b[0][2, 0].double() @ (a[0][2, 0].double() @ x[0].double()))[:width]
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(y[1], before[1])


@torch.no_grad()
def test_logits_are_left_alone_while_no_adapter_has_any_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from xpu_lora_compile.integrations import vllm_punica

    calls: list[Any] = []
    real = vllm_punica.add_slices_eagerly
    monkeypatch.setattr(vllm_punica, "add_slices_eagerly", lambda *args: calls.append(args) or real(*args))
    wrapper, (a, b) = wrapper_for(MIXED, 3, sampled=[3, 0]), stacks([64])
    weights, b = b[0].clone(), [torch.zeros_like(b[0])]
    x, zeros = torch.randn(2, 24), torch.zeros(2, 64)

    def logits() -> Tensor:
        return wrapper.add_lora_logits(zeros.clone(), x, a[0], b[0], 1.0)

    assert torch.equal(logits(), zeros)
    assert not calls
    # As vLLM loads an adapter, and evicts it.
    with torch.inference_mode():
        b[0][2, 0, :64].copy_(weights[2, 0])
    torch.testing.assert_close(logits()[0], weights[2, 0] @ (a[0][2, 0] @ x[0]), rtol=1e-4, atol=1e-3)
    assert len(calls) == 1
    b[0][2] = 0
    assert torch.equal(logits(), zeros)
    assert len(calls) == 1
    # Who counts no writes is always taken for one that has some.
    with torch.inference_mode():
        b = [b[0].clone()]
        logits()
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("replaced", ["stack", "memory"])
def test_a_stack_in_the_memory_of_one_that_was_zero_keeps_its_lora(replaced: str) -> None:
    wrapper, ((a,), (b,)) = wrapper_for([3, 1], 3), stacks([64])
    memory = np.zeros(b.shape, dtype=np.float32)

    def stack_in_it() -> Tensor:
        return torch.frombuffer(memory, dtype=torch.float32).view(b.shape)

    x, y = torch.randn(2, 24), torch.randn(2, 64)
    stack = stack_in_it()
    before = stack.data_ptr(), stack._version
    assert torch.equal(wrapper.add_lora_logits(y.clone(), x, a, stack, 1.0), y)
    # Not by torch, so that no tensor counts it as a write.
    memory[:] = b.numpy()
    if replaced == "stack":
        del stack
        stack = stack_in_it()
    else:
        stack.data = stack_in_it()
    assert (stack.data_ptr(), stack._version) == before
    wanted = y.double() + products(products(x, a, [3, 1]), b, [3, 1])
    made = wrapper.add_lora_logits(y.clone(), x, a, stack, 1.0)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-3)
    assert len(wrapper._looked_through) == 1


def layer_of(wrapper: Any, a: Any, b: Any) -> Any:
    """A layer that holds its stacks as vLLM's own do, given to a wrapper."""
    from vllm.lora.layers.base import BaseLayerWithLoRA

    layer: Any = BaseLayerWithLoRA()
    layer.lora_a_stacked, layer.lora_b_stacked = a, b
    layer.set_mapping(wrapper)
    return layer


def test_logits_of_drafts_are_refused_where_vllm_says_one_adapter_a_request() -> None:
    """As its second model runner does: here of three requests, the first of which has two drafts."""
    from xpu_lora_compile.errors import BatchError

    tokens = [2] * 3 + [3] * 4 + [1] * 6
    wrapper = wrapper_for(tokens, 3, sampled=[2, 3, 1])
    hidden, a, b = torch.randn(13, 16), torch.randn(3, 1, 4, 16), torch.randn(3, 1, 20, 4)
    gathered, y = hidden[[0, 1, 2, 6, 12]], torch.zeros(5, 20)
    with pytest.raises(BatchError, match="5 rows of which it is not known"):
        wrapper.add_lora_logits(y, gathered, a, b, 1.0)
    assert not y.any()
    # One row of each request, and rows that are the tokens of the batch, are known.
    for x, adapters in ((hidden[[2, 6, 12]], [2, 3, 1]), (hidden.clone(), tokens), (hidden[3:5], tokens[3:5])):
        made = wrapper.add_lora_logits(torch.zeros(len(x), 20), x, a, b, 1.0)
        wanted = products(products(x, a, adapters), b, adapters)
        torch.testing.assert_close(made.double(), wanted, atol=1e-4, rtol=1e-4)


def test_layers_store_their_stacks_by_rank_in_one_tensor() -> None:
    from vllm.lora.layers.base import BaseLayerWithLoRA

    wrapper, (a, b) = wrapper_for(MIXED, 3), stacks([16, 8])
    linear, logits = layer_of(wrapper, tuple(a), tuple(b)), layer_of(wrapper, a[0], b[0])
    sharded, plain = layer_of(wrapper, (a[0][:, :, :4],), (b[0],)), layer_of(None, tuple(a), tuple(b))
    several = layer_of(wrapper, (a[0].bfloat16(), a[1]), tuple(b))
    assert [stack.dtype for stack in several.lora_a_stacked] == [torch.bfloat16, torch.float32]
    assert linear.punica_wrapper is logits.punica_wrapper is wrapper
    packed = linear.lora_a_stacked[0].packed
    assert packed.shape == (3, 1, 8, 24 + 24 + 16 + 8)
    for stack, was in zip((*linear.lora_a_stacked, *linear.lora_b_stacked), (*a, *b), strict=True):
        assert torch.equal(stack, was)
        assert stack.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    for stack in (*linear.lora_b_stacked, logits.lora_b_stacked, *sharded.lora_b_stacked):
        assert stack.stride(-2) == 1
    assert torch.equal(logits.lora_b_stacked, b[0])
    assert torch.equal(sharded.lora_b_stacked[0], b[0])
    assert plain.lora_b_stacked[0] is b[0]
    assert b[0].is_contiguous()
    # Given to a wrapper again, and written to as `set_lora` does.
    linear.set_mapping(wrapper)
    assert linear.lora_a_stacked[0].packed is packed
    linear.lora_b_stacked[1][2, 0, :8, :4].copy_(torch.ones(8, 4))
    assert linear.lora_a_stacked[0].packed[2, 0, :4, -8:].eq(1).all()
    # A wrapper of each kind more makes no second change.
    wrapper_for(MIXED, 3)
    again = BaseLayerWithLoRA.set_mapping
    wrapper_for(MIXED, 3)
    assert BaseLayerWithLoRA.set_mapping is again


@torch.no_grad()
def test_expanding_replaces_or_adds_and_takes_strided_tensors() -> None:
    wrapper, (_, b) = wrapper_for(MIXED, 3), stacks([8, 8])
    hidden = torch.randn(8, 7, 2).permute(2, 1, 0)
    y = torch.randn(24, 7).t()
    before = y.clone()
    wrapper.add_expand(y, hidden, b, (8, 8), offset_start=4, add_inputs=False)
    wanted = before.double()
    for t, one in enumerate(MIXED):
        for s in range(2 if one else 0):
            wanted[t, 4 + 8 * s : 12 + 8 * s] = b[s][one - 1, 0].double() @ hidden[s, t].double()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_embedding_adds_and_a_classifier_replaces_its_rows() -> None:
    wrapper, (_, b) = wrapper_for(MIXED, 3), stacks([16])
    x, y = torch.randn(7, 8), torch.randn(7, 16)
    before = y.clone()
    wrapper.add_lora_embedding(y, x, b[0], add_input=True)
    torch.testing.assert_close(y.double(), before.double() + products(x, b[0], MIXED), rtol=1e-5, atol=1e-5)
    weights, bias, x = torch.randn(3, 1, 5, 24), torch.randn(3, 5), torch.randn(7, 24)
    y = torch.randn(7, 5)
    before = y.clone()
    wrapper.apply_lora_full_linear(y, x, weights, bias, torch.tensor([True, False, True]))
    for t, one in enumerate(MIXED):
        wanted = before[t] if one in (0, 2) else weights[one - 1, 0] @ x[t] + bias[one - 1]
        torch.testing.assert_close(y[t], wanted)


@torch.no_grad()
def test_an_embedding_may_get_its_tokens_with_a_batch_dimension() -> None:
    """As vLLM's Transformers backend gives them: the layer takes the first dimension for the number of tokens."""
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

    layer = VocabParallelEmbeddingWithLoRA.__new__(VocabParallelEmbeddingWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.base_layer = torch.nn.Embedding(512, 6)
    layer.lora_a_stacked, layer.lora_b_stacked = torch.randn(3, 512, 4), torch.randn(3, 1, 6, 4)
    layer.lora_a_stacked_2d = layer.lora_a_stacked.flatten(0, 1)
    layer.punica_wrapper = wrapper_for(MIXED, 3)
    tokens = torch.arange(7)
    rows = zip(layer.base_layer(tokens), tokens, MIXED, strict=True)
    wanted = [
        base + layer.lora_b_stacked[one - 1, 0] @ layer.lora_a_stacked[one - 1, token] if one else base
        for base, token, one in rows
    ]
    for given in (tokens, tokens[None]):
        torch.testing.assert_close(layer(given), torch.stack(wanted).view(*given.shape, 6))


@torch.no_grad()
@pytest.mark.parametrize("labels", [1, 2, 7, 100])
def test_a_shrink_may_have_any_rank(labels: int) -> None:
    # As a head that labels every token asks for it: all of its weights as A.
    wrapper = wrapper_for(MIXED, 3)
    x, weights, y = torch.randn(7, 24), torch.randn(3, 1, labels, 24), torch.full((1, 7, labels), torch.nan)
    wrapper.add_shrink(y, x, (weights,), 1.0)
    torch.testing.assert_close(y[0].double(), products(x, weights, MIXED), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layer_may_have_seven_slices() -> None:
    widths = (24, 8, 8, 16, 1, 5, 3)
    wrapper, (a, b) = wrapper_for(MIXED, 3), stacks([*widths])
    held = layer_of(wrapper, tuple(a), tuple(b))

    def layer(x: Tensor) -> Tensor:
        y = torch.zeros(len(x), sum(widths))
        return wrapper.add_lora_linear(y, x, held.lora_a_stacked, held.lora_b_stacked, 1.0, widths)

    x = torch.randn(7, 24)
    wanted = torch.cat([products(products(x, p, MIXED), q, MIXED) for p, q in zip(a, b, strict=True)], 1)
    compiled = torch.compile(layer, fullgraph=True, backend="xpu_lora", options={"xpu_lora.execute": "eager"})
    for made in (layer(x), compiled(x)):
        torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.skipif(
    not any("Token" in head for head in RELEASE.heads),
    reason="this release of vLLM has no head that labels every token",
)
def test_a_head_that_labels_every_token_gives_each_its_adapters_labels() -> None:
    from vllm.lora import layers
    from vllm.model_executor.layers.linear import ReplicatedLinear

    # Without vLLM's processes, which its own constructor asks for.
    base: Any = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(base)
    base.weight, base.bias = torch.nn.Parameter(torch.randn(4, 24)), torch.nn.Parameter(torch.randn(4))
    base.input_size, base.output_size, base.params_dtype, base.tp_size, base.tp_rank = 24, 4, torch.float32, 1, 0
    base.skip_bias_add = base.return_bias = False
    base.quant_method = SimpleNamespace(apply=lambda layer, x, bias: torch.nn.functional.linear(x, layer.weight, bias))
    head = layers.TokenClassificationHeadWithLoRA(base)
    sizes = {"max_lora_rank": 8, "max_lora_cls_labels": 7, "fully_sharded_loras": False, "lora_dtype": torch.float32}
    head.create_lora_weights(3, SimpleNamespace(**sizes))
    head.set_mapping(wrapper_for(MIXED, 3))
    # The first adapter has LoRA on the head, the other two bring heads of three and five labels along.
    a, b, bias = torch.randn(8, 24), torch.randn(4, 8), torch.randn(5)
    three, five = torch.randn(3, 24), torch.randn(5, 24)
    head.set_lora(0, a, b)
    head.set_module_to_save(1, three, None)
    head.set_module_to_save(2, five, bias)
    x = torch.randn(7, 24)
    for row, made, adapter in zip(x, head(x), MIXED, strict=True):
        own = base.weight @ row + base.bias
        wanted = {0: own, 1: own + b @ (a @ row), 2: three @ row, 3: five @ row + bias}[adapter]
        torch.testing.assert_close(made, torch.cat([wanted, torch.zeros(7 - len(wanted))]), rtol=1e-4, atol=1e-4)


TEXT, WHOLE = "model.layers.0.self_attn.o_proj", "language_model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("names", "taken"), [([TEXT], RELEASE.text_names), ([WHOLE], True), ([TEXT, WHOLE], False), (["model.x"], False)]
)
def test_an_adapter_may_have_the_names_of_the_language_model_alone(
    names: list[str], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.model_executor.models.module_mapping import MultiModelKeys

    from xpu_lora_compile.errors import UnmatchedTensorError
    from xpu_lora_compile.integrations.vllm_adapters import check_adapter

    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: SimpleNamespace(world_size=1))
    manager: Any = LoRAModelManager.__new__(LoRAModelManager)
    manager.modules = {WHOLE: SimpleNamespace(base_layer=None)}
    manager.packed_modules, manager.packed_modules_mapping = {}, {}
    manager.lora_config = SimpleNamespace(max_lora_rank=8, target_modules=None)
    manager.model, manager.is_pooling_model, manager.supports_mm = torch.nn.Module(), False, True
    manager.mm_mapping = MultiModelKeys.from_string_field(language_model="language_model")
    weights = {name: LoRALayerWeights(name, 8, 8, torch.ones(8, 24), torch.ones(24, 8)) for name in names}
    with nullcontext() if taken else pytest.raises(UnmatchedTensorError, match="of other modules: model"):
        check_adapter(manager, LoRAModel(1, 8, weights), "text")
    # vLLM goes on with the same.
    assert [manager._get_lora_layer_weights(LoRAModel(1, 8, weights), WHOLE)] == [
        weights.get(WHOLE) or (weights[TEXT] if taken else None)
    ]


@pytest.mark.parametrize("held", ["wrapped", "as it was"])
def test_lora_that_deepseeks_attention_would_leave_out_is_refused(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM puts the layer with LoRA into the module of the attention, or the module still has the one without."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    from xpu_lora_compile.errors import UnmatchedTensorError
    from xpu_lora_compile.integrations.vllm_adapters import check_adapter

    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: SimpleNamespace(world_size=1))
    model, attention = torch.nn.Module(), MLAAttention.__new__(MLAAttention)
    torch.nn.Module.__init__(attention)
    layers = {name: torch.nn.Module() for name in ("attn.kv_b_proj", "attn.o_proj")}
    for layer in layers.values():
        layer.base_layer = torch.nn.Linear(24, 24)
    kept = layers["attn.kv_b_proj"]
    attention.kv_b_proj, model.attn = kept if held == "wrapped" else kept.base_layer, attention
    config = SimpleNamespace(max_lora_rank=8, target_modules=None)
    manager = SimpleNamespace(model=model, modules=layers, packed_modules={}, lora_config=config)
    manager.is_pooling_model = False
    for name, b, refused in (("o_proj", 1.0, False), ("kv_b_proj", 0.0, False), ("kv_b_proj", 1.0, True)):
        weights = LoRALayerWeights(f"attn.{name}", 8, 8, torch.ones(8, 24), torch.full((24, 8), b))
        said = r"attn\.kv_b_proj: wanted LoRA on layers that vLLM's attention calls"
        with pytest.raises(UnmatchedTensorError, match=said) if refused else nullcontext():
            check_adapter(manager, LoRAModel(1, 8, {f"attn.{name}": weights}), "deepseek")


def test_rows_past_those_of_the_batch_have_no_adapter() -> None:
    from xpu_lora_compile.integrations.vllm_punica import XpuLoraPunicaWrapper

    fresh = XpuLoraPunicaWrapper(64, 64, device="cpu", lora_config=SimpleNamespace(max_loras=3))
    assert fresh._token_lora_indices.eq(-1).all()
    for adapters in ([3] * 40, MIXED, [1, 2] * 8):
        tell(fresh, adapters, 3)
        rows = len(adapters)
        assert fresh._token_lora_indices[:rows].tolist() == [one - 1 for one in adapters]
        assert fresh._token_lora_indices[rows:].eq(-1).all()
        assert fresh._sampler_indices[rows:].eq(-1).all()
        assert fresh._embeddings_indices[rows:].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("rows", [9, 5], ids=["more", "fewer"])
def test_a_layer_with_other_rows_than_the_batch_fails_with_its_name(rows: int) -> None:
    from xpu_lora_compile.errors import BatchError

    wrapper, (a, b) = wrapper_for(MIXED, 3), stacks([16])
    wrapper.names[id(b)] = "visual.blocks.0.attn.proj"
    x, y = torch.randn(rows, 24), torch.randn(rows, 16)
    wanted = f"visual.blocks.0.attn.proj: wanted the 7 tokens of the batch, .* got {rows} rows .* LoRA on `proj`"
    with pytest.raises(BatchError, match=wanted):
        wrapper.add_lora_linear(y, x, a, b, 1.0, (16,))
    # Adapters without LoRA on the layer, and a batch without adapters, cannot be wrong.
    before, zeros = y.clone(), [torch.zeros_like(b[0])]
    assert torch.equal(wrapper.add_lora_linear(y, x, a, zeros, 1.0, (16,)), before)
    tell(wrapper, [0] * 7, 3)
    assert torch.equal(wrapper.add_lora_linear(y, x, a, b, 1.0, (16,)), before)


@torch.no_grad()
def test_inside_an_encoder_every_row_is_one_adapters() -> None:
    from xpu_lora_compile.errors import BatchError

    wrapper, (a, b) = wrapper_for(MIXED, 3), stacks([16])
    x, y = torch.randn(2, 5, 24), torch.randn(2, 5, 16)
    before, wanted = y.clone(), products(products(x.view(10, 24), a[0], [2] * 10), b[0], [2] * 10).view(2, 5, 16)
    wrapper.enter_encoder(1)
    torch.testing.assert_close(wrapper.add_lora_linear(y, x, a, b, 1.0, (16,)), (before + wanted).float())
    wrapper.enter_encoder(-1)
    assert torch.equal(wrapper.add_lora_linear(before.clone(), x, a, b, 1.0, (16,)), before)
    wrapper.enter_encoder(None)
    with pytest.raises(BatchError, match="which tells whose items it encodes"):
        wrapper.add_lora_linear(y, x, a, b, 1.0, (16,))
    wrapper.enter_encoder(1)
    with pytest.raises(BatchError, match="no LoRA of an embedding inside an encoder"):
        wrapper.add_lora_embedding(torch.randn(4, 16), torch.randn(4, 8), b[0])
    wrapper.leave_encoder()
    assert torch.equal(
        wrapper.add_lora_linear(before[0, :1].clone(), x[0, :1], a, [b[0] * 0], 1.0, (16,)), before[0, :1]
    )


@torch.no_grad()
def test_a_batch_without_adapters_reads_no_weight() -> None:
    wrapper, (a, b) = wrapper_for([0] * 4, 3), stacks([16])
    y = torch.randn(4, 16)
    before = y.clone()
    wrapper.add_lora_linear(y, torch.full((4, 24), torch.nan), a, b, 1.0, (16,))
    wrapper.add_lora_logits(y, torch.full((4, 24), torch.nan), a[0], b[0], 1.0)
    assert torch.equal(y, before)


def batches_of(wrapper: Any) -> Iterator[Tensor]:
    """The inputs of one batch after another, whose adapters the wrapper has been told."""
    for adapters in (MIXED, [0, 0, 1], [0, 0, 0, 0]):
        tell(wrapper, adapters, 3)
        yield torch.randn(len(adapters), 24)


@torch.no_grad()
def test_a_traced_call_is_one_op_and_takes_other_batches() -> None:
    import xpu_lora_compile as xlc

    wrapper, (a, b) = wrapper_for(MIXED, 3), stacks([16, 8, 8])
    weight = torch.randn(32, 24)

    def layer(x: Tensor) -> Tensor:
        return wrapper.add_lora_linear(torch.nn.functional.linear(x, weight), x, a, b, 1.0, (16, 8, 8))

    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend="xpu_lora", options={"xpu_lora.execute": "eager"}
    )
    with xlc.record_decisions() as decisions:
        for x in batches_of(wrapper):
            torch.testing.assert_close(compiled(x), layer(x))
    (decision,) = decisions
    # In place: a copy of the output would be a second pass over it.
    assert not any("copy" in note for note in decision.notes)


@torch.no_grad()
@pytest.mark.parametrize("storage", ["packed", "apart", "one replaced"])
def test_generated_code_gets_a_layers_weights_as_one_tensor_and_the_indices_as_they_are(storage: str) -> None:
    from torch._inductor.utils import run_and_get_code

    import xpu_lora_compile as xlc

    wrapper, (a, b) = wrapper_for(MIXED, 3), stacks([16, 8, 8])
    held = layer_of(None if storage == "apart" else wrapper, tuple(a), tuple(b))
    if storage == "one replaced":
        held.lora_b_stacked = (*held.lora_b_stacked[:2], torch.randn(3, 1, 8, 8))
    weight = torch.randn(32, 24)

    def layer(x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, weight)
        return wrapper.add_lora_linear(y, x, held.lora_a_stacked, held.lora_b_stacked, 1.0, (16, 8, 8))

    compiled = torch.compile(layer, fullgraph=True, backend="xpu_lora")

    def serve() -> None:
        for x in batches_of(wrapper):
            held.lora_a_stacked[1][1] = torch.randn(8, 24)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), layer(x))

    with xlc.record_decisions() as decisions:
        _, codes = run_and_get_code(serve)
    assert len(decisions) == 1
    (call,) = (line for code in codes for line in code.split("\n") if line.strip().startswith("torch.ops.xpu_lora."))
    assert f"native_add_{'packed' if storage == 'packed' else 'slices'}.default(" in call
    # A view of some indices would be made anew for each call.
    assert "reinterpret_tensor" not in call


def test_lora_of_experts_that_processes_share_is_vllms_own() -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from xpu_lora_compile.integrations.vllm_punica import XpuLoraPunicaWrapper

    assert issubclass(XpuLoraPunicaWrapper, PunicaWrapperCPU)
    for name in ("add_lora_fused_moe", "moe_lora_align_block_size"):
        assert getattr(XpuLoraPunicaWrapper, name) is getattr(PunicaWrapperCPU, name)
    # A CPU's has none.
    experts, a, b = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(3, 4, 8, 24), torch.zeros(3, 4, 16, 8)
    operands = (torch.zeros(2, 1, 16), torch.zeros(2, 24), (a,), (b,), experts, torch.ones(2, 1))
    for expert_map, fully_sharded in ((torch.arange(4), False), (None, True)):
        rest = (None, None, 2, 1, 3, torch.ones(4), 4, 1, 1, fully_sharded, False)
        with pytest.raises(NotImplementedError):
            wrapper_for([1, 0], 3).add_lora_w13(*operands, expert_map, *rest, add_inputs=True)
