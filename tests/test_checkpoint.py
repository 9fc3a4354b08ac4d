"""Checkpoints as files; that a run continues from them as if nothing had been is in test_train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellhpc.checkpoint import _pack, _save, _unpack, read_checkpoint
from cellhpc.errors import DataError


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "shared-0": random.normal(size=(3, 4)).astype(np.float32),
        "shared-1": np.array(7, np.int64),
        "own-0": np.array([[1, 2], [3, 2**32 - 1]], np.uint32),
    }


def test_a_checkpoint_keeps_values_types_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    _save(path, {"about": np.array('{"ranks": 2}'), **arrays()})
    about, read = read_checkpoint(path)
    assert about == {"ranks": 2}
    assert read.keys() == arrays().keys()
    for name, value in arrays().items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value, strict=True)


def test_a_damaged_file_is_refused_or_reads_as_it_was_written(tmp_path: Path) -> None:
    """Whatever byte is wrong, and wherever it is torn: never a wrong number, and never another error."""
    path = tmp_path / "checkpoint.npz"
    _save(path, {"about": np.array("{}"), **arrays()})
    good = path.read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        damaged = bytearray(good)
        damaged[random.integers(len(good))] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            _, read = read_checkpoint(path)
        except DataError:
            refused += 1
            continue
        for name in arrays().keys() & read.keys():  # one that is missing is found against the variables
            np.testing.assert_array_equal(read[name], arrays()[name], strict=True)
    assert refused > 200
    for length in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match="damaged"):
            read_checkpoint(path)


def test_values_of_many_ranks_travel_as_bytes() -> None:
    values = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(5, np.int64), np.zeros((2, 0), np.uint8)]
    rows = np.concatenate([_pack([value[None] for value in values]), _pack([value[None] + 1 for value in values])])
    for value, both in zip(values, _unpack(rows, values), strict=True):
        np.testing.assert_array_equal(both, np.stack([value, value + 1]), strict=True)
    assert _pack([value[None][:0] for value in values]).shape == (0, rows.shape[1])
