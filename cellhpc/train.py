"""One run: fit a network to one fold, step by step, and predict the held-out tiles.

The step is our own: `ranks.mean` averages the gradients (Horovod's Keras layer silently does not, with Keras 3). A
batch is shared by the ranks, so that every rank runs the same number of steps by construction, and a network without
batch statistics learns the same on any number of ranks. Batch normalisation (unless it is synchronised) and
augmentation see each rank's share; the moving statistics are averaged after each epoch, after which the weights of all
ranks are compared bit for bit.

A run can be told to stop at any moment, on any rank: whether a rank was travels with the gradients of each step, so
that all stop after the same one, with a checkpoint. The attempt that continues it is the same run, to the last digit.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellhpc.attempts import Superseded, finished
from cellhpc.attributions import ATTRIBUTIONS
from cellhpc.batch_norm import set_batch_norm
from cellhpc.checkpoint import WEIGHTS, Interrupted, Keeper, Progress, Variables
from cellhpc.data import Data, load_data
from cellhpc.errors import UserError
from cellhpc.feed import feed, shuffle, whole_batches
from cellhpc.folds import Folds
from cellhpc.inputs import mix
from cellhpc.ledger import provenance
from cellhpc.networks import Network, build, named_weights, parse_network
from cellhpc.predictor import DRAWS, PREDICTIONS, Predictor
from cellhpc.ranks import Ranks
from cellhpc.recipe import TrainSettings
from cellhpc.schedule import learning_rate
from cellhpc.scores import levels
from cellhpc.settings import How
from cellhpc.step import Graphs, clear_optimizer, make_optimizer, trained_variables
from cellhpc.sweep import Run

__all__ = [
    "Data", "Interrupted", "NotFinite", "RunFailed", "Superseded", "Trainer", "Watch", "load_data", "train_run",
]  # fmt: skip


class RunFailed(UserError):
    """A run can't go on; all ranks see it at the same step, and can train the next run."""


class NotFinite(RunFailed):
    """A number of a run is not finite: with the same settings it would be so again."""


@dataclass
class Watch:
    """What others tell a process that trains, and what it tells them; signal handlers may set and read it.

    Attributes
    ----------
    stop_asked
        Set it on any rank: all ranks stop after the same step, with a checkpoint.
    checkpoint_seconds
        A checkpoint is written when the last one is older.
    keep_weights
        A run that is finished keeps its weights.
    attributions
        Of each treatment that it calls wrong, it keeps so many tiles with maps (`cellhpc.attributions`).
    tensorboard
        Runs write their history for TensorBoard too.
    combine
        How probabilities of tiles are combined where held-out calls are counted after an epoch.
    steps_done
        Steps that this process has done, of all its runs.
    """

    stop_asked: bool = False
    checkpoint_seconds: float = 600.0
    keep_weights: bool = False
    attributions: int = 0
    tensorboard: bool = False
    combine: How = "mean"
    steps_done: int = 0


