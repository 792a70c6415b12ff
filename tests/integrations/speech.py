"""Tiny random speech models with adapters, audio to transcribe, and what transformers with PEFT makes of it."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RATE = 16000
LANGUAGES = 99
WHISPER_VOCABULARY = 51865
WHISPER_PROMPT = [50258, 50259, 50359, 50363]
NEW_TOKENS = 8


def audio(number: int, seconds: float = 1.0) -> np.ndarray:
    """A few tones and noise, other ones for each number."""
    generator = np.random.default_rng(number)
    time = np.arange(int(seconds * RATE)) / RATE
    tones = [np.sin(2 * math.pi * generator.uniform(100, 3000) * time + generator.uniform(0, 6)) for _ in range(5)]
    wave = sum(tones) + 0.1 * generator.standard_normal(len(time))
    return (wave / np.abs(wave).max()).astype(np.float32)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every weight a size that keeps activations alive and tokens apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed_positions" not in name:
            scale = 1.5 / math.sqrt(parameter[0].numel())
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def add_adapters(model: nn.Module, folder: Path, targets: list[str] | str, rank: int, count: int) -> Any:
    """The model with random adapters, each saved in a folder of its name; B is as large as A."""
    from peft import LoraConfig, PeftModel

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    names = [f"adapter_{number}" for number in range(count)]
    peft: Any = PeftModel(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1])
    for name in names:
        peft.save_pretrained(folder, selected_adapters=[name])
    return peft.eval()


def whisper(folder: Path, width: int = 64, heads: int = 2) -> Any:
    """A Whisper of 2 + 2 layers, saved with what its processor needs; PEFT's model with two adapters."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    sizes = {"d_model": width, "encoder_ffn_dim": 2 * width, "decoder_ffn_dim": 2 * width}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": heads}
    config = WhisperConfig(
        vocab_size=WHISPER_VOCABULARY,
        decoder_start_token_id=WHISPER_PROMPT[0],
        decoder_attention_heads=heads,
        **sizes,
        **layers,
    )
    # `randomise` leaves positions as they are.
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    whisper_tokenizer().save_pretrained(folder)
    linears = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return add_adapters(model, folder, linears, 8, 2)


def whisper_tokenizer() -> Any:
    """Bytes, and as many words without a meaning as Whisper has tokens; its special tokens are in their places."""
    from transformers import AddedToken, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as NAMES

    letters = [chr(byte) for byte in range(33, 127)] + [chr(byte) for byte in range(161, 173)]
    letters += [chr(byte) for byte in range(174, 256)] + [chr(256 + number) for number in range(68)]
    words = letters + [f"Ġw{number}" for number in range(50257 - len(letters))]
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in list(NAMES)[:LANGUAGES])]
    special += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    special += ["<|notimestamps|>"]
    tokenizer = WhisperTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(one, special=True, normalized=False) for one in special]}
    )
    tokenizer.add_tokens([AddedToken(f"<|{number * 0.02:.2f}|>", normalized=False) for number in range(1501)])
    return tokenizer


@torch.no_grad()
def whisper_rows(peft: Any, name: str | None, wave: np.ndarray, new: int = NEW_TOKENS) -> tuple[list[int], Tensor]:
    """What PEFT's Whisper decodes greedily, and the log-probability of each token."""
    from transformers import WhisperFeatureExtractor

    features = WhisperFeatureExtractor()(wave, sampling_rate=RATE, return_tensors="pt").input_features
    with chosen(peft, name) as model:
        encoded = model.model.encoder(features)
        tokens, values = list(WHISPER_PROMPT), []
        for _ in range(new):
            logits = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
            values.append(logits.log_softmax(-1).max())
            tokens.append(int(logits.argmax()))
    return tokens[len(WHISPER_PROMPT) :], torch.stack(values)


class chosen:  # noqa: N801
    """PEFT's model with one of its adapters, or none."""

    def __init__(self, peft: Any, name: str | None) -> None:
        self.peft, self.name = peft, name

    def __enter__(self) -> Any:
        if self.name is None:
            self.disabled = self.peft.disable_adapter()
            self.disabled.__enter__()
        else:
            self.peft.set_adapter(self.name)
        return self.peft.base_model.model

    def __exit__(self, *error: object) -> None:
        if self.name is None:
            self.disabled.__exit__(*error)


