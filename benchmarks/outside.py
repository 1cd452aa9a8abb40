"""What the experts do with scans far outside the training data.

    python benchmarks/outside.py PREPARED --persons 2

``PREPARED`` is a folder of ``remix-experts prepare``. Brains of the validation split through
acquisitions of the training bank whose slices are thicker, or whose noise or contrast is another
than any in training; PSNR (dB) inside the brain of what the app would write, of cubic
interpolation, and of the linear estimate that feeds the network; the gain over cubic interpolation
by person. A person's geometry is the same but for the voxel sizes. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from remix_bids.evaluation.metrics import eroded, psnr
from remix_bids.evaluation.restore import as_shipped, as_told, registry_of, restore, see
from remix_bids.evaluation.settings import CUBIC, ESTIMATE
from remix_bids.experts.registry import Registry
from remix_bids.simulation.acquisition import SyntheticShape, geometries, place
from remix_bids.simulation.degrade import field_of_view
from remix_bids.training.dataset import Person, crop_to_foreground, load_persons


@dataclass(frozen=True)
class Outside:
    """Voxel sizes in mm, noise in units of bright tissue; training ends at 9 mm3 and 3 %."""

    name: str
    in_plane: float
    spacing: float
    noise: float = 0.0
    inverted: bool = False


TRIED = (
    Outside("1 x 1 x 7 mm, as in training", 1.0, 7.0),
    Outside("1 x 1 x 10 mm", 1.0, 10.0),
    Outside("1 x 1 x 12 mm", 1.0, 12.0),
    Outside("3 x 3 x 3 mm", 3.0, 3.0),
    Outside("1 x 1 x 5 mm, noise of 3 %, as in training", 1.0, 5.0, noise=0.03),
    Outside("1 x 1 x 5 mm, noise of 6 %", 1.0, 5.0, noise=0.06),
    Outside("1 x 1 x 5 mm, noise of 10 %", 1.0, 5.0, noise=0.1),
    Outside("1 x 1 x 5 mm, as in training", 1.0, 5.0),
    Outside("1 x 1 x 5 mm, contrast inverted", 1.0, 5.0, inverted=True),
)


def inverted(image: Tensor) -> Tensor:
    """Dark where a brain was bright, as in a T2w; air stays air."""
    return (1.2 - image).clamp(min=0.05) * (image > 0.05)


def measured(person: Person, outside: Outside, seed: list[int], experts: Registry) -> list[float]:
    """PSNR of cubic interpolation, the estimate and the app."""
    rng = np.random.default_rng(seed)
    bank = geometries(held_out=False)
    shape = SyntheticShape(outside.in_plane, outside.spacing, 0.0)
    acquisition = place(bank[rng.integers(len(bank))], person.world, rng, shape=shape)
    truth = person.image.float()
    truth = inverted(truth) if outside.inverted else truth
    crop, grid = crop_to_foreground(truth, 64)
    native = see(truth, acquisition, outside.noise, seed)
    record, told = experts.select(acquisition.volume), as_told(native, acquisition)
    made = restore(native, told, grid, [record])
    shipped = as_shipped(made[record.name], made[CUBIC], native, told, grid, record)
    seen = field_of_view(acquisition)
    truth = truth[crop]
    mask = eroded((truth > 0.05) & seen[crop], 2)
    return [psnr(image, truth, mask) for image in (made[CUBIC], made[ESTIMATE], shipped)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--persons", type=int, default=2, help="brains of the validation split")
    parser.add_argument("--experts-dir", type=Path)
    given = parser.parse_args()
    experts = registry_of(given.experts_dir)
    persons = [p for p in load_persons(given.prepared, "validation") if not p.head]
    print("| scan | cubic | estimate | app | app over cubic |\n| --- | --- | --- | --- | --- |")
    for outside in TRIED:
        rows = [
            measured(person, outside, [12, i], experts)
            for i, person in enumerate(persons[: given.persons])
        ]
        cubic, estimate, app = np.mean(rows, axis=0)
        gains = ", ".join(f"{row[2] - row[0]:+.2f}" for row in rows)
        means = f"{cubic:.2f} | {estimate:.2f} | {app:.2f}"
        print(f"| {outside.name} | {means} | {gains} |", flush=True)


if __name__ == "__main__":
    main()
