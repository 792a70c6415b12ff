"""The command line: `xpu-lora explain MODULE:FACTORY`, `xpu-lora verify MODULE:FACTORY`.

Exit status: 0 if all is well, 1 if an adapter is dead or a call is wrong, 2 if the command cannot do what it is told.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from xpu_lora_compile.errors import (
    BenchError,
    DeadAdapterError,
    FactoryError,
    VerificationError,
    own_error,
)
from xpu_lora_compile.inspect.report import Report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Factory = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="A function without arguments that returns (model, args) or (model, args, kwargs), or yields it as a "
        "context manager, say inside `bank.use`. MODULE is imported, also from the current folder.",
    ),
]
Suite = Literal["main", "wide"]
Grad = Annotated[bool, typer.Option("--grad", help="Run in grad mode, as in training.")]
Code = Annotated[bool, typer.Option("--generate-code/--no-generate-code", help="Have Inductor compile the graph, too.")]


@app.callback()
def main() -> None:
    """LoRA that the PyTorch compiler can see: say what it does with a model, and check it."""


@app.command()
def explain(
    factory: Factory,
    html: Annotated[Path | None, typer.Option(help="Write the page with the graphs before and after here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON here.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s for the floors; measured if left out.")] = None,
    generate_code: Code = False,
    grad: Grad = False,
) -> None:
    """Compile a model, and show what became of every call that adds LoRA."""
    from xpu_lora_compile.inspect.explain import explain

    console = _console()
    dead: DeadAdapterError | None = None
    for path in (html, json):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"the folder of {path} does not exist")
    with _reported(), _made(factory, grad) as (model, args, kwargs):
        try:
            report: Report = explain(model, bandwidth=bandwidth, generate_code=generate_code)(*args, **kwargs)
        except DeadAdapterError as error:
            dead, report = error, error.report
        for part in report.parts():
            console.print(part, markup=False, highlight=False)
        if html is not None:
            report.save_html(html)
        if json is not None:
            json.write_text(report.to_json() + "\n", encoding="utf-8")
    if dead is not None:
        Console(stderr=True).print(str(dead), style="red", markup=False, highlight=False)
        raise typer.Exit(1)


@app.command()
def verify(
    factory: Factory,
    seed: Annotated[int, typer.Option(help="Of the random weights and slots.")] = 0,
    generate_code: Code = True,
    grad: Grad = False,
) -> None:
    """Compare every call that adds LoRA with its exact value, in the rewritten graph and in the generated code."""
    from xpu_lora_compile.inspect.verify import verify

    with _reported(), _made(factory, grad) as (model, args, kwargs):
        result = verify(model, seed=seed, generate_code=generate_code)(*args, **kwargs)
        _console().print(str(result), markup=False, highlight=False)


bench = typer.Typer(no_args_is_help=True, help="Time our kernels beside their peers, after checking the numbers.")
app.add_typer(bench, name="bench")

Json = Annotated[Path | None, typer.Option(help="Write all that was measured as JSON here.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of PyTorch, whatever OMP_NUM_THREADS says.")]
Seconds = Annotated[float, typer.Option(help="For each contender at each point.")]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(help="float32, bfloat16, float16; several times for several. By default the first two."),
]
Rows = Annotated[
    list[int] | None,
    typer.Option(
        help="T; several times for several. By default 1, 8, 32 and 256; of gpu 1, 8, 32, 128, 1024 and 4096."
    ),
]
Rank = Annotated[int, typer.Option(help="R of every adapter.")]
Slots = Annotated[int, typer.Option(help="K, and as many adapters.")]


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu.")] = "",
    report: Annotated[Path, typer.Option(help="Where to write what it finds, to attach to an issue.")] = Path(
        "xpu-lora-doctor.txt"
    ),
) -> None:
    """What is installed, what will be used, and whether it works on this device: two minutes, exit status 0 if it does.

    Without --device it examines the accelerator that PyTorch finds, or the CPU.
    """
    from xpu_lora_compile.bench import show
    from xpu_lora_compile.inspect import doctor as examination

    with _reported():
        import torch

        show.check("cpu", [], [])
        examination.check_report(report)
        found = next((one for one in ("xpu", "cuda") if torch.get_device_module(one).is_available()), "cpu")
        with show.progress() as advance:
            diagnosis = examination.examine(device or found, advance)
        _print(str(diagnosis))
        report.write_text(f"{diagnosis}\n", encoding="utf-8")
        _print(f"written to {report}")
    raise typer.Exit(0 if diagnosis.is_right else 1)


@bench.command("ops")
def bench_ops(
    suite: Annotated[Suite, typer.Option(help="main: 4096x4096; wide: ranks, slots, sizes and qkv slices.")] = "main",
    dtype: Dtypes = None,
    rows: Rows = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu.")] = "cpu",
    seconds: Seconds = 0.3,
    threads: Threads = 2,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time against T as a PNG here.")] = None,
) -> None:
    """Shrink and expand alone: ours, vLLM's and PEFT's ways, plain forms through Inductor, and a floor."""
    from xpu_lora_compile.bench import measure, ops, show

    dtypes, rows = dtype or ["float32", "bfloat16"], rows or [1, 8, 32, 256]
    with _reported(), measure.pinned(threads):
        show.check(device, dtypes, rows, json, plot)
        points = ops.suite(suite, dtypes, rows)
        with show.progress(len(points)) as advance:
            run = ops.run(points, device, seconds, advance)
        title = f"a step of {ops.LAYERS} layers, by layer; {run.machine}"
        places = {
            f"{one.point}; floor {one.floor:.0f} us, memory {one.peak_memory >> 10} KiB": one.timings
            for one in run.results
        }
        _print(
            show.timings_table(title, "point", ops.OURS[0], places),
            show.summary_table(run.summary, ours_is_faster=True),
        )
        _print(show.noise(places.values()))
        show.save(run, json)
        if plot is not None:
            show.plot(run.results, plot)


@bench.command("gpu")
def bench_gpu(
    rows: Rows = None,
    output: Annotated[list[str] | None, typer.Option(help="a: 4096; b: 4096+1024+1024; c: 14336+14336.")] = None,
    bank: Annotated[
        list[int] | None, typer.Option(min=0, max=3, help="K, R: 0: 8, 16; 1: 32, 16; 2: 8, 64; 3: 64, mixed 8-64.")
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(help="A folder with sources of vLLM, SGLang or LMDeploy, for comparison.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Only these of the peers.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain PyTorch forms, too: seconds more a point.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Replays of each graph.")] = 15,
    json: Json = None,
) -> None:
    """Base product and LoRA in a CUDA graph of 12 layers: ours, the base alone, peers, plain forms, launch floors."""
    from xpu_lora_compile.bench import gpu, show

    rows, outputs = rows or [1, 8, 32, 128, 1024, 4096], output or list(gpu.OUTPUTS)
    with _reported():
        show.check("cpu", [], rows, json)
        if unknown := [one for one in outputs if one not in gpu.OUTPUTS]:
            raise BenchError("bench gpu: --output", ", ".join(gpu.OUTPUTS), str(unknown), "Correct it.")
        points = gpu.suite(outputs, bank or list(range(len(gpu.BANKS))), rows)
        with show.progress(len(points)) as advance:
            run = gpu.run(points, peers, peer or [], plain, rounds, advance)
        places = {str(one.point): one.timings for one in run.results}
        floors = " and ".join(f"{floor:.1f}" for floor in run.launch_floors)
        title = f"a layer of {gpu.LAYERS} in a CUDA graph; {run.machine}; one and two launches of nothing: {floors} us"
        _print(show.timings_table(title, "point", gpu.BASE, places), show.summary_table(run.summary))
        _print(show.noise(places.values()))
        show.save(run, json)


@bench.command("gpu-model")
def bench_gpu_model(
    shape: Annotated[str, typer.Option(help="smollm2, or llama-8b (8 of its layers).")] = "smollm2",
    batch: Annotated[int, typer.Option(help="Rows.")] = 32,
    rank: Rank = 16,
    slots: Slots = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Replays of each graph.")] = 30,
    json: Json = None,
) -> None:
    """A decoding step of a model in a CUDA graph, on random weights: mixed adapters, and the base model."""
    from xpu_lora_compile.bench import gpu_model, model, show

    with _reported():
        show.check("cpu", [], [batch, rank, slots], json)
        with show.progress() as advance:
            run = gpu_model.run(shape, batch, rank, slots, rounds, "cuda", advance)
        _print(
            show.timings_table(f"a decoding step; {run.machine}", "model", model.BASE, {run.what: run.timings}),
            show.summary_table(run.summary),
            show.noise([run.timings]),
        )
        show.save(run, json)


@bench.command("layer")
def bench_layer(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    rows: Rows = None,
    features: Annotated[int, typer.Option(help="D.")] = 4096,
    width: Annotated[int, typer.Option(help="W.")] = 4096,
    rank: Rank = 16,
    slots: Slots = 8,
    seconds: Seconds = 0.5,
    threads: Threads = 2,
    json: Json = None,
) -> None:
    """One linear layer with its base product: ours, PEFT's layer, and the gather form written into the module."""
    from xpu_lora_compile.bench import layer, measure, show

    rows = rows or [1, 8, 32, 256]
    with _reported(), measure.pinned(threads):
        show.check("cpu", [dtype], [*rows, features, width, rank, slots], json)
        with show.progress(len(rows)) as advance:
            run = layer.run(dtype, rows, features, width, rank, slots, seconds, advance)
        places = {f"T{one.rows}": one.timings for one in run.results}
        _print(
            show.timings_table(f"{run.what}; {run.machine}", "rows", layer.BASE, places), show.noise(places.values())
        )
        show.save(run, json)


