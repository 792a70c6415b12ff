"""Mixtures of experts on a CPU: of the kind of Mixtral and of Qwen3-MoE, with adapters in each form of experts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.conftest import Engine
from integrations.served import LENGTHS, Served, started
from integrations.test_wrapper import wrapper_for
from safetensors.torch import load_file, save_file
from torch import Tensor

from xpu_lora_compile.errors import (
    AdapterShapeError,
    AttachError,
    BatchError,
    NonFiniteWeightError,
    RankError,
    UnmatchedTensorError,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, tuple[list[str] | str, list[str]]] = {
    "attention": (ATTENTION, []),
    "down": ([], PARAMETERS[1:]),
    "experts": (ATTENTION, PARAMETERS),
    # PEFT's own choice: attention and experts, gate and up with twice the rank and alpha of their own; and the router.
    "all": ("all-linear", []),
}
NAMES = {
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}


@pytest.fixture(scope="module", autouse=True)
def _plugin() -> None:
    from xpu_lora_compile.integrations.vllm import register

    register()


@pytest.fixture(scope="module", autouse=True)
def _group_of_experts() -> None:
    """vLLM makes groups of processes once a process, and where the first model has no experts, none for these."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        # Of one process, as all groups of these engines.
        parallel_state._EP = parallel_state._TP


def made(kind: str) -> Any:
    """A model of two layers."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 515, "tie_word_embeddings": False}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96}
    model: Any
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    else:
        # 48 columns are no multiple of what vLLM's own kernel takes.
        experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    return model


def served(kind: str, folder: Path) -> Served:
    """A model with its adapters, one of which is there in two forms."""
    adapters = {
        name: {"target_modules": modules, "target_parameters": parameters}
        for name, (modules, parameters) in ADAPTERS.items()
    }
    made_of = Served(made(kind), adapters, folder)
    expert_by_expert(kind, folder / "experts", folder / "single")
    made_of.wanted |= {("single", number): made_of.wanted["experts", number] for number in range(len(LENGTHS))}
    return made_of


def expert_by_expert(kind: str, source: Path, folder: Path) -> None:
    """Write an adapter of PEFT's form in the form that names each expert."""
    block, names = NAMES[kind]
    count = 4 if kind == "mixtral" else 8
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(source / "adapter_model.safetensors").items():
        owner, found, rest = key.partition(".mlp.experts.")
        if not found:
            tensors[key] = value
            continue
        factor = rest.removeprefix("base_layer.")
        for expert in range(count):
            of_a = value.reshape(count, -1, value.shape[1])[expert] if "lora_A" in factor else None
            of_b = value.reshape(len(value), -1, count)[:, :, expert]
            halves = [("down", of_b)] if factor == rest else list(zip(("gate", "up"), of_b.chunk(2), strict=True))
            for name, half in halves:
                tensor = half if of_a is None else of_a
                tensors[f"{owner}.{block}.experts.{expert}.{names[name]}.{factor}"] = tensor.clone().contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": None}))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def eager(qwen3_moe: Served) -> Engine:
    return started(qwen3_moe)


