"""Figures of quality as files: what is written, in which header, and what the tables say."""

import json
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

from remix_bids.interfaces.bids import check_t1w
from remix_bids.interfaces.qc import (
    CheckHeader,
    CollectQC,
    DescribeNative,
    DropSlices,
    EnforceConsistency,
    ToNative,
)
from remix_bids.interfaces.reports import Tabulate, _number, consistency_html, quality_html
from remix_bids.interfaces.resample import save_on_working_grid
from remix_bids.native import native_grid
from remix_bids.registration.itk import write_itk_affine
from remix_bids.simulation import estimate
from remix_bids.spatial import WORKING_GRID, Grid
from tests.bids_skeletons import GEOMETRY, save_image
from tests.pages import figures_of, sidecar


def outputs(interface, folder):
    folder.mkdir(exist_ok=True)
    return interface.run(cwd=str(folder)).outputs


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 3), (0, 0)])
def test_native_image_keeps_world_and_codes(tmp_path, codes):
    affine = GEOMETRY.copy()
    affine[:3, :3] = np.diag([-4.0, 4.0, 6.0])
    affine[:3, 3] = (90, -110, -80)
    scan = save_image(tmp_path / "scan.nii.gz", affine=affine)
    image = nb.load(scan)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    nb.save(image, scan)
    write_itk_affine(tmp_path / "affine.txt", np.eye(4))
    for name, value in (("before", 0), ("after", 1)):
        flat = np.full(WORKING_GRID.shape, value, np.float32)
        save_on_working_grid(flat, tmp_path / f"{name}.nii")
    node = ToNative(
        native=str(scan),
        transform=str(tmp_path / "affine.txt"),
        before=str(tmp_path / "before.nii"),
        after=str(tmp_path / "after.nii"),
    )
    result = outputs(node, tmp_path / "node")
    out = nb.load(result.out_file)
    expected = native_grid(Grid(image.shape, nb.load(scan).affine))
    assert out.shape == tuple(result.shape) == expected.shape
    np.testing.assert_allclose(out.affine, expected.affine, atol=1e-4)
    assert out.header.get_zooms() == pytest.approx((1, 1, 1))
    assert out.get_data_dtype() == np.float32
    known = [code for code in codes if code]
    assert int(out.header["sform_code"]) == int(out.header["qform_code"]) == (known or [1])[0]
    assert 0 < result.enhanced_fraction <= 1


def test_consistency_steps_as_many_as_told(tmp_path, monkeypatch):
    """None, or a noisy scan: the file itself. One: the scan fills in what the output lacks."""
    affine = np.diag([1.0, 1, 4, 1])
    affine[:3, 3] = (-30, -40, -30)
    scan = save_image(tmp_path / "scan.nii.gz", affine=affine)
    nb.save(nb.Nifti1Image(np.full((60, 60, 15), 100, np.float32), affine), scan)
    write_itk_affine(tmp_path / "affine.txt", np.eye(4))
    covered = np.zeros(WORKING_GRID.shape, np.float32)
    covered[60:120, 86:146, 42:100] = 1
    for name, values in (("enhanced", 50 * covered), ("coverage", covered)):
        save_on_working_grid(values, tmp_path / f"{name}.nii")
    given = {name: str(tmp_path / f"{name}.nii") for name in ("enhanced", "coverage")}
    given |= {"native": str(scan), "transform": str(tmp_path / "affine.txt")}
    none = outputs(EnforceConsistency(**given, steps=0), tmp_path / "none")
    assert (none.out_file, none.share) == (given["enhanced"], 0)
    one = outputs(EnforceConsistency(**given, steps=1), tmp_path / "one")
    assert one.share == 1
    image = nb.load(one.out_file).get_fdata()
    assert image[90, 116, 70] == pytest.approx(100, rel=0.01)
    assert not image[covered == 0].any()
    monkeypatch.setattr(estimate, "freedom_from_noise", lambda *_: 0.0)
    noisy = outputs(EnforceConsistency(**given, steps=1), tmp_path / "noisy")
    assert (noisy.out_file, noisy.share) == (given["enhanced"], 0)


def test_native_sidecar(tmp_path):
    content = sidecar() | {
        "SpatialReference": "tpl",
        "Interpolation": "estimate",
        "Resolution": "x",
    }
    node = DescribeNative(
        in_file=write(tmp_path / "a.json", content), shape=[10, 20, 30], enhanced_fraction=0.812345
    )
    found = json.loads(Path(outputs(node, tmp_path / "node").out_file).read_text())
    assert found["EnhancedFraction"] == 0.8123
    assert "10 x 20 x 30" in found["Resolution"]
    assert not {"SpatialReference", "AffineDeterminant"} & set(found)
    assert found["Expert"] == "5"
    assert found["Interpolation"].startswith("cubic B-spline, once")
    assert "what was added" in found["Interpolation"]
    given = write(tmp_path / "a.json", content | {"Expert": "none"})
    node = DescribeNative(in_file=given, shape=[10, 20, 30], enhanced_fraction=0.0)
    found = json.loads(Path(outputs(node, tmp_path / "none").out_file).read_text())
    assert (found["EnhancedFraction"], "added" in found["Interpolation"]) == (0, False)


