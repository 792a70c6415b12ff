"""Qwen2-VL in vLLM's engine, next to PEFT: run with the folder of torchvision's Python, and one for the model.

No torchvision loads beside vLLM's build for CPUs: that of PyPI is built for CUDA. Of torchvision, images need its
Python alone. So its folder is put in front, and the names of its compiled ops, which it asks for as it is imported,
stand for them here: none is ever called. It runs in a process of its own, in which nothing has looked for torchvision.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def name_ops(torchvision: Path) -> torch.library.Library:
    """Define the ops for which torchvision registers fakes as it is imported."""
    text = (torchvision / "torchvision" / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in {
        *re.findall(r'register_meta\("(\w+)"', text),
        *re.findall(r'register_fake\("torchvision::(\w+)"', text),
    }:
        library.define(f"{name}(Tensor never_called) -> Tensor")
    sys.path.insert(0, str(torchvision))
    return library


# Words of the tokenizer; a picture of 56 x 56 is four of them.
START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
PROMPT = [100, 200, 300, 400]
FOUND = "found.json"


def qwen2_vl(folder: Path) -> tuple[Any, dict[str, int]]:
    """A Qwen2-VL with adapters on its image encoder and its language model: PEFT's model, and its words' numbers."""
    from integrations import speech
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = speech.bytes_tokenizer(1003, ["<|im_end|>", START, END, IMAGE, VIDEO], speech.GRANITE_TEMPLATE)
    numbers = {word: tokenizer.convert_tokens_to_ids(word) for word in (START, END, IMAGE, VIDEO)}
    text = {"vocab_size": 1003, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config=vision,
        image_token_id=numbers[IMAGE],
        video_token_id=numbers[VIDEO],
        vision_start_token_id=numbers[START],
        vision_end_token_id=numbers[END],
        tie_word_embeddings=False,
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    speech.randomise(model)
    # A picture that it says itself would be none to transformers.
    model.lm_head.weight.data[list(numbers.values())] = 0
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes))
    processor.save_pretrained(folder)
    linears = r".*visual\.blocks.*\.(qkv|proj|fc1|fc2)|.*visual\.merger\.mlp\.[02]|.*language_model.*\.\w+_proj"
    return speech.add_adapters(model, folder, linears, 8, 2), numbers


@torch.no_grad()
def rows(peft: Any, numbers: dict[str, int], folder: Path, name: str | None, number: int) -> tuple[list[int], Tensor]:
    """What PEFT's model decodes greedily, and the log-probability of each token."""
    from integrations import speech

    images = speech.processor_in(folder).image_processor(speech.picture(number), return_tensors="pt")
    tokens, values = [numbers[START], *[numbers[IMAGE]] * 4, numbers[END], *PROMPT], []
    with speech.chosen(peft, name) as model:
        for _ in range(speech.NEW_TOKENS):
            ids = torch.tensor([tokens])
            types = (ids == numbers[IMAGE]).int()
            logits = model(
                input_ids=ids, **images, attention_mask=torch.ones_like(ids), mm_token_type_ids=types
            ).logits[0, -1]
            values.append(logits.log_softmax(-1).max())
            tokens.append(int(logits.argmax()))
    return tokens[-speech.NEW_TOKENS :], torch.stack(values)


def main(torchvision: Path, folder: Path) -> None:
    """Write into the model's folder how many rows there were, which of them are not PEFT's, and how many answers."""
    # Kept: the names go with it.
    ops = name_ops(torchvision)
    from integrations import speech
    from integrations.test_encoders import NAMES, engine
    from vllm import ModelRegistry

    peft, numbers = qwen2_vl(folder)
    # A class that is there already is not looked at in a process of its own, which would not know the ops.
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())

    def prompt(number: int) -> Any:
        ids = [numbers[START], numbers[IMAGE], numbers[END], *PROMPT]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": speech.picture(number)}}

    with engine(
        folder,
        prompt,
        lambda *row: rows(peft, numbers, folder, *row),
        enable_tower_connector_lora=True,
        max_model_len=64,
    ) as media:
        asked = [(name, number) for number in range(3) for name in NAMES]
        wrong = [media.differing(asked), *(media.differing([row]) for row in asked[:3])]
        answers = {tuple(media.wanted[row][0]) for row in asked if row[1] == 0}
    (folder / FOUND).write_text(json.dumps({"rows": len(asked) + 3, "wrong": wrong, "answers": len(answers)}))
    del ops


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
