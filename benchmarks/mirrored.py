"""What is gained by the mean over mirrored inputs, by class: of one pass, two, and all eight.

    python benchmarks/mirrored.py PREPARED

``PREPARED`` is a folder of ``remix-experts prepare``. Cubes of the validation persons through
acquisitions of the training bank, half of them noisy; the general network, PSNR (dB) above its
input. It prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remix_bids.evaluation.restore import registry_of
from remix_bids.evaluation.table import markdown_table
from remix_bids.experts.inference import load_expert, predict
from remix_bids.experts.registry import GENERAL
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import geometries
from remix_bids.training.dataset import Simulator, load_persons
from remix_bids.training.trainer import psnr_of_unit

HEAD = ["class", "one pass", "mirrored along one axis", "as shipped", "all eight"]
FLIPS = [axes for count in range(4) for axes in combinations((1, 2, 3), count)]


@torch.inference_mode()
def mean_over(
    network: ResidualUNet, inputs: Tensor, scan: Tensor, flips: Sequence[tuple[int, ...]]
) -> Tensor:
    total = torch.zeros_like(inputs[0])
    for axes in flips:
        back = [axis - 1 for axis in axes]
        total += network(inputs.flip(axes)[None], scan[None])[0, 0].flip(back)
    return total / len(flips)


def gains(network: ResidualUNet, simulator: Simulator, volumes: int) -> list[float]:
    found = []
    for index in range(volumes):
        pair, _ = simulator.pair(index)
        mask = (pair.inputs[1] > 0) & (pair.target > 0.05)
        outputs = {
            "input": pair.inputs[0],
            "one pass": mean_over(network, pair.inputs, pair.scan, FLIPS[:1]),
            "mirrored along one axis": mean_over(network, pair.inputs, pair.scan, FLIPS[:2]),
            "as shipped": predict(network, pair.inputs, pair.scan),
            "all eight": mean_over(network, pair.inputs, pair.scan, FLIPS),
        }
        before, *after = (psnr_of_unit(output, pair.target, mask) for output in outputs.values())
        found.append([value - before for value in after])
    return np.mean(found, axis=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--volumes", type=int, default=10, help="of each class")
    parser.add_argument("--experts-dir", type=Path)
    given = parser.parse_args()
    network = load_expert(registry_of(given.experts_dir)[GENERAL])
    persons = load_persons(given.prepared, "validation")
    mask = torch.from_numpy(np.load(given.prepared / "strip_mask.npy", allow_pickle=False))
    bank = geometries(held_out=False)
    body = []
    for k in range(1, 8):
        only = tuple(float(c == k) for c in range(1, 8))
        simulator = Simulator(persons, bank, mask, only, 4000 + k, cube=96)
        found = gains(network, simulator.for_validation(4000 + k), given.volumes)
        body.append([str(k), *(f"{gain:.3f}" for gain in found)])
    print("\n".join(markdown_table(HEAD, body)))


if __name__ == "__main__":
    main()
