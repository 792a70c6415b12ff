"""Adapters that are loaded, replaced and removed while requests run: each answer is whole that of one version."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.vllm_soak import Reference, Row, tiny_llama
from xpu_lora_compile.integrations import vllm_loads

# Of the reference's prompts: too short for a cached prefix, and long enough for one.
SHORT, LONG = 0, 4


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("loads")
    return Reference(folder, tiny_llama(folder / "model"), adapters=6, seed=0)


@pytest.fixture(scope="module")
def engine(reference: Reference) -> Any:
    """Two slots and two adapters in memory."""
    from integrations.conftest import Engine

    return Engine(
        reference.model,
        max_loras=2,
        max_cpu_loras=2,
        max_lora_rank=8,
        max_num_seqs=8,
        block_size=32,
        enforce_eager=True,
    )


class Requests:
    """Requests to an engine that runs step by step."""

    def __init__(self, engine: Any, reference: Reference) -> None:
        self.engine, self.reference = engine.llm.llm_engine, reference
        self.outputs: dict[str, Any] = {}
        self.count = 0

    def ask(self, lora: Any, prompt: int = LONG, tokens: int = 12) -> str:
        """Add one, and do not run it."""
        from vllm import SamplingParams

        self.count += 1
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0)
        prompt_ids = {"prompt_token_ids": self.reference.prompts[prompt]}
        self.engine.add_request(str(self.count), prompt_ids, sampling, lora_request=lora)
        return str(self.count)

    def step(self, steps: int | None = None) -> None:
        """Some steps, or all that are left."""
        while self.engine.has_unfinished_requests() and steps != 0:
            self.outputs |= {output.request_id: output for output in self.engine.step() if output.finished}
            steps = None if steps is None else steps - 1

    def answered_as(self, number: str, adapter: Path | None, prompt: int = LONG) -> bool:
        """Whether a request's tokens and their log-probabilities are those of this adapter alone."""
        (completion,) = self.outputs[number].outputs
        tokens = list(completion.token_ids)
        values = [each[token].logprob for each, token in zip(completion.logprobs, tokens, strict=True)]
        return self.reference.is_row(adapter, prompt, Row(tokens, values, [], 0))


@pytest.fixture
def requests(engine: Any, reference: Reference) -> Requests:
    return Requests(engine, reference)


