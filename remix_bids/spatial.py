"""Grids and resampling, shared by simulation, training, evaluation and the app.

Voxel indices are (i, j, k) in array order, world coordinates are RAS+ millimetres (NIfTI). An
*index map* is the 4x4 matrix that takes an output voxel index to an input voxel index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_MARGIN = 2  # voxels that a cubic B-spline reaches beyond its interval
_SLAB = 8


@dataclass(frozen=True)
class Grid:
    """A voxel grid: shape (x, y, z) and voxel-to-world affine (4x4, RAS+, mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=float)
        if affine.shape != (4, 4) or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
            raise ValueError(f"not an invertible 4x4 affine: {affine!r}")
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def voxel_sizes(self) -> np.ndarray:
        """Voxel sizes in mm, in array order."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))


WORKING_GRID = Grid(
    (181, 217, 181),
    np.array([[1, 0, 0, -90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]], dtype=float),
)
"""The grid all experts work on: TemplateFlow's ``MNI152Lin`` at ``res-01``."""


def index_map(output: Grid, source: Grid, world: np.ndarray | None = None) -> np.ndarray:
    """Index map from ``output`` voxels to ``source`` voxels.

    Parameters
    ----------
    world : (4, 4) array, optional
        Takes output world coordinates to source world coordinates (RAS+, mm); identity if absent.
        For ANTs this is the forward affine of a registration with ``output`` fixed.
    """
    world = np.eye(4) if world is None else np.asarray(world, dtype=float)
    return np.linalg.inv(source.affine) @ world @ output.affine


@lru_cache(maxsize=64)
def _prefilter_matrix(n: int) -> np.ndarray:
    """Dense inverse of cubic B-spline sampling on ``n`` samples with mirror boundaries."""
    sampling = np.zeros((n, n))
    for i in range(n):
        sampling[i, i] += 4 / 6
        for j in (i - 1, i + 1):
            j = -j if j < 0 else j
            j = 2 * (n - 1) - j if j > n - 1 else j
            sampling[i, max(j, 0)] += 1 / 6
    inverse = np.linalg.inv(sampling)
    # It decays as 0.27 to the power of the distance: what remains far away is only slow denormals.
    return np.where(np.abs(inverse) > 1e-12, inverse, 0.0)


def along_axis(matrix: Tensor, image: Tensor, axis: int) -> Tensor:
    """Apply a (m, n) matrix along one of the three last axes (0, 1, 2) of ``image``."""
    if axis == 2:
        return image @ matrix.T
    if axis == 1:
        return matrix @ image
    lead, (x, y, z) = image.shape[:-3], image.shape[-3:]
    return (matrix @ image.reshape(*lead, x, y * z)).reshape(*lead, matrix.shape[0], y, z)


def spline_coefficients(image: Tensor) -> Tensor:
    """Cubic B-spline coefficients of (..., x, y, z) samples, mirror boundaries."""
    for axis in range(3):
        n = image.shape[axis - 3]
        if n > 1:
            matrix = torch.as_tensor(_prefilter_matrix(n), dtype=image.dtype, device=image.device)
            image = along_axis(matrix, image, axis)
    return image


