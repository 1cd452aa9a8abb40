"""The example that needs no data."""

import json
import shutil

import nibabel as nb
import numpy as np
import pytest
import torch

from remix_bids.cli.experts import main
from remix_bids.naming import output_names
from remix_bids.registration.itk import read_itk_affine, write_itk_affine
from remix_bids.simulation import example
from remix_bids.simulation.degrade import restore_grid
from remix_bids.spatial import WORKING_GRID, Grid
from remix_bids.templates import NILEARN_SPACE


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with space") / "demo"
    assert main(["simulate", str(folder), "--seed", "1"]) == 0
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_random_affine_stays_in_its_range(seed):
    world = example.random_affine(np.random.default_rng(seed))
    scales = np.linalg.norm(world[:3, :3], axis=0)
    turn = world[:3, :3] / scales
    angle = np.rad2deg(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    np.testing.assert_allclose(turn.T @ turn, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) > 0
    assert angle <= example.MAX_ANGLE + 1e-6
    assert np.all(np.abs(scales - 1) <= example.MAX_STRETCH)
    assert np.all(np.abs(world[:3, 3]) <= example.MAX_SHIFT)


def test_grid_holds_the_moved_brain():
    brain = torch.zeros(40, 50, 30)
    brain[5:35, 5:45, 5:25] = 1
    grid = Grid((40, 50, 30), np.diag([1.0, 1, 1, 1]))
    made = example.make_example(brain, grid, np.random.default_rng(3))
    low = made.acquisition.grid
    np.testing.assert_allclose(low.voxel_sizes, example.VOXEL_SIZES)
    assert nb.aff2axcodes(low.affine) == ("L", "A", "S")
    # All the brain's signal is in the scan: nothing was cut off, and a scan keeps the integral.
    volume = np.prod(example.VOXEL_SIZES) / np.linalg.det(made.acquisition.world)
    assert float(made.native.sum()) * volume == pytest.approx(float(brain.sum()), rel=0.02)


def test_displacements():
    mask = torch.zeros(WORKING_GRID.shape, dtype=torch.bool)
    mask[90, 126, 72] = mask[100, 126, 72] = True  # world (0, 0, 0) and (10, 0, 0)
    moved = np.eye(4)
    moved[:3, 3] = 0, 3, 4
    np.testing.assert_allclose(example.displacements(moved, np.eye(4), mask), 5)
    stretched = np.diag([1.1, 1, 1, 1])
    np.testing.assert_allclose(example.displacements(stretched, np.eye(4), mask), [0, 1])


def test_dataset_and_truth_belong_together(made):
    scan = nb.load(made / "bids/sub-demo/anat/sub-demo_T1w.nii.gz")
    truth = torch.from_numpy(nb.load(made / "truth/T1w.nii.gz").get_fdata(dtype=np.float32))
    assert truth.shape == WORKING_GRID.shape
    np.testing.assert_allclose(scan.header.get_zooms(), (1, 1, 5))
    assert int(scan.header["qform_code"]) == int(scan.header["sform_code"]) == 1
    sidecar = json.loads((made / "bids/sub-demo/anat/sub-demo_T1w.json").read_text())
    assert sidecar["SkullStripped"] is True
    assert sidecar["SliceThickness"] == 5
    world = read_itk_affine(made / "truth/affine.txt")
    native = torch.from_numpy(scan.get_fdata(dtype=np.float32))
    low = restore_grid(native, Grid(scan.shape, scan.affine), world)
    brain = truth > 0
    assert low.covered[brain].all()
    assert torch.corrcoef(torch.stack([low.image[brain], truth[brain]]))[0, 1] > 0.9


def test_same_seed_leaves_files_alone_and_another_does_not(made, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(made, folder)
    scan = folder / "bids/sub-demo/anat/sub-demo_T1w.nii.gz"
    before = scan.stat().st_mtime_ns, scan.read_bytes()
    assert main(["simulate", str(folder), "--seed", "1"]) == 0
    assert (scan.stat().st_mtime_ns, scan.read_bytes()) == before
    assert main(["simulate", str(folder), "--seed", "2"]) == 0
    assert scan.read_bytes() != before[1]
    assert not list(folder.rglob("*.part*"))


def test_a_dataset_of_somebody_else_is_left_alone(tmp_path, capsys):
    description = tmp_path / "bids" / "dataset_description.json"
    description.parent.mkdir()
    description.write_text('{"Name": "precious"}')
    assert main(["simulate", str(tmp_path)]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bids", "dataset_description.json"]


def test_compare_wants_a_run_first(made, capsys):
    assert main(["compare", str(made)]) == 2
    assert "first run: remix-bids" in capsys.readouterr().err


def test_compare_of_a_perfect_result(made, tmp_path, capsys):
    scan = made / "bids/sub-demo/anat/sub-demo_T1w.nii.gz"
    names = output_names(scan, NILEARN_SPACE)
    out = tmp_path / "out"
    (out / names.image).parent.mkdir(parents=True)
    truth = nb.load(made / "truth/T1w.nii.gz")
    almost = nb.Nifti1Image(truth.get_fdata(dtype=np.float32) + 1, truth.affine)
    nb.save(almost, out / names.image)
    (out / names.sidecar).write_text('{"Expert": "5"}')
    world = read_itk_affine(made / "truth/affine.txt")
    world[:3, 3] += 0, 3, 4
    write_itk_affine(out / names.forward_transform, world)
    assert main(["compare", str(made), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "5.00 mm on average, 5.00 mm at most" in printed
    assert "expert 5" in printed
    assert printed.rstrip().endswith(str(out / "sub-demo.html"))
    cubic, expert = (float(x.split()[-2]) for x in printed.splitlines() if x.endswith("dB"))
    assert expert > 50 > cubic
