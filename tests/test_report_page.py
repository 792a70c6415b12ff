"""The page that `Report.save_html` writes, in a real browser, clicked through as a reader would."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from playwright.sync_api import ConsoleMessage, Error, Page, Route, expect, sync_playwright
from support.peft_folders import tiny_llama
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import DeadAdapterError
from xpu_lora_compile.inspect.report import Report
from xpu_lora_compile.kernels import force_kernel

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EVIL = "</script><img src=x onerror=alert(1)><!--<script>"

Open = Callable[[Report], Page]


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One tab of the system's browser; playwright's own browsers are not downloaded."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"NO BROWSER: none of {', '.join(BROWSERS)} is on PATH, so THE REPORT'S PAGE IS NOT TESTED")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(10_000)
        yield page
        browser.close()


@pytest.fixture
def open_page(tab: Page, tmp_path: Path) -> Iterator[Open]:
    """A function that saves a report and opens it without a network; the page may complain of nothing."""
    file = tmp_path / "report.html"
    complaints: list[str] = []
    requests: list[str] = []

    def answer(route: Route) -> None:
        requests.append(route.request.url)
        if route.request.url == file.as_uri():
            route.continue_()
        else:
            route.abort()

    def complain(trouble: ConsoleMessage | Error) -> None:
        complaints.append(str(trouble))

    def open_(report: Report) -> Page:
        report.save_html(file)
        tab.set_viewport_size({"width": 1440, "height": 900})
        tab.goto(file.as_uri())
        return tab

    tab.route("**/*", answer)
    tab.on("console", complain)
    tab.on("pageerror", complain)
    yield open_
    tab.unroute("**/*", answer)
    tab.remove_listener("console", complain)
    tab.remove_listener("pageerror", complain)
    assert complaints == []
    assert requests == [file.as_uri()]


@pytest.fixture(scope="module")
def llama() -> Report:
    """A Llama of two layers, with LoRA on all its linear layers and the padded vocabulary.

    With a kernel that wants a routing, which so has its place in the drawings.
    """
    model = tiny_llama()
    bank = xlc.attach(model, slots=3, max_rank=4, target_modules=r".*(_proj|lm_head)", vocab_size=67)
    with bank.use([None, None]), torch.no_grad(), force_kernel("gather"):
        return xlc.explain(model, bandwidth=20)(torch.zeros(2, 5, dtype=torch.long), use_cache=False)


class Halves(nn.Module):
    """Two linear layers, and a graph break in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """The second after the first."""
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.fixture(scope="module")
def halves() -> Report:
    """Two graphs with one site each."""
    model = Halves()
    bank = xlc.attach(model, slots=2, max_rank=2)
    with bank.use([None]), torch.no_grad():
        return xlc.explain(model, bandwidth=20)(torch.zeros(1, 4))


def drawn(page: Page, side: str) -> list[str]:
    """The names of the LoRA nodes in a drawing."""
    return sorted(page.locator(f"#drawing-{side} g.lora .name").all_text_contents())


def row_of(page: Page, module: str) -> Any:
    """The table's row of a module."""
    return page.locator("tbody tr").filter(has=page.get_by_text(module, exact=True))


def test_verdict_and_totals_are_those_of_the_report(open_page: Open, llama: Report) -> None:
    page = open_page(llama)
    expect(page.locator("h1")).to_have_text(
        "15 LoRA sites became 9 calls, 1 routing computation; every site reaches the output."
    )
    expect(page.locator("#totals")).to_contain_text("at 20 GB/s (as told)")
    expect(page.locator("#alarm")).to_be_hidden()


def test_table_has_a_row_for_each_group_and_unfolds_to_the_sites(open_page: Open, llama: Report) -> None:
    page, rows = open_page(llama), len(llama.groups())
    expect(page.locator("tbody tr")).to_have_count(rows)
    row_of(page, "model.layers.*.mlp.gate_proj").locator(".toggle").click()
    expect(page.locator("tbody tr")).to_have_count(rows + 2)
    expect(row_of(page, "model.layers.1.mlp.gate_proj")).to_be_visible()


