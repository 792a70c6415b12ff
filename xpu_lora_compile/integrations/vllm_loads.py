"""A new version of an adapter, loaded in place of the old one, answers requests that come after it, and no others.

vLLM replaces the weights of an adapter that is loaded again (`load_inplace`, or by its name once it was unloaded), and
goes on with its number, name and folder. Requests that are running then get the one version's weights and the other's
keys and values; a request that waits since before may bring the old version back for all; what is cached of a prefix
is found by name and folder; and vLLM 0.32 reads the files again in every step of a request.

Here each load is an adapter of its own to the engine. The first keeps its number and name. A later one gets a number
past all others, and "sql (load 2)" for a name, which is in the key of a cached prefix, too. A request gets the latest
load of its number, name and folder as it arrives at the engine, and keeps it. No weights are replaced, so an old
version takes a slot of its own until its requests are over, and memory until it is the one not used for longest.

vLLM reads an adapter that is not in memory in the middle of a step. Its engine ends if that fails, as where the folder
is gone by then; other files it takes for those that it knew. Here the adapters of the requests that come next are read
before the step, and the requests of one that cannot be read as it was end with an error.

Where several processes share a model and each refuses a load, vLLM reads the first one's answer. The others' are taken
for those to later calls, until the engine waits for ever. So a refusal is an answer like others.

| changed in vLLM | what it does more |
|---|---|
| `EngineCore.add_lora`, `remove_lora`, `pin_lora`, `list_loras` | translate what the user knows |
| `EngineCore.collective_rpc` | forgets which adapters are in memory |
| `EngineCore.preprocess_add_request` | gives a request its load |
| `EngineCore.step`, `step_with_batch_queue` | read adapters first, and end the requests of those that cannot be read |
| `AsyncLLM.add_lora` | resets `load_inplace` |
| `LoRAModelRunnerMixin.add_lora` | returns why a load was refused, where several processes share a model |
| `LRUCacheWorkerLoRAManager._apply_adapters` | keeps what a step needs from being given up for another that it needs |
"""

from __future__ import annotations

import importlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from xpu_lora_compile.integrations.vllm_changes import change

# Numbers of adapters from here on are given out here. vLLM counts from 1; its second model runner has 32 bits for them.
FIRST_OF_LATER_LOADS = 1 << 30

_LOST = "its files are gone, or not those that were loaded"

# The files of an adapter as they were when they were read: path, size and time of each.
Files = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Load:
    """One load of an adapter: its number for vLLM's user, the engine's `LoRARequest`, and the files that it read."""

    number: int
    request: Any
    files: Files


