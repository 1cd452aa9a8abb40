"""The T1w images of a BIDS dataset that a run works on."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remix_bids.config import RunConfig
from remix_bids.errors import InputImageError, NothingToDoError, UsageError
from remix_bids.naming import DERIVATIVE, split_name
from remix_bids.sidecars import forget_sidecars, positive, read_sidecars

LOGGER = logging.getLogger("remix_bids")
EXTENSIONS = (".nii", ".nii.gz")
DATABASE = "layout_index.sqlite"
"""What PyBIDS calls it."""
OTHER_DATATYPES = "beh|dwi|eeg|emg|fmap|func|ieeg|meg|micr|motion|mrs|nirs|perf|pet"


@dataclass(frozen=True)
class Scan:
    """One T1w image to work on."""

    path: Path
    subject: str
    session: str | None
    skull_stripped: bool | None  # what its sidecar says, if it says anything
    slice_thickness: float | None = None  # mm, likewise

    @property
    def label(self) -> str:
        """The file's name without extension: what the user recognises."""
        return self.path.name.partition(".")[0]


def collect_scans(config: RunConfig, filters: dict[str, Any]) -> list[Scan]:
    """Query the dataset.

    Raises
    ------
    UsageError
        Unknown labels or filter entities, or a dataset that cannot be read.
    NothingToDoError
        No T1w image is left; the message gives the query.
    """
    subjects = _subject_labels(config.bids_dir)
    unknown = sorted(set(config.participant_label) - set(subjects))
    if unknown:
        raise UsageError(
            f"--participant-label {' '.join(unknown)}: not in {config.bids_dir}, which has "
            + (" ".join(subjects[:20]) + (" ..." if len(subjects) > 20 else "") or "no subject")
        )
    layout = _layout(config, subjects)
    wanted = config.participant_label or tuple(subjects)
    if config.bids_database_dir is not None:
        _check_database(config, layout, wanted)
    _check_sessions(config, subjects)
    query: dict[str, Any] = {
        "datatype": "anat",
        "suffix": "T1w",
        **_translate(filters, layout),
    }
    try:
        files = layout.get(**query)
    except Exception as error:  # PyBIDS' own kinds, and those of its database
        raise UsageError(f"the query {_show(query)} cannot be run: {error}") from None
    forget_sidecars()
    scans = []
    for path in sorted(Path(file.path) for file in files):
        if not path.name.endswith(EXTENSIONS):
            continue
        try:
            scan = _as_scan(path, Path(layout.root))
        except InputImageError as error:
            LOGGER.warning("ignored %s: %s", path, error)
            continue
        # By names, for PyBIDS ends a label at the first dash, and a filter file cannot widen these.
        if scan.subject not in wanted:
            continue
        if not config.session_label or scan.session in config.session_label:
            scans.append(scan)
    asked = {"subject": config.participant_label, "session": config.session_label}
    if not scans:
        query |= {key: list(labels) for key, labels in asked.items() if labels}
        raise NothingToDoError(f"no T1w image in {config.bids_dir} matches {_show(query)}")
    found = {scan.subject for scan in scans}
    if lacking := [label for label in config.participant_label if label not in found]:
        LOGGER.warning(
            "no T1w image that is asked for: %s", ", ".join(f"sub-{label}" for label in lacking)
        )
    return scans


def _as_scan(path: Path, bids_dir: Path) -> Scan:
    """What its place, its name and its sidecars tell of an image.

    Raises
    ------
    InputImageError
        It is no image that was acquired as such.
    """
    entities, _, extension = split_name(path)
    if "sub" not in entities:
        raise InputImageError(f"{path.name} names no subject")
    place = [f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities]
    if path.parent != bids_dir.joinpath(*place, "anat"):
        raise InputImageError(f"by its name it belongs in {'/'.join((*place, 'anat'))}")
    if extension not in EXTENSIONS:
        raise InputImageError("a label holds a dot, which BIDS does not allow")
    derived = [key for key in DERIVATIVE if key in entities]
    if derived:
        raise InputImageError(f"{derived[0]}- marks it as processed, not acquired")
    if entities.get("part", "mag") != "mag":
        raise InputImageError(f"part-{entities['part']} is no magnitude")
    metadata = read_sidecars(path, bids_dir)
    stripped = metadata.get("SkullStripped")
    return Scan(
        path=path,
        subject=entities["sub"],
        session=entities.get("ses"),
        skull_stripped=stripped if isinstance(stripped, bool) else None,
        slice_thickness=positive(metadata.get("SliceThickness")),
    )


