"""How wide the slices of a scan are, from the scan itself.

Header and sidecar give spacing and nominal thickness, but not the profile: slices of 5 mm may be
Gaussians as wide, or boxes that blur no more than a Gaussian of 3.5 mm. A brain varies about as
much along any axis, though; so the scan is blurred along its pixels until it varies there as much
as across its slices, and the blur that this takes is that of the slices. The idea is that of
ESPRESO (Han, Remedios, Schär, Carass, Prince 2023), where an adversarial network is the judge.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter1d

from remix_bids.simulation.acquisition import (
    BRAIN_CENTRE,
    WIDTH_FACTOR,
    Acquisition,
    coarsest_axes,
    from_header,
    slice_axis,
)
from remix_bids.simulation.degrade import FWHM_TO_SIGMA, kernel_width, profile
from remix_bids.spatial import Grid

# Chosen by hand on simulated scans of training persons; `benchmarks/slices.py` prints what errors
# they leave. Ratios are widths over the width that a header makes likely (`from_header`).
_SPREAD = 0.16  # standard deviation of the ratio
# Hardly a slice that is simulated lies beyond. On real scans more than slices differs between the
# axes (ghosts along one of them, interpolated matrices): what lies beyond is not the slices.
_PLAUSIBLE = 0.55, 1.13
ERROR_MM = 0.38
"""Standard deviation of what is measured."""
# Spacing over pixel size from which slices are measured. Thinner ones drown in how much sharper
# scanners are along one axis than along another.
_STANDS_OUT = 2.0
# Part of the spacing. Across wider gaps neighbouring slices have too little in common.
_MOST_GAP = 0.3

_CALMER = 0.2  # log variance of differences, by which brains vary less from back to front
_INSIDE = np.array([64.0, 80.0, 62.0])  # mm, half axes of an ellipsoid that is mostly brain
_FEWEST = 2000  # differences, below which nothing is measured
_FLAT = 1e-4  # of the brightness; differences as small are rounding
_TRIED = np.linspace(0.4, 1.3, 7)  # of the spacing


@lru_cache
def _box_as_gaussian() -> float:
    """Width of the Gaussian that blurs as much as a smoothed box of width 1, by its variance."""
    offsets = np.linspace(-1, 1, 2001)
    weights = profile(offsets, 1.0, box=True)
    return float(np.sqrt((weights * offsets**2).sum() / weights.sum())) / FWHM_TO_SIGMA


def true_width(acquisition: Acquisition, axis: int | None = None) -> float:
    """Width (FWHM, mm) of the Gaussian that blurs an image of 1 mm as much as a simulated slice.

    ``axis``: another array axis than that of the slices.
    """
    axis = slice_axis(acquisition.grid) if axis is None else axis
    width = acquisition.widths[axis]
    return _as_box(width) if acquisition.box[axis] else float(np.hypot(1.0, kernel_width(width)))


def _as_box(width: float) -> float:
    """Width of the Gaussian that blurs an image of 1 mm as much as a box of this width."""
    return float(np.hypot(1.0, kernel_width(width) * _box_as_gaussian()))


def width_of_slices(acquisition: Acquisition) -> float:
    """Width (FWHM, mm) of the profile along the axis of the slices."""
    return float(acquisition.widths[slice_axis(acquisition.grid)])


def measurable(told: Acquisition) -> bool:
    """Whether the slices of a scan stand out enough to be measured."""
    sizes = np.sort(told.grid.voxel_sizes)
    # A header that says 1 x 1 x 2 mm may mean a little less.
    stands_out = sizes[2] > 0.99 * _STANDS_OUT * max(sizes[1], 1.0)
    thinnest = (1 - _MOST_GAP) * WIDTH_FACTOR * sizes[2]
    return bool(stands_out and width_of_slices(told) > thinnest)


def _inside_brain(acquisition: Acquisition) -> np.ndarray:
    """Native voxels of the ellipsoid."""
    to_template = np.linalg.inv(acquisition.world) @ acquisition.grid.affine
    indices = np.ogrid[tuple(slice(n) for n in acquisition.grid.shape)]
    distance = np.zeros((1, 1, 1))
    for row, centre, radius in zip(to_template[:3], BRAIN_CENTRE, _INSIDE, strict=True):
        place = sum(factor * index for factor, index in zip(row, (*indices, 1.0), strict=True))
        distance = distance + ((place - centre) / radius) ** 2
    return np.asarray(distance < 1)


def _variation(data: np.ndarray, mask: np.ndarray, axis: int, lag: int) -> float:
    """Logarithm of the mean squared second difference along an axis; NaN if nothing tells it."""
    n = data.shape[axis]
    if n <= 2 * lag:
        return float("nan")
    first, middle, last = (
        tuple(slice(start, start + n - 2 * lag) if a == axis else slice(None) for a in range(3))
        for start in (0, lag, 2 * lag)
    )
    inside = mask[first] & mask[middle] & mask[last]
    found = (data[first] - 2 * data[middle] + data[last])[inside]
    if len(found) <= _FEWEST:
        return float("nan")
    square = float(np.mean(found.astype(np.float64) ** 2))
    return float(np.log(square)) if square > _FLAT**2 else float("nan")


def _surplus(
    data: np.ndarray, inside: np.ndarray, told: Acquisition, axis: int, across: int
) -> np.ndarray:
    """How much more (log variance) data vary across slices than along an axis that is blurred.

    For every blur of `_TRIED`; grows with it, and is 0 where the blur is that of the slices.
    """
    sizes = told.grid.voxel_sizes
    spacing, size = float(sizes[across]), float(sizes[axis])
    # The distance of slices in pixels lies between two whole numbers, or is one.
    fewer = int(spacing / size)
    more = np.log(spacing / size / fewer) / np.log((fewer + 1) / fewer)
    lags = {lag: share for lag, share in ((fewer, 1 - more), (fewer + 1, more)) if share > 1e-6}
    found = np.zeros(len(_TRIED))
    for i, ratio in enumerate(_TRIED):
        blur = np.sqrt(max((ratio * spacing) ** 2 - told.widths[axis] ** 2, 0.0))
        sigma = blur * FWHM_TO_SIGMA / size
        blurred = gaussian_filter1d(data, sigma, axis, truncate=3) if sigma > 0 else data
        along = sum(share * _variation(blurred, inside, axis, lag) for lag, share in lags.items())
        found[i] = _variation(blurred, inside, across, 1) - along
    return found


def measure_slices(native: np.ndarray, told: Acquisition) -> float | None:
    """Width of the slices' profile, as it is found in a scan.

    Parameters
    ----------
    native : (x, y, z) array
        On ``told.grid``.
    told : Acquisition
        As `from_header` gives it; how wide it takes slices to be only decides whether they can be
        measured.

    Returns
    -------
    float or None
        Full width at half maximum of the Gaussian that blurs as much, mm; 0.4 to 1.3 of the
        spacing. None where slices do not stand out, or too little brain was scanned.
    """
    if not measurable(told):
        return None
    inside = _inside_brain(told)
    if not inside.any():
        return None
    # Blurred from the edge of this box on, as if all beyond were like it.
    cut = tuple(slice(int(where.min()), int(where.max()) + 1) for where in np.nonzero(inside))
    inside = inside[cut]
    data = native[cut].astype(np.float32)
    bright = float(np.percentile(data[inside], 75))
    if not bright > 0:
        return None
    data /= bright
    inside &= data > 0.05
    across = slice_axis(told.grid)
    directions = np.linalg.inv(told.world)[:3, :3] @ told.grid.affine[:3, :3]
    back_to_front = (directions[1] / np.linalg.norm(directions, axis=0)) ** 2
    surplus = np.zeros(len(_TRIED))
    for axis in {0, 1, 2} - {across}:
        surplus += _surplus(data, inside, told, axis, across)
        surplus -= _CALMER * (back_to_front[axis] - back_to_front[across])
    if not np.isfinite(surplus).all():
        return None
    spacing = float(told.grid.voxel_sizes[across])
    return spacing * float(np.interp(0.0, np.maximum.accumulate(surplus), _TRIED))


def with_width(acquisition: Acquisition, width: float) -> Acquisition:
    """An acquisition with another width (FWHM, mm) of its slices.

    Where axes are as coarse, along all of them: nothing tells which is that of the slices.
    """
    widths = list(acquisition.widths)
    for axis in coarsest_axes(acquisition.grid):
        widths[axis] = width
    return replace(acquisition, widths=(widths[0], widths[1], widths[2]))


def expected_width(told: Acquisition) -> float:
    """Width (FWHM, mm) that slices have in the mean where a header is all that is known.

    Half of the slices are Gaussians as wide as the header makes likely, half are boxes, which blur
    less, the more so the thicker they are; along each of several axes that are as coarse only as
    often as the slices are stacked along it.
    """
    header = width_of_slices(told)
    narrower = header - min(header, _as_box(header))
    return header - narrower / 2 / len(coarsest_axes(told.grid))


def weighed(measured: float | None, told: Acquisition) -> Acquisition:
    """What a header tells, its slices as wide as it and what was measured make likely."""
    header = width_of_slices(told)
    width = expected_width(told)
    if measured is not None:
        spread = (_SPREAD * header) ** 2
        width += spread / (spread + ERROR_MM**2) * (measured - width)
        width = float(np.clip(width, _PLAUSIBLE[0] * header, _PLAUSIBLE[1] * header))
    return with_width(told, width)


def from_scan(
    native: np.ndarray, grid: Grid, world: np.ndarray, thickness: float | None = None
) -> Acquisition:
    """The acquisition of a real scan, as far as header, sidecar and the scan itself tell.

    Parameters
    ----------
    native : (x, y, z) array
        The scan.
    grid : Grid
    world : (4, 4) array
        Template world to scanner world (RAS+, mm).
    thickness : float, optional
        Of the slices, mm; see `remix_bids.simulation.acquisition.from_header`.

    Returns
    -------
    Acquisition
        With Gaussian profiles. That of the slices is as wide as what is measured and what is
        expected of such a header make likely; as is expected where nothing can be measured.
    """
    told = from_header(grid, world, thickness)
    return weighed(measure_slices(native, told), told)


def as_if_measured(rng: np.random.Generator, told: Acquisition, true: Acquisition) -> Acquisition:
    """`from_scan` without a look at the scan: the truth and an error like that of a measurement.

    Training simulates parts of heads, too small to measure slices in.
    """
    error = rng.normal(0, ERROR_MM)
    return weighed(true_width(true) + error if measurable(told) else None, told)
