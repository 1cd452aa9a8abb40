"""Consistency, image quality and native space: files in, files out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from remix_bids.experts.registry import NO_EXPERT
from remix_bids.interfaces.bids import CUBIC
from remix_bids.interfaces.resample import brain_on_working_grid, save_on_working_grid

if TYPE_CHECKING:  # torch is imported by workers only
    from remix_bids.simulation.acquisition import Acquisition
    from remix_bids.spatial import Grid


def load(path: str) -> np.ndarray:
    """The one volume of an image, float32."""
    import nibabel as nb

    image = nb.load(path)
    return np.asanyarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3]).copy()


def load_scan(path: str, transform: str) -> tuple[np.ndarray, Grid, np.ndarray]:
    """A scan, its native grid, and the way to there from template world."""
    import nibabel as nb
    import torch

    from remix_bids.registration.itk import read_itk_affine
    from remix_bids.spatial import Grid

    torch.set_num_threads(1)  # the voxels must not depend on the number of processors
    data = load(path)
    return data, Grid(data.shape, nb.load(path).affine), read_itk_affine(transform)


def load_acquisition(inputs: Any) -> tuple[np.ndarray, Acquisition]:
    """The scan of inputs with ``thickness``, and the acquisition that header and scan tell."""
    from remix_bids.simulation.slices import from_scan

    data, grid, world = load_scan(inputs.native, inputs.transform)
    known = inputs.thickness if isdefined(inputs.thickness) else None
    return data, from_scan(data, grid, world, known)


def load_brain(inputs: Any) -> np.ndarray:
    """The template's brain on the working grid, of inputs with ``template`` and its mask."""
    mask = inputs.template_mask
    return brain_on_working_grid(Path(inputs.template), Path(mask) if isdefined(mask) else None)


