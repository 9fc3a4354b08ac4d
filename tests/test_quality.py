from __future__ import annotations

import cv2
import numpy as np
import pytest

from cellhpc.quality import measure


@pytest.fixture
def field() -> np.ndarray:
    """A noisy 12-bit field of two channels, the second one flat."""
    noisy = np.random.default_rng(0).integers(100, 3000, (60, 80)).astype(np.uint16)
    return np.stack([noisy, np.full((60, 80), 500, np.uint16)], -1)


def test_figures_are_those_of_the_plain_formulas(field: np.ndarray) -> None:
    found = measure(field)
    plain = field.astype(float)
    assert found.low == (field[..., 0].min(), 500)
    assert found.high == (field[..., 0].max(), 500)
    np.testing.assert_allclose(found.mean, plain.mean((0, 1)))
    np.testing.assert_allclose(found.saturated, (plain == plain.max((0, 1))).mean((0, 1)))
    steps = plain[:, 2:] - plain[:, :-2]
    np.testing.assert_allclose(found.focus, (steps**2).mean((0, 1)) / plain.mean((0, 1)) ** 2)


def test_blur_lowers_focus_brightness_does_not_and_a_camera_at_its_limit_shows(field: np.ndarray) -> None:
    sharp = field[..., :1]
    blurred = cv2.GaussianBlur(sharp, (0, 0), 2)[..., None]
    assert measure(blurred).focus[0] < measure(sharp).focus[0] / 10
    assert measure(sharp * 4).focus == pytest.approx(measure(sharp).focus)
    assert measure(np.minimum(sharp, 2900)).saturated[0] > 0.02 > measure(sharp).saturated[0]


def test_a_black_field_of_bytes() -> None:
    found = measure(np.zeros((8, 8, 1), np.uint8))
    assert (found.mean, found.focus, found.saturated) == ((0,), (0,), (1,))
