"""Folders as users have them: what PEFT makes of each is what the bank makes of it, or the refusal's advice works."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from peft import PeftModel
from support.peft_folders import edit_config, edited_weights, loaded_by_peft, quiet, save_adapter, tiny_llama
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.config import read_config
from xpu_lora_compile.errors import AdapterError, LoraError, UnmatchedTensorError, UnsupportedAdapterError

TOKENS = torch.randint(6, 70, (2, 5), generator=torch.Generator().manual_seed(0))
PREFIX = "base_model.model."
TEXT: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    return made(lambda: transformers.Gemma3ForConditionalGeneration(config))


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config={"model_type": "clip_vision_model", **VISION}
    )
    return made(lambda: transformers.LlavaForConditionalGeneration(config))


def qwen3_moe() -> nn.Module:
    experts = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 1}
    return made(lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **experts)))


def phi() -> nn.Module:
    sizes = {**TEXT, "num_key_value_heads": 4}
    return made(lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**sizes)))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    return made(lambda: transformers.GPT2LMHeadModel(config))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def logits_of_peft(model: nn.Module, folder: Path) -> Tensor:
    return logits(loaded_by_peft(folder, copy.deepcopy(model)).eval())


def logits_here(model: nn.Module, folder: Path, **options: Any) -> Tensor:
    """Load into a bank that covers what the folder needs, unless `options` name other modules."""
    if "target_modules" in options:
        bank = xlc.attach(model, **options)
        bank.load("a", folder)
    else:
        bank = xlc.attach(model, adapters={"a": folder}, **options)
    with bank.use(["a"] * len(TOKENS)):
        return logits(model)


def assert_as_peft(model: nn.Module, folder: Path, **options: Any) -> None:
    expected = logits_of_peft(model, folder)
    assert (expected - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits_here(model, folder, **options), expected, atol=1e-5, rtol=1e-4)


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    with edited_weights(folder) as tensors:
        new = {rename(key): tensor for key, tensor in tensors.items()}
        assert new.keys() != tensors.keys()
        tensors.clear()
        tensors.update(new)
    return folder


# --- names in the file ---------------------------------------------------------------------------------------------

TEXT_LINEARS = r".*language_model.*\.(q_proj|v_proj)"
FORMER_NAMES: dict[str, Callable[[str], str]] = {
    "before-4.52": lambda key: key.replace("model.model.language_model.", "model.language_model.model."),
    "before-4.52-without-prefix": lambda key: key.replace(f"{PREFIX}model.language_model.", "language_model.model."),
    "without-prefix": lambda key: key.removeprefix(PREFIX),
}


@pytest.mark.parametrize("model", [gemma3, llava])
@pytest.mark.parametrize("names", FORMER_NAMES)
def test_a_vision_language_adapter_with_former_names_is_loaded(
    model: Callable[[], nn.Module], names: str, tmp_path: Path
) -> None:
    renamed(save_adapter(tmp_path, model=model(), target_modules=TEXT_LINEARS), FORMER_NAMES[names])
    edit_config(tmp_path, target_modules=["q_proj", "v_proj"])
    expected = logits_of_peft(model(), tmp_path)
    assert (expected - logits(model())).abs().max() > 1e-3
    for options in ({}, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*vision.*"}):
        if options:
            edit_config(tmp_path, exclude_modules=".*vision.*")
        torch.testing.assert_close(logits_here(model(), tmp_path, **options), expected, atol=1e-5, rtol=1e-4)


def test_names_are_mapped_by_the_rules_that_models_of_transformers_4_carry(tmp_path: Path) -> None:
    model = tiny_llama()
    model._checkpoint_conversion_mapping = {"^decoder": "model", "^never": "wrong"}
    save_adapter(tmp_path, target_modules=["q_proj", "v_proj"])
    renamed(tmp_path, lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}decoder."))
    assert_as_peft(model, tmp_path)


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled-inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled-block": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "fsdp": lambda key: f"_fsdp_wrapped_module.{key}",
    "fsdp-blocks": lambda key: key.replace(PREFIX, f"{PREFIX}_fsdp_wrapped_module.").replace(
        ".self_attn", "._fsdp_wrapped_module.self_attn"
    ),
    "checkpointed-block": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "fsdp-of-checkpointed": lambda key: key.replace(
        ".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ),
    "ddp": lambda key: f"module.{key}",
    "ddp-inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "ddp-of-compiled": lambda key: f"module._orig_mod.{key}",
    "compiled-ddp": lambda key: f"_orig_mod.module.{key}",
    "peft-twice": lambda key: PREFIX + key,
    "default": lambda key: key.replace(".weight", ".default.weight"),
    "another-name": lambda key: key.replace(".weight", ".pirate.weight"),
    "default-in-ddp": lambda key: "module." + key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_wrappers_and_live_models_put_into_names_is_seen_through(case: str, tmp_path: Path) -> None:
    expected = logits_of_peft(tiny_llama(), save_adapter(tmp_path, target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(
        logits_here(tiny_llama(), renamed(tmp_path, WRAPPED[case])), expected, atol=1e-5, rtol=1e-4
    )


def test_an_adapters_name_inside_the_keys_of_an_embedding_is_seen_through(tmp_path: Path) -> None:
    expected = logits_of_peft(tiny_llama(), save_adapter(tmp_path, target_modules=["embed_tokens", "lm_head"]))
    renamed(tmp_path, lambda key: re.sub(r"(lora_embedding_[AB]|lora_[AB])", r"\1.default", key))
    torch.testing.assert_close(logits_here(tiny_llama(), tmp_path), expected, atol=1e-5, rtol=1e-4)


def test_a_module_of_the_users_own_may_be_called_module(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 4)

    save_adapter(tmp_path, model=Net(), target_modules=["module"])
    assert xlc.attach(Net(), adapters={"a": tmp_path}).sites.keys() == {"module"}


def test_two_keys_of_one_tensor_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    with edited_weights(tmp_path) as tensors:
        key = next(key for key in tensors if key.endswith("lora_A.weight"))
        tensors[f"_orig_mod.{key}"] = tensors[key].clone()
    with pytest.raises(UnmatchedTensorError, match="wanted one tensor for"):
        xlc.attach(tiny_llama()).load("a", tmp_path)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    renamed(tmp_path, lambda key: key.replace(".weight", f".{'first' if '.0.' in key else 'second'}.weight"))
    with pytest.raises(UnmatchedTensorError, match=r"those of first, second\..*selected_adapters"):
        xlc.attach(tiny_llama()).load("a", tmp_path)


def test_keys_without_prefix_that_peft_drops_are_refused_until_they_have_it(tmp_path: Path) -> None:
    expected = logits_of_peft(tiny_llama(), save_adapter(tmp_path, target_modules=["q_proj"]))
    renamed(tmp_path, lambda key: key.removeprefix(PREFIX))
    with pytest.raises(UnmatchedTensorError, match=r"that begin with 'base_model\.model\.'.*Put it in front of each"):
        xlc.attach(tiny_llama(), adapters={"a": tmp_path})
    renamed(tmp_path, lambda key: PREFIX + key)
    torch.testing.assert_close(logits_here(tiny_llama(), tmp_path), expected, atol=1e-5, rtol=1e-4)


def test_keys_with_a_name_before_the_prefix_are_refused_until_it_is_cut_off(tmp_path: Path) -> None:
    expected = logits_of_peft(tiny_llama(), save_adapter(tmp_path, target_modules=["q_proj"]))
    renamed(tmp_path, lambda key: f"policy.{key}")
    with pytest.raises(UnmatchedTensorError, match="Cut off what stands before it"):
        xlc.attach(tiny_llama(), adapters={"a": tmp_path})
    renamed(tmp_path, lambda key: key.removeprefix("policy."))
    torch.testing.assert_close(logits_here(tiny_llama(), tmp_path), expected, atol=1e-5, rtol=1e-4)


def test_modules_that_the_config_does_not_target_can_be_named_in_it_as_the_refusal_says(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj", "v_proj"])
    edit_config(tmp_path, target_modules=["q_proj"])
    with pytest.raises(UnmatchedTensorError, match="Name their modules in its target_modules"):
        xlc.attach(tiny_llama(), adapters={"a": tmp_path})
    edit_config(tmp_path, target_modules=["q_proj", "v_proj"])
    assert_as_peft(tiny_llama(), tmp_path)


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B.bias", "lora_C.weight"])
def test_parts_that_peft_drops_are_refused_until_they_are_left_out(part: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.{part}"
    with edited_weights(tmp_path) as tensors:
        tensors[key] = torch.ones(32)
    with pytest.raises(UnmatchedTensorError, match=r"PEFT would not use them\. Leave them out") as caught:
        xlc.attach(tiny_llama(), adapters={"a": tmp_path})
    assert "target_modules" not in caught.value.args[3]
    with edited_weights(tmp_path) as tensors:
        del tensors[key]
    assert_as_peft(tiny_llama(), tmp_path)


def test_a_name_that_the_model_does_not_have_is_told_with_the_one_that_may_be_meant(tmp_path: Path) -> None:
    expected = logits_of_peft(tiny_llama(), save_adapter(tmp_path, target_modules=["q_proj"]))
    renamed(tmp_path, lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}decoder."))
    with pytest.raises(UnmatchedTensorError) as caught:
        xlc.attach(tiny_llama(), adapters={"a": tmp_path})
    meant = "If it is model.layers.0.self_attn.q_proj that the file means by decoder.layers.0.self_attn.q_proj, rename"
    assert meant in caught.value.args[3]
    renamed(tmp_path, lambda key: key.replace(f"{PREFIX}decoder.", f"{PREFIX}model."))
    torch.testing.assert_close(logits_here(tiny_llama(), tmp_path), expected, atol=1e-5, rtol=1e-4)


# --- the base model's own weights in the file ----------------------------------------------------------------------


def test_a_heads_bias_beside_the_copy_of_its_weight_is_ignored(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=phi(), target_modules=["q_proj", "lm_head"])
    with edited_weights(tmp_path) as tensors:
        assert f"{PREFIX}lm_head.base_layer.bias" in tensors
    assert_as_peft(phi(), tmp_path)


def test_a_norm_that_equals_the_models_is_ignored_and_another_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    key = f"{PREFIX}model.norm.weight"
    with edited_weights(tmp_path) as tensors:
        tensors[key] = torch.ones(32)
    assert_as_peft(tiny_llama(), tmp_path)
    with edited_weights(tmp_path) as tensors:
        tensors[key] = torch.full((32,), 1.5)
    with pytest.raises(UnsupportedAdapterError, match=r"model\.norm\.weight: .*merge_and_unload") as caught:
        xlc.attach(tiny_llama(), adapters={"a": tmp_path})
    assert "PEFT would not use" not in str(caught.value)
    assert_merging_works(tiny_llama(), tmp_path)


def test_a_vocabulary_that_was_resized_is_told_with_its_size(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=tiny_llama(vocab_size=72), target_modules=["q_proj"], save_embedding_layers=True)
    with pytest.raises(UnsupportedAdapterError, match=r"resize_token_embeddings\(72\)"):
        xlc.attach(tiny_llama(), adapters={"a": tmp_path})
    model = tiny_llama()
    with quiet():
        model.resize_token_embeddings(72)
    with pytest.raises(UnsupportedAdapterError, match="merge_and_unload"):
        xlc.attach(model, adapters={"a": tmp_path})
    assert_merging_works(model, tmp_path)


def assert_merging_works(model: nn.Module, folder: Path) -> None:
    """Follow the advice to merge: the model that comes out computes what PEFT computes with the adapter."""
    expected = logits_of_peft(model, folder)
    with quiet():
        merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    xlc.attach(merged, target_modules=["q_proj"])


# --- configs -------------------------------------------------------------------------------------------------------

UNSET = [None, False, "", [], {}, "none", "None", {"enabled": False, "names": [None, ""]}]


@pytest.mark.parametrize("value", UNSET, ids=repr)
def test_a_trainers_field_that_is_not_set_is_harmless(value: Any, tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    edit_config(tmp_path, a_field_of_a_trainer=value, lora_dtype=value, enable_lora=value)
    assert_as_peft(tiny_llama(), tmp_path)


def test_fields_of_trainers_that_say_how_they_trained_are_harmless(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    edit_config(tmp_path, lora_dtype="float32", lorap_lr_ratio=16.0, lorap_emb_lr=1e-6, merge_weights=True)
    assert_as_peft(tiny_llama(), tmp_path)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "use_qalora", "modules_to_save", "layers_pattern"])
def test_a_field_of_pefts_is_unset_where_peft_takes_it_for_unset(field: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    edit_config(tmp_path, **{field: ""})
    assert_as_peft(tiny_llama(), tmp_path)


def test_a_field_that_peft_does_not_know_can_be_removed_as_the_refusal_says(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    edit_config(tmp_path, a_field_of_a_trainer="on")
    with pytest.raises(UnsupportedAdapterError, match=r"remove it from adapter_config\.json"):
        read_config(tmp_path)
    edit_config(tmp_path, a_field_of_a_trainer=...)
    assert_as_peft(tiny_llama(), tmp_path)


def test_fan_in_fan_out_means_nothing_for_linear_layers_and_embeddings(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj", "embed_tokens"], fan_in_fan_out=True)
    edit_config(tmp_path, fan_in_fan_out=True)
    assert_as_peft(tiny_llama(), tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "targets", [["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens"]], ids="-".join
)
def test_ensure_weight_tying_ties_what_peft_ties(targets: list[str], tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    save_adapter(tmp_path, model=copy.deepcopy(model), target_modules=targets, ensure_weight_tying=True)
    assert_as_peft(model, tmp_path)


def test_a_tied_head_that_the_bank_does_not_cover_is_named(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    save_adapter(tmp_path, model=copy.deepcopy(model), target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(UnmatchedTensorError, match="targets lm_head, which this bank does not cover"):
        xlc.attach(model, target_modules=["embed_tokens"]).load("a", tmp_path)


MERGEABLE: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("case", MERGEABLE)
def test_merging_is_recommended_where_it_works(case: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], **MERGEABLE[case])
    with pytest.raises(UnsupportedAdapterError, match="merge_and_unload"):
        read_config(tmp_path)
    assert_merging_works(tiny_llama(), tmp_path)


NOT_MERGEABLE: dict[str, dict[str, Any]] = {
    "replicated-layers": {"layer_replication": [[0, 2], [0, 2]]},
}


@pytest.mark.parametrize("case", NOT_MERGEABLE)
def test_merging_is_not_recommended_where_peft_cannot(case: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], **NOT_MERGEABLE[case])
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_config(tmp_path)
    assert "merge" not in str(caught.value)
    assert "PeftModel.from_pretrained(model, folder)" in caught.value.args[3]
    logits_of_peft(tiny_llama(), tmp_path)
    # If PEFT has learnt to merge it, it belongs to the others.
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        assert_merging_works(tiny_llama(), tmp_path)


def test_each_field_has_its_own_advice(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    edit_config(tmp_path, use_bdlora={"nblocks": 2}, layer_replication=[[0, 2]])
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_config(tmp_path)
    assert re.search(r"use_bdlora: Let PEFT.*layer_replication: Serve it", caught.value.args[3]) or re.search(
        r"layer_replication: Serve it.*use_bdlora: Let PEFT", caught.value.args[3]
    )


# --- modules that carry no LoRA here -------------------------------------------------------------------------------


def test_a_parameter_of_a_plain_layer_is_the_layer(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], target_parameters=["up_proj.weight"])
    assert_as_peft(tiny_llama(), tmp_path)


def test_lora_on_single_experts_is_that_of_peft(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=qwen3_moe(), target_modules=["q_proj"])
    with edited_weights(tmp_path) as tensors, torch.random.fork_rng():
        torch.manual_seed(0)
        for expert in range(2):
            for name, inputs, outputs in (("gate_proj", 32, 16), ("up_proj", 32, 16), ("down_proj", 16, 32)):
                for layer in range(2):
                    module = f"{PREFIX}model.layers.{layer}.mlp.experts.{expert}.{name}"
                    tensors[f"{module}.lora_A.weight"] = torch.randn(4, inputs) * 0.3
                    tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, 4) * 0.3
    edit_config(tmp_path, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(UnmatchedTensorError, match=r"target_parameters=\['down_proj', 'gate_up_proj'\]"):
        xlc.attach(qwen3_moe()).load("a", tmp_path)
    assert_as_peft(qwen3_moe(), tmp_path)


def test_lora_on_conv1d_is_that_of_peft(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=gpt2(), target_modules="all-linear")
    expected = logits_of_peft(gpt2(), tmp_path)
    torch.testing.assert_close(logits_here(gpt2(), tmp_path), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", ["hooks", "lora"])
def test_hooks_of_accelerate_stay_and_call_layers(first: str, tmp_path: Path) -> None:
    """Weights are on the CPU, and come to the device of the call for each call; adapters stay there."""
    expected = logits_of_peft(tiny_llama(), save_adapter(tmp_path, target_modules=["q_proj"]))
    model, plain = tiny_llama(), logits(tiny_llama())
    if first == "hooks":
        accelerate.cpu_offload(model, execution_device="cpu")
    bank = xlc.attach(model, adapters={"a": tmp_path})
    if first == "lora":
        accelerate.cpu_offload(model, execution_device="cpu")
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.is_meta
    assert layer.lora_a.device == torch.device("cpu")
    with bank.use(["a", None]):
        found = logits(model)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], plain[1], atol=1e-5, rtol=1e-4)
    bank.drop("a")
    bank.load("again", tmp_path)
    with bank.use(["again", "again"]):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    if first == "lora":
        # Such hooks know the tensors of adapters, too, and have to go first.
        with pytest.raises(AdapterError, match="forward was replaced"):
            bank.detach()
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        for module in model.modules():
            vars(module).pop("forward", None)
    bank.detach()
    assert not hasattr(layer, "lora_a")
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-4)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert layer.forward.__func__ is nn.Linear.forward


@pytest.mark.parametrize("first", ["hooks", "lora"])
def test_hooks_of_accelerate_may_go_while_lora_is_there(first: str, tmp_path: Path) -> None:
    expected = logits_of_peft(tiny_llama(), save_adapter(tmp_path, target_modules=["q_proj"]))
    model = tiny_llama()
    if first == "hooks":
        accelerate.cpu_offload(model, execution_device="cpu")
    bank = xlc.attach(model, adapters={"a": tmp_path})
    if first == "lora":
        accelerate.cpu_offload(model, execution_device="cpu")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    with bank.use(["a", "a"]):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_attach_with_adapters_says_what_is_wrong_with_their_modules(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    with pytest.raises(LoraError, match=r"q_proj \(Linear\) with a forward.*del module.forward"):
        xlc.attach(model, adapters={"a": tmp_path})
    del layer.forward
    xlc.attach(model, adapters={"a": tmp_path})


def test_a_forward_that_someone_else_has_put_there_is_refused_and_stays_so(tmp_path: Path) -> None:
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    with pytest.raises(LoraError, match=r"q_proj \(Linear\) with a forward of its own.*del module.forward"):
        xlc.attach(model)
    del layer.forward
    bank = xlc.attach(model)
    layer.forward = layer.forward
    with pytest.raises(AdapterError, match="forward was replaced"):
        bank.detach()


def test_a_module_that_the_file_lacks_can_be_excluded_as_the_refusal_says(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"])
    edit_config(tmp_path, exclude_modules=None)
    with pytest.raises(AdapterError, match=r"name them in exclude_modules of adapter_config\.json"):
        xlc.attach(tiny_llama()).load("a", tmp_path)
    edit_config(tmp_path, exclude_modules=["layers.1.self_attn.q_proj"])
    assert_as_peft(tiny_llama(), tmp_path)
