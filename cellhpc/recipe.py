"""`[train]` of the job file: how one network is fitted to one fold, and presets of that."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cellhpc.errors import listing
from cellhpc.sections import Settings


class AugmentSettings(Settings):
    """`[train.augment]`: what happens to each tile of a batch, in this order; what is left out does not happen."""

    rotations: bool = False
    """One of the eight rotations and mirrors."""
    gains: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Each channel times one of these factors; `[1, 1, 0.75, 1.25]` leaves half of the channels as they are."""
    blur: float = Field(0.0, ge=0, le=1)
    """Probability of a mean of 3x3 pixels."""
    noise: float = Field(0.0, ge=0, le=1)
    """Probability of Gaussian noise."""
    noise_variance: float = Field(50.0, gt=0)
    """Variance of the noise, in squared grey levels of 0..255."""


AUGMENTATIONS = MappingProxyType(
    {
        "none": AugmentSettings(),
        "rotations": AugmentSettings(rotations=True),
        "kensert2019": AugmentSettings(rotations=True, gains=(1, 1, 0.75, 1.25), blur=0.5, noise=0.5),
    }
)
"""Augmentations that have a name."""


def _named(value: object) -> object:
    """Put the table in the place of its name."""
    if not isinstance(value, str):
        return value
    if value not in AUGMENTATIONS:
        raise ValueError(f"Allowed are {listing(AUGMENTATIONS)}, and a table [train.augment]")
    return AUGMENTATIONS[value]


Part = Literal["head", "all"]
"""What is trained in an epoch."""

PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "none": {},
        "kensert2019": {
            "epochs": 7,
            "batch_size": 32,
            "learning_rate": 5e-4,
            "schedule": "constant",
            "optimizer": "sgd",
            "momentum": 0.9,
            "class_weights": True,
            "augment": "kensert2019",
            "trained": "all",
            "input_scaling": "raw",
        },
        "fast": {
            "epochs": 5,
            "batch_size": 32,
            "learning_rate": 0.01,
            "schedule": "cosine",
            "optimizer": "adamw",
            "augment": "none",
            "trained": "head",
            "batch_norm": "frozen",
            "input_scaling": "keras",
        },
        "best": {
            "epochs": 8,
            "batch_size": 32,
            "learning_rate": 0.01,
            "schedule": "cosine",
            "augment": "rotations",
            "batch_norm_momentum": 0.9,
            "input_scaling": "keras",
            "predict_rotations": True,
        },
    }
)
"""What `train.preset` gives to the keys that are left out."""


_OF_THE_STEPS = (
    "preset", "epochs", "learning_rate", "scale_learning_rate", "schedule", "step_epochs", "step_factor",
    "warmup_epochs", "class_weights", "head_epochs",
)  # fmt: skip


