"""A step of a model with mixed adapters: compiled in Python, and as a `.pt2` in Python and in C++. On a CUDA device.

Of SmolLM2's widths, with random weights, without a cache. Prints microseconds of the host a step, with the wait for the
device, and how many rows of the answers of C++ are not those of Python, to the bit.

    python benchmarks/pt2.py --rows 32 --tokens 1 --layers 8
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.bench.model import SMOLLM2, TARGETS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import serve_pt2

SLOTS, RANK, STEPS = 8, 16, 50


class Setting:
    """The model, its adapters, the file and the program."""

    def __init__(self, folder: Path, rows: int, tokens: int, layers: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        with torch.device("cuda"):
            made: Any = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers}))
        self.model = made.to(torch.bfloat16).eval().requires_grad_(False)
        self.bank = xlc.attach(self.model, slots=SLOTS, max_rank=RANK, target_modules=TARGETS)
        self.given = {"use_cache": False, "logits_to_keep": 1}
        self.inputs = torch.randint(0, SMOLLM2["vocab_size"], (rows, tokens), device="cuda")
        self.adapters = {f"adapter-{number}": folder / str(number) for number in range(SLOTS)}
        for adapter in self.adapters.values():
            adapter.mkdir()
            write_adapter(adapter, self.bank.sites, RANK, torch.bfloat16)
        names = [*self.adapters, None]
        self.rows = [names[row % len(names)] for row in range(rows)]
        start = time.perf_counter()
        self.file = xlc.export(self.model, folder / "served.pt2", kwargs={"input_ids": self.inputs, **self.given})
        print(f"export: {time.perf_counter() - start:.0f} s, {self.file.stat().st_size / 1e6:.0f} MB", flush=True)
        self.program = serve_pt2.make_program(folder / "serve_pt2")

    def measure(self) -> None:
        """Print the table."""
        start = time.perf_counter()
        served = xlc.load_artifact(self.file)
        print(f"load_artifact: {time.perf_counter() - start:.1f} s", flush=True)
        for name, adapter in self.adapters.items():
            self.bank.load(name, adapter)
            served.load(name, adapter)
        compiled = {launch: self._compiled(launch) for launch in ("op", "inductor")}
        logits = self._with_adapters(compiled["inductor"])()
        answer = served(self.inputs, adapters=self.rows)["logits"]
        same = sum(torch.equal(*pair) for pair in zip(answer, logits, strict=True))
        print(f"served in Python: {same} of {len(self.rows)} rows are the compiled model's, to the bit", flush=True)
        contenders: dict[str, Callable[[], object]] = {
            "base model, compiled": lambda: compiled["op"](input_ids=self.inputs, **self.given),
            "compiled, an op launches": self._with_adapters(compiled["op"]),
            "compiled, Inductor launches": self._with_adapters(compiled["inductor"]),
            ".pt2 in Python": lambda: served(self.inputs, adapters=self.rows),
        }
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        with torch.no_grad():
            for number in range(STEPS + 5):
                for name, contender in contenders.items():
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    contender()
                    torch.cuda.synchronize()
                    if number >= 5:
                        taken[name].append(time.perf_counter() - start)
        for name, times in taken.items():
            print(f"{name:30} {statistics.median(times) * 1e6:9.0f} us", flush=True)
        plan: list[dict[str, Any]] = [{"load": [name, str(path)]} for name, path in self.adapters.items()]
        plan += [{"rows": self.rows} for _ in range(STEPS + 5)]
        tensors = {f"{number}.input_ids": self.inputs for number in range(STEPS + 5)}
        tensors |= {f"{number}.logits": answer.contiguous() for number in (0, STEPS)}
        status, said = serve_pt2.run_program(self.program, self.file, plan, tensors)
        print(f"C++: exit {status}: {said}", flush=True)

    def _compiled(self, launch: str) -> Any:
        torch._dynamo.reset()
        return torch.compile(self.model, backend="xpu_lora", dynamic=False, options={"xpu_lora.launch": launch})

    def _with_adapters(self, compiled: Any) -> Callable[[], Tensor]:
        def step() -> Tensor:
            with torch.no_grad(), self.bank.use(self.rows):
                logits: Tensor = compiled(input_ids=self.inputs, **self.given).logits
                return logits

        return step


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options}")
    with tempfile.TemporaryDirectory() as folder:
        Setting(Path(folder), options.rows, options.tokens, options.layers).measure()


if __name__ == "__main__":
    main()
