"""Image quality, before and after: pure functions on arrays of the working grid (1 mm, MNI).

What each measure means, its unit and which direction is better stands in ``data/qc.json``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft
from scipy.ndimage import (
    binary_erosion,
    convolve1d,
    distance_transform_edt,
    gaussian_filter,
)

from remix_bids.qc.mosaic import box_around

FEWEST = 500
"""Voxels that a tissue class must have to be measured."""

LOW_BAND, HIGH_BAND = (0.03, 0.12), (0.15, 0.45)
"""Spatial frequencies (cycles per mm) whose power is compared."""

CONE = 0.9
"""Cosine of the angle around an axis within which frequencies count as being along it."""

RIM = 12
"""Voxels of the brain's border, around whose depth it is faded out for its spectrum."""

_MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Tissues:
    """Three classes of the brain.

    Attributes
    ----------
    csf, grey, white : (x, y, z) bool array
        Voxels that surely are of one class: the rims are taken off.
    dark : float
        Intensity below which a voxel is CSF.
    """

    csf: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    dark: float


def find_tissues(image: np.ndarray, brain: np.ndarray) -> Tissues | None:
    """Three classes of the brain by intensity (Otsu 1979, several thresholds).

    Parameters
    ----------
    image : (x, y, z) array
        T1w: CSF is dark, white matter bright.
    brain : bool array of the same shape

    Returns
    -------
    Tissues or None
        None where the classes cannot be told: too few voxels of one, no coherent grey or white
        matter, or the two nearer to each other than the sum of their spreads.
    """
    limits = _thresholds(image, brain)
    if limits is None:
        return None
    dark, bright, high = limits
    classes = (
        brain & (image < dark),
        brain & (image >= dark) & (image < bright),
        brain & (image >= bright) & (image <= high),
    )
    grey, white = (image[c] for c in classes[1:])
    if min(c.sum() for c in classes) < FEWEST:
        return None
    if np.median(white) - np.median(grey) < grey.std() + white.std():
        return None
    csf_core, grey_core, white_core = (binary_erosion(c) for c in classes)
    if min(grey_core.sum(), white_core.sum()) < FEWEST:  # scattered voxels are no tissue
        return None
    csf = csf_core if csf_core.sum() >= FEWEST else classes[0]
    return Tissues(csf, grey_core, white_core, dark)


def _thresholds(image: np.ndarray, brain: np.ndarray) -> tuple[float, float, float] | None:
    """Between CSF, grey and white matter, and the upper end of the latter."""
    from skimage.filters import threshold_multiotsu

    values = image[brain]
    if values.size < 10 * FEWEST:
        return None
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    if not high > low:
        return None
    try:
        dark, bright = threshold_multiotsu(np.clip(values, low, high), classes=3, nbins=128)
    except ValueError:  # fewer than three different values
        return None
    return float(dark), float(bright), high


def sharpness(image: np.ndarray, brain: np.ndarray) -> float:
    """Mean length of the gradient in the brain, in percent of its intensity range per mm.

    The range goes from the 5th to the 95th percentile.
    """
    box = box_around(brain, 1)
    image, brain = image[box].astype(np.float32), brain[box]
    gradient = np.sqrt(sum(g**2 for g in np.gradient(image)))
    low, high = np.percentile(image[brain], (5, 95))
    return float(100 * gradient[brain].mean() / (high - low)) if high > low else 0.0


def noise(image: np.ndarray, where: np.ndarray) -> float:
    """Standard deviation of what second differences along all three axes leave over.

    From the median absolute value, so that edges do not count; in the image's units. Interpolated
    images hold less of it than acquired ones: compare it with itself, before and after.
    """
    box = box_around(where, 2)
    left, where = image[box].astype(np.float32), where[box]
    for axis in range(3):
        left = convolve1d(left, [1, -2, 1], axis=axis)
    return float(_MAD_TO_SIGMA * np.median(np.abs(left[where])) / 6**1.5)


