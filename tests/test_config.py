"""Settings survive a round trip, and wrong ones are refused by name."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from remix_bids.config import RunConfig, read_settings
from remix_bids.errors import UsageError


def full_config() -> RunConfig:
    return RunConfig(
        bids_dir=Path('/data/my "study" \\ 1'),
        output_dir=Path("/out/ünï\tcode"),
        participant_label=("01", "it's"),
        session_label=("a",),
        bids_filter_file=Path("/f.json"),
        mem_gb=7.25,
        nprocs=3,
        low_mem=True,
        expert="3",
        verbose=2,
        run_uuid="x",
    )


@pytest.mark.parametrize("config", [full_config(), RunConfig(Path("/a"), Path("/b"))])
def test_round_trip(config):
    again = RunConfig.from_toml(config.to_toml())
    assert again == config
    for field in fields(RunConfig):
        assert type(getattr(again, field.name)) is type(getattr(config, field.name))


def test_is_frozen():
    with pytest.raises(AttributeError):
        full_config().nprocs = 4
    assert full_config().with_(nprocs=4).nprocs == 4
    assert full_config().nprocs == 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("colour = 'red'", "colour"),
        ("nprocs = 'many'", "nprocs"),
        ("nprocs = true", "nprocs"),
        ("low_mem = 1", "low_mem"),
        ("participant_label = '01'", "participant_label"),
        ("nprocs = ", "TOML"),
        ("settings = 3", "no table"),
        ("[[settings]]\nnprocs = 1", "no table"),
    ],
)
def test_wrong_settings(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        read_settings(text)


def test_import_has_no_side_effects(tmp_path):
    code = (
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import remix_bids.config\n"
        "heavy = {'torch', 'ants', 'nipype', 'bids', 'nibabel', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert dict(os.environ) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
