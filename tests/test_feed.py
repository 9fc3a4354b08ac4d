from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from cellhpc import train
from cellhpc.codecs import CODECS
from cellhpc.data import Data, load_data
from cellhpc.errors import DataError
from cellhpc.feed import feed, shuffle, whole_batches, windows
from cellhpc.folds import Folds
from cellhpc.ranks import OneRank
from cellhpc.recipe import AUGMENTATIONS
from cellhpc.shards import Shards
from cellhpc.tiles import Store
from cellhpc.train import Interrupted, Trainer, train_run
from tests import small
from tests.test_train import outputs, same_run

MOBILENET = "MobileNet(alpha=0.25)"
WINDOW = 20  # of 64 training tiles in shards of four: tiles of a shard come into two windows


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Folds]:
    return small.store(tmp_path_factory.mktemp("small") / "screen")


@pytest.fixture(scope="module")
def held(study: tuple[Store, Folds]) -> Data:
    return load_data(*study, 32)


@pytest.fixture(scope="module")
def streamed(study: tuple[Store, Folds]) -> Data:
    return load_data(*study, 32, window_tiles=WINDOW)


def batches(rows: np.ndarray, size: int = 5) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class TestOrder:
    def test_in_memory_it_is_drawn_over_all_tiles(self, held: Data) -> None:
        """The order of all runs that were made before there were windows."""
        rows = np.arange(3, 40)
        drawn = shuffle(held.pixels, rows, [7, 2], 4, 1)
        assert drawn.tolist() == np.random.default_rng([7, 2]).permutation(rows).tolist()

    def test_windows_hold_each_tile_once_and_few_shards(self, streamed: Data) -> None:
        pixels = streamed.pixels
        assert isinstance(pixels, Shards)
        assert np.bincount(pixels.shard).tolist() == [4] * 18
        rows = np.delete(np.arange(72), np.arange(8, 16))
        drawn = shuffle(pixels, rows, [0, 1], 4, 5)
        assert sorted(drawn) == rows.tolist()
        cut = [slice(4 * one.start, 4 * one.stop) for one in windows(16, 5)]
        shards = [pixels.shard[drawn[window]] for window in cut]
        assert [len(set(some)) for some in shards] == [1, 2, 5, 5, 3]
        assert all((np.diff(some) != 0).sum() >= len(set(some)) for some in shards[1:])  # shuffled within
        assert drawn.tolist() == shuffle(pixels, rows, [0, 1], 4, 5).tolist()
        others = [shuffle(pixels, rows, seed, 4, 5) for seed in ([0, 2], [1, 1])]
        assert all(set(pixels.shard[other[cut[2]]]) != set(shards[2]) for other in others)

    def test_windows_are_whole_batches(self) -> None:
        assert [whole_batches(window, 16) for window in (None, 1, 16, 40)] == [1, 1, 1, 2]

    def test_an_epoch_begins_with_smaller_windows(self) -> None:
        cuts = {size: [one.stop - one.start for one in windows(40, size)] for size in (1, 2, 8, 16)}
        assert cuts == {1: [1] * 40, 2: [1] + [2] * 20, 8: [1, 1, 2, 4, *[8] * 4], 16: [2, 2, 4, 8, 16, 16]}
        assert windows(0, 5) == []


