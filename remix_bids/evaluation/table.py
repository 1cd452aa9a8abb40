"""The evaluation: persons x classes x geometries through all methods, and the table of it."""

from __future__ import annotations

import csv
import multiprocessing
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remix_bids.evaluation.methods import back_project, interpolate, run_expert
from remix_bids.evaluation.metrics import correlation, eroded, psnr, ssim
from remix_bids.experts.inference import load_expert
from remix_bids.experts.registry import GENERAL, effective_voxel_volume, load_registry
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import (
    CLASS_RANGES,
    Acquisition,
    draw_shape,
    from_header,
    load_bank,
    place,
)
from remix_bids.simulation.degrade import acquire, add_rician_noise, restore_grid
from remix_bids.simulation.estimate import linear_estimate, make_consistent
from remix_bids.training.dataset import Person, crop_to_foreground

METHODS = ("linear", "cubic", "estimate", "back-projection", GENERAL, "expert", "expert + steps")
METRICS = {
    "psnr": "PSNR in dB, inside the brain",
    "psnr_whole": "PSNR in dB, all that the scan covers of the head's bounding box",
    "ssim": "SSIM, inside the brain",
    "correlation": "Correlation, inside the brain",
}
SHIPS = "expert"  # named before the experts were trained: the network alone
ANISOTROPY = ((1.0, 2.0), (2.0, 4.0), (4.0, 20.0))


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


def run_case(case: Case, protocol: dict, experts_dir: Path | None, tune: bool) -> list[dict]:
    """All methods on one case, one row each; or every iterate of back-projection, to tune it."""
    torch.set_num_threads(1)
    truth = case.person.image.float()
    crop, grid = crop_to_foreground(truth, 64)
    acquisition = case.acquisition()
    native = acquire(truth, acquisition)
    if case.noise > 0:
        sigma = case.noise * float(truth[truth > 0.1].quantile(0.75))
        generator = torch.Generator().manual_seed(
            int(np.random.default_rng([*case.seed, 1]).integers(2**62))
        )
        native = add_rician_noise(native, sigma, generator)
    truth = truth[crop]
    low = restore_grid(native, acquisition.grid, acquisition.world, grid)
    mask = eroded((truth > 0.05) & low.covered, protocol["erosion"])
    settings = protocol["back_projection"]
    iterations = settings["iterations_noise" if case.noise else "iterations"][case.klass - 1]
    results: dict[str, Tensor] = {}
    if tune:
        steps = settings["most"]
        iterates = back_project(native, acquisition, grid, low.image, steps, settings["step"])
        results = {"0": low.image} | {str(i): x for i, x in enumerate(iterates, 1)}
    else:
        iterates = back_project(native, acquisition, grid, low.image, iterations, settings["step"])
        registry = load_registry(experts_dir)
        name = str(case.klass)
        # Back-projection is given the true profile, the experts only what a sidecar tells.
        told = from_header(acquisition.grid, acquisition.world, acquisition.thickness)
        estimate = linear_estimate(native, told, grid)
        results["linear"] = interpolate(native, acquisition, grid, "linear")
        results["cubic"] = low.image
        results["estimate"] = estimate.image
        results["back-projection"] = deque(iterates, maxlen=1).pop() if iterations else low.image
        results[GENERAL] = run_expert(estimate, registry[GENERAL], _network(GENERAL, experts_dir))
        results["expert"] = run_expert(estimate, registry[name], _network(name, experts_dir))
        steps = protocol["consistency"]["steps_noise" if case.noise else "steps"]
        results["expert + steps"] = make_consistent(results["expert"], native, told, grid, steps)
    return [
        {
            "person": case.person.name,
            "class": case.klass,
            "kind": case.kind,
            "voxel_sizes": " x ".join(f"{s:.2f}" for s in acquisition.grid.voxel_sizes),
            "volume": acquisition.volume,
            "anisotropy": round(acquisition.anisotropy, 2),
            "profile": "box" if any(acquisition.box) else "gaussian",
            "noise": case.noise,
            "method": method,
            "psnr": round(psnr(image, truth, mask), 3),
            "psnr_whole": round(psnr(image, truth, low.covered), 3),
            "ssim": round(ssim(image, truth, mask), 4),
            "correlation": round(correlation(image, truth, mask), 5),
        }
        for method, image in results.items()
    ]


def _job(arguments: tuple[Case, dict, Path | None, bool]) -> list[dict]:
    return run_case(*arguments)


