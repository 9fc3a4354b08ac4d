"""Finished runs to results: scores, tables, figures and the report of a study.

`aggregate` reads the runs that are done, checks that they belong together and that nothing leaked, and writes into
`STUDY/results/`:

- `scores.json`, described below and by the JSON Schema `cellhpc/scores.schema.json`;
- `treatments.csv`, `wells.csv`, `fields.csv`: call and probabilities of every unit and model;
- `confusion-<model>.png|svg|csv` and `confusion.png|svg`, all models side by side;
- `learning-curves.png|svg`;
- `montage.png`, tiles by label, and `outliers.csv`, the fields that stand out of their plate (`cellhpc.outliers`);
- `report.html`, one page that needs no network;
- `done.json`, the marker: with the same runs and settings a second call does nothing.

`scores.json` (`cellhpc-scores/1`)::

    study, complete, headline     name; whether every planned run is in; sentences, what is missing first
    cautions                      those sentences of the headline that a reader of the numbers must know besides
    combine, classes, abbreviations, folds.{by, also, sha256, total}, runs.{done, expected, missing}
    folds.not_scorable            with `folds.also`: what can't be held out, and its treatments
    folds.unknown                 whether each fold leaves a label out altogether: what is of that label is not counted
    models[]                      one for each network and initialisation
      network, initialisation, weights, slug, seeds
      levels_of                   "seed 0", or "ensemble of 3 seeds (mean probability of each tile)"
      levels.{tile, field, well, treatment}.{correct, total, accuracy, wilson95, bootstrap95}
      by_seed.SEED.{folds.{done, total, missing}, levels}
      confusion                   counts of treatments: rows true, columns called, in the order of classes
      by_compound[], wrong[]      right treatments of each compound; the treatments that were wrong
      curves.{all, SEED}.{tile, field, well, treatment}.{correct, total}      lists, an entry an epoch, folds pooled
      cost.{runs, epochs, hours, images_per_s, ranks, memory_mb}
    search[]                      with a `[search]`: what each run chose, and on what
      network, initialisation, seed, fold, values                           `values` as in `[search]`
      log_probability, fields.{correct, total}, inner, diverged             of inner compounds; candidates that diverged
    baselines.{chance, majority, batch_only}      of treatments; null while folds are missing, and with `folds.also`
    conversion                    counts of the store, and the fields that were set aside, each with its reason
    quality                       counts of fields, and those that stand out of their plate (`cellhpc.outliers.summary`)
    provenance, settings          versions, hosts, commits; the resolved job file
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cellhpc import figures, ledger, scores
from cellhpc.attempts import finished
from cellhpc.errors import DataError, listing
from cellhpc.folds import Folds, read_folds
from cellhpc.montage import montage
from cellhpc.outliers import outliers, summary
from cellhpc.report import render_report
from cellhpc.tiles import Store

SCHEMA = "cellhpc-scores/1"
_TABLES = {"treatment": "treatments.csv", "well": "wells.csv", "field": "fields.csv"}


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run left: `run.json`, the epochs of `history.json`, and its tile predictions."""

    id: str
    facts: dict[str, Any]
    epochs: list[dict[str, Any]]
    predictions: pd.DataFrame

    @property
    def model(self) -> tuple[str, str]:
        """Network and initialisation."""
        return self.facts["network"], self.facts["initialisation"]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.facts["seed"])

    @property
    def fold(self) -> str:
        """Name of the run's fold."""
        return str(self.facts["fold"]["name"])

    @property
    def search(self) -> dict[str, Any] | None:
        """How the run chose its settings, if it did."""
        return self.facts.get("search")

    @property
    def known(self) -> pd.DataFrame:
        """The predictions that can be right: without those of the label that the fold leaves out altogether."""
        return self.predictions[self.predictions["label"] != self.facts["fold"].get("unknown", "")]


