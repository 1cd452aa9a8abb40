"""Leave slices out: real truth, from the scan itself.

Every second slice is taken away; what is restored from the others is held against it.
"""

from __future__ import annotations

import numpy as np
import torch

from remix_bids.qc.consistency import predict, to_native
from remix_bids.simulation.acquisition import Acquisition, slice_axis
from remix_bids.spatial import resample


def compare(
    native: np.ndarray,
    kept: np.ndarray,
    restored: np.ndarray,
    covered: np.ndarray,
    brain: np.ndarray,
    acquisition: Acquisition,
) -> dict[str, float | None]:
    """How near the slices that were left out are to what was restored without them.

    Parameters
    ----------
    native : (x, y, z) array
        The whole scan.
    kept : array
        The same without every second slice (the first one is kept).
    restored : (181, 217, 181) array
        What the expert made of ``kept``, on the working grid.
    covered, brain : bool arrays like ``restored``
    acquisition : Acquisition
        Of ``native``: slices keep their thickness when others are left out.

    Returns
    -------
    dict
        ``left_out_psnr`` of the expert, taken through the acquisition, and ``left_out_psnr_cubic``
        of cubic interpolation straight from slice to slice, in dB in the brain (range: from 0, or
        the scan's least value where that is below, to the brain's 99.5th percentile); None where no
        left-out slice shows the brain.
    """
    axis = slice_axis(acquisition.grid)
    halved = np.eye(4)
    halved[axis, axis] = 0.5
    cubic = resample(torch.from_numpy(kept), halved, native.shape, "cubic").numpy()
    predicted = predict(restored, covered, acquisition)
    judged = to_native(brain, acquisition) & np.isfinite(predicted)
    left_out = np.arange(native.shape[axis]) % 2 == 1
    left_out[2 * kept.shape[axis] - 1 :] = False  # nothing lies beyond the last slice kept
    shape = [1, 1, 1]
    shape[axis] = -1
    judged &= left_out.reshape(shape)
    if not judged.any():
        return {"left_out_psnr": None, "left_out_psnr_cubic": None}
    truth, lowest = native[judged], min(0.0, float(native.min()))
    peak = float(np.percentile(truth, 99.5)) - lowest

    def psnr(values: np.ndarray) -> float:
        error = float(((np.clip(values[judged], lowest, None) - truth) ** 2).mean())
        return float(10 * np.log10(peak**2 / max(error, 1e-12)))

    return {"left_out_psnr": psnr(predicted), "left_out_psnr_cubic": psnr(cubic)}
