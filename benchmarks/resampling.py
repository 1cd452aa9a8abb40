"""What our own interpolation costs: 1 mm to a turned 1 mm grid and back, without any thick slice.

    python benchmarks/resampling.py PREPARED

``PREPARED`` is a folder of ``remix-experts prepare``. PSNR inside one validation brain,
and CPU time relative to the shipped setting, for linear interpolation and for the cubic B-spline
tabulated at 2, 3 and 4 nodes per output voxel. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    person = next(p for p in load_persons(given.prepared, "validation") if not p.head)
    truth, grid, other = person.image.float(), spatial.WORKING_GRID, turned()
    there, back = spatial.index_map(other, grid), spatial.index_map(grid, other)
    mask = eroded(truth > 0.05, 4)
    shipped, rows = spatial._NODES, []
    for order, nodes in (("cubic", shipped), ("linear", shipped), ("cubic", 3), ("cubic", 4)):
        spatial._NODES = nodes
        start = time.process_time()
        image = spatial.resample(truth, there, other.shape, order)
        image = spatial.resample(image, back, grid.shape, order)
        seconds = time.process_time() - start
        name = "linear" if order == "linear" else f"cubic, {nodes} nodes per voxel"
        rows.append((name, psnr(image, truth, mask), seconds))
    print("| interpolation | PSNR, dB | CPU time, ratio |\n| --- | --- | --- |")
    for name, value, seconds in rows:
        print(f"| {name} | {value:.1f} | {seconds / rows[0][2]:.1f} |")


if __name__ == "__main__":
    main()
