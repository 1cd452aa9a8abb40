"""The Boutiques descriptor says what the parser says."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

from remix_bids.cli.boutiques import build_descriptor
from remix_bids.cli.parser import build_parser

DESCRIPTOR = resources.files("remix_bids.data").joinpath("boutiques.json")
BOSH = Path(sys.executable).with_name("bosh")


def test_descriptor_is_up_to_date():
    again = "python -m remix_bids.cli.boutiques > remix_bids/data/boutiques.json"
    assert json.loads(DESCRIPTOR.read_text()) == build_descriptor(), f"run: {again}"


def test_every_option_is_described():
    flags = {item.get("command-line-flag") for item in build_descriptor()["inputs"]} - {None}
    known = {o for action in build_parser()._actions for o in action.option_strings}
    left_out = {o for o in known if o.startswith("--")} - flags
    assert left_out == {"--help", "--version"}


def test_boutiques_accepts_it(tmp_path):
    def bosh(*args):
        done = subprocess.run([BOSH, *map(str, args)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "OK" in bosh("validate", str(DESCRIPTOR))
    invocation = tmp_path / "invocation.json"
    wanted = {
        "bids_dir": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "analysis_level": "participant",
        "participant_label": ["01", "02"],
        "mem": "8G",
        "nprocs": 2,
        "offline": True,
    }
    invocation.write_text(json.dumps(wanted))
    shown = bosh("exec", "simulate", str(DESCRIPTOR), "-i", invocation).strip().splitlines()[-1]
    given = vars(build_parser().parse_args(shown.split()[1:]))
    assert given == {
        "bids_dir": tmp_path,
        "output_dir": Path(tmp_path / "out"),
        "analysis_level": "participant",
        "participant_label": ["01", "02"],
        "mem_gb": 8.0,
        "nprocs": 2,
        "offline": True,
    }
