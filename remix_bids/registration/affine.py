"""Affine registration of clinical heads and brains to a template, with several starts and a score.

The way: a search over all shifts and rotations at 8 mm (`search`), ANTs' affine at 4 mm from the
best starts of each kind (head against template with skull, stripped brain against the masked
template), ANTs' affine at 2 mm around the template's brain from the best, a score (`score`).

ANTs is reproducible only on one ITK thread and with its seed in the environment before it is
imported, so every registration runs in a child process of its own; ``n_procs`` of them run side by
side and cannot change a result.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from remix_bids.errors import InputImageError, MissingResourceError
from remix_bids.registration import score as scoring
from remix_bids.registration import search as coarse
from remix_bids.registration.itk import write_itk_affine
from remix_bids.registration.pool import Pool
from remix_bids.registration.volumes import (
    Volume,
    depth_profile,
    load_volume,
    sample,
    save_volume,
    squeeze_intensities,
    to_isotropic,
)

POLISHED = 4  # starts of each kind that are optimised at 8 mm
TRIED = 2  # starts of each kind that ANTs gets
DISTINCT = 8.0  # mm over the brain: closer starts are the same start
LOOK = 0.5  # evidence for a head or a brain that is believed, see `volumes.DepthProfile`
BONUS = 0.15  # what full evidence is worth in units of the score
# Score below which a result is not trusted, for a head and for a stripped brain, whose edge alone
# agrees well. Measured (docs/evidence/registration.tsv): right ones reach 0.54 and 0.68 at least,
# wrong ones 0.42 and 0.56 at most.
POOR = {False: 0.48, True: 0.62}
TISSUE = 0.38  # the same inside the brain, without its edge: right ones 0.46, wrong ones 0.29
DOUBT = {False: 0.45, True: 0.55}  # score after the first stage below which both kinds are tried
PEAK = -0.005  # a score this much better a few mm away is a warning, see `score.peak`
COVERED = 0.6  # fraction of the template's brain that must lie in the field of view

LEVELS = (coarse.SPACING, 4.0, scoring.SPACING, 2.0)
REGIONS = {"first": "wide", "other": "wide", "second": "near", "skull": "middle"}

FIRST: dict[str, Any] = {
    "type_of_transform": "Affine",
    "aff_metric": "mattes",
    "aff_sampling": 32,
    "aff_random_sampling_rate": 0.5,
    "aff_iterations": (150, 100),
    "aff_shrink_factors": (2, 1),
    "aff_smoothing_sigmas": (1, 0),
}
SECOND: dict[str, Any] = {
    **FIRST,
    "aff_random_sampling_rate": 0.25,
    "aff_iterations": (100, 50),
}


@dataclass(frozen=True)
class Templates:
    """The template to register to.

    Attributes
    ----------
    t1w : Path
        T1w template.
    brain_mask : Path or None
        Its brain mask on any grid; None only for a stripped template, whose non-zero voxels it is.
    skull_stripped : bool
        The template itself has no skull.
    """

    t1w: Path
    brain_mask: Path | None
    skull_stripped: bool = False


@dataclass
class AffineResult:
    """What came out.

    Attributes
    ----------
    matrix : (4, 4) array
        Template world to native world, RAS+ mm.
    skull_stripped : bool
        The image was matched as a stripped brain.
    score : float
        Neighbourhood correlation with the template in and around the brain, 0 to 1.
    plausible : bool
        Score, peak, scales and coverage are as they should be.
    singular_values : (3,) array
        Native mm per template mm, largest first.
    determinant : float
        Native volume per template volume: multiply a volume measured in template space by it.
    warnings : list of str
        One sentence each; empty when plausible.
    starts : list of dict
        Every registration run: name, stage, skull_stripped, score, coverage, singular_values.
    peak : float
        How far the score falls a few mm away, see `score.peak`; below 0 is wrong.
    tissue : float
        Score inside the brain, more than 4 mm from its edge.
    """

    matrix: np.ndarray
    skull_stripped: bool
    score: float
    plausible: bool
    singular_values: np.ndarray
    determinant: float
    warnings: list[str] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    peak: float = 0.0
    tissue: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        out = asdict(self)
        out["matrix"] = self.matrix.tolist()
        out["singular_values"] = [round(float(v), 4) for v in self.singular_values]
        return out


@dataclass(frozen=True)
class Prepared:
    """A template on one grid: kinds of it, and regions around its brain."""

    kinds: dict[bool, Volume]
    inner: Volume  # the brain more than 4 mm from its edge
    near: Volume  # the brain and 4 mm around it
    middle: Volume  # the brain and the skull over it
    wide: Volume  # the brain, the scalp and air over it


def _grow(distance: np.ndarray, affine: np.ndarray, mm: float) -> Volume:
    return Volume((distance <= mm).astype(np.float32), affine)


def _stamp(path: Path | None) -> tuple[str, int] | None:
    return None if path is None else (str(path), Path(path).stat().st_mtime_ns)


def prepare(templates: Templates) -> dict[float, Prepared]:
    """Templates at all `LEVELS`, kept for the next image of this process.

    Raises
    ------
    MissingResourceError
        A file is missing or damaged, or there is no brain mask for a template with skull.
    """
    try:
        stamps = _stamp(templates.t1w), _stamp(templates.brain_mask)
        return _prepare(templates, stamps)
    except (OSError, InputImageError) as error:
        raise MissingResourceError(f"the template cannot be used: {error}") from error


@lru_cache(maxsize=2)
def _prepare(templates: Templates, stamps: tuple) -> dict[float, Prepared]:
    t1w = load_volume(templates.t1w)
    if templates.brain_mask is not None:
        mask = load_volume(templates.brain_mask)
        inside = (mask.data > 0.5).astype(np.float32)
        if mask.data.shape != t1w.data.shape or not np.allclose(mask.affine, t1w.affine):
            inside = sample(Volume(inside, mask.affine), t1w.points())[0].astype(np.float32)
    elif templates.skull_stripped:
        inside = (t1w.data > 0).astype(np.float32)
    else:
        raise MissingResourceError(
            f"the template {templates.t1w} has a skull and comes without a brain mask; "
            "give its brain mask too"
        )
    t1w = squeeze_intensities(t1w)
    levels = {}
    for spacing in LEVELS:
        mask = to_isotropic(Volume(inside, t1w.affine), spacing)
        kinds = {True: to_isotropic(Volume(t1w.data * inside, t1w.affine), spacing)}
        if not templates.skull_stripped:
            kinds[False] = to_isotropic(t1w, spacing)
        distance = ndimage.distance_transform_edt(mask.data < 0.5) * spacing
        depth = ndimage.distance_transform_edt(mask.data >= 0.5) * spacing
        inner = Volume((depth > 4.0).astype(np.float32), mask.affine)
        near, middle, wide = (_grow(distance, mask.affine, mm) for mm in (4.0, 12.0, 24.0))
        levels[spacing] = Prepared(kinds, inner, near, middle, wide)
    return levels


def _displacement(a: np.ndarray, b: np.ndarray, points: np.ndarray) -> float:
    """Mean distance between two affines over (3, n) points."""
    change = (a - b)[:3]
    return float(np.linalg.norm(change[:, :3] @ points + change[:, 3:], axis=0).mean())


def _distinct(starts: list[coarse.Start], points: np.ndarray, n: int) -> list[coarse.Start]:
    kept: list[coarse.Start] = []
    for start in starts:
        if all(_displacement(start.matrix, k.matrix, points) > DISTINCT for k in kept):
            kept.append(start)
        if len(kept) == n:
            break
    return kept


def register_affine(
    moving: Path,
    templates: Templates,
    *,
    skull_stripped: bool | None = None,
    n_procs: int = 1,
    random_seed: int = 0,
    sloppy: bool = False,
    work_dir: Path,
    pool: Pool | None = None,
) -> AffineResult:
    """Register one T1w image, head or stripped brain, to a template.

    Parameters
    ----------
    moving : Path
        3D image; any orientation, voxel size, origin.
    templates : Templates
        What to register to.
    skull_stripped : bool, optional
        Whether ``moving`` has no skull, when that is known; otherwise both are tried.
    n_procs : int
        Child processes side by side; never changes the result.
    random_seed : int
        ANTs' seed.
    sloppy : bool
        Fewer starts and iterations, for tests.
    work_dir : Path
        Where temporary files go; they are removed.
    pool : Pool, optional
        Children to use instead of ``n_procs`` and ``random_seed``, for many images in a row.

    Raises
    ------
    MissingResourceError
        ``moving`` is a whole head and the template has no skull.
    InputImageError
        ``moving`` cannot be used.
    """
    original = load_volume(moving)
    head = depth_profile(original).head
    image = squeeze_intensities(original)
    levels = prepare(templates)
    if skull_stripped is None:
        kinds = [False, True] if head > 0 else [True, False]
        if templates.skull_stripped:
            if head > LOOK:
                raise _refusal(templates)
            kinds = [True]
    elif skull_stripped or not templates.skull_stripped:
        kinds = [skull_stripped]
    else:
        raise _refusal(templates)

    eight = levels[coarse.SPACING]
    brain = eight.near.points()[:, eight.near.data > 0.5]
    centre = brain.mean(axis=1)
    small = to_isotropic(image, coarse.SPACING)
    found = coarse.search(small, {k: eight.kinds[k] for k in kinds}, eight.wide, centre)
    candidates: list[coarse.Start] = []
    for kind in kinds:
        first = _distinct(found[kind], brain, 2 if sloppy else POLISHED)
        better = [coarse.polish(s, small, eight.kinds[kind], eight.wide, centre) for s in first]
        better.sort(key=lambda s: -s.score)
        candidates += _distinct(better, brain, 1 if sloppy else TRIED)

    judge = levels[scoring.SPACING]
    seen = to_isotropic(image, scoring.SPACING)
    log: list[dict[str, Any]] = []

    def rate(stage: str, start: coarse.Start, matrix: np.ndarray) -> dict[str, Any]:
        value, part = scoring.agreement(seen, judge.kinds[start.stripped], judge.near, matrix)
        row = {
            "name": start.name,
            "stage": stage,
            "skull_stripped": start.stripped,
            "score": round(value, 4),
            "evidence": round(value + BONUS * (-head if start.stripped else head), 4),
            "coverage": round(part, 4),
            "possible": scoring.possible(matrix),
            "singular_values": [round(float(v), 4) for v in scoring.singular_values(matrix)],
        }
        log.append(row)
        return {**row, "matrix": matrix, "start": start}

    Path(work_dir).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=work_dir, prefix="affine_") as scratch_name,
        Pool(n_procs, random_seed, Path(scratch_name))
        if pool is None
        else nullcontext(pool) as children,
    ):
        scratch = Path(scratch_name)

        def ants(stage: str, level: float, starts: list[coarse.Start], options: dict[str, Any]):
            prepared = levels[level]
            save_volume(to_isotropic(image, level), scratch / f"{stage}_moving.nii")
            region = getattr(prepared, REGIONS[stage])
            save_volume(region, scratch / f"{stage}_mask.nii")
            jobs = []
            for i, start in enumerate(starts):
                fixed = scratch / f"{stage}_{'brain' if start.stripped else 'head'}.nii"
                save_volume(prepared.kinds[start.stripped], fixed)
                initial = scratch / f"{stage}_{i}.txt"
                write_itk_affine(initial, start.matrix)
                jobs.append(
                    {
                        "name": start.name,
                        "stage": stage,
                        "fixed": str(fixed),
                        "moving": str(scratch / f"{stage}_moving.nii"),
                        "mask": str(scratch / f"{stage}_mask.nii"),
                        "initial": str(initial),
                        "output": str(scratch / f"{stage}_{i}.json"),
                        "options": options,
                    }
                )
            children.run(jobs)
            rows = []
            for start, job in zip(starts, jobs, strict=True):
                matrix = json.loads(Path(str(job["output"])).read_text())
                if matrix is not None:
                    rows.append(rate(stage, start, np.array(matrix)))
            return rows

        rows = [rate("search", s, s.matrix) for s in candidates]
        # ANTs tries the kind that the image does not look like only where that is in doubt.
        doubt = abs(head) < LOOK
        likely = [c for c in candidates if doubt or c.stripped == kinds[0]]
        rows += ants("first", 4.0, likely, FIRST)
        others = [c for c in candidates if c not in likely]
        if others and max(rows, key=_order)["score"] < DOUBT[kinds[0]]:
            rows += ants("other", 4.0, others, FIRST)
        best = [max((r for r in rows if r["skull_stripped"] == k), key=_order) for k in kinds]
        best.sort(key=_order, reverse=True)
        # The other kind gets its second stage only when it is close.
        best = [r for r in best if r["evidence"] > best[0]["evidence"] - 0.1]
        starts = [
            coarse.Start(r["start"].name, r["skull_stripped"], r["matrix"], r["score"])
            for r in best
        ]
        rows = best + ants("second", 2.0, starts, SECOND)
        winner = max(rows, key=_order)
        if winner["stage"] != "second":
            # Too little contrast inside the brain (post-contrast spin echo): let the skull help.
            rows += ants("skull", 2.0, starts, SECOND)

    winner = max(rows, key=_order)
    kind = winner["skull_stripped"]
    fall = scoring.peak(seen, judge.kinds[kind], judge.near, winner["matrix"])
    tissue = scoring.agreement(seen, judge.kinds[kind], judge.inner, winner["matrix"])[0]
    result = _result(winner, fall, tissue, log)
    if skull_stripped is None and head * (-1 if kind else 1) < -LOOK:
        seen_as = "a stripped brain" if kind else "a whole head"
        result.warnings.append(
            f"Registration: the image was matched as {seen_as} but does not look like one; state "
            "SkullStripped in its sidecar."
        )
        result.plausible = False
    return result


def _order(row: dict[str, Any]) -> tuple[bool, float]:
    """Possible ones first, then by score and by what the image looks like."""
    return row["possible"], row["evidence"]


def _refusal(templates: Templates) -> MissingResourceError:
    return MissingResourceError(
        f"the image is a whole head, and the template {templates.t1w} has no skull: a head "
        "registered to a brain swells to fill it. Use a template with skull (MNI152Lin)"
    )


def _result(
    winner: dict[str, Any], fall: float, tissue: float, log: list[dict[str, Any]]
) -> AffineResult:
    matrix = winner["matrix"]
    warnings = []
    if not winner["possible"]:
        values = ", ".join(f"{v:.2f}" for v in winner["singular_values"])
        warnings.append(
            f"Registration: scales {values} are outside {scoring.SCALES[0]} to "
            f"{scoring.SCALES[1]}; the result is probably wrong."
        )
    expected = POOR[winner["skull_stripped"]]
    if winner["score"] < expected:
        warnings.append(
            f"Registration: the image agrees poorly with the template (score "
            f"{winner['score']:.2f}, expected above {expected}); look at the overlay."
        )
    if tissue < TISSUE:
        warnings.append(
            f"Registration: hardly any anatomy inside the brain agrees (score {tissue:.2f}, "
            f"expected above {TISSUE}); look at the overlay."
        )
    if fall < PEAK:
        warnings.append(
            "Registration: a result a few mm away agrees better with the template (score "
            f"{winner['score'] - fall:.3f} instead of {winner['score']:.3f}); look at the overlay."
        )
    if winner["coverage"] < COVERED:
        warnings.append(
            f"Registration: only {100 * winner['coverage']:.0f} % of the brain region lies in "
            "the field of view; look at the overlay."
        )
    return AffineResult(
        matrix=matrix,
        skull_stripped=winner["skull_stripped"],
        score=winner["score"],
        plausible=not warnings,
        singular_values=scoring.singular_values(matrix),
        determinant=float(np.linalg.det(matrix[:3, :3])),
        warnings=warnings,
        starts=log,
        peak=round(fall, 4),
        tissue=round(tissue, 4),
    )
