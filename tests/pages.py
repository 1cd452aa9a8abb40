"""Report pages for tests: every part is what a run writes, only the volumes are small."""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from remix_bids.config import RunConfig
from remix_bids.interfaces.reports import consistency_html, quality_html, summary_html
from remix_bids.naming import output_names
from remix_bids.qc import mosaic
from remix_bids.reports.individual import build_report, note_run

MEASURES = ("sharpness", "anisotropy", "noise", "snr", "cnr", "brain_volume")


def open_browser():
    """A headless Chromium that keeps its console and its requests in logs."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        raise FileNotFoundError(
            "no chromium or no chromedriver: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def sidecar(expert="5", warnings=()):
    return {
        "VoxelSize": [1.0, 1.0, 5.0],
        "VoxelVolume": 5.0,
        "EffectiveVoxelVolume": 5.0,
        "Expert": expert,
        "ExpertSHA256": "ab" * 32,
        "SelectionRule": "effective voxel volume (each side counted as at least 1 mm)",
        "SkullStripped": False,
        "RegistrationScore": 0.7,
        "AffineDeterminant": 0.9,
        "BrainCoverage": 1.0,
        "SliceProfileWidth": 4.2,
        "Device": "cpu",
        "Timings": {"Registration": 21.2, "Enhancement": 8.0},
        "Warnings": list(warnings),
    }


def figures_of(name, rng, expert="5"):
    """A flat object such as ``*_desc-remix_qc.json``, with figures drawn at random."""
    out = {"bids_name": name, "expert": expert, "voxel_size": "1 x 1 x 5"}
    out |= {"effective_voxel_volume": 5.0, "registration_score": 0.7 + 0.02 * rng.normal()}
    out |= {"brain_coverage": 100.0, "affine_determinant": 0.9 + 0.03 * rng.normal()}
    out |= {"warnings": 0, "residual_energy": 2 + 0.1 * rng.normal(), "network_energy": 1.0}
    for i, key in enumerate(MEASURES, 1):
        out |= {f"{key}_{when}": i * (10 + rng.normal()) for when in ("before", "after")}
    for i, key in enumerate(("chi2_median", "chi2_p95", "chi2_max", "disagreeing"), 1):
        out[f"consistency_{key}"] = i + 0.05 * rng.normal()
    out |= {"consistency_correlation": 0.99, "consistency_nrmse": 3 + 0.1 * rng.normal()}
    return out | {"scan_noise": 5.0, "unknowable": 2 + 0.05 * rng.normal()}


def write_figures(out: Path, source: str) -> None:
    """Everything in ``figures/`` for one scan."""
    rng = np.random.default_rng(0)
    names = output_names(source, "MNI152Lin")
    (out / names.summary).parent.mkdir(parents=True, exist_ok=True)
    (out / names.qc).parent.mkdir(parents=True, exist_ok=True)
    ball = np.linalg.norm(np.indices((60, 72, 60)).T - (30, 36, 30), axis=-1).T < 22
    after = ball * (1 + 0.3 * rng.random(ball.shape))
    before = after.copy()
    before[:, :, 1::2] = before[:, :, ::2]  # slices of 2
    label = source.partition(".")[0]
    figures = figures_of(label, rng) | {"left_out_psnr": 22.5, "left_out_psnr_cubic": 22.0}
    palette = mosaic.Palette(high=0.2)
    place = [(30, 36, 30), (20, 30, 35)]
    content = sidecar(warnings=["Coverage: <b>x</b> & y"]) | {"EnhancedFraction": 0.8}
    for path, text in (
        (names.qc, json.dumps(figures)),
        (names.summary, summary_html(label, content)),
        (names.header, '<p class="fine">Nothing to remark.</p>'),
        (names.registration, mosaic.overlay(before, after, ball)),
        (names.enhancement, mosaic.before_after(before, after, ball)),
        (names.difference, mosaic.painted(before, after - before, ball, palette, "difference")),
        (names.changes, mosaic.close_ups(before, after, place, ["1", "2"], ball, palette)),
        (names.consistency, consistency_html(figures)),
        (names.consistency_map, mosaic.painted(after, before, ball, palette, "chi-square")),
        (names.unknowable, mosaic.painted(after, after - before, ball, palette, "unknowable")),
        (names.quality, quality_html(figures)),
        (names.native, mosaic.before_after(before, after, ball, outline=ball)),
    ):
        (out / path).write_text(text)


def write_subject(out: Path, subject: str, sources: list[str]) -> Path:
    """The page of one subject and all that it shows."""
    for source in sources:
        write_figures(out, source)
    log = out / f"sub-{subject}" / "log" / "run"
    note_run(log, RunConfig(out / "bids", out, output_spaces=("MNI152Lin", "T1w")), {})
    return build_report(out, subject, "run", {"Made": "today"})
