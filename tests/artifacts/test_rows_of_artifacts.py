"""Artifacts whose rows are packed sequences and images: exported in a `use` block, which says how the rows lie."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import serve_pt2
import torch
from support.artifacts import admitted, made_once, save_plain_adapter
from support.cases import DEVICE
from support.image_models import llava, llava_batch
from torch import Tensor, nn
from torch.export import Dim

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import native, preferred_on

pytestmark = [
    pytest.mark.skipif(bool(native.problem()), reason="a C++ compiler is wanted"),
    pytest.mark.skipif(not preferred_on(DEVICE.type).ops_without_python, reason=f"no kernel for it on {DEVICE.type}"),
]


class Album(nn.Module):
    """Words of sequences that are packed in one row, and pictures, as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words, self.text = nn.Embedding(30, 8), nn.Linear(8, 12)
            self.vision = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7))

    def forward(self, tokens: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """Tokens `[1, T]` and pixels `[N, 2, 3]` -> `[1, T, 12]` and `[N, 7]`."""
        return {"text": self.text(self.words(tokens)), "pictures": self.vision(pixels.flatten(1))}


def attached_album() -> tuple[nn.Module, xlc.AdapterBank]:
    model = Album().eval().requires_grad_(False).to(DEVICE)
    return model, xlc.attach(model, slots=3, max_rank=4, target_modules=["words", "text", "vision.0", "vision.2"])


def inputs_for(lengths: list[int], images: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, 30, (1, sum(lengths)))
    return {"tokens": tokens.to(DEVICE), "pixels": torch.randn(images, 2, 3).to(DEVICE)}


def export_album(path: Path) -> None:
    model, bank = attached_album()
    shapes = {"tokens": {1: Dim("words", max=64)}, "pixels": {0: Dim("images", max=9)}}
    with bank.use([None, None], lengths=[3, 4], parts={"vision": [None] * 3}):
        xlc.export(model, path, kwargs=inputs_for([3, 4], 3), dynamic_shapes=shapes)
        # The block is as it was.
        model(**inputs_for([3, 4], 3))


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "album.pt2", export_album)


def folders_for(tmp_path: Path) -> dict[str, Path]:
    text, vision = {"text": ((2, 8), (12, 2))}, {"vision.0": ((4, 6), (10, 4)), "vision.2": ((4, 10), (7, 4))}
    return {
        "a": save_plain_adapter(tmp_path / "a", {**text, "words": ((2, 30), (8, 2))}, r=2),
        "b": save_plain_adapter(tmp_path / "b", vision, seed=1),
        "c": save_plain_adapter(tmp_path / "c", {**text, "vision.2": ((2, 10), (7, 2))}, r=2, seed=2),
    }


# The adapter and the length of each sequence, and the adapter of each image.
BATCHES: list[tuple[list[str | None], list[int], list[str | None]]] = [
    (["a", None, "c"], [5, 2, 7], ["b", "c"]),
    (["c", "a"], [1, 40], [None, "b", "b", "c", None]),
    (["b", "c", None, "a"], [9, 1, 1, 3], ["c"] * 9),
    (["c"], [1], ["b"]),
]


def test_packed_sequences_and_images_have_the_adapters_that_are_named(
    album: Path, program: Path, tmp_path: Path
) -> None:
    model, bank = attached_album()
    served = xlc.load_artifact(album)
    plan: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for name, folder in folders_for(tmp_path).items():
        bank.load(name, folder)
        served.load(name, folder)
        plan.append({"load": [name, str(folder)]})
    for number, (names, lengths, images) in enumerate(BATCHES):
        inputs = inputs_for(lengths, len(images))
        with torch.no_grad(), bank.use(names, lengths=lengths, parts={"vision": images}):
            expected = model(**inputs)
        answer = served(**inputs, adapters=names, lengths=lengths, parts={"vision": images})
        for key, value in expected.items():
            torch.testing.assert_close(answer[key], value)
        plan.append({"rows": names, "lengths": lengths, "parts": {"vision": images}})
        tensors |= {f"{number}.{key}": value.contiguous() for key, value in (inputs | answer).items()}
    status, said = serve_pt2.run_program(program, album, plan, tensors)
    assert (status, "4 batches, 0 of 10 rows wrong" in said) == (0, True), said


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no lengths": ({"lengths": None}, r"wanted adapters with lengths, parts\['vision'\]; got adapters, parts", "0 len"),
    "no parts": ({"parts": {}}, r"parts\['vision'\]; got adapters with lengths\.", "wanted names for its rows; got no"),
    "lengths that are too short": ({"lengths": [3, 3]}, "6 tokens for a batch of 7", "got 6 for a batch of 7"),
    "more lengths than names": ({"lengths": [3, 3, 1]}, "2 numbers of tokens", "got 3 lengths for 2 names"),
    "a length of nought": ({"lengths": [7, 0]}, "of at least 1", "wanted a length of at least 1 for each name"),
    "a name too few": (
        {"parts": {"vision": [None]}},
        r"vision'\]: .* got 1 name for a batch of 2",
        "got 1 for a batch",
    ),
    "another part": ({"parts": {"vision": [None] * 2, "text": [None] * 7}}, r"parts\['text'\]", "got text"),
}


