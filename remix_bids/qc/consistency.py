"""Consistency: what a scanner would have seen, had the output been the truth.

The output is taken through the scan's own acquisition (slice profile, spacing, obliquity) and held
against the acquired voxels, in units of the scan's noise.

It is blind to detail that averages to zero across a slice, to gaps between slices, to what lies
below the noise or outside the field of view, and to a wrong registration, because the same affine
goes there and back. `unknowable` shows the part of an image that it is blind to.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import map_coordinates, maximum_filter, uniform_filter
from torch import Tensor

from remix_bids.evaluation.methods import back_project
from remix_bids.qc.mosaic import box_around
from remix_bids.simulation.acquisition import Acquisition, slice_axis
from remix_bids.simulation.degrade import acquire, restore_grid
from remix_bids.simulation.estimate import within
from remix_bids.simulation.noise import scan_noise
from remix_bids.spatial import (
    WORKING_GRID,
    Grid,
    coverage,
    index_map,
    resample,
    voxel_indices,
)

WINDOW = 10.0
"""Side of the cube (mm) in which disagreement is averaged."""

NOISE_FLOOR = 0.01
"""Of the brain's intensity; noise is never taken below it: no model of a scanner is better."""

LIMIT = 4.0
"""Reduced chi-square above which a window disagrees: errors of twice the noise."""

MARGIN = 12
"""Voxels around a region that are needed to work on it alone."""

_SEEN = 0.98  # of a voxel's profile must lie in what the output covers


@dataclass(frozen=True)
class Consistency:
    """How an output agrees with what was measured; all arrays are on the native grid.

    Attributes
    ----------
    chi2 : (x, y, z) float32 array
        Mean of the squared residual over the noise variance in a cube of `WINDOW` mm around each
        voxel (reduced chi-square; 1 for the truth); NaN where it was not judged.
    residual : (x, y, z) float32 array
        Acquired minus predicted, in the scanner's units; NaN where it was not judged.
    noise : float
        Standard deviation that the residual was held against, in the scanner's units.
    correlation : float
        Of acquired and predicted voxels in the brain.
    nrmse : float
        Root mean square of the residual over that of the acquired voxels in the brain.
    median, p95, largest : float
        Of ``chi2`` in the brain.
    disagreeing : float
        Part of the brain's voxels whose ``chi2`` is above `LIMIT`.
    """

    chi2: np.ndarray
    residual: np.ndarray
    noise: float
    correlation: float
    nrmse: float
    median: float
    p95: float
    largest: float
    disagreeing: float


def estimate_noise(native: np.ndarray, brain: np.ndarray, grid: Grid) -> float:
    """Standard deviation of the noise of a scan, from the scan alone.

    See `remix_bids.simulation.noise.scan_noise`; within the brain, bounded from below by
    `NOISE_FLOOR`.

    Parameters
    ----------
    native : (x, y, z) array
        In the scanner's units.
    brain : (x, y, z) bool array
    grid : Grid
        Of both.

    Returns
    -------
    float
        In the scanner's units; at least `NOISE_FLOOR` of the median intensity of the brain.

    Raises
    ------
    ValueError
        The brain is empty.
    """
    if not brain.any():
        raise ValueError("no voxel of the brain was acquired")
    sigma = scan_noise(native, grid, brain)
    return max(sigma, NOISE_FLOOR * float(np.median(native[brain])))


def predict(image: np.ndarray, covered: np.ndarray, acquisition: Acquisition) -> np.ndarray:
    """What the scanner would have seen.

    Parameters
    ----------
    image : (181, 217, 181) float array
        On the working grid.
    covered : bool array of the same shape
        Where the image holds something.
    acquisition : Acquisition

    Returns
    -------
    float32 array of the native shape
        NaN where the voxel's profile reaches outside of what is covered, or of the grid.
    """
    seen, part = (acquire(_tensor(what), acquisition) for what in (image, covered))
    judged = (part >= _SEEN) & within(acquisition, WORKING_GRID, seen)
    return np.where(judged.numpy(), (seen / part).numpy(), np.nan).astype(np.float32)


def to_native(mask: np.ndarray, acquisition: Acquisition, grid: Grid = WORKING_GRID) -> np.ndarray:
    """A mask of the working grid on the native grid, bool."""
    mapping = index_map(acquisition.grid, grid, np.linalg.inv(acquisition.world))
    native = resample(_tensor(mask), mapping, acquisition.grid.shape, "linear").numpy() > 0.5
    # `resample` repeats the edge, which a mask that touches the border of the grid would not.
    corners = np.argwhere(native).T
    if corners.size:
        index = mapping[:3, :3] @ corners + mapping[:3, 3:]
        inside = ((index >= -0.5) & (index <= np.array(grid.shape)[:, None] - 0.5)).all(axis=0)
        native[tuple(corners[:, ~inside])] = False
    return native