def directional_power(image: np.ndarray, brain: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """How much fine detail an image holds along three directions.

    Parameters
    ----------
    image : (x, y, z) array
    brain : bool array of the same shape
        It is faded out towards its border: an edge is detail along all axes, however blurred the
        image.
    axes : (3, 3) array
        Columns are directions in voxel space of ``image``, of any length, such as those of the
        native voxel axes.

    Returns
    -------
    (3,) array
        Power in `HIGH_BAND` over that in `LOW_BAND` along each direction, in decibels; NaN where
        the brain is too small to tell.
    """
    box = box_around(brain, 0)
    depth = distance_transform_edt(np.pad(brain[box], 1))[1:-1, 1:-1, 1:-1]
    rim = min(RIM, depth.max() / 2)
    weight = gaussian_filter((depth > rim).astype(np.float32), rim / 3, mode="constant")
    part = image[box].astype(np.float32)
    part = (part - (part * weight).sum() / weight.sum()) * weight
    padded = [fft.next_fast_len(n, real=True) for n in part.shape]
    power = np.abs(fft.rfftn(part, padded)) ** 2
    lines = [fft.fftfreq(padded[0]), fft.fftfreq(padded[1]), fft.rfftfreq(padded[2])]
    f = np.stack(np.meshgrid(*(line.astype(np.float32) for line in lines), indexing="ij"))
    radius = np.sqrt((f**2).sum(axis=0))
    out = np.zeros(3)
    for i, direction in enumerate((axes / np.linalg.norm(axes, axis=0)).T):
        along = np.abs(np.tensordot(direction.astype(np.float32), f, axes=1)) >= CONE * radius
        bands = [power[along & (radius >= a) & (radius < b)] for a, b in (HIGH_BAND, LOW_BAND)]
        high, low = (max(band.mean(), 1e-30) if band.size else np.nan for band in bands)
        out[i] = 10 * np.log10(high / low)
    return out


def anisotropy(image: np.ndarray, brain: np.ndarray, axes: np.ndarray, thick: int) -> float:
    """Fine detail along the thick axis against that along the two others, in decibels.

    0 where resolution is isotropic (and so is the anatomy); negative where the thick axis is
    blurred. Parameters as in `directional_power`; ``thick`` is the column of the thick axis.
    """
    detail = directional_power(image, brain, axes)
    return float(detail[thick] - np.delete(detail, thick).mean())


def image_quality(
    image: np.ndarray,
    brain: np.ndarray,
    covered: np.ndarray,
    axes: np.ndarray,
    thick: int,
    tissues: Tissues | None,
    determinant: float,
) -> dict[str, float | None]:
    """All measures of one image.

    Parameters
    ----------
    image : (x, y, z) array
        On a grid of 1 mm in template space.
    brain, covered : bool arrays of the same shape
        What was acquired of the brain, and at all.
    axes : (3, 3) array
        Directions of the native voxel axes on that grid, as columns.
    thick : int
        Which of them is the coarsest.
    tissues : Tissues or None
        The same for all images that are compared.
    determinant : float
        Native volume per template volume, of the affine.

    Returns
    -------
    dict
        Keys as in ``data/qc.json``; None where a measure cannot be taken.
    """
    uneven = anisotropy(image, brain, axes, thick)
    inner = brain & binary_erosion(covered, border_value=1)  # where all neighbours were acquired
    out: dict[str, float | None] = {
        "sharpness": sharpness(image, inner if inner.any() else brain),
        "anisotropy": uneven if np.isfinite(uneven) else None,
        "noise": None,
        "snr": None,
        "cnr": None,
        "brain_volume": None,
    }
    if tissues is None:
        return out
    sigma = noise(image, tissues.white)
    grey, white = image[tissues.grey].mean(), image[tissues.white].mean()
    spread = np.sqrt((image[tissues.grey].var() + image[tissues.white].var()) / 2)
    out["noise"] = float(100 * sigma / white) if white > 0 else None
    out["snr"] = float(white / image[tissues.white].std()) if image[tissues.white].std() else None
    out["cnr"] = float((white - grey) / spread) if spread > 0 else None
    out["brain_volume"] = float((image[brain] >= tissues.dark).sum()) * determinant
    return out


def residual_energy(before: np.ndarray, after: np.ndarray, brain: np.ndarray) -> float:
    """Energy of what was added, in percent of the energy of the image around its mean."""
    values = before[brain].astype(np.float64)
    total = ((values - values.mean()) ** 2).sum()
    added = ((after[brain].astype(np.float64) - values) ** 2).sum()
    return float(100 * added / total) if total > 0 else 0.0
