"""A layer whose weight a parent reads without calling it is noticed; a layer that had nothing to do is no fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as f
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.errors import AdapterError, UnreachedLayerError

EXECUTIONS = pytest.mark.parametrize("execution", ["eager", "compiled"])
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def attached(make: Callable[[], nn.Module], folder: Path, **options: Any) -> tuple[nn.Module, xlc.AdapterBank]:
    """A model with random weights in eval mode, and a bank with the adapters "a" and "b"."""
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        bank = xlc.attach(model, max_rank=2, **options)
        linear = {name: site for name, site in bank.sites.items() if site.kind == "linear"}
        for name in "ab":
            (folder / name).mkdir()
            write_adapter(folder / name, linear, 2)
            bank.load(name, folder / name)
    return model, bank


def compiled_or_not(model: nn.Module, execution: str) -> Callable[..., Tensor]:
    return torch.compile(model, backend="eager") if execution == "compiled" else model


class Reader(nn.Module):
    """Reads the weight of one layer, and calls another one."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return f.linear(self.called(x), self.read.weight, self.read.bias)


class Fused(Reader):
    """Two weights in one product."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.read.weight, self.called.weight]).T


class Sometimes(Reader):
    """Reads the weight where the values say so."""

    def forward(self, x: Tensor, short_cut: bool = False) -> Tensor:
        return f.linear(self.called(x), self.read.weight) if short_cut else self.read(self.called(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Reader()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@EXECUTIONS
@pytest.mark.parametrize("names", [["a", None], ["a", "a"]], ids=["mixed", "one-for-all"])
def test_a_weight_that_a_parent_reads_is_an_error_with_layer_and_parent(
    names: list[str | None], execution: str, tmp_path: Path
) -> None:
    model, bank = attached(Inner, tmp_path)
    run = compiled_or_not(model, execution)
    with pytest.raises(UnreachedLayerError, match=r"block\.read \(in Reader\)") as error, bank.use(names):
        run(X)
    assert "block.called" not in str(error.value)
    assert "Have the parent call the module, or leave it out with exclude_modules" in str(error.value)


@EXECUTIONS
def test_all_layers_that_were_left_out_are_named(execution: str, tmp_path: Path) -> None:
    model, bank = attached(Fused, tmp_path)
    run = compiled_or_not(model, execution)
    with pytest.raises(UnreachedLayerError, match=r"called \(in Fused\), read \(in Fused\)"), bank.use(["a", "b"]):
        run(X)


@EXECUTIONS
def test_each_block_says_so_again(execution: str, tmp_path: Path) -> None:
    model, bank = attached(Reader, tmp_path)
    run = compiled_or_not(model, execution)
    for names in (["a", "b"], ["b", "a"], ["a", "b"]):
        with pytest.raises(UnreachedLayerError), bank.use(names):
            run(X)


@EXECUTIONS
def test_leaving_the_layer_out_works_as_advised(execution: str, tmp_path: Path) -> None:
    model, bank = attached(Reader, tmp_path, exclude_modules=["read"])
    run = compiled_or_not(model, execution)
    with bank.use(["a", "b"]):
        run(X)


def test_an_error_in_the_block_is_not_hidden_by_it(tmp_path: Path) -> None:
    model, bank = attached(Reader, tmp_path)
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), bank.use(["a", "b"]):
        model(X)


def test_a_block_in_which_nothing_was_left_out_is_fine_after_one_in_which_something_was(tmp_path: Path) -> None:
    model, bank = attached(Sometimes, tmp_path)
    with pytest.raises(UnreachedLayerError), bank.use(["a", "b"]):
        model(X, short_cut=True)
    with bank.use(["a", "b"]):
        model(X)


def test_outside_of_blocks_weights_may_be_read(tmp_path: Path) -> None:
    model, bank = attached(Reader, tmp_path)
    model(X)
    with bank.use(["a", "b"]):
        pass
    model(X)


# No false alarms.


class Looks(nn.Module):
    """Asks a layer for its dtype, device and shape, and calls it only sometimes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, call: bool = True) -> Tensor:
        if self.layer.weight.dtype != torch.int8 and self.layer.weight.device == x.device:
            x = x.to(self.layer.weight.dtype)
        width = self.layer.weight.shape[0] + self.layer.weight.size(0)
        return self.layer(x) + width if call else self.other(x) + width


