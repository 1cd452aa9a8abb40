"""Evaluation with an affine that is estimated from the scan."""

import nibabel as nb
import numpy as np
import pytest
import torch

from remix_bids.evaluation.methods import interpolate
from remix_bids.evaluation.metrics import correlation
from remix_bids.evaluation.registered import as_registered
from remix_bids.registration.affine import Templates
from remix_bids.simulation.acquisition import Acquisition
from remix_bids.simulation.degrade import acquire
from remix_bids.spatial import WORKING_GRID, Grid, index_map, resample


@pytest.mark.slow
def test_the_truth_follows_the_estimated_affine(tmp_path):
    """A truth that lies beside the template: found there, and still under its own scan."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    nb.save(image, tmp_path / "brain.nii.gz")
    data = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))
    x, y, z = data.shape
    whole = Grid((x, y, z), image.affine)
    template = resample(data, index_map(WORKING_GRID, whole), WORKING_GRID.shape).clamp(min=0)
    beside = np.diag([1.04, 1.0, 0.97, 1.0])
    beside[:3, 3] = 4, -3, 2
    truth = resample(data, index_map(WORKING_GRID, whole, beside), WORKING_GRID.shape).clamp(min=0)

    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    affine[:3, 3] = -90, -125, -75
    acquisition = Acquisition(Grid((181, 217, 46), affine), np.eye(4), (1.0, 1.0, 4.0))
    native = acquire(truth, acquisition)
    templates = Templates(tmp_path / "brain.nii.gz", None, skull_stripped=True)
    found, moved = as_registered(native, acquisition, truth, templates, head=False)

    def alike(one, other):
        return correlation(one, other, other > 0.2 * other.max())

    assert alike(truth, template) < 0.8
    assert alike(moved, template) > 0.97
    before = alike(interpolate(native, acquisition, WORKING_GRID, "linear"), truth)
    after = alike(interpolate(native, found, WORKING_GRID, "linear"), moved)
    assert after == pytest.approx(before, abs=0.005)
