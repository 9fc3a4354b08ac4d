"""The graphs of a run: what one step of training computes, and one of prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cellhpc.inputs import prepare
from cellhpc.networks import HEAD_DROPOUT, HEAD_LOGITS, Network
from cellhpc.ranks import Ranks
from cellhpc.recipe import Part, TrainSettings

FEATURE_BYTES = 2**28
"""Features of all tiles that a process may keep, for each compiled network."""


def make_optimizer(settings: TrainSettings, variables: list[Any]) -> Any:
    """Make the optimiser of Keras variables; its own variables are what `clear_optimizer` sets."""
    import keras

    limits = {"weight_decay": settings.weight_decay or None, "global_clipnorm": settings.clip_norm}
    if settings.optimizer == "adamw":
        limits["weight_decay"] = settings.weight_decay
        optimizer = keras.optimizers.AdamW(settings.learning_rate, **limits)
    else:
        optimizer = keras.optimizers.SGD(settings.learning_rate, momentum=settings.momentum, **limits)
    # Kernels have two axes and more; biases, and the scales and shifts of normalisation, have one.
    optimizer.exclude_from_weight_decay([variable for variable in variables if len(variable.shape) < 2])
    if settings.precision == "float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(variables)
    return optimizer


def clear_optimizer(optimizer: Any) -> None:
    """Set an optimiser to its start: no moments, no steps, the first scale of the loss."""
    for variable in optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    if hasattr(optimizer, "dynamic_scale"):
        optimizer.dynamic_scale.assign(optimizer.initial_scale)


def head_layers(model: Any) -> list[Any]:
    """List the layers of a network's head: logits, and dropout where there is some."""
    return [layer for layer in model.layers if layer.name in (HEAD_DROPOUT, HEAD_LOGITS)]


def trained_variables(model: Any, part: Part) -> list[Any]:
    """List the Keras variables that learn while a part of a network is trained."""
    layers = head_layers(model) if part == "head" else [model]
    return [variable for layer in layers for variable in layer.trainable_variables]


def losses_of(targets: Any, logits: Any, smoothing: float) -> Any:
    """Cross entropy (n,) of logits (n, classes) and class numbers (n,), of which a share is spread over all classes."""
    import tensorflow as tf

    if not smoothing:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    classes = logits.shape[1]
    return tf.nn.softmax_cross_entropy_with_logits(
        tf.one_hot(targets, classes, on_value=1 - smoothing + smoothing / classes, off_value=smoothing / classes),
        logits,
    )


def thinned_kernels(kernel: np.ndarray, dropout: float, draws: int, seed: int) -> np.ndarray:
    """Make the kernels of networks whose heads don't see some features: what Monte Carlo dropout draws.

    Parameters
    ----------
    kernel
        Of the logits, float32 (d, classes).
    dropout
        Share of the features that are dropped; what is left counts 1 / (1 - dropout) times, as in training.
    draws, seed
        How many, and the run's seed. More draws begin with those of fewer.

    Returns
    -------
    ndarray
        float32 (d, draws * classes), draw by draw.
    """
    kept = np.random.default_rng([seed, 0, 0, 3]).random((draws, len(kernel))) >= dropout
    kernels = np.where(kept.T[:, :, None], kernel[:, None, :] / np.float32(1 - dropout), np.float32(0))
    return kernels.reshape(len(kernel), -1)


