"""The evaluation: persons x classes x geometries through all methods, and the table of it."""

from __future__ import annotations

import csv
import multiprocessing
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from remix_bids.evaluation.methods import back_project, interpolate, run_expert
from remix_bids.evaluation.metrics import correlation, eroded, psnr, ssim
from remix_bids.experts.inference import load_expert
from remix_bids.experts.registry import GENERAL, effective_voxel_volume, load_registry
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import (
    CLASS_RANGES,
    Acquisition,
    draw_shape,
    load_bank,
    place,
)
from remix_bids.simulation.degrade import acquire, add_rician_noise, restore_grid
from remix_bids.training.dataset import Person, crop_to_foreground

METHODS = ("linear", "cubic", "back-projection", GENERAL, "expert")
METRICS = ("psnr", "ssim", "correlation")


@dataclass(frozen=True)
class Case:
    """One person seen through one acquisition."""

    person: Person
    klass: int
    kind: str
    seed: tuple[int, ...]
    noise: float

    def acquisition(self) -> Acquisition:
        """A held-out geometry on the person; its own scale and shear."""
        rng = np.random.default_rng(self.seed)
        bank = [g for g in load_bank() if g.held_out]
        low, high = CLASS_RANGES[self.klass]
        if self.kind == "real":
            own = [g for g in bank if low <= effective_voxel_volume(g.grid.voxel_sizes) < high]
            if own:
                return place(own[rng.integers(len(own))], self.person.world, rng)
        tilt = re.fullmatch(r"oblique(\d+)", self.kind)
        plane = [g for g in bank if g.plane == self.kind] or bank
        return place(
            plane[rng.integers(len(plane))],
            self.person.world,
            rng,
            shape=draw_shape(rng, self.klass),
            obliquity=float(tilt[1]) if tilt else None,
        )


def cases(
    persons: Sequence[Person], protocol: dict, classes: Sequence[int], noise: Sequence[float]
) -> list[Case]:
    """The cases of a protocol; the order of kinds turns with person and class."""
    kinds = protocol["kinds"]
    return [
        Case(person, k, kinds[(i + k + j) % len(kinds)], (protocol["seed"], i, k, j), sigma)
        for k in classes
        for i, person in enumerate(persons)
        for j in range(protocol["geometries_per_person"])
        for sigma in noise
    ]


@lru_cache(maxsize=2)
def _network(name: str, experts_dir: Path | None) -> ResidualUNet:
    return load_expert(load_registry(experts_dir)[name])


def run_case(case: Case, protocol: dict, experts_dir: Path | None = None) -> list[dict]:
    """All methods on one case; one row per method, and per iterate of back-projection."""
    torch.set_num_threads(1)
    truth = case.person.image.float()
    crop, grid = crop_to_foreground(truth, 64)
    acquisition = case.acquisition()
    native = acquire(truth, acquisition)
    if case.noise > 0:
        sigma = case.noise * float(truth[truth > 0.1].quantile(0.75)) if case.noise else 0.0
        generator = torch.Generator().manual_seed(case.seed[-1] + 1000 * case.seed[1])
        native = add_rician_noise(native, sigma, generator)
    truth = truth[crop]
    low = restore_grid(native, acquisition.grid, acquisition.world, grid)
    mask = eroded((truth > 0.05) & low.covered, protocol["erosion"])
    results = {
        "linear": interpolate(native, acquisition, grid, "linear"),
        "cubic": low.image,
    }
    settings = protocol["back_projection"]
    tuned = settings["iterations_noise" if case.noise else "iterations"][case.klass - 1]
    iterates = {}
    step = settings["step"]
    for i, x in enumerate(back_project(native, acquisition, grid, low.image, tuned, step), 1):
        iterates[i] = psnr(x, truth, mask)
        results["back-projection"] = x
    results.setdefault("back-projection", low.image)
    registry = load_registry(experts_dir)
    for method, record in ((GENERAL, registry[GENERAL]), ("expert", registry[str(case.klass)])):
        results[method] = run_expert(low, record, _network(record.name, experts_dir))
    sizes = " x ".join(f"{s:.2f}" for s in acquisition.grid.voxel_sizes)
    return [
        {
            "person": case.person.name,
            "class": case.klass,
            "kind": case.kind,
            "voxel_sizes": sizes,
            "volume": acquisition.volume,
            "anisotropy": round(acquisition.anisotropy, 2),
            "profile": "box" if any(acquisition.box) else "gaussian",
            "noise": case.noise,
            "method": method,
            "psnr": round(psnr(image, truth, mask), 3),
            "ssim": round(ssim(image, truth, mask), 4),
            "correlation": round(correlation(image, truth, mask), 5),
            "iterates": " ".join(f"{v:.2f}" for v in iterates.values())
            if method == "back-projection"
            else "",
        }
        for method, image in results.items()
    ]


