"""The contract of a host, with each of `HOSTS`: what it declares is what `attach` uses and what its layers do."""

from __future__ import annotations

import copy
import inspect
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import stand_ins
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.errors import AttachError, UnsupportedAdapterError
from xpu_lora_compile.layers import HOSTS, Host, host_of
from xpu_lora_compile.layers.experts import Experts
from xpu_lora_compile.layers.host import LoraLayer, full_name
from xpu_lora_compile.layers.router import Router
from xpu_lora_compile.rows.routing import BatchRouting


@dataclass(frozen=True)
class Example:
    """A module of one kind.

    Args:
        module: makes one.
        inputs: for three sequences.
        shrink: the oracle: A `[r, D]` and the inputs to `[..., r]`.
        features_last: the output with its features in the last dimension.
    """

    module: Callable[[], nn.Module]
    inputs: Tensor
    shrink: Callable[[Tensor, Tensor], Tensor]
    features_last: Callable[[Tensor], Tensor] = lambda output: output


# By the host's name. What a library makes that may not be there is a stand-in.
EXAMPLES = {
    "nn.Linear": Example(lambda: nn.Linear(6, 5), torch.randn(3, 2, 6), lambda a, x: x @ a.t()),
    "nn.Embedding": Example(
        lambda: nn.Embedding(7, 4), torch.tensor([[0, 6], [3, 1], [2, 2]]), lambda a, tokens: a.t()[tokens]
    ),
    "nn.Conv2d": Example(
        lambda: nn.Conv2d(3, 5, (2, 3)),
        torch.randn(3, 3, 2, 6),
        lambda a, x: nn.functional.conv2d(x, a.view(-1, 3, 2, 3)).flatten(2).transpose(1, 2),
        lambda output: output.flatten(2).transpose(1, 2),
    ),
    "Conv1D": Example(lambda: Conv1D(5, 6), torch.randn(3, 2, 6), lambda a, x: x @ a.t()),
    **{
        name: Example(lambda kind=kind: kind(6, 5), torch.randn(3, 2, 6), lambda a, x: x @ a.t())
        for name, kind in stand_ins.BY_HOST.items()
    },
}
SLOTS, RANK = 2, 3


# Experts and routers are of models of transformers, and have test files of their own.
@pytest.fixture(params=[host for host in HOSTS if not isinstance(host, Experts | Router)], ids=lambda host: host.name)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    torch._dynamo.reset()
    host: Host = request.param
    assert host.name in EXAMPLES, "Give it an example in EXAMPLES."
    if host.name in stand_ins.BY_HOST:
        base = stand_ins.BY_HOST[host.name].__mro__[1 if host.name.startswith("GPTQ") else 0]
        monkeypatch.setattr(host, "classes", (*host.classes, full_name(base)))
    return host


@pytest.fixture
def example(host: Host) -> Example:
    return EXAMPLES[host.name]


@pytest.fixture
def model(example: Example) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(example.module()).requires_grad_(False)


def attached(model: nn.Module, **options: Any) -> tuple[xlc.AdapterBank, LoraLayer]:
    bank = xlc.attach(model, slots=SLOTS, max_rank=RANK, target_modules=["0"], **options)
    assert isinstance(model[0], LoraLayer)
    return bank, model[0]


