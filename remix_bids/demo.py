"""The example that needs no data: a simulated BIDS dataset, and how near a run came to its truth.

Below one folder: ``bids/`` is the dataset of one subject, ``truth/`` the brain on the working grid
and the affine (ITK, template to scanner points), ``out/`` what ``remix-bids`` writes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
import torch

from remix_bids import __version__
from remix_bids.derivatives import BIDS_VERSION, write_text
from remix_bids.errors import RemixError, UsageError
from remix_bids.evaluation.metrics import eroded, psnr
from remix_bids.naming import output_names
from remix_bids.registration.itk import read_itk_affine, write_itk_affine
from remix_bids.simulation.degrade import restore_grid
from remix_bids.simulation.example import VOXEL_SIZES, displacements, make_example
from remix_bids.spatial import WORKING_GRID, Grid
from remix_bids.templates import NILEARN_SPACE, find_template

NAME = "remix-bids example"
SCAN = "sub-demo_T1w.nii.gz"
RESCALE = 4.0  # the template has 8 bits; scanners count to a thousand or so
RIM = 2  # voxels at the brain's edge that are not counted, as in the evaluation


@dataclass(frozen=True)
class Comparison:
    """A run on the example against its truth.

    Attributes
    ----------
    displacement, largest_displacement : float
        Of the estimated affine over the brain, mm: mean and largest.
    cubic, expert : float
        PSNR inside the brain, dB.
    expert_name : str
    report : Path
    """

    displacement: float
    largest_displacement: float
    cubic: float
    expert: float
    expert_name: str
    report: Path

    def __str__(self) -> str:
        return "\n".join(
            [
                f"registration error over the brain: {self.displacement:.2f} mm on average, "
                f"{self.largest_displacement:.2f} mm at most",
                "PSNR inside the brain against the known truth:",
                f"    cubic interpolation  {self.cubic:6.2f} dB",
                f"    expert {self.expert_name:<13} {self.expert:6.2f} dB",
                f"report: {self.report}",
            ]
        )


def write_example(folder: Path, seed: int) -> Path:
    """Write the simulated dataset and its truth; return the dataset's folder.

    Files that are there with the same content are left alone, so that a run that was made from
    them stays valid.

    Parameters
    ----------
    folder : Path
        ``bids/`` and ``truth/`` are made in it.
    seed : int
        Of the affine.

    Raises
    ------
    UsageError
        ``folder`` holds a ``bids/`` that is something else.
    """
    bids, truth = folder / "bids", folder / "truth"
    if bids.exists() and not _is_example(bids):
        raise UsageError(f"{bids} is there and is no example of ours; name another folder")
    brain, grid = _load(find_template(NILEARN_SPACE, offline=True).t1w)
    example = make_example(brain * RESCALE, grid, np.random.default_rng(seed))

    anat = bids / "sub-demo" / "anat"
    _save(example.native, example.acquisition.grid.affine, anat / SCAN, code="scanner")
    _save(example.truth, WORKING_GRID.affine, truth / "T1w.nii.gz", code="mni")
    write_itk_affine(truth / "affine.txt", example.acquisition.world)
    description = {
        "Name": NAME,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "raw",
        "GeneratedBy": [{"Name": "remix-experts simulate", "Version": __version__}],
    }
    sidecar = {
        "Modality": "MR",
        "MRAcquisitionType": "2D",
        "SliceThickness": VOXEL_SIZES[2],
        "SpacingBetweenSlices": VOXEL_SIZES[2],
        "SkullStripped": True,
        "SimulationSeed": seed,
    }
    write_text(bids / "dataset_description.json", _json(description))
    write_text(anat / SCAN.replace(".nii.gz", ".json"), _json(sidecar))
    write_text(bids / "participants.tsv", "participant_id\nsub-demo\n")
    write_text(
        bids / "README",
        "Simulated, not acquired: the ICBM 2009a symmetric brain as nilearn carries it, turned, "
        f"scaled and shifted at random (seed {seed}) and scanned in axial slices of "
        f"{VOXEL_SIZES[2]:g} mm by `remix-experts simulate`.\n",
    )
    return bids


def compare(folder: Path, output: Path | None = None) -> Comparison:
    """Hold a run on the example against the truth.

    Parameters
    ----------
    folder : Path
        What `write_example` wrote to.
    output : Path, optional
        Where ``remix-bids`` wrote to; ``out/`` in ``folder`` by default.

    Raises
    ------
    UsageError
        There is no example, or no result of it, in the folders named.
    RemixError
        The result has another grid than the truth.
    """
    output = folder / "out" if output is None else output
    scan = folder / "bids" / "sub-demo" / "anat" / SCAN
    names = output_names(scan, NILEARN_SPACE)
    for path, made_by in (
        (scan, f"remix-experts simulate {folder}"),
        (folder / "truth" / "T1w.nii.gz", f"remix-experts simulate {folder}"),
        (
            output / names.image,
            f"remix-bids {folder / 'bids'} {output} participant --output-spaces {NILEARN_SPACE}",
        ),
    ):
        if not path.is_file():
            raise UsageError(f"{path} is not there; first run: {made_by}")
    native, native_grid = _load(scan)
    truth, _ = _load(folder / "truth" / "T1w.nii.gz")
    result, result_grid = _load(output / names.image)
    if result_grid.shape != WORKING_GRID.shape or not np.allclose(
        result_grid.affine, WORKING_GRID.affine
    ):
        raise RemixError(f"{output / names.image} is not on the working grid")
    estimated = read_itk_affine(output / names.forward_transform)
    brain = truth > 0
    distance = displacements(estimated, read_itk_affine(folder / "truth" / "affine.txt"), brain)
    low = restore_grid(native, native_grid, estimated)
    inside = eroded(brain & low.covered, RIM)
    return Comparison(
        displacement=float(distance.mean()),
        largest_displacement=float(distance.max()),
        cubic=psnr(low.image, truth, inside),
        expert=psnr(result, truth, inside),
        expert_name=str(json.loads((output / names.sidecar).read_text()).get("Expert")),
        report=output / "sub-demo.html",
    )


def _is_example(bids: Path) -> bool:
    try:
        content = json.loads((bids / "dataset_description.json").read_text())
        return bool(content["Name"] == NAME)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _load(path: Path) -> tuple[torch.Tensor, Grid]:
    image = nb.load(path)
    data = np.asanyarray(image.dataobj).astype(np.float32)
    return torch.from_numpy(data), Grid(image.shape, image.affine)


def _save(values: torch.Tensor, affine: np.ndarray, path: Path, code: str) -> None:
    """Write as 16-bit NIfTI unless the same image is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.rint(values.numpy()).astype(np.int16)
    if path.is_file():
        old = nb.load(path)
        same_grid = old.shape == data.shape and np.allclose(old.affine, affine, atol=1e-4)
        if same_grid and np.array_equal(np.asanyarray(old.dataobj), data):
            return
    image = nb.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    part = path.with_name(f".{path.name.removesuffix('.nii.gz')}.part.nii.gz")
    try:
        nb.save(image, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
