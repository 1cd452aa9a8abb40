"""MNI -> native -> MNI: what a scanner would have seen, brought back to the working grid.

All functions are linear in the image (but for Rician noise, and for a restored magnitude, which is
not negative), run on the device of their input, and are differentiable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from remix_bids.simulation.acquisition import Acquisition, Sampling, sampling
from remix_bids.spatial import WORKING_GRID, Grid, along_axis, coverage, index_map, resample

FWHM_TO_SIGMA = 1 / math.sqrt(8 * math.log(2))
_MARGIN_MM = 3.0
GAUSSIAN_REACH, _BOX_REACH = 1.3, 0.75  # widths from its centre at which a profile ends
_LANCZOS = 3


@dataclass(frozen=True)
class LowResolution:
    """An image that went through an acquisition, on the grid it came from.

    Attributes
    ----------
    image : (x, y, z) tensor
        Zero where nothing was acquired.
    covered : (x, y, z) bool tensor
    sampling : Sampling
        Where the scan has measured.
    """

    image: Tensor
    covered: Tensor
    sampling: Sampling


def profile(offsets: np.ndarray, width: float, box: bool) -> np.ndarray:
    """Weights of a slice profile at distances (mm) from the slice's centre, not normalised.

    Parameters
    ----------
    width : float
        Full width at half maximum, mm.
    box : bool
        A box smoothed over a fifth of its width, as of a good slice-selective pulse; else Gaussian.
    """
    if not box:
        return np.exp(-0.5 * (offsets / (width * FWHM_TO_SIGMA)) ** 2)
    slope = 0.1 * width
    edge = (width / 2 - np.abs(offsets)) / slope
    return 0.5 * (1 + np.tanh(edge))


def kernel_width(width: float, source: float = 1.0) -> float:
    """Width (FWHM, mm) left of a profile once that of the image's own voxels is taken off."""
    return math.sqrt(max(width**2 - source**2, 0.0))


def _oversampling(spacing: float, width: float) -> int:
    """Samples per voxel that a profile of this width needs.

    So that `_profile_weights` follow the profile's Fourier transform: coarser steps take off too
    little of the highest frequencies, finer ones only cost time.
    """
    step = 1.2 if width < 0.6 else float(np.clip(width / 2.5, 0.8, 1.0))
    return max(1, math.ceil(spacing / step - 1e-6))


def _profile_weights(step: float, width: float, box: bool) -> np.ndarray:
    """Weights of samples ``step`` (mm) apart around a slice's centre.

    Not the profile at the samples, which may fall beside the edges of a box: its integrals over an
    image that Lanczos' interpolation tells between the samples, too.

    Parameters
    ----------
    width, box
        As in `profile`.
    """
    reach = (_BOX_REACH if box else GAUSSIAN_REACH) * width
    offsets = np.linspace(-reach, reach, 601)
    samples = np.arange(-(n := math.ceil(reach / step) + _LANCZOS), n + 1)
    away = offsets / step - samples[:, None]
    near = np.abs(away) < _LANCZOS
    between = np.where(near, np.sinc(away) * np.sinc(away / _LANCZOS), 0.0)
    weights = between @ profile(offsets, width, box)
    return weights / weights.sum()


def _profile_matrix(n: int, spacing: float, width: float, box: bool) -> tuple[np.ndarray, int, int]:
    """Matrix from fine samples to voxels along one axis, samples per voxel, samples of margin."""
    if width <= 0:
        return np.eye(n), 1, 0
    m = _oversampling(spacing, width)
    weights = _profile_weights(spacing / m, width, box)
    reach = len(weights) // 2
    matrix = np.zeros((n, (n - 1) * m + 1 + 2 * reach))
    for i in range(n):
        matrix[i, i * m : i * m + 2 * reach + 1] = weights
    return matrix, m, reach


def _native_ranges(
    box: np.ndarray, mapping: np.ndarray, acquisition: Acquisition
) -> list[tuple[int, int]]:
    """Ranges of native indices that see, or are seen from, a box (2, 3) of image indices."""
    grid = acquisition.grid
    corners = np.array([(*corner, 1) for corner in product(*box.T)])
    index = (np.linalg.inv(mapping) @ corners.T)[:3]
    # Four voxels: beyond, the spline that brings the native image back has decayed to .5 %.
    reach = GAUSSIAN_REACH * np.array(acquisition.widths)
    margin = np.maximum(4, reach / grid.voxel_sizes) + _MARGIN_MM / grid.voxel_sizes
    last = np.array(grid.shape) - 1
    low = np.clip(np.floor(index.min(axis=1) - margin), 0, last).astype(int)
    high = np.clip(np.ceil(index.max(axis=1) + margin), low, last).astype(int)
    return [(int(a), int(b) + 1) for a, b in zip(low, high, strict=True)]


