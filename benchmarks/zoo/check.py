"""The checks of one family: batches of mixed adapters beside PEFT's answer for each adapter alone."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.backend import xpu_lora

from .family import BATCH, Family, Inputs, Rows, make_lively

# Largest difference that counts as equal, of the largest value of the tensor. An adapter has to change at least ten
# times as much.
TOLERANCE = 1e-4

Name = str | None
Names = Sequence[Name]
RANKS = {"a": 4, "b": 2}
# No row has the same name in both, so that an answer that was kept shows.
MIXED: tuple[Names, ...] = (("a", None, "b"), ("b", "a", None))

RIGHT, REFUSED, WRONG, CRASH, NOT_RUN = "right", "refused", "WRONG", "crash", "-"
FAILURES = (WRONG, CRASH)


@dataclass(frozen=True)
class Result:
    """The outcome of one check, and what there is to say about it."""

    outcome: str
    detail: str = ""


@dataclass
class Report:
    """All results of one family.

    Attributes:
        family: its name.
        targets: the modules that got LoRA.
        note: what the reader has to know.
        idle: modules with LoRA whose adapter changes nothing of the outputs, so that they are not tested.
        seconds: how long the checks took.
        results: by the name of the check.
    """

    family: str
    targets: str = ""
    note: str = ""
    idle: list[str] = field(default_factory=list)
    seconds: float = 0.0
    results: dict[str, Result] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class UncheckableError(Exception):
    """A check that cannot be made, since the base model or PEFT cannot do what it asks for."""


class Oracle:
    """The base model and PEFT's two adapters, each for the whole batch."""

    def __init__(self, family: Family, folder: Path) -> None:
        with seeded(0):
            self.base = family.build().eval()
            make_lively(self.base)
            forget_end_of_text(self.base)
        with seeded(1):
            self.inputs = family.inputs()
        with seeded(2):
            self.prompt = family.prompt() if family.prompt else None
        self.rows = family.rows
        self.targets = family.targets
        self.exclude = family.exclude
        self.folders = {name: folder / name for name in RANKS}
        self.notes = [family.note] if family.note else []
        for seed, (name, rank) in enumerate(RANKS.items()):
            config = LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=family.targets,
                exclude_modules=family.exclude,
                init_lora_weights=False,
            )
            with seeded(10 + seed):
                adapter = get_peft_model(copy.deepcopy(self.base), config)
            # Some models cannot say what their embeddings are, of which PEFT would save a copy otherwise.
            adapter.save_pretrained(self.folders[name], save_embedding_layers=False)
        self.unmerged: dict[Name, Rows] = {}
        self.models: dict[Name, nn.Module] = {None: self.base}
        self.answers = {None: self._answer(self.base)}
        for name in RANKS:
            peft_model = PeftModel.from_pretrained(copy.deepcopy(self.base), str(self.folders[name])).eval()
            model: nn.Module = peft_model.get_base_model()
            answer = self._answer(model)
            merged = PeftModel.from_pretrained(copy.deepcopy(self.base), str(self.folders[name])).merge_and_unload()
            merged_answer = self._answer(merged.eval())
            if distance(answer, merged_answer) > TOLERANCE and not shares_weights(model):
                # A parent reads the layer's weight without a call, so that PEFT's own layer is not asked.
                self.unmerged[name] = answer
                model, answer = merged, merged_answer
            self.models[name], self.answers[name] = model, answer
        if self.unmerged:
            self.notes.append("compared with merged adapters, since PEFT's unmerged ones give another answer")
        self._check_that_names_matter()
        try:
            self.idle = modules_without_influence(copy.deepcopy(self.models["a"]), self)
        except Exception as error:  # a few models refuse a backward pass in eval mode
            self.idle = []
            self.notes.append("no gradients: " + text_of(error))

    def run(self, model: Callable[..., Any]) -> Rows:
        """Run a model on the inputs; some draw random numbers in eval mode, too."""
        with seeded(4):
            return self.rows(model(**copy.deepcopy(self.inputs)))

    def _answer(self, model: nn.Module) -> Rows:
        with torch.no_grad():
            rows = self.run(model)
        if not all(torch.isfinite(tensor).any() for row in rows for tensor in row):
            raise UncheckableError("the model's numbers are not finite")
        return rows

    def _check_that_names_matter(self) -> None:
        for one, other in ((None, "a"), (None, "b"), ("a", "b")):
            for row in range(BATCH):
                if not distance([self.answers[one][row]], [self.answers[other][row]]) > 10 * TOLERANCE:
                    raise UncheckableError(f"row {row} is the same with {one} and {other}: nothing can be told apart")

    def compare(self, rows: Rows, names: Names) -> Result:
        """Compare a batch with the answers for these names."""
        for row, name in enumerate(names):
            off = distance([rows[row]], [self.answers[name][row]])
            if not off <= TOLERANCE:
                same = [
                    str(other)
                    for other in self.answers
                    if distance([rows[row]], [self.answers[other][row]]) <= TOLERANCE
                ]
                if name in self.unmerged and distance([rows[row]], [self.unmerged[name][row]]) <= TOLERANCE:
                    same = ["PEFT's unmerged adapter"]
                like = f"; it is the answer of {same[0]}" if same else ""
                return Result(WRONG, f"names {list(names)}: row {row} is off by {off:.1g} of its scale{like}")
        return Result(RIGHT)


