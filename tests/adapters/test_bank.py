"""The bank: what it computes equals PEFT, nothing recompiles, and what fails changes nothing."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.cases import DEVICE
from support.peft_folders import CASES, edited_weights, loaded_by_peft, save_adapter, tiny_llama
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import xpu_lora_compile as xlc
from xpu_lora_compile import errors
from xpu_lora_compile.adapters.checkpoint import WEIGHTS_FILE
from xpu_lora_compile.adapters.staging import Staged

EVERYWHERE = "(q|k|v|o|gate|up|down)_proj|lm_head|embed_tokens".join((r".*\.?(", ")"))
TOKENS = torch.randint(0, 70, (4, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums in float32; two adapters here differ by far more, as a test below shows."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different targets and ranks, by name."""
    top = tmp_path_factory.mktemp("adapters")
    lora = {
        "pirate": {"target_modules": ["q_proj", "v_proj"], "r": 4},
        "haiku": {"target_modules": ["k_proj", "lm_head"], "r": 2, "use_rslora": True},
        "telegram": {"target_modules": "all-linear", "r": 3},
        "shouting": {"target_modules": ["embed_tokens", "down_proj"], "r": 4},
    }
    return {name: save_adapter(top / name, seed=seed, **lora[name]) for seed, name in enumerate(lora)}


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    return tiny_llama().requires_grad_(False).to(DEVICE)


@pytest.fixture
def bank(model: nn.Module) -> xlc.AdapterBank:
    return xlc.attach(model, slots=3, max_rank=4, target_modules=EVERYWHERE)


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str | None, Tensor]:
    """The logits that PEFT gives with each adapter alone, and without any."""
    with torch.no_grad():
        return {
            None: tiny_llama().to(DEVICE)(TOKENS).logits,
            **{name: loaded_by_peft(folder).to(DEVICE)(TOKENS).logits for name, folder in folders.items()},
        }


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_adapter_computes_what_peft_computes(case: str, model: nn.Module, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / case, **CASES[case])
    bank = xlc.attach(model, slots=2, max_rank=5, target_modules=EVERYWHERE)
    bank.load(case, folder)
    with bank.use([case] * len(TOKENS)):
        logits = model(TOKENS).logits
    with torch.no_grad():
        peft = loaded_by_peft(folder).to(DEVICE)(TOKENS).logits
    assert_same_logits(logits, peft)
    assert not torch.allclose(peft, tiny_llama().to(DEVICE)(TOKENS).logits, atol=1e-2)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad-mode"])
@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_every_row_is_answered_by_its_own_adapter(
    execution: str,
    grad: bool,
    model: nn.Module,
    bank: xlc.AdapterBank,
    folders: dict[str, Path],
    expected: dict[str | None, Tensor],
) -> None:
    for name in ("pirate", "haiku", "shouting"):
        bank.load(name, folders[name])
    run = torch.compile(model, backend="xpu_lora", fullgraph=True) if execution == "compiled" else model
    if grad:
        model.requires_grad_(True)
    with torch.set_grad_enabled(grad):
        for names in (["pirate", None, "haiku", "shouting"], ["haiku", "haiku", "pirate", None]):
            with bank.use(names):
                logits = run(TOKENS).logits
            for row, name in enumerate(names):
                assert_same_logits(logits[row], expected[name][row])
        assert_same_logits(run(TOKENS).logits, expected[None])