def aggregate(
    study: Path,
    job_name: str,
    runs: Sequence[Path],
    classes: Sequence[str],
    how: scores.How = "mean",
    conversion: Mapping[str, Any] | None = None,
    store: Store | None = None,
) -> dict[str, Any]:
    """Score the finished runs of a study and write its results.

    Parameters
    ----------
    study
        The study's folder; holds `folds.json`, and `job.json` if the settings are to be in the report.
    job_name
        Name of the study.
    runs
        Folders of all runs that are planned, finished or not; `cellhpc.attempts` says what is in them.
    classes
        Classes in the order of the probabilities.
    how
        How probabilities are combined.
    conversion
        Counts of the store (`ConversionPlan.counts`), for the record and the headline.
    store
        What the runs learnt from, for the montage and the quality of the pictures.

    Returns
    -------
    dict
        The document of `results/scores.json`.

    Raises
    ------
    DataError
        No run is finished; or runs do not belong together (another split, other classes), predict a compound that they
        trained on, hold one out twice, or hold tables that are no predictions. Every problem is listed.
    """
    results = study / "results"
    outputs = {unit: folder for unit in runs if (folder := finished(unit)) is not None}
    if not outputs:
        raise DataError(
            f"{study}: none of the {len(runs)} runs is finished, there is nothing to aggregate.",
            remedy="Train them first, with: cellhpc train JOB.toml",
        )
    settings = ledger.read_json(study / "job.json") if (study / "job.json").exists() else {}
    folds = read_folds(study / "folds.json")
    inputs = ledger.digest(
        {
            "schema": SCHEMA,
            "version": metadata.version("cellhpc"),
            "study": job_name,
            "runs": {unit.name: _identity(unit, folder) for unit, folder in outputs.items()},
            "expected": sorted(unit.name for unit in runs),
            "classes": list(classes),
            "how": how,
            "folds": folds.sha256,
            "settings": settings,
            "conversion": conversion,
            "store": store and store.content_digest,
        }
    )
    if ledger.is_done(results, inputs) and all((results / name).exists() for name in ("scores.json", "report.html")):
        document: dict[str, Any] = ledger.read_json(results / "scores.json")
        return document

    models: dict[tuple[str, str], list[FinishedRun]] = defaultdict(list)
    for run in _read_runs(outputs, classes, folds):
        models[run.model].append(run)
    scored = [_score_model(model_runs, classes, how, folds) for model_runs in models.values()]
    wells = pd.concat([tables["well"] for _, tables in scored]).drop_duplicates(["fold", "plate", "well"])
    # Else the training treatments are not all known.
    whole = set(wells["fold"]) == {fold.name for fold in folds.folds} and not (folds.also or folds.unknown)
    missing = [unit.name for unit in runs if unit not in outputs]
    headline = _headline([model for model, _ in scored], len(outputs), len(runs), missing)
    cautions = _cautions(wells, folds, conversion or {})
    document = {
        "schema": SCHEMA,
        "study": job_name,
        "complete": not missing,
        "headline": headline + cautions,
        "cautions": cautions,
        "combine": how,
        "classes": list(classes),
        "abbreviations": figures.abbreviate(classes),
        "folds": {
            **{"by": folds.by, "also": folds.also, "sha256": folds.sha256, "total": len(folds.folds)},
            "not_scorable": folds.not_scorable,
            "unknown": folds.unknown,
        },
        "runs": {"done": len(outputs), "expected": len(runs), "missing": missing},
        "models": [model for model, _ in scored],
        **_searched([run for group in models.values() for run in group]),
        "baselines": scores.baselines(wells if whole else wells.iloc[:0], classes),
        "conversion": dict(conversion or {}),
        "quality": summary(store.fields) if store else {},
        "no_montage": "",
        "provenance": {
            "runs": _origin(run.facts for group in models.values() for run in group),
            "aggregate": ledger.provenance(),
        },
        "settings": settings,
    }
    _write(results, document, scored, inputs, store)
    return document


