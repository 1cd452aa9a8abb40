"""Affine registration with ANTs as a Nipype interface."""

from __future__ import annotations

import json
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


class _AffineRegistrationInputSpec(BaseInterfaceInputSpec):
    moving_image = File(exists=True, mandatory=True, desc="T1w image on its native grid")
    fixed_image = File(exists=True, mandatory=True, desc="template")
    fixed_image_mask = File(exists=True, desc="the template's brain")
    template_skull_stripped = traits.Bool(False, usedefault=True)
    skull_stripped = traits.Bool(desc="what is known about the image; absent: both are tried")
    random_seed = traits.Int(0, usedefault=True)
    sloppy = traits.Bool(False, usedefault=True)
    num_threads = traits.Int(1, usedefault=True, nohash=True, desc="processes side by side")


class _AffineRegistrationOutputSpec(TraitedSpec):
    forward_transform = File(exists=True, desc="ITK affine that resamples moving on fixed")
    inverse_transform = File(exists=True, desc="ITK affine that resamples fixed on moving")
    report = File(exists=True, desc="all starts, JSON")
    score = traits.Float()
    plausible = traits.Bool()
    skull_stripped = traits.Bool()
    determinant = traits.Float(desc="native volume per template volume")
    warnings = traits.List(Str)


class AffineRegistration(SimpleInterface):
    """Register one T1w image to a template (see `remix_bids.registration.affine`)."""

    input_spec = _AffineRegistrationInputSpec
    output_spec = _AffineRegistrationOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        from remix_bids.registration.affine import Templates, register_affine
        from remix_bids.registration.itk import write_itk_affine

        given, folder = self.inputs, Path(runtime.cwd)
        mask = given.fixed_image_mask
        result = register_affine(
            Path(given.moving_image),
            Templates(
                t1w=Path(given.fixed_image),
                brain_mask=Path(mask) if isdefined(mask) else None,
                skull_stripped=given.template_skull_stripped,
            ),
            skull_stripped=given.skull_stripped if isdefined(given.skull_stripped) else None,
            n_procs=given.num_threads,
            random_seed=given.random_seed,
            sloppy=given.sloppy,
            work_dir=folder,
        )
        write_itk_affine(folder / "forward.txt", result.matrix)
        write_itk_affine(folder / "inverse.txt", np.linalg.inv(result.matrix))
        (folder / "report.json").write_text(json.dumps(result.to_dict(), indent=2))
        self._results.update(
            forward_transform=str(folder / "forward.txt"),
            inverse_transform=str(folder / "inverse.txt"),
            report=str(folder / "report.json"),
            score=float(result.score),
            plausible=bool(result.plausible),
            skull_stripped=bool(result.skull_stripped),
            determinant=float(result.determinant),
            warnings=list(result.warnings),
        )
        return runtime
