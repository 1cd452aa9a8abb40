"""Checking what comes in, describing and writing what goes out."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from itertools import product
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

from remix_bids.errors import InputImageError
from remix_bids.experts.registry import NO_EXPERT

SMALLEST_SIDE, LARGEST_SIDE = 0.2, 15.0  # mm, of a voxel
SMALLEST_EXTENT, LARGEST_EXTENT = 40.0, 600.0  # mm, of the field of view
FEWEST_SLICES = 5
MOST_NEGATIVE = 0.01  # of the voxels: splines overshoot below 0 here and there


def check_t1w(path: Path) -> list[str]:
    """Check that one image can be worked on; return what should be known about it.

    Raises
    ------
    InputImageError
        One sentence: what is wrong, and what to do where that is known.
    """
    import nibabel as nb

    if not path.exists():
        hint = "; it is a broken link (datalad get?)" if path.is_symlink() else ""
        raise InputImageError(f"{path} does not exist{hint}.")
    try:
        image = nb.load(path)
        dtype, shape = image.get_data_dtype(), tuple(image.shape)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise InputImageError(f"{path} cannot be read as an image: {error}") from error
    if dtype.fields is not None or np.issubdtype(dtype, np.complexfloating):
        raise InputImageError(f"{path} holds {dtype} voxels (colour or complex), no grey values.")
    if len(shape) < 3 or int(np.prod(shape[3:])) != 1:
        raise InputImageError(
            f"{path} is not one 3D volume, its shape is {shape}; choose or average one volume."
        )
    shape = shape[:3]
    affine = np.asarray(image.affine, dtype=float)
    sides = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    volume = abs(np.linalg.det(affine[:3, :3]))
    if not np.isfinite(affine).all() or not volume > 1e-3 * np.prod(sides):
        raise InputImageError(
            f"{path} has a voxel-to-world affine that cannot be inverted; repair its header."
        )
    extents = sides * shape
    if sides.min() < SMALLEST_SIDE or sides.max() > LARGEST_SIDE:
        raise InputImageError(
            f"{path} has voxels of {_mm(sides)} mm, which no T1w scan has; check its header."
        )
    if extents.max() > LARGEST_EXTENT:
        raise InputImageError(
            f"{path} has a field of view of {_mm(extents)} mm, which no scan of a head has; check "
            "its header."
        )
    if min(shape) < FEWEST_SLICES or extents.min() < SMALLEST_EXTENT:
        raise InputImageError(
            f"{path} has {shape[0]} x {shape[1]} x {shape[2]} voxels and a field of view of "
            f"{_mm(extents)} mm: too small to hold a brain."
        )
    try:
        data = np.asanyarray(image.dataobj, dtype=np.float32)
    except Exception as error:  # a truncated file shows only now
        raise InputImageError(f"{path} cannot be read to its end: {error}") from error
    bad = int(np.count_nonzero(~np.isfinite(data)))
    if bad:
        raise InputImageError(
            f"{path} has {bad} voxels that are no finite number; replace them, with 0 for example."
        )
    if data.min() == data.max():
        raise InputImageError(f"{path} is empty: all voxels hold {data.flat[0]:g}.")
    remarks = _header_remarks(image, affine, sides)
    negative = np.count_nonzero(data < 0) / data.size
    if negative > MOST_NEGATIVE:
        remarks.append(
            f"Intensities: {negative:.0%} of the voxels are negative; the experts have learned "
            "from magnitudes, so use the scan as it was acquired."
        )
    return remarks


def _header_remarks(image: Any, affine: np.ndarray, sides: np.ndarray) -> list[str]:
    remarks = []
    header = image.header
    if hasattr(header, "get_qform"):
        sform, sform_code = header.get_sform(coded=True)
        try:
            qform, qform_code = header.get_qform(coded=True)
            if qform is not None and not np.isfinite(qform).all():
                raise ValueError
        except (ValueError, np.linalg.LinAlgError):
            qform, qform_code = None, 0
            if sform_code:
                remarks.append("Header: the qform is invalid; the sform was used.")
        if not sform_code and not qform_code:
            remarks.append(
                "Header: no orientation is stated (qform and sform codes are 0); "
                "left and right cannot be known."
            )
        elif sform_code and qform_code and _apart(sform, qform, image.shape[:3]) > 1.0:
            remark = "Header: qform and sform disagree; the sform was used."
            if sform_code != 1:  # ITK takes it for the scanner's code only
                remark += (
                    " ANTs and ITK-SNAP use the qform of such a file: make them equal before the "
                    "transforms are applied there."
                )
            remarks.append(remark)
        pixdim = np.asarray(header.get_zooms()[:3], dtype=float)
        if not np.allclose(pixdim, sides, rtol=0.02):
            remarks.append(
                f"Header: pixdim says voxels of {_mm(pixdim)} mm, the affine {_mm(sides)} mm; "
                "the affine was used."
            )
    axes = affine[:3, :3] / sides
    shear = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if shear > 0.02:
        remarks.append("Header: the voxel axes are not at right angles (shear).")
    return remarks


def _apart(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance (mm) between the places that two affines give a corner of an image."""
    corners = np.array([*product(*((0, n - 1) for n in shape))])
    moved = corners @ (first - second)[:3, :3].T + (first - second)[:3, 3]
    return float(np.linalg.norm(moved, axis=1).max())


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


