"""Figures and the summary of one scan, for the report."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    Str,
    TraitedSpec,
    isdefined,
    traits,
)

from remix_bids.experts.registry import NO_EXPERT
from remix_bids.interfaces.qc import load, load_brain, load_scan
from remix_bids.interfaces.resample import on_working_grid
from remix_bids.qc import mosaic
from remix_bids.qc.dictionary import qc_dictionary

NOTICE = '<p class="notice"><b>Not for diagnostic use.</b> The output is an estimate.</p>\n'
DIFFERENCE_SCALE = 0.2  # of the intensity window; the same for all scans
RIM = 5  # voxels
MISFIT_SCALE = (1.0, 4.0)  # times the noise: transparent up to, red from


class _FigureOutputSpec(TraitedSpec):
    out_file = File(exists=True)


class _PlotRegistrationInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="image on the working grid")
    template = File(exists=True, mandatory=True)
    template_mask = File(exists=True)


class PlotRegistration(SimpleInterface):
    """The registered image under the outline of the template's brain."""

    input_spec = _PlotRegistrationInputSpec
    output_spec = _FigureOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        template = on_working_grid(Path(self.inputs.template))
        text = mosaic.overlay(load(self.inputs.in_file), template, load_brain(self.inputs))
        path = Path(runtime.cwd) / "registration.svg"
        path.write_text(text)
        self._results["out_file"] = str(path)
        return runtime


class _SeenInputSpec(BaseInterfaceInputSpec):
    coverage = File(exists=True, mandatory=True)
    template = File(exists=True, mandatory=True)
    template_mask = File(exists=True)


def _seen(inputs: Any) -> np.ndarray:
    """Where to look: the acquired part of the brain, or all that was acquired."""
    covered = load(inputs.coverage) > 0
    seen = load_brain(inputs) & covered
    return seen if seen.any() else covered


class _PlotEnhancementInputSpec(_SeenInputSpec):
    native = File(exists=True, mandatory=True, desc="image on its native grid")
    transform = File(exists=True, mandatory=True, desc="ITK affine, template to native points")
    after = File(exists=True, mandatory=True)


class PlotEnhancement(SimpleInterface):
    """The acquired slices, as thick as they are, and the result, in one intensity window."""

    input_spec = _PlotEnhancementInputSpec
    output_spec = _FigureOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        from remix_bids.qc.consistency import thick_slices
        from remix_bids.spatial import WORKING_GRID, index_map

        native, grid, world = load_scan(self.inputs.native, self.inputs.transform)
        mapping = index_map(WORKING_GRID, grid, world)
        before = thick_slices(native, grid, mapping, WORKING_GRID.shape)
        before *= load(self.inputs.coverage) > 0
        text = mosaic.before_after(before, load(self.inputs.after), _seen(self.inputs))
        path = Path(runtime.cwd) / "enhancement.svg"
        path.write_text(text)
        self._results["out_file"] = str(path)
        return runtime


class _PlotDifferenceInputSpec(_SeenInputSpec):
    before = File(exists=True, mandatory=True, desc="interpolated image")
    after = File(exists=True, mandatory=True)


class _PlotDifferenceOutputSpec(TraitedSpec):
    out_file = File(exists=True)
    changes = File(exists=True, desc="the places that changed most")


class PlotDifference(SimpleInterface):
    """What was added to the interpolated image, and where it was most."""

    input_spec = _PlotDifferenceInputSpec
    output_spec = _PlotDifferenceOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        from scipy.ndimage import binary_erosion, uniform_filter

        from remix_bids.qc.consistency import WINDOW, largest_places
        from remix_bids.spatial import WORKING_GRID

        before, after, seen = load(self.inputs.before), load(self.inputs.after), _seen(self.inputs)
        top = mosaic.intensity_window(before, seen)[1]
        difference = after - before
        palette = mosaic.Palette(high=DIFFERENCE_SCALE * top)
        folder = Path(runtime.cwd)
        title = f"after minus before: red +{DIFFERENCE_SCALE:.0%}, blue -{DIFFERENCE_SCALE:.0%}"
        text = mosaic.painted(before, difference, seen, palette, f"{title} of the window")
        (folder / "difference.svg").write_text(text)

        local = np.sqrt(uniform_filter((difference * seen) ** 2, round(WINDOW)).clip(min=0))
        # The skull lies near the template's border, and is not what a reader looks for.
        inner = binary_erosion(seen, iterations=RIM)
        places = largest_places(local, inner if inner.any() else seen)
        titles = []
        for i, place in enumerate(places, 1):
            x, y, z = (WORKING_GRID.affine @ (*place, 1))[:3]
            titles.append(f"{i}: {x:.0f}, {y:.0f}, {z:.0f} mm; {100 * local[place] / top:.0f} %")
        text = mosaic.close_ups(before, after, places, titles, seen, palette)
        (folder / "changes.svg").write_text(text)
        self._results["out_file"] = str(folder / "difference.svg")
        self._results["changes"] = str(folder / "changes.svg")
        return runtime


class _PlotConsistencyInputSpec(_SeenInputSpec):
    after = File(exists=True, mandatory=True)
    chi2 = File(exists=True, mandatory=True)
    unknowable = File(exists=True, mandatory=True)


