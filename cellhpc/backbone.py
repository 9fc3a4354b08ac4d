"""What features are made from: the tiles of a store, and a network without its head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellhpc.attempts import finished
from cellhpc.checkpoint import WEIGHTS
from cellhpc.errors import UsageError, UserError, listing
from cellhpc.inputs import mix, prepare
from cellhpc.ledger import digest, read_json
from cellhpc.networks import (
    HEAD_LOGITS,
    NO_TENSORFLOW,
    Network,
    build,
    initialisation,
    parse_network,
    set_weights,
    weights_digest,
)
from cellhpc.predictor import PREDICT_TILES
from cellhpc.record import is_store
from cellhpc.study import StudyFolder
from cellhpc.tiles import Store

FORMAT = 1
"""Raised when the same source gives other features."""


@dataclass(frozen=True)
class Source:
    """What features are made from, and how.

    Attributes
    ----------
    store
        The tiles.
    network, weights
        As in `sweep.networks` and `sweep.weights`, `xavier` being of seed 0; or the weights that a run kept.
    tile_px
        Side of the tiles, one that the store holds.
    inputs, input_scaling
        As in `[train]`.
    rotations
        Average over a tile's eight rotations and mirrors.
    classes
        Logits of the head that the weights have; it is taken off.
    run
        Of a run: its `id`, and the compounds that it has `trained_on` and `held_out`.
    """

    store: Store
    network: Network
    weights: str
    tile_px: int
    inputs: tuple[str, ...] = ()
    input_scaling: Literal["raw", "keras"] = "keras"
    rotations: bool = False
    classes: int = 2
    run: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def about(self) -> dict[str, Any]:
        """All that the features depend on, and in `digest` its digest; raises `UsageError` if there are no weights."""
        content = {
            "format": FORMAT,
            "network": self.network.text,
            "weights_digest": weights_digest(self.weights),
            "store_digest": self.store.content_digest,
            "plates": list(self.store.plates),
            "tile_px": self.tile_px,
            "inputs": list(self.inputs),
            "input_scaling": self.input_scaling,
            "rotations": self.rotations,
        }
        return {"digest": digest(content), **content}

    @property
    def name(self) -> str:
        """Name for a folder, as `MobileNet-alpha0.25_imagenet_224`."""
        start = self.run.get("id") or f"{self.network.slug}_{initialisation(self.weights)}"
        return f"{start}_{self.tile_px}" + ("_rotations" if self.rotations else "")


def choose_source(
    place: Path,
    network: str | None = None,
    weights: str | None = None,
    run: str | None = None,
    tile_px: int | None = None,
    inputs: Sequence[str] | None = None,
    input_scaling: Literal["raw", "keras"] | None = None,
    rotations: bool = False,
) -> Source:
    """Say what features are made from.

    Parameters
    ----------
    place
        Folder of a store, or of a study: then what is not given is as in its job file.
    network, weights
        As in `sweep.networks` and `sweep.weights`.
    run
        Instead of these, a finished run of the study that has kept its weights.
    tile_px
        Side of the tiles; by default the network's own, or the only one that the store holds.
    inputs, input_scaling, rotations
        As in `Source`. A network that is not trained any further wants what it was trained with: `keras` is the
        default, also where the study's runs, which get used to grey levels, see them `raw`.

    Raises
    ------
    UsageError
        Something is missing, does not exist, or does not go together.
    """
    folder = StudyFolder(place)
    if is_store(place):
        if run is not None:
            raise UsageError(
                f"{place} is a store, and a run is one of a study. Type: cellhpc features STUDY --run {run}"
            )
        store = Store.open(place)
        known: dict[str, Any] = {}
    elif folder.job.is_file():
        job = folder.read_job()
        plates = read_json(folder.plates) if folder.plates.is_file() else None
        store = Store.open(folder.store(job), plates)
        known = {"inputs": job.train.inputs, "tile_px": job.sweep.tile_px}
        if run is not None:
            if network or weights or tile_px or inputs or input_scaling:
                raise UsageError(
                    "--run says which network, weights, tiles and inputs: leave out the options for these."
                )
            return _of_run(folder, store, run, rotations)
        known |= {"network": _only(job.sweep.networks), "weights": _only(job.sweep.weights)}
    else:
        raise UsageError(f"{place}: neither a store nor a study is there. Type: cellhpc convert JOB.toml")
    network, weights = network or known.get("network"), weights or known.get("weights")
    if network is None or weights is None:
        raise UsageError(
            "which network, and which weights? For instance: "
            'cellhpc features STORE --network "MobileNet(alpha=0.25)" --weights imagenet'
        )
    inputs = tuple(known.get("inputs", ()) if inputs is None else inputs)
    try:
        parsed = parse_network(network)
        side_px = tile_px or known.get("tile_px") or _own_side_px(parsed, store)
        source = Source(store, parsed, weights, side_px, inputs, input_scaling or "keras", rotations)
        mix(store.channels, inputs)
        source.about  # noqa: B018 - are there such weights?
    except UsageError as fault:
        options = {"sweep.networks": "--network", "sweep.weights": "--weights", "train.inputs": "--input"}
        said = str(fault)
        for key, option in options.items():
            said = said.replace(key, option)
        raise UsageError(said) from None
    return source


def _of_run(folder: StudyFolder, store: Store, name: str, rotations: bool) -> Source:
    unit = folder.runs / name
    if (outputs := finished(unit)) is None:
        runs = sorted(path.name for path in folder.runs.glob("*") if finished(path))
        done = f"Finished: {listing(runs)}." if runs else "None is finished."
        raise UsageError(f"{folder.path} has no finished run {name!r}. {done}")
    if not (outputs / WEIGHTS).is_file():
        raise UsageError(
            f"{name} has not kept its weights. Remove {unit}, then train it again with: "
            "cellhpc train JOB.toml --set sweep.keep_weights=true"
        )
    record = read_json(outputs / "run.json")
    settings = record["settings"]
    return Source(
        store,
        parse_network(record["network"]),
        str(outputs / WEIGHTS),
        record["tile_px"],
        tuple(settings["inputs"]),
        settings["input_scaling"],
        rotations,
        len(record["classes"]),
        {"id": name, "trained_on": record["trained_on"], "held_out": record["fold"]["held_out"]},
    )


def _only(values: Sequence[str]) -> str | None:
    return values[0] if len(values) == 1 else None


def _own_side_px(network: Network, store: Store) -> int:
    sizes = store.tile_sizes_px
    if network.side_px in sizes or len(sizes) == 1:
        return network.side_px if network.side_px in sizes else sizes[0]
    raise UsageError(f"{store.folder} holds tiles of {listing(sizes)} pixels. Choose one with --tile-px.")


def start_tensorflow(threads: int | None = None, place: int | None = None) -> None:
    """Make TensorFlow quiet and deterministic in this process, before its first use.

    Parameters
    ----------
    threads
        How many compute; by default one for each core.
    place
        Number of this process on its host: of several GPUs it takes its own. By default, it may use all.

    Raises
    ------
    UserError
        It is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError(NO_TENSORFLOW) from None
    if threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    devices = tf.config.list_physical_devices("GPU")
    if devices and place is not None:
        devices = [devices[place % len(devices)]]  # Slurm may show a task its own GPU only, or all of the node's
        tf.config.set_visible_devices(devices, "GPU")
    for device in devices:
        tf.config.experimental.set_memory_growth(device, True)
    tf.config.experimental.enable_op_determinism()


