"""What a run leaves beside its predictions: draws of dropout, and which pixels spoke for wrong calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from cellhpc import step
from cellhpc.attributions import ATTRIBUTIONS, wrong_tiles
from cellhpc.augment import orient
from cellhpc.data import load_data
from cellhpc.ledger import read_json
from cellhpc.networks import parse_network
from cellhpc.predictor import DRAWS, PREDICTIONS
from cellhpc.ranks import OneRank
from cellhpc.recipe import TrainSettings
from cellhpc.scores import combine
from cellhpc.step import Graphs, head_layers, thinned_kernels
from cellhpc.train import Interrupted, Trainer, Watch, train_run
from tests import made_up, small
from tests.ranks_at_work import start_ranks
from tests.test_train import MOBILENET, outputs

VGG = "VGG16"
"""Has logits that differ, also with weights that are drawn."""


def settings(**keys: Any) -> TrainSettings:
    return TrainSettings.model_validate({**small.SETTINGS.model_dump(), **keys})


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def draw_a_head(of: Trainer) -> None:
    """Give a network a head whose logits differ by about one half."""
    backbone = keras.Model(of.model.input, head_layers(of.model)[0].input)
    norm = np.linalg.norm(backbone(of.data.pixels[:1].astype(np.float32), training=False))
    kernel, bias = of.model.get_layer("logits").weights
    kernel.assign(np.random.default_rng(0).normal(0, 0.5 / norm, kernel.shape))
    bias.assign([0.1, 0.0, -0.1])


class TestDraws:
    """Monte Carlo dropout."""

    @pytest.mark.parametrize("rotations", [False, True])
    def test_a_draw_is_a_network_without_some_features(self, rotations: bool) -> None:
        data, _ = small.data(per_compound=4)
        keys = {"dropout": 0.4, "dropout_draws": 3, "predict_rotations": rotations, "input_scaling": "keras"}
        of = Trainer(MOBILENET, data, settings(**keys), OneRank())
        draw_a_head(of)
        rows = np.array([2, 30, 17, 9])
        drawn = of.predictor.draw(rows, seed=5)
        backbone = keras.Model(of.model.input, head_layers(of.model)[0].input)
        kernel, bias = of.model.get_layer("logits").get_weights()
        kept = np.random.default_rng([5, 0, 0, 3]).random((3, len(kernel))) >= 0.4
        assert 0 < kept.sum() < kept.size
        tiles = data.pixels[rows].astype(np.float32)
        views = [orient(tiles, np.full(4, k)).numpy() for k in range(8 if rotations else 1)]
        features = [backbone(view / 127.5 - 1, training=False).numpy() for view in views]
        wanted = [np.mean([softmax(seen * mask / 0.6 @ kernel + bias) for seen in features], 0) for mask in kept]
        assert np.allclose(drawn.filter(like="p_"), np.concatenate(wanted), atol=1e-5)
        assert np.ptp(wanted, 0).min() > 1e-5
        assert drawn["draw"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        predicted = of.predictor.predict(rows)
        keys_of = list(predicted.columns[: -len(data.classes)])
        assert list(drawn.columns) == [*keys_of, "draw", *predicted.columns[-len(data.classes) :]]
        for _, one in drawn.groupby("draw"):
            pd.testing.assert_frame_equal(one[keys_of].reset_index(drop=True), predicted[keys_of])

    def test_their_mean_is_near_the_prediction(self) -> None:
        data, _ = small.data(per_compound=1)
        of = Trainer(MOBILENET, data, settings(dropout=0.2, dropout_draws=1000), OneRank())
        draw_a_head(of)
        predicted, drawn = of.predictor.predict(np.arange(9)), of.predictor.draw(np.arange(9), seed=0)
        values = drawn.filter(like="p_").to_numpy().reshape(1000, len(predicted), -1)
        deviation = values.std(0)
        assert deviation.min() > 0.01
        assert np.allclose(values.mean(0), predicted.filter(like="p_"), atol=0.02)
        assert np.allclose(values.sum(-1), 1, atol=1e-5)

    def test_kernels_are_those_of_fewer_draws_first_and_of_the_seed(self) -> None:
        kernel = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
        few, more = (thinned_kernels(kernel, 0.3, draws, seed=1).reshape(1000, draws, 3) for draws in (2, 5))
        assert np.array_equal(few, more[:, :2])
        assert not np.array_equal(few, thinned_kernels(kernel, 0.3, 2, seed=2).reshape(few.shape))
        dropped = (more == 0).all(-1)
        assert dropped.mean() == pytest.approx(0.3, abs=0.03)  # of 5,000: five deviations
        assert np.allclose(more[~dropped], np.repeat(kernel[:, None], 5, 1)[~dropped] / 0.7)

    def test_a_run_that_was_interrupted_leaves_the_same_bytes(self, tmp_path: Path) -> None:
        data, folds = small.data(per_compound=4)
        of = Trainer(MOBILENET, data, settings(dropout=0.5, dropout_draws=3, epochs=1), OneRank())
        run, other = small.run(folds, MOBILENET, seed=3), small.run(folds, MOBILENET, fold=1)
        train_run(of, run, folds, tmp_path / "whole")
        for _ in range(2):
            with pytest.raises(Interrupted):
                train_run(of, run, folds, tmp_path / "parts", small.After(0))
        train_run(of, other, folds, tmp_path / "parts")
        train_run(of, run, folds, tmp_path / "parts")
        whole, parts = (outputs(tmp_path / name / run.id) for name in ("whole", "parts"))
        assert (whole / DRAWS).read_bytes() == (parts / DRAWS).read_bytes()
        drawn, predicted = pd.read_parquet(whole / DRAWS), pd.read_parquet(whole / PREDICTIONS)
        assert len(drawn) == 3 * len(predicted)
        assert (drawn.filter(like="p_")[: len(predicted)] != predicted.filter(like="p_")).to_numpy().any()


CLASSES = ("cats", "dogs")


def bright_squares() -> tuple[np.ndarray, Graphs]:
    """Two tiles of 32 pixels with a bright square of 8 at another place each, and a network that looks at brightness.

    Its last maps have places of 8 pixels: the mean grey level of the first channel, and of the second. The first speaks
    for dogs.
    """
    tiles = np.full((2, 32, 32, 3), 10, np.uint8)
    tiles[0, 8:16, 16:24, 0] = 250
    tiles[1, 24:32, 0:8, 0] = 250
    tiles[:, 0:8, 0:8, 1] = 250  # speaks for cats
    seen = keras.Input((32, 32, 3))
    maps = keras.layers.Conv2D(2, 8, strides=8, use_bias=False)(seen)
    logits = keras.layers.Dense(2, name="logits")(keras.layers.GlobalAveragePooling2D()(maps))
    model = keras.Model(seen, logits)
    means = np.zeros((8, 8, 3, 2), np.float32)
    means[:, :, 0, 0] = means[:, :, 1, 1] = 1 / 64
    model.set_weights([means, np.array([[-1, 2], [1, -1]], np.float32), np.zeros(2, np.float32)])
    network = parse_network(MOBILENET)
    return tiles, Graphs(network, model, None, small.CHANNELS, 32, settings(), OneRank())


class TestAttributions:
    """Which pixels spoke for a call."""

    def test_a_map_is_where_the_bright_square_is(self) -> None:
        tiles, graphs = bright_squares()
        dogs = graphs.attribution()(tiles, np.array([1, 1], np.int32)).numpy()
        assert dogs.shape == (2, 32, 32)
        for one, (rows, columns) in zip(
            dogs, [(slice(8, 16), slice(16, 24)), (slice(24, 32), slice(0, 8))], strict=True
        ):
            middle = one[rows, columns][2:6, 2:6]
            assert middle.min() > 0.5
            assert one.max() == 1.0
            assert one.min() == 0.0
            top = np.unravel_index(one.argmax(), one.shape)
            assert rows.start <= top[0] < rows.stop
            assert columns.start <= top[1] < columns.stop
            assert one.sum() < 3 * one[rows, columns].sum()  # what is between the places of the last maps
        cats = graphs.attribution()(tiles, np.array([0, 0], np.int32)).numpy()
        assert all(np.unravel_index(one.argmax(), one.shape) < (8, 8) for one in cats)
        # Of each tile its own class; and nothing speaks in a tile of one grey level... but the level itself.
        both = graphs.attribution()(tiles, np.array([1, 0], np.int32)).numpy()
        assert np.array_equal(both[0], dogs[0])
        assert np.array_equal(both[1], cats[1])
        assert not graphs.attribution()(np.zeros_like(tiles), np.array([0, 1], np.int32)).numpy().any()

    @pytest.mark.parametrize("network", [MOBILENET, "EfficientNetB0"])
    def test_it_is_one_product_of_the_last_maps_with_the_kernel(self, network: str) -> None:
        """Class activation mapping; EfficientNet has further poolings within."""
        data, _ = small.data(side_px=96, per_compound=1)
        of = Trainer(network, data, settings(dropout=0.5), OneRank())
        classes = np.arange(9, dtype=np.int32) % 3
        maps = of.predictor.graphs.attribution()(data.pixels, classes).numpy()
        pooling = [layer for layer in of.model.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D)][-1]
        last = keras.Model(of.model.input, pooling.input)(data.pixels.astype(np.float32), training=False).numpy()
        assert last.shape[1:3] == (3, 3)
        kernel = of.model.get_layer("logits").kernel.numpy()
        places = np.maximum(np.einsum("nyxk,kn->nyx", last, kernel[:, classes]), 0)
        plain = tf.image.resize(places[..., None], (96, 96)).numpy()[..., 0]
        top = plain.max((1, 2), keepdims=True)
        assert np.allclose(maps, np.divide(plain, top, out=np.zeros_like(plain), where=top > 0), atol=1e-4)
        assert (top > 0).sum() >= 3

    def test_the_tiles_are_those_that_spoke_most_for_a_wrong_call(self) -> None:
        table = made_up.predictions(skill=0.35)
        treatments = combine(table)["treatment"].set_index("treatment")
        wrong = treatments[~treatments["correct"]]
        assert 0 < len(wrong) < len(treatments)
        chosen = wrong_tiles(table, 3)
        assert list(dict.fromkeys(chosen["treatment"])) == list(wrong.index)
        for treatment, rows in chosen.groupby("treatment"):
            call = treatments.loc[treatment, "call"]
            assert set(rows["call"]) == {call}
            own = table.loc[table["treatment"] == treatment, f"p_{call}"]
            assert rows[f"p_{call}"].tolist() == sorted(own, reverse=True)[:3]
            assert table.loc[rows.index].equals(rows.drop(columns="call"))
        label = wrong["label"].iloc[0]
        known = wrong_tiles(table, 3, unknown=label)
        assert set(known["label"]) == set(wrong["label"]) - {label}
        right = table[table["treatment"].isin(treatments.index[treatments["correct"]])]
        assert wrong_tiles(right.reset_index(drop=True), 3).empty

    def test_a_run_leaves_them_and_predicts_what_it_does_without(self, tmp_path: Path) -> None:
        """A network that hardly learns says the same of tiles that hardly differ: it is wrong in two folds of three."""
        data, folds = small.data(per_compound=4)
        data.pixels[:] = data.pixels[0]
        data.pixels[:, 0, 0, 0] = np.arange(len(data.pixels))
        of = Trainer(VGG, data, settings(learning_rate=1e-9, epochs=1, trained="head"), OneRank())
        counts = []
        for fold in (0, 3, 6):  # of a label each
            run = small.run(folds, VGG, fold=fold)
            train_run(of, run, folds, tmp_path / "with", Watch(attributions=2))
            train_run(of, run, folds, tmp_path / "without")
            kept, plain = outputs(tmp_path / "with" / run.id), outputs(tmp_path / "without" / run.id)
            assert (kept / PREDICTIONS).read_bytes() == (plain / PREDICTIONS).read_bytes()
            assert not (plain / ATTRIBUTIONS).exists()
            predicted = pd.read_parquet(kept / PREDICTIONS)
            with np.load(kept / ATTRIBUTIONS, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            assert (found["pixels"].dtype, found["map"].dtype) == (np.uint8, np.float16)
            counts.append(len(found["map"]))
            assert found["pixels"].shape == (counts[-1], 32, 32, 3)
            assert found["map"].shape == (counts[-1], 32, 32)
            assert {"treatment", "compound", "label", "call", "plate", "well", "field", "tile"} < set(found)
            for number in range(counts[-1]):
                (held_out,) = run.fold.held_out
                assert found["compound"][number] == held_out
                assert found["call"][number] != found["label"][number]
                same = predicted.query(f"field == {found['field'][number]} and tile == {found['tile'][number]}")
                row = data.tiles.merge(same[["compound", "field", "tile"]], how="left", indicator=True)
                (at,) = np.flatnonzero(row["_merge"] == "both")
                assert np.array_equal(found["pixels"][number], data.pixels[at])
        assert sorted(counts) == [0, 2, 2]

    def test_tiles_that_stay_in_their_shards_are_found_too(self, tmp_path: Path) -> None:
        store, folds = small.store(tmp_path / "screen")
        rows = np.array([50, 3, 20, 64])
        answers = []
        for window in (None, 24):
            data = load_data(store, folds, 32, window_tiles=window)
            of = Trainer(MOBILENET, data, settings(window_tiles=window), OneRank())
            of._reset(small.run(folds, MOBILENET), Watch())
            predictions = of.predictor.predict(rows)
            answers.append(of.predictor.attribute(rows, predictions, 2, ""))
        assert len(answers[0]["map"]) > 0
        for name, array in answers[0].items():
            assert np.array_equal(array, answers[1][name]), name


ALONE = {"trained": "head", "epochs": 3, "optimizer": "adamw", "weight_decay": 0.1, "input_scaling": "keras"}
MORE = {**ALONE, "dropout": 0.3, "dropout_draws": 2, "predict_rotations": True}


class TestFixedFeatures:
    """A head that learns alone: the backbone runs once for each tile."""

    @pytest.mark.parametrize(
        ("network", "keys"),
        [(VGG, ALONE), (VGG, MORE), (MOBILENET, {**ALONE, "precision": "bfloat16"})],
        ids=["few", "many", "bfloat16"],
    )
    def test_the_run_is_the_one_that_computes_them_in_every_step(
        self, network: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, folds = small.data(per_compound=2)
        run = small.run(folds, network, seed=2)
        left = []
        for cached in (True, False):
            of = Trainer(network, data, settings(**keys), OneRank())
            assert of.predictor.graphs.cached == cached
            if cached:  # it is stopped, too, and goes on where it was
                with pytest.raises(Interrupted):
                    train_run(of, run, folds, tmp_path / str(cached), small.After(1))
            train_run(of, run, folds, tmp_path / str(cached), Watch(attributions=1))
            left.append(outputs(tmp_path / str(cached) / run.id))
            monkeypatch.setattr(TrainSettings, "fixed_features", property(lambda _: False))
        assert [path.name for path in sorted(left[0].iterdir())] == [path.name for path in sorted(left[1].iterdir())]
        for name in (PREDICTIONS, DRAWS)[: 2 if "dropout" in keys else 1]:
            tables = [pd.read_parquet(folder / name) for folder in left]
            pd.testing.assert_frame_equal(*tables, check_exact=False, atol=1e-5)
        losses = [[epoch["loss"] for epoch in read_json(folder / "history.json")["epochs"]] for folder in left]
        assert np.allclose(*losses, rtol=1e-5)
        assert network == MOBILENET or min(abs(np.diff(losses[0]))) > 1e-3

    def test_they_are_computed_once_for_all_runs_from_the_same_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data, folds = small.data(per_compound=4)
        of = Trainer(MOBILENET, data, settings(**ALONE), OneRank())
        seen: list[int] = []
        plain = of.predictor._features

        def counted(tiles: np.ndarray) -> Any:
            seen.append(len(tiles))
            return plain(tiles)

        monkeypatch.setattr(of.predictor, "_features", counted)
        _, first = of.fit(small.run(folds, MOBILENET), folds)
        of.fit(small.run(folds, MOBILENET, fold=1), folds)
        assert sum(seen) == len(data.tiles)
        of.fit(small.run(folds, MOBILENET, seed=1), folds)  # draws another backbone
        assert sum(seen) == 2 * len(data.tiles)
        _, again = of.fit(small.run(folds, MOBILENET), folds)
        pd.testing.assert_frame_equal(first, again, check_exact=True)

    def test_they_are_not_kept_where_they_would_change_or_be_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for keys in ({"trained": "all"}, {"trained": "head_first"}, {"augment": {"noise": 0.5}}):
            assert not settings(**{**ALONE, **keys}).fixed_features
        data, _ = small.data(per_compound=1)
        monkeypatch.setattr(step, "FEATURE_BYTES", len(data.tiles) * 256 * 4)  # 256 features of each tile
        for rotations in (False, True):
            of = Trainer(MOBILENET, data, settings(**ALONE, predict_rotations=rotations), OneRank())
            assert of.predictor.graphs.cached != rotations

    def test_two_ranks_learn_what_one_does(self, tmp_path: Path) -> None:
        keys = {"trained": "head"}
        first, second = start_ranks(
            "train_program.py", 2, tmp_path, VGG, 32, 16, 3, 4, 0.001, json.dumps(keys)
        )  # fmt: skip
        assert first["checksums"] == second["checksums"]
        assert first["probabilities"] == second["probabilities"]
        data, folds = small.data(per_compound=4)
        of = Trainer(VGG, data, settings(**keys, batch_size=16, epochs=3, learning_rate=0.001), OneRank())
        history, predicted = of.fit(small.run(folds, VGG), folds)
        losses = [epoch["loss"] for epoch in history]
        assert np.allclose(first["losses"], losses, rtol=1e-4)
        assert np.allclose(first["probabilities"], predicted.filter(like="p_"), atol=1e-4)
        assert abs(losses[0] - losses[2]) > 1e-3  # the tolerances are small against what was learnt
