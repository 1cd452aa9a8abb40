"""Where is the brain, roughly? A search over all shifts and rotations to 40 degrees.

Correlation of the template with the image at 8 mm, over the template's brain mask and the 12 mm
around it, for all translations at once by Fourier transforms, with the field of view accounted for
(Padfield 2012, masked normalised correlation). No origin in a header can mislead it, and it costs
a few seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft, optimize
from scipy.spatial.transform import Rotation

from remix_bids.registration.volumes import Volume, sample

SPACING = 8.0  # mm
RADIUS = 112.0  # mm around the centre of the template's brain, all of it and the scalp
STEP = 20.0  # degrees between starts
REACH = 45.0  # degrees, the largest rotation tried
MIN_OVERLAP = 0.5  # of the template's brain region inside the field of view, or, of a slab that
OF_THE_MOST = 0.8  # cannot hold as much, of the most that it can hold


@dataclass(frozen=True)
class Start:
    """A candidate: template world to native world (4x4, RAS+ mm) and its correlation."""

    name: str
    stripped: bool
    matrix: np.ndarray
    score: float


def rotations() -> list[np.ndarray]:
    """Rotation vectors (radians) on a cubic grid inside a ball of `REACH` degrees."""
    steps = np.arange(-2, 3) * STEP
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    inside = np.linalg.norm(grid, axis=1) <= REACH
    return list(np.deg2rad(grid[inside]))


def _orthonormal(affine: np.ndarray) -> np.ndarray:
    """Axes of a grid in world coordinates."""
    return affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0))


def search(
    moving: Volume, templates: dict[bool, Volume], region: Volume, centre: np.ndarray
) -> dict[bool, list[Start]]:
    """Best starts for each kind, before any local optimisation.

    Parameters
    ----------
    moving : Volume
        The image at `SPACING` mm isotropic.
    templates : dict of Volume
        Under False the template with skull, under True the stripped one; either may be missing.
    region : Volume
        Weights of the comparison (1 inside) in template space.
    centre : (3,) array
        Centre of the template's brain, world mm.

    Returns
    -------
    dict of list of Start
        For each kind one start per rotation, best first.
    """
    axes = _orthonormal(moving.affine)
    n = int(RADIUS // SPACING)
    offsets = np.stack(np.meshgrid(*[np.arange(-n, n + 1)] * 3, indexing="ij")) * SPACING
    size = 2 * n + 1
    shape = [fft.next_fast_len(int(s) + size - 1, real=True) for s in moving.data.shape]
    data = moving.data.astype(np.float32)
    image = [fft.rfftn(x, shape) for x in (np.ones_like(data), data, data**2)]
    keep = tuple(slice(0, int(s) + size - 1) for s in moving.data.shape)

    def correlate(kernel: np.ndarray, which: int) -> np.ndarray:
        return fft.irfftn(kernel * image[which], shape)[keep]

    starts: dict[bool, list[Start]] = {kind: [] for kind in templates}
    for vector in rotations():
        turn = Rotation.from_rotvec(vector).as_matrix()  # template to native axes
        points = np.tensordot(turn.T @ axes, offsets, 1) + centre.reshape(3, 1, 1, 1)
        weight = sample(region, points)[0].astype(np.float32)
        mirrored = (slice(None, None, -1),) * 3
        w = fft.rfftn(weight[mirrored], shape)
        count = correlate(w, 0)
        total = weight.sum()
        safe = np.maximum(count, 1)
        b = correlate(w, 1)
        var_b = np.maximum(correlate(w, 2) - b**2 / safe, 0)
        usable = count > min(MIN_OVERLAP * total, OF_THE_MOST * count.max())
        for kind, template in templates.items():
            f = sample(template, points)[0].astype(np.float32) * weight
            wf = fft.rfftn(f[mirrored], shape)
            a = correlate(wf, 0)
            var_a = correlate(fft.rfftn((f * f)[mirrored], shape), 0) - a**2 / safe
            cov = correlate(wf, 1) - a * b / safe
            floor = 1e-3 * total
            ncc = cov / np.sqrt(np.maximum(var_a, floor) * np.maximum(var_b, floor))
            ncc = np.where(usable, ncc * (0.5 + 0.5 * count / total), -1)
            peak = np.array(np.unravel_index(int(ncc.argmax()), ncc.shape))
            # Index 0 of the correlation is the kernel's last sample on the image's first.
            world = moving.affine[:3, :3] @ (peak - n) + moving.affine[:3, 3]
            matrix = np.eye(4)
            matrix[:3, :3] = turn
            matrix[:3, 3] = world - turn @ centre
            name = "rot" + "_".join(f"{round(float(np.rad2deg(v))):+d}" for v in vector)
            starts[kind].append(Start(name, kind, matrix, float(ncc[tuple(peak)])))
    return {kind: sorted(found, key=lambda s: -s.score) for kind, found in starts.items()}


def polish(
    start: Start,
    moving: Volume,
    template: Volume,
    region: Volume,
    centre: np.ndarray,
    evaluations: int = 350,
) -> Start:
    """Local optimisation of rotation, shift and one scale, same correlation as `search`."""
    inside = region.data > 0.5
    points = region.points()[:, inside]
    fixed = sample(template, points)[0]
    relative = points - centre[:, None]
    home = start.matrix[:3, :3] @ centre + start.matrix[:3, 3]

    def matrix_of(p: np.ndarray) -> np.ndarray:
        turn = Rotation.from_rotvec(p[:3] * 0.2).as_matrix() @ start.matrix[:3, :3]
        out = np.eye(4)
        out[:3, :3] = turn * np.exp(0.1 * p[6])
        out[:3, 3] = home + 8 * p[3:6] - out[:3, :3] @ centre
        return out

    def seen_at(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m = matrix_of(p)
        return sample(moving, m[:3, :3] @ relative + (m[:3, :3] @ centre + m[:3, 3])[:, None])

    least = min(MIN_OVERLAP, OF_THE_MOST * float(seen_at(np.zeros(7))[1].mean()))

    def cost(p: np.ndarray) -> float:
        values, seen = seen_at(p)
        part = seen.mean()
        if part < least:
            return 1.0
        x, y = fixed[seen] - fixed[seen].mean(), values[seen] - values[seen].mean()
        ncc = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum() + 1e-6)
        # A scale prior keeps a head from swelling to fill the brain.
        return float(-ncc * (0.5 + 0.5 * part) + 0.005 * p[6] ** 2)

    result = optimize.minimize(
        cost,
        np.zeros(7),
        method="Powell",
        options={"maxfev": evaluations, "xtol": 1e-2, "ftol": 1e-4},
    )
    return Start(start.name, start.stripped, matrix_of(result.x), -float(result.fun))
