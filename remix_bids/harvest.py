"""Acquisitions out of BIDS datasets and collections of headers, without identifiers or dates.

What is read stays here together with the person's name; `as_bank` drops the name. A row of a bank
holds geometry, contrast, licence and where the dataset is published: no label, date or file name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np

from remix_bids.errors import InputImageError, UsageError
from remix_bids.naming import DERIVATIVE, output_names, split_name
from remix_bids.registration.itk import read_itk_affine
from remix_bids.registration.score import possible, singular_values
from remix_bids.sidecars import forget_sidecars, positive, read_sidecars
from remix_bids.simulation.acquisition import BRAIN_CENTRE, Geometry, slice_axis
from remix_bids.spatial import Grid

LOGGER = logging.getLogger(__name__)

OPEN_LICENCES = {"CC0", "PDDL", "MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC BY"}
HELD_OUT_SHARE = 0.2
SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw")
"""Contrasts whose geometry is of use: clinical series of one visit are planned alike."""

VOXEL_SIDES = 0.2, 20.0
"""Voxel sizes (mm) outside this range are a wrong header."""

UNKNOWN_LICENCE = "none stated"
OWN_SCANS = "own scans"
_SAME = 0.02  # relative difference below which header and sidecar agree on the spacing


@dataclass(frozen=True)
class Found:
    """A geometry and whose it is.

    Attributes
    ----------
    person : str
        Never leaves this module.
    geometry : Geometry
        With an empty ``group``.
    """

    person: str
    geometry: Geometry


def _digest(geometry: Geometry) -> str:
    """Hash of what a bank tells of a geometry anyway."""
    told = json.dumps({**asdict(geometry), "group": "", "held_out": False}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _digests(found: Sequence[Found]) -> dict[str, list[str]]:
    """Sorted hashes of every person's geometries."""
    digests: dict[str, list[str]] = {}
    for one in found:
        digests.setdefault(one.person, []).append(_digest(one.geometry))
    return {person: sorted(own) for person, own in digests.items()}


def as_bank(
    found: Sequence[Found], split_key: Callable[[str], str] | None = None
) -> list[Geometry]:
    """Take the names off: persons become running numbers, a fifth of them is held out.

    The numbers follow a hash of the persons' geometries, which stand in the bank, and of nothing
    else: neither the labels nor their order can be got back from them.

    Parameters
    ----------
    found : sequence of Found
        Their order is kept.
    split_key : callable, optional
        From a person to the text whose hash decides who is held out, for published collections
        whose persons are public; the hash of the geometries by default.
    """
    digests = _digests(found)
    # The smallest hash: a scan that is added later seldom changes it.
    keys = {person: min(own) for person, own in digests.items()}
    ordered = sorted(digests, key=lambda person: digests[person])
    numbers = {person: f"p{i:04d}" for i, person in enumerate(ordered)}
    out = []
    for one in found:
        key = split_key(one.person) if split_key else keys[one.person]
        share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8
        out.append(
            replace(one.geometry, group=numbers[one.person], held_out=share < HELD_OUT_SHARE)
        )
    return out


def _rounded(matrix: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(v), 6) for v in line) for line in matrix)


# --- a collection of header records --------------------------------------------------------------


def _person(row: dict) -> str:
    """The person of a record: several scans of one person share it."""
    collection = re.split(r"[ /]", row["source"].removeprefix("OpenNeuroDatasets/"))[0:2]
    kind = "longitudinal" if "longitudinal" in row["source"] else ""
    return "/".join([*collection, kind, row["subject"].split("_study")[0]])


def geometries_from_records(path: Path) -> list[Geometry]:
    """Turn a JSON list of header records into a bank, leaving out what may not be shipped.

    The held-out fifth is chosen by a hash of the (published) person, so that it does not depend on
    the order of the rows nor change when rows are added.

    Parameters
    ----------
    path : Path
        Records with the keys ``source, licence, exact, contrast, subject, shape, affine,
        slice_thickness, slice_gap``.

    Raises
    ------
    UsageError
        If the file is no such list.
    """
    try:
        every = json.loads(Path(path).read_text())
        rows = [row for row in every if row["licence"] in OPEN_LICENCES]
        found = [
            Found(
                _person(row),
                Geometry(
                    shape=tuple(row["shape"]),
                    affine=_rounded(row["affine"]),
                    thickness=row["slice_thickness"],
                    gap=row["slice_gap"],
                    exact=row["exact"],
                    contrast=row["contrast"],
                    licence=row["licence"],
                    source=re.split(r" |/sub-", row["source"])[0],
                    group="",
                ),
            )
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a list of header records ({type(error).__name__}: {error}); "
            "name such a file or a BIDS dataset"
        ) from error
    if left_out := len(every) - len(rows):
        LOGGER.warning("%s: %d records without an open licence are left out", path, left_out)
    if not rows:
        raise UsageError(f"{path} holds no record with an open licence; the bank would be empty")
    return as_bank(found, split_key=str)


