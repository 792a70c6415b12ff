"""A model that PEFT has loaded, with another adapter for each row: PEFT's eager batch against ours on the same weights.

    python benchmarks/live_peft.py                                     # SmolLM2-135M's shape on the CPU, two threads
    python benchmarks/live_peft.py --device cuda --dtype bfloat16 --size 8b --layers 8

Calls of the model with `adapter_names=`, of a prompt and of one token for each row; numbers are compared with PEFT's
before anything is timed. On CUDA the compiled contender is captured, too.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import xpu_lora_compile as xlc
from xpu_lora_compile.bench.measure import check_error, machine, measure
from xpu_lora_compile.bench.model import SMOLLM2, TARGETS

# As Llama 3.1 8B.
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SIZES = {"smollm2": SMOLLM2, "8b": LLAMA_8B}
PEFT, EAGER, COMPILED = "PEFT, eager", "ours, eager", "ours, compiled"


def main() -> None:
    """Print medians, and how many times as fast as PEFT ours is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--size", default="smollm2", choices=SIZES)
    parser.add_argument("--layers", type=int, help="of the model, for a shorter one")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16], help="of each row")
    parser.add_argument("--seconds", type=float, default=10, help="the share of each contender")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(2)
    dtype = getattr(torch, options.dtype)
    peft = peft_model(SIZES[options.size], options.layers, options.adapters, options.rank, dtype, options.device)
    ours = copy.deepcopy(peft)
    bank = xlc.attach(ours)
    mode = "reduce-overhead" if options.device == "cuda" else "default"
    compiled: Any = torch.compile(ours, backend="xpu_lora", mode=mode)
    print(machine(options.device))
    print(f"{options.size}, {options.dtype}, adapters in {dtype_of(peft)}: {bank}")
    voices = ["__base__", *peft.peft_config]
    names = [voices[row % len(voices)] for row in range(options.batch)]
    for tokens in options.tokens:
        inputs = torch.randint(0, 1000, (options.batch, tokens), device=options.device)
        contenders = {PEFT: peft, EAGER: ours, COMPILED: compiled}
        calls = {name: call_of(model, inputs, names) for name, model in contenders.items()}
        check(calls, options.dtype)
        timings = measure(calls, options.device, options.seconds)
        print(f"\n{options.batch} rows of {tokens} tokens, {options.adapters} adapters of rank {options.rank}")
        for name, timing in timings.items():
            ratio = timings[PEFT].median / timing.median
            print(f"{name:16} {timing.median / 1000:9.2f} ms  ±{timing.spread:4.0%}  {ratio:5.2f} times PEFT's speed")
    print(f"\nlooking at PEFT's state: {cost_of_a_look(ours, names) * 1e3:.2f} ms a call")


def peft_model(
    sizes: dict[str, Any], layers: int | None, adapters: int, rank: int, dtype: torch.dtype, device: str
) -> Any:
    """A model with random weights, and random adapters, as PEFT holds them: in float32."""
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**(sizes | ({"num_hidden_layers": layers} if layers else {})))
        base = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
        peft: Any = get_peft_model(base, lora, adapter_name="adapter_0")
        for number in range(1, adapters):
            peft.add_adapter(f"adapter_{number}", lora)
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]) / (2 if "lora_B" in name else 1))
    return peft.requires_grad_(False).eval()


def dtype_of(peft: Any) -> torch.dtype:
    """The dtype of the adapters' weights."""
    return next(value.dtype for name, value in peft.named_parameters() if "lora_" in name)


def call_of(model: Any, inputs: Tensor, names: list[str]) -> Callable[[int], Tensor]:
    """A call whose rows are told other adapters each time."""

    def call(number: int) -> Tensor:
        turn = number % len(names)
        with torch.no_grad():
            result: Tensor = model(input_ids=inputs, adapter_names=names[turn:] + names[:turn], use_cache=False).logits
            return result

    return call


def check(calls: dict[str, Callable[[int], Tensor]], dtype: str) -> None:
    """Compare two calls of each contender with PEFT's."""
    for number in (0, 3):
        wanted = calls[PEFT](number).float()
        for name, call in calls.items():
            error = float((call(number).float() - wanted).abs().max() / wanted.abs().max())
            check_error(f"live PEFT: {name}", error, 1e-4 if dtype == "float32" else 5e-2)


def cost_of_a_look(model: Any, names: list[str]) -> float:
    """Seconds that a call of the model takes before and after the model runs."""
    inputs = {"input_ids": torch.zeros(len(names), 1, dtype=torch.long), "adapter_names": names}

    def look(_: int) -> None:
        opened: list[Any] = []
        with torch.no_grad():
            model.lora_live.open(opened, (), inputs)
            model.lora_live.close(opened)

    return statistics.median([measure({"look": look}, "cpu", 0.3)["look"].median / 1e6 for _ in range(3)])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
