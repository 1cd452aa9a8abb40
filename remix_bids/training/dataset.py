"""Training pairs: a prepared person, a drawn acquisition, augmentation, degradation, patches."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remix_bids.errors import UsageError
from remix_bids.experts.inference import network_input, slices_last
from remix_bids.simulation.acquisition import Acquisition, Geometry, draw, from_header, slice_axis
from remix_bids.simulation.degrade import acquire, add_rician_noise, bounding_box
from remix_bids.simulation.estimate import linear_estimate
from remix_bids.simulation.intensity import intensity_scale
from remix_bids.simulation.slices import as_if_measured
from remix_bids.spatial import WORKING_GRID, Grid, along_axis

COARSE_MM = 1.2
"""A person with a voxel side above this is no truth for detail."""
COARSE_CLASSES = range(3, 8)
COARSE_DETAIL = 0.3
MOST_TRIES = 50
"""To simulate a volume. A bank of slabs, as of the hippocampus, misses most cubes."""


@dataclass(frozen=True)
class Person:
    """A high-resolution image on the working grid.

    Attributes
    ----------
    image : (181, 217, 181) float16 tensor
        Scaled so that 1 is the 99.5th percentile of the foreground.
    world : (4, 4) array
        Template world to native world (RAS+, mm).
    voxel_sizes : tuple of 3 float
        Of the native image, mm.
    """

    name: str
    image: Tensor
    head: bool
    voxel_sizes: tuple[float, ...]
    world: np.ndarray
    split: str

    @property
    def coarse(self) -> bool:
        return max(self.voxel_sizes) > COARSE_MM

    def serves(self, k: int) -> bool:
        """Whether the image is a truth for scans of class ``k``."""
        return not self.coarse or k in COARSE_CLASSES

    @cached_property
    def digest(self) -> str:
        """First digits of a sha256 of image and affine, which tell one preparation from another."""
        data = self.image.cpu().numpy().tobytes() + np.asarray(self.world, dtype=float).tobytes()
        return hashlib.sha256(data).hexdigest()[:8]

    @property
    def study(self) -> str:
        """Where the image comes from: the name (as in ``ds002748x01``) less the person's number."""
        return re.sub(r"x?\d+$", "", self.name)


def load_persons(folder: Path, split: str, device: str = "cpu") -> list[Person]:
    """Read the persons of one split ('train', 'validation' or 'held_out') of a prepared folder.

    Raises
    ------
    UsageError
        If nothing was prepared there.
    """
    table = Path(folder) / "persons.json"
    if not table.is_file():
        raise UsageError(f"there is no {table}: name a folder that remix-experts prepare wrote")
    rows = json.loads(table.read_text())["persons"]
    return [
        Person(
            name=row["name"],
            image=torch.from_numpy(np.load(Path(folder) / row["file"], allow_pickle=False)).to(
                device
            ),
            head=row["head"],
            voxel_sizes=tuple(row["voxel_sizes"]),
            world=np.array(row["world"]),
            split=row["split"],
        )
        for row in rows
        if row["split"] == split
    ]


@dataclass(frozen=True)
class Augmentation:
    """Probabilities and ranges; all off with `OFF`."""

    flip: float = 0.5
    contrast: float = 0.5
    gamma: tuple[float, float] = (0.7, 1.4)
    bias: float = 0.5
    bias_range: float = 0.4
    sharpness: float = 0.5
    sharpness_range: tuple[float, float] = (-0.8, 0.5)  # of what a blur of 1 voxel takes away
    noise: float = 0.5
    noise_range: float = 0.03  # standard deviation, in units of bright tissue
    lesions: float = 0.2
    truncate: float = 0.2
    truncate_range: tuple[float, float] = (0.05, 0.25)
    strip: float = 0.2


OFF = Augmentation(flip=0, contrast=0, bias=0, sharpness=0, noise=0, lesions=0, truncate=0, strip=0)


def _coordinates(shape: Sequence[int], like: Tensor) -> list[Tensor]:
    """Coordinates from -1 to 1 along the three axes, to be broadcast."""
    axes = [torch.linspace(-1, 1, n, device=like.device) for n in shape]
    return [a.view([-1 if i == axis else 1 for i in range(3)]) for axis, a in enumerate(axes)]