class Loads:
    """The latest load of each adapter, by its number, name and folder. One for each engine."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, str, str], Load] = {}
        # All of them, by the engine's number; their names for the engine; and how many a name of the user's has had.
        self._loads: dict[int, Load] = {}
        self._names: set[str] = set()
        self._times: Counter[str] = Counter()
        self._numbers = count(FIRST_OF_LATER_LOADS)
        # The adapters that were read before the last step; empty where another load may have taken a slot since.
        self.ready: Mapping[int, Any] = {}
        # The engine's numbers of those that must not be given up for others, and of those that were ever read.
        self.pinned: set[int] = set()
        self.read: set[int] = set()
        # Requests arrive in a thread of their own.
        self._lock = threading.Lock()

    def of(self, request: Any) -> Any:
        """The `LoRARequest` for the engine that a request with this one gets."""
        key = (request.lora_int_id, request.lora_name, request.lora_path)
        with self._lock:
            latest = self._latest.get(key)
            # Who asks for it with each request wants the files as they are now.
            if latest is None or (request.load_inplace and latest.files != _files(request.lora_path)):
                latest = self._new(request)
                self._latest[key] = latest
        return latest.request

    def begin(self, request: Any) -> Load:
        """What vLLM is to read for an explicit load; requests get it once it was `finished`."""
        key = (request.lora_int_id, request.lora_name, request.lora_path)
        with self._lock:
            latest = self._latest.get(key)
            return self._new(request) if latest is None or request.load_inplace else latest

    def finish(self, request: Any, load: Load) -> list[int]:
        """From now on requests get this load; the engine's numbers of those that were pinned, and are not to be now."""
        with self._lock:
            self._latest[request.lora_int_id, request.lora_name, request.lora_path] = load
            latest = {load.request.lora_int_id for load in self._latest.values()}
            unpinned = self.pinned - latest
            self.pinned &= latest
            return list(unpinned)

    def remove(self, number: int) -> list[int]:
        """Forget an adapter of vLLM's user; the engine's numbers of all its loads."""
        with self._lock:
            self._latest = {key: load for key, load in self._latest.items() if key[0] != number}
            return [load.request.lora_int_id for load in self._loads.values() if load.number == number]

    def drop_unread(self, number: int) -> None:
        """Have the next request get a new load where this one, by the engine's number, was never read."""
        with self._lock:
            if number not in self.read:
                self._latest = {key: load for key, load in self._latest.items() if load.request.lora_int_id != number}

    def latest(self, number: int) -> list[int]:
        """The engine's numbers of the latest loads of an adapter of vLLM's user."""
        with self._lock:
            return [load.request.lora_int_id for load in self._latest.values() if load.number == number]

    def of_user(self, numbers: set[int]) -> set[int]:
        """What vLLM's user calls these loads."""
        return {self._loads[number].number if number in self._loads else number for number in numbers}

    def is_as_it_was(self, number: int) -> bool:
        """Whether the files of a load, by the engine's number, are there as they were; true if they never were here."""
        load = self._loads.get(number)
        return load is None or not load.files or load.files == _files(load.request.lora_path)

    def _new(self, request: Any) -> Load:
        number, name = request.lora_int_id, request.lora_name
        self._times[name] += 1
        for_engine = name if self._times[name] == 1 else f"{name} (load {self._times[name]})"
        # An adapter of the user's may be called like a load of another.
        while for_engine in self._names:
            self._times[name] += 1
            for_engine = f"{name} (load {self._times[name]})"
        self._names.add(for_engine)
        later = (number for number in self._numbers if number not in self._loads)
        changes = {"lora_int_id": next(later) if number in self._loads else number, "lora_name": for_engine}
        replace = importlib.import_module("msgspec").structs.replace
        load = Load(number, replace(request, load_inplace=False, **changes), _files(request.lora_path))
        self._loads[load.request.lora_int_id] = load
        return load


def _files(path: str) -> Files:
    """Of an adapter; none where the path is no folder of this machine."""
    folder = os.path.expanduser(path)  # noqa: PTH111 - each step looks at the files of all that wait
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith("adapter_"))  # noqa: PTH208
    except OSError:
        return ()
    found = [f"{folder}/{name}" for name in names]
    return tuple((file, *state) for file in found if (state := _state(file)) is not None)


def _state(file: str) -> tuple[int, int] | None:
    """Size and time of a file; None where it cannot be seen, as on a disk that is away."""
    try:
        state = os.stat(file)  # noqa: PTH116
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def tell_loads_apart() -> None:
    """Change vLLM's classes that hand out requests, of the engine and of its clients."""
    core: Any = importlib.import_module("vllm.v1.engine.core").EngineCore
    for made_from in (_add_lora, _remove_lora, _pin_lora, _list_loras, _preprocess_add_request):
        change(core, made_from.__name__.removeprefix("_"), made_from)
    for name in ("step", "step_with_batch_queue"):
        change(core, name, _step)
    change(core, "collective_rpc", _forgetting)
    client: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
    change(client, "add_lora", _add_lora_once)


def change_workers() -> None:
    """Change the classes of vLLM that load adapters in the processes of a model."""
    manager: Any = importlib.import_module("vllm.lora.worker_manager").LRUCacheWorkerLoRAManager
    runner: Any = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin").LoRAModelRunnerMixin
    change(manager, "_apply_adapters", _apply_adapters)
    change(runner, "add_lora", _answer_with_refusals)


