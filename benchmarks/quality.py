"""Does the consistency check tell? One command, one table.

    python benchmarks/quality.py TEST --out docs/evidence/consistency

``TEST`` is what ``remix-experts prepare EXTERNAL_TEST TEST --test`` has written: high-resolution
persons on the working grid. Each is taken through a held-out acquisition with Rician noise; then
the truth, cubic interpolation, the input of the network as it is (identity), the expert, a wrong
expert and outputs with a planted error are held against the simulated scan. ``--enforce`` measures
instead what the consistency step does to PSNR.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commit import commit
from scipy.ndimage import distance_transform_edt, gaussian_filter, maximum_filter

from remix_bids.evaluation.cases import Case
from remix_bids.evaluation.methods import run_expert
from remix_bids.evaluation.metrics import eroded, psnr
from remix_bids.evaluation.restore import as_told
from remix_bids.experts.inference import load_expert
from remix_bids.experts.registry import load_registry
from remix_bids.qc import consistency, quality
from remix_bids.simulation.acquisition import Acquisition, slice_axis
from remix_bids.simulation.degrade import acquire, add_rician_noise, restore_grid
from remix_bids.simulation.estimate import linear_estimate, make_consistent
from remix_bids.spatial import WORKING_GRID, index_map
from remix_bids.training.dataset import Person, load_persons

SEED = 4
RADIUS = 3.0  # mm: a sphere of 6 mm
KINDS = ("axial", "sagittal", "coronal", "oblique15", "real", "oblique30")
WRONG = {1: "7", 2: "7", 3: "7", 4: "1", 5: "1", 6: "1", 7: "1"}
QUALITY = ("sharpness", "anisotropy", "noise", "snr", "cnr")
CHI2 = ("median", "p95", "largest", "disagreeing", "correlation", "nrmse")


def simulate(
    person: Person, index: int, klass: int, noise: float
) -> tuple[torch.Tensor, torch.Tensor, Acquisition]:
    """A person's truth, a noisy scan of it, and its acquisition."""
    truth = person.image.float() * 1000
    case = Case(person, klass, KINDS[index % len(KINDS)], index, (SEED, index, klass), noise)
    acquisition = case.acquisition()
    native = acquire(truth, acquisition)
    if noise:
        sigma = noise * float(truth[truth > 100].quantile(0.75))
        native = add_rician_noise(native, sigma, torch.Generator().manual_seed(SEED + index))
    return truth, native.clamp(min=0), acquisition


