"""LoRA on lists of `nn.Linear` that a router picks rows for, as code on the hub and transformers 4 have experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_folders import edit_config, loaded_by_peft, save_adapter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import UnprovedRowsError

D, EXPERTS, TOP_K = 16, 5, 2
NAMES = ["pirate", None, "haiku", "pirate"]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((D, 24), (24, D), (D, 24)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """A router and its experts; how rows come to them and back is each subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(EXPERTS)])

    def routed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = torch.topk(nn.functional.softmax(self.gate(rows), -1), TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), chosen


class LoopOverExperts(Mixture):
    """As Mixtral of transformers 4."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, D)
        weights, chosen = self.routed(rows)
        result = torch.zeros_like(rows)
        mask = nn.functional.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for number in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            place, token = torch.where(mask[number].squeeze(0))
            its = self.experts[number](rows[None, token].reshape(-1, D)) * weights[token, place, None]
            result.index_add_(0, token, its)
        return result.reshape(x.shape)


class SortedByExpert(Mixture):
    """As DeepSeek's own code."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, D)
        weights, chosen = self.routed(rows)
        counts = chosen.new_zeros((len(chosen), EXPERTS)).scatter_(1, chosen, 1).sum(0)
        order = chosen.view(-1).argsort()
        picked, start, outputs = rows[order // TOP_K], 0, []
        for number, count in enumerate(counts.cpu().numpy()):
            if count:
                outputs.append(self.experts[number](picked[start : start + count]))
                start += count
        together = torch.cat(outputs)
        result = torch.empty_like(together)
        result[order] = together
        return (result.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1).view(x.shape)


class RowsOfEachExpert(Mixture):
    """As Qwen's and Phi's code on the hub: an expert takes its rows by a mask, once for each of a token's choices."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, D).repeat_interleave(TOP_K, 0)
        weights, chosen = self.routed(x.view(-1, D))
        flat, result = chosen.view(-1), torch.empty_like(rows)
        for number, expert in enumerate(self.experts):
            result[flat == number] = expert(rows[flat == number])
        return (result.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).view(x.shape)


KINDS = [LoopOverExperts, SortedByExpert, RowsOfEachExpert]


class Model(nn.Module):
    """`[batch, tokens]` to `[batch, tokens, D]`: two blocks of attention and experts."""

    def __init__(self, kind: type[Mixture], *, checkpoints: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.blocks = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(D, D), "mlp": kind()}) for _ in range(2)])
        self.checkpoints = checkpoints

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embed(input_ids)
        for block in self.blocks:
            states = nn.functional.layer_norm(states, (D,))
            states = states + nn.functional.scaled_dot_product_attention(block["q_proj"](states), states, states)
            mlp: Any = block["mlp"]
            states = states + (checkpoint(mlp, states, use_reentrant=False) if self.checkpoints else mlp(states))
        return nn.functional.layer_norm(states, (D,))


def model_of(kind: type[Mixture], **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(kind, **options).eval().requires_grad_(False)


def bank_of(
    model: nn.Module, kind: type[Mixture], tmp_path: Path
) -> tuple[xlc.AdapterBank, dict[str | None, nn.Module]]:
    """A bank of two adapters, one on experts alone; and what PEFT makes of each of them."""
    targets = {"pirate": ["w1", "w2", "w3", "q_proj", "gate"], "haiku": ["w1", "w2"]}
    folders = {
        name: save_adapter(tmp_path / name, seed=seed, model=model_of(kind), target_modules=modules)
        for seed, (name, modules) in enumerate(targets.items())
    }
    bank = xlc.attach(model, adapters=folders)
    return bank, {None: model_of(kind), **{name: loaded_by_peft(its, model_of(kind)) for name, its in folders.items()}}


def input_ids(*sizes: int) -> Tensor:
    return torch.randint(50, sizes, generator=torch.Generator().manual_seed(sum(sizes)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_row_has_its_own_adapters_experts(kind: type[Mixture], tmp_path: Path) -> None:
    model = model_of(kind)
    bank, oracles = bank_of(model, kind, tmp_path)
    for batch, tokens in ((4, 6), (2, 1), (4, 6), (4, 3), (3, 1)):
        ids = input_ids(batch, tokens)
        with bank.use(NAMES[:batch]):
            got = model(ids)
        for row, name in enumerate(NAMES[:batch]):
            torch.testing.assert_close(got[row], oracles[name](ids)[row], atol=2e-4, rtol=2e-4)
        assert not torch.allclose(got[0], oracles[None](ids)[0], atol=1e-3)


@torch.no_grad()
def test_packed_sequences_have_their_own_adapters_experts(tmp_path: Path) -> None:
    model = model_of(LoopOverExperts)
    for block in model.blocks:
        # Nothing here keeps packed sequences apart, so that attention must not mix them.
        block["q_proj"] = nn.Identity()
    model.forward = lambda ids: _without_attention(model, ids)
    folder = save_adapter(tmp_path / "a", model=model_of(LoopOverExperts), target_modules=["w1", "w2"])
    bank = xlc.attach(model, adapters={"a": folder, "b": folder})
    ids = input_ids(1, 9)
    with bank.use(["a", None, "b"], lengths=[4, 3, 2]):
        got = model(ids)[0]
    with bank.use(["a"]):
        changed = model(ids)[0]
    with bank.use([None]):
        plain = model(ids)[0]
    torch.testing.assert_close(got, torch.cat([changed[:4], plain[4:7], changed[7:]]), atol=2e-4, rtol=2e-4)


def _without_attention(model: nn.Module, ids: Tensor) -> Tensor:
    states: Tensor = model.embed(ids)
    for block in model.blocks:
        states = nn.functional.layer_norm(states + block["mlp"](states), (D,))
    return states


@torch.no_grad()
def test_compiled_calls_say_that_they_cannot_know_the_rows(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = model_of(SortedByExpert)
    bank, oracles = bank_of(model, SortedByExpert, tmp_path)
    ids = input_ids(4, 6)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with bank.use(NAMES), pytest.raises(UnprovedRowsError, match=r"experts\.\d\.w1|gate|q_proj"):
            compiled(ids)
        with bank.use(NAMES):
            model(ids)
    with bank.use(["haiku"] * 4):
        torch.testing.assert_close(compiled(ids), oracles["haiku"](ids), atol=2e-4, rtol=2e-4)


def test_gradients_reach_the_experts_of_the_rows(tmp_path: Path) -> None:
    model = model_of(LoopOverExperts)
    bank, oracles = bank_of(model, LoopOverExperts, tmp_path)
    ids = input_ids(4, 6)
    stacks = [(name, layer.lora_b.requires_grad_()) for name, layer in bank._layers.items() if name.endswith("w2")]
    with bank.use(NAMES):
        model(ids).square()[[0, 3]].sum().backward()
    oracle = oracles["pirate"]
    parameters = dict(oracle.named_parameters())
    for name, _ in stacks:
        parameters[f"base_model.model.{name}.lora_B.default.weight"].requires_grad_()
    oracle(ids).square()[[0, 3]].sum().backward()
    for name, stack in stacks:
        factor = oracle.get_submodule(f"base_model.model.{name}").scaling["default"]
        wanted = parameters[f"base_model.model.{name}.lora_B.default.weight"].grad / factor
        slot = bank.names.index("pirate")
        torch.testing.assert_close(stack.grad[slot][:, : wanted.shape[1]], wanted, atol=2e-4, rtol=2e-4)


def test_a_checkpoint_that_runs_experts_again_is_refused(tmp_path: Path) -> None:
    model = model_of(LoopOverExperts, checkpoints=True)
    bank, _ = bank_of(model, LoopOverExperts, tmp_path)
    model.embed.requires_grad_()
    with bank.use(NAMES):
        result = model(input_ids(4, 6))
        with pytest.raises(UnprovedRowsError, match=r"a checkpoint runs it again.*gradient checkpointing off"):
            result.sum().backward()


@torch.no_grad()
def test_adapters_with_invocation_tokens_are_refused_there(tmp_path: Path) -> None:
    model = model_of(LoopOverExperts)
    folder = save_adapter(tmp_path / "a", model=model_of(LoopOverExperts), target_modules=["w1"])
    edit_config(folder, alora_invocation_tokens=[3, 1], task_type="CAUSAL_LM")
    bank, ids = xlc.attach(model, adapters={"a": folder}), input_ids(2, 6)
    with bank.use(["a", None], input_ids=ids), pytest.raises(UnprovedRowsError, match="invocation tokens"):
        model(ids)
