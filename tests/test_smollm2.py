"""The real model, call by call: its graph is what we claim, and every call is within its error budget.

A few of its layers; `tox -e demo` runs all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import smollm2
import torch
from serve_many_adapters import TARGETS
from torch import nn

import xpu_lora_compile as xlc

LAYERS = 6


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
        smollm2.pad_vocabulary(model, tokenizer)
        del model.model.layers[LAYERS:]
        model.config.num_hidden_layers = LAYERS
        xlc.attach(model, slots=4, max_rank=8, target_modules=TARGETS, vocab_size=smollm2.ORIGINAL_VOCAB)
        yield model


def test_every_site_is_within_its_budget(model: Any) -> None:
    tokens = torch.arange(100, 104)[:, None]
    with torch.no_grad(), xlc.record_decisions() as decisions:
        result = xlc.verify(model, generate_code=False)(tokens, use_cache=False)
    assert len(decisions) == len(result.sites) == 7 * LAYERS + 1
    assert all(site.is_right for site in result.sites)
    # The head, whose weights are narrower than its output, among them.
    assert all(site.rewritten > 0 for site in result.sites)
