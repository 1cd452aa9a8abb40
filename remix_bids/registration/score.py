"""How well do an image and a template agree under an affine, and is the affine possible at all?"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from remix_bids.registration.volumes import Volume, sample

SPACING = 3.0  # mm, of the comparison
WINDOW = 2.0  # sigma of the neighbourhood, voxels
SCALES = (0.75, 1.3)  # singular values a human head can have against an adult template


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Singular values of the linear part, largest first: native mm per template mm."""
    return np.linalg.svd(np.asarray(matrix)[:3, :3], compute_uv=False)


def possible(matrix: np.ndarray) -> bool:
    """Whether scales lie within `SCALES` and handedness is kept."""
    values = singular_values(matrix)
    return bool(
        values.min() >= SCALES[0]
        and values.max() <= SCALES[1]
        and np.linalg.det(np.asarray(matrix)[:3, :3]) > 0
    )


def neighbourhood_correlation(
    fixed: np.ndarray, moving: np.ndarray, inside: np.ndarray, region: np.ndarray
) -> float:
    """Mean signed local correlation, weighted by the local contrast of ``fixed``.

    Parameters
    ----------
    fixed, moving : (x, y, z) arrays
        On one grid.
    inside : (x, y, z) bool array
        Where ``moving`` was measured.
    region : (x, y, z) bool array
        Where to compare.

    Returns
    -------
    float
        1 for a linear relation in every neighbourhood, 0 for none. Blind to bias fields and to
        global contrast. A neighbourhood where ``moving`` is flat counts as 0.
    """
    valid = (inside & region).astype(np.float32)
    n = ndimage.gaussian_filter(valid, WINDOW, mode="constant")
    n = np.maximum(n, 1e-3)

    def mean(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x * valid, WINDOW, mode="constant") / n

    f, m = mean(fixed), mean(moving)
    ff = np.maximum(mean(fixed * fixed) - f * f, 0)
    mm = np.maximum(mean(moving * moving) - m * m, 0)
    fm = mean(fixed * moving) - f * m
    used = (valid > 0) & (n > 0.1)
    if used.sum() < 100:
        return 0.0
    correlation = fm[used] / np.sqrt((ff[used] + 1e-5) * (mm[used] + 1e-4))
    weight = np.sqrt(ff[used])
    return float((correlation * weight).sum() / max(float(weight.sum()), 1e-6))


def agreement(
    moving: Volume, template: Volume, region: Volume, matrix: np.ndarray
) -> tuple[float, float]:
    """Neighbourhood correlation under ``matrix`` and the covered fraction of ``region``.

    Parameters
    ----------
    matrix : (4, 4) array
        Template world to native world, RAS+ mm.
    """
    box = ndimage.find_objects((region.data > 0.5).astype(int))[0]
    where = region.data[box] > 0.5
    points = template.points()[(slice(None), *box)]
    at = np.tensordot(matrix[:3, :3], points, 1) + matrix[:3, 3].reshape(3, 1, 1, 1)
    values, inside = sample(moving, at)
    score = neighbourhood_correlation(template.data[box], values, inside, where)
    return score, float(inside[where].mean())


def perturbations(centre: np.ndarray) -> list[np.ndarray]:
    """Small wrong turns (4x4) about a centre: 4 mm, 6 degrees, 8 % along and about each axis.

    Each moves the brain by about 4 mm.
    """
    changes = []
    for axis in range(3):
        for sign in (-1, 1):
            shift = np.eye(4)
            shift[axis, 3] = 4.0 * sign
            changes.append(shift)
            linear = [Rotation.from_rotvec(np.eye(3)[axis] * np.deg2rad(6.0 * sign)).as_matrix()]
            linear.append(np.diag(1 + 0.08 * sign * np.eye(3)[axis]))
            for part in linear:
                about = np.eye(4)
                about[:3, :3] = part
                about[:3, 3] = centre - part @ centre
                changes.append(about)
    return changes


def peak(moving: Volume, template: Volume, region: Volume, matrix: np.ndarray) -> float:
    """How far the score falls at the most favourable of the `perturbations`.

    A right registration lies on a peak: the score, which is not what was optimised, falls on every
    side. Below 0 a result a few mm away agrees better, so something is wrong.
    """
    here = agreement(moving, template, region, matrix)[0]
    centre = region.points()[:, region.data > 0.5].mean(axis=1)
    return min(
        here - agreement(moving, template, region, matrix @ change)[0]
        for change in perturbations(centre)
    )
