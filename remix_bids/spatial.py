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
from torch import Tensor

_NODES = 2  # per output voxel, at which the spline is tabulated
_SLAB = 8  # planes sampled at a time: small intermediate arrays stay in a CPU's cache


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


def _mirror(i: int, n: int) -> int:
    i = abs(i)
    return 2 * (n - 1) - i if i > n - 1 else i


def _spline_weights(t: float) -> tuple[float, float, float, float]:
    """Cubic B-spline weights of the four samples around a position ``t`` in [0, 1)."""
    u = 1 - t
    return u**3 / 6, 2 / 3 - t * t * (1 - t / 2), 2 / 3 - u * u * (1 - u / 2), t**3 / 6


@lru_cache(maxsize=256)
def _spline_matrix(n: int, factor: int, start: int, stop: int) -> np.ndarray:
    """Interpolating cubic B-spline of ``n`` samples, mirrored at its ends, as a matrix.

    It gives the values at ``factor`` nodes per sample, from sample ``start`` to ``stop``.
    """
    if n == 1:
        return np.ones((1, 1))
    sampling = np.zeros((n, n))
    nodes = np.zeros(((stop - start) * factor + 1, n))
    for matrix, positions in (
        (sampling, np.arange(n)),
        (nodes, start + np.arange(len(nodes)) / factor),
    ):
        for row, position in zip(matrix, positions, strict=True):
            base = int(np.floor(position))
            for offset, weight in enumerate(_spline_weights(position - base), base - 1):
                row[_mirror(offset, n)] += weight
    out = np.linalg.solve(sampling.T, nodes.T).T
    # It decays as 0.27 to the power of the distance: what is cut off is a millionth of a sample.
    return np.where(np.abs(out) > 1e-6, out, 0.0)


def _bands(matrix: Tensor, rows: int = 32) -> list[tuple[slice, slice]]:
    """Blocks of rows of a matrix, with the columns that are not zero there."""
    used = (matrix.detach() != 0).cpu().numpy()
    blocks = []
    for start in range(0, len(used), rows):
        block = slice(start, min(start + rows, len(used)))
        columns = np.flatnonzero(used[block].any(axis=0))
        first, last = (columns[0], columns[-1]) if len(columns) else (0, 0)
        blocks.append((block, slice(int(first), int(last) + 1)))
    return blocks


def along_axis(matrix: Tensor, image: Tensor, axis: int) -> Tensor:
    """Apply a (m, n) matrix along one of the three last axes (0, 1, 2) of ``image``.

    Matrices are mostly banded: on a CPU blocks of rows skip the columns that are zero. A GPU would
    wait to find them longer than it takes for all.
    """
    if matrix.is_cuda:
        return _product(matrix, image, axis)
    blocks = _bands(matrix)
    if sum((r.stop - r.start) * (c.stop - c.start) for r, c in blocks) > 0.7 * matrix.numel():
        return _product(matrix, image, axis)
    shape = list(image.shape)
    shape[axis - 3] = len(matrix)
    out = image.new_empty(shape)  # filled part by part: the largest array that there is, held once
    for r, c in blocks:
        seen = image.narrow(axis - 3, c.start, c.stop - c.start)
        out.narrow(axis - 3, r.start, r.stop - r.start).copy_(_product(matrix[r, c], seen, axis))
    return out


def _product(matrix: Tensor, image: Tensor, axis: int) -> Tensor:
    if axis == 2:
        return image @ matrix.T
    if axis == 1:
        return matrix @ image
    lead, (x, y, z) = image.shape[:-3], image.shape[-3:]
    return (matrix @ image.reshape(*lead, x, y * z)).reshape(*lead, matrix.shape[0], y, z)


def _sample_linear(image: Tensor, index: Tensor) -> Tensor:
    """Trilinear samples of (x, y, z) at (3, ...) indices, edge values outside.

    `torch.nn.functional.grid_sample` is slower on a CPU (``benchmarks/resampling.py``).
    """
    kind = torch.int32 if image.numel() < 2**31 else torch.int64
    first = torch.zeros_like(index[0], dtype=kind)  # flat index of a voxel's lower corner
    between = []
    for position, n in zip(index, image.shape, strict=True):
        position = position.clamp(0, n - 1)
        lower = position.floor().clamp(max=max(n - 2, 0))
        between.append((position - lower).flatten())
        first = first * n + lower.to(first)
    flat, first = image.reshape(-1), first.flatten()
    steps = np.cumprod([1, *image.shape[:0:-1]])[::-1]
    dx, dy, dz = (int(step) * (n > 1) for step, n in zip(steps, image.shape, strict=True))
    x, y, z = between

    def along_z(corner: int) -> Tensor:
        near, far = (flat[c:].index_select(0, first) for c in (corner, corner + dz))
        return near.lerp(far, z)

    def along_y(corner: int) -> Tensor:
        return along_z(corner).lerp(along_z(corner + dy), y)

    return along_y(0).lerp(along_y(dx), x).reshape(index.shape[1:])


def _tabulate(
    image: Tensor, mapping: np.ndarray, shape: tuple[int, int, int]
) -> tuple[Tensor, np.ndarray]:
    """The cubic spline of an image on nodes twice as fine as the output, and the map to them.

    Only the part that the output can reach is tabulated. Trilinear look-ups in the table cost an
    eighth of those that a cubic kernel needs, and separable tables are matrix products.
    """
    corners = np.array(list(product(*((0, n - 1) for n in shape))), dtype=float)
    index = corners @ mapping[:3, :3].T + mapping[:3, 3]
    to_nodes = np.eye(4)
    for axis in range(3):
        n = image.shape[axis - 3]
        start = int(np.clip(np.floor(index[:, axis].min()), 0, n - 1))
        stop = int(np.clip(np.ceil(index[:, axis].max()), start, n - 1))
        if stop == start:
            start, stop = max(0, start - 1), min(n - 1, stop + 1)
        factor = max(_NODES, round(_NODES / float(np.linalg.norm(mapping[axis, :3]))))
        factor = factor if n > 1 else 1
        table = _spline_matrix(n, factor, start, stop)
        weights = torch.as_tensor(table, dtype=image.dtype, device=image.device)
        image = along_axis(weights, image, axis)
        to_nodes[axis, axis], to_nodes[axis, 3] = factor, -factor * start
    return image, to_nodes @ mapping


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
        Trilinear, or interpolating cubic B-spline (tabulated at half an output voxel). Outside the
        source grid the edge value is repeated; multiply by `coverage` to keep what was measured.

    Returns
    -------
    tensor of ``shape`` (with the channel axis of the input, if it had one)
    """
    if order not in ("cubic", "linear"):
        raise ValueError(f"order must be 'cubic' or 'linear', not {order!r}")
    channels = image.ndim == 4
    batch = image[None] if channels else image[None, None]
    if order == "cubic":
        batch, mapping = _tabulate(batch, mapping, shape)
    out = image.new_empty((batch.shape[1], *shape))
    for start in range(0, shape[0], _SLAB):
        depth = min(_SLAB, shape[0] - start)
        first = np.eye(4)
        first[0, 3] = start
        index = voxel_indices(mapping @ first, (depth, *shape[1:]), image)
        for c, channel in enumerate(batch[0]):
            out[c, start : start + depth] = _sample_linear(channel, index)
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
