"""A model that PEFT has loaded: what PEFT does goes on working, on slots of the bank; nothing recompiles."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from support.cases import DEVICE
from support.live_models import ADAPTERS, MODELS, TOKENS, Change, disabled, live_model, logits, qwen2, randomize, saved
from support.peft_folders import lora_layers, quiet
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import xpu_lora_compile as xlc
from xpu_lora_compile import errors
from xpu_lora_compile.layers.host import LoraLayer

MIXED = ["haiku", "__base__", "default", "pirate"]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums in float32."""
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


def assert_differ(one: Tensor, other: Tensor) -> None:
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.fixture(autouse=True)
def without_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(kind: str, **lora: Any) -> tuple[PeftModel, PeftModel, Any]:
    """A live model with a bank, the same model without one, and the bank."""
    model = live_model(kind, **lora)
    oracle = copy.deepcopy(model)
    return model, oracle, xlc.attach(model)


def calls_of_layers(model: PeftModel) -> list[str]:
    """Have each later call of a bank's layer in a block leave its name in this list."""
    called: list[str] = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.register_forward_hook(
                lambda layer, *_: (
                    called.append(layer.lora_name) if layer.lora_routing.sequence_slots is not None else None
                )
            )
    return called


def test_a_live_model_computes_what_it_did_on_the_banks_layers(kind: str) -> None:
    model, oracle, bank = pair(kind)
    called = calls_of_layers(model)
    assert_same(logits(model), logits(oracle))
    assert set(called) == set(bank._layers)
    assert_differ(logits(model), disabled(oracle))


def test_adapter_names_give_each_row_its_adapter(kind: str) -> None:
    model, oracle, _ = pair(kind)
    assert_same(logits(model, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))
    assert_same(logits(model, adapter_names=MIXED[::-1]), logits(oracle, adapter_names=MIXED[::-1]))
    assert_differ(logits(model, adapter_names=MIXED), logits(model))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(2))
def test_random_changes_are_followed_eagerly(kind: str, seed: int, tmp_path: Path) -> None:
    model, oracle, _ = pair(kind)
    folders = [saved(tmp_path / f"{rank}", kind, rank, rank) for rank in (2, 4)]
    change = Change(seed, folders)
    for _ in range(40):
        what, call = change.next([model, oracle])
        with quiet():
            expected = call(oracle)
        try:
            assert_same(call(model), expected)
        except AssertionError as error:
            raise AssertionError(what) from error


@pytest.mark.parametrize(("kind", "count"), [("qwen2", 1000), ("gpt2", 150), ("bert", 150)])
def test_nothing_recompiles_over_1000_random_calls(kind: str, count: int, tmp_path: Path) -> None:
    model, oracle, _ = pair(kind)
    folders = [saved(tmp_path / f"{rank}", kind, rank, rank) for rank in (2, 4)]
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter)
    assert_same(logits(compiled), logits(oracle))
    assert counter.frame_count == 1
    change = Change(0, folders)
    whats = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(count):
            what, call = change.next([model, oracle])
            whats.add(what)
            before = counter.op_count
            result = call(compiled)
            if number % 4 == 0:
                with quiet():
                    assert_same(result, call(oracle))
            assert counter.op_count == before
    assert counter.frame_count == 1
    assert len(whats) == 12


def test_the_backend_of_the_package_compiles_it(tmp_path: Path) -> None:
    model, oracle, _ = pair("qwen2")
    compiled: Any = torch.compile(model, backend="xpu_lora", fullgraph=True)
    assert_same(logits(compiled), logits(oracle))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(logits(compiled, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))
        assert_same(disabled(compiled), disabled(oracle))
        for each in (model, oracle):
            each.set_adapter("haiku", inference_mode=True)
        assert_same(logits(compiled), logits(oracle))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": False, "num_return_sequences": 1}], ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_generate_gives_each_row_its_adapter(kind: str, options: dict[str, Any]) -> None:
    model, oracle, _ = pair(kind)
    length = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    for given in ({}, {"adapter_names": MIXED}):
        actual, expected = (each.generate(input_ids=TOKENS, **length, **given) for each in (model, oracle))
        assert torch.equal(actual, expected)


