from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.peft_folders import tiny_llama
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile import passes
from xpu_lora_compile.errors import KernelError, VerificationError
from xpu_lora_compile.inspect import replay
from xpu_lora_compile.inspect.verify import _random_adapters
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.ops import NATIVE_ADD_LORA
from xpu_lora_compile.passes.editing import calls_to
from xpu_lora_compile.passes.graph import Memory, Rewrite
from xpu_lora_compile.rows import rules
from xpu_lora_compile.rows.layout import Layout

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"]
TOKENS = torch.arange(10).reshape(2, 5)


def attached(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, xlc.AdapterBank]:
    model = tiny_llama(num_hidden_layers=1).to(dtype)
    return model, xlc.attach(model, slots=3, max_rank=4, target_modules=TARGETS, vocab_size=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_right_model_is_within_the_budget_at_every_site(dtype: torch.dtype, grad: bool) -> None:
    model, _ = attached(dtype)
    with torch.set_grad_enabled(grad):
        result = xlc.verify(model, generate_code=False)(TOKENS, use_cache=False)
    assert len(result.sites) == 9
    assert all(site.is_right for site in result.sites)
    # All zeros would mean that no row had an adapter.
    assert max(site.rewritten for site in result.sites) > 0


def test_the_generated_code_is_compared_too() -> None:
    model, _ = attached()
    with torch.no_grad():
        result = xlc.verify(model)(TOKENS, use_cache=False)
    assert all(site.compiled is not None and site.compiled <= 1 for site in result.sites)
    assert any(site.compiled for site in result.sites)
    assert result.output_error < 1e-5


def test_the_bank_is_afterwards_as_it_was() -> None:
    model, bank = attached()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    xlc.verify(model, generate_code=False)(TOKENS, use_cache=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with bank.use([None, None]), torch.no_grad():
        xlc.verify(model, generate_code=False)(TOKENS, use_cache=False)
        model(TOKENS)
    assert bank.names == ()


def test_slots_that_are_filled_count_with_all_their_ranks_meanwhile() -> None:
    """As on an accelerator, whose kernels read no further than the rank of a slot: 0 of an empty one."""
    model, bank = attached()
    ranks = torch.tensor([0, 2, 0], dtype=torch.int32)
    bank._routing.ranks = ranks
    with _random_adapters(model, TOKENS, 0):
        assert bank._routing.ranks is ranks
        assert ranks.tolist() == [4, 4, 4]
    assert ranks.tolist() == [0, 2, 0]


def test_ipex_by_force_is_refused_before_anything_runs() -> None:
    """It rounds oftener than the budget has room for, and the graph as it was has operands that it does not take."""
    model, _ = attached(torch.bfloat16)
    with force_kernel("ipex"), pytest.raises(KernelError, match="wanted a kernel that rounds once, as the contract"):
        xlc.verify(model, generate_code=False)(TOKENS, use_cache=False)


def test_a_model_that_fails_leaves_the_bank_as_it_was() -> None:
    model, _ = attached()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(IndexError):
        xlc.verify(model, generate_code=False)(1000 * TOKENS)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_inputs_that_the_model_changes_are_not_changed() -> None:
    def function(cache: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> None:
        xlc.bgmv_expand(cache, hidden, b, indices)

    cache = torch.zeros(2, 4)
    args = cache, torch.ones(2, 3), torch.ones(1, 4, 3), torch.tensor([0, 0])
    assert all(site.is_right for site in xlc.verify(function)(*args).sites)
    assert not cache.any()


def qkv(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """vLLM's sequence for three slices of a packed projection, each with its own rank buffer."""
    y = nn.functional.linear(x, weight)
    buffers = torch.zeros(3, len(x), a.shape[2])
    for s in range(3):
        xlc.bgmv_shrink(buffers[s], x, a[s], indices, 0.5)
    for s in range(3):
        xlc.bgmv_expand_slice(y, buffers[s], b[s], indices, 4 * s, 4)
    return y.relu()


def operands() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(5, 6),
        torch.randn(14, 6),
        torch.randn(3, 2, 3, 6),
        torch.randn(3, 2, 4, 3),
        torch.tensor([0, 1, -1, 1, 7]),
    )


def test_a_fused_chain_is_compared_slice_by_slice() -> None:
    with torch.no_grad():
        result = xlc.verify(qkv)(*operands())
    assert len(result.sites) == 3
    assert all(site.is_right and site.rewritten > 0 for site in result.sites)


def edited(edit: Any) -> tuple[Any, ...]:
    """The pipeline with a wrong pass at its end, which edits the arguments of the first add_lora."""

    def wrong(graph: Graph, _rewrite: Rewrite) -> None:
        for call in calls_to(graph, NATIVE_ADD_LORA)[:1]:
            call.args = edit(*call.args)

    return (*passes.PIPELINE, wrong)


# outputs, inputs, a, b, routing, slice_outputs, slice_offsets, scaling
EDITS = {
    "one column too far": lambda o, x, a, b, r, to, at, s: (o, x, a, b, r, to, [*at[:-1], at[-1] + 1], s),
    "another adapter's B": lambda o, x, a, b, r, to, at, s: (o, x, a, [b[0], b[0], b[2]], r, to, at, s),
    "another scaling": lambda o, x, a, b, r, to, at, s: (o, x, a, b, r, to, at, 2 * s),
    "a slice left out": lambda o, x, a, b, r, to, at, s: (o, x, a[:2], b[:2], r, to[:2], at[:2], s),
    "another input": lambda o, x, a, b, r, to, at, s: (o, x.graph.call_function(torch.neg, (x,)), a, b, r, to, at, s),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("generate_code", [False, True], ids=["rewritten", "generated"])
def test_a_wrong_graph_fails_and_the_site_is_named(
    name: str, generate_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(*args: Any) -> Any:
        if name == "another input":
            (node,) = calls_to(args[1].graph, NATIVE_ADD_LORA)
            with args[1].graph.inserting_before(node):
                return EDITS[name](*args)
        return EDITS[name](*args)

    monkeypatch.setattr(passes, "PIPELINE", edited(edit))
    with torch.no_grad(), pytest.raises(VerificationError, match=r"test_verify\.py:\d+") as error:
        xlc.verify(qkv, generate_code=generate_code)(*operands())
    wrong = [at for at, site in enumerate(error.value.verification.sites) if not site.is_right]
    assert wrong == {"one column too far": [2], "another adapter's B": [1], "a slice left out": [2]}.get(
        name, [0, 1, 2]
    )


def test_a_wrong_module_of_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Graph, _rewrite: Rewrite) -> None:
        call = calls_to(graph, NATIVE_ADD_LORA)[3]
        call.args = (*call.args[:-1], 1.5)

    monkeypatch.setattr(passes, "PIPELINE", (*passes.PIPELINE, wrong))
    model, _ = attached()
    with (
        torch.no_grad(),
        pytest.raises(VerificationError, match=r"the first one model\.layers\.0\.mlp\.down_proj") as error,
    ):
        xlc.verify(model, generate_code=False)(TOKENS, use_cache=False)
    # The others are given right values, and are right.
    assert [site.place for site in error.value.verification.sites if not site.is_right] == [
        "model.layers.0.mlp.down_proj"
    ]


def test_generated_code_that_differs_from_its_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from xpu_lora_compile import backend

    real = backend.generate_code

    def wrong(module: GraphModule, *args: Any) -> Any:
        for call in calls_to(module.graph, NATIVE_ADD_LORA):
            call.args = (*call.args[:-1], 1.5)
        module.recompile()
        return real(module, *args)

    monkeypatch.setattr(backend, "generate_code", wrong)
    with torch.no_grad(), pytest.raises(VerificationError) as error:
        xlc.verify(qkv)(*operands())
    assert all(site.rewritten <= 1 < site.compiled for site in error.value.verification.sites)


def test_sites_in_a_subgraph_are_counted_as_unchecked() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        def with_lora(x: Tensor) -> Tensor:
            return xlc.lora_linear(x + 1, x, [a], [b], indices, [0])

        return torch.cond(x.sum() > 0, with_lora, lambda x: x - 1, (x,))

    args = torch.ones(2, 4), torch.ones(1, 3, 4), torch.ones(1, 4, 3), torch.tensor([0, -1])
    with torch.no_grad():
        result = xlc.verify(function, generate_code=False)(*args)
    assert (len(result.sites), result.unchecked) == (0, 1)
    assert "Not compared: 1 site in subgraphs." in str(result)


def test_the_text_lists_the_worst_sites() -> None:
    with torch.no_grad():
        lines = str(xlc.verify(qkv)(*operands())).splitlines()
    assert lines[0].startswith("3 sites, 3 of them right; the results of the model differ by ")
    assert len([line for line in lines if "test_verify.py" in line]) == 3


def test_a_model_without_lora_is_an_error() -> None:
    with pytest.raises(VerificationError, match="wanted a call that adds LoRA; got none"):
        xlc.verify(nn.Linear(2, 2), generate_code=False)(torch.ones(1, 2))


def test_damage_beside_a_site_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        base = x * 2
        return xlc.lora_linear(base, x, [a], [b], indices, [0]), base

    args = torch.ones(2, 4), torch.ones(1, 3, 4), torch.ones(1, 4, 3), torch.tensor([0, -1])
    with torch.no_grad():
        assert xlc.verify(function, generate_code=False)(*args).returns_the_same
        monkeypatch.setattr(Memory, "is_seen_after", lambda *_args: False)
        with pytest.raises(VerificationError, match="something beside these calls"):
            xlc.verify(function, generate_code=False)(*args)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 6e4], ids=["nan", "inf", "overflow"])
def test_inputs_that_are_no_numbers_or_overflow_are_no_errors(value: float) -> None:
    x, weight, a, b, indices = (one.half() if one.is_floating_point() else one for one in operands())
    x[1] = value
    with torch.no_grad():
        result = xlc.verify(qkv, generate_code=False)(x, weight, a, b, indices)
    assert all(site.is_right for site in result.sites)


def test_running_statistics_are_as_they_were_and_the_same_in_each_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    xlc.attach(model, slots=2, max_rank=2)
    with torch.no_grad():
        result = xlc.verify(model, generate_code=False)(torch.randn(8, 4))
    assert result.output_error < 1e-5
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_graph_that_runs_several_times_counts_with_its_worst_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, *_, indices = operands()
    scales = iter([1.5, 1.0])
    real = replay.Layout.excesses

    def wrong_at_first(self: Any, bases: Any, inputs: Any, results: Any) -> Any:
        return real(self, bases, inputs, [next(scales) * one for one in results])

    def function(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = torch.relu(xlc.lora_linear(x, x, [a], [b], indices, [0]))
        return x

    monkeypatch.setattr(replay.Layout, "excesses", wrong_at_first)
    square = torch.ones(2, 3, 6), torch.ones(2, 6, 3)
    with torch.no_grad(), pytest.raises(VerificationError) as error:
        xlc.verify(function, generate_code=False)(x, weight, *square, indices)
    assert len(error.value.verification.sites) == 1


# Isolation.


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))

    def between(self, x: Tensor) -> Tensor:
        return x.tanh()


class Leaking(TwoLayers):
    """Each sequence sees a little of the one before it."""

    def between(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.roll(1, 0)


def test_isolation_is_reported_for_each_module() -> None:
    model = TwoLayers()
    xlc.attach(model, slots=3, max_rank=2)
    result = xlc.verify(model, generate_code=False)(torch.randn(5, 2, 4))
    assert result.isolation == {"first": 0, "second": 0}
    # However wide the terminal is.
    text = " ".join(str(result).split())
    assert "other rows keep their bits in 2 of 2 modules" in text
    assert "LEAK" not in text


def test_isolation_is_that_of_a_llama_too() -> None:
    model, bank = attached()
    result = xlc.verify(model, generate_code=False)(TOKENS, use_cache=False)
    assert result.isolation == dict.fromkeys(bank.sites, 0)


def test_a_batch_of_one_has_no_isolation() -> None:
    model = TwoLayers()
    xlc.attach(model, slots=3, max_rank=2)
    result = xlc.verify(model, generate_code=False)(torch.randn(1, 2, 4))
    assert result.isolation == {}
    assert "Isolation: not checked." in str(result)


def test_isolation_is_checked_in_a_packed_batch() -> None:
    model = TwoLayers()
    bank = xlc.attach(model, slots=3, max_rank=2)
    with bank.use([None, None, None], lengths=[2, 1, 3]):
        result = xlc.verify(model, generate_code=False)(torch.randn(1, 6, 4))
    assert result.isolation == {"first": 0, "second": 0}


def test_rows_that_have_the_next_sequences_adapter_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Layout.rows

    def rows(self: Layout, slots: Tensor, shape: Sequence[int]) -> Tensor:
        # In eager calls, and of the sequences alone: what says whose the rows are must stay right.
        is_right = torch.compiler.is_compiling() or slots.equal(torch.arange(len(slots)))
        return real(self, slots if is_right else slots.roll(1), shape)

    monkeypatch.setattr(Layout, "rows", rows)
    model = TwoLayers()
    xlc.attach(model, slots=4, max_rank=2)
    with pytest.raises(VerificationError, match="modules where they change, the first one first") as error:
        xlc.verify(model, generate_code=False)(torch.randn(5, 2, 4))
    assert all(error.value.verification.isolation.values())
    assert "LEAK: first" in str(error.value)


def test_a_model_that_lets_one_sequence_see_another_is_found_and_the_module_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A rule that is wrong: with the right one, the model refuses to run.
    monkeypatch.setitem(rules.RULES, "roll", rules.pointwise)
    model = Leaking()
    xlc.attach(model, slots=3, max_rank=2)
    with pytest.raises(VerificationError, match="1 module where they change, the first one second") as error:
        xlc.verify(model, generate_code=False)(torch.randn(5, 2, 4))
    isolation = error.value.verification.isolation
    assert isolation["first"] == 0
    assert isolation["second"] > 0
