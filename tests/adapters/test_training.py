"""Adapters trained in a bank: as PEFT trains each alone, with any optimizer, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.cases import DEVICE, same_bits
from support.mixtures import mixture, save_fused
from support.peft_folders import edit_config, edited_weights, loaded_by_peft, quiet, save_adapter, tiny_llama
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.errors import (
    AdapterError,
    ArtifactError,
    BankInUseError,
    LostGradientError,
    UnknownAdapterError,
    UnsupportedAdapterError,
)
from xpu_lora_compile.passes.text import as_text

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
# Different ranks, scalings that are no powers of two, and different modules.
ADAPTERS: dict[str, dict[str, Any]] = {
    "pirate": {"r": 4, "lora_alpha": 6, "target_modules": TARGETS},
    "haiku": {"r": 3, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "telegram": {"r": 5, "lora_alpha": 7, "target_modules": ["v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each adapter, which PEFT wrote, with small random weights."""
    root, made = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, lora) in enumerate(ADAPTERS.items()):
        made[name] = save_adapter(root / name, seed=seed, **lora)
        with edited_weights(made[name]) as tensors:
            for tensor in tensors.values():
                tensor *= 0.1
    return made


def _tokens(seed: int, rows: int = 2) -> Tensor:
    return torch.randint(0, 70, (rows, 9), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _loss(model: Callable[..., Any], tokens: Tensor, **given: Any) -> Tensor:
    """The loss of each row."""
    logits = model(tokens, **given).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def _attached(folders: dict[str, Path], **given: Any) -> tuple[nn.Module, AdapterBank]:
    model = tiny_llama().to(DEVICE).requires_grad_(False)
    return model, xlc.attach(model, adapters=folders, slots=5, max_rank=6, target_modules=TARGETS, **given)


def _pefts_losses(folder: Path, batches: list[Tensor], optimizer: Callable[[Any], Any]) -> list[float]:
    with quiet():
        model = PeftModel.from_pretrained(tiny_llama().to(DEVICE), folder, is_trainable=True)
    steps, losses = optimizer([weight for weight in model.parameters() if weight.requires_grad]), []
    for tokens in batches:
        loss = _loss(model, tokens).mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


def _compiled(model: nn.Module) -> Callable[..., Any]:
    """Without Inductor, which takes many times as long, and computes the same."""
    run: Callable[..., Any] = torch.compile(model, backend="xpu_lora", options={"xpu_lora.execute": "eager"})
    return run


OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.3, momentum=0.9),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_three_adapters_in_one_batch_learn_as_each_does_alone_with_peft(
    folders: dict[str, Path], optimizer: str, compiled: bool
) -> None:
    model, bank = _attached(folders)
    bank.trainable(list(folders))
    optimizers = {name: OPTIMIZERS[optimizer](bank.parameters(name)) for name in folders}
    names = [name for name in folders for _ in range(2)]
    batches = {name: [_tokens(100 * seed + step % 3) for step in range(20)] for seed, name in enumerate(folders)}
    run: Callable[..., Any] = model
    if compiled:
        # Once by Inductor.
        run = torch.compile(model, backend="xpu_lora") if optimizer == "adamw" else _compiled(model)
    losses: dict[str, list[float]] = {name: [] for name in folders}
    for step in range(20):
        tokens = torch.cat([batches[name][step] for name in folders])
        with bank.use(names):
            of_rows = _loss(run, tokens).view(3, 2).mean(1)
            of_rows.sum().backward()
        for name, loss in zip(folders, of_rows.tolist(), strict=True):
            losses[name].append(loss)
            optimizers[name].step()
            optimizers[name].zero_grad()
    for name, folder in folders.items():
        wanted = _pefts_losses(folder, batches[name], OPTIMIZERS[optimizer])
        assert abs(wanted[0] - wanted[-1]) > 0.02
        torch.testing.assert_close(torch.tensor(losses[name]), torch.tensor(wanted), rtol=2e-4, atol=2e-4)


