"""Each family of linear layers in a small model: PEFT's answer for each adapter alone, from one mixed batch."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support import quantized_models as models
from support.peft_folders import loaded_by_peft, quiet, save_adapter
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import CopiedModelError
from xpu_lora_compile.layers.host import LoraLayer

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(1, 70, (3, 5), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Family:
    """A model, the modules of two adapters, and how far rounding may take its results from PEFT's.

    Args:
        make: the model.
        first: modules that the adapter of the first row has LoRA on.
        second: those of the last row's.
        tolerance: absolute, of logits of about 0.6.
        compiles: as one graph; compressed-tensors breaks it, with and without LoRA.
    """

    make: models.Make
    first: Any = field(default_factory=lambda: ["q_proj", "down_proj"])
    second: Any = field(default_factory=lambda: ["o_proj"])
    tolerance: float = 5e-6
    compiles: bool = True


def intx(ao: Any) -> Any:
    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))


FAMILIES = {
    "Conv1D": Family(models.gpt2, ["c_attn", "c_proj"], "all-linear"),
    "FalconLinear": Family(models.falcon, ["query_key_value"], "all-linear"),
    "scaled embedding of Gemma": Family(models.gemma3, ["embed_tokens", "q_proj"], ["embed_tokens"]),
    "scaled embedding of BART": Family(models.bart, ["embed_tokens", "q_proj"], ["embed_tokens"]),
    "bitsandbytes 4-bit": Family(models.bnb_4bit),
    "bitsandbytes 8-bit": Family(models.bnb_8bit),
    "torchao int8": Family(models.torchao(lambda ao: ao.Int8WeightOnlyConfig())),
    "torchao float8": Family(models.torchao(lambda ao: ao.Float8WeightOnlyConfig())),
    "torchao int4": Family(models.torchao(intx)),
    # A step of int8 in an activation, where another order of sums rounds it to its neighbour.
    "torchao int8, activations too": Family(
        models.torchao(lambda ao: ao.Int8DynamicActivationInt8WeightConfig()), tolerance=5e-3
    ),
    "HQQ 4-bit": Family(models.hqq),
    "compressed-tensors int8": Family(models.compressed, compiles=False),
}


@dataclass(frozen=True)
class Case:
    family: Family
    folders: dict[str, Path]
    base: Tensor
    wanted: Tensor

    def model(self) -> nn.Module:
        return models.seeded(self.family.make)

    def attached(self) -> tuple[nn.Module, xlc.AdapterBank]:
        model = self.model()
        return model, xlc.attach(model, adapters=self.folders)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("adapters")

    def model() -> nn.Module:
        return models.seeded(family.make)

    first = save_adapter(folder / "first", model=model(), seed=1, target_modules=family.first)
    second = save_adapter(folder / "second", model=model(), seed=2, target_modules=family.second)
    with torch.no_grad(), quiet():
        base = model()(TOKENS).logits
        alone = [loaded_by_peft(path, model())(TOKENS).logits for path in (first, second)]
    assert all(float((logits - base).abs().max()) > 0.1 for logits in alone)
    return Case(family, {"a": first, "b": second}, base, torch.stack([alone[0][0], base[1], alone[1][2]]))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad-mode"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_rows_of_a_mixed_batch_are_those_of_peft(case: Case, way: str, grad: bool) -> None:
    torch._dynamo.reset()
    model, bank = case.attached()
    run: Any = model
    if way == "compiled":
        options = {"xpu_lora.execute": "eager"}
        run = torch.compile(model, backend="xpu_lora", fullgraph=case.family.compiles, options=options)
    with torch.set_grad_enabled(grad), bank.use(["a", None, "b"]):
        if not case.family.compiles:
            model(TOKENS)
        logits = run(TOKENS).logits
    torch.testing.assert_close(logits, case.wanted, atol=case.family.tolerance, rtol=0)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, case.base)


def test_state_dict_and_classes_are_those_of_the_model(case: Case) -> None:
    plain = case.model()
    model, bank = case.attached()
    assert list(model.state_dict()) == list(plain.state_dict())
    bank.detach()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, case.base)


def test_a_copy_says_so_and_can_be_made_plain(case: Case) -> None:
    model, _ = case.attached()
    other = copy.deepcopy(model)
    with pytest.raises(CopiedModelError):
        other(TOKENS)
    xlc.detach(other)
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS).logits, case.base, atol=case.family.tolerance, rtol=0)


def test_a_model_in_training_mode_and_in_bfloat16_autocast_keeps_its_rows_apart(case: Case) -> None:
    model, bank = case.attached()
    with torch.no_grad(), bank.use(["a", None, "b"]):
        assert model.train()(TOKENS).logits.shape == case.base.shape
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.eval()(TOKENS).logits
    torch.testing.assert_close(logits.float(), case.wanted, atol=0.05, rtol=0)


def test_a_layer_alone_is_pickled_by_the_names_of_its_parts(case: Case) -> None:
    model, _ = case.attached()
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    made, arguments, *_ = layer.__reduce_ex__(2)
    assert type(made(*arguments)) is type(layer)
    pickle.dumps((made, arguments))


def test_verify_finds_each_call_within_rounding(case: Case) -> None:
    if not case.family.compiles:
        pytest.skip("breaks its graph")
    torch._dynamo.reset()
    model, _ = case.attached()
    assert len(xlc.verify(model, generate_code=False)(TOKENS).sites) > 0
