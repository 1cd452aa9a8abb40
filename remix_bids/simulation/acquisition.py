"""Acquisitions: the geometry of a scan, and the bank of real ones.

A `Geometry` is what a header and a sidecar tell of one real scan. An `Acquisition` is a geometry
placed on a head: it also knows the way from template world to scanner world, and the profile.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path

import numpy as np

from remix_bids.errors import UsageError
from remix_bids.experts.registry import effective_voxel_volume
from remix_bids.spatial import Grid

BRAIN_CENTRE = np.array([0.0, -18.0, 10.0])
"""Middle of the brain's bounding box in MNI152 (RAS+, mm)."""

FINEST = 0.9
"""In-plane voxel size (mm) below which a reconstruction is taken to be zero-filled."""

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""World axis (RAS+) along which the slices of a plane are stacked."""


@dataclass(frozen=True)
class Geometry:
    """What is known of one real scan; one row of the bank.

    Attributes
    ----------
    shape : tuple of 3 int
        Voxels in array order.
    affine : tuple of 4 tuples of 4 float
        Voxel index to scanner world, RAS+, mm.
    thickness, gap : float or None
        Of the slices, mm, where the sidecar tells.
    exact : bool
        False where field of view, slice count or centre had to be assumed.
    group : str
        Anonymous key of the person; geometries of one group stay on one side of a split.
    held_out : bool
        Never used for training.
    world : tuple of 4 tuples of 4 float, optional
        Template world to scanner world (RAS+, mm) of the person who was scanned, from an earlier
        run of remix-bids; most rows have none.
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    thickness: float | None
    gap: float | None
    exact: bool
    contrast: str
    licence: str
    source: str
    group: str
    held_out: bool = False
    world: tuple[tuple[float, ...], ...] | None = None

    @cached_property
    def grid(self) -> Grid:
        return Grid(self.shape, np.array(self.affine))

    @cached_property
    def plane(self) -> str:
        grid = self.grid
        normal = grid.affine[:3, slice_axis(grid)]
        return list(PLANES)[int(np.argmax(np.abs(normal)))]


@dataclass(frozen=True)
class Acquisition:
    """A geometry on a head: all that the simulator needs.

    Attributes
    ----------
    grid : Grid
        The native grid.
    world : (4, 4) array
        Template world to scanner world (RAS+, mm): what registration gives as forward affine.
    widths : tuple of 3 float
        Full width at half maximum of the acquisition's profile along each voxel axis, mm.
    box : tuple of 3 bool
        Along which axes the profile is a smoothed box; a Gaussian elsewhere.
    thickness : float or None
        Nominal slice thickness, mm, where a sidecar would tell it.
    """

    grid: Grid
    world: np.ndarray
    widths: tuple[float, float, float]
    box: tuple[bool, bool, bool] = (False, False, False)
    thickness: float | None = None

    @property
    def volume(self) -> float:
        """Effective voxel volume in mm3."""
        return effective_voxel_volume(self.grid.voxel_sizes)

    @property
    def anisotropy(self) -> float:
        sizes = np.maximum(self.grid.voxel_sizes, 1.0)
        return float(sizes.max() / sizes.min())

    def without_profile(self) -> Acquisition:
        """The same grid, sampled at points."""
        return replace(self, widths=(0.0, 0.0, 0.0))


def slice_axis(grid: Grid) -> int:
    """Array axis with the coarsest voxel size.

    Of several that are as coarse the one nearest to feet-head, else to back-front: in which order
    axes are stored is no property of a scan.
    """
    sizes = grid.voxel_sizes
    nearest = np.abs(_nearest_axes(grid.affine[:3, :3] / sizes)).argmax(axis=0)
    return int(max(_coarsest(sizes), key=lambda axis: nearest[axis]))


def coarsest_axes(grid: Grid) -> tuple[int, ...]:
    """Array axes that are as coarse as the coarsest one."""
    return tuple(map(int, _coarsest(grid.voxel_sizes)))


def _coarsest(sizes: np.ndarray) -> np.ndarray:
    return np.flatnonzero(sizes > (1 - 1e-3) * sizes.max())


def _zero_filled(sizes: np.ndarray) -> np.ndarray:
    # Those of a turned affine are rounded, and `place` samples the finest ones at just this size.
    return np.asarray(sizes < FINEST - 1e-3)


