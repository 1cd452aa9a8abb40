"""The files that make an output folder a BIDS derivative dataset."""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remix_bids import __version__
from remix_bids.errors import UsageError

LOGGER = logging.getLogger("remix_bids")
NAME = "remix-bids"
BIDS_VERSION = "1.10.0"
IGNORED = ("**/figures", "**/log", "logs", "group_*", "*_xfm.*", "*_qc.json", "*.html")


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; leave an equal one alone."""
    content = text.encode(errors="surrogateescape")
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_output_dataset(output_dir: Path) -> None:
    """Refuse a folder that holds another dataset.

    Raises
    ------
    UsageError
        With a suggestion.
    """
    path = output_dir / "dataset_description.json"
    if not path.is_file():
        return
    content = _read_json(path)
    makers = [m.get("Name") for m in (content.get("GeneratedBy") or []) if isinstance(m, dict)]
    if NAME not in makers:
        owner = ", ".join(str(m) for m in makers if m) or content.get("Name", "unknown")
        raise UsageError(
            f"the output folder {output_dir} already holds another dataset ({owner}); "
            f"use for example {output_dir / NAME}"
        )


def write_dataset_files(output_dir: Path, bids_dir: Path) -> None:
    """Write ``dataset_description.json`` and ``.bidsignore`` where they differ from what is there.

    Parameters
    ----------
    output_dir, bids_dir : Path
        The results, and the dataset they come from (linked as ``raw``).
    """
    path, link = output_dir / "dataset_description.json", bids_dir.resolve().as_uri()
    earlier = (_read_json(path).get("DatasetLinks") or {}).get("raw", link)
    if earlier != link:
        LOGGER.warning(
            "%s holds results of %s: if that is another dataset, stop and name another output "
            "folder, for its participants may have the same labels",
            *(output_dir, earlier),
        )
    raw = _read_json(bids_dir / "dataset_description.json")
    maker: dict[str, Any] = {"Name": NAME, "Version": __version__, **_container()}
    description: dict[str, Any] = {
        "Name": f"{NAME}: super-resolved T1w images of {raw.get('Name') or bids_dir.name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [maker],
        "DatasetLinks": {"raw": link},
        "SourceDatasets": [_source(raw, bids_dir)],
    }
    if raw.get("License"):
        description["License"] = raw["License"]
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text)
    _write_bidsignore(output_dir / ".bidsignore")


def _container(environ: Mapping[str, str] = os.environ) -> dict[str, dict[str, str]]:
    """The image that this runs in; it says its own name, for example docker:remix-bids:0.1.0."""
    kind, _, tag = environ.get("REMIX_BIDS_CONTAINER", "").partition(":")
    if not tag:
        return {}
    if environ.get("APPTAINER_CONTAINER") or environ.get("SINGULARITY_CONTAINER"):
        kind = "singularity"  # the same image, run by another engine
    return {"Container": {"Type": kind, "Tag": tag}}


def _source(raw: dict[str, Any], bids_dir: Path) -> dict[str, str]:
    """Where the input comes from: its DOI when it has one, the folder otherwise."""
    doi = re.search(r"10\.\d{4,}/\S+", str(raw.get("DatasetDOI") or ""))
    if doi:
        return {"URL": f"https://doi.org/{doi[0]}", "DOI": doi[0]}
    return {"URL": bids_dir.resolve().as_uri()}


def _write_bidsignore(path: Path) -> None:
    """Add our lines to those that are there."""
    # Somebody's own lines stay as they are, in whatever encoding.
    lines = path.read_text(errors="surrogateescape").splitlines() if path.is_file() else []
    missing = [line for line in IGNORED if line not in lines]
    if missing:
        write_text(path, "\n".join([*lines, *missing]) + "\n")
