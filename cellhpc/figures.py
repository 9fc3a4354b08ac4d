"""The study's figures: confusion matrices of treatments and learning curves.

Figures are built on Matplotlib's objects (no pyplot, no global state) and written as PNG with an SVG beside it. Colours
are those of Okabe & Ito (2008), which colour-blind readers can tell apart; what a colour says, a line style or a number
says too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cellhpc import ledger
from cellhpc.names import model_name

DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, FAINT = "#1A1A1A", "#6B6B6B", "#D9D9D9"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "cellhpc",
}
"""Matplotlib's settings for every figure."""
_RIGHT = LinearSegmentedColormap.from_list("right", ["#FFFFFF", "#56A0CE", "#0072B2"])
_WRONG = LinearSegmentedColormap.from_list("wrong", ["#FFFFFF", "#F0A36B", "#D55E00"])

# Abbreviations of Kensert, Harrison & Spjuth 2019, Figure 5.
ABBREVIATIONS = {
    "actin disruptors": "Act",
    "aurora kinase inhibitors": "Aur",
    "cholesterol-lowering": "Ch",
    "dna damage": "DD",
    "dna replication": "DR",
    "eg5 inhibitors": "Eg5",
    "epithelial": "Epi",
    "kinase inhibitors": "KI",
    "microtubule destabilizers": "MD",
    "microtubule stabilizers": "MS",
    "protein degradation": "PD",
    "protein synthesis": "PS",
}

CONFUSION_CAPTION = "Hard calls of the treatments; zeros are left blank. Blue: right; orange: wrong."


def abbreviate(labels: Sequence[str]) -> dict[str, str]:
    """Short forms of labels for figures: the paper's for BBBC021, else initials or first letters, each used once."""
    short: dict[str, str] = {}
    for label in labels:
        words = re.findall(r"\w+", label) or [label]
        stem = words[0] if len(words) == 1 else "".join(word[0].upper() for word in words)
        known = ABBREVIATIONS.get(label.lower())
        whole = label if len(label) <= 4 else None
        longer = [stem] if len(words) > 1 else []
        choices = [known, whole, *longer, *(words[0][:n] for n in range(3, len(words[0]) + 1))]
        choices += [f"{stem[:3]}{n}" for n in range(2, len(labels) + 2)]
        short[label] = next(name for name in choices if name and name not in short.values())
    return short