@dataclass(frozen=True)
class Sampling:
    """How a scan's grid looks from an output grid: each of its axes by the nearest output axis.

    Attributes
    ----------
    rows : (3, 4) array
        Scan index along each axis as an affine function of the output index.
    sizes : (3,) array
        Voxel sizes of the scan, mm.
    """

    rows: np.ndarray
    sizes: np.ndarray

    @property
    def axis(self) -> int:
        """Along which the slices are stacked; the last one of several that are as coarse."""
        return int(_coarsest(self.sizes)[-1])

    def phases(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Where the scan has measured, (3, x, y, z) float32, one channel for each axis.

        ``cos(2 pi k)`` with k the scan's index (1 on a sample, -1 half-way), faded out as the voxel
        size approaches the 1 mm of the output.
        """
        i, j, k = (np.arange(n, dtype=np.float32) for n in shape)
        out = np.empty((3, *shape), dtype=np.float32)
        for phase, row, size in zip(out, self.rows.astype(np.float32), self.sizes, strict=True):
            index = (row[0] * i + row[3])[:, None, None] + (row[1] * j)[None, :, None] + row[2] * k
            phase[...] = np.clip(size - 1, 0, 1) * np.cos(np.float32(2 * np.pi) * index)
        return out


def sampling(mapping: np.ndarray, source: Grid) -> Sampling:
    """The grid of a scan, seen through the index map from an output grid to it."""
    sizes = source.voxel_sizes
    nearest = np.abs(_nearest_axes(mapping[:3, :3] * sizes[:, None])).argmax(axis=0)
    return Sampling(mapping[:3][nearest], sizes[nearest])


def load_bank(path: Path | None = None) -> list[Geometry]:
    """Read a bank of geometries; the shipped one by default.

    Raises
    ------
    UsageError
        If there is no such file, or it is no bank.
    """
    if path is not None and not Path(path).is_file():
        raise UsageError(f"there is no bank {path}: remix-experts harvest writes one")
    if path is None:
        text = resources.files("remix_bids.data").joinpath("acquisitions.json").read_text()
    else:
        text = Path(path).read_text()
    try:
        return [
            Geometry(
                **{
                    **row,
                    "shape": tuple(row["shape"]),
                    "affine": _as_tuples(row["affine"]),
                    "world": _as_tuples(row["world"]) if "world" in row else None,
                }
            )
            for row in json.loads(text)["acquisitions"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} is not a bank that remix-experts harvest has written "
            f"({type(error).__name__}: {error})"
        ) from error


@lru_cache
def geometries(bank: Path | None = None, *, held_out: bool) -> list[Geometry]:
    """The geometries of a bank (the shipped one by default) that are, or are not, held out.

    Raises
    ------
    UsageError
        If there are none.
    """
    found = [g for g in load_bank(bank) if g.held_out == held_out]
    if not found:
        why = "no geometry is held out" if held_out else "all of its persons are held out"
        raise UsageError(f"{bank} cannot be used for this: {why}; harvest more persons")
    return found


def _as_tuples(matrix: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(line) for line in matrix)


def save_bank(geometries: Sequence[Geometry], path: Path) -> None:
    """Write a bank, one geometry a line so that differences can be read."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    told = [asdict(g) for g in geometries]
    for row in told:
        if row["world"] is None:
            del row["world"]
    rows = ",\n".join(json.dumps(row) for row in told)
    Path(path).write_text(f'{{"format": 1, "acquisitions": [\n{rows}\n]}}\n')


@dataclass(frozen=True)
class SyntheticShape:
    """Voxel sizes drawn for a class; the bank alone cannot balance the classes (SCIENCE 1)."""

    in_plane: float
    spacing: float
    gap: float


# Centre of a class to the range of effective voxel volumes that it trains on, mm3.
CLASS_RANGES = {
    k: (1.0, 1.5) if k == 1 else (6.25, 9.0) if k == 7 else (k - 0.75, k + 0.75)
    for k in range(1, 8)
}


def draw_shape(rng: np.random.Generator, k: int) -> SyntheticShape:
    """Draw voxel sizes of class ``k``: mostly thick slices, some of them isotropic."""
    volume = rng.uniform(*CLASS_RANGES[k])
    kind = rng.choice(3, p=[0.70, 0.15, 0.15])
    if kind == 2:
        side = volume ** (1 / 3)
        return SyntheticShape(side, side, 0.0)
    in_plane = rng.uniform(1.0, 1.15) if kind == 0 else rng.uniform(1.15, 1.5)
    in_plane = min(in_plane, volume ** (1 / 3))  # a slice is never thinner than its pixels
    spacing = volume / max(in_plane, 1.0) ** 2
    gap = 0.0 if rng.random() < 0.5 else rng.uniform(0.05, 0.25)
    return SyntheticShape(in_plane, spacing, gap * spacing)


def turn_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation by an angle in degrees about an axis of any length (Rodrigues' formula)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(angle)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _rotation(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Rotation by angles in degrees about the posterior-anterior, left-right and feet-head axes."""
    r, p, y = np.deg2rad([roll, pitch, yaw])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    about_y = np.array([[np.cos(r), 0, np.sin(r)], [0, 1, 0], [-np.sin(r), 0, np.cos(r)]])
    about_z = np.array([[np.cos(y), -np.sin(y), 0], [np.sin(y), np.cos(y), 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


def _rotation_of(affine: np.ndarray) -> np.ndarray:
    """The rotation nearest to an affine."""
    u, _, vt = np.linalg.svd(affine[:3, :3])
    return u @ vt


def _nearest_axes(directions: np.ndarray) -> np.ndarray:
    """The signed permutation nearest to a matrix of direction cosines."""
    out = np.zeros((3, 3))
    left = np.abs(directions).copy()
    for _ in range(3):
        row, column = np.unravel_index(np.argmax(left), left.shape)
        out[row, column] = np.sign(directions[row, column])
        left[row, :] = left[:, column] = -1
    return out


def place(
    geometry: Geometry,
    person: np.ndarray,
    rng: np.random.Generator,
    *,
    shape: SyntheticShape | None = None,
    box: bool | None = None,
    centre_sd: float = 5.0,
    obliquity: float | None = None,
) -> Acquisition:
    """Put the geometry of one scan on the head of another person.

    Slices are planned on the anatomy, while header angles also hold the tilt of the head: three
    quarters of the draws keep only the plane of the header and tilt it by a few degrees, one
    quarter keeps the header's full rotation.

    A geometry with an affine of its own lies where it really lay: its affine, the header's rotation
    and the centre of the field of view are taken as they are, and ``person`` is not looked at.

    Parameters
    ----------
    geometry : Geometry
        A row of the bank.
    person : (4, 4) array
        Template world to native world of a real person; its scale and shear are used, its rotation
        and shift are not.
    rng : numpy Generator
    shape : SyntheticShape, optional
        Voxel sizes instead of the geometry's own; the field of view is kept.
    box : bool, optional
        Profile across the slice: smoothed box or Gaussian; drawn if absent.
    centre_sd : float
        Standard deviation of the shift of the field of view, mm; of no effect on a geometry with an
        affine of its own.
    obliquity : float, optional
        Turn the slices by exactly this angle (degrees) about a random axis instead, away from the
        axes of the anatomy.

    Returns
    -------
    Acquisition
    """
    grid = geometry.grid
    sizes = grid.voxel_sizes
    axis = slice_axis(grid)
    extent = sizes * np.array(grid.shape)
    directions = grid.affine[:3, :3] / sizes
    own = None if geometry.world is None else np.array(geometry.world, dtype=float)
    if obliquity is not None:
        turn = turn_about(rng.normal(size=3), obliquity)
        # Without an affine of its own the head is upright in the scanner.
        head = np.eye(3) if own is None else _rotation_of(own)
        directions = head @ turn @ _nearest_axes(head.T @ directions)
    elif own is None and rng.random() < 0.75:
        tilt = _rotation(rng.normal(0, 3), rng.normal(0, 8), rng.normal(0, 3))
        directions = tilt @ _nearest_axes(directions)

    if shape is not None:
        sizes = np.full(3, shape.in_plane)
        sizes[axis] = shape.spacing
        thickness = shape.spacing - shape.gap
    elif geometry.gap is not None:
        thickness = sizes[axis] - geometry.gap
    elif geometry.thickness is not None:
        thickness = min(geometry.thickness, sizes[axis])
    else:
        thickness = sizes[axis] * rng.uniform(0.85, 1.0)
    told = shape is not None or geometry.gap is not None or geometry.thickness is not None
    # How an array is stored is no property of a scanner.
    if (coarse := _coarsest(sizes)).size > 1:
        axis = int(rng.choice(coarse))

    # Fine matrices are zero-filled: what was acquired in-plane is coarser than the voxel, and
    # sampling it at 0.9 mm loses nothing that was measured.
    widths = np.where(_zero_filled(sizes), rng.uniform(np.clip(sizes, 0.8, 1.2), 1.25), sizes)
    widths[axis] = thickness
    in_plane = np.arange(3) != axis
    sizes = np.where(in_plane, np.maximum(sizes, FINEST), sizes)
    counts = np.maximum(np.ceil(extent / sizes - 1e-6), 4).astype(int)
    widths *= rng.uniform(0.85, 1.1)
    is_box = bool(rng.random() < 0.5) if box is None else box

    if own is None:
        stretch = np.array(person, dtype=float)[:3, :3]
        _, s, vt = np.linalg.svd(stretch)
        world = np.eye(4)
        world[:3, :3] = vt.T @ np.diag(s) @ vt
        centre = world[:3, :3] @ BRAIN_CENTRE + rng.normal(0, centre_sd, 3)
    else:
        world = own
        centre = (grid.affine @ [*((np.array(grid.shape) - 1) / 2), 1])[:3]
    affine = np.eye(4)
    affine[:3, :3] = directions * sizes
    affine[:3, 3] = centre - affine[:3, :3] @ ((counts - 1) / 2)
    return Acquisition(
        Grid(tuple(counts), affine),
        world,
        (float(widths[0]), float(widths[1]), float(widths[2])),
        (is_box and axis == 0, is_box and axis == 1, is_box and axis == 2),
        float(thickness) if told else None,
    )


WIDTH_FACTOR = 0.975
"""Effective width of a profile over its nominal one: the middle of the range that is simulated."""


def from_header(grid: Grid, world: np.ndarray, thickness: float | None = None) -> Acquisition:
    """The acquisition of a real scan, as far as its header and sidecar tell.

    Parameters
    ----------
    grid : Grid
        The native grid.
    world : (4, 4) array
        Template world to scanner world (RAS+, mm): the forward affine of the registration.
    thickness : float, optional
        Of the slices, mm (``SliceThickness``); the spacing where it is absent, zero or larger, or
        where two axes are equally coarse.

    Returns
    -------
    Acquisition
        With Gaussian profiles of the middle of the widths that `place` draws.
    """
    sizes = grid.voxel_sizes
    widths = np.where(_zero_filled(sizes), (np.clip(sizes, 0.8, 1.2) + 1.25) / 2, sizes)
    axis = slice_axis(grid)
    # Where two axes are as coarse, nothing tells which of them the slices are stacked along.
    alone = np.delete(sizes, axis).max() < 0.99 * sizes[axis]
    if alone and thickness is not None and 0 < thickness < sizes[axis]:
        widths[axis] = thickness
    x, y, z = (float(w) for w in widths * WIDTH_FACTOR)
    return Acquisition(grid, np.array(world, dtype=float), (x, y, z), thickness=thickness)


def draw(
    rng: np.random.Generator,
    bank: Sequence[Geometry],
    persons: Sequence[np.ndarray],
    k: int,
) -> Acquisition:
    """Draw a training acquisition of class ``k``: a real plane and field of view, drawn sizes.

    Planes that a bank does not hold are left to those that it holds.

    Parameters
    ----------
    bank : sequence of Geometry
        Geometries that training may use.
    persons : sequence of (4, 4) arrays
        Template world to native world of training persons.
    k : int
        Class, 1 to 7.
    """
    plane = rng.choice(["axial", "sagittal", "coronal"], p=[0.45, 0.35, 0.20])
    person = persons[int(rng.integers(len(persons)))]
    low, high = CLASS_RANGES[k]
    own = [g for g in bank if low <= effective_voxel_volume(g.grid.voxel_sizes) < high]
    if own and rng.random() < 0.3:
        return place(own[rng.integers(len(own))], person, rng)
    candidates = [g for g in bank if g.plane == plane] or list(bank)
    geometry = candidates[rng.integers(len(candidates))]
    return place(geometry, person, rng, shape=draw_shape(rng, k))
