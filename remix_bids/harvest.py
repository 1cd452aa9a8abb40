"""Acquisitions out of collections of real headers, without identifiers or dates."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from remix_bids.simulation.acquisition import Geometry

OPEN_LICENCES = {"CC0", "PDDL", "MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC BY"}
HELD_OUT_SHARE = 0.2


def _person(row: dict) -> str:
    """The person of a record: several scans of one person share it."""
    collection = re.split(r"[ /]", row["source"].removeprefix("OpenNeuroDatasets/"))[0:2]
    kind = "longitudinal" if "longitudinal" in row["source"] else ""
    return "/".join([*collection, kind, row["subject"].split("_study")[0]])


def geometries_from_records(path: Path) -> list[Geometry]:
    """Turn a JSON list of header records into a bank, leaving out what may not be shipped.

    Persons become running numbers. The held-out fifth is chosen by a hash of the person, so that
    it does not depend on the order of the rows nor change when rows are added.

    Parameters
    ----------
    path : Path
        Records with the keys ``source, licence, exact, contrast, subject, shape, affine,
        slice_thickness, slice_gap``.
    """
    rows = [r for r in json.loads(Path(path).read_text()) if r["licence"] in OPEN_LICENCES]
    persons = {name: i for i, name in enumerate(sorted({_person(r) for r in rows}))}
    out = []
    for row in rows:
        person = _person(row)
        draw = int(hashlib.sha256(person.encode()).hexdigest()[:8], 16) / 16**8
        out.append(
            Geometry(
                shape=tuple(row["shape"]),
                affine=tuple(tuple(round(v, 6) for v in line) for line in row["affine"]),
                thickness=row["slice_thickness"],
                gap=row["slice_gap"],
                exact=row["exact"],
                contrast=row["contrast"],
                licence=row["licence"],
                source=re.split(r" |/sub-", row["source"])[0],
                group=f"p{persons[person]:04d}",
                held_out=draw < HELD_OUT_SHARE,
            )
        )
    return out
