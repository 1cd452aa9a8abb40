"""What an expert gains over cubic interpolation, by how sharp the image is that was scanned.

    python benchmarks/sharpness.py PREPARED --persons 2

``PREPARED`` is a folder of ``remix-experts prepare``. Scanners differ in how sharp their millimetre
is: brains of the validation split are blurred or sharpened as the augmentation of training does,
then seen through acquisitions of the training bank. PSNR (dB, inside the brain) of the expert alone
less that of cubic interpolation, mean over the cases of a class. It prints Markdown tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from remix_bids.evaluation.metrics import eroded, psnr
from remix_bids.evaluation.restore import as_told, registry_of, restore, see
from remix_bids.evaluation.settings import CUBIC
from remix_bids.experts.registry import Registry
from remix_bids.simulation.acquisition import draw, geometries
from remix_bids.simulation.degrade import field_of_view
from remix_bids.training.dataset import Person, crop_to_foreground, load_persons, sharpened

AMOUNTS = (-0.8, -0.4, 0.0, 0.4)  # of what a blur of one voxel takes away


def gains(
    person: Person, klass: int, noise: float, seed: tuple[int, ...], experts: Registry
) -> list[float]:
    """One for each of `AMOUNTS`, through the same acquisition and noise."""
    rng = np.random.default_rng(seed)
    acquisition = draw(rng, geometries(held_out=False), [person.world], klass)
    found = []
    for amount in AMOUNTS:
        truth = sharpened(person.image.float(), amount)
        crop, grid = crop_to_foreground(truth, 64)
        native, truth = see(truth, acquisition, noise, seed), truth[crop]
        made = restore(native, as_told(native, acquisition), grid, [experts[str(klass)]])
        seen = field_of_view(acquisition)
        mask = eroded((truth > 0.05) & seen[crop], 2)
        found.append(psnr(made[str(klass)], truth, mask) - psnr(made[CUBIC], truth, mask))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--persons", type=int, default=2, help="brains of the validation split")
    parser.add_argument("--classes", type=int, nargs="+", default=range(1, 8))
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.02])
    parser.add_argument("--experts-dir", type=Path)
    given = parser.parse_args()
    experts = registry_of(given.experts_dir)
    persons = [p for p in load_persons(given.prepared, "validation") if not p.head]
    for noise in given.noise:
        heading = " | ".join(f"{amount:+.1f}" for amount in AMOUNTS)
        print(f"\nnoise {noise:.0%}\n\n| class | {heading} |\n|" + " --- |" * (len(AMOUNTS) + 1))
        for k in given.classes:
            cases = [
                gains(person, k, noise, (8, k, i), experts)
                for i, person in enumerate(persons[: given.persons])
            ]
            values = " | ".join(f"{v:+.2f}" for v in np.mean(cases, axis=0))
            print(f"| {k} | {values} |", flush=True)


if __name__ == "__main__":
    main()
