"""One readable training loop: resumable to the step; on a CPU the same seed gives the same weights.

On a GPU it has not been shown: cuDNN may choose algorithms whose sums come in another order.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from remix_bids.errors import RemixError, UsageError
from remix_bids.experts.unet import INPUTS, SCAN, ResidualUNet, residual_scale
from remix_bids.training import team
from remix_bids.training.dataset import Simulator, cut_patch
from remix_bids.training.losses import PARTS, RemixLoss

LOGGER = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.safetensors"
TYPICAL = 0.06
"""`residual_scale` of slices of 4 mm: a patch of such a scan has weight 1 in the loss."""


def check_number(name: str, value: Any, *, whole: bool = False, least: float = 0) -> None:
    """Raise ValueError where a recipe has something else than a number from ``least`` on."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        what = "whole number" if whole else "number"
        raise ValueError(f"{name} must be a {what} of at least {least}, not {value!r}")


@dataclass(frozen=True)
class Schedule:
    """Hyper-parameters of one stage."""

    steps: int  # 0: the start itself, such as the mean of two stages
    rate: float = 5e-4  # peak
    batch: int = 2  # patches, of each process
    warmup: int = 100  # steps
    final: float = 0.01  # of the peak rate, at the end of the cosine
    decay: float = 1e-4  # of weights, not of biases
    clip: float = 1.0  # norm of the gradient
    ema: float = 0.995
    rim: int = 4  # voxels of a patch's border that the loss ignores
    volumes_per_round: int = 24  # simulated volumes whose patches are shuffled together
    validate_every: int = 250
    checkpoint_every: int = 250  # steps; and after every validation
    validation_volumes: int = 12
    workers: int = 1  # processes that simulate while the network learns; 0: this one does

    def __post_init__(self) -> None:
        may_be_0 = ("steps", "warmup", "final", "decay", "rim", "workers")
        for setting in fields(self):
            least = int(setting.name not in may_be_0)
            value, whole = getattr(self, setting.name), setting.type == "int"
            check_number(setting.name, value, whole=whole, least=least if whole else 0)

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to ``final`` of the peak."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share)))


