"""The page of a report: whole in one file, made for all readers, and safe whatever names it shows."""

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import CHROMIUM, open_page
from helpers.reports import arrays, report

from asapc.writing.html import render

HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(1)>" onload='alert(1)' {{ 7*7 }} $x^{$ &amp;"""
MAX_BYTES = 2 * 10**6
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements of a page with their attributes and the text in them; tags that are not closed are errors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(report(), arrays()))


def test_the_verdict_comes_first_and_every_section_has_a_heading(page):
    assert "PASSED" in page.texts["header"][0]
    assert page.texts["h1"] == ["model.pt"]
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[:2] == [1, 2]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    targets = {attributes["href"] for attributes in page.all("a")}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert targets == {f"#{i}" for i in ids if not i.endswith("-h")}
    for section in page.all("section"):
        assert section["aria-labelledby"] in ids


def test_the_page_loads_nothing(page):
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name == "src":
                assert value.startswith("data:image/")
            if name == "href":
                assert value.startswith("#")
    style = page.texts["style"][0]
    assert "url(" not in style
    assert "&" not in style
    assert style.count("{") == style.count("}")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_figure_is_there_and_described(page):
    images = page.all("img")
    # Of each site a curve where two operators are known, sums, a scatter, and three maps of each of two samples.
    assert len(images) == 1 + 3 * (2 + 3 * 2)
    assert all(len(image["alt"]) > 20 for image in images)
    assert len(page.all("figcaption")) == len(page.all("figure")) == 1 + 3 * 4


def test_tables_have_heads_and_the_page_a_language(page):
    assert page.all("html") == [{"lang": "en"}]
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    assert page.texts["thead"]
    bars = [attributes for _, attributes in page.elements if "bar" in (attributes.get("class") or "").split()]
    assert bars
    assert all(attributes["aria-hidden"] == "true" for attributes in bars)


def test_the_page_says_what_the_report_says(page):
    data = report()
    text = page.texts["main"][0]
    for term in data["verdict"]["terms"]:
        assert term["term"] in text
    for name in ("teacher", "exact", "truncated", "softmax", "compiled"):
        assert name in text
    assert data["command"] in text
    assert data["date"] in text
    assert "truncated 3 at a, would take 2.50 ms" in " ".join(text.split())
    assert "no finite number" in text


def hostile(value: object) -> object:
    """A report with all its free strings replaced."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_names_are_shown_and_are_no_markup(page):
    data = report()
    kept = ("schema", "verdict", "budget", "latency", "fidelity")
    changed = {key: value if key in kept else hostile(value) for key, value in data.items()}
    for site, of_data in zip(changed["sites"], data["sites"], strict=True):
        site["choice"] |= {key: of_data["choice"][key] for key in ("operator", "features", "front", "lowering")}
    changed["engine"] = {"status": "failed", "reason": HOSTILE, "node": None}
    text = render(changed, arrays())
    mutant = Page(text)
    assert {tag for tag, _ in mutant.elements} == {tag for tag, _ in page.elements}
    assert HOSTILE in mutant.texts["h1"][0] or Path(HOSTILE).name in mutant.texts["h1"][0]
    assert all(not name.startswith("on") for _, attributes in mutant.elements for name in attributes)
    assert "{{ 7*7 }}" in mutant.texts["main"][0]
    assert "49" not in mutant.texts["h1"][0]


def test_twelve_layers_with_long_sequences_stay_below_two_megabytes():
    data = report()
    data["sites"] = [data["sites"][0] | {"name": f"encoder.layers.{n}.attention"} for n in range(12)]
    text = render(data, arrays(sites=12, size=64))
    assert len(text.encode()) < MAX_BYTES
    assert text.count("<img") == 12 * 9


def test_a_report_without_arrays_has_the_page_without_those_figures():
    page = Page(render(report(), {}))
    assert len(page.all("img")) == 1
    assert "model.pt" in page.texts["h1"]


def test_intervals_are_drawn_where_they_are_known():
    data = report()
    data["latency"]["ratios"] = []
    assert "95 % intervals" not in render(data, {})
    finding = {"truncated": "not significantly different", "softmax": "identical"}
    data["latency"]["warnings"] = ["the machine was busy <b>"]
    data["latency"]["ratios"] = [
        {"batch": 32, "name": name, "value": 1.5, "low": 1.4, "high": 1.6, "finding": finding.get(name, "slower")}
        for name in ("teacher", "exact", "truncated", "softmax")
    ]
    page = Page(render(data, {}))
    # The teacher's bar is cut off, and identical graphs were not compared.
    assert len(page.all("b")) == 2
    assert "1.50 (1.40 to 1.60)" in page.texts["main"][0]
    assert "same graph" in page.texts["main"][0]
    assert "1.40 to 1.60" in page.texts["header"][0]
    assert "the machine was busy <b>" in page.texts["main"][0]


def test_a_map_that_is_not_finite_or_all_zero_is_drawn():
    given = arrays()
    given["0.teacher"][:] = np.nan
    given["1.compiled"][:] = given["1.teacher"][:] = 0
    given["2.columns"][:] = np.nan
    page = Page(render(report(), given))
    assert len(page.all("img")) == 1 + 3 * (2 + 3 * 2) - 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_every_figure_and_complains_of_nothing(dark, tmp_path):
    path = tmp_path / "page.html"
    text = render(report(), arrays())
    # Nothing of the page's own runs code: a second page looks at the first.
    probe = """<iframe id=f></iframe><pre id=r></pre><script>f.srcdoc = PAGE; f.onload = () => setTimeout(() => {
      const d = f.contentDocument, v = f.contentWindow.matchMedia('(prefers-color-scheme: dark)').matches;
      r.textContent = JSON.stringify({all: d.images.length, dark: v,
        drawn: [...d.images].filter(i => i.complete && i.naturalWidth > 8).length,
        wide: d.documentElement.scrollWidth - f.clientWidth}) }, 500)</script>
      <style>iframe { width: 360px; height: 800px; border: 0 }</style>"""
    literal = json.dumps(text).replace("</", "<\\/")
    path.write_text(f"<!DOCTYPE html>{probe.replace('PAGE', literal)}")
    result = open_page(path, "--dump-dom", "--virtual-time-budget=4000", dark=dark)
    assert "CONSOLE" not in result
    facts = json.loads(result.partition('<pre id="r">')[2].partition("</pre>")[0])
    assert facts["all"] == facts["drawn"] == 1 + 3 * (2 + 3 * 2)
    assert facts["dark"] == dark
    assert facts["wide"] <= 0  # on a phone the page itself does not scroll sideways
