"""What each part of the recipe is worth: one expert trained without it, for a short while.

    python benchmarks/ablations.py PREPARED --steps 300 --out docs/evidence/ablations.md

``PREPARED`` is a folder of ``remix-experts prepare``. Every arm takes the same steps on patches of
one class; all but one begin with the shipped general network. Gains over the linear estimate on
validation persons, half of the volumes noisy. One seed: read differences, and none below 0.05 dB.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from commit import commit
from variants import patches, restored, train

from remix_bids.evaluation.metrics import correlation, psnr, ssim
from remix_bids.experts.inference import load_expert
from remix_bids.experts.registry import GENERAL, load_registry
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import geometries
from remix_bids.training.dataset import Simulator, load_persons
from remix_bids.training.losses import PARTS, RemixLoss
from remix_bids.training.trainer import forward_parts

WHOLE = "whole recipe"
ARMS = (WHOLE, *(f"loss without {part}" for part in PARTS), "not transferred", "no slice profile")
RATE, RATE_FROM_SCRATCH = 4e-4, 1e-3


def loss_of(arm: str, whole: RemixLoss) -> RemixLoss:
    """The calibrated loss, without the part that an arm leaves out."""
    kept = [0.0 if arm.endswith(f"without {part}") else 1.0 for part in PARTS]
    return replace(whole, factors=tuple(f * k for f, k in zip(whole.factors, kept, strict=True)))


def begin(arm: str) -> tuple[ResidualUNet, float]:
    """The network that an arm begins with, and its rate."""
    torch.manual_seed(0)
    shipped = load_expert(load_registry()[GENERAL])
    if arm == "not transferred":
        return ResidualUNet(shipped.inputs, shipped.widths), RATE_FROM_SCRATCH
    return shipped.train(), RATE


def measure(network: ResidualUNet, pairs: list) -> list[float]:
    """Mean gains in PSNR, SSIM and correlation over the linear estimate."""
    gains = []
    for pair in pairs:
        out, low, y, mask = restored(network, pair)
        gains.append([m(out, y, mask) - m(low, y, mask) for m in (psnr, ssim, correlation)])
    return np.mean(gains, axis=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--expert", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--volumes", type=int, default=24)
    parser.add_argument("--out", type=Path, help="also write the table there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    strip = torch.from_numpy(np.load(given.prepared / "strip_mask.npy", allow_pickle=False))
    own = tuple(float(k == given.expert) for k in range(1, 8))

    def simulator(split: str, seed: int) -> Simulator:
        bank = geometries(held_out=False)
        return Simulator(load_persons(given.prepared, split), bank, strip, own, seed=seed)

    told = simulator("train", 5026)
    pool = patches(told, given.volumes)
    points = patches(replace(told, profile=False), given.volumes)
    unseen = simulator("validation", 2033).for_validation(2033)
    pairs = [unseen.pair(i)[0] for i in range(12)]
    with torch.no_grad():
        first = {key: value[:32] for key, value in pool.items()}
        whole = RemixLoss().calibrated(forward_parts(None, first, RemixLoss(), 4))
    lines = [
        "# What each part of the recipe is worth",
        "",
        f"`python benchmarks/ablations.py PREPARED --expert {given.expert} --steps {given.steps}` "
        f"at commit {commit()}: one seed, expert {given.expert}, {given.steps} steps for each arm, "
        f"{len(pairs)} volumes of validation persons, half of them noisy.",
        "",
        "| arm | PSNR gain, dB | SSIM gain | correlation gain |",
        "| --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for arm in ARMS:
        network, rate = begin(arm)
        data = points if arm == "no slice profile" else pool
        train(network, rate, data, given.steps, loss_of(arm, whole))
        decibels, similar, correlated = measure(network, pairs)
        lines.append(f"| {arm} | {decibels:+.2f} | {similar:+.4f} | {correlated:+.5f} |")
        print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
