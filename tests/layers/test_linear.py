"""LoRA on `nn.Linear`: wider and narrower adapters of an output embedding, gradients, and what is no plain one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.peft_folders import loaded_by_peft, save_adapter, tiny_llama
from torch import nn

import xpu_lora_compile as xlc
from xpu_lora_compile.layers import host_of

TOKENS = torch.randint(0, 70, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("vocab_size", "relation"), [(70, "narrower"), (128, "equal"), (150, "wider")])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad-mode"])
def test_adapters_of_another_vocabulary(vocab_size: int, relation: str, grad: bool, tmp_path: Path) -> None:
    """The model's vocabulary is padded to 128; adapters cover `vocab_size` rows."""
    torch._dynamo.reset()
    trained_on = tiny_llama(vocab_size=vocab_size)
    folder = save_adapter(tmp_path / "a", model=copy.deepcopy(trained_on), target_modules=["lm_head"],
                          save_embedding_layers=False)  # fmt: skip
    rows = min(vocab_size, 128)
    padded = tiny_llama(vocab_size=128)
    weights = trained_on.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = nn.functional.pad(weights[name][:rows], (0, 0, 0, 128 - rows))
    padded.load_state_dict(weights)
    expected = loaded_by_peft(folder, trained_on)(TOKENS).logits[..., :rows]
    bank = xlc.attach(padded, max_rank=4, target_modules=["lm_head"], vocab_size=vocab_size)
    bank.load("a", folder)
    with torch.set_grad_enabled(grad), bank.use(["a", "a"]), xlc.record_decisions() as decisions:
        run = torch.compile(padded, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
        logits = run(TOKENS).logits
    torch.testing.assert_close(logits[..., :rows], expected, atol=1e-5, rtol=1e-5)
    assert not logits[..., rows:].any()
    # In grad mode the layer itself cuts weights that are wider, and says at which column they are added.
    grads = {"narrower": "slice", "equal": "equal", "wider": "equal"}
    assert [decision.relation for decision in decisions] == [grads[relation] if grad else relation]


def test_a_gradient_reaches_the_inputs_and_not_the_bank(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    bank = xlc.attach(model, slots=1, max_rank=2)
    layer = model[0]
    layer.store(0, torch.ones(2, 6), torch.ones(5, 2))
    bank._slots[0] = "a"
    x = torch.randn(3, 6, requires_grad=True)
    with bank.use(["a", None, "a"]):
        model(x).sum().backward()
    expected = layer.weight.sum(0) + torch.tensor([10.0, 0.0, 10.0])[:, None]
    torch.testing.assert_close(x.grad, expected)
    assert layer.lora_a.grad is None


def of_whole_numbers() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return layer


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return 2 * super().forward(input)


class Named(nn.Linear):
    pass


def test_a_subclass_with_the_same_forward_is_taken_and_others_are_not() -> None:
    assert host_of(Named(6, 5)) is host_of(nn.Linear(6, 5))
    assert host_of(Doubled(6, 5)) is None


@pytest.mark.parametrize(
    "layer",
    [
        nn.modules.linear.NonDynamicallyQuantizableLinear(6, 5),
        of_whole_numbers(),
        nn.utils.spectral_norm(nn.Linear(6, 5)),
    ],
    ids=["parent-reads-it", "int8", "computed-weight"],
)
def test_a_linear_layer_that_may_compute_something_else_has_no_host(layer: nn.Module) -> None:
    assert host_of(nn.Linear(6, 5)) is not None
    assert host_of(layer) is None
