"""LoRA on bitsandbytes: the dtype of adapters, outliers that a batch shares, and which classes are taken by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import quantized_models as models
from support.peft_folders import loaded_by_peft, quiet, save_adapter
from support.stand_ins import StandInForBitsAndBytes
from torch import nn

import xpu_lora_compile as xlc
from xpu_lora_compile.layers import host_of

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

TOKENS = torch.randint(1, 70, (3, 5), generator=torch.Generator().manual_seed(3))


def named(name: str, *bases: type, **members: Any) -> Any:
    """A class that is called as one of bitsandbytes."""
    members = {"__module__": "bitsandbytes.nn.modules", "__qualname__": name, **members}
    return type(name, bases or (nn.Linear,), {"forward": StandInForBitsAndBytes.forward, **members})


def test_classes_are_known_by_name_and_subclasses_by_their_forward() -> None:
    kind = named("Linear4bit")
    nf4 = type("LinearNF4", (kind,), {"__module__": "elsewhere"})
    odd = type("Odd", (kind,), {"__module__": "elsewhere", "forward": lambda self, x: x})
    found = [host_of(each(6, 5)) for each in (kind, named("Linear8bitLt"), nf4, odd, named("OutlierAwareLinear"))]
    assert [host and host.name for host in found] == ["bitsandbytes"] * 3 + [None] * 2


@pytest.mark.parametrize(
    ("said", "wanted"), [(None, torch.bfloat16), (torch.float16, torch.float16)], ids=["of-the-model", "said"]
)
def test_adapters_have_the_dtype_to_compute_in(said: torch.dtype | None, wanted: torch.dtype) -> None:
    layer = named("Linear4bit")(6, 5, bias=False)
    layer.weight = nn.Parameter(torch.zeros(15, 1, dtype=torch.uint8), requires_grad=False)
    layer.compute_dtype = said
    model = nn.Sequential(nn.LayerNorm(6), layer, nn.Embedding(50, 6).bfloat16())
    xlc.attach(model, target_modules=["1"])
    assert layer.lora_a.dtype == layer.lora_b.dtype == wanted


def test_float16_and_bfloat16_inputs_go_with_adapters_in_float32() -> None:
    model = nn.Sequential(StandInForBitsAndBytes(6, 5))
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            model[0].bias.data = model[0].bias.data.to(dtype)
            x = torch.randn(2, 6, dtype=dtype)
            base = model(x)
            bank = xlc.attach(
                model, slots=1, max_rank=2, dtype=torch.float32, target_modules=["0"],
                linear_classes=[StandInForBitsAndBytes],
            )  # fmt: skip
            model[0].store(0, torch.ones(2, 6), torch.ones(5, 2))
            bank._slots[0] = "a"
            with bank.use(["a", None]):
                output = model(x)
            assert output.dtype == dtype
            assert torch.equal(output[1], base[1])
            torch.testing.assert_close(output[0] - base[0], 2 * x[0].sum().expand(5), atol=0.1, rtol=0.02)
            bank.detach()


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_outliers_of_a_batch_are_those_that_peft_finds_in_it(way: str, tmp_path: Path) -> None:
    """Which columns are computed in float16 depends on all rows of a batch: PEFT is given the same mixed batch."""

    def make() -> nn.Module:
        return models.seeded(lambda: models.bnb_8bit(threshold=1.0))

    first = save_adapter(tmp_path / "a", model=make(), seed=1, target_modules=["q_proj", "down_proj"])
    second = save_adapter(tmp_path / "b", model=make(), seed=2, target_modules=["o_proj"])
    peft = loaded_by_peft(first, make())
    with quiet(), torch.no_grad():
        peft.load_adapter(second, "b")
        wanted = peft(TOKENS, adapter_names=["default", "__base__", "b"]).logits
    torch._dynamo.reset()
    model = make()
    bank = xlc.attach(model, adapters={"a": first, "b": second})
    run: Any = model
    if way == "compiled":
        run = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    with torch.no_grad(), bank.use(["a", None, "b"]):
        torch.testing.assert_close(run(TOKENS).logits, wanted, atol=5e-6, rtol=0)


def test_a_gradient_goes_through_the_base_and_the_adapters(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return models.seeded(models.bnb_4bit).requires_grad_(False)

    folder = save_adapter(tmp_path / "a", model=make(), seed=1, target_modules=["q_proj", "down_proj"])

    def gradient(run: Any) -> torch.Tensor:
        embedded = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        run(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        return embedded.grad

    wanted = gradient(loaded_by_peft(folder, make()))
    torch._dynamo.reset()
    model = make()
    bank = xlc.attach(model, adapters={"a": folder})
    compiled = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    with bank.use(["a", None, "a"]):
        for run in (model, compiled):
            found = gradient(run)
            torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], atol=1e-4, rtol=1e-4)
            assert not torch.allclose(found[1], wanted[1], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inductor_compiles_a_mixed_batch(dtype: torch.dtype, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return models.seeded(lambda: models.bnb_4bit(dtype))

    folder = save_adapter(tmp_path / "a", model=make(), seed=1, target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        base, wanted = make()(TOKENS).logits, loaded_by_peft(folder, make())(TOKENS).logits
        torch._dynamo.reset()
        model = make()
        # Packs the weights, which torch.compile does not follow, with or without LoRA.
        model(TOKENS)
        bank = xlc.attach(model, adapters={"a": folder})
        with bank.use(["a", None, "a"]):
            logits = torch.compile(model, backend="xpu_lora", fullgraph=True)(TOKENS).logits
    tolerance = 0.02 if dtype == torch.bfloat16 else 5e-6
    torch.testing.assert_close(logits, torch.stack([wanted[0], base[1], wanted[2]]), atol=tolerance, rtol=0)
