"""Other people's programs in the evaluation: any command that reads and writes an image."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import zlib
from pathlib import Path

import nibabel as nb
import numpy as np
from nibabel.filebasedimages import ImageFileError

from remix_bids.errors import RemixError, UsageError
from remix_bids.spatial import Grid

UNREADABLE = (OSError, EOFError, zlib.error, ImageFileError, ValueError)
"""What `read_image` raises."""


def parse_command(template: str) -> list[str]:
    """Split a command like ``mri_synthseg --i {input} --o {output}``; no shell is involved.

    Raises
    ------
    UsageError
        If it does not name both files, or a quotation in it does not end.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UsageError(f"the command {template!r} cannot be read: {error}") from error
    if not words or not all(any(name in w for w in words) for name in ("{input}", "{output}")):
        raise UsageError(f"the command {template!r} must hold {{input}} and {{output}}")
    return words


def run_command(
    template: str, image: np.ndarray, grid: Grid, dtype: type = np.float32
) -> tuple[np.ndarray, Grid]:
    """Run a command on an image.

    Parameters
    ----------
    template : str
        See `parse_command`.
    dtype : type
        Of the result; to whole numbers it is rounded, for a scaled NIfTI holds 2.9999 for 3.
    image : (x, y, z) array
        Written as float32 NIfTI.
    grid : Grid
        Of the image, RAS+ mm.

    Returns
    -------
    (x, y, z) array and Grid
        What the command wrote, on the grid it chose.

    Raises
    ------
    RemixError
        If it fails or writes nothing that can be read as one image.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = {key: str(Path(folder) / f"{key}.nii.gz") for key in ("input", "output")}
        written = nb.Nifti1Image(image.astype(np.float32), grid.affine)
        written.header.set_xyzt_units("mm", "sec")
        nb.save(written, names["input"])
        words = [
            word.replace("{input}", names["input"]).replace("{output}", names["output"])
            for word in parse_command(template)
        ]
        try:
            done = subprocess.run(  # noqa: S603 - a list of arguments, no shell
                words, capture_output=True, text=True, errors="replace", check=False
            )
            if done.returncode:
                raise RemixError(
                    f"{template!r} ended with {done.returncode}: {done.stderr.strip()[-500:]}"
                )
            return read_image(Path(names["output"]), dtype)
        except UNREADABLE as error:
            raise RemixError(f"{template!r}: {error}") from error


def read_image(file: Path, dtype: type) -> tuple[np.ndarray, Grid]:
    """One image and its grid; whole numbers are rounded.

    Raises
    ------
    OSError, EOFError, zlib.error, ImageFileError, ValueError
        If it is no single image of finite numbers.
    """
    image = nb.load(file)
    data = np.asanyarray(image.dataobj)
    x, y, z = image.shape[:3]
    data = data.reshape(x, y, z)  # refuses more than one image
    if not np.isfinite(data).all():
        raise ValueError("it holds voxels that are no finite number")
    data = np.rint(data) if np.issubdtype(dtype, np.integer) else data
    return data.astype(dtype), Grid((x, y, z), image.affine)
