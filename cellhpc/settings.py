"""The job file: frozen, documented, validated settings for each stage of a study.

A job file is TOML with the sections `[study]`, `[screen]`, `[convert]`, `[folds]`, `[train]`, `[search]`, `[sweep]` and
`[aggregate]`. Each class below is one section: its fields are the keys, their docstrings the documentation. Paths may
hold `~` and `${VARIABLES}` of the environment; relative ones start where the command is run. `[train]` is described in
`cellhpc.recipe`, `[search]` in `cellhpc.grid`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from cellhpc.errors import listing
from cellhpc.grid import Candidate, candidates, describe
from cellhpc.recipe import TrainSettings
from cellhpc.sections import Settings, UserPath, expand_path, load, parse


def _expand_weights(value: object) -> object:
    return value if not isinstance(value, str) or value in ("imagenet", "xavier") else str(expand_path(value))


Weights = Annotated[str, BeforeValidator(_expand_weights)]


def _check_plane(value: object) -> object:
    if value != "projection" and (type(value) is not int or value < 1):
        raise ValueError('Allowed are "projection" and the number of a z-step, from 1')
    return value


ZPlane = Annotated[Literal["projection"] | int, BeforeValidator(_check_plane)]


def _check_pattern(key: str, pattern: str | None, what: str) -> None:
    """Refuse what is no regular expression, or one without a group; the first group takes out `what`."""
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as fault:
        raise ValueError(f"{key} {pattern!r} is no regular expression: {fault}") from None
    if not groups:
        raise ValueError(f"{key} {pattern!r} has no group; put the {what} in round brackets")


class StudySettings(Settings):
    """`[study]`: what it is called and where everything of it goes."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name in figures and reports: letters, digits, `_`, `.` and `-`."""
    folder: UserPath
    """The study's folder: resolved job file, store, folds, runs, results."""


class ScreenBase(Settings):
    """What every layout has."""

    path: UserPath
    """Folder of the pictures."""
    tables: UserPath | None = None
    """Folder of the screen's tables, when it is not `path`."""
    outside: bool = False
    """Let the tables name pictures outside of `path`, by absolute paths or by `..`; a table of somebody else could name
    any file that you can read."""
    compounds: tuple[str, ...] = ()
    """Keep only these compounds; empty keeps all."""
    drop_compounds: tuple[str, ...] = ()
    """Leave these compounds out of the study."""

    @property
    def tables_folder(self) -> Path:
        """Folder in which the tables lie."""
        return self.tables or self.path


class Bbbc021Screen(ScreenBase):
    """`[screen]` with `layout = "bbbc021"`: the tables and folders of BBBC021v1."""

    layout: Literal["bbbc021"]
    taxol: Literal["kensert2019", "all"] = "kensert2019"
    """Wells of taxol, the positive control of every plate, that are kept: those of Week1 plates in D0x, or all."""


class Bbbc014Screen(ScreenBase):
    """`[screen]` with `layout = "bbbc014"`: `Channel {1|2}-NN-R-CC-00.Bmp` of one 96-well plate, labels by column."""

    layout: Literal["bbbc014"]


class WellColumns(Settings):
    """`[screen.columns]`: which column of the table says what; keys that are left out are not in the table."""

    plate: str | None = None
    """Name of the plate; without it, the table holds for every plate."""
    well: str
    """Well, as `B06`."""
    compound: str
    """Name of the compound; on control wells the value of `control`."""
    concentration: str | None = None
    """Concentration, a number in `unit`."""
    label: str | None = None
    """What is to be predicted, as the mechanism of action; empty cells are unlabelled."""
    batch: str | None = None
    """Batch (week, experiment)."""
    replicate: str | None = None
    """Replicate; without it, the wells of a treatment count as its replicates."""


class ManifestColumns(WellColumns):
    """`[screen.columns]` of a manifest, which has a row for each field."""

    plate: str
    """Name of the plate."""
    field: str | None = None
    """Number of the field in its well; without it, fields count in the order of their rows."""


class TableScreen(ScreenBase):
    """What layouts have whose wells are told by a table with columns of any name."""

    table: str
    """File name of the table (CSV or Parquet) in the folder of the tables."""
    separator: str = Field(",", min_length=1, max_length=1)
    """Separator of a CSV table, one character."""
    unit: str = "uM"
    """Unit of the concentrations."""
    control: str = "DMSO"
    """The compound that marks control wells."""


