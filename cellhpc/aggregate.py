"""Finished runs to results: scores, tables, figures and the report of a study.

`aggregate` reads the runs that are done, checks that they belong together and that nothing leaked, and writes into
`STUDY/results/`:

- `scores.json`, described below and by the JSON Schema `cellhpc/scores.schema.json`;
- `treatments.csv`, `compounds.csv`, `wells.csv`, `fields.csv`: call and probabilities of every unit and model (wells
  and fields fold by fold, as they are scored); `by_label.csv`, `comparisons.csv`; `p_values.csv` of conformal
  prediction, `uncertainty.csv`, the entropies of every treatment, and `repeat.csv`, what to repeat in the lab;
- `accuracy.csv`, `calibration.csv`, `reliability.csv`, `conformal.csv`, `rejection.csv`, `curves.csv`, `unknown.csv`:
  what `scores.json` says, as tables (`cellhpc.score_tables`);
- `confusion-<model>.png|svg|csv` and `confusion.png|svg`, all models side by side;
- `learning-curves.png|svg`; `reliability`, `conformal` and `rejection.png|svg` where there is enough for them;
- `montage.png`, tiles by label, and `outliers.csv`, the fields that stand out of their plate (`cellhpc.outliers`);
- `report.html`, one page that needs no network;
- `done.json`, the marker: with the same runs and settings a second call does nothing.

`scores.json` (`cellhpc-scores/2`)::

    study, complete, headline     name; whether every planned run is in; sentences, what is missing first
    cautions                      those sentences of the headline that a reader of the numbers must know besides
    combine, classes, abbreviations, folds.{by, also, sha256, total}, runs.{done, expected, missing}
    folds.not_scorable            with `folds.also`: what can't be held out, and its treatments
    folds.unknown                 whether each fold leaves a label out altogether: what is of that label is not counted
    curves_combined               the rules by which the runs counted calls after an epoch; usually one, as `combine`
    models[]                      one for each network and initialisation
      network, initialisation, weights, slug, seeds
      levels_of                   "seed 0", or "ensemble of 3 seeds (mean probability of each tile)"
      levels.{tile, field, well, treatment, compound}.{correct, total, accuracy, wilson95, bootstrap95}
                .top2.{correct, total, accuracy, wilson95}      the true label is one of the first two
      by_seed.SEED.{folds.{done, total, missing}, levels}
      macro.{compound, label}.{accuracy, of, bootstrap95}      mean over compounds, labels of treatment accuracies
      spread                      of treatments over seeds: {seeds, mean, sd, lowest, highest}, of those with all folds
      confusion                   counts of treatments: rows true, columns called, in the order of classes
      uncertainty                 calibration, conformal, decomposition, rejection, repeat[], unknown: as
                                  `cellhpc.uncertainty.assess` says
      by_label[]                  {label, compounds, correct, total, accuracy, wilson95} of treatments
      by_compound[], wrong[]      right treatments of each compound; the treatments that were wrong
      curves.{all, SEED}.{tile, field, well, treatment}.{correct, total}      lists, an entry an epoch, folds pooled
      cost.{runs, epochs, hours, images_per_s, ranks, memory_mb}
    comparisons[]                 of models that differ in one thing alone, over compounds (`cellhpc.compare`)
      a, b, units, compounds, treatments, a_only, b_only, both, neither
      difference, bootstrap95, p_value, test, mcnemar_p
    ensembles[]                   of all networks from one initialisation: mean probability of each treatment
      name, networks, initialisation, treatment.{correct, ...}, confusion, wrong[]
    search[]                      with a `[search]`: what each run chose, and on what
      network, initialisation, seed, fold, values                           `values` as in `[search]`
      log_probability, fields.{correct, total, by_epoch}, inner             of inner compounds
      diverged                                                              candidates whose loss was not finite
    baselines.{chance, majority, batch_only}      of treatments; null with `folds.unknown`, and without a store while
                                  folds are missing or with `folds.also`
    baselines.table[]             the same as rows, and those of `cellhpc.baselines` where there is a store
      name, words, correct, total, accuracy, wilson95, not_scorable
    conversion                    counts of the store, and the fields that were set aside, each with its reason
    quality                       counts of fields, and those that stand out of their plate (`cellhpc.outliers.summary`)
    provenance, settings          versions, hosts, commits, submissions with their Slurm jobs; the resolved job file

Predictions are read fold by fold and forgotten (see `cellhpc.counting`): time grows with the runs, memory does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from cellhpc import figures, ledger, scores
from cellhpc.attempts import finished
from cellhpc.attributions import ATTRIBUTIONS
from cellhpc.baselines import blind_baselines, feature_baselines, feature_digests, intensity_baselines
from cellhpc.compare import comparisons, ensembles
from cellhpc.counting import Asked, count
from cellhpc.errors import DataError, listing
from cellhpc.folds import Folds, read_folds
from cellhpc.names import model_name, told_apart
from cellhpc.outliers import summary
from cellhpc.predictor import DRAWS, PREDICTIONS
from cellhpc.results import Name, write_results
from cellhpc.runs import Course, FinishedRun, read_runs
from cellhpc.study import StudyFolder
from cellhpc.submission import history
from cellhpc.tally import UNKNOWN, ModelTally
from cellhpc.tiles import Store

SCHEMA = "cellhpc-scores/2"


def aggregate(
    study: Path,
    job_name: str,
    units: Sequence[Path],
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
    units
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
    outputs = {unit: folder for unit in units if (folder := finished(unit)) is not None}
    if not outputs:
        raise DataError(
            f"{study}: none of the {len(units)} runs is finished, there is nothing to aggregate.",
            remedy="Train them first, with: cellhpc train JOB.toml",
        )
    settings = ledger.read_json(study / "job.json") if (study / "job.json").exists() else {}
    folds = read_folds(study / "folds.json")
    inputs = ledger.digest(
        {
            "schema": SCHEMA,
            "version": metadata.version("cellhpc"),
            "study": job_name,
            # Short, as there are thousands.
            "runs": {unit.name: ledger.digest(_identity(unit, folder)) for unit, folder in outputs.items()},
            "expected": sorted(unit.name for unit in units),
            "classes": list(classes),
            "how": how,
            "folds": folds.sha256,
            "settings": settings,
            "conversion": conversion,
            "store": store and store.content_digest,
            "features": feature_digests(study, store) if store else [],
        }
    )
    if ledger.is_done(results, inputs) and all((results / name).exists() for name in ("scores.json", "report.html")):
        document: dict[str, Any] = ledger.read_json(results / "scores.json")
        return document

    runs, courses, origin, problems = read_runs(outputs, classes, folds)
    models, asked = count(runs, problems, folds, classes, how, results)
    of_models: dict[Name, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        of_models[run.model].append(run)
    entries = [_entry(own, models[name], courses[name], folds) for name, own in of_models.items()]
    tell_apart(entries)
    missing = [unit.name for unit in units if unit not in outputs]
    cautions = _cautions(asked, folds, conversion or {})
    incomplete = (
        [f"Incomplete: {len(outputs)} of {len(units)} runs are finished. Missing: {listing(missing, 6)}."]
        if missing
        else []
    )
    done = {run.fold for run in runs}
    if done == {fold.name for fold in folds.folds} and not folds.also and not folds.unknown:
        baselines = scores.baselines(asked.table(), classes)
    elif store and not folds.unknown:  # which says what was trained on besides what was asked
        baselines = blind_baselines(store, folds, done)
    else:
        baselines = scores.blind([], classes)
    if store and not folds.unknown:
        baselines["table"] += intensity_baselines(store, folds) + feature_baselines(study, store, folds)
    treatments_of = {name: model.treatments for name, model in models.items()}
    document = {
        "schema": SCHEMA,
        "study": job_name,
        "complete": not missing,
        "headline": incomplete + headline(entries, folds.by) + cautions,
        "cautions": cautions,
        "combine": how,
        "curves_combined": sorted({run.combine for run in runs}),
        "classes": list(classes),
        "abbreviations": figures.abbreviate(classes),
        "folds": {
            **{"by": folds.by, "also": folds.also, "sha256": folds.sha256, "total": len(folds.folds)},
            "not_scorable": folds.not_scorable,
            "unknown": folds.unknown,
        },
        "runs": {"done": len(outputs), "expected": len(units), "missing": missing},
        "models": entries,
        "comparisons": comparisons(treatments_of),
        "ensembles": ensembles(treatments_of, classes),
        **_searched(runs),
        "baselines": baselines,
        "conversion": dict(conversion or {}),
        "quality": summary(store.fields) if store else {},
        "no_montage": "",
        "provenance": {
            "runs": origin.document(),
            "submissions": history(StudyFolder(study)),
            "aggregate": ledger.provenance(),
        },
        "settings": settings,
    }
    write_results(results, document, models, inputs, store, outputs.values(), folds)
    return document


def _identity(unit: Path, folder: Path) -> list[Any]:
    """Tell a run from a later one: its digest, its attempt, and the sizes and times of its files."""
    files = [folder / name for name in ("run.json", "history.json", PREDICTIONS, DRAWS, ATTRIBUTIONS)]
    found = [file.stat() for file in files if file.exists()]
    return [ledger.done_digest(unit), folder.name, *((facts.st_size, facts.st_mtime_ns) for facts in found)]


def _entry(
    runs: Sequence[FinishedRun], model: ModelTally, courses: Mapping[int, Course], folds: Folds
) -> dict[str, Any]:
    """Make the entry of one network from one initialisation in `scores.json`."""
    network, start = runs[0].model
    found = model.document()
    for seed, entry in found["by_seed"].items():
        done = {run.fold for run in runs if str(run.seed) == seed}
        absent = sorted({fold.name for fold in folds.folds} - done)
        entry["folds"] = {"done": len(done), "total": len(folds.folds), "missing": absent}
    together = Course.together(courses.values())
    return {
        "network": network,
        "initialisation": start,
        "weights": runs[0].weights,
        "slug": slug(network, start),
        **found,
        "curves": {"all": together.curves(), **{str(seed): courses[seed].curves() for seed in found["seeds"]}},
        "cost": together.cost(),
    }


def slug(network: str, start: str) -> str:
    """Name of a model in file names."""
    return re.sub(r"[^\w.]+", "-", f"{network} {start}").strip("-")


def tell_apart(entries: Sequence[dict[str, Any]]) -> None:
    """Give slugs a number that several models would have."""
    for entry, own in zip(entries, told_apart([entry["slug"] for entry in entries]), strict=True):
        entry["slug"] = own


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


def headline(models: Sequence[dict[str, Any]], by: str) -> list[str]:
    """Say the accuracy of each model in one sentence, and which folds it lacks.

    Where something else than compounds is held out, as a cell line, wells are what is asked: they are told first.
    """
    sentences = []
    for model in models:
        told = ["treatment"] if by in ("compound", "fold") or "well" not in model["levels"] else ["well", "treatment"]
        counted = []
        for level in told:
            at = model["levels"][level]
            _, accuracy, interval = scores.counted(at)
            counted.append(f"{at['correct']} of {at['total']} {level}s, {accuracy} % (95 % interval {interval}")
        sentence = f"{model_name(model)}: {'); '.join(counted)}; {model['levels_of']})"
        for seed, entry in model["by_seed"].items():
            folds = entry["folds"]
            if folds["missing"]:
                which = f" of seed {seed}" if len(model["seeds"]) > 1 else ""
                sentence += (
                    f"; {folds['done']} of {folds['total']} folds{which}, without {listing(folds['missing'], 6)}"
                )
        sentences.append(sentence + ".")
    return sentences


def caution_of_shared(asked: pd.DataFrame, by: str) -> list[str]:
    """Say so where compounds are on both sides of a split; `asked` has the columns `compound` and `fold`."""
    if not (asked.groupby("compound")["fold"].nunique() > 1).any():
        return []
    return [
        f"What is held out is the {by}: the same compounds are in training, so this is not the accuracy for "
        "new compounds."
    ]


def _cautions(asked: Asked, folds: Folds, conversion: Mapping[str, Any]) -> list[str]:
    """Say what else a reader must know: fields that were set aside, and compounds on both sides of a split."""
    sentences = []
    if aside := conversion.get("set_aside"):
        sentences.append(f"{len(aside)} field(s) could not be read and were set aside; scores.json lists them.")
    if UNKNOWN in asked.columns:
        sentences.append(
            "Each fold leaves a label out altogether. Treatments of that label can't be right and are not scored; "
            "known ones count in each fold that holds them out."
        )
    else:
        sentences += caution_of_shared(asked.table(), folds.by)
    if folds.not_scorable:
        lacking = sum(folds.not_scorable.values())
        sentences.append(
            f"{lacking} treatment(s) of {folds.by} {listing(folds.not_scorable, 40)} can't be scored: without their "
            f"{folds.also}, their label is in no other {folds.by}, or alone."
        )
    if folds.also and folds.also not in asked.columns:
        sentences.append(f"Not checked for leaks: the predictions have no column {folds.also}.")
    if folds.by not in asked.columns:
        sentences.append(f"Not checked for leaks: the predictions have no column {folds.by}, which the folds hold out.")
    return sentences