# --- a BIDS dataset ------------------------------------------------------------------------------


def geometries_from_bids(
    bids_dir: Path,
    derivatives: Path | None = None,
    *,
    suffixes: Sequence[str] = SUFFIXES,
    licence: str | None = None,
) -> list[Geometry]:
    """Turn the anatomical scans of a BIDS dataset into a bank.

    A file that cannot be used is warned about and left out; a transform that cannot be used is
    warned about, and its scan kept without one.

    Parameters
    ----------
    bids_dir : Path
    derivatives : Path, optional
        Output folder of remix-bids for this dataset: its affines to an MNI space are taken over.
    suffixes : sequence of str
        Contrasts to read.
    licence : str, optional
        Of the dataset, as the rows tell it; by default what ``dataset_description.json`` says, if
        that is a licence that is known here.

    Returns
    -------
    list of Geometry
        In an order that depends on the geometries only.

    Raises
    ------
    UsageError
        If a folder cannot be read or holds no scan that can be used.
    """
    for folder in filter(None, (bids_dir, derivatives)):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; name a BIDS dataset")
    description = _read_object(bids_dir / "dataset_description.json")
    licence = licence or _known_licence(description.get("License"))
    source = _published(description.get("DatasetDOI"))
    found, transforms = [], 0
    for path, sidecar in _scans(bids_dir, suffixes):
        try:
            geometry = read_geometry(path, sidecar)
        except InputImageError as error:
            LOGGER.warning("left out: %s", error)
            continue
        if derivatives is not None:
            try:
                world = _registration(derivatives, path, geometry.grid)
            except InputImageError as error:
                LOGGER.warning("kept without its affine to MNI: %s", error)
                world = None
            if world is not None:
                geometry = replace(geometry, world=_rounded(world))
                transforms += 1
        person = split_name(path)[0]["sub"]
        found.append(Found(person, replace(geometry, licence=licence, source=source)))
    if not found:
        raise UsageError(
            f"{bids_dir} holds no scan that can be used: sub-*/[ses-*/]anat/*_"
            f"{{{','.join(suffixes)}}}.nii[.gz]"
        )
    if derivatives is not None and not transforms:
        LOGGER.warning(
            "no affine to MNI was found in %s: none of its sub-*/[ses-*/]anat/*_from-*_to-MNI*_"
            "mode-image_xfm.txt belongs to a scan of %s",
            derivatives,
            bids_dir,
        )
    digests = _digests(found)  # they tell persons apart who share a geometry
    found.sort(key=lambda one: (_digest(one.geometry), digests[one.person]))
    return as_bank(found)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _known_licence(text: object) -> str:
    """A free text may hold anything, a bank only what is known."""
    plain = re.sub(r"[\s-]+\d(\.\d)?$", "", str(text)).replace("CC-", "CC ").strip()
    return next(
        (known for known in OPEN_LICENCES if text == known or plain == known), UNKNOWN_LICENCE
    )


def _published(doi: object) -> str:
    match = re.search(r"10\.\d{4,}/[\w.()/-]+", str(doi))
    return f"doi:{match[0]}" if match else OWN_SCANS


