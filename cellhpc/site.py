"""The site file: where and as whom jobs run. One file for a cluster, the same for every study.

A site file is TOML with the sections `[slurm]`, `[convert]`, `[train]`, `[aggregate]`, `[container]`, `[scratch]` and
`[measured]`. Nothing in it changes a result: that is the job file's, `sweep.ranks` included. Examples lie in `slurm/`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cellhpc.sections import Settings, UserPath, expand_variables, load, parse


def _minutes(value: object) -> object:
    """Read Slurm's time limits: minutes, `[D-]HH:MM:SS` or `D-HH[:MM]`; a rest of seconds counts as a minute."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?|(\d+)-(\d+)", value)
    if match is None:
        raise ValueError('a time limit is written "HH:MM:SS", "D-HH:MM:SS", or as a number of minutes')
    days, first, second, third, only_days, only_hours = (int(part) if part else 0 for part in match.groups())
    if match.group(5):
        return (only_days * 24 + only_hours) * 60
    if match.group(4) or match.group(1):
        return (days * 24 + first) * 60 + second + (third > 0)
    return first + (second > 0)  # MM:SS


Minutes = Annotated[int, BeforeValidator(_minutes), Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
ANY_NETWORK = "any"
"""In the place of a network, what holds for all that are not named."""
Speeds = Annotated[
    dict[str, Positive],
    BeforeValidator(lambda value: {ANY_NETWORK: value} if isinstance(value, int | float) else value),
]
Expanded = Annotated[str, BeforeValidator(lambda value: expand_variables(value) if isinstance(value, str) else value)]


class Placement(Settings):
    """What Slurm is told of where a job belongs; in `[slurm]` for all stages, in a stage's section for that stage."""

    account: Expanded | None = None
    """Account that is charged."""
    partition: str | None = None
    """Partition, or several with commas; without it, the cluster's default."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    reservation: str | None = None
    """Reservation to run in."""
    exclude: str | None = None
    """Nodes to avoid."""
    options: dict[str, str | int | bool] = Field(default={})
    """More options of sbatch, by their long names: `{ nice = 100, exclusive = true }`; false takes one back."""


class SlurmSettings(Placement):
    """`[slurm]`: what holds for every job."""

    mail_user: Expanded | None = None
    """Address that Slurm writes to."""
    mail_type: str = "END,FAIL"
    """On which events; only with `mail_user`. Arrays send one letter for all their tasks."""
    modules: tuple[str, ...] = ()
    """Modules to load, on a clean slate (`module purge`)."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the job's work, after the modules."""
    python: str | None = None
    """Python on the nodes that has cellhpc, when it is not the one that submits. Containers have their own."""
    share: Literal["private", "group"] = "private"
    """Who may read a study: only its owner, or also the owner's group."""


class Stage(Placement):
    """Resources of one stage."""

    nodes: int = Field(1, ge=1)
    """Nodes of a job."""
    cpus_per_task: int = Field(1, ge=1)
    """Cores of each task (a task is a rank)."""
    memory_gb: float = Field(4.0, gt=0)
    """Memory on each node."""
    time: Minutes = 60
    """Time limit. A training that reaches it leaves a checkpoint, is queued again and goes on."""
    gres: str | None = None
    """Generic resources of a node, as `gpu:a100:2`."""
    gpus_per_task: int = Field(0, ge=0)
    """GPUs of each task."""
    restarts: int = Field(3, ge=0)
    """How often a task that crashed (a rank that was killed, a lost link) is queued again by itself."""


class ConvertStage(Stage):
    """`[convert]`: one job; Dask over all its tasks."""

    tasks_per_node: int = Field(1, ge=1)
    """Tasks on each node; each runs as many workers as it has cores."""


class TrainStage(Stage):
    """`[train]`: arrays of jobs, each of `sweep.ranks` tasks spread evenly over its nodes."""

    throttle: int = Field(32, ge=1)
    """Jobs of a submission that may run at the same time; with `sweep.runs_per_job = 0`, also their number."""
    signal_seconds: int = Field(120, ge=10, le=3600)
    """How long before the time limit a training is told to leave its checkpoint. Slurm may be a minute early."""


class AggregateStage(Stage):
    """`[aggregate]`: one job."""

    time: Minutes = 30


class ContainerSettings(Settings):
    """`[container]`: the image that everything runs in; `containers/` builds one."""

    image: UserPath
    """The image (.sif) or a sandbox folder, on a file system that the nodes see. A job that waits ends at once when its
    image was changed meanwhile."""
    runtime: str = "apptainer"
    """The command, or its path."""
    python: str = "/opt/cellhpc/bin/python"
    """Python inside the image."""
    binds: tuple[Expanded, ...] = ()
    """More folders to bind, as `/data` or `/from:/to:ro`. The study's own folders are bound by themselves."""
    options: tuple[str, ...] = ()
    """More options of `apptainer exec`. `--nv` is given by itself where `[train]` has GPUs."""


class ScratchSettings(Settings):
    """`[scratch]`: fast folders of a node."""

    folder: str | None = None
    """Folder of a node for temporary files, expanded by the job's shell, as `/local/$USER`. Each job has a folder of
    its own in it, on each of its nodes, which is removed when it ends. Without it, `$TMPDIR`."""


class MeasuredSettings(Settings):
    """`[measured]`: what was measured of trainings on this cluster, for the hours that `--dry-run` tells.

    What is left out is taken from the finished runs of the study. `tests/bench/scaling.py` measures a machine and
    writes such a section.
    """

    images_per_s: Speeds = Field(default={})
    """Images of its steps that a job trains in a second, all its ranks together: a number, or one for each network,
    `{ ResNet50 = 250, "MobileNet(alpha=0.25)" = 900, any = 100 }`."""
    predicted_per_s: Speeds = Field(default={})
    """Held-out tiles that a job predicts in a second, given likewise."""
    start_seconds: float | None = Field(None, ge=0)
    """From the start of a job to its first step at full speed: libraries, network, tiles into memory, graphs."""
    run_seconds: float | None = Field(None, ge=0)
    """What a run takes beside its steps and predictions when it is not the first of its job."""
    ranks: int | None = Field(None, ge=1)
    """Ranks of the job that was measured; by default `sweep.ranks`. With others, `allreduce_mb_per_s` is needed."""
    allreduce_mb_per_s: float | None = Field(None, gt=0)
    """Megabytes that a rank sends in a second while gradients are averaged over ranks."""


class Site(Settings):
    """A whole site file."""

    slurm: SlurmSettings = SlurmSettings()
    convert: ConvertStage = ConvertStage()
    train: TrainStage = TrainStage()
    aggregate: AggregateStage = AggregateStage()
    container: ContainerSettings | None = None
    scratch: ScratchSettings = ScratchSettings()
    measured: MeasuredSettings = MeasuredSettings()

    @model_validator(mode="after")
    def _time_for_the_signal(self) -> Site:
        if self.train.signal_seconds >= self.train.time * 60:
            raise ValueError(
                f"train.signal_seconds is {self.train.signal_seconds}, not shorter than the limit train.time of "
                f"{self.train.time} min"
            )
        for name in ("convert", "aggregate"):
            if self.stage(name).time < 2:
                raise ValueError(f"{name}.time is {self.stage(name).time} min; allowed is 2 min or more")
        return self

    def stage(self, name: str) -> Stage:
        """Resources of the stage `convert`, `train` or `aggregate`."""
        return {"convert": self.convert, "train": self.train, "aggregate": self.aggregate}[name]

    def placement(self, name: str) -> Placement:
        """Where a stage's jobs belong: what its section says goes before what `[slurm]` says for all."""
        stage = self.stage(name)
        placed = {key: getattr(stage, key) or getattr(self.slurm, key) for key in Placement.model_fields}
        return Placement.model_construct(**placed | {"options": self.slurm.options | stage.options})


def load_site(path: Path | str) -> Site:
    """Read a site file.

    Raises
    ------
    UsageError
        The file is missing or not TOML, a key is unknown (the valid ones are listed), or a value is not allowed.
    """
    return load(Site, path, "site file", "Examples lie in slurm/, for instance slurm/local.toml.")


def parse_site(document: dict[str, Any], source: str) -> Site:
    """Validate a site given as nested dictionaries; `source` names it in messages."""
    return parse(Site, document, source)
