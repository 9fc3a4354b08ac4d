"""The grid of runs (network x initialisation x seed x fold), and how it is packed into jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cellhpc.errors import UsageError
from cellhpc.folds import Fold, Folds
from cellhpc.ledger import digest
from cellhpc.networks import Network, initialisation, parse_network, weights_digest
from cellhpc.settings import Job

TRAINING_FORMAT = 1
"""Raised when the same settings train differently: runs of an earlier format are done again."""


@dataclass(frozen=True)
class Run:
    """One training: a network, where it starts, a seed and a fold; `digest` covers all that its result depends on."""

    id: str
    network: str
    weights: str
    initialisation: str
    seed: int
    tile_px: int
    fold: Fold
    digest: str


@dataclass(frozen=True)
class TrainingJob:
    """Runs that share processes, and the number of ranks that train each of them together."""

    id: str
    ranks: int
    threads: int
    runs: tuple[Run, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON-ready data."""
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> TrainingJob:
        """Rebuild a job from `to_json`'s data."""
        runs = tuple(
            Run(**{**run, "fold": Fold(run["fold"]["name"], tuple(run["fold"]["held_out"]))})
            for run in document["runs"]
        )
        return TrainingJob(document["id"], document["ranks"], document["threads"], runs)


def networks(job: Job) -> list[Network]:
    """List the sweep's networks, each checked against keras.applications."""
    return [parse_network(text) for text in job.sweep.networks]


def tile_sizes_px(job: Job) -> tuple[int, ...]:
    """Sides of the tiles that the sweep's networks need, in pixels."""
    return tuple(sorted({job.sweep.tile_px or network.side_px for network in networks(job)}))


def plan_runs(job: Job, folds: Folds, store_digest: str) -> list[Run]:
    """List the runs of a study, network by network so that neighbours can share a compiled graph.

    Raises
    ------
    UsageError
        A network or a weights file does not exist, or two initialisations would have one name.
    """
    names = [initialisation(weights) for weights in job.sweep.weights]
    if len(set(names)) != len(names):
        raise UsageError(f"sweep.weights: two files have one name: {', '.join(names)}. Rename one.")
    swept = networks(job)
    slugs = [network.slug for network in swept]
    if len(set(slugs)) != len(slugs):
        raise UsageError(f"sweep.networks names a network twice: {', '.join(slugs)}.")
    starts = [(weights, initialisation(weights), weights_digest(weights)) for weights in job.sweep.weights]
    runs = []
    for network in swept:
        side_px = job.sweep.tile_px or network.side_px
        for weights, start, identity in starts:
            for seed in job.sweep.seeds:
                for number, fold in enumerate(folds.folds):
                    content = {
                        "format": TRAINING_FORMAT,
                        "ranks": job.sweep.ranks,  # batch statistics and augmentation see a rank's share of a batch
                        "network": [network.name, network.arguments],
                        "weights": identity,
                        "seed": seed,
                        "tile_px": side_px,
                        "fold": fold.held_out,
                        "folds": folds.sha256,
                        "store": store_digest,
                        "train": job.train.model_dump(mode="json"),
                    }
                    runs.append(
                        Run(
                            id=f"{network.slug}_{start}_s{seed}_f{number:02d}",
                            network=network.text,
                            weights=weights,
                            initialisation=start,
                            seed=seed,
                            tile_px=side_px,
                            fold=fold,
                            digest=digest(content),
                        )
                    )
    return runs


def pack(runs: Sequence[Run], job: Job, cores: int) -> list[TrainingJob]:
    """Pack runs into jobs, in their order: `runs_per_job` each, or shared evenly by the jobs that run at a time."""
    if not runs:
        return []
    parallel = min(job.sweep.parallel_jobs, len(runs))
    size = job.sweep.runs_per_job or -(-len(runs) // parallel)
    threads = max(1, cores // (parallel * job.sweep.ranks))
    packed = [tuple(runs[start : start + size]) for start in range(0, len(runs), size)]
    return [TrainingJob(f"train-{number:04d}", job.sweep.ranks, threads, group) for number, group in enumerate(packed)]
