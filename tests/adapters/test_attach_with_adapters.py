"""`attach(model, adapters=...)`, wrapped models and parts of models; and what a bank says of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.peft_folders import edit_config, edited_weights, loaded_by_peft, quiet, save_adapter, tiny_llama
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import AdapterError, AttachError, NoFreeSlotError, UnmatchedTensorError
from xpu_lora_compile.layers.host import LoraLayer

TOKENS = torch.randint(0, 70, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "pirate": save_adapter(tmp_path / "pirate", target_modules=["q_proj"], r=4),
        "haiku": save_adapter(tmp_path / "haiku", seed=1, target_modules=["layers.1.mlp.up_proj", "k_proj"], r=6),
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def assert_as_peft(model: nn.Module, bank: xlc.AdapterBank, folders: dict[str, Path], run: Any = None) -> None:
    with bank.use(list(folders)):
        got = logits(model if run is None else run)
    for row, folder in enumerate(folders.values()):
        expected = logits(loaded_by_peft(folder))[row]
        # Where there is a GPU, DataParallel moves the model to it.
        torch.testing.assert_close(got[row].cpu(), expected, atol=1e-5, rtol=1e-4)


def test_modules_and_rank_are_read_from_the_folders(folders: dict[str, Path]) -> None:
    model = tiny_llama()
    bank = xlc.attach(model, adapters=folders)
    assert set(bank.sites) == {
        *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "k_proj")),
        "model.layers.1.mlp.up_proj",
    }
    assert bank.names == ("pirate", "haiku")
    assert model.model.layers[0].self_attn.q_proj.lora_a.shape == (8, 6, 32)
    assert_as_peft(model, bank, folders)


def test_exactly_the_modules_of_the_files_are_covered(tmp_path: Path) -> None:
    """And not those whose names end alike."""
    nested = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    save_adapter(tmp_path, model=copy.deepcopy(nested), target_modules=r"0")
    assert set(xlc.attach(nested, adapters={"a": tmp_path}).sites) == {"0"}


def test_what_the_caller_says_comes_first(folders: dict[str, Path]) -> None:
    model = tiny_llama()
    bank = xlc.attach(model, adapters=folders, slots=2, max_rank=9, target_modules="all-linear", dtype=torch.bfloat16)
    assert len(bank.sites) == 14
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.lora_a.shape, layer.lora_a.dtype) == ((2, 9, 32), torch.bfloat16)


def test_there_is_a_slot_for_each_adapter(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", target_modules=["q_proj"])
    bank = xlc.attach(tiny_llama(), adapters={str(number): folder for number in range(9)})
    assert len(bank.names) == 9
    with pytest.raises(NoFreeSlotError):
        bank.load("another", folder)


def test_no_adapters_are_as_none_given() -> None:
    model = tiny_llama()
    assert len(xlc.attach(model, adapters={}).sites) == 14
    assert model.model.layers[0].self_attn.q_proj.lora_a.shape == (8, 16, 32)


@pytest.mark.parametrize("sizes", [(60, 70), (128, 70), (70,)], ids=str)
def test_the_vocabulary_is_that_of_the_largest_adapter(sizes: tuple[int, ...], tmp_path: Path) -> None:
    folders = {
        str(size): save_adapter(
            tmp_path / str(size), model=tiny_llama(vocab_size=size), target_modules=["lm_head"],
            save_embedding_layers=False,
        )
        for size in sizes
    }  # fmt: skip
    bank = xlc.attach(tiny_llama(vocab_size=128), adapters=folders)
    assert bank.sites["lm_head"].out_features == max(sizes)


def test_a_vocabulary_beyond_the_models_is_refused_with_the_adapters_name(tmp_path: Path) -> None:
    model, larger = tiny_llama(vocab_size=128), tiny_llama(vocab_size=150)
    save_adapter(tmp_path, model=larger, target_modules=["lm_head"], save_embedding_layers=False)
    with pytest.raises(AdapterError, match=r"adapter 'large', .*at most 128"):
        xlc.attach(model, adapters={"large": tmp_path})


def spoil_values(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        next(iter(tensors.values()))[0, 0] = float("nan")


def spoil_names(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors["stranger"] = torch.ones(1)


def empty(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors.clear()


SPOILS: dict[str, Callable[[Path], None]] = {
    "values": spoil_values,
    "names": spoil_names,
    "empty": empty,
    "config": lambda folder: edit_config(folder, use_dora=True),
    "no-config": lambda folder: (folder / "adapter_config.json").unlink(),
}


@pytest.mark.parametrize("case", SPOILS)
def test_where_one_adapter_fails_the_model_is_untouched_and_the_error_names_it(
    case: str, folders: dict[str, Path]
) -> None:
    model = tiny_llama()
    before = logits(model)
    SPOILS[case](folders["haiku"])
    with pytest.raises(AdapterError, match=r"^adapter 'haiku', "):
        xlc.attach(model, adapters=folders)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert torch.equal(logits(model), before)
    xlc.attach(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"adapters": ["a"]}, "a mapping of names and folders; got list"),
        ({"adapters": {"a": "x", "b": "y"}, "slots": 1}, "a slot for each of 2 adapters; got 1. Pass slots=2"),
        ({"adapters": {"a": 3}}, "the path of a PEFT folder; got 3"),
    ],
    ids=["list", "slots", "number"],
)
def test_wrong_calls_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises((AttachError, AdapterError), match=message):
        xlc.attach(tiny_llama(), **call)


def test_an_adapter_without_a_name_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match="a string that is not empty"):
        xlc.attach(tiny_llama(), adapters={"": folders["pirate"]})


# --- wrapped models, and parts of models ---------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "DDP-of-compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "checkpointed": checkpoint_wrapper,
}


@pytest.mark.parametrize("case", WRAPS)
@pytest.mark.usefixtures("process_group")
def test_attach_sees_through_what_wraps_a_model(case: str, folders: dict[str, Path]) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    wrapped = WRAPS[case](model)
    logits(wrapped)
    bank = xlc.attach(wrapped)
    assert "model.layers.0.self_attn.q_proj" in bank.sites
    for name, folder in folders.items():
        bank.load(name, folder)
    assert_as_peft(model, bank, folders, wrapped)
    bank.detach()
    torch.testing.assert_close(logits(wrapped).cpu(), logits(tiny_llama()))


@pytest.mark.usefixtures("process_group")
def test_a_model_whose_weights_fsdp_has_cut_up_is_refused() -> None:
    with quiet():
        sharded = torch.distributed.fsdp.FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu"))
    with pytest.raises(AttachError, match="one that FSDP has cut up"):
        xlc.attach(sharded)


def test_wrapped_blocks_have_their_plain_names(folders: dict[str, Path]) -> None:
    model = tiny_llama()
    model.model.layers[0] = compiled(model.model.layers[0])
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    bank = xlc.attach(model, target_modules=["q_proj", "k_proj", "layers.1.mlp.up_proj"])
    assert "model.layers.0.self_attn.q_proj" in bank.sites
    assert "model.layers.1.self_attn.q_proj" in bank.sites
    for name, folder in folders.items():
        bank.load(name, folder)
    assert_as_peft(model, bank, folders)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r"model\.layers\.1\..*_proj"], ids=str)
def test_an_adapter_of_the_whole_model_fits_the_part_that_computes_its_layers(targets: Any, tmp_path: Path) -> None:
    lora = {"rank_pattern": {r"model\.layers\.1.*": 2}} if targets == ["q_proj"] else {}
    expected = logits(loaded_by_peft(save_adapter(tmp_path, target_modules=targets, **lora)))
    model = tiny_llama()
    bank = xlc.attach(model.model)
    bank.load("a", tmp_path)
    with bank.use(["a", "a"]):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    bank.detach()
    assert len(xlc.attach(model.model, adapters={"a": tmp_path}).sites) == {"all-linear": 14}.get(str(targets), len(
        loaded_layers(tmp_path)
    ))  # fmt: skip


def loaded_layers(folder: Path) -> list[str]:
    with edited_weights(folder) as tensors:
        return [key for key in tensors if key.endswith("lora_A.weight")]


def test_an_adapter_of_the_part_sends_the_reader_there(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=tiny_llama().model, target_modules=["q_proj"])
    model = tiny_llama()
    with pytest.raises(UnmatchedTensorError, match=r"attach to that, with xlc\.attach\(model\.model\)"):
        xlc.attach(model).load("a", tmp_path)
    bank = xlc.attach(tiny_llama().model)
    bank.load("a", tmp_path)
    assert bank.names == ("a",)


def test_an_adapter_on_the_head_does_not_fit_the_part_without_it(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj", "lm_head"], save_embedding_layers=False)
    with pytest.raises(UnmatchedTensorError, match=r"LoRA on lm_head\. Use the model that the adapter was trained on"):
        xlc.attach(tiny_llama().model).load("a", tmp_path)


def test_adapters_of_peft_can_be_taken_off_as_the_refusal_says() -> None:
    with quiet():
        wrapped = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(AttachError, match=r"peft_model\.unload\(\)"):
            xlc.attach(compiled(wrapped.get_base_model()))
        assert len(xlc.attach(wrapped.unload()).sites) == 14


def test_modules_that_cannot_carry_lora_can_be_excluded_as_the_refusal_says() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    with pytest.raises(AttachError, match=r"exclude_modules=\['attention\.out_proj'\]"):
        xlc.attach(model)
    assert set(xlc.attach(model, exclude_modules=["attention.out_proj"]).sites) == {"linear"}


# --- what a bank says ----------------------------------------------------------------------------------------------


def test_a_bank_says_what_it_holds_and_loading_prints_nothing(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bank = xlc.attach(tiny_llama(), adapters=folders, slots=4)
    held = [
        "AdapterBank(pirate, haiku; 2 of 4 slots taken, max_rank=6, 5 modules, 29.2 kB)",
        "  pirate  rank 4 on 2 modules",
        "  haiku   rank 6 on 3 modules",
    ]
    assert repr(bank) == str(bank) == "\n".join(held)
    bank.drop("pirate")
    assert str(bank).splitlines()[1:] == ["  haiku  rank 6 on 3 modules"]
    bank.detach()
    assert repr(bank).startswith("AdapterBank(empty; 0 of 4 slots taken")
    assert capfd.readouterr() == ("", "")
