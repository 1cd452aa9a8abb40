"""The best linear guess of the image behind an acquisition: what the network is fed.

Interpolation treats thick slices as points. Here every axis is estimated by ordinary kriging: an
image whose covariance falls off with distance as measured on brains, seen through Gaussian profiles
of the acquisition's widths. It costs as much as a spline and comes near to iterative
back-projection (docs/experiments.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from remix_bids.simulation.acquisition import Acquisition
from remix_bids.simulation.degrade import (
    FWHM_TO_SIGMA,
    GAUSSIAN_REACH,
    LowResolution,
    acquire,
    field_of_view,
    seen_from,
)
from remix_bids.simulation.noise import freedom_from_noise, scan_noise, tissue_level
from remix_bids.spatial import (
    WORKING_GRID,
    Grid,
    along_axis,
    index_map,
    resample,
    voxel_indices,
)

# Covariance exp(-(d / LENGTH)^POWER) of a brain along a line, and the variance of noise relative to
# that of the image: what validation liked best (docs/experiments.md).
LENGTH, POWER, NOISE = 12.0, 1.3, 2e-4
IMAGE_WIDTH = 1.0  # mm, of the voxels that are to be estimated
_NODE_MM = 0.5
_NEGLIGIBLE = 1e-5  # weights below are dropped: most of a matrix is, and need not be multiplied
_UNKNOWN_MEAN = 100.0  # variance of the mean, so large that the data alone determine it


def _covariance(distance: np.ndarray, width: float) -> np.ndarray:
    """Covariance of two Gaussian averages whose squared widths (FWHM, mm) add up to width^2."""
    lags = np.arange(0.0, distance.max() + 0.2, 0.1)
    z = np.linspace(-3.5, 3.5, 71)
    weights = np.exp(-0.5 * z**2)
    blurred = np.exp(-((np.abs(lags[:, None] + width * FWHM_TO_SIGMA * z) / LENGTH) ** POWER))
    return np.interp(distance, lags, blurred @ weights / weights.sum())


def estimator(n: int, spacing: float, width: float, positions: np.ndarray) -> np.ndarray:
    """Matrix from ``n`` samples along a line to the image at some positions.

    Parameters
    ----------
    n : int
        Samples, at multiples of ``spacing`` (mm).
    width : float
        Of their Gaussian profile (FWHM, mm).
    positions : (m,) array
        Where to estimate, mm from the first sample.

    Returns
    -------
    (m, n) array
        Rows sum to 1: a constant comes back as itself.
    """
    samples = np.arange(n) * spacing
    width = max(width, IMAGE_WIDTH)
    between = _covariance(np.abs(samples[:, None] - samples), np.sqrt(2) * width)
    across = _covariance(np.abs(positions[:, None] - samples), np.hypot(IMAGE_WIDTH, width))
    system = between + NOISE * np.eye(n) + _UNKNOWN_MEAN
    matrix = np.linalg.solve(system, (across + _UNKNOWN_MEAN).T).T
    matrix = np.where(np.abs(matrix) > _NEGLIGIBLE, matrix, 0.0)
    return matrix / matrix.sum(axis=1, keepdims=True)


@lru_cache(maxsize=6)  # three axes, and both looks at a scan need the same
def _table_matrix(n: int, spacing: float, width: float, start: float, nodes: int) -> np.ndarray:
    """`estimator` at some nodes from ``start`` (mm) on."""
    return estimator(n, spacing, width, start + _NODE_MM * np.arange(nodes))


def estimate_image(native: Tensor, acquisition: Acquisition, grid: Grid = WORKING_GRID) -> Tensor:
    """The linear estimate on ``grid``, not masked; linear in ``native``.

    Parameters
    ----------
    native : (x, y, z) tensor
        On ``acquisition.grid``.
    acquisition : Acquisition
        Its profiles are taken to be Gaussian.
    grid : Grid
        Of the result, in template world.
    """
    mapping = index_map(grid, acquisition.grid, acquisition.world)
    corners = np.array(list(product(*((0, n - 1) for n in grid.shape))), dtype=float)
    reached = corners @ mapping[:3, :3].T + mapping[:3, 3]
    table, to_nodes = native, np.eye(4)
    for axis, spacing in enumerate(acquisition.grid.voxel_sizes):
        n = native.shape[axis]
        # Half a voxel beyond the first and last sample is still covered. Nodes lie around the
        # middle of the axis: a scan that is stored the other way round has the same ones.
        middle = (n - 1) / 2 * spacing
        first = np.clip(reached[:, axis].min(), -0.5, n - 1) * spacing - middle
        last = np.clip(reached[:, axis].max(), 0, n - 0.5) * spacing - middle
        steps = math.floor(first / _NODE_MM), math.ceil(last / _NODE_MM)
        low, nodes = middle + steps[0] * _NODE_MM, max(2, steps[1] - steps[0] + 1)
        matrix = _table_matrix(n, float(spacing), acquisition.widths[axis], float(low), nodes)
        table = along_axis(torch.as_tensor(matrix, dtype=native.dtype).to(native), table, axis)
        to_nodes[axis, axis], to_nodes[axis, 3] = spacing / _NODE_MM, -low / _NODE_MM
    return resample(table, to_nodes @ mapping, grid.shape, "linear")


@dataclass(frozen=True)
class Estimate(LowResolution):
    """The linear estimate of an image, and what it leaves open: all that a network is fed.

    Attributes
    ----------
    rest : (x, y, z) tensor
        Estimated from what the first estimate does not explain of the scan: noise, and detail where
        the true profile is not the assumed one. Part of it is in ``image`` already (`trust`); zero
        where nothing was acquired.
    noise : float
        Of the scan, as far as it can be told from the scan (`remix_bids.simulation.noise`).
    """

    rest: Tensor
    noise: float


def linear_estimate(
    native: Tensor, acquisition: Acquisition, grid: Grid = WORKING_GRID
) -> Estimate:
    """Bring a native image to a grid in template world, less the blur of its slices.

    What the first estimate does not explain of the scan is estimated again and added, as far as it
    stands out of the noise. The same function serves training, evaluation and the app.
    """
    noise = scan_noise(native.cpu().numpy(), acquisition.grid)
    image = estimate_image(native, acquisition, grid)
    if native.min() >= 0:
        image = image.clamp(min=0)  # it overshoots at edges, a magnitude does not
    missing = unexplained(image, native, acquisition, grid)
    rest = estimate_image(missing, acquisition, grid)
    image = image + trust(missing, native, noise) * rest
    if native.min() >= 0:
        image = image.clamp(min=0)
    low = seen_from(image, acquisition.grid, acquisition.world, grid)
    return Estimate(low.image, low.covered, low.sampling, rest * low.covered, noise)


def make_consistent(
    image: Tensor,
    native: Tensor,
    acquisition: Acquisition,
    grid: Grid,
    steps: int = 1,
) -> tuple[Tensor, float]:
    """Add what an image lacks to explain the scan.

    x <- x + E(y' - A x), E `estimate_image`, A the acquisition, y' between what the image explains
    of the scan and the scan itself, the nearer to the scan the less noise is in it
    (`remix_bids.simulation.noise.freedom_from_noise`): an expert has removed it, and steps would
    bring it back.

    Parameters
    ----------
    image : (x, y, z) tensor
        On ``grid``; what it holds where nothing was acquired does not matter.
    native : tensor
        The scan, on ``acquisition.grid``.
    steps : int

    Returns
    -------
    tensor like ``image``, and the share of what it left unexplained that was given back
        0, and the image as it was, if all of it may be noise.
    """
    scan = native.cpu().numpy()
    share = freedom_from_noise(scan_noise(scan, acquisition.grid), scan, acquisition.grid)
    if share == 0:
        return image, share
    # An edge of the field of view is none of the image: it would ring into it.
    seen = field_of_view(acquisition, grid).to(image.device)
    image = torch.where(seen, image, estimate_image(native, acquisition, grid))
    wanted = native
    if share < 1:
        wanted = native - (1 - share) * unexplained(image, native, acquisition, grid)
    for _ in range(steps):
        missing = unexplained(image, wanted, acquisition, grid)
        image = image + estimate_image(missing, acquisition, grid)
        if native.min() >= 0:
            image = image.clamp(min=0)
    return image, share


def _reach(acquisition: Acquisition) -> np.ndarray:
    """How far the profile of a voxel reaches along each axis, in voxels (3,)."""
    return GAUSSIAN_REACH * np.array(acquisition.widths) / acquisition.grid.voxel_sizes


def within(acquisition: Acquisition, grid: Grid, like: Tensor) -> Tensor:
    """Voxels of a scan whose profile does not reach beyond a grid in template space, bool.

    ``like``: a tensor of the native shape, for the device.
    """
    mapping = index_map(acquisition.grid, grid, np.linalg.inv(acquisition.world))
    margin = np.abs(mapping[:3, :3]) @ _reach(acquisition)
    inside = torch.ones_like(like, dtype=torch.bool)
    x, y, z = like.shape
    places = voxel_indices(mapping, (x, y, z), like)
    for place, rim, n in zip(places, margin, grid.shape, strict=True):
        inside &= (place >= rim) & (place <= n - 1 - rim)
    return inside


def unexplained(image: Tensor, native: Tensor, acquisition: Acquisition, grid: Grid) -> Tensor:
    """Scan less what a scanner would have seen of an image.

    0 for voxels whose profile reaches beyond the grid, or beyond the field of view, where the image
    holds nothing that was measured.
    """
    inside = within(acquisition, grid, native)
    reach = _reach(acquisition)
    for axis, rim in enumerate(reach - 0.5):
        lost = min(max(0, math.ceil(rim)), native.shape[axis])
        inside.narrow(axis, 0, lost).fill_(False)
        inside.narrow(axis, native.shape[axis] - lost, lost).fill_(False)
    return (native - acquire(image, acquisition, grid)) * inside


def trust(missing: Tensor, native: Tensor, noise: float) -> float:
    """How much of what an estimate left unexplained is worth adding, 0 to 1.

    The linear estimate explains most of the noise, too: what is left is all signal when it is as
    large as the noise in bright tissue, and all noise when it is half as large
    (docs/experiments.md).
    """
    left = missing[(native > tissue_level(native.cpu().numpy())) & (missing != 0)]
    rms = float(left.square().mean().sqrt()) if len(left) else 0.0
    return float(np.clip(2 - noise / rms, 0, 1)) if rms > 0 else 0.0