def _loads(core: Any) -> Loads:
    # A dictionary's method, for threads that ask for it at the same time.
    loads: Loads = core.__dict__.setdefault("lora_loads", Loads())
    return loads


def _add_lora(own: Any) -> Any:
    def add_lora(core: Any, lora_request: Any) -> bool:
        load = _loads(core).begin(lora_request)
        try:
            added = _read(core, load.request)
        except Exception as error:
            # The server looks for the name that it knows.
            name, known = load.request.lora_name, lora_request.lora_name
            error.args = tuple(part.replace(name, known) if isinstance(part, str) else part for part in error.args)
            raise
        for number in _loads(core).finish(lora_request, load):
            core.model_executor.remove_lora(number)
        return added

    return add_lora


def _answer_with_refusals(own: Any) -> Any:
    def add_lora(runner: Any, lora_request: Any) -> bool | str:
        try:
            added: bool = own(runner, lora_request)
        except Exception as error:
            if runner.vllm_config.parallel_config.world_size == 1:
                raise
            return str(error)
        return added

    return add_lora


def _add_lora_once(own: Any) -> Any:
    async def add_lora(client: Any, lora_request: Any) -> bool:
        added: bool = await own(client, lora_request)
        # vLLM 0.32's server hands the same object to all requests that follow; 0.33's resets it as well.
        lora_request.load_inplace = False
        return added

    return add_lora


def _remove_lora(own: Any) -> Any:
    def remove_lora(core: Any, lora_id: int) -> bool:
        _loads(core).ready = {}
        removed = [own(core, number) for number in _loads(core).remove(lora_id) or [lora_id]]
        return any(removed)

    return remove_lora


def _pin_lora(own: Any) -> Any:
    def pin_lora(core: Any, lora_id: int) -> bool:
        numbers = _loads(core).latest(lora_id) or [lora_id]
        pinned = all(own(core, number) for number in numbers)
        _loads(core).pinned.update(numbers)
        return pinned

    return pin_lora


def _forgetting(own: Any) -> Any:
    def collective_rpc(core: Any, *args: Any, **kwargs: Any) -> Any:
        # What the user has the processes do may empty their memory, as new weights of the model do.
        _loads(core).ready = {}
        return own(core, *args, **kwargs)

    return collective_rpc


def _list_loras(own: Any) -> Any:
    def list_loras(core: Any) -> set[int]:
        return _loads(core).of_user(own(core))

    return list_loras


def _preprocess_add_request(own: Any) -> Any:
    def preprocess_add_request(core: Any, request: Any) -> Any:
        asked = request.lora_request
        if asked is not None:
            request.lora_request = load = _loads(core).of(asked)
            # What an encoder returned for one load is not another's: see `vllm_platform.py`.
            for feature in request.mm_features or ():
                if feature.identifier.startswith(f"{asked.lora_name}:"):
                    feature.identifier = load.lora_name + feature.identifier.removeprefix(asked.lora_name)
        return own(core, request)

    return preprocess_add_request


def _read(core: Any, request: Any) -> bool:
    """Have all processes of the model read an adapter, if it is not in memory, and give it a slot.

    Raises:
        RuntimeError: one of several processes refuses it; if there is one process, what that raises.
    """
    _loads(core).ready = {}
    answers = core.model_executor.collective_rpc("add_lora", args=(request,))
    for answer in answers:
        if isinstance(answer, str):
            # Others may have read it.
            core.model_executor.collective_rpc("remove_lora", args=(request.lora_int_id,))
            raise RuntimeError(answer)
    _loads(core).read.add(request.lora_int_id)
    return all(answers)


def _step(own: Any) -> Any:
    def step(core: Any) -> tuple[dict[int, Any] | None, bool]:
        ended = _read_what_comes_next(core)
        outputs, executed = own(core)
        if ended:
            engine: Any = importlib.import_module("vllm.v1.engine")
            outputs = outputs or {}
            for request in ended:
                output = engine.EngineCoreOutput(request.request_id, [], finish_reason=engine.FinishReason.ERROR)
                outputs.setdefault(request.client_index, engine.EngineCoreOutputs()).outputs.append(output)
        return outputs, executed

    return step


