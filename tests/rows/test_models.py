"""Models whose layers see rows in other orders than a Llama's: each row is answered as PEFT answers it alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.image_models import GRIDS, SMALL, llava, llava_batch, qwen2_vl, qwen2_vl_batch
from support.peft_folders import loaded_by_peft, quiet, save_adapter
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import BatchError, UnprovedRowsError

NAMES = ["a", None, "b"]
# As many tokens as sequences, so that whoever goes by sizes alone takes one for the other.
IDS = torch.randint(3, 90, (3, 3), generator=torch.Generator().manual_seed(0))


def random(*shape: int) -> Tensor:
    """The same each time: an adapter must change an answer enough to be told from others."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode with the same random weights each time; large ones, so that answers differ."""
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model


class Doubled(nn.Module):
    """As classifier-free guidance of diffusion: the batch twice, with another condition, and one result for both."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, 8]`, to the same."""
        without, with_condition = self.outer(self.inner(torch.cat([x * 0.5, x])).relu()).chunk(2)
        return without + 3 * (with_condition - without)


class TimeFirst(nn.Module):
    """Attention that wants the time first, under inputs that have the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, time, 16]`, to `[batch, time, 4]`."""
        return self.head(self.layer(x.transpose(0, 1)).transpose(0, 1))


def qwen2_moe() -> nn.Module:
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4}
    return hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**SMALL, **sizes, intermediate_size=48, num_key_value_heads=2, num_experts_per_tok=2)
    )


def swin() -> nn.Module:
    return hf.SwinForImageClassification(
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    )


# The model, its inputs, and the modules that adapters are on.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], Any]] = {
    "OPT": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
        {"input_ids": IDS},
        ["q_proj", "v_proj", "fc1", "fc2"],
    ),
    "Qwen2-MoE": (
        qwen2_moe,
        {"input_ids": IDS},
        r".*(self_attn\.\w_proj|shared_expert\.\w+_proj|shared_expert_gate)",
    ),
    "XLNet": (
        lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48)),
        {"input_ids": IDS},
        ["layer_1", "layer_2"],
    ),
    "Swin": (swin, {"pixel_values": random(3, 3, 32, 32)}, ["q_proj", "v_proj", "fc1", "fc2"]),
    "doubled rows": (Doubled, {"x": random(3, 3, 8)}, ["inner", "outer"]),
    "time first": (TimeFirst, {"x": random(3, 3, 16)}, ["linear1", "linear2"]),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    return seeded(MODELS[name][0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module, Any], dict[str, Path]]:
    def save(model: nn.Module, targets: Any) -> dict[str, Path]:
        top = tmp_path_factory.mktemp("adapters")
        return {
            name: save_adapter(top / name, seed=seed, model=copy.deepcopy(model), target_modules=targets, r=2 + seed)
            for seed, name in enumerate("ab")
        }

    return save


def first_tensor(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0] if isinstance(result, tuple) else result.logits


def answers(model: nn.Module, folders: dict[str, Path], run: Callable[[nn.Module], Any]) -> dict[str | None, Any]:
    """What the base model answers, and PEFT with each adapter alone."""
    peft = {name: loaded_by_peft(folder, copy.deepcopy(model)).eval() for name, folder in folders.items()}
    with torch.no_grad(), quiet():
        return {None: run(copy.deepcopy(model)), **{name: run(one) for name, one in peft.items()}}


def attached(model: nn.Module, folders: dict[str, Path], **options: Any) -> tuple[nn.Module, xlc.AdapterBank]:
    model = copy.deepcopy(model)
    bank = xlc.attach(model, max_rank=4, **options)
    for name, folder in folders.items():
        bank.load(name, folder)
    return model, bank


def assert_is(got: Tensor, wanted: dict[str | None, Tensor], name: str | None) -> None:
    """Equal but for the order of sums in float32, and far from what the other adapters give."""
    scale = float(wanted[name].abs().max())
    torch.testing.assert_close(got, wanted[name], atol=1e-4 * scale, rtol=0)
    others = [other for key, other in wanted.items() if key != name]
    assert all((got - other).abs().max() > 1e-2 * scale for other in others)