@bench.command("model")
def bench_model(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch: Annotated[int, typer.Option(help="Rows.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2, help="For each row, after a prompt of 8 tokens.")] = 32,
    rank: Rank = 16,
    slots: Slots = 4,
    layers: Annotated[int, typer.Option(help="Of SmolLM2-135M's 30.")] = 30,
    runs: Annotated[int, typer.Option(min=2, help="Of each contender, interleaved.")] = 5,
    threads: Threads = 2,
    json: Json = None,
) -> None:
    """A model of SmolLM2-135M's shape, decoding with mixed adapters: beside itself without LoRA, and PEFT."""
    from xpu_lora_compile.bench import measure, model, show

    with _reported(), measure.pinned(threads):
        show.check("cpu", [dtype], [batch, new_tokens, rank, slots, layers], json)
        with show.progress() as advance:
            run = model.run(dtype, batch, new_tokens, rank, slots, layers, runs, advance)
        _print(
            show.timings_table(f"a decoding step; {run.machine}", "model", model.BASE, {run.what: run.timings}),
            show.summary_table(run.summary),
            show.noise([run.timings]),
        )
        show.save(run, json)


@bench.command("vllm")
def bench_vllm(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Requests, all at once.")] = 16,
    rank: Rank = 16,
    slots: Slots = 2,
    layers: Annotated[int, typer.Option(help="Of SmolLM2-135M's 30.")] = 30,
    runs: Annotated[int, typer.Option(min=2, help="Of each contender, interleaved.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="OMP_NUM_THREADS of each engine.")] = 1,
    eager: Annotated[bool, typer.Option("--eager", help="All engines with enforce_eager.")] = False,
    json: Json = None,
) -> None:
    """The engine of vLLM on a CPU, SmolLM2-135M's shape: base model; mixed adapters with the plugin, and without."""
    from xpu_lora_compile.bench import model, show, vllm

    with _reported():
        show.check("cpu", [dtype], [batch, rank, slots, layers], json)
        with show.progress() as advance:
            run = vllm.run(dtype, batch, rank, slots, layers, runs, threads, eager, advance)
        _print(
            show.timings_table(f"a batch; {run.what}; {run.machine}", "workload", model.BASE, run.timings),
            show.summary_table(run.summary),
            show.noise(run.timings.values()),
        )
        show.save(run, json)


def _print(*parts: Any) -> None:
    for part in filter(None, parts):
        _console().print(part, markup=False, highlight=False)


def _console() -> Console:
    """As wide as the terminal; wide enough for the table where there is none."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=140)


@contextmanager
def _reported() -> Iterator[None]:
    """End the command with our own errors' text alone, and with a traceback for those of the factory or the model."""
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        if said := error if isinstance(error, OSError) else own_error(error):
            Console(stderr=True).print(str(said), style="red", markup=False, highlight=False)
        else:
            traceback.print_exc()
        raise typer.Exit(1 if isinstance(error, VerificationError | DeadAdapterError) else 2) from None


@contextmanager
def _made(factory: str, grad: bool) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The model that the factory makes, and the arguments to call it with."""
    import torch

    made = _found(factory)()
    context = made if isinstance(made, AbstractContextManager) else None
    with torch.set_grad_enabled(grad):
        try:
            found = context.__enter__() if context is not None else made
            yield _checked(factory, found)
        finally:
            if context is not None:
                context.__exit__(None, None, None)


def _found(factory: str) -> Any:
    module, _, name = factory.partition(":")
    if not module or not name:
        raise FactoryError("factory", "MODULE:FACTORY", repr(factory), "Write, say, `my_models:tiny`.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise FactoryError(
            "factory", "a module that can be imported", f"{module}: {error}", "Check the name."
        ) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        functions = ", ".join(one for one, value in vars(sys.modules[module]).items() if callable(value)) or "none"
        raise FactoryError("factory", f"a function of {module}", repr(name), f"It has {functions}.")
    return found


def _checked(factory: str, made: object) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if isinstance(made, tuple) and len(made) in (2, 3):
        model, args, kwargs = (*made, {})[:3]
        if callable(model) and isinstance(args, tuple | list) and isinstance(kwargs, dict):
            return model, tuple(args), kwargs
    raise FactoryError(
        f"factory {factory}",
        "(model, args) or (model, args, kwargs), with a tuple and a dict",
        f"a tuple of {', '.join(type(one).__name__ for one in made)}"
        if isinstance(made, tuple)
        else type(made).__name__,
        "Return what is to be called, and what to call it with.",
    )


if __name__ == "__main__":
    app()
