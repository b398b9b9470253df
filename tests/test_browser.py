"""Reports in a real browser: nothing on the console, every chart there, no overflow on a phone, readable contrast."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, needs_chromium
from test_report import make_run

from minitron_cli.config.run import RunConfig
from minitron_cli.report.stage import write_report
from minitron_cli.stages import run_recipe

pytestmark = needs_chromium

SMALL = (
    "data.max_tokens=20000", "data.seq_len=64", "importance.samples=8", "importance.loss_samples=4",
    "search.candidates=2", "search.steps=2", "search.eval_sequences=4", "search.batch_size=2", "distill.steps=4",
    "distill.eval_every=2", "distill.save_every=4", "distill.batch_size=2", "distill.eval_sequences=4",
    "eval.max_sequences=4", "bench.batch_size=[1]", "bench.context=[16]", "bench.rounds=1", "bench.new_tokens=4",
)  # fmt: skip
"""The quickstart in seconds: every stage of it, with less of everything."""

DRAWN = "[...document.querySelectorAll('svg[role=img]')].filter((each) => each.getBoundingClientRect().width > 0)"

PALE = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const curve = (share) => share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  const light = (value) => curve(value / 255);
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = channels(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const pale = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((each) => each.nodeType === 3 && each.textContent.trim());
    if (!own || !node.getClientRects().length || ["SCRIPT", "title"].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const ink = channels(node.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const two = [luminance(ink), luminance(ground(node))].sort((a, b) => b - a);
    const contrast = (two[0] + 0.05) / (two[1] + 0.05);
    const text = node.textContent.trim().slice(0, 30);
    if (contrast < 4.5) pale.push(`${contrast.toFixed(2)} ${node.tagName}.${node.getAttribute("class")} ${text}`);
  }
  return pale;
})()"""
"""Texts with less than 4.5 : 1 between their colour and what is behind them (WCAG 2.2, 1.4.3)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "quickstart"
    run_recipe(RunConfig(recipe="quickstart", out=out, set=SMALL))
    return out / "report.html"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page with every section, of invented numbers, and one of two runs side by side."""
    root = tmp_path_factory.mktemp("pages")
    runs = [make_run(root / name, tasks=True, bench=True) for name in ("one", "two")]
    return {"whole": write_report(runs[0]), "several": write_report(runs, root / "several.html")}


def alright(page: Page, path: Path) -> None:
    """What holds for every page at every width."""
    assert page.console == []
    assert page.requests == [path.resolve().as_uri()]  # itself and nothing else
    wide, there = page.ask("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= there, f"the page is {wide} px wide in a window of {there}"
    assert page.ask(PALE) == []


def charts(page: Page) -> list[str]:
    """What the drawings that can be seen say of themselves; each has a size and ink."""
    found: list[str] = page.ask(f"{DRAWN}.map((each) => each.getAttribute('aria-label'))")
    assert page.ask(f"{DRAWN}.every((each) => each.getBoundingClientRect().height > 5 && each.childElementCount)")
    return found


def begins(labels: list[str], words: str) -> bool:
    return any(label.startswith(words) for label in labels)


QUICKSTART = (
    "Validation loss over training tokens", "Training loss of the distilled model", "The network before",
    "2 candidates by parameters and loss", "Block importance", "Loss increase without the layer",
    "FFN neurons, layer by layer", "Hidden channels", "Attention heads", "Reading prompts, tokens per second",
    "Generating, tokens per second", "Time to the first token", "Largest memory", "KV cache",
)  # fmt: skip


@pytest.mark.parametrize(("width", "dark"), [(1000, False), (1000, True), (390, False), (390, True)])
def test_the_quickstart_report(browser: Browser, quickstart: Path, width: int, dark: bool) -> None:
    page = browser.open(quickstart, width=width, dark=dark)
    alright(page, quickstart)
    labels = charts(page)
    assert not [words for words in QUICKSTART if not begins(labels, words)]
    ground = page.ask("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize("name", ["whole", "several"])
@pytest.mark.parametrize("width", [1000, 390])
def test_pages_with_everything(browser: Browser, whole: dict[str, Path], name: str, width: int) -> None:
    page = browser.open(whole[name], width=width)
    alright(page, whole[name])
    wanted = ("Share of the teacher's value by task",) if name == "whole" else ("Students by", "Validation loss over")
    assert all(begins(charts(page), words) for words in wanted)


def test_it_can_be_read_without_eyes(browser: Browser, whole: dict[str, Path]) -> None:
    """Headings in order, every drawing told in words, every table with headers, every region named."""
    page = browser.open(whole["whole"])
    levels: list[int] = page.ask("[...document.querySelectorAll('h1, h2, h3')].map((each) => Number(each.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.ask("document.documentElement.lang") == "en"
    everything = "[...document.querySelectorAll('{}')].every((each) => {})"
    named = "each.closest('[aria-hidden], [aria-label]') || each.getAttribute('aria-labelledby')"
    for what, holds in (
        ("svg", named),
        ("[role=region], section", named),
        ("table", "each.querySelector('th[scope=col]')"),
        ("nav a", "document.querySelector(each.hash)"),
    ):
        assert page.ask(everything.format(what, holds)), what


def test_pale_text_would_be_seen(browser: Browser, whole: dict[str, Path]) -> None:
    """Guards the test of contrast."""
    page = browser.open(whole["whole"])
    page.ask("document.querySelector('h1').style.color = '#8a8a8a'")
    (found,) = page.ask(PALE)
    assert found.startswith("3.4") and found.endswith("H1.null quickstart")


def test_tables_are_copied_as_cells(browser: Browser, whole: dict[str, Path]) -> None:
    page = browser.open(whole["whole"])
    copied = """(async () => {
      let text = null;
      Object.defineProperty(navigator, "clipboard", {value: {writeText: async (given) => { text = given; }}});
      document.querySelector(".copy").click();
      await new Promise((done) => setTimeout(done, 20));
      return text;
    })()"""
    rows: Any = [row.split("\t") for row in page.ask(copied).split("\n")]
    assert rows[0][:2] == ["model", "params"] and rows[3][:3] == ["distilled", "875,728", "54.7 %"]
    assert page.ask("document.querySelectorAll('.copy').length === document.querySelectorAll('.scroll table').length")