def assert_rows_are(got: Tensor, wanted: dict[str | None, Tensor], names: list[str | None]) -> None:
    for row, name in enumerate(names):
        assert_is(got[row], {key: value[row] for key, value in wanted.items()}, name)


@pytest.mark.sweep
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad-mode"])
@pytest.mark.parametrize("execution", ["eager", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_answered_by_its_own_adapter(
    name: str, execution: str, grad: bool, folders: Callable[..., dict[str, Path]]
) -> None:
    _, inputs, targets = MODELS[name]
    saved = folders(model_of(name), targets)
    wanted = answers(model_of(name), saved, lambda model: first_tensor(model(**inputs)))
    model, bank = attached(model_of(name), saved, target_modules=targets)
    torch._dynamo.reset()
    # Mixtures of experts break the graph, with LoRA and without.
    compiled = torch.compile(model, backend="xpu_lora", options={"xpu_lora.execute": "eager"})
    run = model if execution == "eager" else compiled
    with torch.set_grad_enabled(grad):
        for names in (NAMES, ["b", "b", "b"], [None, "a", "a"], NAMES, [None] * 3):
            with bank.use(names):
                got = first_tensor(run(**inputs))
            assert_rows_are(got, wanted, names)


def test_the_next_batch_may_have_other_sizes(folders: Callable[..., dict[str, Path]]) -> None:
    """What the first call showed holds for calls of its kind."""
    saved = folders(model_of("OPT"), ["q_proj", "fc1"])
    model, bank = attached(model_of("OPT"), saved, target_modules=["q_proj", "fc1"])
    for batch, length in ((3, 3), (3, 5), (2, 7), (5, 5), (4, 1), (3, 1)):
        ids = torch.randint(3, 90, (batch, length))
        wanted = answers(model_of("OPT"), saved, lambda model, ids=ids: model(ids).logits)
        names = [*NAMES, None, "a"][:batch]
        with bank.use(names), torch.no_grad():
            assert_rows_are(model(ids).logits, wanted, names)


# Encoder-decoders and decoders, with names for each input sequence.


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def bart() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "forced_eos_token_id": None}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=99, **sizes, **heads))


def whisper() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8, "max_source_positions": 16}
    tokens = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **heads, **tokens))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, intermediate_size=48, pad_token_id=0))


GENERATING: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], list[str]]] = {
    "T5": (t5, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, ["q", "v", "wo"]),
    "BART": (bart, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, ["q_proj", "v_proj", "fc1"]),
    "Whisper": (whisper, {"input_features": random(3, 8, 32)}, ["q_proj", "v_proj"]),
    "Llama": (llama, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, ["q_proj", "v_proj", "up_proj"]),
}
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-and-samples": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", GENERATING)
def test_names_are_given_for_each_input_sequence(
    name: str, search: str, folders: Callable[..., dict[str, Path]]
) -> None:
    make, inputs, targets = GENERATING[name]
    base = seeded(make)
    saved = folders(base, targets)
    length = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def run(model: nn.Module) -> Tensor:
        return model.generate(**inputs, **length, **SEARCHES[search])[:, -5:]

    wanted = answers(base, saved, run)
    model, bank = attached(base, saved, target_modules=targets)
    with bank.use(NAMES):
        got = run(model)
        # Afterwards each name is one row again.
        again = run(model)
    times = SEARCHES[search].get("num_return_sequences", 1)
    rows = [row for row in range(3) for _ in range(times)]
    for position, row in enumerate(rows):
        assert got[position].tolist() == wanted[NAMES[row]][position].tolist()
    assert torch.equal(got, again)
    assert len({tuple(wanted[one][0].tolist()) for one in wanted}) == 3


