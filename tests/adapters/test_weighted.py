"""Several adapters for a row, with weights: beside PEFT's own sums, as data of one compiled graph, with gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import DEVICE
from support.peft_folders import quiet, save_adapter, tiny_llama
from support.quantized_models import gpt2, seeded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import xpu_lora_compile as xlc
from xpu_lora_compile import errors

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(1, 70, (6, 5), generator=torch.Generator().manual_seed(3)).to(DEVICE)
GENERATE: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
ROWS: list[Any] = [
    {"pirate": 0.7, "haiku": -1.3},
    "pirate",
    None,
    {"haiku": 0.25},
    {"haiku": 1.0, "pirate": 1.0},
    {"telegram": 2.0, "pirate": 0.0},
]


def qwen2() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 70}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, pad_token_id=0))


# A model, and the modules of three adapters.
MODELS: dict[str, Any] = {
    "Qwen2": (qwen2, ["q_proj", "down_proj"], ["q_proj", "k_proj", "v_proj"], "all-linear"),
    "GPT-2": (gpt2, ["c_attn", "c_proj"], ["c_attn"], "all-linear"),
    "Llama with its vocabulary": (tiny_llama, ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"], ["lm_head"]),
}
NAMES = ("pirate", "haiku", "telegram")


class Served:
    """A model's adapters in folders, and what PEFT makes of sums of them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.make, *targets = MODELS[kind]
        self.folders = {
            name: save_adapter(folder / name, model=self.model(), seed=seed, r=2 + seed, target_modules=modules)
            for seed, (name, modules) in enumerate(zip(NAMES, targets, strict=True))
        }

    def model(self) -> Any:
        return seeded(self.make).to(DEVICE)

    def attached(self, adapters_per_row: int = 2, **options: Any) -> tuple[Any, xlc.AdapterBank]:
        torch._dynamo.reset()
        model = self.model()
        return model, xlc.attach(model, adapters=self.folders, adapters_per_row=adapters_per_row, **options)

    def peft(self) -> Any:
        from peft import PeftModel

        with quiet():
            made = PeftModel.from_pretrained(self.model(), self.folders["pirate"], adapter_name="pirate")
            for name in NAMES[1:]:
                made.load_adapter(self.folders[name], name)
        return made.eval()

    def wanted(self, entry: Any, call: Any) -> Any:
        """What PEFT's model gives with the adapters of one row."""
        made = self.peft()
        with torch.no_grad(), quiet():
            if entry is None:
                with made.disable_adapter():
                    return call(made)
            if isinstance(entry, str):
                made.set_adapter(entry)
            elif all(weight == 1.0 for weight in entry.values()):
                made.base_model.set_adapter(list(entry))
            else:
                made.add_weighted_adapter(list(entry), list(entry.values()), "mix", combination_type="cat")
                made.set_adapter("mix")
            return call(made)


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served("Qwen2", tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def expected(served: Served) -> Tensor:
    """PEFT's logits of each row with its adapters: sums of active ones, or joined with weights."""
    rows = [served.wanted(entry, lambda made: made(TOKENS).logits)[row] for row, entry in enumerate(ROWS)]
    base = served.wanted(None, lambda made: made(TOKENS).logits)
    changed = [bool((logits - base[row]).abs().max() > 0.05) for row, logits in enumerate(rows)]
    assert changed == [True, True, False, True, True, True]
    return torch.stack(rows)


def is_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad-mode"])
@pytest.mark.parametrize("way", ["eager", "rewritten", "Inductor"])
def test_rows_of_a_mixed_batch_are_those_of_peft(served: Served, expected: Tensor, way: str, grad: bool) -> None:
    if grad and way == "Inductor":
        pytest.skip("minutes of Inductor for what the rewritten graph shows")
    model, bank = served.attached()
    options = {"xpu_lora.execute": "eager"} if way == "rewritten" else {}
    run: Any = model if way == "eager" else torch.compile(model, backend="xpu_lora", fullgraph=True, options=options)
    with torch.set_grad_enabled(grad), bank.use(ROWS):
        is_close(run(TOKENS).logits, expected)
    order = [5, 3, 0, 4, 2, 1]
    with torch.set_grad_enabled(grad), bank.use([ROWS[row] for row in order]):
        is_close(run(TOKENS[order]).logits, expected[order])
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, served.model()(TOKENS).logits)


