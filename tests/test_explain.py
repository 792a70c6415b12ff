from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_folders import tiny_llama
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import DeadAdapterError, OptionError
from xpu_lora_compile.kernels import KERNELS, force_kernel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
TOKENS = torch.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def llama() -> Any:
    """The report on a Llama of two layers whose vocabulary of 70 is taken for one of 64 that was padded."""
    torch.compiler.reset()
    model = tiny_llama()
    bank = xlc.attach(model, slots=3, max_rank=4, target_modules=TARGETS, vocab_size=64)
    with bank.use([None, None]), torch.no_grad():
        return xlc.explain(model, bandwidth=10)(TOKENS, use_cache=False)


def site_of(report: Any, module: str) -> Any:
    (site,) = [site for site in report.sites if site.module == module]
    return site


def test_every_linear_is_a_site_with_its_module_and_line(llama: Any) -> None:
    linears = {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LINEARS} | {"lm_head"}
    assert {site.module for site in llama.sites} == linears
    site = site_of(llama, "lm_head")
    file, line = site.source.rsplit(":", 1)
    assert "lm_head(" in Path(file).read_text().splitlines()[int(line) - 1]


LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_a_site_tells_its_sizes_and_dtypes(llama: Any) -> None:
    site = site_of(llama, "model.layers.1.mlp.down_proj")
    assert site.shapes == {"T": "10", "D": "48", "R": "4", "K": "3", "W": "32", "H": "32"}
    assert site.dtypes == {"output": "f32", "inputs": "f32", "A": "f32", "B": "f32"}
    assert (site.relation, site.guard) == ("equal", None)


def test_the_padded_vocabulary_is_a_narrower_site(llama: Any) -> None:
    site = site_of(llama, "lm_head")
    assert (site.shapes["W"], site.shapes["H"], site.relation) == ("64", "70", "narrower")


def test_a_site_names_those_that_it_was_fused_with(llama: Any) -> None:
    q = site_of(llama, "model.layers.0.self_attn.q_proj")
    k, v = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
    assert q.fused_with == [k, v]
    assert site_of(llama, k).call == q.call
    assert site_of(llama, "model.layers.0.self_attn.o_proj").fused_with == []


def test_fifteen_sites_become_nine_calls(llama: Any) -> None:
    assert llama.counts == {"sites": 15, "calls": 9, "routings": 0, "graphs": 1}
    (graph,) = llama.graphs
    assert graph.calls_before == {"bgmv_shrink": 15, "bgmv_expand": 15}
    assert graph.calls_after == {"native_add_lora": 9}


def test_the_floor_is_the_bytes_at_the_stated_bandwidth(llama: Any) -> None:
    site = site_of(llama, "model.layers.0.self_attn.o_proj")
    weights = 3 * (4 * 32 + 32 * 4) * 4  # Three of three slots may be used by ten rows.
    assert site.bytes == weights + 2 * 10 * 32 * 4 + 10 * 32 * 4
    assert site.floor_us == pytest.approx(site.bytes / 10e9 * 1e6)
    assert (llama.bandwidth, llama.bandwidth_source) == (10, "as told")


