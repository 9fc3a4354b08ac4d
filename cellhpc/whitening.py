"""Whitening on controls: variation that untreated wells show too says nothing of a treatment.

Typical variation normalisation (TVN; Ando, McLean & Berndl 2017, bioRxiv 161422): the axes of a principal component
analysis of all negative controls, of which none is left out, are shifted and scaled until the controls have mean 0 and
variance 1 along each; the same map is then applied to everything. Two things differ here. Theirs aligns the covariance
of each batch's controls afterwards (CORAL); here the mean of each plate's controls is taken away before, so that a
plate's shift goes, and its other peculiarities stay. And `RIDGE` is ours: d features of fewer than d controls have axes
along which no control varies, which would be stretched without end; so none is stretched more than 32 times as much as
one along which controls vary as on average.

Theirs are embeddings of cells. Here tiles are whitened, and the profile of a well or treatment is the mean of its
whitened tiles: on a plate the map is affine, so means could be whitened as well, but of the rows that it is fitted on,
tiles of controls are the most. Of intensity statistics the rows are fields.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellhpc.errors import DataError, listing

RIDGE = 1e-3
"""Share of the mean variance of controls that is added along each axis before it is scaled to one."""


def bare_plates(controls: NDArray, plates: NDArray) -> list[str]:
    """List the plates that have no control: nothing of them can be whitened. Parameters are those of `whiten`."""
    return sorted(set(plates.astype(str)) - set(plates[controls].astype(str)))


def whiten(values: NDArray, controls: NDArray, plates: NDArray) -> NDArray:
    """Whiten on controls: afterwards these lie around zero on each plate, and vary by one along each axis in all.

    Parameters
    ----------
    values
        Float (n, d): figures of tiles or of fields.
    controls
        Which of them are of controls, bool (n,).
    plates
        The plate of each, (n,).

    Returns
    -------
    ndarray
        float64 (n, d), of turned axes.

    Raises
    ------
    DataError
        A plate has no controls.
    """
    if bare := bare_plates(controls, plates):
        raise DataError(f"{listing(bare)}: without a control on each plate, nothing can be whitened")
    centred = np.array(values, np.float64)
    for plate in np.unique(plates):
        mine = plates == plate
        centred[mine] -= centred[mine & controls].mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(centred[controls], rowvar=False, ddof=0))
    scales = np.sqrt(np.maximum(variances, 0) + RIDGE * max(float(variances.mean()), 1e-12))
    return centred @ (axes / scales)
