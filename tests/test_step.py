from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from cellhpc.attempts import finished
from cellhpc.checkpoint import CHECKPOINT, read_checkpoint
from cellhpc.ranks import OneRank
from cellhpc.recipe import TrainSettings
from cellhpc.step import clear_optimizer, head_layers, losses_of, make_optimizer
from cellhpc.train import Interrupted, RunFailed, Trainer, Watch, train_run
from tests import small
from tests.test_train import MOBILENET, outputs, same_run


def settings(**keys: Any) -> TrainSettings:
    return TrainSettings.model_validate({**small.SETTINGS.model_dump(), **keys})


def trainer(network: str = MOBILENET, per_compound: int = 4, **keys: Any) -> Trainer:
    data, _ = small.data(per_compound=per_compound)
    return Trainer(network, data, settings(**keys), OneRank())


def fit(of: Trainer) -> tuple[list[float], np.ndarray]:
    """Losses of the epochs, and probabilities."""
    _, folds = small.data(per_compound=4)
    history, predictions = of.fit(small.run(folds, of.network.text), folds)
    return [epoch["loss"] for epoch in history], predictions.filter(like="p_").to_numpy()


def weights_by_part(of: Trainer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights of the backbone and of the head."""
    head = {id(weight) for layer in head_layers(of.model) for weight in layer.weights}
    return tuple(
        [weight.numpy() for weight in of.model.weights if (id(weight) in head) == wanted] for wanted in (False, True)
    )


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> list[bool]:
    return [np.array_equal(first, second) for first, second in zip(one, other, strict=True)]


class Plain:
    """The optimisers in NumPy, for a kernel and a bias."""

    def __init__(self, of: TrainSettings, values: list[np.ndarray]) -> None:
        self.of, self.values, self.steps = of, [value.astype(float) for value in values], 0
        self.first, self.second = ([np.zeros_like(value) for value in self.values] for _ in range(2))

    def apply(self, gradients: list[np.ndarray], rate: float) -> None:
        self.steps += 1
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        scale = min(1.0, self.of.clip_norm / norm) if self.of.clip_norm else 1.0
        for number, gradient in enumerate(gradients):
            decay = self.of.weight_decay if self.values[number].ndim > 1 else 0.0
            self.values[number] *= 1 - rate * decay
            if self.of.optimizer == "sgd":
                self.first[number] = self.of.momentum * self.first[number] - rate * scale * gradient
                self.values[number] += self.first[number]
                continue
            self.first[number] = 0.9 * self.first[number] + 0.1 * scale * gradient
            self.second[number] = 0.999 * self.second[number] + 0.001 * (scale * gradient) ** 2
            mean, square = self.first[number] / (1 - 0.9**self.steps), self.second[number] / (1 - 0.999**self.steps)
            self.values[number] -= rate * mean / (np.sqrt(square) + 1e-7)


@pytest.mark.parametrize(
    "keys",
    [
        {"weight_decay": 0.5},
        {"clip_norm": 0.7},
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "weight_decay": 0.5, "clip_norm": 0.7},
        {"optimizer": "adamw", "weight_decay": 0.5, "precision": "float16"},
    ],
)
def test_optimisers_are_those_of_their_papers(keys: dict[str, Any]) -> None:
    of = settings(**keys)
    random = np.random.default_rng(0)
    values = [random.normal(size=shape).astype(np.float32) for shape in ((3, 2), (2,))]
    variables = [keras.Variable(value) for value in values]
    optimizer, plain = make_optimizer(of, variables), Plain(of, values)
    clear_optimizer(optimizer)
    for step in range(5):
        rate = 0.1 / (step + 1)
        gradients = [random.normal(size=value.shape).astype(np.float32) for value in values]
        optimizer.learning_rate.assign(rate)
        scale = float(optimizer.scale_loss(tf.constant(1.0)))
        optimizer.apply([tf.constant(gradient * scale) for gradient in gradients], variables)
        plain.apply(gradients, rate)
    for variable, value in zip(variables, plain.values, strict=True):
        assert np.allclose(variable.numpy(), value, atol=1e-4)  # 1 - 0.999 has four digits in float32


def test_an_overflow_of_float16_skips_the_step_and_halves_the_scale() -> None:
    variable = keras.Variable(np.ones((2, 2), np.float32))
    optimizer = make_optimizer(settings(precision="float16"), [variable])
    clear_optimizer(optimizer)
    optimizer.learning_rate.assign(1.0)
    optimizer.apply([tf.fill((2, 2), np.inf)], [variable])
    assert float(optimizer.dynamic_scale) == 2.0**14
    assert np.array_equal(variable, np.ones((2, 2)))
    clear_optimizer(optimizer)
    assert float(optimizer.dynamic_scale) == 2.0**15


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_cross_entropy_with_a_share_for_every_class(smoothing: float) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    targets = np.array([0, 3, 1, 1, 2])
    wanted = (1 - smoothing) * np.eye(4)[targets] + smoothing / 4
    logarithms = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    made = losses_of(tf.constant(targets, tf.int32), tf.constant(logits), smoothing)
    assert np.allclose(made, -(wanted * logarithms).sum(1), atol=1e-6)


def test_a_head_alone_is_softmax_regression_on_the_features_of_a_backbone_that_stays_bit_for_bit() -> None:
    """EfficientNet has batch statistics and dropout. One batch is all tiles, so that their order is nothing."""
    of = trainer("EfficientNetB0", trained="head", batch_size=32, epochs=3, learning_rate=3.0, class_weights=False)
    _, folds = small.data(per_compound=4)
    of._reset(small.run(folds, of.network.text), Watch())
    backbone, (kernel, bias) = weights_by_part(of)
    drawn = [layer.seed_generator.state.numpy() for layer in of.model.layers if hasattr(layer, "seed_generator")]
    losses, probabilities = fit(of)
    assert all(equal(backbone, weights_by_part(of)[0]))
    states = [layer.seed_generator.state.numpy() for layer in of.model.layers if hasattr(layer, "seed_generator")]
    assert len(drawn) > 5
    assert all(equal(drawn, states))
    features = keras.Model(of.model.input, head_layers(of.model)[0].input)
    seen = features(of.data.pixels.astype(np.float32), training=False).numpy()
    training = folds.training(of.data.tiles, folds.folds[0])
    held_out = folds.held_out(of.data.tiles, folds.folds[0])
    wanted, targets = [], np.eye(3)[of.data.targets[training]]
    plain = Plain(of.settings, [kernel, bias])
    for _ in range(3):
        odds = np.exp(seen[training] @ plain.values[0] + plain.values[1])
        guess = odds / odds.sum(1, keepdims=True)
        wanted.append(-np.log(guess[targets == 1]).mean())
        error = (guess - targets) / len(targets)
        plain.apply([seen[training].T @ error, error.sum(0)], 3.0)
    odds = np.exp(seen[held_out] @ plain.values[0] + plain.values[1])
    assert np.allclose(losses, wanted, rtol=1e-4)
    assert np.allclose(probabilities, odds / odds.sum(1, keepdims=True), atol=1e-4)
    assert losses[0] - losses[2] > 5e-3  # the tolerances are small against what was learnt


def test_what_is_frozen_has_neither_decay_nor_optimiser_until_all_is_trained() -> None:
    of = trainer(trained="head_first", head_epochs=2, epochs=3, optimizer="adamw", weight_decay=0.1)
    _, folds = small.data(per_compound=4)
    of._reset(small.run(folds, MOBILENET), Watch())
    start = weights_by_part(of)
    after = []
    agree = of._agree
    of._agree = lambda epoch: (after.append(weights_by_part(of)), agree(epoch))  # type: ignore[method-assign]
    fit(of)
    assert len(after) == 3
    assert all(equal(start[0], after[0][0]))
    assert all(equal(start[0], after[1][0]))
    assert not any(equal(start[1], after[0][1]))
    kernels = [array.ndim > 1 for array in start[0]]
    assert not any(np.array(equal(after[1][0], after[2][0]))[kernels])
    assert int(of.optimizer.iterations) == 2  # of the last epoch: it starts anew with what it then trains


def test_frozen_batch_normalisation_stays_and_all_else_learns() -> None:
    of = trainer(batch_norm="frozen", weight_decay=0.1, batch_size=32, epochs=1)
    _, folds = small.data(per_compound=4)
    of._reset(small.run(folds, MOBILENET), Watch())
    layers = [layer for layer in of.model.layers if layer.weights]
    start = [layer.get_weights() for layer in layers]
    (loss,), _ = fit(of)
    for layer, before in zip(layers, start, strict=True):
        stayed = equal(before, layer.get_weights())
        assert all(stayed) if isinstance(layer, keras.layers.BatchNormalization) else not any(stayed), layer.name
    # In training the network was the one that predicts.
    of._reset(small.run(folds, MOBILENET), Watch())
    training = folds.training(of.data.tiles, folds.folds[0])
    logits = of.model(of.data.pixels[training].astype(np.float32), training=False)
    targets = of.data.targets[training]
    losses = losses_of(targets, logits, 0.0) * len(targets) / 3 / np.bincount(targets)[targets]
    assert loss == pytest.approx(float(np.mean(losses)), rel=1e-5)


EVERYTHING = {
    "epochs": 3, "trained": "head_first", "optimizer": "adamw", "weight_decay": 0.01, "clip_norm": 1.0,
    "dropout": 0.5, "label_smoothing": 0.1, "warmup_epochs": 1.5, "augment": {"gains": [1, 0.9], "noise": 0.5},
}  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        {**EVERYTHING, "precision": "float16"},
        {"epochs": 2, "schedule": "step", "step_epochs": [1], "dropout": 0.3, "precision": "bfloat16"},
    ],
    ids=["float16", "bfloat16"],
)
def test_a_run_that_is_stopped_after_every_step_is_the_whole_run(keys: dict[str, Any], tmp_path: Path) -> None:
    of = trainer(**keys)
    computes = {layer.name: layer.compute_dtype for layer in of.model.layers}
    assert computes.pop("logits") == computes.pop("head_dropout") == "float32"
    assert set(computes.values()) == {of.settings.precision}
    assert {weight.dtype for weight in of.model.weights} == {"float32"}
    assert keras.config.dtype_policy().name == "float32"
    _, folds = small.data(per_compound=4)
    run = small.run(folds, MOBILENET)
    train_run(of, run, folds, tmp_path / "whole")
    for _ in range(2 * of.settings.epochs):
        with pytest.raises(Interrupted):
            train_run(of, run, folds, tmp_path / "parts", small.After(0))
    train_run(of, run, folds, tmp_path / "parts")
    same_run(outputs(tmp_path / "whole" / run.id), outputs(tmp_path / "parts" / run.id))


def one_step(**keys: Any) -> tuple[float, np.ndarray]:
    """One step with all tiles: loss, and how it changed the weights."""
    of = trainer(batch_size=32, epochs=1, **keys)
    of._reset(small.run(small.data(per_compound=4)[1], MOBILENET), Watch())
    before = [weight.numpy() for weight in of.model.trainable_variables]
    (loss,), _ = fit(of)
    after = zip(of.model.trainable_variables, before, strict=True)
    return loss, np.concatenate([(weight.numpy() - start).ravel() for weight, start in after])


def test_xla_computes_the_same_step_up_to_rounding() -> None:
    """This network divides by tiny deviations: rounding grows in it a thousandfold."""
    loss, change = one_step()
    compiled_loss, compiled = one_step(xla=True)
    assert compiled_loss == pytest.approx(loss, rel=1e-3)
    assert compiled_loss != loss  # else it was not compiled
    assert change @ compiled > 0.99 * np.linalg.norm(change) * np.linalg.norm(compiled)


class TestNotFinite:
    RUN = small.run(small.data(per_compound=4)[1], MOBILENET)
    FOLDS = small.data(per_compound=4)[1]

    def test_the_last_good_checkpoint_stays(self, tmp_path: Path) -> None:
        keys = {"epochs": 3, "schedule": "step", "step_epochs": [1], "step_factor": 1e38}
        watch = small.After(99, checkpoint_seconds=0)
        of = trainer(**keys)
        for _ in range(2):  # again: the run goes on from there, and ends there
            with pytest.raises(RunFailed, match=r" at epoch 2, step \d with learning rate 1e\+36\. Lower train\.learn"):
                train_run(of, self.RUN, self.FOLDS, tmp_path, watch)
        assert finished(tmp_path / self.RUN.id) is None
        kept = sorted(tmp_path.rglob(CHECKPOINT))
        assert kept
        for path in kept:
            about, arrays = read_checkpoint(path)
            assert about["progress"]["epoch"] == 2 or about["progress"]["step"] > 0
            assert all(np.isfinite(array).all() for array in arrays.values())

    def test_a_loss_that_is_still_finite_does_not_let_lost_weights_through(self, tmp_path: Path) -> None:
        of = trainer(learning_rate=3e38, weight_decay=1e3, batch_size=32, epochs=1)
        with pytest.raises(
            RunFailed, match=r"a weight is not finite at epoch 1, step 1 with learning rate 3e\+38\. Low"
        ):
            train_run(of, self.RUN, self.FOLDS, tmp_path, small.After(99, checkpoint_seconds=0))
        assert not list(tmp_path.rglob(CHECKPOINT))
        with pytest.raises(RunFailed, match=r"a predicted probability is not finite at epoch 1, step 1"):
            train_run(of, self.RUN, self.FOLDS, tmp_path)
        assert finished(tmp_path / self.RUN.id) is None
