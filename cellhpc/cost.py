"""What trainings cost, as data and as a short table; `cellhpc.estimate` finds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cellhpc.convert.plan import size_text


@dataclass(frozen=True)
class Load:
    """One training: its network, the side of its tiles, how many it trains on and holds out, and for how long."""

    network: str
    tile_px: int
    training: int
    held_out: int
    epochs: int
    batch_size: int
    searching: bool = False
    """It is a candidate of a run's search, and not the run itself."""
    drawing: bool = False
    """It predicts once more when it ends, for `train.dropout_draws`."""

    @property
    def steps(self) -> int:
        """Count the steps as `train.Trainer.fit` does."""
        return self.epochs * max(1, self.training // self.batch_size)

    @property
    def images(self) -> int:
        """Tiles in these steps."""
        return self.steps * self.batch_size

    @property
    def predicted(self) -> int:
        """Tiles that it predicts: what it holds out, after every epoch."""
        return (self.epochs + self.drawing) * self.held_out


Job = Sequence[Load]
"""Trainings that share a job's processes, in their order."""


@dataclass(frozen=True)
class Place:
    """What each job of training has.

    Attributes
    ----------
    ranks, nodes, cores, gpus
        Of a job in all.
    seconds
        From its start to when it is told to stop; None without a limit.
    """

    ranks: int = 1
    nodes: int = 1
    cores: int = 1
    gpus: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Stored:
    """The used tiles of a study as they lie in its store.

    Attributes
    ----------
    tiles
        How many.
    bytes
        To read all of them once, by the side of the tiles.
    shard_bytes
        Of their shards, with whatever else is in them, by the side.
    how
        What these bytes are, for the assumptions.
    """

    tiles: int
    bytes: Mapping[int, float]
    shard_bytes: Mapping[int, float]
    how: str


@dataclass(frozen=True)
class NetworkCost:
    """What the runs of one network cost.

    Attributes
    ----------
    runs, steps, images, predicted
        Counts, of all runs together; `images` are those of the steps, `predicted` held-out tiles.
    images_per_s
        Of a job; None where it is not known, and then so are `hours` of jobs without their start-up.
    sent_bytes
        What a rank sends in a step of the whole network (of its head, where that alone learns); None if not known.
    sent_bytes_in_all
        By all ranks, in all steps.
    """

    network: str
    runs: int
    steps: int
    images: int
    predicted: int
    images_per_s: float | None
    hours: float | None
    sent_bytes: float | None
    sent_bytes_in_all: float | None


@dataclass(frozen=True)
class Cost:
    """What trainings cost.

    Attributes
    ----------
    jobs, at_a_time, starts
        How many jobs, how many of them run at the same time, and how often one is started; None if not known.
    wall_seconds, job_hours, gpu_hours, core_hours
        None if not known. Hours of GPUs and cores are those that the jobs hold.
    bytes_read
        Of the store; without times, as if no job reached its limit.
    networks
        By network.
    unknown
        What is missing for the hours, and what to type.
    assumptions
        What the numbers rest on, and where it comes from.
    """

    place: Place
    jobs: int
    at_a_time: int
    starts: int | None
    wall_seconds: float | None
    job_hours: float | None
    gpu_hours: float | None
    core_hours: float | None
    bytes_read: float
    networks: tuple[NetworkCost, ...]
    unknown: tuple[str, ...]
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Give all of it for `--dry-run --json`."""
        return asdict(self)

    def render(self) -> str:
        """Tell it as a short table, then what it rests on."""
        if not self.jobs:
            return "Cost: nothing is to be trained"
        place = self.place
        each = f"{place.gpus:,} GPU(s) and {place.cores:,} core(s)" if place.gpus else f"{place.cores:,} core(s)"
        ranks = place.ranks
        lines = [
            f"Cost of {sum(one.runs for one in self.networks):,} run(s) in {self.jobs:,} job(s) of {ranks:,} rank(s) "
            f"on {each}, {self.at_a_time:,} at a time",
            f"  {'network':24} {'runs':>7} {'steps':>15} {'images/s':>9} {'job hours':>11}"
            + (f" {'a step sends':>13}" if ranks > 1 else ""),
        ]
        for one in self.networks:
            lines.append(
                f"  {one.network:24} {one.runs:7,} {one.steps:15,} {number_text(one.images_per_s):>9} "
                f"{number_text(one.hours):>11}"
                + (f" {size_text(one.sent_bytes) if one.sent_bytes is not None else '-':>13}" if ranks > 1 else "")
            )
        if self.wall_seconds is not None:
            hours = f"{number_text(self.gpu_hours)} GPU hours, " if place.gpus else ""
            lines += [
                f"  time    training: about {_time_text(self.wall_seconds)} once jobs run; "
                f"{hours}{number_text(self.core_hours)} core hours, {self.starts or 0:,} start(s) of jobs"
            ]
        lines += [f"  time    not known: {what}" for what in self.unknown]
        lines.append(f"  read    {size_text(self.bytes_read)} of the store")
        sent = [one.sent_bytes_in_all for one in self.networks if one.sent_bytes_in_all is not None]
        if ranks > 1 and len(sent) == len(self.networks):
            lines.append(f"  send    {size_text(sum(sent))} between ranks, all of them together")
        return "\n".join([*lines, "  assumed", *(f"    - {line}" for line in self.assumptions)])


def number_text(value: float | None) -> str:
    """Tell a number in three digits, or all before the point; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"


def _time_text(seconds: float) -> str:
    """Tell a time in the unit that suits it."""
    return f"{number_text(seconds / 3600)} h" if seconds >= 3600 else f"{number_text(seconds / 60)} min"
