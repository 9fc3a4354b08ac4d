"""The command `cellhpc`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click
from rich.console import Console

from cellhpc.errors import UsageError, UserError
from cellhpc.ledger import is_done, read_json, write_json
from cellhpc.record import is_store
from cellhpc.sections import parse_override
from cellhpc.settings import PREDICTION_COLUMNS, How, load_job

if TYPE_CHECKING:
    from cellhpc.drive import SubmissionPlan
    from cellhpc.pipeline import StudyPlan
    from cellhpc.submission import Submission

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="cellhpc")
def cli() -> None:
    """From raw high-content-screening plates to mechanism of action.

    \b
    cellhpc synth bbbc021 DIR --preset demo   make a small synthetic screen
    cellhpc inspect JOB.toml                  what its tables say, and what is wrong with them
    cellhpc run JOB.toml --dry-run            what would be done
    cellhpc run JOB.toml                      convert, train every fold, aggregate; again: do what is missing
    cellhpc run JOB.toml --site SITE.toml     the same as jobs of Slurm; returns at once
    cellhpc status STUDY                      what it is doing; logs, resume and cancel take a study too
    cellhpc pictures STORE                    its plates at a glance, and the fields that stand out
    cellhpc score TABLE --out DIR             accuracies of predictions from anywhere, by the same code
    cellhpc features STORE --network NAME     what a network says of every tile, as Zarr; a baseline in seconds
    cellhpc doctor --site SITE.toml           is this cluster ready?
    """  # noqa: D301 (Click keeps the lines after a backspace, which a raw string would spell out)


def _takes_job(command: Command) -> Command:
    """Add the job file and the options of every command that takes one."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Replace a setting of the job file; repeatable.",
    )(command)
    return click.argument("job_file", metavar="JOB.toml", type=click.Path(path_type=Path))(command)


def _takes_study(command: Command) -> Command:
    """Add the folder of a study that was begun."""
    return click.argument("study", metavar="STUDY", type=click.Path(path_type=Path))(command)


@cli.command()
@click.argument("layout", metavar="bbbc021|bbbc014")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--preset", default="full", show_default=True, help="full: the real one's sizes; demo: made in seconds.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a setting of the preset; repeatable."
)
@click.option("--workers", type=click.IntRange(1), help="Processes that draw; by default one for each core.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def synth(
    layout: str, folder: Path, preset: str, overrides: tuple[str, ...], workers: int | None, as_json: bool
) -> None:
    """Make a synthetic screen in the raw layout of a real one."""
    from cellhpc import synth as screens

    settings = screens.choose(layout, preset, dict(parse_override(override) for override in overrides))
    facts = screens.synth(folder, settings, workers)
    _answer(facts, as_json, lambda: click.echo("\n".join(f"{key}: {value}" for key, value in facts.items())))


