"""Batch normalisation while a network is trained: of a rank's share, frozen, or over all ranks.

Keras spells it out in a dozen operations, each over all activations, which take a third of a small network's step.
Where the statistics are of a rank's own share, one operation of TensorFlow computes the same here, up to rounding.
"""

from __future__ import annotations

import functools
from typing import Any

from cellhpc.ranks import Ranks
from cellhpc.recipe import TrainSettings


def set_batch_norm(model: Any, settings: TrainSettings, ranks: Ranks) -> list[Any]:
    """Let the batch normalisation of a network do as the settings say.

    Parameters
    ----------
    model
        Of Keras; changed in place. What it can train is asked for after this.
    settings
        `batch_norm` and `batch_norm_momentum`.
    ranks
        The processes that train together.

    Returns
    -------
    list of tf.Variable
        Moving statistics that come to differ between ranks while all of the network is trained.
    """
    import keras

    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in layers:
        if settings.batch_norm_momentum is not None:
            layer.momentum = settings.batch_norm_momentum
        if settings.batch_norm == "frozen":
            layer.trainable = False  # Keras then also runs it in inference mode
        if settings.batch_norm == "synchronised" and ranks.size > 1:
            # Keras's own `synchronized` asks tf.distribute, and Horovod's layer fails with Keras 3.
            layer._moments = functools.partial(_moments_over_ranks, layer._moments, ranks)
        elif settings.batch_norm != "frozen" and layer.axis in (-1, 3) and not layer.renorm:
            layer.call = functools.partial(_fused, layer, layer.call)
    if settings.batch_norm != "batch":
        return []
    return [variable.value for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]


def _fused(layer: Any, call: Any, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
    """Do at once what the `call` of a layer does to (n, y, x, c) while it learns; anything else is left to that."""
    import tensorflow as tf

    if not (training and layer.trainable) or mask is not None or len(inputs.shape) != 4:
        return call(inputs, training=training, mask=mask)
    channels = inputs.shape[3]
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs,
        scale=tf.convert_to_tensor(layer.gamma) if layer.scale else tf.ones(channels),
        offset=tf.convert_to_tensor(layer.beta) if layer.center else tf.zeros(channels),
        mean=tf.zeros(0),
        variance=tf.zeros(0),
        epsilon=layer.epsilon,
        is_training=True,
    )
    count = tf.cast(tf.size(inputs) // channels, tf.float32)
    variance *= tf.maximum(count - 1, 1) / count  # the operation's is for n - 1 degrees of freedom
    for moving, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        moving.assign(moving * layer.momentum + value * (1.0 - layer.momentum))
    return outputs


def _moments_over_ranks(moments: Any, ranks: Ranks, inputs: Any, mask: Any) -> tuple[Any, Any]:
    """Mean and variance (c,) of the tiles of all ranks, each of which has as many.

    Every rank puts its moments into its own place of an array that is zero elsewhere; the sum over the ranks is all of
    them, from which the variance follows without the cancellation of E[x^2] - E[x]^2. The gradient of a mean over ranks
    is the mean over ranks of the gradients, as it has to be where gradients of the weights are averaged afterwards.
    (Horovod's all-gather would do for the values, but its gradient is too small by the number of ranks.)
    """
    import tensorflow as tf

    own = tf.stack(moments(inputs, mask))
    place = tf.one_hot(ranks.rank, ranks.size, dtype=own.dtype)[:, None, None]
    means, variances = tf.unstack(ranks.mean([place * own])[0] * ranks.size, axis=1)
    mean = tf.reduce_mean(means, 0)
    return mean, tf.reduce_mean(variances + tf.square(means - mean), 0)
