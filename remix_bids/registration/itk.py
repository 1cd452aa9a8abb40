"""ITK affine files to and from 4x4 matrices, without ITK.

ITK stores an affine as a 3x3 matrix ``A``, a translation ``t`` and a fixed centre ``c`` in LPS
millimetres: ``y = A (x - c) + t + c``, from points of the fixed image to points of the moving one
(what a resampler needs). Here matrices are homogeneous, in RAS+ millimetres (NIfTI), same
direction.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # LPS <-> RAS, its own inverse
_HEADER = "#Insight Transform File V1.0"


def _to_ras(parameters: np.ndarray, centre: np.ndarray) -> np.ndarray:
    linear = parameters[:9].reshape(3, 3)
    lps = np.eye(4)
    lps[:3, :3] = linear
    lps[:3, 3] = parameters[9:12] + centre - linear @ centre
    return _FLIP @ lps @ _FLIP


def _read_text(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        key, colon, value = line.partition(":")
        if colon and not line.startswith("#"):
            if key in fields:
                raise ValueError(f"{path} holds more than one transform")
            fields[key] = value.strip()
    try:
        kind = fields["Transform"]
        parameters = np.array(fields["Parameters"].split(), dtype=float)
        centre = np.array(fields["FixedParameters"].split(), dtype=float)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not an ITK transform file") from error
    return kind, parameters, centre


def _read_binary(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    from scipy.io import loadmat

    content = loadmat(path)
    kinds = [key for key in content if key != "fixed" and not key.startswith("__")]
    if len(kinds) != 1 or "fixed" not in content:
        raise ValueError(f"{path} is not an ITK transform file")
    kind = kinds[0]
    return kind, content[kind].astype(float).ravel(), content["fixed"].astype(float).ravel()


def read_itk_affine(path: str | Path) -> np.ndarray:
    """Read an ITK affine, text (``.txt``, ``.tfm``) or ANTs' binary (``.mat``).

    Returns
    -------
    (4, 4) float64 array
        From points of the fixed image to points of the moving image, RAS+ mm.

    Raises
    ------
    ValueError
        The file holds something else than one 3D affine.
    """
    path = Path(path)
    reader = _read_binary if path.suffix == ".mat" else _read_text
    kind, parameters, centre = reader(path)
    if not kind.startswith(("AffineTransform_", "MatrixOffsetTransformBase_")):
        raise ValueError(f"{path} holds a {kind}, not an affine")
    if parameters.size != 12 or centre.size != 3:
        raise ValueError(f"{path} does not hold a 3D affine")
    return _to_ras(parameters, centre)


def write_itk_affine(path: str | Path, matrix: np.ndarray) -> None:
    """Write a fixed-to-moving RAS+ matrix as an ITK text affine that ``antsApplyTransforms`` reads.

    Parameters
    ----------
    matrix : (4, 4) array
        From points of the fixed image to points of the moving image, RAS+ mm.
    """
    matrix = np.asarray(matrix, dtype=float)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(f"not a finite 4x4 matrix: {matrix!r}")
    lps = _FLIP @ matrix @ _FLIP
    parameters = np.concatenate([lps[:3, :3].ravel(), lps[:3, 3]])
    Path(path).write_text(
        f"{_HEADER}\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {' '.join(repr(float(p)) for p in parameters)}\n"
        "FixedParameters: 0 0 0\n"
    )
