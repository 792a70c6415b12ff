"""A random model with adapters in a folder, and what PEFT makes of each row, with which an engine is compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.conftest import Engine
from torch import nn

RANK = 4
# Of the prompts, in tokens.
LENGTHS = (9, 14, 21)
NEW_TOKENS = 10
Row = tuple[str | None, int]


class Served:
    """A model's folder with its adapters, and PEFT's tokens and log-probabilities of a prompt for each row.

    Args:
        base: the model; its weights become random ones of which every projection shows.
        adapters: of each name the arguments of a LoraConfig.
        folder: where both are saved.
    """

    def __init__(self, base: Any, adapters: Mapping[str, dict[str, Any]], folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        self.folder, self.names = folder, (None, *adapters)
        self.prompts = [[(7 * i + 3 * n + 1) % 500 + 5 for i in range(n)] for n in LENGTHS]
        torch.manual_seed(0)
        for weight in base.parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))
        base.eval().save_pretrained(folder)
        self.wanted = {(None, number): self._of(base, number) for number in range(len(LENGTHS))}
        for seed, (name, options) in enumerate(adapters.items()):
            model: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, lora_alpha=8, **options))
            torch.manual_seed(seed)
            for key, weight in model.named_parameters():
                if "lora_" in key:
                    nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1] if "lora_A" in key else 4 * RANK))
            model.save_pretrained(folder / name)
            self.wanted |= {(name, number): self._of(model.eval(), number) for number in range(len(LENGTHS))}
        # Every adapter shows in every prompt.
        for number in range(len(LENGTHS)):
            assert len({str(self.wanted[name, number][1]) for name in self.names}) == len(self.names)

    @torch.no_grad()
    def _of(self, model: Any, number: int) -> tuple[list[int], list[float]]:
        prompt = self.prompts[number]
        ids = torch.tensor([prompt])
        model.generation_config.eos_token_id = None
        length = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length)[0, len(prompt) :]
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
        return new.tolist(), [logs[i, token].item() for i, token in enumerate(prompt[1:])]

    def rows(self, *names: str | None) -> list[Row]:
        """All prompts of each name in one batch."""
        return [(name, number) for number in range(len(LENGTHS)) for name in names]

    def differing(self, engine: Engine, rows: list[Row]) -> list[Row]:
        """Those rows of one batch whose tokens or log-probabilities are not PEFT's."""
        asked = [(name, self.prompts[number]) for name, number in rows]
        outputs = engine.generate(asked, max_tokens=NEW_TOKENS, prompt_logprobs=0)
        wrong = []
        for row, output in zip(rows, outputs, strict=True):
            logs = [next(iter(each.values())).logprob for each in output.prompt_logprobs[1:]]
            tokens, wanted = self.wanted[row]
            if list(output.outputs[0].token_ids) != tokens or logs != pytest.approx(wanted, abs=1e-4):
                wrong.append(row)
        return wrong


def started(served: Served, **options: Any) -> Engine:
    """An engine with two slots that runs the model as it is, unless options say otherwise."""
    defaults: dict[str, Any] = {"max_loras": 2, "max_lora_rank": 8, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Engine(
        served.folder, **(defaults | {"max_model_len": 64, "block_size": 32, "enforce_eager": True} | options)
    )
