"""What evaluation, lesions and gates share: one image seen by a scanner, and restored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remix_bids.evaluation.methods import interpolate, run_expert
from remix_bids.evaluation.settings import CUBIC, ESTIMATE
from remix_bids.experts.inference import load_expert
from remix_bids.experts.registry import ExpertRecord, Registry, is_fine_enough, load_registry
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import Acquisition
from remix_bids.simulation.degrade import acquire, add_rician_noise, seen_from
from remix_bids.simulation.estimate import linear_estimate, make_consistent
from remix_bids.simulation.slices import from_scan
from remix_bids.spatial import Grid


@lru_cache(maxsize=8)
def _network(record: ExpertRecord) -> ResidualUNet:
    return load_expert(record)


def registry_of(experts_dir: Path | None) -> Registry:
    """The experts of a folder; on one thread, whose number changes the last digit."""
    torch.set_num_threads(1)
    return load_registry(experts_dir)


def see(
    truth: Tensor,
    acquisition: Acquisition,
    noise: float,
    seed: Sequence[int],
    brain: Tensor | None = None,
) -> Tensor:
    """The native image of ``truth`` (on the working grid), with Rician noise.

    Parameters
    ----------
    noise : float
        In units of the brain's 75th percentile.
    seed : sequence of int
        The same seed draws the same noise.
    brain : (x, y, z) bool tensor, optional
        Where the brain lies in a head.
    """
    native = acquire(truth, acquisition).clamp(min=0)  # a magnitude
    if noise > 0:
        bright = truth > 0.1 if brain is None else brain & (truth > 0.1)
        sigma = noise * float(truth[bright].quantile(0.75))
        number = int(np.random.default_rng([*seed, 1]).integers(2**62))
        native = add_rician_noise(native, sigma, torch.Generator().manual_seed(number))
    return native


def as_told(native: Tensor, acquisition: Acquisition) -> Acquisition:
    """What the app would know of an acquisition: its header, and what the scan itself shows."""
    grid, world = acquisition.grid, acquisition.world
    return from_scan(native.cpu().numpy(), grid, world, acquisition.thickness)


def restore(
    native: Tensor, told: Acquisition, grid: Grid, records: Iterable[ExpertRecord]
) -> dict[str, Tensor]:
    """Cubic interpolation, the linear estimate, and some experts on it.

    Parameters
    ----------
    told : Acquisition
        See `as_told`.

    Returns
    -------
    dict of str to (x, y, z) tensor on ``grid``
        Keys are `CUBIC`, `ESTIMATE` and the names of the experts.
    """
    estimate = linear_estimate(native, told, grid)
    results = {CUBIC: interpolate(native, told, grid, "cubic"), ESTIMATE: estimate.image}
    for record in records:
        results[record.name] = run_expert(estimate, record, _network(record))
    return results


def as_shipped(
    expert: Tensor,
    cubic: Tensor,
    native: Tensor,
    told: Acquisition,
    grid: Grid,
    record: ExpertRecord,
) -> Tensor:
    """What the app would write (`SHIPS`), made of what `restore` gives."""
    if is_fine_enough(told.grid.voxel_sizes):
        return cubic
    if not record.consistency_steps:
        return expert
    image, _ = make_consistent(expert, native, told, grid, record.consistency_steps)
    return seen_from(image, told.grid, told.world, grid).image
