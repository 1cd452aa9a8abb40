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
from remix_bids.experts.unet import INPUTS, SCAN, ResidualUNet
from remix_bids.simulation.estimate import Estimate
from remix_bids.simulation.intensity import intensity_scale


def network_input(low: Estimate, scale: float) -> tuple[Tensor, Tensor]:
    """What a network sees of a scan, its slices stacked along the last axis.

    The axis comes last so that the network need not learn one task three times.

    Parameters
    ----------
    low : Estimate
    scale : float
        The intensity that becomes 1.

    Returns
    -------
    (channels, x, y, z) tensor
        In the order of `remix_bids.experts.unet.INPUTS`.
    (4,) tensor
        In the order of `remix_bids.experts.unet.SCAN`.
    """
    order = axes_in_order(low.sampling.axis)
    x, y, z = low.image.shape
    covered = low.covered.to(low.image)
    phases = torch.from_numpy(low.sampling.phases((x, y, z))[order]).to(low.image) * covered
    channels = torch.stack([low.image / scale, covered, *phases, low.rest / scale])
    scan = [*low.sampling.sizes[order], low.noise / scale]
    return slices_last(channels, low.sampling.axis), torch.as_tensor(scan).to(low.image)


def axes_in_order(axis: int) -> list[int]:
    """The axes with ``axis`` and the last one swapped."""
    order = [0, 1, 2]
    order[axis], order[2] = order[2], order[axis]
    return order


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
        for key, known in (("channels", INPUTS), ("scan", SCAN)):
            if (told := design.get(key, list(known))) != list(known):
                raise ValueError(f"its {key} are {', '.join(told)}, not {', '.join(known)}")
        if design["inputs"] != len(INPUTS):
            raise ValueError(f"it takes {design['inputs']} channels, not {len(INPUTS)}")
        network = ResidualUNet(design["inputs"], tuple(design["widths"]))
        network.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()})
    except Exception as error:
        raise MissingResourceError(
            f"expert {record.name}: {path} does not load: {error}"
        ) from error
    return network.eval()


@torch.inference_mode()
def predict(network: ResidualUNet, inputs: Tensor, scan: Tensor) -> Tensor:
    """Run a network on one volume of any size, and on its mirror image: the mean of both.

    The task knows no direction, the weights do a little: their errors differ, and partly cancel.

    Parameters
    ----------
    inputs : (channels, x, y, z) tensor
        Padded with zeros at the far ends to a multiple that the network can halve.
    scan : (4,) tensor
        Its numbers, as in `remix_bids.experts.unet.SCAN`.

    Returns
    -------
    (x, y, z) tensor
        Of mirrored inputs (along all three axes), the mirrored output.
    """
    shape = inputs.shape[1:]
    pad = [(-n) % network.multiple for n in shape]

    def one_pass(*axes: int) -> Tensor:
        padded = F.pad(inputs.flip(axes), (0, pad[2], 0, pad[1], 0, pad[0]))[None]
        output = network(padded, scan[None])[0, 0, : shape[0], : shape[1], : shape[2]]
        return output.flip([axis - 1 for axis in axes])

    return (one_pass() + one_pass(1, 2, 3)) / 2


def enhance(
    low: Estimate,
    record: ExpertRecord,
    *,
    device: str = "cpu",
    network: ResidualUNet | None = None,
) -> np.ndarray:
    """Super-resolve an image on the working grid.

    Parameters
    ----------
    low : Estimate
        Of the scan (`remix_bids.simulation.estimate`), float32, in scanner units.
    record : ExpertRecord
    device : str
        A torch device.
    network : ResidualUNet, optional
        The expert, already loaded, to spare the reading.

    Returns
    -------
    float32 array of the same shape
        In scanner units; zero where nothing was acquired, negative only if the scan is.

    Raises
    ------
    InputImageError
        If the image holds nothing to work on.
    """
    network = load_expert(record) if network is None else network
    try:
        scale = intensity_scale(low.image, low.covered)
    except ValueError as error:
        raise InputImageError(str(error)) from error
    inputs, scan = network_input(low, scale)
    # Else a GPU rounds to TF32, which is not what `remix_bids.experts.reference` has compared.
    torch.backends.cudnn.allow_tf32 = False
    output = predict(network.to(device), inputs.to(device), scan.to(device)).cpu()
    output = slices_last(output, low.sampling.axis) * scale
    if low.image.min() >= 0:
        output = output.clamp(min=0)
    return (output * low.covered).numpy()
