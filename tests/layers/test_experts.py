"""LoRA on experts: families of transformers, forms of files, next to PEFT for each adapter alone; pages and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from support.artifacts import save_files
from support.mixtures import (
    FAMILIES,
    assert_rows,
    experts_of,
    logits,
    logits_by_peft,
    mixture,
    save_forms,
    save_fused,
    token_ids,
)
from support.peft_folders import edited_weights
from torch import Tensor
from torch.fx import GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import AdapterError, ArtifactError, AttachError, NoFreePageError
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.layers import experts as experts_module
from xpu_lora_compile.passes.text import as_text


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def tokens() -> Tensor:
    return token_ids()


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_each_row_has_its_own_adapters_experts(
    family: str, implementation: str, tmp_path: Path, tokens: Tensor
) -> None:
    folders = {name: save_fused(family, tmp_path / name, seed) for seed, name in enumerate("ab")}
    wanted: dict[str | None, Tensor] = {None: logits_by_peft(family, None, tokens)}
    wanted |= {name: logits_by_peft(family, folder, tokens) for name, folder in folders.items()}
    assert all((wanted[name] - wanted[None]).abs().max() > 1e-3 for name in "ab")
    model = mixture(family, implementation)
    bank = xlc.attach(model, adapters=folders)
    names: list[str | None] = ["b", None, "a", "b"]
    with bank.use(names):
        assert_rows(logits(model, tokens), wanted, names)
    with bank.use(["a"] * 4):
        assert_rows(logits(model, tokens), wanted, ["a"] * 4)
    plain = logits(mixture(family, implementation), tokens)
    assert torch.equal(logits(model, tokens), plain)
    bank.detach()
    assert torch.equal(logits(model, tokens), plain)


# Llama 4 turns queries and keys as complex numbers.
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("Mixtral", "grouped_mm"),
        ("Qwen2Moe", "grouped_mm"),
        ("Qwen3Moe", "batched_mm"),
        ("DeepseekV3", "grouped_mm"),
        ("Olmoe", "batched_mm"),
        ("GptOss", "eager"),
        ("Llama4Text", "eager"),
    ],
)
def test_it_is_one_graph_for_all_adapters(family: str, implementation: str, tmp_path: Path, tokens: Tensor) -> None:
    folders = {name: save_fused(family, tmp_path / name, seed) for seed, name in enumerate("abc")}
    model = mixture(family, implementation)
    bank = xlc.attach(model, adapters={name: folders[name] for name in "ab"}, slots=2)
    # Inductor takes most of a minute for each family; what it makes of one is what it makes of others.
    options = {} if family in ("Qwen3Moe", "GptOss") else {"xpu_lora.execute": "eager"}
    compiled = torch.compile(model, backend="xpu_lora", fullgraph=True, options=options)
    names: list[str | None] = ["b", None, "a", "b"]
    wanted = {name: logits_by_peft(family, folders.get(name), tokens) for name in (*"abc", None)}
    with bank.use(names):
        assert_rows(logits(compiled, tokens), wanted, names)
    bank.drop("b")
    bank.load("c", folders["c"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for others in (["c", "a", None, None], ["a", "c", "c", None]):
            with bank.use(others):
                assert_rows(logits(compiled, tokens), wanted, list(others))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_tiles_are_made_of_the_order_that_the_layer_sorts_its_rows_in(tmp_path: Path, tokens: Tensor) -> None:
    folders = {name: save_fused("Mixtral", tmp_path / name, seed) for seed, name in enumerate("ab")}
    model = mixture("Mixtral", "grouped_mm")
    bank = xlc.attach(model, adapters=folders)
    names: list[str | None] = ["b", None, "a", "b"]
    texts: list[str] = []

    def backend(module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        xlc.rewrite(module)
        texts.append(as_text(module))
        return module.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with bank.use(names), force_kernel("triton"):
        wanted = logits(model, tokens)
        torch.testing.assert_close(logits(compiled, tokens), wanted, atol=1e-4, rtol=1e-4)
    (text,) = texts
    routed = [line for line in text.splitlines() if "route_tiles" in line and "ends=" in line]
    assert len(routed) == len(experts_of(model))
    assert "sorted_indices" not in text


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_file_is_the_same_adapter(family: str, tmp_path: Path, tokens: Tensor) -> None:
    folders = save_forms(family, tmp_path, seed=3)
    wanted = logits_by_peft(family, folders["fused"], tokens)
    assert (wanted - logits_by_peft(family, None, tokens)).abs().max() > 1e-3
    model = mixture(family)
    other = save_fused(family, tmp_path / "other", 5)
    bank = xlc.attach(model, adapters=folders | {"other": other})
    names: list[str | None] = list(folders)
    with bank.use(names):
        assert_rows(logits(model, tokens), dict.fromkeys(names, wanted), names)
    by_name: dict[str | None, Tensor] = dict.fromkeys(names, wanted)
    by_name |= {"other": logits_by_peft(family, other, tokens), None: logits_by_peft(family, None, tokens)}
    compiled = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    for mixed in (["single", "other", None, "shared"], [None, "stacked", "fused", "other"]):
        with bank.use(mixed):
            assert_rows(logits(compiled, tokens), by_name, list(mixed))


def test_peft_reads_the_names_of_single_experts_as_we_do(tmp_path: Path, tokens: Tensor) -> None:
    folder = save_forms("Mixtral", tmp_path, seed=3)["single"]
    model = mixture("Mixtral")
    bank = xlc.attach(model, adapters={"a": folder})
    with bank.use(["a"] * 4):
        torch.testing.assert_close(
            logits(model, tokens), logits_by_peft("Mixtral", folder, tokens), atol=2e-6, rtol=1e-5
        )
    assert experts_of(model)


def test_what_no_token_uses_changes_nothing(tmp_path: Path, tokens: Tensor) -> None:
    """NaN in each page but those of the experts that the tokens of a slot are sent to."""
    folders = {name: save_fused("Qwen3Moe", tmp_path / name, seed) for seed, name in enumerate("ab")}
    model: Any = mixture("Qwen3Moe")
    bank = xlc.attach(model, adapters=folders, slots=3)
    names: list[str | None] = ["a", None, "b", "a"]
    with bank.use(names):
        wanted = logits(model, tokens)
    used: dict[str, set[tuple[int, int]]] = {}
    slots = torch.tensor([0, -1, 1, 0]).repeat_interleave(tokens.shape[1])

    def note(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            pairs = zip(slots.tolist(), inputs[1].tolist(), strict=True)
            used[name] = {(slot, expert) for slot, experts in pairs for expert in experts if slot >= 0}

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in experts_of(model).items()]
    with bank.use(names):
        logits(model, tokens)
    for handle in handles:
        handle.remove()
    poisoned = 0
    for name, module in experts_of(model).items():
        held: Any = module
        pages = {int(held.lora_pages[pair]) for pair in used[name]}
        for page in set(range(held.page_count)) - pages:
            for parameter in held.lora_parameters:
                held._buffers[f"lora_a_{parameter}"][page] = torch.nan
                held._buffers[f"lora_b_{parameter}"][page] = torch.nan
            poisoned += 1
    assert poisoned
    with bank.use(names):
        assert torch.equal(logits(model, tokens), wanted)


def test_an_adapter_takes_pages_for_the_experts_that_it_changes(tmp_path: Path, tokens: Tensor) -> None:
    def keep_two_experts(weights: dict[str, torch.nn.Parameter]) -> None:
        for name, weight in weights.items():
            if ".experts." in name and "lora_B" in name:
                weight.data.view(weight.shape[0], -1, 8)[:, :, 2:] = 0

    few = save_fused("Qwen3Moe", tmp_path / "few", 0, keep_two_experts)
    whole = save_fused("Qwen3Moe", tmp_path / "whole", 1)
    model = mixture("Qwen3Moe")
    bank = xlc.attach(model, target_parameters=["gate_up_proj", "down_proj"], expert_pages=10, max_rank=3, slots=3)
    bank.load("few", few)
    assert "4 of 20 pages of experts taken" in " ".join(repr(bank).split())
    bank.load("whole", whole)
    before = repr(bank)
    with pytest.raises(NoFreePageError, match=r"free pages for 2 experts; got 0 of 10.*expert_pages"):
        bank.load("again", few)
    assert repr(bank) == before
    names: list[str | None] = ["few", "whole", None, "few"]
    wanted = {
        "few": logits_by_peft("Qwen3Moe", few, tokens),
        "whole": logits_by_peft("Qwen3Moe", whole, tokens),
        None: logits_by_peft("Qwen3Moe", None, tokens),
    }
    with bank.use(names):
        assert_rows(logits(model, tokens), wanted, names)
    bank.drop("few")
    bank.load("again", few)
    with bank.use(["again"] * 4):
        assert_rows(logits(model, tokens), wanted | {"again": wanted["few"]}, ["again"] * 4)


def test_a_bank_that_memory_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpu_lora_compile.layers.attach.free_memory", lambda device: 10_000)
    model = mixture("Qwen3Moe")
    with pytest.raises(AttachError, match=r"room in the 0.00 GB that cpu has free; got 8 slots.*expert_pages="):
        xlc.attach(model, target_parameters=["gate_up_proj", "down_proj"])
    assert not any(hasattr(module, "lora_routing") for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(next(key for key in tensors if key.endswith("experts.lora_A.weight"))),
            "no lora_A",
        ),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1.mlp.experts.lora_" in key],
            r"none of model.layers.1.mlp.experts.down_proj",
        ),
        (
            lambda tensors: tensors.update(
                {key: value[:-1] for key, value in tensors.items() if key.endswith("base_layer.lora_A.weight")}
            ),
            r"shapes \[24, 32\] and \[48, 24\] of model.layers.0.mlp.experts.gate_up_proj",
        ),
    ],
)
def test_broken_files_are_refused_and_leave_the_bank(change: Any, message: str, tmp_path: Path) -> None:
    folder = save_fused("Qwen3Moe", tmp_path, 0)
    with edited_weights(folder) as tensors:
        change(tensors)
    bank = xlc.attach(mixture("Qwen3Moe"), target_parameters=["gate_up_proj", "down_proj"], max_rank=3)
    before = repr(bank)
    with pytest.raises(AdapterError, match=message):
        bank.load("a", folder)
    assert repr(bank) == before


def test_where_both_sizes_fit_the_file_is_refused(tmp_path: Path) -> None:
    """Of experts without gates as wide as the model either parameter could be meant."""
    config = transformers.NemotronHConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, layers_block_type=["moe"], num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_groups=1,
        moe_shared_expert_intermediate_size=16, intermediate_size=16, mamba_num_heads=2, mamba_head_dim=8, head_dim=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = [name for name, module in model.named_modules() if name.endswith("experts") and hasattr(module, "up_proj")]
    tensors = {}
    for name in names:
        for path in (name, f"{name}.base_layer"):
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(4 * 2, 16)
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(16, 4 * 2)
    settings = {"r": 2, "target_modules": [], "target_parameters": ["experts.up_proj", "experts.down_proj"]}
    folder = save_files(tmp_path / "a", tensors, {"peft_type": "LORA", "lora_alpha": 2} | settings)
    with pytest.raises(
        AdapterError, match=r"sizes of one parameter; got .*up_proj.*down_proj.*names of single experts"
    ):
        xlc.attach(model, adapters={"a": folder})


def test_adapters_without_experts_of_a_layer_are_served_beside_others(tmp_path: Path, tokens: Tensor) -> None:
    def drop_first_layer(weights: dict[str, torch.nn.Parameter]) -> None:
        for name, weight in weights.items():
            if ".layers.0.mlp.experts." in name and "lora_B" in name:
                weight.data.zero_()

    folders = {
        "experts": save_fused("Qwen3Moe", tmp_path / "experts", 0),
        "plain": save_fused("Qwen3Moe", tmp_path / "plain", 1, target_parameters=None),
        "second": save_fused("Qwen3Moe", tmp_path / "second", 2, drop_first_layer),
    }
    model = mixture("Qwen3Moe")
    bank = xlc.attach(model, adapters=folders)
    names: list[str | None] = ["plain", "experts", None, "second"]
    wanted = {name: logits_by_peft("Qwen3Moe", folders.get(name), tokens) for name in (*folders, None)}
    with bank.use(names):
        assert_rows(logits(model, tokens), wanted, names)


def test_half_of_an_expert_is_refused(tmp_path: Path) -> None:
    folder = save_forms("Mixtral", tmp_path, seed=3)["single"]
    with edited_weights(folder) as tensors:
        for factor in "AB":
            del tensors[f"base_model.model.model.layers.0.mlp.experts.1.w1.lora_{factor}.weight"]
    with pytest.raises(AdapterError, match=r"gate and up of each expert.*got up alone of expert 1"):
        xlc.attach(mixture("Mixtral"), adapters={"a": folder})


def test_an_implementation_that_is_not_ours_is_refused_in_a_block(tmp_path: Path, tokens: Tensor) -> None:
    model: Any = mixture("Mixtral")
    bank = xlc.attach(model, adapters={"a": save_fused("Mixtral", tmp_path, 0)})
    model.config._experts_implementation = "sonicmoe"
    with bank.use(["a"] * 4), pytest.raises(AttachError, match=r"set_experts_implementation\(\"grouped_mm\"\)"):
        logits(model, tokens)


def test_a_parameter_that_is_none_is_named_with_those_that_are() -> None:
    with pytest.raises(AttachError, match=r"experts.down_proj, experts.gate_up_proj, gate.weight.*got 'experts.w1'"):
        xlc.attach(mixture("Mixtral"), target_parameters=["experts.w1"])


def test_gradients_reach_the_experts_of_the_rows(tmp_path: Path, tokens: Tensor) -> None:
    """As autograd has them of PEFT's own factors, here joined by page."""
    folder = save_fused("Mixtral", tmp_path, 0)
    model: Any = mixture("Mixtral")
    bank = xlc.attach(model, adapters={"a": folder})
    held: Any = experts_of(model)["model.layers.1.mlp.experts"]
    stack = held.lora_b_down_proj.requires_grad_()
    with bank.use(["a", None, "a", None]):
        model(tokens).logits.pow(2).sum().backward()
    peft: Any = PeftModel.from_pretrained(mixture("Mixtral"), folder, is_trainable=True)
    peft(tokens[::2]).logits.pow(2).sum().backward()
    of_peft = peft.base_model.model.model.layers[1].mlp.experts
    wanted = of_peft.lora_B["default"].weight.grad
    pages = held.lora_pages[0]
    # PEFT's B is not scaled.
    got = stack.grad[pages].permute(1, 2, 0).reshape(wanted.shape) * of_peft.scaling["default"]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_copy_of_the_model_has_its_own_experts(tmp_path: Path, tokens: Tensor) -> None:
    model = mixture("Mixtral")
    bank = xlc.attach(model, adapters={"a": save_fused("Mixtral", tmp_path, 0)})
    other = copy.deepcopy(model)
    xlc.detach(other)
    assert torch.equal(logits(other, tokens), logits(mixture("Mixtral"), tokens))
    assert "lora" not in " ".join(model.state_dict())
    assert bank.names == ("a",)