class Trainer:
    """A compiled network that runs share: its graph is traced once, its weights are set anew for each run.

    Parameters
    ----------
    network
        Name and arguments, as in `sweep.networks`.
    data
        The tiles.
    settings
        How to train.
    ranks
        The processes that train together.
    """

    def __init__(self, network: str, data: Data, settings: TrainSettings, ranks: Ranks) -> None:
        self.network: Network = parse_network(network)
        self.data = data
        self.settings = settings
        self.ranks = ranks
        self._side_px, self._inputs = data.pixels.shape[1], mix(data.channels, settings.inputs).shape[1]
        self._initial: tuple[tuple[str, int], list[np.ndarray]] | None = None
        self.model = self._build("xavier")
        self._statistics = set_batch_norm(self.model, settings, ranks)
        self.optimizer = make_optimizer(
            settings, trained_variables(self.model, "head" if settings.trained == "head" else "all")
        )
        self.variables = Variables(self.model, self.optimizer, ranks)
        graphs = Graphs(
            self.network,
            self.model,
            self.optimizer,
            data.channels,
            self._side_px,
            settings,
            ranks,
            len(data.pixels) if isinstance(data.pixels, np.ndarray) else 0,
        )
        self._features_of: tuple[str, int | None] | None = None
        parts = dict.fromkeys((settings.part(1), settings.part(settings.epochs)))
        self._steps = {part: graphs.training(part) for part in parts}
        self.predictor = Predictor(graphs, data, ranks)
        """Asks the network, as it is at that moment, of tiles."""

    def use(self, settings: TrainSettings) -> None:
        """Train with other settings from now on; `TrainSettings.graph` of both is the same."""
        if settings.graph() != self.settings.graph():
            raise ValueError("these settings need another compiled network")
        self.settings = settings

    def _build(self, weights: str) -> Any:
        settings, classes = self.settings, len(self.data.classes)
        return build(self.network, self._side_px, self._inputs, classes, weights, settings.dropout, settings.precision)

    def fit(
        self, run: Run, folds: Folds, keeper: Keeper | None = None, watch: Watch | None = None
    ) -> tuple[list[dict[str, Any]], pd.DataFrame]:
        """Train one run and predict its held-out tiles.

        Parameters
        ----------
        run
            The run.
        folds
            The study's folds.
        keeper
            Keeps history and checkpoints, and has those of earlier attempts; without one nothing is written.
        watch
            Where a stop is asked for.

        Returns
        -------
        history
            One dictionary for each epoch: loss, learning rate, seconds, images/s, share of time waiting for data,
            seconds of checkpoints and of predictions (not in the former), peak memory of rank 0 so far, and the
            held-out accuracy, without what is unknown to the fold.
        predictions
            One row a held-out tile: its keys and a probability for each class.

        Raises
        ------
        RunFailed
            The loss, a weight or a probability is not finite, or the weights of the ranks differ.
        Interrupted
            A stop was asked; a checkpoint was written if there is a keeper.
        """
        settings, tiles = self.settings, self.data.tiles
        watch = watch or Watch()
        training = np.flatnonzero(folds.training(tiles, run.fold))
        held_out = np.flatnonzero(folds.held_out(tiles, run.fold))
        steps = max(1, len(training) // settings.batch_size)
        self._reset(run, watch)
        at = keeper.restore() if keeper else Progress()
        predictions = pd.DataFrame()
        while at.epoch <= settings.epochs:
            if at.step == 0 and at.epoch > 1 and settings.part(at.epoch) != settings.part(at.epoch - 1):
                clear_optimizer(self.optimizer)
            self._train_epoch(run, training, steps, at, keeper, watch)
            began = time.perf_counter()
            self._agree(at.epoch)
            at.seconds += time.perf_counter() - began
            began = time.perf_counter()
            predictions = self.predictor.predict(held_out)
            predict_seconds = time.perf_counter() - began
            if not np.isfinite(predictions.filter(like="p_").to_numpy()).all():
                raise self._not_finite("a predicted probability is not finite", at)
            counts = levels(predictions[predictions["label"] != run.fold.unknown], _rule(run, watch))
            at.next_epoch(
                {
                    "epoch": at.epoch,
                    "loss": float(np.mean(at.losses)),
                    "learning_rate": float(self.optimizer.learning_rate),
                    "steps": steps,
                    "seconds": at.seconds,
                    "images_per_s": steps * settings.batch_size / at.seconds,
                    "waiting_for_data": at.waiting_seconds / at.seconds,
                    "checkpoint_seconds": at.checkpoint_seconds,
                    "predict_seconds": predict_seconds,
                    "memory_mb": _peak_memory_mb(),
                    "held_out": {
                        level: {"correct": count["correct"], "total": count["total"]} for level, count in counts.items()
                    },
                }
            )
            if keeper:
                keeper.write_history(at.history)
                if self.ranks.rank == 0:
                    print(f"{run.id}: {_in_words(at.history[-1], settings.epochs)}", flush=True)
        return at.history, predictions

    def _train_epoch(
        self, run: Run, training: np.ndarray, steps: int, at: Progress, keeper: Keeper | None, watch: Watch
    ) -> None:
        """Do the steps of an epoch that are not done yet."""
        began = time.perf_counter()
        settings, targets = self.settings, self.data.targets
        classes = len(self.data.classes)
        class_weights = (
            _class_weights(targets[training], classes) if settings.class_weights else np.ones(classes, np.float32)
        )
        share = settings.batch_size // self.ranks.size
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        together = whole_batches(settings.window_tiles, settings.batch_size)
        given = self.predictor.given
        order = shuffle(given, training, [run.seed, at.epoch], settings.batch_size, together)
        # Repeats tiles only where there are fewer than one batch.
        order = np.resize(order, (steps, settings.batch_size))[:, mine]
        with feed(given, list(order), together, at.step) as fetched:
            spent = time.perf_counter() - began  # the network waits meanwhile
            at.seconds += spent
            at.waiting_seconds += spent
            self._train_steps(run, order, fetched, class_weights, at, keeper, watch)

    def _train_steps(
        self,
        run: Run,
        order: np.ndarray,
        fetched: Iterator[np.ndarray],
        class_weights: np.ndarray,
        at: Progress,
        keeper: Keeper | None,
        watch: Watch,
    ) -> None:
        """Do the steps of an epoch with the batches that are fetched, of the tiles in `order` (steps, share)."""
        settings, targets, steps = self.settings, self.data.targets, len(order)
        train = self._steps[settings.part(at.epoch)]
        while at.step < steps:
            began = time.perf_counter()
            given, labels = next(fetched), targets[order[at.step]]
            at.waiting_seconds += time.perf_counter() - began
            number = (at.epoch - 1) * steps + at.step
            self.optimizer.learning_rate.assign(learning_rate(settings, number, steps, self.ranks.size))
            due = keeper is not None and keeper.is_due(watch.checkpoint_seconds)
            asked = np.array([watch.stop_asked, due], np.float32)
            with self.ranks.collective():
                seen = train(given, labels, class_weights[labels], self._draw(run.seed, number), asked)
                loss, stop, save = map(float, seen.numpy())
            at.step += 1
            if not math.isfinite(loss):
                raise self._not_finite(f"the loss is {loss}", at)
            at.losses.append(loss)
            at.seconds += time.perf_counter() - began
            watch.steps_done += 1
            if keeper and (stop or save):
                began = time.perf_counter()
                if not self.variables.finite():  # the loss was of the weights before this step
                    raise self._not_finite("a weight is not finite", at)
                at.checkpoint_seconds += time.perf_counter() - began
                keeper.write_checkpoint(at, wait=bool(stop))
            if stop:
                raise Interrupted(f"{run.id} was stopped in epoch {at.epoch}, after step {at.step} of {steps}")

    def _reset(self, run: Run, watch: Watch) -> None:
        """Set weights and optimiser to the start of a run; the same on every rank, broadcast to be sure."""
        import keras

        if self._initial is None or self._initial[0] != (run.weights, run.seed):
            keras.utils.set_random_seed(run.seed)
            self._initial = (
                (run.weights, run.seed),
                [weight.copy() for weight in self._build(run.weights).get_weights()],
            )
        self.model.set_weights(self._initial[1])
        clear_optimizer(self.optimizer)
        for number, layer in enumerate(self.model.layers):
            if hasattr(layer, "seed_generator"):  # dropout: as if no run had come before in this process
                draw = np.random.default_rng([run.seed, number, self.ranks.rank, 2])
                layer.seed_generator.state.assign(draw.integers(0, 2**31 - 1, 2))
        self.ranks.broadcast([weight.value for weight in self.model.weights if "float" in weight.dtype])
        of = run.weights, run.seed if run.weights == "xavier" else None
        if self.predictor.graphs.cached and self._features_of != of:
            self.predictor.given, self._features_of = self.data.pixels, None  # room for the new ones
            features = self.predictor.features(lambda: watch.stop_asked)
            if features is None:
                raise Interrupted(f"{run.id} was stopped while the backbone looked at the tiles")
            self.predictor.given, self._features_of = features, of

    def _draw(self, seed: int, at: int) -> np.ndarray:
        """Seed of the augmentation of one step on this rank, int32 (2,)."""
        return np.random.default_rng([seed, at, self.ranks.rank, 1]).integers(0, 2**31 - 1, 2, np.int32)

    def _not_finite(self, what: str, at: Progress) -> NotFinite:
        """Say where a run went out of bounds; its checkpoints are from before."""
        return NotFinite(
            f"{what} at epoch {at.epoch}, step {at.step} with learning rate "
            f"{float(self.optimizer.learning_rate):g}. Lower train.learning_rate, in a new study.folder."
        )

    def _agree(self, epoch: int) -> None:
        """Average the moving statistics over the ranks, then see that all ranks have the same weights."""
        if self.ranks.size == 1:
            return
        if self._statistics and self.settings.part(epoch) == "all":
            for variable, value in zip(
                self._statistics, self.ranks.mean([v.read_value() for v in self._statistics]), strict=True
            ):
                variable.assign(value)
        if not self.ranks.equal(self.model.get_weights()):
            raise RunFailed(f"the weights of the {self.ranks.size} ranks differ after epoch {epoch}")


def train_run(
    trainer: Trainer,
    run: Run,
    folds: Folds,
    folder: Path,
    watch: Watch | None = None,
    about: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Train a run into its folder below `folder`, unless it is done; continue it from an earlier attempt's checkpoint.

    All ranks call it; rank 0 writes. `cellhpc.attempts` describes the run's folder; `about` goes into `attempt.json`,
    `facts` into `run.json`.

    Raises
    ------
    RunFailed
        The run can't be trained; all ranks see it, and can train the next one.
    Interrupted
        A stop was asked; all ranks see it, and a checkpoint is on disk.
    Superseded
        A newer attempt has begun (on rank 0; the others see `Interrupted`).
    RankLost
        Another rank is gone.
    UserError
        A file can't be written.
    """
    unit, ranks = folder / run.id, trainer.ranks
    done_on_ranks = ranks.gather(np.array([finished(unit, run.digest) is not None], np.int32))
    if done_on_ranks[0]:  # rank 0 decides: a shared file system may show the marker to some ranks later
        return
    keeper = Keeper(unit, run.digest, trainer.variables, about, bool(watch and watch.tensorboard))
    watch = watch or Watch()
    _, predictions = trainer.fit(run, folds, keeper, watch)
    tables: dict[str, pd.DataFrame] = {PREDICTIONS: predictions}
    archives: dict[str, dict[str, np.ndarray]] = {}
    if not run.fold.untouched:  # what more is left of a search is of no use later
        rows, ask = np.flatnonzero(folds.held_out(trainer.data.tiles, run.fold)), trainer.predictor
        if trainer.settings.dropout_draws:
            tables[DRAWS] = ask.draw(rows, run.seed)
        if watch.keep_weights:
            archives[WEIGHTS] = named_weights(trainer.model)
        if watch.attributions:
            most, unknown = watch.attributions, run.fold.unknown
            archives[ATTRIBUTIONS] = ask.attribute(rows, predictions, most, unknown, watch.combine)
    more = {"combine": _rule(run, watch), **(facts or {})}
    keeper.publish(tables, archives, lambda: {**_record(trainer, run, folds), **more})


def _rule(run: Run, watch: Watch) -> How:
    """Say how calls are counted after an epoch: candidates of a search are compared by the mean always."""
    return "mean" if run.fold.untouched else watch.combine


def _in_words(epoch: Mapping[str, Any], epochs: int) -> str:
    """Say in a line what a log tells of an epoch."""
    held_out = epoch["held_out"]
    level = "field" if "field" in held_out else "tile"
    right = f"{held_out[level]['correct']} of {held_out[level]['total']} held-out {level}s"
    return (
        f"epoch {epoch['epoch']} of {epochs}: loss {epoch['loss']:.3f}, {right}, {epoch['images_per_s']:,.0f} images/s"
    )


def _record(trainer: Trainer, run: Run, folds: Folds) -> dict[str, Any]:
    """Say what a run was, for its `run.json`."""
    training = folds.training(trainer.data.tiles, run.fold)
    learnt = trainer.data.tiles[training]
    return {
        "id": run.id,
        "network": run.network,
        "weights": run.weights,
        "initialisation": run.initialisation,
        "seed": run.seed,
        "tile_px": run.tile_px,
        "fold": {
            "name": run.fold.name,
            "held_out": list(run.fold.held_out),
            **({"unknown": run.fold.unknown} if run.fold.unknown else {}),
        },
        **({"trained_on_also": sorted(set(learnt[folds.also].astype(str)))} if folds.also else {}),
        "folds_sha256": folds.sha256,
        "digest": run.digest,
        "classes": list(folds.classes),
        "settings": trainer.settings.model_dump(mode="json"),
        "ranks": trainer.ranks.size,
        "threads": _threads(),
        "trained_on": sorted(set(learnt[folds.by].astype(str))),
        "training_tiles": int(training.sum()),
        "held_out_tiles": int(folds.held_out(trainer.data.tiles, run.fold).sum()),
        "parameters": int(trainer.model.count_params()),
        "memory_mb": _peak_memory_mb(),
        **provenance(),
    }


def _threads() -> int:
    """Threads of an operation; their number decides in which order sums are rounded."""
    import tensorflow as tf

    return int(tf.config.threading.get_intra_op_parallelism_threads())


def _peak_memory_mb() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _class_weights(targets: np.ndarray, classes: int) -> np.ndarray:
    """Weights n / (classes * n_class), float32 (classes,); a class without tiles counts for nothing and weighs zero."""
    counts = np.bincount(targets, minlength=classes)
    weights = len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts, weights, 0).astype(np.float32)
