"""The two heavy steps, with the time that they took among their outputs."""

from __future__ import annotations

import time
from typing import Any

from nipype.interfaces.base import traits

from remix_bids.interfaces.ants import AffineRegistration, _AffineRegistrationOutputSpec
from remix_bids.interfaces.experts import Enhance, _EnhanceOutputSpec


class _Timed:
    """Measures ``_run_interface``; the figure stays with the result when it is taken again."""

    def _run_interface(self, runtime: Any) -> Any:
        start = time.monotonic()
        runtime = super()._run_interface(runtime)  # type: ignore[misc]
        self._results["seconds"] = time.monotonic() - start  # type: ignore[attr-defined]
        return runtime


class _TimedRegistrationOutputSpec(_AffineRegistrationOutputSpec):
    seconds = traits.Float(desc="wall clock")


class TimedRegistration(_Timed, AffineRegistration):
    """`AffineRegistration` that says how long it took."""

    output_spec = _TimedRegistrationOutputSpec


class _TimedEnhanceOutputSpec(_EnhanceOutputSpec):
    seconds = traits.Float(desc="wall clock")


class TimedEnhance(_Timed, Enhance):
    """`Enhance` that says how long it took."""

    output_spec = _TimedEnhanceOutputSpec