def test_detach_gives_back_what_peft_had(kind: str) -> None:
    model, oracle, bank = pair(kind)
    logits(model, adapter_names=MIXED)
    bank.detach()
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in oracle.named_modules()
    }
    for name, module in model.named_modules():
        assert vars(module).keys() == vars(oracle.get_submodule(name)).keys()
        assert module._forward_hooks.keys() == oracle.get_submodule(name)._forward_hooks.keys()
        assert module._forward_pre_hooks.keys() == oracle.get_submodule(name)._forward_pre_hooks.keys()
    assert all(torch.equal(value, oracle.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(oracle))
    assert torch.equal(logits(model, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))


def test_what_peft_saves_stays_the_same(tmp_path: Path) -> None:
    model, oracle, _ = pair("qwen2")
    for folder, each in (("ours", model), ("peft's", oracle)):
        each.save_pretrained(tmp_path / folder)
    assert list(model.state_dict()) == list(oracle.state_dict())
    for file in (tmp_path / "peft's").rglob("adapter_model.safetensors"):
        own = tmp_path / "ours" / file.relative_to(tmp_path / "peft's")
        assert own.read_bytes() == file.read_bytes()


def test_training_is_left_to_peft() -> None:
    model, oracle, _ = pair("qwen2")
    for each in (model, oracle):
        each.set_adapter("pirate")
        each.train()
        with torch.enable_grad():
            each(input_ids=TOKENS, labels=TOKENS).loss.backward()
    grads = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
    assert grads
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in grads)
        if name in grads:
            assert torch.equal(parameter.grad, grads[name])


def test_dropout_that_is_in_training_mode_is_left_to_peft_with_a_warning() -> None:
    model, oracle, _ = pair("qwen2", lora_dropout=0.5)
    results = []
    for each in (model, oracle):
        for layer in lora_layers(each).values():
            layer.lora_dropout.train()
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(logits(each))
        assert [str(warning.message) for warning in caught if "eval()" in str(warning.message)] or each is oracle
    assert torch.equal(*results)
    assert_same(logits(model.eval()), logits(oracle.eval()))


def test_an_adapter_without_dropout_that_is_added_to_a_model_in_eval_mode_is_served() -> None:
    model, oracle, _ = pair("qwen2")
    for each in (model, oracle):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            each.add_adapter("more", LoraConfig(**{**MODELS["qwen2"][1], "r": 2, "init_lora_weights": False}))
        each.set_adapter("more", inference_mode=True)
    called = calls_of_layers(model)
    assert_same(logits(model), logits(oracle))
    assert called


