"""Small BIDS datasets for tests; images are real NIfTI files of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nb
import numpy as np

GEOMETRY = np.diag([4.0, 4.0, 6.0, 1.0])


def save_image(path: Path, data: np.ndarray | None = None, affine: np.ndarray = GEOMETRY) -> Path:
    """Write a small image; by default a blob in a field of view of a head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (45, 54, 28)], indexing="ij"))
        data = (1000 * np.exp(-3 * (grid**2).sum(axis=0))).astype(np.int16)
    nb.save(nb.Nifti1Image(data, affine), path)
    return path


def make_dataset(root: Path, names: list[str], *, images: bool = False) -> Path:
    """A dataset with the T1w images named, as empty files unless ``images``.

    ``names`` are file names such as ``sub-01_ses-a_T1w.nii.gz``.
    """
    root.mkdir(parents=True, exist_ok=True)
    description = {"Name": "Test", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("A dataset for tests.\n")
    for name in names:
        parts = name.split("_")
        folder = root / parts[0]
        if parts[1].startswith("ses-"):
            folder = folder / parts[1]
        path = folder / "anat" / name
        if images:
            save_image(path)
        elif not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root
