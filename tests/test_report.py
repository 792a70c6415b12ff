"""`Report`: the table for a terminal, JSON, and which sites make a row together."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline

from xpu_lora_compile.inspect.report import GraphReport, NodeReport, Report, SiteReport
from xpu_lora_compile.passes.calls import ROUTINGS

Q_PROJ = SiteReport(
    module="layers.0.attn.q_proj",
    source="/home/me/model.py:12",
    op="bgmv_expand",
    shapes={"T": "4", "D": "16", "R": "2", "K": "8", "W": "16", "H": "16"},
    dtypes={"output": "f32", "inputs": "f32", "A": "f32", "B": "f32"},
    relation="equal",
    guard=None,
    call="add_lora 0",
    fused_with=["layers.0.attn.k_proj"],
    kernel="gather",
    because="few rows",
    others={"dense": "many slots"},
    bytes=1000,
    floor_us=0.1,
    reaches_output=True,
    notes=["fuse_lora: fused"],
)
K_PROJ = replace(Q_PROJ, module="layers.0.attn.k_proj", fused_with=["layers.0.attn.q_proj"])
HEAD = replace(
    Q_PROJ,
    module="lm_head",
    shapes={**Q_PROJ.shapes, "W": "61", "H": "s7"},
    relation="narrower",
    guard="s7 > 61",
    call="expand_slice 2",
    fused_with=[],
    floor_us=0.8,
    notes=["not fused: because"],
)


def in_layer(site: SiteReport, layer: int) -> SiteReport:
    """The same site of another layer."""
    names = [name.replace(".0.", f".{layer}.") for name in (site.module, *site.fused_with)]
    return replace(site, module=names[0], fused_with=names[1:], call=f"add_lora {layer}")


def report_of(*sites: SiteReport) -> Report:
    """A report with these sites and one small graph."""
    node = NodeReport("%0", "f32[4, 16]", "input", "input", "x", "", [], [], [], [], [])
    graph = GraphReport([node], [node], {"bgmv_expand": 3}, {"add_lora": 2, "route": 1})
    return Report(list(sites), [graph], 10.0, "as told", 0.5, 2.0, True, {"torch": "2.13.0"})


SITES = (Q_PROJ, K_PROJ, in_layer(Q_PROJ, 1), in_layer(K_PROJ, 1), HEAD)


def test_like_sites_of_different_layers_are_one_group() -> None:
    groups = report_of(*SITES).groups()
    assert [[site.module for site in group] for group in groups] == [
        ["layers.0.attn.q_proj", "layers.1.attn.q_proj"],
        ["layers.0.attn.k_proj", "layers.1.attn.k_proj"],
        ["lm_head"],
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": {**Q_PROJ.shapes, "W": "8"}},
        {"dtypes": {**Q_PROJ.dtypes, "B": "bf16"}},
        {"kernel": "dense"},
        {"reaches_output": False},
        {"guard": "s7 == 16"},
        {"fused_with": []},
        {"source": "/home/me/model.py:13"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_sites_that_differ_in_more_than_their_layer_are_not_grouped(change: dict[str, object]) -> None:
    other = replace(in_layer(Q_PROJ, 1), **change)
    assert report_of(Q_PROJ, other).groups() == [[Q_PROJ], [other]]


def shown(report: Report, width: int, patch: pytest.MonkeyPatch) -> str:
    """The report as a terminal of this width shows it, without blank lines."""
    patch.setenv("COLUMNS", str(width))
    return "\n".join(filter(None, str(report).split("\n")))


def above_the_sentences(text: str) -> str:
    return re.split(r"\n\d+ sites? became", text)[0]


def test_report_is_a_table_and_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(report_of(*SITES), 140, monkeypatch)
    assert_expected_inline(
        above_the_sentences(text),
        """\
sites  where                 T x D -> R -> W in H     K  dtypes  widths      becomes       kernel  floor
─────────────────────────────────────────────────────────────────────────────────────────────────────────
2      layers.*.attn.q_proj  4 x 16 -> 2 -> 16 in 16  8  f32     equal       add_lora      gather  0.1 us
       me/model.py:12                                                        + k_proj