@pytest.mark.filterwarnings("ignore")
def test_samples_of_a_sequence_have_its_adapter(folders: Callable[..., dict[str, Path]]) -> None:
    base = seeded(llama)
    saved = folders(base, ["q_proj", "up_proj"])
    model, bank = attached(base, saved, target_modules=["q_proj", "up_proj"])
    seen: list[list[int]] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda layer, _: seen.append(layer.lora_routing.sequence_slots.tolist())
    )
    with bank.use(NAMES):
        model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=True, num_return_sequences=2
        )
        assert seen[0] == seen[1] == [0, 0, -1, -1, 1, 1]
        model(IDS)
    assert seen[-1] == [0, -1, 1]


@pytest.mark.filterwarnings("ignore")
def test_names_for_every_beam_are_taken_as_well(folders: Callable[..., dict[str, Path]]) -> None:
    base = seeded(llama)
    model, bank = attached(base, folders(base, ["q_proj"]), target_modules=["q_proj"])
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "num_beams": 2}
    with bank.use(NAMES):
        wanted = model.generate(**inputs)
    with bank.use([name for name in NAMES for _ in range(2)]):
        assert torch.equal(model.generate(**inputs), wanted)


# Packed batches.

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [5, 6, 7], [33, 4, 5, 6, 7, 8, 9]]
OWNERS = ["a", None, "b", "a"]


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_a_packed_row_has_an_adapter_for_each_of_its_sequences(
    execution: str, folders: Callable[..., dict[str, Path]]
) -> None:
    base = seeded(llama)
    targets = ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"]
    saved = folders(base, targets)
    ids = torch.tensor([[token for prompt in PROMPTS for token in prompt]])
    positions = torch.tensor([[at for prompt in PROMPTS for at in range(len(prompt))]])
    model, bank = attached(base, saved, target_modules=targets)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager", fullgraph=True) if execution == "compiled" else model
    lengths = [len(prompt) for prompt in PROMPTS]
    # transformers masks by positions that begin anew.
    with bank.use(OWNERS, lengths=lengths), torch.no_grad():
        got = run(input_ids=ids, position_ids=positions, use_cache=False).logits[0].split(lengths)
    for logits, prompt, name in zip(got, PROMPTS, OWNERS, strict=True):
        wanted = answers(base, saved, lambda model, prompt=prompt: model(torch.tensor([prompt])).logits[0])
        assert_is(logits, wanted, name)


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_answers_each_request_with_its_adapter(folders: Callable[..., dict[str, Path]]) -> None:
    base = seeded(llama)
    targets = ["q_proj", "v_proj", "up_proj", "lm_head"]
    saved = folders(base, targets)
    small = hf.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=32)
    config = hf.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model, bank = attached(base, saved, target_modules=targets)
    # The same prompt with two adapters: what is cached of one is not the other's.
    prompts, owners = [*PROMPTS, PROMPTS[0]], [*OWNERS, "b"]
    with bank.use(owners):
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    got = [output.generated_tokens for output in outputs.values()]
    for tokens, prompt, name in zip(got, prompts, owners, strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.int64)
        length = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": mask}
        wanted = answers(base, saved, lambda model, p=prompt, n=length: model.generate(torch.tensor([p]), **n)[0, -5:])
        assert tokens == wanted[name].tolist()
    assert got[0] != got[-1]


# Images: none, one or several for a sequence.


EVERY_LINEAR = r"(?!.*patch_embed).*(q_proj|k_proj|v_proj|qkv|proj|fc1|fc2|linear_1|linear_2|mlp\.0|mlp\.2|down_proj)"


@pytest.mark.parametrize("images", [[1, 1, 1], [2, 0, 1], [2, 1, 1]], ids=str)
def test_each_image_has_the_adapter_of_its_sequence(images: list[int], folders: Callable[..., dict[str, Path]]) -> None:
    base = seeded(llava)
    saved, inputs = folders(base, EVERY_LINEAR), llava_batch(images)
    wanted = answers(base, saved, lambda model: model(**inputs).logits)
    model, bank = attached(base, saved, target_modules=EVERY_LINEAR)
    of_images = [name for name, count in zip(NAMES, images, strict=True) for _ in range(count)]
    parts = {"vision_tower": of_images, "multi_modal_projector": of_images}
    with bank.use(NAMES, parts=parts), torch.no_grad():
        assert_rows_are(model(**inputs).logits, wanted, NAMES)
    # Nobody said whose the images are, and three of them fit three names.
    with bank.use(NAMES), torch.no_grad(), pytest.raises(UnprovedRowsError, match=r"parts=\{'model.vision_tower'"):
        model(**inputs)
    for names in (["a"] * 3, [None] * 3):
        with bank.use(names), torch.no_grad():
            assert_rows_are(model(**inputs).logits, wanted, names)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("images", [[1, 1, 1], [2, 0, 1]], ids=str)
