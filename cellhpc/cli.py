"""The command `cellhpc`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from cellhpc.errors import UserError
from cellhpc.sections import parse_override
from cellhpc.settings import Job, load_job

if TYPE_CHECKING:
    from cellhpc.pipeline import StudyPlan

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="cellhpc")
def cli() -> None:
    r"""From raw high-content-screening plates to mechanism of action.

    \b
    cellhpc synth bbbc021 DIR --preset demo   make a small synthetic screen
    cellhpc inspect JOB.toml                  what its tables say, and what is wrong with them
    cellhpc run JOB.toml --dry-run            what would be done
    cellhpc run JOB.toml                      convert, train every fold, aggregate; again: do what is missing
    """


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


@cli.command()
@_takes_job
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(job_file: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Convert, train every fold and aggregate: whatever of it is missing."""
    _stages(load_job(job_file, overrides), ("convert", "train", "aggregate"), dry_run, as_json)


@cli.command()
@_takes_job
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def convert(job_file: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Convert raw fields to tiles."""
    _stages(load_job(job_file, overrides), ("convert",), dry_run, as_json)


@cli.command()
@_takes_job
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def train(job_file: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Train every fold on the converted store."""
    _stages(load_job(job_file, overrides), ("train",), dry_run, as_json)


@cli.command()
@_takes_job
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def aggregate(job_file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Score the finished runs, draw the figures, write the report."""
    _stages(load_job(job_file, overrides), ("aggregate",), dry_run=False, as_json=as_json)


def _stages(job: Job, stages: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    from cellhpc.pipeline import plan_study, run_study

    if dry_run:
        plan = plan_study(job)
        _answer(plan.facts(), as_json, lambda: click.echo(plan.render(stages)))
        return
    plan, scores = run_study(job, stages)
    if not as_json:
        click.echo(_what_was_done(plan, stages))
    if scores is None:
        if as_json:
            _answer(plan.facts(), as_json, lambda: None)
    else:
        _answer(scores, as_json, lambda: _closing(plan.folder.results, scores))


def _what_was_done(plan: StudyPlan, stages: tuple[str, ...]) -> str:
    lines = []
    if "convert" in stages:
        counts = plan.conversion.counts()
        lines.append(
            f"{'Converted before' if plan.converted else 'Converted'}: {counts['fields']:,} fields, "
            f"{counts['kept_tiles']:,} tiles; set aside: {counts['bad_fields']:,} fields that could not be read, "
            f"{counts['near_empty_tiles']:,} near-empty tiles."
        )
    if "train" in stages:
        lines.append(f"Trained: {len(plan.missing):,} runs; {len(plan.runs) - len(plan.missing):,} were done before.")
    if plan.converted and not plan.missing:
        lines.append("Nothing was to be converted or trained.")
    return "\n".join(lines)


def _closing(results: Path, scores: dict[str, Any]) -> None:
    from cellhpc.report import render_scores

    console = Console()
    # A log has no width of its own; the table needs about 120 letters.
    console.width = console.width if console.is_terminal else max(console.width, 120)
    console.print(render_scores(scores))
    click.echo(f"Report: {results / 'report.html'}")


def _answer(facts: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
    else:
        show()


def main() -> None:
    """Entry point: a user's mistake is one message and an exit code, never a traceback."""
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