def test_table_is_sorted_by_a_heading_and_back(open_page: Open, llama: Report) -> None:
    page = open_page(llama)
    first = page.locator("tbody tr").first
    expect(first).to_contain_text("q_proj")
    page.get_by_role("button", name="floor").click()
    expect(first).to_contain_text("lm_head")
    page.get_by_role("button", name="floor").click()
    expect(first).not_to_contain_text("lm_head")
    page.get_by_role("button", name="floor").click()
    expect(first).to_contain_text("q_proj")


def test_table_is_filtered_by_text(open_page: Open, llama: Report) -> None:
    page = open_page(llama)
    page.fill("#filter", "narrower")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("tbody tr")).to_contain_text("lm_head")
    expect(page.locator("#shown")).to_have_text("1 of 15 sites")


def test_fused_sites_are_drawn_as_three_chains_and_one_call(open_page: Open, llama: Report) -> None:
    page = open_page(llama)
    row_of(page, "model.layers.*.self_attn.k_proj").click()
    expect(page.locator("#chosen")).to_have_text("model.layers.0.self_attn.k_proj")
    assert drawn(page, "before") == ["bgmv_expand"] * 3 + ["bgmv_shrink"] * 3
    assert drawn(page, "after") == ["add_lora"]
    assert page.locator("#drawing-before .edge.after").count() >= 3
    expect(page.locator("#drawing-after g.routing")).to_have_count(1)


def test_drawn_boxes_do_not_overlap(open_page: Open, llama: Report) -> None:
    page = open_page(llama)
    overlaps = page.evaluate(
        """() => {
          const found = [];
          for (const drawing of document.querySelectorAll(".drawing")) {
            const boxes = [...drawing.querySelectorAll("rect")].map((rect) => rect.getBoundingClientRect());
            boxes.forEach((a, at) => boxes.slice(at + 1).forEach((b) => {
              if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) found.push([a, b]);
            }));
          }
          return found;
        }"""
    )
    assert overlaps == []


def test_arrow_keys_move_through_the_sites(open_page: Open, llama: Report) -> None:
    page = open_page(llama)
    page.locator("tbody tr").first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#chosen")).to_have_text("model.layers.0.self_attn.k_proj")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#chosen")).to_have_text("model.layers.1.self_attn.k_proj")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("tbody tr")).to_have_count(len(llama.groups()))


def test_whole_graph_has_a_line_for_each_node(open_page: Open, llama: Report) -> None:
    page, graph = open_page(llama), llama.graphs[0]
    page.get_by_role("tab", name="Whole graph").click()
    for side, nodes in (("before", graph.before), ("after", graph.after)):
        lines = page.locator(f"#listing-{side} .row")
        expect(lines).to_have_count(len(nodes))
        assert nodes[-1].text in (lines.last.text_content() or "")


def test_whole_graph_is_filtered_by_text_and_to_lora(open_page: Open, llama: Report) -> None:
    page, graph = open_page(llama), llama.graphs[0]
    page.get_by_role("tab", name="Whole graph").click()
    shown = page.locator("#listing-after .row:not([hidden])")
    page.fill("#filter", "add_lora")
    expect(shown).to_have_count(graph.calls_after["add_lora"])
    page.fill("#filter", "")
    page.get_by_label("only LoRA").check()
    assert graph.calls_after["add_lora"] < shown.count() < len(graph.after)


def test_line_shows_its_operands_its_users_and_its_twin(open_page: Open, llama: Report) -> None:
    page, graph = open_page(llama), llama.graphs[0]
    page.get_by_role("tab", name="Whole graph").click()
    at = next(at for at, node in enumerate(graph.before) if node.sites == [0])
    page.locator(f"#before-{at}").click()
    operands = page.locator("#listing-before .operand")
    expect(operands).to_have_count(len({*graph.before[at].inputs, *graph.before[at].after}))
    expect(page.locator("#listing-before .user")).not_to_have_count(0)
    twin = page.locator("#listing-after .row.here")
    expect(twin).to_contain_text("add_lora")
    expect(twin).to_be_in_viewport()


