"""The graphs of a run: what one step of training computes, and one of prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cellhpc.inputs import prepare
from cellhpc.networks import HEAD_DROPOUT, HEAD_LOGITS, Network
from cellhpc.ranks import Ranks
from cellhpc.recipe import Part, TrainSettings


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
    ) -> None:
        self.network, self.model, self.optimizer, self.channels = network, model, optimizer, channels
        self.side_px, self.settings, self.ranks = side_px, settings, ranks

    def training(self, part: Part) -> Any:
        """Make a step that trains a part of the network.

        Returns
        -------
        tf.function
            From a rank's share of a batch, uint8 tiles (n, y, x, c), int32 class numbers (n,) and float32 weights
            (n,), an int32 seed (2,) and float32 numbers (2,) to the loss and these numbers, each the mean over the
            ranks.
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
                tf.TensorSpec((share, self.side_px, self.side_px, len(self.channels)), tf.uint8),
                tf.TensorSpec((share,), tf.int32),
                tf.TensorSpec((share,), tf.float32),
                tf.TensorSpec((2,), tf.int32),
                tf.TensorSpec((2,), tf.float32),
            ]
        )
        def step(tiles: Any, targets: Any, weights: Any, seed: Any, asked: Any) -> Any:
            tiles = self._prepare(augment(tf.cast(tiles, tf.float32), settings.augment, seed))
            loss, gradients = differentiate(tiles, targets, weights)
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
        """Make a step from uint8 tiles (n, y, x, c) to float32 probabilities (n, classes)."""
        import tensorflow as tf

        from cellhpc.augment import orient

        @tf.function(input_signature=[tf.TensorSpec((None, self.side_px, self.side_px, len(self.channels)), tf.uint8)])
        def predict(tiles: Any) -> Any:
            tiles = tf.cast(tiles, tf.float32)
            orientations = range(8) if self.settings.predict_rotations else range(1)
            count = tf.shape(tiles)[0]
            views = [
                tf.nn.softmax(self.model(self._prepare(orient(tiles, tf.fill((count,), k))), training=False))
                for k in orientations
            ]
            return tf.add_n(views) / float(len(orientations))

        return predict

    def _prepare(self, tiles: Any) -> Any:
        """Make float grey levels (n, y, x, c) what the network sees."""
        return prepare(tiles, self.channels, self.settings.inputs, self.network, self.settings.input_scaling)

    def _forward(self, part: Part) -> Callable[[Any], Any]:
        """From what the network sees to logits, while a part is trained."""
        import keras

        if part == "all":
            return lambda tiles: self.model(tiles, training=True)
        features = head_layers(self.model)[0].input
        backbone, head = keras.Model(self.model.input, features), keras.Model(features, self.model.output)
        return lambda tiles: head(backbone(tiles, training=False), training=True)
