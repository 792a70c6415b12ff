"""`xpu-lora bench moe`: the experts of a mixture with LoRA, next to themselves without it, and to PEFT's own model.

PEFT has no mixed batches here: its model has one adapter for all rows. Our rows have one of several, or none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.bench.measure import Timing, check_error, machine, measure
from xpu_lora_compile.errors import BenchError, counted
from xpu_lora_compile.inspect.operands import RandomOperands

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PARAMETERS = tuple(f"experts.{name}" for name in (GATE_UP, DOWN))
# What `experts_implementation` of transformers may be.
FORMS = ("grouped_mm", "batched_mm", "eager")
# A batched product copies the weights of each pair of a token and an expert: beyond so many bytes it is not measured.
LARGEST_COPY = 1 << 28
BASE, COMPILED_BASE = "base", "base, compiled"
EAGER, COMPILED = "ours, eager", "ours, compiled"
PEFT = "PEFT, one adapter"


@dataclass(frozen=True)
class Sizes:
    """The sizes of one layer's experts and of the adapters, and how transformers computes the products."""

    experts: int
    # Of each token.
    chosen: int
    features: int
    inner: int
    rank: int
    slots: int
    dtype: str
    form: str = FORMS[0]

    def __str__(self) -> str:
        sizes = f"E{self.experts} top-{self.chosen} D{self.features} I{self.inner} R{self.rank} K{self.slots}"
        return f"{self.dtype} {sizes}, {self.form}"

    @property
    def numbers(self) -> tuple[int, ...]:
        """All that are at least 1."""
        return self.experts, self.chosen, self.features, self.inner, self.rank, self.slots

    @property
    def torch_dtype(self) -> torch.dtype:
        """That of weights, inputs and adapters."""
        return cast("torch.dtype", getattr(torch, self.dtype))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """W and D of each product, by the name of its parameter."""
        return {GATE_UP: (2 * self.inner, self.features), DOWN: (self.features, self.inner)}


# The case of a CPU, and Qwen3-30B-A3B's experts.
SMALL = Sizes(64, 8, 512, 192, 16, 8, "float32")
LARGE = Sizes(128, 8, 2048, 768, 16, 8, "bfloat16")


@dataclass(frozen=True)
class MoeResult:
    """What was measured at one number of rows."""

    rows: int
    timings: dict[str, Timing]


@dataclass(frozen=True)
class MoeRun:
    """All that one run measured, and where."""

    machine: str
    what: str
    summary: dict[str, float]
    results: list[MoeResult]


class Mixture(nn.Module):
    """One layer's experts, called as a model calls them."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The output of the experts, `[T, D]`.

        Args:
            hidden: `[T, D]`.
            index: `[T k]`, the experts of each token: of one dimension, so that no other is ever as long as the batch.
            weights: `[T k]`, what each of them counts.
        """
        rows = hidden.shape[0]
        return cast("Tensor", self.experts(hidden, index.view(rows, -1), weights.view(rows, -1)))