def evaluate(
    all_cases: Sequence[Case],
    protocol: dict,
    output: Path,
    *,
    experts_dir: Path | None = None,
    tune: bool = False,
    nprocs: int = 1,
) -> list[dict]:
    """Run all cases and write their rows to a TSV as they come; see `run_case`."""
    rows: list[dict] = []
    jobs = [(case, protocol, experts_dir, tune) for case in all_cases]
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
    means = rng.choice(np.asarray(values), (10000, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def best_iterations(rows: Sequence[dict]) -> dict[float, list[int]]:
    """Of the tuning rows: the iterations of back-projection with the best PSNR, by noise."""
    best: dict[float, list[int]] = {}
    for noise in sorted({float(row["noise"]) for row in rows}):
        best[noise] = []
        for k in sorted({int(row["class"]) for row in rows}):
            where = {"noise": noise, "class": k}
            methods = sorted({row["method"] for row in rows}, key=int)
            means = [
                np.mean(list(by_person(rows, "psnr", method=m, **where).values())) for m in methods
            ]
            best[noise].append(int(methods[int(np.argmax(means))]))
    return best


def to_markdown(rows: Sequence[dict]) -> str:
    """Tables of each metric by class, and paired gains of what ships; the person is the unit."""
    lines: list[str] = []
    for noise in sorted({float(row["noise"]) for row in rows}):
        title = "without noise" if noise == 0 else f"with {noise:.0%} Rician noise"
        mine = [row for row in rows if float(row["noise"]) == noise]
        for metric, label in METRICS.items():
            lines += [f"**{label}, {title}**", "", *_means(mine, metric), ""]
        for metric in ("psnr", "ssim", "correlation"):
            lines += [
                f"**Gain of the expert in {metric}, {title}** (mean over persons, 95 % bootstrap "
                "interval, persons better)",
                "",
                *_gains(mine, metric),
                "",
            ]
        lines += [f"**Gain of the expert in psnr by kind of acquisition, {title}**", ""]
        lines += [*_by_kind(mine), ""]
    return "\n".join(lines)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = "|" + " --- |" * len(head)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in body)]


def _classes(rows: Sequence[dict]) -> list[int]:
    return sorted({int(row["class"]) for row in rows})


def _means(rows: Sequence[dict], metric: str) -> list[str]:
    """Mean over persons for each class and method."""
    digits = 2 if metric.startswith("psnr") else 4
    values = np.array(
        [
            [
                np.mean(list(by_person(rows, metric, method=m, **{"class": k}).values()))
                for m in METHODS
            ]
            for k in _classes(rows)
        ]
    )
    body = [
        [name, *(f"{v:.{digits}f}" for v in line)]
        for name, line in zip(
            [*map(str, _classes(rows)), "mean"], [*values, values.mean(axis=0)], strict=True
        )
    ]
    return _table(["class", *METHODS], body)


def paired_gain(rows: Sequence[dict], metric: str, base: str, **where: object) -> list[float]:
    """Gain of what ships over another method, one value a person."""
    expert = by_person(rows, metric, method=SHIPS, **where)
    other = by_person(rows, metric, method=base, **where)
    return [expert[person] - other[person] for person in expert]


def _cell(gain: Sequence[float], digits: int) -> str:
    if not gain:
        return ""
    low, high = bootstrap_interval(gain)
    better = sum(g > 0 for g in gain)
    mean = float(np.mean(gain))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {better}/{len(gain)}"


def _gains(rows: Sequence[dict], metric: str) -> list[str]:
    others = [m for m in METHODS if m != SHIPS]
    digits = 2 if metric == "psnr" else 4
    body = [
        [str(k), *(_cell(paired_gain(rows, metric, m, **{"class": k}), digits) for m in others)]
        for k in _classes(rows)
    ]
    return _table(["class", *others], body)


def _by_kind(rows: Sequence[dict]) -> list[str]:
    """Gains split by profile, anisotropy and where the geometry comes from, class 1 left out."""
    rest = [row for row in rows if int(row["class"]) > 1]
    groups = {
        "Gaussian profile": [row for row in rest if row["profile"] == "gaussian"],
        "box profile": [row for row in rest if row["profile"] == "box"],
        "geometry of a real scan": [row for row in rest if row["kind"] == "real"],
        "rescaled geometry": [row for row in rest if row["kind"] != "real"],
    }
    for low, high in ANISOTROPY:
        groups[f"anisotropy {low:g} to {high:g}"] = [
            row for row in rest if low <= float(row["anisotropy"]) < high
        ]
    bases = ("cubic", "back-projection", GENERAL)
    body = [
        [name, *(_cell(paired_gain(group, "psnr", m), 2) for m in bases)]
        for name, group in groups.items()
    ]
    return _table(["acquisitions", *bases], body)
