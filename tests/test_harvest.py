"""Harvesting: what headers tell goes into the bank, what names people does not."""

import json
import os
import re
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

from remix_bids.cli.experts import main
from remix_bids.harvest import Found, _digest, as_bank
from remix_bids.registration.itk import write_itk_affine
from remix_bids.simulation.acquisition import (
    Geometry,
    SyntheticShape,
    load_bank,
    place,
    save_bank,
    slice_axis,
)

from .bids_skeletons import make_dataset

SECRETS = ("Kowalski", "19530217", "1953-02-17", "11:52:07", "Santa Clara", "ACC0815")
LABELS = ("ZQKowalski1", "ZQ19530217", "ZQzebra", "ZQ7")
WORLD = np.array([[1.02, 0.1, 0, 3], [-0.1, 0.98, 0.2, 20], [0, -0.2, 1.1, -5], [0, 0, 0, 1.0]])


def scan(path, *, sizes=(0.9, 0.9, 5.0), shift=0.0, codes=(1, 1)):
    """A real NIfTI file of a head's field of view whose free texts name a person."""
    shape = tuple(int(220 / s) for s in sizes)
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = -np.array(sizes) * shape / 2 + [shift, 0, 10]
    image = nb.Nifti1Image(np.zeros(shape, np.int8), affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    image.header["descrip"] = b"Kowalski 1953-02-17"
    image.header["aux_file"] = b"ACC0815"
    image.header["intent_name"] = b"Kowalski"
    image.header["db_name"] = b"19530217"
    path.parent.mkdir(parents=True, exist_ok=True)
    nb.save(image, path)


def dataset(root):
    """Three people with good scans, one with bad files only."""
    make_dataset(root, [])
    description = {"Name": "Scans of Kowalski", "BIDSVersion": "1.10.0", "License": "by Kowalski"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    first, second, third, bad = (root / f"sub-{label}" for label in LABELS)
    scan(first / "ses-19530217" / "anat" / f"{first.name}_ses-19530217_T1w.nii.gz")
    scan(
        first / "ses-19530217" / "anat" / f"{first.name}_ses-19530217_acq-ACC0815_FLAIR.nii.gz",
        sizes=(0.9, 4.0, 0.9),
    )
    scan(second / "anat" / f"{second.name}_T1w.nii", sizes=(0.45, 0.45, 6.0), shift=3)
    scan(third / "anat" / f"{third.name}_T2w.nii.gz", sizes=(3.0, 1.0, 1.0), shift=5)
    scan(third / "anat" / f"{third.name}_bold.nii.gz")
    sidecar = {
        "SliceThickness": 4.5,
        "SpacingBetweenSlices": 5.0,
        "PatientName": "Kowalski",
        "PatientBirthDate": "19530217",
        "AcquisitionTime": "11:52:07",
        "InstitutionName": "Santa Clara",
    }
    (root / "T1w.json").write_text(json.dumps(sidecar))  # inherited by both T1w
    (second / "anat" / f"{second.name}_T1w.json").write_text(
        json.dumps({"SliceThickness": 5.0, "SpacingBetweenSlices": 6.0})
    )
    (bad / "anat").mkdir(parents=True)
    (bad / "anat" / f"{bad.name}_run-1_T1w.nii.gz").write_bytes(b"no image")
    scan(bad / "anat" / f"{bad.name}_run-2_T1w.nii.gz", codes=(0, 0))
    scan(bad / "anat" / f"{bad.name}_space-MNI152Lin_T1w.nii.gz")
    return root


def transform(
    derivatives, scan_path, world=WORLD, space="MNI152Lin", warnings=(), sidecar="space-{}_res-1_"
):
    """What a run of remix-bids leaves for a scan."""
    name = scan_path.name.partition("_T1w")[0]
    parts = scan_path.parent.parts
    folder = derivatives.joinpath(*parts[parts.index(name.split("_")[0]) :])
    folder.mkdir(parents=True, exist_ok=True)
    write_itk_affine(folder / f"{name}_from-T1w_to-{space}_mode-image_xfm.txt", world)
    (folder / f"{name}_{sidecar.format(space)}desc-remix_T1w.json").write_text(
        json.dumps({"Warnings": list(warnings)})
    )


def t1w(root, label):
    return next((root / f"sub-{label}").rglob("*_T1w.nii*"))


def by_size(bank, size):
    return next(g for g in bank if max(g.grid.voxel_sizes) == pytest.approx(size, abs=1e-4))


@pytest.fixture
def harvested(tmp_path, caplog):
    root, derivatives = dataset(tmp_path / "bids"), tmp_path / "out"
    transform(derivatives, t1w(root, LABELS[0]))
    assert main(["harvest", str(root), str(derivatives), str(tmp_path / "bank.json")]) == 0
    return load_bank(tmp_path / "bank.json"), caplog.text


def test_headers_and_sidecars_are_read(harvested):
    bank, _ = harvested
    assert sorted(g.contrast for g in bank) == ["FLAIR", "T1w", "T1w", "T2w"]
    inherited, own = by_size(bank, 5.0), by_size(bank, 6.0)
    assert (inherited.thickness, inherited.gap, inherited.plane) == (4.5, 0.5, "axial")
    assert (own.thickness, own.gap) == (5.0, 1.0)
    flair, sagittal = by_size(bank, 4.0), by_size(bank, 3.0)
    assert (flair.thickness, flair.gap, flair.plane) == (None, None, "coronal")
    assert sagittal.plane == "sagittal"
    assert own.shape == (488, 488, 36)
    assert all(g.exact for g in bank)


def test_scans_of_one_person_share_a_group(harvested):
    bank, _ = harvested
    assert len({g.group for g in bank}) == 3
    assert by_size(bank, 5.0).group == by_size(bank, 4.0).group


def test_bad_files_get_one_line_each_and_the_others_go_on(harvested):
    _, said = harvested
    lines = [line for line in said.splitlines() if "left out" in line]
    assert len(lines) == 3
    assert sum("cannot be read" in line for line in lines) == 1
    assert sum("sform and qform code are 0" in line for line in lines) == 1
    assert sum("not a scan as it was acquired" in line for line in lines) == 1


def test_no_identifier_and_no_date_is_in_a_bank(harvested, tmp_path):
    text = (tmp_path / "bank.json").read_text()
    for secret in (*SECRETS, *LABELS, "sub-", "ses-", ".nii", str(tmp_path)):
        assert secret.lower() not in text.lower()
    assert not re.search(r"(19|20)\d\d-\d\d-\d\d", text)
    assert {g.source for g in harvested[0]} == {"own scans"}
    assert {g.licence for g in harvested[0]} == {"none stated"}


def test_harvesting_twice_gives_the_same_bank(harvested, tmp_path, capsys):
    args = ["harvest", str(tmp_path / "bids"), str(tmp_path / "out"), str(tmp_path / "again.json")]
    assert main(args) == 0
    told = capsys.readouterr().out
    assert told.startswith("4 geometries (")
    assert {*re.findall(r"\d+ (?:T1w|T2w|FLAIR)", told)} == {"2 T1w", "1 T2w", "1 FLAIR"}
    assert "of 3 persons, 0 in part assumed, 1 with an affine to MNI, " in told
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "bank.json").read_bytes()


def test_other_labels_give_the_same_bank(harvested, tmp_path):
    """Neither group nor split nor order of a bank can be got from, or lead to, a label."""
    renamed = tmp_path / "renamed"
    for path in sorted((tmp_path / "bids").rglob("*")):
        if path.is_file():
            name = str(path.relative_to(tmp_path / "bids"))
            for label, other in zip(LABELS, ("d", "c", "b", "a"), strict=True):
                name = name.replace(f"sub-{label}", f"sub-{other}")
            (renamed / name).parent.mkdir(parents=True, exist_ok=True)
            (renamed / name).write_bytes(path.read_bytes())
    for bids, bank in ((renamed, "other.json"), (tmp_path / "bids", "plain.json")):
        assert main(["harvest", str(bids), str(tmp_path / bank)]) == 0
    assert (tmp_path / "other.json").read_bytes() == (tmp_path / "plain.json").read_bytes()


def test_persons_who_share_a_geometry_are_not_told_apart_by_their_labels():
    shared, own = sorted(load_bank()[:2], key=_digest)

    def groups(one, other):
        found = as_bank([Found(one, shared), Found(other, shared), Found(one, own)])
        return {geometry.group for geometry in found[::2]}, found[1].group

    assert groups("a", "b") == groups("b", "a")


def test_affines_of_earlier_runs_are_taken_over(harvested):
    bank, _ = harvested
    placed = [g for g in bank if g.world is not None]
    assert [max(g.grid.voxel_sizes) for g in placed] == [pytest.approx(5.0, abs=1e-4)]
    np.testing.assert_allclose(placed[0].world, WORLD, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "warnings", "said"),
    [
        (np.diag([1.5, 1.5, 1.5, 1]), (), "scales the template by"),
        (np.array([[1, 0, 0, 500], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), (), "outside"),
        (WORLD, ["Registration: the image agrees poorly"], "its run warned"),
    ],
)
def test_doubtful_affines_are_not(tmp_path, caplog, wrong, warnings, said):
    root, derivatives = dataset(tmp_path / "bids"), tmp_path / "out"
    transform(derivatives, t1w(root, LABELS[1]), wrong, warnings=warnings)
    assert main(["harvest", str(root), str(derivatives), str(tmp_path / "bank.json")]) == 0
    assert said in caplog.text
    bank = load_bank(tmp_path / "bank.json")
    assert len(bank) == 4
    assert all(g.world is None for g in bank)


def test_a_run_in_native_space_warns_in_the_sidecar_that_it_has(tmp_path, caplog):
    root, derivatives = dataset(tmp_path / "bids"), tmp_path / "out"
    warnings = ["Registration: the image agrees poorly"]
    transform(derivatives, t1w(root, LABELS[1]), warnings=warnings, sidecar="")
    assert main(["harvest", str(root), str(derivatives), str(tmp_path / "bank.json")]) == 0
    assert "its run warned" in caplog.text
    assert all(g.world is None for g in load_bank(tmp_path / "bank.json"))


def test_a_header_against_its_sidecar(tmp_path, caplog):
    root = make_dataset(tmp_path / "bids", [])
    scan(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz", sizes=(1.0, 1.0, 5.0))
    told = {"SliceThickness": 5, "SpacingBetweenSlices": 6.5}
    (root / "sub-1" / "anat" / "sub-1_T1w.json").write_text(json.dumps(told))
    assert main(["harvest", str(root), str(tmp_path / "bank.json")]) == 0
    (found,) = load_bank(tmp_path / "bank.json")
    assert (found.thickness, found.gap) == (5.0, None)
    assert "the header counts" in caplog.text


@pytest.mark.parametrize(
    "told", ["Infinity", "1e400", "NaN", "0.00001", "-3", '"5"', "true", "[5]"]
)
def test_what_is_no_thickness_is_none(tmp_path, told):
    root = make_dataset(tmp_path / "bids", [])
    scan(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz", sizes=(1.0, 1.0, 5.0))
    (root / "T1w.json").write_text(f'{{"SliceThickness": {told}}}')
    assert main(["harvest", str(root), str(tmp_path / "bank.json")]) == 0
    (found,) = load_bank(tmp_path / "bank.json")
    assert (found.thickness, found.gap) == (None, None)


def test_a_broken_sidecar_costs_only_what_it_says(tmp_path, caplog):
    root = make_dataset(tmp_path / "bids", [])
    for label in "12":
        scan(root / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz", shift=int(label))
    (root / "T1w.json").write_text('{"SliceThickness": 4}')
    (root / "sub-1" / "anat" / "sub-1_T1w.json").write_text("{")
    (root / "sub-2" / "anat" / "sub-2_acq-other_T1w.json").write_text('{"SliceThickness": 1}')
    assert main(["harvest", str(root), str(tmp_path / "bank.json")]) == 0
    assert [g.thickness for g in load_bank(tmp_path / "bank.json")] == [4.0, 4.0]
    assert caplog.text.count("is not read") == 1


def test_a_licence_and_a_doi_are_kept_where_they_are_known(tmp_path):
    root = make_dataset(tmp_path / "bids", [])
    scan(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    description = {
        "Name": "x",
        "BIDSVersion": "1.10.0",
        "License": "CC BY 4.0",
        "DatasetDOI": "doi:10.18112/openneuro.ds004889.v1.1.2",
    }
    (root / "dataset_description.json").write_text(json.dumps(description))
    assert main(["harvest", str(root), str(tmp_path / "bank.json"), "--licence", "PDDL"]) == 0
    assert load_bank(tmp_path / "bank.json")[0].licence == "PDDL"
    assert main(["harvest", str(root), str(tmp_path / "bank.json")]) == 0
    (found,) = load_bank(tmp_path / "bank.json")
    assert (found.licence, found.source) == ("CC BY", "doi:10.18112/openneuro.ds004889.v1.1.2")


def test_nothing_to_harvest_is_told(tmp_path, capsys):
    root = make_dataset(tmp_path / "bids", [])
    assert main(["harvest", str(root), str(tmp_path / "bank.json")]) == 2
    assert "holds no scan" in capsys.readouterr().err
    assert main(["harvest", str(tmp_path / "gone"), str(tmp_path / "bank.json")]) == 2
    assert "name a BIDS dataset" in capsys.readouterr().err
    (tmp_path / "records.json").write_text("{")
    assert main(["harvest", str(tmp_path / "records.json"), str(tmp_path / "bank.json")]) == 2
    assert "not a list of header records" in capsys.readouterr().err
    (tmp_path / "records.json").write_text('[{"licence": "CC BY-NC"}]')
    assert main(["harvest", str(tmp_path / "records.json"), str(tmp_path / "bank.json")]) == 2
    assert "no record with an open licence" in capsys.readouterr().err
    assert main(["harvest", str(root), str(tmp_path)]) == 2
    assert "name the bank to write" in capsys.readouterr().err
    assert not (tmp_path / "bank.json").exists()


# --- what the simulator makes of an affine -------------------------------------------------------


@pytest.fixture
def placed():
    """An oblique axial scan with its own affine; the scan's middle is off the brain's."""
    turn = np.linalg.svd(WORLD[:3, :3])
    tilt = turn[0] @ turn[2]
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([0.9, 0.9, 6.0])
    affine[:3, 3] = WORLD[:3] @ [0, -30, 20, 1] - affine[:3, :3] @ [127.5, 127.5, 11.5]
    told, own = (tuple(tuple(line) for line in m.tolist()) for m in (affine, WORLD))
    return Geometry((256, 256, 24), told, 5.0, 1.0, True, "T1w", "CC0", "x", "p0", False, world=own)


def test_a_scan_with_an_affine_lies_where_it_lay(placed):
    for seed in range(4):
        person = np.diag([1.2, 0.8, 1.0, 1.0])  # not looked at
        found = place(placed, person, np.random.default_rng(seed))
        np.testing.assert_array_equal(found.world, WORLD)
        np.testing.assert_allclose(found.grid.affine, placed.affine)
        assert found.grid.shape == placed.shape
        assert found.thickness == pytest.approx(5.0)


def test_other_sizes_keep_its_middle_and_its_field_of_view(placed):
    shape = SyntheticShape(1.1, 4.0, 0.4)
    grid = place(placed, np.eye(4), np.random.default_rng(0), shape=shape).grid
    middle = [g.affine @ [*((np.array(g.shape) - 1) / 2), 1] for g in (placed.grid, grid)]
    np.testing.assert_allclose(*middle, atol=1e-9)
    np.testing.assert_allclose(grid.voxel_sizes, [1.1, 1.1, 4.0])
    assert grid.shape[2] == 24 * 6 / 4


def test_obliquity_counts_from_the_anatomy(placed):
    found = place(placed, np.eye(4), np.random.default_rng(0), obliquity=20.0)
    u, _, vt = np.linalg.svd(WORLD[:3, :3])
    axis = slice_axis(found.grid)
    normal = (u @ vt).T @ found.grid.affine[:3, axis] / found.grid.voxel_sizes[axis]
    cosines = (u @ vt).T @ found.grid.affine[:3, :3] / found.grid.voxel_sizes
    angle = np.rad2deg(np.arccos((np.trace(cosines) - 1) / 2))
    assert angle == pytest.approx(20.0, abs=0.01)
    assert abs(normal[2]) > np.cos(np.deg2rad(20.1))


def test_a_bank_keeps_affines(placed, tmp_path):
    bank = [load_bank()[0], placed]
    save_bank(bank, tmp_path / "bank.json")
    assert load_bank(tmp_path / "bank.json") == bank
    assert (tmp_path / "bank.json").read_text().count('"world"') == 1


# --- the shipped bank ----------------------------------------------------------------------------


@pytest.mark.data
def test_the_shipped_bank_comes_from_the_records(tmp_path):
    data = Path(os.environ["REMIX_BIDS_TEST_DATA"])
    assert main(["harvest", str(data / "acquisitions.json"), str(tmp_path / "bank.json")]) == 0
    assert load_bank(tmp_path / "bank.json") == load_bank()