def _identity(unit: Path, folder: Path) -> list[Any]:
    """Tell a run from a later one: its digest, its attempt, and the sizes and times of its files."""
    files = [folder / name for name in ("run.json", "history.json", "predictions.parquet")]
    found = [file.stat() for file in files if file.exists()]
    return [ledger.done_digest(unit), folder.name, *((facts.st_size, facts.st_mtime_ns) for facts in found)]


def _read_runs(outputs: Mapping[Path, Path], classes: Sequence[str], folds: Folds) -> list[FinishedRun]:
    """Read finished runs, each from the folder of its outputs, and refuse those that can't be scored together."""
    runs, problems = [], []
    for unit, folder in outputs.items():
        try:
            facts = ledger.read_json(folder / "run.json")
            epochs = ledger.read_json(folder / "history.json")["epochs"]
            predictions = pq.ParquetFile(folder / "predictions.parquet").read().to_pandas()
        except (OSError, ValueError, KeyError, pa.ArrowException) as fault:
            problems.append(f"{unit.name}: can't be read: {fault!s}".splitlines()[0])
            continue
        run = FinishedRun(unit.name, facts, epochs, predictions.assign(fold=str(facts["fold"]["name"])))
        problems += _problems_of(run, classes, folds)
        runs.append(run)
    problems += _problems_between(runs, folds)
    if problems:
        raise DataError(
            "The finished runs can't be scored together.",
            problems,
            "Remove the run folders that are named, then type: cellhpc run JOB.toml",
        )
    return runs


def _problems_of(run: FinishedRun, classes: Sequence[str], folds: Folds) -> list[str]:
    """List what is wrong with one run, by itself and against the split."""
    problems = []
    if run.facts["folds_sha256"] != folds.sha256:
        problems.append(f"split {run.facts['folds_sha256'][:12]}, the study's folds.json has {folds.sha256[:12]}")
    for where, found in (("run.json", run.facts["classes"]), ("predictions", scores.classes_of(run.predictions))):
        if list(found) != list(classes):
            order = " in another order" if sorted(found) == sorted(classes) else ""
            problems.append(f"classes in {where} are {', '.join(found)}; expected{order}: {', '.join(classes)}")
    planned = {fold.name: set(fold.held_out) for fold in folds.folds}
    held_out = set(run.facts["fold"]["held_out"])
    if planned.get(run.fold) != held_out:
        problems.append(
            f"fold {run.fold} holds out {listing(held_out)}; folds.json: {listing(planned.get(run.fold, ()))}"
        )
    unknown = next((fold.unknown for fold in folds.folds if fold.name == run.fold), "")
    if (found := run.facts["fold"].get("unknown", "")) != unknown:
        problems.append(f"fold {run.fold} leaves out the label {found or 'none'}; folds.json: {unknown or 'none'}")
    if folds.by in run.predictions:
        leaked = set(run.predictions[folds.by].astype(str)) - held_out
        if leaked:
            problems.append(f"predicts {folds.by} {listing(leaked)}, which its fold {run.fold} trained on: a leak")
        unseen = held_out - set(run.predictions[folds.by].astype(str))
        if unseen:
            problems.append(f"no predictions of {folds.by} {listing(unseen)}, which its fold {run.fold} holds out")
    if trained := held_out & set(run.facts.get("trained_on", ())):
        problems.append(f"holds out {folds.by} {listing(trained)}, which it trained on: a leak")
    if folds.also and folds.also in run.predictions:
        shared = set(run.predictions[folds.also].astype(str)) & set(run.facts.get("trained_on_also", ()))
        if shared:
            problems.append(f"predicts {folds.also} {listing(shared)}, which it trained on: a leak")
    problems += _problems_of_search(run, folds)
    if not run.epochs:
        problems.append("its history has no epochs")
    if not problems:
        try:
            scores.check_probabilities(run.predictions)
        except DataError as fault:
            problems.append(" ".join(str(fault).split()))
    return [f"{run.id}: {problem}" for problem in problems]


