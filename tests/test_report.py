"""The page and the closing table of a made-up study."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cellhpc.aggregate import aggregate
from cellhpc.report import render_report, render_scores
from tests.made_up import CLASSES, make_study

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (300).to_bytes(4, "big") + (200).to_bytes(4, "big")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, two seeds; one run is missing."""
    folder = tmp_path_factory.mktemp("study")
    runs = make_study(folder, networks=("MobileNet(alpha=0.25)",), seeds=(0, 1))
    (runs[-1] / "done.json").unlink()
    aggregate(folder, "<made> & up", runs, CLASSES)
    return folder


@pytest.fixture(scope="module")
def scores(study: Path) -> dict[str, Any]:
    return aggregate(study, "<made> & up", sorted((study / "runs").iterdir()), CLASSES)


@pytest.fixture(scope="module")
def page(study: Path) -> str:
    return (study / "results" / "report.html").read_text()


class Outline(HTMLParser):
    """Headings, links and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_nothing_is_fetched_from_elsewhere(page: str, study: Path) -> None:
    links = Outline(page).links
    words = re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", words)
    assert all(link.startswith("data:image/png;base64,") or (study / "results" / link).is_file() for link in links)
    assert len(page) < 5_000_000


def test_the_page_is_whole_and_its_headline_comes_first(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert outline.seen.index("table") < outline.seen.index("figure")
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Confusion of treatments",
        "Learning curves",
        "Uncertainty",
        "Treatments that were called wrong",
        "Where this comes from",
    ]


def test_figures_are_the_files_beside_the_page(page: str, study: Path) -> None:
    shown = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert {path.read_bytes() for path in (study / "results").glob("*.png")} == set(shown)


def test_what_is_missing_and_all_numbers_are_said(page: str, scores: dict[str, Any]) -> None:
    assert "&lt;made&gt; &amp; up" in page
    assert f'<p class="missing">{scores["headline"][0]}</p>' in page
    for model in scores["models"]:
        for at in model["levels"].values():
            assert f"{at['correct']}/{at['total']}, {100 * at['accuracy']:.1f} %" in page
            assert f"Wilson {100 * at['wilson95'][0]:.1f} to {100 * at['wilson95'][1]:.1f}" in page
        for row in model["wrong"]:
            assert f"<td>{row['treatment']}</td><td>{row['label']}</td><td>{row['call']}</td>" in page
    assert "seed 1: 6 of 7 folds" in page
    assert "Chance, 1 of 3" in page


def test_provenance_is_on_the_page(page: str, scores: dict[str, Any]) -> None:
    for words in (scores["folds"]["sha256"], "0123456789abcdef", "numpy 2.0.2", "node1", "train.batch_size"):
        assert words in page


def test_a_page_of_one_seed_without_settings(scores: dict[str, Any]) -> None:
    model = {**scores["models"][0], "seeds": [0], "wrong": []}
    alone = {**scores, "models": [model], "settings": {}, "complete": True}
    alone["baselines"] = {"chance": 1 / 3, "majority": None, "batch_only": None}
    page = render_report(alone, dict.fromkeys(("confusion", f"confusion-{model['slug']}", "learning-curves"), PNG))
    assert 'class="missing"' not in page
    assert "None: all 14 were right." in page
    assert 'width="192"' in page  # 300 pixels of 150 in an inch
    assert "Commonest" not in page


def test_the_closing_table(scores: dict[str, Any]) -> None:
    console = Console(width=160, file=io.StringIO())
    console.print(render_scores(scores))
    text = console.file.getvalue()
    at = scores["models"][1]["levels"]["treatment"]
    low, high = (f"{100 * bound:.1f}" for bound in at["wilson95"])
    row = next(line for line in text.splitlines() if "xavier, 2 seeds" in line)
    for words in (f"{at['correct']}/{at['total']}", f"{100 * at['accuracy']:.1f}", f"{low} to {high}"):
        assert words in row
    for words in (
        "<made> & up",
        "commonest class of training",
        "chance, 1 of 3 classes",
        "33.3",
        "Incomplete: 27 of 28",
    ):
        assert words in text
