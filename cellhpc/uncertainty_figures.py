"""Figures of uncertainty: reliability, conformal sets, and risk against coverage; in the look of `figures`.

Each is drawn from the entries `models` of `scores.json`: `network`, `initialisation`, and `uncertainty` as
`uncertainty.assess` gives it. A model that has no such part is left out; where none has it, there is no figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from cellhpc.figures import COLOURS, FAINT, GREY, INK, STYLE, legend_lines, line_of, new_figure, wrap_title
from cellhpc.names import model_name

RELIABILITY_CAPTION = (
    "Treatments by their highest probability; below the diagonal: too sure.\n"
    "Bars, and the marks' sizes: how many. Temperatures were fitted on the other compounds."
)
CONFORMAL_CAPTION = (
    "Black: what is asked for, 1 - alpha. Bars: Wilson's 95 % interval over treatments. Sets come from the other "
    "compounds;\nwhat is proven of them stands in scores.json and on the page."
)
REJECTION_CAPTION = (
    "The treatments of the highest entropy are set aside first. Thin: had the wrong calls been.\n"
    "AURC: the mean of the curve; less is better."
)
_BEFORE: dict[str, Any] = {"color": COLOURS[1], "ls": (0, (4, 1.6)), "marker": "s", "mfc": "white"}
_AFTER: dict[str, Any] = {"color": COLOURS[0], "ls": "-", "marker": "o", "mfc": COLOURS[0]}
_PER_ROW = 3


def reliability_figure(models: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw accuracy by highest probability, before and after tempering, one panel a model; counts as bars below."""
    models = _with(models, "calibration")
    if not models:
        return None
    columns = min(_PER_ROW, len(models))
    rows = -(-len(models) // columns)
    side, strip, gap, between, left, top, under, foot = 2.3, 0.55, 0.5, 0.13, 0.7, 0.45, 0.5, 0.8
    tall = top + side + between + strip + under
    with mpl.rc_context(STYLE):
        figure = new_figure(max(left + columns * (side + gap), 5.2), rows * tall + foot)
        width, height = figure.get_size_inches()
        left += (width - left - columns * (side + gap)) / 2
        for number, model in enumerate(models):
            row, column = divmod(number, columns)
            x, y = left + column * (side + gap), height - row * tall - top - side
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            below = figure.add_axes((x / width, (y - between - strip) / height, side / width, strip / height))
            _draw_reliability(axes, below, model["uncertainty"]["calibration"])
            axes.set_title(wrap_title(model_name(model), side), loc="left", fontsize=9, pad=6)
            if column == 0:
                axes.set_ylabel("Accuracy")
                below.set_ylabel("Count", labelpad=8)
        handles = [
            Line2D([], [], lw=1.1, mew=1.3, label=words, **look)
            for words, look in (("as predicted", _BEFORE), ("after temperature", _AFTER))
        ]
        figure.legend(
            handles=handles, loc="lower center", ncols=2, handlelength=3.4, bbox_to_anchor=(0.5, 0.42 / height)
        )
        figure.text(0.5, 0.1 / height, RELIABILITY_CAPTION, ha="center", va="bottom", fontsize=7.5, color=GREY)
    return figure


def conformal_figure(models: Sequence[Mapping[str, Any]], classes: int) -> Figure | None:
    """Draw coverage against 1 - alpha, and the mean size of sets: above marginal, below by label.

    Parameters
    ----------
    models
        As the module's text says.
    classes
        Number of classes, the largest size of a set.
    """
    models = _with(models, "conformal")
    if not models:
        return None
    legend_rows = -(-len(models) // 2)
    foot = 0.95 + 0.2 * legend_rows
    with mpl.rc_context(STYLE):
        figure = new_figure(7.6, 4.9 + foot)
        height = figure.get_size_inches()[1]
        panels = figure.subplots(2, 2, sharex=True, sharey="col")
        for (coverage, size), kind, words in zip(
            panels, ("marginal", "by_label"), ("all labels together", "label by label"), strict=True
        ):
            alphas = [entry["alpha"] for entry in models[0]["uncertainty"]["conformal"][kind]]
            places = np.arange(len(alphas))
            for number, model in enumerate(models):
                entries = model["uncertainty"]["conformal"][kind]
                colour, line = line_of(model, models)
                shift = places + 0.09 * (number - (len(models) - 1) / 2)
                at = np.array([entry["coverage"] for entry in entries])
                ends = np.array([entry["wilson95"] for entry in entries])
                coverage.vlines(shift, ends[:, 0], ends[:, 1], color=colour, lw=1.1, alpha=0.7)
                for axes, values in ((coverage, at), (size, [entry["mean_size"] for entry in entries])):
                    axes.plot(shift, values, color=colour, lw=0.9, ms=5, **line)
            coverage.hlines(1 - np.array(alphas), places - 0.42, places + 0.42, color=INK, lw=1.6, zorder=1)
            size.axhline(1, color=GREY, lw=1, ls=(0, (1, 2)))
            coverage.set_title(f"Coverage, {words}", loc="left")
            size.set_title(f"Labels in a set, {words}", loc="left")
            coverage.set_xticks(places, [f"{1 - alpha:.0%}".replace("%", " %") for alpha in alphas])
            for axes in (coverage, size):
                axes.set_axisbelow(True)
                axes.yaxis.grid(visible=True, color=FAINT, lw=0.6)
        coverage, size = panels[0]
        lowest = min(
            entry["wilson95"][0]
            for model in models
            for kind in ("marginal", "by_label")
            for entry in model["uncertainty"]["conformal"][kind]
        )
        coverage.set_ylim(max(0, np.floor(20 * min(lowest, 0.75)) / 20), 1.01)
        coverage.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        size.set_ylim(0, classes * 1.04)
        for axes in panels[1]:
            axes.set_xlabel("1 - alpha")
        figure.legend(
            handles=legend_lines(models),
            loc="lower center",
            ncols=min(2, len(models)),
            handlelength=3.4,
            bbox_to_anchor=(0.5, 0.42 / height),
        )
        figure.text(0.5, 0.1 / height, CONFORMAL_CAPTION, ha="center", va="bottom", fontsize=7.5, color=GREY)
        figure.subplots_adjust(
            left=0.085, right=0.985, top=1 - 0.3 / height, bottom=foot / height, hspace=0.2, wspace=0.2
        )
    return figure


def rejection_figure(models: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw the share of wrong calls among the treatments that are kept, by the share that is kept."""
    models = _with(models, "rejection")
    if not models:
        return None
    foot = 1.05 + 0.2 * (len(models) + 1)
    with mpl.rc_context(STYLE):
        figure = new_figure(6.4, 3.3 + foot)
        height = figure.get_size_inches()[1]
        axes = figure.subplots()
        highest = 0.0
        for model in models:
            entry = model["uncertainty"]["rejection"]
            colour, line = line_of(model, models)
            coverage, risk = (np.array([at[name] for at in entry["curve"]]) for name in ("coverage", "risk"))
            marks = max(len(coverage) // 8, 1)
            axes.plot(coverage, risk, color=colour, lw=2, ms=4.5, markevery=marks, clip_on=False, zorder=3, **line)
            wrong = entry["aurc_random"]
            best = np.maximum(coverage - (1 - wrong), 0) / coverage
            axes.plot(coverage, best, color=colour, lw=0.8, ls=line["ls"], alpha=0.8, zorder=2)
            axes.axhline(wrong, color=colour, lw=1, ls=(0, (1, 2)), zorder=1)
            highest = max(highest, risk.max(), wrong)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, min(1.0, 1.12 * highest) if highest else 0.1)
        axes.set_axisbelow(True)
        axes.yaxis.grid(visible=True, color=FAINT, lw=0.6)
        for axis, decimals in ((axes.xaxis, 0), (axes.yaxis, 0 if highest > 0.1 else 1)):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=" %"))
        axes.set_xlabel("Treatments kept")
        axes.set_ylabel("Wrong among them")
        handles = [
            *legend_lines(models),
            Line2D([], [], color=GREY, lw=1, ls=(0, (1, 2)), label="in random order"),
        ]
        for handle, model in zip(handles, models, strict=False):
            entry = model["uncertainty"]["rejection"]
            handle.set_label(f"{model_name(model)}: AURC {entry['aurc']:.4f}, best {entry['aurc_best']:.4f}")
        figure.legend(handles=handles, loc="lower center", handlelength=3.4, bbox_to_anchor=(0.5, 0.42 / height))
        figure.text(0.5, 0.1 / height, REJECTION_CAPTION, ha="center", va="bottom", fontsize=7.5, color=GREY)
        figure.subplots_adjust(left=0.11, right=0.97, top=1 - 0.15 / height, bottom=foot / height)
    return figure


def _draw_reliability(axes: Axes, below: Axes, entry: Mapping[str, Any]) -> None:
    """Draw one model: its bins that are not empty above, all counts below."""
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=(0, (1, 2)), zorder=1)
    states = [state for state in (entry, entry["after_temperature"]) if state]
    for number, (state, look) in enumerate(zip(states, (_BEFORE, _AFTER), strict=False)):
        filled = [one for one in state["bins"] if one["count"]]
        x, y = ([one[name] for one in filled] for name in ("confidence", "accuracy"))
        share = np.array([one["count"] for one in filled]) / sum(one["count"] for one in filled)
        axes.plot(x, y, color=look["color"], lw=1.1, ls=look["ls"], zorder=2 + number)
        face, above = look["mfc"], 4 + number
        axes.scatter(
            x,
            y,
            14 + 110 * share,
            marker=look["marker"],
            fc=face,
            ec=look["color"],
            lw=1.3,
            clip_on=False,
            zorder=above,
        )
        width = (state["bins"][0]["high"] - state["bins"][0]["low"]) / 2.4
        centres = [(one["low"] + one["high"]) / 2 + (number - 0.5) * width for one in state["bins"]]
        below.bar(centres, [one["count"] for one in state["bins"]], width=width, fc=face, ec=look["color"], lw=1.1)
    axes.annotate(
        "ECE " + " → ".join(f"{state['ece']:.3f}" for state in states),
        (0, 1), xycoords="axes fraction", xytext=(5, -6), textcoords="offset points", va="top", fontsize=8, color=GREY,
    )  # fmt: skip
    for panel in (axes, below):
        panel.set_xlim(0, 1)
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.tick_params(labelbottom=False)
    axes.set_axisbelow(True)
    axes.grid(visible=True, color=FAINT, lw=0.6)
    below.locator_params(axis="y", nbins=2, integer=True)
    below.set_xlabel("Highest probability")


def _with(models: Sequence[Mapping[str, Any]], part: str) -> list[Mapping[str, Any]]:
    return [model for model in models if (model.get("uncertainty") or {}).get(part)]
