"""Models that cannot be exported are refused before the compiler is asked, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import serve_pt2
import torch
from support.artifacts import admitted
from torch import Tensor, nn
from torch.export import Dim

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import native

pytestmark = pytest.mark.skipif(bool(native.problem()), reason="a C++ compiler is wanted")

X = torch.randn(3, 4)


class Model(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 6)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) if self.own is None else self.own(self, x)


def attached(forward: Callable[[nn.Module, Tensor], Any] | None = None) -> tuple[Model, xlc.AdapterBank]:
    model = Model(forward).eval().requires_grad_(False)
    return model, xlc.attach(model, slots=2, max_rank=4)


def refused(tmp_path: Path, match: str, model: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(xlc.LoraError, match=match):
        xlc.export(model, tmp_path / "a.pt2", args or (X,), **options)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_bank(tmp_path: Path) -> None:
    refused(tmp_path, "a model that LoRA is attached to; got a plain model", Model().eval())
    refused(tmp_path, r"a torch.nn.Module that LoRA is attached to; got function", lambda x: x)


def test_a_copy_of_a_model(tmp_path: Path) -> None:
    import copy

    refused(tmp_path, "a copy of one, which no bank knows", copy.deepcopy(attached()[0]))


def test_a_model_in_training_mode(tmp_path: Path) -> None:
    refused(tmp_path, "a model in evaluation mode", attached()[0].train())


def test_adapters_that_are_being_trained(tmp_path: Path) -> None:
    model, _ = attached()
    model.first.lora_a.requires_grad_()
    refused(tmp_path, "adapters that carry no gradients; got some that do, of first", model)


def test_inputs_that_are_being_trained(tmp_path: Path) -> None:
    refused(tmp_path, "got one that requires grad", attached()[0], X.clone().requires_grad_())


def test_a_batch_of_one_or_none(tmp_path: Path) -> None:
    refused(tmp_path, "a batch of at least two sequences", attached()[0], X[:1])
    with pytest.raises(xlc.LoraError, match="a batch of at least two sequences; got no tensor"):
        xlc.export(attached()[0], tmp_path / "a.pt2")


def test_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    refused(tmp_path, "tensors, numbers, and lists, tuples and dicts of such; got a object", attached()[0], object())
    refused(tmp_path, "got one that is not contiguous", attached()[0], torch.randn(4, 3).t())


def test_a_layer_whose_rows_cannot_be_told(tmp_path: Path) -> None:
    model, _ = attached(lambda self, x: self.second(self.first(x).mean(0, keepdim=True)))
    refused(tmp_path, "second: wanted rows that are known to be those of 3 sequences", model)


def test_a_layer_that_is_not_called(tmp_path: Path) -> None:
    refused(tmp_path, "a call that leaves out second", attached(lambda self, x: self.first(x))[0])


def test_a_layer_whose_weight_is_read(tmp_path: Path) -> None:
    model, _ = attached(lambda self, x: nn.functional.linear(self.first(x), self.second.weight))
    refused(tmp_path, "a call that leaves out second", model)


def test_a_result_that_is_no_tensor(tmp_path: Path) -> None:
    model, _ = attached(lambda self, x: {"y": self.second(self.first(x)), "cache": object()})
    refused(tmp_path, "what the model returns, cache: wanted tensors", model)


def test_a_model_that_does_something_else_while_it_is_traced(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = self.first(x[:, None] if torch.compiler.is_compiling() else x)
        return self.second(hidden)

    refused(tmp_path, "first: wanted rows as they were when the model was called", attached(forward)[0])


def test_a_kernel_that_is_written_in_python(tmp_path: Path) -> None:
    with xlc.force_kernel("gather"):
        refused(tmp_path, "a kernel for cpu that runs without Python; got gather", attached()[0])


def test_lora_in_float64(tmp_path: Path) -> None:
    model = Model().eval().requires_grad_(False).double()
    xlc.attach(model, slots=2, max_rank=4)
    refused(tmp_path, r"LoRA that the kernel native computes; got xpu_lora", model, X.double())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model, _ = attached()
    for path in (tmp_path / "a.zip", tmp_path / "no folder" / "a.pt2"):
        with pytest.raises(xlc.LoraError, match="export: path"):
            xlc.export(model, path, (X,))
    folder = tmp_path / "a.pt2"
    folder.mkdir()
    with pytest.raises(xlc.LoraError, match="a folder of that name"):
        xlc.export(model, folder, (X,))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(tmp_path, "where this process cannot write", attached()[0])


def test_a_failed_trace_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, bank = attached()
    routing = model.first.lora_routing
    with pytest.raises(Exception, match="batch"):
        # The first layer's width is no size that may change.
        xlc.export(model, tmp_path / "a.pt2", (X,), dynamic_shapes={"x": {0: Dim("batch", min=2), 1: Dim("batch2")}})
    assert model.first.lora_routing is routing
    assert routing.sequence_slots is None
    with bank.use([None] * 3):
        model(X)


def test_a_guard_on_a_size_that_is_no_range(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return y * 3 if x.shape[0] % 3 == 0 else y

    shapes = {"x": {0: Dim.AUTO}}
    refused(tmp_path, r"holds only if Eq\(Mod\((\w+), 3\), 0\), where \1 is size 0 of x", attached(forward)[0],
            dynamic_shapes=shapes)  # fmt: skip


def test_a_model_that_does_something_else_with_a_batch_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return y * 3 if x.shape[0] == 1 else y

    model, _ = attached(forward)
    shapes = {"x": {0: Dim("batch", max=64)}}
    refused(
        tmp_path, r"other results with the example inputs cut to \w+ = 1, size 0 of x", model, dynamic_shapes=shapes
    )
    # Neither a least size of two nor an ordinary model is refused before the compiler is asked.
    admitted(tmp_path, monkeypatch, model, (X,), dynamic_shapes={"x": {0: Dim("batch", min=2, max=64)}})
    admitted(tmp_path, monkeypatch, attached()[0], (X,), dynamic_shapes=shapes)
    admitted(tmp_path, monkeypatch, attached()[0], (X,), dynamic_shapes={"x": {0: Dim.AUTO}})


def test_a_model_that_cannot_run_a_batch_of_one(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x[1, 0]

    shapes = {"x": {0: Dim("batch", max=64)}}
    refused(tmp_path, r"got IndexError with the example inputs cut to \w+ = 1", attached(forward)[0],
            dynamic_shapes=shapes)  # fmt: skip


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (lambda y, z: {"a": {"b": y}, "a.b": z}, r"\['a'\]\['b'\] and \['a.b'\], which are both named 'a.b'"),
        (lambda y, z: {0: y, "0": z}, r"\[0\] and \['0'\], which are both named '0'"),
        (lambda y, z: [{"": y, "0": z}, {0: [y], "0": [z]}], r"\[1\]\[0\] and \[1\]\['0'\], which are both named '0'"),
        (lambda y, z: {"": y, "output": z}, r"\[''\] and \['output'\], which are both named 'output'"),
    ],
)
def test_results_of_the_same_name(tmp_path: Path, result: Callable[[Tensor, Tensor], Any], match: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.first(x)
        return result(y, self.second(y))

    refused(tmp_path, match, attached(forward)[0])


def with_buffer(forward: Callable[[nn.Module, Tensor], Any]) -> Model:
    model = Model(forward).eval().requires_grad_(False)
    model.register_buffer("count", torch.ones(2))
    xlc.attach(model, slots=2, max_rank=4)
    return model


def test_a_model_that_writes_into_a_buffer(tmp_path: Path) -> None:
    def adds(self: Any, x: Tensor) -> Tensor:
        self.count[1:].add_(1)
        return self.second(self.first(x)) * self.count[1]

    def replaces(self: Any, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.second(self.first(x)) * self.count[1]

    for forward in (adds, replaces):
        model = with_buffer(forward)
        before = model.count
        refused(tmp_path, "got one that changes count of the model", model)
        assert model.count is before
        assert model.count.tolist() == [1, 1]


def test_a_model_that_writes_into_a_weight_or_an_input(tmp_path: Path) -> None:
    def weight(self: Any, x: Tensor) -> Tensor:
        self.first.bias.mul_(2)
        return self.second(self.first(x))

    refused(tmp_path, "got one that changes first.bias of the model", attached(weight)[0])
    x = X.clone()
    refused(tmp_path, "changes the input x", attached(lambda self, x: self.second(self.first(x.mul_(2))))[0], x)
    assert x.equal(X)


def test_a_model_that_sets_a_buffer_to_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count = self.count.clone()
        return self.second(self.first(x)) * self.count[1]

    admitted(tmp_path, monkeypatch, with_buffer(forward), (X,))


def test_a_model_that_is_itself_the_layer(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4).eval().requires_grad_(False)
    xlc.attach(layer, slots=2, max_rank=4)
    refused(tmp_path, "layers with LoRA that have names; got a model that is itself the one layer", layer)
    refused(tmp_path, "layers with LoRA that have names", nn.Sequential(layer).eval())


def test_a_model_that_updates_statistics(tmp_path: Path) -> None:
    model = Model(lambda self, x: self.second(self.norm(self.first(x)))).eval().requires_grad_(False)
    model.norm = nn.BatchNorm1d(5, track_running_stats=True)
    model.norm.num_batches_tracked = None
    xlc.attach(model, slots=2, max_rank=4)
    refused(tmp_path, "got one that changes norm.running_mean of the model", model)
    assert not model.norm.running_mean.any()


def test_a_model_of_transformers_gets_as_far_as_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats keys for the queries that share them, in a batch of any size: torch 2.8 could not follow the copy."""
    model = serve_pt2.tiny_llama()
    xlc.attach(model, slots=2, max_rank=4)
    shapes = {"input_ids": {0: Dim("batch", max=64)}}
    tokens = {"input_ids": serve_pt2.batch_of([None] * 3)}
    admitted(tmp_path, monkeypatch, model, (), kwargs=tokens, dynamic_shapes=shapes)
