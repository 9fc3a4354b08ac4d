"""Whitening against scikit-learn's, on more controls than features and on fewer, and what it is good for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

from cellhpc import whitening
from cellhpc.errors import DataError
from cellhpc.profiles import neighbours, predict
from cellhpc.scores import combine
from cellhpc.whitening import RIDGE, bare_plates, whiten
from tests.made_up import predictions

LABELS = ("Actin disruptors", "DNA damage", "Epithelial", "Kinase inhibitors")


def rows(tiles: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make features of two plates that differ, every third tile of a control; some features vary together."""
    random = np.random.default_rng(0)
    plates = np.array(["P1", "P2"])[np.arange(tiles) % 2]
    values = random.normal(0, 1, (tiles, width)) @ random.normal(0, 1, (width, width)) + 5.0 * (plates == "P2")[:, None]
    return values, np.arange(tiles) % 3 == 0, plates


def test_it_is_scikit_learns_of_centred_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "RIDGE", 0.0)
    values, controls, plates = rows(300, 6)
    found = whiten(values, controls, plates)
    centred = values - pd.DataFrame(values[controls]).groupby(plates[controls]).mean().loc[plates].to_numpy()
    expected = PCA(whiten=True).fit(centred[controls]).transform(centred) * np.sqrt(100 / 99)  # it divides by n - 1
    np.testing.assert_allclose(np.abs(found), np.abs(expected[:, ::-1]), rtol=1e-6, atol=1e-9)  # signs are free
    np.testing.assert_allclose(np.cov(found[controls], rowvar=False, ddof=0), np.eye(6), atol=1e-9)
    for plate in ("P1", "P2"):
        np.testing.assert_allclose(found[controls & (plates == plate)].mean(axis=0), 0, atol=1e-9)
    assert np.linalg.norm(found[~controls].mean(axis=0)) > 0.1  # treatments are not centred


def test_with_the_ridge_controls_vary_by_nearly_one() -> None:
    values, controls, plates = rows(300, 6)
    found = np.cov(whiten(values, controls, plates)[controls], rowvar=False, ddof=0)
    np.testing.assert_allclose(found - np.diag(np.diag(found)), 0, atol=1e-9)
    assert 0.5 < np.diag(found).min() < np.diag(found).max() < 1


def test_with_fewer_controls_than_features_nothing_is_stretched_without_end() -> None:
    """Ten controls of two plates vary along eight axes; along the other 32 the ridge alone says how far."""
    values, controls, plates = rows(30, 40)
    ten = controls.sum()
    assert ten == 10
    found = whiten(values, controls, plates)
    # On one plate the map is linear but for a shift: what it does to unit vectors is its matrix.
    more, one = np.eye(40) + values[1], np.append(plates, np.full(40, plates[1]))
    stretched = whiten(np.concatenate([values, more]), np.append(controls, np.zeros(40, bool)), one)
    np.testing.assert_allclose(stretched[:30], found)
    stretch = np.linalg.svd(stretched[30:] - found[1], compute_uv=False)
    centred = values[controls] - pd.DataFrame(values[controls]).groupby(plates[controls]).transform("mean")
    mean_variance = centred.var(axis=0, ddof=0).mean()
    np.testing.assert_allclose(stretch[:32], 1 / np.sqrt(RIDGE * mean_variance), rtol=1e-6)
    assert stretch[0] < 32 / np.sqrt((1 + RIDGE) * mean_variance) < np.inf
    # Before and after means it is the same map: profiles may be made of whitened tiles.
    mine = plates == "P1"
    mean = whiten(
        np.append(values, [values[mine].mean(axis=0)], axis=0), np.append(controls, False), np.append(plates, "P1")
    )
    np.testing.assert_allclose(mean[-1], found[mine].mean(axis=0), atol=1e-8)


def test_a_plate_without_controls_is_named() -> None:
    values, controls, plates = rows(30, 2)
    controls = controls & (plates == "P1")
    assert bare_plates(controls, plates) == ["P2"]
    with pytest.raises(DataError, match="P2: without a control on each plate, nothing can be whitened"):
        whiten(values, controls, plates)


def test_it_takes_away_what_plates_do() -> None:
    """Each week has one compound of each label, and plates shift and stretch features more than labels do."""
    compounds = {f"{label[:3]}-{number}": label for number in range(3) for label in LABELS}
    tiles = predictions(compounds, LABELS)
    tiles = tiles.loc[:, ~tiles.columns.str.startswith("p_")]
    random = np.random.default_rng(0)
    centres = {label: random.normal(0, 1, 12) for label in LABELS}
    shift, gain = ({plate: random.normal(where, deviation, 12) for plate in tiles["plate"].unique()}
                   for where, deviation in ((0, 3), (1, 0.05)))  # fmt: skip
    dmso = pd.DataFrame({"plate": np.repeat(tiles["plate"].unique(), 24), "label": ""})
    every = pd.concat([tiles, dmso], ignore_index=True)
    cells = np.array([centres.get(label, np.zeros(12)) for label in every["label"]])
    cells += random.normal(0, 0.3, cells.shape) * np.linspace(0.2, 2, 12)
    values = np.array([cells[row] * gain[plate] + shift[plate] for row, plate in enumerate(every["plate"])])
    controls = (every["label"] == "").to_numpy()
    whitened = whiten(values, controls, every["plate"].to_numpy())[~controls]
    values = values[~controls]

    def right(given: np.ndarray) -> tuple[int, int, int]:
        calls = combine(predict(tiles, given, "compound"))["treatment"]
        return (
            neighbours(tiles, given, "compound")["correct"].sum(),
            neighbours(tiles, given, "compound_and_batch")["correct"].sum(),
            calls["correct"].sum(),
        )

    before, after = right(values), right(whitened)
    assert before[0] < 6  # the nearest is of the same week, and in a week no other compound has the label
    assert after[:2] == (24, 24)
    assert after[2] == 24 > before[2]