def _sample_linear(image: Tensor, index: Tensor) -> Tensor:
    """Trilinear samples of (n, c, x, y, z) at (n, 3, x, y, z) indices, edge values outside."""
    sizes = torch.tensor(image.shape[-3:], dtype=index.dtype, device=index.device)
    # grid_sample wants coordinates in [-1, 1] and the last array axis first.
    grid = (2 * index / (sizes - 1).clamp(min=1).view(3, 1, 1, 1) - 1).flip(1).movedim(1, -1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _cubic_by_linear(padded: Tensor, index: Tensor) -> Tensor:
    """Cubic B-spline interpolation as eight trilinear look-ups (Sigg and Hadwiger 2005).

    ``padded`` holds the coefficients (1, C, x, y, z) with a mirrored margin of `_MARGIN` voxels.
    """
    sizes = torch.tensor(padded.shape[-3:], dtype=index.dtype, device=index.device) - 2 * _MARGIN
    index = torch.minimum(index[0].clamp(min=0), (sizes - 1).view(3, 1, 1, 1))
    base = index.floor()
    t = index - base
    w0 = (1 - t) ** 3 / 6
    w1 = 2 / 3 - 0.5 * t**2 * (2 - t)
    low = w0 + w1
    at = (base + (w1 / low + (_MARGIN - 1)), base + (t**3 / 6 / (1 - low) + (_MARGIN + 1)))
    weight = (low, 1 - low)
    corners = list(product((0, 1), repeat=3))
    where = torch.stack([torch.stack([at[i][0], at[j][1], at[k][2]]) for i, j, k in corners])
    terms = _sample_linear(padded.expand(len(corners), -1, -1, -1, -1), where)
    out = torch.zeros_like(terms[:1])
    for (i, j, k), term in zip(corners, terms, strict=True):
        out += term * (weight[i][0] * weight[j][1] * weight[k][2])
    return out


def voxel_indices(mapping: np.ndarray, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    """Input voxel indices (3, x, y, z) of every voxel of an output grid."""
    m = torch.as_tensor(mapping, dtype=torch.float64)
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    rows = []
    for r in range(3):
        row = (
            (m[r, 0] * axes[0] + m[r, 3])[:, None, None]
            + (m[r, 1] * axes[1])[None, :, None]
            + (m[r, 2] * axes[2])[None, None, :]
        )
        rows.append(row.to(like.dtype).to(like.device))
    return torch.stack(rows)


def resample(
    image: Tensor, mapping: np.ndarray, shape: tuple[int, int, int], order: str = "cubic"
) -> Tensor:
    """Resample an image through an index map.

    Parameters
    ----------
    image : (x, y, z) or (c, x, y, z) floating tensor
        Samples on the source grid.
    mapping : (4, 4) array
        Output voxel index to source voxel index.
    shape : tuple of int
        Output grid.
    order : {'cubic', 'linear'}
        Interpolating cubic B-spline or trilinear. Outside the source grid the edge value is
        repeated; multiply by `coverage` to keep only what was measured.

    Returns
    -------
    tensor of ``shape`` (with the channel axis of the input, if it had one)
    """
    if order not in ("cubic", "linear"):
        raise ValueError(f"order must be 'cubic' or 'linear', not {order!r}")
    channels = image.ndim == 4
    batch = image[None] if channels else image[None, None]
    sample = _sample_linear
    if order == "cubic" and min(image.shape[-3:]) > _MARGIN:
        batch = F.pad(spline_coefficients(batch), (_MARGIN,) * 6, mode="reflect")
        sample = _cubic_by_linear
    out = image.new_empty((batch.shape[1], *shape))
    # Slabs keep the intermediate arrays small: twice as fast as the whole grid at once on a CPU.
    for start in range(0, shape[0], _SLAB):
        depth = min(_SLAB, shape[0] - start)
        first = np.eye(4)
        first[0, 3] = start
        index = voxel_indices(mapping @ first, (depth, *shape[1:]), image)[None]
        out[:, start : start + depth] = sample(batch, index)[0]
    return out if channels else out[0]


def coverage(
    mapping: np.ndarray,
    source_shape: tuple[int, int, int],
    shape: tuple[int, int, int],
    like: Tensor | None = None,
) -> Tensor:
    """Which output voxels lie inside the acquired grid (voxel edges included): bool (x, y, z)."""
    like = torch.empty(0) if like is None else like
    index = voxel_indices(mapping, shape, like)
    sizes = torch.tensor(source_shape, dtype=index.dtype, device=index.device).view(3, 1, 1, 1)
    return ((index >= -0.5) & (index <= sizes - 0.5)).all(dim=0)
