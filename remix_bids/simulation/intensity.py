"""How bright an image is."""

from __future__ import annotations

from torch import Tensor

PERCENTILE = 99.5


def intensity_scale(image: Tensor, covered: Tensor | None = None) -> float:
    """The intensity that becomes 1: the 99.5th percentile of the foreground that was acquired.

    Foreground is what exceeds a tenth of the 99.5th percentile of all acquired voxels, so that the
    amount of air in the field of view does not move the scale.

    Raises
    ------
    ValueError
        If nothing was acquired or all of it is zero.
    """
    values = image.flatten() if covered is None else image[covered.bool()]
    if len(values) == 0:
        raise ValueError("no voxel of the scan lies inside the working grid")
    rough = _percentile(values)
    if not rough > 0:
        raise ValueError("the scan is zero everywhere inside the working grid")
    return _percentile(values[values > 0.1 * rough])


def _percentile(values: Tensor) -> float:
    # torch.quantile refuses more than 2**24 values, a working grid comes close; kthvalue does not.
    k = max(1, round(PERCENTILE / 100 * len(values)))
    return float(values.kthvalue(k).values)