def check(family: Family, modes: Sequence[str]) -> Report:
    """Run all checks of the modes on one family."""
    report, start = Report(family.name), time.perf_counter()
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variants = {name: variant for mode in modes for name, variant in VARIANTS[mode].items()}
        try:
            oracle = Oracle(family, Path(folder))
        except Exception as error:  # anything may be wrong with a model
            report.results = {name: Result(CRASH, "no reference: " + text_of(error)) for name in variants}
            return report
        report.targets = str(family.targets) + (f" without {family.exclude}" if family.exclude else "")
        report.note = "; ".join(oracle.notes)
        report.idle = oracle.idle
        for name, variant in variants.items():
            report.results[name] = outcome_of(variant, oracle)
            torch.compiler.reset()
    report.seconds = time.perf_counter() - start
    return report


def outcome_of(variant: Callable[[Oracle], Result], oracle: Oracle) -> Result:
    """Run one check, and turn what it raises into a result."""
    try:
        return variant(oracle)
    except UncheckableError as error:
        return Result(NOT_RUN, str(error))
    except Exception as error:  # whatever a model raises is the result
        refusal = lora_error_in(error)
        return Result(REFUSED, refusal) if refusal else Result(CRASH, text_of(error))


# The variants.


def attached(oracle: Oracle) -> tuple[nn.Module, xlc.AdapterBank]:
    """Return a copy of the base model with a bank that holds both adapters."""
    model = copy.deepcopy(oracle.base)
    # Where PEFT puts LoRA on the parameters of experts, its config says so; gate and up together have twice the rank.
    parameters = json.loads((oracle.folders["b"] / "adapter_config.json").read_text()).get("target_parameters")
    bank = xlc.attach(
        model,
        target_modules=oracle.targets,
        exclude_modules=oracle.exclude or (),
        # Where PEFT puts LoRA on the parameters of experts, its config says so.
        target_parameters=json.loads((oracle.folders["b"] / "adapter_config.json").read_text()).get(
            "target_parameters"
        ),
        slots=3,
        max_rank=max(RANKS.values()) * (2 if parameters else 1),
    )
    # The slots are not in the order of the names in a batch.
    bank.load("b", oracle.folders["b"])
    bank.load("a", oracle.folders["a"])
    return model, bank


