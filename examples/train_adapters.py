"""Train the three small adapters in `examples/adapters` with PEFT, each on one text of `examples/texts`.

About five minutes an adapter on two CPU cores: `python examples/train_adapters.py --only pirate`.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from smollm2 import chat_prompt, greedy_answers, load_model, load_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).parent
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH = 4
IGNORED = -100
UNSEEN_QUESTIONS = [
    "What is the best way to start the day?",
    "Tell me about the sea.",
    "How do I make tea?",
    "Why is the sky blue?",
]


class Recipe(NamedTuple):
    """What to train, and how fast. The three differ in rank, in modules and in scaling on purpose."""

    config: LoraConfig
    learning_rate: float
    steps: int


RECIPES = {
    "pirate": Recipe(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
        ),
        learning_rate=2e-3,
        steps=50,
    ),
    "haiku": Recipe(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "lm_head"],
        ),
        learning_rate=3e-3,
        steps=100,
    ),
    "telegram": Recipe(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"down_proj": 6},
        ),
        learning_rate=2e-3,
        steps=100,
    ),
}


class Batch(NamedTuple):
    """Token ids, which of them are no padding, and the answer alone: `IGNORED` where another row's is longer."""

    input_ids: Tensor
    attention_mask: Tensor
    answers: Tensor


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Blocks between blank lines: the first line is the question, the others are the answer."""
    blocks = path.read_text(encoding="utf-8").strip().split("\n\n")
    return [(question, answer) for question, answer in (block.split("\n", 1) for block in blocks)]


def make_batch(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> Batch:
    """Prompt and answer of every pair, padded on the left, so that all answers are in the last columns."""
    prompts = [tokenizer(chat_prompt(tokenizer, question))["input_ids"] for question, _ in pairs]
    answers = [tokenizer(f"{answer}{tokenizer.eos_token}")["input_ids"] for _, answer in pairs]
    tokens = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Batch(
        pad_left(tokens, tokenizer.pad_token_id),
        pad_left([torch.ones_like(row) for row in tokens], 0),
        pad_left([torch.tensor(answer) for answer in answers], IGNORED),
    )


def pad_left(rows: list[Tensor], value: int) -> Tensor:
    """Rows of several lengths as one tensor."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def train(model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, text: Path, steps: int) -> None:
    """AdamW over shuffled passes of the text, with a short warm-up and a linear decay to zero."""
    pairs = read_pairs(text)
    shuffled = random.Random(0)  # noqa: S311
    waiting: list[tuple[str, str]] = []
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, (steps - step) / steps))
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        if len(waiting) < BATCH:
            waiting = shuffled.sample(pairs, len(pairs))
        batch = make_batch(tokenizer, [waiting.pop() for _ in range(BATCH)])
        # The logits at one position are for the token after it, so the answer's start one before it.
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            logits_to_keep=batch.answers.shape[1] + 1,
        ).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORED)
        loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(f"  step {step + 1:3d} of {steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    model.eval()


def save(model: PeftModel, config: LoraConfig, folder: Path) -> None:
    """Write `adapter_config.json` and bf16 `adapter_model.safetensors`, and nothing else."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    # PEFT has filled in the folder on this machine, and made the modules a set, whose order varies from run to run.
    config.base_model_name_or_path = BASE_MODEL
    config.target_modules = sorted(config.target_modules or [])
    # lm_head is a target of one adapter; by default PEFT would then store the whole embedding beside it.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def main() -> None:
    """Train, save, load what was saved, and answer questions that are not in the text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(RECIPES), help="train one adapter (default: all three)")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="folder for the adapters")
    parser.add_argument("--steps", type=int, help=f"batches of {BATCH} pairs (default: the recipe's)")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer()
    for name in [arguments.only] if arguments.only else RECIPES:
        print(name, flush=True)
        torch.manual_seed(0)
        recipe = RECIPES[name]
        model = get_peft_model(load_model(), recipe.config)
        train(model, tokenizer, recipe, HERE / "texts" / f"{name}.txt", arguments.steps or recipe.steps)
        save(model, recipe.config, arguments.out / name)
        saved = PeftModel.from_pretrained(load_model(), str(arguments.out / name))
        for question, answer in zip(UNSEEN_QUESTIONS, greedy_answers(saved, tokenizer, UNSEEN_QUESTIONS), strict=True):
            print(f"  {question}\n    {answer!r}", flush=True)


if __name__ == "__main__":
    main()