def sphere(place: np.ndarray, shape: tuple[int, ...], radius: float) -> np.ndarray:
    index = np.indices(shape, dtype=np.float32)
    return ((index - np.reshape(place, (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius**2


def planted(expert: np.ndarray, brain: np.ndarray, normal: int) -> Iterator[tuple]:
    """Outputs with one error each: name, image, place."""
    inner = distance_transform_edt(brain) > 15
    centre = np.argwhere(inner).mean(axis=0) + np.array([25, 0, 10])
    flat = centre.round().astype(int)
    bump = expert.copy()
    bump[sphere(flat, expert.shape, RADIUS)] *= 1.2
    yield "6 mm sphere, +20 %", bump, flat

    # Erased: where there is most structure, a ball is replaced by its smooth surroundings.
    smooth = gaussian_filter(expert, 6)
    contrast = gaussian_filter((expert - smooth) ** 2, 3) * inner
    place = np.array(np.unravel_index(np.argmax(contrast), contrast.shape))
    ball = sphere(place, expert.shape, 5)
    erased = expert.copy()
    erased[ball] = smooth[ball]
    yield "10 mm ball erased", erased, place

    pair = expert.copy()
    for step, sign in ((0, 1.0), (1, -1.0)):
        patch = [slice(c - 8, c + 9) for c in flat]
        patch[normal] = slice(flat[normal] + step, flat[normal] + step + 1)
        pair[tuple(patch)] += sign * 0.2 * float(np.median(expert[brain]))
    yield "+-20 % in adjacent planes", pair, flat


def local(found: consistency.Consistency, place: np.ndarray, acquisition: Acquisition) -> float:
    """Largest chi-square within 5 mm of a place of the working grid."""
    mapping = index_map(WORKING_GRID, acquisition.grid, acquisition.world)
    index = (mapping[:3, :3] @ place + mapping[:3, 3]).round().astype(int)
    reach = [2 * max(1, round(5 / s)) + 1 for s in acquisition.grid.voxel_sizes]
    largest = maximum_filter(np.nan_to_num(found.chi2), reach)
    index = np.clip(index, 0, np.array(largest.shape) - 1)
    return float(largest[tuple(index)])


def run_person(person: Person, index: int, klass: int, noise: float, experts: Any) -> list[dict]:
    truth, native, acquisition = simulate(person, index, klass, noise)
    low = restore_grid(native, acquisition.grid, acquisition.world)
    covered = low.covered.numpy()
    brain = (truth > 50).numpy() & covered
    mapping = index_map(WORKING_GRID, acquisition.grid, acquisition.world)
    axes, thick = np.linalg.inv(mapping)[:3, :3], slice_axis(acquisition.grid)
    normal = int(np.argmax(np.abs(axes[:, thick])))
    outputs = {"truth": truth.numpy(), "cubic": low.image.numpy()}
    told = as_told(native, acquisition)
    estimate = linear_estimate(native, told)
    outputs["identity"] = estimate.image.numpy()
    for name, which in (("expert", str(klass)), ("wrong expert", WRONG[klass])):
        record = experts[which]
        outputs[name] = run_expert(estimate, record, load_expert(record)).numpy()
    scan = native.numpy()
    tissues = quality.find_tissues(outputs["cubic"], brain)
    mask = eroded(torch.from_numpy(brain), 2)
    rows = []
    reference: consistency.Consistency | None = None

    def add(name: str, image: np.ndarray, place: np.ndarray | None = None) -> None:
        nonlocal reference
        found = consistency.check(scan, image, covered, brain, acquisition)
        if name == "expert":
            reference = found
        row: dict[str, Any] = {"person": person.name, "class": klass, "output": name}
        row["voxel_sizes"] = " x ".join(f"{s:.2f}" for s in acquisition.grid.voxel_sizes)
        row |= {key: getattr(found, key) for key in CHI2}
        if place is not None and reference is not None:
            row["there_before"] = local(reference, place, acquisition)
            row["there"] = local(found, place, acquisition)
        measured = quality.image_quality(image, brain, covered, axes, thick, tissues, 1.0)
        row |= {key: measured[key] for key in QUALITY}
        if name in ("truth", "cubic", "expert") or "planes" in name:
            part = consistency.unknowable(image, covered, brain, acquisition)
            row["unknowable"] = 100 * consistency.energy_share(part, image, brain)
        row["psnr"] = psnr(torch.from_numpy(image), truth, mask)
        rows.append(row)

    for name, image in outputs.items():
        add(name, image)
    for name, image, place in planted(outputs["expert"], brain, normal):
        add(name, image, place)
    return rows


def run_enforced(person: Person, index: int, klass: int, noise: float, experts: Any) -> list[dict]:
    truth, native, acquisition = simulate(person, index, klass, noise)
    low = restore_grid(native, acquisition.grid, acquisition.world)
    covered = low.covered.numpy()
    brain = (truth > 50).numpy() & covered
    record = experts[str(klass)]
    told = as_told(native, acquisition)
    estimate = linear_estimate(native, told)
    expert = run_expert(estimate, record, load_expert(record)).numpy()
    given = (torch.from_numpy(expert), native, told, WORKING_GRID)
    enforced, share = make_consistent(*given)
    enforced = enforced.numpy() * covered
    mask = eroded(torch.from_numpy(brain), 2)
    before, after = (psnr(torch.from_numpy(v), truth, mask) for v in (expert, enforced))
    return [
        {
            "person": person.name,
            "class": klass,
            "noise": noise,
            "expert": before,
            "enforced": after,
            "gain": after - before,
            "share": share,
        }
    ]


def mean(rows: list[dict], key: str, digits: int = 2) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{np.mean(values):.{digits}f}" if values else ""


def table_of_outputs(rows: list[dict]) -> str:
    head = ("output", "chi2 median", "95 %", "largest", "disagreeing %", "correlation", "NRMSE %")
    head += ("chi2 there, before", "there, after", "unknowable %", *QUALITY, "PSNR dB")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(row["output"] for row in rows):
        own = [row for row in rows if row["output"] == name]
        cells = [name, mean(own, "median"), mean(own, "p95"), mean(own, "largest", 1)]
        cells += [f"{100 * np.mean([row['disagreeing'] for row in own]):.1f}"]
        cells += [mean(own, "correlation", 4)]
        cells += [f"{100 * np.mean([row['nrmse'] for row in own]):.2f}"]
        cells += [mean(own, "there_before"), mean(own, "there"), mean(own, "unknowable")]
        cells += [mean(own, key) for key in QUALITY] + [mean(own, "psnr")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_steps(rows: list[dict]) -> str:
    lines = [
        "| class | noise | persons | expert dB | enforced dB | gain dB | worst | given back |",
        "|" + "---|" * 8,
    ]
    for klass, noise in dict.fromkeys((row["class"], row["noise"]) for row in rows):
        own = [row for row in rows if (row["class"], row["noise"]) == (klass, noise)]
        worst = min(row["gain"] for row in own)
        lines.append(
            f"| {klass} | {noise:.0%} | {len(own)} | {mean(own, 'expert')} | "
            f"{mean(own, 'enforced')} | {mean(own, 'gain')} | {worst:.2f} | "
            f"{mean(own, 'share', 2)} |"
        )
    return "\n".join(lines)


def write(rows: list[dict], given: argparse.Namespace) -> None:
    """The table (Markdown) and every row (TSV)."""
    persons = list(dict.fromkeys(row["person"] for row in rows))
    names = ", ".join(persons)
    command = f"python benchmarks/quality.py TEST --out {given.out}"
    command += " --enforce" if given.enforce else ""
    command += f" --persons {len(persons)} --classes {' '.join(map(str, given.classes))}"
    command += f" --noise {' '.join(map(str, given.noise))}"
    title = "The consistency step and PSNR" if given.enforce else "Does the consistency check tell?"
    text = (
        f"# {title}\n\n`{command}` at commit {commit() or 'unknown'}, {date.today()}; every row is "
        f"in `{given.out.name}.tsv`. Persons: {names}.\n\n"
    )
    text += (table_of_steps if given.enforce else table_of_outputs)(rows) + "\n"
    given.out.with_suffix(".md").write_text(text)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with given.out.with_suffix(".tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="without extension")
    parser.add_argument("--persons", type=int, default=6, help="at most")
    parser.add_argument("--classes", type=int, nargs="+", default=[5])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.02])
    parser.add_argument("--experts-dir", type=Path)
    parser.add_argument("--enforce", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    experts = load_registry(given.experts_dir)
    persons = load_persons(given.test, "held_out")[: given.persons]
    work = run_enforced if given.enforce else run_person
    rows: list[dict] = []
    for klass in given.classes:
        for noise in given.noise:
            for index, person in enumerate(persons):
                rows += work(person, index, klass, noise, experts)
                print(person.name, klass, noise, flush=True)
                write(rows, given)  # an interrupted run leaves what it has


if __name__ == "__main__":
    main()
