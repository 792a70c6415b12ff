"""aLoRA, which counts from its invocation tokens on: PEFT's answer for each adapter alone, in a mixed batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_folders import edit_config, loaded_by_peft, quiet, save_adapter, tiny_llama
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import ArtifactError, BatchError, UnprovedRowsError, UnsupportedAdapterError

INVOCATION = [5, 9, 5]
# Twice, once and the last token cut off, nowhere, overlapping, at the very beginning, and behind padding on the left.
PROMPTS = torch.tensor(
    [
        [5, 9, 5, 7, 5, 9, 5, 8, 5, 9],
        [1, 2, 3, 4, 6, 7, 8, 9, 5, 9],
        [5, 9, 5, 9, 5, 1, 2, 3, 4, 6],
        [5, 9, 5, 3, 4, 6, 7, 8, 1, 2],
        [0, 0, 0, 0, 3, 5, 9, 5, 7, 8],
        [7, 5, 9, 5, 3, 1, 2, 4, 6, 8],
    ]
)
MASK = (PROMPTS != 0).long()
NAMES = ["activated", "activated", "activated", "plain", "activated", None]


def llama() -> nn.Module:
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("adapters")
    activated = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": INVOCATION}
    save_adapter(path / "activated", model=llama(), target_modules="all-linear", **activated)
    save_adapter(path / "other", model=llama(), target_modules=["q_proj", "lm_head"], seed=2,
                 **{**activated, "alora_invocation_tokens": [3, 1]})  # fmt: skip
    save_adapter(path / "plain", model=llama(), target_modules=["q_proj", "down_proj"], seed=1)
    return {name: path / name for name in ("activated", "other", "plain")}


@pytest.fixture
def served(folders: dict[str, Path]) -> tuple[nn.Module, xlc.AdapterBank]:
    torch._dynamo.reset()
    model = llama().requires_grad_(False)
    return model, xlc.attach(model, adapters=folders)


def by_peft(folder: Path | None, prompts: Tensor = PROMPTS, mask: Tensor = MASK, **options: Any) -> Tensor:
    model: Any = llama() if folder is None else loaded_by_peft(folder, llama())
    with torch.no_grad(), quiet():
        if options:
            return model.generate(input_ids=prompts, attention_mask=mask, **options)
        return model(input_ids=prompts, attention_mask=mask).logits


def assert_each(logits: Tensor, wanted: dict[str | None, Tensor], names: list[str | None]) -> None:
    for row, name in enumerate(names):
        is_token = MASK[row].bool()
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(logits[row][is_token], wanted[name][row][is_token], atol=2e-6 * largest, rtol=0)


def test_each_row_of_a_mixed_batch_has_pefts_logits(served: Any, folders: dict[str, Path]) -> None:
    model, bank = served
    wanted = {name: by_peft(folders.get(name or "")) for name in (*folders, None)}
    options = {"xpu_lora.execute": "eager"}
    compiled: Any = torch.compile(model, backend="xpu_lora", fullgraph=True, options=options)
    batches = [NAMES, ["other", "activated", None, "other", "plain", "activated"], ["activated"] * 6]
    for number, names in enumerate(batches):
        with bank.use(names, input_ids=PROMPTS):
            assert_each(model(input_ids=PROMPTS, attention_mask=MASK).logits, wanted, names)
        with torch.no_grad(), bank.use(names, input_ids=PROMPTS):
            assert_each(model(input_ids=PROMPTS, attention_mask=MASK).logits, wanted, names)
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                assert_each(compiled(input_ids=PROMPTS, attention_mask=MASK).logits, wanted, names)
    # The adapters make a difference, so that this shows something.
    assert (wanted["activated"][0] - wanted[None][0])[4:].abs().min(1).values.min() > 0
    torch.testing.assert_close(wanted["activated"][1], wanted[None][1])


def test_one_prompt_alone_has_pefts_logits(served: Any, folders: dict[str, Path]) -> None:
    model, bank = served
    compiled: Any = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    wanted = by_peft(folders["activated"], PROMPTS[:1], MASK[:1])
    for run in (model, compiled):
        with torch.no_grad(), bank.use(["activated"], input_ids=PROMPTS[:1]):
            torch.testing.assert_close(run(input_ids=PROMPTS[:1]).logits, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_generate_goes_on_with_the_adapter_as_peft_does(served: Any, folders: dict[str, Path], way: str) -> None:
    model, bank = served
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = {name: by_peft(folders.get(name or ""), **options) for name in ("activated", "plain", None)}
    if way == "compiled":
        model.compile(backend="xpu_lora", options={"xpu_lora.execute": "eager"})
        options["cache_implementation"] = "static"
    with bank.use(NAMES, input_ids=PROMPTS), quiet():
        tokens = model.generate(input_ids=PROMPTS, attention_mask=MASK, **options)
    for row, name in enumerate(NAMES):
        assert tokens[row].tolist() == wanted[name][row].tolist()
    assert wanted["activated"][0].tolist() != wanted[None][0].tolist()


def test_nan_of_an_adapter_reaches_no_prompt_without_its_invocation(served: Any) -> None:
    model, bank = served
    slot = bank._slots.index("activated")
    with torch.no_grad(), bank.use([None] * 6):
        base = model(input_ids=PROMPTS, attention_mask=MASK).logits
    for layer in bank._layers.values():
        layer.lora_a[slot] = torch.nan
    with torch.no_grad(), bank.use(["activated"] * 6, input_ids=PROMPTS):
        logits = model(input_ids=PROMPTS, attention_mask=MASK).logits
    assert torch.equal(logits[1], base[1])
    assert logits[0, 4:].isnan().all()


def test_what_was_compiled_before_is_not_used_for_it(folders: dict[str, Path]) -> None:
    torch._dynamo.reset()
    model: Any = llama().requires_grad_(False)
    bank = xlc.attach(model, adapters={"plain": folders["plain"]}, target_modules="all-linear", max_rank=4)
    compiled: Any = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    with torch.no_grad(), bank.use(["plain", None] * 3):
        compiled(PROMPTS, MASK)
    with bank.use(["plain", None] * 3):
        # As another thread may.
        bank.load("activated", folders["activated"])
        wanted = {name: by_peft(folders.get(name or "")) for name in ("activated", "plain", None)}
        with torch.no_grad():
            assert_each(model(PROMPTS, MASK).logits, wanted, ["plain", None] * 3)
    with torch.no_grad(), bank.use(NAMES, input_ids=PROMPTS):
        assert_each(compiled(PROMPTS, MASK).logits, wanted, NAMES)


def test_plain_adapters_of_the_bank_need_no_prompts(served: Any, folders: dict[str, Path]) -> None:
    model, bank = served
    with torch.no_grad(), bank.use(["plain"] * 6):
        torch.testing.assert_close(model(PROMPTS, MASK).logits, by_peft(folders["plain"]), atol=2e-5, rtol=2e-5)
    packed = {"position_ids": torch.arange(10).repeat(6)[None], "use_cache": False}
    with torch.no_grad(), bank.use(["plain"] * 6, lengths=[10] * 6):
        logits = model(PROMPTS.view(1, 60), **packed).logits.view(6, 10, -1)
    wanted = by_peft(folders["plain"], PROMPTS, torch.ones_like(MASK))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(BatchError, match=r"integers \[6, tokens\]"), bank.use(NAMES):
        pass
    for wrong in (PROMPTS > 3, PROMPTS.tolist()):
        with pytest.raises(BatchError, match=r"integers \[6, tokens\]"), bank.use(NAMES, input_ids=wrong):
            pass
    with pytest.raises(BatchError, match="6 prompts, one for each name; got 2"), bank.use(NAMES, input_ids=PROMPTS[:2]):
        pass


def test_what_peft_cannot_do_with_it_is_refused(served: Any, tmp_path: Path) -> None:
    model, bank = served
    options = {"max_new_tokens": 2, "pad_token_id": 0}
    with bank.use(NAMES, input_ids=PROMPTS):
        for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}):
            with pytest.raises(BatchError, match="adapters with invocation tokens"):
                model.generate(PROMPTS, attention_mask=MASK, **options, **more)
        with pytest.raises(BatchError, match="the prompts of the block"):
            model.generate(PROMPTS, attention_mask=MASK, **options, prefill_chunk_size=4)
    with (
        pytest.raises(BatchError, match="packed"),
        bank.use(["activated", None], lengths=[5, 5], input_ids=PROMPTS[:1]),
    ):
        pass
    with pytest.raises(UnsupportedAdapterError, match="alora_invocation_tokens"):
        bank.trainable(["activated"])
    with pytest.raises(ArtifactError, match="alora_invocation_tokens"):
        xlc.export(model, tmp_path / "served.pt2", (PROMPTS,))
    bank.drop("activated")
    with torch.no_grad(), bank.use(["plain"] * 6):
        model(PROMPTS)


@pytest.mark.parametrize("execution", ["eager", "compiled"])
@torch.no_grad()
def test_other_prompts_than_those_of_the_block_are_refused(served: Any, execution: str) -> None:
    model, bank = served
    run: Any = model if execution == "eager" else torch.compile(model, backend="eager")
    with bank.use(NAMES, input_ids=PROMPTS):
        run(PROMPTS, MASK)
        for others in (PROMPTS.flip(0), PROMPTS[:, 2:], torch.cat([PROMPTS, PROMPTS[:, :1]], 1)):
            with pytest.raises(BatchError, match="the prompts of the block, or one token of each behind them"):
                run(others)
        cache = run(PROMPTS, MASK, use_cache=True).past_key_values
        with pytest.raises(BatchError, match="one token of each"):
            run(PROMPTS[:, :4], past_key_values=cache)


def test_rows_that_are_not_those_of_prompts_are_refused(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.proj = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.proj(self.embed(input_ids).view(-1, 8)).view(*input_ids.shape, 8)

    model = Flat().eval()
    save_adapter(tmp_path, model=copy.deepcopy(model), target_modules=["proj"])
    edit_config(tmp_path, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION)
    bank = xlc.attach(model, adapters={"a": tmp_path})
    with (
        torch.no_grad(),
        pytest.raises(UnprovedRowsError, match="invocation tokens"),
        bank.use(["a", None] * 3, input_ids=PROMPTS),
    ):
        model(PROMPTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"task_type": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_more_than_peft_activates_is_refused(folders: dict[str, Path], tmp_path: Path, changes: Any) -> None:
    bank = xlc.attach(llama())
    for file in folders["activated"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedAdapterError, match=f"an aLoRA of A and B alone.*{next(iter(changes))}"):
        bank.load("a", tmp_path)


def test_embeddings_and_several_adapters_for_a_row_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(tmp_path, model=llama(), target_modules=["embed_tokens"])
    edit_config(tmp_path, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION)
    bank = xlc.attach(llama(), target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedAdapterError, match=r"aLoRA on linear layers; got model\.embed_tokens"):
        bank.load("a", tmp_path)
    bank = xlc.attach(llama(), adapters_per_row=2)
    with pytest.raises(UnsupportedAdapterError, match="adapters for all tokens"):
        bank.load("a", folders["activated"])
