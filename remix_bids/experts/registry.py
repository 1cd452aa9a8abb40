"""The table of experts, and the gate that picks one.

The gate looks at a voxel volume in mm3, rounded to 3 decimals:

==============  =======
volume          expert
==============  =======
below 1.5       1
[1.5, 2.5)      2
[2.5, 3.5)      3
[3.5, 4.5)      4
[4.5, 5.5)      5
[5.5, 6.5)      6
6.5 and above   7 (above 8.5 with a warning)
==============  =======
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from remix_bids.errors import MissingResourceError

EXPERTS = [str(k) for k in range(1, 8)]
"""Those that the gate chooses from."""
GENERAL = "general"
NO_EXPERT = "none"
UNBOUNDED = 1e9
"""Upper end (mm3) of the range of the last expert."""
VOLUME_LIMIT = 8.5
"""Above this voxel volume (mm3) the last expert works at the edge of its range, or outside it."""
FINE_ENOUGH = 1.05
"""With all voxel sides at most this long (mm) the gate chooses no expert."""


def voxel_volume(voxel_sizes: Iterable[float]) -> float:
    """Product of the three voxel sizes (mm), in mm3, rounded to 3 decimals: the paper's gate."""
    return round(float(np.prod([float(s) for s in voxel_sizes])), 3)


def effective_voxel_volume(voxel_sizes: Iterable[float]) -> float:
    """The same product with each side counted as at least the target's 1 mm: our gate.

    Scanners reconstruct thick slices on fine matrices: 0.45 x 0.45 x 6 mm is 1.2 mm3 by the plain
    product, but holds no more detail than 1 x 1 x 6 mm.
    """
    return voxel_volume(max(float(s), 1.0) for s in voxel_sizes)


def is_fine_enough(voxel_sizes: Iterable[float]) -> bool:
    """Whether a scan is only resampled: it has next to nothing to gain at 1 mm."""
    # Headers hold float32, and sides of a turned grid are rounded otherwise.
    return round(max(voxel_sizes), 3) <= FINE_ENOUGH


@dataclass(frozen=True)
class ExpertRecord:
    """One network: where it is, what it serves and what it was trained for.

    Attributes
    ----------
    name : str
        '1' to '7' or 'general'.
    path : Path
        The safetensors file.
    sha256 : str
        Of that file.
    lower, upper : float
        The voxel volumes it serves, mm3: lower <= volume < upper.
    anisotropy : tuple of 2 float
        Smallest and largest ratio of effective voxel sides seen in training.
    reference : tuple of float, optional
        What it computed where it was exported; see `remix_bids.experts.reference`.
    consistency_steps : int
        Steps of `remix_bids.simulation.estimate.make_consistent` that follow the network.
    """

    name: str
    path: Path
    sha256: str
    lower: float
    upper: float
    anisotropy: tuple[float, float] = (1.0, 9.0)
    reference: tuple[float, ...] | None = None
    consistency_steps: int = 0

    def check(self) -> Path:
        """Return the path of the weights after comparing their sha256.

        Raises
        ------
        MissingResourceError
            If the file is missing or is not the one that the table names.
        """
        if not self.path.is_file():
            raise MissingResourceError(
                f"expert {self.name}: {self.path} is missing; reinstall remix-bids or correct "
                "--experts-dir"
            )
        found = hashlib.sha256(self.path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise MissingResourceError(
                f"expert {self.name}: {self.path} has sha256 {found[:12]}..., the table says "
                f"{self.sha256[:12]}...; the file is damaged, reinstall remix-bids or correct "
                "--experts-dir"
            )
        return self.path


class Registry:
    """All experts of one folder."""

    def __init__(self, records: Iterable[ExpertRecord]) -> None:
        self._records = {record.name: record for record in records}

    def __getitem__(self, name: str) -> ExpertRecord:
        try:
            return self._records[str(name)]
        except KeyError:
            known = ", ".join(self._records) or "none"
            raise MissingResourceError(f"there is no expert {name!r}; known: {known}") from None

    def __iter__(self):
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def select(self, volume: float) -> ExpertRecord:
        """The expert that serves a voxel volume (mm3); see the table in the module's docstring."""
        if not volume > 0:
            raise ValueError(f"a voxel volume must be positive, not {volume}")
        volume = round(float(volume), 3)
        for record in self:
            if record.name != GENERAL and record.lower <= volume < record.upper:
                return record
        raise MissingResourceError(f"no expert serves a voxel volume of {volume} mm3")


def load_registry(directory: Path | None = None) -> Registry:
    """Read ``experts.toml`` of a folder; the shipped experts by default.

    Raises
    ------
    MissingResourceError
        If the table is missing or cannot be read.
    """
    if directory is None:
        directory = Path(str(resources.files("remix_bids.data").joinpath("experts")))
    table = Path(directory) / "experts.toml"
    if not table.is_file():
        raise MissingResourceError(f"{table} is missing; correct --experts-dir")
    try:
        rows = tomllib.loads(table.read_text())["expert"]
        return Registry(
            ExpertRecord(
                name=name,
                path=table.with_name(row["file"]),  # refuses what lies elsewhere
                sha256=str(row["sha256"]),
                lower=float(row["lower"]),
                upper=float(row["upper"]),
                anisotropy=tuple(row.get("anisotropy", (1.0, 9.0))),
                reference=tuple(map(float, row["reference"])) if "reference" in row else None,
                consistency_steps=int(row.get("consistency_steps", 0)),
            )
            for name, row in rows.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MissingResourceError(f"{table} cannot be read: {error}") from error