def _job(arguments: tuple[Case, dict, Path | None]) -> list[dict]:
    return run_case(*arguments)


def evaluate(
    all_cases: Sequence[Case],
    protocol: dict,
    output: Path,
    *,
    experts_dir: Path | None = None,
    nprocs: int = 1,
) -> list[dict]:
    """Run all cases and write their rows to a TSV as they come."""
    rows: list[dict] = []
    jobs = [(case, protocol, experts_dir) for case in all_cases]
    context = multiprocessing.get_context("spawn")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file, context.Pool(nprocs) as pool:
        writer: csv.DictWriter | None = None
        for done in pool.imap(_job, jobs):
            if writer is None:
                writer = csv.DictWriter(file, done[0], delimiter="\t", lineterminator="\n")
                writer.writeheader()
            writer.writerows(done)
            file.flush()
            rows += done
    return rows


def by_person(rows: Sequence[dict], metric: str, **where: object) -> dict[str, float]:
    """Mean of a metric for each person over the rows that match."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if all(str(row[key]) == str(value) for key, value in where.items()):
            values.setdefault(row["person"], []).append(float(row[metric]))
    return {person: float(np.mean(v)) for person, v in values.items()}


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over persons."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values)
    means = rng.choice(values, (10000, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def to_markdown(rows: Sequence[dict]) -> str:
    """Tables of each metric, and the paired gains of the expert with the person as the unit."""
    lines = []
    classes = sorted({int(row["class"]) for row in rows})
    for noise in sorted({float(row["noise"]) for row in rows}):
        title = "without noise" if noise == 0 else f"with {noise:.0%} Rician noise"
        for metric in METRICS:
            head = " | ".join(METHODS)
            lines += [f"**{metric}, inside the brain, {title}**", "", f"| class | {head} |"]
            lines += ["|" + " --- |" * (len(METHODS) + 1)]
            table = []
            for k in classes:
                found = [
                    np.mean(
                        list(
                            by_person(rows, metric, method=m, noise=noise, **{"class": k}).values()
                        )
                    )
                    for m in METHODS
                ]
                table.append(found)
                digits = 2 if metric == "psnr" else 4
                lines.append(f"| {k} | " + " | ".join(f"{v:.{digits}f}" for v in found) + " |")
            means = np.mean(table, axis=0)
            lines += ["| mean | " + " | ".join(f"{v:.{digits}f}" for v in means) + " |", ""]
        others = METHODS[:-1]
        lines += [
            f"**PSNR gain of the expert in dB, {title}** (mean over persons, 95 % bootstrap "
            "interval, persons better)",
            "",
            "| class | " + " | ".join(others) + " |",
        ]
        lines += ["|" + " --- |" * (len(others) + 1)]
        for k in classes:
            expert = by_person(rows, "psnr", method="expert", noise=noise, **{"class": k})
            cells = []
            for method in others:
                base = by_person(rows, "psnr", method=method, noise=noise, **{"class": k})
                gain = [expert[p] - base[p] for p in expert]
                low, high = bootstrap_interval(gain)
                better = sum(g > 0 for g in gain)
                cells.append(f"{np.mean(gain):+.2f} [{low:+.2f}, {high:+.2f}] {better}/{len(gain)}")
            lines.append(f"| {k} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