def _problems_of_search(run: FinishedRun, folds: Folds) -> list[str]:
    """List what is wrong with how a run chose its settings: what it held out may have had no part in that."""
    inner = next((set(fold.inner) for fold in folds.folds if fold.name == run.fold), set())
    if run.search is None:
        return ["folds.json names inner compounds to choose on, and it did not choose"] if inner else []
    held_out, asked = set(run.facts["fold"]["held_out"]), set(run.search["asked"])
    trained = set(run.search["trained_on"])
    problems = []
    if leaked := held_out & (asked | trained):
        problems.append(f"holds out {folds.by} {listing(leaked)}, which took part in its search: a leak")
    if asked != inner:
        problems.append(f"chose on {folds.by} {listing(asked)}; folds.json: {listing(inner)}")
    if both := asked & trained:
        problems.append(f"its search trained on {folds.by} {listing(both)}, on which it chose: a leak")
    if len(run.epochs) != (planned := run.facts["settings"]["epochs"]):
        problems.append(f"its history has {len(run.epochs)} epochs, and it chose {planned}")
    return problems


def _problems_between(runs: Sequence[FinishedRun], folds: Folds) -> list[str]:
    """List what is wrong among runs: held out twice by one model and seed, or histories of different lengths."""
    problems = []
    held_out: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for run in runs:
        for value in [run.fold] if folds.unknown else run.facts["fold"]["held_out"]:  # known ones are in several folds
            held_out[(*run.model, run.seed, value)].append(run.id)
    for (network, start, seed, value), ids in held_out.items():
        if len(ids) > 1:
            problems.append(
                f"{network}, {start}, seed {seed}: {value} is held out by {len(ids)} runs: {', '.join(ids)}"
            )
    epochs: dict[tuple[str, str], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.search is None:  # else epochs may have been what it chose
            epochs[run.model][len(run.epochs)].append(run.id)
    for model, lengths in epochs.items():
        if len(lengths) > 1:
            found = "; ".join(f"{length} epochs in {listing(ids, 3)}" for length, ids in sorted(lengths.items()))
            problems.append(f"{', '.join(model)}: histories of different lengths: {found}")
    return problems


def _score_model(
    runs: Sequence[FinishedRun], classes: Sequence[str], how: scores.How, folds: Folds
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Score one network from one initialisation: its entry in `scores.json`, and the tables of its calls."""
    network, start = runs[0].model
    seeds = sorted({run.seed for run in runs})
    by_seed, tiles = {}, []
    for seed in seeds:
        own = [run for run in runs if run.seed == seed]
        tiles.append(pd.concat([run.known for run in own], ignore_index=True))
        absent = sorted({fold.name for fold in folds.folds} - {run.fold for run in own})
        by_seed[str(seed)] = {
            "folds": {"done": len(own), "total": len(folds.folds), "missing": absent},
            "levels": scores.score(_combine(tiles[-1:], how, folds.unknown)),
        }
    tables = _combine(tiles, how, folds.unknown)
    treatments = tables["treatment"]
    several = f"ensemble of {len(seeds)} seeds (mean probability of each tile)"
    model = {
        "network": network,
        "initialisation": start,
        "weights": str(runs[0].facts["weights"]),
        "slug": re.sub(r"[^\w.]+", "-", f"{network} {start}").strip("-"),
        "seeds": seeds,
        "levels_of": several if len(seeds) > 1 else f"seed {seeds[0]}",
        "levels": scores.score(tables),
        "by_seed": by_seed,
        "confusion": scores.confusion(treatments, classes).to_numpy().tolist(),
        "by_compound": scores.by_compound(treatments).to_dict("records"),
        "wrong": [
            {
                **{name: str(row[name]) for name in ("treatment", "compound", "label", "call")},
                "p_call": float(row[scores.PREFIX + row["call"]]),
                "p_label": float(row[scores.PREFIX + row["label"]]),
            }
            for row in treatments[~treatments["correct"]].to_dict("records")
        ],
        "curves": {
            "all": _curves(runs),
            **{str(seed): _curves([run for run in runs if run.seed == seed]) for seed in seeds},
        },
        "cost": _cost(runs),
    }
    return model, tables


def _combine(tiles: Sequence[pd.DataFrame], how: scores.How, apart: bool) -> dict[str, pd.DataFrame]:
    """Combine the tiles of the seeds of a model; `apart` for each fold by itself, where folds share tiles."""
    if not apart:
        return scores.combine(scores.average_tables(tiles) if len(tiles) > 1 else tiles[0], how)
    names = sorted({name for table in tiles for name in table["fold"]})
    own = [[part for table in tiles if len(part := table[table["fold"] == name])] for name in names]
    parts = [_combine(tables, how, apart=False) for tables in own]
    return {level: pd.concat([part[level] for part in parts], ignore_index=True) for level in scores.LEVELS}


def _curves(runs: Sequence[FinishedRun]) -> dict[str, dict[str, list[int]]]:
    """Held-out counts of each epoch at each level, summed over runs; one that chose fewer epochs stays at its last."""
    epochs = range(max(len(run.epochs) for run in runs))
    together = [[run.epochs[min(epoch, len(run.epochs) - 1)] for run in runs] for epoch in epochs]
    return {
        level: {
            count: [sum(int(epoch["held_out"][level][count]) for epoch in same) for same in together]
            for count in ("correct", "total")
        }
        for level in scores.LEVELS
    }


def _searched(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Say what each run chose; nothing without a search."""
    chosen = []
    for run in runs:
        if run.search is None:
            continue
        candidates = {one["name"]: one for one in run.search["candidates"]}
        best = candidates[run.search["chosen"]]
        chosen.append(
            {
                "network": run.model[0],
                "initialisation": run.model[1],
                "seed": run.seed,
                "fold": run.fold,
                **{key: best[key] for key in ("values", "log_probability", "fields")},
                "inner": run.search["inner"],
                "diverged": [one["values"] for one in candidates.values() if "diverged" in one],
            }
        )
    return {"search": chosen} if chosen else {}


def _cost(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Time (of searches too), speed and size of runs; a run whose record holds no time counts with its epochs'."""
    seconds = [run.facts.get("seconds") or sum(epoch["seconds"] for epoch in run.epochs) for run in runs]
    seconds += [run.search["seconds"] for run in runs if run.search]
    speeds = [epoch["images_per_s"] for run in runs for epoch in run.epochs[1:] or run.epochs]
    memory = [run.facts["memory_mb"] for run in runs if run.facts.get("memory_mb")]
    return {
        "runs": len(runs),
        "epochs": max(len(run.epochs) for run in runs),
        "hours": sum(seconds) / 3600,
        "images_per_s": float(statistics.median(speeds)),
        "ranks": sorted({int(run.facts.get("ranks", 1)) for run in runs}),
        "memory_mb": max(memory, default=None),
    }


def _origin(facts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Distinct hosts, commits and versions of runs; a commit with changed files ends in `+`."""
    hosts, commits, pythons = set(), set(), set()
    versions: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        hosts.update([fact["host"]] if "host" in fact else [])
        pythons.update([fact["python"]] if "python" in fact else [])
        commits.update([fact["commit"] + ("+" if fact.get("dirty") else "")] if "commit" in fact else [])
        for package, version in fact.get("versions", {}).items():
            versions[package].add(version)
    return {
        "hosts": sorted(hosts),
        "commits": sorted(commits),
        "python": sorted(pythons),
        "versions": {package: sorted(found) for package, found in sorted(versions.items())},
    }


def _headline(models: Sequence[dict[str, Any]], done: int, expected: int, missing: Sequence[str]) -> list[str]:
    """Say what is missing, then the accuracy of each model in one sentence."""
    sentences = []
    if missing:
        sentences.append(f"Incomplete: {done} of {expected} runs are finished. Missing: {listing(missing, 6)}.")
    for model in models:
        at = model["levels"]["treatment"]
        low, high = at["wilson95"]
        sentence = (
            f"{model['network']}, {model['initialisation']}: {at['correct']} of {at['total']} treatments, "
            f"{100 * at['accuracy']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}; {model['levels_of']})"
        )
        for seed, entry in model["by_seed"].items():
            folds = entry["folds"]
            if folds["missing"]:
                which = f" of seed {seed}" if len(model["seeds"]) > 1 else ""
                sentence += (
                    f"; {folds['done']} of {folds['total']} folds{which}, without {listing(folds['missing'], 6)}"
                )
        sentences.append(sentence + ".")
    return sentences


def _cautions(wells: pd.DataFrame, folds: Folds, conversion: Mapping[str, Any]) -> list[str]:
    """Say what else a reader must know: fields that were set aside, and compounds on both sides of a split."""
    sentences = []
    if aside := conversion.get("set_aside"):
        sentences.append(f"{len(aside)} field(s) could not be read and were set aside; scores.json lists them.")
    shared = wells.groupby("compound")["fold"].nunique()
    if folds.unknown:
        sentences.append(
            "Each fold leaves a label out altogether. What is of that label is unknown to its network: no answer is "
            f"right, and it is not counted. Accuracies are of the known {folds.by}s of the other labels."
        )
    elif (shared > 1).any():
        sentences.append(
            f"What is held out is the {folds.by}: the same compounds are in training, so this is not the accuracy for "
            "new compounds."
        )
    if folds.not_scorable:
        count = sum(folds.not_scorable.values())
        sentences.append(
            f"{count} treatment(s) of {folds.by} {listing(folds.not_scorable, 40)} can't be scored: without their "
            f"{folds.also}, their label is in no other {folds.by}, or alone."
        )
    if folds.also and folds.also not in wells:
        sentences.append(f"Not checked for leaks: the predictions have no column {folds.also}.")
    if folds.by not in wells:
        sentences.append(f"Not checked for leaks: the predictions have no column {folds.by}, which the folds hold out.")
    return sentences


def _write(
    results: Path,
    document: dict[str, Any],
    scored: Sequence[tuple[dict[str, Any], dict[str, pd.DataFrame]]],
    inputs: str,
    store: Store | None,
) -> None:
    """Write all results, the marker last; remove the matrices of models that an earlier aggregation had."""
    (results / ledger.DONE).unlink(missing_ok=True)
    classes = document["classes"]
    for level, name in _TABLES.items():
        parts = {(model["network"], model["initialisation"]): tables[level] for model, tables in scored}
        named = pd.concat(parts, names=["network", "initialisation"]).reset_index(level=[0, 1])
        ledger.write_table(results / name, named)
    matrices, pictures = {}, {}
    for model, _ in scored:
        title = f"{model['network']}, {model['initialisation']}"
        matrix = pd.DataFrame(model["confusion"], index=pd.Index(classes, name="label"), columns=classes)
        name = f"confusion-{model['slug']}"
        matrices[title] = matrix
        pictures[name] = figures.save(figures.confusion_figure(matrix, title), results / f"{name}.png")
        ledger.write_table(results / f"{name}.csv", matrix.reset_index())
    pictures["confusion"] = figures.save(figures.confusions_figure(matrices), results / "confusion.png")
    curves = figures.learning_curves_figure(document["models"], len(classes))
    pictures["learning-curves"] = figures.save(curves, results / "learning-curves.png")
    if store:
        ledger.write_table(results / "outliers.csv", outliers(store.fields))
        try:
            pictures["montage"] = montage(store, classes).save(results / "montage.png")
        except (DataError, OSError) as fault:  # scores don't need the tiles, which may be gone by now
            (results / "montage.png").unlink(missing_ok=True)
            document["no_montage"] = str(fault)
    ledger.write_json(results / "scores.json", document)
    ledger.write_text(results / "report.html", render_report(document, pictures))
    for path in results.glob("confusion-*"):
        if path.stem not in pictures:
            path.unlink()
    ledger.mark_done(results, inputs)
