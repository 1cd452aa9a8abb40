"""The four-part loss of REMIx: MAE, SSIM, gradient MAE (intensity), correlation (structure).

All images are (n, x, y, z), scaled so that 1 is bright tissue; weights are (n, x, y, z) and >= 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from remix_bids.spatial import along_axis

PARTS = ("mae", "gradient", "ssim", "correlation")
SHARES = (0.5, 0.2, 0.2, 0.1)
"""Of each part in the loss of the identity, once calibrated."""
AIR_WEIGHT = 0.1


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over space of each image, (n,)."""
    return (values * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1e-6)


def mae(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute error, (n,)."""
    return weighted_mean((x - y).abs(), weight)


def gradient_mae(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute error of the three forward differences, (n,)."""
    error = x - y
    total = torch.zeros_like(error[:, 0, 0, 0])
    for axis in (1, 2, 3):
        n = error.shape[axis] - 1
        both = torch.minimum(weight.narrow(axis, 0, n), weight.narrow(axis, 1, n))
        total = total + weighted_mean(error.diff(dim=axis).abs(), both)
    return total / 3


@lru_cache(maxsize=16)
def _window(
    n: int, dtype: torch.dtype, device: torch.device, size: int = 7, sigma: float = 1.5
) -> Tensor:
    offsets = torch.arange(size, dtype=dtype) - size // 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = torch.zeros(n - size + 1, n, dtype=dtype)
    for i in range(n - size + 1):
        matrix[i, i : i + size] = weights / weights.sum()
    return matrix.to(device)


def ssim_map(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity (Wang 2004) in 3D, Gaussian window of 7 voxels and sigma 1.5.

    Returns
    -------
    (n, x - 6, y - 6, z - 6) tensor
        Only where the whole window fits.
    """
    windows = [_window(n, x.dtype, x.device) for n in x.shape[1:]]

    def blur(image: Tensor) -> Tensor:
        for axis, window in enumerate(windows):
            image = along_axis(window, image, axis)
        return image

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my, xx, yy, xy = blur(torch.stack([x, y, x * x, y * y, x * y]))
    vx, vy, vxy = xx - mx * mx, yy - my * my, xy - mx * my
    return ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def ssim_loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """1 - SSIM, (n,)."""
    return weighted_mean(1 - ssim_map(x, y), weight[:, 3:-3, 3:-3, 3:-3])


def correlation_loss(x: Tensor, y: Tensor, weight: Tensor, flat: float = 0.02) -> Tensor:
    """1 - Pearson's correlation, (n,); zero where the target's deviation is below ``flat``."""

    def centred(image: Tensor) -> Tensor:
        return image - weighted_mean(image, weight)[:, None, None, None]

    x, y = centred(x), centred(y)
    vx, vy = weighted_mean(x * x, weight), weighted_mean(y * y, weight)
    r = weighted_mean(x * y, weight) / torch.sqrt(vx * vy + 1e-12)
    return torch.where(vy > flat**2, 1 - r, torch.zeros_like(r))


@dataclass(frozen=True)
class RemixLoss:
    """The weighted sum of the four parts.

    Attributes
    ----------
    factors : tuple of 4 float
        In the order of `PARTS`; see `calibrated`.
    """

    factors: tuple[float, ...] = (1.0, 0.5, 0.1, 0.1)

    def parts(self, x: Tensor, y: Tensor, covered: Tensor, detail: Tensor) -> Tensor:
        """Unweighted parts (4, n).

        Parameters
        ----------
        x, y : (n, x, y, z) tensors
            Output and target.
        covered : (n, x, y, z) tensor
            Where the scan has data; nothing else counts.
        detail : (n,) tensor
            Trust in the fine detail of each target; scales gradient and SSIM.
        """
        weight = covered * torch.where(y > 0.02, 1.0, AIR_WEIGHT)
        return torch.stack(
            [
                mae(x, y, weight),
                gradient_mae(x, y, weight) * detail,
                ssim_loss(x * covered, y * covered, weight) * detail,  # whole windows are seen
                correlation_loss(x, y, weight),
            ]
        )

    def __call__(self, parts: Tensor) -> Tensor:
        """The loss of a batch from its parts."""
        factors = torch.tensor(self.factors, dtype=parts.dtype, device=parts.device)
        return (factors @ parts).mean()

    def calibrated(self, identity: Tensor) -> RemixLoss:
        """Factors that give the parts of the identity (4, n) their `SHARES`, MAE kept at 1."""
        means = identity.mean(dim=1).clamp(min=1e-6).tolist()
        raw = [share / mean for share, mean in zip(SHARES, means, strict=True)]
        return replace(self, factors=tuple(value / raw[0] for value in raw))
