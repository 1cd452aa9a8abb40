"""What our own interpolation costs: 1 mm to a turned 1 mm grid and back, without any thick slice.

    python benchmarks/resampling.py PREPARED

``PREPARED`` is a folder of ``remix-experts prepare``. PSNR inside one validation brain,
and CPU time relative to the shipped setting, for linear interpolation and for the cubic B-spline
tabulated at 2, 3 and 4 nodes per output voxel, and for the shipped setting with torch's grid_sample
in place of our own look-ups. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from remix_bids import spatial
from remix_bids.evaluation.metrics import eroded, psnr
from remix_bids.training.dataset import load_persons

TURN = np.deg2rad([8.0, 14.0, -9.0])  # about the three axes


def turned() -> spatial.Grid:
    """The working grid, turned about its middle."""
    x, y, z = TURN
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    grid = spatial.WORKING_GRID
    middle = grid.affine @ np.array([*(np.array(grid.shape) - 1) / 2, 1])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ about_y
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2)
    return spatial.Grid(grid.shape, affine)


def by_grid_sample(image: Tensor, index: Tensor) -> Tensor:
    """What `spatial._sample_linear` does, by torch."""
    sizes = torch.tensor(image.shape).view(3, 1, 1, 1)
    # It wants coordinates in [-1, 1] and the last array axis first.
    grid = (2 * index / (sizes - 1) - 1).flip(0).movedim(0, -1)[None]
    return F.grid_sample(image[None, None], grid, padding_mode="border", align_corners=True)[0, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--repeats", type=int, default=5, help="in turn; medians are compared")
    given = parser.parse_args()
    torch.set_num_threads(1)
    person = next(p for p in load_persons(given.prepared, "validation") if not p.head)
    truth, grid, other = person.image.float(), spatial.WORKING_GRID, turned()
    there, back = spatial.index_map(other, grid), spatial.index_map(grid, other)
    mask = eroded(truth > 0.05, 4)
    shipped, own = spatial._NODES, spatial._sample_linear
    settings = {
        f"cubic, {shipped} nodes per voxel": ("cubic", shipped, own),
        "linear": ("linear", shipped, own),
        "cubic, 3 nodes per voxel": ("cubic", 3, own),
        "cubic, 4 nodes per voxel": ("cubic", 4, own),
        f"cubic, {shipped} nodes per voxel, grid_sample": ("cubic", shipped, by_grid_sample),
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    found = {}
    for turn in range(given.repeats + 1):
        for name, (order, spatial._NODES, spatial._sample_linear) in settings.items():
            start = time.process_time()
            image = spatial.resample(truth, there, other.shape, order)
            image = spatial.resample(image, back, grid.shape, order)
            if turn:  # the first one also makes the splines' matrices
                seconds[name].append(time.process_time() - start)
            found[name] = psnr(image, truth, mask)
    first = np.median(seconds[next(iter(settings))])
    print("| interpolation | PSNR, dB | CPU time, ratio |\n| --- | --- | --- |")
    for name, value in found.items():
        print(f"| {name} | {value:.1f} | {np.median(seconds[name]) / first:.2f} |")


if __name__ == "__main__":
    main()
