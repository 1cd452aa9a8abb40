"""Running an expert: array in, array out."""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from remix_bids.errors import InputImageError, MissingResourceError
from remix_bids.experts.registry import ExpertRecord
from remix_bids.experts.unet import ResidualUNet

PERCENTILE = 99.5


def intensity_scale(image: Tensor, covered: Tensor) -> float:
    """The intensity that becomes 1: the 99.5th percentile of the foreground that was acquired.

    Foreground is what exceeds a tenth of the 99.5th percentile of all acquired voxels, so that the
    amount of air in the field of view does not move the scale.

    Raises
    ------
    ValueError
        If nothing was acquired or all of it is zero.
    """
    values = image[covered.bool()]
    if len(values) == 0:
        raise ValueError("no voxel of the scan lies inside the working grid")
    rough = _percentile(values)
    if not rough > 0:
        raise ValueError("the scan is zero everywhere inside the working grid")
    return _percentile(values[values > 0.1 * rough])


def _percentile(values: Tensor) -> float:
    # torch.quantile refuses more than 2**24 values, a working grid comes close; kthvalue does not.
    k = max(1, round(PERCENTILE / 100 * len(values)))
    return float(values.kthvalue(k).values)


def network_input(
    low_resolution: Tensor, covered: Tensor, phase: Tensor, axis: int, scale: float
) -> Tensor:
    """Stack the channels in the order of `remix_bids.experts.unet.INPUTS`.

    Parameters
    ----------
    axis : int
        Along which the slices are stacked; it comes last, so that the network need not learn one
        task three times.
    """
    channels = torch.stack([low_resolution / scale, covered.to(low_resolution), phase])
    return slices_last(channels, axis)


def slices_last(volume: Tensor, axis: int) -> Tensor:
    """Swap the slices' axis (0, 1, 2 of the last three) with the last one; its own inverse."""
    return volume.transpose(axis - 3, -1)


def load_expert(record: ExpertRecord) -> ResidualUNet:
    """Load the network of an expert, its file checked by sha256; nothing is unpickled.

    Raises
    ------
    MissingResourceError
        If the file is missing, damaged or holds another network.
    """
    path = record.check()
    try:
        with safe_open(str(path), framework="pt") as file:
            design = json.loads(file.metadata()["network"])
        network = ResidualUNet(design["inputs"], tuple(design["widths"]))
        network.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()})
    except Exception as error:
        raise MissingResourceError(
            f"expert {record.name}: {path} does not load: {error}"
        ) from error
    return network.eval()


@torch.inference_mode()
def predict(network: ResidualUNet, inputs: Tensor) -> Tensor:
    """Run a network on one volume of any size.

    Parameters
    ----------
    inputs : (channels, x, y, z) tensor
        Padded with zeros at the far ends to a multiple that the network can halve.

    Returns
    -------
    (x, y, z) tensor
    """
    shape = inputs.shape[1:]
    pad = [(-n) % network.multiple for n in shape]
    padded = F.pad(inputs, (0, pad[2], 0, pad[1], 0, pad[0]))[None]
    return network(padded)[0, 0, : shape[0], : shape[1], : shape[2]]


def enhance(
    low_resolution: np.ndarray,
    covered: np.ndarray,
    phase: np.ndarray,
    axis: int,
    record: ExpertRecord,
    *,
    device: str = "cpu",
    network: ResidualUNet | None = None,
) -> np.ndarray:
    """Super-resolve an image on the working grid.

    Parameters
    ----------
    low_resolution : (x, y, z) float array
        The linear estimate (`remix_bids.simulation.estimate`) in scanner units, zero where nothing
        was acquired.
    covered : (x, y, z) bool array
        Where the scan has data.
    phase : (x, y, z) float array
        See `remix_bids.simulation.acquisition.slice_phase`.
    axis : int
        Along which the slices are stacked.
    record : ExpertRecord
    device : str
        A torch device.
    network : ResidualUNet, optional
        The expert, already loaded, to spare the reading.

    Returns
    -------
    float32 array of the same shape
        In scanner units; zero where nothing was acquired, negative nowhere.

    Raises
    ------
    InputImageError
        If the image holds nothing to work on.
    """
    network = load_expert(record) if network is None else network
    image = torch.from_numpy(np.ascontiguousarray(low_resolution, dtype=np.float32))
    mask = torch.from_numpy(np.ascontiguousarray(covered, dtype=bool))
    try:
        scale = intensity_scale(image, mask)
    except ValueError as error:
        raise InputImageError(str(error)) from error
    wave = torch.from_numpy(np.ascontiguousarray(phase, dtype=np.float32))
    inputs = network_input(image, mask, wave, axis, scale).to(device)
    output = slices_last(predict(network.to(device), inputs), axis).cpu() * scale
    return (output.clamp(min=0) * mask).numpy()