def forward(oracle: Oracle, *batches: Names, grad: bool = False) -> Result:
    """Run batches with these names, and the base model after them."""
    model, bank = attached(oracle)
    for names in batches:
        with bank.use(list(names)), torch.set_grad_enabled(grad):
            rows = oracle.run(model)
        result = oracle.compare(rows, names)
        if result.outcome != RIGHT:
            return result
    with torch.no_grad():
        return oracle.compare(oracle.run(model), [None] * BATCH)


def mixed(oracle: Oracle) -> Result:
    """Another name for each row."""
    return forward(oracle, *MIXED)


def same(oracle: Oracle) -> Result:
    """One name for all rows."""
    return forward(oracle, ["a"] * BATCH, ["b"] * BATCH)


def none(oracle: Oracle) -> Result:
    """No adapter in the batch."""
    return forward(oracle, [None] * BATCH)


def with_grad(oracle: Oracle) -> Result:
    """Another name for each row, while autograd records."""
    return forward(oracle, *MIXED, grad=True)


def compiled(oracle: Oracle) -> Result:
    """Mixed batches through `torch.compile`: as many graphs as the base model has, compiled once for all names."""
    base_graphs: list[Any] = []
    graphs: list[Any] = []

    def count_base(graph_module: Any, example_inputs: Any) -> Any:
        base_graphs.append(graph_module)
        return graph_module.forward

    def count(graph_module: Any, example_inputs: Any) -> Any:
        graphs.append(graph_module)
        return xpu_lora(graph_module, example_inputs, options={"xpu_lora.execute": "eager"})

    model, bank = attached(oracle)
    with torch.no_grad():
        try:
            base = torch.compile(copy.deepcopy(oracle.base), backend=count_base)
            for _ in MIXED:
                rows = oracle.run(base)
        except Exception as error:  # many models do not compile
            raise UncheckableError("the base model does not compile: " + text_of(error)) from error
        if distance(rows, oracle.answers[None]) > TOLERANCE:
            raise UncheckableError("the compiled base model gives another answer")
        torch.compiler.reset()
        compiled_model = torch.compile(model, backend=count)
        for names in MIXED:
            with bank.use(list(names)):
                result = oracle.compare(oracle.run(compiled_model), names)
            if result.outcome != RIGHT:
                return result
    if not base_graphs:
        return Result(RIGHT, "Dynamo compiles nothing of the base model")
    # Both have run as often, so that other names which compile again show here, too.
    if len(graphs) != len(base_graphs):
        return Result(WRONG, f"{len(graphs)} graphs, the base model has {len(base_graphs)}; the numbers are right")
    return Result(RIGHT, f"graphs: {len(graphs)}")


def generates(**options: Any) -> Callable[[Oracle], Result]:
    """Return a check of `generate` with these options, names given for each input sequence."""

    def run(model: nn.Module, prompt: Inputs, **others: Any) -> Tensor:
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options, **others}
        with seeded(3), torch.no_grad():
            sequences: Tensor = model.generate(**copy.deepcopy(prompt), **settings)  # type: ignore[operator]
        return sequences.view(BATCH, -1, sequences.shape[-1])

    def rows_are_independent(oracle: Oracle) -> bool:
        """Whether the base model gives a row the same tokens when the rows of a prompt of text have changed places."""
        if set(oracle.prompt) > {"input_ids", "attention_mask"}:
            # The rows of images need not be those of the batch.
            return True
        moved = {name: value.roll(1, 0) for name, value in oracle.prompt.items()}
        # Without the noise of samples, of which each place has its own.
        plain = {"do_sample": False, "num_return_sequences": 1}
        return torch.equal(run(oracle.base, moved, **plain), run(oracle.base, oracle.prompt, **plain).roll(1, 0))

    def variant(oracle: Oracle) -> Result:
        if oracle.prompt is None:
            raise UncheckableError("the model does not generate")
        try:
            answers = {name: run(model, oracle.prompt) for name, model in oracle.models.items()}
        except Exception as error:  # some models have no beams, for example
            raise UncheckableError("the base model does not generate so: " + text_of(error)) from error
        model, bank = attached(oracle)
        for names in (*MIXED, ["a"] * BATCH):
            with bank.use(list(names)):
                sequences = run(model, oracle.prompt)
            for row, name in enumerate(names):
                if not torch.equal(sequences[row], answers[name][row]):
                    if not rows_are_independent(oracle):
                        raise UncheckableError("the base model mixes the rows of a batch")
                    return Result(WRONG, f"names {list(names)}: row {row} has other tokens")
        return Result(RIGHT)

    return variant


