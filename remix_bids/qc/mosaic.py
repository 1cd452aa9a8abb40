"""Mosaics of slices as small, self-contained SVG text (arrays in, text out).

All volumes are (x, y, z) on one grid whose axes point right, anterior and superior, such as the
working grid. Panels show the person's left on the page's left, and say so (L, R).
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
text{font:13px sans-serif;fill:#fff;stroke:#000;stroke-width:3;paint-order:stroke}
.edge{fill:none;stroke-width:1.1;stroke-linejoin:round}
.flip,.over{visibility:hidden}
svg:hover .over{visibility:visible}
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
        start, stop = int(low) - margin, int(high) + margin + 1
        sides.append(slice(max(start, 0), min(stop, mask.shape[axis])))
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

    tile_widths: tuple[int, int, int]
    row_heights: tuple[int, int, int]
    n: int

    @property
    def place_width(self) -> int:
        return max(self.tile_widths)

    @property
    def width(self) -> int:
        return self.n * (self.place_width + GAP) - GAP

    @property
    def height(self) -> int:
        return sum(self.row_heights) + 2 * GAP

    def corner(self, row: int, column: int, tile: np.ndarray) -> tuple[int, int]:
        """Upper left pixel (x, y) of a tile, centred in its place."""
        x = column * (self.place_width + GAP) + (self.place_width - tile.shape[1]) // 2
        return x, self.top(row)

    def top(self, row: int) -> int:
        """Pixel (y) where a row begins."""
        return sum(self.row_heights[:row]) + row * GAP

    def sides(self) -> str:
        """L and R beside the first axial and the first coronal tile, as SVG."""
        left = (self.place_width - self.tile_widths[0]) // 2
        return "".join(_sides(left, left + self.tile_widths[0], self.top(row)) for row in (0, 1))


def _sides(left: int, right: int, top: int) -> str:
    """L and R in the upper corners of a tile."""
    return (
        f'<text x="{left + 3}" y="{top + 15}">L</text>'
        f'<text x="{right - 3}" y="{top + 15}" text-anchor="end">R</text>'
    )


def _layout(shape: tuple[int, ...], n: int) -> _Layout:
    nx, ny, nz = shape
    return _Layout((nx, nx, ny), (ny, nz, nz), n)


_WARM = np.array([[255.0, 200, 30], [235, 30, 20]])
_COLD = np.array([[60.0, 220, 255], [40, 70, 255]])


@dataclass(frozen=True)
class Palette:
    """How a map is painted over an image: transparent at ``low``, full colour at ``high``.

    A signed map is painted warm where it is positive and cold where it is negative.
    """

    high: float
    low: float = 0.0

    def __call__(self, grey: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Paint (h, w) values over (h, w) grey levels of 0 to 255; (h, w, 3)."""
        values = np.nan_to_num(values)
        strength = np.clip((np.abs(values) - self.low) / (self.high - self.low), 0, 1)[..., None]
        warm = _WARM[0] * (1 - strength) + _WARM[1] * strength
        cold = _COLD[0] * (1 - strength) + _COLD[1] * strength
        colour = np.where(values[..., None] >= 0, warm, cold)
        opacity = strength**0.75  # small values must show
        return grey[..., None] * (1 - opacity) + colour * opacity


