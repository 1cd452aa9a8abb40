"""What feeds the network: interpolation, the linear estimate, back-projection, side by side.

    python benchmarks/estimate.py PREPARED --persons 2

``PREPARED`` is a folder of ``remix-experts prepare``. PSNR inside the brain of validation persons
through acquisitions of training, mean over the cases of a class; the estimate also without its
second look and with other assumptions about the covariance of a brain and about the noise;
back-projection also with profiles that are 15 % too narrow or too wide. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from remix_bids.evaluation.cases import Case, cases
from remix_bids.evaluation.methods import back_project
from remix_bids.evaluation.metrics import eroded, psnr
from remix_bids.evaluation.restore import as_told, see
from remix_bids.simulation import estimate
from remix_bids.simulation.degrade import restore_grid
from remix_bids.training.dataset import crop_to_foreground, load_persons

VARIANTS = ((1.0, 2e-4), (1.3, 2e-5), (1.3, 2e-4), (1.3, 2e-3), (1.6, 2e-4))  # power, noise
ITERATES = (1, 2, 4)
WRONG = (0.85, 1.15)  # widths that back-projection is told, relative to the true ones


def run(case: Case) -> dict[str, float]:
    truth = case.person.image.float()
    crop, grid = crop_to_foreground(truth, 64)
    acquisition = case.acquisition()
    native = see(truth, acquisition, case.noise, case.seed)
    truth = truth[crop]
    low = restore_grid(native, acquisition.grid, acquisition.world, grid)
    mask = eroded((truth > 0.05) & low.covered, 2)
    told = as_told(native, acquisition)
    images = {"cubic": low.image}
    for i, x in enumerate(back_project(native, acquisition, grid, low.image, max(ITERATES), 1.0)):
        if i + 1 in ITERATES:
            images[f"back-projection, {i + 1}, true profile"] = x
    for factor in WRONG:
        x, y, z = (factor * width for width in acquisition.widths)
        wrong = replace(acquisition, widths=(x, y, z))
        *_, images[f"back-projection, {max(ITERATES)}, widths times {factor}"] = back_project(
            native, wrong, grid, low.image, max(ITERATES), 1.0
        )
    first = estimate.estimate_image(native, told, grid).clamp(min=0) * low.covered
    missing = estimate.unexplained(first, native, told, grid)
    images["estimate, one look"] = first
    images["estimate, two looks, noise ignored"] = (
        first + estimate.estimate_image(missing, told, grid) * low.covered
    )
    shipped = estimate.POWER, estimate.NOISE
    for estimate.POWER, estimate.NOISE in (*VARIANTS, shipped):
        estimate._table_matrix.cache_clear()  # made with the numbers of before
        name = f"estimate, power {estimate.POWER}, noise {estimate.NOISE:g}"
        images[name] = estimate.linear_estimate(native, told, grid).image
    return {name: psnr(image, truth, mask) for name, image in images.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--persons", type=int, default=2, help="brains of the validation split")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.02])
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = resources.files("remix_bids.data").joinpath("protocol.toml").read_text()
    persons = [p for p in load_persons(given.prepared, "validation") if not p.head]
    protocol = tomllib.loads(text) | {"geometries_per_person": 1}
    for noise in given.noise:
        columns = []
        for k in given.classes:
            found = [run(case) for case in cases(persons[: given.persons], protocol, [k], [noise])]
            columns.append({name: np.mean([row[name] for row in found]) for name in found[0]})
        print(f"\nnoise {noise:.0%}\n\n| input | {' | '.join(map(str, given.classes))} | mean |")
        print("|" + " --- |" * (len(given.classes) + 2))
        for name in columns[0]:
            values = [column[name] for column in columns]
            print(f"| {name} | {' | '.join(f'{v:.2f}' for v in [*values, np.mean(values)])} |")


if __name__ == "__main__":
    main()