class TestFeed:
    @pytest.mark.parametrize("where", ["held", "streamed"])
    @pytest.mark.parametrize(("together", "start"), [(1, 0), (1, 4), (4, 0), (4, 6), (4, 13), (4, 14), (50, 0)])
    def test_batches_are_those_that_indexing_gives(
        self, where: str, together: int, start: int, held: Data, request: pytest.FixtureRequest
    ) -> None:
        wanted = batches(np.random.default_rng(0).permutation(72)[:68])
        with feed(request.getfixturevalue(where).pixels, wanted, together, start) as fetched:
            for rows, pixels in zip(wanted[start:], fetched, strict=True):
                np.testing.assert_array_equal(pixels, held.pixels[rows])
                assert pixels.flags.c_contiguous

    def test_no_batches(self, streamed: Data) -> None:
        with feed(streamed.pixels, []) as fetched:
            assert list(fetched) == []

    def test_a_fault_is_raised_where_the_batch_is_asked_for(self, study: tuple[Store, Folds]) -> None:
        store = study[0]
        data = load_data(*study, 32, window_tiles=WINDOW)
        shard = store.folder / "tiles.zarr/P1/tiles_32/c.2.0.0.0"
        whole = shard.read_bytes()
        before = threading.active_count()
        try:
            shard.unlink()
            with feed(data.pixels, batches(np.arange(72), 4)) as fetched:  # shards in their order: P1's third is ninth
                for _ in range(8):
                    next(fetched)
                with pytest.raises(DataError, match=r"P1/tiles_32: tiles 8 to 11 can't be read: c.2.0.0.0 is missing"):
                    next(fetched)
        finally:
            shard.write_bytes(whole)
        assert threading.active_count() == before

    def test_leaving_early_leaves_no_thread_and_no_window_to_be_decoded(
        self, streamed: Data, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded = spied(monkeypatch)
        before = threading.active_count()
        with pytest.raises(ZeroDivisionError), feed(streamed.pixels, batches(np.arange(72)), 2) as fetched:  # noqa: PT012
            next(fetched)
            _ = 1 / 0
        assert threading.active_count() == before
        assert sum(decoded) <= 20

    def test_memory_is_bounded_by_two_windows(self, tmp_path: Path) -> None:
        """Of a store twelve times as large as a window, more is never held."""
        tile, window = (64, 64, 3), 20
        pixels = np.random.default_rng(0).integers(0, 99, (12 * window, *tile), np.uint8)
        zarr.create_array(
            tmp_path / "A/tiles_64", data=pixels, chunks=(1, *tile), shards=(16, *tile),
            compressors=CODECS["zstd"], chunk_key_encoding={"name": "default", "separator": "."},
        )  # fmt: skip
        shards = Shards(tmp_path, pd.DataFrame({"plate": "A", "row": range(len(pixels))}), tile)

        def peak_of(count: int) -> int:
            rows = shuffle(shards, np.arange(count), [0], 4, window // 4)
            tracemalloc.start()
            with feed(shards, batches(rows, 4), window // 4) as fetched:
                for _ in fetched:
                    pass
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return peak

        two = 2 * window * pixels[0].nbytes
        assert two < peak_of(len(pixels)) < 1.3 * two  # threads hold a compressed tile each
        assert peak_of(len(pixels)) < 1.1 * peak_of(2 * window)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many tiles are decoded by each call."""
    decoded: list[int] = []
    decode = Shards.decode

    def noting(self: Shards, rows: np.ndarray, *words: object, **named: object) -> None:
        decoded.append(len(rows))
        decode(self, rows, *words, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Shards, "decode", noting)
    return decoded


@pytest.fixture(scope="module")
def trainer(streamed: Data) -> Trainer:
    settings = small.SETTINGS.model_copy(
        update={"window_tiles": WINDOW, "batch_size": 8, "augment": AUGMENTATIONS["rotations"]}
    )
    return Trainer(MOBILENET, streamed, settings, OneRank())


class TestTraining:
    def test_a_streamed_run_is_that_from_memory_in_the_same_order(
        self, trainer: Trainer, study: tuple[Store, Folds], held: Data, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folds, streamed = study[1], trainer.data
        run = small.run(folds, MOBILENET)
        history, predictions = trainer.fit(run, folds)
        assert history[1]["loss"] != history[0]["loss"]  # it learns something
        monkeypatch.setattr(trainer, "data", held)
        monkeypatch.setattr(train, "shuffle", lambda _, *rest: shuffle(streamed.pixels, *rest))
        pd.testing.assert_frame_equal(trainer.fit(run, folds)[1], predictions, check_exact=True)

    def test_it_continues_to_the_last_digit_and_decodes_no_window_again(
        self, trainer: Trainer, study: tuple[Store, Folds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folds = study[1]
        run = small.run(folds, MOBILENET)
        train_run(trainer, run, folds, tmp_path / "whole")
        for after in (3, 2):  # in the third of the windows, and before the last; they are of 1, 2, 2, 2 and 1 steps
            with pytest.raises(Interrupted):
                train_run(trainer, run, folds, tmp_path / "parts", small.After(after))
        decoded = spied(monkeypatch)
        with pytest.raises(Interrupted):
            train_run(trainer, run, folds, tmp_path / "parts", small.After(0))  # at the end of the epoch
        train_run(trainer, run, folds, tmp_path / "parts")
        assert decoded == [8, 8, 8, 16, 16, 16, 8, 8]  # the last step, predictions, an epoch, predictions
        same_run(outputs(tmp_path / "whole" / run.id), outputs(tmp_path / "parts" / run.id))