class Extractor:
    """A network without its head.

    Parameters
    ----------
    source
        What it is.
    """

    def __init__(self, source: Source) -> None:
        import keras
        import tensorflow as tf

        from cellhpc.augment import orient

        channels, side_px = source.store.channels, source.tile_px
        kept = source.weights if source.run else None
        keras.utils.set_random_seed(0)  # of weights that are drawn
        whole = build(
            source.network,
            side_px,
            mix(channels, source.inputs).shape[1],
            source.classes,
            "xavier" if kept else source.weights,
        )
        if kept:
            set_weights(whole, Path(kept))
        model = keras.Model(whole.input, whole.get_layer(HEAD_LOGITS).input)
        self.width = int(model.output_shape[1])
        """Features of a tile."""
        orientations = range(8 if source.rotations else 1)

        @tf.function(input_signature=[tf.TensorSpec((None, side_px, side_px, len(channels)), tf.uint8)])
        def extract(tiles: Any) -> Any:
            tiles = tf.cast(tiles, tf.float32)
            views = [orient(tiles, tf.fill((tf.shape(tiles)[0],), number)) for number in orientations]
            seen = [prepare(view, channels, source.inputs, source.network, source.input_scaling) for view in views]
            return tf.add_n([tf.cast(model(view, training=False), tf.float32) for view in seen]) / len(orientations)

        self._extract = extract

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Features, float32 (n, d), of uint8 tiles (n, y, x, channel)."""
        parts = [
            np.asarray(self._extract(pixels[start : start + PREDICT_TILES]))
            for start in range(0, len(pixels), PREDICT_TILES)
        ]
        return np.concatenate(parts)
