"""What a mechanism of action does to cells: a look for each, and the random streams of a screen.

The twelve mechanisms are those of BBBC021; the looks follow what is seen in its pictures, exaggerated a little, so that
they survive in tiles of 64 pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

from cellhpc.synth.cells import Look

UNTREATED = Look()

MOAS: Mapping[str, Look] = {
    "Microtubule stabilizers": replace(
        UNTREATED,
        count=0.7,
        tubulin=1.3,
        network=0.35,
        bundles=1.0,
        fragmented=0.7,
        round=0.1,
        elongation=0.16,
        nucleus=0.55,
    ),
    "Actin disruptors": replace(
        UNTREATED,
        count=0.75,
        size=0.8,
        spikes=0.55,
        actin=0.85,
        cortex=0.1,
        fibres=0.0,
        foci=1.0,
        haze=0.2,
        tubulin=1.1,
    ),
    "Aurora kinase inhibitors": replace(
        UNTREATED,
        count=0.5,
        size=1.5,
        nucleus=0.95,
        lobes=0.11,
        speckle=0.22,
        dna=0.9,
        binucleate=0.2,
        round=0.0,
        ruffle=0.06,
    ),
    "DNA damage": replace(
        UNTREATED,
        count=0.5,
        size=1.4,
        nucleus=0.74,
        nucleus_elongation=0.16,
        dna=0.7,
        speckle=0.05,
        fibres=0.8,
        cortex=0.5,
        round=0.0,
        network=0.8,
    ),
    "Eg5 inhibitors": replace(
        UNTREATED,
        count=0.75,
        round=0.65,
        monoaster=0.95,
        clump=0.6,
        tubulin=1.05,
    ),
    "Protein synthesis": replace(
        UNTREATED,
        count=0.65,
        size=0.78,
        nucleus=0.36,
        tubulin=0.5,
        actin=0.5,
        dna=1.1,
        speckle=0.05,
        round=0.0,
        clump=0.65,
    ),
    "Cholesterol-lowering": replace(
        UNTREATED,
        count=0.45,
        size=0.6,
        spikes=1.0,
        elongation=0.4,
        tubulin=1.7,
        actin=0.5,
        cortex=0.35,
        nucleus=0.36,
        clump=0.3,
        dna=1.2,
    ),
    "DNA replication": replace(
        UNTREATED,
        count=0.5,
        size=1.0,
        nucleus=0.6,
        speckle=0.4,
        elongation=0.35,
        ruffle=0.1,
        actin=1.5,
        cortex=1.1,
        haze=0.5,
        tubulin=0.85,
        round=0.0,
    ),
    "Epithelial": replace(
        UNTREATED,
        count=0.95,
        clump=0.97,
        size=0.85,
        ruffle=0.02,
        actin=1.6,
        cortex=1.5,
        fibres=0.05,
        haze=0.15,
        elongation=0.06,
    ),
    "Kinase inhibitors": replace(
        UNTREATED,
        count=0.75,
        size=1.2,
        elongation=0.3,
        ruffle=0.02,
        clump=0.15,
        actin=0.6,
        cortex=0.35,
        fibres=0.0,
        haze=0.45,
        tubulin=1.3,
        network=1.2,
        round=0.0,
    ),
    "Microtubule destabilizers": replace(
        UNTREATED,
        count=0.65,
        size=0.8,
        tubulin=0.7,
        network=0.1,
        diffuse=1.0,
        inside_nucleus=0.9,
        fragmented=0.3,
        round=0.3,
        fibres=0.9,
        actin=1.2,
    ),
    "Protein degradation": replace(
        UNTREATED,
        count=0.6,
        size=0.72,
        aggresome=1.5,
        network=0.5,
        tubulin=1.15,
        nucleus=0.42,
        lobes=0.06,
        dna=1.35,
        actin=0.9,
        round=0.1,
        nucleus_elongation=0.22,
    ),
}
"""The look of each mechanism at full effect. The first six make the demo."""

_COMPOUND_SPREAD = {
    "count": 0.13, "size": 0.06, "nucleus": 0.05, "dna": 0.09, "tubulin": 0.11, "actin": 0.11, "network": 0.12,
    "cortex": 0.12, "fibres": 0.2, "elongation": 0.2, "ruffle": 0.2, "speckle": 0.15, "haze": 0.2,
}  # fmt: skip
_FRACTIONS = {"clump", "fragmented", "binucleate", "round", "monoaster"}


def stream(*key: object) -> np.random.Generator:
    """Random numbers that depend on the key alone, as (seed, plate, well, site), whichever process draws them."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), np.uint32))


def treated_look(moa: str | None, effect: float, compound_rng: np.random.Generator) -> Look:
    """Look of cells under one compound.

    Parameters
    ----------
    moa
        The compound's mechanism; None for a compound without one.
    effect
        From 0 (untreated) to 1 (full effect).
    compound_rng
        The compound's random numbers: how strong each part of the phenotype is with it, and what else it shifts.
    """
    start, end = asdict(UNTREATED), asdict(MOAS[moa] if moa else UNTREATED)
    values = {}
    for name, begin in start.items():
        strength = compound_rng.uniform(0.8, 1.15)
        side_effect = compound_rng.normal() * _COMPOUND_SPREAD.get(name, 0.0)
        value = (begin + effect * strength * (end[name] - begin)) * np.exp(effect * side_effect)
        values[name] = float(np.clip(value, 0, 1) if name in _FRACTIONS else max(value, 0.0))
    return Look(**values)


def hill(concentration: float, half_effect: float, slope: float = 1.3) -> float:
    """Effect, 0 to 1, of a concentration: the Hill equation."""
    return 0.0 if concentration <= 0 else 1 / (1 + (half_effect / concentration) ** slope)