def test_a_step_of_an_optimizer_is_followed() -> None:
    model, oracle, _ = pair("qwen2")
    before = logits(model)
    for each in (model, oracle):
        each.set_adapter("default")
        parameters = [parameter for parameter in each.base_model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            with torch.enable_grad():
                each.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            assert_same(logits(each.eval()), logits(oracle.eval())) if each is oracle else logits(each.eval())
    assert_same(logits(model), logits(oracle))
    assert_differ(logits(model), before)


def test_an_adapter_that_requires_grad_in_grad_mode_is_left_to_peft() -> None:
    model, oracle, _ = pair("qwen2")
    called = calls_of_layers(model)
    for each in (model, oracle):
        each.set_adapter("pirate")
    with torch.enable_grad():
        with pytest.warns(UserWarning, match="requires grad"):
            result = logits(model)
        assert torch.equal(result, logits(oracle))
        assert result.requires_grad
    assert not called
    assert_same(logits(model), logits(oracle))
    assert called


def test_merged_adapters_are_left_to_peft() -> None:
    model, oracle, bank = pair("qwen2")
    for each in (model, oracle):
        each.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        assert torch.equal(logits(model), logits(oracle))
    with pytest.raises(errors.AdapterError, match="merged"), bank.use(["pirate"] * 4):
        pass
    for each in (model, oracle):
        each.unmerge_adapter()
    assert_same(logits(model), logits(oracle))


def test_merge_and_unload_gives_a_model_with_the_adapter_in_its_weights() -> None:
    model, oracle, _ = pair("qwen2")
    assert torch.equal(model.merge_and_unload()(TOKENS).logits, oracle.merge_and_unload()(TOKENS).logits)


def test_several_active_adapters_are_summed() -> None:
    model = live_model("qwen2")
    oracle = copy.deepcopy(model)
    xlc.attach(model, max_rank=9)
    called = calls_of_layers(model)
    for active in (["default", "haiku"], ["haiku", "pirate", "default"]):
        for each in (model, oracle):
            each.base_model.set_adapter(active, inference_mode=True)
        assert_same(logits(model), logits(oracle))
    assert called
    for each in (model, oracle):
        for layer in lora_layers(each).values():
            layer.scaling["haiku"] = 0.25
    assert_same(logits(model), logits(oracle))


def test_an_adapter_that_does_not_fit_is_left_to_peft_with_a_warning(tmp_path: Path) -> None:
    model, oracle, _ = pair("qwen2")
    folder = saved(tmp_path / "wide", "qwen2", 7, 0)
    for each in (model, oracle):
        each.load_adapter(folder, "wide")
    names = ["wide", "haiku", "__base__", "wide"]
    with pytest.warns(UserWarning, match="max_rank=7"):
        assert_same(logits(model, adapter_names=names), logits(oracle, adapter_names=names))
    assert_same(logits(model, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))


def test_layers_that_peft_adds_later_are_left_to_peft_with_a_warning() -> None:
    model, oracle, _ = pair("qwen2")
    for each in (model, oracle):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            each.add_adapter("more", LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    names = ["more", "haiku", "__base__", "more"]
    with pytest.warns(UserWarning, match="up_proj"):
        assert_same(logits(model, adapter_names=names), logits(oracle, adapter_names=names))
    for each in (model, oracle):
        each.set_adapter("more", inference_mode=True)
    assert_same(logits(model, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))


def test_slots_hold_the_adapters_that_were_used_last() -> None:
    model = live_model("qwen2")
    oracle = copy.deepcopy(model)
    bank = xlc.attach(model, slots=2)
    for names in (["default", "pirate"] * 2, ["haiku", "__base__"] * 2, ["haiku", "pirate"] * 2, ["default"] * 4):
        assert_same(logits(model, adapter_names=names), logits(oracle, adapter_names=names))
    assert set(bank.names) == {"default", "pirate"} or set(bank.names) == {"default", "haiku"}
    with pytest.warns(UserWarning, match="2 slots"):
        assert_same(logits(model, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))


def test_a_use_block_names_pefts_adapters() -> None:
    model, oracle, bank = pair("qwen2")
    expected = logits(oracle, adapter_names=MIXED)
    with bank.use(["haiku", None, "default", "pirate"]):
        assert_same(logits(model), expected)
        assert_same(logits(model, adapter_names=MIXED[::-1]), logits(oracle, adapter_names=MIXED[::-1]))
        assert_same(logits(model), expected)
        assert_same(model.get_base_model()(TOKENS).logits, expected)
    with pytest.raises(errors.UnknownAdapterError, match="load_adapter"), bank.use(["nobody"] * 4):
        pass
    with pytest.raises(errors.UnknownAdapterError, match="Write None"), bank.use(["haiku", "__base__"] * 2):
        pass
    for change in (lambda: bank.load("x", "folder"), lambda: bank.drop("haiku")):
        with pytest.raises(errors.AdapterError, match="peft_model"):
            change()


def test_a_model_without_a_kind_of_task_is_served_too() -> None:
    model, oracle, _ = pair("qwen2", task_type=None)
    assert type(oracle) is PeftModel
    compiled: Any = torch.compile(model, backend=CompileCounterWithBackend("eager"), fullgraph=True)
    for called in (model, compiled):
        assert_same(logits(called), logits(oracle))
        assert_same(logits(called, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))
        assert_same(called(TOKENS).logits, logits(oracle))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(disabled(compiled), disabled(oracle))


def test_errors_of_pefts_own_are_raised_by_peft() -> None:
    model, _, _ = pair("qwen2")
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, adapter_names=["nobody"] * 4)
    with pytest.raises(errors.BatchError, match="3 names"):
        logits(model, adapter_names=["haiku", "pirate", "default"])


def test_parts_of_the_model_called_by_themselves_are_pefts() -> None:
    model, oracle, _ = pair("qwen2")
    states = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(model.get_base_model()(TOKENS).logits, oracle.get_base_model()(TOKENS).logits)
    name = next(iter(lora_layers(oracle)))
    inner, of_oracle = (each.get_base_model().get_submodule(name) for each in (model, oracle))
    assert torch.equal(inner(states), of_oracle(states))


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_kinds_of_lora(lora: dict[str, Any]) -> None:
    # PEFT has biases of one adapter alone.
    adapters = ADAPTERS[:1] if "bias" in lora else ADAPTERS
    model, oracle, bank = pair("qwen2", adapters=adapters, **lora)
    called = calls_of_layers(model)
    for name in adapters:
        for each in (model, oracle):
            each.set_adapter(name, inference_mode=True)
        assert_same(logits(model), logits(oracle))
    assert set(called) == set(bank._layers)


def test_an_activated_lora_is_pefts_and_the_warning_says_who_serves_it(tmp_path: Path) -> None:
    activated = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [int(TOKENS[0, 2])]}
    model, oracle, _ = pair("qwen2", adapters=ADAPTERS[:1], **activated)
    expected = logits(oracle)
    assert not torch.equal(expected, disabled(oracle))
    with pytest.warns(UserWarning, match="save_pretrained"):
        assert torch.equal(logits(model), expected)
    oracle.save_pretrained(tmp_path)
    base = qwen2().to(DEVICE)
    bank = xlc.attach(base, adapters={"activated": tmp_path})
    with bank.use(["activated"] * 4, input_ids=TOKENS), torch.no_grad():
        assert_same(base(TOKENS).logits, expected)