def bias_field(rng: np.random.Generator, like: Tensor, limit: float) -> Tensor:
    """A smooth multiplicative field within 1 -+ ``limit``: a random polynomial of degree two."""
    x, y, z = _coordinates(like.shape, like)
    a = rng.normal(size=9)
    terms = (x, y, z, x * y, y * z, x * z, x * x, y * y, z * z)
    log = torch.zeros_like(like)
    for factor, term in zip(a, terms, strict=True):
        log += factor * term
    log = log - log.mean()
    return 1 + limit * rng.uniform(0.2, 1.0) * log / log.abs().max()


def add_lesions(rng: np.random.Generator, image: Tensor) -> Tensor:
    """1 to 3 smooth ellipsoids in tissue, 10 to 40 % brighter or darker.

    Of 3 to 15 mm, and 0.7 to 1.3 times that along each axis.
    """
    tissue = torch.nonzero(image > 0.3)
    image = image.clone()
    for _ in range(rng.integers(1, 4)):
        centre = tissue[int(rng.integers(len(tissue)))].tolist()
        radii = rng.uniform(1.5, 7.5) * rng.uniform(0.7, 1.3, 3)
        box = tuple(
            slice(max(0, int(c - 2 * r) - 1), int(c + 2 * r) + 2)
            for c, r in zip(centre, radii, strict=True)
        )
        grids = [
            torch.arange(s.start, min(s.stop, n), device=image.device) - c
            for s, n, c in zip(box, image.shape, centre, strict=True)
        ]
        d = sum(
            ((g / r) ** 2).view([-1 if i == axis else 1 for i in range(3)])
            for axis, (g, r) in enumerate(zip(grids, radii, strict=True))
        )
        change = rng.choice([-1, 1]) * rng.uniform(0.1, 0.4)
        image[box] *= 1 + change * torch.sigmoid((1 - torch.as_tensor(d)) * 4)
    return image