def _grey(tile: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    return np.clip((np.nan_to_num(tile) - low) / (high - low), 0, 1) * 255


def _picture(
    volume: np.ndarray,
    cuts: Cuts,
    window: tuple[float, float],
    values: np.ndarray | None = None,
    palette: Palette | None = None,
) -> str:
    """A mosaic as a data URI; with a map painted over it, if one is given."""
    layout = _layout(volume.shape, len(cuts.x))
    coloured = values is not None and palette is not None
    canvas = np.zeros((layout.height, layout.width, *((3,) if coloured else ())))
    over = _slices(values, cuts) if values is not None else None
    for row, tiles in enumerate(_slices(volume, cuts)):
        for column, tile in enumerate(tiles):
            x, y = layout.corner(row, column, tile)
            pixels = _grey(tile, window)
            if palette is not None and over is not None:
                pixels = palette(pixels, over[row][column])
            canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = pixels
    return _jpeg(canvas)


def _jpeg(pixels: np.ndarray) -> str:
    """Grey levels (h, w) or colours (h, w, 3) of 0 to 255 as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(pixels.round().astype(np.uint8))
    image.save(buffer, format="JPEG", quality=QUALITY, optimize=True)
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
    return _page(definitions, body + layout.sides(), layout.width, layout.height)


def before_after(
    before: np.ndarray,
    after: np.ndarray,
    mask: np.ndarray,
    *,
    n: int = 4,
    names: tuple[str, str] = ("before: the acquired slices", "after: the output"),
    outline: np.ndarray | None = None,
) -> str:
    """Two volumes in one place and one intensity window; hovering shows the second.

    Parameters
    ----------
    before, after : (x, y, z) array
        On one grid.
    mask : (x, y, z) bool array
        Where to look; cuts and window are taken from ``before`` inside it.
    n : int
        Cuts along each axis.
    names : tuple of 2 str
        Titles.
    outline : (x, y, z) bool array, optional
        Its border is drawn in both.
    """
    box = _box(mask, before)
    before, after, mask = before[box], after[box], mask[box]
    cuts = choose_cuts(mask, n)
    layout = _layout(before.shape, n)
    window = intensity_window(before, mask)
    definitions = _image("before", _picture(before, cuts, window), layout)
    definitions += _image("after", _picture(after, cuts, window), layout)
    edges = ""
    if outline is not None:
        edges = f'<path class="edge" stroke="#3c6" d="{_contours(outline[box], cuts)}"/>'
    body = _panel("before", f"{names[0]} (point at the figure for the other)", "", edges)
    # A title of its own colour, and a ground of its own: two texts must not show through.
    cover = f'<rect y="{-TITLE}" width="{layout.width}" height="{TITLE}"/>'
    body += f'<g class="over">{cover}{_panel("after", names[1], "", edges)}</g>'
    return _page(definitions, body + layout.sides(), layout.width, layout.height)


def painted(
    volume: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    palette: Palette,
    title: str,
    *,
    n: int = 4,
) -> str:
    """A map in colour over an image in grey; hovering shows the image alone.

    Parameters
    ----------
    volume, values : (x, y, z) array
        Image and map, on one grid; the map may hold NaN, which is not painted.
    mask : (x, y, z) bool array
        Where to look.
    palette : Palette
        With its fixed scale.
    title : str
        Says what the colours mean.
    n : int
        Cuts along each axis.
    """
    box = _box(mask, volume)
    volume, values, mask = volume[box], values[box], mask[box]
    cuts = choose_cuts(mask, n)
    layout = _layout(volume.shape, n)
    window = intensity_window(volume, mask)
    definitions = _image("map", _picture(volume, cuts, window, values, palette), layout)
    definitions += _image("image", _picture(volume, cuts, window), layout)
    cover = f'<rect y="{-TITLE}" width="{layout.width}" height="{TITLE}"/>'
    body = _panel("map", title)
    body += f'<g class="over">{cover}{_panel("image", "the image alone")}</g>'
    return _page(definitions, body + layout.sides(), layout.width, layout.height)


def close_ups(
    before: np.ndarray,
    after: np.ndarray,
    places: list[tuple[int, int, int]],
    titles: list[str],
    mask: np.ndarray,
    palette: Palette,
    *,
    normal: int = 1,
    reach: int = 24,
) -> str:
    """Places seen from near: one column each, with rows before, after and difference.

    Parameters
    ----------
    before, after : (x, y, z) array
        On one grid of 1 mm.
    places : list of voxel indices
        In the middle of each column.
    titles : list of str
        Of the columns.
    mask : (x, y, z) bool array
        For the intensity window.
    palette : Palette
        For the difference, in the units of the images.
    normal : int
        The axis that the planes shown are perpendicular to.
    reach : int
        Half the side of a picture in voxels.
    """
    window = intensity_window(before, mask)
    side = 2 * reach + 1
    zoom = 4
    columns = []
    for place in places:
        tiles = []
        for volume in (before, after, after - before):
            plane = np.take(volume, place[normal], axis=normal)
            middle = [c for axis, c in enumerate(place) if axis != normal]
            padded = np.pad(plane, reach)
            tile = padded[middle[0] : middle[0] + side, middle[1] : middle[1] + side]
            tiles.append(tile.T[::-1])
        grey = [np.repeat(_grey(t, window)[..., None], 3, axis=2) for t in tiles[:2]]
        grey.append(palette(_grey(tiles[0], window), tiles[2]))
        enlarged = [t.repeat(zoom, axis=0).repeat(zoom, axis=1) for t in grey]
        columns.append(np.concatenate([np.pad(t, ((0, GAP), (0, GAP), (0, 0))) for t in enlarged]))
    canvas = np.concatenate(columns, axis=1) if columns else np.zeros((GAP, GAP, 3))
    height, width = canvas.shape[:2]
    step = side * zoom + GAP
    text = "".join(
        f'<text x="{i * step + 6}" y="-7">{title}</text>' for i, title in enumerate(titles)
    )
    rows = ("before", "after", "difference")
    text += "".join(f'<text x="6" y="{i * step + 16}">{row}</text>' for i, row in enumerate(rows))
    if normal != 0:  # a sagittal plane has no left and right
        text += "".join(
            _sides(i * step, i * step + side * zoom, side * zoom - 21) for i in range(len(places))
        )
    picture = f'<image href="{_jpeg(canvas)}" width="{width}" height="{height}"/>'
    return _page("", picture + text, width, height)