def test_names_alone_give_the_bits_of_a_bank_with_one_adapter_a_row(served: Served) -> None:
    names = ["pirate", None, "haiku", "telegram", "pirate", "haiku"]
    results = []
    for adapters_per_row in (1, 3):
        model, bank = served.attached(adapters_per_row)
        with torch.no_grad(), bank.use(names):
            results.append(model(TOKENS).logits)
    if any("embed" in site for site in bank.sites):
        # An embedding with several adapters adds what a float32 tensor holds.
        is_close(*results)
    else:
        assert torch.equal(*results)


def test_the_order_of_the_names_changes_no_bit(small: Served) -> None:
    model, bank = small.attached(3)
    mixes = {"pirate": 0.7, "haiku": -1.3, "telegram": 0.1}
    with torch.no_grad():
        with bank.use([mixes] * 6):
            wanted = model(TOKENS).logits
        with bank.use([dict(reversed(mixes.items()))] * 6):
            assert torch.equal(model(TOKENS).logits, wanted)


def test_slots_that_a_row_does_not_name_are_not_read_for_it(small: Served) -> None:
    model, bank = small.attached()
    entries: list[Any] = [{"pirate": 0.5, "haiku": 2.0}, "haiku", None, {"pirate": 1.0}, None, "telegram"]
    with torch.no_grad(), bank.use(entries):
        wanted = model(TOKENS).logits
        slots = [slot for slot in range(8) if slot > 2] + [bank.names.index("telegram")]
        for layer in bank._layers.values():
            layer.lora_a[slots], layer.lora_b[slots] = torch.nan, torch.nan
        got = model(TOKENS).logits
    assert torch.equal(got[:5], wanted[:5])
    assert got[5].isnan().all()


def random_entry(choose: random.Random, names: tuple[str, ...]) -> Any:
    count = choose.randrange(4)
    if count == 3:
        return choose.choice([None, *names])
    return {name: choose.uniform(-2, 2) for name in choose.sample(names, count)} or None


def test_nothing_recompiles_over_1000_random_weighted_lists(small: Served) -> None:
    choose, (model, bank) = random.Random(0), small.attached()
    counter = CompileCounterWithBackend("xpu_lora")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    lists = [[random_entry(choose, NAMES) for _ in range(6)] for _ in range(1000)]
    # Lists of one kind of entry are not forgotten.
    lists[3:3] = [[None] * 6, ["pirate"] * 6, [{"pirate": 0.5, "haiku": 0.5}] * 6]
    with torch.no_grad():
        for at, entries in enumerate(lists):
            with bank.use(entries):
                got = compiled(TOKENS).logits
                if at % 100 == 0:
                    is_close(got, model(TOKENS).logits)
    assert counter.frame_count == 1


def test_batches_of_other_sizes_recompile_no_oftener_than_with_one_adapter_a_row(small: Served) -> None:
    choose, counts = random.Random(0), []
    for adapters_per_row in (1, 2):
        model, bank = small.attached(adapters_per_row)
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with torch.no_grad():
            for size in (6, 4, 5, 3, 2, 6):
                names = NAMES if adapters_per_row == 1 else [random_entry(choose, NAMES) for _ in range(3)]
                with bank.use([*names, *["pirate"] * 3][:size]):
                    is_close(compiled(TOKENS[:size]).logits, model(TOKENS[:size]).logits)
        counts.append(counter.frame_count)
    assert counts[1] == counts[0]


# Gradients.


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_weights_that_are_tensors_get_their_gradient(small: Served, way: str) -> None:
    model, bank = small.attached()
    run: Any = model
    if way == "compiled":
        run = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
    weights = [torch.tensor(value, requires_grad=True, device=DEVICE) for value in (0.7, -0.4, 1.5)]

    def entries(of: Any) -> list[Any]:
        return [{"pirate": of[0], "haiku": of[1]}, {"telegram": of[2]}, None, {"haiku": of[1]}, "pirate", None]

    def loss(logits: Tensor) -> Tensor:
        return 10 * logits.double().log_softmax(-1)[..., 5].sum()

    with bank.use(entries(weights)):
        total = loss(run(TOKENS).logits)
    grads = torch.autograd.grad(total, weights)
    # In float32 a step of 1e-2 leaves three digits.
    for at, grad in enumerate(grads):
        ends = []
        for step in (1e-2, -1e-2):
            moved = [weight.item() + step * (number == at) for number, weight in enumerate(weights)]
            with torch.no_grad(), bank.use(entries(moved)):
                ends.append(loss(run(TOKENS).logits))
        torch.testing.assert_close(grad.double(), (ends[0] - ends[1]) / 2e-2, atol=2e-2, rtol=2e-2)
        assert grad.abs() > 0.1


