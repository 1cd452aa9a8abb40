"""Mosaics of slices as small, self-contained SVG text (arrays in, text out).

All volumes are (x, y, z) on one grid whose axes point right, anterior and superior, such as the
working grid. Panels show the left of the body on the left.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np

GAP = 4  # pixels between tiles
QUALITY = 88  # of the JPEG: artefacts stay invisible, a page stays small
TITLE = 22  # pixels of a panel's title line

_STYLE = """
text{font:13px sans-serif;fill:#fff}
.edge{fill:none;stroke-width:1.1;stroke-linejoin:round}
.flip{visibility:hidden}
svg:hover .flip{animation:flicker 2s infinite step-end}
@keyframes flicker{0%{visibility:visible}50%{visibility:hidden}}
"""


@dataclass(frozen=True)
class Cuts:
    """Which slices to show: voxel indices along x, y and z."""

    x: tuple[int, ...]
    y: tuple[int, ...]
    z: tuple[int, ...]


def choose_cuts(mask: np.ndarray, n: int) -> Cuts:
    """``n`` evenly spaced cuts along each axis through the bounding box of a mask."""
    if not mask.any():
        mask = np.ones_like(mask)
    chosen = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hits = np.flatnonzero(mask.any(axis=others))
        chosen.append(tuple(round(float(c)) for c in np.linspace(hits[0], hits[-1], n + 2)[1:-1]))
    return Cuts(*chosen)


def box_around(mask: np.ndarray, margin: int) -> tuple[slice, slice, slice]:
    """The bounding box of a mask, grown by some voxels; everything, if the mask is empty."""
    sides = []
    for axis in range(3):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (hits[0], hits[-1]) if hits.size else (0, mask.shape[axis] - 1)
        sides.append(slice(max(int(low) - margin, 0), min(int(high) + margin + 1, mask.shape[axis])))
    return sides[0], sides[1], sides[2]


def intensity_window(volume: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Display window: 0 (or the 1st percentile, if negative) to the 99.8th of what is not air."""
    values = volume[mask & np.isfinite(volume)]
    values = values[values != 0]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, (1, 99.8)))
    low = min(low, 0.0)
    return (low, high) if high > low else (low, low + 1.0)


def _box(mask: np.ndarray, *volumes: np.ndarray) -> tuple[slice, slice, slice]:
    """The part of the grid that is worth showing: a mask, and what is bright around it."""
    shown = mask.copy()
    for volume in volumes:
        shown |= volume > 0.05 * intensity_window(volume, mask)[1]
    if not shown.any():
        shown[:] = True
    return box_around(shown, 2)


def _slices(volume: np.ndarray, cuts: Cuts) -> list[list[np.ndarray]]:
    """Rows (axial, coronal, sagittal) of 2D slices (row 0 on top)."""
    return [
        [volume[:, :, k].T[::-1] for k in cuts.z],
        [volume[:, j, :].T[::-1] for j in cuts.y],
        [volume[i, :, :].T[::-1] for i in cuts.x],
    ]


@dataclass(frozen=True)
class _Layout:
    """Where each tile of a mosaic stands."""

    tile_width: int
    row_heights: tuple[int, int, int]
    n: int

    @property
    def width(self) -> int:
        return self.n * (self.tile_width + GAP) - GAP

    @property
    def height(self) -> int:
        return sum(self.row_heights) + 2 * GAP

    def corner(self, row: int, column: int, tile: np.ndarray) -> tuple[int, int]:
        """Upper left pixel (x, y) of a tile, centred in its place."""
        x = column * (self.tile_width + GAP) + (self.tile_width - tile.shape[1]) // 2
        return x, sum(self.row_heights[:row]) + row * GAP


def _layout(shape: tuple[int, ...], n: int) -> _Layout:
    nx, ny, nz = shape
    return _Layout(max(nx, ny), (ny, nz, nz), n)


