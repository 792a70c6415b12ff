"""One batch, four prompts, four voices: the base model and three adapters, answered by one compiled graph.

The model's vocabulary is padded after the adapters were trained, so that its logits are wider than their `lm_head`
weights: what the compiler decides about that is shown at the end. The answers are checked against PEFT, which runs each
adapter alone on the unpadded model; a difference makes the exit status 1. Run it with
`python examples/serve_many_adapters.py`.
"""

from __future__ import annotations

import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from smollm2 import ORIGINAL_VOCAB, chat_prompt, load_model, load_tokenizer, pad_vocabulary
from torch import Tensor
from transformers import CompileConfig, StaticCache, StoppingCriteria, StoppingCriteriaList

import xpu_lora_compile as xlc

ADAPTERS = Path(__file__).parent / "adapters"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
BATCH: list[tuple[str | None, str]] = [
    (None, "Tell me about the sea."),
    ("pirate", "Tell me about the sea."),
    ("haiku", "Tell me about the sea."),
    ("telegram", "Tell me about the sea."),
]
NEW_TOKENS = 32
RUNS = 3


class OnToken(StoppingCriteria):
    """Never stops; says that another token is there."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Advance, and let every row go on."""
        self.progress.advance(self.task)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def compiled_decoding() -> CompileConfig:
    """Have `generate` compile the step that makes one token; the prompt, whose length varies, stays eager."""
    config = CompileConfig(backend="xpu_lora", fullgraph=True, mode="default")
    # transformers does so by itself on XPU and CUDA only.
    vars(config)["_compile_all_devices"] = True
    return config


def main() -> int:
    """Serve the batch, check it, and report."""
    console = Console()
    # PEFT and transformers warn of tied embeddings and of names of theirs; nothing of that concerns what follows.
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    names = [name for name, _ in BATCH]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading SmolLM2-135M, float32", total=None)
        model, tokenizer = load_model(), load_tokenizer()
        pad_vocabulary(model, tokenizer)
        # The library's own annotations keep a model from calling `generate`.
        decoder: Any = model
        prompts = tokenizer([chat_prompt(tokenizer, text) for _, text in BATCH], padding=True, return_tensors="pt")

        progress.update(task, description="loading three adapters")
        bank = xlc.attach(model, slots=4, max_rank=8, target_modules=TARGETS, vocab_size=ORIGINAL_VOCAB)
        for folder in sorted(ADAPTERS.iterdir()):
            bank.load(folder.name, folder)

        def generate(what: str) -> tuple[Tensor, float]:
            progress.reset(task, total=NEW_TOKENS, description=what)
            if not console.is_terminal:
                console.print(what)
            start = time.perf_counter()
            tokens: Tensor = decoder.generate(
                **prompts,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                cache_implementation="static",
                compile_config=compiled_decoding(),
                stopping_criteria=StoppingCriteriaList([OnToken(progress, task)]),
            )
            return tokens[:, prompts["input_ids"].shape[1] :], time.perf_counter() - start

        with bank.use(names), xlc.record_decisions() as decisions:
            mixed, compile_time = generate("compiling the mixed batch (a minute or two)")
        progress.update(task, description="explaining the decoding step")
        with bank.use(names):
            report = explain_step(model, prompts)
        generate("compiling the base model, to compare with")
        seconds: dict[str, list[float]] = {"base model, compiled": [], "mixed adapters, compiled": []}
        # From here on a recompile would be an error.
        torch.compiler.set_stance("fail_on_recompile")
        for run in range(RUNS):
            seconds["base model, compiled"].append(generate(f"base model, run {run + 1}")[1])
            # Other rows, other adapters: the graph is the same.
            with bank.use(names[run:] + names[:run]):
                seconds["mixed adapters, compiled"].append(generate(f"mixed adapters, run {run + 1}")[1])
        torch.compiler.set_stance("default")
        progress.update(task, description="asking PEFT for each adapter alone")
        alone, seconds["PEFT's adapter_names, eager"] = ask_peft(tokenizer, prompts, names)
        progress.update(task, description=f"done after {time.perf_counter() - start:.0f} s")

    for (name, text), row in zip(BATCH, mixed, strict=True):
        console.print(f"\n[bold]{name or 'base model'}[/bold]: {text}")
        console.print(tokenizer.decode(row, skip_special_tokens=True), markup=False, highlight=False)
    console.print()
    console.print("What the compiler decided about one decoding step:")
    for part in report.parts():
        console.print(part, markup=False, highlight=False)
    console.print(speed_table(seconds, compile_time, len(decisions) // len(bank.sites)))
    wrong = [str(name) for name, row, wanted in zip(names, mixed, alone, strict=True) if not torch.equal(row, wanted)]
    if wrong:
        console.print(f"[red]These rows differ from PEFT's tokens: {', '.join(wrong)}[/red]")
        return 1
    console.print(f"All {len(BATCH)} rows equal PEFT's greedy tokens, adapter by adapter, on the unpadded model.")
    return 0


def ask_peft(tokenizer: Any, prompts: Any, names: list[str | None]) -> tuple[list[Tensor], list[float]]:
    """Each row's tokens with its adapter alone, unpadded and unbatched; and the seconds of PEFT's own mixed batch."""
    folders = sorted(ADAPTERS.iterdir())
    model: Any = PeftModel.from_pretrained(load_model(), folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    alone = []
    for name, text in BATCH:
        prompt = tokenizer(chat_prompt(tokenizer, text), return_tensors="pt")
        if name is None:
            with model.disable_adapter():
                tokens = model.generate(**prompt, **length)
        else:
            model.set_adapter(name)
            tokens = model.generate(**prompt, **length)
        alone.append(tokens[0, prompt["input_ids"].shape[1] :])
    seconds = []
    # The pad token is beyond this model's vocabulary; what stands in its place is masked.
    prompts["input_ids"].clamp_(max=ORIGINAL_VOCAB - 1)
    for _ in range(RUNS):
        start = time.perf_counter()
        model.generate(**prompts, **length, adapter_names=[name or "__base__" for name in names])
        seconds.append(time.perf_counter() - start)
    return alone, seconds


def explain_step(model: Any, prompts: Any) -> xlc.Report:
    """What the compiler makes of the step that is compiled: one token for each row, after the prompts."""
    cache = StaticCache(model.config, max_cache_len=prompts["input_ids"].shape[1] + NEW_TOKENS)
    with torch.no_grad():
        tokens = model(**prompts, past_key_values=cache).logits[:, -1:].argmax(-1)
        return xlc.explain(model)(input_ids=tokens, past_key_values=cache)


def speed_table(seconds: dict[str, list[float]], compile_time: float, graphs: int) -> Table:
    """Median speed of the runs, prompts included."""
    table = Table("batch of 4", "tokens/s", title=f"\nmedian of {RUNS} runs of {NEW_TOKENS} tokens, prompts included")
    for what, runs in seconds.items():
        table.add_row(what, f"{len(BATCH) * NEW_TOKENS / statistics.median(runs):.1f}")
    table.add_section()
    table.add_row("graphs compiled with LoRA", str(graphs))
    table.add_row("seconds of that, with the first run", f"{compile_time:.0f}")
    table.add_row("recompiles after other adapters", "0 (they would raise)")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