def test_the_input_of_a_fused_call_is_counted_once(llama: Any) -> None:
    gate, up = (site_of(llama, f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up"))
    weights = 3 * (4 * 32 + 48 * 4) * 4
    assert gate.bytes + up.bytes == 2 * (weights + 2 * 10 * 48 * 4) + 10 * 32 * 4


def test_a_kernel_is_chosen_with_a_reason_and_the_others_are_not(llama: Any) -> None:
    site = site_of(llama, "lm_head")
    assert site.kernel == "native"
    assert site.because == "it is the first that takes this call"
    assert set(site.others) == {kernel.name for kernel in KERNELS} - {"native"}
    assert all(site.others[kernel] == "native comes first" for kernel in ("gather", "grouped"))


def test_a_forced_kernel_is_shown_as_such() -> None:
    model = nn.Linear(4, 4)
    bank = xlc.attach(nn.Sequential(model), slots=4, max_rank=2)
    with bank.use([None] * 3), torch.no_grad(), force_kernel("gather"):
        report = xlc.explain(lambda x: model(x), bandwidth=1)(torch.ones(3, 4))
    assert [(site.kernel, site.because) for site in report.sites] == [("gather", "it was forced")]
    assert report.sites[0].others["native"] == "another was forced"


def test_a_dynamic_size_is_shown_with_its_size_here_and_its_guard() -> None:
    def function(output: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        output = output + 1
        xlc.bgmv_expand(output, hidden, b, indices)
        return output

    output, b = torch.zeros(2, 12), torch.zeros(3, 10, 4)
    for tensor, dim in ((output, 1), (b, 1)):
        torch._dynamo.mark_dynamic(tensor, dim)
    report = xlc.explain(function, bandwidth=1)(output, torch.zeros(2, 4), b, torch.tensor([0, 1]))
    (site,) = report.sites
    assert site.relation == "narrower"
    assert site.guard is not None
    assert "<" in site.guard
    assert (site.module, site.op) == ("", "bgmv_expand")


def test_each_graph_of_a_broken_function_is_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    bank = xlc.attach(model, slots=2, max_rank=2)

    def broken(x: Tensor) -> Tensor:
        x = model[0](x)
        torch._dynamo.graph_break()
        return model[1](x)

    with bank.use([None]), torch.no_grad():
        report = xlc.explain(broken, bandwidth=1)(torch.ones(1, 4))
    assert report.counts == {"sites": 2, "calls": 2, "routings": 0, "graphs": 2}
    assert len({site.call for site in report.sites}) == 2


def test_training_graphs_are_explained_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    bank = xlc.attach(model, slots=2, max_rank=2)
    with bank.use([None]):
        report = xlc.explain(model, bandwidth=1)(torch.ones(1, 4))
    assert [site.op for site in report.sites] == ["lora_linear", "lora_linear"]
    assert all("carries gradients" in " ".join(site.notes) for site in report.sites)


def test_explaining_leaves_the_model_and_its_compiled_graphs_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    bank = xlc.attach(model, slots=2, max_rank=2)
    compiled = torch.compile(model, backend="xpu_lora", options={"xpu_lora.execute": "eager"})
    inputs = torch.randn(2, 4)
    with bank.use([None, None]), torch.no_grad():
        before = compiled(inputs)
        for _ in range(10):  # More often than Dynamo compiles one function again.
            xlc.explain(model, bandwidth=1)(inputs)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(inputs), before)


def test_with_generated_code_the_share_of_the_passes_is_of_a_whole_compilation() -> None:
    model = nn.Linear(4, 4)
    bank = xlc.attach(nn.Sequential(model), slots=2, max_rank=2)
    with bank.use([None]), torch.no_grad():
        report = xlc.explain(lambda x: model(x), bandwidth=1, generate_code=True)(torch.ones(1, 4))
    assert report.generated_code
    assert 0 < report.passes_seconds < report.first_call_seconds
    assert "with Inductor" in str(report)


def test_the_bandwidth_is_measured_where_none_is_given() -> None:
    bank = xlc.attach(nn.Sequential(model := nn.Linear(4, 4)), slots=2, max_rank=2)
    with bank.use([None]), torch.no_grad():
        report = xlc.explain(lambda x: model(x))(torch.ones(1, 4))
    assert report.bandwidth > 0
    assert "measured in this run" in report.bandwidth_source


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan")])
def test_a_bandwidth_that_is_none_is_an_error(bandwidth: float) -> None:
    with pytest.raises(OptionError, match="GB/s above 0"):
        xlc.explain(nn.Linear(2, 2), bandwidth=bandwidth)


def test_the_json_holds_what_the_report_holds(llama: Any) -> None:
    found = json.loads(llama.to_json())
    assert found["counts"] == llama.counts
    assert [site["module"] for site in found["sites"]] == [site.module for site in llama.sites]
    assert len(found["graphs"][0]["after"]) == len(llama.graphs[0].after)


class Dropping(nn.Module):
    """Computes LoRA and returns something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "not used":
            return self.second(x)
        if self.how == "overwritten":
            return y.copy_(self.second(x))
        if self.how == "copied before":
            kept = self.second(x)
            y.mul_(2)
            return kept
        return self.second(y)


@pytest.mark.parametrize("how", ["not used", "overwritten", "copied before"])
def test_lora_that_cannot_reach_the_result_is_an_error(how: str) -> None:
    model = Dropping(how)
    bank = xlc.attach(model, slots=2, max_rank=2)
    with bank.use([None]), torch.no_grad(), pytest.raises(DeadAdapterError, match="first") as error:
        xlc.explain(model, bandwidth=1)(torch.ones(1, 4))
    alive = {site.module: site.reaches_output for site in error.value.report.sites}
    assert alive == {"first": False, "second": True}


def test_lora_that_reaches_the_result_through_another_layer_is_none() -> None:
    model = Dropping("used")
    bank = xlc.attach(model, slots=2, max_rank=2)
    with bank.use([None]), torch.no_grad():
        report = xlc.explain(model, bandwidth=1)(torch.ones(1, 4))
    assert all(site.reaches_output for site in report.sites)


def test_a_result_that_is_written_to_an_input_is_seen() -> None:
    def function(cache: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> None:
        xlc.bgmv_expand(cache, hidden, b, indices)

    args = torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(1, 4, 3), torch.tensor([0, 0])
    assert [site.reaches_output for site in xlc.explain(function, bandwidth=1)(*args).sites] == [True]


def test_a_flag_that_pruned_lora_out_of_the_graph_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    xlc.attach(model, slots=2, max_rank=2)
    with torch.no_grad(), pytest.raises(DeadAdapterError, match=r"none for 0\..*bank\.use"):
        xlc.explain(model, bandwidth=1)(torch.ones(1, 4))


def test_a_forward_that_a_decorator_has_wrapped_is_no_obstacle() -> None:
    """As in transformers 5.24: Dynamo then calls the model `args[0]`."""

    def wrapped(forward: Any) -> Any:
        @functools.wraps(forward)
        def call(*args: Any, **keywords: Any) -> Any:
            return forward(*args, **keywords)

        return call

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        @wrapped
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    model = Model()
    bank = xlc.attach(model, slots=1, max_rank=1)
    with bank.use([None] * 2), torch.no_grad():
        report = xlc.explain(model, bandwidth=1)(torch.ones(2, 4))
    assert [site.module for site in report.sites] == ["inner.0"]


def test_an_attached_module_that_is_never_called_is_found() -> None:
    model = Dropping("used")
    model.third = nn.Linear(4, 4)
    bank = xlc.attach(model, slots=2, max_rank=2)
    with bank.use([None]), torch.no_grad(), pytest.raises(DeadAdapterError, match="none for third"):
        xlc.explain(model, bandwidth=1)(torch.ones(1, 4))


class Breaking(nn.Module):
    """Breaks the graph between its layers; `python` is not compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.python = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.by_python(self.second(x))

    @torch.compiler.disable
    def by_python(self, x: Tensor) -> Tensor:
        result: Tensor = self.python(x)
        return result


def test_layers_after_a_break_of_the_graph_and_those_of_python_are_named() -> None:
    model = nn.Sequential()
    model.add_module("inner", Breaking())
    bank = xlc.attach(model, slots=2, max_rank=2)
    with bank.use([None] * 3), torch.no_grad():
        report = xlc.explain(model, bandwidth=1)(torch.ones(3, 4))
    assert [site.module for site in report.sites] == ["inner.first", "inner.second"]
    assert report.by_python == ["inner.python"]
    assert "left it to Python, and right: inner.python." in str(report)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a layer"])
def test_a_model_that_is_compiled_already_is_explained_and_stays_compiled(how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    bank = xlc.attach(model, slots=2, max_rank=2)
    compiled: Any = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model[0]).compile(backend="eager")
    before = [module._compiled_call_impl for module in model.modules()]
    with bank.use([None]), torch.no_grad():
        report = xlc.explain(compiled, bandwidth=1)(torch.ones(1, 4))
        assert all(site.is_right for site in xlc.verify(compiled, generate_code=False)(torch.ones(1, 4)).sites)
    assert [site.module for site in report.sites] == ["0", "1"]
    assert [module._compiled_call_impl for module in model.modules()] == before


def test_a_model_without_lora_is_an_error() -> None:
    with pytest.raises(DeadAdapterError, match="wanted a call that adds LoRA; got none in 1 graph"):
        xlc.explain(nn.Linear(2, 2), bandwidth=1)(torch.ones(1, 2))


@pytest.mark.parametrize("tool", [xlc.explain, xlc.verify])
def test_what_cannot_be_called_is_an_error_at_once(tool: Any) -> None:
    with pytest.raises(OptionError, match=r"\(model\)\(inputs\)"):
        tool(torch.ones(2))


@pytest.mark.parametrize("tool", [xlc.explain, xlc.verify])
@pytest.mark.parametrize(("variable", "value"), [("XPU_LORA_FUEL", "much"), ("XPU_LORA_DUMP", "/dev/null/folder")])
def test_a_wrong_variable_is_our_own_error(
    tool: Any, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(OptionError, match=variable):
        tool(nn.Linear(2, 2))(torch.ones(1, 2))


def test_a_site_that_ran_out_of_fuel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_LORA_FUEL", "1")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    bank = xlc.attach(model, slots=2, max_rank=2)
    with bank.use([None]), torch.no_grad():
        report = xlc.explain(model, bandwidth=1)(torch.ones(1, 4))
    assert all("left as it is: XPU_LORA_FUEL has run out" in site.notes for site in report.sites)


def test_a_model_that_dynamo_gave_up_on_is_said_to_be_so() -> None:
    @torch.compiler.disable
    def apart(x: Tensor) -> Tensor:
        return x + 1

    with pytest.raises(DeadAdapterError, match=r"Dynamo compiled nothing.*torch\.compiler\.reset"):
        xlc.explain(lambda x: apart(x), bandwidth=1)(torch.ones(2))
