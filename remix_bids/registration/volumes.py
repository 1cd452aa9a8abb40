"""Small isotropic volumes to register with: arrays, affines and how to sample them (numpy only)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.linalg import polar

from remix_bids.errors import InputImageError

_SHEAR = 1e-3  # cosine between axes; rounding in a header is less
_FWHM = 2.3548  # full width at half maximum of a Gaussian of sigma 1


@dataclass(frozen=True)
class Volume:
    """Samples (x, y, z) float32 and their voxel-to-world affine (RAS+, mm)."""

    data: np.ndarray
    affine: np.ndarray

    @property
    def zooms(self) -> np.ndarray:
        """Voxel sizes in mm."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    def points(self) -> np.ndarray:
        """World coordinates (3, x, y, z) of all voxels."""
        index = np.indices(self.data.shape, dtype=float)
        return np.tensordot(self.affine[:3, :3], index, 1) + self.affine[:3, 3].reshape(3, 1, 1, 1)


def load_volume(path: str | Path) -> Volume:
    """Read one 3D image; a fourth axis of length 1 is dropped.

    Raises
    ------
    InputImageError
        It cannot be read, is not 3D, is empty, or has an affine that cannot be inverted.
    """
    import nibabel as nb

    try:
        image = nb.load(path)
        data = np.asanyarray(image.dataobj).astype(np.float32)
    except Exception as error:
        raise InputImageError(f"{path} cannot be read as an image: {error}") from error
    affine = np.array(image.affine, dtype=float)
    if data.ndim > 3 and int(np.prod(data.shape[3:])) == 1:
        data = data.reshape(data.shape[:3])
    if data.ndim != 3 or min(data.shape) < 2:
        raise InputImageError(f"{path} is not a 3D image: its shape is {data.shape}")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise InputImageError(f"{path} has no usable voxel-to-world affine in its header")
    data[~np.isfinite(data)] = 0
    if data.max() <= data.min():
        raise InputImageError(f"{path} is empty: all voxels hold {data.flat[0]}")
    return Volume(data, affine)


def squeeze_intensities(volume: Volume) -> Volume:
    """Background at 0, tissue deep inside the head at 0.5, fat and vessels clipped at 1."""
    data = volume.data - np.percentile(volume.data, 0.5)
    np.clip(data, 0, None, out=data)
    deep = depth_profile(volume).deep
    return Volume(np.clip(data / (2 * deep), 0, 1).astype(np.float32), volume.affine)


def to_isotropic(volume: Volume, spacing: float) -> Volume:
    """Same axes and extent on voxels of ``spacing`` mm, smoothed where that is coarser.

    Axes that are not at right angles are replaced by the nearest that are, since ITK knows no
    shear; the extent then holds the whole volume, 0 around it.
    """
    zooms = volume.zooms
    sigma = np.sqrt(np.clip(spacing**2 - zooms**2, 0, None)) / _FWHM / zooms
    smooth = ndimage.gaussian_filter(volume.data, sigma, mode="nearest")
    axes = volume.affine[:3, :3] / zooms
    if np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR:
        return _at_right_angles(Volume(smooth, volume.affine), spacing)
    shape = np.maximum(np.floor(np.array(volume.data.shape) * zooms / spacing + 1e-6), 1)
    step = spacing / zooms
    # Centred, so that both grids have the same middle.
    start = (np.array(volume.data.shape) - 1) / 2 - (shape - 1) / 2 * step
    data = ndimage.affine_transform(
        smooth, np.diag(step), start, tuple(shape.astype(int)), order=1, mode="nearest"
    )
    change = np.eye(4)
    change[:3, :3] = np.diag(step)
    change[:3, 3] = start
    return Volume(data, volume.affine @ change)