class ManifestScreen(TableScreen):
    """`[screen]` with `layout = "manifest"`: one table, a row for each field or for each channel of a field."""

    layout: Literal["manifest"]
    columns: ManifestColumns
    """The table's columns."""
    rows: Literal["field", "channel"] = "field"
    """Whether a row is a field or one channel of a field."""
    channels: tuple[str, ...] = Field(min_length=1, max_length=5)
    """The channels in the order in which they are stored."""
    files: dict[str, str] = Field(min_length=1)
    """For `rows = "field"`, the file of each channel, or `all` for one file with all channels; for `rows = "channel"`,
    `all` for the file and `channel` for the name of the channel. Each is a template over the table's columns,
    as `images/{Plate}/{File}.tif` or `{Channel}`; the first column without a name is `{index}`."""
    batch_pattern: str | None = None
    """Regular expression whose first group takes the batch out of the plate's name, when no column holds it."""
    labels: tuple[str, ...] = ()
    """The labels that are allowed; empty allows all."""
    extra_columns: tuple[str, ...] = ()
    """More columns of the table to carry along, for instance one that `folds.by` names."""

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        wanted = {"all", "channel"} if self.rows == "channel" else set(self.channels)
        if set(self.files) != wanted and (self.rows == "channel" or set(self.files) != {"all"}):
            alone = "" if self.rows == "channel" else ", or all alone"
            raise ValueError(
                f'files has the keys {listing(self.files)}; with rows = "{self.rows}" it needs {listing(wanted)}{alone}'
            )
        if self.rows == "channel" and "{" not in self.files["channel"]:
            raise ValueError(f'files.channel is {self.files["channel"]!r}; it needs a column in braces: "{{Channel}}"')
        if len(set(self.channels)) != len(self.channels):
            raise ValueError(f"channels names one twice: {listing(self.channels)}")
        if self.batch_pattern is not None:
            if self.columns.batch is not None:
                raise ValueError("columns.batch and batch_pattern both tell the batch; keep one of them")
            _check_pattern("batch_pattern", self.batch_pattern, "batch")
        return self


class MetaxpressScreen(TableScreen):
    """`[screen]` with `layout = "metaxpress"`: plates as MetaXpress leaves them, and a plate map as the table."""

    layout: Literal["metaxpress"]
    columns: WellColumns
    """The plate map's columns."""
    channels: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=5)
    """The number of each channel's wavelength, in the order in which they are stored: `{ dna = 1, actin = 4 }`."""
    z: ZPlane | None = None
    """Which plane of a z-stack is read: `projection`, or the number of its z-step. Not needed where there is one."""
    time_point: int = Field(1, ge=1)
    """Which time point is read; pictures outside of `TimePoint_N` folders are of time point 1."""
    plate_pattern: str | None = None
    """Regular expression whose first group takes the plate out of its folder's path from `path`, as `^([^/]+)/` of
    `P1/2015-02-03/123`; by default the plate is the last folder that is no `TimePoint_N` or `ZStep_N`."""

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if len(set(self.channels.values())) != len(self.channels):
            raise ValueError(f"channels gives two channels one wavelength: {listing(self.channels.values())}")
        _check_pattern("plate_pattern", self.plate_pattern, "plate")
        return self


ScreenSettings = Annotated[
    Bbbc021Screen | Bbbc014Screen | ManifestScreen | MetaxpressScreen, Field(discriminator="layout")
]


