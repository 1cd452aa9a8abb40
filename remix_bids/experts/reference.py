"""Does this machine compute what the experts computed where they were exported?

Every expert is run on one small synthetic input; a few numbers of what it adds to it stand in
``experts.toml``. Another torch, processor or precision that computes something else is noticed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from remix_bids.experts.inference import predict
from remix_bids.experts.unet import ResidualUNet

SEED = 1
SHAPE = (40, 32, 48)
POINTS = 8
TOLERANCE = 1e-4
"""Largest difference that is accepted, relative to the root mean square of what an expert adds.

The order in which float32 numbers are summed makes 1e-6, half precision or TF32 1e-3 and more."""


def _uniform(count: int, seed: int) -> np.ndarray:
    """Numbers in [0, 1) from raw bits, which unlike distributions never change between versions."""
    return (np.random.PCG64(seed).random_raw(count) >> 11) * 2.0**-53


def reference_input() -> tuple[Tensor, Tensor]:
    """Blobs in thick slices, a margin that was not acquired, slices 4 mm apart.

    Returns
    -------
    (6, 40, 32, 48) float32 tensor
        Channels as in `remix_bids.experts.unet.INPUTS`.
    (4,) tensor
        As `remix_bids.experts.unet.SCAN`.
    """
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij", sparse=True)
    image = np.zeros(SHAPE)
    for a, b, c, width, height in _uniform(60, SEED).reshape(12, 5):
        distance = (x - a * SHAPE[0]) ** 2 + (y - b * SHAPE[1]) ** 2
        distance = distance + (4 * (z // 4) + 2 - c * SHAPE[2]) ** 2
        image = image + (0.2 + 0.4 * height) * np.exp(-distance / (2 * (2 + 5 * width) ** 2))
    image = image + 0.05 * _uniform(image.size, SEED + 1).reshape(SHAPE)
    covered = np.broadcast_to((z >= 4) & (z < 44), SHAPE)
    phase = np.broadcast_to(np.cos(2 * np.pi * z / 4), SHAPE)
    no_phase = np.zeros(SHAPE)
    rest = 0.02 * (_uniform(image.size, SEED + 3).reshape(SHAPE) - 0.5)
    channels = [image * covered, covered, no_phase, no_phase, phase * covered, rest * covered]
    return torch.from_numpy(np.stack(channels).astype(np.float32)), torch.tensor(
        [1.0, 1.0, 4.0, 0.01]
    )


def reference_output(network: ResidualUNet) -> tuple[float, ...]:
    """What a network adds to the reference input: root mean square, mean, and some voxels."""
    inputs, scan = reference_input()
    torch.set_num_threads(1)  # as in the app: their number changes the last digit
    added = (predict(network, inputs, scan) - inputs[0]).double().flatten()
    places = (_uniform(POINTS, SEED + 2) * len(added)).astype(int)
    values = [added.square().mean().sqrt(), added.mean(), *added[places.tolist()]]
    return tuple(float(f"{float(v):.9g}") for v in values)


def difference(found: tuple[float, ...], stored: tuple[float, ...]) -> float:
    """Largest difference of two reference outputs, relative to the stored root mean square.

    Infinite where they cannot be compared; `TOLERANCE` is what passes.
    """
    if len(found) != len(stored) or not np.isfinite([*found, *stored]).all():
        return float("inf")
    change = float(np.abs(np.subtract(found, stored)).max())
    return change / stored[0] if stored[0] > 0 else (0.0 if change == 0 else float("inf"))
