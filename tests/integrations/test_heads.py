"""A model that classifies, in vLLM's engine: adapters bring heads of their own, and base rows have the model's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.conftest import Engine
from integrations.served import LENGTHS
from torch import Tensor, nn

LABELS = 3
NAMES = (None, "sentiment", "topic")


class Classifier:
    """A random model with adapters in a folder, and PEFT's probabilities of each label for each row."""

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen2Config, Qwen2ForSequenceClassification

        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 515}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        torch.manual_seed(0)
        config = Qwen2Config(**sizes, **heads, num_labels=LABELS, pad_token_id=0, initializer_range=0.15)
        base = Qwen2ForSequenceClassification(config).eval()
        base.save_pretrained(folder)
        self.folder = folder
        self.prompts = [[(5 * i + 3 * n + 1) % 500 + 5 for i in range(n)] for n in LENGTHS]
        self.wanted = {(None, number): self._of(base, number) for number in range(len(LENGTHS))}
        for name in filter(None, NAMES):
            lora = LoraConfig(
                r=4,
                target_modules="all-linear",
                task_type="SEQ_CLS",
                init_lora_weights=False,
                modules_to_save=["score"],
            )
            model: Any = get_peft_model(copy.deepcopy(base), lora)
            for key, weight in model.named_parameters():
                if "modules_to_save" in key:
                    nn.init.normal_(weight, std=0.3)
            model.eval().save_pretrained(folder / name)
            self.wanted |= {(name, number): self._of(model, number) for number in range(len(LENGTHS))}
        # Whatever row had another's head or LoRA would show.
        rows = torch.stack(list(self.wanted.values()))
        assert (torch.cdist(rows, rows) + torch.eye(len(rows))).min() > 1e-3

    @torch.no_grad()
    def _of(self, model: Any, number: int) -> Tensor:
        probabilities: Tensor = model(input_ids=torch.tensor([self.prompts[number]])).logits[0].softmax(-1)
        return probabilities


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return Classifier(tmp_path_factory.mktemp("classifier"))


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_each_row_has_the_head_of_its_adapter(classifier: Classifier, eager: bool) -> None:
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    engine = Engine(
        classifier.folder, runner="pooling", max_loras=2, max_lora_rank=8, max_num_seqs=8, max_model_len=64,
        enforce_eager=eager, enable_prefix_caching=False,
    )  # fmt: skip
    assert (counters["stats"]["unique_graphs"] == before) is eager
    # All together; the slots the other way around; and without one of the adapters, or any.
    for names in (NAMES, NAMES[::-1], ("topic", None), (None,)):
        rows = [(name, number) for number in range(len(LENGTHS)) for name in names]
        outputs = engine.llm.classify(
            [{"prompt_token_ids": classifier.prompts[number]} for _, number in rows],
            lora_request=[engine.requests.get(name or "") for name, _ in rows],
            use_tqdm=False,
        )
        found = torch.tensor([output.outputs.probs for output in outputs])
        torch.testing.assert_close(found, torch.stack([classifier.wanted[row] for row in rows]), atol=1e-4, rtol=1e-3)
