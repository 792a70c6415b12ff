"""How an adapter comes into a bank: bit by bit what the file says, all of it or nothing, and nobody is disturbed."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import DEVICE
from support.peft_folders import CASES, edit_config, edited_weights, save_adapter, tiny_llama
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile import errors
from xpu_lora_compile.adapters import staging, upload
from xpu_lora_compile.adapters.checkpoint import WEIGHTS_FILE, are_finite, opened_checkpoint, read_checkpoint
from xpu_lora_compile.adapters.config import read_config
from xpu_lora_compile.adapters.cores import with_few_cores
from xpu_lora_compile.adapters.files import opened_safetensors
from xpu_lora_compile.adapters.names import BaseModel
from xpu_lora_compile.adapters.staging import Staged, Staging
from xpu_lora_compile.layers import HOSTS

EVERYWHERE = r".*(_proj|lm_head|embed_tokens)"
TOKENS = torch.randint(0, 70, (4, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
ON_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="asks for CUDA's streams")


def bank_of(slots: int = 3, dtype: torch.dtype | None = None, rank: int = 8) -> tuple[nn.Module, xlc.AdapterBank]:
    model = tiny_llama().requires_grad_(False).to(DEVICE)
    return model, xlc.attach(model, slots=slots, max_rank=rank, target_modules=EVERYWHERE, dtype=dtype)


def stacks_of(bank: xlc.AdapterBank) -> dict[tuple[str, str], Tensor]:
    return {(name, part): getattr(layer, part) for name, layer in bank._layers.items() for part in ("lora_a", "lora_b")}


def wanted_slots(model: nn.Module, bank: xlc.AdapterBank, folder: Path) -> dict[tuple[str, str], Tensor]:
    """What a slot must hold, from tensors that are read one by one and stored one by one."""
    weights = read_checkpoint(folder, read_config(folder), bank.sites, BaseModel.of(model, HOSTS), 8)
    slots = {}
    for name, layer in bank._layers.items():
        a, b = torch.zeros(layer.lora_a.shape[1:]), torch.zeros(layer.lora_b.shape[1:])
        if (pair := weights.get(name)) is not None:
            is_table = isinstance(layer, nn.Embedding)
            (a.t() if is_table else a)[: pair.a.shape[0], : pair.a.shape[1]] = pair.a
            b[: pair.b.shape[0], : pair.b.shape[1]] = pair.b
        slots |= {(name, "lora_a"): a.to(layer.lora_a.dtype), (name, "lora_b"): b.to(layer.lora_b.dtype)}
    return slots


def assert_slot_holds(model: nn.Module, bank: xlc.AdapterBank, slot: int, folder: Path) -> None:
    for place, wanted in wanted_slots(model, bank, folder).items():
        assert torch.equal(stacks_of(bank)[place][slot].cpu(), wanted), place


def as_dtype(folder: Path, *dtypes: torch.dtype) -> Path:
    with edited_weights(folder) as tensors:
        for position, key in enumerate(sorted(tensors)):
            tensors[key] = tensors[key].to(dtypes[position % len(dtypes)])
    return folder


HALF = (torch.bfloat16, torch.float16)
FILES = {"fp32": (torch.float32,), "bf16": HALF[:1], "fp16": HALF[1:], "mixed": (torch.float32, *HALF)}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("case", ["rank_pattern", "alpha_pattern", "rslora", "list", "all-linear"])
def test_a_slot_holds_what_the_file_says(case: str, file: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = as_dtype(save_adapter(tmp_path, **CASES[case]), *FILES[file])
    model, bank = bank_of(dtype=dtype)
    for stack in stacks_of(bank).values():
        # Nothing of what was there before may stay.
        stack[0] = torch.nan
    bank.load("a", folder)
    assert_slot_holds(model, bank, 0, folder)


@pytest.mark.parametrize("case", ["embedding", "embedding-and-lm_head"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_vocabulary_and_copies_of_base_weights_in_the_file(case: str, slots: int, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, **CASES[case])
    model, bank = bank_of(slots)
    bank.load("a", folder)
    assert_slot_holds(model, bank, 0, folder)


def test_what_one_adapter_has_and_the_next_has_not_is_zero(tmp_path: Path) -> None:
    model, bank = bank_of(1)
    for name in ("all-linear", "list", "rank_pattern", "lm_head", "list", "all-linear"):
        folder = save_adapter(tmp_path / name, **CASES[name])
        bank.load(name, folder)
        assert_slot_holds(model, bank, 0, folder)
        bank.drop(name)


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_a_file_whose_values_lie_askew(extra: int, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, **CASES["list"])
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
    text = json.dumps(header).encode()
    text += b" " * (extra - len(text) % 4 + 4)
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    model, bank = bank_of()
    bank.load("a", folder)
    assert_slot_holds(model, bank, 0, folder)


def test_many_small_pieces_are_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_PIECE", 500)
    folder = save_adapter(tmp_path, **CASES["embedding-and-lm_head"])
    model, bank = bank_of()
    bank.load("a", folder)
    assert_slot_holds(model, bank, 0, folder)


class DoubleOfCuda:
    """Does at once what CUDA does in the order of a stream, and notes what was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        empty, done = torch.empty, self.done

        class Event:
            def record(self) -> None:
                done.append("record")

            def synchronize(self) -> None:
                done.append("wait")

        def make(*sizes: int, pin_memory: bool = False, **options: Any) -> Tensor:
            return empty(*sizes, **options).fill_(255)

        monkeypatch.setattr(torch, "empty", make)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(upload, "side_stream", lambda _: None)