def write_json(path: Path, content: dict[str, Any]) -> str:
    """Write a JSON object; return the path."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return str(path)


class _ScanInputSpec(BaseInterfaceInputSpec):
    native = File(exists=True, mandatory=True, desc="image on its native grid")
    transform = File(exists=True, mandatory=True, desc="ITK affine, template to native points")
    thickness = traits.Float(desc="of the slices, mm, where the sidecar tells")


class _BrainInputSpec(_ScanInputSpec):
    coverage = File(exists=True, mandatory=True, desc="on the working grid: where the scan is")
    template = File(exists=True, mandatory=True)
    template_mask = File(exists=True)


class _CheckConsistencyInputSpec(_BrainInputSpec):
    enhanced = File(exists=True, mandatory=True, desc="as the network made it, working grid")
    enforced = File(exists=True, desc="after the consistency step, where there was one")


class _CheckConsistencyOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="figures, JSON")
    chi2 = File(exists=True, desc="map of disagreement on the working grid")
    unknowable = File(exists=True, desc="what the scan could not have told, working grid")


class CheckConsistency(SimpleInterface):
    """Hold an output against the acquired voxels (see `remix_bids.qc.consistency`)."""

    input_spec = _CheckConsistencyInputSpec
    output_spec = _CheckConsistencyOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        import torch

        from remix_bids.errors import InputImageError
        from remix_bids.qc import consistency
        from remix_bids.spatial import WORKING_GRID, index_map, resample

        native, acquisition = load_acquisition(self.inputs)
        covered, brain = load(self.inputs.coverage) > 0, load_brain(self.inputs)
        enhanced = load(self.inputs.enhanced)
        try:
            found = consistency.check(native, enhanced, covered, brain, acquisition)
        except ValueError as error:
            raise InputImageError(f"{self.inputs.native}: {error}") from error
        blind = consistency.unknowable(
            enhanced, covered, brain, acquisition, lowest=min(0.0, float(native.min()))
        )
        figures = {"scan_noise": found.noise, **_figures(found)}
        share = consistency.energy_share(blind, enhanced, brain & covered)
        figures["unknowable"] = 100 * share
        if isdefined(self.inputs.enforced) and self.inputs.enforced != self.inputs.enhanced:
            enforced = load(self.inputs.enforced)
            after = consistency.check(
                native, enforced, covered, brain, acquisition, noise=found.noise
            )
            figures |= {f"{key}_enforced": value for key, value in _figures(after).items()}

        mapping = index_map(WORKING_GRID, acquisition.grid, acquisition.world)
        chi2 = torch.from_numpy(np.nan_to_num(found.chi2))
        on_grid = resample(chi2, mapping, WORKING_GRID.shape, "linear").numpy() * covered
        folder = Path(runtime.cwd)
        for name, values in (("chi2", on_grid), ("unknowable", blind)):
            save_on_working_grid(values.astype(np.float32), folder / f"{name}.nii.gz")
            self._results[name] = str(folder / f"{name}.nii.gz")
        self._results["out_file"] = write_json(folder / "consistency.json", figures)
        return runtime


def _figures(found: Any) -> dict[str, float]:
    return {
        "consistency_chi2_median": found.median,
        "consistency_chi2_p95": found.p95,
        "consistency_chi2_max": found.largest,
        "consistency_disagreeing": 100 * found.disagreeing,
        "consistency_correlation": found.correlation,
        "consistency_nrmse": 100 * found.nrmse,
    }


class _EnforceConsistencyInputSpec(_ScanInputSpec):
    enhanced = File(exists=True, mandatory=True)
    coverage = File(exists=True, mandatory=True, desc="on the working grid: where the scan is")
    steps = traits.Int(mandatory=True, desc="none leaves the output as it is")


class _EnforceConsistencyOutputSpec(TraitedSpec):
    out_file = File(exists=True)
    share = traits.Float(
        desc="of what the output left unexplained of the scan, given back; none of a noisy scan"
    )


class EnforceConsistency(SimpleInterface):
    """Make an output agree with the acquired voxels, by as many steps as its expert asks for."""

    input_spec = _EnforceConsistencyInputSpec
    output_spec = _EnforceConsistencyOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        if self.inputs.steps == 0:
            self._results.update(out_file=self.inputs.enhanced, share=0.0)
            return runtime
        import torch

        from remix_bids.simulation.estimate import make_consistent
        from remix_bids.spatial import WORKING_GRID

        native, acquisition = load_acquisition(self.inputs)
        image, share = make_consistent(
            torch.from_numpy(load(self.inputs.enhanced)),
            torch.from_numpy(native),
            acquisition,
            WORKING_GRID,
            self.inputs.steps,
        )
        if share == 0:
            self._results.update(out_file=self.inputs.enhanced, share=share)
            return runtime
        path = Path(runtime.cwd) / "enforced.nii.gz"
        save_on_working_grid(image.numpy() * (load(self.inputs.coverage) > 0), path)
        self._results.update(out_file=str(path), share=share)
        return runtime


class _MeasureQualityInputSpec(_BrainInputSpec):
    before = File(exists=True, mandatory=True, desc="interpolated image on the working grid")
    estimate = File(exists=True, mandatory=True, desc="what the network was fed with")
    enhanced = File(exists=True, mandatory=True, desc="its output, or `before` without an expert")
    after = File(exists=True, mandatory=True, desc="the same after its steps: what is written")


class _JSONOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="figures, JSON")


class MeasureQuality(SimpleInterface):
    """Image quality before and after (see `remix_bids.qc.quality`)."""

    input_spec = _MeasureQualityInputSpec
    output_spec = _JSONOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        from remix_bids.qc import quality
        from remix_bids.simulation.acquisition import slice_axis
        from remix_bids.spatial import WORKING_GRID, index_map

        _, grid, world = load_scan(self.inputs.native, self.inputs.transform)
        mapping = index_map(WORKING_GRID, grid, world)
        axes = np.linalg.inv(mapping)[:3, :3]
        covered = load(self.inputs.coverage) > 0
        brain = load_brain(self.inputs) & covered
        images = {"before": load(self.inputs.before), "after": load(self.inputs.after)}
        tissues = quality.find_tissues(images["before"], brain)
        determinant = float(np.linalg.det(world[:3, :3]))
        figures: dict[str, Any] = {}
        for name, image in images.items():
            measured = quality.image_quality(
                image, brain, covered, axes, slice_axis(grid), tissues, determinant
            )
            figures |= {f"{key}_{name}": value for key, value in measured.items()}
        figures["residual_energy"] = quality.residual_energy(
            images["before"], images["after"], brain
        )
        enhanced = load(self.inputs.enhanced)
        fed = load(self.inputs.estimate)
        if np.array_equal(enhanced, images["before"]):  # no network was asked
            fed = enhanced
        figures["network_energy"] = quality.residual_energy(fed, enhanced, brain)
        path = Path(runtime.cwd) / "quality.json"
        self._results["out_file"] = write_json(path, figures)
        return runtime


class _ToNativeInputSpec(_ScanInputSpec):
    before = File(exists=True, mandatory=True, desc="interpolated image on the working grid")
    after = File(exists=True, mandatory=True, desc="output on the working grid")


class _ToNativeOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="1 mm isotropic, scanner's world, float32")
    part = File(exists=True, desc="how much of the residual was laid over each voxel")
    shape = traits.List(traits.Int)
    enhanced_fraction = traits.Float(desc="of the field of view")


class ToNative(SimpleInterface):
    """Lay what the network added over the scan in native space (see `remix_bids.native`)."""

    input_spec = _ToNativeInputSpec
    output_spec = _ToNativeOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        import nibabel as nb
        import torch

        from remix_bids.native import to_native_space
        from remix_bids.spatial import coverage, index_map

        native, source, world = load_scan(self.inputs.native, self.inputs.transform)
        residual = torch.from_numpy(load(self.inputs.after) - load(self.inputs.before))
        image, part, grid = to_native_space(torch.from_numpy(native), source, world, residual)
        covered = coverage(index_map(grid, source), source.shape, grid.shape)
        header = nb.load(self.inputs.native).header
        codes = [int(header[k]) for k in ("sform_code", "qform_code") if k in header]
        code = next((c for c in codes if c), 1)
        folder = Path(runtime.cwd)
        for name, values in (("out_file", image), ("part", part)):
            out = nb.Nifti1Image(values.numpy().astype(np.float32), grid.affine)
            out.header.set_xyzt_units("mm", "sec")
            out.set_sform(grid.affine, code=code)
            out.set_qform(grid.affine, code=code)
            nb.save(out, folder / f"{name}.nii.gz")
            self._results[name] = str(folder / f"{name}.nii.gz")
        self._results["shape"] = list(grid.shape)
        self._results["enhanced_fraction"] = float(part[covered].mean())
        return runtime


class _DescribeNativeInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="sidecar of the MNI image")
    shape = traits.List(traits.Int, mandatory=True)
    enhanced_fraction = traits.Float(mandatory=True)


class DescribeNative(SimpleInterface):
    """Write the sidecar of the image in native space."""

    input_spec = _DescribeNativeInputSpec
    output_spec = _JSONOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        content = json.loads(Path(self.inputs.in_file).read_text())
        x, y, z = self.inputs.shape
        content["Resolution"] = f"1 mm isotropic, {x} x {y} x {z} voxels, in the scanner's world"
        # Sizes are the person's own here, and the image refers to no template.
        for key in ("SpatialReference", "AffineDeterminant"):
            content.pop(key, None)
        added = content["Expert"] != NO_EXPERT
        also = "; what was added on the template's grid likewise" if added else ""
        content["Interpolation"] = CUBIC + also
        content["EnhancedFraction"] = round(self.inputs.enhanced_fraction, 4)
        path = Path(runtime.cwd) / "native.json"
        self._results["out_file"] = write_json(path, content)
        return runtime


class _DropSlicesInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="image on its native grid")
    thickness = traits.Float(desc="of its slices, mm, where a sidecar tells it")


class _DropSlicesOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="every second slice of it")
    thickness = traits.Float(desc="of the slices that are left, mm: at most their spacing before")


class DropSlices(SimpleInterface):
    """Keep every second slice of a scan, the first one included."""

    input_spec = _DropSlicesInputSpec
    output_spec = _DropSlicesOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        import nibabel as nb

        from remix_bids.simulation.acquisition import slice_axis
        from remix_bids.spatial import Grid

        image = nb.load(self.inputs.in_file)
        data = load(self.inputs.in_file)
        grid = Grid(data.shape, image.affine)
        axis = slice_axis(grid)
        # Of slices that overlapped only the spacing counted, and that slices are missing does not
        # make the others thicker.
        spacing = float(grid.voxel_sizes[axis])
        told = self.inputs.thickness
        self._results["thickness"] = min(told, spacing) if isdefined(told) else spacing
        keep = [slice(None)] * 3
        keep[axis] = slice(None, None, 2)
        affine = image.affine.copy()
        affine[:3, axis] *= 2
        path = Path(runtime.cwd) / "kept.nii"
        nb.save(nb.Nifti1Image(data[tuple(keep)], affine), path)
        self._results["out_file"] = str(path)
        return runtime


class _CompareLeftOutInputSpec(_BrainInputSpec):
    kept = File(exists=True, mandatory=True, desc="scan without every second slice")
    enhanced = File(exists=True, mandatory=True, desc="what the expert made of it")


class CompareLeftOut(SimpleInterface):
    """Hold slices that were left out against what was restored without them."""

    input_spec = _CompareLeftOutInputSpec
    output_spec = _JSONOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        from remix_bids.qc import left_out

        native, acquisition = load_acquisition(self.inputs)
        found = left_out.compare(
            native,
            load(self.inputs.kept),
            load(self.inputs.enhanced),
            load(self.inputs.coverage) > 0,
            load_brain(self.inputs),
            acquisition,
        )
        path = Path(runtime.cwd) / "left_out.json"
        self._results["out_file"] = write_json(path, found)
        return runtime


class _CollectQCInputSpec(BaseInterfaceInputSpec):
    source = traits.Str(mandatory=True, desc="name of the scan")
    sidecar = File(exists=True, mandatory=True)
    consistency = File(exists=True, mandatory=True)
    quality = File(exists=True, mandatory=True)
    left_out = File(exists=True)


class CollectQC(SimpleInterface):
    """All figures of one scan in one flat JSON object, which the group level reads."""

    input_spec = _CollectQCInputSpec
    output_spec = _JSONOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        given = self.inputs
        sidecar = json.loads(Path(given.sidecar).read_text())
        content: dict[str, Any] = {
            "bids_name": given.source,
            "expert": sidecar["Expert"],
            "voxel_size": " x ".join(f"{side:.3g}" for side in sidecar["VoxelSize"]),
            "effective_voxel_volume": sidecar["EffectiveVoxelVolume"],
            "registration_score": sidecar["RegistrationScore"],
            "brain_coverage": 100 * sidecar["BrainCoverage"],
            "affine_determinant": sidecar["AffineDeterminant"],
            "warnings": len(sidecar["Warnings"]),
        }
        for path in (given.quality, given.consistency, given.left_out):
            if isdefined(path):
                content |= json.loads(Path(path).read_text())
        rounded = {k: _figure(v) if isinstance(v, float) else v for k, v in content.items()}
        self._results["out_file"] = write_json(Path(runtime.cwd) / "qc.json", rounded)
        return runtime


def _figure(value: float) -> float | None:
    """Five digits; None for what could not be measured, since JSON knows no NaN."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