def _train(model: Callable[..., Any], bank: AdapterBank, names: list[str | None], steps: int = 3) -> None:
    trained = [name for name in dict.fromkeys(names) if name is not None]
    optimizers = [torch.optim.SGD(bank.parameters(name), lr=0.5) for name in trained]
    for step in range(steps):
        with bank.use(names):
            _loss(model, _tokens(step, len(names))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_a_slot_that_is_not_trained_keeps_its_bits(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    before = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    bank.trainable(["haiku"])
    _train(model, bank, ["haiku", None])
    slot = bank.names.index("haiku")
    changed = 0
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("lora_a", "lora_b")):
            others = [k for k in range(len(value)) if k != slot]
            assert same_bits(value[others], before[name][others])
            changed += not same_bits(value[slot], before[name][slot])
        else:
            assert same_bits(value, before[name])
    assert changed >= 2 * 4


def test_an_untrained_adapter_serves_in_the_batch_of_a_trained_one(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    tokens = _tokens(0, 4)
    names = ["pirate", "haiku", None, "telegram"]
    with torch.no_grad(), bank.use(names):
        before = model(tokens).logits
    bank.trainable(["haiku"])
    with torch.no_grad(), bank.use(names):
        torch.testing.assert_close(model(tokens).logits, before)
    with bank.use(names):
        torch.testing.assert_close(model(tokens).logits, before)
    bank.trainable([])
    with torch.no_grad(), bank.use(names):
        torch.testing.assert_close(model(tokens).logits, before)


@pytest.mark.parametrize("while_trained", [True, False])
def test_peft_loads_what_is_saved_with_the_same_outputs(
    folders: dict[str, Path], tmp_path: Path, while_trained: bool
) -> None:
    model, bank = _attached(folders)
    bank.trainable(list(folders))
    _train(model, bank, list(folders))
    tokens = _tokens(7)
    wanted = {}
    for name in folders:
        with torch.no_grad(), bank.use([name] * 2):
            wanted[name] = model(tokens).logits
    if not while_trained:
        bank.trainable([])
    for name in folders:
        bank.save(name, tmp_path / name)
        saved = loaded_by_peft(tmp_path / name, tiny_llama().to(DEVICE)).eval()
        with torch.no_grad():
            torch.testing.assert_close(saved(tokens).logits, wanted[name])
        assert (
            load_file(tmp_path / name / "adapter_model.safetensors").keys()
            == load_file(folders[name] / "adapter_model.safetensors").keys()
        )
    again, second = _attached({name: tmp_path / name for name in folders})
    for name in folders:
        with torch.no_grad(), second.use([name] * 2):
            torch.testing.assert_close(again(tokens).logits, wanted[name])


def test_what_is_saved_without_training_is_what_was_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    _, bank = _attached(folders)
    bank.save("pirate", tmp_path)
    for file in (folders["pirate"], tmp_path):
        assert json.loads((file / "adapter_config.json").read_text())["r"] == 4
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (folders["pirate"], tmp_path))
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=0)


def test_a_new_adapter_changes_nothing_until_it_is_trained(tmp_path: Path) -> None:
    model = tiny_llama().to(DEVICE).requires_grad_(False)
    tokens = _tokens(3)
    with torch.no_grad():
        base = model(tokens).logits
    bank = xlc.attach(model, slots=2, max_rank=8)
    bank.add("new", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    with torch.no_grad(), bank.use(["new", "new"]):
        assert same_bits(model(tokens).logits, base)
    bank.trainable(["new"])
    names = list(bank.named_parameters("new"))
    assert len(names) == 8
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert [parameter.shape for parameter in bank.parameters("new")[:2]] == [(4, 32), (32, 4)]
    _train(model, bank, ["new", "new"])
    with torch.no_grad(), bank.use(["new", "new"]):
        trained = model(tokens).logits
    assert not torch.allclose(trained, base, atol=1e-3)
    bank.save("new", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded_by_peft(tmp_path, tiny_llama().to(DEVICE))(tokens).logits, trained)


def test_all_linear_modules_get_a_new_adapter_as_with_peft(tmp_path: Path) -> None:
    model = tiny_llama().to(DEVICE)
    bank = xlc.attach(model, slots=2, max_rank=8, target_modules="all-linear")
    bank.add("new")
    bank.save("new", tmp_path)
    with quiet():
        peft_model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"))
        peft_model.save_pretrained(tmp_path / "peft")
    ours, pefts = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "peft"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in pefts.items()}
    for key, value in ours.items():
        assert value.std().item() == pytest.approx(pefts[key].std().item(), rel=0.2)


