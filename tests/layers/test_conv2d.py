"""LoRA on `nn.Conv2d`: PEFT's answer for each adapter alone, from one mixed batch of images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.peft_folders import edited_weights, loaded_by_peft, quiet, save_adapter
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import (
    AdapterError,
    AdapterShapeError,
    ArtifactError,
    AttachError,
    UnprovedRowsError,
    UnsupportedAdapterError,
)
from xpu_lora_compile.layers import host_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

IMAGES = torch.randn(4, 3, 11, 9, generator=torch.Generator().manual_seed(5))
NAMES = ["a", None, "b", "a"]


class Block(nn.Module):
    """A block of a diffusion model: it goes down and up again, with a shortcut and the step's embedding between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.time = nn.Linear(4, 8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2)
        self.proj = nn.Linear(8, 8)
        self.up = nn.Conv2d(8, 8, 3, padding=1)
        self.conv_out = nn.Conv2d(16, 5, 3, padding=1, bias=False)

    def forward(self, images: Tensor, steps: Tensor) -> Tensor:
        first = self.conv_in(images)
        hidden = nn.functional.silu(self.norm(first)) + self.time(steps)[:, :, None, None]
        small = self.down(hidden) + self.shortcut(first)
        tokens = self.proj(small.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(small.shape)
        large = self.up(nn.functional.interpolate(tokens, size=first.shape[-2:]))
        # As classifier-free guidance does, twice.
        both = torch.cat([torch.cat([large, first], 1), torch.cat([first, large], 1)])
        one, other = self.conv_out(both).chunk(2)
        return other + 2 * (one - other)


def resnet() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    return hf.ResNetForImageClassification(config)


STEPS = torch.randn(4, 4, generator=torch.Generator().manual_seed(6))
# A model, its inputs, and what each of two adapters has LoRA on.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any], dict[str, Any]]] = {
    "block": (
        Block,
        (IMAGES, STEPS),
        {"target_modules": ["conv_in", "down", "shortcut", "proj", "up", "conv_out", "time"]},
        {"target_modules": ["down", "conv_out"], "r": 3, "use_rslora": True, "rank_pattern": {"down": 2}},
    ),
    "resnet": (
        resnet,
        (IMAGES,),
        {"target_modules": ["convolution"]},
        {"target_modules": r".*stages\.1.*convolution", "r": 2},
    ),
}

