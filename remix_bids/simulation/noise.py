"""How noisy a scan is: from the scan alone, and from what a restored image leaves of it."""

from __future__ import annotations

import numpy as np
import torch

from remix_bids.simulation.acquisition import slice_axis
from remix_bids.simulation.intensity import intensity_scale
from remix_bids.spatial import Grid

_MAD_TO_SIGMA = 1.4826
_TISSUE = 0.3  # of the 99th percentile of what is not zero
_BLOCK_MM, _FEWEST_BLOCKS = 8.0, 10
# What an expert leaves of a scan in flat tissue, in units of the image: up to the first there is
# little noise in it, from the second on nothing else counts. Both grow with the root of how much
# thicker slices are than pixels: more detail is left then (docs/experiments.md).
_QUIET, _NOISY = 0.002, 0.0036


def tissue_level(native: np.ndarray) -> float:
    """Intensity above which a scan is bright tissue, where Rician noise is nearly Gaussian."""
    values = native[native != 0]
    return _TISSUE * float(np.percentile(values, 99)) if values.size else np.inf


def scan_noise(native: np.ndarray, grid: Grid, inside: np.ndarray | None = None) -> float:
    """Standard deviation of the noise of a scan.

    The median absolute value of second differences across both in-plane diagonals, which smooth
    anatomy cancels out of. Zero-filled (interpolated) planes hold less noise at this scale than at
    others, so that a fine matrix is first thinned to about 1 mm. Fine texture counts as noise.

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
    steps = [slice(None, None, max(1, round(1.0 / s))) for s in grid.voxel_sizes]
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


def calm_level(values: np.ndarray, inside: np.ndarray, grid: Grid) -> float | None:
    """Root mean square of values where they are calmest: the lowest tenth of small blocks.

    Parameters
    ----------
    values, inside : (x, y, z) arrays
        On the grid of a scan; only blocks that lie inside count.
    grid : Grid
        Of the scan. Blocks are about as large in mm on every grid, at least one slice thick.

    Returns
    -------
    float or None
        None where there are too few blocks.
    """
    edges = np.full(3, _BLOCK_MM)
    edges[slice_axis(grid)] /= 2
    sizes = np.maximum(1, np.round(edges / grid.voxel_sizes)).astype(int)
    counts = np.array(values.shape) // sizes
    shape = [n for pair in zip(counts, sizes, strict=True) for n in pair]
    cut = tuple(slice(0, n) for n in counts * sizes)
    tissue = inside[cut].reshape(shape).mean(axis=(1, 3, 5)) > 0.9
    if tissue.sum() < _FEWEST_BLOCKS:
        return None
    squares = (values[cut].astype(np.float64) ** 2).reshape(shape).mean(axis=(1, 3, 5))
    return float(np.sqrt(np.percentile(squares[tissue], 10)))


def share_of_detail(missing: np.ndarray, native: np.ndarray, grid: Grid) -> float:
    """How much of what an image does not explain of a scan is worth giving back to it, 0 to 1.

    Noise is everywhere, detail is not: where tissue is flat, noise alone is left.

    Parameters
    ----------
    missing : (x, y, z) array
        What is not explained; 0 where that is not known.
    native : (x, y, z) array
        The scan.
    grid : Grid
        Of both.
    """
    inside = (native > tissue_level(native)) & (missing != 0)
    calm = calm_level(missing, inside, grid)
    if calm is None:
        return 1.0
    pixel, spacing = np.sort(grid.voxel_sizes)[1:]
    level = calm / intensity_scale(torch.from_numpy(native)) / np.sqrt(spacing / pixel)
    return float(np.clip((_NOISY - level) / (_NOISY - _QUIET), 0, 1))