def test_experts_of_a_live_model_are_refused_with_the_way_out(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    parameters = ["mlp.experts.down_proj"]
    with quiet():
        base = MixtralForCausalLM(config).to(DEVICE).eval()
        lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(base), lora).eval()
    with pytest.raises(errors.AttachError, match=r"parameters of .*experts.*save_pretrained"):
        xlc.attach(model)
    model.save_pretrained(tmp_path)
    bank = xlc.attach(base, adapters={"experts": tmp_path})
    ids = torch.arange(8, device=DEVICE).view(2, 4)
    with bank.use(["experts"] * 2), torch.no_grad():
        assert_same(base(ids).logits, model(ids).logits)


def test_tokens_of_adapters() -> None:
    model, oracle, _ = pair("qwen2", trainable_token_indices=[int(TOKENS[0, 0]), 5])
    assert_same(logits(model), logits(oracle))
    assert_same(logits(model, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))
    assert_same(disabled(model), disabled(oracle))


def test_embeddings_with_lora() -> None:
    model, oracle, _ = pair("qwen2", target_modules=["embed_tokens", "q_proj", "lm_head"])
    assert_same(logits(model), logits(oracle))
    assert_same(logits(model, adapter_names=MIXED), logits(oracle, adapter_names=MIXED))


def test_slots_have_the_dtype_of_pefts_weights() -> None:
    with quiet():
        base = qwen2().to(torch.bfloat16).to(DEVICE)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    randomize(model)
    bank = xlc.attach(model)
    assert {layer.lora_a.dtype for layer in bank._layers.values()} == {torch.float32}
    bank.detach()
    bank = xlc.attach(model, dtype=torch.bfloat16)
    assert {layer.lora_a.dtype for layer in bank._layers.values()} == {torch.bfloat16}


def in_place(value: nn.Parameter) -> None:
    value.mul_(2)


def other_memory(value: nn.Parameter) -> None:
    value.data = value.data * 2