LOOKS = [
    pytest.param(execution, call, id=f"{execution}-{'beside' if call else 'without'}-a-call", marks=marks)
    for execution, call, marks in (
        ("eager", True, []),
        ("eager", False, []),
        ("compiled", True, []),
        ("compiled", False, []),
    )
]


@pytest.mark.parametrize(("execution", "call"), LOOKS)
def test_a_look_at_a_weights_dtype_or_device_is_no_fault(call: bool, execution: str, tmp_path: Path) -> None:
    model, bank = attached(Looks, tmp_path)
    run = compiled_or_not(model, execution)
    for names in (["a", "b"], [None, "a"]):
        with bank.use(names):
            run(X, call)


class TakesItsType(Looks):
    def forward(self, x: Tensor, call: bool = False) -> Tensor:
        return self.other(x.type_as(self.layer.weight))


@EXECUTIONS
@pytest.mark.xfail(strict=True, reason="`x.type_as(layer.weight)` asks for the dtype alone, and is taken for a use")
def test_a_look_at_a_weights_dtype_by_type_as_is_no_fault(execution: str, tmp_path: Path) -> None:
    model, bank = attached(TakesItsType, tmp_path)
    with bank.use(["a", "b"]):
        compiled_or_not(model, execution)(X)


class TextAndImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        x = self.text(x)
        return x if pixel_values is None else x + self.tower(pixel_values.to(self.tower.weight.dtype))


@EXECUTIONS
def test_a_vision_tower_in_a_batch_of_text_is_no_fault(execution: str, tmp_path: Path) -> None:
    model, bank = attached(TextAndImages, tmp_path)
    run = compiled_or_not(model, execution)
    with bank.use(["a", "b"]):
        run(X)
    with bank.use(["a", "b"]):
        run(X, X)
        run(X)
    with bank.use(["a", "b"]):
        run(X)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 8)
        result = torch.zeros_like(rows)
        for expert, chosen in zip(self.experts, (rows[:, 0] < 1e9, rows[:, 0] > 1e9), strict=True):
            (places,) = torch.where(chosen)
            if len(places):
                result.index_add_(0, places, expert(rows[places].to(expert.weight.dtype)))
        return result.view(x.shape)


@EXECUTIONS
def test_an_expert_without_tokens_is_no_fault(execution: str, tmp_path: Path) -> None:
    model, bank = attached(Mixture, tmp_path)
    run = compiled_or_not(model, execution)
    with bank.use(["a", "a"]):
        run(X)


class Tied(nn.Module):
    """The output embedding's weight is that of the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


class TiedByUse(nn.Module):
    """One embedding alone, whose weight is the output's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return f.linear(self.embed(tokens), self.embed.weight)


