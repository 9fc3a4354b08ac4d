"""The page and the closing table of a made-up study."""

from __future__ import annotations

import base64
import copy
import functools
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from cellhpc.aggregate import aggregate
from cellhpc.gallery import Gallery
from cellhpc.report import render_report, render_scores
from cellhpc.report.compounds import anchors, compounds_of, wrong_treatments
from cellhpc.report.page import PAGE_BYTES
from cellhpc.report.words import compared, p_value, points, right_at, sentence_case
from tests.made_up import CLASSES, make_study
from tests.made_up_scores import MadeUp, make_scores

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
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script.*src|<link|<iframe|fetch\(|import\(", words)
    assert "default-src 'none'" in page
    places = {f"#{name}" for name in re.findall(r' id="([^"]+)"', page)}
    assert all(
        link.startswith("data:image/png;base64,") or link in places or (study / "results" / link).is_file()
        for link in links
    )
    assert len(page) < 5_000_000


def test_the_page_is_whole_and_its_headline_comes_first(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert outline.seen.index("table") < outline.seen.index("img")
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Confusion of treatments",
        "Learning curves",
        "Uncertainty",
        "Treatments that were called wrong",
        "Compounds",
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
            low, high = at["wilson95"]
            assert f'title="Wilson\'s 95 % interval">{100 * low:.1f} to {100 * high:.1f}<' in page
        for row in model["wrong"]:
            assert f">{row['treatment']}</a></td><td>{row['label']}</td><td>{row['call']}</td>" in page
    assert "seed 1: 6 of 7 folds" in page
    assert "Chance, 1 of 3" in page


def test_provenance_is_on_the_page(page: str, scores: dict[str, Any]) -> None:
    for words in (scores["folds"]["sha256"], "0123456789abcdef", "numpy 2.0.2", "node1", "train.batch_size"):
        assert words in page
    for model in scores["models"]:
        cost = model["cost"]
        row = f'<td>{", ".join(map(str, model["seeds"]))}</td><td>2</td><td class="n">{cost["hours"]:.2f}</td>'
        assert row in page
        assert f'<td class="n">{cost["images_per_s"]:.0f}</td><td class="n">0.9</td>' in page


def test_a_page_of_one_seed_without_settings(scores: dict[str, Any]) -> None:
    model = {**scores["models"][0], "seeds": [0], "wrong": []}
    alone = {**scores, "models": [model], "settings": {}, "complete": True}
    alone["baselines"] = {"chance": 1 / 3, "majority": None, "batch_only": None, "table": []}
    page = render_report(alone, dict.fromkeys(("confusion", f"confusion-{model['slug']}", "learning-curves"), PNG))
    assert 'class="missing"' not in page
    assert "none, all 14 were right." in page
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


@functools.cache
def full_page() -> str:
    made = make_scores()
    return render_report(made.document, made.pictures, made.tables, gallery=made.gallery)


class TestFullPage:
    """A page of a document that holds everything: 38 compounds, 103 treatments, six models."""

    @pytest.fixture
    def made(self) -> MadeUp:
        return make_scores()

    @pytest.fixture
    def page(self) -> str:
        return full_page()

    def test_all_sections_in_the_order_in_which_one_wants_them(self, page: str) -> None:
        assert Outline(page).open == []
        assert re.findall(r"<h2>(.*?)</h2>", page) == [
            "Confusion of treatments",
            "Learning curves",
            "Uncertainty",
            "Treatments that were called wrong",
            "Compounds",
            "Tiles by label",
            "Quality of the pictures",
            "Where this comes from",
        ]
        assert page.index("Incomplete: 450 of 456 runs") < page.index("<table")

    def test_what_is_absent_has_no_section(self, made: MadeUp) -> None:
        """The document of predictions from anywhere: no runs, folds, curves, comparisons or uncertainty."""
        bare = copy.deepcopy(made.document)
        for name in ("folds", "runs", "comparisons", "settings"):
            del bare[name]
        bare.update(quality={}, provenance={}, baselines={"chance": 1 / 12, "table": []})
        for model in bare["models"]:
            for name in ("uncertainty", "macro", "by_label", "spread", "cost"):
                del model[name]
            model["curves"] = {}
            model["seeds"] = [0]
            model["by_seed"] = {"0": {"levels": {}}}
            model["levels"] = {"treatment": model["levels"]["treatment"]}
            del model["levels"]["treatment"]["top2"]
        pictures = {name: png for name, png in made.pictures.items() if name.startswith("confusion")}
        page = render_report(bare, pictures)
        assert Outline(page).open == []
        assert re.findall(r"<h2>(.*?)</h2>", page) == [
            "Confusion of treatments",
            "Treatments that were called wrong",
            "Compounds",
            "Where this comes from",
        ]
        assert not re.search(r"<h3>|Wells|Top two|href=\"#(curves|uncertainty|pictures)|Split", page)

    @pytest.mark.parametrize(
        ("part", "words"),
        [
            ("calibration", "<h3>Calibration</h3>"),
            ("conformal", "<h3>Conformal sets</h3>"),
            ("decomposition", "<h3>What more data"),
            ("rejection", "<h3>Calls that are held back</h3>"),
            ("repeat", "<h3>What to repeat"),
            ("unknown", "<h3>Labels that a network never saw</h3>"),
        ],
    )
    def test_parts_of_uncertainty_come_and_go(self, made: MadeUp, page: str, part: str, words: str) -> None:
        assert words in page
        without = copy.deepcopy(made.document)
        for model in without["models"]:
            model["uncertainty"][part] = None
        changed = render_report(without, made.pictures)
        assert words not in changed
        assert "<h2>Uncertainty</h2>" in changed

    def test_numbers_of_uncertainty(self, made: MadeUp, page: str) -> None:
        found = made.document["models"][0]["uncertainty"]
        assert found["conformal"]["guarantee"] in page
        at = found["conformal"]["marginal"][1]
        low, high = at["wilson95"]
        assert f"{at['covered']}/103, {100 * at['coverage']:.1f} %" in page
        assert f'{100 * low:.1f} to {100 * high:.1f}</span></td>\n<td class="n">{at["mean_size"]:.2f}</td>' in page
        assert '0.70 <span class="range">(0.61 to 0.82)</span>' in page
        curve = found["rejection"]["curve"]
        assert f"{100 * (1 - curve[81]['risk']):.1f} %" in page  # 82 of 103 are just below 80 %
        ranked = page[page.index("What to repeat") : page.index("Labels that a network never saw")]
        names = re.findall(r"<td class=\"n\">\d+</td><td><a href=\"#[^\"]+\">(.*?)</a>", ranked)
        assert names[:20] == [row["treatment"] for row in found["repeat"][:20]]

    def test_models_are_compared_in_words_and_baselines_stand_below_them(self, made: MadeUp, page: str) -> None:
        entry = made.document["comparisons"][0]
        assert f"<li>{html.escape(compared(entry))}</li>" in page
        assert page.count("<li>") == 3  # of 15 pairs, those of one network
        headline = page[: page.index("</table>")]
        for row in made.document["baselines"]["table"]:
            assert sentence_case(row["words"]) in headline
        assert "11 can't be scored" in headline

    def test_every_compound_has_a_section_and_every_treatment_its_probabilities(self, made: MadeUp, page: str) -> None:
        sections = re.findall(r"<details class=\"compound\" id=\"([^\"]+)\"(.*?)</details>", page, re.DOTALL)
        assert len(sections) == len({anchor for anchor, _ in sections}) == 38
        table = made.tables["ResNet50-imagenet"]
        one = table[table["compound"] == "compound 20/Z"].iloc[0]
        (section,) = (text for anchor, text in sections if anchor == "compound-compound-20-Z")
        assert f'title="{one["label"]}: {one["p_" + one["label"]]:.3f}"' in section
        rights = [int(n) / int(of) for n, of in re.findall(r"(\d+) of (\d+) calls right", page)]
        assert rights == sorted(rights)

    def test_the_page_stays_small_and_says_what_was_left_out(self, made: MadeUp, page: str) -> None:
        assert len(page.encode()) <= PAGE_BYTES < 5_000_000
        shown = page.count('alt="tile"')
        assert 0 < shown < len(made.gallery.shown)
        assert f"{len(made.gallery.shown) - shown} tile(s) were left out" in page
        few = Gallery(made.gallery.shown[:5], made.gallery.channels)
        assert "were left out" not in render_report(made.document, made.pictures, made.tables, gallery=few)

    def test_what_is_said_beside_tiles_counts_too(self, made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
        usual = render_report(made.document, made.pictures, made.tables, gallery=made.gallery)
        monkeypatch.setattr("cellhpc.gallery._MARKUP_BYTES", 0)  # as if nothing were said beside them
        page = render_report(made.document, made.pictures, made.tables, gallery=made.gallery)
        assert len(page.encode()) <= PAGE_BYTES
        assert page.count('alt="tile"') >= usual.count('alt="tile"')

    def test_where_sections_do_not_fit_those_with_wrong_calls_stay(
        self, made: MadeUp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = []
        whole = len(render_report(made.document, made.pictures, made.tables).encode())
        none = len(render_report(made.document, made.pictures).encode())
        for size in (whole, whole - 1, none + 2000):
            monkeypatch.setattr("cellhpc.report.page.PAGE_BYTES", size)
            text = render_report(made.document, made.pictures, made.tables)
            counts.append(text.count('<details class="compound"'))
            assert Outline(text).open == []
            assert ("all treatments are in" in text) == (counts[-1] < 38)
            assert len(text.encode()) <= size
        assert counts[0] == 38 > counts[1] > counts[2] == 0

    def test_a_page_of_very_many_compounds_is_small_too_and_says_where_the_others_are(self, made: MadeUp) -> None:
        many = copy.deepcopy(made.document)
        for model in many["models"]:
            model["by_compound"] = [
                {**row, "compound": f"{row['compound']} {copied}"}
                for copied in range(400)
                for row in model["by_compound"]
            ]
            model["wrong"] = [
                {**row, "treatment": f"{row['treatment']} {copied}"} for copied in range(400) for row in model["wrong"]
            ]
        page = render_report(many, made.pictures, made.tables, gallery=made.gallery)
        assert len(page.encode()) <= PAGE_BYTES
        (rows,) = {int(found) for found in re.findall(r"The first (\d+) of 15,200, .*?href=\"compounds.csv\"", page)}
        index = page.split('id="compounds"')[1].split("</table>")[0]
        assert index.count("<tr data-words=") == rows >= 30
        assert re.search(rf"The first {rows} of [\d,]+, .*href=\"treatments.csv\"", page)
        outline = Outline(page)
        assert outline.open == []
        assert {link[1:] for link in outline.links if link.startswith("#")} <= set(re.findall(r' id="([^"]+)"', page))

    def test_a_page_of_very_many_labels_is_small_too(self, made: MadeUp) -> None:
        many = copy.deepcopy(made.document)
        many["classes"] = [f"label {number}" for number in range(3000)]
        many["abbreviations"] |= {name: name for name in many["classes"]}
        row = many["models"][0]["by_label"][0]
        for model in many["models"]:
            model["by_label"] = [{**row, "label": name} for name in many["classes"]]
        large = {name: picture + b"0" * 800_000 for name, picture in list(made.pictures.items())[:4]}
        page = render_report(many, {**made.pictures, **large})
        assert len(page.encode()) <= PAGE_BYTES
        assert re.search(r"The first \d+ of 3,000, .*href=\"by_label.csv\"", page)
        assert Outline(page).open == []

    def test_figures_that_are_too_large_are_linked(self, made: MadeUp) -> None:
        large = {**made.pictures, "montage": made.pictures["montage"] + b"0" * 2_000_000}
        page = render_report(made.document, large)
        assert '<a href="montage.png">' in page
        assert page.count("data:image/png") == len(large) - 1

    def test_conformal_sets_are_those_of_the_p_values(self, made: MadeUp) -> None:
        table = made.tables["ResNet50-imagenet"]
        classes = made.document["classes"]
        p = pd.DataFrame(0.1, index=table.index, columns=[f"marginal_{name}" for name in classes])
        p[f"marginal_{classes[3]}"] = 0.11  # above alpha, 0.1; the others are not
        p = pd.concat([table[["treatment", "compound", "label"]], p], axis=1)
        compounds = compounds_of(made.document, made.tables, {"ResNet50-imagenet": p}, Gallery())
        first = {said.labels for one in compounds for treatment in one.treatments for said in treatment.sayings[:1]}
        assert first == {(classes[3],)}

    def test_slurm_jobs_are_in_the_provenance(self, page: str) -> None:
        assert "17 (convert), 18 (train, 32 tasks), 19 (aggregate)" in page
        assert "2026-11-02 08:00:00" in page


def test_treatments_that_most_models_call_wrong_come_first() -> None:
    models = [{"wrong": [{"treatment": name} for name in names]} for names in (["a", "b"], ["b"], ["c", "b", "c2"])]
    assert wrong_treatments({"models": models}) == ["b", "a", "c", "c2"]


def test_anchors_differ_where_names_differ_in_signs_alone() -> None:
    assert anchors(["AZ-A", "AZ/A", "µ", "+", "AZ A"]) == [
        "compound-AZ-A",
        "compound-AZ-A-2",
        "compound-µ",
        "compound-x",
        "compound-AZ-A-3",
    ]


def test_differences_in_words() -> None:
    entry = {
        "a": "ResNet50, imagenet", "b": "ResNet50, xavier", "units": "compounds", "compounds": 38,
        "difference": 0.6, "bootstrap95": [0.5, 0.702], "p_value": 0.00012,
    }  # fmt: skip
    assert compared(entry) == (
        "ResNet50, imagenet against xavier: +60.0 points (95 % interval +50.0 to +70.2), p\u00a0=\u00a00.00012, "
        "paired over 38 compounds."
    )
    other = {**entry, "b": "InceptionV3, imagenet", "difference": -0.01, "bootstrap95": None, "p_value": 0.00001}
    assert compared(other) == (
        "ResNet50, imagenet against InceptionV3, imagenet: −1.0 points, p\u00a0<\u00a00.0001, paired over 38 compounds."
    )
    assert [p_value(p) for p in (1.0, 0.5, 0.0123, 0.0001)] == ["1", "0.50", "0.012", "0.00010"]
    assert [points(difference) for difference in (0.0, -0.0001, 0.0005)] == ["0.0", "0.0", "0.0"]


def test_the_share_that_is_right_when_some_calls_are_held_back() -> None:
    curve = [{"coverage": 0.25, "risk": 0.0}, {"coverage": 0.5, "risk": 0.5}, {"coverage": 1.0, "risk": 0.75}]
    assert [right_at(curve, coverage) for coverage in (0.2, 0.5, 0.8, 1.0)] == [None, 0.5, 0.5, 0.25]