@pytest.mark.parametrize("write", [in_place, other_memory])
def test_writes_to_parameters_that_were_found_before_are_followed(write: Any) -> None:
    model, oracle = live_model("qwen2"), live_model("qwen2")
    found = [layer.lora_B["default"].weight for each in (model, oracle) for layer in lora_layers(each).values()]
    xlc.attach(model)
    before = logits(model)
    for value in found:
        write(value)
    assert_same(logits(model), logits(oracle))
    assert_differ(logits(model), before)


def test_the_backend_alone_takes_the_model_over() -> None:
    model = live_model("qwen2")
    oracle = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="xpu_lora", options={"xpu_lora.execute": "eager"})
    for names in (MIXED, MIXED[::-1]):
        assert_same(logits(compiled, adapter_names=names), logits(oracle, adapter_names=names))
        assert type(model) is not type(oracle)
    with torch.compiler.set_stance("fail_on_recompile"):
        for each in (model, oracle):
            each.set_adapter("haiku", inference_mode=True)
        assert_same(logits(compiled), logits(oracle))
        assert_same(disabled(compiled), disabled(oracle))
    xlc.detach(model)
    assert type(model) is type(oracle)
    assert torch.equal(logits(model), logits(oracle))


def test_the_backend_alone_compiles_pefts_lora_where_it_cannot_take_it_over() -> None:
    with quiet():
        layers = nn.Sequential(nn.Conv1d(3, 4, 2))
        model = get_peft_model(layers, LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    model.requires_grad_(False)
    sounds = torch.randn(2, 3, 5)
    compiled = torch.compile(model, backend="xpu_lora", options={"xpu_lora.execute": "eager"})
    with pytest.warns(UserWarning, match="Conv1d"):
        assert_same(compiled(sounds), model(sounds))
    assert_same(compiled(sounds + 1), model(sounds + 1))


def test_writes_through_data_that_were_prepared_before_are_followed_after_refresh() -> None:
    model, oracle, bank = pair("qwen2")
    values = [layer.lora_B["default"].weight.data for each in (model, oracle) for layer in lora_layers(each).values()]
    logits(model)
    for value in values:
        value.mul_(2)
    bank.refresh()
    assert_same(logits(model), logits(oracle))


def test_a_copy_is_pefts_model_again_after_detach() -> None:
    model, oracle, bank = pair("qwen2")
    expected = logits(oracle)
    for made in (copy.deepcopy(model), _pickled(model)):
        with pytest.raises(errors.CopiedModelError):
            logits(made)
        again = copy.deepcopy(made)
        xlc.detach(made)
        assert torch.equal(logits(made), expected)
        bank_of_copy = xlc.attach(again)
        assert_same(logits(again), expected)
        bank_of_copy.detach()
        assert torch.equal(logits(again), expected)
    assert_same(logits(model), expected)
    bank.detach()


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    made: nn.Module = torch.load(file, weights_only=False)
    return made


def test_what_is_no_lora_of_a_peft_model_is_refused() -> None:
    with quiet():
        config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
        ia3 = get_peft_model(qwen2(), config)
    with pytest.raises(errors.AttachError, match="IA3Model"):
        xlc.attach(ia3)
    with quiet():
        convolution = get_peft_model(nn.Sequential(nn.Conv1d(3, 4, 2)), LoraConfig(target_modules=["0"]))
    with pytest.raises(errors.AttachError, match="Conv1d"):
        xlc.attach(convolution)
    model = live_model("qwen2")
    with pytest.raises(errors.AttachError, match="whole PeftModel"):
        xlc.attach(model.get_base_model())
    with pytest.raises(errors.AttachError, match="target_modules"):
        xlc.attach(model, target_modules=["q_proj"])
    xlc.attach(model)
    with pytest.raises(errors.AttachError, match="one that has it"):
        xlc.attach(model)


def test_no_warning_without_a_reason() -> None:
    model, _, _ = pair("qwen2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)
        logits(model, adapter_names=MIXED)
        disabled(model)
