"""Read README.md and the pages of docs/, and set up what their Python blocks work on.

A page says two things in HTML comments, which readers do not see, in front of a Python block:

    <!-- setup: model, input_ids = llama(), token_ids() -->     Python that runs before the block
    <!-- not run: it needs an NVIDIA GPU -->                    the block is only compiled, for this reason

A `text` block right behind a Python block is what that block prints.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from support.image_models import llava, llava_batch, qwen2_vl, qwen2_vl_batch
from support.mixtures import mixture
from support.peft_folders import quiet, save_adapter, tiny_llama
from torch import Tensor, nn

import xpu_lora_compile as xlc

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (setup|not run): (.*?) -->\s*$", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block of code: its language, the line where it begins, and what the page says about running it."""

    language: str
    line: int
    code: str
    setup: str = ""
    not_run: str = ""
    printed: str | None = None


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    fences = list(_FENCE.finditer(text))
    blocks = []
    for at, fence in enumerate(fences):
        before = text[fences[at - 1].end() if at else 0 : fence.start()]
        comment = _COMMENT.search(before)
        said = {comment[1]: comment[2]} if comment else {}
        follower = fences[at + 1] if at + 1 < len(fences) else None
        is_output = follower and follower[1] == "text" and not text[fence.end() : follower.start()].strip()
        blocks.append(
            Block(
                fence[1],
                text[: fence.start()].count("\n") + 2,
                fence[2],
                said.get("setup", ""),
                said.get("not run", ""),
                follower[2] if follower and is_output else None,
            )
        )
    return blocks


def prose_of(text: str) -> str:
    """A page without its blocks of code and its comments; every line keeps its place."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    return re.sub(r"<!--.*?-->", blank, _FENCE.sub(blank, text), flags=re.DOTALL)


# What setups call. They run in a temporary folder.


def llama() -> nn.Module:
    """A language model of two layers."""
    return tiny_llama()


def token_ids(batch: int = 3, tokens: int = 5) -> Tensor:
    """Tokens for `llama`."""
    return torch.randint(3, 60, (batch, tokens), generator=torch.Generator().manual_seed(0))


def save_adapters(*folders: str, model: nn.Module | None = None, **lora: Any) -> None:
    """Have PEFT write folders with random adapters: for a model without LoRA, or for q and v of `llama`."""
    for seed, folder in enumerate(folders):
        # PEFT changes the model that it is given; None is one that is like `llama`.
        save_adapter(
            Path(folder), seed=seed, model=copy.deepcopy(model), **{"target_modules": ["q_proj", "v_proj"], **lora}
        )


def small_mixture() -> nn.Module:
    """A mixture of experts of two layers."""
    return mixture("Mixtral")


def peft_llama(*names: str) -> nn.Module:
    """What PEFT makes of `llama`, with random adapters of these names on q and v."""
    with quiet():
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(tiny_llama(), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    return model.eval()


def save_loha(folder: str) -> None:
    """Have PEFT write a LoHa adapter for q and v of `llama`."""
    with quiet():
        config = LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"], init_weights=False)
        get_peft_model(tiny_llama(), config).save_pretrained(folder)


def serve(model: nn.Module) -> xlc.AdapterBank:
    """A bank with two adapters on every linear layer of a model, "pirate" and "haiku"."""
    save_adapters("pirate", "haiku", model=model, target_modules="all-linear")
    return xlc.attach(model.eval(), adapters={"pirate": "pirate", "haiku": "haiku"})


HELPERS = {
    function.__name__: function
    for function in (
        llama,
        small_mixture,
        peft_llama,
        token_ids,
        save_adapters,
        save_loha,
        serve,
        llava,
        llava_batch,
        qwen2_vl,
        qwen2_vl_batch,
    )
}