class ConvertSettings(Settings):
    """`[convert]`: raw fields to 8-bit tiles."""

    store: UserPath | None = None
    """Folder of the converted store; by default `store` in the study's folder. Studies may share one."""
    preprocessing: Literal["kensert2019", "zscore", "percentile", "none"] = "kensert2019"
    """How intensities become grey levels 0..255.
    `kensert2019`: Anscombe transform, z-score on the plate's DMSO pixels, joint min-max of each field: loses how bright
    a field is beside others. `zscore`: the same scores from the fixed `zscore_range`: keeps that, loses what lies
    beyond. `percentile`: each channel from one percentile of the plate's pixels to the other: loses what lies beyond,
    and differences between plates. `none`: 8-bit pixels as they are."""
    statistics: Literal["dmso", "plate"] = "dmso"
    """Which fields of a plate its statistics are of: the controls, or all that are used. These see treated wells too,
    as the paper's do not."""
    zscore_range: tuple[float, float] = (-2.0, 6.0)
    """The scores that become 0 and 255, with `preprocessing = "zscore"`."""
    percentiles: tuple[float, float] = (0.1, 99.9)
    """The two percentiles, with `preprocessing = "percentile"`."""
    illumination: Literal["none", "mean", "median"] = "none"
    """Divide each channel by how the microscope lights it: the mean or median picture of the plate's fields, smoothed.
    Every file is read once more, and intensities are rounded to whole counts."""
    illumination_sigma_px: float = Field(100.0, gt=0)
    """Deviation of the Gaussian that smooths it, in pixels of a field: larger than a cell, smaller than a field."""
    tile_grid: tuple[int, int] = (2, 2)
    """Tiles in a field: rows, columns. A rest that does not divide is refused."""
    empty_above: int = Field(50, ge=0, le=255)
    """A tile's value counts as signal above this grey level."""
    empty_fraction: float = Field(0.002, ge=0, lt=1)
    """A tile is set aside when at most this fraction of its values is signal; with 0, when nothing is."""
    shard_fields: int = Field(16, ge=1)
    """Fields in one shard, the unit of work of one task."""
    codec: Literal["zstd", "lz4", "none"] = "zstd"
    """Lossless compression of the tiles, by Blosc with bit shuffle: `zstd` makes them smaller, `lz4` reads faster."""
    on_bad_field: Literal["fail", "skip"] = "fail"
    """A field that can't be read: refuse its plate, or set the field aside and count it."""
    controls: bool = False
    """Cut tiles of the control wells too, so that features can be whitened on them (`cellhpc.whitening`). They have no
    label: no network learns from them or is asked about them. Each plate then needs control wells. They come only into
    a new store, and runs belong to their store: decide before training, or convert a second one for
    `cellhpc features STORE2 --baseline`."""
    archive: UserPath | None = None
    """Folder into which every field that is read is also written as it is, as OME-Zarr 0.5: a plate of its own for each
    plate, a file for the pixels of each field. Without it, none is. Stores of one screen may share it."""
    archive_codec: Literal["zstd", "lz4", "none"] = "zstd"
    """Lossless compression of the archive, as `codec`."""
    archive_pixel_um: float | None = Field(None, gt=0)
    """Side of a pixel in micrometres, for the archive: the screens' tables do not tell it."""

    dashboard: bool = False
    """Serve Dask's dashboard while fields are converted, on the loopback interface: whoever is logged in on that host
    can look at it. Its address is told when it begins."""
    performance_report: bool = False
    """Leave Dask's report of where the time went in the store, `performance.html`; the last call's, of its rank 0."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for key in ("zscore_range", "percentiles"):
            low, high = getattr(self, key)
            if not low < high:
                raise ValueError(f"{key} is [{low:g}, {high:g}]; the second must be larger than the first")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles are {list(self.percentiles)}; allowed are numbers from 0 to 100")
        return self


class FoldsSettings(Settings):
    """`[folds]`: what is held out."""

    by: str = "compound"
    """Column of the fields table whose values are held out one by one: `compound`, or for example `cell_line`."""
    also: str = ""
    """Column, as `batch`, of which training shares no value with what is held out: with the compound, its weeks are
    left out. A label may then be in no training set of its compounds: these are not held out, but counted and named.
    A label that a training set lacks is never right there; it can't be asked either."""
    on_single_compound: Literal["fail", "drop"] = "fail"
    """A label with a single compound can't be learnt when that compound is held out: refuse, or drop the label."""
    unknown: bool = False
    """How unsure is a network of what it never learnt? Hold out whole labels instead, one after the other: a fold
    trains on no compound of its label (unknown to it), and besides not on one compound of each other label that can
    spare one (known, for comparison). Accuracies count the known ones only: no answer is right for the others. A label
    with a single compound stays, unless it is dropped: it can be unknown, and is never among the known."""

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.unknown and self.also:
            raise ValueError(
                "unknown and also exclude each other: without the batches of all that a fold then holds out, hardly "
                "anything would be left to learn from"
            )
        return self