@pytest.mark.parametrize("n", [27, 28])
def test_every_second_slice_stays_in_its_place(tmp_path, n):
    data = np.random.default_rng(0).random((20, 22, n)).astype(np.float32)
    scan = save_image(tmp_path / "scan.nii.gz", data)
    found = outputs(DropSlices(in_file=str(scan)), tmp_path / "node")
    kept = nb.load(found.out_file)
    assert kept.shape == (20, 22, 14)
    np.testing.assert_array_equal(kept.get_fdata(dtype=np.float32), data[:, :, ::2])
    np.testing.assert_allclose(kept.affine @ [3, 4, 5, 1], nb.load(scan).affine @ [3, 4, 10, 1])
    spacing = float(nb.affines.voxel_sizes(nb.load(scan).affine)[2])
    for told, used in ((None, spacing), (spacing / 2, spacing / 2), (spacing * 1.6, spacing)):
        node = DropSlices(in_file=str(scan), **({} if told is None else {"thickness": told}))
        assert outputs(node, tmp_path / str(told)).thickness == pytest.approx(used)


def test_header_findings(tmp_path):
    scan = save_image(tmp_path / "scan.nii.gz")
    image = nb.load(scan)
    image.set_sform(GEOMETRY, 1)
    image.set_qform(GEOMETRY, 1)
    nb.save(image, scan)
    page = Path(outputs(CheckHeader(in_file=str(scan)), tmp_path / "a").out_file)
    assert "Nothing to remark" in page.read_text()
    bare = nb.Nifti1Image(np.asanyarray(image.dataobj), None)
    nb.save(bare, scan)
    node = CheckHeader(in_file=str(scan), remarks=["Header: <odd>"])
    page = Path(outputs(node, tmp_path / "b").out_file)
    assert "Header: &lt;odd&gt;" in page.read_text()
    assert "orientation" in page.read_text()  # niworkflows' own words
    assert not list(page.parent.glob("*valid*"))  # its repaired copy is not kept


def test_all_figures_in_one_flat_object(tmp_path):
    node = CollectQC(
        source="sub-01_T1w",
        sidecar=write(tmp_path / "s.json", sidecar(warnings=["a", "b"])),
        consistency=write(tmp_path / "c.json", {"consistency_nrmse": 2.123456789}),
        quality=write(tmp_path / "q.json", {"snr_after": None, "anisotropy_after": float("nan")}),
        left_out=write(tmp_path / "l.json", {"left_out_psnr": 20.0}),
    )
    found = json.loads(Path(outputs(node, tmp_path / "node").out_file).read_text())
    assert found["bids_name"] == "sub-01_T1w"
    assert (found["warnings"], found["brain_coverage"]) == (2, 100.0)
    assert found["consistency_nrmse"] == 2.1235
    assert found["snr_after"] is None
    assert found["anisotropy_after"] is None  # not NaN, which JSON does not know
    assert not any(isinstance(value, dict | list) for value in found.values())


def test_numbers_are_written_out():
    told = [_number(value) for value in (None, 0.01234, 999.4, 1234.5, 12345.6)]
    assert told == ["n/a", "0.0123", "999", "1,234", "12,346"]


def test_tables(tmp_path):
    figures = figures_of("sub-01_T1w", np.random.default_rng(0))
    page = consistency_html(figures)
    assert "Disagreement with the scan, typical" in page
    assert "enforce" not in page
    assert "Leave slices out" not in page
    assert "resampled copy" not in page
    page = consistency_html(figures | {"expert": "none"})
    assert "<th>resampled copy</th>" in page
    assert "No network was run" in page
    enforced = figures | {"consistency_nrmse_enforced": 1.25}
    page = consistency_html(enforced | {"left_out_psnr": 21.5, "left_out_psnr_cubic": 21.0})
    assert "<td>1.25</td>" in page
    assert "as far as they bring it" in page
    assert "21.50 dB" in page
    page = quality_html(figures | {"snr_before": None, "snr_after": None})
    assert "n/a: the tissue classes" in page
    assert "Volume of brain tissue" in page
    node = Tabulate(in_file=write(tmp_path / "q.json", figures))
    result = outputs(node, tmp_path / "node")
    assert Path(result.quality).read_text() == quality_html(figures)


@pytest.mark.parametrize("code", [0, 1])
def test_numbers_of_an_unused_qform_fail_no_scan(tmp_path, code):
    data = np.arange(50**3, dtype=np.float32).reshape(50, 50, 50)
    image = nb.Nifti1Image(data, np.diag([4.0, 4, 4, 1]))
    image.header["quatern_b"], image.header["qform_code"] = np.nan, code
    nb.save(image, tmp_path / "sub-1_T1w.nii")
    assert np.isnan(nb.load(tmp_path / "sub-1_T1w.nii").header["quatern_b"])
    remarks = check_t1w(tmp_path / "sub-1_T1w.nii")
    assert any("the qform is invalid" in text for text in remarks) == (code == 1)
    page = outputs(CheckHeader(in_file=str(tmp_path / "sub-1_T1w.nii")), tmp_path / "a").out_file
    assert "ValidateImage cannot read the header" in Path(page).read_text()