def test_verify_and_explain_see_every_product_of_experts(tmp_path: Path, tokens: Tensor) -> None:
    model = mixture("Mixtral")
    bank = xlc.attach(model, adapters={"a": save_fused("Mixtral", tmp_path, 0)}, slots=2)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with bank.use(["a", None, "a", None]):
        found = xlc.verify(model)(tokens)
        report = xlc.explain(model)(tokens)
    assert all(site.is_right for site in found.sites)
    assert not any(found.isolation.values())
    experts = [site for site in report.sites if site.module.endswith(".experts")]
    assert len(experts) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_file_of_export_holds_no_experts(tmp_path: Path, tokens: Tensor) -> None:
    model = mixture("Mixtral")
    bank = xlc.attach(model, adapters={"a": save_fused("Mixtral", tmp_path, 0)})
    with (
        bank.use(["a"] * 4),
        pytest.raises(ArtifactError, match=r"LoRA on experts, routers or convolutions, model.layers.0"),
    ):
        xlc.export(model, tmp_path / "model.pt2", (tokens,))


@pytest.mark.parametrize("few", [False, True], ids=["many-rows", "few-rows"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_calls_that_nothing_looks_at_take_shorter_ways(
    family: str, few: bool, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: save_fused(family, tmp_path / name, seed) for seed, name in enumerate("ab")}
    wanted = {name: logits_by_peft(family, folders.get(name), tokens) for name in (*"ab", None)}
    model = mixture(family)
    bank = xlc.attach(model, adapters=folders)
    names: list[str | None] = ["b", None, "a", "b"]
    with bank.use(names):
        # Followed op by op.
        logits(model, tokens)
        monkeypatch.setattr(experts_module, "_is_few", lambda experts, _: few and experts_module._is_plain(experts))
        monkeypatch.setattr(experts_module, "_grouped" if few else "_one_by_one", None)
        assert_rows(logits(model, tokens), wanted, names)


def test_a_tokens_rows_are_rounded_once_in_a_compiled_graph_too() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, weights = (torch.randn(sizes, generator=draw).bfloat16() for sizes in ((400, 32), (50, 8)))
    order = torch.randperm(400, generator=draw)
    with torch.no_grad():
        got = torch.compile(experts_module._summed, backend="eager", fullgraph=True)(rows, order, weights)
    exact = (rows.double()[torch.argsort(order)] * weights.double().reshape(-1, 1)).view(50, 8, 32).sum(1)
    # Each product is rounded to bfloat16, as the model's own are; sums of them are not.
    products = (rows[torch.argsort(order)] * weights.reshape(-1, 1)).double().view(50, 8, 32).sum(1)
    torch.testing.assert_close(got.double(), products, atol=1e-5, rtol=1e-5)
    assert (got.double() - exact).abs().max() < 0.05


def test_few_rows_are_those_of_few_experts_on_a_cpu_that_nothing_looks_at() -> None:
    with torch.no_grad():
        assert experts_module._is_few(torch.zeros(2, dtype=torch.int64), 8)
        assert not experts_module._is_few(torch.zeros(3, dtype=torch.int64), 8)
        assert not experts_module._is_few(torch.zeros(0, dtype=torch.int64), 8)
        assert not experts_module._is_few(torch.zeros(2, dtype=torch.int64, device="meta"), 8)
    assert not experts_module._is_few(torch.zeros(2, dtype=torch.int64), 8)
