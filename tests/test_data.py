"""The app on real scans; `make test-data DATA=...` names the folder that holds them."""

import hashlib
import os
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

from remix_bids.registration.itk import read_itk_affine
from remix_bids.spatial import WORKING_GRID
from tests.commands import assert_valid, last_line, run

pytestmark = pytest.mark.data
N_SCANS = 7


@pytest.fixture(scope="module")
def data():
    name = os.environ.get("REMIX_BIDS_TEST_DATA")
    if not name:
        pytest.skip("real scans are not part of the repository: REMIX_BIDS_TEST_DATA names none")
    return Path(name).resolve()


def _checksums(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def clinical(data, tmp_path_factory):
    """The output folder of one run on all clinical scans."""
    folder = tmp_path_factory.mktemp("clinical")
    before = {name: _checksums(data / name) for name in ("clinical", "templateflow")}
    done = run(
        "remix-bids",
        *(data / "clinical", folder / "out", "participant", "-w", folder / "work", "--offline"),
        *("--output-spaces", "MNI152Lin", "T1w"),
        TEMPLATEFLOW_HOME=data / "templateflow",
    )
    assert done.returncode == 0
    assert last_line(done) == f"{N_SCANS} done, 0 failed"
    assert {name: _checksums(data / name) for name in before} == before
    return folder / "out"


def test_outputs_are_on_the_working_grid(clinical):
    images = sorted(clinical.rglob("*_space-MNI152Lin_res-1_desc-remix_T1w.nii.gz"))
    assert len(images) == N_SCANS
    for path in images:
        image = nb.load(path)
        assert image.shape == WORKING_GRID.shape
        np.testing.assert_allclose(image.affine, WORKING_GRID.affine)
        assert np.isfinite(image.get_fdata()).all()


def test_affines_keep_the_size_of_heads(clinical):
    transforms = sorted(clinical.rglob("*_from-T1w_to-*_xfm.txt"))
    assert len(transforms) == N_SCANS
    for path in transforms:
        scales = np.linalg.svd(read_itk_affine(path)[:3, :3], compute_uv=False)
        print(path.name, scales.round(3))
        assert scales.max() < 1.3, path.name
        assert scales.min() > 0.75, path.name


def test_every_person_has_a_report(clinical):
    assert len(list(clinical.glob("sub-*.html"))) == 6


def test_native_images_overlay_the_scans(data, clinical):
    """Taken to the acquired voxels, the native output is the scan but for what was added."""
    from nibabel.processing import resample_from_to

    scans = sorted((data / "clinical").rglob("*_T1w.nii.gz"))
    assert len(scans) == N_SCANS
    for path in scans:
        scan = nb.load(path)
        name = path.name.replace("_T1w", "_desc-remix_T1w")
        native = nb.load(next(clinical.rglob(name)))
        matrix = native.affine[:3, :3]
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-3)
        seen = resample_from_to(native, (scan.shape[:3], scan.affine), order=1).get_fdata()
        truth = scan.get_fdata().reshape(seen.shape)
        assert np.corrcoef(seen.ravel(), truth.ravel())[0, 1] > 0.97, name


def test_output_is_valid(clinical):
    assert_valid(clinical)
