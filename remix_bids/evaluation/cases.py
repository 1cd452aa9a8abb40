"""What is evaluated: persons x classes x geometries x noise levels, all drawn from the protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from remix_bids.experts.registry import effective_voxel_volume
from remix_bids.simulation.acquisition import (
    CLASS_RANGES,
    Acquisition,
    Geometry,
    draw_shape,
    geometries,
    place,
)
from remix_bids.training.dataset import Person


@dataclass(frozen=True)
class Case:
    """One person seen through one acquisition.

    Attributes
    ----------
    person : Person
    drawn : int
        Class from whose range of voxel volumes the geometry is drawn. Ranges overlap: which expert
        it goes to is for the gate to say.
    kind : str
        Of geometry, as the protocol names it.
    number : int
        Of this person's geometries in the class.
    seed : tuple of int
    noise : float
    bank : Path, optional
        Where geometries come from; the shipped bank by default.
    segmented : bool
        Whether Dice is found if it is asked for; see `segmented_first`.
    """

    person: Person
    drawn: int
    kind: str
    number: int
    seed: tuple[int, ...]
    noise: float
    bank: Path | None = None
    segmented: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """What tells this case from others, as it stands in a table."""
        return self.person.name, str(self.drawn), str(self.number), str(self.noise)

    @property
    def held_out(self) -> bool:
        """Whether its geometry is: choices are made on others than those that are reported."""
        return self.person.split == "held_out"

    @property
    def source(self) -> str:
        """Where the geometry comes from: ``kind``, unless no real one has such a volume."""
        real = self.kind != "real" or self._real()
        return self.kind if real else "any plane"

    def acquisition(self) -> Acquisition:
        """A geometry on the person; its own scale and shear."""
        rng = np.random.default_rng(self.seed)
        if self.source == "real":
            own = self._real()
            return place(own[rng.integers(len(own))], self.person.world, rng)
        tilt = re.fullmatch(r"oblique(\d+)", self.kind)
        bank = geometries(self.bank, held_out=self.held_out)
        plane = [g for g in bank if g.plane == self.kind] or bank
        return place(
            plane[rng.integers(len(plane))],
            self.person.world,
            rng,
            shape=draw_shape(rng, self.drawn),
            obliquity=float(tilt[1]) if tilt else None,
        )

    def _real(self) -> list[Geometry]:
        """The real geometries of the class."""
        low, high = CLASS_RANGES[self.drawn]
        bank = geometries(self.bank, held_out=self.held_out)
        return [g for g in bank if low <= effective_voxel_volume(g.grid.voxel_sizes) < high]


def told_sizes(acquisition: Acquisition) -> str:
    """Voxel sizes, as they stand in a table."""
    return " x ".join(f"{side:.2f}" for side in acquisition.grid.voxel_sizes)


def cases(
    persons: Sequence[Person],
    protocol: dict,
    classes: Sequence[int],
    noise: Sequence[float],
    bank: Path | None = None,
) -> list[Case]:
    """The cases of a protocol; the order of kinds turns with person and class.

    A person whose image is coarser than 1 mm is no truth for thin slices.
    """
    kinds = protocol["kinds"]

    def case(person: Person, i: int, k: int, j: int, sigma: float) -> Case:
        chosen_on = () if person.split == "held_out" else (1,)  # others than what is reported
        seed = (protocol["seed"], i, k, j, *chosen_on)
        kind = kinds[(i + k + j) % len(kinds)]
        return Case(person, k, kind, j, seed, sigma, bank)

    return [
        case(person, i, k, j, sigma)
        for k in dict.fromkeys(classes)
        for i, person in enumerate(persons)
        if person.serves(k)
        for j in range(protocol["geometries_per_person"])
        for sigma in dict.fromkeys(map(float, noise))
    ]


Expert = Callable[[float], str]
"""Which expert serves an effective voxel volume (mm3)."""


def fine_enough(todo: Sequence[Case], expert: Expert) -> list[Case]:
    """The cases whose person is a truth for the expert that the scan goes to, too.

    The range of voxel volumes that class 3 draws from reaches down to those of expert 2.
    """
    return [c for c in todo if c.person.serves(int(expert(c.acquisition().volume)))]


def with_every_expert(chosen: Sequence[Case], more: Sequence[Case], expert: Expert) -> list[Case]:
    """Cases, and of further ones the first of each person for every expert that has none yet.

    A class is drawn from a range of voxel volumes, and ranges overlap: the gate may send none of a
    person's scans to some expert.
    """
    served = {(c.person.name, c.noise, expert(c.acquisition().volume)) for c in chosen}
    added = []
    for case in sorted(more, key=lambda c: c.number):
        key = case.person.name, case.noise, expert(case.acquisition().volume)
        if key not in served:
            served.add(key)
            added.append(case)
    return [*chosen, *added]


def segmented_first(todo: Sequence[Case], expert: Expert, scans: int = 1) -> list[Case]:
    """The same cases, with those marked that are segmented where Dice is asked for.

    That takes longer than all the rest: the first geometry of a person and class has to do, or the
    first ``scans``, and further ones only where an expert would have none of the person.
    """
    first = [case for case in todo if case.number < scans]
    wanted = {case.key for case in with_every_expert(first, todo, expert)}
    return [replace(case, segmented=case.key in wanted) for case in todo]