def test_each_adapter_has_its_own_learning_rate_and_weight_decay(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    bank.trainable(["pirate", "haiku"])
    before = {name: [p.detach().clone() for p in bank.parameters(name)] for name in ("pirate", "haiku")}
    optimizers = [
        torch.optim.AdamW(bank.parameters("pirate"), lr=0.0, weight_decay=0.5),
        torch.optim.AdamW(bank.parameters("haiku"), lr=0.1, weight_decay=0.0),
    ]
    with bank.use(["pirate", "haiku"]):
        _loss(model, _tokens(0)).sum().backward()
    norm = nn.utils.clip_grad_norm_(bank.parameters("haiku"), 1e-3)
    assert norm > 1e-3
    assert sum(p.grad.square().sum() for p in bank.parameters("pirate")) > 1e-5
    for optimizer in optimizers:
        optimizer.step()
    assert all(same_bits(p, b) for p, b in zip(bank.parameters("pirate"), before["pirate"], strict=True))
    assert not any(same_bits(p, b) for p, b in zip(bank.parameters("haiku"), before["haiku"], strict=True))


def test_layers_without_a_trained_adapter_hand_gradients_on_by_the_same_op(folders: dict[str, Path]) -> None:
    texts: list[str] = []

    def backend(module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        xlc.rewrite(module)
        texts.append(as_text(module))
        return module.forward

    found = []
    for given in (folders, {"haiku": folders["haiku"]}):
        targets = TARGETS if given is folders else ["q_proj", "v_proj"]
        model = tiny_llama().to(DEVICE).requires_grad_(False)
        bank = xlc.attach(model, adapters=given, slots=5, max_rank=6, target_modules=targets)
        bank.trainable(["haiku"])
        run = torch.compile(model, backend=backend) if given is folders else model
        with bank.use(["haiku", None]):
            _loss(run, _tokens(0)).sum().backward()
        found.append([p.grad for p in bank.parameters("haiku")])
        with bank.use(["haiku", None]), torch.no_grad():
            _loss(model, _tokens(0))
        bank.trainable([])
        assert all(layer.lora_training is None for layer in model.modules() if hasattr(layer, "lora_training"))
    torch.testing.assert_close(*found)
    assert any("trained_linear" in text for text in texts)
    assert not any("lora_linear" in text for text in texts)


def test_layers_without_a_trained_adapter_may_be_converted_or_narrower(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    more = save_adapter(tmp_path, r=2, lora_alpha=3, seed=7, target_modules=["q_proj", "down_proj"])
    gradients = []
    for converted in (False, True):
        model = tiny_llama().to(DEVICE).requires_grad_(False)
        given: dict[str, Any] = {"vocab_size": 80} if converted else {}
        bank = xlc.attach(model, slots=3, max_rank=6, target_modules=[*TARGETS, "lm_head"], **given)
        bank.load("haiku", folders["haiku"])
        bank.load("more", more)
        bank.trainable(["haiku"])
        if converted:
            model.model.layers[0].mlp.to(torch.bfloat16).to(torch.float32)
            model.model.layers[1].mlp.to(torch.float64)
            model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: (args[0].double(),))
            model.model.layers[1].mlp.register_forward_hook(lambda _, args, result: result.float())
        for names in (["haiku"], ["haiku", "more"]):
            bank.trainable(names)
            with bank.use(["haiku", "more"]):
                _loss(model, _tokens(0)).sum().backward()
        gradients.append([p.grad.float() for name in ("haiku", "more") for p in bank.parameters(name)])
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-3)


def test_transformers_trainer_trains_an_adapter_inside_of_its_block(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [row.cpu() for seed in range(4) for row in _tokens(seed)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    trained = []
    for by_trainer in (True, False):
        model, bank = _attached(folders)
        bank.trainable(["pirate"])
        optimizer = torch.optim.SGD(bank.parameters("pirate"), lr=0.3)
        if by_trainer:
            _train_by_transformers(model, bank, optimizer, data, tmp_path)
        else:
            # Two batches of two rows for each step.
            for step in range(2):
                for batch in range(2):
                    first = 4 * step + 2 * batch
                    tokens = torch.stack(rows[first : first + 2]).to(DEVICE)
                    with bank.use(["pirate"] * 2):
                        (_loss(model, tokens).mean() / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
        trained.append([parameter.detach() for parameter in bank.parameters("pirate")])
    torch.testing.assert_close(*trained)


def _train_by_transformers(
    model: nn.Module, bank: AdapterBank, optimizer: torch.optim.Optimizer, data: list[dict[str, Tensor]], folder: Path
) -> None:
    """As docs/training.md has it: blocks around forward and backward, and gradients that are zeroed by the user."""

    class InBlocks(Trainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any) -> Tensor:
            with bank.use(["pirate"] * len(inputs["input_ids"])):
                loss: Tensor = super().training_step(model, inputs, *args)
            return loss

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(data)  # type: ignore[arg-type]

    class ZeroGradients(TrainerCallback):
        def on_step_end(self, *args: Any, **given: Any) -> None:
            optimizer.zero_grad()

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        report_to=[],
        use_cpu=DEVICE.type == "cpu",
        save_strategy="no",
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    InBlocks(
        model,
        arguments,
        train_dataset=data,
        optimizers=(optimizer, constant),
        callbacks=[ZeroGradients()],  # type: ignore[arg-type]
    ).train()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_adapter_that_no_row_uses_gets_no_gradient(folders: dict[str, Path], compiled: bool) -> None:
    model, bank = _attached(folders)
    run = torch.compile(model, backend="xpu_lora") if compiled else model
    bank.trainable(["pirate", "haiku"])
    with bank.use(["pirate", None]):
        _loss(run, _tokens(0)).sum().backward()
    assert all(p.grad is not None for p in bank.parameters("pirate"))
    assert all(p.grad is None for p in bank.parameters("haiku"))
    with bank.use(["haiku", None]):
        _loss(run, _tokens(0)).sum().backward()
    kept = [p.grad.clone() for p in bank.parameters("haiku")]
    with bank.use(["pirate", None]):
        _loss(run, _tokens(0)).sum().backward()
    assert all(same_bits(p.grad, was) for p, was in zip(bank.parameters("haiku"), kept, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_add_up_over_small_batches(folders: dict[str, Path], compiled: bool) -> None:
    plain, bank = _attached(folders)
    model = _compiled(plain) if compiled else plain
    bank.trainable(list(folders))
    names, tokens = [*folders, "pirate"], _tokens(1, 4)
    with bank.use(names):
        _loss(model, tokens).sum().backward()
    whole = {name: [p.grad.clone() for p in bank.parameters(name)] for name in folders}
    for name in folders:
        for parameter in bank.parameters(name):
            parameter.grad = None
    for first in (0, 2):
        with bank.use(names[first : first + 2]):
            _loss(model, tokens[first : first + 2]).sum().backward()
    for name in folders:
        for parameter, wanted in zip(bank.parameters(name), whole[name], strict=True):
            torch.testing.assert_close(parameter.grad, wanted)


def test_parameters_of_one_that_is_trained_already_stay_the_same(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    bank.trainable(["pirate"])
    before = bank.parameters("pirate")
    bank.trainable(["haiku", "pirate"])
    assert all(left is right for left, right in zip(before, bank.parameters("pirate"), strict=True))
    bank.trainable(["pirate"])
    assert all(left is right for left, right in zip(before, bank.parameters("pirate"), strict=True))
    _train(model, bank, ["pirate", "haiku"][:1] * 2)
    bank.drop("pirate")
    assert "pirate" not in bank.names
    bank.load("pirate", folders["pirate"])
    with pytest.raises(AdapterError, match="trained are none"):
        bank.parameters("pirate")


@pytest.mark.parametrize(
    ("reentrant", "compiled"), [(False, False), (True, False), (False, True)], ids=["", "reentrant", "compiled"]
)
def test_checkpoints_change_no_gradient(folders: dict[str, Path], reentrant: bool, compiled: bool) -> None:
    gradients = []
    for checkpoints in (False, True):
        model, bank = _attached(folders)
        bank.trainable(list(folders))
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if compiled:
                # It has been enabled by that, and breaks the graph.
                model.disable_input_require_grads()
            elif reentrant:
                model.enable_input_require_grads()
        # With what Inductor would compile run as it is, which takes less time.
        given: dict[str, Any] = {"fullgraph": True, "options": {"xpu_lora.execute": "eager"}}
        called: Any = torch.compile(model, backend="xpu_lora", **given) if checkpoints and compiled else model
        with bank.use(list(folders)):
            _loss(called, _tokens(2, 3), use_cache=False).sum().backward()
        gradients.append([p.grad for name in folders for p in bank.parameters(name)])
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="elsewhere the fused optimizers of torch refuse such parameters")
def test_a_parameter_with_gaps_in_memory_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    bank = xlc.attach(tiny_llama(vocab_size=100), slots=1, max_rank=4, target_modules=["lm_head"])
    bank.add("smaller", r=4, target_modules=["lm_head"])
    bank.save("smaller", tmp_path)
    given: dict[str, Any] = {"slots": 1, "max_rank": 4, "target_modules": ["lm_head"]}
    bank = xlc.attach(tiny_llama(vocab_size=104), **given)
    bank.load("smaller", tmp_path)
    with pytest.raises(UnsupportedAdapterError, match=r"wanted B without gaps in memory.*vocab_size=100"):
        bank.trainable(["smaller"])
    bank = xlc.attach(tiny_llama(vocab_size=104), vocab_size=100, **given)
    bank.load("smaller", tmp_path)
    bank.trainable(["smaller"])
    assert all(p.is_contiguous() or p.t().is_contiguous() for p in bank.parameters("smaller"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_trains_with_gradients_close_to_those_of_float32(folders: dict[str, Path], compiled: bool) -> None:
    gradients = []
    for enabled in (False, True):
        plain, bank = _attached(folders)
        model = _compiled(plain) if compiled else plain
        bank.trainable(list(folders))
        with bank.use(list(folders)), torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            _loss(model, _tokens(2, 3)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for name in folders for p in bank.parameters(name)]))
        assert gradients[-1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.995


def test_a_base_of_bfloat16_trains_adapters_of_float32(folders: dict[str, Path]) -> None:
    model = tiny_llama().to(DEVICE, torch.bfloat16).requires_grad_(False)
    bank = xlc.attach(model, adapters=folders, dtype=torch.float32)
    bank.trainable(list(folders))
    _train(model, bank, list(folders))
    assert {p.dtype for name in folders for p in bank.parameters(name)} == {torch.float32}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="another generator")
def test_dropout_is_pefts(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "dropped"
    shutil.copytree(folders["pirate"], folder)
    edit_config(folder, lora_dropout=0.4)
    with quiet():
        peft_model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    model, bank = _attached({"dropped": folder, "haiku": folders["haiku"]})
    bank.trainable(["dropped"])
    tokens = _tokens(4)

    def losses(run: Any) -> Tensor:
        torch.manual_seed(5)
        return _loss(run, tokens).detach()

    for training in (True, False):
        peft_model.train(training)
        model.train(training)
        with bank.use(["dropped"] * 2):
            torch.testing.assert_close(losses(model), losses(peft_model))
    model.train()
    with bank.use(["haiku", None]):
        with torch.no_grad():
            dropped = losses(model)
        model.eval()
        assert same_bits(losses(model), dropped)


def test_nan_in_another_tenant_changes_no_bit_of_a_gradient(folders: dict[str, Path]) -> None:
    gradients = []
    for poisoned in (False, True):
        model, bank = _attached(folders)
        bank.trainable(["pirate", "haiku"])
        if poisoned:
            with torch.no_grad():
                bank.parameters("haiku")[0].fill_(torch.nan)
        with bank.use(["pirate", "haiku"]):
            _loss(model, _tokens(0)).sum().backward()
        gradients.append([p.grad for p in bank.parameters("pirate")])
        assert any(p.grad.isnan().any() for p in bank.parameters("haiku")) == poisoned
    assert all(same_bits(left, right) for left, right in zip(*gradients, strict=True))


def _gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 70, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


def _bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=70)).eval()


@pytest.mark.parametrize(
    ("make", "targets"), [(_gpt2, ["c_attn", "c_proj"]), (_bert, ["query", "value", "dense"])], ids=["gpt2", "bert"]
)
def test_models_that_are_no_llama_get_pefts_gradients(
    make: Callable[[], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "one", model=make(), target_modules=targets)
    tokens = _tokens(0)
    with quiet():
        peft_model = PeftModel.from_pretrained(make().to(DEVICE), folder, is_trainable=True)
    peft_model(tokens).logits.square().sum().backward()
    model = make().to(DEVICE).requires_grad_(False)
    bank = xlc.attach(model, adapters={"one": folder})
    bank.trainable(["one"])
    with bank.use(["one"] * 2):
        model(tokens).logits.square().sum().backward()
    wanted = {
        name.replace(".default", ""): weight.grad
        for name, weight in peft_model.named_parameters()
        if weight.requires_grad and "lora_" in name
    }
    ours = bank.named_parameters("one")
    assert ours.keys() == wanted.keys()
    for name, parameter in ours.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4 * scale)


@pytest.fixture
def attached(folders: dict[str, Path]) -> tuple[nn.Module, AdapterBank]:
    return _attached(folders)


def test_training_is_refused_where_it_would_go_wrong(attached: tuple[nn.Module, AdapterBank], tmp_path: Path) -> None:
    model, bank = attached
    with pytest.raises(UnknownAdapterError):
        bank.trainable(["nobody"])
    with pytest.raises(AdapterError, match=r"Write trainable\(\['pirate'\]\)"):
        bank.trainable("pirate")
    with pytest.raises(AdapterError, match=r"Call bank\.trainable"):
        bank.parameters("pirate")
    with bank.use(["pirate"]), pytest.raises(BankInUseError):
        bank.trainable(["pirate"])
    bank.trainable(["pirate"])
    with pytest.raises(ArtifactError, match="carry no gradients"):
        xlc.export(model, tmp_path / "file.pt2", (_tokens(0),))
    with pytest.raises(AdapterError, match="names of linear modules of the bank"):
        bank.add("new", target_modules=["nothing"])
    for rank in (0, 7):
        with pytest.raises(AdapterError, match=f"^add 'new': r: wanted 1 to 6, the bank's max_rank; got {rank}. Pass"):
            bank.add("new", r=rank)
    weight = bank.parameters("pirate")[0]
    weight.data = weight.data.clone()
    with pytest.raises(AdapterError, match="other memory"):
        bank.use(["pirate"]).__enter__()


def test_a_model_that_is_moved_while_adapters_are_trained_is_refused(
    attached: tuple[nn.Module, AdapterBank],
) -> None:
    model, bank = attached
    bank.trainable(["pirate"])
    model.to(torch.bfloat16)
    with pytest.raises(AdapterError, match="was moved"):
        bank.use(["pirate"]).__enter__()
    with pytest.raises(AdapterError, match="was moved"):
        bank.save("pirate", "nowhere")


@pytest.mark.parametrize(
    ("lora", "why"),
    [({"use_dora": True}, "use_dora=True"), ({"target_modules": ["embed_tokens"]}, "embed_tokens")],
    ids=["dora", "embedding"],
)
def test_adapters_of_more_than_linear_layers_are_refused(tmp_path: Path, lora: dict[str, Any], why: str) -> None:
    folder = save_adapter(tmp_path / "more", **{"target_modules": ["q_proj"], **lora})
    bank = xlc.attach(tiny_llama(), adapters={"more": folder})
    with pytest.raises(UnsupportedAdapterError, match=why):
        bank.trainable(["more"])


def test_weights_that_change_between_forward_and_backward_are_an_error(
    attached: tuple[nn.Module, AdapterBank],
) -> None:
    model, bank = attached
    bank.trainable(["pirate"])
    with bank.use(["pirate"]):
        loss = _loss(model, _tokens(0, 1)).sum()
        with torch.no_grad():
            bank.parameters("pirate")[0].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_detach_ends_training(attached: tuple[nn.Module, AdapterBank]) -> None:
    model, bank = attached
    bank.trainable(["pirate"])
    bank.detach()
    assert not any("lora" in key for module in model.modules() for key in vars(module))


def test_what_training_does_not_take_is_refused(tmp_path: Path) -> None:
    """Several adapters for a row, and LoRA on experts, which a saved folder would leave out."""
    several = xlc.attach(tiny_llama(), adapters_per_row=2)
    several.add("a", r=2)
    with pytest.raises(UnsupportedAdapterError, match=r"adapters_per_row=2. Attach without adapters_per_row"):
        several.trainable(["a"])
    bank = xlc.attach(mixture("Mixtral"), adapters={"experts": save_fused("Mixtral", tmp_path / "experts", 0)})
    for refused in (lambda: bank.trainable(["experts"]), lambda: bank.save("experts", tmp_path / "out")):
        with pytest.raises(UnsupportedAdapterError, match=r"LoRA on the experts' model.layers.0.mlp.experts"):
            refused()
    assert not (tmp_path / "out").exists()
    router = save_fused("Mixtral", tmp_path / "router", 0, target_parameters=["mlp.gate.weight"])
    bank = xlc.attach(mixture("Mixtral"), adapters={"router": router})
    with pytest.raises(UnsupportedAdapterError, match=r"LoRA on linear layers; got model.layers.0.mlp.gate"):
        bank.trainable(["router"])


def test_blocks_inside_of_blocks_and_other_terms_keep_their_gradients() -> None:
    model: Any = tiny_llama()
    bank = xlc.attach(model)
    for name in ("outer", "inner", "penalty"):
        bank.add(name, r=2)
    bank.trainable(["outer", "inner", "penalty"])
    tokens = torch.randint(3, 60, (2, 5))
    with bank.use(["outer"] * 2):
        model(tokens).logits.pow(2).sum().backward()
        with bank.use(["inner"] * 2):
            model(tokens).logits.pow(2).sum().backward()
        sum(weight.pow(2).sum() for weight in bank.parameters("penalty")).backward()
    for name in ("outer", "inner", "penalty"):
        assert any(weight.grad is not None and weight.grad.any() for weight in bank.parameters(name)), name


def test_gradients_of_gradients_are_refused() -> None:
    model: Any = tiny_llama()
    bank = xlc.attach(model)
    bank.add("a", r=2)
    for trained in (["a"], []):
        bank.trainable(trained)
        embedded = model.get_input_embeddings()(torch.randint(3, 60, (2, 5))).detach().requires_grad_()
        with bank.use(["a"] * 2), pytest.raises(LostGradientError, match=r"first derivatives; got create_graph=True"):
            torch.autograd.grad(model(inputs_embeds=embedded).logits.sum(), embedded, create_graph=True)


def test_other_adapters_are_trained_without_a_recompile(folders: dict[str, Path], tmp_path: Path) -> None:
    """As many of them, in the same modules: which slots are trained, and their scalings, are data."""
    names = ["first", "second"]
    more = {name: save_adapter(tmp_path / name, r=2, lora_alpha=3, seed=7, target_modules=TARGETS) for name in names}
    edit_config(more["second"], lora_alpha=5)
    model, bank = _attached(folders | more)
    compiled = _compiled(model)
    for recompiles, trained in ((True, names[0]), (False, names[1])):
        bank.trainable([trained])
        with torch._dynamo.config.patch(error_on_recompile=not recompiles), bank.use(["pirate", trained]):
            _loss(compiled, _tokens(0)).sum().backward()
        got = [parameter.grad for parameter in bank.parameters(trained)]
        for parameter in bank.parameters(trained):
            parameter.grad = None
        with bank.use(["pirate", trained]):
            _loss(model, _tokens(0)).sum().backward()
        for mine, wanted in zip(got, (parameter.grad for parameter in bank.parameters(trained)), strict=True):
            torch.testing.assert_close(mine, wanted)


def test_parameters_that_are_frozen_or_scaled_otherwise_get_what_is_theirs(tmp_path: Path) -> None:
    """Modules with scalings of their own, whose calls share no tensor of them; a parameter without gradients."""
    folder = save_adapter(tmp_path / "one", r=4, lora_alpha=4, alpha_pattern={"q_proj": 12}, target_modules=TARGETS)
    with quiet():
        peft_model = PeftModel.from_pretrained(tiny_llama().to(DEVICE), folder, is_trainable=True)
    _loss(peft_model, _tokens(0)).sum().backward()
    model = tiny_llama().to(DEVICE).requires_grad_(False)
    bank = xlc.attach(model, adapters={"one": folder})
    bank.trainable(["one"])
    frozen, *rest = bank.parameters("one")
    frozen.requires_grad_(False)
    compiled = torch.compile(model, backend="xpu_lora")
    for run in (model, compiled):
        with bank.use(["one"] * 2):
            _loss(run, _tokens(0)).sum().backward()
        assert frozen.grad is None
        wanted = [weight.grad for weight in peft_model.parameters() if weight.requires_grad][1:]
        for parameter, right in zip(rest, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, right, rtol=1e-3, atol=1e-5)
            parameter.grad = None


def test_gradients_that_come_after_the_block_reach_its_adapters(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    bank.trainable(["pirate", "haiku"])
    with bank.use(["pirate", None]):
        loss = _loss(model, _tokens(0)).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in bank.parameters("pirate"))


def test_hooks_run_or_are_refused(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    bank.trainable(["pirate", "haiku"])
    first, others = bank.parameters("pirate")[0], bank.parameters("haiku")
    seen: list[Tensor] = []
    first.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    with bank.use(["pirate"]):
        _loss(model, _tokens(0, 1)).sum().backward()
    assert [same_bits(grad, first.grad) for grad in seen] == [True]
    handle = first.register_hook(lambda _: None)
    with pytest.raises(AdapterError, match=r"'pirate': .*: wanted a parameter without hooks of register_hook"):
        bank.use(["pirate"]).__enter__()
    bank.save("haiku", folders["haiku"].parent / "saved")
    bank.trainable(["pirate", "haiku"])
    assert all(left is right for left, right in zip(others, bank.parameters("haiku"), strict=True))
    handle.remove()
    with bank.use(["pirate"]):
        loss = _loss(model, _tokens(0, 1)).sum()
        first.register_hook(lambda _: None)
        with pytest.raises(AdapterError, match="Use register_post_accumulate_grad_hook"):
            loss.backward()


def test_gradients_reach_the_adapters_of_the_forward_pass_whichever_block_is_open(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    bank.trainable(["pirate", "haiku"])

    def gradients_of(name: str) -> list[Tensor | None]:
        found = [parameter.grad for parameter in bank.parameters(name)]
        for parameter in bank.parameters(name):
            parameter.grad = None
        return found

    with bank.use(["pirate"] * 2):
        _loss(model, _tokens(0)).sum().backward()
    wanted = gradients_of("pirate")
    assert gradients_of("haiku") == [None] * len(bank.parameters("haiku"))
    # In a later block, of another number of rows.
    with bank.use(["pirate"] * 2):
        loss = _loss(model, _tokens(0)).sum()
    with bank.use(["haiku"] * 3):
        (loss + _loss(model, _tokens(1, 3)).sum()).backward()
    for mine, right in zip(gradients_of("pirate"), wanted, strict=True):
        torch.testing.assert_close(mine, right)
    assert None not in gradients_of("haiku")
    # In the block around it.
    with bank.use(["haiku"] * 3):
        with bank.use(["pirate"] * 2):
            loss = _loss(model, _tokens(0)).sum()
        loss.backward()
    for mine, right in zip(gradients_of("pirate"), wanted, strict=True):
        torch.testing.assert_close(mine, right)
    gradients_of("haiku")
    # And an adapter of the block around gets no zeros, with which an optimizer would do a step.
    with bank.use(["haiku"] * 2), bank.use(["pirate"] * 2):
        _loss(model, _tokens(0)).sum().backward()
    assert gradients_of("haiku") == [None] * len(bank.parameters("haiku"))


def test_a_backward_pass_that_fails_takes_nothing_from_the_next(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    bank.trainable(["pirate", "haiku"])
    with bank.use(["haiku"]):
        of_haiku = _loss(model, _tokens(0, 1)).sum()
        of_haiku.backward(retain_graph=True)
    wanted = [parameter.grad.clone() for parameter in bank.parameters("haiku")]

    def fail(_: Tensor) -> None:
        raise ValueError("on purpose")

    first = bank.parameters("pirate")[0]
    handle = first.register_post_accumulate_grad_hook(fail)
    # Of another size: the rows of batches of one size are in one buffer.
    with bank.use(["pirate"] * 2):
        with pytest.raises(ValueError, match="on purpose"):
            _loss(model, _tokens(0)).sum().backward()
        handle.remove()
        for parameter in bank.parameters("haiku"):
            parameter.grad = None
        of_haiku.backward()
    for parameter, right in zip(bank.parameters("haiku"), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, right)


def test_a_part_of_a_gradient_keeps_no_memory_of_others(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    bank.trainable(list(folders))
    with bank.use(["haiku"]):
        _loss(model, _tokens(0, 1)).sum().backward()
    for parameter in bank.parameters("haiku"):
        assert parameter.grad.untyped_storage().nbytes() == parameter.grad.nbytes
        assert parameter.grad.stride() == parameter.stride() or parameter.grad.is_contiguous()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda what: pickle.loads(pickle.dumps(what))])  # noqa: S301
def test_a_copy_of_a_model_that_is_trained_computes_the_same_and_trains_nothing(
    folders: dict[str, Path], copied: Callable[[Any], Any]
) -> None:
    _, bank = _attached(folders)
    bank.trainable(["pirate"])
    layer = next(module for module in bank._layers.values() if module.lora_training is not None)
    training = copied(layer.lora_training)
    assert same_bits(training.scalings, layer.lora_training.scalings)
    assert same_bits(training.slots, layer.lora_training.slots)
    assert not training.leaf_a.requires_grad
    assert not training.leaf_b.requires_grad


def test_a_model_whose_adapters_were_trained_is_freed(folders: dict[str, Path]) -> None:
    model, bank = _attached(folders)
    bank.trainable(["pirate"])
    with bank.use(["pirate"]):
        _loss(model, _tokens(0, 1)).sum().backward()
    left = weakref.ref(model)
    del model, bank
    gc.collect()
    assert left() is None
