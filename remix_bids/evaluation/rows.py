"""The rows of an evaluation: reading, writing, resuming, joining."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from remix_bids.errors import UsageError
from remix_bids.evaluation.cases import Case, told_sizes
from remix_bids.evaluation.settings import BACK_PROJECTIONS, EXPERT, SHIPS, Settings

SCAN = ("class", "kind", "voxel_sizes", "volume", "profile")
"""What a row tells of the scan."""
COLUMNS = (
    *("person", "image", "drawn", "number", "noise", "affine", "setup", "method", "psnr"),
    *("dice_manual", "segmenter", "labels"),
    *SCAN,
)
"""Without these a table is not one of `evaluate`, or of an earlier version."""


def read_rows(path: Path) -> list[dict]:
    """The rows of a TSV of `evaluate`, as strings, but for a last one that was cut off.

    Raises
    ------
    UsageError
        If the file is no such table, or that of an earlier version.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    *lines, _ = text.split("\n")  # after the last line end there is nothing, or a row cut off
    reader = csv.DictReader(lines, delimiter="\t")
    rows = list(reader)
    if text and (lacking := {*COLUMNS} - {*(reader.fieldnames or ())}):
        raise UsageError(
            f"{path} lacks {', '.join(sorted(lacking))}: it is not a table that this version of "
            "remix-experts evaluate writes; name another file"
        )
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UsageError(f"{path}, line {number} has more or fewer fields than the first")
    return rows


def write_rows(
    path: Path, batches: Iterable[Sequence[dict]], kept: Sequence[dict] = ()
) -> list[dict]:
    """Write rows to a TSV as they come, so that a stopped run leaves what it has; return all.

    ``kept``: rows that come first. What the file held stays until there are rows in its place.
    """
    rows: list[dict] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", newline="") as file:
            for batch in filter(None, chain([kept], batches)):
                if not rows:
                    writer = csv.DictWriter(file, batch[0], delimiter="\t", lineterminator="\n")
                    writer.writeheader()
                writer.writerows(batch)
                file.flush()
                if not rows:
                    part.replace(path)  # and goes on to grow there
                rows += batch
    finally:
        part.unlink(missing_ok=True)
    return rows


def finished(rows: Sequence[dict], cases: Sequence[Case], settings: Settings) -> list[dict]:
    """Of the rows of an earlier run, those of cases that were whole.

    Raises
    ------
    UsageError
        If they were measured with other experts, another protocol, another affine, another
        segmenter or other manual classes, on another preparation of a person, of other methods,
        without Dice that is to be found now, or on cases that are not to be run now: writing the
        file anew would lose them.
    """
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(row_key(row), []).append(row)
    asked = {*settings.methods, *settings.commands}
    methods = {row["method"] for row in rows}
    if not settings.tune and (methods - asked or (len(found) > 1 and methods != asked)):
        raise UsageError(
            f"the output holds rows of other methods ({', '.join(sorted(methods ^ asked))}); name "
            "another file, and join the two by remix-experts table"
        )
    if any(
        (row["setup"], row["affine"])
        != (settings.setup(row["method"], row["class"]), settings.affine)
        for row in rows
    ):
        raise UsageError(
            "the output holds rows of other experts, of another protocol or of another affine; "
            "name another file, or remove this one"
        )
    images = {case.person.name: case.person.digest for case in cases}
    for row in rows:
        if images.get(row["person"], row["image"]) != row["image"]:
            raise UsageError(
                f"the output holds rows of another preparation of {row['person']}; name another "
                "file, or remove this one"
            )
    most = max(map(len, found.values()), default=0)
    wanted = {case.key: case for case in cases}
    for key, own in found.items():
        if key not in wanted or not _same_scan(own[0], wanted[key]):
            raise UsageError(
                "the output holds rows of cases that are not asked for now, the first "
                f"{_told(key)}; name another file, and join the two by remix-experts table"
            )
    segmenters = {row["segmenter"] for row in rows} - {""}
    if settings.segmenter and segmenters - {settings.segmenter_name}:
        raise UsageError(
            f"the output holds Dice of another segmenter ({', '.join(sorted(segmenters))}); name "
            "another file, or remove this one"
        )
    compared = {(row["person"], row["labels"]) for row in _by_hand(rows)}
    if settings.labels and any(settings.labels_digest(name) != own for name, own in compared):
        raise UsageError(
            "the output holds Dice with other manual classes than those of --labels; name another "
            "file, or remove this one"
        )
    whole = {
        key: own
        for key, own in found.items()
        if len(own) == (most if settings.tune else len(asked))
    }
    if settings.segmenter and asked & {*settings.protocol["segmented"], *settings.commands}:
        column = "dice_manual" if settings.labels else "dice"
        for key, own in whole.items():
            segmented = wanted[key].segmented and not wanted[key].person.head
            if segmented and not any(row[column] for row in own):
                raise UsageError(
                    f"the output holds cases without the Dice that is asked for now, the first "
                    f"{_told(key)}; name another file, and join the two by remix-experts table"
                )
    return [row for own in whole.values() for row in own]