def _read_what_comes_next(core: Any) -> list[Any]:
    """Read the adapters of the requests that run or are the next to; requests whose adapter cannot be read are ended.

    vLLM may choose others, whose adapters it reads itself: so their files are looked at as well.

    Returns the requests that were ended.
    """
    loads, ended = _loads(core), []
    asked = {adapter.lora_int_id: adapter for adapter in _adapters(core.scheduler.requests.values())}
    for adapter in _lost(core, [its for number, its in asked.items() if number not in loads.ready]):
        ended += _end(core, adapter, _LOST)
    while (wanted := _wanted(core)) != loads.ready:
        # Those that are ready first: what is read for another takes the place of one that was not used for longer.
        for adapter in sorted(wanted.values(), key=lambda adapter: adapter.lora_int_id not in loads.ready):
            problem = _problem(core, adapter)
            if problem:
                ended += _end(core, adapter, problem)
                break
        else:
            loads.ready = wanted
    return ended


def _lost(core: Any, adapters: Sequence[Any]) -> list[Any]:
    """Those adapters that some process has not in memory, and whose files are not those that were loaded."""
    changed = [adapter for adapter in adapters if not _loads(core).is_as_it_was(adapter.lora_int_id)]
    # One of several processes may have read it before its files changed, and another not.
    in_memory = core.model_executor.collective_rpc("list_loras") if changed else []
    return [adapter for adapter in changed if not all(adapter.lora_int_id in numbers for numbers in in_memory)]


def _problem(core: Any, adapter: Any) -> str:
    """Read an adapter that is not in memory; why that fails, empty if it does not."""
    if _lost(core, [adapter]):
        return _LOST
    try:
        _read(core, adapter)
    except Exception as error:
        _loads(core).drop_unread(adapter.lora_int_id)
        return str(error) or type(error).__name__
    return ""


def _wanted(core: Any) -> dict[int, Any]:
    """The adapters of requests that run, then of those that wait, for as many as there are slots: by number."""
    config, scheduler = core.vllm_config.lora_config, core.scheduler
    wanted: dict[int, Any] = {}
    for adapter in _adapters(chain(scheduler.running, scheduler.kv_holding_waiting, scheduler.waiting)):
        if config is None or len(wanted) == config.max_loras:
            break
        wanted[adapter.lora_int_id] = adapter
    return wanted


def _adapters(requests: Iterable[Any]) -> Iterator[Any]:
    """Those of unfinished requests; without pooling models, whose clients take no error for a request."""
    for request in requests:
        if request.lora_request is not None and request.sampling_params is not None and not request.is_finished():
            yield request.lora_request


def _end(core: Any, adapter: Any, problem: str) -> list[Any]:
    """Take all requests of an adapter out of the scheduler, and say why."""
    requests = core.scheduler.requests.values()
    asked = [request for request in requests if request.lora_request == adapter and not request.is_finished()]
    status: Any = importlib.import_module("vllm.v1.request").RequestStatus
    core.scheduler.finish_requests([request.request_id for request in asked], status.FINISHED_ERROR)
    logger = importlib.import_module("vllm.logger").init_logger("vllm.plugins.xpu_lora_compile")
    logger.error(
        "xpu_lora_compile: ended %d requests of adapter %s, which is not in memory and cannot be read from %s: %s. "
        "Keep the folder of an adapter as it is until its requests are over. Load other files with `load_inplace`.",
        len(asked),
        adapter.lora_name,
        adapter.lora_path,
        problem,
    )
    return asked


def _apply_adapters(own: Any) -> Any:
    def _apply_adapters(manager: Any, lora_requests: Any) -> None:
        # Those that are there first: what is read for another takes the place of one that the step does not need. Then
        # by number, so that all processes give up the same ones: the order of a set differs.
        there = manager.list_adapters()
        order = sorted(lora_requests, key=lambda asked: (asked.lora_int_id not in there, asked.lora_int_id))
        own(manager, dict.fromkeys(order))

    return _apply_adapters