def _subject_labels(bids_dir: Path) -> list[str]:
    try:
        with os.scandir(bids_dir) as entries:
            return sorted(e.name[4:] for e in entries if e.name.startswith("sub-") and e.is_dir())
    except OSError as error:
        raise UsageError(f"{bids_dir} cannot be read: {error}") from None


def _check_sessions(config: RunConfig, subjects: list[str]) -> None:
    if not config.session_label:
        return
    known: set[str] = set()
    for subject in subjects:
        folder = config.bids_dir / f"sub-{subject}"
        known.update(path.name[4:] for path in folder.glob("ses-*") if path.is_dir())
    unknown = sorted(set(config.session_label) - known)
    if unknown:
        raise UsageError(
            f"--session-label {' '.join(unknown)}: no such session; "
            f"there is {' '.join(sorted(known)) or 'none'}"
        )


def _layout(config: RunConfig, subjects: list[str]) -> Any:
    """A PyBIDS layout of what may be asked for: anatomical files of the chosen participants."""
    from bids import BIDSLayout, BIDSLayoutIndexer

    root = Path(os.path.abspath(config.bids_dir))
    ignore: list[Any] = [
        re.compile(r"^/(code|derivatives|models|sourcedata|stimuli)(/|$)"),
        re.compile(r"/\.[^/]*(/|$)"),
        re.compile(rf"/sub-[^/]+/(ses-[^/]+/)?({OTHER_DATATYPES})(/|$)"),
    ]
    others: set[str] = set()
    if config.participant_label and config.bids_database_dir is None:
        others = set(subjects) - set(config.participant_label)
    closed = _closed_folders(root, sorted(set(subjects) - others))
    for folder in closed:
        LOGGER.warning("%s cannot be entered and is left out", root / folder)
    # One pattern of thousands of names is slow; a set is looked up instead.
    ignore.append(_Folders({*(f"sub-{label}" for label in others), *closed}))

    def layout(database: Path | None) -> BIDSLayout:
        return BIDSLayout(
            root,
            validate=False,
            config=[_entities_below(root)],
            database_path=database,
            # Sidecars are read by `read_sidecars`.
            indexer=BIDSLayoutIndexer(validate=False, index_metadata=False, ignore=ignore),
        )

    kept = config.bids_database_dir
    try:
        if kept is not None:
            _make_database(kept, layout)
        return layout(kept)
    except UsageError:
        raise
    except Exception as error:  # PyBIDS raises many kinds for a dataset it cannot read
        advice = f" by --bids-database-dir {kept} (remove that folder, it is made anew)"
        how = "" if kept is None else advice
        raise UsageError(
            f"{config.bids_dir} cannot be read as a BIDS dataset{how}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _make_database(folder: Path, layout: Callable[[Path], Any]) -> None:
    """Index a dataset, unless that is done: other runs see a whole index or none.

    Runs that begin together may all make one; the last one stays.

    Raises
    ------
    UsageError
        Nothing can be written there.
    """
    if (folder / DATABASE).is_file():
        return
    part = folder / f".{uuid.uuid4().hex}.part"
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--bids-database-dir {folder} cannot be written: {error}") from None
    try:
        layout(part)
        os.replace(part / DATABASE, folder / DATABASE)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _closed_folders(root: Path, subjects: Sequence[str]) -> list[str]:
    """Folders of subjects that this user may not enter, relative to the dataset."""
    found, left = [], [root / f"sub-{label}" for label in subjects]
    while left:
        folder = left.pop()
        if not os.access(folder, os.R_OK | os.X_OK):
            found.append(folder.relative_to(root).as_posix())
        elif folder.name.startswith(("sub-", "ses-")) and len(folder.relative_to(root).parts) < 3:
            left += [entry for entry in folder.iterdir() if entry.is_dir()]
    return sorted(found)


def _entities_below(root: Path) -> dict[str, Any]:
    """The configuration of PyBIDS, with entities looked for below the dataset only.

    PyBIDS looks at the whole path: a dataset in ``/data/pet`` would hold nothing but PET.
    """
    import bids.layout

    shipped = Path(bids.layout.__file__).parent / "config" / "bids.json"
    config: dict[str, Any] = json.loads(shipped.read_text())
    for entity in config["entities"]:
        entity["pattern"] = rf"^{re.escape(str(root))}.*?(?:{entity['pattern']})"
    return config


def _check_database(config: RunConfig, layout: Any, wanted: Sequence[str]) -> None:
    """A database that was made earlier is not compared with the dataset by PyBIDS.

    Raises
    ------
    UsageError
        It is one of another dataset.
    """
    root = os.path.abspath(config.bids_dir)
    if any(not Path(path).is_relative_to(root) for path in layout.files):
        raise UsageError(
            f"--bids-database-dir {config.bids_database_dir} is of another dataset, or this one "
            "lay elsewhere when it was made; remove that folder, or name another one"
        )
    places = (Path(path).relative_to(root).parts[0] for path in layout.files)
    if lacking := sorted({*wanted} - {place.removeprefix("sub-") for place in places}):
        LOGGER.warning(
            "--bids-database-dir %s has no files of sub-%s; remove that folder if the dataset has "
            "changed since it was made",
            config.bids_database_dir,
            ", sub-".join(lacking[:20]) + (" ..." if len(lacking) > 20 else ""),
        )


class _Folders:
    """Stands in for a compiled pattern: matches folders, relative to the dataset, and all below."""

    def __init__(self, folders: set[str]) -> None:
        self._folders = folders

    def search(self, path: str) -> bool:
        parts = path.strip("/").split("/")[:3]
        return any("/".join(parts[:n]) in self._folders for n in range(1, len(parts) + 1))


def _translate(filters: dict[str, Any], layout: Any) -> dict[str, Any]:
    """Filters as PyBIDS wants them, in lists, too.

    null and 'Query.NONE' mean absent, 'Query.ANY' and '*' present.
    """
    from bids.layout import Query

    special = {"Query.NONE": Query.NONE, "Query.ANY": Query.ANY, "Query.OPTIONAL": Query.OPTIONAL}
    special["*"] = Query.ANY

    def translated(value: Any) -> Any:
        if value is None:
            return Query.NONE
        if isinstance(value, list):
            return [translated(one) for one in value]
        if isinstance(value, str):
            return special.get(value.removeprefix("<").split(":")[0].rstrip(">"), value)
        return value

    known = {*layout.get_entities(), "extension", "regex_search", "run", "session", "acquisition"}
    unknown = sorted(set(filters) - known)
    if unknown:
        raise UsageError(
            f"--bids-filter-file: unknown entity {', '.join(unknown)}; "
            f"known: {', '.join(sorted(known))}"
        )
    for key, fixed in (("suffix", "T1w"), ("datatype", "anat")):
        if filters.get(key, fixed) not in (fixed, [fixed]):
            raise UsageError(
                f"--bids-filter-file: {key} is {filters[key]!r}; only {fixed} can be worked on"
            )
    query = {key: translated(value) for key, value in filters.items()}
    if query.get("regex_search"):
        _check_patterns(query)
    return query


def _check_patterns(query: dict[str, Any]) -> None:
    """PyBIDS would leave it to its database to complain.

    Raises
    ------
    UsageError
        A value is no regular expression.
    """
    for key, values in query.items():
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str):
                continue
            try:
                re.compile(value)
            except re.error as error:
                raise UsageError(
                    f"--bids-filter-file: {key} {value!r} is no regular expression: {error}"
                ) from None


def _show(query: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in query.items())


def run_validator(config: RunConfig) -> str:
    """Run bids-validator-deno where it is installed; return what it says ('' when all is well).

    Its verdict is shown and logged and never stops a run: much useful data has small errors.
    """
    beside = Path(sys.executable).parent / "bids-validator-deno"
    program = str(beside) if beside.is_file() else shutil.which("bids-validator-deno")
    if config.skip_bids_validation or program is None:
        return ""
    command = [program, "--ignoreWarnings", "--ignoreNiftiHeaders", str(config.bids_dir)]
    try:
        done = subprocess.run(  # noqa: S603 - a list of arguments, no shell
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
            env={**os.environ, "DENO_NO_UPDATE_CHECK": "1"},  # Deno would ask its maker's server
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"bids-validator-deno could not be run: {error}"
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip()