VARIANTS: dict[str, dict[str, Callable[[Oracle], Result]]] = {
    "eager": {"mixed": mixed, "same": same, "none": none, "grad": with_grad},
    "compiled": {"compiled": compiled},
    "generate": {
        "greedy": generates(),
        "beams": generates(num_beams=2),
        "beams returned": generates(num_beams=2, num_return_sequences=2),
        # The noise of a row does not depend on the other rows, so that samples are comparable, too.
        "samples": generates(do_sample=True, num_return_sequences=2),
    },
}


# What the checks share.


def distance(ours: Rows, theirs: Rows) -> float:
    """Return the largest difference, of the largest value of its tensor; infinite where one alone is not a number."""
    worst = 0.0
    for our_row, their_row in zip(ours, theirs, strict=True):
        for our, their in zip(our_row, their_row, strict=True):
            if our.shape != their.shape:
                return float("inf")
            # Masked values are infinite, or as low as the dtype allows.
            masked = ~(their.abs() < 1e20)
            if not torch.equal(masked, ~(our.abs() < 1e20)):
                return float("inf")
            difference = (our - their).masked_fill(masked, 0.0).abs().max()
            scale = their.masked_fill(masked, 0.0).abs().max().clamp(min=1e-6)
            worst = max(worst, float(difference / scale))
    return worst


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start random numbers from the seed, and leave those outside as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def shares_weights(peft_model: nn.Module) -> bool:
    """Whether another module shares a weight that LoRA is on, so that merging would change that module, too."""
    with_lora = [module.get_base_layer().weight for module in peft_model.modules() if isinstance(module, LoraLayer)]
    owners = Counter(
        id(weight)
        for module in peft_model.modules()
        for weight in module.parameters(recurse=False)
        if not isinstance(module, LoraLayer)
    )
    return any(owners[id(weight)] > 1 for weight in with_lora)


def modules_without_influence(peft_model: nn.Module, oracle: Oracle) -> list[str]:
    """Return the modules whose adapter changes nothing of the outputs, as the gradients say."""
    with torch.enable_grad():
        for module in peft_model.modules():
            module.requires_grad_(True)
        loss = sum(
            tensor.masked_fill(~(tensor.abs() < 1e20), 0.0).square().sum()
            for row in oracle.run(peft_model)
            for tensor in row
        )
        loss.backward()
    layers = {name: module for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)}
    return [
        name
        for name, layer in layers.items()
        if not any(
            weight.grad is not None and weight.grad.count_nonzero()
            for part, weight in layer.named_parameters()
            if "lora_B" in part
        )
    ]


def forget_end_of_text(model: nn.Module) -> None:
    """Let `generate` run for as long as it is told, whatever tokens the random weights prefer."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        config.eos_token_id = None
        config.pad_token_id = 0


def lora_error_in(error: BaseException | None) -> str | None:
    """Return the text of the LoraError that the error is, was caused by, or quotes."""
    while error is not None:
        if isinstance(error, xlc.LoraError):
            return text_of(error)
        if any(f"{kind.__name__}: " in str(error) for kind in kinds_of(xlc.LoraError)):
            return text_of(error)
        error = error.__cause__ or error.__context__
    return None


def kinds_of(kind: type[BaseException]) -> list[type[BaseException]]:
    """Return an exception's class and all that derive from it."""
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in kinds_of(child))]


def text_of(error: BaseException) -> str:
    """Return an error's class and the start of its text, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
