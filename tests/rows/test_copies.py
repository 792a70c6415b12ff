"""A copy of a model that LoRA is attached to belongs to no bank, says so, and can be given one or made plain."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_folders import quiet, save_adapter, tiny_llama
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.errors import AttachError, CopiedModelError, own_error
from xpu_lora_compile.layers.host import LoraLayer

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def quantized(model: nn.Module) -> nn.Module:
    """Quantizes nothing here, but copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "save-and-load": saved_and_loaded,
    "quantize_dynamic": quantized,
    "AveragedModel": averaged,
}
EVERY_COPY = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).eval().requires_grad_(False)


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    sites = xlc.attach(copy.deepcopy(model)).sites
    with torch.random.fork_rng():
        torch.manual_seed(1)
        write_adapter(tmp_path, sites, 2)
    return tmp_path


@pytest.fixture
def bank(model: nn.Module, folder: Path) -> xlc.AdapterBank:
    bank = xlc.attach(model, max_rank=2)
    bank.load("a", folder)
    return bank


def served(model: nn.Module, bank: xlc.AdapterBank) -> Tensor:
    with bank.use(["a", None]):
        return model(X)


@EVERY_COPY
def test_a_copy_says_that_it_is_one_outside_of_blocks(
    copied: Callable[[nn.Module], nn.Module], model: nn.Module, bank: xlc.AdapterBank
) -> None:
    other = copied(model)
    with pytest.raises(CopiedModelError, match=r"xlc.attach\(copy\).* or xlc.detach\(copy\)"):
        other(X)


@EVERY_COPY
@pytest.mark.parametrize("names", [["a", "a"], ["a", None], [None, None]], ids=str)
def test_a_copy_says_that_it_is_one_in_a_block_of_the_original(
    names: list[str | None], copied: Callable[[nn.Module], nn.Module], model: nn.Module, bank: xlc.AdapterBank
) -> None:
    other = copied(model)
    with bank.use(names), pytest.raises(CopiedModelError):
        other(X)


@EVERY_COPY
def test_a_copy_that_was_made_in_a_block_says_so_too(
    copied: Callable[[nn.Module], nn.Module], model: nn.Module, bank: xlc.AdapterBank
) -> None:
    with bank.use(["a", None]):
        before = model(X)
        other = copied(model)
        with pytest.raises(CopiedModelError):
            other(X)
        assert torch.equal(model(X), before)
    with pytest.raises(CopiedModelError):
        other(X)


def test_a_copy_that_is_compiled_says_so_too(model: nn.Module, bank: xlc.AdapterBank) -> None:
    run = torch.compile(copy.deepcopy(model), backend="eager")
    for block in (bank.use(["a", None]), bank.use([None, None])):
        with block, pytest.raises(Exception, match="a copy of one, which no bank knows") as error:
            run(X)
        assert isinstance(own_error(error.value), CopiedModelError)


@EVERY_COPY
def test_the_original_is_untouched(
    copied: Callable[[nn.Module], nn.Module], model: nn.Module, bank: xlc.AdapterBank, folder: Path
) -> None:
    base, before = model(X), served(model, bank)
    other = copied(model)
    with pytest.raises(CopiedModelError):
        other(X)
    assert torch.equal(model(X), base)
    assert torch.equal(served(model, bank), before)
    xlc.detach(other)
    assert torch.equal(model(X), base)
    assert torch.equal(served(model, bank), before)
    xlc.attach(other)
    assert torch.equal(served(model, bank), before)


@EVERY_COPY
def test_detach_makes_a_copy_plain(
    copied: Callable[[nn.Module], nn.Module], model: nn.Module, bank: xlc.AdapterBank
) -> None:
    base = model(X)
    other = copied(model)
    xlc.detach(other)
    assert not any(isinstance(module, LoraLayer) for module in other.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in other.modules())
    assert not dict(other.named_buffers())
    assert torch.equal(other(X), base)
    with bank.use(["a", None]):
        assert torch.equal(other(X), base)