def _scans(bids_dir: Path, suffixes: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every acquired scan with what its sidecars say."""
    forget_sidecars()
    found = [*bids_dir.glob("sub-*/anat/*.nii*"), *bids_dir.glob("sub-*/ses-*/anat/*.nii*")]
    for path in sorted(found):
        try:
            entities, suffix, extension = split_name(path)
        except InputImageError as error:
            LOGGER.warning("left out: %s", error)
            continue
        if suffix not in suffixes or extension not in (".nii", ".nii.gz"):
            continue
        if "sub" not in entities or any(key in entities for key in DERIVATIVE):
            LOGGER.warning("left out: %s is not a scan as it was acquired", path)
            continue
        yield path, read_sidecars(path, bids_dir)


def read_geometry(path: Path, sidecar: dict[str, Any]) -> Geometry:
    """The geometry of one scan, from its header and its sidecar; voxels are not read.

    Parameters
    ----------
    path : Path
        A 3D NIfTI image.
    sidecar : dict
        ``SliceThickness`` and ``SpacingBetweenSlices`` (mm) are looked at. The header knows the
        spacing; a gap is told only where header and sidecar agree on it.

    Raises
    ------
    InputImageError
        If the header does not tell where the voxels lie.
    """
    try:
        image = nb.load(path)
        header, shape, affine = image.header, image.shape, image.affine
    except Exception as error:  # nibabel raises many kinds for a file it cannot read
        raise InputImageError(f"{path} cannot be read: {error}") from error
    if not isinstance(header, nb.Nifti1Header):
        raise InputImageError(f"{path} is not a NIfTI image")
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape[:3]) < 2:
        raise InputImageError(f"{path} is not a volume: its shape is {shape}")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        raise InputImageError(
            f"{path} does not tell its orientation: sform and qform code are 0 in its header"
        )
    try:
        grid = Grid(shape[:3], affine)
    except ValueError as error:
        raise InputImageError(f"{path} has no usable affine: {error}") from error
    sizes = grid.voxel_sizes
    if not (
        np.isfinite(affine).all() and VOXEL_SIDES[0] <= sizes.min() <= sizes.max() <= VOXEL_SIDES[1]
    ):
        raise InputImageError(
            f"{path} has voxels of {' x '.join(f'{s:.3g}' for s in sizes)} mm; sides of "
            f"{VOXEL_SIDES[0]:g} to {VOXEL_SIDES[1]:g} mm are believed"
        )
    spacing = float(sizes[slice_axis(grid)])
    thickness = positive(sidecar.get("SliceThickness"))
    told = positive(sidecar.get("SpacingBetweenSlices"))
    gap = None
    if told is not None and abs(told - spacing) > _SAME * spacing:
        LOGGER.warning(
            "%s: SpacingBetweenSlices is %g mm, but its header says %.4g mm; the header counts",
            path,
            told,
            spacing,
        )
    elif told is not None and thickness is not None and thickness <= told:
        gap = round(spacing - thickness, 4) if spacing > thickness else 0.0
    return Geometry(
        shape=grid.shape,
        affine=_rounded(affine),
        thickness=thickness,
        gap=gap,
        exact=True,
        contrast=split_name(path)[1],
        licence=UNKNOWN_LICENCE,
        source=OWN_SCANS,
        group="",
    )


def _registration(derivatives: Path, scan: Path, grid: Grid) -> np.ndarray | None:
    """The affine of an earlier run, template world to scanner world (RAS+, mm), if there is one.

    Raises
    ------
    InputImageError
        If it cannot be read or cannot be right.
    """
    template = output_names(scan, "MNI*").forward_transform
    paths = sorted((derivatives / template.parent).glob(template.name))
    if not paths:
        return None
    # All MNI spaces agree within some millimetres; the paper's comes first.
    path = min(paths, key=lambda p: ("_to-MNI152Lin_" not in p.name, p.name))
    try:
        world = read_itk_affine(path)
    except (OSError, ValueError) as error:
        raise InputImageError(str(error)) from error
    space = path.name.partition("_to-")[2].partition("_")[0]
    names = output_names(scan, space)
    for sidecar in (names.sidecar, names.native_sidecar):  # a run may write either
        for warning in _read_object(derivatives / sidecar).get("Warnings", []):
            if str(warning).startswith("Registration:"):
                raise InputImageError(f"{path} is doubtful, its run warned: {warning}")
    if not possible(world):
        scales = ", ".join(f"{s:.2f}" for s in singular_values(world))
        raise InputImageError(f"{path} cannot be right: it scales the template by {scales}")
    centre = np.linalg.inv(grid.affine) @ world @ [*BRAIN_CENTRE, 1]
    if not all(-0.5 <= c <= n - 0.5 for c, n in zip(centre[:3], grid.shape, strict=True)):
        raise InputImageError(
            f"{path} puts the middle of the brain outside {scan.name}: it belongs to another scan"
        )
    return world