class TrainSettings(Settings):
    """`[train]`: how one network is fitted to one fold. Everything but `preset` changes the result.

    On a CPU, the same settings, ranks and threads give the same numbers to the last digit, for each value below but
    `xla`; on a GPU, TensorFlow is asked for the same, and the kernels of another model of GPU round otherwise.
    """

    preset: Literal["none", "kensert2019", "fast", "best"] = "none"
    """Other defaults for the keys that are left out; those that are given win, and the study's `job.json` shows what
    came out. `none`: the defaults below. `kensert2019`: the settings in the paper's code when its predictions were
    committed. `fast`: a baseline; the head alone learns, on a backbone that stays as it was pre-trained. `best`: what
    was chosen within two halves of the compounds of 660 fields of BBBC021, with MobileNet-0.25 at 128 pixels
    (`tests/bench/inner_choice.py` says how, `tests/bench/real.py` what it reaches, and what without that knowledge)."""
    epochs: int = Field(10, ge=1)
    """Epochs, fixed before training or chosen by `[search]`: the held-out compound never chooses."""
    batch_size: int = Field(32, ge=1)
    """Tiles in one step, all ranks together."""

    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate, before `schedule`, `warmup_epochs` and `scale_learning_rate` change it."""
    scale_learning_rate: bool = False
    """Multiply the learning rate by the number of ranks, for batches that grew with it (Goyal et al. 2017)."""
    schedule: Literal["constant", "step", "cosine"] = "constant"
    """Learning rate over the steps: constant; times `step_factor` after each of `step_epochs`; or half a cosine from
    the end of the warm-up down to zero."""
    step_epochs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """With `schedule = "step"`, the epochs after which the learning rate is multiplied."""
    step_factor: float = Field(0.1, gt=0)
    """With `schedule = "step"`, by how much."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs, or a part of one, in which the learning rate rises linearly from nearly nothing."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent with momentum, or AdamW (Loshchilov & Hutter 2019; decays of moments 0.9, 0.999)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of stochastic gradient descent."""
    weight_decay: float = Field(0.0, ge=0)
    """In each step weights shrink by this times the learning rate, apart from the gradient (decoupled), with both
    optimisers. Only kernels do: no biases, no batch normalisation, and nothing that is not trained."""
    clip_norm: float | None = Field(None, gt=0)
    """Scale gradients down to this norm over all of them together, after they are averaged over the ranks."""

    class_weights: bool = True
    """Weight a tile's loss by n / (classes * n_class), of the classes that a fold trains on."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all classes."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the features that the head does not see, drawn anew for each tile of a step."""
    dropout_draws: int = Field(0, ge=0, le=1000)
    """With dropout: when a run ends, predict the held-out tiles so many times more with features dropped, to learn how
    unsure the network is (Monte Carlo dropout, Gal & Ghahramani 2016). A draw is a network of its own: it drops the
    same features of all tiles, and of all runs with the same seed. They are in `draws.parquet`; the predictions drop
    nothing. The backbone, whose own dropout is off, runs once for all draws."""
    augment: Annotated[AugmentSettings, BeforeValidator(_named)] = AUGMENTATIONS["kensert2019"]
    """A name or a table. `none`; `rotations`: one of eight rotations and mirrors; `kensert2019`: these, channel gain,
    blur and noise."""

    trained: Literal["all", "head", "head_first"] = "all"
    """What learns: the whole network, as in the paper; its head alone; or the head alone in the first `head_epochs` and
    then all, with an optimiser that starts anew. While the head alone learns, the backbone predicts: its weights and
    statistics stay bit for bit, and its own dropout is off. If it is the head alone to the end, without augmentation
    and with all tiles in memory, the backbone runs once for each tile, for all epochs and runs of a process."""
    head_epochs: int = Field(1, ge=1)
    """With `trained = "head_first"`, the epochs of the head alone."""
    batch_norm: Literal["batch", "frozen", "synchronised"] = "batch"
    """What batch normalisation takes while all is trained: statistics of a rank's share of the batch; those that came
    with the weights, where it also does not learn; or statistics of the batch of all ranks."""
    batch_norm_momentum: float | None = Field(None, ge=0, lt=1)
    """Momentum of the moving statistics of batch normalisation; by default the network's own (often 0.99)."""

    inputs: tuple[str, ...] = Field((), max_length=5)
    """What a network sees at each of its inputs: a channel, the mean of some (`"er+golgi"`), or nothing (`""`).
    ImageNet weights want three, so `["dna", "er+golgi", "actin"]` of four channels. By default a screen's channels in
    their order, and nothing at the rest of three."""
    input_scaling: Literal["raw", "keras"] = "raw"
    """`raw`: the network sees 0..255, as in the paper; `keras`: scaled as keras.applications does for the network."""
    predict_rotations: bool = False
    """Average the predictions of a tile over its eight rotations and mirrors."""
    window_tiles: int | None = Field(None, ge=0)
    """Tiles of a shuffled window: they are read from their shards, a window after the other, and a host holds two; the
    more, the better shuffled. With 0, all tiles are in memory. By default they are if they fit, else windows have the
    largest power of two that fits, at most 8,192; the plan says which. As it changes the order of tiles, a study keeps
    what its first training began with."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers that the backbone computes with (Keras's mixed precision); weights, logits, loss and probabilities are
    float32 always. `float16` scales the loss dynamically and skips steps whose gradients overflow. Both halve memory on
    GPUs and are fast on recent ones; most CPUs are slower with them."""
    xla: bool = False
    """Compile forward and backward pass with XLA; the ranks' means stay outside. The first step takes longer. XLA does
    not promise the same numbers on another machine, nor after an update."""
    compression: Literal["none", "fp16"] = "none"
    """Send gradients between ranks as 16-bit numbers: half the traffic, and what is below 6e-8 is lost."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        name = given.get("preset") if isinstance(given, dict) else None
        return {**PRESETS[name], **given} if isinstance(name, str) and name in PRESETS else given

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if (self.schedule == "step") != bool(self.step_epochs):
            raise ValueError('schedule = "step" and step_epochs go together, as step_epochs = [4, 8]')
        if list(self.step_epochs) != sorted(set(self.step_epochs)) or self.step_epochs[-1:] >= (self.epochs,):
            raise ValueError(
                f"step_epochs is {list(self.step_epochs)}; allowed are rising numbers below epochs ({self.epochs})"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs:g}; it must be below epochs ({self.epochs})")
        if self.trained == "head_first" and self.head_epochs >= self.epochs:
            raise ValueError(f"head_epochs is {self.head_epochs}; it must be below epochs ({self.epochs})")
        if self.dropout_draws and not self.dropout:
            raise ValueError(
                f"dropout_draws is {self.dropout_draws} and dropout is 0: all draws would be the same; set dropout, as "
                "dropout = 0.3"
            )
        if self.xla and self.batch_norm == "synchronised":
            raise ValueError(
                'xla and batch_norm = "synchronised" exclude each other: XLA can\'t wait for other ranks amid a pass'
            )
        return self

    @property
    def fixed_features(self) -> bool:
        """Whether the backbone says the same of a tile in every step of every run that starts with its weights."""
        how = self.augment
        return self.trained == "head" and not (how.rotations or how.gains or how.blur or how.noise)

    def identity(self) -> dict[str, Any]:
        """Give what the digest of a run covers: not where settings came from; in memory is in memory."""
        return {**self.model_dump(mode="json", exclude={"preset"}), "window_tiles": self.window_tiles or None}

    def graph(self) -> TrainSettings:
        """Give these settings with the defaults for those that only the steps know: what a compiled network is of."""
        return self.model_copy(update={key: type(self).model_fields[key].default for key in _OF_THE_STEPS})

    def part(self, epoch: int) -> Part:
        """Say what is trained in an epoch, counted from 1."""
        if self.trained == "head_first":
            return "head" if epoch <= self.head_epochs else "all"
        return self.trained
