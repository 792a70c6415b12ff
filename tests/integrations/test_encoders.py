"""Audio and images with LoRA: every row of every layer has the adapter of its request, in encoders as well."""

from __future__ import annotations

import functools
import gc
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from integrations import qwen2_vl, speech
from torch import Tensor

NAMES = [None, "adapter_0", "adapter_1"]
Row = tuple[Any, ...]


class Media:
    """An engine for prompts with audio or an image, and what PEFT makes of each row: a name and what it is asked."""

    def __init__(
        self, folder: Path, prompt: Callable[..., Any], peft: Callable[..., tuple[list[int], Tensor]], **options: Any
    ) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        defaults = {"dtype": "float32", "enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "enforce_eager": True}
        defaults |= {"max_num_seqs": 16, "gpu_memory_utilization": 0.2, "skip_mm_profiling": True}
        self.llm = LLM(model=str(folder), **(defaults | options))
        self.ties: list[Row] = []
        self.prompt, self.peft, self.wanted = prompt, peft, dict[Row, tuple[list[int], Tensor]]()
        self.requests = {name: LoRARequest(name, n, str(folder / name)) for n, name in enumerate(NAMES) if name}

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def differing(self, rows: list[Row]) -> list[Row]:
        """Those of one batch's rows whose tokens, or their probabilities, are not PEFT's.

        A row is compared up to its first other token. If that is as probable as PEFT's, it is a tie: see `self.ties`.
        """
        from vllm import SamplingParams

        for row in set(rows) - set(self.wanted):
            self.wanted[row] = self.peft(*row)
        greedy = SamplingParams(
            temperature=0, max_tokens=speech.NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0
        )
        outputs = self.llm.generate(
            [self.prompt(*row[1:]) for row in rows],
            greedy,
            lora_request=[self.requests.get(row[0]) for row in rows],
            use_tqdm=False,
        )
        wrong = []
        for row, output in zip(rows, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            values = [step[token].logprob for token, step in zip(tokens, output.outputs[0].logprobs, strict=True)]
            wanted, probabilities = self.wanted[row]
            compared = next(
                (n + 1 for n, pair in enumerate(zip(tokens, wanted, strict=True)) if len(set(pair)) > 1), None
            )
            is_close = torch.isclose(torch.tensor(values), probabilities, rtol=0, atol=1e-4)
            if not is_close[:compared].all():
                wrong.append(row)
            elif compared is not None:
                self.ties.append(row)
        return wrong


@contextmanager
def engine(*args: Any, **options: Any) -> Iterator[Media]:
    """An engine, and its end: vLLM's state is one for the process, and the next engine has its own."""
    made = Media(*args, **options)
    try:
        yield made
    finally:
        made.llm.llm_engine.engine_core.shutdown()
        del made.llm
        gc.collect()


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whisper")
    return folder, speech.whisper(folder)


@pytest.fixture(scope="class")
def whisper(whisper_folder: tuple[Path, Any]) -> Iterator[Media]:
    folder, peft = whisper_folder

    def prompt(number: int) -> Any:
        media = {"audio": (speech.audio(number), speech.RATE)}
        encoder = {"prompt": "", "multi_modal_data": media}
        return {"encoder_prompt": encoder, "decoder_prompt": {"prompt_token_ids": speech.WHISPER_PROMPT}}

    # Frames of three audios in a step, 1500 each, beside 4 tokens of each decoder.
    options = {"max_num_batched_tokens": 4500, "skip_mm_profiling": False}
    rows = functools.partial(speech.whisper_rows, peft)
    with engine(folder, prompt, lambda name, number: rows(name, speech.audio(number)), **options) as media:
        yield media


def change(folder: Path, to: Path, part: str, how: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    """A copy of an adapter, with others in the place of the tensors whose names have this part."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    file = to / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if part in name]:
        tensors |= how(name, tensors.pop(name))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return to


LAYERS = "model.decoder.layers"
NAN = (f"{LAYERS}.0.fc1.lora_A", lambda name, a: {name: a.clone().index_fill_(0, torch.tensor(1), math.nan)})
WRONG = {
    "NaN": (*NAN, r"layers\.0\.mlp\.fc1: wanted finite weights in torch\.float32; got NaN or infinity"),
    "infinity": (
        f"{LAYERS}.1.fc2.lora_B",
        lambda name, b: {name: b / 0},
        r"layers\.1\.mlp\.fc2: wanted finite weights",
    ),
    "no such layer": (
        f"{LAYERS}.1.fc1",
        lambda name, tensor: {name.replace("layers.1", "layers.9"): tensor},
        r"can have LoRA in WhisperFor.*; got 1 of other modules: model\.decoder\.layers\.9\.mlp\.fc1\. ",
    ),
    "half": (f"{LAYERS}.1.fc1.lora_B", lambda name, b: {}, r"layers\.1\.mlp\.fc1: wanted both lora_A and lora_B"),
    "narrower": (
        f"{LAYERS}.0.encoder_attn.v_proj.lora_B",
        lambda name, b: {name: b[:32]},
        r"encoder_attn\.v_proj: wanted lora_A \[R, 64\] and lora_B \[64, R\]; got \[8, 64\] and \[32, 8\]",
    ),
    "one column": (
        f"{LAYERS}.0.self_attn.q_proj.lora_A",
        lambda name, a: {name: a[:, :1]},
        r"self_attn\.q_proj: wanted lora_A \[R, 64\].* got \[8, 1\] and \[64, 8\]",
    ),
    "another rank": (
        f"{LAYERS}.0.self_attn.q_proj.lora_A",
        lambda name, a: {name: a[:4]},
        r"self_attn\.q_proj: wanted lora_A \[R, 64\].* got \[4, 64\] and \[64, 8\]",
    ),
    "too high a rank": (
        f"{LAYERS}.0.fc2.lora_",
        lambda name, tensor: {name: torch.cat([tensor, tensor], dim=0 if "lora_A" in name else 1)},
        r"layers\.0\.mlp\.fc2: wanted a rank up to 8; got 16",
    ),
}


class TestWhisper:
    """One engine for all of them; it is gone before another one starts."""

    def test_whisper_hears_each_audio_with_its_own_adapter(self, whisper: Media) -> None:
        rows = [(name, number) for number in range(3) for name in NAMES]
        assert whisper.differing(rows) == []
        # The adapters show: no two of them make the same of an audio.
        assert len({tuple(whisper.wanted[row][0]) for row in rows if row[1] == 0}) == len(NAMES)
        # In another order, so that steps join other requests; and alone.
        assert whisper.differing(rows[::-2]) == []
        for row in rows[:3]:
            assert whisper.differing([row]) == []

    def test_an_encoder_called_by_nobody_it_knows_fails_with_the_layers_name(self, whisper: Media) -> None:
        from xpu_lora_compile.errors import BatchError

        assert whisper.differing([("adapter_0", 0)]) == []
        with torch.inference_mode(), pytest.raises(BatchError, match=r"model\.encoder\.layers\.0\.self_attn\.qkv_proj"):
            whisper.runner.model.embed_multimodal(input_features=torch.zeros(1, 80, 3000))
        # Frames that were mapped for a request are not another number of frames.
        layer = whisper.runner.model.model.decoder.layers[0].encoder_attn.kv_proj
        with torch.inference_mode(), pytest.raises(BatchError, match=r"encoder_attn\.kv_proj: .* got 7 rows"):
            layer(torch.zeros(7, 64))
        assert whisper.differing([("adapter_1", 1), (None, 1)]) == []

    @pytest.mark.parametrize("kind", WRONG)
    def test_a_wrong_adapter_is_refused_as_it_is_loaded(
        self, whisper: Media, whisper_folder: tuple[Path, Any], tmp_path: Path, kind: str
    ) -> None:
        from vllm.lora.request import LoRARequest

        from xpu_lora_compile.errors import AdapterError

        part, how, said = WRONG[kind]
        folder = change(whisper_folder[0] / "adapter_0", tmp_path / "wrong", part, how)
        before = whisper.llm.llm_engine.list_loras()
        with pytest.raises(AdapterError, match=said) as refused:
            whisper.llm.llm_engine.add_lora(LoRARequest("wrong", 77, str(folder)))
        assert "wrong" in str(refused.value)
        assert whisper.llm.llm_engine.list_loras() == before

    def test_others_are_served_after_a_refusal(self, whisper: Media) -> None:
        assert whisper.differing([(name, 1) for name in NAMES]) == []


@pytest.fixture(scope="module")
def granite_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("granite")
    return folder, speech.granite_speech(folder)


def test_granite_speech_answers_each_audio_with_its_own_adapter(granite_folder: tuple[Path, Any]) -> None:
    folder, peft = granite_folder

    def prompt(number: int, ask: str) -> Any:
        chat = [{"role": "user", "content": speech.GRANITE_ASKS[ask]}]
        tokenizer = granite.llm.get_tokenizer()
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return {
            "prompt_token_ids": tokenizer.encode(text),
            "multi_modal_data": {"audio": (speech.audio(number), speech.RATE)},
        }

    def wanted(name: str | None, number: int, ask: str) -> tuple[list[int], Tensor]:
        return speech.granite_rows(peft, folder, name, speech.audio(number), ask)

    with engine(folder, prompt, wanted, max_lora_rank=64, max_model_len=256) as granite:
        assert granite.runner.model.language_model.lm_head.weight.shape[0] == 1024 != speech.GRANITE_VOCABULARY
        rows = [(name, number, ask) for number in range(2) for ask in speech.GRANITE_ASKS for name in NAMES]
        assert granite.differing(rows) == []
        for row in rows[:3]:
            assert granite.differing([row]) == []


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("blip2")
    return folder, speech.blip2(folder)


@pytest.mark.parametrize("mapped", [True, False], ids=["tower_connector_lora", "no get_mm_mapping"])
def test_an_image_encoder_sees_each_image_with_its_own_adapter(
    blip2_folder: tuple[Path, Any], mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not mapped:
        # As ernie45_vl and keye_vl1_5 are; neither is part of transformers, and so of what PEFT can be asked for.
        from vllm.model_executor.models.blip2 import Blip2ForConditionalGeneration

        monkeypatch.delattr(Blip2ForConditionalGeneration, "get_mm_mapping")
    folder, peft = blip2_folder

    def prompt(number: int) -> Any:
        return {"prompt_token_ids": speech.BLIP2_PROMPT, "multi_modal_data": {"image": speech.picture(number)}}

    def wanted(name: str | None, number: int) -> tuple[list[int], Tensor]:
        return speech.blip2_rows(peft, folder, name, number)

    with engine(folder, prompt, wanted, enable_tower_connector_lora=mapped) as blip2:
        # The same images for each adapter, some of which are in the cache of what the encoder returned.
        rows = [(name, number) for number in range(3) for name in NAMES]
        assert blip2.differing(rows) == []
        for row in [(name, 0) for name in NAMES] + [("adapter_1", 4), (None, 4), ("adapter_0", 4)]:
            assert blip2.differing([row]) == []


TORCHVISION = Path(sys.prefix, "torchvision")


@pytest.mark.skipif(
    not TORCHVISION.is_dir(), reason=f"pip install --no-deps --target {TORCHVISION} torchvision==0.28.0"
)
def test_qwen2_vl_sees_each_image_with_its_own_adapter(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, qwen2_vl.__file__, str(TORCHVISION), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / qwen2_vl.FOUND).read_text())
    assert found["rows"] == 12
    assert not any(found["wrong"])
    # Each adapter shows, and the base model.
    assert found["answers"] == len(NAMES)


def test_an_encoder_decoder_that_is_not_known_is_refused_with_the_layers_name() -> None:
    from vllm.v1.attention.backend import AttentionType

    from xpu_lora_compile.errors import AttachError
    from xpu_lora_compile.integrations.vllm import register

    register()
    from xpu_lora_compile.integrations.vllm_encoders import _cross_attention

    class OtherAttention(torch.nn.Module):
        attn_type = AttentionType.ENCODER_DECODER

    model = torch.nn.Module()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(AttachError, match="wanted an encoder-decoder with the cross attention of Whisper; got none"):
        _cross_attention(SimpleNamespace(model=model))
    model.decoder = torch.nn.ModuleDict({"cross": OtherAttention()})
    with pytest.raises(AttachError, match=r"^decoder\.cross: .* got OtherAttention in Module"):
        _cross_attention(SimpleNamespace(model=model))


def test_what_runs_encoders_unseen_is_refused_where_they_have_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.config

    from xpu_lora_compile.errors import AttachError
    from xpu_lora_compile.integrations.vllm import register

    register()
    from xpu_lora_compile.integrations import vllm_encoders

    class Whisper(torch.nn.Module):
        config = SimpleNamespace(is_encoder_decoder=False)

        def embed_multimodal(self) -> None:
            """What makes it a model with an encoder."""

    graphs = SimpleNamespace(cudagraph_mm_encoder=False)
    config = SimpleNamespace(use_v2_model_runner=False, compilation_config=graphs)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: config)
    monkeypatch.setattr(vllm_encoders, "_say_what_was_taken_over", lambda _: None)
    manager = SimpleNamespace(model=Whisper(), modules={}, punica_wrapper_mapping={}, supports_mm=False)
    find_encoders = vllm_encoders._finding_encoders(lambda _: None)
    find_encoders(manager)
    assert manager.encoders
    graphs.cudagraph_mm_encoder = True
    with pytest.raises(AttachError, match=r"Whisper: .* got cudagraph_mm_encoder. Leave it out"):
        find_encoders(manager)
    config.use_v2_model_runner = True
    with pytest.raises(AttachError, match=r"Whisper: .* got Model Runner V2. Set VLLM_USE_V2_MODEL_RUNNER=0"):
        find_encoders(manager)


@contextmanager
def server(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """The OpenAI server with two adapters; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--enforce-eager"),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base", "--dtype", "float32"),
        *("--enable-lora", "--max-loras", "2", "--generation-config", "vllm", "--gpu-memory-utilization", "0.2"),
        *("--lora-modules", *(f"{name}={folder / name}" for name in NAMES if name), "--skip-mm-profiling", *options),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    # A session of its own: vLLM's processes end with it, also where one that is starting does not listen.
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)  # noqa: S603
    address, patience = f"http://127.0.0.1:{port}", time.monotonic() + 400
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < patience, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)  # noqa: S310
                break
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def sound_file(number: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(speech.RATE)
        sound.writeframes((speech.audio(number) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def as_sent(number: int) -> np.ndarray:
    """The audio as the file holds it, in 16 bits."""
    return ((speech.audio(number) * 32767).astype("<i2") / 32768).astype(np.float32)


def ask(address: str, path: str, model: str, number: int, **fields: str) -> str:
    """The text that the server answers an audio with."""
    boundary = "a-line-between"
    fields = {"model": model, "max_completion_tokens": str(speech.NEW_TOKENS), "temperature": "0"} | fields
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in fields.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    body = "".join(parts).encode() + head.encode() + sound_file(number) + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{address}/v1/audio/{path}", body, kind)  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        # What the server leaves out is the last letter, where it is not complete.
        return str(json.load(answer)["text"]).rstrip("\ufffd")


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.rstrip("\ufffd")


def ask_all(address: str, path: str, rows: list[Row], **fields: str) -> list[str]:
    with ThreadPoolExecutor(4) as clients:
        return list(clients.map(lambda row: ask(address, path, row[0] or "base", row[1], **fields), rows))


ROWS = [(name, number) for number in range(2) for name in NAMES]


def test_the_server_transcribes_with_whisper(whisper_folder: tuple[Path, Any], tmp_path: Path) -> None:
    folder, peft = whisper_folder
    tokenizer = speech.whisper_tokenizer()
    wanted = [speech.whisper_rows(peft, name, as_sent(number))[0] for name, number in ROWS]
    with server(folder, tmp_path / "log", "--max-lora-rank", "8") as address:
        texts = ask_all(address, "transcriptions", ROWS, language="en")
        assert texts == [text_of(tokenizer, row) for row in wanted]
        wrong = change(folder / "adapter_0", tmp_path / "wrong", *NAN)
        body = json.dumps({"lora_name": "wrong", "lora_path": str(wrong)}).encode()
        request = urllib.request.Request(  # noqa: S310
            f"{address}/v1/load_lora_adapter", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)  # noqa: S310
        assert "fc1: wanted finite weights" in refused.value.read().decode()
        assert ask_all(address, "transcriptions", ROWS, language="en") == texts


def test_the_server_transcribes_and_translates_with_granite_speech(
    granite_folder: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, peft = granite_folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = ("--max-lora-rank", "64", "--max-model-len", "256")
    with server(folder, tmp_path / "log", *options) as address:
        for path, fields in {"transcriptions": {}, "translations": {"to_language": "en"}}.items():
            wanted = [speech.granite_rows(peft, folder, name, as_sent(number), path)[0] for name, number in ROWS]
            texts = ask_all(address, path, ROWS, **fields)
            assert texts == [text_of(tokenizer, row) for row in wanted]
