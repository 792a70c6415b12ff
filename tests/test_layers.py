"""`attach`: which modules it finds, what it changes in a model, and what it refuses."""

from __future__ import annotations

import copy
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


def test_all_linear_leaves_out_the_output_embedding() -> None:
    bank = xlc.attach(tiny_llama())
    assert {name.rsplit(".", 1)[-1] for name in bank.sites} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize(
    ("target", "exclude", "found"),
    [
        (["layers.0.self_attn.q_proj"], (), {"model.layers.0.self_attn.q_proj"}),
        (r"model\.layers\.1\..*[kv]_proj", (), {"model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"}),
        (["q_proj"], ["layers.0.self_attn.q_proj"], {"model.layers.1.self_attn.q_proj"}),
        (["q_proj", "lm_head", "embed_tokens"], r".*layers.*", {"lm_head", "model.embed_tokens"}),
    ],
    ids=["list", "regex", "exclude", "vocabulary"],
)
def test_modules_are_found_by_pefts_rules(target: object, exclude: object, found: set[str]) -> None:
    assert set(xlc.attach(tiny_llama(), target_modules=target, exclude_modules=exclude).sites) == found


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


@pytest.mark.parametrize(("vocab_size", "relation"), [(70, "narrower"), (128, "equal"), (150, "wider")])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad-mode"])
def test_adapters_of_another_vocabulary(vocab_size: int, relation: str, grad: bool, tmp_path: Path) -> None:
    """The model's vocabulary is padded to 128; adapters cover `vocab_size` rows."""
    torch._dynamo.reset()
    trained_on = tiny_llama(vocab_size=vocab_size)
    folder = save_adapter(tmp_path / "a", model=copy.deepcopy(trained_on), target_modules=["lm_head"],
                          save_embedding_layers=False)  # fmt: skip
    rows = min(vocab_size, 128)
    padded = tiny_llama(vocab_size=128)
    weights = trained_on.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = nn.functional.pad(weights[name][:rows], (0, 0, 0, 128 - rows))
    padded.load_state_dict(weights)
    expected = loaded_by_peft(folder, trained_on)(TOKENS).logits[..., :rows]
    bank = xlc.attach(padded, max_rank=4, target_modules=["lm_head"], vocab_size=vocab_size)
    bank.load("a", folder)
    with torch.set_grad_enabled(grad), bank.use(["a", "a"]), xlc.record_decisions() as decisions:
        run = torch.compile(padded, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
        logits = run(TOKENS).logits
    torch.testing.assert_close(logits[..., :rows], expected, atol=1e-5, rtol=1e-5)
    assert not logits[..., rows:].any()
    # In grad mode the layer itself cuts weights that are wider, and says at which column they are added.
    grads = {"narrower": "slice", "equal": "equal", "wider": "equal"}
    assert [decision.relation for decision in decisions] == [grads[relation] if grad else relation]


def test_a_gradient_reaches_the_inputs_and_not_the_bank(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    bank = xlc.attach(model, slots=1, max_rank=2)
    layer = model[0]
    layer.store(0, torch.ones(2, 6), torch.ones(5, 2))
    bank._slots[0] = "a"
    x = torch.randn(3, 6, requires_grad=True)
    with bank.use(["a", None, "a"]):
        model(x).sum().backward()
    expected = layer.weight.sum(0) + torch.tensor([10.0, 0.0, 10.0])[:, None]
    torch.testing.assert_close(x.grad, expected)
    assert layer.lora_a.grad is None


def hooked(model: nn.Module) -> nn.Module:
    """A forward on the instance, as accelerate puts it there."""
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    return model


def wrapped_by_peft() -> nn.Module:
    with quiet():
        return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))


def quantized(model: nn.Module) -> nn.Module:
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("model", "call", "message"),
    [
        (tiny_llama(), {"target_modules": ["c_attn"]}, r"names of modules such as .*q_proj.* which matches nothing"),
        (tiny_llama(), {"target_modules": "["}, "regular expression"),
        (tiny_llama(), {"target_modules": ["self_attn"]}, r"self_attn \(LlamaAttention\)"),
        (Odd(), {}, r"attention.out_proj \(NonDynamicallyQuantizableLinear\)"),
        (Odd(), {"target_modules": ["norm"]}, r"norm \(LayerNorm\)"),
        (tiny_llama(), {"slots": 0}, "slots: wanted an integer of at least 1; got 0"),
        (tiny_llama(), {"max_rank": 1.5}, "max_rank: wanted an integer of at least 1; got 1.5"),
        (tiny_llama(), {"vocab_size": -1}, "vocab_size"),
        (tiny_llama(), {"dtype": torch.int32}, "float32, bfloat16 or float16"),
        (tiny_llama(), {"target_modules": None}, "a list of names or a string"),
        (hooked(tiny_llama()), {}, r"layers.0.self_attn.q_proj \(Linear\)"),
        (quantized(tiny_llama()), {}, "no quantized weight"),
        (tiny_llama(), {"vocab_size": 60}, "an output embedding among target_modules"),
        (wrapped_by_peft(), {}, "plain base model"),
    ],
    ids=[
        *("nothing", "regex", "container", "attention", "norm", "slots", "rank", "vocabulary"),
        *("dtype", "target", "hooked", "quantized", "no-head", "peft"),
    ],
)
def test_what_cannot_carry_lora_is_refused(model: nn.Module, call: dict[str, object], message: str) -> None:
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(AttachError, match=message):
        xlc.attach(model, **call)
    assert [type(module) for module in model.modules()] == kinds


def test_an_attach_that_runs_out_of_memory_changes_nothing() -> None:
    model = tiny_llama()
    with pytest.raises(RuntimeError):
        xlc.attach(model, slots=10**13)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    xlc.attach(model)


def test_attached_in_inference_mode_and_loaded_outside(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.inference_mode():
        bank = xlc.attach(model, target_modules=["q_proj"])
    bank.load("a", save_adapter(tmp_path / "a", target_modules=["q_proj"]))


def test_a_layer_is_called_by_keyword_as_before() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Embedding(3, 4))
    xlc.attach(model, target_modules=["0", "1"])
    assert model[0](input=torch.ones(1, 6)).shape == (1, 5)
    assert model[1](input=torch.tensor([1])).shape == (1, 4)


def test_attaching_twice_is_refused() -> None:
    model = tiny_llama()
    xlc.attach(model)
    with pytest.raises(AttachError, match="detach"):
        xlc.attach(model)
