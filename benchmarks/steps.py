"""What consistency steps after the network gain, by number, assumed slice profile and noise.

    python benchmarks/steps.py PREPARED --persons 2

``PREPARED`` is a folder of ``remix-experts prepare``. Brains of the validation split through
acquisitions of the training bank, drawn as in training, half of the sidecars silent about the
thickness. PSNR (dB) against that of the network alone, mean over the cases of a class: after one
step and more, as they ship (giving way to noise); quarters of a step, and the best of them for each
scan; without noise a whole step by the width of the slices that it assumes, relative to the one
used, and with the true width; the network itself, told wider and thinner slices, without
steps; and back-projection, as it is tuned for the protocol, told the true profile, wider and
thinner ones. With ``--interpolate`` the planes of the scan come on a finer matrix,
as many scanners give them, which hides their noise from who looks at neighbours. It prints Markdown
tables.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample
from torch import Tensor

from remix_bids.evaluation.methods import back_project, interpolate
from remix_bids.evaluation.metrics import eroded, psnr
from remix_bids.evaluation.restore import registry_of, see
from remix_bids.experts.inference import enhance, load_expert
from remix_bids.experts.registry import Registry
from remix_bids.simulation import estimate
from remix_bids.simulation.acquisition import Acquisition, draw, geometries, slice_axis
from remix_bids.simulation.slices import from_scan, true_width, width_of_slices, with_width
from remix_bids.spatial import Grid
from remix_bids.training.dataset import Person, crop_to_foreground, load_persons

MOST_STEPS = 3
SHARES = (0.25, 0.5, 0.75, 1.0)
WIDTHS = (0.8, 0.9, 1.0, 1.1, 1.2)  # of slices, relative to the one used
MISTOLD = (0.85, 1.15)  # the same, of what the network is told


def step(image: Tensor, native: Tensor, told: Acquisition, grid: Grid) -> Tensor:
    """What a whole step adds, whatever the noise."""
    missing = estimate.unexplained(image, native, told, grid)
    return estimate.estimate_image(missing, told, grid)


def zero_filled(
    native: Tensor, acquisition: Acquisition, factor: float
) -> tuple[Tensor, Acquisition]:
    """The scan with ``factor`` times as many rows and columns: zeros around its k-space."""
    data, scale = native.numpy(), np.ones(4)
    for axis in {0, 1, 2} - {slice_axis(acquisition.grid)}:
        n = data.shape[axis]
        data = resample(data, round(factor * n), axis=axis)
        scale[axis] = n / data.shape[axis]
    x, y, z = data.shape
    grid = Grid((x, y, z), acquisition.grid.affine @ np.diag(scale))
    return torch.from_numpy(np.abs(data)), replace(acquisition, grid=grid)


def run(
    person: Person,
    klass: int,
    noise: float,
    seed: tuple[int, ...],
    experts: Registry,
    zeros: float,
    tuned: list[tuple[int, float]],
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    bank = geometries(held_out=False)
    acquisition = draw(rng, bank, [person.world], klass)
    thickness = acquisition.thickness if rng.random() < 0.5 else None
    truth = person.image.float()
    crop, grid = crop_to_foreground(truth, 64)
    native, truth = see(truth, acquisition, noise, seed), truth[crop]
    if zeros > 1:
        native, acquisition = zero_filled(native, acquisition, zeros)
    told = from_scan(native.numpy(), acquisition.grid, acquisition.world, thickness)
    low = estimate.linear_estimate(native, told, grid)
    record = experts[str(klass)]
    network = load_expert(record)
    image = torch.from_numpy(enhance(low, record, network=network))
    mask = eroded((truth > 0.05) & low.covered, 2)
    before = psnr(image, truth, mask)
    found = {}
    for count in range(1, MOST_STEPS + 1):
        stepped, _ = estimate.make_consistent(image, native, told, grid, count)
        found["1 step" if count == 1 else f"{count} steps"] = psnr(stepped, truth, mask) - before

    def gain(addition: Tensor) -> float:
        return psnr((image + addition).clamp(min=0), truth, mask) - before

    addition = step(image, native, told, grid)
    parts = {f"{share:.0%} of a step": gain(share * addition) for share in SHARES}
    found |= parts | {"the best of these and none": max(0.0, *parts.values())}
    if not noise:
        used = width_of_slices(told)
        assumed = {f"width times {factor}": factor * used for factor in WIDTHS}
        assumed["true width"] = true_width(acquisition)
        for name, width in assumed.items():
            found[name] = gain(step(image, native, with_width(told, width), grid))
        for factor in MISTOLD:
            mistold = estimate.linear_estimate(native, with_width(told, factor * used), grid)
            other = torch.from_numpy(enhance(mistold, record, network=network))
            found[f"network told width times {factor}"] = psnr(other, truth, mask) - before
        iterations, share = tuned[klass - 1]
        cubic = interpolate(native, acquisition, grid, "cubic")
        for factor in (1.0, *MISTOLD):
            assumed_to_be = with_width(acquisition, factor * width_of_slices(acquisition))
            *_, other = back_project(native, assumed_to_be, grid, cubic, iterations, share)
            name = f"back-projection told true width times {factor}"
            found[name] = psnr(other, truth, mask) - before
    return found


def cases(given: argparse.Namespace, noise: float, k: int) -> Iterator[dict[str, float]]:
    experts = registry_of(given.experts_dir)
    persons = [p for p in load_persons(given.prepared, "validation") if not p.head]
    protocol = resources.files("remix_bids.data").joinpath("protocol.toml").read_text()
    tuned = tomllib.loads(protocol)["back_projection"]["clean"]
    for i, person in enumerate(persons[: given.persons]):
        for j in range(given.draws):
            yield run(person, k, noise, (given.seed, j, k, i), experts, given.interpolate, tuned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--persons", type=int, default=2, help="brains of the validation split")
    parser.add_argument("--classes", type=int, nargs="+", default=range(1, 8))
    parser.add_argument("--draws", type=int, default=2, help="acquisitions for each")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.005, 0.01, 0.02])
    parser.add_argument("--seed", type=int, default=6, help="another one draws other acquisitions")
    parser.add_argument("--interpolate", type=float, default=1.0, help="rows and columns, times")
    parser.add_argument("--experts-dir", type=Path)
    given = parser.parse_args()
    for noise in given.noise:
        columns = [list(cases(given, noise, k)) for k in given.classes]
        print(f"\nnoise {noise:.1%}\n\n| step | {' | '.join(map(str, given.classes))} | mean |")
        print("|" + " --- |" * (len(given.classes) + 2))
        for name in columns[0][0]:
            values = [float(np.mean([row[name] for row in rows])) for rows in columns]
            values.append(float(np.mean(values)))
            print(f"| {name} | {' | '.join(f'{v:+.2f}' for v in values)} |", flush=True)


if __name__ == "__main__":
    main()