# By name: a layer, of sizes, strides and padding of all kinds. PEFT's A has no dilation, and pads with zeros.
LAYERS = {
    "1x1": lambda: nn.Conv2d(3, 5, 1),
    "1x1-stride-padding": lambda: nn.Conv2d(3, 5, 1, stride=(2, 3), padding=(1, 0)),
    "3x3": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "3x1-stride": lambda: nn.Conv2d(3, 5, (3, 1), stride=(3, 2), padding=(0, 2), bias=False),
    "valid": lambda: nn.Conv2d(3, 5, 4, padding="valid"),
    "same-even-dilated": lambda: nn.Conv2d(3, 5, (2, 4), padding="same", dilation=(2, 1)),
    "same-dilated": lambda: nn.Conv2d(3, 5, 3, padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    "circular-same": lambda: nn.Conv2d(3, 5, 3, padding="same", padding_mode="circular"),
    "as-large-as-the-image": lambda: nn.Conv2d(3, 5, (11, 9)),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def by_peft(folder: Path, model: nn.Module, inputs: tuple[Tensor, ...], name: str | None) -> Tensor:
    plain = copy.deepcopy(model)
    with torch.no_grad():
        return result_of((loaded_by_peft(folder / name, plain) if name else plain)(*inputs))


def result_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def assert_each(output: Tensor, wanted: dict[str | None, Tensor], names: list[str | None]) -> None:
    for row, name in enumerate(names):
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(output[row] / largest, wanted[name][row] / largest, atol=2e-6, rtol=0)


@pytest.fixture
def layer(tmp_path: Path) -> nn.Module:
    """One convolution, and the folder "a" of an adapter for it."""
    model = nn.Sequential(made(LAYERS["3x3"])).eval()
    save_adapter(tmp_path / "a", model=copy.deepcopy(model), target_modules=["0"])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_each_image_of_a_mixed_batch_has_pefts_result(name: str, tmp_path: Path) -> None:
    make, inputs, first, second = MODELS[name]
    model = made(make)
    save_adapter(tmp_path / "a", model=copy.deepcopy(model), **first)
    save_adapter(tmp_path / "b", model=copy.deepcopy(model), seed=1, **second)
    wanted = {name: by_peft(tmp_path, model, inputs, name) for name in ("a", "b", None)}
    bank = xlc.attach(model, adapters={"a": tmp_path / "a", "b": tmp_path / "b"})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    others = ["b", "b", None, "a"]
    for names in (NAMES, others, ["a"] * 4, [None] * 4):
        with torch.no_grad(), bank.use(names):
            assert_each(result_of(model(*inputs)), wanted, names)
    with torch.no_grad(), bank.use(NAMES):
        assert_each(result_of(compiled(*inputs)), wanted, NAMES)
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        bank.drop("b")
        bank.load("b", tmp_path / "b")
        with bank.use(others):
            assert_each(result_of(compiled(*inputs)), wanted, others)
    with torch.no_grad():
        assert torch.equal(result_of(model(*inputs)), wanted[None])


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_any_shape_computes_as_pefts(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(made(LAYERS[name]))
    save_adapter(tmp_path / "a", model=copy.deepcopy(model), target_modules=["0"])
    wanted = {name: by_peft(tmp_path, model, (IMAGES,), name) for name in ("a", None)}
    bank = xlc.attach(model, adapters={"a": tmp_path / "a"}, slots=2)
    bank._layers["0"].lora_a[1], bank._layers["0"].lora_b[1] = torch.nan, torch.nan
    names = ["a", None, None, "a"]
    for images in (IMAGES, IMAGES.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            base = model(images)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), bank.use(names):
                output = model(images)
            assert_each(output, wanted, names)
            assert torch.equal(output[1], base[1])
            for memory_format in (torch.contiguous_format, torch.channels_last):
                kept = [tensor.is_contiguous(memory_format=memory_format) for tensor in (output, base)]
                assert kept[0] == kept[1]


def test_one_graph_serves_images_of_any_size(layer: nn.Module, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain = copy.deepcopy(layer)
    bank = xlc.attach(layer, adapters={"a": tmp_path / "a"})
    options = {"xpu_lora.execute": "eager"}
    compiled = torch.compile(layer, backend="xpu_lora", fullgraph=True, dynamic=True, options=options)
    names = ["a", None, "a", None]
    with torch.no_grad(), bank.use(names):
        compiled(IMAGES)
        images = IMAGES[:, :, :8, :7].contiguous()
        with torch.compiler.set_stance("fail_on_recompile"):
            output = compiled(images)
    assert_each(output, {name: by_peft(tmp_path, plain, (images,), name) for name in ("a", None)}, names)


def test_nan_in_one_image_and_its_adapter_stays_there(layer: nn.Module, tmp_path: Path) -> None:
    bank = xlc.attach(layer, adapters={"a": tmp_path / "a"}, slots=2)
    bank._layers["0"].lora_a[1], bank._layers["0"].lora_b[1] = torch.nan, torch.nan
    bank._slots[1] = "broken"
    images = IMAGES.clone()
    images[3] = torch.nan
    with torch.no_grad():
        with bank.use(["a", None, "a", "a"]):
            wanted = layer(IMAGES)
        with bank.use(["a", None, "broken", "a"]):
            output = layer(images)
    assert torch.equal(output[:2], wanted[:2])
    assert output[2:].isnan().all()


@pytest.mark.parametrize(
    "more", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}], ids=["DoRA", "lora_bias", "bias"]
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_dora_and_biases_are_pefts(more: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=bias), nn.Conv2d(4, 5, 1))  # noqa: E731
    model = made(make)
    save_adapter(tmp_path / "a", model=copy.deepcopy(model), target_modules=["0", "1"], **more)
    save_adapter(tmp_path / "b", model=copy.deepcopy(model), target_modules=["0"], seed=1)
    with edited_weights(tmp_path / "a") as tensors:
        for key in tensors:
            if "magnitude" in key or key.endswith(".bias"):
                tensors[key] = torch.rand(tensors[key].shape, generator=torch.Generator().manual_seed(2)) + 0.5
    wanted = {name: by_peft(tmp_path, model, (IMAGES,), name) for name in ("a", "b", None)}
    bank = xlc.attach(model, adapters={"a": tmp_path / "a", "b": tmp_path / "b"})
    with torch.no_grad(), bank.use(NAMES):
        assert_each(model(IMAGES), wanted, NAMES)
    bank.detach()
    if "bias" in more and not bias:
        return
    with pytest.raises(UnsupportedAdapterError, match=r"use_dora=True|lora_bias=True|bias=.lora_only"):
        xlc.attach(model, target_modules=["0", "1"]).load("a", tmp_path / "a")


def test_a_peft_model_computes_on_the_bank() -> None:
    model = made(Block)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["down", "conv_out", "proj"], r=3, use_dora=True, init_lora_weights=False)
        live = get_peft_model(model, config).eval()
        live.add_adapter("b", LoraConfig(target_modules=["down", "up", "conv_out"], r=2, init_lora_weights=False))
    live.requires_grad_(False)
    oracle = copy.deepcopy(live)
    bank = xlc.attach(live)
    wanted: dict[str | None, Tensor] = {}
    with torch.no_grad():
        for name in ("default", "b"):
            for each in (live, oracle):
                each.set_adapter(name, inference_mode=True)
            wanted[name] = oracle(IMAGES, STEPS)
            assert_each(live(IMAGES, STEPS), wanted, [name] * 4)
        with oracle.disable_adapter():
            wanted[None] = oracle(IMAGES, STEPS)
        with bank.use(names := ["default", None, "b", "default"]):
            assert_each(live(IMAGES, STEPS), wanted, names)


def test_an_image_alone_and_no_image_are_taken_as_without_lora(layer: nn.Module, tmp_path: Path) -> None:
    wanted = by_peft(tmp_path, layer, (IMAGES[:1],), "a")
    bank = xlc.attach(layer, adapters={"a": tmp_path / "a"})
    with torch.no_grad(), bank.use(["a"]):
        torch.testing.assert_close(layer[0](IMAGES[0]), wanted[0], atol=1e-4, rtol=1e-5)
        assert layer[0](IMAGES[:0]).shape == (0, 5, 11, 9)


def test_all_linear_leaves_it_out_as_in_peft() -> None:
    assert set(xlc.attach(made(Block)).sites) == {"time", "proj"}


def test_what_peft_would_compute_otherwise_has_no_host() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    assert host_of(nn.Conv2d(4, 4, 3, padding=1)) is not None
    assert host_of(nn.Conv2d(4, 4, 1, dilation=2)) is not None
    assert host_of(Doubled(4, 4, 3)) is None
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Linear(4, 4))
    with pytest.raises(AttachError, match=r"0 \(Conv2d\) with groups=2, 1 \(Conv2d\) with dilation=\(2, 2\)"):
        xlc.attach(model, target_modules=["0", "1", "2"])


