"""Tissue classes of an image, and how far two segmentations agree.

The question is whether a segmenter finds in a restored image what it finds in the true one, so the
segmenter itself must not move: Atropos gets one mask and one set of starting means for all methods.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from remix_bids.evaluation.external import run_command
from remix_bids.spatial import Grid, index_map

TISSUES = {1: "CSF", 2: "grey matter", 3: "white matter"}

Segmenter = Callable[[np.ndarray, np.ndarray, Sequence[float]], np.ndarray]
"""Image (x, y, z), brain mask (x, y, z) and mean intensity of each tissue to labels (x, y, z)."""


def atropos(image: np.ndarray, mask: np.ndarray, means: Sequence[float]) -> np.ndarray:
    """Three tissue classes by ANTs Atropos (mixture of Gaussians, Markov random field).

    Parameters
    ----------
    image : (x, y, z) array
    mask : (x, y, z) bool array
        Nothing is labelled outside.
    means : sequence of 3 float
        Where the classes start, ascending.

    Returns
    -------
    (x, y, z) int array
        0 outside, then `TISSUES`.
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    os.environ["ANTS_RANDOM_SEED"] = "1"
    import ants

    centres = "x".join(f"{mean:.6f}" for mean in sorted(means))
    found = ants.atropos(
        a=ants.from_numpy(image.astype(np.float32)),
        x=ants.from_numpy(mask.astype(np.float32)),
        i=f"KMeans[3,{centres}]",
        m="[0.1,1x1x1]",
        c="[3,0]",
    )["segmentation"].numpy()
    return np.rint(found).astype(np.int16)


def external(template: str, grid: Grid) -> Segmenter:
    """Any command that writes labels, e.g. ``mri_synthseg --i {input} --o {output}``."""

    def segment(image: np.ndarray, mask: np.ndarray, means: Sequence[float]) -> np.ndarray:
        labels, found = run_command(template, image, grid, np.int32)
        if found.shape != grid.shape or not np.allclose(found.affine, grid.affine, atol=1e-3):
            labels = nearest(labels, index_map(grid, found), image.shape)
        return labels

    return segment


def nearest(labels: np.ndarray, mapping: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Labels on another grid (nearest neighbour); 0 outside."""
    from scipy.ndimage import affine_transform

    moved = affine_transform(
        labels, mapping[:3, :3], mapping[:3, 3], tuple(shape), order=0, mode="constant"
    )
    return np.asarray(moved)


def tissue_means(image: np.ndarray, mask: np.ndarray) -> list[float]:
    """Where Atropos starts: the 10th, 45th and 80th percentile of the true brain."""
    return [float(v) for v in np.percentile(image[mask], [10, 45, 80])]


def dice(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Mean Dice overlap of all labels above 0 that occur in either image inside a mask."""
    one, other = one[mask], other[mask]
    values = []
    for label in sorted({*np.unique(one), *np.unique(other)} - {0}):
        a, b = one == label, other == label
        values.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return float(np.mean(values)) if values else float("nan")


def moved_and_back(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image moved by half a voxel with 1 % noise, and back: the segmenter's own floor."""
    from scipy.ndimage import shift

    noise = rng.normal(0, 0.01 * np.percentile(image, 99.5), image.shape)
    there = shift(image.astype(np.float32), 0.5, order=3, mode="nearest") + noise
    return np.asarray(shift(there, -0.5, order=3, mode="nearest"))
