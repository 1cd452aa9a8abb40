"""Where templates are looked for, and how they get there."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

from remix_bids import templates
from remix_bids.errors import MissingResourceError

SPACE = "MNI152Lin"
T1W, MASK = f"tpl-{SPACE}_res-01_T1w.nii.gz", f"tpl-{SPACE}_res-01_desc-brain_mask.nii.gz"
# Stands in for TemplateFlow's client, whose server cannot be reached from a test: it makes its
# skeleton of empty files and fills one that is asked for.
CLIENT = """
import os, pathlib, shutil
home = pathlib.Path(os.environ["TEMPLATEFLOW_HOME"])
folder = home / "tpl-MNI152Lin"
folder.mkdir()
for stem in ("res-01_T1w", "res-01_desc-brain_mask", "res-02_T1w"):
    (folder / f"tpl-MNI152Lin_{stem}.nii.gz").touch()
(home / "tpl-Other").mkdir()
def get(space, *, resolution, desc, suffix, extension):
    stem = "desc-brain_mask" if desc else "T1w"
    path = folder / f"tpl-{space}_res-0{resolution}_{stem}.nii.gz"
    if suffix == os.environ.get("BREAKS_AT"):
        path.write_bytes(b"half of it")
        raise RuntimeError("something went wrong")
    shutil.copy(os.environ["SERVER"], path)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "python/templateflow").mkdir(parents=True)
    (tmp_path / "python/templateflow/__init__.py").touch()
    (tmp_path / "python/templateflow/api.py").write_text(CLIENT)
    image = nb.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4))
    nb.save(image, tmp_path / "server.nii.gz")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
    monkeypatch.setenv("SERVER", str(tmp_path / "server.nii.gz"))
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_the_one_that_templateflow_uses(monkeypatch, tmp_path):
    monkeypatch.delenv("TEMPLATEFLOW_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from templateflow.conf.env import get_templateflow_home

    assert templates.templateflow_home() == get_templateflow_home() == tmp_path / "templateflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert templates.templateflow_home() == get_templateflow_home()
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "own"))
    assert templates.templateflow_home() == get_templateflow_home() == tmp_path / "own"


def test_a_missing_template_is_fetched_once(home, monkeypatch):
    with pytest.raises(MissingResourceError, match=f"not in {home}"):
        templates.find_template(SPACE, offline=True)
    found = templates.find_template(SPACE, offline=False)
    assert (found.t1w.name, found.brain_mask.name) == (T1W, MASK)
    assert files(home) == {T1W, MASK, f"tpl-{SPACE}_res-02_T1w.nii.gz"}
    assert (home / "tpl-Other").is_dir()  # the skeleton by which TemplateFlow finds all others
    monkeypatch.setenv("BREAKS_AT", "T1w")
    assert templates.find_template(SPACE, offline=False) == found


def test_a_download_that_breaks_leaves_nothing(home, monkeypatch):
    monkeypatch.setenv("BREAKS_AT", "mask")
    with pytest.raises(MissingResourceError, match=r"fetched .*something went wrong.*a connection"):
        templates.find_template(SPACE, offline=False)
    assert not files(home)
    stub = home / f"tpl-{SPACE}" / MASK  # as TemplateFlow leaves them
    stub.parent.mkdir()
    stub.touch()
    monkeypatch.delenv("BREAKS_AT")
    assert templates.find_template(SPACE, offline=False).brain_mask == stub


def test_a_damaged_template_is_to_be_removed(home):
    found = templates.find_template(SPACE, offline=False)
    found.t1w.write_bytes(gzip.compress(b"cut off")[:-9])
    with pytest.raises(MissingResourceError, match=rf"{T1W} cannot be read .* Remove it"):
        templates.find_template(SPACE, offline=False)
