"""Real scans side by side: cubic interpolation, back-projection, expert.

    remix-bids BIDS OUT participant
    python benchmarks/pictures.py BIDS OUT docs/pictures

One JPEG for each scan: a cut across its slices through the middle of the brain, the same intensity
window in all panels. Back-projection is given the measured profile, as the expert is, and the
iterations that the protocol found best with noise.
"""

from __future__ import annotations

import argparse
import tomllib
from importlib import resources
from pathlib import Path

import nibabel as nb
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from remix_bids.evaluation.methods import back_project
from remix_bids.experts.registry import load_registry
from remix_bids.registration.itk import read_itk_affine
from remix_bids.sidecars import positive, read_sidecars
from remix_bids.simulation.acquisition import Acquisition
from remix_bids.simulation.degrade import restore_grid
from remix_bids.simulation.slices import from_scan
from remix_bids.spatial import WORKING_GRID, Grid

SIDE = 120  # mm
ZOOM = 3
MIDDLE = (68, 108, 82)  # voxel of the working grid: a parasagittal cut through the basal ganglia


def tuned(acquisition: Acquisition) -> tuple[int, float]:
    """Iterations and share of back-projection for a class, with noise."""
    protocol = resources.files("remix_bids.data").joinpath("protocol.toml").read_text()
    record = load_registry().select(acquisition.volume)
    iterations, share = tomllib.loads(protocol)["back_projection"]["noisy"][int(record.name) - 1]
    return iterations, share


def restored(source: Path, bids: Path, transform: Path) -> tuple[dict[str, np.ndarray], int]:
    """Interpolated and back-projected images, and the axis along which slices are stacked."""
    image = nb.load(source)
    data = np.asanyarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3])
    native = torch.from_numpy(data.copy())
    thickness = positive(read_sidecars(source, bids).get("SliceThickness"))
    world = read_itk_affine(transform)
    acquisition = from_scan(data, Grid(data.shape, image.affine), world, thickness)
    low = restore_grid(native, acquisition.grid, acquisition.world)
    iterates = back_project(native, acquisition, WORKING_GRID, low.image, *tuned(acquisition))
    *_, projected = iterates
    panels = {"cubic interpolation": low.image.numpy(), "back-projection": projected.numpy()}
    return panels, low.sampling.axis


def picture(panels: dict[str, np.ndarray], axis: int) -> Image.Image:
    across = 0 if axis != 0 else 1  # the cut holds the axis of the slices
    half = SIDE // 2
    window = [slice(max(0, c - half), c + half) for c in MIDDLE]
    window[across] = slice(MIDDLE[across], MIDDLE[across] + 1)
    cuts = {name: np.squeeze(v[tuple(window)], axis=across).T[::-1] for name, v in panels.items()}
    top = np.percentile(next(iter(cuts.values())), 99.5)
    font = ImageFont.load_default(size=16)
    tiles = []
    for name, cut in cuts.items():
        gray = Image.fromarray((255 * np.clip(cut / top, 0, 1)).astype(np.uint8))
        tile = gray.resize((gray.width * ZOOM, gray.height * ZOOM), Image.Resampling.NEAREST)
        ImageDraw.Draw(tile).text((8, 6), name, fill=255, font=font)
        tiles.append(tile)
    whole = Image.new("L", (sum(t.width + 6 for t in tiles) - 6, tiles[0].height))
    left = 0
    for tile in tiles:
        whole.paste(tile, (left, 0))
        left += tile.width + 6
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids", type=Path)
    parser.add_argument("derivatives", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--subjects", nargs="+", help="without sub-; all by default")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for source in sorted(given.bids.glob("sub-*/**/*_T1w.nii.gz")):
        stem = source.name.removesuffix("_T1w.nii.gz")
        if given.subjects and stem.split("_")[0].removeprefix("sub-") not in given.subjects:
            continue
        folder = (given.derivatives / source.relative_to(given.bids)).parent
        made = next(folder.glob(f"{stem}_space-MNI*_desc-remix_T1w.nii.gz"), None)
        if made is None:
            print(f"{stem}: no output in {folder}")
            continue
        transform = next(folder.glob(f"{stem}_from-T1w_to-MNI*_mode-image_xfm.*"))
        panels, axis = restored(source, given.bids, transform)
        panels["expert"] = np.asanyarray(nb.load(made).dataobj, dtype=np.float32)
        picture(panels, axis).save(given.out / f"{stem}.jpg", quality=85)
        print(given.out / f"{stem}.jpg", flush=True)


if __name__ == "__main__":
    main()
