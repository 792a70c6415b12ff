"""DoRA, biases and weights of an adapter's own: PEFT's result for each adapter alone, in one batch with others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import quantized_models as models
from support import stand_ins
from support.peft_folders import edit_config, edited_weights, quiet, save_adapter
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.extras import EMPTY, HEAD_SLOTS, HEADS, SCALES, SHIFTS
from xpu_lora_compile.errors import (
    AdapterError,
    AdapterShapeError,
    ArtifactError,
    AttachError,
    CopiedModelError,
    NonFiniteWeightError,
    UnmatchedTensorError,
    UnsupportedAdapterError,
)
from xpu_lora_compile.layers import HOSTS
from xpu_lora_compile.layers.host import LoraLayer, full_name

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(1, 70, (5, 6), generator=torch.Generator().manual_seed(3))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 70}


def with_biases(model: nn.Module) -> nn.Module:
    """The model, whose biases are zeros by default, with others."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def qwen(**options: Any) -> nn.Module:
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, **options)
    return with_biases(transformers.Qwen2ForCausalLM(config))


def tied_qwen() -> nn.Module:
    return qwen(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    return with_biases(models.gpt2())


def llama_classifier() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def roberta_classifier() -> nn.Module:
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=32)
    return with_biases(transformers.RobertaForSequenceClassification(config))


def distilbert_classifier() -> nn.Module:
    config = transformers.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=70)
    return with_biases(transformers.DistilBertForSequenceClassification(config))


def bert_tagger() -> nn.Module:
    return with_biases(transformers.BertForTokenClassification(transformers.BertConfig(**SIZES)))


