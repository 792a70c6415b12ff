"""A thread that works with a few of the CPU's cores, so that whoever serves keeps the others.

    with_few_cores(function, *arguments) -> what the function returns

With all cores each op of torch would wait for those that serve, and they for it: on one H200's host of 16 cores, a
decoding loop waited 4 to 7 ms for a load with 16 threads, and 0.5 ms for one with 4, which was no slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import ParamSpec, TypeVar

import torch

_MOST = 4

P = ParamSpec("P")
R = TypeVar("R")


def with_few_cores(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function in the thread, after what others have given it; this thread waits, even where it is interrupted.

    The function runs outside of all modes and streams of this thread, and without gradients.
    """
    running = _worker().submit(torch.no_grad()(function), *args, **kwargs)
    try:
        return running.result()
    except BaseException:
        # What it works on must not be used by others before it has ended.
        wait([running])
        raise


@cache
def _worker() -> ThreadPoolExecutor:
    """The thread, with a quarter of the cores and at most four."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    few = min(_MOST, max(1, cores // 4))
    worker = ThreadPoolExecutor(1, "xpu-lora-load", initializer=torch.set_num_threads, initargs=(few,))
    # The thread starts here. Its number is its own, but torch gives the last one that was set to threads to come.
    worker.submit(torch.get_num_threads).result()
    torch.set_num_threads(before)
    return worker


# A process that was forked has no threads but its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.cache_clear)
