"""Back to the scanner: the output in native space.

The acquired image is interpolated once; what the network added on the working grid is resampled and
laid over it. So what lies outside the working grid is there too, only not enhanced.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from remix_bids.spatial import (
    WORKING_GRID,
    Grid,
    coverage,
    index_map,
    resample,
    voxel_indices,
)

TAPER = 5.0
"""Over so many mm the residual fades out towards the border of the working grid."""

SIDE = 1.0  # mm, of an output voxel


def native_grid(source: Grid) -> Grid:
    """The 1 mm isotropic grid of a scan, in the scanner's world.

    Parameters
    ----------
    source : Grid
        The acquired grid; may be oblique, sheared, left- or right-handed.

    Returns
    -------
    Grid
        Its axes run as those of ``source`` do, at right angles (the nearest rotation, where the
        source is sheared). It has the same centre and covers the acquired field of view, voxel
        edges included. For a source of 1 mm it is the source's own grid.
    """
    directions = source.affine[:3, :3] / source.voxel_sizes
    u, _, vt = np.linalg.svd(directions)
    axes = u @ vt  # keeps the handedness
    edges = [(-0.5, n - 0.5) for n in source.shape]
    corners = np.array(list(product(*edges))) @ source.affine[:3, :3].T @ axes
    low, high = corners.min(axis=0), corners.max(axis=0)
    counts = np.ceil((high - low) / SIDE - 1e-3).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = axes * SIDE
    middle = axes @ ((low + high) / 2) + source.affine[:3, 3]
    affine[:3, 3] = middle - affine[:3, :3] @ ((counts - 1) / 2)
    return Grid((int(counts[0]), int(counts[1]), int(counts[2])), affine)


def enhanced_part(mapping: np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """How much of what was added counts at each voxel of an output grid.

    Parameters
    ----------
    mapping : (4, 4) array
        Output voxel index to voxel index of the working grid.
    shape : tuple of int
        Output grid.

    Returns
    -------
    (x, y, z) tensor
        1 inside the working grid, 0 outside, with a ramp of `TAPER` mm inside its border.
    """
    index = voxel_indices(mapping, shape, torch.empty(0))
    last = torch.tensor(WORKING_GRID.shape).view(3, 1, 1, 1) - 1
    depth = torch.minimum(index, last - index).amin(dim=0)  # the grid has voxels of 1 mm
    return (depth / TAPER).clamp(0, 1)


def _continued(residual: Tensor, seen: Tensor) -> Tensor:
    """As if all beyond the field of view were like its edge, for the spline that is laid through.

    It is 0 there, a step that the spline would ring at.
    """
    if seen.all() or not seen.any():
        return residual
    nearest = distance_transform_edt(~seen.numpy(), return_distances=False, return_indices=True)
    x, y, z = torch.from_numpy(nearest).long()
    return residual[x, y, z]


def to_native_space(
    native: Tensor, source: Grid, world: np.ndarray, residual: Tensor
) -> tuple[Tensor, Tensor, Grid]:
    """The output in the scanner's world.

    Parameters
    ----------
    native : (x, y, z) tensor
        The acquired image, on ``source``.
    source : Grid
    world : (4, 4) array
        Template world to scanner world (RAS+, mm): the forward affine of the registration.
    residual : (181, 217, 181) tensor
        On the working grid: output of the network minus the interpolated image.

    Returns
    -------
    image, part, grid
        The output; how much of the residual was laid over each voxel (0 to 1, and 0 outside the
        field of view, or where there is none); the grid of both, see `native_grid`.
    """
    grid = native_grid(source)
    mapping = index_map(grid, source)
    covered = coverage(mapping, source.shape, grid.shape)
    image = resample(native, mapping, grid.shape, "cubic")
    to_working = index_map(grid, WORKING_GRID, np.linalg.inv(world))
    part = enhanced_part(to_working, grid.shape) * covered * bool(residual.any())
    seen = coverage(index_map(WORKING_GRID, source, world), source.shape, WORKING_GRID.shape)
    residual = _continued(residual, seen)
    image = image + part * resample(residual, to_working, grid.shape, "cubic")
    if native.min() >= 0:
        image = image.clamp(min=0)  # a spline overshoots at edges, a magnitude does not
    return image * covered, part, grid