def test_box_leads_to_its_line(open_page: Open, llama: Report) -> None:
    page = open_page(llama)
    page.locator("#drawing-after g.lora").click()
    expect(page.locator("#listing-after .row.here")).to_contain_text("add_lora")
    expect(page.locator("#listing-after .row.here")).to_be_in_viewport()


def test_each_graph_has_its_own_sites_and_lines(open_page: Open, halves: Report) -> None:
    page = open_page(halves)
    graphs = page.locator("#graphs select")
    expect(graphs.locator("option")).to_have_count(2)
    for number, name in enumerate(("first", "second")):
        graphs.select_option(str(number))
        expect(page.locator("tbody tr")).to_have_count(1)
        expect(page.locator("#chosen")).to_have_text(name)
        page.get_by_role("tab", name="Whole graph").click()
        expect(page.locator("#listing-before .row")).to_have_count(len(halves.graphs[number].before))
        page.get_by_role("tab", name="Sites").click()


def test_selector_of_graphs_is_hidden_where_there_is_one(open_page: Open, llama: Report) -> None:
    expect(open_page(llama).locator("#graphs")).to_be_hidden()


def test_model_without_lora_shows_its_graph(open_page: Open) -> None:
    with pytest.raises(DeadAdapterError) as caught:
        xlc.explain(nn.Linear(3, 3), bandwidth=20)(torch.zeros(1, 3))
    report: Report = caught.value.report
    page = open_page(report)
    expect(page.locator("h1")).to_have_text("No call in this model adds LoRA.")
    expect(page.locator("#alarm")).to_contain_text("wanted a call that adds LoRA")
    expect(page.locator("#listing-before .row")).to_have_count(len(report.graphs[0].before))
    page.get_by_role("tab", name="Sites").click()
    expect(page.locator("#table")).to_contain_text("nothing to rewrite")


def test_site_without_influence_cannot_be_overlooked(open_page: Open) -> None:
    def forgets(x: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        lost = torch.zeros(2, 3)
        xlc.bgmv_expand(lost, x, b, indices)
        return x + 1

    with pytest.raises(DeadAdapterError) as caught:
        xlc.explain(forgets, bandwidth=20)(torch.zeros(2, 1), torch.zeros(1, 3, 1), torch.zeros(2, dtype=torch.long))
    report: Report = caught.value.report
    page = open_page(report)
    expect(page.locator("#alarm")).to_be_visible()
    expect(page.locator("h1")).to_contain_text("without influence")
    expect(page.locator("tbody tr.dead")).to_contain_text("NOT REACHED")
    expect(page.locator("#drawing-before .dead")).to_contain_text("reaches no output")


def test_colours_follow_the_readers_scheme(open_page: Open, llama: Report) -> None:
    page, brightness = open_page(llama), {}
    schemes: tuple[Literal["dark"], Literal["light"]] = ("dark", "light")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        brightness[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert int(brightness["dark"]) < 60
    assert int(brightness["light"]) > 200


def test_narrow_window_stacks_the_drawings_and_never_scrolls_sideways(open_page: Open, llama: Report) -> None:
    page = open_page(llama)
    page.set_viewport_size({"width": 900, "height": 800})
    before, after = (page.locator(f"#drawing-{side}").bounding_box() for side in ("before", "after"))
    assert before is not None
    assert after is not None
    assert after["y"] >= before["y"] + before["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 900


def test_markup_in_a_name_stays_text(open_page: Open) -> None:
    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(EVIL, nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return next(iter(self.children()))(x)

    model = Evil()
    bank = xlc.attach(model, slots=2, max_rank=2)
    with bank.use([None]), torch.no_grad():
        report = xlc.explain(model, bandwidth=20)(torch.zeros(1, 4))
    page = open_page(report)
    expect(page.locator("#chosen")).to_have_text(EVIL)
    page.get_by_role("tab", name="Whole graph").click()
    expect(page.locator("#listing-before .row.lora")).to_have_count(2)
    assert page.locator("img").count() == 0
    assert page.title() == "LoRA in the compiled graph"
