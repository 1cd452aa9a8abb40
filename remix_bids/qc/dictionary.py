"""What every figure of quality means."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources


@lru_cache(maxsize=1)
def qc_dictionary() -> dict[str, dict[str, str]]:
    """Name, description, unit and better direction of every figure, in the order of reports."""
    return json.loads(resources.files("remix_bids.data").joinpath("qc.json").read_text())
