"""Checks of a folder of experts: checksums and reference outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remix_bids.errors import MissingResourceError
from remix_bids.experts.inference import load_expert
from remix_bids.experts.reference import TOLERANCE, difference, reference_output
from remix_bids.experts.registry import EXPERTS, GENERAL, UNBOUNDED, Registry, load_registry


@dataclass(frozen=True)
class Finding:
    """What was found about one expert.

    Attributes
    ----------
    good : bool
    compared : bool
        False where the table holds no reference output.
    text : str
        One line.
    """

    good: bool
    compared: bool
    text: str


def verify(directory: Path | None = None) -> Iterator[Finding]:
    """Check every expert of a folder, the shipped ones by default; a bad one stops no other.

    Raises
    ------
    MissingResourceError
        If there is no table of experts, or no expert in it.
    """
    registry = load_registry(directory)
    if len(registry) == 0:
        raise MissingResourceError("experts.toml names no expert; export them again")
    for record in registry:
        try:
            found = reference_output(load_expert(record))
        except MissingResourceError as error:
            yield Finding(False, False, f"FAILED  {error}")
            continue
        if record.reference is None:
            yield Finding(True, False, f"ok      expert {record.name}: sha256")
            continue
        apart = difference(found, record.reference)
        good = apart <= TOLERANCE
        text = f"expert {record.name}: sha256, reference output to {apart:.1g} of its size"
        if not good:
            text = (
                f"expert {record.name}: this machine computes something else than the table says: "
                f"the reference output differs by {apart:.1g} of its size, {TOLERANCE:g} is "
                "accepted; compare the version of torch"
            )
        yield Finding(good, True, f"{'ok    ' if good else 'FAILED'}  {text}")
    for text in _gaps(registry):
        yield Finding(False, False, f"FAILED  {text}")


def _gaps(registry: Registry) -> Iterator[str]:
    """What the gate, or ``--expert``, would look for in vain."""
    records = {record.name: record for record in registry}
    if lacking := [name for name in (*EXPERTS, GENERAL) if name not in records]:
        yield f"experts.toml lacks {', '.join(lacking)}"
        return
    bounds = [0.0]
    for name in EXPERTS:
        if records[name].lower != bounds[-1]:
            yield (
                f"expert {name} serves volumes from {records[name].lower:g} mm3 on, and the one "
                f"before it up to {bounds[-1]:g}"
            )
        bounds.append(records[name].upper)
    if bounds[-1] < UNBOUNDED:
        yield f"expert {EXPERTS[-1]} serves volumes up to {bounds[-1]:g} mm3 only"
