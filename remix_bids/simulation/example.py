"""A thick-slice scan of a known brain, somewhere in a scanner: a problem with a known answer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from remix_bids.simulation.acquisition import Acquisition, turn_about
from remix_bids.simulation.degrade import acquire, bounding_box
from remix_bids.spatial import WORKING_GRID, Grid, index_map, resample

VOXEL_SIZES = (1.0, 1.0, 5.0)
MAX_ANGLE = 20.0  # degrees
MAX_STRETCH = 0.10  # of the size, along each axis
MAX_SHIFT = 100.0  # mm, along each axis
MARGIN = 6.0  # mm of air that the field of view leaves around the brain


@dataclass(frozen=True)
class Example:
    """A scan and the truth behind it.

    Attributes
    ----------
    native : (x, y, z) float tensor
        What the scanner would have seen, on the grid of ``acquisition``.
    acquisition : Acquisition
        Its ``world`` is the true affine, template world to scanner world.
    truth : (181, 217, 181) float tensor
        The brain on the working grid.
    """

    native: Tensor
    acquisition: Acquisition
    truth: Tensor


def random_affine(rng: np.random.Generator) -> np.ndarray:
    """Template world to scanner world: a turn about a random axis, scales and a shift.

    Returns
    -------
    (4, 4) array
        RAS+, mm; at most `MAX_ANGLE`, `MAX_STRETCH` and `MAX_SHIFT`.
    """
    turn = turn_about(rng.normal(size=3), rng.uniform(0, MAX_ANGLE))
    world = np.eye(4)
    world[:3, :3] = turn @ np.diag(rng.uniform(1 - MAX_STRETCH, 1 + MAX_STRETCH, 3))
    world[:3, 3] = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 3)
    return world


def axial_grid(brain: Tensor, grid: Grid, world: np.ndarray) -> Grid:
    """An axial grid, stored from right to left as most scanners do, around a moved brain.

    Parameters
    ----------
    brain : (x, y, z) tensor
        Zero outside the brain, on ``grid``.
    world : (4, 4) array
        Template world to scanner world.
    """
    box = bounding_box(brain != 0)
    corners = np.array([(*corner, 1) for corner in product(*box.T)])
    points = (world @ grid.affine @ corners.T)[:3]
    low, high = points.min(axis=1) - MARGIN, points.max(axis=1) + MARGIN
    sizes = np.array(VOXEL_SIZES)
    counts = np.ceil((high - low) / sizes).astype(int)
    affine = np.diag([-sizes[0], sizes[1], sizes[2], 1.0])
    affine[:3, 3] = (low + high) / 2 - affine[:3, :3] @ ((counts - 1) / 2)
    return Grid((int(counts[0]), int(counts[1]), int(counts[2])), affine)


def make_example(brain: Tensor, grid: Grid, rng: np.random.Generator) -> Example:
    """Move a brain by a random affine and scan it in thick axial slices, without noise.

    Parameters
    ----------
    brain : (x, y, z) float tensor
        High-resolution brain, zero outside it, on ``grid`` in template world.
    grid : Grid
    rng : numpy Generator
    """
    world = random_affine(rng)
    acquisition = Acquisition(
        axial_grid(brain, grid, world), world, VOXEL_SIZES, (False, False, True)
    )
    native = acquire(brain, acquisition, grid).clamp(min=0)
    truth = resample(brain, index_map(WORKING_GRID, grid), WORKING_GRID.shape)
    return Example(native, acquisition, truth.clamp(min=0))


def displacements(estimated: np.ndarray, true: np.ndarray, mask: Tensor) -> np.ndarray:
    """How far apart two affines put every voxel of a mask on the working grid, mm.

    Parameters
    ----------
    estimated, true : (4, 4) arrays
        Template world to scanner world.
    mask : (181, 217, 181) bool tensor
    """
    index = torch.nonzero(mask).numpy().T
    points = WORKING_GRID.affine[:3, :3] @ index + WORKING_GRID.affine[:3, 3:]
    change = (np.asarray(estimated) - true)[:3]
    return np.linalg.norm(change[:, :3] @ points + change[:, 3:], axis=0)