class _PlotConsistencyOutputSpec(TraitedSpec):
    out_file = File(exists=True)
    unknowable = File(exists=True)


class PlotConsistency(SimpleInterface):
    """Where the output disagrees with the scan, and what the scan could not have told."""

    input_spec = _PlotConsistencyInputSpec
    output_spec = _PlotConsistencyOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        after, seen = load(self.inputs.after), _seen(self.inputs)
        top = mosaic.intensity_window(after, seen)[1]
        folder = Path(runtime.cwd)
        low, high = MISFIT_SCALE
        title = f"disagreement, clear up to {low:g} x noise, yellow to red at {high:g} x and above"
        values = np.sqrt(load(self.inputs.chi2))
        text = mosaic.painted(after, values, seen, mosaic.Palette(high, low), title)
        (folder / "consistency.svg").write_text(text)
        part = load(self.inputs.unknowable)
        palette = mosaic.Palette(high=DIFFERENCE_SCALE * top)
        title = (
            f"what the scan could not have told: red +{DIFFERENCE_SCALE:.0%}, "
            f"blue -{DIFFERENCE_SCALE:.0%} of the window"
        )
        text = mosaic.painted(after, part, seen, palette, title)
        (folder / "unknowable.svg").write_text(text)
        self._results["out_file"] = str(folder / "consistency.svg")
        self._results["unknowable"] = str(folder / "unknowable.svg")
        return runtime


class _PlotNativeInputSpec(BaseInterfaceInputSpec):
    native = File(exists=True, mandatory=True, desc="image on its native grid")
    after = File(exists=True, mandatory=True, desc="output in native space")
    part = File(exists=True, mandatory=True, desc="what of it was enhanced")


class PlotNative(SimpleInterface):
    """The output over the scan in native space, with the border of what was enhanced."""

    input_spec = _PlotNativeInputSpec
    output_spec = _FigureOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        import nibabel as nb

        from remix_bids.qc.consistency import thick_slices
        from remix_bids.spatial import Grid, index_map

        # The figures want axes that point right, anterior and superior.
        after, part = (
            nb.as_closest_canonical(nb.load(path)) for path in (self.inputs.after, self.inputs.part)
        )
        scan = nb.load(self.inputs.native)
        source = Grid(scan.shape[:3], scan.affine)
        mapping = index_map(Grid(after.shape, after.affine), source)
        before = thick_slices(load(self.inputs.native), source, mapping, after.shape)
        inside = np.asanyarray(part.dataobj) > 0.5
        text = mosaic.before_after(
            before,
            np.asanyarray(after.dataobj, dtype=np.float32),
            inside if inside.any() else np.ones_like(inside),
            names=("the acquired slices, native space", "the output in native space"),
            outline=inside,
        )
        path = Path(runtime.cwd) / "native.svg"
        path.write_text(text)
        self._results["out_file"] = str(path)
        return runtime


class _TabulateInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="all figures of a scan, JSON")


class _TabulateOutputSpec(TraitedSpec):
    consistency = File(exists=True, desc="HTML fragment")
    quality = File(exists=True, desc="HTML fragment")


class Tabulate(SimpleInterface):
    """The figures of one scan as tables."""

    input_spec = _TabulateInputSpec
    output_spec = _TabulateOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        figures = json.loads(Path(self.inputs.in_file).read_text())
        folder = Path(runtime.cwd)
        for name, text in (
            ("consistency", consistency_html(figures)),
            ("quality", quality_html(figures)),
        ):
            (folder / f"{name}.html").write_text(text)
            self._results[name] = str(folder / f"{name}.html")
        return runtime


def _number(value: Any) -> str:
    return "n/a" if value is None else f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>\n"


def quality_html(figures: dict[str, Any]) -> str:
    """Image quality before and after, as an HTML fragment."""
    rows = []
    for key, entry in qc_dictionary().items():
        if f"{key}_before" in figures:
            values = [_number(figures[f"{key}_{when}"]) for when in ("before", "after")]
            rows.append([entry["LongName"], *values, entry["Units"], entry["Better"]])
        elif key in ("residual_energy", "network_energy") and key in figures:
            value = _number(figures[key])
            rows.append([entry["LongName"], "", value, entry["Units"], entry["Better"]])
    text = _table(["", "before", "after", "unit", "better is"], rows)
    if figures.get("snr_before") is None:
        text += "<p>n/a: the tissue classes of this image cannot be told apart.</p>\n"
    return text


