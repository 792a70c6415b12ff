"""`xpu-lora bench layer`: one linear layer with LoRA, base product included, against PEFT's layer and plain forms."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.bench import forms
from xpu_lora_compile.bench.measure import Timing, check_error, machine, measure
from xpu_lora_compile.errors import BenchError
from xpu_lora_compile.inspect.operands import RandomOperands


@dataclass(frozen=True)
class LayerResult:
    """What was measured of one layer at one number of rows."""

    rows: int
    timings: dict[str, Timing]


class _Plain(nn.Module):
    """A Linear with the gather form of LoRA written straight into it."""

    a: Tensor
    b: Tensor
    indices: Tensor

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.base = base
        for name, tensor in (("a", a), ("b", b), ("indices", indices)):
            self.register_buffer(name, tensor)

    def forward(self, inputs: Tensor) -> Tensor:
        """The base layer's output with LoRA."""
        output: Tensor = self.base(inputs)
        forms.gather(output, inputs, [self.a], [self.b], self.indices, [0])
        return output


BASE = "base alone, compiled"


@dataclass(frozen=True)
class LayerRun:
    """All that one run measured, and where."""

    machine: str
    what: str
    results: list[LayerResult]


def run(
    dtype: str,
    rows: list[int],
    features: int,
    width: int,
    rank: int,
    slots: int,
    seconds: float,
    on_done: Callable[[str], None],
) -> LayerRun:
    """Time the layer at each T.

    Raises:
        BenchError: PEFT's layer, or the plain one, and ours disagree; or PEFT is not installed.
    """
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(features, width, bias=False)).to(getattr(torch, dtype)).requires_grad_(False)
    served = nn.Sequential(nn.Linear(features, width, bias=False)).to(getattr(torch, dtype)).requires_grad_(False)
    served.load_state_dict(base.state_dict())
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        names, peft = peft_adapters(served, Path(folder), ["0"], rank, slots)
        bank = xlc.attach(served, slots=slots, max_rank=rank)
        for name in names:
            bank.load(name, Path(folder) / name)
        ours, without = torch.compile(served, backend="xpu_lora"), torch.compile(base)
        layer: Any = served[0]
        draw = RandomOperands(0)
        for count in rows:
            inputs, indices = draw.normal(count, features, dtype=layer.weight.dtype), draw.indices(count, slots)
            chosen = [names[slot] if slot >= 0 else None for slot in indices.tolist()]
            stacked_b = layer.lora_b.contiguous()
            plain = torch.compile(_Plain(base[0], layer.lora_a, stacked_b, indices), fullgraph=True)
            with bank.use(chosen):
                contenders: dict[str, Callable[[int], Any]] = {
                    BASE: _calls(without, inputs),
                    "ours, compiled": _calls(ours, inputs),
                    "ours, eager": _calls(served, inputs),
                    "gather, Inductor": _calls(plain, inputs),
                    "PEFT": _calls(peft, inputs, adapter_names=[name or "__base__" for name in chosen]),
                }
                _check({name: call for name, call in contenders.items() if name != BASE}, dtype)
                results.append(LayerResult(count, measure(contenders, "cpu", seconds)))
                on_done(f"T{count}")
    torch.compiler.reset()
    return LayerRun(machine("cpu"), f"{dtype} {features}x{width} R{rank} K{slots}", results)


def peft_adapters(
    model: nn.Module, folder: Path, targets: list[str] | str, rank: int, slots: int
) -> tuple[list[str], Any]:
    """PEFT's own model over a copy of this one, with random adapters, which are saved one to a folder, too."""
    try:
        from peft import LoraConfig, PeftModel
    except ImportError as error:
        raise BenchError("bench", "peft, to be compared with", "none", "pip install peft.") from error
    names = [f"adapter_{number}" for number in range(slots)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    peft: Any = PeftModel(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    # Of a size that shows in the result without drowning it.
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]) / (2 if "lora_B" in name else 1))
    for name in names:
        peft.save_pretrained(folder, selected_adapters=[name])
    return names, peft.eval()


def _calls(model: Callable[..., Any], inputs: Tensor, **keywords: object) -> Callable[[int], Any]:
    return lambda _: model(inputs, **keywords)


def _check(contenders: dict[str, Callable[[int], Any]], dtype: str) -> None:
    results = {name: call(0) for name, call in contenders.items()}
    first = next(iter(results.values()))
    allowed = first.abs().max().item() * (1e-4 if dtype == "float32" else 5e-2)
    for name, result in results.items():
        error = (result.float() - first.float()).abs().max().item()
        check_error(f"bench layer: {name}, beside ours", error, allowed)
