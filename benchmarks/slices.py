"""How well the width of slices is found in scans, by their spacing and by noise.

    python benchmarks/slices.py PREPARED

``PREPARED`` is a folder of ``remix-experts prepare``. Persons of the validation split (or another),
but for those whose image is coarser than 1.2 mm, through acquisitions of the training bank, drawn
as in training, half of the sidecars silent about the thickness. Errors in mm of the width (FWHM) of
the Gaussian that blurs as much as the simulated slice: what is expected of the header alone, what
is measured, and what is used, which weighs the two. It prints a Markdown table; and one of scans
whose slices cannot be measured: the true width over the header's, and over what is expected.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from remix_bids.evaluation.restore import see
from remix_bids.simulation.acquisition import (
    coarsest_axes,
    draw,
    from_header,
    geometries,
    slice_axis,
)
from remix_bids.simulation.slices import (
    expected_width,
    from_scan,
    measurable,
    measure_slices,
    true_width,
    width_of_slices,
)
from remix_bids.training.dataset import Person, load_persons

CLASSES = range(2, 8)
BANDS = ((2, 3), (3, 4), (4, 5), (5, 6), (6, 9))  # mm between slices


def errors(person: Person, klass: int, noise: float, seed: tuple[int, ...]) -> list[float] | None:
    """Spacing, and errors of header, measurement and what is used, mm; None if not measured."""
    rng = np.random.default_rng(seed)
    bank = geometries(held_out=False)
    acquisition = draw(rng, bank, [person.world], klass)
    thickness = acquisition.thickness if rng.random() < 0.5 else None
    grid, world = acquisition.grid, acquisition.world
    native = see(person.image.float(), acquisition, noise, seed).numpy()
    told = from_header(grid, world, thickness)
    measured = measure_slices(native, told)
    if measured is None:
        return None
    used = width_of_slices(from_scan(native, grid, world, thickness))
    expected = expected_width(told)
    true = true_width(acquisition)
    spacing = float(grid.voxel_sizes[slice_axis(grid)])
    return [spacing, expected - true, measured - true, used - true]


def unmeasured(klass: int, draws: int) -> list[tuple[bool, float, float]]:
    """Of drawn acquisitions: voxels of one size; true width over header's, and over expected."""
    rng, bank = np.random.default_rng(klass), geometries(held_out=False)
    found = []
    for _ in range(draws):
        acquisition = draw(rng, bank, [np.eye(4)], klass)
        told = from_header(acquisition.grid, acquisition.world, acquisition.thickness)
        if not measurable(told):
            axes = coarsest_axes(acquisition.grid)
            true = float(np.mean([true_width(acquisition, axis) for axis in axes]))
            ratios = true / width_of_slices(told), true / expected_width(told)
            found.append((len(axes) == 3, *ratios))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--draws", type=int, default=3, help="acquisitions of a person and class")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.02])
    given = parser.parse_args()
    torch.set_num_threads(1)
    persons = [p for p in load_persons(given.prepared, given.split) if not p.coarse]
    print("| noise | mm between slices | scans | header, RMSE | measured, mean | SD | used, RMSE |")
    print("|" + " --- |" * 7)
    for noise in given.noise:
        found = np.array(
            [
                row
                for j in range(given.draws)
                for k in CLASSES
                for i, person in enumerate(persons)
                if (row := errors(person, k, noise, (8, j, k, i))) is not None
            ]
        ).reshape(-1, 4)
        for low, high in (*BANDS, (BANDS[0][0], BANDS[-1][1])):
            rows = found[(found[:, 0] >= low) & (found[:, 0] < high)]
            if len(rows):
                header, _, used = np.sqrt((rows[:, 1:] ** 2).mean(axis=0))
                mean, sd = rows[:, 2].mean(), rows[:, 2].std()
                print(
                    f"| {noise:.0%} | {low} to {high} | {len(rows)} | {header:.2f} | {mean:+.2f} "
                    f"| {sd:.2f} | {used:.2f} |",
                    flush=True,
                )
    print("\n| class | not measured | of 1000 | over header's | SD | over what is expected | SD |")
    print("|" + " --- |" * 7)
    for k in range(1, 8):
        all_of_k = unmeasured(k, 1000)
        for one_size, name in ((True, "voxels of one size"), (False, "thin slices, wide gaps")):
            rows = np.array([row[1:] for row in all_of_k if row[0] == one_size])
            if len(rows):
                (header, expected), (sd, left) = rows.mean(axis=0), rows.std(axis=0)
                numbers = f"{header:.2f} | {sd:.2f} | {expected:.2f} | {left:.2f}"
                print(f"| {k} | {name} | {len(rows)} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