@EVERY_COPY
def test_attach_gives_a_copy_a_bank_of_its_own(
    copied: Callable[[nn.Module], nn.Module], model: nn.Module, bank: xlc.AdapterBank, folder: Path
) -> None:
    base, before = model(X), served(model, bank)
    other = copied(model)
    own = xlc.attach(other, max_rank=2)
    assert own.names == ()
    assert torch.equal(other(X), base)
    own.load("b", folder)
    with own.use(["b", None]):
        assert torch.equal(other(X), before)
        # The original has no part in it.
        assert torch.equal(model(X), base)
    with bank.use(["a", None]), own.use([None, "b"]):
        assert torch.equal(model(X), before)
        assert not torch.equal(other(X), before)
    own.detach()
    assert torch.equal(other(X), base)


def test_a_copy_of_a_copy_says_so_as_well(model: nn.Module, bank: xlc.AdapterBank) -> None:
    other = saved_and_loaded(copy.deepcopy(model))
    with pytest.raises(CopiedModelError):
        other(X)
    xlc.detach(other)
    other(X)


def test_weights_of_a_copy_are_its_own(model: nn.Module, bank: xlc.AdapterBank) -> None:
    before = served(model, bank)
    other = copy.deepcopy(model)
    xlc.detach(other)
    other[0].weight.zero_()
    assert torch.equal(served(model, bank), before)


def test_a_state_dict_goes_from_one_to_the_other(model: nn.Module, bank: xlc.AdapterBank) -> None:
    other = copy.deepcopy(model)
    xlc.detach(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_detach_refuses_a_model_with_a_bank_and_a_plain_one(model: nn.Module, bank: xlc.AdapterBank) -> None:
    with pytest.raises(AttachError, match=r"a model with a bank. Call `bank.detach\(\)`"):
        xlc.detach(model)
    bank.detach()
    with pytest.raises(AttachError, match=r"a plain model\. Use it as it is"):
        xlc.detach(model)


def test_a_copy_may_be_looked_at(model: nn.Module, bank: xlc.AdapterBank) -> None:
    other = copy.deepcopy(model)
    assert other[0].weight.shape == (6, 4)
    assert list(other.state_dict()) == list(model.state_dict())
    assert "LoraLinear" in repr(other)


def test_a_part_of_the_model_that_is_copied_says_so(model: nn.Module, bank: xlc.AdapterBank) -> None:
    other = copy.deepcopy(model[0])
    with bank.use(["a", None]), pytest.raises(CopiedModelError):
        other(X)


# generate.

TOKENS = torch.arange(6).view(2, 3) + 3
GENERATE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "save-and-load"])
def test_generate_of_a_copy_uses_the_copy(copied: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = tiny_llama(pad_token_id=0)
    bank = xlc.attach(model, max_rank=4, target_modules=["q_proj", "v_proj", "lm_head"])
    bank.load("a", save_adapter(tmp_path / "a", target_modules=["q_proj", "v_proj", "lm_head"]))
    with quiet():
        plain = model.generate(TOKENS, **GENERATE)
        with bank.use(["a", "a"]):
            wanted = model.generate(TOKENS, **GENERATE)
            other = copied(model)
            with pytest.raises(CopiedModelError):
                other.generate(TOKENS, **GENERATE)
        assert not torch.equal(plain, wanted)
        with pytest.raises(CopiedModelError):
            other.generate(TOKENS, **GENERATE)
        xlc.detach(other)
        with torch.no_grad():
            other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
        with bank.use(["a", "a"]):
            of_the_copy = other.generate(TOKENS, **GENERATE)
            assert torch.equal(model.generate(TOKENS, **GENERATE), wanted)
        assert torch.equal(model.generate(TOKENS, **GENERATE), plain)
        assert torch.equal(other.generate(TOKENS, **GENERATE), of_the_copy)
    assert not torch.equal(of_the_copy, plain)


def test_generate_of_a_copy_with_a_bank_of_its_own_has_its_adapters(tmp_path: Path) -> None:
    model = tiny_llama(pad_token_id=0)
    targets = ["q_proj", "v_proj", "lm_head"]
    bank = xlc.attach(model, max_rank=4, target_modules=targets)
    bank.load("a", save_adapter(tmp_path / "a", target_modules=targets))
    other = copy.deepcopy(model)
    own = xlc.attach(other, max_rank=4, target_modules=targets)
    own.load("a", tmp_path / "a")
    with quiet():
        with bank.use(["a", None]):
            wanted = model.generate(TOKENS, **GENERATE, num_beams=2)
        with own.use(["a", None]):
            assert torch.equal(other.generate(TOKENS, **GENERATE, num_beams=2), wanted)
