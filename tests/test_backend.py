"""The backend: modes, options, users' own passes, training, dynamic shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import ADD_HERE, DEVICE, ROUTINGS_HERE
from torch import Tensor, nn
from torch._dynamo.backends.registry import list_backends
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

import xpu_lora_compile as xlc
from xpu_lora_compile.backend import CacheKey, RewritePass
from xpu_lora_compile.inductor_internals import InTurn


class Model(nn.Module):
    """A linear layer with LoRA, whose output is wider than the adapters' weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 10)
        self.register_buffer("a", torch.randn(4, 3, 16))
        self.register_buffer("b", torch.randn(4, 8, 3))

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        output, hidden = self.linear(x), x.new_empty(x.shape[0], 3)
        xlc.bgmv_shrink(hidden, x, self.a, indices)
        xlc.bgmv_expand(output, hidden, self.b, indices)
        return output.relu()


@pytest.fixture
def model() -> Model:
    torch._dynamo.reset()
    return Model().requires_grad_(False).to(DEVICE)


def batch(rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, indices = torch.randn(rows, 16, generator=generator), torch.randint(-1, 5, (rows,), generator=generator)
    return x.to(DEVICE), indices.to(DEVICE)


def test_the_backend_is_found_by_its_name() -> None:
    assert "xpu_lora" in list_backends()


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fullgraph": {"fullgraph": True},
    "dynamic": {"dynamic": True},
    "default": {"mode": "default"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
    "option-of-inductor": {"options": {"epilogue_fusion": False}},
    "eager": {"options": {"xpu_lora.execute": "eager"}},
}


@pytest.mark.parametrize("call", CALLS)
def test_compiled_equals_eager(model: Model, call: str) -> None:
    compiled = torch.compile(model, backend="xpu_lora", **CALLS[call])
    for rows in (5, 3):
        torch.testing.assert_close(compiled(*batch(rows)), model(*batch(rows)))


@pytest.mark.usefixtures("without_caches")
def test_stock_inductor_with_our_options_equals_eager(model: Model) -> None:
    with xlc.record_decisions() as decisions:
        compiled = torch.compile(model, options=xlc.inductor_options())
        torch.testing.assert_close(compiled(*batch()), model(*batch()))
    assert {decision.relation for decision in decisions} == {"narrower"}


@pytest.mark.parametrize("through", ["backend", "options"])
def test_the_generated_code_calls_the_internal_ops_and_copies_nothing(model: Model, through: str) -> None:
    options = {"backend": "xpu_lora"} if through == "backend" else {"options": xlc.inductor_options()}
    _, (code,) = run_and_get_code(torch.compile(model, fullgraph=True, **options), *batch())
    # On CUDA the base product is in the call; a CPU's is what `native_add_lora` is composed of.
    op = {"cuda": "linear_with_lora", "cpu": "native_add_slices"}.get(DEVICE.type, ADD_HERE)
    assert code.count(f"torch.ops.xpu_lora.{op}.default(") == 1
    route = "route_tiles" if DEVICE.type == "cuda" else "route"
    assert code.count(f"torch.ops.xpu_lora.{route}.default(") == ROUTINGS_HERE
    assert "shrink" not in code
    assert "expand" not in code
    assert "clone" not in code
    assert "copy" not in code.split("def call", 1)[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"options": {"max_autotunes": True}}, "Did you mean 'max_autotune'"),
        ({"options": {"xpu_lora.exec": "eager"}}, "Did you mean 'xpu_lora.execute'"),
        ({"options": {"xpu_lora.execute": "ptxas"}}, "wanted 'inductor' or 'eager'; got 'ptxas'"),
        ({"options": {"max_autotune": "yes"}}, "got str should be bool"),
        ({"options": {"xpu_lora.execute": "eager", "max_autotune": True}}, "no mode and no options of Inductor"),
        ({"mode": "reduce-overheads"}, "Did you mean 'reduce-overhead'"),
    ],
    ids=["unknown", "ours-misspelt", "value", "type", "eager-and-more", "mode"],
)
def test_a_wrong_option_names_the_right_one(model: Model, call: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match="OptionError") as failure:
        torch.compile(model, backend="xpu_lora", **call)(*batch())
    assert message in str(failure.value)


def test_inductor_options_refuses_what_inductor_does_not_know() -> None:
    with pytest.raises(xlc.LoraError, match="Did you mean 'epilogue_fusion'"):
        xlc.inductor_options({"epilog_fusion": True})
    with pytest.raises(xlc.LoraError, match="Use backend="):
        xlc.inductor_options({"xpu_lora.execute": "eager"})
    with pytest.raises(xlc.LoraError, match="a dict of names and values"):
        xlc.inductor_options(5)  # type: ignore[arg-type]


def test_rewrite_refuses_what_holds_no_graph(model: Model) -> None:
    for wrong in (None, model, torch.fx.Graph()):
        with pytest.raises(xlc.LoraError, match="a GraphModule or an ExportedProgram"):
            xlc.rewrite(wrong)  # type: ignore[arg-type]


class Count(CustomGraphPass):
    """A user's own pass."""

    def __init__(self, identity: object = "count") -> None:
        self.identity = identity
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> object:
        return self.identity


