"""The interfaces between the graph and the science, on real arrays with a small network."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch
from nipype.interfaces.base import isdefined

from remix_bids.experts.registry import load_registry
from remix_bids.experts.unet import ResidualUNet
from remix_bids.interfaces.experts import NO_EXPERT, Enhance, SelectExpert
from remix_bids.interfaces.resample import ToWorkingGrid, save_on_working_grid
from remix_bids.registration.itk import write_itk_affine
from remix_bids.spatial import WORKING_GRID
from remix_bids.training.trainer import save_network
from tests.bids_skeletons import save_image

BOUNDS = [0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 1e9]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Eight experts: one small network that changes its input."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    network = ResidualUNet(widths=(4, 8))
    torch.nn.init.normal_(network.out.weight, std=0.01)
    save_network(network, folder / "e.safetensors")
    digest = hashlib.sha256((folder / "e.safetensors").read_bytes()).hexdigest()
    names = [*"1234567", "general"]
    bounds = [*pairwise(BOUNDS), (0, 1e9)]
    rows = [
        f'[expert.{name}]\nfile = "e.safetensors"\nsha256 = "{digest}"\nlower = {low}\nupper = {up}'
        for name, (low, up) in zip(names, bounds, strict=True)
    ]
    (folder / "experts.toml").write_text("\n".join(rows))
    return folder / "experts.toml"


def outputs(interface, folder):
    folder.mkdir(exist_ok=True)
    return interface.run(cwd=str(folder)).outputs


def load(path):
    return np.asanyarray(nb.load(path).dataobj)


# --- to the working grid -------------------------------------------------------------------------


@pytest.fixture
def template(tmp_path):
    brain = np.zeros(WORKING_GRID.shape, dtype=np.float32)
    brain[60:120, 70:150, 50:130] = 1
    save_on_working_grid(brain, tmp_path / "template.nii.gz")
    return tmp_path / "template.nii.gz"


def test_known_affine_brings_known_voxels(tmp_path, template):
    """A ramp along world x of the scanner, moved by a known affine, comes out as that ramp."""
    affine = np.array([[0, 0, 4.0, -70], [-2.0, 0, 0, 80], [0, 2.0, 0, -60], [0, 0, 0, 1]])
    shape = (90, 80, 40)
    index = np.indices(shape).reshape(3, -1)
    x = (affine[:3, :3] @ index + affine[:3, 3:])[0].reshape(shape)
    source = save_image(tmp_path / "sub-01_T1w.nii.gz", (x + 500).astype(np.float32), affine)
    matrix = np.eye(4)
    matrix[0, 3], matrix[1, 3] = 10, -7
    write_itk_affine(tmp_path / "xfm.txt", matrix)
    result = outputs(
        ToWorkingGrid(
            in_file=str(source), transform=str(tmp_path / "xfm.txt"), template=str(template)
        ),
        tmp_path / "node",
    )
    image, covered = load(result.out_file), load(result.coverage) > 0
    header = nb.load(result.out_file).header
    assert np.array_equal(nb.load(result.out_file).affine, WORKING_GRID.affine)
    assert (header["sform_code"], header["qform_code"]) == (4, 4)
    expected = (np.arange(181) - 90 + 10 + 500)[:, None, None] * np.ones(WORKING_GRID.shape)
    # Away from the ends of the field of view, where a spline repeats the last value.
    inner = covered.copy()
    inner[:, :, :] &= np.abs(expected - 500 - 8) < 70
    assert inner.sum() > 1e6
    assert np.abs(image - expected)[inner].max() < 0.5
    assert np.abs(load(result.estimate) - expected)[inner].max() < 1
    assert not image[~covered].any()
    # Template x = -90 + i sees the scanner's x = i - 80: from -72 (half a slice out) to 88.
    assert np.flatnonzero(covered.any(axis=(1, 2))).tolist() == list(range(8, 169))
    assert set(np.unique(load(result.coverage))) == {0, 1}
    brain = load(str(template)) > 0
    assert result.brain_coverage == pytest.approx(covered[brain].mean())
    assert not isdefined(result.slice_width)  # a ramp tells nothing of its slices
    assert len(result.warnings) == (result.brain_coverage < 0.95)


def test_little_coverage_is_said(tmp_path, template):
    affine = np.diag([4.0, 4.0, 6.0, 1.0])
    affine[:3, 3] = -80, -100, 20
    source = save_image(tmp_path / "sub-01_T1w.nii.gz", None, affine)
    write_itk_affine(tmp_path / "xfm.txt", np.eye(4))
    result = outputs(
        ToWorkingGrid(
            in_file=str(source), transform=str(tmp_path / "xfm.txt"), template=str(template)
        ),
        tmp_path / "node",
    )
    assert result.brain_coverage < 0.95
    assert f"{100 * result.brain_coverage:.1f} %" in result.warnings[0]
    assert load(result.out_file).min() >= 0  # a spline must not undershoot what has no negatives


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "gate", "asked", "expert", "warned"),
    [
        ((0.45, 0.45, 6.0), "effective", "auto", "6", ""),
        ((0.45, 0.45, 6.0), "paper", "auto", "1", ""),
        ((0.78125, 0.78125, 6.5), "effective", "auto", "7", ""),
        ((1.0, 1.0, 3.0), "effective", "auto", "3", ""),
        ((1.0, 1.0, 3.0), "effective", "general", "general", ""),
        ((1.0, 1.0, 3.0), "effective", "5", "5", ""),
        ((1.0, 1.0, 8.8), "effective", "auto", "7", "at the edge"),
        ((1.0, 1.0, 12.0), "effective", "auto", "7", "anisotropy"),
        ((1.0, 1.0, 1.0), "effective", "auto", NO_EXPERT, "nothing is to be gained"),
        ((0.5, 1.05, 0.8), "effective", "auto", NO_EXPERT, "nothing is to be gained"),
        ((1.05 + 1e-7, 1.05, 1.05), "effective", "auto", NO_EXPERT, "nothing is to be gained"),
        ((1.0, 1.0, 1.0), "effective", "1", "1", ""),
        ((1.06, 1.06, 1.06), "effective", "auto", "1", ""),
    ],
)
def test_gate(tmp_path, experts, sides, gate, asked, expert, warned):
    path = tmp_path / "image.nii"
    nb.save(nb.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([*sides, 1.0])), path)
    node = SelectExpert(in_file=str(path), experts_table=str(experts), expert=asked, gate=gate)
    result = outputs(node, tmp_path / "node")
    assert result.expert == expert
    assert result.voxel_volume == pytest.approx(np.prod(sides), abs=6e-4)
    assert result.effective_voxel_volume == pytest.approx(np.prod(np.maximum(sides, 1)), abs=6e-4)
    assert warned in " ".join(result.warnings)
    assert bool(result.warnings) == bool(warned)


@pytest.mark.parametrize(
    ("own", "least", "asked", "steps"),
    [(0, 0, "auto", 0), (2, 0, "auto", 2), (0, 1, "auto", 1), (2, 1, "3", 2)],
)
def test_an_expert_knows_its_steps_of_consistency(tmp_path, experts, own, least, asked, steps):
    text = experts.read_text().replace("[expert.4]", f"[expert.4]\nconsistency_steps = {own}")
    text = text.replace("[expert.3]", f"[expert.3]\nconsistency_steps = {own}")
    for name in ("experts.toml", "e.safetensors"):
        (tmp_path / name).write_bytes((experts.parent / name).read_bytes())
    (tmp_path / "experts.toml").write_text(text)
    path = save_image(tmp_path / "scan.nii.gz", affine=np.diag([1.0, 1, 4, 1]))
    table = str(tmp_path / "experts.toml")
    node = SelectExpert(in_file=str(path), experts_table=table, expert=asked, least_steps=least)
    assert outputs(node, tmp_path / "node").consistency_steps == steps
    fine = save_image(tmp_path / "fine.nii.gz", affine=np.diag([1.0, 1, 1, 1]))
    node = SelectExpert(in_file=str(fine), experts_table=table, least_steps=1)
    assert outputs(node, tmp_path / "fine").consistency_steps == 0  # no network, no step


# --- the network ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    covered = np.zeros(WORKING_GRID.shape, dtype=np.uint8)
    covered[20:160, 20:200, 30:150] = 1
    values = {
        "in_file": rng.random(WORKING_GRID.shape, dtype=np.float32) * 800 * covered,
        "estimate": rng.random(WORKING_GRID.shape, dtype=np.float32) * 800 * covered,
        "rest": rng.normal(0, 10, WORKING_GRID.shape).astype(np.float32) * covered,
        "coverage": covered,
    }
    for name, array in values.items():
        save_on_working_grid(array, folder / f"{name}.nii")
    save_image(folder / "native.nii.gz", None, np.diag([1.0, 1.0, 3.0, 1.0]))
    write_itk_affine(folder / "xfm.txt", np.eye(4))
    native = {"native": str(folder / "native.nii.gz"), "transform": str(folder / "xfm.txt")}
    return {name: str(folder / f"{name}.nii") for name in values} | native


def enhance(inputs, experts, folder, **settings):
    table = Path(experts)
    settings = {"expert": "3", "expert_file": str(table.parent / "e.safetensors"), **settings}
    return outputs(Enhance(**inputs, **settings), folder)


def test_enhance_does_not_depend_on_the_number_of_threads(tmp_path, inputs):
    """With a shipped expert: a small network rounds alike by luck."""
    record = load_registry()["3"]
    torch.set_num_threads(1)
    one = enhance(inputs, record.path, tmp_path / "one", expert_file=str(record.path))
    torch.set_num_threads(3)
    three = enhance(inputs, record.path, tmp_path / "three", expert_file=str(record.path))
    assert np.array_equal(load(one.out_file), load(three.out_file))
    low, high = load(inputs["estimate"]), load(one.out_file)
    assert high.dtype == np.float32
    assert not np.array_equal(low, high)  # the network did something
    assert not high[load(inputs["coverage"]) == 0].any()
    assert one.device == "cpu"


def test_no_expert_is_a_copy(tmp_path, inputs, experts):
    result = enhance(inputs, experts, tmp_path / "node", expert=NO_EXPERT)
    assert np.array_equal(load(result.out_file), load(inputs["in_file"]))
    assert "copy" in result.intensity_scaling


def test_damaged_weights_are_refused(tmp_path, inputs, experts):
    table = tmp_path / "experts" / "experts.toml"
    table.parent.mkdir()
    table.write_text(Path(experts).read_text())
    (table.parent / "e.safetensors").write_bytes(b"something else")
    with pytest.raises(Exception, match="sha256"):
        enhance(inputs, table, tmp_path / "node")


def test_registration_result_is_plain_json(tmp_path):
    from remix_bids.registration.affine import AffineResult

    result = AffineResult(np.eye(4), True, 0.9, True, np.ones(3), 1.0, ["w"], [{"name": "a"}])
    assert json.loads(json.dumps(result.to_dict()))["matrix"][0] == [1, 0, 0, 0]
