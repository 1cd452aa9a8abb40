"""Names of everything that is written for one T1w image.

All entities of the source are kept, as they are written (``run-01`` stays ``run-01``), and put in
the order of the BIDS specification.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from remix_bids.errors import GraphError, InputImageError

# Order of the BIDS schema; from, to and mode come last but for desc.
ORDER = tuple(
    key
    for line in (
        "sub ses sample task tracksys acq nuc voi ce trc stain rec dir run mod echo flip inv mt",
        "part proc hemi space split recording chunk atlas seg scale res den label desc",
        "from to mode",
    )
    for key in line.split()
)
DERIVATIVE = ("space", "res", "den", "label", "desc")  # no raw image has these


def split_name(path: Path | str) -> tuple[dict[str, str], str, str]:
    """Entities, suffix and extension of a BIDS file name.

    >>> split_name("sub-01_run-02_T1w.nii.gz")
    ({'sub': '01', 'run': '02'}, 'T1w', '.nii.gz')
    """
    name = Path(path).name
    stem, dot, extension = name.partition(".")
    *pairs, suffix = stem.split("_")
    entities = {}
    for pair in pairs:
        key, dash, value = pair.partition("-")
        if not dash or not key or not value:
            raise InputImageError(f"{name} is not a BIDS name: {pair!r} is no key-value pair")
        entities[key] = value
    return entities, suffix, dot + extension


def join_name(entities: dict[str, str], suffix: str, extension: str) -> str:
    """A file name with the entities in the order of BIDS; unknown ones stand before ``space``.

    >>> join_name({"sub": "01", "desc": "remix", "chunk": "1", "space": "Lin"}, "T1w", ".json")
    'sub-01_space-Lin_chunk-1_desc-remix_T1w.json'
    """
    known = {key: i for i, key in enumerate(ORDER)}
    before_space = known["space"] - 0.5
    ordered = sorted(entities, key=lambda key: known.get(key, before_space))
    return "_".join([*(f"{key}-{entities[key]}" for key in ordered), suffix]) + extension


@dataclass(frozen=True)
class OutputNames:
    """Paths, below the output folder, of all that one scan can yield."""

    image: Path
    sidecar: Path
    forward_transform: Path
    inverse_transform: Path
    native_image: Path
    native_sidecar: Path
    qc: Path
    summary: Path
    header: Path
    registration: Path
    enhancement: Path
    difference: Path
    changes: Path
    consistency: Path
    consistency_map: Path
    unknowable: Path
    quality: Path
    native: Path

    def all(self) -> list[Path]:
        """Every path."""
        return [Path(value) for value in vars(self).values()]


def output_names(source: Path | str, space: str) -> OutputNames:
    """Names for one source image (``[..]/sub-01[_..]_T1w.nii[.gz]``).

    Parameters
    ----------
    source : Path
        The T1w image; only its name counts.
    space : str
        The MNI space of the output.
    """
    entities, suffix, _ = split_name(source)
    subject = f"sub-{entities['sub']}"
    session = [f"ses-{entities['ses']}"] if "ses" in entities else []
    anat = Path(subject, *session, "anat")
    figures = Path(subject, "figures")

    def name(suffix: str, extension: str, **more: str) -> str:
        return join_name({**entities, **more}, suffix, extension)

    image = {"space": space, "res": "1", "desc": "remix"}
    forward = {"from": suffix, "to": space, "mode": "image"}
    inverse = {"from": space, "to": suffix, "mode": "image"}
    return OutputNames(
        image=anat / name(suffix, ".nii.gz", **image),
        sidecar=anat / name(suffix, ".json", **image),
        forward_transform=anat / name("xfm", ".txt", **forward),
        inverse_transform=anat / name("xfm", ".txt", **inverse),
        native_image=anat / name(suffix, ".nii.gz", desc="remix"),
        native_sidecar=anat / name(suffix, ".json", desc="remix"),
        qc=anat / name("qc", ".json", desc="remix"),
        summary=figures / name(suffix, ".html", desc="summary"),
        header=figures / name(suffix, ".html", desc="header"),
        registration=figures / name(suffix, ".svg", desc="registration"),
        enhancement=figures / name(suffix, ".svg", desc="enhancement"),
        difference=figures / name(suffix, ".svg", desc="difference"),
        changes=figures / name(suffix, ".svg", desc="changes"),
        consistency=figures / name(suffix, ".html", desc="consistency"),
        consistency_map=figures / name(suffix, ".svg", desc="consistencymap"),
        unknowable=figures / name(suffix, ".svg", desc="unknowable"),
        quality=figures / name(suffix, ".html", desc="quality"),
        native=figures / name(suffix, ".svg", desc="native"),
    )


def check_collisions(sources: Iterable[Path | str], space: str) -> None:
    """Refuse two scans that would be written to one file.

    Raises
    ------
    GraphError
        With the names of both.
    """
    taken: dict[Path, Path | str] = {}
    for source in sources:
        for path in output_names(source, space).all():
            # Some file systems do not tell upper from lower case.
            other = taken.setdefault(Path(str(path).lower()), source)
            if other != source:
                raise GraphError(
                    f"{other} and {source} would both be written to {path.name}; "
                    "remove or rename one of them, or choose with --bids-filter-file"
                )


def workflow_name(source: Path | str) -> str:
    """A name for the workflow of one scan: letters, digits and underscores.

    >>> workflow_name("sub-01_acq-ax_T1w.nii.gz")
    'sub_01_acq_ax_T1w_wf'
    """
    entities, suffix, _ = split_name(source)
    return re.sub(r"\W", "_", join_name(entities, suffix, "")) + "_wf"