def test_a_router_learns(small: Served) -> None:
    """Weights that start at zero come closer to those with which the wanted logits were made."""
    model, bank = small.attached()
    with torch.no_grad(), bank.use([{"pirate": 0.6, "haiku": -0.5}] * 6):
        wanted = model(TOKENS).logits
    router = torch.zeros(2, requires_grad=True, device=DEVICE)
    steps = torch.optim.Adam([router], lr=0.1)
    losses = []
    for _ in range(40):
        steps.zero_grad()
        with bank.use([{"pirate": router[0], "haiku": router[1]}] * 6):
            loss = (model(TOKENS).logits - wanted).square().mean()
            loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_weights_that_are_tensors_without_a_gradient_are_data(small: Served) -> None:
    model, bank = small.attached()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for value in (0.5, -1.0):
            with bank.use([{"pirate": value, "haiku": 1.0}] * 6):
                wanted = compiled(TOKENS).logits
            tensor = torch.tensor([value], dtype=torch.float64, requires_grad=True, device=DEVICE)
            with bank.use([{"pirate": tensor, "haiku": torch.ones((), device=DEVICE)}] * 6):
                assert torch.equal(compiled(TOKENS).logits, wanted)
    assert counter.frame_count == 1


# Other ways to call a model.


def test_generate_with_beams_gives_each_row_its_sum(small: Served) -> None:
    model, bank = small.attached()
    entries = ROWS[:4]
    with torch.no_grad(), bank.use(entries):
        got = model.generate(TOKENS[:4], **GENERATE, num_beams=3)
    for row, entry in enumerate(entries):
        wanted = small.wanted(
            entry, lambda made, row=row: made.generate(TOKENS[row : row + 1], **GENERATE, num_beams=3)
        )
        assert torch.equal(got[row : row + 1], wanted)


def test_a_packed_batch_gives_each_sequence_its_sum(small: Served) -> None:
    model, bank = small.attached()
    lengths = [2, 3, 5]
    entries: list[Any] = [{"pirate": 0.7, "haiku": -1.3}, None, {"telegram": 0.5, "haiku": 1.0}]
    position_ids = torch.tensor([[*range(2), *range(3), *range(5)]], device=DEVICE)
    packed = torch.cat([TOKENS[row, :length] for row, length in enumerate(lengths)])[None]
    with torch.no_grad():
        with bank.use(entries, lengths=lengths):
            got = model(input_ids=packed, position_ids=position_ids, use_cache=False).logits[0].split(lengths)
        for row, (length, entry) in enumerate(zip(lengths, entries, strict=True)):
            with bank.use([entry]):
                is_close(got[row], model(TOKENS[row : row + 1, :length]).logits[0])


def test_generate_batch_gives_each_request_its_sum(small: Served) -> None:
    model, bank = small.attached()
    entries = ROWS[:3]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=32)
    with bank.use(entries):
        outputs = model.generate_batch(TOKENS[:3].tolist(), generation_config=config, continuous_batching_config=sizes)
    answers = [output.generated_tokens for output in outputs.values()]
    for row, entry in enumerate(entries):
        wanted = small.wanted(entry, lambda made, row=row: made.generate(TOKENS[row : row + 1], **GENERATE))
        assert answers[row] == wanted[0, TOKENS.shape[1] :].tolist()


def test_verify_finds_each_call_within_its_budget_and_no_row_in_another(small: Served) -> None:
    model, _ = small.attached()
    found = xlc.verify(model, generate_code=False)(TOKENS)
    assert all(site.is_right for site in found.sites)
    assert found.isolation
    assert not any(found.isolation.values())