def test_rows_that_the_file_does_not_ask_for_are_refused(album: Path, program: Path) -> None:
    served, inputs = xlc.load_artifact(album), inputs_for([3, 4], 2)
    right: dict[str, Any] = {"lengths": [3, 4], "parts": {"vision": [None, None]}}
    served(**inputs, adapters=[None, None], **right)
    for change, words, cpp_words in WRONG.values():
        given = right | change
        with pytest.raises(xlc.LoraError, match=words):
            served(**inputs, adapters=[None, None], **given)
        step = {"rows": [None, None], "parts": given["parts"], "lengths": given["lengths"] or []}
        status, said = serve_pt2.run_program(program, album, [step], {f"0.{key}": x for key, x in inputs.items()})
        assert (status, cpp_words in said) == (2, True), said


class Logits(nn.Module):
    """What else LLaVA returns holds None in a list, which no file can."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.model(**inputs).logits
        return logits


def test_an_image_model_of_transformers_gets_as_far_as_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llava().to(DEVICE).eval().requires_grad_(False)
    bank = xlc.attach(model, slots=2, max_rank=4)
    inputs: dict[str, Any] = {name: tensor.to(DEVICE) for name, tensor in llava_batch([2, 0, 1]).items()}
    inputs["use_cache"] = False
    parts = {name: [None] * 3 for name in ("vision_tower", "multi_modal_projector")}
    with bank.use([None] * 3, parts=parts):
        admitted(tmp_path, monkeypatch, Logits(model).eval(), (), kwargs=inputs)
    # Outside of a block nobody says which parts have rows of their own.
    with pytest.raises(xlc.LoraError, match=r"wanted one row of slots; got parts that have had names of their own"):
        xlc.export(Logits(model).eval(), tmp_path / "a.pt2", kwargs=inputs)


def test_a_block_that_does_not_fit_the_inputs(tmp_path: Path) -> None:
    model, bank = attached_album()
    inputs = inputs_for([3, 4], 3)
    with bank.use([None, None], lengths=[3, 5]), pytest.raises(xlc.LoraError, match="lengths of 8 in all for inputs"):
        xlc.export(model, tmp_path / "a.pt2", kwargs=inputs)
    with (
        bank.use([None], lengths=[7], parts={"vision": [None] * 3}),
        pytest.raises(xlc.LoraError, match="names for at least two sequences; got a `use` block of one"),
    ):
        xlc.export(model, tmp_path / "a.pt2", kwargs=inputs)
    with (
        bank.use([None] * 2, lengths=[3, 4], parts={"vision": [None]}),
        pytest.raises(xlc.LoraError, match="names for at least two sequences; got one for vision"),
    ):
        xlc.export(model, tmp_path / "a.pt2", kwargs=inputs)


def test_tokens_that_become_one_row(tmp_path: Path) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.pairs = nn.Embedding(30, 4), nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            result: Tensor = self.pairs(self.words(tokens).unflatten(1, (-1, 2)).flatten(2))
            return result

    model = Pairs().eval().requires_grad_(False).to(DEVICE)
    bank = xlc.attach(model, slots=2, max_rank=2)
    tokens = torch.zeros(1, 10, dtype=torch.long, device=DEVICE)
    with (
        bank.use([None] * 2, lengths=[4, 6]),
        pytest.raises(xlc.LoraError, match="got several tokens of a packed row in one row of pairs"),
    ):
        xlc.export(model, tmp_path / "a.pt2", (tokens,))


def test_a_block_of_another_thread(tmp_path: Path) -> None:
    model, bank = attached_album()
    said: list[str] = []

    def export() -> None:
        with pytest.raises(xlc.LoraError, match="a bank that nobody else uses") as error:
            xlc.export(model, tmp_path / "a.pt2", kwargs=inputs_for([3, 4], 3))
        said.append(str(error.value))

    with bank.use([None, None], lengths=[3, 4]):
        thread = threading.Thread(target=export)
        thread.start()
        thread.join()
    assert said
