"""The learning rate of each step."""

from __future__ import annotations

import math

from cellhpc.recipe import TrainSettings


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int, ranks: int = 1) -> float:
    """Learning rate of a step.

    Parameters
    ----------
    settings
        Of `[train]`.
    step
        Number of the step in its run, from 0.
    steps_per_epoch
        Steps in an epoch.
    ranks
        Processes that train the run.

    Notes
    -----
    The warm-up rises so that its last step has the full learning rate: a step of it has (step + 1) / steps of that.
    """
    rate = settings.learning_rate * (ranks if settings.scale_learning_rate else 1)
    warmup = settings.warmup_epochs * steps_per_epoch
    if settings.schedule == "step":
        rate *= settings.step_factor ** sum(step >= epoch * steps_per_epoch for epoch in settings.step_epochs)
    if step < warmup:
        return rate * min(1.0, (step + 1) / warmup)
    if settings.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (settings.epochs * steps_per_epoch - warmup)))
    return rate
