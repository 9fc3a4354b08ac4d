"""The grid of runs: network x initialisation x seed x fold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cellhpc.attempts import newest
from cellhpc.errors import UsageError
from cellhpc.folds import Fold, Folds
from cellhpc.ledger import digest
from cellhpc.networks import Network, initialisation, parse_network, weights_digest
from cellhpc.settings import Job

TRAINING_FORMAT = 3
"""Raised when the same settings train differently: runs of an earlier format are done again."""

SEARCH = "search"
"""Folder of the candidates of a search, below that of the run."""


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


def networks(job: Job) -> list[Network]:
    """List the sweep's networks, each checked against keras.applications."""
    return [parse_network(text) for text in job.sweep.networks]


def tile_sizes_px(job: Job) -> tuple[int, ...]:
    """Sides of the tiles that the sweep's networks need, in pixels."""
    return tuple(sorted({job.sweep.tile_px or network.side_px for network in networks(job)}))


def runs_of(job: Job, folds: Folds) -> int:
    """Count the runs of a study."""
    return len(job.sweep.networks) * len(job.sweep.weights) * len(job.sweep.seeds) * len(folds.folds)


def plan_runs(job: Job, folds: Folds, content_digest: str, ranks: int | None = None) -> list[Run]:
    """List the runs of a study, network by network so that neighbours can share a compiled graph.

    Parameters
    ----------
    job, folds
        The settings and the split.
    content_digest
        Of what the store holds.
    ranks
        Processes that train a run together, when it is not `sweep.ranks`.

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
    settings = job.train.identity()
    starts = [(weights, initialisation(weights), weights_digest(weights)) for weights in job.sweep.weights]
    runs = []
    for network in swept:
        side_px = job.sweep.tile_px or network.side_px
        for weights, start, identity in starts:
            for seed in job.sweep.seeds:
                for number, fold in enumerate(folds.folds):
                    content = {
                        "format": TRAINING_FORMAT,
                        # Batch statistics and augmentation see a rank's share of a batch.
                        "ranks": ranks or job.sweep.ranks,
                        "network": [network.name, network.arguments],
                        "weights": identity,
                        "seed": seed,
                        "tile_px": side_px,
                        "fold": fold.held_out,
                        "folds": folds.sha256,
                        "store": content_digest,
                        "train": settings,
                        **({"search": job.search} if job.search else {}),
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


def newest_attempt(unit: Path) -> Path | None:
    """Folder of a run's newest attempt, its search's included: the one in which something was written last."""
    places = (unit, *sorted(unit.glob(f"{SEARCH}/*"), reverse=True))  # the later one wins where a clock is coarse
    found = [folder for one in places if (folder := newest(one)) is not None]
    return max(found, key=_written, default=None)


def _written(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # a successor has cleared it away
        return 0.0