def test_generate_names_images_by_part(
    images: list[int], options: dict[str, Any], folders: Callable[..., dict[str, Path]]
) -> None:
    """It calls the tower by itself, outside of the model's forward."""
    base = seeded(llava)
    saved, inputs = folders(base, EVERY_LINEAR), llava_batch(images)
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    per_row = options.get("num_return_sequences", 1)

    def generated(model: Any) -> Tensor:
        sequences: Tensor = model.generate(**inputs, **length)
        return sequences.view(3, per_row, -1)

    wanted = answers(base, saved, generated)
    model, bank = attached(base, saved, target_modules=EVERY_LINEAR)
    of_images = [name for name, count in zip(NAMES, images, strict=True) for _ in range(count)]
    with bank.use(NAMES, parts={"vision_tower": of_images, "multi_modal_projector": of_images}):
        got = generated(model)
    assert all(torch.equal(got[row], wanted[name][row]) for row, name in enumerate(NAMES))
    message = r"parts\['model\.vision_tower'\].*4 names for a batch of 3"
    too_many = {"vision_tower": ["a"] * 4, "multi_modal_projector": ["a"] * 4}
    with bank.use(NAMES, parts=too_many), pytest.raises(BatchError, match=message):
        generated(model)


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_images_of_any_size_that_are_packed_in_one_row_of_patches(
    execution: str, folders: Callable[..., dict[str, Path]]
) -> None:
    base = seeded(qwen2_vl)
    saved, inputs = folders(base, EVERY_LINEAR), qwen2_vl_batch()
    wanted = answers(base, saved, lambda model: model(**inputs).logits)
    model, bank = attached(base, saved, target_modules=EVERY_LINEAR)
    torch._dynamo.reset()
    run = model if execution == "eager" else torch.compile(model, backend="eager")
    lengths = [int(grid.prod()) for grid in GRIDS]
    with bank.use(NAMES, parts={"visual": (["a", "a", "b"], lengths)}), torch.no_grad():
        if execution == "compiled":
            # Its vision tower reads sizes from the grid, which breaks the graph: a call that is followed goes first.
            model(**inputs)
        assert_rows_are(run(**inputs).logits, wanted, NAMES)
    with bank.use(NAMES), torch.no_grad(), pytest.raises(UnprovedRowsError, match=r"parts=\{'model.visual'"):
        model(**inputs)
    unpacked = {"visual": ["a", "a", "b"]}
    advice = r"parts=\{'model\.visual': \(names, lengths\)\}"
    with bank.use(NAMES, parts=unpacked), torch.no_grad(), pytest.raises(UnprovedRowsError, match=advice):
        model(**inputs)
    short = {"visual": (["a", "a", "b"], [16, 8, 5])}
    with bank.use(NAMES, parts=short), torch.no_grad(), pytest.raises(BatchError, match="Pass the lengths of all"):
        model(**inputs)


def test_adapters_of_the_text_alone_need_no_word_about_images(folders: Callable[..., dict[str, Path]]) -> None:
    base = seeded(llava)
    targets = r".*language_model.*(q_proj|v_proj)"
    saved, inputs = folders(base, targets), llava_batch([2, 0, 1])
    wanted = answers(base, saved, lambda model: model(**inputs).logits)
    model, bank = attached(base, saved, target_modules=targets)
    with bank.use(NAMES), torch.no_grad():
        assert_rows_are(model(**inputs).logits, wanted, NAMES)
