"""What the JSON sidecars of a scan say.

Not read by PyBIDS, which refuses a whole dataset for one broken sidecar.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from remix_bids.naming import split_name

LOGGER = logging.getLogger("remix_bids")


def read_sidecars(scan: Path, bids_dir: Path) -> dict[str, Any]:
    """Sidecars of a scan by BIDS' inheritance: the nearer the folder, the more it counts.

    One that cannot be read is warned about and left out.

    Parameters
    ----------
    scan : Path
        Below ``bids_dir``.
    bids_dir : Path
    """
    entities, suffix, _ = split_name(scan)
    below = scan.parent.relative_to(bids_dir).parts
    content: dict[str, Any] = {}
    for depth in range(len(below) + 1):
        applying = []
        for path in _sidecars(bids_dir.joinpath(*below[:depth]), suffix):
            pairs = path.name.partition(".")[0].split("_")[:-1]
            if set(pairs) <= {f"{key}-{value}" for key, value in entities.items()}:
                applying.append((len(pairs), path))
        for _, path in sorted(applying):
            content |= _read_sidecar(path)
    return content


def forget_sidecars() -> None:
    """Read all files anew from here on."""
    for cached in (_sidecars, _read_sidecar):
        cached.cache_clear()


@lru_cache(maxsize=64)
def _sidecars(folder: Path, suffix: str) -> tuple[Path, ...]:
    return (*folder.glob(f"*_{suffix}.json"), *folder.glob(f"{suffix}.json"))


@lru_cache(maxsize=64)  # so that one at the top is read, and warned about, once
def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        # Keys and numbers are ASCII; the name of a hospital may be in any encoding.
        content = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (OSError, ValueError) as error:
        LOGGER.warning("%s is not read: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}


def positive(value: object) -> float | None:
    """A number above zero, to 4 decimals; None for what else a sidecar may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Neither infinity, as which JSON reads 1e400, nor what would be rounded to 0.
    return round(float(value), 4) if 1e-4 <= value < 1e6 else None