def _by_hand(rows: Sequence[dict]) -> list[dict]:
    """Those that were compared with manual classes."""
    return [row for row in rows if row["dice_manual"]]


def _same_scan(row: dict, case: Case) -> bool:
    """Whether a row is of this case: what is drawn depends on who comes before a person."""
    sizes = told_sizes(case.acquisition())
    return bool(row["kind"] == case.source and row["voxel_sizes"] == sizes)


def row_key(row: dict) -> tuple[str, ...]:
    """`Case.key` of a row of a TSV."""
    return row["person"], row["drawn"], row["number"], row["noise"]


def joined(tables: Iterable[Sequence[dict]]) -> list[dict]:
    """The rows of several runs, case by case; of one method on one case, the last run's counts.

    Dice stays where a later run of the same setup did not look for it.

    Raises
    ------
    UsageError
        If rows are of several protocols, affines or segmenters, those of one person of several
        preparations or manual classes, those of one method in one class of several networks,
        iterations or commands, a case is not the same scan in all runs, or cases lack a method, or
        its Dice, that others have: a mean over such rows would mislead.
    """
    cases: dict[tuple, dict[str, dict]] = {}
    every = [row for table in tables for row in table]
    for name, what in (("affine", "affines"), ("segmenter", "segmenters")):
        if len(kinds := {row[name] for row in every} - {""}) > 1:
            raise UsageError(f"the rows are of several {what}: {', '.join(sorted(kinds))}")
    labels: dict[str, str] = {}
    for row in _by_hand(every):
        if labels.setdefault(row["person"], row["labels"]) != row["labels"]:
            raise UsageError(f"the rows are of several files of manual classes of {row['person']}")
    images: dict[str, str] = {}
    for row in every:
        if images.setdefault(row["person"], row["image"]) != row["image"]:
            raise UsageError(f"the rows are of several preparations of {row['person']}")
        case = cases.setdefault(row_key(row), {})
        before = case.get(row["method"], {})
        if before.get("setup") == row["setup"]:
            row = before | {key: value for key, value in row.items() if value != ""}
        case[row["method"]] = row
    rows = [row for methods in cases.values() for row in methods.values()]
    if len({row["setup"].partition(".")[0] for row in rows}) > 1:
        raise UsageError("the rows are of several protocols")
    setups: dict[str, set[str]] = {}
    for row in rows:
        setups.setdefault(_made_by(row), set()).add(row["setup"])
    for name, found in setups.items():
        if len(found) > 1:
            raise UsageError(f"the rows of {name} are of several networks, iterations or commands")
    for key, methods in cases.items():
        if len({tuple(row[name] for name in SCAN) for row in methods.values()}) > 1:
            raise UsageError(f"{_told(key)} is not the same scan in all files: another protocol?")
    most = {row["method"] for row in rows}
    lacking = {key: most - {*methods} for key, methods in cases.items() if len(methods) < len(most)}
    if lacking:
        key, names = next(iter(lacking.items()))
        raise UsageError(
            f"{len(lacking)} of {len(cases)} cases lack methods that others have, the first "
            f"{', '.join(sorted(names))} for {_told(key)}: run evaluate for them, too"
        )
    for column, option in (("dice", "--dice"), ("dice_manual", "--dice --labels")):
        segmented = {row["method"] for row in rows if row.get(column)}
        for key, methods in cases.items():
            without = {name for name in segmented if not methods[name][column]}
            if without and without != segmented:
                raise UsageError(
                    f"{', '.join(sorted(without))} for {_told(key)} lacks the Dice that other "
                    f"methods have: run evaluate {option} for it, too"
                )
    return rows


def _made_by(row: dict) -> str:
    """What must be one and the same in all of its rows of a table."""
    if row["method"] in (EXPERT, SHIPS):
        return f"expert {row['class']}"
    if row["method"] in BACK_PROJECTIONS:
        return f"{row['method']} in class {row['class']}"
    return row["method"]


def _told(key: tuple[str, ...]) -> str:
    person, drawn, number, noise = key[:4]
    return f"{person}, class {drawn}, geometry {number}, noise {noise}"
