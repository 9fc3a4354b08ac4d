"""The best preset on real pictures: 660 fields of BBBC021, 18 compounds left out, from ImageNet's MobileNet-0.25.

Five studies of jobs/bbbc021_subset.toml, which train from the given weights and share a store for each side of tiles:

- compound: each compound is left out, five seeds;
- week: each compound is left out together with all of its week (`folds.also = "batch"`), five seeds. Treatments whose
  mechanism then is in no other compound can't be scored: they are counted and named;
- xavier: as `compound`, from random weights, one seed;
- other, other_week: as `compound` and `week`, with `OTHER`.

Nothing is chosen here. `tests/bench/inner_choice.py` tells how the preset was chosen, among how many settings, on
inner compounds: but the compounds of each half are held out too, and so the preset had seen half of them in the
choice. `crossed` is without that: folds that hold out a compound of half B are those of the preset, which half A
chooses, and folds of half A are those of `OTHER`, which half B chooses; once more with the week left out too. (The
choice itself left compounds out, and no week.)

Beside them what fixed features of the same weights reach (`tests/bench/features.py`). Two runs are trained side by side
on two cores. What is interrupted goes on when the same is typed again: it lies in `--folder`. Needs CELLHPC_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pandas as pd
from inner_choice import HALVES

from cellhpc.attempts import finished
from cellhpc.backbone import choose_source
from cellhpc.convert import convert, plan_conversion
from cellhpc.drive import run_study
from cellhpc.features import write_features
from cellhpc.ledger import read_json
from cellhpc.levels import average_tables
from cellhpc.profiles import baseline
from cellhpc.scores import levels
from cellhpc.screens import read_screen
from cellhpc.settings import Job, load_job

JOB = Path(__file__).parents[2] / "jobs" / "bbbc021_subset.toml"
FEATURES_PX = 224
LEVELS = ("treatment", "field")
OTHER = ("sweep.tile_px=160", "train.epochs=6")
"""What half B chooses."""
CORES = len(os.sched_getaffinity(0))


def studies(folder: Path, seeds: int) -> dict[str, Job]:
    """The job of each study; all but what is said here is the job file's."""
    pretrained, xavier = load_job(JOB).sweep.weights
    many, one = list(range(seeds)), [0]
    others = (f"convert.store={folder / 'store_other'}", *OTHER)
    kinds: dict[str, tuple[str, list[int], str, tuple[str, ...]]] = {
        "compound": (pretrained, many, "", ()),
        "week": (pretrained, many, "batch", ()),
        "xavier": (xavier, one, "", ()),
        "other": (pretrained, many, "", others),
        "other_week": (pretrained, many, "batch", others),
    }
    return {
        name: load_job(
            JOB,
            [
                f"study.name={name}",
                f"study.folder={folder / name}",
                f"convert.store={folder / 'store'}",
                f"folds.also={also!r}",
                f"sweep.weights=[{weights!r}]",
                f"sweep.seeds={given}",
                "sweep.ranks=1",
                f"sweep.parallel_jobs={CORES}",
                *more,
            ],
        )
        for name, (weights, given, also, more) in kinds.items()
    }


def counted(at: dict[str, Any]) -> str:
    """Write a level of `scores.json`: counts, share, Wilson's interval, and the bootstrap over compounds if it has."""
    ends = [at[name] for name in ("wilson95", "bootstrap95") if name in at]
    intervals = [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in ends]
    return f"{at['correct']}/{at['total']} = {100 * at['accuracy']:.1f} % [{'; '.join(intervals)}]"


