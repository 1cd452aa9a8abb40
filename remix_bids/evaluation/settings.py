"""What an evaluation is asked for: which methods, which experts, measured how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from remix_bids.experts.registry import GENERAL, load_registry
from remix_bids.registration.affine import Templates

CUBIC, ESTIMATE = "cubic", "estimate"
BACK_PROJECTION, EXPERT = "back-projection", "expert"
SHIPS = "expert + steps"
"""What the app would write: the network that the gate chooses and the steps of consistency that
its table gives it (``consistency_steps`` in ``experts.toml``), the less of them the noisier the
scan; where the gate chooses no expert, cubic interpolation."""
BLIND = "back-projection, as told"
"""Told what the app knows of a scan, not its true slice profile. Measured if it is asked for."""
BACK_PROJECTIONS = (BACK_PROJECTION, BLIND)
ATROPOS = "atropos"
"""The segmenter that comes with ANTs; any other is a command."""
_DICE_REVISION = 2
"""Raised by hand when code changes what Dice says, and nothing else of a row."""
NETWORKS = (GENERAL, EXPERT, SHIPS)
METHODS = ("linear", CUBIC, ESTIMATE, BACK_PROJECTION, *NETWORKS)
ALL_METHODS = (*METHODS, BLIND)


@dataclass(frozen=True)
class Settings:
    """How cases are run.

    Attributes
    ----------
    protocol : dict
    brain : Path, optional
        ``strip_mask.npy``: where the brain of a head lies on the working grid.
    experts_dir : Path, optional
        The shipped experts by default.
    tune : bool
        Every iterate of back-projection instead of all methods.
    commands : mapping of str to str
        Other programs by name; see `remix_bids.evaluation.external`.
    segmenter : str, optional
        'atropos', or a command; absent: no Dice.
    labels : Path, optional
        BIDS derivatives with manual tissue classes.
    templates : Templates, optional
        Register every acquired image to these, as the app does; the true affine by default.
    methods : sequence of str
        Of `ALL_METHODS`, those that are measured. Rows of all but `NETWORKS` do not depend on
        experts.
    """

    protocol: dict
    brain: Path | None = None
    experts_dir: Path | None = None
    tune: bool = False
    commands: Mapping[str, str] = field(default_factory=dict)
    segmenter: str | None = None
    labels: Path | None = None
    templates: Templates | None = None
    methods: Sequence[str] = METHODS

    @property
    def segmenter_name(self) -> str:
        """As it stands in the rows: a command by its digest, for it may hold folders' names."""
        if self.segmenter is None:
            return ""
        digest = hashlib.sha256(self.segmenter.encode()).hexdigest()[:8]
        name = ATROPOS if self.segmenter == ATROPOS else f"command {digest}"
        return f"{name}, revision {_DICE_REVISION}"

    def manual_labels(self, person: str) -> Path | None:
        """Where a person's manual tissue classes lie."""
        if self.labels is None:
            return None
        name = f"sub-{person}"
        return self.labels / name / "anat" / f"{name}_desc-tissues_dseg.nii.gz"

    def labels_digest(self, person: str) -> str:
        """Of a person's manual tissue classes, as it stands in the rows; '' without labels."""
        file = self.manual_labels(person)
        return "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:8]

    @cached_property
    def affine(self) -> str:
        """Which affine is used, as it stands in the rows; templates by their digest."""
        if self.templates is None:
            return "true"
        files = [self.templates.t1w, self.templates.brain_mask]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file is not None))
        return f"registered {digest.hexdigest()[:8]}"

    def setup(self, method: str, klass: str) -> str:
        """What decides a method's rows of a class, as first digits of a sha256.

        One of the protocol and, where there is more to tell, a dot and one of it: the network that
        is run and its steps, the iterations of back-projection, another program's command. So
        rows of an expert outlive the others, and rows without networks all of them.
        """
        own = self._own(method, klass)
        return ".".join([self._rules, *([_digest(own)] if own else [])])

    def _own(self, method: str, klass: str) -> list[Any]:
        """What decides a method's rows, but for the protocol that all have in common."""
        iterations = self.protocol["back_projection"]
        if self.tune:
            return [iterations]
        if method in NETWORKS:
            return [*self._networks[GENERAL if method == GENERAL else klass]]
        if method in BACK_PROJECTIONS:
            return [iterations[noise][int(klass) - 1] for noise in ("clean", "noisy")]
        return [self.commands[method]] if method in self.commands else []

    @cached_property
    def _networks(self) -> dict[str, tuple[str, int]]:
        """Weights and steps by name."""
        experts = load_registry(self.experts_dir)
        return {e.name: (e.sha256, e.consistency_steps) for e in experts}

    @cached_property
    def _rules(self) -> str:
        """Of the protocol, without what chooses cases and what only one method follows."""
        left_out = {"geometries_per_person", "noise", "segmented", "back_projection"}
        return _digest({k: v for k, v in self.protocol.items() if k not in left_out})


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