def bytes_tokenizer(words: int, special: list[str], template: str) -> Any:
    """Bytes, words without a meaning and special tokens, so many in all; with a template of chats."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters + [f"Ġw{number}" for number in range(words - len(letters) - len(special))] + special
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.chat_template = template
    return fast


GRANITE_VOCABULARY = 1003
GRANITE_TEMPLATE = (
    "{% for m in messages %}USER: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GRANITE_ASKS = {
    "transcriptions": "<|audio|>can you transcribe the speech into a written format?",
    "translations": "<|audio|>translate the speech to English",
}


def granite_speech(folder: Path) -> Any:
    """A Granite Speech with adapters of rank 64 on its language model, as the released one has it; PEFT's model."""
    from transformers import (
        Blip2QFormerConfig,
        GraniteConfig,
        GraniteSpeechConfig,
        GraniteSpeechEncoderConfig,
        GraniteSpeechFeatureExtractor,
        GraniteSpeechForConditionalGeneration,
        GraniteSpeechProcessor,
    )

    text = {"vocab_size": GRANITE_VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1001}
    queries = {"hidden_size": 48, "encoder_hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteSpeechConfig(
        text_config=GraniteConfig(**text, tie_word_embeddings=False).to_dict(),
        encoder_config=GraniteSpeechEncoderConfig(num_layers=2, hidden_dim=32, num_heads=2, context_size=20).to_dict(),
        projector_config=Blip2QFormerConfig(**queries, intermediate_size=64).to_dict(),
        audio_token_index=GRANITE_VOCABULARY - 1,
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )
    model = GraniteSpeechForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    tokenizer = bytes_tokenizer(GRANITE_VOCABULARY, ["<|end_of_text|>", "<|audio|>"], GRANITE_TEMPLATE)
    GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(), tokenizer).save_pretrained(folder)
    peft = add_adapters(model, folder, r".*language_model.*\.(q_proj|v_proj)", 64, 2)
    # As the released model and its adapter have them, and vLLM reads them: transformers 5 saves other names.
    rename_tensors(folder / "model.safetensors", "language_model.model.model.", "language_model.model.")
    for file in folder.glob("adapter_*/adapter_model.safetensors"):
        rename_tensors(file, "model.model.language_model.", "model.language_model.model.")
    return peft


def rename_tensors(file: Path, old: str, new: str) -> None:
    """Exchange a part of the names in a file."""
    from safetensors.torch import load_file, save_file

    tensors = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@functools.cache
def processor_in(folder: Path) -> Any:
    """The saved processor; reading it takes longer than what it does."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def granite_rows(
    peft: Any, folder: Path, name: str | None, wave: np.ndarray, ask: str, new: int = NEW_TOKENS
) -> tuple[list[int], Tensor]:
    """What PEFT's Granite Speech decodes greedily, and the log-probability of each token."""
    processor = processor_in(folder)
    chat = [{"role": "user", "content": GRANITE_ASKS[ask]}]
    prompt = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(prompt, torch.from_numpy(wave)[None], return_tensors="pt")
    audio = {key: inputs[key] for key in ("input_features", "input_features_mask") if key in inputs}
    tokens, values = inputs["input_ids"][0].tolist(), []
    with chosen(peft, name) as model:
        for _ in range(new):
            logits = model(input_ids=torch.tensor([tokens]), **audio).logits[0, -1]
            values.append(logits.log_softmax(-1).max())
            tokens.append(int(logits.argmax()))
    return tokens[-new:], torch.stack(values)


def blip2(folder: Path) -> Any:
    """A BLIP-2 with adapters on its image encoder and its language model; PEFT's model."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    heads = {"num_attention_heads": 2, "num_hidden_layers": 2}
    text = {
        "model_type": "opt",
        "vocab_size": 1003,
        "hidden_size": 64,
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
        **heads,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "image_size": 56, "patch_size": 14, **heads}
    queries = {"hidden_size": 48, "encoder_hidden_size": 32, "intermediate_size": 64, **heads}
    config = Blip2Config(
        vision_config=vision,
        qformer_config=queries,
        text_config=text | {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1001, "pad_token_id": 1},
        num_query_tokens=8,
        image_token_index=1002,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    tokenizer = bytes_tokenizer(1003, ["</s>", "<image>"], GRANITE_TEMPLATE)
    processor = BlipImageProcessorPil(size={"height": 56, "width": 56})
    Blip2Processor(processor, tokenizer, num_query_tokens=8).save_pretrained(folder)
    linears = r".*vision_model.*\.(projection|fc1|fc2)|.*language_model.*\.(out_proj|fc1|fc2)"
    return add_adapters(model, folder, linears, 8, 2)


def picture(number: int) -> Any:
    """Random colours, as large as the encoder reads."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8))


BLIP2_PROMPT = [100, 200, 300, 400]


@torch.no_grad()
def blip2_rows(peft: Any, folder: Path, name: str | None, number: int) -> tuple[list[int], Tensor]:
    """What PEFT's BLIP-2 decodes greedily, and the log-probability of each token."""
    pixels = processor_in(folder).image_processor(picture(number), return_tensors="pt").pixel_values
    tokens, values = [1002] * 8 + BLIP2_PROMPT, []
    with chosen(peft, name) as model:
        for _ in range(NEW_TOKENS):
            ids = torch.tensor([tokens])
            logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0, -1]
            values.append(logits.log_softmax(-1).max())
            tokens.append(int(logits.argmax()))
    return tokens[-NEW_TOKENS:], torch.stack(values)
