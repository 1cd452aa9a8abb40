"""Slices left out of real scans: what the app found, as a table.

    remix-bids BIDS OUT participant --leave-slices-out
    python benchmarks/left_out.py OUT

Reads the figures that the app wrote (``*_qc.json``) for every scan; prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def row(figures: Path) -> list[str]:
    """One line of the table: scan, voxel sizes, expert, PSNR of both at the missing slices."""
    stem = figures.name.removesuffix("_desc-remix_qc.json")
    found = json.loads(figures.read_text())
    scan = [stem, found["voxel_size"], found["expert"]]
    expert, cubic = found["left_out_psnr"], found["left_out_psnr_cubic"]
    if expert is None:
        return [*scan, "", "", ""]
    return [*scan, f"{cubic:.2f}", f"{expert:.2f}", f"{expert - cubic:+.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("derivatives", type=Path)
    given = parser.parse_args()
    print("| scan | voxel sizes, mm | expert of the whole scan | cubic, dB | expert, dB | gain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for figures in sorted(given.derivatives.glob("sub-*/**/*_desc-remix_qc.json")):
        print(f"| {' | '.join(map(str, row(figures)))} |")


if __name__ == "__main__":
    main()