@pytest.mark.parametrize("piece", [1, 100, 4096, 2**23])
def test_an_upload_brings_every_byte(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = as_dtype(save_adapter(tmp_path, **CASES["list"]), *FILES["mixed"])
    monkeypatch.setattr(upload, "_PIECE", piece)
    cuda = DoubleOfCuda(monkeypatch)
    with opened_safetensors(folder / WEIGHTS_FILE) as file:
        keys = sorted(file.keys())[1:]
        runs = upload.runs_of(file, keys)
        block = upload.upload(file, runs, torch.device("cpu"))
        assert sorted(key for run in runs for key in run.keys) == keys
        for run in runs:
            got = block[run.at : run.at + run.size]
            assert torch.equal(got, file.bytes_of(run.start, run.start + run.size))
    # A piece of pinned memory is written to after the copy that read it.
    assert cuda.done == ["wait", "record"] * sum(-(-run.size // piece) for run in runs)


def test_the_few_cores_are_those_of_loads_alone() -> None:
    before = torch.get_num_threads()
    few = with_few_cores(torch.get_num_threads)
    cores = len(os.sched_getaffinity(0))
    assert few == min(4, max(1, cores // 4))
    assert torch.get_num_threads() == before
    found: list[int] = []
    thread, _ = in_thread(lambda: found.append(torch.get_num_threads()))
    thread.join()
    assert found == [before]


def test_an_error_of_what_runs_with_few_cores_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        with_few_cores(lambda: 1 / 0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("file", FILES)
def test_the_way_of_cuda_gives_the_same_bits(
    file: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run on the CPU, but for the upload itself."""

    def bytes_in_place(file: Any, runs: list[upload.Run], _device: object) -> Tensor:
        block = torch.full((runs[-1].at + runs[-1].size,), 255, dtype=torch.uint8)
        for run in runs:
            assert run.at % 16 == 0
            block[run.at : run.at + run.size] = file.bytes_of(run.start, run.start + run.size)
        return block

    monkeypatch.setattr(staging, "upload", bytes_in_place)
    folder = as_dtype(save_adapter(tmp_path, **CASES["embedding-and-lm_head"]), *FILES[file])
    model = tiny_llama()
    bank = xlc.attach(model, slots=1, max_rank=8, target_modules=EVERYWHERE, dtype=dtype)
    layers = bank._layers
    stacks = list(stacks_of(bank).values())
    with opened_checkpoint(folder, read_config(folder), bank.sites, BaseModel.of(model, HOSTS), 8) as checkpoint:
        block = staging._Block(stacks, torch.device("cpu"), dtype)
        staging._fill_on_cuda(block, checkpoint, layers)
    for values, wanted in zip(block.slots, wanted_slots(model, bank, folder).values(), strict=True):
        assert torch.equal(values, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    for size in (1, 7, 100, 40_000):
        values = torch.randn(size, device=DEVICE).to(dtype)
        assert are_finite(values)
        for place in {0, size // 2, size - 1}:
            kept = values[place].clone()
            values[place] = value
            assert not are_finite(values)
            values[place] = kept


@pytest.mark.parametrize("alpha", [0, 1e299])
def test_a_scaling_at_the_ends_of_what_a_number_is(alpha: float, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, **CASES["list"])
    edit_config(folder, lora_alpha=alpha)
    model, bank = bank_of()
    if alpha:
        with pytest.raises(errors.NonFiniteWeightError, match="after scaling"):
            bank.load("a", folder)
    else:
        bank.load("a", folder)
        assert_slot_holds(model, bank, 0, folder)


def test_the_module_with_the_bad_value_is_named_and_the_next_load_is_right(tmp_path: Path) -> None:
    good, bad = (save_adapter(tmp_path / name, **CASES["all-linear"]) for name in ("good", "bad"))
    with edited_weights(bad) as tensors:
        key = next(key for key in sorted(tensors) if "layers.1" in key and "lora_B" in key)
        tensors[key][1, 1] = torch.inf
    model, bank = bank_of(1)
    with pytest.raises(errors.NonFiniteWeightError, match=key):
        bank.load("a", bad)
    bank.load("a", good)
    assert_slot_holds(model, bank, 0, good)


def test_the_stacks_stay_where_they_are(tmp_path: Path) -> None:
    """Compiled code and captured graphs go on reading there."""
    folder = save_adapter(tmp_path, **CASES["all-linear"])
    _, bank = bank_of(2)

    def places() -> list[tuple[int, tuple[int, ...]]]:
        return [(stack.data_ptr(), stack.stride()) for stack in stacks_of(bank).values()]

    before = places()
    for name in ("a", "b"):
        bank.load(name, folder)
    bank.drop("a")
    bank.load("c", folder)
    assert places() == before


def test_the_memory_of_a_model_that_was_moved_is_not_kept(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, **CASES["list"])
    model, bank = bank_of()
    bank.load("a", folder)
    before = [weakref.ref(stack) for stack in stacks_of(bank).values()]
    model.to(torch.bfloat16)
    gc.collect()
    assert all(stack() is None for stack in before)
    bank.drop("a")
    bank.load("b", folder)
    assert_slot_holds(model, bank, 0, folder)
    assert [dtype for _, dtype in bank._staging._idle] == [torch.bfloat16]
    bank.detach()
    assert not bank._staging._idle


class Held:
    """Keeps loads from storing until it is told to let them go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.goes = threading.Event(), threading.Event()
        store = Staged.store

        def hold(staged: Staged, *rest: Any) -> None:
            self.reached.set()
            assert self.goes.wait(60)
            store(staged, *rest)

        monkeypatch.setattr(Staged, "store", hold)


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_an_adapter_is_not_there_before_all_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_adapter(tmp_path, **CASES["all-linear"])
    model, bank = bank_of(2)
    held = Held(monkeypatch)
    thread, raised = in_thread(lambda: bank.load("a", folder))
    assert held.reached.wait(60)
    # Whoever serves is not kept waiting.
    with bank.use([None] * 4):
        model(TOKENS)
    with pytest.raises(errors.UnknownAdapterError), bank.use(["a"]):
        pass
    assert bank.names == ()
    with pytest.raises(errors.DuplicateAdapterError):
        bank.load("a", folder)
    held.goes.set()
    thread.join()
    assert not raised
    assert bank.names == ("a",)
    assert_slot_holds(model, bank, 0, folder)


def test_a_slot_that_is_being_filled_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_adapter(tmp_path, **CASES["list"])
    model, bank = bank_of(1)
    with monkeypatch.context() as patch:
        held = Held(patch)
        thread, raised = in_thread(lambda: bank.load("a", folder))
        assert held.reached.wait(60)
        with pytest.raises(errors.NoFreeSlotError, match="all taken by a"):
            bank.load("b", folder)
        held.goes.set()
        thread.join()
    assert not raised
    bank.drop("a")
    bank.load("b", folder)
    assert_slot_holds(model, bank, 0, folder)


def test_a_bank_that_is_detached_meanwhile_gets_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_adapter(tmp_path, **CASES["list"])
    _, bank = bank_of()
    held = Held(monkeypatch)
    thread, raised = in_thread(lambda: bank.load("a", folder))
    assert held.reached.wait(60)
    bank.detach()
    held.goes.set()
    thread.join()
    assert [type(error) for error in raised] == [errors.AdapterError]
    assert bank.names == ()


def test_loads_of_many_threads_while_one_serves(tmp_path: Path) -> None:
    names = ["list", "all-linear", "rank_pattern", "lm_head"]
    folders = {name: save_adapter(tmp_path / name, seed=seed, **CASES[name]) for seed, name in enumerate(names)}
    model, bank = bank_of(4)
    bank.load("list", folders["list"])
    wrong: list[float] = []
    begun, ends = threading.Event(), threading.Event()

    def serve() -> None:
        with torch.no_grad():
            with bank.use(["list", None] * 2):
                wanted = model(TOKENS).logits.clone()
            while not ends.is_set():
                begun.set()
                with bank.use(["list", None] * 2):
                    wrong.append(float((model(TOKENS).logits - wanted).abs().max()))
            with bank.use(["list", None] * 2):
                wrong.append(float((model(TOKENS).logits - wanted).abs().max()))

    def swap(name: str) -> None:
        for _ in range(10):
            bank.load(name, folders[name])
            assert_slot_holds(model, bank, bank._slots.index(name), folders[name])
            bank.drop(name)
        bank.load(name, folders[name])

    serving, raised = in_thread(serve)
    assert begun.wait(60)
    loading = [in_thread(lambda name=name: swap(name)) for name in names[1:]]
    for thread, its in loading:
        thread.join()
        raised += its
    ends.set()
    serving.join()
    assert not raised
    assert wrong
    assert max(wrong) < 1e-5
    assert sorted(bank.names) == sorted(names)
    for name in names:
        assert_slot_holds(model, bank, bank._slots.index(name), folders[name])


def test_a_load_that_ends_waits_for_one_that_begins(tmp_path: Path) -> None:
    """Each takes the memory of the load before, or puts its own back; what one goes through the other would change."""
    folder = save_adapter(tmp_path, **CASES["list"])
    _, bank = bank_of()
    bank.load("a", folder)
    begun: list[tuple[threading.Thread, list[BaseException]]] = []

    class Devices(list[object]):
        def __contains__(self, device: object) -> bool:
            begun.append(in_thread(lambda: bank.load("b", folder)))
            begun[0][0].join(1)
            return True

    bank._staging._keep({}, Devices())
    ((thread, raised),) = begun
    thread.join()
    assert not raised
    assert bank.names == ("a", "b")


def test_pythons_turns_are_as_long_as_before_when_a_load_ends(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, **CASES["list"])
    _, bank = bank_of()
    before = sys.getswitchinterval()
    with staging.short_turns():
        assert sys.getswitchinterval() < before
        bank.load("a", folder)
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == before
    with pytest.raises(errors.AdapterFileError):
        bank.load("b", tmp_path / "nowhere")
    assert sys.getswitchinterval() == before
    with staging.short_turns():
        sys.setswitchinterval(before * 2)
    assert sys.getswitchinterval() == before * 2
    sys.setswitchinterval(before)


def test_a_part_beyond_the_end_of_the_file_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, **CASES["list"])
    with opened_safetensors(folder / WEIGHTS_FILE) as file:
        end = max(file.span(key)[1] for key in file.keys())  # noqa: SIM118 - no dictionary
        assert file.bytes_of(end - 4, end).numel() == 4
        with pytest.raises(errors.AdapterFileError, match=f"at least {end + 1} bytes"):
            file.bytes_of(end - 4, end + 1)


def test_memory_is_used_again(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, **CASES["list"])
    _, bank = bank_of()
    used = []
    for name in ("a", "b"):
        bank.load(name, folder)
        used += [block.flat.data_ptr() for block in bank._staging._idle.values()]
    assert len(used) == 2
    assert used[0] == used[1]
    assert isinstance(bank._staging, Staging)


@ON_CUDA
def test_work_that_was_left_on_another_stream_reads_the_old_adapter(tmp_path: Path) -> None:
    old, new = (save_adapter(tmp_path / name, seed=seed, **CASES["all-linear"]) for seed, name in enumerate("ab"))
    model, bank = bank_of(1)
    bank.load("old", old)
    with torch.no_grad(), bank.use(["old"] * 4):
        wanted = model(TOKENS).logits.clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(stream), bank.use(["old"] * 4):
        torch.cuda._sleep(500_000_000)
        got = model(TOKENS).logits
    bank.drop("old")
    bank.load("new", new)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert_slot_holds(model, bank, 0, new)


@ON_CUDA
def test_a_captured_graph_sees_the_swap(tmp_path: Path) -> None:
    old, new = (save_adapter(tmp_path / name, seed=seed, **CASES["all-linear"]) for seed, name in enumerate("ab"))
    model, bank = bank_of(1)
    bank.load("x", old)
    wanted = []
    with torch.no_grad():
        with bank.use(["x"] * 4):
            for _ in range(3):
                model(TOKENS)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = model(TOKENS).logits
        for folder in (new, old, new):
            bank.drop("x")
            bank.load("x", folder)
            with bank.use(["x"] * 4):
                graph.replay()
                wanted.append((logits.clone(), model(TOKENS).logits.clone()))
    for replayed, eager in wanted:
        torch.testing.assert_close(replayed, eager, atol=1e-4, rtol=1e-4)
    assert (wanted[0][0] - wanted[1][0]).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="asks for fork")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="a process that was forked may not use the device of its parent")
def test_a_process_that_was_forked_after_a_load_loads_too(tmp_path: Path) -> None:
    _model, bank = bank_of()
    save_adapter(tmp_path / "x", **CASES["list"])
    bank.load("before", tmp_path / "x")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        bank.load("after", tmp_path / "x")
        os._exit(0 if bank.names == ("before", "after") else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("it hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_file_that_was_cut_short_since_it_was_opened_is_an_error(tmp_path: Path) -> None:
    save_adapter(tmp_path / "x", **CASES["list"])
    path = tmp_path / "x" / WEIGHTS_FILE
    with opened_safetensors(path) as file:
        start, end = max(map(file.span, file.keys()))
        os.truncate(path, start + 1)
        with pytest.raises(errors.AdapterFileError, match=f"wanted at least {end} bytes; got {start + 1}"):
            file.bytes_of(start, end)


def test_what_a_failed_load_has_made_is_not_for_the_next(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, bank = bank_of()
    save_adapter(tmp_path / "x", **CASES["list"])
    with FakeTensorMode(), pytest.raises((AssertionError, RuntimeError, errors.LoraError)):
        bank.load("x", tmp_path / "x")
    bank.load("x", tmp_path / "x")
    for key, values in wanted_slots(model, bank, tmp_path / "x").items():
        assert torch.equal(stacks_of(bank)[key][0].cpu(), values), key


def test_stacks_that_require_gradients_are_loaded_without_any(tmp_path: Path) -> None:
    _model, bank = bank_of()
    save_adapter(tmp_path / "x", **CASES["list"])
    for layer in bank._layers.values():
        layer.lora_a.requires_grad_(True)
    bank.load("x", tmp_path / "x")
    bank.drop("x")
    bank.load("x", tmp_path / "x")
    assert bank.names == ("x",)
