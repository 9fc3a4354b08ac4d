"""A made-up microscope that lights its fields unevenly: the unevenness is found and taken away."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from cellhpc.illumination import even_out, gains, illumination, shrink

SIZE = (256, 320)


def light() -> np.ndarray:
    """How a field is lit: brightest in the middle, less than half as bright in the corners."""
    y, x = np.mgrid[-1 : 1 : SIZE[0] * 1j, -1 : 1 : SIZE[1] * 1j]
    return 1.7 - 0.5 * (x**2 + y**2)


def fields(number: int, dtype: str = "uint16", level: float = 1000) -> list[np.ndarray]:
    """Fields of two channels, of cells at random places, in that light; the second channel is lit evenly."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(number):
        cells = random.gamma(4, level / 4, (SIZE[0] // 16, SIZE[1] // 16)).repeat(16, 0).repeat(16, 1)
        pixels = np.stack([cells * light(), cells], -1)
        made.append(random.poisson(pixels).clip(0, np.iinfo(dtype).max).astype(dtype))
    return made


@pytest.mark.parametrize("how", ["mean", "median"])
def test_the_light_is_found(how: Literal["mean", "median"]) -> None:
    coarse = illumination([shrink(field) for field in fields(200)], how, sigma_px=40)
    factors = gains(coarse, *SIZE)
    assert factors.shape == (2, *SIZE)
    assert factors.max() == 1
    inside = (slice(24, -24), slice(24, -24))  # the smoothing sees less at the edges
    found = factors[0][inside] * light()[inside]
    assert found.std() / found.mean() < 0.03
    assert light()[inside].std() / light()[inside].mean() > 0.08
    assert factors[1].std() / factors[1].mean() < 0.03


@pytest.mark.parametrize(("dtype", "level"), [("uint16", 1000), ("uint16", 60_000), ("uint8", 60)])
def test_a_field_is_divided_and_rounded_to_whole_counts(dtype: str, level: float) -> None:
    made = fields(20, dtype, level)
    coarse = illumination([shrink(field) for field in made], "mean", 40)
    factors = gains(coarse, *SIZE)
    even = even_out(made[0], factors)
    assert even.dtype == made[0].dtype
    np.testing.assert_allclose(even, made[0] * np.moveaxis(factors, 0, -1), atol=0.51)


def test_a_channel_without_light_stays_as_it_is() -> None:
    black = [np.zeros((*SIZE, 1), np.uint16)] * 3
    factors = gains(illumination([shrink(field) for field in black], "median", 40), *SIZE)
    assert (factors == 1).all()
