"""Names and files of the output dataset."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import ants
import nibabel as nb
import numpy as np
import pytest
from nipype.interfaces.base import Undefined
from PIL import Image

from remix_bids import __version__ as VERSION
from remix_bids.config import RunConfig
from remix_bids.derivatives import IGNORED, write_dataset_files, write_text
from remix_bids.errors import GraphError, InputImageError
from remix_bids.inputs import run_validator
from remix_bids.interfaces.bids import DerivativesSink, Describe, check_t1w, is_as_written
from remix_bids.interfaces.reports import summary_html
from remix_bids.naming import check_collisions, output_names, split_name
from remix_bids.qc import mosaic
from remix_bids.reports import boilerplate, individual
from remix_bids.reports.individual import build_report, note_done, note_run, open_crash_files
from tests.bids_skeletons import GEOMETRY, save_image
from tests.pages import write_subject

VALIDATOR = Path(sys.executable).parent / "bids-validator-deno"

# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "image", "forward"),
    [
        (
            "sub-01_T1w.nii.gz",
            "sub-01/anat/sub-01_space-MNI152Lin_res-1_desc-remix_T1w.nii.gz",
            "sub-01/anat/sub-01_from-T1w_to-MNI152Lin_mode-image_xfm.txt",
        ),
        (
            "sub-01_ses-pre_acq-ax_ce-gad_rec-norm_run-01_T1w.nii",
            "sub-01/ses-pre/anat/sub-01_ses-pre_acq-ax_ce-gad_rec-norm_run-01_space-MNI152Lin_res-1"
            "_desc-remix_T1w.nii.gz",
            "sub-01/ses-pre/anat/sub-01_ses-pre_acq-ax_ce-gad_rec-norm_run-01_from-T1w_to-MNI152Lin"
            "_mode-image_xfm.txt",
        ),
        (  # entities that the sinks of others drop or misplace
            "sub-01_echo-2_inv-1_part-mag_chunk-3_T1w.nii.gz",
            "sub-01/anat/sub-01_echo-2_inv-1_part-mag_space-MNI152Lin_chunk-3_res-1_desc-remix"
            "_T1w.nii.gz",
            "sub-01/anat/sub-01_echo-2_inv-1_part-mag_chunk-3_from-T1w_to-MNI152Lin_mode-image"
            "_xfm.txt",
        ),
    ],
)
def test_names(source, image, forward):
    names = output_names(source, "MNI152Lin")
    assert str(names.image) == image
    assert str(names.sidecar) == image.replace(".nii.gz", ".json")
    assert str(names.forward_transform) == forward
    assert "from-MNI152Lin_to-T1w" in names.inverse_transform.name
    source_entities = split_name(source)[0]
    for path in names.all():
        assert source_entities.items() <= split_name(path)[0].items()


def test_collisions():
    check_collisions(["sub-01_run-1_T1w.nii.gz", "sub-01_run-01_T1w.nii.gz"], "MNI152Lin")
    with pytest.raises(GraphError, match="both be written"):
        check_collisions(["a/sub-01_T1w.nii.gz", "b/sub-01_T1w.nii.gz"], "MNI152Lin")
    with pytest.raises(GraphError):  # one file on a disk that does not tell upper from lower case
        check_collisions(["sub-a_T1w.nii.gz", "sub-A_T1w.nii.gz"], "MNI152Lin")


# --- what comes in -------------------------------------------------------------------------------


def flat(value):
    return np.full((45, 54, 28), value, dtype=np.float32)


def spoiled(value):
    data = flat(0)
    data[10:20] = 100
    data[15, 15, 15] = value
    return data


SINGULAR = GEOMETRY.copy()
SINGULAR[2] = 0
TALL = np.diag([6.0, 6.0, 10.0, 1])
RGB = np.zeros((45, 54, 28), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("data", "affine", "reason"),
    [
        (flat(7), GEOMETRY, "all voxels hold 7"),
        (spoiled(np.nan), GEOMETRY, "1 voxels that are no finite number"),
        (spoiled(np.inf), GEOMETRY, "no finite number"),
        (RGB, GEOMETRY, "colour"),
        (spoiled(1).astype(np.complex64), GEOMETRY, "complex"),
        (np.zeros((45, 54, 28, 2), dtype=np.int16), GEOMETRY, "not one 3D volume"),
        (np.zeros((45, 54), dtype=np.int16), GEOMETRY, "not one 3D volume"),
        (spoiled(1)[:, :, :3], GEOMETRY, "too small"),
        (spoiled(1), np.diag([0.004, 0.004, 0.006, 1]), "which no T1w scan has"),
        (spoiled(1), np.diag([4.0, 4.0, 60.0, 1]), "which no T1w scan has"),
        (np.zeros((10, 10, 70), np.int16), TALL, "which no scan of a head has"),
        (spoiled(1), SINGULAR, "cannot be inverted"),
    ],
)
def test_bad_images_are_refused_in_one_sentence(tmp_path, data, affine, reason):
    path = save_image(tmp_path / "sub-01_T1w.nii.gz", data, GEOMETRY)
    if affine is not GEOMETRY:
        image = nb.load(path)
        image.header.set_sform(affine, code=1)
        image.header.set_qform(None, code=0)
        if affine is SINGULAR:
            image = nb.Nifti1Image(data, None, image.header)
            image.header.set_sform(affine, code=1)
        else:
            image = nb.Nifti1Image(data, affine)
        nb.save(image, path)
    with pytest.raises(InputImageError, match=reason) as error:
        check_t1w(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    missing = tmp_path / "missing.nii.gz"
    with pytest.raises(InputImageError, match="does not exist"):
        check_t1w(missing)
    missing.symlink_to(tmp_path / "annex/object")
    with pytest.raises(InputImageError, match="broken link"):
        check_t1w(missing)
    path = save_image(tmp_path / "sub-01_T1w.nii.gz")
    whole = path.read_bytes()
    for part in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(part)
        with pytest.raises(InputImageError, match="cannot be read"):
            check_t1w(path)


def test_good_images(tmp_path):
    path = save_image(tmp_path / "sub-01_T1w.nii.gz")
    assert check_t1w(path) == []
    data = np.asanyarray(nb.load(path).dataobj)
    assert check_t1w(save_image(tmp_path / "one.nii", data[..., None])) == []
    image = nb.Nifti1Image(data, None)
    image.header.set_zooms((4, 4, 6))
    nb.save(image, path)
    assert "left and right" in check_t1w(path)[0]
    image = nb.Nifti1Image(data, GEOMETRY)
    image.header.set_sform(GEOMETRY, 1)
    moved = GEOMETRY.copy()
    moved[0, 3] = 30
    image.header.set_qform(moved, 1)
    nb.save(image, path)
    assert check_t1w(path) == ["Header: qform and sform disagree; the sform was used."]
    # ANTs reads the same matrix as we do for the scanner's code only.
    for code, said in ((1, False), (2, True), (4, True)):
        image.header.set_sform(GEOMETRY, code)
        nb.save(image, path)
        assert ("ANTs and ITK-SNAP use the qform" in check_t1w(path)[0]) == said
        origin = np.array(ants.image_read(str(path)).origin) * (-1, -1, 1)
        assert np.allclose(origin, GEOMETRY[:3, 3], atol=1e-3) != said
    # Left and right changed about one origin: on a fine matrix no entry differs by a millimetre.
    fine = nb.Nifti1Image(np.indices((100, 100, 10))[0].astype(np.int16), None)
    fine.header.set_sform(np.diag([0.45, 0.45, 6, 1]), 1)
    fine.header.set_qform(np.diag([-0.45, 0.45, 6, 1]), 1)
    nb.save(fine, path)
    assert "sform was used" in check_t1w(path)[0]


def test_negative_intensities_are_remarked_upon(tmp_path):
    data = np.asanyarray(nb.load(save_image(tmp_path / "a.nii.gz")).dataobj).astype(np.float32)
    path = save_image(tmp_path / "b.nii.gz", (data - data.mean()) / data.std())
    assert "% of the voxels are negative" in check_t1w(path)[0]
    data[:2, :2, :2] = -1  # a spline has overshot
    assert check_t1w(save_image(path, data)) == []


# --- what goes out -------------------------------------------------------------------------------


def sink(tmp_path, content, target):
    source = tmp_path / "source.txt"
    source.write_text(content)
    folder = tmp_path / "node"
    folder.mkdir(exist_ok=True)
    DerivativesSink(in_file=str(source), out_path=str(target)).run(cwd=str(folder))
    return folder


def test_sink_writes_whole_files_and_knows_its_own(tmp_path):
    target = tmp_path / 'out dir/it\'s "here"; $(x)/file.txt'
    folder = sink(tmp_path, "one", target)
    assert target.read_text() == "one"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]  # no temporary file is left
    assert is_as_written(folder, target)
    target.write_text("somebody else's")
    assert not is_as_written(folder, target)
    sink(tmp_path, "two", target)
    assert is_as_written(folder, target)
    target.unlink()
    assert not is_as_written(folder, target)


def test_sink_leaves_nothing_half_written(tmp_path, monkeypatch):
    target = tmp_path / "out/file.txt"
    sink(tmp_path, "old", target)

    def fail_half_way(source, part):
        Path(part).write_text("ha")
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        sink(tmp_path, "new", target)
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(("engine", "kind"), [("", "docker"), ("/a.sif", "singularity")])
def test_dataset_files_name_the_container(tmp_path, monkeypatch, engine, kind):
    monkeypatch.setenv("REMIX_BIDS_CONTAINER", "docker:remix-bids:0.1.0")
    monkeypatch.setenv("APPTAINER_CONTAINER", engine)
    write_dataset_files(tmp_path / "out", tmp_path)
    description = json.loads((tmp_path / "out/dataset_description.json").read_text())
    (maker,) = description["GeneratedBy"]
    assert maker["Container"] == {"Type": kind, "Tag": "remix-bids:0.1.0"}
    assert description["SourceDatasets"] == [{"URL": tmp_path.as_uri()}]  # it has no DOI


@pytest.mark.parametrize(
    "doi", ["doi:10.1234/x", "DOI: 10.1234/x", "https://www.doi.org/10.1234/x", "10.1234/x"]
)
def test_dataset_files(tmp_path, doi, caplog):
    bids, out = tmp_path / "my bids", tmp_path / "out"
    bids.mkdir()
    raw = {"Name": "Raw", "License": "CC0", "DatasetDOI": doi}
    (bids / "dataset_description.json").write_text(json.dumps(raw))
    out.mkdir()
    (out / ".bidsignore").write_bytes(b"mine\nlogs\ncaf\xe9\n")
    write_dataset_files(out, bids)
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "remix-bids"
    assert description["DatasetLinks"]["raw"].startswith("file:///")
    assert " " not in description["DatasetLinks"]["raw"]
    assert description["SourceDatasets"] == [
        {"URL": "https://doi.org/10.1234/x", "DOI": "10.1234/x"}
    ]
    assert "Container" not in description["GeneratedBy"][0]
    lines = (out / ".bidsignore").read_bytes().splitlines()
    assert lines[:3] == [b"mine", b"logs", b"caf\xe9"]  # as they were
    assert sorted(lines) == sorted({b"mine", b"caf\xe9", *(line.encode() for line in IGNORED)})
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    write_dataset_files(out, bids)  # equal files are left alone
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert not caplog.text
    write_dataset_files(out, tmp_path / "elsewhere")
    assert "bids: if that is another dataset, stop" in caplog.text


def test_writing_from_many_jobs(tmp_path):
    path = tmp_path / "file.txt"
    texts = [str(i) * 100_000 for i in range(8)]
    jobs = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


STATIC = {
    "Sources": ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"],
    "Resolution": "1 mm",
    "SpatialReference": "tpl-MNI152Lin_res-01_T1w.nii.gz",
    "SelectionRule": "effective <volume>",
    "RandomSeed": 1,
}


DYNAMIC_KEYS = (
    *("SkullStripped", "Expert", "ExpertSHA256", "VoxelSize", "VoxelVolume"),
    *("EffectiveVoxelVolume", "Device", "IntensityScaling", "AffineDeterminant"),
    "Interpolation",
    *("RegistrationScore", "BrainCoverage", "SliceProfileWidth", "Warnings"),
)


def describe(tmp_path, **changes):
    given = {
        "static": STATIC,
        "skull_stripped": False,
        "registration_score": 0.71239,
        "affine_determinant": 0.7,
        "brain_coverage": 0.93,
        "slice_width": 2.4,
        "voxel_size": [0.7, 0.7, 3.0],
        "voxel_volume": 1.47,
        "effective_voxel_volume": 3.0,
        "expert": "3",
        "expert_sha256": "ab" * 32,
        "device": "cpu",
        "intensity_scaling": "none",
        "validation_warnings": ["Header: x"],
        "coverage_warnings": ["Coverage: y & z"],
        **changes,
    }
    result = Describe(**given).run(cwd=str(tmp_path))
    return Path(result.outputs.out_file)


def test_sidecar_of_a_resampled_copy(tmp_path):
    content = json.loads(describe(tmp_path, expert="none").read_text())
    assert content["Interpolation"].startswith("cubic B-spline, once")


def test_slices_that_were_not_measured_have_no_width(tmp_path):
    content = json.loads(describe(tmp_path, slice_width=Undefined).read_text())
    assert "SliceProfileWidth" not in content
    assert "too thin to be measured" in summary_html("sub-01_T1w", content)


@pytest.mark.parametrize(("share", "told"), [(1.0, "2 step(s)"), (0.25, "for 25% of what it left")])
def test_sidecar_and_report_tell_the_steps_after_the_network(tmp_path, share, told):
    sidecar = describe(tmp_path, consistency_steps=2, consistency_share=share)
    content = json.loads(sidecar.read_text())
    assert told in content["ConsistencyStep"]
    assert ("may be noise" in content["ConsistencyStep"]) == (share < 1)
    assert content["ConsistencyStep"] in summary_html("sub-01_T1w", content)


def test_sidecar(tmp_path):
    content = json.loads(describe(tmp_path).read_text())
    assert content["Warnings"] == ["Header: x", "Coverage: y & z"]
    assert content["Sources"] == STATIC["Sources"]
    assert set(content) == {*STATIC, *DYNAMIC_KEYS}
    assert content["Interpolation"].startswith("a linear estimate")
    assert content["SliceProfileWidth"] == 2.4
    page = summary_html("sub-01_T1w", content)
    assert "a Gaussian of 2.4 mm" in page
    assert "effective &lt;volume&gt;" in page
    assert "Coverage: y &amp; z" in page


def write_example(out: Path, tmp_path: Path, source: str) -> None:
    """Everything that a run writes for one scan, from real parts."""
    from remix_bids.interfaces.resample import save_on_working_grid

    names = output_names(source, "MNI152Lin")
    for path in names.all():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
    save_on_working_grid(np.ones((181, 217, 181), dtype=np.float32), out / names.image)
    shutil.copy(describe(tmp_path), out / names.sidecar)
    (out / names.forward_transform).write_text("#Insight Transform File V1.0\n")
    (out / names.inverse_transform).write_text("#Insight Transform File V1.0\n")
    shutil.copy(out / names.image, out / names.native_image)
    shutil.copy(out / names.sidecar, out / names.native_sidecar)
    (out / names.qc).write_text("{}")
    content = json.loads((out / names.sidecar).read_text())
    (out / names.summary).write_text(summary_html(source, content))
    ball = np.linalg.norm(np.indices((20, 24, 20)).T - (10, 12, 10), axis=-1).T < 7
    (out / names.registration).write_text(mosaic.overlay(ball * 1.0, ball * 2.0, ball))
    (out / names.enhancement).write_text(mosaic.before_after(ball * 1.0, ball * 2.0, ball))


def test_outputs_pass_the_validator(tmp_path):
    bids, out = tmp_path / "bids", tmp_path / "out"
    bids.mkdir()
    write_dataset_files(out, bids)
    sources = [
        f"sub-01_ses-{ses}_acq-{acq}_run-{run}_T1w.nii.gz"
        for ses in "ab"
        for acq in ("ax", "cor")
        for run in (1, 2)
    ]
    for source in (*sources, "sub-01_ses-a_echo-1_part-mag_T1w.nii"):
        write_example(out, tmp_path, source)
    (out / "sub-01/log/run").mkdir(parents=True)
    (out / "sub-01/log/run/remix_bids.toml").write_text("")
    build_report(out, "01", "run", {})
    done = subprocess.run([VALIDATOR, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "[ERROR]" not in done.stdout
    # The check itself works: a name outside of BIDS is an error.
    (out / "sub-01/ses-a/anat/sub-01_ses-a_colour-red_T1w.nii.gz").write_bytes(b"")
    done = subprocess.run([VALIDATOR, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_validating_the_input_opens_no_connection(tmp_path, monkeypatch):
    """Deno asks for its newest version by itself half a second after it has started."""
    for i in range(300):
        anat = tmp_path / f"bids/sub-{i:03d}/anat"
        anat.mkdir(parents=True)
        (anat / f"sub-{i:03d}_T1w.nii.gz").write_bytes(b"no image")
    config = RunConfig(tmp_path / "bids", tmp_path / "out")
    monkeypatch.setenv("HOME", str(tmp_path))  # it asks once a day, and keeps the day there
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert "dataset_description.json" in run_validator(config)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


# --- the report ----------------------------------------------------------------------------------


def test_report_holds_all_scans_and_opens_no_connection(tmp_path):
    sources = ["sub-01_T1w.nii.gz", "sub-01_run-1_T1w.nii.gz", "sub-01_part-mag_chunk-1_T1w.nii.gz"]
    for source in sources:
        write_example(tmp_path, tmp_path, source)
    page = build_report(tmp_path, "01", "run", {"Made": "today"}).read_text()
    for source in sources:
        label = source.removesuffix(".nii.gz")
        assert f'<section id="{label}">' in page
    assert page.count("<object") == 2 * len(sources)
    assert "No errors to report" in page
    everything = page + "".join(p.read_text() for p in tmp_path.rglob("*.svg"))
    everything = everything.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert "http" not in everything
    assert "<script" not in everything
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_a_page_made_later_tells_what_the_run_was_made_with(tmp_path, monkeypatch):
    write_example(tmp_path, tmp_path, "sub-01_T1w.nii.gz")
    config = RunConfig(tmp_path / "bids", tmp_path)
    for run in ("20260101", "20260102"):
        about = {"Template": f"template of {run}"}
        note_run(tmp_path / "sub-01/log" / run, config, about)
    for module in (boilerplate, individual):
        monkeypatch.setattr(module, "__version__", "99.9")
    page = build_report(tmp_path, "01", "run", {"Page made": "today, by another"}).read_text()
    assert f"<i>remix-bids</i> {VERSION}" in page
    for row in (f"remix-bids</th><td>{VERSION}", "template of 20260102", "today, by another"):
        assert row in page
    (settings,) = re.findall(r"Settings</th><td>(.+?)</td>", page)
    assert (tmp_path / settings).is_file()
    (tmp_path / "sub-01/log/20260102/about.json").unlink()
    (tmp_path / "sub-01/log/20260102/about.json").symlink_to("nowhere")
    assert "template of 20260101" in build_report(tmp_path, "01", "run", {}).read_text()


def test_report_shows_crashes_until_the_scan_has_come_through(tmp_path):
    folder = tmp_path / "sub-01/log/run"
    folder.mkdir(parents=True)
    crash = folder / "crash-2026-root-validate-x.txt"
    crash.write_text(
        "Node: remix_wf.sub_01_wf.sub_01_run_1_T1w_wf.validate\nWorking directory: /w\n\n"
        "Node inputs:\n\nin_file = a\n\nTraceback (most recent call last):\n"
        "remix_bids.errors.InputImageError: a <b> is empty.\n"
    )
    page = build_report(tmp_path, "01", "run", {}).read_text()
    assert "a &lt;b&gt; is empty." in page
    assert "1 step(s) failed" in page
    again = tmp_path / "sub-01/log/run2"
    again.mkdir()
    again = Path(shutil.copy(crash, again))
    os.utime(crash, (1, 1))
    assert open_crash_files(tmp_path / "sub-01") == [again]  # of one node the last counts
    again.unlink()
    os.utime(crash)
    write_example(tmp_path, tmp_path, "sub-01_run-1_T1w.nii.gz")  # a later step may fail
    assert open_crash_files(tmp_path / "sub-01") == [crash]
    page = build_report(tmp_path, "01", "run", {}).read_text()
    assert page.count("may be of an earlier run") == 1  # the figures that are there
    note_done(again.parent, [Path("/bids/sub-01_run-2_T1w.nii.gz")])  # another scan changes nothing
    assert open_crash_files(tmp_path / "sub-01") == [crash]
    note_done(again.parent, [Path(f"/bids/sub-01_run-{n}_T1w.nii.gz") for n in (1, 2)])
    assert open_crash_files(tmp_path / "sub-01") == []
    assert "of an earlier run" not in build_report(tmp_path, "01", "run", {}).read_text()
    os.utime(crash, (2e9, 2e9))  # and failed again
    assert open_crash_files(tmp_path / "sub-01") == [crash]


def test_archived_results_do_not_spoil_the_report(tmp_path):
    """As DataLad leaves them: the lock is a link, a figure of an earlier session is not there."""
    write_example(tmp_path, tmp_path, "sub-01_T1w.nii.gz")
    (tmp_path / "sub-01/log").mkdir(exist_ok=True)
    (tmp_path / "sub-01/log/.report.lock").symlink_to("nowhere")
    names = output_names("sub-01_ses-a_T1w.nii.gz", "MNI152Lin")
    (tmp_path / names.summary).symlink_to("nowhere")
    page = build_report(tmp_path, "01", "run", {}).read_text()
    assert f"{names.summary.name} cannot be read" in page


def test_both_panels_have_one_window():
    before = np.random.default_rng(0).random((30, 40, 30)).astype(np.float32)
    mask = np.ones(before.shape, dtype=bool)
    same = mosaic.before_after(before, before, mask)
    images = [part.split('"')[0] for part in same.split('href="data:')[1:]]
    assert len(images) == 2
    assert images[0] == images[1]
    twice = mosaic.before_after(before, 2 * before, mask)
    images = [part.split('"')[0] for part in twice.split('href="data:')[1:]]
    assert images[0] != images[1]  # a window of its own would hide the difference


@pytest.mark.parametrize("row", [0, 1])  # axial, coronal
def test_left_and_right_are_marked_where_they_are(row):
    """A person's right half that is bright, in a brain that is higher and longer than wide."""
    volume = np.full((30, 50, 60), 0.2, dtype=np.float32)
    volume[15:] = 1
    page = mosaic.before_after(volume, volume, np.ones(volume.shape, dtype=bool))
    uri = page.split("base64,")[1].split('"')[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))), dtype=float)
    marks = re.findall(r'<text x="(\d+)" y="(\d+)"[^>]*>([LR])</text>', page)
    assert [mark[2] for mark in marks] == ["L", "R"] * 2
    (left, top, _), (right, _, _) = marks[2 * row : 2 * row + 2]
    line = pixels[int(top)]
    assert 40 < line[int(left)] < 60 < 240 < line[int(right)]


def test_no_name_becomes_markup(tmp_path):
    """Whoever names a folder writes no script into a report."""
    name = "a<img src=x onerror=alert(1)>"
    source = f'sub-{name}_acq-"x_T1w.nii.gz'
    page = write_subject(tmp_path, name, [source]).read_text()
    assert "<img" not in page
    assert 'acq-"' not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_slices_stand_upright():
    volume = np.zeros((30, 40, 50), dtype=np.float32)
    volume[0, 0, -1] = 1  # left, posterior, superior
    axial, coronal, sagittal = mosaic._slices(volume, mosaic.Cuts((0,), (0,), (49,)))
    assert axial[0][-1, 0] == 1  # left on the left, posterior at the bottom
    assert coronal[0][0, 0] == 1  # superior on top
    assert sagittal[0][0, 0] == 1