def test_tensors_of_another_shape_are_refused_by_name(layer: nn.Module, tmp_path: Path) -> None:
    bank = xlc.attach(layer, target_modules=["0"])
    with edited_weights(tmp_path / "a") as tensors:
        key = "base_model.model.0.lora_A.weight"
        tensors[key] = tensors[key].flatten(1)
    with pytest.raises(AdapterShapeError, match=r"0\.lora_A\.weight.*shape \[4, 3, 3, 3\]; got shape \[4, 27\]"):
        bank.load("a", tmp_path / "a")
    assert bank.names == ()


def test_save_writes_the_tensors_that_were_loaded(layer: nn.Module, tmp_path: Path) -> None:
    bank = xlc.attach(layer, adapters={"a": tmp_path / "a"})
    bank.save("a", tmp_path / "again")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor)


def test_what_a_convolution_cannot_have_is_refused(layer: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="adapters_per_row"):
        xlc.attach(layer, target_modules=["0"], adapters_per_row=2)
    with pytest.raises(AttachError, match="target_parameters"):
        xlc.attach(layer, target_parameters=["0.weight"])
    bank = xlc.attach(layer, adapters={"a": tmp_path / "a"})
    with pytest.raises(UnsupportedAdapterError, match=r"LoRA on linear layers; got 0"):
        bank.trainable(["a"])
    with pytest.raises(AdapterError, match="names of linear modules"):
        bank.add("new", target_modules=["0"])
    with pytest.raises(ArtifactError, match="convolutions, 0"):
        xlc.export(layer, tmp_path / "served.pt2", (IMAGES,))


def test_images_that_mix_sequences_are_refused(tmp_path: Path) -> None:
    class Stacked(nn.Module):
        """All images of the batch, one above the other."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images.transpose(0, 1).reshape(1, 3, -1, images.shape[-1]))

    model = made(Stacked)
    save_adapter(tmp_path / "a", model=copy.deepcopy(model), target_modules=["conv"])
    bank = xlc.attach(model, adapters={"a": tmp_path / "a"})
    with torch.no_grad(), pytest.raises(UnprovedRowsError, match="conv"), bank.use(["a", None] * 2):
        model(IMAGES)
    with torch.no_grad(), bank.use(["a"] * 4):
        model(IMAGES)


def test_the_code_of_inductor_is_verified(layer: nn.Module) -> None:
    xlc.attach(layer, target_modules=["0"])
    verified = xlc.verify(layer)(IMAGES)
    assert [site.is_right for site in verified.sites] == [True]
    assert verified.isolation == {"0": 0}
