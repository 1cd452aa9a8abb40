"""The group level: quality figures of all scans in one table and one interactive page.

The page holds its data and its script; it opens from a disk and asks nothing of the network.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard
from urllib.parse import quote

from remix_bids import __version__
from remix_bids.derivatives import write_text
from remix_bids.errors import NothingToDoError
from remix_bids.naming import join_name, split_name
from remix_bids.qc.dictionary import qc_dictionary

LOGGER = logging.getLogger("remix_bids")
LIMIT = 5.0
"""Robust z-score (median, median absolute deviation) above which a scan is flagged."""

FEWEST = 8
"""Scans of one expert that are compared among themselves; fewer are compared with all of them, by
`OF_ALL` only."""

POOREST_COVERAGE = 95.0  # percent of the brain

# Columns that outliers are looked for in, and the side that is bad.
WATCHED = {
    "registration_score": "low",
    "affine_determinant": "both",
    "consistency_chi2_median": "high",
    "consistency_chi2_p95": "high",
    "consistency_nrmse": "high",
    "unknowable": "high",
    "residual_energy": "high",
    "network_energy": "high",
    "sharpness_after": "both",
    "anisotropy_after": "low",
    "noise_after": "high",
    "brain_volume_after": "both",
}
OF_ALL = ("registration_score", "affine_determinant", "brain_volume_after")
"""Those that do not depend on how thick the slices are."""
FIRST = ("bids_name", "flagged", "reasons", "expert", "voxel_size")


def collect(
    output_dir: Path, participants: Sequence[str] = (), sessions: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """All figures below an output folder, one row for each scan, sorted by name.

    Participants who were asked for and have none are warned about.

    Parameters
    ----------
    output_dir : Path
        What the participant level has written.
    participants, sessions : sequence of str
        Labels without ``sub-`` and ``ses-``; all by default.

    Raises
    ------
    NothingToDoError
        There is none.
    """
    rows, found = [], set()
    for subject_dir in sorted(output_dir.glob("sub-*")):
        label = subject_dir.name.removeprefix("sub-")
        if not subject_dir.is_dir() or (participants and label not in participants):
            continue
        for path in sorted(subject_dir.rglob("*_desc-remix_qc.json")):
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if not isinstance(content, dict) or "bids_name" not in content:
                continue
            if sessions and split_name(content["bids_name"])[0].get("ses") not in sessions:
                continue
            rows.append(content)
            found.add(label)
    if not rows:
        labels = [*(f"sub-{label}" for label in participants), *(f"ses-{s}" for s in sessions)]
        raise NothingToDoError(
            f"there is no *_desc-remix_qc.json{' of ' * bool(labels)}{', '.join(labels)} below "
            f"{output_dir}; run the participant level first"
        )
    if lacking := [label for label in participants if label not in found]:
        LOGGER.warning(
            "not in the table, for there is no *_desc-remix_qc.json of them: %s",
            ", ".join(f"sub-{label}" for label in lacking),
        )
    return sorted(rows, key=lambda row: row["bids_name"])


def flag(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Why each scan stands out: an empty list where it does not.

    A scan is compared with those of its expert by the distance to their median in units of 1.4826
    median absolute deviations; where there are fewer than `FEWEST` of them, with all scans, by
    `OF_ALL`. Warnings and poor coverage count always.
    """
    reasons: list[list[str]] = [[] for _ in rows]
    dictionary = qc_dictionary()
    by_expert: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_expert.setdefault(str(row.get("expert")), []).append(i)
    for key, bad_side in WATCHED.items():
        name = dictionary[key.removesuffix("_after")]["LongName"]
        everyone = _numbers(rows, key, range(len(rows)))
        for expert, members in by_expert.items():
            own = _numbers(rows, key, members)
            group, whose = own, f"expert {expert}"
            if len(own) < FEWEST and key in OF_ALL:
                group, whose = everyone, "all scans"
            if len(group) < FEWEST:
                continue
            middle = median(group)
            spread = 1.4826 * median(abs(value - middle) for value in group)
            for i in members:
                value = rows[i].get(key)
                if not _is_number(value) or not spread > 0:
                    continue
                z = (value - middle) / spread
                if (z > LIMIT and bad_side != "low") or (z < -LIMIT and bad_side != "high"):
                    side = "high" if z > 0 else "low"
                    reasons[i].append(
                        f"{name} is {side}: {value:.4g}, median of {whose} {middle:.4g}"
                    )
    for row, why in zip(rows, reasons, strict=True):
        covered = row.get("brain_coverage")
        if _is_number(covered) and covered < POOREST_COVERAGE:
            why.append(f"Only {covered:.1f} % of the brain in the field of view")
        if row.get("warnings"):
            why.append(f"{row['warnings']} warning(s) in the report")
    return reasons


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(rows: Sequence[dict[str, Any]], key: str, which: Iterable[int]) -> list[float]:
    return [rows[i][key] for i in which if _is_number(rows[i].get(key))]


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    known = list(dict.fromkeys(key for row in rows for key in row))
    return [*FIRST, *(key for key in known if key not in FIRST)]


