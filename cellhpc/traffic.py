"""What the ranks of a run send each other in a step, known before anything is trained.

A mean over n ranks goes round a ring: each rank sends 2 (n - 1) / n times the bytes that are averaged, once while they
are summed and once while the sum is handed on, and no way of doing it needs less (Patarasuk & Yuan 2009, J. Parallel
Distrib. Comput. 69, 117). Gloo and NCCL, which Horovod uses, do so.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cellhpc.batch_norm import set_batch_norm
from cellhpc.errors import UserError
from cellhpc.networks import build, parse_network
from cellhpc.ranks import OneRank
from cellhpc.recipe import Part, TrainSettings
from cellhpc.step import trained_variables

_BESIDE = 12
"""Bytes of what travels with the gradients: the loss, and whether to stop and to write, float32 each."""
_NO_TENSORFLOW = 3


@dataclass(frozen=True)
class Sizes:
    """What of a network ranks average.

    Attributes
    ----------
    head, all
        Trained numbers, where the head alone learns and where all of it does.
    normalised
        Channels of all its batch normalisation.
    """

    head: int
    all: int
    normalised: int


def averaged_bytes(sizes: Sizes, settings: TrainSettings, part: Part, ranks: int) -> int:
    """Bytes that the ranks average in a step: gradients, and with `synchronised` what batch normalisation asks."""
    size = getattr(sizes, part) * (4 if settings.compression == "none" else 2) + _BESIDE
    if settings.batch_norm == "synchronised" and part == "all":
        # Mean and variance of each channel on each rank, float32, on the way forward; their gradients on the way back.
        size += 2 * sizes.normalised * 2 * ranks * 4
    return size


def ring_bytes(averaged: float, ranks: int) -> float:
    """Bytes that each of the ranks sends to average so many."""
    return 2 * (ranks - 1) / ranks * averaged


def count(wanted: Sequence[tuple[str, int, int]], classes: int, settings: TrainSettings) -> list[Sizes] | None:
    """Build networks in a process of its own and count what is trained of them; None where TensorFlow is missing.

    Parameters
    ----------
    wanted
        Networks as text, each with the side of its tiles (pixels) and its inputs.
    classes, settings
        Logits of the head, and how it is trained.

    Raises
    ------
    UserError
        A network can't be built.
    """
    words = json.dumps([list(wanted), classes, settings.model_dump(mode="json")])
    done = subprocess.run(
        [sys.executable, "-m", "cellhpc.traffic", words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode == _NO_TENSORFLOW:
        return None
    if done.returncode:
        raise UserError((done.stderr.strip() or "it said nothing").splitlines()[-1].removeprefix("cellhpc: "))
    return [Sizes(**sizes) for sizes in json.loads(done.stdout.splitlines()[-1])]


def _count_here(network: str, side_px: int, inputs: int, classes: int, settings: TrainSettings) -> Sizes:
    import keras

    keras.backend.clear_session()
    model = build(parse_network(network), side_px, inputs, classes, "xavier", settings.dropout)
    normal = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    set_batch_norm(model, settings, OneRank())
    head, every = (
        sum(math.prod(variable.shape) for variable in trained_variables(model, part)) for part in ("head", "all")
    )
    return Sizes(head, every, sum(layer.moving_mean.shape[0] for layer in normal))


def _main() -> None:
    wanted, classes, given = json.loads(sys.argv[1])
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        sys.exit(_NO_TENSORFLOW)
    settings = TrainSettings.model_validate(given)
    try:
        found = [_count_here(network, side_px, inputs, classes, settings) for network, side_px, inputs in wanted]
    except UserError as fault:
        print(f"cellhpc: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
    print(json.dumps([asdict(sizes) for sizes in found]))


if __name__ == "__main__":
    _main()
