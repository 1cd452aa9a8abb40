"""From a recipe to trained stages, and from those to a folder of experts."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from remix_bids.errors import UsageError
from remix_bids.experts.inference import load_expert
from remix_bids.experts.reference import reference_output
from remix_bids.experts.registry import EXPERTS, GENERAL, UNBOUNDED, ExpertRecord
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import CLASS_RANGES, geometries
from remix_bids.toml_file import read_toml
from remix_bids.training import team
from remix_bids.training.dataset import COARSE_MM, Simulator, load_persons
from remix_bids.training.losses import RemixLoss
from remix_bids.training.trainer import (
    CHECKPOINT,
    Schedule,
    check_number,
    is_finished,
    read_metadata,
    train,
)

LOGGER = logging.getLogger(__name__)
SETTINGS = {
    "network": ("inputs", "widths"),
    "data": ("patch", "cube", "patches_per_volume", "head_share", "own_share", "seed"),
    "consistency": ("steps",),
}
"""What sections of a recipe must hold."""
NOT_OF_SCHEDULE = ("start", "classes", "calibrate", "widths", "patches_per_volume")


def read_recipe(path: Path, *sections: str) -> dict[str, Any]:
    """A recipe as it is written, checked as far as a typing error would go.

    Parameters
    ----------
    sections : str
        Those that are needed.

    Raises
    ------
    UsageError
        It cannot be read, lacks a section or a setting, or a stage has one that there is not.
    """
    recipe = read_toml(path, "the recipe")
    if lacking := [name for name in sections if name not in recipe]:
        raise UsageError(f"the recipe {path} lacks [{'], ['.join(lacking)}]")
    for section in sections:
        if lacking := [key for key in SETTINGS.get(section, ()) if key not in recipe[section]]:
            raise UsageError(f"the recipe {path}: [{section}] lacks {', '.join(lacking)}")
    known = {*NOT_OF_SCHEDULE, *(field.name for field in fields(Schedule))} - {"workers"}
    for stage, settings in recipe.get("stages", {}).items():
        if unknown := sorted({*settings} - known):
            raise UsageError(
                f"the recipe {path}: stage {stage!r} has no setting {', '.join(unknown)}; there "
                f"are {', '.join(sorted(known))}"
            )
        if "steps" not in settings:
            raise UsageError(f"the recipe {path}: stage {stage!r} lacks its steps")
        if "classes" not in settings and stage not in EXPERTS:
            raise UsageError(f"the recipe {path}: stage {stage!r} lacks its classes")
    try:
        if "network" in sections and "data" in sections:
            _check_values(recipe)
    except ValueError as error:
        raise UsageError(f"the recipe {path}: {error}") from None
    return recipe


def _check_values(recipe: dict[str, Any]) -> None:
    """Raise ValueError if patches, widths, classes or a schedule cannot be trained with."""
    data = recipe["data"]
    for name in ("patch", "cube", "patches_per_volume"):
        check_number(f"[data] {name}", data[name], whole=True, least=1)
    if data["patch"] > data["cube"]:
        raise ValueError("[data] patch is larger than the cube that it is cut from")
    for stage, settings in recipe.get("stages", {}).items():
        try:
            schedule = schedule_of(settings)
            widths = settings.get("widths", recipe["network"]["widths"])
            for width in widths:
                check_number("a width", width, whole=True, least=1)
            if data["patch"] % (least := 2 ** (len(widths) - 1)):
                raise ValueError(f"[data] patch must be a multiple of {least}")
            weights = class_weights(stage, settings, data["own_share"])
            for weight in weights:
                check_number("a class' share", weight)
            if len(weights) != 7 or not sum(weights):
                raise ValueError("classes are the shares of classes 1 to 7, not all of them 0")
            patches = settings.get("patches_per_volume", data["patches_per_volume"])
            if schedule.batch > patches * schedule.volumes_per_round:
                raise ValueError("batch is larger than patches_per_volume x volumes_per_round")
        except (TypeError, ValueError) as error:
            raise ValueError(f"stage {stage!r}: {error}") from None


def schedule_of(settings: dict[str, Any], **more: Any) -> Schedule:
    """The schedule of a stage as a recipe has it."""
    return Schedule(**{k: v for k, v in settings.items() if k not in NOT_OF_SCHEDULE}, **more)


def _warn_if_unfinished(folder: Path) -> None:
    """A stage keeps its best weights from its start on; these may not be its last ones."""
    checkpoint, schedule = folder / CHECKPOINT, folder / "schedule.json"
    if checkpoint.is_file() and schedule.is_file():
        taken = read_metadata(checkpoint, "progress")["step"]
        planned = json.loads(schedule.read_text())["steps"]
        if taken < planned:
            LOGGER.warning("%s has taken %d of its %d steps", folder, taken, planned)


def class_weights(stage: str, settings: dict[str, Any], own_share: float) -> tuple[float, ...]:
    """How often a stage draws each class: as told, or an expert's own class and its neighbours."""
    if "classes" in settings:
        return tuple(float(w) for w in settings["classes"])
    k = int(stage)
    near = [n for n in (k - 1, k + 1) if 1 <= n <= 7]
    weights = dict.fromkeys(near, (1 - own_share) / len(near)) | {k: own_share}
    return tuple(weights.get(c, 0.0) for c in range(1, 8))


