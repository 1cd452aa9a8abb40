"""How near an image is to the truth, inside a mask. Images are (x, y, z), masks bool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def matched(image: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """The image with the gain and offset that bring it nearest to the truth in the mask.

    Fair to methods that make their own intensities.
    """
    x, y = image[mask].double(), truth[mask].double()
    gain = ((x - x.mean()) * (y - y.mean())).mean() / x.var(unbiased=False).clamp(min=1e-12)
    return (gain * (image - x.mean()) + y.mean()).to(image)


def detail_ratio(
    image: Tensor, truth: Tensor, mask: Tensor, band: tuple[float, float] = (0.2, 0.4)
) -> float:
    """Energy of the gradient in a band of frequencies (cycles/mm), relative to the truth's.

    The images (1 mm) are multiplied by the mask, its edge softened over some voxels.
    """
    soft = F.avg_pool3d(mask.float()[None, None], 5, stride=1, padding=2)[0, 0]
    axes = [torch.fft.fftfreq(n) for n in image.shape]
    squared = sum(
        (f**2).view([-1 if i == axis else 1 for i in range(3)]) for axis, f in enumerate(axes)
    )
    frequency = torch.as_tensor(squared).sqrt()
    inside = (frequency >= band[0]) & (frequency < band[1])

    def energy(x: Tensor) -> float:
        spectrum = torch.fft.fftn(x.clamp(min=0) * soft)
        return float((frequency[inside] ** 2 * spectrum[inside].abs() ** 2).double().sum())

    return energy(image) / energy(truth)


def grown(mask: Tensor, voxels: int) -> Tensor:
    """A mask and all within some voxels of it."""
    size = 2 * voxels + 1
    pooled = mask.float()[None, None]
    for axis in range(3):  # a cube is separable
        kernel = [size if a == axis else 1 for a in range(3)]
        pad = [voxels if a == axis else 0 for a in range(3)]
        pooled = F.max_pool3d(pooled, kernel, stride=1, padding=pad)
    return pooled[0, 0] > 0


def eroded(mask: Tensor, voxels: int) -> Tensor:
    """A mask without its outermost voxels."""
    return mask & ~grown(~mask, voxels)