@dataclass(frozen=True)
class Draw:
    """Random inputs of a mixture: `[T, D]`, and `[T, k]` each."""

    hidden: Tensor
    index: Tensor
    weights: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of a `Mixture`."""
        return self.hidden, self.index.flatten(), self.weights.flatten()


def check_options(sizes: Sizes, device: str, peers: Path | None) -> None:
    """Check what the command was told.

    Raises:
        BenchError: a form that transformers does not have, or that no CUDA graph can hold; more experts for a token
            than there are; a device that this is not for; or peers on a CPU.
    """
    # In that form the host reads which experts have rows.
    forms = FORMS if device == "cpu" else FORMS[:2]
    if sizes.form not in forms:
        raise BenchError("bench moe: --form", ", ".join(forms), repr(sizes.form), "Choose one of these.")
    if sizes.chosen > sizes.experts:
        wanted = f"at most the {sizes.experts} experts"
        raise BenchError("bench moe: --chosen", wanted, str(sizes.chosen), "Choose fewer, or give more --experts.")
    if device not in ("cpu", "cuda"):
        raise BenchError("bench moe: --device", "cpu, or cuda where there is one", repr(device), "Choose another.")
    if peers is not None and device == "cpu":
        raise BenchError("bench moe: --peers", "--device cuda, where their kernels run", "cpu", "Leave it out.")


def mixture(sizes: Sizes, device: str = "cpu", form: str | None = None, like: Mixture | None = None) -> Mixture:
    """Random experts of Qwen3's class, or with the weights of another.

    Raises:
        BenchError: transformers is missing, or older than 5.
    """
    try:
        from transformers import Qwen3MoeConfig
        from transformers.integrations import moe  # noqa: F401 - there from 5 on
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as missing:
        raise BenchError("bench moe", "transformers 5", str(missing), "pip install -U transformers.") from missing
    config = Qwen3MoeConfig(
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.chosen,
        hidden_size=sizes.features,
        moe_intermediate_size=sizes.inner,
    )
    config._experts_implementation = form or sizes.form
    with torch.device("meta" if like is not None else device):
        experts: Any = Qwen3MoeExperts(config)
    for name, (_, columns) in sizes.shapes().items():
        if like is not None:
            weight = getattr(like.experts, name)
        else:
            weight = getattr(experts, name).data.to(sizes.torch_dtype).normal_(std=columns**-0.5)
        setattr(experts, name, nn.Parameter(weight.detach(), requires_grad=False))
    return Mixture(experts).eval()


def draw(sizes: Sizes, rows: int, device: str = "cpu", seed: int = 0) -> Draw:
    """Random inputs of so many rows: any k experts of each are as likely as any others."""
    operands = RandomOperands(seed, device, drawn_on=device)
    hidden = operands.normal(rows, sizes.features, dtype=sizes.torch_dtype)
    logits, index = operands.normal(rows, sizes.experts).topk(sizes.chosen)
    return Draw(hidden, index, logits.softmax(-1).to(sizes.torch_dtype))


def write_adapters(folder: Path, sizes: Sizes, count: int) -> dict[str, Path]:
    """Write random adapters as PEFT does; return the folder of each, by name."""
    operands, rank, experts = RandomOperands(1), sizes.rank, sizes.experts
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": []}
    config |= {"target_parameters": list(PARAMETERS), "lora_dropout": 0.0}
    written: dict[str, Path] = {}
    for number in range(count):
        weights: dict[str, Tensor] = {}
        for name, (width, features) in sizes.shapes().items():
            # The parameter that PEFT has wrapped first is inside.
            prefix = f"base_model.model.experts{'.base_layer' if name == GATE_UP else ''}"
            weights[f"{prefix}.lora_A.weight"] = operands.normal(experts * rank, features, scale=features**-0.5)
            weights[f"{prefix}.lora_B.weight"] = operands.normal(width, rank * experts, scale=0.5 * rank**-0.5)
        place = folder / f"adapter_{number}"
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(weights, place / "adapter_model.safetensors")
        written[place.name] = place
    return written


def run(sizes: Sizes, rows: Sequence[int], inputs: int, seconds: float, on_done: Callable[[str], None]) -> MoeRun:
    """Time the experts on a CPU at each T.

    Args:
        sizes: of the layer and the adapters.
        rows: each T.
        inputs: how many, each with experts of its own, the calls take in turn: of few rows one finds what it reads in
            the caches.
        seconds: for each contender at each T.
        on_done: told of each T.

    Raises:
        BenchError: a contender computes something else than PEFT; or PEFT or transformers 5 is missing.
    """
    torch.manual_seed(0)
    base, results = mixture(sizes), []
    others = {f"base, {form}": mixture(sizes, form=form, like=base) for form in FORMS if form != sizes.form}
    served = mixture(sizes, like=base)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapters = write_adapters(Path(folder), sizes, sizes.slots)
        bank = xlc.attach(served, adapters=adapters, slots=sizes.slots)
        models: dict[str, Any] = {
            BASE: base,
            COMPILED_BASE: torch.compile(base, dynamic=False),
            **others,
            EAGER: served,
            COMPILED: torch.compile(served, backend="xpu_lora", dynamic=False),
            PEFT: peft_model(base, sizes, adapters["adapter_0"]),
        }
        for count in rows:
            indices, draws = (
                RandomOperands(2).indices(count, sizes.slots),
                [draw(sizes, count, seed=n) for n in range(inputs)],
            )
            chosen = [f"adapter_{slot}" if slot >= 0 else None for slot in indices.tolist()]
            _check(models, base, sizes, adapters, chosen, draws[0], bank)
            names = [name for name in models if not (name == "base, batched_mm" and _copied(sizes, count))]
            with bank.use(chosen):
                contenders = {name: _calls(models[name], draws) for name in names}
                results.append(MoeResult(count, measure(contenders, "cpu", seconds)))
            torch.compiler.reset()
            on_done(f"T{count}")
    return MoeRun(machine("cpu"), f"{sizes}, {counted(inputs, 'input')} in turn", summary(results), results)


def summary(results: Sequence[MoeResult]) -> dict[str, float]:
    """Ratios at each T."""
    found: dict[str, float] = {}
    for result in results:
        times = {name: timing.median for name, timing in result.timings.items()}
        ours = min(times[EAGER], times[COMPILED])
        fastest = min(time for name, time in times.items() if name.startswith("base"))
        found |= {
            f"T = {result.rows}: {PEFT} / ours, eager": times[PEFT] / times[EAGER],
            f"T = {result.rows}: ours, eager / base": times[EAGER] / times[BASE],
            f"T = {result.rows}: ours, compiled / base, compiled": times[COMPILED] / times[COMPILED_BASE],
            f"T = {result.rows}: ours, the faster / the fastest base": ours / fastest,
        }
    return found


def peft_model(base: Mixture, sizes: Sizes, folder: Path) -> Any:
    """PEFT's own model with one adapter, which shares the weights of the experts.

    Raises:
        BenchError: PEFT is not installed, or too old for adapters of parameters.
    """
    try:
        from peft import PeftModel
        from peft.tuners.lora.layer import ParamWrapper  # noqa: F401 - there from 0.17 on
    except ImportError as missing:
        raise BenchError("bench moe", "peft, to be compared with", str(missing), "pip install -U peft.") from missing
    return PeftModel.from_pretrained(cast("Any", mixture(sizes, like=base)), folder).eval()


def _copied(sizes: Sizes, rows: int) -> bool:
    """Whether a batched product copies more than is reasonable."""
    weights = max(width * features for width, features in sizes.shapes().values())
    return rows * sizes.chosen * weights * sizes.torch_dtype.itemsize > LARGEST_COPY


def _calls(model: Callable[..., Any], draws: Sequence[Draw]) -> Callable[[int], Any]:
    return lambda number: model(*draws[number % len(draws)].arguments())


def _check(
    models: Mapping[str, Any],
    base: Mixture,
    sizes: Sizes,
    adapters: Mapping[str, Path],
    chosen: Sequence[str | None],
    inputs: Draw,
    bank: AdapterBank,
) -> None:
    """Compare each row of ours with PEFT's model that has its adapter alone."""
    expected = base(*inputs.arguments())
    for name in sorted({name for name in chosen if name is not None}):
        mine = torch.tensor([row for row, other in enumerate(chosen) if other == name])
        model = models[PEFT] if name == "adapter_0" else peft_model(base, sizes, adapters[name])
        expected[mine] = model(*inputs.arguments())[mine]
    allowed = expected.abs().max().item() * (1e-4 if sizes.dtype == "float32" else 5e-2)
    with bank.use(chosen):
        for name in (EAGER, COMPILED):
            # The first call is followed op by op, and may take other ways.
            models[name](*inputs.arguments())
            error = (models[name](*inputs.arguments()).float() - expected.float()).abs().max().item()
            check_error(f"bench moe: {name} at T{len(chosen)}, next to PEFT", error, allowed)
    # The base models among each other: what is timed is one function.
    plain = base(*inputs.arguments())
    for name, model in models.items():
        if name.startswith("base"):
            error = (model(*inputs.arguments()).float() - plain.float()).abs().max().item()
            check_error(f"bench moe: {name} at T{len(chosen)}", error, allowed)
