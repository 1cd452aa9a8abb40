"""The table of an evaluation as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from remix_bids.evaluation.table import (
    bootstrap_interval,
    classes_of,
    methods_of,
    noise_title,
    paired_gain,
)

BASE = "cubic"


def plot(rows: Sequence[dict], path: Path) -> None:
    """Gain in PSNR over cubic interpolation by class, one panel for each noise level.

    Bars are means over persons, lines their 95 % bootstrap intervals.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "remix-bids"  # the same rows give the same file
    import matplotlib.pyplot as plt

    levels = sorted({float(row["noise"]) for row in rows})
    methods = [m for m in methods_of(rows) if m != BASE]
    figure, panels = plt.subplots(
        1, len(levels), figsize=(5.5 * len(levels), 3.6), sharey=True, squeeze=False
    )
    for panel, noise in zip(panels[0], levels, strict=True):
        mine = [row for row in rows if float(row["noise"]) == noise]
        where = np.arange(len(classes_of(mine)))
        for i, method in enumerate(methods):
            gains = [paired_gain(mine, "psnr", BASE, k, method) for k in classes_of(mine)]
            means = np.array([np.mean(g) for g in gains])
            low, high = np.array([bootstrap_interval(g) for g in gains]).T
            width = 0.85 / len(methods)
            x = where + (i - (len(methods) - 1) / 2) * width
            panel.bar(x, means, width, label=method)
            panel.vlines(x, low, high, color="black", linewidth=0.8)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(where, [str(k) for k in classes_of(mine)])
        panel.set_xlabel("effective voxel volume, mm$^3$")
        panel.set_title(noise_title(noise))
    panels[0][0].set_ylabel(f"PSNR gain over {BASE}, dB")
    panels[0][-1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
