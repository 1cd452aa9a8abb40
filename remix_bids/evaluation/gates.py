"""The two gates on real geometries: which voxel volume should choose the expert?

The paper's gate looks at the plain product of the voxel sizes, ours at the effective one. On the
held-out real geometries where they choose different experts, both experts get the same input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from remix_bids.errors import UsageError
from remix_bids.evaluation.metrics import correlation, eroded, psnr
from remix_bids.evaluation.restore import as_told, registry_of, restore, see
from remix_bids.evaluation.settings import CUBIC
from remix_bids.evaluation.table import bootstrap_interval, by_person
from remix_bids.experts.registry import Registry, effective_voxel_volume, voxel_volume
from remix_bids.simulation.acquisition import Geometry, geometries, place
from remix_bids.simulation.degrade import field_of_view
from remix_bids.training.dataset import Person, crop_to_foreground

LOGGER = logging.getLogger(__name__)
GATES = ("paper", "effective")


@dataclass(frozen=True)
class Disagreement:
    """A real geometry and the experts that the two gates choose for it."""

    geometry: Geometry
    paper: str
    effective: str


def disagreements(registry: Registry, bank: Sequence[Geometry]) -> list[Disagreement]:
    """The geometries of a bank for which the gates choose different experts, in its order."""
    out = []
    for geometry in bank:
        sizes = geometry.grid.voxel_sizes
        paper = registry.select(voxel_volume(sizes)).name
        effective = registry.select(effective_voxel_volume(sizes)).name
        if paper != effective:
            out.append(Disagreement(geometry, paper, effective))
    return out


def run_gates(
    persons: Sequence[Person],
    *,
    experts_dir: Path | None = None,
    bank: Path | None = None,
    limit: int | None = None,
    noise: float = 0.0,
    seed: int = 77,
    erosion: int = 2,
) -> Iterator[list[dict]]:
    """Both gates on every held-out geometry of a bank that they disagree upon.

    Geometries are dealt to the persons in turn. Three rows for each: cubic interpolation, and the
    expert of either gate.

    Parameters
    ----------
    bank : Path, optional
        The shipped bank by default.
    limit : int, optional
        Only so many geometries, spread over all.
    noise : float
        See `remix_bids.evaluation.restore.see`.
    erosion : int
        Voxels taken off the brain inside which errors count.

    Raises
    ------
    UsageError
        If there are none.
    """
    registry = registry_of(experts_dir)
    todo = disagreements(registry, geometries(bank, held_out=True))
    if not todo:
        raise UsageError(f"{bank}: both gates choose alike for all that is held out; try another")
    if limit is not None and limit < len(todo):
        todo = [todo[i] for i in np.linspace(0, len(todo) - 1, limit).astype(int)]

    def compare(number: int, case: Disagreement) -> list[dict]:
        person = persons[number % len(persons)]
        rng = np.random.default_rng([seed, number])
        acquisition = place(case.geometry, person.world, rng)
        truth = person.image.float()
        crop, grid = crop_to_foreground(truth, 64)
        native = see(truth, acquisition, noise, [seed, number])
        names = {"paper": case.paper, "effective": case.effective}
        told = as_told(native, acquisition)
        results = restore(native, told, grid, [registry[n] for n in names.values()])
        truth = truth[crop]
        seen = field_of_view(acquisition)
        mask = eroded((truth > 0.05) & seen[crop], erosion)
        sizes = case.geometry.grid.voxel_sizes
        LOGGER.info(
            "%s, %s mm: expert %s or %s",
            person.name,
            " x ".join(f"{s:.2f}" for s in sizes),
            case.paper,
            case.effective,
        )
        return [
            {
                "person": person.name,
                "geometry": number,
                "plane": case.geometry.plane,
                "voxel_sizes": " x ".join(f"{s:.2f}" for s in sizes),
                "volume": voxel_volume(sizes),
                "effective_volume": effective_voxel_volume(sizes),
                "noise": noise,
                "experts": f"{case.paper} or {case.effective}",
                "gate": gate,
                "method": method,
                "psnr": round(psnr(results[method], truth, mask), 3),
                "correlation": round(correlation(results[method], truth, mask), 5),
            }
            for gate, method in (("none", CUBIC), *names.items())
        ]

    return (compare(number, case) for number, case in enumerate(todo))


def to_markdown(rows: Sequence[dict]) -> str:
    """Paired PSNR of the two gates, for each pair of experts and for all, person as the unit."""
    pairs = sorted({str(row["experts"]) for row in rows})
    lines = [
        "PSNR in dB inside the brain, mean over persons; gain of the effective gate over the "
        "paper's with its 95 % bootstrap interval over persons, and persons better.",
        "",
        "| expert by paper or effective | geometries | cubic | paper | effective | gain | better |",
        "|" + " --- |" * 7,
    ]
    for title, where in (*((p, {"experts": p}) for p in pairs), ("all", {})):
        none, paper, effective = (
            by_person(rows, "psnr", gate=gate, **where) for gate in ("none", *GATES)
        )
        gain = [effective[p] - paper[p] for p in paper]
        low, high = bootstrap_interval(gain)
        count = sum(
            row["gate"] == "paper" and all(row[k] == v for k, v in where.items()) for row in rows
        )
        means = " | ".join(f"{np.mean(list(v.values())):.2f}" for v in (none, paper, effective))
        better = sum(g > 0 for g in gain)
        lines.append(
            f"| {title} | {count} | {means} | {np.mean(gain):+.2f} [{low:+.2f}, {high:+.2f}] | "
            f"{better}/{len(gain)} |"
        )
    return "\n".join(lines)