2      layers.*.attn.k_proj  4 x 16 -> 2 -> 16 in 16  8  f32     equal       add_lora      gather  0.1 us
       me/model.py:12                                                        + q_proj
1      lm_head               4 x 16 -> 2 -> 61 in s7  8  f32     narrower    expand_slice  gather  0.8 us
       me/model.py:12                                            if s7 > 61""",
    )
    assert_expected_inline(
        text.removeprefix(above_the_sentences(text)).strip(),
        """\
5 sites became 3 calls, with 1 routing computation, in 1 graph.
Every site reaches the output of its graph.
Floor of all LoRA: 1.2 us, at 10 GB/s (as told).
The passes took 0.5 s of 2 s for the first call, with Inductor: 25 %.
Runs on kernel gather: few rows.
Not on dense: many slots.
not fused: because: lm_head.""",
    )


def test_what_has_no_column_in_a_terminal_of_80_columns_stands_below(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_expected_inline(
        above_the_sentences(shown(report_of(*SITES), 80, monkeypatch)),
        """\
#  sites  where    T x D -> R -> W in H     K  dtypes  widths    kernel  floor
───────────────────────────────────────────────────────────────────────────────
1  2      q_proj   4 x 16 -> 2 -> 16 in 16  8  f32     equal     gather  0.1 us
2  2      k_proj   4 x 16 -> 2 -> 16 in 16  8  f32     equal     gather  0.1 us
3  1      lm_head  4 x 16 -> 2 -> 61 in s7  8  f32     narrower  gather  0.8 us
In every row: me/model.py:12.
1  layers.*.attn.q_proj,
   becomes add_lora + k_proj
2  layers.*.attn.k_proj,
   becomes add_lora + q_proj