def _corner(old: Tensor, new: Tensor) -> Tensor:
    """``new`` with ``old`` in its first rows and columns, and zeros in the rest of those rows."""
    grown = new.clone()
    grown[: old.shape[0]] = 0
    grown[tuple(slice(n) for n in old.shape)] = old
    return grown


def begin_with(network: ResidualUNet, weights: dict[str, Tensor]) -> None:
    """Load weights of a network that may have fewer inputs, and be narrower: it computes the same.

    Inputs that it does not know yet (the last channels), and features that are added, begin at zero
    weight in all that there was.

    Raises
    ------
    UsageError
        If the network that they are of is wider, or has other levels.
    """
    own = network.state_dict()
    fits = weights.keys() == own.keys() and all(
        n >= o for name in own for n, o in zip(own[name].shape, weights[name].shape, strict=True)
    )
    if not fits:
        raise UsageError("a stage can only start from a network that is as wide, or narrower")
    widths = [
        [len(tensors[name]) for name in own if name.endswith("first.bias")]
        for tensors in (weights, own)
    ]
    grown = {}
    for name, new in own.items():
        old = weights[name].float()
        if name.startswith("up.") and name.endswith("first.weight"):
            # What comes from below, and what was skipped.
            halves = zip(old.chunk(2, dim=1), new.chunk(2, dim=1), strict=True)
            grown[name] = torch.cat([_corner(*pair) for pair in halves], dim=1)
        elif name.startswith("scan.2."):
            # Factor and shift of every block.
            before, after = ([w for w in of for _ in range(2)] for of in widths)
            parts = zip(old.split(before), new.split(after), strict=True)
            grown[name] = torch.cat([_corner(*pair) for pair in parts])
        else:
            grown[name] = _corner(old, new)
    network.load_state_dict(grown)