class Graphs:
    """What is computed for the runs of a network; each graph is traced at its first call.

    Parameters
    ----------
    network, model
        The network, and what `networks.build` made of it.
    optimizer
        What `make_optimizer` made.
    channels
        Names of the tiles' channels.
    side_px
        Side of the tiles.
    settings
        How to train.
    ranks
        The processes that train together.
    tiles
        How many there are, if all are in memory; else 0.
    """

    def __init__(
        self,
        network: Network,
        model: Any,
        optimizer: Any,
        channels: Sequence[str],
        side_px: int,
        settings: TrainSettings,
        ranks: Ranks,
        tiles: int = 0,
    ) -> None:
        self.network, self.model, self.optimizer, self.channels = network, model, optimizer, channels
        self.side_px, self.settings, self.ranks = side_px, settings, ranks
        self.views = 8 if settings.predict_rotations else 1
        """Orientations in which a tile is predicted."""
        self.cached = settings.fixed_features and 0 < tiles * self.views * self.width * 4 <= FEATURE_BYTES
        """Training and prediction take what `features` says of tiles, instead of tiles: it does not change, and that of
        all tiles is not large."""

    @cached_property
    def _backbone(self) -> Any:
        """From what the network sees to its features (n, d)."""
        import keras

        return keras.Model(self.model.input, head_layers(self.model)[0].input)

    @cached_property
    def _head(self) -> Any:
        """From features (n, d) to logits."""
        import keras

        return keras.Model(head_layers(self.model)[0].input, self.model.output)

    @property
    def width(self) -> int:
        """Features of a tile."""
        return int(head_layers(self.model)[0].input.shape[1])

    def training(self, part: Part) -> Any:
        """Make a step that trains a part of the network.

        Returns
        -------
        tf.function
            From a rank's share of a batch, uint8 tiles (n, y, x, c) or features (n, views, d), int32 class numbers
            (n,) and float32 weights (n,), an int32 seed (2,) and float32 numbers (2,) to the loss and these numbers,
            each the mean over the ranks.
        """
        import tensorflow as tf

        from cellhpc.augment import augment

        settings, ranks = self.settings, self.ranks
        trained = trained_variables(self.model, part)
        variables = [variable.value for variable in trained]
        forward = self._forward(part)
        share = settings.batch_size // ranks.size  # known sizes let TensorFlow do some sums once for all steps

        def differentiate(tiles: Any, targets: Any, weights: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(weights * losses_of(targets, forward(tiles), settings.label_smoothing))
                total = self.optimizer.scale_loss(tf.add_n([loss, *self.model.losses]))
            return loss, tape.gradient(total, variables)

        if settings.xla:
            differentiate = tf.function(differentiate, jit_compile=True)

        @tf.function(
            input_signature=[
                self._given(share),
                tf.TensorSpec((share,), tf.int32),
                tf.TensorSpec((share,), tf.float32),
                tf.TensorSpec((2,), tf.int32),
                tf.TensorSpec((2,), tf.float32),
            ]
        )
        def step(given: Any, targets: Any, weights: Any, seed: Any, asked: Any) -> Any:
            if self.cached:
                seen = given[:, 0]
            else:
                seen = self._prepare(augment(tf.cast(given, tf.float32), settings.augment, seed))
            loss, gradients = differentiate(seen, targets, weights)
            # These travel with the gradients: all ranks see the same, and stop or write at the same step.
            if settings.compression == "none":
                *gradients, loss, asked = ranks.mean([*gradients, loss, asked])
            else:
                gradients = ranks.mean(gradients, fp16=True)
                loss, asked = ranks.mean([loss, asked])
            self.optimizer.apply(gradients, trained)
            return tf.concat([[loss], asked], 0)

        return step

    def prediction(self) -> Any:
        """Make a step from uint8 tiles (n, y, x, c), or features, to float32 probabilities (n, classes)."""
        import tensorflow as tf

        whole = self._head if self.cached else self.model

        @tf.function(input_signature=[self._given()])
        def predict(given: Any) -> Any:
            views = [tf.nn.softmax(whole(view, training=False)) for view in self._views(given)]
            return tf.add_n(views) / float(len(views))

        return predict

    def features(self) -> Any:
        """Make a step from uint8 tiles (n, y, x, c) to the float32 features (n, views, d) of a tile's orientations."""
        import tensorflow as tf

        @tf.function(input_signature=[self._tiles()])
        def extract(tiles: Any) -> Any:
            views = [self._backbone(view, training=False) for view in self._orientations(tiles)]
            return tf.stack([tf.cast(view, tf.float32) for view in views], 1)

        return extract

    def draws(self) -> Any:
        """Make a step from tiles, or features, to float32 probabilities (n, draws, classes), one a thinned head.

        The step also takes the kernels of `thinned_kernels`: the backbone, which does not differ, runs once.
        """
        import tensorflow as tf

        bias = self.model.get_layer(HEAD_LOGITS).bias.value

        @tf.function(input_signature=[self._given(), tf.TensorSpec((self.width, None), tf.float32)])
        def draw(given: Any, kernels: Any) -> Any:
            shape = (tf.shape(given)[0], -1, bias.shape[0])
            seen = [view if self.cached else self._backbone(view, training=False) for view in self._views(given)]
            views = [tf.nn.softmax(tf.reshape(tf.cast(one, tf.float32) @ kernels, shape) + bias) for one in seen]
            return tf.add_n(views) / float(len(views))

        return draw

    def attribution(self) -> Any:
        """Make a step that says which pixels spoke for a class: Grad-CAM (Selvaraju et al. 2017).

        The last maps of the backbone, what its global average pooling takes, are summed, each weighted by the mean
        gradient of the class's logit with respect to it; what is below zero is cut off. With a dense layer alone behind
        the pooling, these weights are the layer's, over the number of places in a map: it is class activation mapping
        (Zhou et al. 2016) then. Of ConvNeXt, a normalisation lies between.

        Returns
        -------
        tf.function
            From uint8 tiles (n, y, x, c) and int32 class numbers (n,) to float32 maps (n, y, x): bilinear between the
            places of the last maps, the highest place of each tile 1; 0 where nothing speaks for the class.
        """
        import keras
        import tensorflow as tf

        pooling = [layer for layer in self.model.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D)][-1]
        backbone, rest = keras.Model(self.model.input, pooling.input), keras.Model(pooling.input, self.model.output)

        @tf.function(input_signature=[self._tiles(), tf.TensorSpec((None,), tf.int32)])
        def attribute(tiles: Any, classes: Any) -> Any:
            last = backbone(self._prepare(tf.cast(tiles, tf.float32)), training=False)
            with tf.GradientTape() as tape:
                tape.watch(last)
                spoke = tf.gather(rest(last, training=False), classes, batch_dims=1)
            weights = tf.reduce_mean(tape.gradient(spoke, last), (1, 2), keepdims=True)
            places = tf.nn.relu(tf.reduce_sum(tf.cast(weights * last, tf.float32), 3, keepdims=True))
            maps = tf.image.resize(places, (self.side_px, self.side_px))[..., 0]
            return tf.math.divide_no_nan(maps, tf.reduce_max(maps, (1, 2), keepdims=True))

        return attribute

    def _tiles(self, count: int | None = None) -> Any:
        """Say what a batch of tiles is."""
        import tensorflow as tf

        return tf.TensorSpec((count, self.side_px, self.side_px, len(self.channels)), tf.uint8)

    def _given(self, count: int | None = None) -> Any:
        """Say what training and prediction take: a batch of tiles, or what the backbone said of them."""
        import tensorflow as tf

        return tf.TensorSpec((count, self.views, self.width), tf.float32) if self.cached else self._tiles(count)

    def _views(self, given: Any) -> list[Any]:
        """Give what the network, or its head, sees of what a prediction takes."""
        import tensorflow as tf

        return tf.unstack(given, axis=1) if self.cached else self._orientations(given)

    def _orientations(self, tiles: Any) -> list[Any]:
        """Make of uint8 tiles (n, y, x, c) what the network sees of them: as they are, or in each orientation."""
        import tensorflow as tf

        from cellhpc.augment import orient

        tiles = tf.cast(tiles, tf.float32)
        count = tf.shape(tiles)[0]
        return [self._prepare(orient(tiles, tf.fill((count,), k))) for k in range(self.views)]

    def _prepare(self, tiles: Any) -> Any:
        """Make float grey levels (n, y, x, c) what the network sees."""
        return prepare(tiles, self.channels, self.settings.inputs, self.network, self.settings.input_scaling)

    def _forward(self, part: Part) -> Callable[[Any], Any]:
        """From what the network, or its head, sees to logits, while a part is trained."""
        if part == "all":
            return lambda tiles: self.model(tiles, training=True)
        if self.cached:
            return lambda features: self._head(features, training=True)
        return lambda tiles: self._head(self._backbone(tiles, training=False), training=True)