# Both slots taken in each; all prompts of one name in one batch.
PAIRS = [("attention", "experts"), ("experts", "down"), ("single", "attention"), ("all", "down")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_row_is_its_adapters(eager: Engine, qwen3_moe: Served, pair: tuple[str, str]) -> None:
    assert qwen3_moe.differing(eager, qwen3_moe.rows(None, *pair)) == []


def test_a_batch_without_adapters_is_the_base_models(eager: Engine, qwen3_moe: Served) -> None:
    assert qwen3_moe.differing(eager, [(None, 0), (None, 2)]) == []


def test_the_model_is_compiled_with_its_experts_in_one_graph(mixtral: Served, capfd: Any) -> None:
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    engine = started(mixtral, enforce_eager=False)
    assert counters["stats"]["unique_graphs"] - before == 1
    assert not counters["graph_break"]
    for pair in PAIRS:
        assert mixtral.differing(engine, mixtral.rows(None, *pair)) == []


def test_experts_that_are_not_targeted_are_vllms_own(mixtral: Served) -> None:
    engine = started(mixtral, lora_target_modules=["qkv_proj", "o_proj"])
    (experts, *_) = engine.runner.vllm_config.compilation_config.static_all_moe_layers
    runner = engine.runner.vllm_config.compilation_config.static_forward_context[experts]
    assert runner.routed_experts.quant_method.experts_cls.__name__ != "CpuLoraExperts"
    assert mixtral.differing(engine, mixtral.rows(None, "attention")) == []


@pytest.mark.parametrize("option", ["fully_sharded_loras", "enable_moe_shared_loras"])
def test_factors_that_are_shared_are_refused_as_it_starts(mixtral: Served, option: str) -> None:
    with pytest.raises(AttachError, match=r"layers\.0\.block_sparse_moe\.experts: wanted LoRA of each expert, whole"):
        started(mixtral, **{option: True})


def refused(**differs: Any) -> str:
    from xpu_lora_compile.integrations.vllm_experts import _refuse

    parallel = {"use_ep": False, "is_sequence_parallel": False, "use_all2all_kernels": False, "dp_size": 1}
    parallel["tp_size"] = 1
    moe: dict[str, Any] = {"is_act_and_mul": True, "activation": SimpleNamespace(value="silu"), "swiglu_limit": None}
    moe["moe_parallel_config"] = SimpleNamespace(**{key: differs.get(key, value) for key, value in parallel.items()})
    config = SimpleNamespace(lora_config=SimpleNamespace(fully_sharded_loras=False, enable_moe_shared_loras=False))
    with pytest.raises(AttachError) as error:
        _refuse(
            "layers.3.experts", SimpleNamespace(**{key: differs.get(key, value) for key, value in moe.items()}), config
        )
    return str(error.value)


def test_deployments_that_it_does_not_compute_are_refused_with_the_way_out() -> None:
    for option in ("use_ep", "is_sequence_parallel", "use_all2all_kernels"):
        assert "layers.3.experts: wanted a CPU's experts in one process" in refused(**{option: True})
    assert "got data parallelism. Start vLLM without it" in refused(dp_size=2)
    assert "got tensor parallelism. Start vLLM without it" in refused(tp_size=2)
    assert "got silu. Serve this model on another device" in refused(is_act_and_mul=False)
    assert "silu with a limit of 7.0" in refused(swiglu_limit=7.0)
    oai = refused(activation=SimpleNamespace(value="swigluoai"))
    assert "got swigluoai" in oai
    assert "--lora-target-modules" in oai


def test_quantized_experts_are_refused(mixtral: Served, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(mixtral.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    linear = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ATTENTION]
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    fp8["ignored_layers"] = linear
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    served = SimpleNamespace(folder=folder)
    with pytest.raises(AttachError, match=r"block_sparse_moe\.experts: wanted experts in float32, bfloat16 or float16"):
        started(served, dtype="bfloat16")  # type: ignore[arg-type]


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """A copy of an adapter with other tensors and another config."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def load(engine: Engine, folder: Path) -> Any:
    """What vLLM's worker reads of an adapter."""
    from vllm.lora.request import LoRARequest

    return engine.runner.lora_manager._load_adapter(LoRARequest("changed", 77, str(folder)))


def wrapped_the_other_way_around(tensors: dict[str, Tensor]) -> None:
    for inner in [name for name in tensors if ".experts.base_layer." in name]:
        outer = inner.replace("base_layer.", "")
        tensors[inner], tensors[outer] = tensors[outer], tensors[inner]


INNER = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
DOWN = "base_model.model.model.layers.1.mlp.experts.5.down_proj.lora_{}.weight"
WRONG: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], dict[str, Any], type[Exception], str]] = {
    "half of a pair": ("experts", lambda t: t.pop(INNER), {}, UnmatchedTensorError, "both lora_A and lora_B"),
    "a size": (
        "experts",
        lambda t: t.update({INNER: t[INNER][:, :60].contiguous()}),
        {},
        AdapterShapeError,
        r"base_layer: wanted lora_A \[8 R, 64\] and lora_B \[96, 8 R\], or lora_A \[8 R, 48\]",
    ),
    "a rank in the config alone": ("experts", lambda _: None, {"r": 2}, AdapterShapeError, "one pair of rank 2"),
    "a rank of a parameter that vLLM takes for the other": (
        "experts",
        wrapped_the_other_way_around,
        {"alpha_pattern": {"mlp.experts.down_proj": 32}},
        UnmatchedTensorError,
        "got alpha_pattern 'mlp.experts.down_proj'",
    ),
    "a number of no expert": (
        "single",
        lambda t: t.update({DOWN.format(f).replace("5", "8"): t[DOWN.format(f)].clone() for f in "AB"}),
        {},
        (ValueError, UnmatchedTensorError),  # type: ignore[dict-item]
        "experts.8",
    ),
    "NaN": ("experts", lambda t: t[INNER].fill_(math.nan), {}, NonFiniteWeightError, "finite"),
    "a rank too high": (
        "single",
        lambda t: t.update({DOWN.format("A"): torch.ones(9, 48), DOWN.format("B"): torch.ones(64, 9)}),
        {},
        RankError,
        "a rank up to 8",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_experts_are_refused(eager: Engine, qwen3_moe: Served, tmp_path: Path, kind: str) -> None:
    source, change, config, error, said = WRONG[kind]
    folder = changed(qwen3_moe.folder / source, tmp_path / "changed", change, **config)
    with pytest.raises(error, match=said):
        load(eager, folder)


def test_experts_that_an_adapter_lacks_are_zeros(eager: Engine, qwen3_moe: Served, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for factor in "AB":
            del tensors[DOWN.format(factor)]

    whole = load(eager, qwen3_moe.folder / "single").loras["model.layers.1.mlp.experts"]
    part = load(eager, changed(qwen3_moe.folder / "single", tmp_path / "part", change)).loras[whole.module_name]
    for products in zip(whole.lora_b, part.lora_b, strict=True):
        others = [expert for expert in range(8) if expert != 5]
        torch.testing.assert_close(products[0][others], products[1][others], rtol=0, atol=0)
    assert whole.lora_b[1][5].any()
    assert not part.lora_b[1][5].any()
    torch.testing.assert_close(whole.lora_b[0], part.lora_b[0], rtol=0, atol=0)


def mixture(slots: int = 3, experts: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    """Stacks of gate and up, of different values: D 24, I 16, rank 8."""
    a = [torch.randn(slots, experts, 8, 24) for _ in range(2)]
    return a, [torch.randn(slots, experts, 16, 8) for _ in range(2)]


ROWS = [2, 0, 1, 3, 0, 2, 3]


def added(x: Tensor, a: Tensor, b: Tensor, experts: Tensor) -> Tensor:
    """What LoRA adds to each pair of a token and an expert, in float64."""
    result = torch.zeros(*experts.shape, b.shape[-2], dtype=torch.float64)
    for token, adapter in enumerate(ROWS):
        for place, expert in enumerate(experts[token].tolist()):
            if adapter:
                row = x[token, place].double() if x.dim() == 3 else x[token].double()
                result[token, place] = b[adapter - 1, expert].double() @ (a[adapter - 1, expert].double() @ row)
    return result


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_lora_behind_vllms_seams(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wrapper = wrapper_for(ROWS, 3)
    a, b = ([stack.to(dtype) for stack in stacks] for stacks in mixture())
    x, y = torch.randn(len(ROWS), 24).to(dtype), torch.randn(len(ROWS), 2, 32).to(dtype)
    experts = torch.randint(0, 4, (len(ROWS), 2), dtype=torch.int32)
    weights = torch.rand(len(ROWS), 2)
    rest = (None, None, len(ROWS), 2, 3, torch.ones(4), 4, 2, 2, False, False)
    wanted = y.double() + torch.cat([added(x, *pair, experts) for pair in zip(a, b, strict=True)], -1)
    routing = wrapper.add_lora_w13(y, x, tuple(a), tuple(b), experts, weights, None, *rest)
    torch.testing.assert_close(y.double(), wanted, **_tolerance(dtype))
    inner, z = torch.randn(len(ROWS) * 2, 24).to(dtype), torch.randn(len(ROWS), 2, 16).to(dtype)
    wanted = z.double() + weights.unsqueeze(-1) * added(inner.view(len(ROWS), 2, 24), a[0], b[0], experts)
    last = (len(ROWS), None, None, 2, 3, torch.ones(4), 2, False, 0, False)
    wrapper.add_lora_w2(z, inner, (a[0],), (b[0],), weights, *routing, *last, add_inputs=True)
    torch.testing.assert_close(z.double(), wanted, **_tolerance(dtype))


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-2}


def test_rows_that_vllm_has_not_mapped_are_refused() -> None:
    wrapper = wrapper_for(ROWS, 3)
    a, b = mixture()
    rest = (None, None, 3, 2, 3, torch.ones(4), 4, 2, 2, False, False)
    x, y, experts = torch.randn(3, 24), torch.randn(3, 2, 32), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(BatchError, match="3 rows of which it is not known"):
        wrapper.add_lora_w13(y, x, tuple(a), tuple(b), experts, torch.ones(3, 2), None, *rest)


@torch.no_grad()
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_experts_with_biases_and_other_activations(activation: str, on_input: bool) -> None:
    from torch.nn import functional

    from xpu_lora_compile.integrations.vllm_experts import cpu_lora_experts

    torch.manual_seed(0)
    a, b = mixture()
    down_a, down_b = torch.randn(3, 4, 8, 16), torch.randn(3, 4, 24, 8)
    w1, w2, bias1, bias2 = torch.randn(4, 32, 24), torch.randn(4, 24, 16), torch.randn(4, 32), torch.randn(4, 24)
    layer: Any = object.__new__(cpu_lora_experts())
    layer.quant_config = SimpleNamespace(w1_bias=bias1, w2_bias=bias2)
    stacks = {"w13_lora_a_stacked": tuple(a), "w13_lora_b_stacked": tuple(b)}
    stacks |= {"w2_lora_a_stacked": (down_a,), "w2_lora_b_stacked": (down_b,)}
    layer.set_lora_context(SimpleNamespace(**stacks, punica_wrapper=wrapper_for(ROWS, 3)))
    x, output = torch.randn(len(ROWS), 24), torch.full((len(ROWS), 24), math.nan)
    experts, weights = torch.randint(0, 4, (len(ROWS), 2), dtype=torch.int32), torch.rand(len(ROWS), 2)
    kind = SimpleNamespace(value=activation)
    layer.apply(output, x, w1, w2, weights, experts, kind, apply_router_weight_on_input=on_input)
    picked = experts.long()
    halves = torch.einsum("td,tkhd->tkh", x.double(), w1[picked].double()) + bias1[picked]
    halves = halves + torch.cat([added(x, *pair, experts) for pair in zip(a, b, strict=True)], -1)
    gate, up = halves.chunk(2, -1)
    if activation == "silu":
        inner = functional.silu(gate) * up
    else:
        inner = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
    result = torch.einsum("tki,tkdi->tkd", inner, w2[picked].double()) + bias2[picked]
    result = result + added(inner, down_a, down_b, experts)
    wanted = (result if on_input else result * weights.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(output.double(), wanted, rtol=1e-4, atol=1e-2)
