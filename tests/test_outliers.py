"""Fields that stand out are named, and no others: on pictures that were spoiled on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
import pandas as pd
import pytest

from cellhpc.outliers import COLUMNS, SHOWN, THRESHOLD, outliers, summary
from cellhpc.quality import measure

CHANNELS = ("dna", "actin")
PLATES = {"P1": 1.0, "P2": 1.0}  # how brightly each is lit
Key = tuple[str, str, int]
Spoil = Callable[[np.ndarray], np.ndarray]


def picture(seed: int, cells: int, brightness: float = 1.0) -> np.ndarray:
    """A 12-bit field of two channels with so many cells."""
    random = np.random.default_rng(seed)
    field = np.full((96, 120, len(CHANNELS)), 100, np.float32)
    for _ in range(cells):
        centre = int(random.integers(120)), int(random.integers(96))
        for channel in range(len(CHANNELS)):
            plane = np.zeros(field.shape[:2], np.float32)
            cv2.circle(plane, centre, 5, float(random.integers(500, 900)), -1)
            field[..., channel] += plane
    return np.clip(random.poisson(field * brightness), 0, 4095).astype(np.uint16)


def table(spoiled: Mapping[Key, Spoil], brightness: Mapping[str, float] = PLATES) -> pd.DataFrame:
    """The fields of plates of six wells of four; B02 is a control, and each well has more cells than the one before."""
    rows = []
    for plate, light in brightness.items():
        for number in range(24):
            well, field = f"B{2 + number // 4:02d}", 1 + number % 4
            pixels = picture(number + 100 * len(rows), 14 + 4 * (number // 4), light)
            pixels = spoiled.get((plate, well, field), lambda same: same)(pixels)
            found = measure(pixels)
            control = well == "B02"
            row = {"plate": plate, "well": well, "field": field, "role": "dmso" if control else "treatment",
                   "treatment": "DMSO" if control else f"c {well} 1 uM", "bad": "", "near_empty": 0}  # fmt: skip
            for at, channel in enumerate(CHANNELS):
                row |= {f"file_{channel}": "x", f"mean_{channel}": found.mean[at]}
                row |= {f"focus_{channel}": found.focus[at], f"saturated_{channel}": found.saturated[at]}
            rows.append(row)
    return pd.DataFrame(rows)


def blur(pixels: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(pixels, (0, 0), 4)


def dim(pixels: np.ndarray) -> np.ndarray:
    return (pixels // 8).astype(np.uint16)


def overexpose(pixels: np.ndarray) -> np.ndarray:
    return np.minimum(pixels * 8, 4095).astype(np.uint16)


def blacken(pixels: np.ndarray) -> np.ndarray:
    return np.zeros_like(pixels)


def one_channel(spoil: Spoil) -> Spoil:
    return lambda pixels: np.dstack([pixels[..., :1], spoil(pixels)[..., 1:]])


def keys(named: pd.DataFrame) -> set[Key]:
    return {*named[["plate", "well", "field"]].itertuples(index=False, name=None)}


def figures(named: pd.DataFrame, key: Key) -> set[str]:
    mine = (named[["plate", "well", "field"]] == key).all(axis=1)
    return {*named.loc[mine, "figure"]}


def test_good_fields_are_not_named() -> None:
    named = outliers(table({}))
    assert named.empty
    assert list(named.columns) == list(COLUMNS)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (blur, {"focus_dna", "focus_actin"}),
        (dim, {"mean_dna", "mean_actin"}),
        (overexpose, {"mean_dna", "mean_actin", "saturated_dna", "saturated_actin"}),
        (blacken, {"mean_dna", "mean_actin", "focus_dna", "focus_actin", "saturated_dna", "saturated_actin"}),
        (one_channel(blur), {"focus_actin"}),
        (one_channel(dim), {"mean_actin"}),
    ],
)
def test_a_spoiled_field_is_named_with_what_is_wrong_and_no_other_is(spoil: Spoil, expected: set[str]) -> None:
    for key in (("P1", "B04", 3), ("P2", "B02", 1)):  # a treatment, and a control
        named = outliers(table({key: spoil}))
        assert keys(named) == {key}
        assert figures(named, key) == expected


def test_value_and_median_are_those_of_the_field_and_of_its_plate() -> None:
    fields = table({("P1", "B04", 3): one_channel(dim)}, {"P1": 1.0, "P2": 3.0})
    (row,) = outliers(fields).to_dict("records")
    mine = fields[fields["plate"] == "P1"]
    (value,) = mine.loc[(mine["well"] == "B04") & (mine["field"] == 3), "mean_actin"]
    assert (row["figure"], row["value"], row["plate_median"]) == ("mean_actin", value, mine["mean_actin"].median())
    away = np.log(mine["mean_actin"]) - np.log(mine["mean_actin"]).median()
    assert row["deviations"] == pytest.approx((np.log(value) - np.log(mine["mean_actin"]).median())
                                              / max(1.4826 * away.abs().median(), 0.1))  # fmt: skip
    assert row["deviations"] < -THRESHOLD
    assert (row["named_of_well"], row["fields_of_well"], row["treatment"]) == (1, 4, "c B04 1 uM")


def test_a_plate_that_is_darker_than_others_is_not_named_for_it() -> None:
    assert outliers(table({}, {"P1": 1.0, "P2": 0.2, "P3": 3.0})).empty


def test_a_whole_well_that_stands_out_can_be_told_from_a_field() -> None:
    named = outliers(table({("P1", "B05", field): dim for field in (1, 2, 3, 4)} | {("P1", "B06", 2): dim}))
    counts = named.drop_duplicates(["well", "field"]).set_index(["well", "field"])["named_of_well"].to_dict()
    assert counts == {**{("B05", field): 4 for field in (1, 2, 3, 4)}, ("B06", 2): 1}


def test_near_empty_tiles_are_named_and_bad_fields_are_not() -> None:
    fields = table({})
    fields.loc[5, "near_empty"] = 2
    measured = [name for name in fields if name.startswith(("mean", "focus", "saturated"))]
    fields.loc[7, measured] = np.nan
    fields.loc[7, ["bad", "near_empty"]] = ["torn", 4]
    (row,) = outliers(fields).to_dict("records")
    assert (row["well"], row["field"], row["figure"], row["value"]) == ("B03", 2, "near_empty", 2)
    told = summary(fields)
    assert told["shown"][0]["figures"] == ["2 near-empty tiles"]
    assert (told["fields"], told["controls"], told["set_aside"], told["stand_out"]) == (48, 8, 1, 1)


def test_the_order_of_rows_and_other_columns_do_not_matter() -> None:
    fields = table({("P1", "B04", 3): dim, ("P2", "B05", 2): blur})
    shuffled = fields.sample(frac=1, random_state=3).assign(mean_age="of somebody")
    pd.testing.assert_frame_equal(outliers(fields), outliers(shuffled))


def test_the_farthest_come_first_and_a_report_shows_so_many() -> None:
    spoiled: dict[Key, Spoil] = {(f"P{plate}", "B04", 3): dim for plate in range(25)}
    spoiled["P7", "B04", 3] = blacken
    fields = table(spoiled, {f"P{plate}": 1.0 for plate in range(25)})
    named = outliers(fields)
    farthest = named.groupby(["plate", "well", "field"], sort=False)["deviations"].agg(lambda away: away.abs().max())
    assert farthest.is_monotonic_decreasing
    told = summary(fields)
    assert (told["stand_out"], len(told["shown"])) == (25, SHOWN)
    first = told["shown"][0]
    assert (first["plate"], first["well"], first["field"], first["of_well"]) == ("P7", "B04", 3, "1 of 4")
    assert any(words.startswith("mean of dna 0, median ") for words in first["figures"])
