"""The command line: `xpu-lora explain MODULE:FACTORY`, `xpu-lora verify MODULE:FACTORY`.

Exit status: 0 if all is well, 1 if an adapter is dead or a call is wrong, 2 if the command cannot do what it is told.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from xpu_lora_compile.bench.commands import bench
from xpu_lora_compile.command import console, print_parts, reported
from xpu_lora_compile.errors import (
    DeadAdapterError,
    FactoryError,
)
from xpu_lora_compile.inspect.report import Report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")

Factory = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="A function without arguments that returns (model, args) or (model, args, kwargs), or yields it as a "
        "context manager, say inside `bank.use`. MODULE is imported, also from the current folder.",
    ),
]
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

    screen = console()
    dead: DeadAdapterError | None = None
    for path in (html, json):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"the folder of {path} does not exist")
    with reported(), _made(factory, grad) as (model, args, kwargs):
        try:
            report: Report = explain(model, bandwidth=bandwidth, generate_code=generate_code)(*args, **kwargs)
        except DeadAdapterError as error:
            dead, report = error, error.report
        for part in report.parts():
            screen.print(part, markup=False, highlight=False)
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

    with reported(), _made(factory, grad) as (model, args, kwargs):
        result = verify(model, seed=seed, generate_code=generate_code)(*args, **kwargs)
        console().print(str(result), markup=False, highlight=False)


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

    with reported():
        import torch

        show.check("cpu", [], [])
        examination.check_report(report)
        found = next((kind for kind in ("xpu", "cuda") if torch.get_device_module(kind).is_available()), "cpu")
        with show.progress() as advance:
            diagnosis = examination.examine(device or found, advance)
        print_parts(str(diagnosis))
        report.write_text(f"{diagnosis}\n", encoding="utf-8")
        print_parts(f"written to {report}")
    raise typer.Exit(0 if diagnosis.is_right else 1)


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
        functions = ", ".join(name for name, value in vars(sys.modules[module]).items() if callable(value)) or "none"
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
        f"a tuple of {', '.join(type(part).__name__ for part in made)}"
        if isinstance(made, tuple)
        else type(made).__name__,
        "Return what is to be called, and what to call it with.",
    )


if __name__ == "__main__":
    app()