def weights_of(bank: xlc.AdapterBank, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """A and B, as a checkpoint holds them."""
    site, random = bank.sites["0"], torch.Generator().manual_seed(1)
    return torch.randn(rank, site.in_features, generator=random), torch.randn(site.out_features, rank, generator=random)


def test_each_host_has_a_name_and_a_test_file_of_its_own() -> None:
    files = [f"test_{type(host).__module__.rpartition('.')[2]}.py" for host in HOSTS]
    assert len(set(files)) == len({host.name for host in HOSTS}) == len(HOSTS)
    assert [file for file in files if not (Path(__file__).parent / file).is_file()] == []


def test_a_module_belongs_to_the_first_host_that_takes_it(host: Host, model: nn.Module) -> None:
    assert host.takes_class(type(model[0]))
    assert host_of(model[0]) is host


def test_a_module_with_a_forward_of_its_own_has_no_host(model: nn.Module) -> None:
    model[0].forward = model[0].forward
    assert host_of(model[0]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attach_uses_what_the_host_declares(host: Host, model: nn.Module, example: Example, dtype: torch.dtype) -> None:
    model.to(dtype)
    site, layer_class = host.site(model[0]), host.layer(model[0])
    # What says nothing has the dtype of the model, which is its bias.
    declared = host.dtype(model[0]) or model[0].bias.dtype, host.device(model[0])
    bank, layer = attached(model)
    assert type(layer) is layer_class
    assert bank.sites == {"0": site}
    assert layer.lora_a.shape == (SLOTS, *layer_class.shape_of_a(site, RANK))
    assert sorted(layer.lora_a.shape[1:]) == sorted((RANK, site.in_features))
    assert layer.lora_b.shape == (SLOTS, site.out_features, RANK)
    assert (layer.lora_a.dtype, layer.lora_a.device) == declared
    assert (layer.lora_b.dtype, layer.lora_b.device) == declared
    inputs = example.inputs.to(dtype) if example.inputs.is_floating_point() else example.inputs
    output = example.features_last(layer(inputs))
    assert (output.shape[-1], output.dtype) == (site.out_features, declared[0])


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("way", ["inference", "grad-mode", "compiled"])
def test_a_layer_adds_the_adapter_of_each_row(model: nn.Module, example: Example, way: str, rank: int) -> None:
    base = model(example.inputs)
    bank, layer = attached(model)
    a, b = weights_of(bank, rank)
    # Of the slot that no row uses.
    layer.lora_a[0], layer.lora_b[0] = torch.nan, torch.nan
    layer.store(1, a, b)
    bank._slots[:] = ["other", "a"]
    run: Any = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    with torch.set_grad_enabled(way == "grad-mode"), bank.use(["a", None, "a"]):
        output = run(example.inputs) if way == "compiled" else model(example.inputs)
    output, base = example.features_last(output), example.features_last(base)
    expected = base + example.shrink(a, example.inputs) @ b.t() * torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    torch.testing.assert_close(output, expected)
    assert torch.equal(output[1], base[1])
    assert torch.equal(example.features_last(model(example.inputs)), base)


def test_a_layer_says_how_many_dimensions_of_its_input_are_no_rows(
    model: nn.Module, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, layer = attached(model)
    bank._slots[0] = "a"
    said: list[int] = []
    rows_of = BatchRouting.rows_of

    def noted(self: BatchRouting, layer: Any, inputs: Tensor, features: int) -> Tensor | None:
        said.append(features)
        return rows_of(self, layer, inputs, features)

    monkeypatch.setattr(BatchRouting, "rows_of", noted)
    with torch.no_grad(), bank.use(["a", None, "a"]):
        model(example.inputs)
    assert said == [layer.lora_features]


def test_a_weight_that_is_read_without_a_call_is_noticed(model: nn.Module) -> None:
    if "weight" not in model[0]._parameters:
        with pytest.raises(AttributeError):
            attached(model)[1].weight  # noqa: B018
        return
    kind = model[0].weight.dtype
    bank, layer = attached(model)
    bank._slots[0] = "a"
    with pytest.raises(xlc.errors.UnreachedLayerError), bank.use(["a"]):
        layer.weight.float().sum()
    with bank.use(["a"]):
        # No assertion: pytest would write it as two statements.
        dtype = layer.weight.dtype
    assert dtype == kind


def test_a_layer_is_called_by_keyword_as_before(model: nn.Module, example: Example) -> None:
    base = model(example.inputs)
    name = next(iter(inspect.signature(model[0].forward).parameters))
    attached(model)
    assert torch.equal(model[0](**{name: example.inputs}), base)


def test_detach_gives_back_the_class_and_all_attributes(model: nn.Module) -> None:
    kind, attributes, text = type(model[0]), set(vars(model[0])), str(model)
    bank, _ = attached(model)
    bank.detach()
    assert (type(model[0]), set(vars(model[0])), str(model)) == (kind, attributes, text)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_can_be_made_plain(model: nn.Module, example: Example, way: str) -> None:
    kind, base = type(model[0]), model(example.inputs)
    attached(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    xlc.detach(other)
    assert type(other[0]) is kind
    assert torch.equal(other(example.inputs), base)


def test_the_state_dict_of_a_layer_is_that_of_the_module(model: nn.Module) -> None:
    before = model.state_dict()
    attached(model)
    assert list(model.state_dict()) == list(before)
    model.load_state_dict(before)


def test_errors_name_the_kinds_of_modules_that_carry_lora(host: Host, tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(AttachError, match=f"plain .*{host.name}.* modules"):
        xlc.attach(model, target_modules=["0"])
    bank = xlc.attach(model, target_modules=["1"])
    write_adapter(tmp_path, {"0": bank.sites["1"]}, 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["0"]
    with pytest.raises(UnsupportedAdapterError, match=rf"LoRA on .*{host.name}.* modules; got LoRA on 0 \(LayerNorm\)"):
        bank.load("a", tmp_path)
