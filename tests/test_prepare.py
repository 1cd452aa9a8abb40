"""Who is trained on, and what a scan that cannot be read costs the others."""

import hashlib
import json

import nibabel as nb
import numpy as np
import pytest

from remix_bids.cli.experts import _coverage, main
from remix_bids.errors import InputImageError, RemixError, UsageError
from remix_bids.registration.affine import Templates
from remix_bids.training.prepare import load_image, prepare


def splits(folder):
    rows = json.loads((folder / "persons.json").read_text())["persons"]
    return {row["name"]: row["split"] for row in rows}


def test_who_is_named_later_is_not_trained_on(tmp_path):
    """The recipe named other persons when these were prepared; nothing is prepared again."""
    rows = [{"name": name, "file": f"{name}.npy", "split": "train"} for name in "abcd"]
    (tmp_path / "persons.json").write_text(json.dumps({"persons": rows}))
    scans = {name: tmp_path / f"{name}.nii.gz" for name in "abc"}
    templates = Templates(tmp_path / "t1w.nii.gz", None)
    prepare(scans, templates, tmp_path, validation=["a"], held_out=["b"])
    assert splits(tmp_path) == {"a": "validation", "b": "held_out", "c": "train", "d": "train"}
    # Those of another dataset in the same folder are not asked for, and keep theirs.
    prepare({"c": scans["c"]}, templates, tmp_path, validation=[], held_out=["c"])
    assert splits(tmp_path) == {"a": "validation", "b": "held_out", "c": "held_out", "d": "train"}
    # Unless they are named now.
    prepare({"c": scans["c"]}, templates, tmp_path, validation=["d"], held_out=["c"])
    assert splits(tmp_path)["d"] == "validation"


def test_names_may_have_their_prefix_and_strangers_are_told(tmp_path, caplog):
    rows = [{"name": name, "file": f"{name}.npy", "split": "train"} for name in "ab"]
    (tmp_path / "persons.json").write_text(json.dumps({"persons": rows}))
    templates = Templates(tmp_path / "t1w.nii.gz", None)
    scans = {name: tmp_path / f"{name}.nii.gz" for name in "ab"}
    prepare(scans, templates, tmp_path, validation=["sub-a"], held_out=["sub-b", "nobody"])
    assert splits(tmp_path) == {"a": "validation", "b": "held_out"}
    assert "there is no sub-nobody, whom the recipe names" in caplog.text


def test_voxels_that_are_no_numbers_are_refused(tmp_path):
    data = np.ones((20, 20, 20), np.float32)
    data[3, 3, 3] = np.nan
    nb.save(nb.Nifti1Image(data, np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(InputImageError, match=r"x.nii.gz has 1 voxels that are no finite number"):
        load_image(tmp_path / "x.nii.gz")


def test_who_is_stripped_is_told_by_a_column_or_found_out(tmp_path):
    table = tmp_path / "participants.tsv"
    assert _coverage(table) == {}
    table.write_text("participant_id\tcoverage\nsub-a\tbrain\nsub-b\thead, defaced\nsub-c\tn/a\n")
    assert _coverage(table) == {"a": True, "b": False}


def test_another_person_of_the_same_label_is_told(tmp_path):
    """Two datasets in one folder, both with a sub-a; the first one's split stays."""
    scan = tmp_path / "sub-a_T1w.nii.gz"
    scan.write_bytes(b"one")
    digest = hashlib.sha256(b"one").hexdigest()
    rows = [{"name": "a", "file": "a.npy", "split": "validation", "sha256": digest}]
    (tmp_path / "persons.json").write_text(json.dumps({"persons": rows}))
    templates = Templates(tmp_path / "t1w.nii.gz", None)
    prepare({"a": scan}, templates, tmp_path, validation=["a"], held_out=[])
    scan.write_bytes(b"other")
    with pytest.raises(UsageError, match=r"holds a sub-a of another image than .*sub-a_T1w"):
        prepare({"a": scan}, templates, tmp_path, validation=[], held_out=[])
    assert splits(tmp_path) == {"a": "validation"}


def test_a_scan_that_cannot_be_read_is_told(tmp_path):
    scan = tmp_path / "sub-x_T1w.nii.gz"
    scan.write_bytes(b"no image")
    template = tmp_path / "t1w.nii.gz"
    template.write_bytes(b"no image")
    with pytest.raises(RemixError, match=r"1 of 1 scans could not be prepared, the first .*sub-x"):
        prepare({"x": scan}, Templates(template, None), tmp_path, validation=[], held_out=[])
    assert splits(tmp_path) == {}


def test_a_template_that_is_not_there_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "prepare",
                str(tmp_path),
                str(tmp_path / "out"),
                "--template",
                "/no",
                "--template-mask",
                "/no",
            ]
        )
    assert "there is no file '/no'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
