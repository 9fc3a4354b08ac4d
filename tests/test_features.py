"""Features are what the network says before its head; they come plate by plate, and always the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
import zarr
from PIL import Image

from cellhpc import features as features_module
from cellhpc.backbone import Extractor, Source, choose_source
from cellhpc.convert import convert, plan_conversion
from cellhpc.convert import execute as convert_module
from cellhpc.errors import DataError, UsageError
from cellhpc.features import Features, write_features
from cellhpc.folds import plan_folds
from cellhpc.ledger import held, read_json, write_json
from cellhpc.networks import Network
from cellhpc.ranks import OneRank
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings, FoldsSettings, TrainSettings
from cellhpc.tiles import Store
from cellhpc.train import Trainer, Watch, load_data, train_run
from tests import one_process, small
from tests.conftest import Cellhpc
from tests.test_networks import write_applications_file

MOBILENET = "MobileNet(alpha=0.25)"
CHANNELS = ("dna", "er", "golgi", "actin")
INPUTS = ("dna", "er+golgi", "actin")
COMPOUNDS = ("a-1", "a-2", "b-1", "b-2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three plates of eight wells, a field of four tiles each; the label tells how bright the second half is."""
    root = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(0)
    rows = []
    for plate in range(3):
        for number in range(8):
            compound = COMPOUNDS[number % 4]
            files = {f"file_{channel}": f"{plate}{number}{channel}.png" for channel in CHANNELS}
            for file in files.values():
                level = 60 if compound.startswith("a") else 150
                pixels = random.normal(level, 20, (64, 64)).clip(1, 255).astype(np.uint8)
                if (plate, number, file.endswith("dna.png")) == (1, 2, True):
                    pixels[:] = 200
                Image.fromarray(pixels).save(root / file)
            rows.append({
                "plate": f"P{plate}", "batch": f"W{plate // 2}", "well": f"B{8 - number:02d}", "field": 1,
                "compound": compound, "concentration": 1.0, "unit": "uM", "treatment": f"{compound} 1 uM",
                "label": compound[0], "replicate": str(plate + 1), "role": "treatment", **files,
            })  # fmt: skip
    settings = ConvertSettings(preprocessing="none", shard_fields=2)
    plan = plan_conversion(settings, Screen(pd.DataFrame(rows), CHANNELS, root), (32, 48), root / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "_cluster", one_process.cluster)
        convert(plan, workers=1)
    return Store.open(plan.store)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in the layout of keras.applications."""
    path = tmp_path_factory.mktemp("weights") / "drawn.h5"
    keras.utils.set_random_seed(5)
    network = plain_network()
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # statistics are those of one batch: what is drawn says something
    network(np.random.default_rng(5).uniform(-1, 1, (64, 32, 32, 3)).astype(np.float32), training=True)
    write_applications_file(network, path)
    return path


@pytest.fixture(scope="module")
def study(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of that store with two finished runs; the first one kept its weights."""
    folder = tmp_path_factory.mktemp("study")
    settings = TrainSettings(
        epochs=2, batch_size=16, learning_rate=0.01, inputs=INPUTS, input_scaling="keras", batch_norm_momentum=0.1
    )
    folds = plan_folds(store.tiles, FoldsSettings())
    trainer = Trainer(MOBILENET, load_data(store, folds, 32), settings, OneRank())
    for fold, keep in ((0, True), (3, False)):
        train_run(trainer, small.run(folds, MOBILENET, fold), folds, folder / "runs", Watch(keep_weights=keep))
    job = {
        "study": {"name": "s", "folder": str(folder)},
        "screen": {"layout": "bbbc021", "path": "raw"},
        "convert": {"store": str(store.folder)},
        "train": settings.model_dump(mode="json"),
        "sweep": {"networks": [MOBILENET], "weights": ["xavier"], "tile_px": 48},
    }
    write_json(folder / "job.json", job)
    write_json(folder / "plates.json", ["P0", "P1", "P2"])
    return folder


def plain_network(side_px: int = 32) -> keras.Model:
    return keras.applications.MobileNet(
        alpha=0.25, include_top=False, weights=None, pooling="avg", input_shape=(side_px, side_px, 3)
    )


