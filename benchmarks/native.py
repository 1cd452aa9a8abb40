"""Does the native output lie on the input? Displacement at landmarks of real scans.

    remix-bids BIDS OUT participant --output-spaces T1w
    python benchmarks/native.py BIDS OUT --out docs/evidence/native

Landmarks are the strongest corners of the brain-sized middle of each scan, at least 8 mm apart.
Around each one a block of 24 mm is sampled from the input and from the output at the same places of
the scanner's world; the displacement is the shift, in parts of a millimetre, at which the two agree
best. It writes a Markdown table with a row for each scan; its last column reads the same output
half a millimetre off.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nb
import numpy as np
from commit import commit
from scipy.ndimage import gaussian_filter, map_coordinates, spline_filter
from skimage.feature import corner_peaks, structure_tensor
from skimage.registration import phase_cross_correlation

SIDE = 24  # mm
STEP = 0.5  # mm, of the blocks
APART = 8  # mm
OFF = np.array([0.0, 0.0, 0.5])  # mm: what the measurement must be able to see
REACH = 70  # mm from the middle of the field of view


def sample(image: nb.Nifti1Image, spline: np.ndarray, world: np.ndarray) -> np.ndarray:
    """Cubic interpolation at places (3, ...) of the scanner's world, mm, from its coefficients."""
    to_index = np.linalg.inv(image.affine)
    index = np.tensordot(to_index[:3, :3], world, 1) + to_index[:3, 3].reshape(-1, *[1] * 3)
    return map_coordinates(spline, index, order=3, mode="nearest", prefilter=False)


def landmarks(image: nb.Nifti1Image, data: np.ndarray, count: int) -> np.ndarray:
    """Corners of the output, (n, 3) mm in the scanner's world."""
    tensor = structure_tensor(gaussian_filter(data, 1), sigma=3)
    matrices = np.stack(tensor, axis=-1)[..., [0, 1, 2, 1, 3, 4, 2, 4, 5]]
    weakest = np.linalg.eigvalsh(matrices.reshape(*data.shape, 3, 3))[..., 0]
    found = corner_peaks(weakest, min_distance=APART, num_peaks=20 * count, exclude_border=SIDE)
    world = found @ image.affine[:3, :3].T + image.affine[:3, 3]
    middle = (np.array(data.shape) - 1) / 2 @ image.affine[:3, :3].T + image.affine[:3, 3]
    return world[np.linalg.norm(world - middle, axis=1) < REACH][:count]


def displacements(source: Path, output: Path, count: int, off: np.ndarray) -> np.ndarray:
    """(n,) mm at the landmarks; ``off`` is added to where the output is read."""
    scan, made = nb.load(source), nb.load(output)
    low = np.asanyarray(scan.dataobj, dtype=np.float32).reshape(scan.shape[:3])
    high = np.asanyarray(made.dataobj, dtype=np.float32)
    ticks = np.arange(-SIDE / 2, SIDE / 2, STEP)
    offsets = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"))
    window = np.hanning(len(ticks))
    window = window[:, None, None] * window[:, None] * window
    splines = [spline_filter(data, mode="nearest", output=np.float32) for data in (low, high)]
    shifts = []
    for place in landmarks(made, high, count):
        world = place.reshape(3, 1, 1, 1) + offsets
        moved = world + off.reshape(3, 1, 1, 1)
        blocks = [sample(scan, splines[0], world), sample(made, splines[1], moved)]
        blocks = [(block - block.mean()) * window for block in blocks]
        shift, *_ = phase_cross_correlation(*blocks, upsample_factor=20, normalization=None)
        shifts.append(np.linalg.norm(shift) * STEP)
    return np.array(shifts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids", type=Path)
    parser.add_argument("derivatives", type=Path)
    parser.add_argument("--landmarks", type=int, default=40, help="of each scan")
    parser.add_argument("--out", type=Path, required=True, help="without extension")
    given = parser.parse_args()
    lines = [
        "# Landmarks of native outputs\n\n`python benchmarks/native.py BIDS OUT --out "
        f"{given.out}` at {commit()}."
        f" Displacement in mm between input and output, which `--output-spaces T1w` wrote.\n",
        "| scan | voxel sizes, mm | turned by, degrees | landmarks | median | 95 % | largest | "
        "median, read 0.5 mm off |",
        "|" + " --- |" * 8,
    ]
    for source in sorted(given.bids.glob("sub-*/**/*_T1w.nii.gz")):
        name = source.name.replace("_T1w.nii.gz", "_desc-remix_T1w.nii.gz")
        output = given.derivatives / source.relative_to(given.bids).with_name(name)
        affine = nb.load(source).affine
        sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        turn = np.degrees(np.arccos(np.clip(np.abs(affine[:3, :3] / sizes).max(axis=0), 0, 1)))
        found = displacements(source, output, given.landmarks, np.zeros(3))
        off = displacements(source, output, given.landmarks, OFF)
        scan = source.name.removesuffix("_T1w.nii.gz")
        lines.append(
            f"| {scan} | {' x '.join(f'{s:.2f}' for s in sizes)} "
            f"| {turn.max():.1f} | {len(found)} | {np.median(found):.2f} | "
            f"{np.percentile(found, 95):.2f} | {found.max():.2f} | {np.median(off):.2f} |"
        )
        print(lines[-1], flush=True)
    given.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
