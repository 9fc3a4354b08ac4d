"""What the trainings of a study will cost, on paper: hours, wall-clock, bytes; from counts and a few measured parts.

Counted are runs, steps, images, predicted tiles, bytes that are read of the store and that ranks send each other.
Measured are the figures of `cellhpc.measured`. With a speed of S images/s, P predicted tiles/s and s seconds beside,

- a run of E epochs with T training and H held-out tiles does E max(1, T // B) steps of B tiles, as `train` does, and
  takes E max(1, T // B) B / S + E H / P + s;
- a job takes its start-up and its runs; where that is more than its time limit, as many start-ups as it needs jobs'
  time for the rest, each time going on from a checkpoint;
- jobs begin in their order, each as soon as one of so many places is free (list scheduling; Graham 1969, SIAM J. Appl.
  Math. 17, 416), which is what Slurm does with an array that is throttled, on a cluster that has the room;
- with other ranks than those that S was measured with, a step is B tiles' share of arithmetic and the means over the
  ranks, one after the other: nothing of them is taken to be hidden.

Every number that is not known is named; none is made up for it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cellhpc.cost import Cost, Job, Load, NetworkCost, Place, Stored, number_text
from cellhpc.measured import Figure, Parts
from cellhpc.recipe import TrainSettings
from cellhpc.traffic import Sizes, averaged_bytes, ring_bytes


def makespan(seconds: Sequence[float], places: int) -> float:
    """Seconds until jobs are done that begin in their order, each as soon as one of the places is free."""
    free = [0.0] * max(1, min(places, len(seconds)))
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def starts_of(work: float, start: float, limit: float | None) -> int | None:
    """How often a job has to be started for so many seconds of work, each time with a start-up; None: never done."""
    if limit is None:
        return 1
    return max(1, math.ceil(work / (limit - start))) if limit > start else None


def estimate(
    arrays: Sequence[tuple[int, Sequence[Job]]],
    place: Place,
    settings: TrainSettings,
    stored: Stored,
    parts: Mapping[str, Parts],
    sizes: Mapping[str, Sizes] | None = None,
    allreduce_mb_per_s: float | None = None,
    stage: bool = False,
) -> Cost:
    """Estimate what trainings cost.

    Parameters
    ----------
    arrays
        Jobs, in groups that run side by side, each with how many of its jobs may run at a time.
    place
        What each job has.
    settings
        How a run is trained; a training's epochs and batches are its own, as a search may vary them.
    stored
        The tiles.
    parts
        What is measured of each network.
    sizes
        What the ranks average of each network, where that is known.
    allreduce_mb_per_s
        As the site file's `measured.allreduce_mb_per_s`.
    stage
        As `sweep.stage`.
    """
    loads = [load for _, jobs in arrays for job in jobs for load in job]
    searching = any(load.searching for load in loads)
    model = _Model(place, settings, stored, parts, sizes or {}, allreduce_mb_per_s, stage, searching)
    networks = tuple(
        model.network(name, [load for load in loads if load.network == name])
        for name in dict.fromkeys(load.network for load in loads)
    )
    names = [one.network for one in networks]
    unknown = [line for name in names if (line := model.why_unknown(name))]
    count = sum(len(jobs) for _, jobs in arrays)
    times = [] if unknown else [(most, [model.job(job) for job in jobs]) for most, jobs in arrays]
    starts = [each for _, jobs in times for _, each in jobs]
    if None in starts:
        unknown.append("a start-up takes longer than a job may run; give train.time of the site file more")
    known = not unknown
    hours = sum(seconds for _, jobs in times for seconds, _ in jobs) / 3600 if known else None
    reads = iter(starts if known else [1] * count)
    return Cost(
        place=place,
        jobs=count,
        at_a_time=sum(min(most, len(jobs)) for most, jobs in arrays),
        starts=sum(each or 0 for each in starts) if known else None,
        wall_seconds=max((makespan([seconds for seconds, _ in jobs], most) for most, jobs in times), default=0.0)
        if known
        else None,
        job_hours=hours,
        gpu_hours=None if hours is None else hours * place.gpus,
        core_hours=None if hours is None else hours * place.cores,
        bytes_read=sum(model.bytes_read(job, next(reads) or 1) for _, jobs in arrays for job in jobs),
        networks=networks,
        unknown=tuple(unknown),
        assumptions=tuple(model.assumptions(names)) if names else (),
    )


@dataclass(frozen=True)
class _Model:
    place: Place
    settings: TrainSettings
    stored: Stored
    parts: Mapping[str, Parts]
    sizes: Mapping[str, Sizes]
    allreduce_mb_per_s: float | None
    stage: bool
    searching: bool

    # ---- what is counted

    def averaged(self, network: str, ranks: int) -> float | None:
        """Bytes that ranks average in a step, the mean over the epochs."""
        if ranks > 1 and network not in self.sizes:
            return None
        epochs = range(1, self.settings.epochs + 1)
        parts = [self.settings.part(epoch) for epoch in epochs]
        each = [averaged_bytes(self.sizes[network], self.settings, part, ranks) for part in parts if ranks > 1]
        return sum(each) / len(epochs)

    def sent(self, network: str, ranks: int) -> float | None:
        """Bytes that each rank sends in a step, the mean over the epochs."""
        averaged = self.averaged(network, ranks)
        return None if averaged is None else ring_bytes(averaged, ranks)

    def bytes_read(self, job: Job, starts: int) -> float:
        """Bytes that a job reads from the store."""
        sides = {load.tile_px for load in job}
        if not self.settings.window_tiles:
            return starts * self.place.nodes * sum(self.stored.bytes[side] for side in sides)
        if self.stage:
            return starts * self.place.nodes * sum(self.stored.shard_bytes[side] for side in sides)
        each = {side: self.stored.bytes[side] / max(1, self.stored.tiles) for side in sides}
        return sum(each[load.tile_px] * (load.images + load.predicted) for load in job)

    # ---- what follows from what is measured

    def speed(self, network: str) -> float | None:
        """Images/s of a job here."""
        figure = self.parts[network].images_per_s
        if figure is None or figure.ranks == self.place.ranks:
            return figure.value if figure else None
        there, here = self.sent(network, figure.ranks), self.sent(network, self.place.ranks)
        if there is None or here is None or self.allreduce_mb_per_s is None:
            return None
        rate = self.allreduce_mb_per_s * 1e6
        batch = self.settings.batch_size
        arithmetic = batch / figure.value - there / rate
        if arithmetic <= 0:
            return None
        return batch / (arithmetic * figure.ranks / self.place.ranks + here / rate)

    def why_unknown(self, network: str) -> str:
        figure = self.parts[network].images_per_s
        if figure is None:
            return (
                f"no run of {network} has been measured. Type the same when one has finished, or give its speed in "
                f"the site file: [measured] images_per_s = {{ {_key(network)} = ... }}"
            )
        if self.speed(network) is not None:
            return ""
        if network not in self.sizes:
            return (
                f"{network} was measured with {figure.ranks} rank(s), and what {self.place.ranks} send is counted by "
                "TensorFlow, which is not installed here"
            )
        if self.allreduce_mb_per_s is None:
            return (
                f"{network} was measured with {figure.ranks} rank(s), not {self.place.ranks}. Give "
                "measured.allreduce_mb_per_s in the site file, or the speed with these ranks"
            )
        return f"measured.allreduce_mb_per_s of the site file is less than {network} had with {figure.ranks} ranks"

    def run(self, load: Load) -> float:
        """Seconds of a run."""
        parts, speed = self.parts[load.network], self.speed(load.network)
        assert speed is not None  # noqa: S101 - asked only where it is known
        predicted = self._per_tile(parts.predicted_per_s, speed)
        beside = parts.run_seconds.value if parts.run_seconds else 0.0
        return load.images / speed + load.predicted / predicted + beside

    def _per_tile(self, figure: Figure | None, speed: float) -> float:
        """Tiles/s of predictions, which ranks share without a word; none is slower than training."""
        return figure.value * self.place.ranks / figure.ranks if figure else speed

    def start(self, job: Job) -> float:
        """Seconds of a start-up: that of each network in the job, which makes its own graphs."""
        starts = [self.parts[name].start_seconds for name in dict.fromkeys(load.network for load in job)]
        return sum(figure.value for figure in starts if figure)

    def job(self, job: Job) -> tuple[float, int | None]:
        """Seconds of a job in all, and how often it is started."""
        work, start = sum(self.run(load) for load in job), self.start(job)
        starts = starts_of(work, start, self.place.seconds)
        return work + (starts or 0) * start, starts

    def network(self, name: str, loads: Sequence[Load]) -> NetworkCost:
        steps = sum(load.steps for load in loads)
        sent = self.sent(name, self.place.ranks)
        known = not self.why_unknown(name)
        return NetworkCost(
            network=name,
            runs=sum(not load.searching for load in loads),
            steps=steps,
            images=sum(load.images for load in loads),
            predicted=sum(load.predicted for load in loads),
            images_per_s=self.speed(name),
            hours=sum(self.run(load) for load in loads) / 3600 if known else None,
            sent_bytes=sent,
            sent_bytes_in_all=None if sent is None else sent * self.place.ranks * steps,
        )

    # ---- what it rests on

    def assumptions(self, names: Sequence[str]) -> list[str]:
        place, settings = self.place, self.settings
        told: dict[str, list[str]] = {}
        for name in names:
            for text in self._assumed_of(name):
                told.setdefault(text, []).append(name)
        lines = [f"{' and '.join(who)}: {text}" for text, who in told.items()]
        if place.ranks > 1:
            lines += self._assumed_of_ranks(names)
        lines += [
            f"every run trains {settings.epochs} epoch(s) of whole batches of {settings.batch_size}, and predicts what "
            "it holds out after each; a step takes as long in every fold (train.epochs, train.batch_size)"
            if not self.searching
            else "every run trains each of its candidates and then chooses the one with the most steps; a training "
            "predicts what it holds out after every epoch, and a step takes as long with all of them ([search])",
            f"read: {self._assumed_reading()}; {self.stored.how}",
            "all jobs that may run at a time do so at once; none fails, and checkpoints cost no time"
            + ("" if place.seconds is None else
               f"; after {number_text(place.seconds / 3600)} h a job starts anew (train.time, train.signal_seconds)"),
        ]  # fmt: skip
        return lines

    def _assumed_of(self, name: str) -> list[str]:
        parts = self.parts[name]
        if parts.images_per_s is None:
            return []
        units = {
            "images_per_s": "{} images/s in a job", "predicted_per_s": "{} tiles/s predicted",
            "start_seconds": "{} s for a start-up", "run_seconds": "{} s of a run beside",
        }  # fmt: skip
        told: dict[str, list[str]] = {}
        for key, text in units.items():
            figure: Figure | None = getattr(parts, key)
            if figure:
                ranks = f" with {figure.ranks} rank(s)" if key.endswith("per_s") else ""
                told.setdefault(figure.source.removeprefix(f"measured.{key} of "), []).append(
                    text.format(number_text(figure.value)) + ranks
                )
        lines = [f"{', '.join(what)} ({source})" for source, what in told.items()]
        if parts.predicted_per_s is None:
            lines.append("predicting takes as long as training, which is the most (not measured)")
        missing = {"a start-up": parts.start_seconds, "a run beside its steps": parts.run_seconds}
        none = [what for what, figure in missing.items() if figure is None]
        if none:
            lines.append(f"{' and '.join(none)} takes no time (not measured: the hours are a lower bound)")
        return lines

    def _assumed_of_ranks(self, names: Sequence[str]) -> list[str]:
        if not all(name in self.sizes for name in names):
            return ["what ranks send is not counted: that needs TensorFlow, which is not installed here"]
        trained = ", ".join(f"{name} {self.sizes[name].all:,}" for name in names)
        lines = [
            f"each of {self.place.ranks} ranks sends 2 (n - 1) / n times what is averaged (a ring); numbers that "
            f"learn: {trained} (counted in the network)"
        ]
        scaled = any((figure := self.parts[name].images_per_s) and figure.ranks != self.place.ranks for name in names)
        lines.append(
            f"{number_text(self.allreduce_mb_per_s)} MB/s sent by a rank, none of it while gradients are computed, and "
            "arithmetic that ranks share evenly (measured.allreduce_mb_per_s)"
            if scaled
            else "the time for that is in the images/s"
        )
        return lines

    def _assumed_reading(self) -> str:
        if not self.settings.window_tiles:
            return "each start of a job reads all used tiles once on each of its nodes, whose ranks and runs share them"
        if self.stage:
            return "each start of a job copies the shards once to each of its nodes (sweep.stage)"
        return "each epoch reads the tiles of its steps and those held out (train.window_tiles)"


def _key(network: str) -> str:
    """Write a network as a key of TOML."""
    return network if network.isalnum() else f'"{network}"'
