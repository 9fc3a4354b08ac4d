"""The page in a real browser, Chromium, without a network: what it asks for, how wide it is, what its script does."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cellhpc.aggregate import aggregate
from cellhpc.report import render_report
from tests.installing import install, may_install
from tests.made_up import CLASSES, make_study
from tests.made_up_scores import make_scores

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

INDEX = "#compounds table.sortable"


@dataclass
class Browsed:
    """A page in the browser, and what it did that it should not."""

    page: Any
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def texts(self, selector: str) -> list[str]:
        """Words of all that is selected, as they are read."""
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def column(self, table: str, number: int) -> list[str]:
        """Words of a column of a table's first body."""
        return self.texts(f"{table} >> nth=0 >> tbody >> nth=0 >> tr >> td:nth-child({number})")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 38 compounds, 103 treatments and six models."""
    made = make_scores()
    path = tmp_path_factory.mktemp("results") / "report.html"
    path.write_text(render_report(made.document, made.pictures, made.tables, gallery=made.gallery))
    return path


def find_chromium() -> str | None:
    """Where Chromium, or Chrome, is here."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if find_chromium() is None and may_install():
        apt = "apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 chromium"
        install("bash", "-c", f"apt-get update -q; {apt}")  # lists that are a little old will do
    if find_chromium() is None:
        pytest.skip("there is no Chromium to try the page in")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium: Any, file: Path) -> Iterator[Any]:
    """Open the page, offline; with a width, and with script or without."""
    contexts = []

    def opened(width: int = 1280, script: bool = True, anchor: str = "", of: Path = file) -> Browsed:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, java_script_enabled=script, offline=True
        )
        contexts.append(context)
        browsed = Browsed(context.new_page())
        browsed.page.on("request", lambda request: browsed.asked.append(request.url))
        browsed.page.on("console", lambda message: browsed.said.append(message.text))
        browsed.page.on("pageerror", lambda fault: browsed.said.append(str(fault)))
        browsed.page.goto(f"file://{of}{anchor}")
        return browsed

    yield opened
    for context in contexts:
        context.close()


def test_the_page_asks_for_nothing_and_complains_of_nothing(browse: Any, file: Path) -> None:
    browsed = browse()
    browsed.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    pictures = browsed.page.evaluate(
        "Promise.all([...document.images].map((one) => one.decode().then(() => one.naturalWidth)))"
    )
    assert len(pictures) > 100
    assert min(pictures) > 0
    assert [url for url in browsed.asked if not url.startswith("data:")] == [f"file://{file}"]
    assert browsed.said == []
    assert file.stat().st_size < 5_000_000


def test_what_an_aggregation_wrote_is_shown_as_it_is(browse: Any, tmp_path: Path) -> None:
    document = aggregate(tmp_path, "made-up", make_study(tmp_path), CLASSES)
    written = tmp_path / "results" / "report.html"
    browsed = browse(of=written)
    shown = browsed.page.inner_text("body")
    for model in document["models"]:
        at = model["levels"]["treatment"]
        assert f"{at['correct']}/{at['total']}" in shown
    assert [url for url in browsed.asked if not url.startswith("data:")] == [f"file://{written}"]
    assert browsed.said == []
    picture = Image.open(io.BytesIO(browsed.page.screenshot(path=tmp_path / "report.png", full_page=True)))
    assert picture.width == 1280
    assert len(np.unique(np.asarray(picture.convert("RGB").resize((64, 64))).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("script", [True, False])
def test_the_page_is_not_wider_than_the_window(browse: Any, width: int, script: bool) -> None:
    browsed = browse(width, script)
    for summary in browsed.page.locator("section > details:not([open]) > summary").all()[:12]:
        summary.click()
    page = "document.documentElement"
    wide, shown = browsed.page.evaluate(f"[{page}.scrollWidth, {page}.clientWidth]")
    assert wide <= shown
    for name in ("h1", "#accuracy figcaption >> nth=0", "#compounds .compound >> nth=0"):
        box = browsed.page.locator(name).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    if width == 1280:  # the headline is all to be seen
        box = browsed.page.locator("table.headline").bounding_box()
        assert box["x"] + box["width"] <= width
        assert browsed.page.locator("table.headline").locator("xpath=..").bounding_box()["width"] >= box["width"]


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(browse: Any) -> None:
    browsed = browse()
    browsed.page.locator("#compounds summary.plain").click()
    before = browsed.column(INDEX, 1)
    heading = browsed.page.locator(f"{INDEX} >> nth=0 >> th >> nth=0")
    assert heading.get_attribute("aria-sort") is None
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert browsed.column(INDEX, 1) == sorted(before) != before
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert browsed.column(INDEX, 1) == sorted(before, reverse=True)


def test_numbers_are_sorted_as_numbers_by_the_keyboard_too(browse: Any) -> None:
    browsed = browse()
    button = browsed.page.locator("table.headline th >> nth=1").get_by_role("button")
    button.focus()
    browsed.page.keyboard.press("Enter")
    shares = [float(text.split("%")[0].split(", ")[1]) for text in browsed.column("table.headline", 2)]
    assert shares == sorted(shares, reverse=True)  # the best first
    browsed.page.keyboard.press("Space")
    shares = [float(text.split("%")[0].split(", ")[1]) for text in browsed.column("table.headline", 2)]
    assert shares == sorted(shares)
    assert browsed.page.locator("table.headline th[aria-sort]").count() == 1
    last = browsed.texts("table.headline tbody >> nth=1 >> tr >> td:first-child")
    assert last[0] == "Chance, 1 of 12"  # baselines stay below the models, and are sorted by themselves


def test_compounds_are_filtered(browse: Any) -> None:
    browsed = browse()
    assert browsed.page.locator(".compound:visible").count() == 38
    browsed.page.get_by_role("searchbox").fill("dna DAMAGE")
    labels = browsed.texts(".compound:visible .label")
    assert labels
    assert set(labels) == {"DNA damage"}
    browsed.page.get_by_role("searchbox").fill("")
    browsed.page.get_by_role("checkbox").check()
    rights = browsed.texts(".compound:visible .right")
    assert 0 < len(rights) < 38
    assert all(int(words.split()[0]) < int(words.split()[2]) for words in rights)


def test_a_link_opens_the_section_that_it_points_to(browse: Any) -> None:
    browsed = browse(anchor="#compound-compound-20-Z")
    assert browsed.page.locator("#compound-compound-20-Z").get_attribute("open") == ""
    browsed.page.locator("#wrong a:visible").first.click()
    target = browsed.page.locator(browsed.page.evaluate("location.hash"))
    assert target.get_attribute("open") == ""
    assert target.locator("table").is_visible()


def test_all_can_be_read_without_script(browse: Any) -> None:
    browsed = browse(script=False)
    assert browsed.page.locator("button, input").count() == 0
    assert "Chance, 1 of 12" in browsed.texts("table.headline td")
    section = browsed.page.locator(".compound").first
    section.locator("summary").click()
    assert section.locator("table").is_visible()
    tile = section.locator("img").first.bounding_box()
    assert (tile["width"], tile["height"]) == (96, 96)
    plain = browsed.page.locator("#accuracy")
    assert "paired over 38 compounds" in plain.inner_text()
    assert plain.inner_text() == browse().page.locator("#accuracy").inner_text()


def test_on_paper_every_section_is_open(browse: Any) -> None:
    browsed = browse()
    assert browsed.page.locator("details:not([open])").count() > 30
    browsed.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert browsed.page.locator("details:not([open])").count() == 0