def test_nothing_recompiles_over_200_changes(
    model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    choose = random.Random(0)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    bank.load("pirate", folders["pirate"])
    for _ in range(200):
        name = choose.choice([name for name in folders if name not in bank.names])
        if len(bank.names) == 3 or (bank.names and choose.random() < 0.3):
            bank.drop(choose.choice(bank.names))
        else:
            bank.load(name, folders[name])
        names = choose.choices([*bank.names, None], k=len(TOKENS))
        with bank.use(names), torch.no_grad():
            logits = compiled(TOKENS).logits
        for row, one in enumerate(names):
            assert_same_logits(logits[row], expected[one][row])
    assert counter.frame_count == 1


def test_a_dynamic_batch_compiles_once(
    model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    choose = random.Random(0)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    bank.load("pirate", folders["pirate"])
    bank.load("haiku", folders["haiku"])
    for _ in range(40):
        rows = choose.choices(range(len(TOKENS)), k=choose.randint(2, 9))
        names = choose.choices(["pirate", "haiku", None], k=len(rows))
        with bank.use(names), torch.no_grad():
            logits = compiled(TOKENS[rows]).logits
        for position, (row, name) in enumerate(zip(rows, names, strict=True)):
            assert_same_logits(logits[position], expected[name][row])
    assert counter.frame_count == 1


def state_of(bank: xlc.AdapterBank) -> tuple[object, ...]:
    stacks = [stack.clone() for layer in bank._layers.values() for stack in (layer.lora_a, layer.lora_b)]
    return bank.names, list(bank._slots), bank._routing.sequence_slots, stacks


def missing(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def wrong_shape(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = tensors[name][:, 1:].contiguous()


def stranger(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def hostile(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def nan(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        # In the tensor that is read last.
        tensors[sorted(tensors)[-1]][0, 0] = torch.nan


BROKEN: dict[str, tuple[Callable[[Path], None], type[errors.LoraError]]] = {
    "missing": (missing, errors.AdapterFileError),
    "wrong shape": (wrong_shape, errors.AdapterShapeError),
    "stranger": (stranger, errors.UnmatchedTensorError),
    "truncated": (truncated, errors.AdapterFileError),
    "hostile": (hostile, errors.AdapterFileError),
    "nan": (nan, errors.NonFiniteWeightError),
}


@pytest.fixture
def unchanged(bank: xlc.AdapterBank, folders: dict[str, Path]) -> Iterator[xlc.AdapterBank]:
    """A bank with one adapter, which must be bit for bit the same after the test."""
    bank.load("haiku", folders["haiku"])
    before = state_of(bank)
    yield bank
    after = state_of(bank)
    assert after[:3] == before[:3]
    assert all(torch.equal(one, other) for one, other in zip(before[3], after[3], strict=True))


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_leaves_the_bank_as_it_was(
    how: str, unchanged: xlc.AdapterBank, folders: dict[str, Path], tmp_path: Path
) -> None:
    damage, error = BROKEN[how]
    folder = shutil.copytree(folders["pirate"], tmp_path / "broken")
    damage(folder)
    with pytest.raises(error, match="broken"):
        unchanged.load("pirate", folder)


def test_a_rank_above_the_banks_is_refused(unchanged: xlc.AdapterBank, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "high", target_modules=["q_proj"], r=5)
    with pytest.raises(errors.RankError, match="max_rank=5"):
        unchanged.load("high", folder)


def test_a_second_adapter_of_the_same_name_is_refused(unchanged: xlc.AdapterBank, folders: dict[str, Path]) -> None:
    with pytest.raises(errors.DuplicateAdapterError, match="haiku"):
        unchanged.load("haiku", folders["pirate"])


@pytest.mark.parametrize("name", ["", None, 3, ("haiku",)])
def test_a_name_that_is_no_name_is_refused(name: object, unchanged: xlc.AdapterBank, folders: dict[str, Path]) -> None:
    with pytest.raises(errors.AdapterError, match="name"):
        unchanged.load(name, folders["pirate"])  # type: ignore[arg-type]


def test_a_full_bank_refuses_and_names_what_it_holds(bank: xlc.AdapterBank, folders: dict[str, Path]) -> None:
    for name in ("pirate", "haiku", "telegram"):
        bank.load(name, folders[name])
    with pytest.raises(errors.NoFreeSlotError, match="3 slots, all taken by pirate, haiku, telegram"):
        bank.load("shouting", folders["shouting"])
    assert bank.names == ("pirate", "haiku", "telegram")


@pytest.mark.parametrize("names", [["nobody"], ["haiku", "nobody"], [3]])
def test_an_unknown_adapter_is_refused(names: list[str], unchanged: xlc.AdapterBank) -> None:
    with pytest.raises(errors.UnknownAdapterError, match="one of haiku"), unchanged.use(names):
        pass
    with pytest.raises(errors.UnknownAdapterError, match="one of haiku"):
        unchanged.drop("nobody")


@pytest.mark.parametrize("names", ["haiku", [], None, 5, {"haiku"}, torch.tensor([1])], ids=str)
def test_names_that_are_no_list_are_refused(names: object, unchanged: xlc.AdapterBank) -> None:
    with pytest.raises(errors.BatchError, match="a list with a name"), unchanged.use(names):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("execution", ["eager", "compiled", "fullgraph"])
def test_a_batch_of_another_size_is_refused(execution: str, model: nn.Module, unchanged: xlc.AdapterBank) -> None:
    run = model if execution == "eager" else torch.compile(model, backend="eager", fullgraph=execution == "fullgraph")
    with pytest.raises(errors.BatchError, match="3 names for a batch of 4"), unchanged.use(["haiku"] * 3):
        run(TOKENS)


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_a_model_that_was_moved_inside_a_block_is_refused(
    execution: str, model: nn.Module, bank: xlc.AdapterBank
) -> None:
    run = model if execution == "eager" else torch.compile(model, backend="eager")
    with bank.use([None] * 4):
        model.to("meta")
        with pytest.raises(errors.BatchError, match=r"Move the model before the block"):
            run(TOKENS.to("meta"))


def test_a_dropped_slot_keeps_nothing_of_its_adapter(
    model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    bank.load("telegram", folders["telegram"])
    bank.drop("telegram")
    assert all(not stack.any() for stack in state_of(bank)[3])
    bank.load("pirate", folders["pirate"])
    with bank.use(["pirate"] * 4):
        assert_same_logits(model(TOKENS).logits, expected["pirate"])


def test_an_adapter_in_use_cannot_be_dropped(bank: xlc.AdapterBank, folders: dict[str, Path]) -> None:
    bank.load("pirate", folders["pirate"])
    with bank.use(["pirate"]), bank.use([None]), pytest.raises(errors.BankInUseError, match="pirate"):
        bank.drop("pirate")
    bank.drop("pirate")


def test_an_inner_block_gives_way_to_the_outer_one(
    model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    bank.load("pirate", folders["pirate"])
    with bank.use(["pirate"] * 4):
        with bank.use([None] * 4):
            assert_same_logits(model(TOKENS).logits, expected[None])
        assert_same_logits(model(TOKENS).logits, expected["pirate"])


def test_an_error_in_the_block_ends_it(bank: xlc.AdapterBank, folders: dict[str, Path]) -> None:
    bank.load("pirate", folders["pirate"])
    with pytest.raises(ZeroDivisionError), bank.use(["pirate"]):
        raise ZeroDivisionError
    bank.drop("pirate")


def test_only_one_thread_can_use_the_bank_while_another_may_load(
    bank: xlc.AdapterBank, folders: dict[str, Path]
) -> None:
    bank.load("pirate", folders["pirate"])
    seen: list[type[BaseException] | None] = []

    def other() -> None:
        bank.load("haiku", folders["haiku"])
        try:
            with bank.use(["haiku"]):
                seen.append(None)
        except errors.BankInUseError as error:
            seen.append(type(error))

    with bank.use(["pirate"]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other_again = threading.Thread(target=lambda: (bank.drop("haiku"), other()))
    other_again.start()
    other_again.join()
    assert seen == [errors.BankInUseError, None]


def test_two_tasks_of_one_thread_do_not_share_the_bank(
    model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    for name in ("pirate", "haiku"):
        bank.load(name, folders[name])

    async def serve(name: str) -> Tensor:
        with bank.use([name] * 4):
            await asyncio.sleep(0)
            return model(TOKENS).logits

    async def both() -> list[object]:
        return await asyncio.gather(serve("pirate"), serve("haiku"), return_exceptions=True)

    first, second = asyncio.run(both())
    assert_same_logits(first, expected["pirate"])
    assert isinstance(second, errors.BankInUseError)
    with bank.use(["haiku"] * 4):
        assert_same_logits(model(TOKENS).logits, expected["haiku"])


def test_blocks_that_close_out_of_order_protect_what_is_still_in_use(
    bank: xlc.AdapterBank, folders: dict[str, Path]
) -> None:
    for name in ("pirate", "haiku"):
        bank.load(name, folders[name])
    first, second = bank.use(["pirate"]), bank.use(["haiku"])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(errors.BankInUseError, match="haiku"):
        bank.drop("haiku")
    bank.drop("pirate")
    second.__exit__(None, None, None)
    bank.drop("haiku")


def test_a_block_that_cannot_open_leaves_the_bank_as_it_was(
    model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    bank.load("pirate", folders["pirate"])
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(errors.AdapterError, match="FakeTensor"):
        bank.use(["pirate"] * 4).__enter__()
    with torch.device("meta"), bank.use(["pirate"] * 4):
        pass
    with bank.use(["pirate"] * 4):
        assert_same_logits(model(TOKENS).logits, expected["pirate"])
    bank.detach()


def interrupted_half_way(staged: Staged, slot: int, *_: object) -> None:
    for stacks, block in next(iter(staged._blocks.values())):
        for stack, values in list(zip(stacks, block.slots, strict=True))[: len(stacks) // 2]:
            stack[slot].copy_(values)
    raise KeyboardInterrupt


def test_a_load_that_was_interrupted_leaves_nothing_in_the_slot(
    model: nn.Module,
    bank: xlc.AdapterBank,
    folders: dict[str, Path],
    expected: dict[str | None, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Staged, "store", interrupted_half_way)
        with pytest.raises(KeyboardInterrupt):
            bank.load("telegram", folders["telegram"])
    assert bank.names == ()
    assert all(not stack.any() for stack in state_of(bank)[3])
    bank.load("pirate", folders["pirate"])
    with bank.use(["pirate"] * 4):
        assert_same_logits(model(TOKENS).logits, expected["pirate"])


def test_a_module_that_was_replaced_or_hooked_is_noticed(
    model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path]
) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    with pytest.raises(errors.AdapterError, match=r"q_proj.*forward was replaced"):
        bank.detach()
    del layer.forward
    model.lm_head = nn.Linear(32, 70)
    with pytest.raises(errors.AdapterError, match="lm_head"):
        bank.load("pirate", folders["pirate"])


@pytest.mark.parametrize("folder", [None, 5, b"/tmp"])
def test_a_folder_that_is_no_path_is_refused(folder: object, unchanged: xlc.AdapterBank) -> None:
    with pytest.raises(errors.AdapterError, match="path of a PEFT folder"):
        unchanged.load("pirate", folder)  # type: ignore[arg-type]


def test_use_inside_inference_mode_and_then_outside(
    model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    with torch.inference_mode():
        bank.load("pirate", folders["pirate"])
        with bank.use(["pirate"] * 4):
            model(TOKENS)
    bank.load("haiku", folders["haiku"])
    with bank.use(["haiku"] * 4):
        assert_same_logits(model(TOKENS).logits, expected["haiku"])


def test_the_order_of_names_is_that_of_the_slots(bank: xlc.AdapterBank, folders: dict[str, Path]) -> None:
    for name in ("pirate", "haiku"):
        bank.load(name, folders[name])
    bank.drop("pirate")
    bank.load("telegram", folders["telegram"])
    assert bank.names == ("telegram", "haiku")
    assert repr(bank).startswith("AdapterBank(telegram, haiku; 2 of 3 slots taken, max_rank=4, ")


def test_the_ranks_of_the_slots_follow_what_is_loaded_and_dropped(
    bank: xlc.AdapterBank, folders: dict[str, Path], tmp_path: Path
) -> None:
    """In the same memory, since captured graphs read it."""
    with bank.use([None] * 4):
        if DEVICE.type == "cpu":
            # Whose kernel asks for none; from here on as on a GPU.
            assert bank._routing.ranks is None
            bank._routing.ranks = torch.tensor(bank._ranks, dtype=torch.int32)
        ranks = bank._routing.ranks
        assert ranks is not None
        said = [ranks.tolist()]
        for name in ("pirate", "haiku", "telegram"):
            bank.load(name, folders[name])
            said.append(ranks.tolist())
        with pytest.raises(errors.NoFreeSlotError):
            bank.load("shouting", folders["shouting"])
        bank.drop("haiku")
        said.append(ranks.tolist())
        with pytest.raises(errors.AdapterError):
            bank.load("broken", tmp_path)
        said.append(ranks.tolist())
        # The highest of its ranks.
        pattern = {"target_modules": ["q_proj", "v_proj"], "r": 1, "rank_pattern": {"v_proj": 4}}
        bank.load("mixed", save_adapter(tmp_path / "mixed", **pattern))
        said.append(ranks.tolist())
        assert bank._routing.ranks is ranks
    assert said == [[0, 0, 0], [4, 0, 0], [4, 2, 0], [4, 2, 3], [4, 0, 3], [4, 0, 3], [4, 4, 3]]


def test_no_rank_is_said_while_weights_are_stored(
    bank: xlc.AdapterBank, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted load leaves a slot of rank 0."""
    bank.load("pirate", folders["pirate"])
    monkeypatch.setattr(Staged, "store", interrupted_half_way)
    with bank.use(["pirate"] * 4), pytest.raises(KeyboardInterrupt):
        bank.load("telegram", folders["telegram"])
    assert bank._ranks == [4, 0, 0]