def check(
    native: np.ndarray,
    image: np.ndarray,
    covered: np.ndarray,
    brain: np.ndarray,
    acquisition: Acquisition,
    *,
    noise: float | None = None,
) -> Consistency:
    """Hold an output against the acquired voxels.

    Parameters
    ----------
    native : (x, y, z) array
        The acquired image.
    image : (181, 217, 181) array
        The output on the working grid, in the units of ``native``.
    covered, brain : bool arrays like ``image``
        Where the scan has data; where the brain is.
    acquisition : Acquisition
        Of ``native``.
    noise : float, optional
        Its noise, if known; estimated by default.

    Raises
    ------
    ValueError
        No voxel of the brain can be judged.
    """
    predicted = predict(image, covered, acquisition)
    residual = native.astype(np.float32) - predicted
    judged = np.isfinite(residual)
    inside = to_native(brain, acquisition) & judged
    if not inside.any():
        raise ValueError("no voxel of the brain can be judged")
    noise = estimate_noise(native, inside, acquisition.grid) if noise is None else noise
    # The filter's running sums round to just below 0 beside what is 0.
    chi2 = windowed_mean((residual / noise) ** 2, judged, acquisition.grid).clip(min=0)
    values = chi2[inside]
    acquired = native[inside].astype(np.float64)
    difference = residual[inside].astype(np.float64)
    return Consistency(
        chi2=chi2,
        residual=residual,
        noise=float(noise),
        correlation=float(np.corrcoef(acquired, predicted[inside])[0, 1]),
        nrmse=float(np.sqrt((difference**2).mean() / (acquired**2).mean())),
        median=float(np.median(values)),
        p95=float(np.percentile(values, 95)),
        largest=float(values.max()),
        disagreeing=float((values > LIMIT).mean()),
    )


def windowed_mean(values: np.ndarray, where: np.ndarray, grid: Grid) -> np.ndarray:
    """Mean over the voxels of ``where`` in a cube of `WINDOW` mm around each; NaN elsewhere."""
    sizes = grid.voxel_sizes.round(3)  # those of a turned affine are not quite what they were
    size = [2 * max(0, round((WINDOW / s - 1) / 2)) + 1 for s in sizes]
    total = uniform_filter(np.where(where, values, 0).astype(np.float64), size, mode="constant")
    share = uniform_filter(where.astype(np.float64), size, mode="constant")
    mean = total / np.maximum(share, 1e-9)
    return np.where(where, mean, np.nan).astype(np.float32)


def unknowable(
    image: np.ndarray,
    covered: np.ndarray,
    where: np.ndarray,
    acquisition: Acquisition,
    *,
    iterations: int = 4,
    lowest: float = 0.0,
) -> np.ndarray:
    """The part of an image that the acquisition could not have told.

    The image is acquired without noise and brought back by iterative back-projection, stopped
    early; what does not come back has left no trace in the scan. A consistency check cannot see it.

    Parameters
    ----------
    image : (181, 217, 181) float array
    covered : bool array of the same shape
    where : bool array of the same shape
        Of interest, such as the brain: all else is left out of the work.
    acquisition : Acquisition
    iterations : int
        The fewer, the more counts as unknowable.
    lowest : float
        No image is below it: 0 for magnitudes, else the least value of the scan.

    Returns
    -------
    float32 array of the same shape
        ``image`` minus what came back; 0 outside ``where`` and where it is not covered.
    """
    box = box_around(where & covered, MARGIN)
    offset = np.eye(4)
    offset[:3, 3] = [side.start for side in box]
    inside = _tensor(covered[box])
    x, y, z = inside.shape
    grid = Grid((x, y, z), WORKING_GRID.affine @ offset)
    part = _tensor(image[box]) * inside
    seen = acquire(part, acquisition, grid)
    start = restore_grid(seen, acquisition.grid, acquisition.world, grid).image * inside
    steps = back_project(
        seen, acquisition, grid, start, iterations, 1.0, lowest, nothing_beyond=True
    )
    out = np.zeros(image.shape, dtype=np.float32)
    out[box] = ((part - deque(steps, maxlen=1).pop()) * inside).numpy()
    return out * (where & covered)


def energy_share(part: np.ndarray, whole: np.ndarray, where: np.ndarray) -> float:
    """Sum of squares of a part over that of the whole, where its mean has been taken off."""
    values = whole[where].astype(np.float64)
    total = ((values - values.mean()) ** 2).sum() if values.size else 0.0
    return float((part[where].astype(np.float64) ** 2).sum() / total) if total > 0 else 0.0


def largest_places(
    values: np.ndarray, where: np.ndarray, *, n: int = 5, apart: int = 20
) -> list[tuple[int, int, int]]:
    """Voxels of the largest local maxima of a map, the largest first.

    Parameters
    ----------
    values : (x, y, z) array
    where : bool array of the same shape
    n : int
        At most so many.
    apart : int
        Side in voxels of the cube in which only one is named.
    """
    scores = np.where(where & np.isfinite(values), values, -np.inf)
    peaks = (scores == maximum_filter(scores, size=apart)) & np.isfinite(scores)
    found = np.argwhere(peaks)
    order = np.argsort(-scores[tuple(found.T)], kind="stable")
    chosen: list[np.ndarray] = []
    for place in found[order]:
        if all(np.abs(place - other).max() >= apart / 2 for other in chosen):
            chosen.append(place)
        if len(chosen) == n:
            break
    return [(int(i), int(j), int(k)) for i, j, k in chosen]


def thick_slices(
    native: np.ndarray, source: Grid, mapping: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """A scan as it was acquired: slices as thick as they are, for looking at.

    Parameters
    ----------
    native : (x, y, z) array
        On ``source``.
    source : Grid
    mapping : (4, 4) array
        Index of the output to index of ``source``.
    shape : tuple of int
        Output.

    Returns
    -------
    float32 array of ``shape``
        Nearest slice, linear within the slice; 0 outside the field of view.
    """
    index = voxel_indices(mapping, shape, torch.empty(0))
    axis = slice_axis(source)
    index[axis] = index[axis].round().clamp(0, source.shape[axis] - 1)
    out = np.empty(shape, dtype=np.float32)
    map_coordinates(native.astype(np.float32), index.numpy(), out, order=1, mode="nearest")
    return out * coverage(mapping, source.shape, shape).numpy()


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