class _ValidateT1wInputSpec(BaseInterfaceInputSpec):
    # Not exists=True: a missing file must fail its own scan, not the building of the graph.
    in_file = File(mandatory=True, desc="T1w image")


class _ValidateT1wOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="the same image, found usable")
    warnings = traits.List(Str, desc="remarks about its header")


class ValidateT1w(SimpleInterface):
    """Check that an image can be worked on."""

    input_spec = _ValidateT1wInputSpec
    output_spec = _ValidateT1wOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        path = Path(self.inputs.in_file)
        self._results["warnings"] = check_t1w(path)
        self._results["out_file"] = str(path)
        return runtime


CUBIC = "cubic B-spline, once, from the native grid"
ESTIMATE = (
    "a linear estimate from the native grid, given the width of its slices; the network adds to it"
)


class _DescribeInputSpec(BaseInterfaceInputSpec):
    static = traits.Dict(Str, traits.Any, mandatory=True, desc="known before the run")
    skull_stripped = traits.Bool(mandatory=True)
    registration_score = traits.Float(mandatory=True)
    affine_determinant = traits.Float(mandatory=True, desc="native volume per template volume")
    brain_coverage = traits.Float(mandatory=True)
    slice_width = traits.Float(desc="FWHM of the slices' profile, mm, where measured")
    voxel_size = traits.List(traits.Float, mandatory=True)
    voxel_volume = traits.Float(mandatory=True)
    effective_voxel_volume = traits.Float(mandatory=True)
    expert = Str(mandatory=True)
    expert_sha256 = Str()
    device = Str(mandatory=True)
    intensity_scaling = Str(mandatory=True)
    registration_seconds = traits.Float()
    enhancement_seconds = traits.Float()
    consistency_steps = traits.Int(0, usedefault=True, desc="that follow the network")
    consistency_share = traits.Float(
        0.0, usedefault=True, desc="of what it left of the scan that they gave back"
    )
    validation_warnings = traits.List(Str)
    registration_warnings = traits.List(Str)
    coverage_warnings = traits.List(Str)
    expert_warnings = traits.List(Str)


class _DescribeOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="JSON sidecar")


class Describe(SimpleInterface):
    """Write the sidecar of a super-resolved image."""

    input_spec = _DescribeInputSpec
    output_spec = _DescribeOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        given = self.inputs
        warnings: list[str] = []
        for name in ("validation", "registration", "coverage", "expert"):
            found = getattr(given, f"{name}_warnings")
            warnings += list(found) if isdefined(found) else []
        timings = {
            name.capitalize(): round(getattr(given, f"{name}_seconds"), 1)
            for name in ("registration", "enhancement")
            if isdefined(getattr(given, f"{name}_seconds"))
        }
        step = None
        if given.consistency_steps and given.consistency_share > 0:
            step = f"{given.consistency_steps} step(s) of consistency after the network"
            if given.consistency_share < 1:
                share = f"{given.consistency_share:.0%} of what it left of the scan"
                step += f", for {share}: the rest may be noise"
        content = {
            **given.static,
            "SkullStripped": given.skull_stripped,
            "RegistrationScore": round(given.registration_score, 4),
            "AffineDeterminant": round(given.affine_determinant, 6),
            "BrainCoverage": round(given.brain_coverage, 4),
            "VoxelSize": [round(side, 4) for side in given.voxel_size],
            "SliceProfileWidth": (
                round(given.slice_width, 2) if isdefined(given.slice_width) else None
            ),
            "VoxelVolume": given.voxel_volume,
            "EffectiveVoxelVolume": given.effective_voxel_volume,
            "Expert": given.expert,
            "ExpertSHA256": given.expert_sha256 if isdefined(given.expert_sha256) else None,
            "Device": given.device,
            "Interpolation": CUBIC if given.expert == NO_EXPERT else ESTIMATE,
            "IntensityScaling": given.intensity_scaling,
            "ConsistencyStep": step,
            "Timings": timings or None,
            "Warnings": warnings,
        }
        path = Path(runtime.cwd) / "sidecar.json"
        kept = {key: value for key, value in content.items() if value is not None}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
        self._results["out_file"] = str(path)
        return runtime


def write_atomically(source: Path, target: Path) -> None:
    """Copy a file so that ``target`` appears whole or not at all, also beside other jobs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


class _SinkInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True)
    # Nipype would hash the file that stands there.
    out_path = Str(mandatory=True, hash_files=False, desc="where it goes, absolute")


class _SinkOutputSpec(TraitedSpec):
    out_file = File(exists=True)


class DerivativesSink(SimpleInterface):
    """Put one file where the run has decided beforehand that it goes.

    niworkflows' sink works names out from the file while the graph runs; it drops some entities,
    misplaces others, and importing it writes into TemplateFlow's folder.
    """

    input_spec = _SinkInputSpec
    output_spec = _SinkOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        target = Path(self.inputs.out_path)
        write_atomically(Path(self.inputs.in_file), target)
        (Path(runtime.cwd) / STAMP).write_text(json.dumps(_stamp(target)))
        self._results["out_file"] = str(target)
        return runtime


STAMP = "written.json"


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def is_as_written(node_dir: Path, target: Path) -> bool:
    """Whether ``target`` is still the file that the sink of this working folder put there.

    A sink that is up to date for Nipype must write again when somebody has removed or replaced
    its file.
    """
    try:
        return json.loads((node_dir / STAMP).read_text()) == _stamp(target)
    except (OSError, ValueError):
        return False