def source(store: Store, weights: Path, **how: Any) -> Source:
    return choose_source(store.folder, MOBILENET, str(weights), **{"tile_px": 32, "inputs": INPUTS, **how})


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but those that tell the time."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("done.json", "features.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_features_are_those_of_plain_keras(store: Store, weights: Path, tmp_path: Path) -> None:
    written = write_features(source(store, weights), tmp_path / "out")
    network = plain_network()
    network.load_weights(weights)
    pixels = store.read(store.tiles, 32).astype(np.float32)
    seen = np.stack([pixels[..., 0], (pixels[..., 1] + pixels[..., 2]) / 2, pixels[..., 3]], axis=-1)
    expected = network(keras.applications.mobilenet.preprocess_input(seen), training=False)
    assert written.read().shape == (96, 256) == (written.facts["tiles"], written.facts["features"])
    assert written.read().dtype == np.float32
    np.testing.assert_allclose(written.read(), expected, atol=1e-3)  # a graph and its layers one by one round apart
    assert np.ptp(written.read(), axis=0).max() > 0.1
    keys = ["plate", "well", "field", "tile", "compound", "label", "batch", "row"]
    pd.testing.assert_frame_equal(written.tiles[keys], store.tiles[keys])


def test_over_the_eight_orientations_they_are_averaged(store: Store, weights: Path) -> None:
    pixels = store.read(store.tiles[:5], 32)
    plain = Extractor(source(store, weights))
    turned = [np.rot90(side, k, (1, 2)) for side in (pixels, pixels[:, ::-1]) for k in range(4)]
    expected = np.mean([plain(np.ascontiguousarray(tiles)) for tiles in turned], axis=0)
    np.testing.assert_allclose(Extractor(source(store, weights, rotations=True))(pixels), expected, rtol=1e-4)
    assert not np.allclose(plain(pixels), expected, rtol=1e-3)


def test_of_a_run_they_lead_to_its_predictions(store: Store, study: Path, tmp_path: Path) -> None:
    """Its head on the features is what the run predicted: the same tiles, inputs, scaling and weights."""
    chosen = choose_source(study, run="run-0-0")
    written = write_features(chosen, tmp_path / "out")
    unit = study / "runs" / "run-0-0" / "001"
    with np.load(unit / "weights.npz") as file:
        kernel, bias = [file[name] for name in file.files][-2:]
    logits = written.read() @ kernel + bias
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predictions = pd.read_parquet(unit / "predictions.parquet")
    held_out = (written.tiles["compound"] == "a-1").to_numpy()
    assert held_out.sum() == len(predictions) == 24
    assert np.ptp(predictions["p_a"]) > 0.001
    np.testing.assert_allclose(probabilities[held_out], predictions[["p_a", "p_b"]], atol=1e-5)
    assert read_json(tmp_path / "out/features.json")["run"] == {
        "id": "run-0-0", "trained_on": ["a-2", "b-1", "b-2"], "held_out": ["a-1"]
    }  # fmt: skip


