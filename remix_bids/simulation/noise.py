"""How noisy a scan is, from the scan alone."""

from __future__ import annotations

import numpy as np
import torch

from remix_bids.simulation.acquisition import slice_axis
from remix_bids.simulation.intensity import intensity_scale
from remix_bids.spatial import Grid

_MAD_TO_SIGMA = 1.4826
_TISSUE = 0.3  # of the 99th percentile of what is not zero
# Fine texture that counts as noise, in units of the image: it grows with the pixels. Chosen on
# validation persons (docs/experiments.md).
_TEXTURE, _MOST_TEXTURE, _DOUBT = 0.009, 0.018, 0.25


def tissue_level(native: np.ndarray) -> float:
    """Intensity above which a scan is bright tissue, where Rician noise is nearly Gaussian."""
    values = native[native != 0]
    return _TISSUE * float(np.percentile(values, 99)) if values.size else np.inf


def scan_noise(native: np.ndarray, grid: Grid, inside: np.ndarray | None = None) -> float:
    """Standard deviation of the noise of a scan.

    The median absolute value of second differences along one in-plane axis of those along the
    other, which smooth anatomy cancels out of. Zero-filled (interpolated) planes hold less noise at
    this scale than at others, so that a fine matrix is first thinned to about 1 mm. Fine texture
    counts as noise.

    Parameters
    ----------
    native : (x, y, z) array
    grid : Grid
        Of the scan.
    inside : (x, y, z) bool array, optional
        Where to look; bright tissue by default.

    Returns
    -------
    float
        In the units of ``native``; 0 where there is nothing to look at.
    """
    # 2/3 mm goes to 1.33 mm however an affine was rounded: halves are rounded up.
    steps = [slice(None, None, max(1, int(round(1.0 / s, 3) + 0.5))) for s in grid.voxel_sizes]
    axis = slice_axis(grid)
    steps[axis] = slice(None)
    data = np.moveaxis(native[tuple(steps)], axis, 0)
    if inside is None:
        mask = data > tissue_level(data)
    else:
        mask = np.moveaxis(inside[tuple(steps)], axis, 0)
    # (1 -2 1) along one axis times (1 -2 1) along the other: sum of squares 36.
    rows = data[:, :-2] - 2 * data[:, 1:-1] + data[:, 2:]
    both = rows[:, :, :-2] - 2 * rows[:, :, 1:-1] + rows[:, :, 2:]
    values = np.abs(both[mask[:, 1:-1, 1:-1]])
    return _MAD_TO_SIGMA * float(np.median(values)) / 6 if values.size else 0.0


def freedom_from_noise(noise: float, native: np.ndarray, grid: Grid) -> float:
    """1 where what `scan_noise` found may all be texture, 0 where there must be noise in it.

    Parameters
    ----------
    noise : float
        Of the scan, in the units of ``native``.
    native : (x, y, z) array
    grid : Grid
        Of the scan.
    """
    if noise == 0:
        return 1.0
    pixel = np.delete(grid.voxel_sizes, slice_axis(grid)).max()
    texture = min(_TEXTURE * pixel**2, _MOST_TEXTURE)
    level = noise / intensity_scale(torch.from_numpy(native))
    return float(np.clip((texture - level) / (_DOUBT * texture), 0, 1))
