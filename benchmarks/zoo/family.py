"""Description of one family of models, and the builders that most families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# Sequences in a batch. Many inputs are as long as the batch is large, so that a mix-up of dimensions shows.
BATCH = 3
VOCABULARY = 99

Inputs = dict[str, Any]
# What encoders return: the second is there where the model has a pooler.
ENCODED = ("last_hidden_state", "pooler_output")
# The tensors that belong to each sequence of the batch.
Rows = list[list[Tensor]]

# Names that most configurations of text models understand; a configuration ignores those that it does not have.
TEXT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: as the table shows it.
        build: makes the model; called with a fixed seed.
        inputs: makes the arguments of `forward` for a batch of three sequences.
        rows: reads what `forward` returned, sequence by sequence.
        prompt: makes the arguments of `generate`; None where the model does not generate.
        targets: the modules that get LoRA, as PEFT takes them.
        exclude: the modules that do not, as PEFT takes them.
        note: what the reader of the table has to know.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    rows: Callable[[Any], Rows]
    prompt: Callable[[], Inputs] | None = None
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] | None = None
    note: str = ""


def model_of(model_class: str, config: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Return a builder of a transformers model, from the name of its class and a maker of its configuration."""
    return lambda: getattr(transformers, model_class)(config())


def config_of(config_class: str, sizes: Mapping[str, Any], **more: Any) -> Callable[[], Any]:
    """Return a maker of a transformers configuration."""
    return lambda: getattr(transformers, config_class)(**{**sizes, **more})


def tokens(length: int = BATCH, low: int = 3, high: int = VOCABULARY) -> Tensor:
    """Return random token ids, `[3, length]`."""
    return torch.randint(low, high, (BATCH, length))


def text(length: int = BATCH) -> Callable[[], Inputs]:
    """Return a maker of token ids and a mask without padding."""
    return lambda: {"input_ids": tokens(length), "attention_mask": torch.ones(BATCH, length, dtype=torch.long)}


def batch_first(*names: str) -> Callable[[Any], Rows]:
    """Return a reader for outputs whose first dimension is the batch: the output itself, or those of its fields."""

    def read(output: Any) -> Rows:
        tensors = [output[name] for name in names if name in output] if names else [output]
        if not tensors:
            raise ValueError(f"the outputs are {', '.join(output)}, none of {names}")
        for tensor in tensors:
            if tensor.shape[0] != BATCH:
                raise ValueError(f"an output of shape {tuple(tensor.shape)} for {BATCH} sequences")
        return [[tensor[row] for tensor in tensors] for row in range(BATCH)]

    return read


def time_first(output: Tensor) -> Rows:
    """Read an output `[T, batch, D]`."""
    return [[output[:, row]] for row in range(BATCH)]


def make_lively(model: nn.Module) -> None:
    """Draw weights so large that every layer matters, since the usual ones nearly vanish in small models."""
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() < 2:
                    if name not in ("weight", "bias") and not weight.count_nonzero():
                        # A gate, which is closed before training.
                        weight.fill_(0.5)
                elif weight is getattr(module, "weight", None):
                    fan_in = 1 if isinstance(module, nn.Embedding) else math.prod(weight.shape[1:])
                    weight.normal_(std=fan_in**-0.5)
                elif not weight.count_nonzero():
                    # A product's own parameter, or queries, that training would start from nothing.
                    weight.normal_(std=weight.shape[-2] ** -0.5)