def _at_right_angles(volume: Volume, spacing: float) -> Volume:
    rotation = polar(volume.affine[:3, :3] / volume.zooms)[0]
    ends = np.array([*product(*((0, n - 1) for n in volume.data.shape))]).T
    corners = rotation.T @ (volume.affine[:3, :3] @ ends + volume.affine[:3, 3:])
    low, high = corners.min(axis=1), corners.max(axis=1)
    shape = np.ceil((high - low) / spacing).astype(int) + 1
    affine = np.eye(4)
    affine[:3, :3] = spacing * rotation
    affine[:3, 3] = rotation @ ((low + high) / 2 - (shape - 1) / 2 * spacing)
    index = np.linalg.inv(volume.affine) @ affine
    data = ndimage.affine_transform(volume.data, index[:3, :3], index[:3, 3], tuple(shape), order=1)
    return Volume(data, affine)


def sample(volume: Volume, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trilinear samples at world points (3, ...) and whether they lie inside the field of view."""
    inverse = np.linalg.inv(volume.affine)
    index = np.tensordot(inverse[:3, :3], points, 1)
    index += inverse[:3, 3].reshape(3, *([1] * (points.ndim - 1)))
    sizes = np.array(volume.data.shape).reshape(3, *([1] * (points.ndim - 1)))
    inside = np.asarray(((index >= -0.5) & (index <= sizes - 0.5)).all(axis=0))
    values = ndimage.map_coordinates(volume.data, index, order=1, mode="nearest")
    return values * inside, inside


def save_volume(volume: Volume, path: Path) -> None:
    """Write as NIfTI, world coordinates in both header forms."""
    import nibabel as nb

    image = nb.Nifti1Image(volume.data.astype(np.float32), volume.affine)
    image.set_sform(volume.affine, 1)
    image.set_qform(volume.affine, 1)
    nb.save(image, path)


@dataclass(frozen=True)
class DepthProfile:
    """Intensity against the depth below the surface of whatever was imaged.

    Attributes
    ----------
    deep : float
        Median more than 20 mm below the surface, above background.
    radius : float
        Largest depth, mm: some 50 to 60 in a brain, 70 and more in a head.
    drop : float
        Largest fall of intensity on the way in, over the first 24 mm, relative to ``deep``: none
        in a stripped brain (fluid, cortex, white matter), but scalp lies over skull in a head.
    """

    deep: float
    radius: float
    drop: float

    @property
    def head(self) -> float:
        """Evidence for a whole head, -1 (a stripped brain, surely) to 1 (a head, surely)."""
        size = np.clip((self.radius - 66) / 4, -1, 1)
        rim = np.clip((self.drop - 0.02) / 0.02, -1, 1)
        return float(size + rim) / 2


def depth_profile(volume: Volume) -> DepthProfile:
    """Measure `DepthProfile`. A cut by the field of view is no surface.

    Raises
    ------
    InputImageError
        There is no object to speak of.
    """
    small = to_isotropic(volume, 4.0)
    data = small.data - np.percentile(small.data, 0.5)
    bright = data[data > 0.1 * np.percentile(data, 99)]
    if bright.size < 1000:
        raise InputImageError("the image shows nothing of the size of a brain")
    inside = ndimage.binary_opening(data > 0.15 * np.percentile(bright, 90))
    labels, n = ndimage.label(inside)
    if n == 0:
        raise InputImageError("the image shows nothing of the size of a brain")
    inside = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    padded = np.pad(inside, 6, mode="edge")
    inside |= ndimage.binary_closing(padded, iterations=4)[6:-6, 6:-6, 6:-6]
    for axis in range(3):
        for plane in np.moveaxis(inside, axis, 0):
            plane[...] = ndimage.binary_fill_holes(plane)
    if inside.all():
        depth = np.full(inside.shape, 100.0)
    else:
        depth = ndimage.distance_transform_edt(inside) * 4.0
    values = data[depth > min(20.0, 0.6 * float(depth.max()))]
    deep = max(float(np.median(values)), 1e-6)
    bins = [data[(depth > d) & (depth <= d + 4)] for d in range(0, 24, 4)]
    profile = np.array([np.median(b) for b in bins if b.size > 20]) / deep
    # A tiny rise-and-fall is noise; see the figures in the docs of the benchmark.
    drop = max((float(a - profile[i:].min()) for i, a in enumerate(profile)), default=0.0)
    return DepthProfile(deep, float(depth.max()), drop)
