"""What the network sees, how it is built and how it learns: short trainings on the same patches.

    python benchmarks/variants.py PREPARED --steps 400 --volumes 48

``PREPARED`` is a folder of ``remix-experts prepare``. Class 4 volumes of brains without
augmentation, half of them noisy; the gain in PSNR over the linear estimate on thick slices and on
nearly isotropic voxels of validation persons. So short a training from nothing tells little: other
starts (``--seed``) may differ by more than the variants. Arithmetic is that of one pass beside one
of SynthSR's network, as in `network.py`. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from network import SYNTHSR_GRID, gigaflops, synthsr

from remix_bids.experts import unet
from remix_bids.simulation.acquisition import geometries
from remix_bids.training.dataset import OFF, Pair, Simulator, cut_patch, load_persons
from remix_bids.training.losses import RemixLoss
from remix_bids.training.trainer import forward_parts, half_precision, psnr_of_unit

FACTORS = (1.0, 0.4, 0.15, 0.2)
CLASS_4 = (0, 0, 0, 1, 0, 0, 0)


class Blind(unet.ResidualUNet):
    """Not told the voxel sizes, but for the size of what is to be added."""

    def forward(self, x: torch.Tensor, scan: torch.Tensor) -> torch.Tensor:
        scan = scan.clone()
        scan[:, :3] = scan[:, :3].amax(dim=1, keepdim=True)
        return super().forward(x, scan)


class Deaf(unet.ResidualUNet):
    """Not told the noise."""

    def forward(self, x: torch.Tensor, scan: torch.Tensor) -> torch.Tensor:
        return super().forward(x, scan * torch.tensor([1.0, 1.0, 1.0, 0.0]))


class Alone(unet.ResidualUNet):
    """Sees the linear estimate and what was covered, not what the estimate leaves of the scan."""

    def forward(self, x: torch.Tensor, scan: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([x[:, :5], 0 * x[:, 5:]], dim=1), scan)


class Phaseless(unet.ResidualUNet):
    """Not shown where the scan was sampled."""

    def forward(self, x: torch.Tensor, scan: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([x[:, :2], 0 * x[:, 2:5], x[:, 5:]], dim=1), scan)


class Strided(unet.ResidualUNet):
    """Its stem is a convolution with stride 2, to as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = torch.nn.Conv3d(self.inputs, 8 * self.inputs, 3, stride=2, padding=1)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.learned(x)


class Unscaled(unet.ResidualUNet):
    """The last layer gives the residual itself."""

    def forward(self, x: torch.Tensor, scan: torch.Tensor) -> torch.Tensor:
        scale = unet.residual_scale(scan)[:, None, None, None, None]
        image = x[:, :1]
        return image + (super().forward(x, scan) - image) / scale


VARIANTS = {
    "narrow: 32, 64, 128": (unet.ResidualUNet, 5e-4),
    "narrow, rate 1e-3": (unet.ResidualUNet, 1e-3),
    "as shipped: 32, 80, 192": (partial(unet.ResidualUNet, widths=(32, 80, 192)), 5e-4),
    "wide at the top: 48, 96, 128": (partial(unet.ResidualUNet, widths=(48, 96, 128)), 5e-4),
    "deeper: 32, 64, 128, 128": (partial(unet.ResidualUNet, widths=(32, 64, 128, 128)), 5e-4),
    "stem of strided convolutions": (Strided, 5e-4),
    "without slice phases": (Phaseless, 5e-4),
    "without the rest of the estimate": (Alone, 5e-4),
    "not told the voxel sizes": (Blind, 5e-4),
    "not told the noise": (Deaf, 5e-4),
    "residual not scaled": (Unscaled, 5e-4),
}


def train(
    network: unet.ResidualUNet,
    rate: float,
    pool: dict[str, torch.Tensor],
    steps: int,
    loss: RemixLoss,
) -> None:
    """A short training on patches that are all there."""
    optimiser = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = (
                rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
            )
        pick = torch.randint(len(pool["detail"]), (2,), generator=generator)
        value = loss(forward_parts(network, {k: v[pick] for k, v in pool.items()}, loss, 4))
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()


def patches(simulator: Simulator, volumes: int) -> dict[str, torch.Tensor]:
    """All patches of some volumes."""
    drawn = [
        cut_patch(sample, i, simulator.patch)
        for sample in map(simulator.__getitem__, range(volumes))
        for i in range(simulator.patches_per_volume)
    ]
    return {key: torch.stack([one[key] for one in drawn]) for key in drawn[0]}


@torch.no_grad()
def restored(network: unet.ResidualUNet, pair: Pair) -> tuple[torch.Tensor, ...]:
    """Output, input and target in the middle of a simulated volume, and where the head is."""
    middle = slice(16, 112)
    x, y = pair.inputs[:, middle, middle, middle], pair.target[middle, middle, middle]
    with half_precision(x, len(network.widths)):
        out = network(x[None], pair.scan[None])[0, 0].float()
    return out, x[0], y, (x[1] > 0) & (y > 0.05)


def gain(network: unet.ResidualUNet, pair: Pair) -> float:
    out, low, y, mask = restored(network, pair)
    return psnr_of_unit(out, y, mask) - psnr_of_unit(low, y, mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--volumes", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of what a network starts with")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bank = geometries(held_out=False)
    strip = torch.from_numpy(np.load(given.prepared / "strip_mask.npy", allow_pickle=False))

    def simulator(split: str, seed: int) -> Simulator:
        brains = [p for p in load_persons(given.prepared, split) if not p.head]
        return Simulator(
            brains,
            bank,
            strip,
            CLASS_4,
            seed=seed,
            patches_per_volume=16,
            augment=replace(OFF, noise=0.5),
        )

    pool = patches(simulator("train", 3026), given.volumes)
    pairs = [simulator("validation", 2033).pair(i)[0] for i in range(8)]
    thick = [p for p in pairs if p.scan[:3].max() > 3]
    other = [p for p in pairs if p.scan[:3].max() <= 3]
    print(
        f"| variant, {given.steps} steps | thick slices ({len(thick)}) | others ({len(other)}) | "
        "arithmetic |"
    )
    print("| --- | --- | --- | --- |")
    _, theirs = synthsr()
    for name in given.only:
        kind, rate = VARIANTS[name]
        torch.manual_seed(given.seed)
        network = kind()
        train(network, rate, pool, given.steps, RemixLoss(FACTORS))
        means = [np.mean([gain(network, p) for p in group]) for group in (thick, other)]
        share = gigaflops(kind, SYNTHSR_GRID) / theirs
        print(f"| {name} | {means[0]:+.2f} | {means[1]:+.2f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
