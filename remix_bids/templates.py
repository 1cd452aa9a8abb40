"""The template of a run, found once, in the parent process, before the graph runs.

TemplateFlow's cache is looked at directly first: importing TemplateFlow writes into its folder. Its
download is not atomic, so it goes to a folder of its own first.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from remix_bids.errors import MissingResourceError

NILEARN_SPACE = "MNI152NLin2009aSym"
SPACES = (
    "MNI152Lin",
    "MNI152NLin2009aAsym",
    NILEARN_SPACE,
    "MNI152NLin2009cAsym",
    "MNI152NLin2009cSym",
    "MNI152NLin6Asym",
    "MNI152NLin6Sym",
)
_ARCHIVE = "https://templateflow.s3.amazonaws.com"
_NILEARN_FILE = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True)
class Template:
    """One template: its space, files, and whether it shows a brain without skull."""

    space: str
    t1w: Path
    brain_mask: Path | None
    skull_stripped: bool

    @property
    def address(self) -> str | None:
        """Where anybody finds the T1w; None for the one that comes with nilearn."""
        if self.space == NILEARN_SPACE:
            return None
        return f"{_ARCHIVE}/tpl-{self.space}/{self.t1w.name}"


def templateflow_home() -> Path:
    """TemplateFlow's folder, without importing TemplateFlow."""
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    home = os.environ.get("TEMPLATEFLOW_HOME") or f"{cache}/templateflow"
    return Path(home).expanduser().absolute()


def find_template(space: str, *, offline: bool) -> Template:
    """Find a template at 1 mm with its brain mask, and check that both can be read.

    Parameters
    ----------
    space : str
        One of `SPACES`. ``MNI152NLin2009aSym`` is the ICBM 2009a brain that nilearn carries.
    offline : bool
        Look at the cache only; otherwise one fetch is tried.

    Raises
    ------
    MissingResourceError
        With the command to run on a connected machine.
    """
    if space == NILEARN_SPACE:
        return Template(space, _check(_nilearn_brain()), None, skull_stripped=True)
    wanted = {"T1w": "T1w", "brain mask": "desc-brain_mask"}
    found = {what: _cached(space, stem) for what, stem in wanted.items()}
    if not offline and not all(found.values()):
        _fetch(space)
        found = {what: _cached(space, stem) for what, stem in wanted.items()}
    for what, path in found.items():
        if path is None:
            raise MissingResourceError(
                f"the {what} of template {space} at 1 mm is not in {templateflow_home()}. "
                + _advice(space)
            )
    t1w, mask = (_check(path, space) for path in found.values() if path is not None)
    return Template(space, t1w, mask, skull_stripped=False)


def _cached(space: str, stem: str) -> Path | None:
    """A file of the cache that is there and not empty (TemplateFlow leaves empty stubs)."""
    folder = templateflow_home() / f"tpl-{space}"
    for resolution in ("01", "1"):
        path = folder / f"tpl-{space}_res-{resolution}_{stem}.nii.gz"
        with suppress(OSError):  # a cache that cannot be entered holds nothing for us
            if path.is_file() and path.stat().st_size:
                return path.absolute()
    return None


def _advice(space: str) -> str:
    return (
        "On a machine with a connection run\n"
        f"    python -c \"from templateflow import api; api.get('{space}', resolution=1, "
        "suffix=['T1w', 'mask'], extension='.nii.gz')\"\n"
        "and copy its TEMPLATEFLOW_HOME (~/.cache/templateflow, if nothing else is set) here; "
        + (
            "bind it into the container and let the variable TEMPLATEFLOW_HOME say where "
            "(docs/hpc.md, section 2)."
            if os.environ.get("REMIX_BIDS_CONTAINER")
            else "the variable TEMPLATEFLOW_HOME says where it is."
        )
    )


_DOWNLOAD = """
import sys
from templateflow import api
api.get(sys.argv[1], resolution=1, desc=None, suffix="T1w", extension=".nii.gz")
api.get(sys.argv[1], resolution=1, desc="brain", suffix="mask", extension=".nii.gz")
"""


def _fetch(space: str) -> None:
    """Let TemplateFlow download the two files (the one thing a run may use the network for).

    They come into TemplateFlow's folder whole or not at all, whatever becomes of this process, and
    whoever else fetches them; so does the skeleton of all templates, if it is new.
    """
    home = templateflow_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=home, prefix=".remix-bids-") as folder:
            done = subprocess.run(  # noqa: S603 - a list of arguments, no shell
                [sys.executable, "-c", _DOWNLOAD, space],
                env={**os.environ, "TEMPLATEFLOW_HOME": folder},
                capture_output=True,
                text=True,
                check=False,
            )
            problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if done.returncode == 0:
                problem = ""
                _move(Path(folder), home)
    except OSError as error:
        problem = str(error)
    if problem:  # whatever went wrong, the user needs the same advice
        raise MissingResourceError(
            f"template {space} could not be fetched ({problem}). " + _advice(space)
        )


def _move(folder: Path, home: Path) -> None:
    """Move all files that the other folder lacks, or holds as TemplateFlow's empty stubs."""
    for path in sorted(folder.rglob("*")):
        target = home / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif not target.exists() or not target.stat().st_size:
            path.replace(target)


def _nilearn_brain() -> Path:
    """nilearn's bundled ICBM 2009a brain; importing nilearn would open a socket."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise MissingResourceError(f"{NILEARN_SPACE} needs nilearn: python -m pip install nilearn")
    return Path(spec.origin).parent / "datasets" / "data" / _NILEARN_FILE


def _check(path: Path, space: str = NILEARN_SPACE) -> Path:
    import nibabel as nb
    import numpy as np

    nilearn = space == NILEARN_SPACE
    advice = "Reinstall nilearn." if nilearn else f"Remove it. {_advice(space)}"
    try:
        image = nb.load(path)
        data = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise MissingResourceError(f"{path} cannot be read ({error}). {advice}") from error
    if data.ndim != 3 or not data.any():
        raise MissingResourceError(f"{path} is not an image of one volume. {advice}")
    return path
