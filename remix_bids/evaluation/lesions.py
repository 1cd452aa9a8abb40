"""What restoration does to lesions: spheres of known size and contrast, degraded and restored.

An image with lesions and the same image without go through the same acquisition and the same
method; what differs between the two results is what is left of the lesions. It is held against what
was put in: mean inside the lesion (contrast kept), and volume at half of its own maximum (volume
kept; a slight blur takes something off a sphere, a strong one spreads it to more than 1).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from remix_bids.evaluation.cases import Case
from remix_bids.evaluation.restore import as_shipped, as_told, registry_of, restore, see
from remix_bids.evaluation.settings import CUBIC, ESTIMATE, EXPERT, SHIPS
from remix_bids.evaluation.table import by_person
from remix_bids.simulation.acquisition import slice_axis
from remix_bids.simulation.degrade import field_of_view
from remix_bids.spatial import WORKING_GRID, index_map
from remix_bids.training.dataset import crop_to_foreground

LOGGER = logging.getLogger(__name__)

DIAMETERS = (3.0, 5.0, 8.0, 12.0)  # mm
CONTRASTS = (-0.4, -0.2, 0.2, 0.4)  # of the mean intensity that was there
METHODS = (CUBIC, ESTIMATE, EXPERT, SHIPS)

_APART = 12.0  # mm between the surfaces of two lesions, more than the thickest slice
_MARGIN = 3  # mm from a lesion to the edge of the brain or of the scan
_FINE = 3  # samples per voxel side, for volumes
_SUB = 7  # samples per voxel side, for voxels that a sphere cuts


@dataclass(frozen=True)
class Lesion:
    """A sphere.

    Attributes
    ----------
    diameter : float
        mm.
    contrast : float
        What is added, relative to the mean of the image inside.
    centre : tuple of 3 int
        Voxel index.
    """

    diameter: float
    contrast: float
    centre: tuple[int, int, int] = (0, 0, 0)

    def box(self, margin: float = 1.0) -> tuple[slice, ...]:
        """The voxels within ``margin`` mm of the sphere; it must not leave the image."""
        reach = int(np.ceil(self.diameter / 2 + margin))
        return tuple(slice(c - reach, c + reach + 1) for c in self.centre)

    def fraction(self, margin: float = 1.0) -> np.ndarray:
        """How much of each voxel of `box` lies inside, 0 to 1; voxels are 1 mm cubes."""
        return _fraction(self.diameter, margin)


@lru_cache(maxsize=32)
def _fraction(diameter: float, margin: float) -> np.ndarray:
    n = 2 * int(np.ceil(diameter / 2 + margin)) + 1
    fine = (np.arange(n * _SUB) + 0.5) / _SUB - n / 2
    squared = fine**2
    inside = squared[:, None, None] + squared[:, None] + squared <= (diameter / 2) ** 2
    fraction = inside.reshape(n, _SUB, n, _SUB, n, _SUB).mean(axis=(1, 3, 5))
    fraction.setflags(write=False)
    return fraction


def all_lesions() -> list[Lesion]:
    """One of every size and contrast, large ones first."""
    return [Lesion(d, c) for d in sorted(DIAMETERS, reverse=True) for c in CONTRASTS]


def place_lesions(
    image: np.ndarray, covered: np.ndarray, wanted: Sequence[Lesion], rng: np.random.Generator
) -> list[list[Lesion]]:
    """Find places in bright, even tissue (white matter, in a T1w), far from each other.

    Parameters
    ----------
    image : (x, y, z) array
        On a grid of 1 mm.
    covered : (x, y, z) bool array
        Where lesions may lie.

    Returns
    -------
    list of lists of Lesion
        Each list fits into one image; mostly there is one. Lesions for which there is no place at
        all are left out.
    """
    usable = (image > 0.05) & covered
    bright = image >= np.quantile(image[usable], 0.6) if usable.any() else usable
    volumes: list[list[Lesion]] = []
    left = list(wanted)
    fits: dict[float, np.ndarray] = {}
    for diameter in {lesion.diameter for lesion in left}:
        around = 2 * int(np.ceil(diameter / 2 + _MARGIN)) + 1
        inner = ndimage.uniform_filter(usable.astype(np.float32), around, mode="constant") > 0.9999
        share = ndimage.uniform_filter(bright.astype(np.float32), int(diameter), mode="constant")
        fits[diameter] = np.where(inner, share, 0)
    while left:
        placed: list[Lesion] = []
        for lesion in left:
            share = fits[lesion.diameter]
            candidates = np.argwhere(share > 0.8 * share.max()) if share.max() > 0 else np.empty(0)
            for other in placed:
                if len(candidates) == 0:
                    break
                apart = np.linalg.norm(candidates - np.array(other.centre), axis=1)
                candidates = candidates[apart >= (lesion.diameter + other.diameter) / 2 + _APART]
            if len(candidates):
                x, y, z = (int(c) for c in candidates[rng.integers(len(candidates))])
                placed.append(Lesion(lesion.diameter, lesion.contrast, (x, y, z)))
        if not placed:
            LOGGER.warning("no place for %d lesions", len(left))
            break
        volumes.append(placed)
        done = {(lesion.diameter, lesion.contrast) for lesion in placed}
        left = [lesion for lesion in left if (lesion.diameter, lesion.contrast) not in done]
    return volumes


def add_lesions(image: Tensor, lesions: Sequence[Lesion]) -> Tensor:
    """A copy of an image (1 mm grid) with lesions; never negative."""
    image = image.clone()
    for lesion in lesions:
        box, fraction = lesion.box(), torch.tensor(lesion.fraction()).to(image)
        mean = image[box][fraction > 0.5].mean()
        image[box] = (image[box] + lesion.contrast * mean * fraction).clamp(min=0)
    return image


def _half_volume(difference: np.ndarray, inside: np.ndarray) -> float:
    """Volume (mm3) above half of the maximum, in one piece with it; the maximum lies inside.

    Linear interpolation to a third of a voxel: the count of whole voxels of a small sphere jumps.
    """
    top = difference[inside].max()
    if not top > 0:
        return 0.0
    peak = np.unravel_index(np.where(inside, difference, -np.inf).argmax(), difference.shape)
    fine = ndimage.zoom(difference, [(_FINE * (n - 1) + 1) / n for n in difference.shape], order=1)
    pieces, _ = ndimage.label(fine >= top / 2)
    return float((pieces == pieces[tuple(_FINE * i for i in peak)]).sum()) / _FINE**3


def kept(restored: Tensor, true: Tensor, lesion: Lesion) -> tuple[float, float]:
    """Contrast and volume kept of one lesion.

    Parameters
    ----------
    restored, true : (x, y, z) tensors
        What the lesions add to the restored image, and to the true one; 1 mm grid.

    Returns
    -------
    tuple of 2 float
        Mean of ``restored`` inside the lesion over that of ``true``; volume at half maximum of the
        one over that of the other. Both 1 when nothing was lost.
    """
    around = _APART / 2
    fraction = lesion.fraction(around)
    size = tuple(np.array(true.shape))
    box = lesion.box(around)
    # Near the edge of the image the box is cut off; the lesion itself never is.
    cut = tuple(
        slice(max(0, -s.start), n - s.start if s.stop > n else None)
        for s, n in zip(box, size, strict=True)
    )
    box = tuple(slice(max(0, s.start), s.stop) for s in box)
    fraction = fraction[cut]
    one, other = (np.sign(lesion.contrast) * d[box].double().numpy() for d in (restored, true))
    core = fraction > 0.5
    volumes = [_half_volume(difference, fraction > 0) for difference in (one, other)]
    return float(one[core].mean() / other[core].mean()), volumes[0] / volumes[1]


def run_case(case: Case, experts_dir: Path | None) -> list[dict]:
    """All lesions and methods of one case, one row each."""
    registry = registry_of(experts_dir)
    truth = case.person.image.float()
    crop, grid = crop_to_foreground(truth, 64)
    acquisition = case.acquisition()
    record = registry.select(acquisition.volume)
    native_grid = acquisition.grid

    def restored(image: Tensor) -> dict[str, Tensor]:
        native = see(image, acquisition, case.noise, case.seed)
        told = as_told(native, acquisition)
        found = restore(native, told, grid, [record])
        found[EXPERT] = found.pop(record.name)
        found[SHIPS] = as_shipped(found[EXPERT], found[CUBIC], native, told, grid, record)
        return found

    covered = field_of_view(acquisition)[crop]
    mapping = index_map(WORKING_GRID, native_grid, acquisition.world)
    rng = np.random.default_rng([*case.seed, 2])
    volumes = place_lesions(truth[crop].numpy(), covered.numpy(), all_lesions(), rng)
    before = restored(truth)
    axis = slice_axis(native_grid)
    corner = np.array([s.start for s in crop])
    rows = []
    for lesions in volumes:
        changed = truth.clone()
        changed[crop] = add_lesions(truth[crop], lesions)
        after = restored(changed)
        true = (changed - truth)[crop]
        for lesion in lesions:
            index = float((mapping @ [*(corner + lesion.centre), 1])[axis])
            for method in METHODS:
                contrast, volume = kept(after[method] - before[method], true, lesion)
                rows.append(
                    {
                        "person": case.person.name,
                        "class": record.name,
                        "kind": case.source,
                        "voxel_sizes": " x ".join(f"{s:.2f}" for s in native_grid.voxel_sizes),
                        "profile": "box" if any(acquisition.box) else "gaussian",
                        "noise": case.noise,
                        "diameter": lesion.diameter,
                        "contrast": lesion.contrast,
                        # 0 in the middle of a slice, 0.5 half-way between two
                        "off_slice": round(abs(index - round(index)), 2),
                        "method": method,
                        "contrast_kept": round(contrast, 4),
                        "volume_kept": round(volume, 3),
                    }
                )
    return rows


def run_cases(cases: Sequence[Case], experts_dir: Path | None) -> Iterator[list[dict]]:
    """`run_case` on one case after the other."""
    for case in cases:
        rows = run_case(case, experts_dir)
        LOGGER.info("%s, class %d, %s", case.person.name, case.drawn, case.source)
        yield rows


def _cell(rows: Sequence[dict], metric: str, **where: object) -> str:
    values = list(by_person(rows, metric, **where).values())
    return f"{np.mean(values):.2f}" if values else ""


def to_markdown(rows: Sequence[dict]) -> str:
    """Contrast and volume kept per class, method and size; contrast kept also by sign."""
    classes = sorted({int(row["class"]) for row in rows})
    counts = [len({r["person"] for r in rows if int(r["class"]) == k}) for k in classes]
    few, many = min(counts, default=0), max(counts, default=0)
    persons = f"{few} to {many} persons" if few < many else f"{many} person{'s' * (many > 1)}"
    lines = [f"Means over {persons} of a class; 1 is the truth.", ""]
    tables = (
        ("Contrast kept", "contrast_kept", "diameter", DIAMETERS, "{:g} mm"),
        ("Volume kept, at half maximum", "volume_kept", "diameter", DIAMETERS, "{:g} mm"),
        ("Contrast kept, by contrast", "contrast_kept", "contrast", CONTRASTS, "{:+.0%}"),
    )
    for title, metric, key, values, form in tables:
        lines += [f"**{title}**", ""]
        lines += ["| class | method | " + " | ".join(form.format(v) for v in values) + " |"]
        lines += ["|" + " --- |" * (len(values) + 2)]
        for k in classes:
            for method in METHODS:
                where = {"class": k, "method": method}
                cells = [_cell(rows, metric, **where, **{key: v}) for v in values]
                lines.append(f"| {k} | {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
