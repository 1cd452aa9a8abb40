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
)

from remix_bids.interfaces.resample import brain_on_working_grid, on_working_grid
from remix_bids.qc import mosaic


def _load(path: str) -> np.ndarray:
    import nibabel as nb

    return np.asanyarray(nb.load(path).dataobj, dtype=np.float32)


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
        template = Path(self.inputs.template)
        mask = self.inputs.template_mask
        brain = brain_on_working_grid(template, Path(mask) if isdefined(mask) else None)
        text = mosaic.overlay(_load(self.inputs.in_file), on_working_grid(template), brain)
        path = Path(runtime.cwd) / "registration.svg"
        path.write_text(text)
        self._results["out_file"] = str(path)
        return runtime


class _PlotEnhancementInputSpec(BaseInterfaceInputSpec):
    before = File(exists=True, mandatory=True)
    after = File(exists=True, mandatory=True)
    coverage = File(exists=True, mandatory=True)
    template = File(exists=True, mandatory=True)
    template_mask = File(exists=True)


class PlotEnhancement(SimpleInterface):
    """The acquired image and the result side by side, in one intensity window."""

    input_spec = _PlotEnhancementInputSpec
    output_spec = _FigureOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        template = Path(self.inputs.template)
        mask = self.inputs.template_mask
        brain = brain_on_working_grid(template, Path(mask) if isdefined(mask) else None)
        seen = brain & (_load(self.inputs.coverage) > 0)
        if not seen.any():
            seen = _load(self.inputs.coverage) > 0
        text = mosaic.before_after(_load(self.inputs.before), _load(self.inputs.after), seen)
        path = Path(runtime.cwd) / "enhancement.svg"
        path.write_text(text)
        self._results["out_file"] = str(path)
        return runtime


class _SummarizeInputSpec(BaseInterfaceInputSpec):
    sidecar = File(exists=True, mandatory=True)
    source = Str(mandatory=True, desc="name of the scan")


class Summarize(SimpleInterface):
    """A table of what was found and done, as an HTML fragment."""

    input_spec = _SummarizeInputSpec
    output_spec = _FigureOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        content = json.loads(Path(self.inputs.sidecar).read_text())
        path = Path(runtime.cwd) / "summary.html"
        path.write_text(summary_html(self.inputs.source, content))
        self._results["out_file"] = str(path)
        return runtime


def summary_html(source: str, sidecar: dict[str, Any]) -> str:
    """What a person wants to know first, as an HTML fragment."""
    expert = sidecar["Expert"]
    digest = sidecar.get("ExpertSHA256", "")
    rows = [
        ("Image", source),
        ("Voxels", " x ".join(f"{side:.3g}" for side in sidecar["VoxelSize"]) + " mm"),
        (
            "Voxel volume",
            f"{sidecar['VoxelVolume']:g} mm3, effective {sidecar['EffectiveVoxelVolume']:g} mm3",
        ),
        ("Expert", f"{expert} ({sidecar['SelectionRule']}; sha256 {digest[:12] or 'none'})"),
        ("Matched as", "skull-stripped brain" if sidecar["SkullStripped"] else "whole head"),
        ("Registration score", f"{sidecar['RegistrationScore']:.2f}"),
        (
            "Volume change",
            f"{sidecar['AffineDeterminant']:.3f} mm3 of the person per mm3 of the output",
        ),
        ("Brain in the field of view", f"{100 * sidecar['BrainCoverage']:.0f} %"),
        ("Made on", sidecar["Device"]),
    ]
    table = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows
    )
    warnings = "\n".join(f"<li>{escape(text)}</li>" for text in sidecar["Warnings"])
    box = f'<ul class="warnings">\n{warnings}\n</ul>\n' if warnings else ""
    return f"{box}<table>\n{table}\n</table>\n"
