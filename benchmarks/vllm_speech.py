"""Speech to text in vLLM with an adapter for each request: how many of 48 rows differ from what PEFT decodes.

    python benchmarks/vllm_speech.py whisper 0            # or granite; the number chooses the sounds
    python benchmarks/vllm_speech.py whisper 1 --compile

Tiny random models, in an environment that has vLLM and the plugin: see the tox leg `vllm`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"


def main(arguments: list[str] | None = None) -> int:
    """Run one model; returns 1 where a row differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["whisper", "granite"])
    parser.add_argument("seed", type=int)
    parser.add_argument("--compile", action="store_true", help="compile the model, as vLLM does by default")
    chosen = parser.parse_args(arguments)
    sys.path[:0] = [str(TESTS), str(TESTS / "integrations"), str(TESTS.parent / "examples")]
    # Before vLLM is imported.
    import conftest  # noqa: F401

    folder = Path(tempfile.mkdtemp())
    prompt, want, rows, options = (whisper if chosen.model == "whisper" else granite)(folder, 16 * chosen.seed)
    from integrations.test_encoders import engine

    with engine(folder, prompt, want, enforce_eager=not chosen.compile, **options) as media:
        mixed, reversed_ = media.differing(rows), media.differing(rows[::-1])
        distinct = len({tuple(media.wanted[row][0]) for row in rows})
    print(f"{chosen.model}: {len(rows)} rows, {distinct} of them distinct")
    print(f"differing from PEFT's: {len(mixed)}; in the reversed batch: {len(reversed_)}")
    print(f"with another token that is as probable: {len(media.ties)}")
    return int(bool(mixed or reversed_))


def whisper(folder: Path, first: int) -> tuple[Any, Any, list[Any], dict[str, Any]]:
    """Prompts, what PEFT decodes, rows and options, for the shape of openai's tiny Whisper with 2 + 2 layers."""
    from integrations import speech
    from integrations.test_encoders import NAMES

    peft = speech.whisper(folder, 384, 6)

    def prompt(sound: int) -> dict[str, Any]:
        audio = {"audio": (speech.audio(sound), 16000)}
        asked = {"prompt_token_ids": speech.WHISPER_PROMPT}
        return {"encoder_prompt": {"prompt": "", "multi_modal_data": audio}, "decoder_prompt": asked}

    def want(name: str | None, sound: int) -> Any:
        return speech.whisper_rows(peft, name, speech.audio(sound))

    rows = [(name, first + sound) for sound in range(16) for name in NAMES]
    return prompt, want, rows, {"max_num_batched_tokens": 6000}


def granite(folder: Path, first: int) -> tuple[Any, Any, list[Any], dict[str, Any]]:
    """The same for a Granite Speech, with two questions about each sound."""
    from integrations import speech
    from integrations.test_encoders import NAMES

    peft = speech.granite_speech(folder)
    tokenizer = speech.processor_in(folder).tokenizer

    def prompt(sound: int, ask: str) -> dict[str, Any]:
        chat = [{"role": "user", "content": speech.GRANITE_ASKS[ask]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        audio = {"audio": (speech.audio(sound), 16000)}
        return {"prompt_token_ids": tokenizer.encode(text), "multi_modal_data": audio}

    def want(name: str | None, sound: int, ask: str) -> Any:
        return speech.granite_rows(peft, folder, name, speech.audio(sound), ask)

    rows = [(name, first + sound, ask) for sound in range(8) for ask in speech.GRANITE_ASKS for name in NAMES]
    return prompt, want, rows, {"max_lora_rank": 64, "max_model_len": 256}


if __name__ == "__main__":
    sys.exit(main())