def column_dictionary(columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """What each column of the table means, as BIDS wants it beside a TSV file."""
    dictionary = qc_dictionary()
    out = {}
    own = {
        "bids_name": "Name of the source image",
        "flagged": "1 where the scan should be looked at",
        "reasons": "Why",
        "expert": "The network that was used",
        "voxel_size": "Native voxel sizes, mm",
    }
    for column in columns:
        base, _, when = column.rpartition("_")
        if column in own:
            out[column] = {"Description": own[column]}
        elif column in dictionary:
            out[column] = dict(dictionary[column])
        elif when in ("before", "after", "enforced") and base in dictionary:
            text = {
                "before": "of the interpolated image",
                "after": "of the output",
                "enforced": "after the consistency step",
            }[when]
            entry = dict(dictionary[base])
            entry["LongName"] += f", {text}"
            out[column] = entry
        else:
            out[column] = {"Description": "n/a"}
    return out


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "n/a"
    return str(value).replace("\t", " ").replace("\n", " ")


def write_group(
    output_dir: Path, participants: Sequence[str] = (), sessions: Sequence[str] = ()
) -> tuple[Path, int, int]:
    """Write ``group_T1w.tsv``, ``.json`` and ``.html`` of what `collect` finds.

    Returns
    -------
    page, number of scans, number of flagged scans

    Raises
    ------
    NothingToDoError
        No scan has been done.
    """
    rows = collect(output_dir, participants, sessions)
    for row, why in zip(rows, flag(rows), strict=True):
        row["flagged"], row["reasons"] = int(bool(why)), "; ".join(why)
    columns = _columns(rows)
    dictionary = column_dictionary(columns)
    table = io.StringIO()
    writer = csv.writer(
        table, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None
    )
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    write_text(output_dir / "group_T1w.tsv", table.getvalue())
    text = json.dumps(dictionary, indent=2, ensure_ascii=False)
    write_text(output_dir / "group_T1w.json", text + "\n")
    page = output_dir / "group_T1w.html"
    write_text(page, group_html(rows, columns, dictionary))
    return page, len(rows), sum(row["flagged"] for row in rows)


def group_html(
    rows: Sequence[dict[str, Any]], columns: Sequence[str], dictionary: dict[str, dict[str, str]]
) -> str:
    """The page."""
    links = []
    for row in rows:
        entities, suffix, _ = split_name(row["bids_name"])
        section = join_name(entities, suffix, "")  # as `individual` names it
        links.append(f"./sub-{quote(entities['sub'])}.html#{quote(section)}")
    data = {
        "columns": list(columns),
        "dictionary": dictionary,
        "rows": [[row.get(column) for column in columns] for row in rows],
        "links": links,
        "made": f"remix-bids {__version__}, {time.strftime('%Y-%m-%d %H:%M')}",
    }
    # "</script>" in a name would end the script; "<" is the same character to JSON when escaped.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = resources.files("remix_bids.data").joinpath("group.html").read_text()
    return page.replace("__DATA__", text)
