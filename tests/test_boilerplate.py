"""The methods text says what the options did, and cites what it names."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from remix_bids.config import RunConfig
from remix_bids.experts.registry import GENERAL, load_registry
from remix_bids.reports.boilerplate import (
    boilerplate_html,
    methods_text,
    references,
    write_boilerplate,
)
from remix_bids.templates import SPACES
from tests.bids_skeletons import make_dataset
from tests.commands import run
from tests.pages import write_subject

PLAIN = RunConfig(Path("bids"), Path("out"))


@pytest.mark.parametrize(
    ("changes", "says", "does_not_say"),
    [
        ({}, ["effective voxel volume", "MNI152Lin space"], ["native space"]),
        ({"gate": "paper"}, ["product of its voxel sizes"], ["effective"]),
        ({"expert": "3"}, ["(--expert 3)"], ["selected by", "1.05 mm"]),
        ({"expert": "general"}, ["one general residual"], ["seven expert"]),
        ({"enforce_consistency": True}, ["back-projection [@backprojection]"], []),
        ({"leave_slices_out": True}, ["every second slice was left out"], []),
        ({"output_spaces": ("T1w",)}, ["written in native space"], ["MNI152Lin space", "also"]),
        ({"output_spaces": ("MNI152Lin", "T1w")}, ["MNI152Lin space", "also written in nat"], []),
        ({"random_seed": 7}, ["random seed 7"], []),
        ({"experts_dir": Path("x")}, ["not those shipped"], ["openly licensed"]),
        ({"output_spaces": ("MNI152NLin2009aSym",)}, ["nilearn carries"], ["TemplateFlow"]),
        ({"sloppy": True}, ["tests only"], []),
        ({"bids_filter_file": Path("f")}, ["filter file"], []),
    ],
)
def test_text_follows_the_options(changes, says, does_not_say):
    text = methods_text(replace(PLAIN, **changes))
    for words in says:
        assert words in text
    for words in does_not_say:
        assert words not in text


def test_steps_of_consistency_are_told_where_an_expert_takes_them():
    for record in load_registry():
        if record.name != GENERAL:
            text = methods_text(replace(PLAIN, expert=record.name))
            assert ("back-projection" in text) == (record.consistency_steps > 0)
            assert (f"networks for {record.name} mm3" in text) == (record.consistency_steps > 0)
    assert "whose table asks" in methods_text(replace(PLAIN, experts_dir=Path("x")))


@pytest.mark.parametrize("space", SPACES)
def test_everything_cited_is_referenced(space):
    text = methods_text(replace(PLAIN, output_spaces=(space,), enforce_consistency=True))
    entries = references(text)
    assert set(entries) == set(re.findall(r"@(\w+)", text))
    for key, entry in entries.items():
        assert entry.startswith("@")
        assert entry.count("{") == entry.count("}")
        assert key in entry
    page = boilerplate_html(replace(PLAIN, output_spaces=(space,)))
    assert "@" not in page
    assert "{" not in page
    assert page.count("<li>") == len(
        references(methods_text(replace(PLAIN, output_spaces=(space,))))
    )


def test_files(tmp_path):
    path = write_boilerplate(replace(PLAIN, output_dir=tmp_path))
    assert path == tmp_path / "logs" / "CITATION.md"
    assert path.with_suffix(".bib").read_text().count("\n@") >= 7
    before = path.stat().st_mtime_ns
    write_boilerplate(replace(PLAIN, output_dir=tmp_path))
    assert path.stat().st_mtime_ns == before


def test_boilerplate_only_does_nothing_else(tmp_path):
    bids, out = make_dataset(tmp_path / "bids", ["sub-01_T1w.nii.gz"]), tmp_path / "out"
    done = run(
        *("remix-bids", bids, out, "participant", "-w", tmp_path / "work"),
        *("--boilerplate-only", "--expert", "general"),
        TEMPLATEFLOW_HOME=tmp_path / "none",
    )
    assert done.returncode == 0
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert written == {
        *("dataset_description.json", ".bidsignore", "logs/CITATION.md", "logs/CITATION.bib")
    }
    assert "general" in (out / "logs/CITATION.md").read_text()
    assert not (tmp_path / "work").exists()


def test_reports_only_builds_pages_of_what_is_there(tmp_path):
    bids, out = make_dataset(tmp_path / "bids", ["sub-01_T1w.nii.gz"]), tmp_path / "out"
    command = ("remix-bids", bids, out, "participant", "--reports-only", "-w", tmp_path / "work")
    nothing = run(*command)
    assert nothing.returncode == 66
    assert "figures" in nothing.stderr
    for subject in ("01", "02"):
        write_subject(out, subject, [f"sub-{subject}_T1w.nii.gz"]).unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("figures/*")}
    done = run(*command, "--participant-label", "02")
    assert done.returncode == 0
    assert [p.name for p in out.glob("*.html")] == ["sub-02.html"]
    # Of one all of whose scans have failed there are logs only.
    (out / "sub-04/log/run").mkdir(parents=True)
    done = run(*command, "--participant-label", "04", "03")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 done, 0 failed")
    assert "no report: sub-03 have not been run" in done.stdout
    shutil.rmtree(out / "sub-04")
    (out / "sub-04.html").unlink()
    done = run(*command)
    assert done.stdout.strip().endswith("2 done, 0 failed")
    page = (out / "sub-01.html").read_text()
    for title in ("Summary", "Before and after", "Consistency with the scan", "Methods", "Errors"):
        assert title in page
    assert {p: p.stat().st_mtime_ns for p in out.rglob("figures/*")} == before
    assert not (tmp_path / "work").exists()