def confusion_figure(matrix: pd.DataFrame, title: str) -> Figure:
    """Draw one confusion matrix of treatments, zeros blank (paper's Figure 5).

    Parameters
    ----------
    matrix
        Counts; rows are the true labels, columns the calls, in the same order.
    title
        Above the matrix.
    """
    short = abbreviate(list(matrix.index))
    side = max(0.36 * len(matrix), 1.5)
    names = [label if label == short[label] else f"{label}  {short[label]}" for label in matrix.index]
    left = 0.75 + 0.068 * max(map(len, names))
    right, bottom, top = 0.85, 0.75, 0.62
    with mpl.rc_context(STYLE):
        figure = new_figure(left + side + right, bottom + side + top)
        width, height = figure.get_size_inches()
        axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
        _draw_confusion(axes, matrix, [short[label] for label in matrix.columns], names)
        axes.set_xlabel("Called", labelpad=6)
        axes.set_ylabel("True", labelpad=8)
        counts = matrix.to_numpy()
        for row, (correct, total) in enumerate(zip(np.diag(counts), counts.sum(axis=1), strict=True)):
            axes.annotate(
                f"{correct}/{total}",
                (len(matrix) - 0.5, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=GREY,
            )
        figure.text(left / width, 1 - 0.16 / height, title, fontsize=10, fontweight="bold", va="top")
        figure.text(left / width, 1 - 0.36 / height, _tally(counts), fontsize=8.5, color=GREY, va="top")
    return figure


def confusions_figure(matrices: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the confusion matrices of several models side by side, at most three in a row."""
    labels = list(next(iter(matrices.values())).index)
    short = [*abbreviate(labels).values()]
    side = max(0.27 * len(labels), 1.8)
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    left, gap, bottom, top = 0.75, 0.55, 0.62, 0.62
    with mpl.rc_context(STYLE):
        figure = new_figure(left + columns * (side + gap), rows * (side + bottom + top))
        width, height = figure.get_size_inches()
        for number, (title, matrix) in enumerate(matrices.items()):
            row, column = divmod(number, columns)
            x, y = left + column * (side + gap), height - row * (side + bottom + top) - top - side
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            _draw_confusion(axes, matrix, short, short, fontsize=7.5)
            axes.set_xlabel("Called")
            if column == 0:
                axes.set_ylabel("True")
            wrapped = wrap_title(title, side)
            axes.set_title(wrapped, fontsize=9, loc="left", pad=17)
            tally = _tally(matrix.to_numpy())
            axes.annotate(
                tally,
                (0, 1),
                xycoords="axes fraction",
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=8,
                color=GREY,
            )
    return figure


def curves_caption(combined: Sequence[str]) -> str:
    """Tell what learning curves show; `combined` are the rules by which runs combined probabilities."""
    return (
        f"Held-out accuracy after each epoch: all folds pooled, probabilities combined by: {' or '.join(combined)}. "
        "It is drawn and never used to choose."
    )


def learning_curves_figure(
    models: Sequence[Mapping[str, Any]], classes: int, combined: Sequence[str] = ("mean",)
) -> Figure:
    """Draw held-out accuracy by epoch at the levels treatment, field and tile (paper's Figure 4).

    Parameters
    ----------
    models
        For each, `network`, `initialisation` and `curves`: for `all` and for each seed, for each level, the lists
        `correct` and `total` with one entry an epoch.
    classes
        Number of classes, for the line of chance.
    combined
        As of `curves_caption`.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(9.2, 3.55 + 0.2 * -(-len(models) // 3))
        panels = figure.subplots(1, 3, sharex=True, sharey=True)
        for axes, level in zip(panels, ("treatment", "field", "tile"), strict=True):
            for model in models:
                colour, line = line_of(model, models)
                seeds = []
                for seed, curves in model["curves"].items():
                    accuracy = np.divide(curves[level]["correct"], curves[level]["total"])
                    epochs = np.arange(1, len(accuracy) + 1)
                    if seed == "all":
                        axes.plot(epochs, accuracy, color=colour, lw=2, ms=4.5, zorder=3, clip_on=False, **line)
                    else:
                        seeds.append(np.column_stack([epochs, accuracy]))
                if len(seeds) > 1:
                    thin = LineCollection(seeds, colors=colour, lw=0.7, alpha=0.55, ls=[line["ls"]], zorder=2)
                    axes.add_collection(thin, autolim=False)
            axes.axhline(1 / classes, color=GREY, lw=1, ls=(0, (1, 2)), zorder=1)
            axes.set_title(f"{level.capitalize()}s", loc="left")
            axes.set_xlabel("Epoch")
        first = panels[0]
        first.set_ylim(0, 1)
        first.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        first.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        last = max(len(next(iter(model["curves"].values()))["tile"]["total"]) for model in models)
        first.set_xlim(1 - 0.04 * last, last * 1.03)
        first.set_ylabel("Held-out accuracy")
        for axes in panels:
            axes.set_axisbelow(True)
            axes.yaxis.grid(visible=True, color=FAINT, lw=0.6)
        above = (1 / classes) % 0.2 < 0.13  # else the grid's next line would run through the words
        first.annotate(
            f"chance, 1 of {classes}",
            (1, 1 / classes),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3 if above else -9),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color=GREY,
        )
        height = figure.get_size_inches()[1]
        rows = -(-len(models) // 3)
        figure.legend(
            handles=legend_lines(models),
            loc="lower center",
            ncols=min(3, len(models)),
            handlelength=3.4,
            bbox_to_anchor=(0.5, 0.27 / height),
        )
        figure.text(0.5, 0.1 / height, curves_caption(combined), ha="center", va="bottom", fontsize=7.5, color=GREY)
        figure.subplots_adjust(
            left=0.075, right=0.985, top=1 - 0.3 / height, bottom=(0.85 + 0.2 * rows) / height, wspace=0.09
        )
    return figure


def save(figure: Figure, path: Path) -> bytes:
    """Write a figure as PNG, and as SVG beside it, each atomically; give the PNG's bytes. The figure is empty then."""
    with mpl.rc_context(STYLE):
        box = figure.get_tightbbox().padded(0.12)  # inches; measured once for both
        with ledger.replacing(path.with_suffix(".svg")) as temporary:
            figure.savefig(temporary, format="svg", bbox_inches=box, metadata={"Date": None})
        with ledger.replacing(path) as temporary:
            figure.savefig(temporary, format="png", bbox_inches=box, dpi=DPI)
            png = temporary.read_bytes()
    figure.clear()  # its parts refer to each other: else they stay until they are collected
    FigureCanvasAgg(figure)  # the old one holds the pixels
    return png


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def wrap_title(title: str, inches: float) -> str:
    """Break a title at its last comma when it is wider than its axes (about 12 bold letters of 9 points in an inch)."""
    return ",\n".join(title.rsplit(", ", 1)) if len(title) > 12 * inches else title


def line_of(model: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Say how a model is drawn beside others.

    Parameters
    ----------
    model, models
        One of them, and all of a figure, each with `network` and `initialisation`.

    Returns
    -------
    colour, line
        By network (by initialisation, if there is one network); line and marker, by initialisation.
    """
    networks = list(dict.fromkeys(one["network"] for one in models))
    starts = dict.fromkeys(one["initialisation"] for one in models)
    pretrained = [start for start in starts if start != "xavier"]
    if model["initialisation"] == "xavier":
        number, line = 1, {"ls": (0, (4, 1.6)), "marker": "s", "mfc": "white", "mew": 1.3}
    else:
        number = pretrained.index(model["initialisation"])
        line = {"ls": "-", "marker": "oD^v"[number % 4], "mew": 1.3}
        number += number > 0  # the second colour is Xavier's
    if len(networks) > 1:
        number = networks.index(model["network"])
    return COLOURS[number % len(COLOURS)], line


def legend_lines(models: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    """Draw the line of each model for a legend, labelled with its name."""
    return [
        Line2D([], [], color=colour, lw=2, ms=4.5, label=model_name(model), **line)
        for model in models
        for colour, line in [line_of(model, models)]
    ]


def _draw_confusion(
    axes: Axes, matrix: pd.DataFrame, across: Sequence[str], down: Sequence[str], fontsize: float = 8.5
) -> None:
    """Shade each cell by its share of the row, blue on the diagonal, orange off it; write the counts above zero."""
    counts = matrix.to_numpy()
    size = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    colours = np.where(np.eye(size, dtype=bool)[..., None], _RIGHT(shares), _WRONG(shares))
    edges = np.arange(size + 1) - 0.5
    axes.pcolormesh(edges, edges, colours)
    axes.set(aspect="equal", xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = shares[row, column] > 0.45
        axes.text(
            column,
            row,
            str(counts[row, column]),
            ha="center",
            va="center",
            fontsize=fontsize,
            color="white" if dark else INK,
        )
    axes.set_xticks(range(size), across)
    axes.set_yticks(range(size), down)
    if max(map(len, across)) > 3:
        axes.tick_params(axis="x", labelrotation=90)
    between = np.arange(1, size) - 0.5
    axes.hlines(between, -0.5, size - 0.5, color=FAINT, lw=0.6)
    axes.vlines(between, -0.5, size - 0.5, color=FAINT, lw=0.6)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.8)


def _tally(counts: np.ndarray) -> str:
    correct, total = int(np.trace(counts)), int(counts.sum())
    return f"{correct} of {total} treatments, {100 * correct / max(total, 1):.1f} %"
