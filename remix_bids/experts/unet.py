"""The network of every expert: a volumetric U-Net that predicts what to add to its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUTS = ("linear_estimate", "covered", "phase_1", "phase_2", "phase_3", "rest")
"""Channels of the input, in this order; slices are stacked along the last axis."""

SCAN = ("size_1", "size_2", "size_3", "noise")
"""What is told of the scan as numbers: voxel sizes in mm, noise in units of the image."""


_GAIN = 3.0  # brings the detail of a brain image to about unit variance
_RESIDUAL = 0.02  # size of the missing detail, by the mm that the largest voxel side exceeds 0.9 mm
_NOISE = 0.02  # of a noisy scan
_HIDDEN = 32


def residual_scale(scan: Tensor) -> Tensor:
    """About how large the difference between truth and input is: missing detail, and noise.

    Parameters
    ----------
    scan : (n, 4) tensor
        As in `SCAN`.

    Returns
    -------
    (n,) tensor
        In units of the image.
    """
    detail = _RESIDUAL * (scan[:, :3].clamp(1, 9).amax(dim=1) - 0.9)
    return torch.hypot(detail, scan[:, 3])


def space_to_depth(x: Tensor) -> Tensor:
    """(n, c, x, y, z) to (n, 8 c, x/2, y/2, z/2): no value is lost, full resolution is left."""
    n, c, d, h, w = x.shape
    x = x.reshape(n, c, d // 2, 2, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(n, 8 * c, d // 2, h // 2, w // 2)


def depth_to_space(x: Tensor) -> Tensor:
    """The inverse of `space_to_depth`."""
    n, c, d, h, w = x.shape
    x = x.reshape(n, c // 8, 2, 2, 2, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(n, c // 8, 2 * d, 2 * h, 2 * w)


class Block(nn.Module):
    """Two 3x3x3 convolutions, each with a leaky ReLU. No normalisation: patches are not volumes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(inputs, width, 3, padding=1)
        self.second = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        """``factor`` and ``shift``, (n, width): what the scan's numbers make of the features."""
        x = F.leaky_relu(self.first(x), 0.1)
        x = x * (1 + factor[..., None, None, None]) + shift[..., None, None, None]
        return F.leaky_relu(self.second(x), 0.1)


class ResidualUNet(nn.Module):
    """U-Net on a space-to-depth stem, with a residual connection at its end.

    It sees the image less its local mean, since what is missing does not depend on it: this learns
    faster and is blind to slow bias fields. Half the resolution with eight times the channels costs
    about half as much as full resolution. The scan's voxel sizes and noise scale and shift the
    features of every level: how much detail is missing, along which axes, and how far to trust what
    is there, cannot be seen in a patch.
    The last convolution starts at zero, so that an untrained network is the identity.

    Parameters
    ----------
    inputs : int
        Channels; the residual is added to the first.
    widths : tuple of int
        Channels of each level, the first at half the resolution of the image.
    """

    def __init__(self, inputs: int = len(INPUTS), widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.inputs, self.widths = inputs, tuple(widths)
        self.down = nn.ModuleList(
            Block(i, o) for i, o in zip((8 * inputs, *widths[:-1]), widths, strict=True)
        )
        self.narrow = nn.ModuleList(
            nn.Conv3d(i, o, 1) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.up = nn.ModuleList(Block(2 * w, w) for w in widths[-2::-1])
        self.out = nn.Conv3d(widths[0], 8, 3, padding=1)
        self.blocks = (*widths, *widths[-2::-1])
        self.scan = nn.Sequential(
            nn.Linear(len(SCAN), _HIDDEN),
            nn.LeakyReLU(0.1),
            nn.Linear(_HIDDEN, 2 * sum(self.blocks)),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=0.1)
                nn.init.constant_(module.get_parameter("bias"), 0.0)
        nn.init.zeros_(self.out.weight)
        for parameter in self.scan[2].parameters():
            nn.init.zeros_(parameter)

    @property
    def multiple(self) -> int:
        """Sides of the input must be a multiple of this."""
        return max(8, 2 ** len(self.widths))

    def stem(self, x: Tensor) -> Tensor:
        """(n, inputs, x, y, z) to (n, 8 inputs, x/2, y/2, z/2)."""
        return space_to_depth(x)

    def forward(self, x: Tensor, scan: Tensor) -> Tensor:
        """(n, inputs, x, y, z) and the scan's numbers (n, 4), as in `SCAN`, to (n, 1, x, y, z)."""
        image = x[:, :1]
        mean = F.interpolate(F.avg_pool3d(image, 8), scale_factor=8.0, mode="trilinear")
        scale = residual_scale(scan)[:, None, None, None, None]
        seen = torch.cat(
            [_GAIN * (image - mean), x[:, 1:2] - 1, x[:, 2:5], x[:, 5:] / scale], dim=1
        )
        # What is finer than the output is 1 mm; 1 to 8 mm become 0 to 2, as does the noise.
        sizes, noise = scan[:, :3].clamp(1, 9), (scan[:, 3:] / _NOISE).clamp(0, 3)
        told = torch.cat([sizes.log(), noise], dim=1)
        changes = self.scan(told).split([2 * w for w in self.blocks], dim=1)
        factors = iter([change.chunk(2, dim=1) for change in changes])
        skips = []
        h = self.stem(seen).contiguous(memory_format=torch.channels_last_3d)
        for block in self.down:
            h = block(h, *next(factors))
            skips.append(h)
            h = F.avg_pool3d(h, 2) if len(skips) < len(self.down) else h
        for narrow, block, skip in zip(self.narrow, self.up, skips[-2::-1], strict=True):
            h = F.interpolate(narrow(h), scale_factor=2.0, mode="nearest")
            h = block(torch.cat([h, skip], dim=1), *next(factors))
        # Brings what the network gives to unit size: the last layer learns as fast as the others.
        return image + scale * depth_to_space(self.out(h))
