"""What is evaluated: persons x classes x geometries x noise levels, all drawn from the protocol."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remix_bids.experts.registry import effective_voxel_volume
from remix_bids.simulation.acquisition import (
    CLASS_RANGES,
    Acquisition,
    draw_shape,
    load_bank,
    place,
)
from remix_bids.training.dataset import Person


@dataclass(frozen=True)
class Case:
    """One person seen through one acquisition."""

    person: Person
    klass: int
    kind: str
    seed: tuple[int, ...]
    noise: float
    first: bool = True  # of this person's geometries in the class: the one that is segmented

    def acquisition(self) -> Acquisition:
        """A held-out geometry on the person; its own scale and shear."""
        rng = np.random.default_rng(self.seed)
        bank = [g for g in load_bank() if g.held_out]
        low, high = CLASS_RANGES[self.klass]
        if self.kind == "real":
            own = [g for g in bank if low <= effective_voxel_volume(g.grid.voxel_sizes) < high]
            if own:
                return place(own[rng.integers(len(own))], self.person.world, rng)
        tilt = re.fullmatch(r"oblique(\d+)", self.kind)
        plane = [g for g in bank if g.plane == self.kind] or bank
        return place(
            plane[rng.integers(len(plane))],
            self.person.world,
            rng,
            shape=draw_shape(rng, self.klass),
            obliquity=float(tilt[1]) if tilt else None,
        )


def cases(
    persons: Sequence[Person], protocol: dict, classes: Sequence[int], noise: Sequence[float]
) -> list[Case]:
    """The cases of a protocol; the order of kinds turns with person and class."""
    kinds = protocol["kinds"]
    return [
        Case(person, k, kinds[(i + k + j) % len(kinds)], (protocol["seed"], i, k, j), sigma, j == 0)
        for k in classes
        for i, person in enumerate(persons)
        for j in range(protocol["geometries_per_person"])
        for sigma in noise
    ]
