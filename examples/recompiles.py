"""A thousand batches, each with other adapters: how often is the model compiled again? Ours, and PEFT's beside it.

A tiny random Llama with three random adapters; every batch names an adapter or the base model for each of four rows.
Compilations are counted, and batches that ran without a compiled graph; no code is generated, since only Dynamo decides
about compiling again. Run it with `python examples/recompiles.py`.
"""

from __future__ import annotations

import logging
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import xpu_lora_compile as xlc

ADAPTERS = ["one", "two", "three"]
ROWS = 4
BATCHES = 1000


@dataclass
class Counts:
    """What a compiler was asked to do.

    Attributes:
        compilations: graphs that were compiled.
        uncompiled: batches in which no compiled graph ran.
    """

    compilations: int = 0
    uncompiled: int = 0
    calls: int = 0

    def backend(self, graph_module: Any, inputs: Any) -> Callable[..., Any]:
        """Count a compilation, and each call of what was compiled; our passes are part of it."""
        self.compilations += 1
        xlc.rewrite(graph_module)

        def call(*args: Any) -> Any:
            self.calls += 1
            return graph_module.forward(*args)

        return call

    def count(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run one batch."""
        before = self.calls
        model(*args, **kwargs)
        self.uncompiled += self.calls == before


def tiny_llama() -> Any:
    """The same random weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 8
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def save_adapters(folder: Path) -> None:
    """Let PEFT save three adapters with random A and B."""
    for name in ADAPTERS:
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        model.save_pretrained(str(folder / name))


def ours(folder: Path, batches: list[list[str | None]], tokens: torch.Tensor) -> Counts:
    """All batches through `bank.use`."""
    counts, model = Counts(), tiny_llama()
    bank = xlc.attach(model, slots=4, max_rank=4)
    for name in ADAPTERS:
        bank.load(name, folder / name)
    compiled = torch.compile(model, backend=counts.backend)
    for names in track(batches, "xpu-lora-compile"):
        with bank.use(names):
            counts.count(compiled, tokens, use_cache=False)
    return counts


def pefts(folder: Path, batches: list[list[str | None]], tokens: torch.Tensor) -> Counts:
    """All batches through PEFT's `adapter_names`."""
    counts = Counts()
    model: Any = PeftModel.from_pretrained(tiny_llama(), folder / ADAPTERS[0], adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    compiled = torch.compile(model.eval(), backend=counts.backend)
    for names in track(batches, "PEFT"):
        counts.count(compiled, tokens, use_cache=False, adapter_names=[name or "__base__" for name in names])
    return counts


def main() -> int:
    """Count both, and print them side by side; the exit status is 0 if ours compiled once."""
    warnings.simplefilter("ignore")
    # Dynamo says at length when it gives up on compiling again; the table says it in a number.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    random.seed(0)
    choices: list[str | None] = [None, *ADAPTERS]
    batches = [random.choices(choices, k=ROWS) for _ in range(BATCHES)]  # noqa: S311
    tokens = torch.arange(ROWS * 3).reshape(ROWS, 3)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_adapters(Path(folder))
        torch.compiler.reset()
        found = {"xpu-lora-compile, bank.use": ours(Path(folder), batches, tokens)}
        torch.compiler.reset()
        found["PEFT, adapter_names"] = pefts(Path(folder), batches, tokens)
        # Dynamo has given up on this model's code, and would not compile it again for anybody.
        torch.compiler.reset()
    different = len({tuple(names) for names in batches})
    title = f"{BATCHES} batches, {different} different"
    table = Table("", "graphs compiled", "batches without any compiled graph", title=title)
    for name, counts in found.items():
        table.add_row(name, str(counts.compilations), str(counts.uncompiled))
    Console().print(table)
    return 0 if found["xpu-lora-compile, bank.use"].compilations == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