class _CheckHeaderInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True)
    remarks = traits.List(traits.Str, desc="what our own check has found")


class _CheckHeaderOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="HTML fragment")


class CheckHeader(SimpleInterface):
    """What our own check and niworkflows' ValidateImage say about the input's header."""

    input_spec = _CheckHeaderInputSpec
    output_spec = _CheckHeaderOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        from html import escape

        from nibabel.spatialimages import HeaderDataError
        from niworkflows.interfaces.header import ValidateImage

        folder = Path(runtime.cwd)
        try:
            result = ValidateImage(in_file=self.inputs.in_file).run(cwd=str(folder))
        except (ValueError, np.linalg.LinAlgError, HeaderDataError) as error:
            # Of numbers that nobody needs, such as an unused qform: no reason to fail a scan.
            found = (
                f"<p>niworkflows' ValidateImage cannot read the header: {escape(str(error))}</p>"
            )
        else:
            found = Path(result.outputs.out_report).read_text().strip()
            copy = Path(result.outputs.out_file)
            if copy.parent == folder:  # a repaired copy; the sform of the original is what we use
                copy.unlink()
        remarks = self.inputs.remarks if isdefined(self.inputs.remarks) else []
        lines = "".join(f"<li>{escape(text)}</li>" for text in remarks)
        if found:  # it speaks of what it did to its own copy
            about = "What niworkflows' ValidateImage would change (its copy is not used)"
            found = f"<details><summary>{about}</summary>{found}</details>"
        parts = [f'<ul class="warnings">{lines}</ul>' if lines else "", found]
        text = "\n".join(part for part in parts if part)
        path = folder / "header.html"
        path.write_text(text or '<p class="fine">Nothing to remark.</p>')
        self._results["out_file"] = str(path)
        return runtime
