"""From the scanner's grid to the working grid."""

from __future__ import annotations

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

COVERED_ENOUGH = 0.95  # of the brain


class _ToWorkingGridInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="image on its native grid")
    transform = File(exists=True, mandatory=True, desc="ITK affine, template to native points")
    template = File(exists=True, mandatory=True, desc="template T1w")
    template_mask = File(exists=True, desc="its brain; absent: where the template is not zero")
    slice_thickness = traits.Float(desc="mm; absent: the spacing of the slices")


class _ToWorkingGridOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="image on the working grid, interpolated (cubic B-spline)")
    estimate = File(exists=True, desc="the same less the blur of its slices, for the network")
    rest = File(exists=True, desc="what the estimate leaves unexplained of the scan")
    coverage = File(exists=True, desc="1 where the scanner has measured")
    brain_coverage = traits.Float(desc="part of the template's brain that was measured")
    slice_width = traits.Float(desc="FWHM of the slices' profile, mm, where it can be measured")
    warnings = traits.List(Str)


class ToWorkingGrid(SimpleInterface):
    """Bring an image to the grid that the experts work on."""

    input_spec = _ToWorkingGridInputSpec
    output_spec = _ToWorkingGridOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        import nibabel as nb
        import torch

        from remix_bids import spatial
        from remix_bids.registration.itk import read_itk_affine
        from remix_bids.simulation.acquisition import from_header
        from remix_bids.simulation.degrade import restore_grid
        from remix_bids.simulation.estimate import linear_estimate
        from remix_bids.simulation.slices import measure_slices, weighed, width_of_slices

        torch.set_num_threads(1)  # the voxels must not depend on the number of processors
        image = nb.load(self.inputs.in_file)
        data = np.asanyarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3])
        native = torch.from_numpy(data.copy())
        thickness = self.inputs.slice_thickness
        told = from_header(
            spatial.Grid(data.shape, image.affine),
            read_itk_affine(self.inputs.transform),
            thickness if isdefined(thickness) else None,
        )
        measured = measure_slices(data, told)
        acquisition = weighed(measured, told)
        interpolated = restore_grid(native, acquisition.grid, acquisition.world)
        estimate = linear_estimate(native, acquisition)

        inside = interpolated.covered.numpy()
        folder = Path(runtime.cwd)
        outputs: dict[str, np.ndarray] = {
            "out_file": interpolated.image.numpy(),
            "estimate": estimate.image.numpy(),
            "rest": estimate.rest.numpy(),
            "coverage": inside.astype(np.uint8),
        }
        for name, values in outputs.items():
            path = folder / f"{name}.nii"
            save_on_working_grid(values, path)
            self._results[name] = str(path)
        mask_file = self.inputs.template_mask
        brain = brain_on_working_grid(
            Path(self.inputs.template), Path(mask_file) if isdefined(mask_file) else None
        )
        part = float(inside[brain].mean()) if brain.any() else 0.0
        self._results["brain_coverage"] = part
        if measured is not None:
            self._results["slice_width"] = width_of_slices(acquisition)
        self._results["warnings"] = []
        if part < COVERED_ENOUGH:
            self._results["warnings"] = [
                f"Coverage: the field of view holds {100 * part:.1f} % of the brain; "
                "the output is 0 where nothing was measured."
            ]
        return runtime


def save_on_working_grid(values: np.ndarray, path: Path) -> None:
    """Write a (181, 217, 181) array as NIfTI with the header of the working grid (MNI, mm)."""
    import nibabel as nb

    from remix_bids.spatial import WORKING_GRID

    image = nb.Nifti1Image(values, WORKING_GRID.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(WORKING_GRID.affine, code="mni")
    image.set_qform(WORKING_GRID.affine, code="mni")
    nb.save(image, path)


def on_working_grid(path: Path, order: int = 1) -> np.ndarray:
    """A template's volume on the working grid, float32 (nearest neighbour or linear)."""
    import nibabel as nb
    from nibabel.processing import resample_from_to

    from remix_bids.spatial import WORKING_GRID

    image = nb.load(path)
    same = image.shape == WORKING_GRID.shape and np.allclose(image.affine, WORKING_GRID.affine)
    if not same:
        data = np.asanyarray(image.dataobj, dtype=np.float32)
        image = resample_from_to(
            nb.Nifti1Image(data, image.affine),
            (WORKING_GRID.shape, WORKING_GRID.affine),
            order=order,
        )
    return np.asanyarray(image.dataobj, dtype=np.float32)


def brain_on_working_grid(template: Path, mask: Path | None) -> np.ndarray:
    """The template's brain, bool: its mask, or where a template without skull is not zero."""
    if mask is not None:
        return on_working_grid(mask, order=0) > 0.5
    return on_working_grid(template) > 0
