"""High-resolution scans to training targets: one registration, one interpolation."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from remix_bids.errors import InputImageError, RemixError, UsageError
from remix_bids.registration.affine import Templates, register_affine
from remix_bids.simulation.intensity import intensity_scale
from remix_bids.spatial import WORKING_GRID, Grid, coverage, index_map, resample
from remix_bids.workers import lead_a_group

LOGGER = logging.getLogger(__name__)


def load_image(path: Path) -> tuple[torch.Tensor, Grid]:
    """A 3D image as float32 tensor, and its grid.

    Raises
    ------
    InputImageError
        It holds voxels that are no number: one of them would spoil a whole network.
    """
    image = nib.load(path)
    x, y, z = image.shape[:3]
    data = np.asarray(image.dataobj, dtype=np.float32).reshape(x, y, z)
    if bad := int(np.count_nonzero(~np.isfinite(data))):
        raise InputImageError(
            f"{path} has {bad} voxels that are no finite number; replace them, with 0 for example"
        )
    return torch.from_numpy(data), Grid((x, y, z), image.affine)


def prepare_person(
    path: Path, templates: Templates, *, skull_stripped: bool | None, seed: int
) -> dict:
    """Register one scan and bring it to the working grid.

    Returns
    -------
    dict
        ``image`` (float16, 181 x 217 x 181, 1 is the 99.5th percentile of the foreground),
        ``world``, ``voxel_sizes``, ``head``, ``score`` and ``warnings`` of the registration.
    """
    native, grid = load_image(path)
    with tempfile.TemporaryDirectory() as folder:
        found = register_affine(
            path,
            templates,
            skull_stripped=skull_stripped,
            random_seed=seed,
            # A target in template space is true by definition: the quick search is enough.
            sloppy=True,
            work_dir=Path(folder),
        )
    mapping = index_map(WORKING_GRID, grid, found.matrix)
    covered = coverage(mapping, grid.shape, WORKING_GRID.shape)
    image = (resample(native, mapping, WORKING_GRID.shape) * covered).clamp(min=0)
    image = image / intensity_scale(image, covered)
    return {
        "image": image.half().numpy(),
        "world": found.matrix.tolist(),
        "voxel_sizes": [round(float(v), 4) for v in grid.voxel_sizes],
        "head": not found.skull_stripped,
        "score": round(float(found.score), 4),
        "warnings": found.warnings,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(
    scans: Mapping[str, Path],
    templates: Templates,
    folder: Path,
    *,
    validation: Sequence[str],
    held_out: Sequence[str],
    skull_stripped: Mapping[str, bool] | None = None,
    n_procs: int = 1,
    seed: int = 0,
) -> None:
    """Prepare many persons; those already in ``folder`` are kept, but for their split.

    So a stopped run goes on, and several datasets can share a folder.

    Parameters
    ----------
    scans : mapping of str to Path
        Person to high-resolution T1w.
    folder : Path
        Receives one ``.npy`` per person, ``strip_mask.npy`` (the template's brain) and
        ``persons.json``.
    validation, held_out : sequence of str
        Persons who are never trained on, with or without ``sub-``.
    skull_stripped : mapping of str to bool, optional
        Whether a person's image is a stripped brain, where that is known; found out otherwise.

    Raises
    ------
    UsageError
        If a person of that name is there already, from another image.
    RemixError
        If scans could not be prepared; all others are.
    """

    splits = {
        name.removeprefix("sub-"): split
        for split, names in (("held_out", held_out), ("validation", validation))
        for name in names
    }

    def split_of(name: str) -> str:
        return splits.get(name, "train")

    known = skull_stripped or {}
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "persons.json"
    rows = json.loads(table.read_text())["persons"] if table.exists() else []
    done = {row["name"] for row in rows}
    if strangers := sorted({*splits} - {*scans} - done):
        LOGGER.warning(
            "there is no sub-%s, whom the recipe names under validation or held_out",
            ", no sub-".join(strangers),
        )
    for row in rows:
        if row["name"] in scans:
            scan = scans[row["name"]]
            if "sha256" in row and row["sha256"] != _digest(scan):
                raise UsageError(
                    f"{folder} holds a sub-{row['name']} of another image than {scan}: two "
                    "datasets with the same label? Give one of them another label, or another "
                    "folder"
                )
        if row["name"] in {*scans, *splits}:  # or of another dataset, and named since
            row["split"] = split_of(row["name"])

    def write() -> None:
        rows.sort(key=lambda r: r["name"])
        part = table.with_suffix(".part")
        part.write_text(json.dumps({"persons": rows}, indent=1))
        part.replace(table)

    write()
    if templates.brain_mask is not None:
        mask, grid = load_image(templates.brain_mask)
        mask = resample(mask, index_map(WORKING_GRID, grid), WORKING_GRID.shape, "linear")
        np.save(folder / "strip_mask.npy", (mask > 0.5).numpy())
    left = [name for name in scans if name not in done]
    with ProcessPoolExecutor(n_procs, get_context("spawn"), lead_a_group) as pool:
        jobs = {
            pool.submit(
                prepare_person,
                scans[name],
                templates,
                skull_stripped=known.get(name),
                seed=seed,
            ): name
            for name in left
        }
        failed: dict[str, str] = {}
        for job in as_completed(jobs):
            name = jobs[job]
            try:
                row = job.result()
            except Exception as error:
                failed[name] = str(error)
                LOGGER.error("%s: %s", name, error)
                continue
            np.save(folder / f"{name}.npy", row.pop("image"))
            named = {"name": name, "file": f"{name}.npy", "split": split_of(name)}
            rows.append(named | {"sha256": _digest(scans[name])} | row)
            write()
            kind = "head" if row["head"] else "brain"
            LOGGER.info(
                *("%s: %s, %s, score %.2f %s", name, kind, split_of(name)),
                *(row["score"], row["warnings"]),
            )
    if failed:
        first, why = next(iter(failed.items()))
        raise RemixError(
            f"{len(failed)} of {len(left)} scans could not be prepared, the first {scans[first]}: "
            f"{why}"
        )
