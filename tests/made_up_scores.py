"""A made-up document of `scores.json` that holds everything which a page can show, and what belongs to it."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cellhpc import figures, scores
from cellhpc.gallery import Gallery, Shown
from cellhpc.report.compounds import wrong_treatments
from tests.made_up import predictions

CLASSES = (
    "Actin disruptors", "Aurora kinase inhibitors", "Cholesterol-lowering", "DNA damage", "DNA replication",
    "Eg5 inhibitors", "Epithelial", "Kinase inhibitors", "Microtubule destabilizers", "Microtubule stabilizers",
    "Protein degradation", "Protein synthesis",
)  # fmt: skip
NETWORKS = ("ResNet50", "InceptionV3", "InceptionResNetV2")
ALPHAS = (0.2, 0.1, 0.05, 0.03)


@dataclass(frozen=True)
class MadeUp:
    """A document, its tables of treatments by the slug of the model, its figures and its tiles."""

    document: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    pictures: dict[str, bytes]
    gallery: Gallery


@functools.cache
def make_scores(compounds: int = 38, treatments: int = 103, networks: tuple[str, ...] = NETWORKS) -> MadeUp:
    """Make a study of networks, each pre-trained and not, with two seeds; its numbers follow from its tables."""
    names = {f"compound {number + 1:02d}/{'AZ'[number % 2]}": CLASSES[number % 12] for number in range(compounds)}
    spared = 3 * compounds - treatments
    dropped = [f"{name} 3 uM" for name in [*names][:spared]]
    models, tables = [], {}
    for number, (network, start) in enumerate((n, s) for n in networks for s in ("imagenet", "xavier")):
        pretrained = start == "imagenet"
        tiles = predictions(names, CLASSES, seed=number, doses=(0.3, 1.0, 3.0), skill=0.9 if pretrained else 0.4)
        tiles = _mistaken(tiles[~tiles["treatment"].isin(dropped)].reset_index(drop=True), 0.05 if pretrained else 0.4)
        levels = scores.combine(tiles)
        slug = f"{network}-{start}"
        tables[slug] = levels["treatment"]
        models.append(_model(network, start, slug, levels, number))
    document = {
        "schema": "cellhpc-scores/2",
        "study": "made-up",
        "complete": False,
        "headline": ["Incomplete: 450 of 456 runs are finished. Missing: ResNet50_xavier_s1_f03, and 5 more."],
        "cautions": ["2 field(s) could not be read and were set aside; scores.json lists them."],
        "combine": "mean",
        "classes": list(CLASSES),
        "abbreviations": figures.abbreviate(CLASSES),
        "folds": {"by": "compound", "also": "", "sha256": "0f" * 32, "total": compounds, "not_scorable": {}},
        "runs": {"done": 450, "expected": 456, "missing": [f"ResNet50_xavier_s1_f{n:02d}" for n in range(6)]},
        "models": models,
        "comparisons": _comparisons(models, tables),
        "baselines": _baselines(treatments),
        "conversion": {},
        "quality": {
            "plates": 49, "fields": 1208, "controls": 392, "set_aside": 2, "near_empty_tiles": 31, "stand_out": 40,
            "threshold": 6.0,
            "shown": [{"plate": "Week1_22123", "well": "B02", "field": 3, "treatment": "compound 01/A 1 uM",
                       "of_well": "1 of 4", "figures": ["low focus in tubulin, 0.2 of 1.4 (-8.1)"]}],
        },
        "no_montage": "",
        "provenance": {
            "runs": {"hosts": ["node1", "node2"], "commits": ["0123456789abcdef"], "python": ["3.11.2"],
                     "versions": {"numpy": ["2.0.2"], "keras": ["3.8.0"]}},
            "submissions": [
                {"number": "0001", "executor": "slurm", "host": "login", "version": "0.1.0", "ended": None,
                 "began": "2026-11-02 08:00:00", "tasks": {"convert": 1, "train": 32, "aggregate": 1},
                 "jobs": [{"id": "17", "stage": "convert", "tasks": 1}, {"id": "18", "stage": "train", "tasks": 32},
                          {"id": "19", "stage": "aggregate", "tasks": 1}]},
            ],
            "aggregate": {"commit": "0123456789abcdef", "dirty": False},
        },
        "settings": {"study": {"name": "made-up"}, "train": {"epochs": 10, "batch_size": 8}},
    }  # fmt: skip
    return MadeUp(document, tables, _pictures(document), _gallery(document))


def _mistaken(tiles: pd.DataFrame, share: float) -> pd.DataFrame:
    """Have a share of the treatments look like the next class."""
    names = tiles["treatment"].unique()
    taken = np.random.default_rng(len(names)).permutation(names)[: round(share * len(names))]
    for label, other in zip(CLASSES, (*CLASSES[1:], CLASSES[0]), strict=True):
        rows = tiles["treatment"].isin(taken) & (tiles["label"] == label)
        pair = [scores.PREFIX + label, scores.PREFIX + other]
        tiles.loc[rows, pair] = tiles.loc[rows, pair[::-1]].to_numpy()
    return tiles


def _accuracy(correct: int, total: int) -> dict[str, Any]:
    share = correct / total
    return {**scores.accuracy(correct, total), "bootstrap95": [max(share - 0.05, 0.0), min(share + 0.04, 1.0)]}


def _model(network: str, start: str, slug: str, levels: dict[str, pd.DataFrame], number: int) -> dict[str, Any]:
    treatments = levels["treatment"]
    compounds = treatments.groupby(["compound", "label"], as_index=False)["correct"].agg(["sum", "count"])
    at = {level: _accuracy(int(table["correct"].sum()), len(table)) for level, table in levels.items()}
    at["compound"] = _accuracy(int((compounds["sum"] * 2 > compounds["count"]).sum()), len(compounds))
    truth = treatments["label"].map(CLASSES.index).to_numpy()
    chances = treatments[[scores.PREFIX + name for name in CLASSES]].to_numpy()
    first_two = (np.argsort(-chances, axis=1)[:, :2] == truth[:, None]).any(axis=1)
    for level in at.values():
        level["top2"] = scores.accuracy(int(first_two.sum()), len(treatments))
    by_label = treatments.groupby("label")
    shares = {"compound": compounds["sum"] / compounds["count"], "label": by_label["correct"].mean()}
    right = at["treatment"]["accuracy"]
    grown = {"correct": [int(epoch * right * 25) for epoch in (1, 2, 3, 4)], "total": [100] * 4}
    curves = {level: grown for level in ("tile", "field", "well", "treatment")}
    seed = {"folds": {"done": 37, "total": 38, "missing": ["compound 01/A"]}, "levels": at}
    return {
        "network": network,
        "initialisation": start,
        "weights": start,
        "slug": slug,
        "seeds": [0, 1],
        "levels_of": "ensemble of 2 seeds (mean probability of each tile)",
        "levels": at,
        "macro": {
            of: {"accuracy": float(share.mean()), "of": len(share), "bootstrap95": [right - 0.05, right]}
            for of, share in shares.items()
        },
        "by_label": [
            {"label": label, "compounds": int(own["compound"].nunique()),
             **scores.accuracy(int(own["correct"].sum()), len(own))}
            for label, own in by_label
        ],
        "spread": {"seeds": 2, "mean": right - 0.01, "sd": 0.012, "lowest": right - 0.02, "highest": right},
        "by_seed": {"0": seed, "1": {**seed, "folds": {"done": 38, "total": 38, "missing": []}}},
        "confusion": scores.confusion(treatments, CLASSES).to_numpy().tolist(),
        "by_compound": [
            {"compound": row.compound, "label": row.label, "correct": int(row.sum), "total": int(row.count)}
            for row in compounds.itertuples(index=False)
        ],
        "wrong": [
            {**{name: str(row[name]) for name in ("treatment", "compound", "label", "call")},
             "p_call": float(row[scores.PREFIX + row["call"]]), "p_label": float(row[scores.PREFIX + row["label"]])}
            for row in treatments[~treatments["correct"]].to_dict("records")
        ],
        "curves": {"all": curves, "0": curves, "1": curves},
        "cost": {"runs": 75, "epochs": 4, "hours": 12.3 + number, "images_per_s": 61.0, "ranks": [2],
                 "memory_mb": 900.0},
        "uncertainty": _uncertainty(treatments, number),
    }  # fmt: skip


def _uncertainty(treatments: pd.DataFrame, number: int) -> dict[str, Any]:
    columns = [scores.PREFIX + name for name in CLASSES]
    chances = treatments[columns].to_numpy(float)
    entropy = -(chances * np.log(np.maximum(chances, 1e-12))).sum(axis=1)
    surest = np.argsort(entropy, kind="stable")
    wrong = ~treatments["correct"].to_numpy()[surest]
    risk = np.cumsum(wrong) / np.arange(1, len(wrong) + 1)
    errors = {"nll": 0.41 + number / 10, "brier": 0.21 + number / 20, "ece": 0.08}
    bins = [
        {"low": low / 10, "high": (low + 1) / 10, "count": low, "confidence": low / 10 + 0.05, "accuracy": low / 10}
        for low in range(10)
    ]
    total = len(treatments)
    covered = {alpha: round((1 - alpha) * total) for alpha in ALPHAS}
    marginal = [
        {"alpha": alpha, "coverage": covered[alpha] / total, "mean_size": 0.9 + 0.05 / alpha, "empty": int(90 * alpha),
         "single": 60, "covered": covered[alpha], "total": total,
         "wilson95": scores.accuracy(covered[alpha], total)["wilson95"]}
        for alpha in ALPHAS
    ]  # fmt: skip
    labels = treatments["label"].value_counts()
    per_label = [
        {"label": label, "covered": int(labels.get(label, 0)), "total": int(labels.get(label, 0)), "mean_size": 8.0}
        for label in CLASSES
    ]
    rows = treatments.to_dict("records")
    return {
        "calibration": {
            **errors,
            "bins": bins,
            "after_temperature": {
                **{key: value * 0.8 for key, value in errors.items()},
                "bins": bins,
                "temperatures": {"lowest": 0.61, "median": 0.7, "highest": 0.82},
            },
        },
        "conformal": {
            "unit": "compound",
            "guarantee": "Cross-conformal: over repeated studies, a set holds the label at least in a share of about "
            "1 - 2 alpha of new compounds; in practice close to 1 - alpha.",
            "compounds": 38,
            "finest_p": 1 / 38,
            "marginal": marginal,
            "by_label": [{**at, "mean_size": 8.0, "per_label": per_label} for at in marginal],
        },
        "decomposition": {
            "members": 40, "kind": "seeds and dropout draws", "entropy": 0.61, "aleatoric": 0.52, "epistemic": 0.09,
        },
        "rejection": {
            "aurc": float(risk.mean()), "aurc_best": 0.001, "aurc_random": float(wrong.mean()), "by": "entropy",
            "curve": [{"coverage": (n + 1) / total, "risk": float(one)} for n, one in enumerate(risk)],
        },
        "repeat": [
            {**{name: rows[at][name] for name in ("treatment", "compound", "label", "call")},
             "p_call": float(chances[at].max()), "entropy": float(entropy[at]), "epistemic": 0.1,
             "set": [CLASSES[best] for best in np.argsort(-chances[at])[: 1 + at % 3]] if at % 7 else [],
             "why": "two labels can't be told apart"}
            for at in surest[::-1]
        ],
        "unknown": {
            "auroc": 0.81, "auroc_epistemic": 0.84, "known": total, "unknown": 14,
            "per_label": [{"label": label, "auroc": 0.8, "known": total, "unknown": 7} for label in CLASSES[:2]],
        },
    }  # fmt: skip


def _comparisons(models: list[dict[str, Any]], tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    entries = []
    for second, b in enumerate(models):
        for a in models[:second]:
            first, other = tables[a["slug"]]["correct"].to_numpy(), tables[b["slug"]]["correct"].to_numpy()
            difference = float(first.mean() - other.mean())
            counts = {
                "a_only": first & ~other, "b_only": other & ~first, "both": first & other, "neither": ~first & ~other,
            }  # fmt: skip
            entries.append(
                {
                    "a": f"{a['network']}, {a['initialisation']}",
                    "b": f"{b['network']}, {b['initialisation']}",
                    "units": "compounds",
                    "compounds": int(tables[a["slug"]]["compound"].nunique()),
                    **{name: int(which.sum()) for name, which in counts.items()},
                    "difference": difference,
                    "bootstrap95": [difference - 0.08, difference + 0.07],
                    "p_value": 0.00004 if abs(difference) > 0.2 else 0.21,
                    "test": "exact sign-flip permutation test over compounds, two-sided",
                }
            )
    return entries


def _baselines(treatments: int) -> dict[str, Any]:
    names = {
        "majority": "commonest class of training", "batch_only": "commonest class of the batch",
        "intensity": "intensity statistics, logistic regression", "neighbours": "nearest neighbour on features (NSC)",
    }  # fmt: skip
    rows = [
        {"name": name, "words": words, **scores.accuracy(11 + 20 * number, treatments), "not_scorable": 0}
        for number, (name, words) in enumerate(names.items())
    ]
    batch = scores.accuracy(60, treatments - 11)
    rows.append({"name": "nscb", "words": "the same, without the batch (NSCB)", **batch, "not_scorable": 11})
    return {
        "chance": 1 / len(CLASSES), "majority": scores.accuracy(11, treatments),
        "batch_only": scores.accuracy(31, treatments), "table": rows,
    }  # fmt: skip


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figures.DPI, bbox_inches="tight")
    return file.getvalue()


def _pictures(document: dict[str, Any]) -> dict[str, bytes]:
    matrices = {
        f"{model['network']}, {model['initialisation']}": pd.DataFrame(model["confusion"], CLASSES, CLASSES)
        for model in document["models"]
    }
    found = {
        f"confusion-{model['slug']}": _png(figures.confusion_figure(matrix, title))
        for model, (title, matrix) in zip(document["models"], matrices.items(), strict=True)
    }
    found["confusion"] = _png(figures.confusions_figure(matrices))
    found["learning-curves"] = _png(figures.learning_curves_figure(document["models"], len(CLASSES)))
    grain = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8))
    sizes = {"montage": (1460, 480), "reliability": (1200, 500), "conformal": (1200, 500), "rejection": (700, 500)}
    for name, size in sizes.items():  # the montage is about as large as a real one
        file = io.BytesIO()
        how = Image.Resampling.BILINEAR if name == "montage" else Image.Resampling.NEAREST
        grain.resize(size, how).save(file, "PNG")
        found[name] = file.getvalue()
    return found


def _gallery(document: dict[str, Any]) -> Gallery:
    """Tiles of blurred grain, about as large as real ones."""
    random = np.random.default_rng(0)
    jpegs = []
    for _ in range(8):
        file = io.BytesIO()
        coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
        coarse.resize((96, 96), Image.Resampling.BICUBIC).save(file, "JPEG", quality=80)
        jpegs.append(file.getvalue())
    shown = []
    for turn in range(6):
        for number, name in enumerate(wrong_treatments(document)):
            place = f"plate Week1_22123, well C{turn + 2:02d}, field 1, tile 2"
            shown.append(Shown(name, place, jpegs[(number + turn) % 8]))
            if turn < 2:
                model = "ResNet50, xavier, seed 0"
                shown.append(Shown(name, place, jpegs[turn], jpegs[number % 8], model, "DNA damage"))
    channels = (("dna", "#0000ff"), ("tubulin", "#00ff00"), ("actin", "#ff0000"))
    return Gallery(tuple(shown), channels)
