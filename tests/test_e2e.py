"""The whole way of one scan, from the command line, on the simulated brain."""

import json
from types import SimpleNamespace

import nibabel as nb
import numpy as np
import pytest
from bids import BIDSLayout
from nibabel.processing import resample_from_to

from remix_bids.demo import compare
from remix_bids.naming import output_names
from remix_bids.spatial import WORKING_GRID
from remix_bids.templates import NILEARN_SPACE, _nilearn_brain
from tests.commands import assert_valid, last_line, run

pytestmark = pytest.mark.slow

SCAN = "sub-demo/anat/sub-demo_T1w.nii.gz"
BROKEN = "sub-broken/anat/sub-broken_T1w.nii.gz"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run on a good scan and a broken one, in folders with spaces in their names."""
    folder = tmp_path_factory.mktemp("end to end") / "my demo"
    assert run("remix-experts", "simulate", folder).returncode == 0
    assert_valid(folder / "bids")
    scan = folder / "bids" / SCAN
    broken = folder / "bids" / BROKEN
    broken.parent.mkdir(parents=True)
    broken.write_bytes(scan.read_bytes()[:100_000])
    (folder / "bids/participants.tsv").write_text("participant_id\nsub-demo\nsub-broken\n")
    before = {path: path.read_bytes() for path in sorted((folder / "bids").rglob("*.*"))}
    done = _participant(folder)
    names = output_names(scan, NILEARN_SPACE)
    return SimpleNamespace(folder=folder, out=folder / "out", names=names, done=done, before=before)


def _participant(folder, *more):
    # Whatever templates the machine has, this run must not need them.
    return run(
        "remix-bids",
        *(folder / "bids", folder / "out", "participant", "-w", folder / "work"),
        *("--output-spaces", NILEARN_SPACE, "--offline", *more),
        TEMPLATEFLOW_HOME=folder / "no templates",
    )


def test_broken_scan_fails_alone(first):
    assert first.done.returncode == 1
    line = last_line(first.done)
    assert line.startswith("1 done, 1 failed: ")
    crashes = list((first.out / "sub-broken" / "log").rglob("crash-*.txt"))
    assert crashes
    assert str(crashes[0]) in line
    assert not list(first.out.rglob("sub-broken*.nii.gz"))


def test_input_is_untouched(first):
    now = {path: path.read_bytes() for path in sorted((first.folder / "bids").rglob("*.*"))}
    assert now == first.before


def test_image_is_on_the_working_grid(first):
    image = nb.load(first.out / first.names.image)
    assert image.shape == WORKING_GRID.shape
    np.testing.assert_allclose(image.affine, WORKING_GRID.affine)
    assert image.get_data_dtype() == np.float32
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 4  # MNI
    data = image.get_fdata()
    assert np.isfinite(data).all()
    assert data.max() > 100  # the scanner's units


def test_sidecar(first):
    sidecar = json.loads((first.out / first.names.sidecar).read_text())
    assert sidecar["SkullStripped"] is True
    assert sidecar["Expert"] in (5, "5")
    assert sidecar["EffectiveVoxelVolume"] == pytest.approx(5)
    assert sidecar["VoxelVolume"] == pytest.approx(5)
    assert sidecar["VoxelSize"] == pytest.approx([1, 1, 5])
    assert sidecar["SelectionRule"].startswith("effective voxel volume")
    assert len(sidecar["ExpertSHA256"]) == 64
    assert sidecar["Sources"] == [f"bids:raw:{SCAN}"]
    for key in (
        *("TemplateFile", "Resolution", "Device", "RandomSeed", "Interpolation"),
        *("IntensityScaling", "AffineDeterminant"),
    ):
        assert sidecar[key], key
    assert sidecar["Warnings"] == []


@pytest.fixture(scope="module")
def comparison(first):
    return compare(first.folder)


def test_registration_is_recovered(comparison):
    assert comparison.displacement < 2


def test_transforms_are_inverse_to_each_other(first):
    from remix_bids.registration.itk import read_itk_affine

    forward = read_itk_affine(first.out / first.names.forward_transform)
    inverse = read_itk_affine(first.out / first.names.inverse_transform)
    np.testing.assert_allclose(forward @ inverse, np.eye(4), atol=1e-3)


def test_expert_is_better_than_cubic(comparison):
    assert comparison.expert_name == "5"
    assert comparison.expert > comparison.cubic + 0.1  # an untrained network is at +0.0


def test_compare_prints_the_figures_and_the_report(first):
    done = run("remix-experts", "compare", first.folder)
    assert done.returncode == 0
    assert "dB" in done.stdout
    assert last_line(done) == f"report: {first.out / 'sub-demo.html'}"


def test_report(first):
    page = (first.out / "sub-demo.html").read_text()
    for figure in (
        *(first.names.registration, first.names.enhancement, first.names.difference),
        *(first.names.changes, first.names.consistency_map, first.names.unknowable),
    ):
        assert (first.out / figure).is_file()
        assert figure.name in page


def test_figures_of_quality(first):
    """On a simulated scan without noise the brain is known, and so is what to expect."""
    found = json.loads((first.out / first.names.qc).read_text())
    assert found["bids_name"] == "sub-demo_T1w"
    assert found["consistency_correlation"] > 0.98
    assert found["anisotropy_before"] < -3  # slices of 5 mm
    assert found["anisotropy_after"] > found["anisotropy_before"]
    assert found["sharpness_after"] > found["sharpness_before"]
    assert found["residual_energy"] > 0.1
    assert 0 < found["network_energy"] < found["residual_energy"]
    assert (first.out / "logs/CITATION.bib").is_file()
    done = run("remix-bids", first.folder / "bids", first.out, "group")
    assert done.returncode == 0
    assert (first.out / "group_T1w.html").is_file()


def test_output_is_valid(first):
    assert_valid(first.out)
    assert not [p for p in first.out.rglob("*") if p.name.endswith(".part")]


def test_second_run_recomputes_nothing(first):
    image = first.out / first.names.image
    before = image.stat().st_mtime_ns
    done = _participant(first.folder, "--participant-label", "sub-demo", "--nprocs", "1")
    assert done.returncode == 0
    assert last_line(done) == "1 done, 0 failed"
    assert "nodes: 0 run" in done.stdout
    assert image.stat().st_mtime_ns == before


# --- the next tool: it knows the dataset, and no path in it ---------------------------------------


@pytest.fixture(scope="module")
def found(first):
    """What a pipeline finds when it asks PyBIDS."""
    layout = BIDSLayout(first.folder / "bids", derivatives=first.out)
    query = {"scope": "remix-bids", "desc": "remix", "suffix": "T1w", "extension": ".nii.gz"}
    return layout, layout.get(**query, space=NILEARN_SPACE)


def test_derivative_is_found_by_query(first, found):
    layout, (image,) = found
    assert image.entities["subject"] == "demo"
    assert image.get_metadata()["Expert"] in (5, "5")
    assert image.get_metadata()["Sources"] == [f"bids:raw:{SCAN}"]
    assert not layout.get(scope="raw", desc="remix")
    way = {"from": "T1w", "to": NILEARN_SPACE}
    (transform,) = layout.get(scope="remix-bids", suffix="xfm", **way)
    assert transform.entities["mode"] == "image"


def test_next_tool_segments_the_derivative(found, tmp_path):
    """ANTs' Atropos finds the white matter of the brain that the scan was simulated from."""
    import ants

    _, (image,) = found
    coarse = nb.load(image.path).slicer[::2, ::2, ::2]  # every second voxel will do, and is faster
    nb.save(coarse, tmp_path / "coarse.nii.gz")
    volume = ants.image_read(str(tmp_path / "coarse.nii.gz"))
    mask = ants.get_mask(volume, low_thresh=1e-3, cleanup=0)
    tissues = ants.atropos(volume, mask, i="KMeans[3]", m="[0.1,1x1x1]", c="[3,0]")["segmentation"]
    labels = tissues.numpy()
    truth = resample_from_to(
        nb.load(_nilearn_brain().with_name("mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz")),
        (labels.shape, coarse.affine),
        order=1,
    ).get_fdata()
    ours, theirs = labels == 3, truth > 0.5 * truth.max()
    dice = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
    print(f"DICE of the white matter {dice:.3f}")
    assert dice > 0.7  # 0.77 seen
