"""The HTML report of one subject, built with nireports from all figures of the subject.

nireports finds figures with PyBIDS, which does not know all entities a T1w image may have, and
its page loads styles from the network. So the figures are found here, and the page is our own;
nireports brings the structure of sections and the reading of crash files.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nireports.assembler.misc import read_crashfile
from nireports.assembler.report import Report, SubReport

from remix_bids import __version__
from remix_bids.config import RunConfig
from remix_bids.derivatives import write_text
from remix_bids.naming import join_name, split_name, workflow_name
from remix_bids.reports.boilerplate import boilerplate_html

LOGGER = logging.getLogger("remix_bids")
TEMPLATE = "report.tpl"
SPECIFICATION = "reports-spec.yml"
DONE, METHODS, ABOUT = "done.txt", "methods.html", "about.json"
"""Beside the crash files of a run."""

OUTDATED = (
    '<p class="failed">The latest run of this scan failed (see Errors). Where there are figures '
    "and outputs all the same, they may be of an earlier run.</p>"
)


class Fragment:
    """One piece of a section: what nireports calls a reportlet."""

    def __init__(self, contents: str, subtitle: str = "", description: str = "") -> None:
        self.name = self.title = None
        self.subtitle = subtitle
        self.description = description
        self.components = [(contents, None)]


class IndividualReport(Report):
    """nireports' report with the figures of one subject."""

    def index(self, config: dict[str, Any]) -> None:
        """Fill the sections: one for each scan, then methods, errors and about."""
        subject_dir = Path(config["root"])
        metadata = config["metadata"]
        scans = scans_with_figures(subject_dir)
        failed = {part for node in _open_crashes(subject_dir) for part in node.split(".")}
        self.template_path = Path(str(resources.files("remix_bids.data").joinpath(TEMPLATE)))
        for label, figures in scans.items():
            reportlets = [Fragment(OUTDATED)] if workflow_name(label) in failed else []
            for wanted in config["figures"]:
                path = figures.get(wanted["desc"])
                if path is not None:
                    contents = _figure(path, Path(config["out_dir"]))
                    reportlets.append(
                        Fragment(contents, wanted["subtitle"], wanted.get("description", ""))
                    )
            self.sections.append(SubReport(label, reportlets=reportlets, title=escape(label)))
        methods = _latest(subject_dir, METHODS)
        if methods:
            fragment = Fragment(methods)
            self.sections.append(SubReport("methods", reportlets=[fragment], title="Methods"))
        errors = _errors(subject_dir, scans)
        self.sections.append(SubReport("errors", reportlets=[Fragment(errors)], title="Errors"))
        about = _about(json.loads(_latest(subject_dir, ABOUT) or "{}") | metadata["about"])
        self.sections.append(SubReport("about", reportlets=[Fragment(about)], title="About"))


def scans_with_figures(subject_dir: Path) -> dict[str, dict[str, Path]]:
    """Figures of a subject by scan (name of the source) and ``desc``."""
    scans: dict[str, dict[str, Path]] = {}
    for path in sorted((subject_dir / "figures").glob("sub-*_desc-*_*.*")):
        entities, suffix, extension = split_name(path)
        desc = entities.pop("desc")
        if extension in (".svg", ".html"):
            scans.setdefault(join_name(entities, suffix, ""), {})[desc] = path
    return scans


def _figure(path: Path, root: Path) -> str:
    if path.suffix == ".html":
        try:
            return path.read_text()
        except OSError as error:  # of an earlier run, and archived since
            return f'<p class="failed">{escape(path.name)} cannot be read: {escape(str(error))}</p>'
    link = quote(path.relative_to(root).as_posix())
    return (
        f'<object type="image/svg+xml" data="./{link}">{escape(path.name)}</object>\n'
        f'<small><a href="./{link}" target="_blank">{escape(path.name)}</a></small>'
    )


def note_run(run_dir: Path, config: RunConfig, about: dict[str, str]) -> None:
    """Write down settings and methods of a run: a page made later, by another version, tells them.

    Parameters
    ----------
    about : dict of str
        Shown at the end of the page.
    """
    settings = run_dir / "remix_bids.toml"
    about = {
        "remix-bids": __version__,
        "Settings": settings.relative_to(config.output_dir).as_posix(),
        **about,
    }
    write_text(settings, config.to_toml())
    write_text(run_dir / METHODS, boilerplate_html(config))
    write_text(run_dir / ABOUT, json.dumps(about, indent=2) + "\n")