def named(name: str, path: Path, **options: Any) -> Any:
    """What vLLM is asked for by this name; each name has a number of its own."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, sum(map(ord, name)), str(path), **options)


@pytest.fixture
def lora(engine: Any) -> Iterator[Callable[..., Any]]:
    """The same, and all are removed in the end."""
    made = set()

    def lora(name: str, path: Path, **options: Any) -> Any:
        asked = named(name, path, **options)
        made.add(asked.lora_int_id)
        return asked

    yield lora
    for number in made:
        engine.llm.llm_engine.remove_lora(number)


def test_a_request_keeps_the_version_that_it_began_with(
    engine: Any, reference: Reference, requests: Requests, lora: Any
) -> None:
    old, new = reference.adapters[:2]
    first = requests.ask(lora("in-place", old))
    requests.step(4)
    assert engine.llm.llm_engine.add_lora(lora("in-place", new, load_inplace=True))
    second = requests.ask(lora("in-place", new))
    # Underway since before the load, it comes after it.
    third = requests.ask(lora("in-place", old))
    requests.step()
    assert requests.answered_as(second, new)
    assert requests.answered_as(first, old)
    assert requests.answered_as(third, old)


@pytest.mark.parametrize("again", ["in place", "by name"])
def test_what_is_cached_of_a_prefix_is_not_the_new_versions(
    engine: Any, reference: Reference, requests: Requests, lora: Any, tmp_path: Path, again: str
) -> None:
    from vllm.lora.request import LoRARequest

    old, new = reference.adapters[1:3]
    folder = shutil.copytree(old, tmp_path / "adapter")
    asked = lora(f"rewritten, {again}", folder)
    for cached in (0, 64):
        first = requests.ask(asked)
        requests.step()
        assert requests.answered_as(first, old)
        assert requests.outputs[first].num_cached_tokens == cached
    shutil.rmtree(folder)
    shutil.copytree(new, folder)
    if again == "in place":
        engine.llm.llm_engine.add_lora(lora(f"rewritten, {again}", folder, load_inplace=True))
    else:
        # The server numbers a name that was unloaded anew.
        asked = LoRARequest(asked.lora_name, 9000, str(folder))
        engine.llm.llm_engine.add_lora(asked)
    second = requests.ask(asked)
    requests.step()
    assert requests.answered_as(second, new)
    assert requests.outputs[second].num_cached_tokens == 0


def test_a_request_that_waits_does_not_bring_the_old_version_back(
    engine: Any, reference: Reference, requests: Requests, lora: Any
) -> None:
    old, new, *others = reference.adapters[:4]
    running = [requests.ask(lora(f"other {number}", path)) for number, path in enumerate(others)]
    waiting = requests.ask(lora("waits", old))
    requests.step(2)
    engine.llm.llm_engine.add_lora(lora("waits", new, load_inplace=True))
    after = requests.ask(lora("waits", new))
    requests.step()
    assert all(requests.answered_as(number, path) for number, path in zip(running, others, strict=True))
    assert requests.answered_as(waiting, old)
    assert requests.answered_as(after, new)


def test_a_version_that_cannot_be_loaded_leaves_the_old_one(
    engine: Any, reference: Reference, requests: Requests, lora: Any, tmp_path: Path
) -> None:
    old = reference.adapters[0]
    engine.llm.llm_engine.add_lora(lora("stays", old))
    with pytest.raises(Exception, match=r"No adapter found|not found|does not exist"):
        engine.llm.llm_engine.add_lora(lora("stays", tmp_path / "missing", load_inplace=True))
    number = requests.ask(lora("stays", old))
    requests.step()
    assert requests.answered_as(number, old)


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_request_whose_files_are_not_as_they_were_ends_and_the_others_go_on(
    engine: Any, reference: Reference, requests: Requests, lora: Any, tmp_path: Path, what: str
) -> None:
    others = reference.adapters[:2]
    folder = shutil.copytree(reference.adapters[2], tmp_path / "adapter")
    engine.llm.llm_engine.add_lora(lora(what, folder))
    # In memory, it is not read again.
    shutil.rmtree(folder)
    if what == "changed":
        shutil.copytree(reference.adapters[3], folder)
    first = requests.ask(lora(what, folder))
    requests.step()
    assert requests.answered_as(first, reference.adapters[2])
    running = [requests.ask(lora(f"beside {what} {number}", path)) for number, path in enumerate(others)]
    requests.step(1)
    second = requests.ask(lora(what, folder))
    requests.step()
    assert requests.outputs[second].outputs[0].finish_reason == "error"
    assert requests.outputs[second].outputs[0].token_ids == []
    assert all(requests.answered_as(number, path) for number, path in zip(running, others, strict=True))


def test_a_request_whose_adapter_cannot_be_found_ends_and_the_next_is_answered(
    reference: Reference, requests: Requests, lora: Any, tmp_path: Path
) -> None:
    lost = requests.ask(lora("lost", tmp_path / "nowhere"))
    requests.step()
    assert requests.outputs[lost].outputs[0].finish_reason == "error"
    found = requests.ask(lora("found", reference.adapters[0]))
    requests.step()
    assert requests.answered_as(found, reference.adapters[0])


def test_files_are_read_again_when_a_request_asks_for_it_and_they_have_changed(
    reference: Reference, requests: Requests, lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    own, read = WorkerLoRAManager._load_adapter, []

    def _load_adapter(manager: Any, asked: Any) -> Any:
        read.append(asked.lora_name)
        return own(manager, asked)

    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", _load_adapter)
    folder = tmp_path / "adapter"
    for adapter in reference.adapters[2:4]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter, folder)
        numbers = [requests.ask(lora("flagged", folder, load_inplace=True)) for _ in range(2)]
        requests.step()
        assert all(requests.answered_as(number, adapter) for number in numbers)
    assert read == ["flagged", "flagged (load 2)"]


def test_adapters_are_known_by_the_users_number(
    engine: Any, reference: Reference, requests: Requests, lora: Any
) -> None:
    core = engine.llm.llm_engine
    asked = lora("numbered", reference.adapters[0])
    core.add_lora(asked)
    core.add_lora(lora("numbered", reference.adapters[1], load_inplace=True))
    assert asked.lora_int_id in core.list_loras()
    assert max(core.list_loras()) < vllm_loads.FIRST_OF_LATER_LOADS
    assert core.remove_lora(asked.lora_int_id)
    assert asked.lora_int_id not in core.list_loras()


def test_a_step_reads_no_adapter_that_it_gives_up_for_another(engine: Any, reference: Reference, lora: Any) -> None:
    used, unused, new = (lora(f"kept {number}", path) for number, path in enumerate(reference.adapters[:3]))
    manager = engine.runner.lora_manager
    # The one that is needed was not used for longest.
    for asked in (used, unused):
        manager.add_adapter(asked)
    kept = manager._adapter_manager.get_adapter(used.lora_int_id)
    manager._apply_adapters(dict.fromkeys([new, used]))
    assert manager.list_adapters() == {used.lora_int_id, new.lora_int_id}
    assert manager._adapter_manager.get_adapter(used.lora_int_id) is kept


class Core:
    """An engine that notes what it is asked, with two processes that share a model."""

    def __init__(self, answers: tuple[Any, ...] = (True, True)) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))
        self.model_executor = self
        self.answers = answers
        self.asked: list[Any] = []
        self.removed: list[int] = []
        self.in_memory: list[set[int]] = [set(), set()]
        self.pinned: set[int] = set()

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """One answer of each process."""
        if method == "list_loras":
            return self.in_memory
        (self.asked if method == "add_lora" else self.removed).extend(args)
        return list(self.answers)

    def preprocess_add_request(self, request: Any) -> Any:
        """Note it."""
        return request

    def pin_lora(self, number: int) -> bool:
        """Note it."""
        self.pinned.add(number)
        return True

    def remove_lora(self, number: int) -> bool:
        """Note it."""
        self.pinned.remove(number)
        return True

    pin_lora = vllm_loads._pin_lora(pin_lora)
    preprocess_add_request = vllm_loads._preprocess_add_request(preprocess_add_request)
    add_lora = vllm_loads._add_lora(collective_rpc)


def test_what_an_encoder_returned_for_one_version_is_not_anothers() -> None:
    core, names = Core(), []
    for in_place in (False, True):
        asked = named("a:b", Path("folder"), load_inplace=in_place)
        assert core.add_lora(asked)
        features = [SimpleNamespace(identifier="a:b:1234"), SimpleNamespace(identifier="5678")]
        request = core.preprocess_add_request(
            SimpleNamespace(lora_request=named("a:b", Path("folder")), mm_features=features)
        )
        names.append([feature.identifier for feature in request.mm_features])
        assert request.lora_request.lora_int_id == core.asked[-1].lora_int_id
    assert names == [["a:b:1234", "5678"], ["a:b (load 2):1234", "5678"]]


def test_processes_that_share_a_model_answer_with_a_refusal() -> None:
    def refuse(runner: Any, asked: Any) -> bool:
        raise ValueError(f"adapter {asked.lora_name}: no")

    runner = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=2)))
    answer = vllm_loads._answer_with_refusals(refuse)
    core = Core()
    core.add_lora(named("refused", Path("folder")))
    # The other has read it.
    core.answers = (True, answer(runner, named("refused (load 2)", Path("other"))))
    with pytest.raises(RuntimeError, match=r"^adapter refused: no$"):
        core.add_lora(named("refused", Path("other"), load_inplace=True))
    assert core.removed == [core.asked[-1].lora_int_id]
    runner.vllm_config.parallel_config.world_size = 1
    with pytest.raises(ValueError, match="no"):
        answer(runner, named("refused", Path("folder")))


def test_a_pinned_version_does_not_keep_its_slot_from_the_next() -> None:
    core = Core()
    core.add_lora(named("pinned", Path("folder")))
    core.add_lora(named("beside", Path("folder")))
    for name in ("pinned", "beside"):
        assert core.pin_lora(named(name, Path("folder")).lora_int_id)
    core.add_lora(named("pinned", Path("folder"), load_inplace=True))
    assert core.pinned == {named("beside", Path("folder")).lora_int_id}


def test_changed_files_are_no_problem_where_every_process_has_the_adapter(tmp_path: Path) -> None:
    core = Core()
    (tmp_path / "adapter_config.json").write_text("old")
    core.add_lora(named("changes", tmp_path))
    (tmp_path / "adapter_config.json").write_text("newer")
    (adapter,) = core.asked
    core.in_memory = [{adapter.lora_int_id}, {adapter.lora_int_id}]
    assert vllm_loads._problem(core, adapter) == ""
    core.in_memory[1].clear()
    assert "gone, or not those that were loaded" in vllm_loads._problem(core, adapter)
    assert len(core.asked) == 2


class Scheduler:
    """Requests that run and wait, with the adapters of these names; it chooses as it likes."""

    def __init__(self, core: Core, running: Sequence[Any], waiting: Sequence[Any]) -> None:
        some = {"sampling_params": object(), "mm_features": None, "ended": False}
        made = [
            SimpleNamespace(request_id=number, lora_request=asked, **some)
            for number, asked in enumerate((*running, *waiting))
        ]
        for request in made:
            request.is_finished = lambda request=request: request.ended
            core.preprocess_add_request(request)
        self.requests = {request.request_id: request for request in made}
        self.running, self.waiting, self.kv_holding_waiting = made[: len(running)], made[len(running) :], []
        core.scheduler = self
        core.vllm_config.lora_config = SimpleNamespace(max_loras=1)

    def finish_requests(self, numbers: Sequence[int], status: Any) -> None:
        """End them."""
        assert status.name == "FINISHED_ERROR"
        for number in numbers:
            self.requests[number].ended = True


def test_an_adapter_that_vllm_may_read_itself_has_the_files_that_were_loaded(tmp_path: Path) -> None:
    """With one slot, whichever of two waiting requests vLLM takes."""
    core, asked = Core(), [named(name, tmp_path / name) for name in ("first", "second")]
    for adapter in asked:
        Path(adapter.lora_path).mkdir()
        Path(adapter.lora_path, "adapter_config.json").write_text("old")
    scheduler = Scheduler(core, [], asked)
    assert vllm_loads._read_what_comes_next(core) == []
    assert [adapter.lora_name for adapter in core.asked] == ["first"]
    Path(asked[1].lora_path, "adapter_model.safetensors").write_text("one more")
    (ended,) = vllm_loads._read_what_comes_next(core)
    assert ended.lora_request.lora_name == "second"
    assert not scheduler.requests[0].ended


def test_files_that_cannot_be_seen_end_their_requests_alone(tmp_path: Path) -> None:
    core, asked = Core(), named("away", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text("old")
    Scheduler(core, [asked], [])
    file.unlink()
    file.symlink_to(file)
    (ended,) = vllm_loads._read_what_comes_next(core)
    assert ended.lora_request.lora_name == "away"
    assert core.asked == []


def test_files_that_were_refused_may_be_mended_where_they_are(tmp_path: Path) -> None:
    core, asked = Core(("refused", True)), named("mended", tmp_path)
    (tmp_path / "adapter_config.json").write_text("wrong")
    Scheduler(core, [asked], [])
    assert len(vllm_loads._read_what_comes_next(core)) == 1
    core.answers = (True, True)
    (tmp_path / "adapter_config.json").write_text("mended now")
    Scheduler(core, [asked], [])
    assert vllm_loads._read_what_comes_next(core) == []
    # What was read once stays the version of its requests.
    (tmp_path / "adapter_config.json").write_text("changed without a word")
    core.answers = ("refused", True)
    vllm_loads._forgetting(lambda core, *_: None)(core, "anything")
    Scheduler(core, [asked], [])
    assert len(vllm_loads._read_what_comes_next(core)) == 1


def test_what_was_read_is_read_again_once_the_memory_may_be_empty(tmp_path: Path) -> None:
    core, asked = Core(), named("emptied", tmp_path)
    (tmp_path / "adapter_config.json").write_text("old")
    Scheduler(core, [asked], [])
    change_of_weights = vllm_loads._forgetting(lambda core, *_: None)
    for _ in range(2):
        vllm_loads._read_what_comes_next(core)
    assert len(core.asked) == 1
    change_of_weights(core, "finish_weight_update")
    vllm_loads._read_what_comes_next(core)
    assert len(core.asked) == 2


def test_an_adapter_may_be_called_like_a_later_load_of_another() -> None:
    core = Core()
    core.add_lora(named("sql", Path("a")))
    core.add_lora(named("sql (load 2)", Path("c")))
    core.add_lora(named("sql", Path("b"), load_inplace=True))
    core.add_lora(named("sql (load 3)", Path("d")))
    assert len({load.lora_name for load in core.asked}) == len({load.lora_int_id for load in core.asked}) == 4
    assert core.asked[1].lora_name == "sql (load 2)"


def test_numbers_of_later_loads_fit_both_of_vllms_model_runners() -> None:
    from vllm.v1.worker.gpu.lora_utils import LoraState

    core = Core()
    taken = named("taken", Path("a"))
    taken.lora_int_id = vllm_loads.FIRST_OF_LATER_LOADS
    core.add_lora(taken)
    for in_place in (False, True):
        core.add_lora(named("again", Path("a"), load_inplace=in_place))
    state = LoraState(3)
    for row, load in enumerate(core.asked):
        state.add_request(str(row), row, load)
    assert state.lora_ids.tolist() == [load.lora_int_id for load in core.asked]
    assert len(set(state.lora_ids.tolist())) == 3