def simulated(
    simulator: Simulator, volumes: Sequence[int], workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Volumes by number, on a device, in order; workers simulate ahead of what is asked for."""
    ahead = device.type == "cuda" and workers > 0
    loader: DataLoader = DataLoader(
        cast(Dataset, simulator),
        batch_size=None,
        sampler=volumes,
        num_workers=workers,
        pin_memory=ahead,
    )
    for sample in loader:
        if workers and not ahead:  # out of shared memory, of which containers have little
            sample = {key: value.clone() for key, value in sample.items()}
        cuts = sample.pop("cuts")  # read here, so that nothing waits for the device
        on_device = {key: value.to(device, non_blocking=ahead) for key, value in sample.items()}
        yield on_device | {"cuts": cuts}


def batches(
    simulator: Simulator, schedule: Schedule, start: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """This process's batches from step ``start`` on: they depend on the seed and the step only."""
    per_round = schedule.volumes_per_round * simulator.patches_per_volume // schedule.batch
    number, skip = divmod(start, per_round)
    volumes = [
        (turn * team.SIZE + team.RANK) * schedule.volumes_per_round + i
        for turn in range(number, schedule.steps // per_round + 1)
        for i in range(schedule.volumes_per_round)
    ]
    pool: list[dict[str, Tensor]] = []
    for sample in simulated(simulator, volumes, schedule.workers, device):
        pool.append(sample)
        if len(pool) < schedule.volumes_per_round:
            continue
        of_volume = simulator.patches_per_volume
        order = np.random.default_rng([simulator.seed, 1, number]).permutation(
            len(pool) * of_volume
        )
        for i in range(skip, per_round):
            pick = order[i * schedule.batch : (i + 1) * schedule.batch]
            patches = [
                cut_patch(pool[n // of_volume], n % of_volume, simulator.patch) for n in pick
            ]
            yield {key: torch.stack([p[key] for p in patches]) for key in patches[0]}
        pool = []
        number, skip = number + 1, 0


def half_precision(inputs: Tensor, levels: int) -> torch.autocast:
    """bfloat16, where a processor has it and computes it rightly.

    CPUs that lack it take far longer to imitate it than float32. On those that have it the gradient
    of a convolution over rows of two voxels, as the last level of a small patch has, is memory that
    nobody wrote (torch 2.13; `tests/test_training.py` trains on such patches).
    """
    fast = inputs.device.type != "cpu" or (
        torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and inputs.shape[-1] >> levels > 2
    )
    return torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=fast)


def psnr_of_unit(x: Tensor, y: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio (dB) inside a mask; 1 is the peak."""
    return float(-10 * torch.log10(((x - y)[mask] ** 2).mean()))


class Validation:
    """PSNR gain over the network's input on fixed volumes of persons who are never trained on."""

    def __init__(
        self,
        simulator: Simulator,
        volumes: int,
        workers: int,
        device: torch.device,
        size: int = 96,
    ) -> None:
        self._cases = []
        for sample in simulated(simulator, range(volumes), workers, device):
            volume = sample["volume"]
            middle = tuple(
                slice(max(0, (n - size) // 2), max(0, (n - size) // 2) + size)
                for n in volume.shape[1:]
            )
            self._cases.append((volume[(slice(None), *middle)].clone(), sample["scan"]))

    @torch.no_grad()
    def __call__(self, network: ResidualUNet) -> float:
        gains = []
        for volume, scan in self._cases:
            side = [n - n % network.multiple for n in volume.shape[1:]]
            cut = volume[(slice(None), *(slice(0, n) for n in side))].float()
            x, y = cut[:-1], cut[-1]
            with half_precision(x, len(network.widths)):
                out = network(x[None], scan[None])[0, 0].float()
            mask = (x[1] > 0) & (y > 0.05)
            gains.append(psnr_of_unit(out, y, mask) - psnr_of_unit(x[0], y, mask))
        return float(np.mean(gains))


def save_network(network: ResidualUNet, path: Path, **provenance: object) -> None:
    """Write the weights as float16 safetensors with the design in the metadata, whole or not."""
    tensors = {k: v.detach().cpu().half().contiguous() for k, v in network.state_dict().items()}
    design = {"inputs": network.inputs, "widths": network.widths, "channels": INPUTS, "scan": SCAN}
    metadata = {"network": json.dumps(design), "provenance": json.dumps(provenance)}
    part = path.with_suffix(".part")
    save_file(tensors, str(part), metadata=metadata)
    os.replace(part, path)


def read_metadata(path: Path, key: str) -> dict[str, Any]:
    """``progress`` of a checkpoint, ``provenance`` of a network's weights."""
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()[key])


def is_finished(folder: Path, schedule: Schedule) -> bool:
    """Whether the stage in a folder has taken all of its steps."""
    checkpoint = folder / CHECKPOINT
    return checkpoint.exists() and read_metadata(checkpoint, "progress")["step"] >= schedule.steps


def as_features_lie(tensor: Tensor) -> Tensor:
    """A 5D tensor with the channels last: else every step orders the weights anew."""
    return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.ndim == 5 else tensor


class State:
    """Network, its average, optimiser and step, kept in one safetensors file."""

    def __init__(
        self,
        network: ResidualUNet,
        schedule: Schedule,
        device: torch.device,
        patches_per_volume: int,
    ) -> None:
        # What decides, with the step, which volumes come next.
        self.division = {
            "processes": team.SIZE,
            "batch": schedule.batch,
            "volumes_per_round": schedule.volumes_per_round,
            "patches_per_volume": patches_per_volume,
        }
        self.network = network.to(device)
        for weight in self.network.parameters():
            weight.data = as_features_lie(weight.data)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        weights = [p for p in self.network.parameters() if p.ndim > 1]
        biases = [p for p in self.network.parameters() if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": schedule.decay},
            {"params": biases},
        ]
        self.optimiser = torch.optim.AdamW(
            groups,
            lr=schedule.rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self.step = 0
        self.loss: RemixLoss | None = None
        self.best = -math.inf
        # Loss and its parts since the last validation, and steps: a GPU need not be waited for.
        self.sums = torch.zeros(1 + len(PARTS), device=device)
        self.summed = 0

    def save(self, path: Path) -> None:
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{k}": v for k, v in moments.items()}
        assert self.loss is not None
        progress = {
            "step": self.step,
            "factors": self.loss.factors,
            "best": self.best,
            "sums": self.sums.tolist(),
            "summed": self.summed,
            **self.division,
        }
        part = path.with_suffix(".part")
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(plain, str(part), metadata={"progress": json.dumps(progress)})
        os.replace(part, path)

    def load(self, path: Path) -> None:
        progress = read_metadata(path, "progress")
        for name, now in self.division.items():  # with other ones some volumes would come twice
            if (first := progress.get(name, now)) != now:
                raise UsageError(
                    f"{path.parent}: {name} was {first} at first and is {now} now; go on with "
                    f"{first}, or remove the folder to begin anew"
                )
        tensors = load_file(str(path))

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        self.average.load_state_dict(part("average."))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimiser.").items():
            i, name = key.split(".")
            # A fused optimiser refuses moments that lie otherwise than their weights.
            moments.setdefault(int(i), {})[name] = as_features_lie(value)
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.best = progress["step"], progress["best"]
        if "sums" in progress:
            self.sums, self.summed = self.sums.new_tensor(progress["sums"]), progress["summed"]
        self.loss = RemixLoss(tuple(progress["factors"]))


def forward_parts(
    network: ResidualUNet | None, batch: dict[str, Tensor], loss: RemixLoss, rim: int
) -> Tensor:
    """Loss parts (4, n) of a batch; of the identity without a network. The loss is float32.

    Each patch counts relative to what its scan lacks, as a gain in decibels does; else thick slices
    drown the rest.
    """
    inputs = batch["inputs"].float()
    if network is None:
        output = inputs[:, 0]
    else:
        with half_precision(inputs, len(network.widths)):
            output = network(inputs, batch["scan"])[:, 0]
        output = output.float()
    inner = (slice(None), *(slice(rim, n - rim) for n in output.shape[1:]))
    target, covered = batch["targets"].float(), inputs[:, 1]
    parts = loss.parts(output[inner], target[inner], covered[inner], batch["detail"])
    return parts * (TYPICAL / residual_scale(batch["scan"]))


def train(
    network: ResidualUNet,
    simulator: Simulator,
    validation: Simulator,
    schedule: Schedule,
    folder: Path,
    *,
    device: str = "cpu",
    loss: RemixLoss | None = None,
    progress: bool = True,
) -> Path:
    """Train one network; go on where an earlier call was stopped.

    Parameters
    ----------
    network : ResidualUNet
        Its weights are the start; ignored when ``folder`` holds a checkpoint.
    simulator, validation : Simulator
        Of training and of validation persons.
    schedule : Schedule
    folder : Path
        Receives ``checkpoint.safetensors``, ``log.csv``, ``best.safetensors`` (the average with the
        best validation) and ``schedule.json``.
    loss : RemixLoss, optional
        Calibrated on the identity if absent.

    Returns
    -------
    Path
        Of the best average weights.
    """
    checkpoint, best = folder / CHECKPOINT, folder / "best.safetensors"
    if is_finished(folder, schedule):
        return best
    folder.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    torch.manual_seed(simulator.seed)
    state = State(network, schedule, where, simulator.patches_per_volume)
    if checkpoint.exists():
        state.load(checkpoint)
        LOGGER.info("%s: going on from step %d", folder.name, state.step)
    if team.LEADS:
        (folder / "schedule.json").write_text(json.dumps(asdict(schedule), indent=1))
        check = Validation(validation, schedule.validation_volumes, schedule.workers, where)
    stream = batches(simulator, schedule, state.step, where)
    if state.loss is None:
        state.loss = loss
    if state.loss is None:
        first = list(islice(stream, 16))
        with torch.no_grad():
            identity = [forward_parts(None, b, RemixLoss(), schedule.rim) for b in first]
        parts = torch.cat(identity, dim=1).mean(dim=1, keepdim=True)
        team.average([parts])
        state.loss = RemixLoss().calibrated(parts)
        stream = batches(simulator, schedule, state.step, where)
        LOGGER.info("loss factors %s", dict(zip(PARTS, state.loss.factors, strict=True)))

    factors = state.loss.factors
    log = folder / "log.csv" if team.LEADS else Path(os.devnull)

    with log.open("a" if state.step else "w", newline="") as file:
        writer = csv.writer(file)

        def validate(rate: float, means: Sequence[float]) -> float:
            """One row of the log; the average is kept if it is the best so far."""
            gain = check(state.average)
            if not math.isfinite(gain):
                raise RemixError(
                    f"{folder}: what is gained on validation volumes at step {state.step} is no "
                    "finite number. Look for voxels that are no numbers"
                )
            numbers = [f"{v:.5f}" for v in means]
            writer.writerow([state.step, f"{rate:.3g}", *numbers, f"{gain:.3f}"])
            file.flush()
            if gain > state.best:
                state.best = gain
                told = {"validation_gain_db": gain, "loss_factors": factors}
                save_network(state.average, best, step=state.step, **told)
            return gain

        if state.step == 0:
            writer.writerow(["step", "rate", "loss", *PARTS, "validation_gain_db"])
            if team.LEADS:  # what a stage begins with may be better than all that follows
                validate(0.0, [math.nan] * (1 + len(PARTS)))
                state.save(checkpoint)
        quiet = not (progress and team.LEADS)
        bar = tqdm(total=schedule.steps, initial=state.step, desc=folder.name, disable=quiet)
        for batch in islice(stream, schedule.steps - state.step):
            rate = schedule.rate_at(state.step)
            for group in state.optimiser.param_groups:
                group["lr"] = rate
            parts = forward_parts(state.network, batch, state.loss, schedule.rim)
            total = state.loss(parts)
            state.optimiser.zero_grad(set_to_none=True)
            total.backward()
            team.average(p.grad for p in state.network.parameters() if p.grad is not None)
            torch.nn.utils.clip_grad_norm_(state.network.parameters(), schedule.clip)
            state.optimiser.step()
            state.step += 1
            # A young average would remember the start for too long.
            keep = min(schedule.ema, (1 + state.step) / (10 + state.step))
            for mean, value in zip(
                state.average.parameters(), state.network.parameters(), strict=True
            ):
                mean.lerp_(value.detach(), 1 - keep)
            state.sums += torch.stack([total.detach(), *parts.detach().mean(dim=1)])
            state.summed += 1
            bar.update()
            due = state.step % schedule.validate_every == 0 or state.step == schedule.steps
            if team.LEADS and (due or state.step % schedule.checkpoint_every == 0):
                if not all(p.isfinite().all() for p in state.network.parameters()):
                    raise RemixError(
                        f"{folder}: weights are no finite numbers at step {state.step} or before; "
                        "the last checkpoint is of before. Look for voxels that are no numbers, or "
                        "lower the rate"
                    )
                if due:
                    gain = validate(rate, (state.sums / state.summed).tolist())
                    state.sums, state.summed = torch.zeros_like(state.sums), 0
                    bar.set_postfix(gain=f"{gain:.2f} dB")
                state.save(checkpoint)
        bar.close()
    team.wait()  # the next stage begins with what the first process has written
    return best
