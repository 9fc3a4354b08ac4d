"""Figures of uncertainty by their artists and not by their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axis import Axis, Tick
from matplotlib.figure import Figure

from cellhpc import figures, scores, uncertainty, uncertainty_figures
from tests.made_up import CLASSES, predictions

NETWORKS = (("ResNet50", "imagenet"), ("ResNet50", "xavier"), ("MobileNet(alpha=0.25)", "mobilenet_0_25_224_tf"))


@pytest.fixture(scope="module")
def models() -> list[dict[str, Any]]:
    made = []
    for number, (network, start) in enumerate(NETWORKS):
        table = scores.combine(predictions(doses=(0.3, 1.0, 3.0), skill=0.3, seed=number))["treatment"]
        found = uncertainty.assess(table, CLASSES)
        made.append({"network": network, "initialisation": start, "uncertainty": found.document})
    return made


def drawn(models: list[dict[str, Any]]) -> list[Figure]:
    made = (
        uncertainty_figures.reliability_figure(models),
        uncertainty_figures.conformal_figure(models, len(CLASSES)),
        uncertainty_figures.rejection_figure(models),
    )
    return [figure for figure in made if figure is not None]


def test_reliability_shows_every_bin_before_and_after(models: list[dict[str, Any]]) -> None:
    figure = uncertainty_figures.reliability_figure(models)
    assert figure is not None
    assert len(figure.axes) == 2 * len(models)
    entry = models[1]["uncertainty"]["calibration"]
    above, below = figure.axes[2:4]
    for state, line in zip((entry, entry["after_temperature"]), above.lines[1:], strict=True):
        points = [(one["confidence"], one["accuracy"]) for one in state["bins"] if one["count"]]
        np.testing.assert_allclose(line.get_xydata(), points)
    heights = [bar.get_height() for bar in below.patches]
    assert heights == [one["count"] for state in (entry, entry["after_temperature"]) for one in state["bins"]]
    assert above.texts[0].get_text() == f"ECE {entry['ece']:.3f} → {entry['after_temperature']['ece']:.3f}"


def test_sets_are_shown_marginal_and_by_label_against_what_is_asked_for(models: list[dict[str, Any]]) -> None:
    figure = uncertainty_figures.conformal_figure(models, len(CLASSES))
    assert figure is not None
    for row, kind in enumerate(("marginal", "by_label")):
        coverage, size = figure.axes[2 * row : 2 * row + 2]
        for number, model in enumerate(models):
            entries = model["uncertainty"]["conformal"][kind]
            np.testing.assert_allclose(coverage.lines[number].get_ydata(), [entry["coverage"] for entry in entries])
            np.testing.assert_allclose(size.lines[number].get_ydata(), [entry["mean_size"] for entry in entries])
        asked = coverage.collections[-1].get_segments()
        np.testing.assert_allclose([segment[0, 1] for segment in asked], [0.8, 0.9, 0.95, 0.97])
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["80 %", "90 %", "95 %", "97 %"]


def test_risk_is_drawn_between_best_and_random(models: list[dict[str, Any]]) -> None:
    figure = uncertainty_figures.rejection_figure(models)
    assert figure is not None
    for number, model in enumerate(models):
        entry = model["uncertainty"]["rejection"]
        curve, best, random = figure.axes[0].lines[3 * number : 3 * number + 3]
        np.testing.assert_allclose(curve.get_ydata(), [at["risk"] for at in entry["curve"]])
        assert np.mean(best.get_ydata()) == pytest.approx(entry["aurc_best"])
        assert random.get_ydata()[0] == pytest.approx(entry["aurc_random"])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[-1] == "in random order"
    assert words[0].startswith("ResNet50, imagenet: AURC 0.")


def shown(axis: Axis) -> list[Tick]:
    """Ticks that are drawn: a locator gives some beyond the ends as well."""
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()]


def test_words_do_not_overlap(models: list[dict[str, Any]]) -> None:
    for some in (models[:1], models[:2], models, models + models[:1]):
        for figure in drawn(some):
            figure.canvas.draw()
            words = [
                text
                for axes in figure.axes
                for text in (axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
            ]
            words += [tick.label1 for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in shown(axis)]
            words += [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
            boxes = [text.get_window_extent() for text in words if text.get_text() and text.get_visible()]
            assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.shrunk(0.98, 0.98).overlaps(b)]


def test_what_is_not_there_is_left_out(models: list[dict[str, Any]], tmp_path: Path) -> None:
    assert drawn([{**models[0], "uncertainty": None}]) == []
    assert drawn([{"network": "ResNet50", "initialisation": "xavier"}]) == []
    table = scores.combine(predictions({"cisplatin": "DNA damage"}))["treatment"]
    one = {**models[0], "uncertainty": uncertainty.assess(table, CLASSES).document}
    reliability, rejection = drawn([one])
    assert len(reliability.axes[0].lines) == 2  # the diagonal, and as predicted
    assert uncertainty_figures.conformal_figure([one, models[0]], 3) is not None
    assert figures.save(rejection, tmp_path / "rejection.png")
    right = uncertainty.assess(table.assign(call=table["label"]), CLASSES)
    never_wrong = {**one, "uncertainty": right.document}
    figure = uncertainty_figures.rejection_figure([never_wrong])
    assert figure is not None
    assert figure.axes[0].get_ylim() == (0, 0.1)
