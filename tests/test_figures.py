"""Figures by their artists and not by their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cellhpc import figures

BBBC021 = {
    "Actin disruptors": "Act", "Aurora kinase inhibitors": "Aur", "Cholesterol-lowering": "Ch", "DNA damage": "DD",
    "DNA replication": "DR", "Eg5 inhibitors": "Eg5", "Epithelial": "Epi", "Kinase inhibitors": "KI",
    "Microtubule destabilizers": "MD", "Microtubule stabilizers": "MS", "Protein degradation": "PD",
    "Protein synthesis": "PS",
}  # fmt: skip


@pytest.fixture
def matrix() -> pd.DataFrame:
    counts = np.diag(np.arange(1, 13))
    counts[2, 5] = 4
    return pd.DataFrame(counts, index=[*BBBC021], columns=[*BBBC021])


def model(network: str, start: str, seeds: int = 1, epochs: int = 4) -> dict[str, Any]:
    """Curves in which half of what is held out is right from the second epoch on."""
    counts = {"correct": [0] + [50] * (epochs - 1), "total": [100] * epochs}
    curves = {level: counts for level in ("tile", "field", "well", "treatment")}
    names = ["all", *map(str, range(seeds))]
    return {"network": network, "initialisation": start, "curves": {name: curves for name in names}}


def test_abbreviations_are_the_papers() -> None:
    assert figures.abbreviate([*BBBC021]) == BBBC021


def test_other_labels_get_short_forms_that_differ() -> None:
    labels = ["positive", "negative", "Tubulin modulators", "tubulin modifiers", "Tau", "poss", "possible", "possibly"]
    short = figures.abbreviate(labels)
    assert len(set(short.values())) == len(labels)
    assert [short[name] for name in ("positive", "negative", "Tubulin modulators", "Tau")] == [
        "pos",
        "neg",
        "TM",
        "Tau",
    ]


def test_labels_without_letters_or_alike_still_differ() -> None:
    assert figures.abbreviate(["+++++", "-----", "a b", "A B"]) == {
        "+++++": "+++",
        "-----": "---",
        "a b": "a b",
        "A B": "A B",
    }


def test_confusion_writes_counts_and_leaves_zeros_blank(matrix: pd.DataFrame) -> None:
    axes = figures.confusion_figure(matrix, "ResNet50, imagenet").axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts if "/" not in text.get_text()}
    assert written == {(column, row): str(n) for (row, column), n in np.ndenumerate(matrix.to_numpy()) if n}
    assert [label.get_text() for label in axes.get_xticklabels()] == [*BBBC021.values()]
    totals = [text.get_text() for text in axes.texts if "/" in text.get_text()]
    assert totals[:3] == ["1/1", "2/2", "3/7"]


def test_confusions_stand_side_by_side_three_in_a_row(matrix: pd.DataFrame) -> None:
    panels = figures.confusions_figure({f"network {n}, xavier": matrix for n in range(4)}).axes
    boxes = [axes.get_position() for axes in panels]
    assert boxes[0].y0 == boxes[1].y0 == boxes[2].y0 > boxes[3].y1
    assert boxes[0].x1 < boxes[1].x0 < boxes[1].x1 < boxes[2].x0
    assert "78 of 82 treatments, 95.1 %" in [text.get_text() for text in panels[0].texts]


def lines(figure: Figure, panel: int = 0) -> list[Any]:
    """Thick lines of a panel: one a model."""
    return [line for line in figure.axes[panel].lines if line.get_linewidth() == 2]


def test_curves_run_from_0_to_1_with_the_line_of_chance() -> None:
    figure = figures.learning_curves_figure([model("ResNet50", "imagenet")], classes=12)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Treatments", "Fields", "Tiles"]
    for axes in figure.axes:
        assert axes.get_ylim() == (0, 1)
        assert any(np.allclose(line.get_ydata(), 1 / 12) for line in axes.lines)
    np.testing.assert_allclose(lines(figure)[0].get_xydata(), [(1, 0), (2, 0.5), (3, 0.5), (4, 0.5)])
    assert any("never used to choose" in text.get_text() for text in figure.texts)


def test_pretrained_and_xavier_differ_in_colour_and_in_line() -> None:
    figure = figures.learning_curves_figure([model("MobileNet", "xavier"), model("MobileNet", "weights_tf")], classes=6)
    xavier, pretrained = lines(figure)
    assert xavier.get_color() != pretrained.get_color()
    assert (xavier.get_linestyle(), pretrained.get_linestyle()) == ("--", "-")
    assert xavier.get_marker() != pretrained.get_marker()


def test_networks_differ_in_colour_and_initialisations_in_line() -> None:
    models = [model(network, start) for network in ("ResNet50", "InceptionV3") for start in ("imagenet", "xavier")]
    drawn = lines(figures.learning_curves_figure(models, classes=12))
    assert [line.get_color() for line in drawn] == [figures.COLOURS[n] for n in (0, 0, 1, 1)]
    assert [line.get_linestyle() for line in drawn] == ["-", "--", "-", "--"]


def test_seeds_are_thin_lines_and_a_single_one_is_not_drawn_twice() -> None:
    def thin(seeds: int) -> int:
        axes = figures.learning_curves_figure([model("ResNet50", "xavier", seeds)], classes=12).axes[0]
        return sum(len(drawn.get_segments()) for drawn in axes.collections if max(drawn.get_linewidths()) < 1)

    assert (thin(1), thin(3)) == (0, 3)


def test_one_epoch_is_a_point() -> None:
    figure = figures.learning_curves_figure([model("ResNet50", "xavier", epochs=1)], classes=2)
    assert lines(figure)[0].get_xydata().tolist() == [[1, 0]]


def test_words_do_not_overlap(matrix: pd.DataFrame) -> None:
    models = [
        model("MobileNet(alpha=0.25)", "mobilenet_0_25_224_tf"),
        *(model(network, start) for network in ("InceptionResNetV2", "ResNet50") for start in ("imagenet", "xavier")),
    ]
    confusions = {f"{one['network']}, {one['initialisation']}": matrix for one in models}
    for figure in (figures.confusions_figure(confusions), figures.learning_curves_figure(models, classes=12)):
        figure.canvas.draw()
        words = [text for axes in figure.axes for text in (axes.title, axes._left_title, axes.xaxis.label, *axes.texts)]
        words += [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
        boxes = [text.get_window_extent() for text in words if text.get_text()]
        assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.shrunk(0.98, 0.98).overlaps(b)]


def test_a_figure_is_a_png_of_150_dpi_and_an_svg_with_letters(matrix: pd.DataFrame, tmp_path: Path) -> None:
    png = figures.save(figures.confusion_figure(matrix, "ResNet50, imagenet"), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes() == png
    with Image.open(tmp_path / "confusion.png") as image:
        assert round(image.info["dpi"][0]) == 150
        assert np.asarray(image.convert("RGB"))[0, 0].tolist() == [255, 255, 255]
    assert "ResNet50, imagenet" in (tmp_path / "confusion.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "confusion.svg"]