def mean_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Mean of the weights of networks that have gone different ways from one start.

    What an expert has learned of its class, and another network of all of them, mostly stays in
    their mean.

    Raises
    ------
    UsageError
        If their shapes differ.

    References
    ----------
    Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022.
    """
    networks = [load_file(str(file)) for file in files]
    if len({tuple((name, w.shape) for name, w in sorted(n.items())) for n in networks}) > 1:
        names = ", ".join(str(file) for file in files)
        raise UsageError(f"a stage can only start from networks of the same widths: {names}")
    return {
        name: torch.stack([n[name].float() for n in networks]).mean(dim=0) for name in networks[0]
    }


def loss_of(weights: Path) -> RemixLoss:
    """The loss that weights were trained with, so that the next stage goes on with it.

    Raises
    ------
    UsageError
        If they do not tell: they were written before weights did.
    """
    factors = read_metadata(weights, "provenance").get("loss_factors")
    if factors is None:
        raise UsageError(
            f"{weights} does not hold the factors of its loss; give the stage that starts from it "
            "calibrate = true in the recipe"
        )
    return RemixLoss(tuple(factors))


def _starts(stage: str, settings: dict[str, Any], output: Path) -> list[Path]:
    """Weights that a stage begins with: of one stage, of several, or none."""
    names = settings.get("start", [])
    starts = []
    for name in [names] if isinstance(names, str) else names:
        starts.append(output / name / "best.safetensors")
        if not starts[-1].is_file():
            raise UsageError(
                f"stage {stage} begins with {name}, and there is no {starts[-1]}: train that stage "
                "first"
            )
        _warn_if_unfinished(output / name)
    return starts


def run_recipe(
    recipe_file: Path,
    prepared: Path,
    output: Path,
    *,
    only: Sequence[str] | None = None,
    bank: Path | None = None,
    device: str = "cpu",
    workers: int | None = None,
) -> None:
    """Train the stages of a recipe; finished stages are kept, a stopped one goes on.

    Parameters
    ----------
    recipe_file : Path
        TOML; see ``remix_bids/data/recipe.toml``.
    prepared : Path
        Folder of `remix_bids.training.prepare.prepare`.
    output : Path
        Gets one folder per stage.
    only : sequence of str, optional
        Stages to run; all by default.
    bank : Path, optional
        Geometries, as `remix-experts harvest` writes them; the shipped bank by default.
    device : str
        Where the networks learn.
    workers : int, optional
        Processes that simulate on the CPU meanwhile; 0 to simulate on ``device`` in turn with
        learning. 0 on a GPU by default, else 1.

    Raises
    ------
    UsageError
        If a stage is unknown or lacks its start, or nobody, or no geometry, is left to train on or
        to validate with.
    """
    recipe = read_recipe(recipe_file, "network", "data", "stages")
    data, stages = recipe["data"], recipe["stages"]
    if unknown := set(only or ()) - set(stages):
        names = ", ".join(sorted(unknown))
        raise UsageError(f"--stage {names}: {recipe_file} holds {', '.join(stages)}")
    own_bank = geometries(bank, held_out=False)
    device = team.join(device)
    if workers is None:
        workers = 1 if device == "cpu" else 0
    simulates = "cpu" if workers else device
    persons = load_persons(prepared, "train", simulates)
    unseen = load_persons(prepared, "validation", simulates)
    reserved = recipe.get("persons", {}).values()
    named = {name.removeprefix("sub-") for names in reserved for name in names}
    if strayed := sorted(named & {person.name for person in persons}):
        raise UsageError(
            f"{', '.join(strayed)}: the recipe names them as validation or held_out, {prepared} "
            "holds them as persons to train on; run remix-experts prepare with this --recipe again"
        )
    mask = np.load(prepared / "strip_mask.npy", allow_pickle=False)
    common = {
        "bank": own_bank,
        "strip_mask": torch.from_numpy(mask).to(simulates),
        "patch": data["patch"],
        "cube": data["cube"],
        "head_share": data["head_share"],
    }
    for stage, settings in stages.items():
        if only and stage not in only:
            continue
        schedule = schedule_of(settings, workers=workers)
        if is_finished(output / stage, schedule):
            continue
        weights = class_weights(stage, settings, data["own_share"])
        for split, some in (("train", persons), ("validation", unseen)):
            if not some:
                raise UsageError(
                    f"{prepared} holds no persons of the split {split!r}: name some, not all, of "
                    "yours under validation in a copy of the recipe, and give it by --recipe to "
                    "prepare and train"
                )
            for k, weight in enumerate(weights, 1):
                if weight and not any(person.serves(k) for person in some):
                    raise UsageError(
                        f"stage {stage!r} draws class {k}, and all persons of the split {split!r} "
                        f"in {prepared} have voxel sides above {COARSE_MM} mm, too coarse for it: "
                        "add one, or train other stages (--stage), or other classes (--recipe)"
                    )
        # By name: a stage that is put before others leaves them their volumes.
        seed = data["seed"] + crc32(stage.encode())
        patches = settings.get("patches_per_volume", data["patches_per_volume"])
        simulator = Simulator(
            persons, class_weights=weights, seed=seed, patches_per_volume=patches, **common
        )
        validation = Simulator(
            unseen, class_weights=weights, seed=data["seed"] + 7, **common
        ).for_validation(data["seed"] + 7)
        torch.manual_seed(data["seed"])
        starts = _starts(stage, settings, output)
        widths, loss = recipe["network"]["widths"], None
        if starts:
            widths = read_metadata(starts[0], "network")["widths"]
        widths = settings.get("widths", widths)
        network = ResidualUNet(recipe["network"]["inputs"], tuple(widths))
        if starts:
            begin_with(network, mean_weights(starts))
            if not settings.get("calibrate", False):
                loss = loss_of(starts[0])
        LOGGER.info("stage %s: %d steps, classes %s", stage, schedule.steps, weights)
        train(network, simulator, validation, schedule, output / stage, device=device, loss=loss)


def export_experts(trained: Path, output: Path, steps: Sequence[int] = (0,) * 7) -> Path:
    """Copy the best weights of the seven experts and the general network, and write their table.

    The table also gets what each computes on a reference input, for ``remix-experts verify``.

    Parameters
    ----------
    trained : Path
        Folder of `run_recipe`.
    output : Path
    steps : sequence of 7 int
        Consistency steps that follow each expert.

    Returns
    -------
    Path
        Of ``experts.toml``.

    Raises
    ------
    UsageError
        If one of them has not been trained, or it is not told how many steps follow each.
    MissingResourceError
        If the weights of one do not load. Nothing is written in either case.
    """
    whole = isinstance(steps, Sequence) and all(type(n) is int and n >= 0 for n in steps)
    if not whole or len(steps) != len(EXPERTS):
        raise UsageError(
            f"consistency steps {steps}: name {len(EXPERTS)} whole numbers, those of each expert"
        )
    names = (*EXPERTS, GENERAL)
    if lacking := [n for n in names if not (trained / n / "best.safetensors").is_file()]:
        raise UsageError(f"{trained} lacks the stages {', '.join(lacking)}: train them first")
    lines = ["# Written by `remix-experts export`; volumes in mm3.", ""]
    files: dict[str, Path] = {}
    for name in names:
        source = trained / name / "best.safetensors"
        _warn_if_unfinished(trained / name)
        file = f"expert-{name}.safetensors" if name != GENERAL else "general.safetensors"
        files[file] = source
        low, high = (0.0, UNBOUNDED) if name == GENERAL else (int(name) - 0.5, int(name) + 0.5)
        # One millimetre in-plane is the finest that is simulated, so the spacing is the volume.
        seen = CLASS_RANGES[7 if name == GENERAL else int(name)][1]
        low, high = (0.0 if name == "1" else low), (UNBOUNDED if name == "7" else high)
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        network = load_expert(ExpertRecord(name, source, digest, low, high))
        provenance = read_metadata(source, "provenance")
        lines += [
            f"[expert.{name}]",
            f'file = "{file}"',
            f'sha256 = "{digest}"',
            f"lower = {low}",
            f"upper = {high}",
            f"anisotropy = [1.0, {seen}]",
            f"consistency_steps = {0 if name == GENERAL else steps[int(name) - 1]}",
            f"steps = {provenance['step']}",
            f"validation_gain_db = {provenance['validation_gain_db']:.3f}",
            f"reference = {list(reference_output(network))}",
            "",
        ]
    output.mkdir(parents=True, exist_ok=True)
    for file, source in files.items():
        shutil.copyfile(source, output / file)  # readable by all, unlike what safetensors writes
    table = output / "experts.toml"
    table.write_text("\n".join(lines))
    return table
