"""Ways of getting from an acquired image to the working grid; all see the same native voxels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from remix_bids.experts.inference import enhance
from remix_bids.experts.registry import ExpertRecord
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import Acquisition
from remix_bids.simulation.degrade import acquire, restore_grid
from remix_bids.simulation.estimate import Estimate
from remix_bids.spatial import Grid, coverage, index_map, resample


def interpolate(native: Tensor, acquisition: Acquisition, grid: Grid, order: str) -> Tensor:
    """No model: linear or cubic interpolation."""
    return restore_grid(native, acquisition.grid, acquisition.world, grid, order=order).image


def back_project(
    native: Tensor,
    acquisition: Acquisition,
    grid: Grid,
    start: Tensor,
    iterations: int,
    step: float,
    lowest: float = 0.0,
    nothing_beyond: bool = False,
) -> Iterator[Tensor]:
    """Iterative back-projection (Irani and Peleg 1991): x <- x + step B(y - A x).

    A is the acquisition with its true slice profile, B cubic interpolation; no value falls below
    ``lowest``. Yields every iterate, 0 where nothing was acquired. What the scanner saw of that
    nevertheless is taken to be the scan's border, repeated: else the edge would ring into the
    image; but for a scan of which there was ``nothing_beyond``.
    """
    x = start
    mapping = index_map(grid, acquisition.grid, acquisition.world)
    covered = coverage(mapping, acquisition.grid.shape, grid.shape, like=native)
    beyond = 0 * start if nothing_beyond else resample(native, mapping, grid.shape)
    for _ in range(iterations):
        missing = native - acquire(torch.where(covered, x, beyond), acquisition, grid)
        back = restore_grid(missing, acquisition.grid, acquisition.world, grid)
        x = (x + step * back.image).clamp(min=lowest) * back.covered
        yield x


def run_expert(low: Estimate, record: ExpertRecord, network: ResidualUNet) -> Tensor:
    """An expert on the linear estimate."""
    return torch.from_numpy(enhance(low, record, network=network))
