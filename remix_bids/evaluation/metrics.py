"""How near an image is to the truth, inside a mask. Images are (x, y, z), masks bool."""

from __future__ import annotations

import torch
from torch import Tensor

from remix_bids.training.losses import ssim_map


def peak(truth: Tensor, mask: Tensor) -> float:
    """The intensity that counts as full range: the 99.5th percentile of the truth in the mask."""
    values = truth[mask]
    return float(values.kthvalue(max(1, round(0.995 * len(values)))).values)


def psnr(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; negative values are clipped."""
    error = (image.clamp(min=0) - truth)[mask]
    return float(10 * torch.log10(peak(truth, mask) ** 2 / (error.double() ** 2).mean()))


def correlation(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Pearson's correlation."""
    pair = torch.stack([image[mask], truth[mask]]).double()
    return float(torch.corrcoef(pair)[0, 1])


def ssim(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Mean structural similarity of the voxels whose 7-voxel window fits into the image."""
    similarity = ssim_map(image.clamp(min=0)[None], truth[None], peak(truth, mask))[0]
    return float(similarity[mask[3:-3, 3:-3, 3:-3]].mean())


def eroded(mask: Tensor, voxels: int) -> Tensor:
    """A mask without its outermost voxels."""
    outside = (~mask).float()[None, None]
    size = 2 * voxels + 1
    grown = torch.nn.functional.max_pool3d(outside, size, stride=1, padding=voxels)
    return (grown == 0)[0, 0] & mask