@cli.command()
@_takes_job
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(job_file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what the screen's tables say, and every problem found; no pixel is decoded."""
    from cellhpc.screens import read_screen
    from cellhpc.screens.summary import render_summary, summary

    facts = summary(read_screen(load_job(job_file, overrides).screen))
    _answer(facts, as_json, lambda: Console().print(render_summary(facts)))
    if facts["problems"]:
        sys.exit(1)


def _takes_site(command: Command) -> Command:
    """Add the options of a stage that can run here or on Slurm."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--test-only", is_flag=True, help="Ask Slurm whether it would take the jobs; submit nothing."),
        click.option("--dry-run", is_flag=True, help="Print the plan; write nothing."),
        click.option(
            "--site",
            "site_file",
            metavar="SITE.toml",
            type=click.Path(path_type=Path),
            help="Submit to Slurm, as this site file says.",
        ),
    ):
        command = option(command)
    return command


@cli.command()
@_takes_job
@_takes_site
def run(**options: Any) -> None:
    """Convert, train every fold and aggregate: whatever of it is missing."""
    _stages(("convert", "train", "aggregate"), **options)


@cli.command()
@_takes_job
@_takes_site
def convert(**options: Any) -> None:
    """Convert raw fields to tiles."""
    _stages(("convert",), **options)


@cli.command()
@_takes_job
@_takes_site
def train(**options: Any) -> None:
    """Train every fold on the converted store."""
    _stages(("train",), **options)


@cli.command()
@_takes_job
@_takes_site
def aggregate(**options: Any) -> None:
    """Score the finished runs, draw the figures, write the report."""
    _stages(("aggregate",), **options)


def _names_columns(command: Command) -> Command:
    """Add an option for each column of a table of predictions that may be called otherwise."""
    for name in reversed(PREDICTION_COLUMNS):
        command = click.option(
            f"--{name}-column", f"column_{name}", metavar="NAME", help=f"Column of the {name}, if not called so."
        )(command)
    return command


@cli.command()
@click.argument("table", metavar="TABLE.csv|parquet", type=click.Path(path_type=Path))
@click.option(
    "--out",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder that the results are written into: a new one, or that of an earlier table.",
)
@click.option(
    "--combine",
    type=click.Choice(get_args(How)),
    default="mean",
    show_default=True,
    help="As aggregate.combine.",
)
@click.option(
    "--class",
    "classes",
    multiple=True,
    metavar="NAME",
    help="Column of the probability of a class; repeatable, in their order. By default those that begin with p_, or "
    "else those that are called as a label is.",
)
@_names_columns
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def score(
    table: Path, folder: Path, combine: str, classes: tuple[str, ...], as_json: bool, **columns: str | None
) -> None:
    """Score predictions from anywhere: a row a tile, field, well or treatment, a column of probability a class.

    A row tells its compound, its concentration or treatment, and its true label.
    """
    from cellhpc.predictions import score_predictions

    names = {key.removeprefix("column_"): name for key, name in columns.items() if name}
    found = score_predictions(table, folder, combine, names, classes)  # type: ignore[arg-type]
    _answer(found, as_json, lambda: _closing(folder, found))


@cli.command()
@click.argument("store", metavar="STORE", type=click.Path(path_type=Path))
@click.option("--raw", metavar="DIR", type=click.Path(path_type=Path), help="Where the raw pictures lie by now.")
@click.option("--sample", type=click.IntRange(0), default=20, show_default=True, help="Fields to make anew.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(store: Path, raw: Path | None, sample: int, as_json: bool) -> None:
    """Read every shard of a store again, make some fields anew from the raw pictures. Exit code 0 if all is well."""
    from cellhpc.upkeep import verify as look

    found = look(store, raw, sample)
    lines = [f"{found.plates:,} plates, {found.shards:,} shards, {found.bytes / 1e6:,.0f} MB read again; "
             f"{found.compared:,} fields made anew and compared"]  # fmt: skip
    if found.without_pictures:
        lines.append(f"{found.without_pictures:,} fields could not be: their raw pictures are not there (--raw DIR)")
    lines += [f"  - {problem}" for problem in found.problems] or ["All is well."]
    _answer(asdict(found), as_json, lambda: click.echo("\n".join(lines)))
    sys.exit(UserError.exit_code if found.problems else 0)


@cli.command()
@click.argument("store", metavar="STORE", type=click.Path(path_type=Path))
@click.argument("plates", metavar="PLATE...", nargs=-1, required=True)
def remove(store: Path, plates: tuple[str, ...]) -> None:
    """Remove plates from a store; the others stay as they are."""
    from cellhpc.upkeep import remove as take_away

    take_away(store, plates)
    click.echo(f"removed: {', '.join(plates)}")


@cli.command()
@click.argument("store", metavar="STORE", type=click.Path(path_type=Path))
@click.option(
    "--out",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path("pictures"),
    show_default=True,
    help="Folder that they are written into.",
)
@click.option("--plate", "plates", multiple=True, help="Only this plate; repeatable.")
def pictures(store: Path, folder: Path, plates: tuple[str, ...]) -> None:
    """Draw every plate of a store and a montage by label, and name the fields that stand out of their plate."""
    from cellhpc.overview import write_pictures

    for path in write_pictures(store, folder, plates):
        click.echo(f"wrote {path}")


@cli.command()
@click.argument("place", metavar="STORE|STUDY", type=click.Path(path_type=Path))
@click.option("--network", metavar="NAME", help='As in sweep.networks: "MobileNet(alpha=0.25)".')
@click.option("--weights", metavar="imagenet|xavier|FILE", help="As in sweep.weights.")
@click.option("--run", metavar="RUN", help="A finished run of the study, trained with sweep.keep_weights.")
@click.option("--tile-px", type=click.IntRange(32, 1024), help="Side of the tiles, by default the network's own.")
@click.option("--input", "inputs", multiple=True, metavar="CHANNELS", help="As in train.inputs; once for each input.")
@click.option("--input-scaling", type=click.Choice(["raw", "keras"]), help="As in [train]; by default keras.")
@click.option("--rotations", is_flag=True, help="Average over the eight rotations and mirrors of a tile.")
@click.option(
    "--out",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder that they are written into, by default features/NAME: in the study's, or in the one you are in.",
)
@click.option(
    "--baseline",
    "with_baseline",
    is_flag=True,
    help="Score them on compounds that are left out; whitened on controls too, if the store has tiles of these.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def features(
    place: Path, inputs: tuple[str, ...], folder: Path | None, with_baseline: bool, as_json: bool, **choice: Any
) -> None:
    """Write what a network says of every tile before its head, as Zarr; done before, it is not done again.

    Of a study, what is not given is as in its job file.
    """
    from cellhpc.backbone import choose_source, start_tensorflow
    from cellhpc.features import write_features
    from cellhpc.profiles import baseline, render_baseline, require_untaught

    source = choose_source(place, inputs=inputs or None, **choice)
    if with_baseline:
        require_untaught({"run": source.run})
    folder = folder or (Path() if is_store(place) else place) / "features" / source.name
    if not is_done(folder, source.about["digest"]):
        start_tensorflow()
    written = write_features(source, folder)
    facts: dict[str, Any] = {"folder": str(folder), "digest": written.about["digest"], **written.facts}
    controls = f" ({written.facts['controls']:,} of controls)" if "controls" in written.facts else ""
    lines = [
        f"{written.facts['features']:,} features of {written.facts['tiles']:,} tiles{controls}, "
        f"made in {written.facts['seconds']:.1f} s ({written.facts['images_per_s']:,.0f} images/s): {folder}"
    ]
    if not with_baseline:
        _answer(facts, as_json, lambda: click.echo("\n".join(lines)))
        return
    began = time.perf_counter()
    lines += [f"Not whitened on controls: {written.not_whitened}."] if written.not_whitened else []
    whitened = None if written.not_whitened else written.read_whitened()
    found = baseline(written.tiles, written.read(), whitened=whitened)
    write_json(folder / "baseline.json", {"features": facts["digest"], **found})
    facts |= {"baseline": found, "baseline_seconds": time.perf_counter() - began}

    def show() -> None:
        click.echo("\n".join(lines))
        _console().print(render_baseline(found, f"Baseline in {facts['baseline_seconds']:.1f} s"))

    _answer(facts, as_json, show)


@cli.command()
@_takes_study
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", is_flag=True, help="Look again every few seconds, until nothing of it waits or runs.")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
def status(study: Path, as_json: bool, watch: bool, every_s: float) -> None:
    """Show what a study is doing: every stage and run. Exit code 0 only if all is done."""
    from cellhpc.board import render_status
    from cellhpc.status import look, open_study

    folder, job = open_study(study)
    console = _console()
    while True:
        seen = look(folder, job)
        if watch and console.is_terminal:
            console.clear()
        _answer(seen.to_json(), as_json, lambda seen=seen: console.print(render_status(seen)))  # type: ignore[misc]
        if not watch or not seen.at_work:
            break
        time.sleep(every_s)
    sys.exit(0 if seen.complete else UserError.exit_code)


@cli.command()
@_takes_study
@click.argument("name", metavar="RUN|TASK|STAGE")
@click.option("-n", "--lines", default=40, show_default=True, help="Last lines of each rank's log.")
@click.option("--rank", type=click.IntRange(0), help="Only this rank's.")
def logs(study: Path, name: str, lines: int, rank: int | None) -> None:
    """Show what a run, a task (train-0003) or a stage (convert, aggregate) said."""
    from cellhpc.status import find_logs, open_study, tail

    folder, _ = open_study(study)
    for number, path in enumerate(find_logs(folder, name)):
        if rank in (None, number):
            click.echo(f"==> {path} <==")
            click.echo("\n".join(tail(path)[-lines:]))


@cli.command()
@_takes_study
@click.option(
    "--site", "site_file", metavar="SITE.toml", type=click.Path(path_type=Path), help="Go on with another site file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def resume(study: Path, site_file: Path | None, as_json: bool) -> None:
    """Do what is missing of a study: on Slurm if it was submitted there, else here."""
    from cellhpc import drive
    from cellhpc.site import load_site, parse_site
    from cellhpc.status import open_study

    folder, job = open_study(study)
    if site_file is not None:
        site = load_site(site_file)
    elif folder.site.exists():
        site = parse_site(read_json(folder.site), str(folder.site))
    else:
        _done_here(*drive.run_study(job), ("convert", "train", "aggregate"), as_json)
        return
    _submitted(*drive.submit_study(job, site), as_json)


@cli.command()
@_takes_study
def cancel(study: Path) -> None:
    """End everything of a study that waits or runs; what is done stays, and resume goes on."""
    from cellhpc.drive import cancel_study

    ended = cancel_study(study)
    click.echo("\n".join(f"ended: {what}" for what in ended) or "Nothing of it waits or runs.")


@cli.command()
@click.option(
    "--site", "site_file", metavar="SITE.toml", type=click.Path(path_type=Path), required=True, help="The site file."
)
@click.option(
    "--folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Below which its jobs get a new folder, removed if all is well; by default the one you are in.",
)
@click.option("--wait", "wait_s", default=600.0, show_default=True, metavar="SECONDS", help="For the jobs, at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(site_file: Path, folder: Path, wait_s: float, as_json: bool) -> None:
    """Is this cluster ready? Runs one small job for each partition of the site file. Exit code 0 if nothing failed."""
    from cellhpc.site import load_site

    site = load_site(site_file)
    from cellhpc.diagnosis import render
    from cellhpc.doctor import diagnose  # imports much: a wrong site file is answered before

    found = diagnose(site, folder, wait_s, lambda line: click.echo(line, err=True))
    _answer(found.to_json(), as_json, lambda: _console().print(render(found)))
    sys.exit(0 if found.healthy else UserError.exit_code)


def _stages(
    stages: tuple[str, ...],
    job_file: Path,
    overrides: tuple[str, ...],
    site_file: Path | None,
    dry_run: bool,
    test_only: bool,
    as_json: bool,
) -> None:
    from cellhpc import drive
    from cellhpc.pipeline import plan_study
    from cellhpc.site import load_site

    job = load_job(job_file, overrides)
    if site_file is None:
        if test_only:
            raise UsageError("--test-only asks Slurm: give --site SITE.toml too")
        if dry_run:
            plan = plan_study(job)
            cost = drive.cost_here(plan) if "train" in stages else None
            facts = plan.facts() | ({"cost": cost.to_json()} if cost else {})
            told = [plan.render(stages), *([cost.render()] if cost else [])]
            _answer(facts, as_json, lambda: click.echo("\n".join(told)))
            return
        _done_here(*drive.run_study(job, stages), stages, as_json)
        return
    site = load_site(site_file)
    if dry_run or test_only:
        planned = drive.plan_submission(job, site, stages)
        if test_only:
            click.echo("\n".join(planned.test()) or "Nothing is to be submitted.")
        else:
            text = planned.study.render(stages)
            _answer(planned.facts(), as_json, lambda: click.echo(f"{text}\n{planned.render()}"))
        return
    _submitted(*drive.submit_study(job, site, stages), as_json)


def _done_here(plan: StudyPlan, scores: dict[str, Any] | None, stages: tuple[str, ...], as_json: bool) -> None:
    if not as_json:
        click.echo(_what_was_done(plan, stages))
    if scores is None:
        if as_json:
            _answer(plan.facts(), as_json, lambda: None)
    else:
        _answer(scores, as_json, lambda: _closing(plan.folder.results, scores))


def _submitted(plan: SubmissionPlan, submission: Submission | None, as_json: bool) -> None:
    folder = plan.study.folder.path
    if submission is None:
        done = {"submitted": [], "status": f"cellhpc status {folder}"}
        _answer(done, as_json, lambda: click.echo(f"Nothing is to be submitted. See: cellhpc status {folder}"))
        return
    jobs = [{"stage": job.stage, "job": job.id, "tasks": job.count} for job in submission.jobs]
    lines = [f"{job.stage}: job {job.id}, {job.count:,} task(s)" for job in submission.jobs]
    window = plan.study.job.train.window_tiles if plan.trains else None
    lines += [f"Tiles come in windows of {window:,} (train.window_tiles)."] if window else []
    lines += [f"See: cellhpc status {folder}"]
    facts = {"submitted": jobs, "window_tiles": window, "status": lines[-1].removeprefix("See: ")}
    _answer(facts, as_json, lambda: click.echo("\n".join(lines)))


def _what_was_done(plan: StudyPlan, stages: tuple[str, ...]) -> str:
    lines = []
    if "convert" in stages:
        counts = plan.conversion.counts()
        controls = f" and {counts['kept_control_tiles']:,} of controls" if "kept_control_tiles" in counts else ""
        lines.append(
            f"{'Converted before' if plan.converted else 'Converted'}: {counts['fields']:,} fields, "
            f"{counts['kept_tiles']:,} tiles{controls}; set aside: {counts['bad_fields']:,} fields that could not be "
            f"read, {counts['near_empty_tiles']:,} near-empty tiles."
        )
    if "train" in stages:
        lines.append(f"Trained: {len(plan.missing):,} runs; {len(plan.runs) - len(plan.missing):,} were done before.")
    if plan.converted and not plan.missing:
        lines.append("Nothing was to be converted or trained.")
    return "\n".join(lines)


def _closing(results: Path, scores: dict[str, Any]) -> None:
    from cellhpc.report import render_scores

    _console().print(render_scores(scores))
    click.echo(f"Report: {results / 'report.html'}")


def _console() -> Console:
    """Make a console; a log has no width of its own, and tables need about 120 letters."""
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, 120)
    return console


def _answer(facts: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
    else:
        show()


def _stop(number: int, _: object) -> None:
    """End as Ctrl-C does: ranks leave checkpoints."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: a user's mistake is one message and an exit code, never a traceback."""
    os.umask(0o077)  # what a study writes is its owner's
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.main(prog_name="cellhpc", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as fault:
        fault.show()
        sys.exit(fault.exit_code)
    except UserError as fault:
        click.echo(f"cellhpc: {fault}", err=True)
        sys.exit(fault.exit_code)
    except OSError as fault:
        click.echo(f"cellhpc: {fault.filename or 'a file'}: {fault.strerror or fault}", err=True)
        sys.exit(UserError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("cellhpc: stopped. The same command goes on where this one ended.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
