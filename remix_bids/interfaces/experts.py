"""Selecting an expert and running it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    Str,
    TraitedSpec,
    traits,
)

from remix_bids.experts.registry import NO_EXPERT
from remix_bids.interfaces.qc import load

if TYPE_CHECKING:  # torch is imported by workers only
    from remix_bids.experts.registry import ExpertRecord
    from remix_bids.experts.unet import ResidualUNet


class _SelectExpertInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="image on its native grid")
    experts_table = File(exists=True, mandatory=True, desc="experts.toml")
    expert = Str("auto", usedefault=True, desc="auto, 1 to 7, or general")
    gate = traits.Enum("effective", "paper", usedefault=True)
    least_steps = traits.Int(0, usedefault=True, desc="of consistency, whatever the expert's own")


class _SelectExpertOutputSpec(TraitedSpec):
    expert = Str(desc="1 to 7, general, or none where there is nothing to gain")
    expert_file = File(exists=True)
    expert_sha256 = Str()
    consistency_steps = traits.Int(desc="that follow the network")
    voxel_size = traits.List(traits.Float, desc="mm")
    voxel_volume = traits.Float(desc="mm3")
    effective_voxel_volume = traits.Float(desc="mm3")
    warnings = traits.List(Str)


class SelectExpert(SimpleInterface):
    """Let the gate choose the expert for one image."""

    input_spec = _SelectExpertInputSpec
    output_spec = _SelectExpertOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        import nibabel as nb

        from remix_bids.experts.registry import (
            FINE_ENOUGH,
            VOLUME_LIMIT,
            effective_voxel_volume,
            is_fine_enough,
            load_registry,
            voxel_volume,
        )

        affine = nb.load(self.inputs.in_file).affine
        sides = [float(s) for s in np.sqrt((affine[:3, :3] ** 2).sum(axis=0))]
        plain, effective = voxel_volume(sides), effective_voxel_volume(sides)
        self._results.update(
            voxel_size=sides,
            voxel_volume=plain,
            effective_voxel_volume=effective,
            consistency_steps=0,
            warnings=[],
        )
        warnings = self._results["warnings"]
        asked = self.inputs.expert
        if asked == "auto" and is_fine_enough(sides):
            self._results["expert"] = NO_EXPERT
            warnings.append(
                f"Expert: all voxel sides are at most {FINE_ENOUGH} mm, so nothing is to be gained "
                "at 1 mm; the output is a resampled copy."
            )
            return runtime
        registry = load_registry(Path(self.inputs.experts_table).parent)
        volume = plain if self.inputs.gate == "paper" else effective
        record = registry.select(volume) if asked == "auto" else registry[asked]
        if effective > VOLUME_LIMIT:
            warnings.append(
                f"Expert: the effective voxel volume of {effective:g} mm3 is above "
                f"{VOLUME_LIMIT} mm3: at the edge of what experts were trained for, or beyond."
            )
        counted = [max(side, 1.0) for side in sides]
        anisotropy = max(counted) / min(counted)
        low, high = record.anisotropy
        if not low - 0.01 <= anisotropy <= high + 0.01:
            warnings.append(
                f"Expert: the voxels' anisotropy of {anisotropy:.1f} is outside the {low:.1f} to "
                f"{high:.1f} that expert {record.name} was trained for."
            )
        self._results.update(
            expert=record.name,
            expert_file=str(record.check()),
            expert_sha256=record.sha256,
            consistency_steps=max(record.consistency_steps, self.inputs.least_steps),
        )
        return runtime


class _EnhanceInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="image on the working grid, interpolated")
    estimate = File(exists=True, mandatory=True, desc="the same less the blur of its slices")
    rest = File(exists=True, mandatory=True, desc="what it leaves unexplained of the scan")
    coverage = File(exists=True, mandatory=True)
    native = File(exists=True, mandatory=True, desc="the scan, for its grid and its noise")
    transform = File(exists=True, mandatory=True, desc="ITK affine, template to native points")
    expert = Str(mandatory=True)
    expert_sha256 = Str(desc="of the weights: other weights are another computation")
    # The path of the weights may differ between machines, the hash says what they are.
    expert_file = File(exists=True, nohash=True)
    device = Str("cpu", usedefault=True, nohash=True)
    use_gpu = traits.Bool(False, usedefault=True, nohash=True, desc="for the scheduler")


class _EnhanceOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="super-resolved image, float32, scanner's intensities")
    device = Str(desc="where these voxels were made")
    intensity_scaling = Str()


class Enhance(SimpleInterface):
    """Run one expert on an image on the working grid."""

    input_spec = _EnhanceInputSpec
    output_spec = _EnhanceOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        import nibabel as nb

        from remix_bids.interfaces.resample import save_on_working_grid

        scaling = "none: the output is a resampled copy"
        device = "cpu"
        if self.inputs.expert == NO_EXPERT:
            high = np.asanyarray(nb.load(self.inputs.in_file).dataobj, dtype=np.float32)
        else:
            import torch

            from remix_bids.experts.inference import enhance
            from remix_bids.experts.registry import load_registry
            from remix_bids.registration.itk import read_itk_affine
            from remix_bids.simulation.acquisition import sampling
            from remix_bids.simulation.estimate import Estimate
            from remix_bids.simulation.noise import scan_noise
            from remix_bids.spatial import WORKING_GRID, Grid, index_map

            # Convolutions round otherwise with another number of threads; scans run side by side.
            torch.set_num_threads(1)
            device = self.inputs.device
            record = load_registry(Path(self.inputs.expert_file).parent)[self.inputs.expert]
            scan = nb.load(self.inputs.native)
            source = Grid(scan.shape[:3], scan.affine)
            native = np.asanyarray(scan.dataobj, dtype=np.float32).reshape(source.shape)
            mapping = index_map(WORKING_GRID, source, read_itk_affine(self.inputs.transform))
            low = Estimate(
                torch.from_numpy(load(self.inputs.estimate)),
                torch.from_numpy(load(self.inputs.coverage) > 0),
                sampling(mapping, source),
                torch.from_numpy(load(self.inputs.rest)),
                scan_noise(native, source),
            )
            high = enhance(low, record, device=device, network=_loaded_expert(record))
            scaling = (
                "99.5th percentile of the foreground inside the field of view to 1 for the "
                "network, undone afterwards"
            )
        path = Path(runtime.cwd) / "enhanced.nii.gz"
        save_on_working_grid(np.asarray(high, dtype=np.float32), path)
        self._results["out_file"] = str(path)
        self._results["device"] = device_name(device)
        self._results["intensity_scaling"] = scaling
        return runtime


@lru_cache(maxsize=8)
def _loaded_expert(record: ExpertRecord) -> ResidualUNet:
    """An expert, kept by the worker process for the next image."""
    from remix_bids.experts.inference import load_expert

    return load_expert(record)


def device_name(device: str) -> str:
    """'cpu', or a graphics card with its model."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"