def sharpened(image: Tensor, amount: float, sigma: float = 1.0) -> Tensor:
    """An image with its finest detail stronger (``amount`` above 0) or weaker.

    Scanners differ in how sharp their millimetre is, and most training images come from one.
    """
    blurred = image
    for axis in range(3):
        n = image.shape[axis]
        offsets = torch.arange(n)[:, None] - torch.arange(n)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2) * (offsets.abs() <= 3)
        kernel = kernel / kernel[n // 2].sum()
        blurred = along_axis(kernel.to(image), blurred, axis)
    # Air stays air, and edges do not turn negative.
    return (image + amount * (image - blurred)).clamp(min=0) * (image > 0)


def vary(
    rng: np.random.Generator, person: Person, augment: Augmentation, strip_mask: Tensor
) -> Tensor:
    """What is shared by both images of a pair, applied before degradation; float32."""
    image = person.image.float()
    if rng.random() < augment.flip:
        image = image.flip(0)  # the working grid is symmetric about x = 0
    if person.head and rng.random() < augment.strip:
        image = image * strip_mask
    if rng.random() < augment.sharpness:
        image = sharpened(image, rng.uniform(*augment.sharpness_range))
    if rng.random() < augment.lesions:
        image = add_lesions(rng, image)
    if rng.random() < augment.contrast:
        image = image.clamp(min=0) ** rng.uniform(*augment.gamma)
    if rng.random() < augment.bias:
        image = image * bias_field(rng, image, augment.bias_range)
    return image


def truncated(
    rng: np.random.Generator, native: Tensor, acquisition: Acquisition, share: tuple[float, float]
) -> tuple[Tensor, Grid]:
    """Lose some slices at one end, as scans that do not cover the head."""
    grid = acquisition.grid
    axis = slice_axis(grid)
    lost = max(1, round(grid.shape[axis] * rng.uniform(*share)))
    start = lost if rng.random() < 0.5 else 0
    kept = grid.shape[axis] - lost
    shift = np.eye(4)
    shift[axis, 3] = start
    x, y, z = (kept if a == axis else n for a, n in enumerate(grid.shape))
    return native.narrow(axis, start, kept), Grid((x, y, z), grid.affine @ shift)


@dataclass(frozen=True)
class Pair:
    """A simulated volume: network input (channels, x, y, z), numbers of the scan (4,), target
    (x, y, z) and trust in its detail. Slices are stacked along the last axis.
    """

    inputs: Tensor
    scan: Tensor
    target: Tensor
    detail: float

    def sample(self, cuts: Tensor) -> dict[str, Tensor]:
        """As tensors: ``volume`` (channels + 1, x, y, z) in float16, the target last, and cuts."""
        volume = torch.cat([self.inputs, self.target[None]]).half()
        detail = torch.tensor(self.detail).to(self.scan)
        return {"volume": volume, "scan": self.scan, "detail": detail, "cuts": cuts}


def simulate_pair(
    rng: np.random.Generator,
    person: Person,
    acquisition: Acquisition,
    augment: Augmentation,
    strip_mask: Tensor,
    size: int,
) -> Pair:
    """Degrade one person through one acquisition, on a cube somewhere in the foreground.

    Parameters
    ----------
    size : int
        Side of the cube in voxels; a part costs less than a whole volume and sees more persons.
    """
    image = vary(rng, person, augment, strip_mask)
    crop, _ = crop_to_foreground(image, size)
    crop, grid = random_cube(rng, crop, size)
    region = np.array([[s.start for s in crop], [s.stop - 1 for s in crop]])
    native = acquire(image, acquisition, region=region).clamp(min=0)  # a magnitude
    source = acquisition.grid
    if rng.random() < augment.noise:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        native = add_rician_noise(native, rng.uniform(0, augment.noise_range), generator)
    if rng.random() < augment.truncate:
        native, source = truncated(rng, native, acquisition, augment.truncate_range)
    low = linear_estimate(native, as_if_told(rng, acquisition, source), grid)
    scale = intensity_scale(low.image, low.covered)
    inputs, scan = network_input(low, scale)
    target = slices_last(image[crop] / scale, low.sampling.axis)
    return Pair(inputs, scan, target, COARSE_DETAIL if person.coarse else 1.0)


def as_if_told(rng: np.random.Generator, acquisition: Acquisition, source: Grid) -> Acquisition:
    """The acquisition as scan and header tell it: half of the sidecars give the thickness."""
    known = rng.random() < 0.5
    told = from_header(source, acquisition.world, acquisition.thickness if known else None)
    return as_if_measured(rng, told, acquisition)


def _crop_grid(crop: tuple[slice, ...]) -> Grid:
    shift = np.eye(4)
    shift[:3, 3] = [s.start for s in crop]
    x, y, z = (s.stop - s.start for s in crop)
    return Grid((x, y, z), WORKING_GRID.affine @ shift)


def random_cube(
    rng: np.random.Generator, crop: tuple[slice, ...], size: int
) -> tuple[tuple[slice, ...], Grid]:
    """A cube inside a box of the working grid, as slices and as a grid."""
    starts = [int(rng.integers(s.start, s.stop - size + 1)) for s in crop]
    cube = tuple(slice(start, start + size) for start in starts)
    return cube, _crop_grid(cube)


def crop_to_foreground(image: Tensor, minimum: int) -> tuple[tuple[slice, ...], Grid]:
    """The box around the foreground, at least ``minimum`` wide, as slices and as a grid."""
    box = bounding_box(image > 0.02)
    crop = []
    for n, low, high in zip(image.shape, box[0], box[1], strict=True):
        size = min(n, max(minimum, high - low + 5))
        start = int(np.clip((low + high - size) // 2 + 1, 0, n - size))
        crop.append(slice(start, start + size))
    return tuple(crop), _crop_grid(tuple(crop))


def draw_cuts(rng: np.random.Generator, pair: Pair, count: int, size: int) -> Tensor:
    """Where to cut patches, four in five of them centred on foreground that was acquired.

    The way from thick slices to thin ones knows no left and right: patches are mirrored, and their
    in-plane axes swapped, at random.

    Returns
    -------
    (count, 7) int tensor
        First voxel along three axes, whether to mirror each of them, and whether to swap.
    """
    shape = pair.target.shape
    foreground = torch.nonzero((pair.target > 0.1) & (pair.inputs[1] > 0))
    cuts = []
    for _ in range(count):
        if rng.random() < 0.8 and len(foreground):
            centre = foreground[int(rng.integers(len(foreground)))].tolist()
            start = [
                int(np.clip(c - size // 2, 0, n - size)) for c, n in zip(centre, shape, strict=True)
            ]
        else:
            start = [int(rng.integers(n - size + 1)) for n in shape]
        cuts.append([*start, *(rng.random(4) < 0.5).tolist()])
    return torch.tensor(cuts, dtype=torch.int32)


def cut_patch(sample: dict[str, Tensor], number: int, size: int) -> dict[str, Tensor]:
    """One patch of a simulated volume, as `Simulator` gives it, on its device.

    Returns
    -------
    dict
        ``inputs`` (channels, size, size, size) and ``targets`` (size, size, size) in float16,
        ``scan`` (4,) and ``detail`` ().
    """
    *start, x, y, z, swap = sample["cuts"][number].tolist()
    cut = sample["volume"][(slice(None), *(slice(s, s + size) for s in start))]
    cut = cut.flip([axis for axis, mirror in enumerate((x, y, z), 1) if mirror])
    scan = sample["scan"]
    if swap:
        cut = cut[[0, 1, 3, 2, 4, 5, 6]].transpose(1, 2)
        scan = scan[[1, 0, 2, 3]]
    return {"inputs": cut[:-1], "targets": cut[-1], "scan": scan, "detail": sample["detail"]}


def study_shares(persons: Sequence[Person]) -> np.ndarray:
    """How often each person is drawn: a study of n together sqrt(n) times as often as one of one.

    Most brains come from one scanner; what is learned should not be that scanner.
    """
    count = Counter(p.study for p in persons)
    share = np.array([count[p.study] ** -0.5 for p in persons])
    return share / share.sum()


@dataclass(frozen=True)
class Simulator:
    """Draws simulated volumes by number: volume ``i`` is the same whenever it is asked for.

    Attributes
    ----------
    class_weights : tuple of 7 float
        How often each class is drawn.
    profile : bool
        False to sample slices at points: what the slice profile is worth.
    """

    persons: Sequence[Person]
    bank: Sequence[Geometry]
    strip_mask: Tensor
    class_weights: tuple[float, ...]
    seed: int
    patch: int = 64
    cube: int = 128
    patches_per_volume: int = 16
    head_share: float = 0.5
    augment: Augmentation = field(default_factory=Augmentation)
    profile: bool = True

    def pair(self, index: int) -> tuple[Pair, np.random.Generator]:
        """Simulate volume ``index``."""
        rng = np.random.default_rng([self.seed, index])
        weights = np.array(self.class_weights, dtype=float)
        k = int(rng.choice(np.arange(1, 8), p=weights / weights.sum()))
        usable = [p for p in self.persons if p.serves(k)]
        heads = [p for p in usable if p.head]
        brains = [p for p in usable if not p.head]
        pool = heads if heads and (not brains or rng.random() < self.head_share) else brains
        person = pool[rng.choice(len(pool), p=study_shares(pool))]
        worlds = [p.world for p in self.persons]
        for left in reversed(range(MOST_TRIES)):
            acquisition = draw(rng, self.bank, worlds, k)
            if not self.profile:
                acquisition = acquisition.without_profile()
            try:
                pair = simulate_pair(
                    rng, person, acquisition, self.augment, self.strip_mask, self.cube
                )
                break
            except ValueError:  # the cube lies beside a thin slab
                if not left:
                    raise
        return pair, rng

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Volume ``index``, and where `cut_patch` is to cut it.

        One volume is less to hand from process to process, or to a GPU, than its patches are.
        """
        pair, rng = self.pair(index)
        return pair.sample(draw_cuts(rng, pair, self.patches_per_volume, self.patch))

    def for_validation(self, seed: int) -> Simulator:
        """The same task on fixed volumes, without augmentation; half of them are noisy."""
        return replace(self, seed=seed, augment=replace(OFF, noise=0.5))
