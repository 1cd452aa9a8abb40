"""What ships for containers and clusters, as far as it can be checked without either."""

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml

from remix_bids import __version__
from remix_bids.cli.parser import build_parser, parse_args
from remix_bids.workflows.run import read_plugin_file
from tests.bids_skeletons import make_dataset

ROOT = Path(__file__).parents[1]


def test_version_of_the_image():
    assert f"ARG VERSION={__version__}\n" in (ROOT / "Dockerfile").read_text()


# --- the templates of the image -------------------------------------------------------------------


def fill(tmp_path, names, kind):
    given = tmp_path / "given/tpl-MNI152Lin"
    given.mkdir(parents=True)
    for name in names:
        (given / name).write_bytes(b"not TemplateFlow's")
    script = ROOT / "docker/templates.py"
    command = [sys.executable, script, given.parent, tmp_path / "home", kind]
    return subprocess.run(command, capture_output=True, text=True, check=False)


FILES = ("tpl-MNI152Lin_res-01_T1w.nii.gz", "tpl-MNI152Lin_res-01_desc-brain_mask.nii.gz")


def test_other_templates_do_not_pass_for_templateflows(tmp_path):
    done = fill(tmp_path, FILES, "templateflow")
    assert done.returncode == 1
    assert "is not the file that TemplateFlow publishes" in done.stderr
    assert "--build-arg TEMPLATES=stand-in" in done.stderr


def test_stand_in_templates(tmp_path):
    assert fill(tmp_path, FILES, "stand-in").returncode == 0
    assert sorted(p.name for p in (tmp_path / "home").rglob("*.nii.gz")) == sorted(FILES)


def test_incomplete_templates(tmp_path):
    done = fill(tmp_path, FILES[:1], "stand-in")
    assert done.returncode == 1
    assert "--build-context templates=DIR" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# --- the Slurm array ------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path):
    """Run one task of the array with a command in Apptainer's place that tells its arguments."""
    names = ["sub-02_T1w.nii.gz", "sub-a_T1w.nii.gz"]
    bids = make_dataset(tmp_path / "my data", names)
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    image = tmp_path / "remix-bids.sif"
    image.touch()

    def run(*options, **slurm):
        keep = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        environ = {**keep, **slurm, "PATH": f"{program.parent}:{os.environ['PATH']}"}
        script = ROOT / "docs/hpc/array.sbatch"
        command = ["bash", script, bids, tmp_path / "out", image, tmp_path / "scratch", *options]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()[1:], done.stderr

    return run


def split(lines):
    """Arguments of Apptainer, and those of the app as its own parser reads them."""
    at = next(i for i, line in enumerate(lines) if line.endswith(".sif"))
    arguments = lines[at + 1 :]
    assert arguments[:3] == ["/data", "/out", "participant"]
    return lines[:at], vars(build_parser().parse_args([str(ROOT), *arguments[1:]]))


def test_task_of_the_array(task, tmp_path):
    code, lines, _ = task(
        *("--gate", "paper"),
        SLURM_ARRAY_TASK_ID="2",
        SLURM_CPUS_PER_TASK="2",
        SLURM_MEM_PER_NODE="8192",
    )
    assert code == 0
    engine, app = split(lines)
    assert app["participant_label"] == ["sub-a"]
    assert (app["nprocs"], app["gate"], app["offline"]) == (2, "paper", True)
    assert app["mem_gb"] == pytest.approx(0.9 * 8, abs=0.01)
    assert engine[:4] == ["run", "--cleanenv", "--containall", "--workdir"]
    assert Path(engine[4]).is_dir()  # Apptainer wants it to be there
    assert f"{tmp_path}/my data:/data:ro" in engine
    assert "--nv" not in engine


def test_task_with_a_card_and_memory_per_processor(task):
    code, lines, _ = task(
        SLURM_ARRAY_TASK_ID="1",
        SLURM_CPUS_PER_TASK="2",
        SLURM_CPUS_ON_NODE="2",
        SLURM_MEM_PER_CPU="2000",
        SLURM_JOB_GPUS="3",
        CUDA_VISIBLE_DEVICES="0",
    )
    engine, app = split(lines)
    assert code == 0
    assert app["participant_label"] == ["sub-02"]
    assert app["device"] == "cuda"
    assert app["mem_gb"] == pytest.approx(3600 / 1024)
    assert "--nv" in engine
    assert "CUDA_VISIBLE_DEVICES=0" in engine


def test_task_of_the_second_part_of_many(task):
    code, lines, _ = task(SLURM_ARRAY_TASK_ID="1", OFFSET="1")
    assert code == 0
    assert split(lines)[1]["participant_label"] == ["sub-a"]


def test_task_with_templates_that_the_image_lacks(task, tmp_path):
    code, lines, _ = task("--output-spaces", "MNI152NLin2009cAsym", SLURM_ARRAY_TASK_ID="1")
    assert code == 0
    assert not any("/templates" in line for line in lines)
    own = {"SLURM_ARRAY_TASK_ID": "1", "TEMPLATES": str(tmp_path)}
    code, lines, _ = task("--output-spaces", "MNI152NLin2009cAsym", **own)
    engine, app = split(lines)
    assert (code, app["output_spaces"]) == (0, ["MNI152NLin2009cAsym"])
    assert f"{tmp_path}:/templates:ro" in engine
    assert "TEMPLATEFLOW_HOME=/templates" in engine


def test_task_without_a_participant(task):
    for number in ("0", "3"):
        code, lines, error = task(SLURM_ARRAY_TASK_ID=number)
        assert (code, lines) == (2, [])
        assert f"no participant number {number}" in error


# --- plugin files, BABS ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "docs/hpc").glob("*.yml")), ids=lambda p: p.name)
def test_plugin_file(path):
    assert read_plugin_file(path)["plugin"] == "SLURM"


def test_babs_file_has_our_options(tmp_path):
    config = yaml.safe_load(resources.files("remix_bids.data").joinpath("babs.yaml").read_text())
    words = []
    for option, value in config["bids_app_args"].items():
        if option != "$SUBJECT_SELECTION_FLAG":
            words += [option, *([str(value)] if value else [])]
    bids = make_dataset(tmp_path / "bids", ["sub-01_T1w.nii.gz"])
    settings = parse_args([str(bids), str(tmp_path / "out"), "participant", *words])
    limits = config["cluster_resources"]["customized_text"]
    assert settings.nprocs == int(re.search(r"--cpus-per-task=(\d+)", limits)[1])
    assert settings.mem_gb < int(re.search(r"--mem=(\d+)G", limits)[1])
    assert list(config["zip_foldernames"].values()) == [__version__.replace(".", "-")]