class SweepSettings(Settings):
    """`[sweep]`: the grid of runs, and how they are packed into jobs."""

    networks: tuple[str, ...] = ("ResNet50",)
    """Names of keras.applications, with arguments where wanted: `ResNet50`, `MobileNet(alpha=0.25)`."""
    weights: tuple[Weights, ...] = ("imagenet",)
    """Where training starts: `imagenet`, `xavier`, or the path of a weights file in keras.applications' layout."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """One run for each seed."""
    tile_px: int | None = Field(None, ge=32, le=1024)
    """Side of a tile in pixels; by default each network's own input size (224, or 299 for the Inceptions)."""
    ranks: int = Field(1, ge=1)
    """Processes that train one run together, by Horovod; with one, Horovod is not needed."""
    parallel_jobs: int = Field(1, ge=1)
    """Jobs that run here at the same time."""
    runs_per_job: int = Field(0, ge=0)
    """Runs that share a job's processes; 0 divides the runs evenly among `parallel_jobs`, on Slurm among as many jobs
    as the site file's `train.throttle` lets run at a time."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory for tiles on a host; by default 60 % of what a job may use there."""
    stage: bool = False
    """Copy shards whose tiles come in windows (`train.window_tiles`) to the node's scratch first, once a host. It is
    `$TMPDIR`, or the site file's `scratch.folder`. Tiles in memory are read only once, and not copied."""
    checkpoint_minutes: float = Field(10.0, gt=0)
    """How often a run leaves a checkpoint, besides the one when it is told to stop: what a power cut can cost."""
    keep_weights: bool = False
    """A finished run keeps its weights, `weights.npz`, for `cellhpc features` and people's own use; runs that were done
    before have none."""
    attributions: int = Field(0, ge=0)
    """A finished run keeps, of each treatment that it calls wrong, so many tiles with maps of the pixels that spoke for
    the call, `attributions.npz`; runs that were done before have none."""
    tensorboard: bool = False
    """Runs write their history for TensorBoard too: `tensorboard --logdir FOLDER/runs`, of the study's folder."""

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        for key in ("networks", "weights", "seeds"):
            values = getattr(self, key)
            if not values:
                raise ValueError(f"{key} is empty")
            if len(set(values)) != len(values):
                raise ValueError(f"{key} names a value twice: {listing(values)}")
        return self


How: TypeAlias = Literal["mean", "median", "log", "vote"]
"""Rules by which probabilities are combined: see `AggregateSettings.combine`."""


class AggregateSettings(Settings):
    """`[aggregate]`: tile predictions to calls."""

    combine: How = "mean"
    """How probabilities are combined on each level: their mean; the paper's element-wise `median`, renormalised; the
    mean of their logarithms, `log`, that is the geometric mean, normalised; or the share of calls, `vote`."""


PREDICTION_COLUMNS = (
    "compound", "concentration", "unit", "label", "treatment", "plate", "well", "field", "tile", "batch", "replicate",
    "fold", "model", "initialisation", "seed", "trained_on",
)  # fmt: skip
"""What the columns of a table of predictions may say, for `cellhpc score`."""


class Job(Settings):
    """A whole job file."""

    study: StudySettings
    screen: ScreenSettings
    convert: ConvertSettings = ConvertSettings()
    folds: FoldsSettings = FoldsSettings()
    train: TrainSettings = TrainSettings()
    search: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Keys of `[train]`, each with a list of values. Every run chooses among their combinations on inner compounds, one
    of each label that can spare it, before it is trained with what it chose; the held-out compound takes no part. What
    is chosen has the best mean log-probability of the true label."""
    sweep: SweepSettings = SweepSettings()
    aggregate: AggregateSettings = AggregateSettings()

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """What `[search]` chooses among; empty without it."""
        return candidates(self.train, self.search)

    @model_validator(mode="after")
    def _candidates_are_sound(self) -> Self:
        if self.search and self.folds.also:
            raise ValueError(
                "search and folds.also exclude each other: inner compounds share their batches with training, and "
                "would choose for another question; choose without folds.also, and give [train] what was chosen"
            )
        if self.search and self.folds.unknown:
            raise ValueError(
                "search and folds.unknown exclude each other: what is chosen would be another network than the one "
                "whose doubts are asked for; choose without folds.unknown, and give [train] what was chosen"
            )
        for candidate in self.candidates:
            if candidate.settings.batch_size % self.sweep.ranks:
                raise ValueError(
                    f"search: the candidate {describe(candidate.values)} can't be shared equally by sweep.ranks "
                    f"{self.sweep.ranks}; choose multiples"
                )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.train.batch_size % self.sweep.ranks:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} can't be shared equally by sweep.ranks {self.sweep.ranks}; "
                "choose a multiple"
            )
        return self


def load_job(path: Path | str, overrides: Sequence[str] = ()) -> Job:
    """Read a job file.

    Parameters
    ----------
    path
        The TOML file.
    overrides
        Settings that replace those of the file, each `section.key=value` with the value in TOML
        (a bare word is taken as a string).

    Raises
    ------
    UsageError
        The file is missing or not TOML, a key is unknown (the valid ones are listed), or a value is not allowed.
    """
    return load(Job, path, "job file", "Examples lie in jobs/, for instance jobs/demo.toml.", overrides)


def parse_job(document: dict[str, Any], source: str) -> Job:
    """Validate a job given as nested dictionaries; `source` names it in messages."""
    return parse(Job, document, source)