def consistency_html(figures: dict[str, Any]) -> str:
    """Agreement with the scan, as an HTML fragment."""
    rows, enforced = [], "consistency_nrmse_enforced" in figures
    for key, entry in qc_dictionary().items():
        if key not in figures or not key.startswith(("consistency", "scan_noise", "unknowable")):
            continue
        row = [entry["LongName"], _number(figures[key])]
        if enforced:
            row.append(_number(figures[f"{key}_enforced"]) if f"{key}_enforced" in figures else "")
        rows.append([*row, entry["Units"], entry["Better"]])
    copied = figures.get("expert") == NO_EXPERT
    head = (
        ["", "resampled copy" if copied else "network"]
        + ["after the consistency step"] * enforced
        + ["unit", "better is"]
    )
    text = _table(head, rows)
    if copied:
        text += (
            "<p>No network was run. A resampled copy that is taken back through the acquisition is "
            "blurred once more, as any interpolated image is: where it disagrees the scan is "
            "sharp, which says nothing against the copy.</p>\n"
        )
    if figures.get("left_out_psnr") is not None:
        expert, cubic = figures["left_out_psnr"], figures["left_out_psnr_cubic"]
        text += (
            "<p>Leave slices out: every second slice was taken away and restored from the others. "
            f"At the missing slices the expert comes to <b>{expert:.2f} dB</b>, cubic "
            f"interpolation to <b>{cubic:.2f} dB</b> (PSNR in the brain). The expert worked with "
            "twice the spacing, which is harder than what it did for the output.</p>\n"
        )
    elif "left_out_psnr" in figures:
        text += "<p>Leave slices out: no left-out slice shows the brain.</p>\n"
    if enforced:
        text += (
            "<p>After the steps of consistency the output agrees with the scan as far as they bring"
            " it; judge the network by the first column.</p>\n"
        )
    return text


class _SummarizeInputSpec(BaseInterfaceInputSpec):
    sidecar = File(exists=True, mandatory=True)
    source = Str(mandatory=True, desc="name of the scan")
    enhanced_fraction = traits.Float(desc="of the output in native space, where there is one")


class Summarize(SimpleInterface):
    """A table of what was found and done, as an HTML fragment."""

    input_spec = _SummarizeInputSpec
    output_spec = _FigureOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        content = json.loads(Path(self.inputs.sidecar).read_text())
        if isdefined(self.inputs.enhanced_fraction):
            content["EnhancedFraction"] = self.inputs.enhanced_fraction
        path = Path(runtime.cwd) / "summary.html"
        path.write_text(summary_html(self.inputs.source, content))
        self._results["out_file"] = str(path)
        return runtime


def summary_html(source: str, sidecar: dict[str, Any]) -> str:
    """What a person wants to know first, as an HTML fragment."""
    expert = sidecar["Expert"]
    digest = sidecar.get("ExpertSHA256", "")
    volume = f"{sidecar['EffectiveVoxelVolume']:g} mm3 effective"
    if "plain product" in sidecar["SelectionRule"]:
        volume = f"{sidecar['VoxelVolume']:g} mm3"
    why = f"asked for by {sidecar['SelectionRule']}"
    if not sidecar["SelectionRule"].startswith("--expert"):
        why = f"the nearest to {volume}; rule: {sidecar['SelectionRule']}"
    if expert == NO_EXPERT:
        why = "all voxel sides are near 1 mm, nothing is to be gained; a resampled copy"
    slices = (
        "taken to blur as much as lies between a Gaussian and a box of the width that header and "
        "sidecar make likely; too thin to be measured, or too far apart, or too few"
    )
    if "SliceProfileWidth" in sidecar:
        width = sidecar["SliceProfileWidth"]
        slices = (
            f"taken to blur as a Gaussian of {width:.1f} mm (FWHM) does: measured in the scan, and "
            "weighed with what header and sidecar make likely"
        )
    timings = sidecar.get("Timings", {})
    rows = [
        ("Image", source),
        ("Voxels", " x ".join(f"{side:.3g}" for side in sidecar["VoxelSize"]) + " mm"),
        ("Slices", slices),
        (
            "Voxel volume",
            f"{sidecar['VoxelVolume']:g} mm3, effective {sidecar['EffectiveVoxelVolume']:g} mm3",
        ),
        ("Expert", f"{expert}: {why}"),
        ("Weights", f"sha256 {digest[:12]}" if digest else "none were used"),
        ("Matched as", "skull-stripped brain" if sidecar["SkullStripped"] else "whole head"),
        ("Registration score", f"{sidecar['RegistrationScore']:.2f}"),
        (
            "Volume change",
            f"{sidecar['AffineDeterminant']:.3f} mm3 of the person per mm3 of the output",
        ),
        ("Brain in the field of view", f"{100 * sidecar['BrainCoverage']:.0f} %"),
        ("Made on", sidecar["Device"]),
        (
            "Time",
            ", ".join(f"{name.lower()} {value:.0f} s" for name, value in timings.items()) or "n/a",
        ),
        ("Consistency step", sidecar.get("ConsistencyStep", "none")),
        ("Enhanced part, native space", f"{100 * sidecar.get('EnhancedFraction', 0):.0f} %"),
        ("Warnings", str(len(sidecar["Warnings"]) or "none")),
    ]
    if "EnhancedFraction" not in sidecar:
        rows = [row for row in rows if not row[0].startswith("Enhanced part")]
    table = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows
    )
    warnings = "\n".join(f"<li>{escape(text)}</li>" for text in sidecar["Warnings"])
    box = f'<ul class="warnings">\n{warnings}\n</ul>\n' if warnings else ""
    return f"{NOTICE}{box}<table>\n{table}\n</table>\n"