def show(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """Print the rows of a study: each seed, their spread, and their ensemble."""
    (model,) = scores["models"]
    found: dict[str, Any] = {"cost": model["cost"], "not_scorable": scores["folds"]["not_scorable"]}
    for seed, entry in model["by_seed"].items():
        print(f"{name:12} seed {seed:5} " + "   ".join(counted(entry["levels"][level]) for level in LEVELS))
    for level in LEVELS:
        right = [entry["levels"][level]["correct"] for entry in model["by_seed"].values()]
        by_epoch = {seed: curve[level]["correct"] for seed, curve in model["curves"].items()}
        found[level] = {"by_seed": right, "ensemble": model["levels"][level], "by_epoch": by_epoch}
    if len(model["seeds"]) > 1:
        spread = [
            f"mean {statistics.mean(found[level]['by_seed']):.1f}, deviation "
            f"{statistics.stdev(found[level]['by_seed']):.1f}, of {model['levels'][level]['total']}"
            for level in LEVELS
        ]
        print(f"{name:12} {'spread':10} " + "   ".join(spread))
        print(f"{name:12} {'ensemble':10} " + "   ".join(counted(model["levels"][level]) for level in LEVELS))
    if lacking := found["not_scorable"]:
        total = model["levels"]["treatment"]["total"] + sum(lacking.values())
        print(f"{name:12} not scorable: {sum(lacking.values())} of {total} treatments, of {', '.join(lacking)}")
    return found


def predictions(folder: Path, half: str) -> dict[int, pd.DataFrame]:
    """Predictions of the runs of a study that hold out a compound of a half, by seed."""
    found: dict[int, list[pd.DataFrame]] = {}
    for unit in sorted((folder / "runs").iterdir()):
        outputs = finished(unit)
        assert outputs is not None
        record = read_json(outputs / "run.json")
        if record["fold"]["name"] in HALVES[half]:
            found.setdefault(record["seed"], []).append(pd.read_parquet(outputs / "predictions.parquet"))
    return {seed: pd.concat(tables, ignore_index=True) for seed, tables in found.items()}


def crossed(title: str, other: Path, preset: Path) -> dict[str, Any]:
    """Count what is right where no compound had a part in the choice of the settings that it is asked with."""
    halves = predictions(other, "A"), predictions(preset, "B")
    seeds = {seed: pd.concat([half[seed] for half in halves], ignore_index=True) for seed in halves[0]}
    of_seeds = {seed: levels(table) for seed, table in seeds.items()}
    together = levels(average_tables([*seeds.values()]))
    for name, at in (*((f"seed {seed:5}", at) for seed, at in of_seeds.items()), (f"{'ensemble':10}", together)):
        print(f"{title:12} {name} " + "   ".join(counted(at[level]) for level in LEVELS))
    return {
        level: {"by_seed": [at[level]["correct"] for at in of_seeds.values()], "ensemble": together[level]}
        for level in LEVELS
    }


def frozen(job: Job, folder: Path) -> dict[str, Any]:
    """Score logistic regression on features of the same weights, which are not trained any further."""
    plan = plan_conversion(job.convert, read_screen(job.screen), (FEATURES_PX,), folder / f"store_{FEATURES_PX}")
    if not plan.is_finished:
        convert(plan)
    source = choose_source(plan.store, job.sweep.networks[0], job.sweep.weights[0], tile_px=FEATURES_PX)
    features = write_features(source, folder / "features")
    found: dict[str, Any] = baseline(features.tiles, features.read())["logistic_regression"]
    return found


def stop(number: int, _: Any) -> None:
    """End as with Ctrl-C, once: the runs leave checkpoints meanwhile."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("studies/real"), help="where the studies lie, and go on")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    began = time.perf_counter()
    jobs = studies(given.folder.absolute(), given.seeds)
    scores: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        _, document = run_study(job)
        assert document is not None
        scores[name] = document
    print(f"{'left out':12} {'':10} treatments, and fields: right [Wilson 95 %; bootstrap over compounds 95 %]")
    found: dict[str, Any] = {name: show(name, document) for name, document in scores.items()}
    where = given.folder.absolute()
    found["crossed"] = crossed("crossed", where / "other", where / "compound")
    found["crossed week"] = crossed("crossed week", where / "other_week", where / "week")
    features = frozen(jobs["compound"], given.folder.absolute())
    for left_out, at in features.items():
        print(f"{'features':12} {left_out.removeprefix('compound_and_'):10} "
              + "   ".join(counted(at[level]) for level in LEVELS))  # fmt: skip
    print("right of seed 0 after each epoch, the compound left out (nothing is chosen by it)")
    for level in LEVELS:
        for name in ("compound", "xavier"):
            print(f"{name:12} {level:10} " + " ".join(f"{right:3}" for right in found[name][level]["by_epoch"]["0"]))
    seconds = time.perf_counter() - began
    hours = sum(document["models"][0]["cost"]["hours"] for document in scores.values())
    runs = sum(document["models"][0]["cost"]["runs"] for document in scores.values())
    print(f"{runs} runs: {60 * hours:.0f} minutes of one core; "
          f"this call took {seconds / 60:.1f} minutes on {CORES} cores")  # fmt: skip
    print(json.dumps({"bench": "real", "cores": CORES, "seconds": seconds, **found, "features": features}))


if __name__ == "__main__":
    main()