def _latest(subject_dir: Path, name: str) -> str:
    """What the latest run has noted, or the latest whose note can be read; '' if none."""
    for path in sorted((subject_dir / "log").glob(f"*/{name}"), reverse=True):
        with suppress(OSError):  # archived since
            return path.read_text()
    return ""


def note_done(run_dir: Path, scans: Iterable[Path]) -> None:
    """Write down which scans of a subject a run has brought to their end, figures and all."""
    write_text(run_dir / DONE, "".join(f"{scan.name}\n" for scan in scans))


def open_crash_files(subject_dir: Path) -> list[Path]:
    """Crash files of all runs, but for scans that have come through since."""
    return list(_open_crashes(subject_dir).values())


def _open_crashes(subject_dir: Path) -> dict[str, Path]:
    """The same by node.

    A crash belongs to the scan whose workflow its ``Node:`` line names; the scan has come through
    when a later run says so (`note_done`). Of one node only the last crash counts.
    """
    finished: dict[str, float] = {}
    for note in sorted((subject_dir / "log").glob(f"*/{DONE}"), key=lambda p: p.stat().st_mtime):
        for name in note.read_text().splitlines():
            finished[workflow_name(name)] = note.stat().st_mtime
    left: dict[str, Path] = {}
    crashes = (subject_dir / "log").glob("*/crash-*.txt")
    for crash in sorted(crashes, key=lambda path: path.stat().st_mtime):
        with crash.open(errors="replace") as file:
            node = file.readline().strip().partition(": ")[2] or crash.name
        done = max(finished.get(part, 0.0) for part in node.split("."))
        if done < crash.stat().st_mtime:
            left[node] = crash
    return left


def _errors(subject_dir: Path, scans: dict[str, Any]) -> str:
    crashes = open_crash_files(subject_dir)
    if not crashes:
        return '<p class="fine">No errors to report.</p>' if scans else "<p>No scan was done.</p>"
    parts = [f'<p class="failed">{len(crashes)} step(s) failed.</p>']
    for crash in crashes:
        try:
            details = read_crashfile(str(crash))
            node, traceback = details.get("node", crash.name), details["traceback"]
        except (ValueError, IndexError, KeyError, OSError):  # not every crash file is regular
            node, traceback = crash.name, crash.read_text(errors="replace")
        traceback = str(traceback).strip()
        reason = traceback.splitlines()[-1] if traceback else "no message"
        parts.append(
            f"<details><summary><b>{escape(str(node))}</b>: {escape(reason)}</summary>"
            f"<pre>{escape(traceback)}</pre><small>{escape(str(crash))}</small></details>"
        )
    return "\n".join(parts)


def _about(about: dict[str, str]) -> str:
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in about.items()
    )
    return f"<table>\n{rows}\n</table>"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock: jobs over the sessions of one subject share its page."""
    if path.is_symlink():  # an archive of earlier results has taken it for one of them
        path.unlink()
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some file systems have no locks; the page still appears whole
            LOGGER.warning("%s cannot be locked: %s", path, error)
        yield


def build_report(output_dir: Path, subject: str, run_uuid: str, about: dict[str, str]) -> Path:
    """(Re)build ``sub-<label>.html`` from all figures of the subject.

    Parameters
    ----------
    output_dir : Path
    subject : str
        Label without ``sub-``.
    run_uuid : str
    about : dict of str
        Shown at the end of the page, after what the latest run has noted.
    """
    target = output_dir / f"sub-{subject}.html"
    subject_dir = output_dir / f"sub-{subject}"
    (subject_dir / "log").mkdir(parents=True, exist_ok=True)
    part = output_dir / f".{target.name}.{run_uuid}.part"
    specification = resources.files("remix_bids.data").joinpath(SPECIFICATION)
    with _locked(subject_dir / "log" / ".report.lock"):
        try:
            report = IndividualReport(
                output_dir,
                run_uuid,
                bootstrap_file=str(specification),
                out_filename=str(part),
                reportlets_dir=str(subject_dir),
                metadata={"about": about},
                subject=subject,
            )
            report.generate_report()
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return target


def read_warnings(sidecar: Path) -> list[str]:
    """The warnings in a sidecar; none when it is not there."""
    try:
        return list(json.loads(sidecar.read_text()).get("Warnings", []))
    except (OSError, ValueError):
        return []