3  guarded by s7 > 61,
   becomes expand_slice""",
    )


LONG = "base_model.model.model.language_model.layers.0.self_attention"
SYMBOLS = {"T": "s77 (here 1024)", "D": "14336", "R": "s8 (here 64)", "K": "64", "W": "s20", "H": "s90"}
MANY = {"T": "1024", "D": "4096", "R": "16+16+16", "K": "s64 (here 8)", "W": "4096+1024+1024", "H": "128256"}
WIDE_SITES = (
    replace(
        Q_PROJ,
        module=f"{LONG}.q_proj",
        shapes=SYMBOLS,
        guard="s20 < s90 and Eq(Mod(s20, 8), 0) or Ne(s8, 64)",
        kernel="vllm-xpu-kernels",
        dtypes={"output": "bf16", "inputs": "f16", "A": "f32", "B": "f64"},
        fused_with=[f"{LONG}.k_proj", f"{LONG}.v_proj", f"{LONG}.a_projection_with_a_long_name"],
    ),
    replace(Q_PROJ, module="", source="/home/me/a/folder_with_a_name/and_a_module_that_has_a_long_name.py:1234"),
    replace(Q_PROJ, module=f"{LONG}.a_projection_with_a_long_name", shapes=MANY, call="vendor_add_lora 3"),
)


def in_lines(word: str) -> list[str]:
    """The word; of a path that is longer than a line in a terminal of 80 columns, its last name and the rest."""
    return [word] if len(word) <= 76 else [word[: word.rindex(".") + 1], word[word.rindex(".") + 1 :]]


@pytest.mark.parametrize("width", [80, 100, 140, 200])
@pytest.mark.parametrize("sites", [SITES, SITES[-1:], WIDE_SITES, WIDE_SITES[:1], WIDE_SITES[1:2], WIDE_SITES[2:]])
def test_every_word_of_a_site_is_whole(
    sites: tuple[SiteReport, ...], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(report_of(*sites), width, monkeypatch)
    assert max(map(len, text.split("\n"))) <= width
    words = set(re.split(r"[\s,]+", text.replace("; ", " "))) | {word.rstrip(".,") for word in text.split()}
    for site in sites:
        facts = [*site.shapes.values(), site.relation, site.guard or "", site.kernel, site.call.split()[0]]
        facts += [re.sub(r"\.\d(?=\.)", ".*", site.module), "/".join(Path(site.source).parts[-2:])]
        facts += ["/".join(dict.fromkeys(site.dtypes.values())), f"{site.floor_us:.3g}"]
        facts += [place.rsplit(".", 1)[-1] for place in site.fused_with]
        missing = {word.rstrip(",") for fact in facts for word in fact.split()} - words
        assert {piece for word in missing for piece in in_lines(word)} <= words


def test_reasons_that_differ_in_numbers_alone_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    point = "measured fastest at the nearest point, D = {}, W = 576, {}"
    sites = [
        replace(Q_PROJ, because=point.format(size, dtype), others={"dense": f"{slower} times slower there"})
        for size, dtype, slower in ((576, "float32", "4.3"), (1536, "float32", "10.5"), (64, "float16", "4.3"))
    ]
    text = shown(report_of(*sites), 200, monkeypatch)
    assert re.findall(r"Runs on .*|Not on .*", text) == [
        f"Runs on kernel gather: {point.format('576 to 1536', 'float32')}; {point.format(64, 'float16')}.",
        "Not on dense: 4.3 to 10.5 times slower there.",
    ]


def test_a_kernel_has_two_lines_of_reasons_whatever_its_sites_say(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = "abcdefgh"
    sites = [replace(Q_PROJ, because=f"{one} " * 30, others={"dense": f"{one} " * 50}) for one in letters]
    sites += [replace(Q_PROJ, kernel="dense", because="many slots", others={"gather": "many slots"})]
    lines = shown(report_of(*sites), 80, monkeypatch).split("\n")
    reasons = lines[next(at for at, line in enumerate(lines) if line.startswith("Runs on kernel")) :]
    starts = [at for at, line in enumerate(reasons) if line.startswith(("Runs on kernel ", "Not on "))]
    assert [reasons[at].split(": ")[0] for at in starts] == ["Runs on kernel gather", "Runs on kernel dense"]
    assert all(after - at <= 2 for at, after in itertools.pairwise([*starts, len(reasons)]))
    assert "Runs on kernel dense: many slots. Not at every site: a a a" in " ".join(lines)


@pytest.mark.parametrize("op", ROUTINGS, ids=str)
def test_whatever_computes_a_routing_is_counted(op: Any) -> None:
    report = report_of(Q_PROJ)
    report.graphs[0].calls_after = {"add_lora": 1, op._schema.name.split("::")[1]: 1}
    assert report.counts["routings"] == 1
    assert "1 site became 1 call, with 1 routing computation, in 1 graph." in str(report)


def test_sites_without_influence_are_said_in_capitals() -> None:
    assert "NOT REACHED, what its graph returns: " in str(report_of(replace(Q_PROJ, reaches_output=False)))


def test_report_without_sites_is_printed() -> None:
    assert "No call that adds LoRA in 1 graph." in str(report_of())


def test_json_gives_back_every_site_and_node() -> None:
    report = report_of(*SITES)
    data = json.loads(report.to_json())
    assert [SiteReport(**site) for site in data["sites"]] == report.sites
    assert [
        GraphReport(*([NodeReport(**node) for node in graph[side]] for side in ("before", "after")), *calls)
        for graph in data["graphs"]
        for calls in [(graph["calls_before"], graph["calls_after"])]
    ] == report.graphs
    assert data["counts"] == {"sites": 5, "calls": 3, "routings": 1, "graphs": 1}


def test_json_names_the_groups_by_the_positions_of_their_sites() -> None:
    assert json.loads(report_of(*SITES).to_json())["groups"] == [
        {"place": "layers.*.attn.q_proj", "sites": [0, 2]},
        {"place": "layers.*.attn.k_proj", "sites": [1, 3]},
        {"place": "lm_head", "sites": [4]},
    ]
