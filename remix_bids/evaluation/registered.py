"""A case as in real use: the affine is estimated from the acquired image, not known."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from remix_bids.registration.affine import Templates, register_affine
from remix_bids.registration.volumes import Volume, save_volume
from remix_bids.simulation.acquisition import Acquisition
from remix_bids.spatial import WORKING_GRID, index_map, resample


def as_registered(
    native: Tensor, acquisition: Acquisition, truth: Tensor, templates: Templates, head: bool
) -> tuple[Acquisition, Tensor]:
    """The acquisition with the affine that the app would find, and the truth in that space.

    What is restored lies where that affine puts it; the truth follows, so that the two lie on each
    other as they do in the scanner.

    Parameters
    ----------
    native : (x, y, z) tensor
        On ``acquisition.grid``.
    acquisition : Acquisition
        With the true affine.
    truth : (x, y, z) tensor
        On the working grid.
    templates : Templates
    head : bool
        Not a stripped brain, as a sidecar would tell.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "native.nii"
        save_volume(Volume(native.numpy(), acquisition.grid.affine), path)
        found = register_affine(path, templates, skull_stripped=not head, work_dir=Path(folder))
    there = np.linalg.inv(acquisition.world) @ found.matrix
    moved = resample(truth, index_map(WORKING_GRID, WORKING_GRID, there), WORKING_GRID.shape)
    return replace(acquisition, world=found.matrix), moved.clamp(min=0)