Lora = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, and what two of its adapters are trained with; a third adapter is plain LoRA."""

    make: Callable[[], nn.Module]
    first: Lora
    second: Lora
    plain: Lora = field(default_factory=lambda: {"target_modules": ["q_proj", "up_proj"]})
    tolerance: float = 5e-6


DORA: Lora = {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}
SEQ_CLS: Lora = {"task_type": "SEQ_CLS"}
CASES = {
    "DoRA beside a bias": Case(qwen, DORA, {"use_dora": True, "target_modules": ["v_proj"], "use_rslora": True}),
    "DoRA of Conv1D": Case(
        gpt2,
        {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"lora_bias": True, "target_modules": ["c_proj"], "fan_in_fan_out": True},
        {"target_modules": ["c_fc"]},
    ),
    "DoRA of embeddings": Case(
        qwen,
        {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
        {"use_dora": True, "target_modules": ["embed_tokens"], "rank_pattern": {"embed_tokens": 2}},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ),
    "DoRA of embeddings that scale": Case(
        models.gemma3, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}, {**DORA, "r": 2}
    ),
    "biases of B": Case(
        qwen,
        {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
        {"lora_bias": True, "target_modules": ["k_proj"], "use_rslora": True},
    ),
    "biases of layers with LoRA": Case(
        qwen,
        {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
        {"bias": "lora_only", "use_dora": True, "target_modules": ["v_proj"]},
    ),
    "all biases": Case(
        qwen,
        {"bias": "all", "target_modules": ["q_proj", "up_proj"]},
        {"bias": "all", "lora_bias": True, "target_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    ),
    "score": Case(
        llama_classifier,
        {**SEQ_CLS, "target_modules": ["q_proj"]},
        {**SEQ_CLS, "target_modules": "all-linear", "use_dora": True},
    ),
    "a head of two layers": Case(
        roberta_classifier,
        {**SEQ_CLS, "target_modules": ["query", "value"]},
        {**SEQ_CLS, "target_modules": ["query", "dense"], "bias": "lora_only"},
        {"target_modules": ["query", "out_proj"]},
    ),
    "names that end alike": Case(
        distilbert_classifier,
        {**SEQ_CLS, "target_modules": ["q_lin"]},
        {**SEQ_CLS, "target_modules": ["q_lin", "v_lin"], "use_dora": True},
        {"target_modules": ["q_lin", "pre_classifier"]},
    ),
    "tags": Case(
        bert_tagger,
        {"task_type": "TOKEN_CLS", "target_modules": ["query"]},
        {"task_type": "TOKEN_CLS", "target_modules": ["query", "key"], "lora_bias": True},
        {"target_modules": ["query", "value"]},
    ),
    "embeddings and lm_head": Case(
        qwen,
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"target_modules": ["lm_head", "embed_tokens"]},
    ),
    "tied embeddings": Case(
        tied_qwen,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    ),
    "embeddings that scale": Case(
        models.gemma3,
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        {**DORA, "modules_to_save": ["lm_head"]},
    ),
}


SOME, OTHERS = list(range(1, 30)), [int(TOKENS[2, 0]), 45]
for _name, _make in {
    "tokens": qwen,
    "tokens of tied embeddings": tied_qwen,
    "tokens that scale": models.gemma3,
}.items():
    CASES[_name] = Case(
        _make,
        {"trainable_token_indices": SOME, "target_modules": ["q_proj"]},
        {"trainable_token_indices": {"embed_tokens": OTHERS}, "target_modules": ["v_proj"], "use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    )


def save(folder: Path, make: Callable[[], nn.Module], seed: int, **lora: Any) -> Path:
    """Let PEFT save an adapter of which all that it trains has other values than before."""
    with quiet(), torch.random.fork_rng():
        model = get_peft_model(models.seeded(make), LoraConfig(**{"r": 4, "lora_alpha": 6, **lora}))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.data.normal_(std=0.3)
        # Copies of the base model's embeddings are of no use to the tests.
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits_of_peft(make: Callable[[], nn.Module], folder: Path) -> Tensor:
    with quiet(), torch.no_grad():
        return PeftModel.from_pretrained(models.seeded(make), folder).eval()(TOKENS).logits


@dataclass(frozen=True)
class Saved:
    case: Case
    folders: dict[str, Path]
    base: Tensor
    alone: dict[str, Tensor]

    def attached(self, **options: Any) -> tuple[Any, xlc.AdapterBank]:
        model = models.seeded(self.case.make)
        return model, xlc.attach(model, adapters=self.folders, **options)

    def assert_right(self, logits: Tensor, names: list[str | None]) -> None:
        rows = [self.base[row] if name is None else self.alone[name][row] for row, name in enumerate(names)]
        torch.testing.assert_close(logits, torch.stack(rows), atol=self.case.tolerance, rtol=1e-5)


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("adapters")
    loras = {"first": case.first, "second": case.second, "plain": case.plain}
    folders = {name: save(folder / name, case.make, seed, **lora) for seed, (name, lora) in enumerate(loras.items())}
    with torch.no_grad():
        base = models.seeded(case.make)(TOKENS).logits
    alone = {name: logits_of_peft(case.make, path) for name, path in folders.items()}
    # Hundreds of times what rounding makes of it.
    assert all(float((logits - base).abs().max()) > 2e-3 for logits in alone.values())
    return Saved(case, folders, base, alone)


NAMES: list[str | None] = ["first", None, "second", "plain", "first"]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad-mode"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_rows_of_a_mixed_batch_are_those_of_peft(saved: Saved, way: str, grad: bool) -> None:
    torch._dynamo.reset()
    model, bank = saved.attached()
    run = model
    if way == "compiled":
        run = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    with torch.set_grad_enabled(grad):
        with bank.use(NAMES):
            saved.assert_right(run(TOKENS).logits, NAMES)
        # Whatever the others are, in the same graph.
        names = ["plain", "second", None, None, None]
        with bank.use(names), torch.compiler.set_stance("fail_on_recompile"):
            logits = run(TOKENS).logits
    saved.assert_right(logits, names)
    assert torch.equal(logits[2:], saved.base[2:]) or way == "compiled"
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, saved.base)


@torch.no_grad()
def test_a_slot_keeps_nothing_of_the_adapter_before(saved: Saved) -> None:
    model, bank = saved.attached()
    for name in saved.folders:
        bank.drop(name)
    for before, after in (("first", "plain"), ("second", "first"), ("plain", "second"), ("first", "second")):
        bank.load("a", saved.folders[before])
        bank.drop("a")
        bank.load("b", saved.folders[after])
        assert bank._slots[0] == "b"
        with bank.use(["b", None, "b", None, None]):
            saved.assert_right(model(TOKENS).logits, [after, None, after, None, None])
        bank.drop("b")


@torch.no_grad()
def test_nothing_of_an_unused_slot_reaches_a_row(saved: Saved) -> None:
    model, bank = saved.attached()
    unused = bank._slots.index("second")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for stack in (layer.lora_a, layer.lora_b, *layer.lora_extras.values()):
                if stack.is_floating_point():
                    stack[unused] = torch.nan
    names = ["first", None, None, "plain", "first"]
    with bank.use(names):
        saved.assert_right(model(TOKENS).logits, names)


@torch.no_grad()
def test_a_model_is_what_it_was_after_detach(saved: Saved) -> None:
    plain = models.seeded(saved.case.make)
    model, bank = saved.attached()
    assert list(model.state_dict()) == list(plain.state_dict())
    bank.detach()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("lora_")]
    assert torch.equal(model(TOKENS).logits, saved.base)


def test_a_bank_without_room_says_with_what_to_attach(saved: Saved) -> None:
    model = models.seeded(saved.case.make)
    bank = xlc.attach(model, adapters={"plain": saved.folders["plain"]}, slots=2)
    _, wanted = saved.attached()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(AdapterError):
        bank.load("first", saved.folders["first"])
    assert bank.names == ("plain",)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert wanted.names == ("first", "second", "plain")


def test_a_file_of_export_has_no_room_for_it(saved: Saved, tmp_path: Path) -> None:
    model, _ = saved.attached()
    with pytest.raises(ArtifactError, match="Attach without use_dora, lora_bias, bias, modules_to_save and"):
        xlc.export(model, tmp_path / "served.pt2", kwargs={"input_ids": TOKENS})


# --- what attach is asked for --------------------------------------------------------------------------------------


def test_without_a_word_there_is_room_for_nothing_else() -> None:
    model = models.seeded(qwen)
    bank = xlc.attach(model)
    assert not any(site.room for site in bank.sites.values())
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "LoraLinear"
    assert {name.rpartition(".")[2] for name, _ in model.named_buffers() if "lora_" in name} == {"lora_a", "lora_b"}


@pytest.mark.parametrize(
    ("options", "of_q_proj", "of_up_proj"),
    [
        ({"use_dora": True}, {SCALES, SHIFTS}, {SCALES}),
        ({"lora_bias": True}, {SHIFTS}, {SHIFTS}),
        ({"bias": "lora_only"}, {SHIFTS}, set()),
        ({"modules_to_save": ["q_proj"]}, {HEADS, HEAD_SLOTS, SHIFTS}, set()),
    ],
    ids=str,
)
def test_a_module_has_room_for_what_it_can_need(options: Any, of_q_proj: set[str], of_up_proj: set[str]) -> None:
    model = models.seeded(qwen)
    xlc.attach(model, slots=3, **options)
    layer = model.model.layers[0]
    assert set(layer.self_attn.q_proj.lora_extras) == of_q_proj
    assert set(layer.mlp.up_proj.lora_extras) == of_up_proj
    for extra in (layer.self_attn.q_proj.lora_extras, layer.mlp.up_proj.lora_extras):
        for name, stack in extra.items():
            assert len(stack) == (3 if name == HEADS else 4)
            assert (stack == EMPTY[name]).all()


WRONG: dict[str, tuple[Any, str]] = {
    "a list of tokens": ({"trainable_token_indices": [1, 2]}, "the most tokens of one adapter"),
    "a number": ({"use_dora": 1}, "use_dora: wanted True or False"),
    "a text": ({"lora_bias": "all"}, "lora_bias: wanted True or False"),
    "another bias": ({"bias": "some"}, "one of none, lora_only, all"),
    "one name": ({"modules_to_save": "score"}, r'Pass a list such as \["score"\]'),
    "no module": ({"modules_to_save": ["classifier"]}, "'classifier', which matches nothing"),
    "a norm": ({"modules_to_save": ["norm"]}, r"layernorm \(Qwen2RMSNorm\)"),
    "a layer with norms": ({"modules_to_save": ["layers.1"]}, r"Qwen2RMSNorm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_attach_cannot_make_room_for_is_refused(case: str) -> None:
    model = models.seeded(qwen)
    options, words = WRONG[case]
    with pytest.raises(AttachError, match=words):
        xlc.attach(model, **options)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


# --- what load refuses ---------------------------------------------------------------------------------------------


def room(folder: Path, match: str, **lora: Any) -> None:
    save(folder, qwen, 1, **{"target_modules": ["q_proj"], **lora})
    bank = xlc.attach(models.seeded(qwen), target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedAdapterError, match=match):
        bank.load("a", folder)


def test_the_remedy_names_the_argument(tmp_path: Path) -> None:
    room(tmp_path / "1", r"attach with use_dora=True: xlc\.attach\(model, use_dora=True", use_dora=True)
    room(tmp_path / "2", r"attach with lora_bias=True", lora_bias=True)
    room(tmp_path / "3", r"attach with bias='lora_only'", bias="lora_only")
    room(tmp_path / "4", r"attach with bias='all'.*Name 'k_proj' among target_modules", bias="all")
    room(tmp_path / "5", r"attach with modules_to_save=\['lm_head'\]", modules_to_save=["lm_head"])

    room(tmp_path / "6", r"attach with trainable_token_indices=2", trainable_token_indices=[3, 4])


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    save(tmp_path, qwen, 1, trainable_token_indices=[3], target_modules=["q_proj"])
    edit_config(tmp_path, trainable_token_indices=[70])
    with pytest.raises(AdapterShapeError, match=r"resize_token_embeddings\(71\)"):
        xlc.attach(models.seeded(qwen), adapters={"a": tmp_path})


def test_lora_and_rows_of_tokens_of_one_embedding_are_refused(tmp_path: Path) -> None:
    """PEFT cannot run them."""
    save(tmp_path, tied_qwen, 1, trainable_token_indices=[3], target_modules=["q_proj"])
    other = save(tmp_path / "lora", tied_qwen, 1, target_modules=["q_proj", "lm_head"])
    with edited_weights(tmp_path) as tensors:
        tensors.update(load_file(other / "adapter_model.safetensors"))
    edit_config(tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedAdapterError, match="both on lm_head"):
        xlc.attach(models.seeded(tied_qwen), adapters={"a": tmp_path})


def test_lora_on_a_module_with_a_weight_of_its_own_is_refused(tmp_path: Path) -> None:
    """PEFT refuses to make such an adapter."""
    other = save(tmp_path / "lora", distilbert_classifier, 1, target_modules=["q_lin", "pre_classifier"])
    head = save(tmp_path / "head", distilbert_classifier, 1, **SEQ_CLS, target_modules=["q_lin"])
    with edited_weights(other) as tensors:
        tensors.update(load_file(head / "adapter_model.safetensors"))
    edit_config(other, modules_to_save=["classifier"])
    with pytest.raises(UnsupportedAdapterError, match="both on pre_classifier"):
        xlc.attach(models.seeded(distilbert_classifier), adapters={"a": other})


def test_a_head_with_a_bias_has_no_rows_of_tokens() -> None:
    model = models.seeded(tied_qwen)
    model.lm_head.bias = nn.Parameter(torch.zeros(70))
    with pytest.raises(AttachError, match=r"lm_head \(Linear, with a bias\)"):
        xlc.attach(model, trainable_token_indices=2)


def test_biases_of_modules_without_lora_are_refused(tmp_path: Path) -> None:
    """Norms have biases, too, and carry nothing."""
    save(tmp_path, gpt2, 1, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    with pytest.raises(UnsupportedAdapterError, match=r"ln_1\.bias.*merge_and_unload"):
        xlc.attach(models.seeded(gpt2), bias="all").load("a", tmp_path)


Change = Callable[[dict[str, Tensor], str], object]
SPOILT: dict[str, tuple[Lora, str, Change, type[AdapterError], str]] = {
    "a magnitude of another size": (
        DORA, "magnitude", lambda t, k: t.update({k: torch.ones(31)}), AdapterShapeError, r"\[32\]; got shape \[31\]",
    ),
    "a magnitude of whole numbers": (
        DORA, "magnitude", lambda t, k: t.update({k: torch.ones(32, dtype=torch.int32)}), AdapterShapeError, "dtype",
    ),
    "a magnitude that is missing": (DORA, "magnitude", lambda t, k: t.pop(k), UnmatchedTensorError, "no .*magnitude"),
    "a magnitude of NaN": (DORA, "magnitude", lambda t, k: t[k].fill_(torch.nan), NonFiniteWeightError, "NaN"),
    "a bias of B of another size": (
        {"lora_bias": True}, "lora_B.bias", lambda t, k: t.update({k: torch.ones(2)}), AdapterShapeError, r"\[32\]",
    ),
    "a bias of B that is missing": (
        {"lora_bias": True}, "lora_B.bias", lambda t, k: t.pop(k), UnmatchedTensorError, r"no .*lora_B\.bias",
    ),
    "an infinite bias of B": (
        {"lora_bias": True}, "lora_B.bias", lambda t, k: t[k].fill_(torch.inf), NonFiniteWeightError, "infinity",
    ),
    "a bias of another size": (
        {"bias": "lora_only"}, "layer.bias", lambda t, k: t.update({k: torch.ones(2)}), AdapterShapeError, r"\[32\]",
    ),
    "an infinite bias": (
        {"bias": "lora_only"}, "base_layer.bias", lambda t, k: t[k].fill_(torch.inf), NonFiniteWeightError, "infinity",
    ),
    "a head of another width": (
        {"modules_to_save": ["lm_head"]}, "lm_head.weight", lambda t, k: t.update({k: torch.ones(70, 31)}),
        AdapterShapeError, r"shape \[70, 32\]",
    ),
    "a head of more tokens": (
        {"modules_to_save": ["lm_head"]}, "lm_head.weight", lambda t, k: t.update({k: torch.ones(72, 32)}),
        AdapterShapeError, r"resize_token_embeddings\(72\)",
    ),
    "a head that is missing": (
        {"modules_to_save": ["lm_head"]}, "lm_head.weight", lambda t, k: t.pop(k), UnmatchedTensorError,
        r"no lm_head\.weight",
    ),
    "rows of another width": (
        {"trainable_token_indices": [1, 2]}, "delta", lambda t, k: t.update({k: torch.ones(2, 31)}), AdapterShapeError,
        r"shape \[2, 32\]",
    ),
    "fewer rows than tokens": (
        {"trainable_token_indices": [1, 2]}, "delta", lambda t, k: t.update({k: torch.ones(1, 32)}), AdapterShapeError,
        r"shape \[2, 32\]",
    ),
    "rows that are missing": (
        {"trainable_token_indices": [1, 2]}, "delta", lambda t, k: t.pop(k), UnmatchedTensorError, "no trainable_token",
    ),
    "rows of NaN": (
        {"trainable_token_indices": [1, 2]}, "delta", lambda t, k: t[k].fill_(torch.nan), NonFiniteWeightError, "NaN",
    ),
    "more tokens than there is room for": (
        {"trainable_token_indices": [1, 2, 3, 4]}, "delta", lambda t, k: None, UnsupportedAdapterError,
        "attach with trainable_token_indices=4",
    ),
    "a head of NaN": (
        {"modules_to_save": ["lm_head"]}, "lm_head.weight", lambda t, k: t[k].fill_(torch.nan), NonFiniteWeightError,
        "NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_wrong_tensor_is_refused_and_the_bank_stays_as_it_was(case: str, tmp_path: Path) -> None:
    lora, part, change, error, words = SPOILT[case]
    save(tmp_path, qwen, 1, **{"target_modules": ["q_proj", "down_proj"], **lora})
    with edited_weights(tmp_path) as tensors:
        change(tensors, next(key for key in tensors if part in key))
    model = models.seeded(qwen)
    room: dict[str, Any] = {"use_dora": True, "lora_bias": True, "bias": "all", "modules_to_save": ["lm_head"]}
    room["trainable_token_indices"] = 3
    bank = xlc.attach(model, target_modules=["q_proj", "down_proj", "lm_head"], **room)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(error, match=words):
        bank.load("a", tmp_path)
    assert bank.names == ()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_tensors_that_the_config_does_not_account_for_are_refused(tmp_path: Path) -> None:
    """PEFT would leave them out, and compute something else."""
    model = models.seeded(qwen)
    bank = xlc.attach(model, target_modules=["q_proj", "down_proj"], use_dora=True, lora_bias=True)
    for name, lora in (("dora", DORA), ("bias", {"lora_bias": True, "target_modules": ["q_proj"]})):
        folder = save(tmp_path / name, qwen, 1, **lora)
        edit_config(folder, use_dora=False, lora_bias=False)
        with pytest.raises(UnmatchedTensorError, match=r"does not account for them"):
            bank.load("a", folder)


def test_rows_of_zeros_have_no_direction(tmp_path: Path) -> None:
    save(tmp_path, qwen, 1, **DORA)
    model = models.seeded(qwen)
    bank = xlc.attach(model, adapters={"b": tmp_path})
    with edited_weights(tmp_path) as tensors:
        for key, tensor in tensors.items():
            if "lora_B" in key and "q_proj" in key:
                tensor[3] = 0
    model.model.layers[0].self_attn.q_proj._parameters["weight"].data[3] = 0
    with pytest.raises(NonFiniteWeightError, match=r"q_proj.*a length of 0"):
        bank.load("a", tmp_path)


def test_weights_that_are_elsewhere_have_no_norms(tmp_path: Path) -> None:
    save(tmp_path, qwen, 1, **DORA)
    model = models.seeded(qwen)
    bank = xlc.attach(model, adapters={"b": tmp_path})
    layer = model.model.layers[1].mlp.down_proj
    layer._parameters["weight"] = nn.Parameter(layer._parameters["weight"].to("meta"), requires_grad=False)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj: wanted the module's weight and bias"):
        bank.load("a", tmp_path)


QUANTIZED: dict[str, models.Make] = {
    "bitsandbytes 4-bit": models.bnb_4bit,
    "bitsandbytes 8-bit": models.bnb_8bit,
    "torchao int8": models.torchao(lambda ao: ao.Int8WeightOnlyConfig()),
    "HQQ": models.hqq,
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_norms_of_dora_are_those_of_the_weight_that_a_quantized_layer_computes_with(kind: str, tmp_path: Path) -> None:
    make = QUANTIZED[kind]
    # Of a plain model: PEFT 0.21 reads a weight of 4 bits as if a first call on a CPU had not packed it.
    save(tmp_path, models.llama, 1, **DORA)
    model, plain = models.seeded(make), models.seeded(make)
    bank = xlc.attach(model, adapters={"a": tmp_path}, slots=2)
    adapter, name = load_file(tmp_path / "adapter_model.safetensors"), "model.layers.1.mlp.down_proj"
    a, b, m = (
        adapter[f"base_model.model.{name}.{part}"]
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    module = plain.get_submodule(name)
    with torch.no_grad():
        weight = module(torch.eye(module.in_features)).t()
    wanted = m / (weight + 1.5 * b @ a).norm(dim=1)
    torch.testing.assert_close(model.get_submodule(name).lora_scales[0], wanted, atol=0, rtol=5e-3)
    with torch.no_grad(), bank.use(["a", None, None, None, None]):
        logits = model(TOKENS).logits
        base = plain(TOKENS).logits
    torch.testing.assert_close(logits[1:], base[1:], atol=2e-3, rtol=0)
    assert float((logits[0] - base[0]).abs().max()) > 3e-3


def test_a_packed_weight_of_4_bits_has_no_norms(tmp_path: Path) -> None:
    save(tmp_path, models.llama, 1, **DORA)
    model = models.seeded(models.bnb_4bit)
    bank = xlc.attach(model, target_modules=["q_proj", "down_proj"], use_dora=True)
    state = model.model.layers[0].self_attn.q_proj._parameters["weight"].quant_state
    state.packing_format_for_cpu = True
    with pytest.raises(AdapterError, match="Load the adapters with DoRA before the model's first call"):
        bank.load("a", tmp_path)
    assert bank.names == ()


def test_dora_on_a_weight_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = stand_ins.BY_HOST["FP8 of transformers"]
    host = next(host for host in HOSTS if host.name == "FP8 of transformers")
    monkeypatch.setattr(host, "classes", (*host.classes, full_name(kind)))
    model = nn.Sequential(kind(6, 5))
    with pytest.raises(AttachError, match=r"use_dora: .* exclude_modules"):
        xlc.attach(model, target_modules=["0"], use_dora=True)
    assert type(model[0]) is kind
    xlc.attach(model, target_modules=["0"], lora_bias=True)


def test_an_adapter_of_fewer_tokens_scales_those_alone(tmp_path: Path) -> None:
    def small() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(**SIZES | {"vocab_size": 60}, num_key_value_heads=2)
            )
        return with_biases(model)

    def padded() -> nn.Module:
        model = small()
        with quiet():
            model.resize_token_embeddings(70, mean_resizing=False)
        return model

    save(tmp_path, small, 1, use_dora=True, target_modules=["lm_head", "embed_tokens"])
    with torch.no_grad():
        model, tokens = models.seeded(padded), TOKENS % 60
        bank = xlc.attach(model, adapters={"a": tmp_path})
        with quiet():
            wanted = PeftModel.from_pretrained(models.seeded(small), tmp_path)(tokens).logits
        base = model(tokens).logits
        with bank.use(["a", None, "a", None, None]):
            logits = model(tokens).logits
    torch.testing.assert_close(logits[0, :, :60], wanted[0])
    torch.testing.assert_close(logits[2, :, :60], wanted[2])
    assert torch.equal(logits[1], base[1])


# --- other dtypes, training, and the compiler's code ---------------------------------------------------------------


def test_scales_are_float32_in_a_bank_of_bfloat16(tmp_path: Path) -> None:
    save(tmp_path, qwen, 1, **DORA, modules_to_save=["lm_head"])
    model = models.seeded(qwen).to(torch.bfloat16)
    bank = xlc.attach(model, adapters={"a": tmp_path})
    extras = model.model.layers[0].self_attn.q_proj.lora_extras
    assert {stack.dtype for stack in extras.values()} == {torch.float32}
    assert model.lm_head.lora_heads.dtype is torch.bfloat16
    with torch.no_grad(), bank.use(["a", None, "a", None, "a"]):
        logits = model(TOKENS).logits
    assert logits.dtype is torch.bfloat16
    wanted = logits_of_peft(qwen, tmp_path)
    torch.testing.assert_close(logits[0].float(), wanted[0], atol=0.06, rtol=0.05)


def test_gradients_pass_through_scales_and_heads(tmp_path: Path) -> None:
    save(tmp_path, llama_classifier, 1, **DORA, **SEQ_CLS)
    model = models.seeded(llama_classifier)
    bank = xlc.attach(model, adapters={"a": tmp_path})
    inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    with bank.use(["a", None, "a", None, "a"]):
        model(inputs_embeds=inputs).logits.square().sum().backward()
    with quiet():
        alone = PeftModel.from_pretrained(models.seeded(llama_classifier), tmp_path).eval()
    theirs = inputs.detach().clone().requires_grad_()
    alone(inputs_embeds=theirs).logits.square().sum().backward()
    assert inputs.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(inputs.grad[::2], theirs.grad[::2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_copy_can_be_made_plain_and_explained_and_verified(tmp_path: Path) -> None:
    save(tmp_path, llama_classifier, 1, **DORA, **SEQ_CLS)
    model = models.seeded(llama_classifier)
    base = model(TOKENS).logits
    bank = xlc.attach(model, adapters={"a": tmp_path})
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301 - what was just written
    with pytest.raises(CopiedModelError):
        other(TOKENS)
    xlc.detach(other)
    assert torch.equal(other(TOKENS).logits, base)
    with bank.use(["a", None, "a", None, "a"]):
        report = xlc.explain(model)(TOKENS)
        assert {site.module for site in report.sites} >= {"score"}
        xlc.verify(model, generate_code=False)(TOKENS)


def test_code_of_inductor_is_right_for_all_of_it_at_once(tmp_path: Path) -> None:
    folders = {
        "dora": save(tmp_path / "1", qwen, 1, **DORA, modules_to_save=["lm_head"]),
        "bias": save(tmp_path / "2", qwen, 2, lora_bias=True, bias="lora_only", target_modules=["q_proj"]),
    }
    torch._dynamo.reset()
    model = models.seeded(qwen)
    bank = xlc.attach(model, adapters=folders)
    with torch.no_grad():
        base = model(TOKENS).logits
        run = torch.compile(model, backend="xpu_lora", fullgraph=True)
        with bank.use(["dora", None, "bias", None, "dora"]):
            logits = run(TOKENS).logits
        alone = [logits_of_peft(qwen, folder) for folder in folders.values()]
        wanted = torch.stack([alone[0][0], base[1], alone[1][2], base[3], alone[0][4]])
        torch.testing.assert_close(logits, wanted, atol=5e-6, rtol=1e-5)
        bank.drop("dora")
        bank.load("another", folders["bias"])
        with bank.use(["another", "bias", None, None, None]), torch.compiler.set_stance("fail_on_recompile"):
            logits = run(TOKENS).logits
    torch.testing.assert_close(logits[:2], alone[1][:2], atol=5e-6, rtol=1e-5)


def test_plain_adapters_of_a_bank_with_room_compute_what_they_do_without(tmp_path: Path) -> None:
    save_adapter(tmp_path, model=models.seeded(qwen), target_modules=["q_proj", "up_proj"])
    answers = []
    for options in ({}, {"use_dora": True, "lora_bias": True, "bias": "all", "modules_to_save": ["lm_head"]}):
        model = models.seeded(qwen)
        bank = xlc.attach(model, **options)
        bank.load("a", tmp_path)
        with torch.no_grad(), bank.use(["a", None, "a", None, None]):
            answers.append(model(TOKENS).logits)
    assert torch.equal(*answers)
