from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellhpc.data import load_data
from cellhpc.errors import UsageError
from cellhpc.memory import Allowed
from tests import small
from tests.ranks_at_work import start_ranks


def test_data_says_what_is_whose(tmp_path: Path) -> None:
    store, folds = small.store(tmp_path / "screen")
    held, streamed = load_data(store, folds, 32), load_data(store, folds, 32, window_tiles=20)
    np.testing.assert_array_equal(held.pixels, store.read(store.tiles, 32))
    assert held.pixels.shape == streamed.pixels.shape == (72, 32, 32, 3)
    pd.testing.assert_frame_equal(held.tiles, streamed.tiles)
    assert replace(held, tiles=held.tiles[:2]).targets.tolist() == [1, 1]  # dim, after bright

    limit = Allowed(150_000, "a test")  # 72 tiles take 221,184 bytes
    with pytest.raises(UsageError, match=r"take 0\.00 GB on a host, .* \(a test\).*--set train.window_tiles=16, in a"):
        load_data(store, folds, 32, limit=limit)
    load_data(store, folds, 32, window_tiles=16, limit=limit)
    with pytest.raises(UsageError, match=r"Two windows of tiles take"):
        load_data(store, folds, 32, window_tiles=30, limit=limit)


def test_a_copy_on_scratch_is_read_instead_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, folds = small.store(tmp_path / "screen")
    wanted = store.read(store.tiles, 32)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    pixels = load_data(store, folds, 32, window_tiles=20, stage=True).pixels
    assert not list(scratch.iterdir())
    (store.folder / "tiles.zarr").rename(tmp_path / "away")
    out = np.empty_like(wanted)
    pixels.decode(np.arange(72), out)
    np.testing.assert_array_equal(out, wanted)
    (tmp_path / "away").rename(store.folder / "tiles.zarr")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    load_data(store, folds, 32, window_tiles=20, stage=True)
    assert "has no 0.00 GB for the shards: they are read from the store" in capsys.readouterr().out


def test_two_ranks_of_a_host_share_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = small.store(tmp_path / "screen")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    both = start_ranks("feed_program.py", 2, tmp_path / "meeting", store.folder)
    for seen in both:
        assert (seen["right"], seen["alone"], seen["staged"]) == (True, True, True)
        assert seen["differing"] == [5]  # what rank 0 wrote there
        assert seen["left"] == []
        assert "in each of 2 ranks" in seen["refused"]
        assert ".0.0.0 is missing" in seen["missing"]
    first, second = both
    assert first["weights"] == second["weights"]
    assert first["predictions"] == second["predictions"]
    assert len(first["predictions"]) == 8
