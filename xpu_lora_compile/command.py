"""What the commands of `xpu-lora` share: where they print, and how they end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from xpu_lora_compile.errors import DeadAdapterError, VerificationError, own_error
from xpu_lora_compile.terminal import NO_TERMINAL


def print_parts(*parts: Any) -> None:
    """Print what is not empty."""
    for part in filter(None, parts):
        console().print(part, markup=False, highlight=False)


def console() -> Console:
    """As wide as the terminal; wide enough for the table where there is none."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=NO_TERMINAL)


@contextmanager
def reported() -> Iterator[None]:
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
