"""How a function of vLLM is changed: one that calls it takes its place, for good or for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Set on what has taken a place; what others wrap around it with `functools.wraps` has it, too.
_MARK = "xpu_lora_compile_changed"


def change(owner: Any, name: str, made_from: Callable[[Any], Any]) -> None:
    """Put what is made from a function in its place. A second call changes nothing.

    Args:
        owner: a class or a module of vLLM's.
        name: of its function.
        made_from: is given the function, and returns one that calls it.
    """
    own = getattr(owner, name)
    if not hasattr(own, _MARK):
        made = functools.wraps(own)(made_from(own))
        setattr(made, _MARK, True)
        setattr(owner, name, made)


@contextmanager
def replaced(owner: Any, name: str, other: Callable[..., Any]) -> Iterator[None]:
    """Have another function in the place of an object's or a module's own until the block ends."""
    had, own = name in vars(owner), getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, own)
        else:
            delattr(owner, name)