def test_shards_hold_them_in_the_order_of_the_tiles(
    store: Store, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_features(source(store, weights), tmp_path / "whole").read()
    monkeypatch.setattr(features_module, "CHUNK_BYTES", 5 * 256 * 4)
    monkeypatch.setattr(features_module, "SHARD_CHUNKS", 3)
    parts = write_features(source(store, weights), tmp_path / "parts")
    array = zarr.open_array(parts.folder / "features.zarr", mode="r")
    assert (array.chunks, array.shards) == ((5, 256), (15, 256))
    assert np.array_equal(parts.read(), whole)


class PowerCut(BaseException):
    """Ends a process at once."""


@pytest.mark.parametrize("at", ["the second plate", "the array", "the table"])
def test_what_was_killed_goes_on_and_ends_with_the_same_bytes(
    at: str, store: Store, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = snapshot(write_features(source(store, weights), tmp_path / "whole").folder)
    assert set(whole) == {"features.zarr/zarr.json", "features.zarr/c/0/0", "tiles.parquet", ".lock"}
    read, asked = Store.read, []

    def counting(self: Store, tiles: pd.DataFrame, tile_px: int) -> np.ndarray:
        asked.append(tiles["plate"].iloc[0])
        if at == "the second plate" and asked == ["P0", "P1"]:
            raise PowerCut
        return read(self, tiles, tile_px)

    def cut(*_: object) -> None:
        raise PowerCut

    monkeypatch.setattr(Store, "read", counting)
    with pytest.MonkeyPatch.context() as patch:
        if at == "the array":
            patch.setattr(Path, "rename", cut)
        if at == "the table":
            patch.setattr(features_module.ledger, "write_table", cut)
        with pytest.raises(PowerCut):
            write_features(source(store, weights), tmp_path / "parts")
    with pytest.raises(UsageError, match="no finished features are there"):
        Features.open(tmp_path / "parts")
    assert (tmp_path / "parts/plates/P0/features.npy").exists()
    write_features(source(store, weights), tmp_path / "parts")
    assert snapshot(tmp_path / "parts") == whole
    assert asked == (["P0", "P1", "P1", "P2"] if at == "the second plate" else ["P0", "P1", "P2"])
    write_features(source(store, weights), tmp_path / "parts")
    assert len(asked) == 4 - (at != "the second plate")


def test_nothing_is_mixed(store: Store, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_features(source(store, weights), folder)
    before = snapshot(folder)
    with pytest.raises(UsageError, match=r"other features:\n  - input_scaling is raw, there keras\n.*with --out"):
        write_features(source(store, weights, input_scaling="raw"), folder)
    other = weights.with_name("other.h5")
    other.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UsageError, match=r"other features:\n  - weights_digest is "):
        write_features(source(store, other), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="mine is not empty and holds no features"):
        write_features(source(store, weights), tmp_path / "mine")
    with held(folder / ".lock", "", ""), pytest.raises(UsageError, match="another command is writing"):
        write_features(source(store, weights), folder)
    assert snapshot(folder) == before


def test_what_a_study_says_need_not_be_said_again(study: Path, store: Store) -> None:
    chosen = choose_source(study)
    assert (chosen.network, chosen.weights, chosen.tile_px) == (Network("MobileNet", (("alpha", 0.25),)), "xavier", 48)
    assert (chosen.inputs, chosen.input_scaling, chosen.run) == (INPUTS, "keras", {})
    assert chosen.name == "MobileNet-alpha0.25_xavier_48"
    of_run = choose_source(study, run="run-0-0", rotations=True)
    assert (of_run.tile_px, of_run.inputs, of_run.classes, of_run.name) == (32, INPUTS, 2, "run-0-0_32_rotations")
    assert chosen.about["digest"] != of_run.about["digest"] != choose_source(study, run="run-0-0").about["digest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'which network, and which weights. For instance: cellhpc features STORE --network "MobileNet'),
        ({"network": MOBILENET}, "which network, and which weights"),
        ({"network": "MobileNot", "weights": "xavier"}, "--network: keras.applications has no 'MobileNot'"),
        ({"network": MOBILENET, "weights": "absent.h5", "tile_px": 32}, "--weights: absent.h5: no such file"),
        ({"network": MOBILENET, "weights": "xavier"}, r"holds tiles of 32, 48 pixels. Choose one with --tile-px"),
        (
            {"network": MOBILENET, "weights": "xavier", "tile_px": 32, "inputs": ("gfp",)},
            r"--input: 'gfp' is no channel of the screen. Allowed: actin, dna, er, golgi",
        ),
        ({"run": "run-0-0"}, "is a store, and a run is one of a study. Type: cellhpc features STUDY --run run-0-0"),
    ],
)
def test_what_is_missing_of_a_store_is_told(options: dict[str, Any], message: str, store: Store) -> None:
    with pytest.raises(UsageError, match=message):
        choose_source(store.folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "run-9"}, "has no finished run 'run-9'. Finished: run-0-0, run-3-0."),
        ({"run": "run-3-0"}, r"run-3-0 has not kept its weights. Remove .*run-3-0, then .* sweep.keep_weights=true"),
        ({"run": "run-0-0", "network": MOBILENET}, "--run says which network, weights, tiles and inputs"),
    ],
)
def test_what_is_missing_of_a_run_is_told(options: dict[str, Any], message: str, study: Path) -> None:
    with pytest.raises(UsageError, match=message):
        choose_source(study, **options)


def test_neither_store_nor_study(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a store nor a study is there"):
        choose_source(tmp_path)


def test_weights_that_do_not_fit_are_told_before_anything_is_made(store: Store, weights: Path, tmp_path: Path) -> None:
    wide = choose_source(store.folder, "MobileNet(alpha=0.5)", str(weights), tile_px=32, inputs=INPUTS)
    with pytest.raises(DataError, match=r"layer 1 is 'conv1' with shapes 3x3x3x8; MobileNet-alpha0.5 has"):
        write_features(wide, tmp_path / "out")
    assert not (tmp_path / "out/plates").exists()


def test_the_command(cellhpc: Cellhpc, study: Path, store: Store, weights: Path, tmp_path: Path) -> None:
    words = ("features", store.folder, "--network", MOBILENET, "--weights", weights, "--tile-px", 32, "--baseline")
    mixed = [word for name in INPUTS for word in ("--input", name)]
    done = cellhpc(*words, *mixed, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["tiles"], said["features"]) == (96, 256)
    assert said["baseline"]["nearest_neighbour"]["compound"]["treatment"]["total"] == 4
    assert said["baseline"]["logistic_regression"]["compound_and_batch"]["field"]["total"] == 24
    assert "nearest_neighbour_whitened" not in said["baseline"]
    assert read_json(tmp_path / "out/baseline.json")["features"] == read_json(tmp_path / "out/features.json")["digest"]
    refused = cellhpc("features", study, "--run", "run-0-0", "--baseline")
    assert refused.returncode == 2
    assert "cellhpc: the features are of run-0-0, which has learnt from 3 of the compounds" in refused.stderr
