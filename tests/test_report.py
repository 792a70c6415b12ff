"""`Report`: the table for a terminal, JSON, and which sites make a row together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from expecttest import assert_expected_inline

from xpu_lora_compile.report import GraphReport, NodeReport, Report, SiteReport

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


def test_report_is_a_table_and_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "116")
    table, sentences = str(report_of(*SITES)).split("└", 1)
    lines = [line.replace("│", "|").replace("┃", "|").rstrip() for line in table.splitlines()]
    assert_expected_inline(
        "\n".join(line for line in lines if line.startswith("|")),
        """\
| sites | where                | T x D -> R -> W in H   | K | dtypes | widths     | becomes      | kernel | floor  |
| 2     | layers.*.attn.q_proj | 4 x 16 -> 2 -> 16 in   | 8 | f32    | equal      | add_lora     | gather | 0.1 us |
|       | me/model.py:12       | 16                     |   |        |            | + k_proj     |        |        |
| 2     | layers.*.attn.k_proj | 4 x 16 -> 2 -> 16 in   | 8 | f32    | equal      | add_lora     | gather | 0.1 us |
|       | me/model.py:12       | 16                     |   |        |            | + q_proj     |        |        |
| 1     | lm_head              | 4 x 16 -> 2 -> 61 in   | 8 | f32    | narrower   | expand_slice | gather | 0.8 us |
|       | me/model.py:12       | s7                     |   |        | if s7 > 61 |              |        |        |""",
    )
    assert_expected_inline(
        sentences.split("\n", 1)[1],
        """\
5 sites became 3 calls, with 1 routing computation, in 1 graph.
Every site reaches the output of its graph.
Floor of all LoRA: 1.2 us, at 10 GB/s (as told).
The passes took 0.5 s of 2 s for the first call, with Inductor: 25 %.
Runs on kernel gather: few rows.
Not on dense: many slots.
not fused: because: lm_head.""",
    )


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