def _picture(volume: np.ndarray, cuts: Cuts, window: tuple[float, float]) -> str:
    """A mosaic as a data URI."""
    from PIL import Image

    layout = _layout(volume.shape, len(cuts.x))
    canvas = np.zeros((layout.height, layout.width), dtype=np.uint8)
    low, high = window
    for row, tiles in enumerate(_slices(volume, cuts)):
        for column, tile in enumerate(tiles):
            x, y = layout.corner(row, column, tile)
            grey = np.clip((np.nan_to_num(tile) - low) / (high - low), 0, 1) * 255
            canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = grey.round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format="JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _contours(mask: np.ndarray, cuts: Cuts) -> str:
    """Outlines of a mask as SVG path data, in the pixels of the mosaic."""
    import contourpy

    layout = _layout(mask.shape, len(cuts.x))
    parts = []
    for row, tiles in enumerate(_slices(mask.astype(np.float32), cuts)):
        for column, tile in enumerate(tiles):
            x, y = layout.corner(row, column, tile)
            for line in contourpy.contour_generator(z=tile).lines(0.5) or ():
                points = " ".join(f"{px + x + 0.5:.1f},{py + y + 0.5:.1f}" for px, py in line)
                parts.append(f"M{points}")
    return "".join(parts)


def _panel(picture: str, title: str, classes: str = "", edges: str = "") -> str:
    return (
        f'<g class="{classes}"><use href="#{picture}"/>{edges}<text x="6" y="-7">{title}</text></g>'
    )


def _page(definitions: str, body: str, width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + TITLE}">\n'
        f"<style>{_STYLE}</style>\n<defs>{definitions}</defs>\n"
        f'<rect width="100%" height="100%" fill="#000"/>\n'
        f'<g transform="translate(0 {TITLE})">{body}</g>\n</svg>\n'
    )


def _image(name: str, uri: str, layout: _Layout) -> str:
    return f'<image id="{name}" href="{uri}" width="{layout.width}" height="{layout.height}"/>'


def overlay(
    volume: np.ndarray,
    reference: np.ndarray,
    mask: np.ndarray,
    *,
    inner: np.ndarray | None = None,
    n: int = 6,
) -> str:
    """A registered volume under the outline of the reference's mask.

    Hovering shows the reference itself in turns.

    Parameters
    ----------
    volume, reference : (x, y, z) array
        The registered image and what it was registered to.
    mask : (x, y, z) bool array
        Drawn in red: the reference's brain.
    inner : (x, y, z) bool array, optional
        Drawn in blue: a structure inside, such as the ventricles.
    """
    box = _box(mask, volume)
    volume, reference, mask = volume[box], reference[box], mask[box]
    inner = None if inner is None else inner[box]
    cuts = choose_cuts(mask, n)
    layout = _layout(volume.shape, n)
    edges = f'<path class="edge" stroke="#f33" d="{_contours(mask, cuts)}"/>'
    if inner is not None and inner.any():
        edges += f'<path class="edge" stroke="#3af" d="{_contours(inner, cuts)}"/>'
    definitions = ""
    for name, data in (("image", volume), ("reference", reference)):
        uri = _picture(data, cuts, intensity_window(data, mask))  # scalp fat may be saturated
        definitions += _image(name, uri, layout)
    body = _panel("image", "registered image, outline of the template's brain", "", edges)
    body += _panel("reference", "template", "flip", edges)
    return _page(definitions, body, layout.width, layout.height)


def before_after(before: np.ndarray, after: np.ndarray, mask: np.ndarray, *, n: int = 3) -> str:
    """Two volumes side by side in the same intensity window; hovering swaps them in place.

    Parameters
    ----------
    before, after : (x, y, z) array
        On one grid.
    mask : (x, y, z) bool array
        Where to look; cuts and window are taken from ``before`` inside it.
    """
    box = _box(mask, before)
    before, after, mask = before[box], after[box], mask[box]
    cuts = choose_cuts(mask, n)
    layout = _layout(before.shape, n)
    window = intensity_window(before, mask)
    definitions = _image("before", _picture(before, cuts, window), layout)
    definitions += _image("after", _picture(after, cuts, window), layout)
    names = {"before": "before: the acquired image, interpolated", "after": "after: super-resolved"}
    shift = layout.width + 3 * GAP
    left = _panel("before", names["before"]) + _panel("after", names["after"], "flip")
    right = _panel("after", names["after"]) + _panel("before", names["before"], "flip")
    body = f'{left}<g transform="translate({shift} 0)">{right}</g>'
    return _page(definitions, body, shift + layout.width, layout.height)