@pytest.mark.usefixtures("without_caches")
@pytest.mark.parametrize("slot", ["pre_grad_custom_pass", "post_grad_custom_pre_pass", "post_grad_custom_post_pass"])
@pytest.mark.parametrize("given", ["option", "configuration"])
@pytest.mark.parametrize("through", ["backend", "options"])
def test_a_users_own_pass_keeps_running(model: Model, slot: str, given: str, through: str) -> None:
    count = Count()
    own = {slot: count} if given == "option" else {}
    config = {} if given == "option" else {slot: count}
    with torch._inductor.config.patch(config):
        if through == "backend":
            compiled = torch.compile(model, backend="xpu_lora", options=own)
        else:
            compiled = torch.compile(model, options=xlc.inductor_options(own))
        torch.testing.assert_close(compiled(*batch()), model(*batch()))
    assert count.calls == 1


@pytest.fixture
def padded_products(monkeypatch: pytest.MonkeyPatch, without_caches: None) -> None:
    """Inductor pads products whose width is no multiple of a few elements, as its benchmark may choose on a GPU."""
    from torch._inductor.fx_passes import pad_mm

    monkeypatch.setattr(pad_mm, "check_device", lambda *_: True)
    monkeypatch.setattr(pad_mm, "has_triton", lambda: True, raising=False)
    with torch._inductor.config.patch(force_shape_pad=True, shape_padding=True):
        yield


def expand_into_a_view(x: Tensor, weight: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    output = torch.nn.functional.linear(x, weight)
    xlc.bgmv_expand(output.view(-1, output.shape[-1]), torch.ones(24, 2, device=DEVICE), b, indices)
    return output


@pytest.mark.usefixtures("padded_products")
@pytest.mark.parametrize("through", ["backend", "options"])
def test_an_op_that_changes_a_view_of_a_product_is_right_whatever_inductor_pads(through: str) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((4, 6, 32), (70, 32), (3, 70, 2)))
    indices = torch.arange(-1, 3, device=DEVICE).repeat_interleave(6)
    options = {"backend": "xpu_lora"} if through == "backend" else {"options": xlc.inductor_options()}
    result = torch.compile(expand_into_a_view, fullgraph=True, **options)(x, weight, b, indices)
    torch.testing.assert_close(result, expand_into_a_view(x, weight, b, indices), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("padded_products")
def test_a_layer_is_right_whatever_stock_inductor_pads() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 70, bias=False)).requires_grad_(False).to(DEVICE)
    bank = xlc.attach(layer, slots=2, max_rank=2)
    layer[0].store(1, torch.randn(2, 32), torch.randn(70, 2))
    bank._slots[1] = "a"
    x = torch.randn(4, 6, 32).to(DEVICE)
    with torch.no_grad(), bank.use(["a", None, "a", None]):
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spelling", ["shape_padding", "shape-padding"])
def test_padding_of_products_cannot_be_asked_for(spelling: str) -> None:
    with pytest.raises(xlc.LoraError, match="shape_padding: wanted False; got True"):
        xlc.inductor_options({spelling: True})


def test_what_was_compiled_for_another_instruction_set_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cache that machines share: vLLM's and Inductor's own keys do not say which it was."""
    mine = CacheKey().uuid(), RewritePass().uuid()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert not {CacheKey().uuid(), RewritePass().uuid()} & {*mine}


def test_passes_in_turn_are_cached_only_if_all_can_be() -> None:
    assert InTurn(CacheKey(), Count("one")).uuid() == (CacheKey().uuid(), "one")
    assert InTurn(CacheKey(), Count(None)).uuid() is None
    assert InTurn(CacheKey(), lambda graph: None).uuid() is None


def test_passes_in_turn_all_run() -> None:
    counts = [Count(), Count()]
    InTurn(*counts)(torch.fx.Graph())
    assert [count.calls for count in counts] == [1, 1]


def test_our_passes_compare_by_what_they_do() -> None:
    assert CacheKey() == CacheKey()
    assert CacheKey() != RewritePass()
    assert len({RewritePass(), RewritePass()}) == 1


def test_a_training_step_gives_the_gradients_of_eager(model: Model) -> None:
    class Trained(Model):
        def forward(self, x: Tensor, indices: Tensor) -> Tensor:
            return xlc.lora_linear(self.linear(x), x, [self.a], [self.b], indices, [0]).relu()

    def gradients(module: nn.Module, call: Any) -> list[Tensor]:
        module.zero_grad()
        call(*batch()).square().sum().backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    trained = Trained().to(DEVICE)
    trained.a, trained.b = nn.Parameter(trained._buffers.pop("a")), nn.Parameter(trained._buffers.pop("b"))
    torch.testing.assert_close(
        gradients(trained, torch.compile(trained, backend="xpu_lora", fullgraph=True)), gradients(trained, trained)
    )


def test_a_gradient_that_would_be_lost_is_an_error_while_compiling(model: Model) -> None:
    x, indices = batch()
    with pytest.raises(RuntimeError, match="LostGradientError"):
        torch.compile(model, backend="xpu_lora")(x.requires_grad_(), indices)


def test_rewritten_graphs_run_without_our_backend(model: Model) -> None:
    def backend(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        xlc.rewrite(module)
        return module.forward

    torch.testing.assert_close(torch.compile(model, backend=backend)(*batch()), model(*batch()))
