"""TOML files that users write."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from remix_bids.errors import UsageError


def read_toml(path: Path, told: str) -> dict[str, Any]:
    """The content of a file; ``told``: what it is, for the message.

    Raises
    ------
    UsageError
        It cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{told} {path}: {error}") from error
