"""Keras backbones, their weights, and the head that is put on them.

`NETWORKS` is known without TensorFlow, so that a job file is checked and planned on a machine that has none.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from cellhpc.errors import DataError, UsageError, UserError

_FAMILIES: dict[str, tuple[str, ...]] = {
    "convnext": ("ConvNeXtBase", "ConvNeXtLarge", "ConvNeXtSmall", "ConvNeXtTiny", "ConvNeXtXLarge"),
    "densenet": ("DenseNet121", "DenseNet169", "DenseNet201"),
    "efficientnet": tuple(f"EfficientNetB{k}" for k in range(8)),
    "efficientnet_v2": tuple(f"EfficientNetV2{k}" for k in ("B0", "B1", "B2", "B3", "S", "M", "L")),
    "inception_resnet_v2": ("InceptionResNetV2",),
    "inception_v3": ("InceptionV3",),
    "mobilenet": ("MobileNet",),
    "mobilenet_v2": ("MobileNetV2",),
    "mobilenet_v3": ("MobileNetV3Large", "MobileNetV3Small"),
    "nasnet": ("NASNetLarge", "NASNetMobile"),
    "resnet": ("ResNet50", "ResNet101", "ResNet152"),
    "resnet_v2": ("ResNet50V2", "ResNet101V2", "ResNet152V2"),
    "vgg16": ("VGG16",),
    "vgg19": ("VGG19",),
    "xception": ("Xception",),
}
NETWORKS = {name: family for family, names in _FAMILIES.items() for name in names}
"""The networks of keras.applications, each with the module that holds its input scaling."""

_SIDES_PX = {"InceptionResNetV2": 299, "InceptionV3": 299, "Xception": 299, "NASNetLarge": 331}
WEIGHTLESS = ("imagenet", "xavier")
HEAD_DROPOUT, HEAD_LOGITS = "head_dropout", "logits"
"""Names of the layers that `build` puts on a backbone; the former is there only with dropout."""
NO_TENSORFLOW = "training needs TensorFlow, which isn't installed. In cellhpc's sources, type: pip install '.[cpu]'"


@dataclass(frozen=True)
class Network:
    """A network of keras.applications and the arguments of its constructor."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def side_px(self) -> int:
        """Side of the network's own square input, in pixels."""
        return _SIDES_PX.get(self.name, 224)

    @property
    def text(self) -> str:
        """The network as it is written in a job file, as `MobileNet(alpha=0.25)`."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments)
        return f"{self.name}({arguments})" if arguments else self.name

    @property
    def slug(self) -> str:
        """Name for folders and files, as `MobileNet-alpha0.25`."""
        return "-".join([self.name, *(f"{key}{value}" for key, value in self.arguments)])


def parse_network(text: str) -> Network:
    """Read a network's name with its arguments, as `ResNet50` or `MobileNet(alpha=0.25)`.

    Raises
    ------
    UsageError
        The text is neither, or keras.applications has no such network.
    """
    unreadable = UsageError(f"sweep.networks: {text!r} is no network. Write it as ResNet50 or MobileNet(alpha=0.25).")
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        name = ast.unparse(call.func if call else node)
        arguments = tuple((str(word.arg), ast.literal_eval(word.value)) for word in call.keywords) if call else ()
    except (SyntaxError, ValueError):
        raise unreadable from None
    if call and call.args:
        raise unreadable
    if name not in NETWORKS:
        raise UsageError(f"sweep.networks: keras.applications has no {name!r}. Allowed: {', '.join(sorted(NETWORKS))}.")
    return Network(name, arguments)


def initialisation(weights: str) -> str:
    """Short name of where training starts: `imagenet`, `xavier`, or the stem of the weights file."""
    return weights if weights in WEIGHTLESS else Path(weights).stem


def weights_digest(weights: str) -> str:
    """Identify the initial weights: their name, or the SHA-256 of the file.

    Raises
    ------
    UsageError
        There is no such file.
    """
    if weights in WEIGHTLESS:
        return weights
    path = Path(weights)
    if path.stem in WEIGHTLESS:
        raise UsageError(f"sweep.weights: {weights}: a file of this name would be taken for {path.stem}. Rename it.")
    if not path.is_file():
        raise UsageError(
            f"sweep.weights: {weights}: no such file. Allowed: imagenet, xavier, or the path of a .h5 file."
        )
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def build(
    network: Network,
    side_px: int,
    channels: int,
    classes: int,
    weights: str,
    dropout: float = 0.0,
    precision: str = "float32",
) -> Any:
    """Build a network with its head: global average pooling, dropout if wanted, and a dense layer of logits.

    Parameters
    ----------
    network, weights
        What to build and where to start: `imagenet` (Keras fetches or has cached the file), `xavier` (Glorot uniform,
        Keras's own initialisation), or the path of a file in keras.applications' layout without top.
    side_px, channels
        Shape of a tile: (side_px, side_px, channels).
    classes
        Number of logits.
    dropout
        Share of the features that the head does not see while it is trained.
    precision
        What the backbone computes with: `float32`, or `bfloat16` or `float16` with weights of float32.

    Returns
    -------
    keras.Model
        From float32 (n, side_px, side_px, channels) to float32 logits (n, classes).

    Raises
    ------
    UsageError
        The constructor refuses the arguments or the size.
    DataError
        The weights don't fit the network; the message says which layer and which shapes.
    """
    import keras

    constructor = getattr(keras.applications, network.name)
    extra = (
        {"include_preprocessing": False}
        if network.name.startswith(("EfficientNetV2", "MobileNetV3", "ConvNeXt"))
        else {}
    )
    arguments = {**extra, **dict(network.arguments)}
    if weights == "imagenet" and channels != 3:
        raise UsageError(
            f"ImageNet weights are for 3 inputs, and {network.slug} would have {channels}, one a channel. Choose "
            'three with train.inputs, as ["dna", "er+golgi", "actin"], or start from xavier.'
        )
    shape = (side_px, side_px, channels)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
    try:
        backbone = constructor(
            include_top=False,
            weights="imagenet" if weights == "imagenet" else None,
            input_shape=shape,
            pooling="avg",
            **arguments,
        )
    except (TypeError, ValueError) as fault:
        raise UsageError(
            f"keras.applications.{network.name} with input {shape} and {arguments or 'no arguments'}: {fault}"
        ) from None
    except Exception as fault:
        # Keras raises a bare Exception when its download of the weights fails.
        if weights != "imagenet":
            raise
        raise DataError(
            f"the ImageNet weights of {network.name} are neither cached nor to be had: {str(fault).splitlines()[0]}",
            remedy="Fetch the file where there is internet, and give its path in sweep.weights.",
        ) from None
    finally:
        keras.config.set_dtype_policy(before)
    if weights not in WEIGHTLESS:
        _load_weights(backbone, Path(weights), network)
    features = backbone.output
    if dropout:
        features = keras.layers.Dropout(dropout, name=HEAD_DROPOUT, dtype="float32")(features)
    logits = keras.layers.Dense(classes, name=HEAD_LOGITS, dtype="float32")(features)
    return keras.Model(backbone.input, logits, name=network.slug.replace("-", "_").replace(".", "_"))


def named_weights(model: Any) -> dict[str, np.ndarray]:
    """Weights of a model in its own order, each by its place and kind, as `0003-gamma`."""
    # Not by the layers' names: Keras counts those on over all that a process builds.
    return {f"{number:04d}-{weight.name}": weight.numpy() for number, weight in enumerate(model.weights)}


def set_weights(model: Any, path: Path) -> None:
    """Set all weights of a model to those of a file of `named_weights`.

    Raises
    ------
    DataError
        The file is missing, damaged, or of another network.
    """
    remedy = "Give the weights.npz of a run with this very network, classes and inputs."
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except Exception as fault:  # a damaged archive makes zipfile and NumPy raise nearly anything
        raise DataError(f"{path}: can't be read as kept weights: {fault}", remedy=remedy) from None
    there = [f"{name} {_shapes([array.shape])}" for name, array in stored.items()]
    wanted = [f"{name} {_shapes([array.shape])}" for name, array in named_weights(model).items()]
    if there != wanted:
        differing = [f"{mine} here, {other} there" for mine, other in zip_longest(wanted, there) if mine != other]
        raise DataError(f"{path}: {len(differing)} weights are not those of {model.name}.", differing, remedy)
    model.set_weights(list(stored.values()))


def scale_input(network: Network, tiles: Any) -> Any:
    """Scale float grey levels 0..255 (n, y, x, 3) as keras.applications defines it for the network."""
    import keras

    return getattr(keras.applications, NETWORKS[network.name]).preprocess_input(tiles)


def _load_weights(backbone: Any, path: Path, network: Network) -> None:
    """Load a legacy HDF5 file layer by layer, after a comparison that names the first layer that differs."""
    import h5py

    remedy = f"Give the file of {network.slug} without top, in the layout of keras.applications."
    layers = [layer for layer in backbone.layers if layer.weights]
    try:
        with h5py.File(path) as file:
            group = file.get("model_weights", file)
            stored = [(name, _stored_shapes(group[name])) for name in map(_text, group.attrs["layer_names"])]
    except (OSError, KeyError) as fault:
        raise DataError(
            f"{path}: not a weights file in the layout of keras.applications: {fault}", remedy=remedy
        ) from None
    stored = [(name, shapes) for name, shapes in stored if shapes]
    for position, (layer, (name, shapes)) in enumerate(zip(layers, stored, strict=False), start=1):
        wanted = [tuple(weight.shape) for weight in _legacy_order(layer)]
        if shapes != wanted:
            raise DataError(
                f"{path}: layer {position} is {name!r} with shapes {_shapes(shapes)}; "
                f"{network.slug} has {layer.name!r} with shapes {_shapes(wanted)} there.",
                remedy=remedy,
            )
    if len(stored) != len(layers):
        spare = (
            "with top?" if len(stored) > len(layers) else f"the first that is missing is {layers[len(stored)].name!r}"
        )
        raise DataError(
            f"{path}: holds {len(stored)} layers with weights, {network.slug} has {len(layers)} ({spare}).",
            remedy=remedy,
        )
    backbone.load_weights(path)


def _legacy_order(layer: Any) -> list[Any]:
    return [*layer.trainable_weights, *layer.non_trainable_weights]


def _stored_shapes(group: Any) -> list[tuple[int, ...]]:
    return [tuple(group[_text(name)].shape) for name in group.attrs["weight_names"]]


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def check(wanted: Sequence[tuple[str, int, int, str]]) -> None:
    """Build each network with its weights once, in a process of its own that is gone afterwards.

    What is wrong with a size, an argument or a weights file is found before hours of work and not after; and the
    weights that Keras fetches are there before many processes want them at once.

    Parameters
    ----------
    wanted
        Networks as text, each with the side of its tiles (pixels), its channels, and its weights.

    Raises
    ------
    UserError
        What `build` says, or that TensorFlow is missing.
    """
    done = subprocess.run(
        [sys.executable, "-m", "cellhpc.networks", json.dumps(list(wanted))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        said = done.stderr.strip() or "it said nothing"
        _, marked, message = said.rpartition("cellhpc: ")
        raise (UsageError if done.returncode == UsageError.exit_code else UserError)(message if marked else said)


def _check_here(wanted: Sequence[Sequence[Any]]) -> None:
    try:
        import keras
    except ImportError:
        raise UserError(NO_TENSORFLOW) from None
    for network, side_px, channels, weights in wanted:
        build(parse_network(network), side_px, channels, 2, weights)
        keras.backend.clear_session()


if __name__ == "__main__":
    try:
        _check_here(json.loads(sys.argv[1]))
    except UserError as fault:
        print(f"cellhpc: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
