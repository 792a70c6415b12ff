"""`attach` and `detach`: what they change in a model, and which arguments they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.peft_folders import loaded_by_peft, quiet, save_adapter, tiny_llama
from support.snapshot import graphs_of_compiling
from torch import nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import AdapterError, AttachError
from xpu_lora_compile.layers.host import LoraLayer

TOKENS = torch.randint(0, 70, (2, 5), generator=torch.Generator().manual_seed(0))


def test_parameters_state_dict_and_types_stay() -> None:
    model, plain = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True)
    xlc.attach(model, target_modules=["q_proj", "lm_head", "embed_tokens"])
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_detach_gives_back_the_plain_model() -> None:
    model = tiny_llama()
    expected = graphs_of_compiling(model, TOKENS)
    bank = xlc.attach(model, target_modules=["q_proj", "lm_head", "embed_tokens"])
    bank.detach()
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert dict(model.named_buffers()).keys() == dict(tiny_llama().named_buffers()).keys()
    assert graphs_of_compiling(model, TOKENS) == expected
    with pytest.raises(AdapterError, match="detached"):
        bank.load("pirate", "nowhere")
    xlc.attach(model)


def test_outside_use_the_graph_is_that_of_the_plain_model() -> None:
    model = tiny_llama()
    xlc.attach(model)
    assert graphs_of_compiling(model, TOKENS) == graphs_of_compiling(tiny_llama(), TOKENS)


def test_stacks_move_with_the_model_and_take_its_dtype() -> None:
    model = tiny_llama()
    xlc.attach(model, slots=3, max_rank=2, target_modules=["q_proj"])
    layer = model.to(torch.bfloat16).model.layers[0].self_attn.q_proj
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((3, 2, 32), (3, 32, 2))
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.bfloat16


def test_the_stacks_dtype_can_be_chosen(tmp_path: Path) -> None:
    model = tiny_llama().requires_grad_(False)
    bank = xlc.attach(model, target_modules=["q_proj"], dtype=torch.float16)
    bank.load("a", save_adapter(tmp_path / "a", target_modules=["q_proj"]))
    assert model.model.layers[0].self_attn.q_proj.lora_a.dtype == torch.float16
    with bank.use(["a", None]):
        torch.testing.assert_close(
            model(TOKENS).logits[0], loaded_by_peft(tmp_path / "a")(TOKENS).logits[0], atol=2e-2, rtol=2e-2
        )


def wrapped_by_peft() -> nn.Module:
    with quiet():
        return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).get_base_model()


@pytest.mark.parametrize(
    ("model", "call", "message"),
    [
        (tiny_llama(), {"target_modules": "["}, "regular expression"),
        (tiny_llama(), {"slots": 0}, "slots: wanted an integer of at least 1; got 0"),
        (tiny_llama(), {"max_rank": 1.5}, "max_rank: wanted an integer of at least 1; got 1.5"),
        (tiny_llama(), {"vocab_size": -1}, "vocab_size"),
        (tiny_llama(), {"dtype": torch.int32}, "float32, bfloat16 or float16"),
        (tiny_llama(), {"target_modules": None}, "a list of names or a string"),
        (tiny_llama(), {"vocab_size": 60}, "an output embedding among target_modules"),
        (wrapped_by_peft(), {}, "wanted a PeftModel, or a plain model"),
    ],
    ids=["regex", "slots", "rank", "vocabulary", "dtype", "target", "no-head", "peft"],
)
def test_wrong_arguments_are_refused(model: nn.Module, call: dict[str, object], message: str) -> None:
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(AttachError, match=message):
        xlc.attach(model, **call)
    assert [type(module) for module in model.modules()] == kinds


def test_an_attach_that_runs_out_of_memory_changes_nothing() -> None:
    model = tiny_llama()
    with pytest.raises(AttachError, match=r"room in the .* GB that cpu has free.*fewer slots"):
        xlc.attach(model, slots=10**13)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    xlc.attach(model)


def test_attached_in_inference_mode_and_loaded_outside(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.inference_mode():
        bank = xlc.attach(model, target_modules=["q_proj"])
    bank.load("a", save_adapter(tmp_path / "a", target_modules=["q_proj"]))


def test_attaching_twice_is_refused() -> None:
    model = tiny_llama()
    xlc.attach(model)
    with pytest.raises(AttachError, match="detach"):
        xlc.attach(model)


def test_a_layer_whose_class_others_have_derived_becomes_plain_again() -> None:
    """As FSDP derives it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    bank = xlc.attach(model)
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    bank.detach()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert model(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is")
def test_a_module_of_torchscript_beside_the_layers_is_no_hindrance() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.ReLU()), nn.Linear(4, 4))
    assert len(xlc.attach(model, target_modules=["0", "2"]).sites) == 2
