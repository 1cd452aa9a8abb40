"""How much memory the nodes of a scan need: what the scheduler goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import nibabel as nb

ENHANCE_GB = 2.5
_VALIDATE_GB, _RESAMPLE_GB, _QC_GB = 0.3, 1.5, 2.0
_REGISTER_GB, _REGISTER_GB_PER_START = 0.5, 0.4


@dataclass(frozen=True)
class Footprint:
    """Peak memory of nodes, in GB.

    Measured with ``--resource-monitor`` on seven clinical scans, and by hand, without Nipype, on
    matrices of 512 x 512 x 28 and 512 x 512 x 176; with a margin.

    Attributes
    ----------
    voxels : int
        Of the scan.
    nodes : int
        At most, of the table that cubic interpolation to 1 mm makes of it
        (`remix_bids.spatial.resample`).
    """

    voxels: int = 0
    nodes: int = 0

    @classmethod
    def of(cls, path: Path) -> Footprint:
        """By the header; nothing where that cannot be read (the scan's own node will say so)."""
        try:
            image = nb.load(path)
            shape = image.shape[:3]
            sides = [math.hypot(*column) for column in image.affine[:3, :3].T]
            # As `remix_bids.spatial` has it, which needs torch: the parent never imports it.
            along = [(n - 1) * max(2, round(2 * s)) + 1 for n, s in zip(shape, sides, strict=True)]
        except Exception:  # nibabel raises many kinds for a damaged file
            return cls()
        return cls(math.prod(image.shape), math.prod(along))

    @property
    def validate_gb(self) -> float:
        return _VALIDATE_GB + 6e-9 * self.voxels

    @property
    def resample_gb(self) -> float:
        return max(_RESAMPLE_GB, self._table_gb)

    @property
    def qc_gb(self) -> float:
        """Of what takes the scan's table, and images on the working grid."""
        return max(_QC_GB, self._table_gb)

    @property
    def _table_gb(self) -> float:
        return 0.9 + 4e-9 * (self.nodes + 4 * self.voxels)

    def register_gb(self, starts: int) -> float:
        """With so many starts side by side."""
        return _REGISTER_GB + _REGISTER_GB_PER_START * starts + 12e-9 * self.voxels


UNKNOWN = Footprint()
"""Of a scan that nothing is known of: what any scan needs."""
