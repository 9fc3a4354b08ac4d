from __future__ import annotations

import importlib
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from cellhpc.errors import DataError, UsageError
from cellhpc.networks import (
    NETWORKS,
    Network,
    build,
    initialisation,
    named_weights,
    parse_network,
    scale_input,
    set_weights,
    weights_digest,
)

PAPER = ["ResNet50", "InceptionV3", "InceptionResNetV2"]
SMALL = Network("MobileNet", (("alpha", 0.25),))


def write_applications_file(backbone: keras.Model, path: Path) -> None:
    """Write weights in the HDF5 layout of the files that keras.applications offers."""
    with h5py.File(path, "w") as file:
        layers = [layer for layer in backbone.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        for layer in layers:
            group = file.create_group(layer.name)
            weights = [*layer.trainable_weights, *layer.non_trainable_weights]
            group.attrs["weight_names"] = [f"{layer.name}/{weight.name}".encode() for weight in weights]
            for weight in weights:
                group[f"{layer.name}/{weight.name}"] = np.asarray(weight)


def test_every_network_of_keras_applications_is_known_with_its_own_module() -> None:
    offered = {name for name in dir(keras.applications) if name[0].isupper()}
    assert set(NETWORKS) == offered
    for name, module in NETWORKS.items():
        assert hasattr(importlib.import_module(f"keras.applications.{module}"), "preprocess_input")
        assert hasattr(keras.applications, name)


@pytest.mark.parametrize(
    ("text", "name", "arguments", "slug", "side_px"),
    [
        ("ResNet50", "ResNet50", (), "ResNet50", 224),
        ("InceptionV3", "InceptionV3", (), "InceptionV3", 299),
        ("MobileNet(alpha=0.25)", "MobileNet", (("alpha", 0.25),), "MobileNet-alpha0.25", 224),
    ],
)
def test_names_with_arguments(text: str, name: str, arguments: tuple, slug: str, side_px: int) -> None:
    network = parse_network(text)
    assert (network.name, network.arguments, network.slug, network.side_px) == (name, arguments, slug, side_px)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ResNet51", "keras.applications has no 'ResNet51'. Allowed: ConvNeXtBase"),
        ("ResNet50(", "is no network"),
        ("A(1)", "is no network"),
    ],
)
def test_wrong_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        parse_network(text)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_load_a_file_in_the_layout_of_keras_applications(name: str, tmp_path: Path) -> None:
    network = Network(name)
    keras.utils.set_random_seed(1)
    backbone = getattr(keras.applications, name)(
        include_top=False, weights=None, input_shape=(96, 96, 3), pooling="avg"
    )
    path = tmp_path / f"{name}.h5"
    write_applications_file(backbone, path)
    keras.utils.set_random_seed(2)
    model = build(network, 96, 3, 12, str(path))
    assert model.output_shape == (None, 12)
    loaded = model.get_weights()[:-2]  # the head's kernel and bias come last
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(loaded, backbone.get_weights(), strict=True))


def test_the_real_imagenet_file_of_mobilenet(cellhpc_data: Path) -> None:
    path = cellhpc_data / "weights" / "mobilenet_2_5_224_tf_no_top.h5"
    model = build(SMALL, 128, 3, 6, str(path))
    with h5py.File(path) as file:
        kernel = file["conv1"][file["conv1"].attrs["weight_names"][0]][()]
    assert np.array_equal(model.get_layer("conv1").get_weights()[0], kernel)


def test_a_file_of_another_network_names_the_layer_and_the_shapes(tmp_path: Path) -> None:
    other = keras.applications.MobileNet(alpha=0.5, include_top=False, weights=None, input_shape=(64, 64, 3))
    write_applications_file(other, tmp_path / "half.h5")
    with pytest.raises(
        DataError,
        match=r"half.h5: layer 1 is 'conv1' with shapes 3x3x3x16; MobileNet-alpha0.25 has 'conv1' with shapes 3x3x3x8",
    ):
        build(SMALL, 64, 3, 6, str(tmp_path / "half.h5"))


def test_a_file_with_the_top_is_refused(tmp_path: Path) -> None:
    whole = keras.applications.MobileNet(alpha=0.25, weights=None)
    write_applications_file(whole, tmp_path / "top.h5")
    with pytest.raises(
        DataError, match=r"top.h5: holds 55 layers with weights, MobileNet-alpha0.25 has 54 \(with top\?\)"
    ):
        build(SMALL, 64, 3, 6, str(tmp_path / "top.h5"))


def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no weights")
    with pytest.raises(DataError, match=r"not a weights file in the layout of keras.applications"):
        build(SMALL, 64, 3, 6, str(tmp_path / "text.h5"))


def test_a_size_that_the_network_refuses() -> None:
    with pytest.raises(UsageError, match=r"InceptionV3 with input \(32, 32, 3\).*75"):
        build(Network("InceptionV3"), 32, 3, 6, "xavier")


def test_imagenet_weights_are_for_three_inputs() -> None:
    with pytest.raises(UsageError, match=r"ImageNet weights are for 3 inputs.* 5, .*Choose three with train.inputs"):
        build(SMALL, 64, 5, 6, "imagenet")


def test_xavier_is_seeded() -> None:
    def kernel(seed: int) -> np.ndarray:
        keras.utils.set_random_seed(seed)
        return build(SMALL, 64, 3, 6, "xavier").get_weights()[0]

    assert np.array_equal(kernel(1), kernel(1))
    assert not np.array_equal(kernel(1), kernel(2))


def test_kept_weights_of_another_network_or_a_torn_file_are_refused(tmp_path: Path) -> None:
    wide, narrow = build(Network("MobileNet", (("alpha", 0.5),)), 64, 3, 6, "xavier"), build(SMALL, 64, 3, 6, "xavier")
    path = tmp_path / "weights.npz"
    np.savez(path, **named_weights(wide))
    with pytest.raises(DataError, match=r"are not those of MobileNet_alpha0_25\.\n  - 0000-kernel 3x3x3x8 here, .*x16"):
        set_weights(narrow, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"weights.npz: can't be read as kept weights"):
        set_weights(wide, path)
    path.write_bytes(whole)
    set_weights(wide, path)


def test_input_scaling_is_the_networks_own() -> None:
    tiles = np.full((1, 2, 2, 3), 255.0, np.float32)
    assert np.allclose(scale_input(Network("MobileNet"), tiles.copy()), 1.0)
    assert np.allclose(
        scale_input(Network("ResNet50"), tiles.copy())[0, 0, 0], 255 - np.array([103.939, 116.779, 123.68])
    )


def test_names_and_identity_of_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.h5").write_bytes(b"1")
    assert [initialisation(name) for name in ("imagenet", "xavier", "folder/mine.h5")] == ["imagenet", "xavier", "mine"]
    before = weights_digest(str(tmp_path / "mine.h5"))
    (tmp_path / "mine.h5").write_bytes(b"2")
    assert weights_digest(str(tmp_path / "mine.h5")) != before
    with pytest.raises(UsageError, match=r"no such file. Allowed: imagenet, xavier, or the path"):
        weights_digest(str(tmp_path / "absent.h5"))