@EXECUTIONS
@pytest.mark.parametrize("kind", [Tied, TiedByUse])
def test_a_tied_embedding_that_is_called_is_no_fault(kind: type[nn.Module], execution: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = kind().requires_grad_(False)
    bank = xlc.attach(model, max_rank=2, target_modules=["embed", "head"])
    bank._slots[0] = "a"
    run = compiled_or_not(model, execution)
    tokens = torch.tensor([[1, 2], [3, 4]])
    for names in (["a", None], [None, "a"]):
        with bank.use(names):
            run(tokens)


def test_a_layer_whose_weight_is_shown_after_its_call_is_no_fault(tmp_path: Path) -> None:
    model, bank = attached(Sometimes, tmp_path)
    with bank.use(["a", "b"]):
        model(X)
        assert model.read.weight.sum().isfinite()


# PyTorch's own transformer layers, which read weights for speed.


class Encoder(nn.Module):
    def __init__(self, layers: int = 2, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


PADDING = torch.tensor([[False, False, True], [False, False, False]])
LINEAR = ["linear1", "linear2"]


@EXECUTIONS
@pytest.mark.parametrize("mask", [None, PADDING], ids=["plain", "padded"])
def test_a_transformer_encoder_without_gradients_has_the_lora_that_it_has_with_them(
    mask: Tensor | None, execution: str, tmp_path: Path
) -> None:
    model, bank = attached(Encoder, tmp_path, target_modules=LINEAR)
    run = compiled_or_not(model, execution)
    with torch.no_grad():
        base = model(X, mask)
    keep = torch.ones(2, 3, dtype=torch.bool) if mask is None else ~mask
    for names in (["a", None], ["a", "b"], ["b", "b"]):
        with bank.use(names):
            wanted = model(X, mask)
            with torch.no_grad():
                served = run(X, mask)
            with torch.inference_mode():
                inferred = model(X, mask)
        torch.testing.assert_close(served[keep], wanted[keep], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(inferred[keep], wanted[keep], atol=1e-5, rtol=1e-5)
        assert (served[0] - base[0])[:2].abs().max() > 1e-2


def test_a_lone_transformer_layer_has_its_lora_without_gradients(tmp_path: Path) -> None:
    model, bank = attached(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), tmp_path, target_modules=LINEAR
    )
    with bank.use(["a", "b"]):
        wanted = model(X)
        with torch.no_grad():
            torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)


def fast_paths(model: nn.Module) -> list[Any]:
    names = {nn.TransformerEncoder: "use_nested_tensor", nn.TransformerEncoderLayer: "activation_relu_or_gelu"}
    return [getattr(module, names[type(module)]) for module in model.modules() if type(module) in names]


@pytest.mark.parametrize("norm_first", [False, True])
def test_detach_gives_the_fast_paths_back(norm_first: bool, tmp_path: Path) -> None:
    before = fast_paths(Encoder(norm_first=norm_first).eval())
    model, bank = attached(lambda: Encoder(norm_first=norm_first), tmp_path, target_modules=LINEAR)
    assert fast_paths(model) != before
    bank.detach()
    assert fast_paths(model) == before


# Modules that were replaced.


@pytest.mark.parametrize("path", ["block.read", "block"])
def test_a_module_that_was_replaced_since_attach_is_refused_by_use(path: str, tmp_path: Path) -> None:
    model, bank = attached(Inner, tmp_path, exclude_modules=["called"])
    former = model.get_submodule(path)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Reader() if path == "block" else nn.Linear(8, 8))
    with pytest.raises(AdapterError, match=r"block\.read.*the module that LoRA was attached to"), bank.use(["a", "b"]):
        pass
    setattr(model.get_submodule(parent), name, former)
    with pytest.raises(UnreachedLayerError), bank.use(["a", "b"]):
        model(X)


def test_after_a_module_was_replaced_the_advice_leads_to_a_new_bank(tmp_path: Path) -> None:
    model, bank = attached(Looks, tmp_path)
    former = model.layer
    model.layer = nn.Linear(8, 8)
    with pytest.raises(AdapterError, match=r"call bank\.detach\(\), and attach and load again"), bank.use(["a", "b"]):
        pass
    bank.detach()
    assert type(former) is nn.Linear
    bank = xlc.attach(model, max_rank=4)
    with bank.use([None, None]):
        model(X)


def test_a_forward_that_was_put_on_a_layer_is_refused_by_use(tmp_path: Path) -> None:
    model, bank = attached(Looks, tmp_path)
    model.layer.forward = lambda x: x
    with pytest.raises(AdapterError, match="whose forward was replaced since"), bank.use(["a", "b"]):
        pass
