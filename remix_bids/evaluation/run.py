"""Running an evaluation: every method on every case, one row each."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remix_bids.errors import RemixError, UsageError
from remix_bids.evaluation.cases import Case, told_sizes
from remix_bids.evaluation.external import UNREADABLE, read_image, run_command
from remix_bids.evaluation.methods import back_project, interpolate
from remix_bids.evaluation.metrics import (
    correlation,
    detail_ratio,
    eroded,
    grown,
    matched,
    psnr,
    ssim,
)
from remix_bids.evaluation.registered import as_registered
from remix_bids.evaluation.restore import as_shipped, as_told, registry_of, restore, see
from remix_bids.evaluation.rows import finished, read_rows, row_key, write_rows
from remix_bids.evaluation.segmenters import (
    Segmenter,
    atropos,
    dice,
    external,
    moved_and_back,
    nearest,
    tissue_means,
)
from remix_bids.evaluation.settings import (
    ALL_METHODS,
    ATROPOS,
    BACK_PROJECTION,
    BLIND,
    CUBIC,
    EXPERT,
    SHIPS,
    Settings,
)
from remix_bids.experts.registry import GENERAL
from remix_bids.simulation.acquisition import Acquisition
from remix_bids.simulation.degrade import field_of_view, restore_grid
from remix_bids.spatial import Grid, index_map
from remix_bids.training.dataset import Person, crop_to_foreground
from remix_bids.workers import lead_a_group

FOREGROUND = 0.05  # of bright tissue


def _restored(
    case: Case, native: Tensor, acquisition: Acquisition, grid: Grid, settings: Settings
) -> dict[str, Tensor]:
    """What every method makes of a native image."""
    how, asked = settings.protocol["back_projection"], {*settings.methods, *settings.commands}
    if settings.tune:
        start = interpolate(native, acquisition, grid, "cubic")
        found = {"0 x 1": start}
        for step in how["steps"]:
            iterates = back_project(native, acquisition, grid, start, how["most"], step)
            found |= {f"{i} x {step:g}": x for i, x in enumerate(iterates, 1)}
        return found
    registry = registry_of(settings.experts_dir)
    record = registry.select(acquisition.volume)
    networks = [registry[GENERAL]] if GENERAL in asked else []
    if EXPERT in asked or SHIPS in asked:
        networks.append(record)
    # Back-projection is given the true profile, the experts only what header and scan tell.
    told = as_told(native, acquisition)
    found = restore(native, told, grid, networks)
    if record in networks:
        found[EXPERT] = found.pop(record.name)
    found["linear"] = interpolate(native, acquisition, grid, "linear")
    for method, known in ((BACK_PROJECTION, acquisition), (BLIND, told)):
        if method in asked:
            iterations, step = how["noisy" if case.noise else "clean"][int(record.name) - 1]
            iterates = back_project(native, known, grid, found[CUBIC], iterations, step)
            found[method] = deque(iterates, maxlen=1).pop() if iterations else found[CUBIC]
    if SHIPS in asked:
        found[SHIPS] = as_shipped(found[EXPERT], found[CUBIC], native, told, grid, record)
    for name, command in settings.commands.items():
        data, source = run_command(command, native.numpy(), acquisition.grid)
        found[name] = restore_grid(torch.from_numpy(data), source, acquisition.world, grid).image
    return {name: found[name] for name in (*ALL_METHODS, *settings.commands) if name in asked}


@lru_cache(maxsize=1)
def _brain(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


@dataclass(frozen=True)
class TrueClasses:
    """Tissue classes of one person's true image, and how to find them in other images.

    Attributes
    ----------
    segment : Segmenter
    name : str
        Its name in the rows.
    mask : (x, y, z) bool array
        Brain.
    means : list of float
        Where the segmenter starts.
    labels : (x, y, z) array
        In the true image.
    again : (x, y, z) array
        In the true image moved by half a voxel and back: the segmenter's own floor.
    manual : (x, y, z) array or None
    digest : str
        Of the file that they are of.
    """

    segment: Segmenter
    name: str
    mask: np.ndarray
    means: list[float]
    labels: np.ndarray
    again: np.ndarray
    manual: np.ndarray | None
    digest: str

    def compare(self, image: Tensor, inside: np.ndarray) -> dict[str, float | str]:
        """Dice of what is found in another image, inside a mask; '' without manual labels."""
        found = self.segment(image.clamp(min=0).numpy(), self.mask, self.means)
        manual = "" if self.manual is None else round(dice(found, self.manual, inside), 4)
        return {
            "dice": round(dice(found, self.labels, inside), 4),
            "dice_floor": round(dice(self.again, self.labels, inside), 4),
            "dice_manual": manual,
            "segmenter": self.name,
            "labels": self.digest,
        }


_kept: dict[str, TrueClasses] = {}
"""Of the last persons in this process: finding them takes as long as two images."""
_MOST_KEPT = 8


def _true_classes(person: Person, truth: Tensor, grid: Grid, settings: Settings) -> TrueClasses:
    if person.name not in _kept:
        if len(_kept) == _MOST_KEPT:
            _kept.pop(next(iter(_kept)))
        image = truth.numpy()
        mask = image > FOREGROUND
        means = tissue_means(image, mask)
        command = settings.segmenter or ATROPOS
        segment = atropos if command == ATROPOS else external(command, grid)
        labels = segment(image, mask, means)
        again = segment(moved_and_back(image, np.random.default_rng(0)), mask, means)
        file, digest = settings.manual_labels(person.name), settings.labels_digest(person.name)
        manual = manual_classes(file, person, grid) if file else None
        name = settings.segmenter_name
        _kept[person.name] = TrueClasses(segment, name, mask, means, labels, again, manual, digest)
    return _kept[person.name]


def manual_classes(file: Path, person: Person, grid: Grid) -> np.ndarray:
    """Manual tissue classes of a person on a template grid.

    Raises
    ------
    UsageError
        If the file cannot be read.
    """
    try:
        labels, own = read_image(file, np.int16)
    except UNREADABLE as error:
        raise UsageError(f"--labels: {file} cannot be read: {error}") from error
    return nearest(labels, index_map(grid, own, person.world), grid.shape)


def run_case(case: Case, settings: Settings) -> list[dict]:
    """All methods on one case, one row each; or every iterate of back-projection, to tune it."""
    registry = registry_of(settings.experts_dir)
    truth = case.person.image.float()
    acquisition = case.acquisition()
    inside = _brain(settings.brain) if case.person.head and settings.brain is not None else None
    native = see(truth, acquisition, case.noise, case.seed, inside)
    if settings.templates is not None:
        acquisition, truth = as_registered(
            native, acquisition, truth, settings.templates, case.person.head
        )
    crop, grid = crop_to_foreground(truth, 64)
    brain = truth > FOREGROUND
    if inside is not None:
        brain &= inside
    truth, brain = truth[crop], brain[crop]
    covered = field_of_view(acquisition, grid)
    mask = eroded(brain & covered, settings.protocol["erosion"])
    # The edge of this mask is softened over two voxels; they must not lie beyond the scan.
    outside = eroded(covered, 2) & ~grown(brain, 5) & (truth > FOREGROUND)
    klass = registry.select(acquisition.volume).name
    about = {
        "person": case.person.name,
        "image": case.person.digest,
        "drawn": case.drawn,
        "number": case.number,
        "class": klass,
        "kind": case.source,
        "voxel_sizes": told_sizes(acquisition),
        "volume": acquisition.volume,
        "anisotropy": round(acquisition.anisotropy, 2),
        "profile": "box" if any(acquisition.box) else "gaussian",
        "noise": case.noise,
        "affine": settings.affine,
    }
    names = (*settings.protocol["segmented"], *settings.commands)
    segmented = names if settings.segmenter and case.segmented and not settings.tune else ()
    rows: list[dict] = []
    measured: dict[
        tuple[int, bool], dict
    ] = {}  # what ships may be the very image of another method
    for method, image in _restored(case, native, acquisition, grid, settings).items():
        key = id(image), method in segmented
        if key not in measured:
            masks = mask, covered, outside
            measured[key] = _measure(case.person, image, truth, masks, grid, settings, key[1])
        setup = settings.setup(method, klass)
        rows.append(about | {"setup": setup, "method": method} | measured[key])
    return rows


def _measure(
    person: Person,
    image: Tensor,
    truth: Tensor,
    masks: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    settings: Settings,
    segment: bool,
) -> dict[str, float | str]:
    """All metrics of one image; ``masks``: brain, what was covered, head outside the brain."""
    brain, covered, outside = masks
    found: dict[str, float | str] = {
        "psnr": round(psnr(image, truth, brain), 3),
        "psnr_whole": round(psnr(image, truth, covered), 3),
        "psnr_matched": round(psnr(matched(image, truth, brain), truth, brain), 3),
        # Its windows reach beyond what was covered, where nothing is to be compared.
        "ssim": round(ssim(image * covered, truth * covered, brain), 4),
        "correlation": round(correlation(image, truth, brain), 5),
        "head_detail": "",
        "dice": "",
        "dice_floor": "",
        "dice_manual": "",
        "segmenter": "",
        "labels": "",
    }
    if person.head:
        found["head_detail"] = round(detail_ratio(image, truth, outside), 4)
    elif segment:
        # Not acquired is no tissue: its zeros would draw the segmenter's classes after them.
        whole = torch.where(covered, image, truth)
        found |= _true_classes(person, truth, grid, settings).compare(whole, brain.numpy())
    return found


def evaluate(
    cases: Sequence[Case], settings: Settings, output: Path, *, nprocs: int = 1
) -> list[dict]:
    """Run all cases and write their rows to a TSV as they come; see `run_case`.

    Cases whose rows are there already are not run again.
    """
    kept = finished(read_rows(output), cases, settings) if output.is_file() else []
    done = {row_key(row) for row in kept}
    todo = [case for case in cases if case.key not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(nprocs, spawn, lead_a_group) as pool:
        try:
            return write_rows(output, pool.map(run_case, todo, repeat(settings)), kept)
        except BrokenProcessPool as error:
            raise RemixError(
                "a process of the evaluation was killed, most likely for its memory: run the same "
                "again with fewer --nprocs; it goes on from the rows that it has"
            ) from error