def bounding_box(mask: Tensor) -> np.ndarray:
    """First and last index (2, 3) of the true voxels along each axis; all zero if there is none."""
    box = np.zeros((2, 3), dtype=int)
    for axis in range(3):
        first, second = (a for a in range(3) if a != axis)
        where = torch.nonzero(mask.any(dim=second).any(dim=first))
        if len(where):
            box[:, axis] = int(where[0]), int(where[-1])
    return box


def acquire(
    image: Tensor,
    acquisition: Acquisition,
    grid: Grid = WORKING_GRID,
    *,
    order: str = "cubic",
    voxel_width: float = 1.0,
    region: np.ndarray | None = None,
) -> Tensor:
    """What the scanner would have seen.

    The image is sampled on a refinement of the native grid, weighted by the profile and summed:
    slice thickness and spacing are independent, so gaps and overlaps come out right.

    Parameters
    ----------
    image : (x, y, z) tensor
        High-resolution image on ``grid``.
    acquisition : Acquisition
    grid : Grid
        Grid of ``image``, in template world.
    order : {'cubic', 'linear'}
    voxel_width : float
        Width (mm) that the image already has; the profile is narrowed by it. 0 to apply it whole.
    region : (2, 3) int array, optional
        First and last index of the part of the image that is of interest; the native image is zero
        where it is far from there. All that is not zero by default.

    Returns
    -------
    tensor of the native shape
    """
    native = acquisition.grid
    # A grid moved by `world` is in scanner world; so the image may be on any grid of the template.
    mapping = index_map(native, grid, np.linalg.inv(acquisition.world))
    box = bounding_box(image != 0) if region is None else region
    ranges = _native_ranges(box, mapping, acquisition)
    sizes = native.voxel_sizes
    matrices, refine, shape = [], np.eye(4), []
    for axis, (start, stop) in enumerate(ranges):
        width = kernel_width(acquisition.widths[axis], voxel_width)
        matrix, m, reach = _profile_matrix(stop - start, sizes[axis], width, acquisition.box[axis])
        matrices.append(torch.as_tensor(matrix, dtype=image.dtype, device=image.device))
        refine[axis, axis] = 1 / m
        refine[axis, 3] = start - reach / m
        shape.append(matrix.shape[1])
    seen = resample(image, mapping @ refine, tuple(shape), order)
    for axis, weights in enumerate(matrices):
        seen = along_axis(weights, seen, axis)
    out = image.new_zeros(native.shape)
    out[tuple(slice(*r) for r in ranges)] = seen
    return out


def add_rician_noise(native: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Magnitude of the image with complex Gaussian noise of standard deviation ``sigma``."""
    shape = (2, *native.shape)
    noise = torch.randn(shape, generator=generator, device=generator.device).to(native) * sigma
    return torch.hypot(native + noise[0], noise[1])


def restore_grid(
    native: Tensor,
    source: Grid,
    world: np.ndarray,
    grid: Grid = WORKING_GRID,
    *,
    order: str = "cubic",
) -> LowResolution:
    """Bring a native image to a grid in template world: the same in training and in the app.

    Parameters
    ----------
    native : (x, y, z) tensor
        On ``source``.
    source : Grid
    world : (4, 4) array
        Template world to scanner world (RAS+, mm).
    grid : Grid
        Of the result.
    """
    image = resample(native, index_map(grid, source, world), grid.shape, order)
    if native.min() >= 0:
        image = image.clamp(min=0)  # a spline overshoots at edges, a magnitude does not
    return seen_from(image, source, world, grid)


def seen_from(image: Tensor, source: Grid, world: np.ndarray, grid: Grid) -> LowResolution:
    """An image on ``grid``, kept where a scan on ``source`` has measured; see `restore_grid`."""
    mapping = index_map(grid, source, world)
    covered = coverage(mapping, source.shape, grid.shape, like=image)
    return LowResolution(image * covered, covered, sampling(mapping, source))


def field_of_view(acquisition: Acquisition, grid: Grid = WORKING_GRID) -> Tensor:
    """Where on a grid in template world an acquisition has measured, bool."""
    mapping = index_map(grid, acquisition.grid, acquisition.world)
    return coverage(mapping, acquisition.grid.shape, grid.shape)
