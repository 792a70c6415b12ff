"""vLLM's server while its adapters change: every answer is compared with what PEFT decodes with that adapter alone.

    python benchmarks/vllm_soak.py --seconds 600
    python benchmarks/vllm_soak.py --seconds 60 --names 20 -- --tensor-parallel-size 2 --fully-sharded-loras

Clients ask under random names of adapters for tokens, their log-probabilities and those of the prompt; some leave
before the answer. Meanwhile an operator loads adapters, loads others in place of them, from another folder or from the
same one with other files in it, unloads them, and tries to load broken ones. The model is random and tiny, in float32.
An answer is right if it is whole that of one adapter which its name had between question and answer. Options after --
go to vLLM. In an environment that has vLLM and the plugin: see the tox leg `vllm`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1] / "tests"
VOCABULARY = 515
NEW_TOKENS = 12
# A log-probability that differs by more is wrong. Those of two adapters differ by more: see `Reference`.
TOLERANCE = 2e-4
BASE = "base"


def main(arguments: list[str] | None = None) -> int:
    """Run the server and its clients; returns 1 where an answer is wrong or the server has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--names", type=int, default=200, help="of adapters that are loaded at the start")
    parser.add_argument("--adapters", type=int, default=24, help="different ones, to which the names belong")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder of a Llama; a tiny random one without it")
    parser.add_argument("--log", type=Path, help="a file for what the server says; it is not kept without it")
    parser.add_argument("--still", action="store_true", help="without an operator: no adapter changes")
    parser.add_argument("options", nargs="*", help="of vLLM, after --")
    chosen = parser.parse_args(arguments)
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "examples")]
    # Settings of the environment, for the server's processes as well.
    from integrations import conftest  # noqa: F401

    # The server's processes need the cores. Threads that wait for each other are slow where others run.
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="vllm-soak-"))
    try:
        reference = Reference(folder, chosen.model or tiny_llama(folder / "model"), chosen.adapters, chosen.seed)
        with server(reference.model, chosen.log or folder / "server.log", chosen.options) as address:
            soak = Soak(reference, address, folder, chosen)
            soak.run()
        print(soak.summary())
        return int(bool(soak.wrong or soak.failed) or not soak.counts["answers"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tiny_llama(folder: Path) -> Path:
    """Save a random Llama of two layers, with a tokenizer whose words are t0, t1 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    # Some tokens are far more probable than others.
    sizes |= {"vocab_size": VOCABULARY, "initializer_range": 0.2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", bos_token="t1").save_pretrained(folder)  # noqa: S106
    return folder


@dataclass
class Row:
    """What PEFT decodes greedily, with the log-probabilities of each token and of the prompt's tokens but the first.

    `sure` is the number of tokens up to the first that is nearly as probable as another.
    """

    tokens: list[int]
    values: list[float]
    prompt: list[float]
    sure: int


class Reference:
    """A model, random adapters in folders, prompts, and PEFT's row of each adapter, or None, for each prompt."""

    def __init__(self, folder: Path, model: Path, adapters: int, seed: int) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from xpu_lora_compile.bench.layer import peft_adapters

        self.model = model
        torch.manual_seed(seed)
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        # All linear layers, those of attention alone, and all that can have LoRA.
        for kind, targets in enumerate([[*linears, "embed_tokens", "lm_head"], linears[:4], linears]):
            peft_adapters(plain, folder / f"kind_{kind}", targets, 2 ** (kind + 1), -(-(adapters - kind) // 3))
        self.adapters = sorted(config.parent for config in folder.glob("kind_*/*/adapter_config.json"))
        choose = random.Random(seed)  # noqa: S311
        stem = [choose.randrange(3, VOCABULARY) for _ in range(64)]
        # Some begin alike, so that a cached prefix can be used. Some are longer than a step takes.
        lengths = (3, 3, 40, 40, 70, 70, 90, 90)
        self.prompts = [
            [*stem[: length - 2], choose.randrange(3, VOCABULARY), choose.randrange(3, VOCABULARY)][:length]
            if length < 66
            else [*stem, *(choose.randrange(3, VOCABULARY) for _ in range(length - 64))]
            for length in lengths
        ]
        peft: Any = PeftModel.from_pretrained(plain, self.adapters[0], adapter_name="0").eval()
        for number, adapter in enumerate(self.adapters[1:], start=1):
            peft.load_adapter(adapter, adapter_name=str(number))
        self.rows: dict[tuple[Path | None, int], Row] = {}
        with peft.disable_adapter():
            self._decode(peft, None)
        for number, adapter in enumerate(self.adapters):
            peft.set_adapter(str(number))
            self._decode(peft, adapter)
        # Every adapter shows, and none is another.
        for prompt in range(len(self.prompts)):
            values = [row.values[0] for (_, number), row in self.rows.items() if number == prompt]
            if len({round(value / TOLERANCE) for value in values}) < len(values):
                raise SystemExit(f"vllm_soak: two adapters are the same to prompt {prompt}; take another --seed.")

    @torch.inference_mode()
    def _decode(self, model: Any, adapter: Path | None) -> None:
        for length in {len(prompt) for prompt in self.prompts}:
            numbers = [number for number, prompt in enumerate(self.prompts) if len(prompt) == length]
            ids = torch.tensor([self.prompts[number] for number in numbers])
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            logits = model(ids).logits.log_softmax(-1)[:, :-1]
            values = logits.gather(-1, ids[:, 1:, None])[..., 0]
            first, second = logits[:, length - 1 :].topk(2).values.unbind(-1)
            for place, number in enumerate(numbers):
                ties = (first - second < TOLERANCE)[place].nonzero()
                self.rows[adapter, number] = Row(
                    tokens=ids[place, length:].tolist(),
                    values=values[place, length - 1 :].tolist(),
                    prompt=values[place, : length - 1].tolist(),
                    sure=int(ties[0]) if len(ties) else NEW_TOKENS,
                )

    def is_row(self, adapter: Path | None, prompt: int, answer: Row) -> bool:
        """Whether an answer, whose prompt's values may be missing, is this adapter's."""
        row = self.rows[adapter, prompt]
        # A token of a tie may be the other, which is as probable; what follows it is not compared.
        tokens, values = answer.tokens[: row.sure], answer.values[: row.sure + 1]
        pairs = [*zip(values, row.values, strict=False), *zip(answer.prompt, row.prompt, strict=False)]
        return tokens == row.tokens[: len(tokens)] and all(abs(a - b) < TOLERANCE for a, b in pairs)


@contextmanager
def server(model: Path, log: Path, options: list[str]) -> Iterator[str]:
    """The OpenAI server of vLLM; host and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slots = {"--max-loras": "2", "--max-cpu-loras": "3", "--max-lora-rank": "8"}
    sizes = {"--max-model-len": "128", "--max-num-batched-tokens": "64", "--max-num-seqs": "8", "--block-size": "32"}
    defaults = {"--dtype": "float32", **slots, **sizes}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--enable-lora"),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", BASE),
        *(word for name, value in defaults.items() if name not in options for word in (name, value)),
        *options,
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:  # noqa: S603
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise SystemExit(log.read_text()[-5000:])
                try:
                    if Connection(f"127.0.0.1:{port}").get("/health") == 200:
                        break
                except OSError:
                    time.sleep(0.5)
            yield f"127.0.0.1:{port}"
            if process.poll() is not None:
                print(log.read_text()[-5000:], file=sys.stderr)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


class Connection:
    """A client's connection to the server."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(address, timeout=120)

    def get(self, path: str) -> int:
        """The status."""
        self.connection.request("GET", path)
        answer = self.connection.getresponse()
        answer.read()
        return answer.status

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The status and the body that came back."""
        self.send(path, body)
        answer = self.connection.getresponse()
        text = answer.read().decode()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json and text else text

    def send(self, path: str, body: dict[str, Any]) -> None:
        """Ask and do not wait."""
        self.connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})


@dataclass
class Span:
    """While a name has an adapter, None for no adapter at all, in seconds; both ends as wide as they may have been."""

    adapter: Path | None
    since: float
    until: float = float("inf")


@dataclass
class Name:
    """A name of an adapter: the folder of its last load, what it stood for when, and when its files last changed.

    From then on until another load is done its requests may be refused.
    """

    path: Path
    spans: list[Span] = field(default_factory=list)
    changed: float = float("-inf")
    loaded: float = 0

    def may_be_refused(self, since: float) -> bool:
        """Whether a request that began at this time, and is over, may have met files that had changed."""
        return self.changed > min(self.loaded, since) or self.loaded > since > self.changed > float("-inf")

    def adapters(self, since: float, until: float) -> list[Path | None]:
        """What it may have stood for at some time between."""
        return [span.adapter for span in list(self.spans) if span.since <= until and span.until >= since]

    def is_loaded(self) -> bool:
        """Whether it stands for an adapter now."""
        return bool(self.spans) and self.spans[-1].adapter is not None


class Soak:
    """Clients and an operator, and what came of it."""

    def __init__(self, reference: Reference, address: str, folder: Path, chosen: argparse.Namespace) -> None:
        self.reference, self.address, self.folder, self.chosen = reference, address, folder, chosen
        self.choose = random.Random(chosen.seed)  # noqa: S311
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.longest = 0.0
        self.names: dict[str, Name] = {}
        self.lock = threading.Lock()
        self.over = threading.Event()

    def run(self) -> None:
        """Load the first adapters, and go on for as long as was asked for."""
        operator = Connection(self.address)
        for number in range(self.chosen.names):
            self._load(operator, f"name_{number}", self.choose.choice(self.reference.adapters))
        self.counts.clear()
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(self.chosen.clients)]
        threads += [] if self.chosen.still else [threading.Thread(target=self._operator)]
        for thread in threads:
            thread.start()
        self.over.wait(self.chosen.seconds)
        self.over.set()
        for thread in threads:
            thread.join()

    def summary(self) -> str:
        """Of the run, in a few lines."""
        counts = dict(sorted(self.counts.items()))
        lines = [f"{name}: {number}" for name, number in counts.items()]
        lines += [f"longest wait: {self.longest:.1f} s", f"wrong: {len(self.wrong)}", *self.wrong[:5]]
        return "\n".join([*lines, f"failed: {len(self.failed)}", *self.failed[:5]])

    def _client(self, number: int) -> None:
        choose = random.Random(f"{self.chosen.seed} {number}")  # noqa: S311
        connection = Connection(self.address)
        try:
            while not self.over.is_set():
                connection = self._ask(connection, choose)
        except (OSError, http.client.HTTPException) as error:
            self.failed.append(f"{type(error).__name__}: {error}")
            self.over.set()

    def _ask(self, connection: Connection, choose: random.Random) -> Connection:
        # Some names are asked for more often than others.
        names = [BASE, *self.names]
        name = choose.choice(names if choose.random() < 0.6 else names[:8])
        prompt = choose.randrange(len(self.reference.prompts))
        body = {"model": name, "prompt": self.reference.prompts[prompt], "max_tokens": choose.randint(1, NEW_TOKENS)}
        body |= {"temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
        if choose.random() < 0.2:
            body["prompt_logprobs"] = 1
        self._count("requests")
        since = time.monotonic()
        if choose.random() < 0.05:
            connection.send("/v1/completions", body)
            time.sleep(choose.random() * 0.05)
            connection.connection.close()
            self._count("left before the answer")
            return Connection(self.address)
        status, answer = connection.post("/v1/completions", body)
        until = time.monotonic()
        with self.lock:
            self.longest = max(self.longest, until - since)
        adapters = [None] if name == BASE else self.names[name].adapters(since, until)
        if status == 404 and name != BASE and None in adapters:
            self._count("refused, as the name was not loaded")
        elif status == 500 and name != BASE and self.names[name].may_be_refused(since):
            self._count("refused, as the files had changed")
        elif status != 200:
            self.failed.append(f"{name}: {status} {str(answer)[:300]}")
        else:
            self._count("answers")
            self._compare(name, adapters, prompt, answer["choices"][0], body)
        return connection

    def _compare(self, name: str, adapters: list[Path | None], prompt: int, choice: Any, body: Any) -> None:
        asked = self.reference.prompts[prompt]
        of_prompt = []
        if "prompt_logprobs" in body:
            pairs = zip(choice["prompt_logprobs"][1:], asked[1:], strict=True)
            of_prompt = [values[str(token)]["logprob"] for values, token in pairs]
            self._count("answers with the prompt's log-probabilities")
        row = Row(choice["token_ids"], choice["logprobs"]["token_logprobs"], of_prompt, 0)
        allowed = adapters if name == BASE else [adapter for adapter in adapters if adapter]
        if len(row.tokens) == body["max_tokens"] == len(row.values) and any(
            self.reference.is_row(adapter, prompt, row) for adapter in allowed
        ):
            return
        got = [adapter for adapter in (None, *self.reference.adapters) if self.reference.is_row(adapter, prompt, row)]
        self.wrong.append(
            f"{name}, prompt {prompt}, {len(row.tokens)} of {body['max_tokens']} tokens: wanted that of one of "
            f"{list(map(str, allowed))}, got that of {list(map(str, got)) or 'no adapter alone'}"
        )

    def _operator(self) -> None:
        choose = random.Random(f"{self.chosen.seed} operator")  # noqa: S311
        connection = Connection(self.address)
        try:
            while not self.over.wait(choose.random() * 0.3):
                name = choose.choice(list(self.names)[: 8 if choose.random() < 0.5 else None])
                adapter = choose.choice(self.reference.adapters)
                action = choose.choice(["in place", "same path", "unload", "broken"])
                if not self.names[name].is_loaded():
                    self._load(connection, name, adapter)
                elif action == "in place":
                    self._load(connection, name, adapter, in_place=True)
                elif action == "same path":
                    self._rewrite(connection, name, adapter)
                elif action == "broken":
                    self._load_broken(connection, name)
                else:
                    self._unload(connection, name)
        except (OSError, http.client.HTTPException) as error:
            self.failed.append(f"operator, {type(error).__name__}: {error}")
            self.over.set()

    def _load(
        self, connection: Connection, name: str, adapter: Path, path: Path | None = None, in_place: bool = False
    ) -> None:
        known = self.names.setdefault(name, Name(adapter))
        since = time.monotonic()
        span = Span(adapter, since)
        before = known.spans[-1] if known.spans else None
        known.path = path or adapter
        known.spans.append(span)
        body = {"lora_name": name, "lora_path": str(known.path), "load_inplace": in_place}
        status, answer = connection.post("/v1/load_lora_adapter", body)
        if status != 200:
            self.failed.append(f"load of {name}: {status} {str(answer)[:300]}")
        known.loaded = time.monotonic()
        if before:
            before.until = known.loaded
        self._count("loads in place" if in_place else "loads")

    def _rewrite(self, connection: Connection, name: str, adapter: Path) -> None:
        """Load another adapter from the folder that the name has now, whose files it has replaced."""
        path = self.folder / "rewritten" / name
        if self.names[name].path == path:
            self._remove(name)
        shutil.copytree(adapter, path, dirs_exist_ok=True)
        self._load(connection, name, adapter, path, in_place=True)
        self._count("of them from the same folder")

    def _remove(self, name: str) -> None:
        """Remove the folder of a name, as its files are to change."""
        shutil.rmtree(self.names[name].path)
        self.names[name].changed = time.monotonic()

    def _load_broken(self, connection: Connection, name: str) -> None:
        """Try to load in place what cannot be loaded: the name goes on with what it had."""
        path = self.folder / "broken"
        if not path.exists():
            from safetensors.torch import load_file, save_file

            shutil.copytree(self.reference.adapters[0], path)
            weights = load_file(path / "adapter_model.safetensors")
            next(weight for name, weight in weights.items() if "lora_B" in name).fill_(float("nan"))
            save_file(weights, path / "adapter_model.safetensors")
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": True}
        status, answer = connection.post("/v1/load_lora_adapter", body)
        if status == 200 or "finite" not in str(answer):
            self.failed.append(f"a broken adapter: {status} {str(answer)[:300]}")
        self._count("broken adapters refused")

    def _unload(self, connection: Connection, name: str) -> None:
        known = self.names[name]
        known.spans.append(Span(None, time.monotonic()))
        status, answer = connection.post("/v1/unload_lora_adapter", {"lora_name": name})
        if status != 200:
            self.failed.append(f"unload of {name}: {status} {str(answer)[:300]}")
        known.spans[-2].until = time.monotonic()
        if known.path not in self.reference.adapters:
            self._remove(name)
        self._count("unloads")

    def _count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


if __name__ == "__main__":
    sys.exit(main())