def test_a_part_of_the_model_may_have_sums_of_its_own(small: Served) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.head = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)

        def forward(self, text: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(text), self.tower(images)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Two().eval().to(DEVICE)
        bank = xlc.attach(model, slots=2, max_rank=2, adapters_per_row=2)
        for layer in bank._layers.values():
            nn.init.normal_(layer.lora_a)
            nn.init.normal_(layer.lora_b)
        text, images = torch.randn(2, 8).to(DEVICE), torch.randn(3, 8).to(DEVICE)
    bank._slots[:] = ["a", "b"]
    mix = {"a": 0.5, "b": -2.0}
    with torch.no_grad():
        base = model(text, images)
        with bank.use(["a", mix], parts={"tower": [mix, None, "b"]}):
            got = model(text, images)
    for which, (layer, rows, inputs) in enumerate(
        [(model.head, [(1, 0), (0.5, -2.0)], text), (model.tower[0], [(0.5, -2.0), (0, 0), (0, 1)], images)]
    ):
        added = torch.einsum("kwr,krd,td->tkw", layer.lora_b, layer.lora_a, inputs)
        wanted = base[which] + (added * torch.tensor(rows, device=DEVICE, dtype=torch.float32)[:, :, None]).sum(1)
        is_close(got[which], wanted)


# What is refused.


@pytest.mark.parametrize(
    ("entry", "error", "text"),
    [
        ({"pirate": 1.0, "haiku": 1.0, "telegram": 1.0}, errors.BatchError, "adapters_per_row=3"),
        ({}, errors.BatchError, "Write None for the base model"),
        ({"pirate": float("nan")}, errors.BatchError, "'pirate'.*a number that float32 holds"),
        ({"pirate": float("inf")}, errors.BatchError, "a number that float32 holds"),
        ({"pirate": 1e39}, errors.BatchError, "a number that float32 holds"),
        ({"pirate": 10**400}, errors.BatchError, "a number that float32 holds"),
        ({"pirate": True}, errors.BatchError, "a number that float32 holds"),
        ({"pirate": "0.7"}, errors.BatchError, "a number that float32 holds"),
        ({"pirate": torch.ones(2)}, errors.BatchError, "one element"),
        ({"pirate": torch.ones((), dtype=torch.int64)}, errors.BatchError, "one element"),
        ({"pirate": torch.tensor(torch.inf)}, errors.BatchError, "a number that float32 holds"),
        ({"nobody": 1.0}, errors.UnknownAdapterError, "nobody"),
        ({None: 1.0}, errors.UnknownAdapterError, "None"),
        ("nobody", errors.UnknownAdapterError, "nobody"),
        (5, errors.UnknownAdapterError, "5"),
        (("pirate", 0.7), errors.BatchError, "Write"),
    ],
)
def test_a_wrong_entry_is_named_and_changes_nothing(small: Served, entry: Any, error: Any, text: str) -> None:
    model, bank = small.attached()
    with torch.no_grad(), bank.use(ROWS):
        wanted = model(TOKENS).logits
        with pytest.raises(error, match=text), bank.use(["pirate", entry, *[None] * 4]):
            pass
        assert torch.equal(model(TOKENS).logits, wanted)
    assert bank.names_in_use() is None
    bank.drop("pirate")


def test_a_bank_with_one_adapter_a_row_says_how_to_have_more(small: Served) -> None:
    _, bank = small.attached(1)
    with pytest.raises(errors.BatchError, match="adapters_per_row=2"), bank.use([{"pirate": 0.5}]):
        pass


def test_an_adapter_of_a_sum_cannot_be_dropped_while_it_is_in_use(small: Served) -> None:
    _, bank = small.attached()
    with bank.use(ROWS):
        for name in NAMES:
            with pytest.raises(errors.BankInUseError):
                bank.drop(name)


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "2"])
def test_a_number_of_adapters_a_row_that_cannot_be_is_refused(number: Any) -> None:
    with pytest.raises(errors.AttachError, match="adapters_per_row"):
        xlc.attach(tiny_llama(), adapters_per_row=number)


@pytest.mark.parametrize(
    "room", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": 2}]
)
def test_room_for_more_than_a_and_b_is_refused(room: dict[str, Any]) -> None:
    model = tiny_llama()
    with pytest.raises(errors.AttachError, match="adapters_per_row"):
        xlc.attach(model, adapters_per_row=2, **room)
    assert type(model.lm_head) is nn.Linear


def test_a_file_holds_one_adapter_a_row(small: Served, tmp_path: Path) -> None:
    model, _ = small.attached()
    with pytest.raises(errors.ArtifactError, match="adapters_per_row"):
        xlc.export(model, tmp_path / "model.pt2", (TOKENS,))


def test_detach_gives_the_plain_model_back(served: Served) -> None:
    plain = served.model()
    model, bank = served.attached()
    assert "adapters_per_row=2" in repr(bank)
    bank.detach()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_other_classes_of_linear_layers_may_have_several(small: Served) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features, self.w = 4, 3, nn.Parameter(torch.ones(3, 4))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ self.w.t()

    model = nn.Sequential(Mine()).to(DEVICE)
    bank = xlc.attach(model, slots=2, max_rank=1, linear_classes=[Mine], adapters_per_row=2)
    layer: Any = model[0]
    nn.init.ones_(layer.lora_a)
    layer.lora_b[0], layer.lora_b[1] = 1.0, 10.0
    bank._slots[:] = ["a", "b"]
    with torch.no_grad(), bank.use([{"a": 0.5, "b": 2.0}, None]):
        assert model(torch.ones(2, 4, device=DEVICE)).tolist() == [[86.0] * 3, [4.0] * 3]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()
