"""What was to be shown, held against the rows of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from remix_bids.evaluation.settings import EXPERT, SHIPS
from remix_bids.evaluation.table import (
    bootstrap_interval,
    by_person,
    classes_of,
    markdown_table,
    noise_title,
    paired_gain,
    with_metric,
)
from remix_bids.experts.registry import GENERAL
from remix_bids.training.dataset import COARSE_CLASSES

TIE = 0.05  # dB; smaller differences are ties
DICE_TIE = 0.002  # likewise: several times what a segmenter differs by from run to run
ABOVE_BACK_PROJECTION = {False: 0.7, True: 1.0}  # dB in the mean, without and with noise
ABOVE_CUBIC = {"gaussian": 2.0, "box": 1.3}  # dB in the mean, by slice profile
GAP_CLOSED = {3: 0.25, 4: 0.25, 5: 0.5, 6: 0.5, 7: 0.5}  # of Dice, from linear to the floor
MOST_DETAIL = 1.05  # of the truth's


@dataclass(frozen=True)
class Claim:
    """One line of the protocol, what was found, and whether it holds."""

    text: str
    found: str
    holds: bool


def _where(holds: Callable[[int], bool], classes: Sequence[int]) -> tuple[str, bool]:
    """In which classes something holds, in words; and whether in all."""
    good = [k for k in classes if holds(k)]
    missing = ", ".join(str(k) for k in classes if k not in good)
    return f"{len(good)} of {len(classes)}" + (f", not {missing}" if missing else ""), not missing


def _better(rows: Sequence[dict], metric: str, bases: Sequence[str], k: int) -> bool:
    """All persons better than every base; then the bootstrap interval is above 0, too."""
    return all(gain > 0 for base in bases for gain in paired_gain(rows, metric, base, k))


def _persons(rows: Sequence[dict], k: int) -> set[str]:
    return {row["person"] for row in rows if int(row["class"]) == k}


def _lacking(rows: Sequence[dict], k: int) -> int:
    """Persons without a scan in a class, but for those whose image is too coarse for it."""
    everybody = {row["person"] for row in rows}
    drawn = {row["person"] for row in rows if int(row["drawn"]) == k}
    asked = everybody if k in COARSE_CLASSES or not drawn else drawn
    return len(asked - _persons(rows, k))


def _with_all(found: tuple[str, bool], lacking: dict[int, int]) -> tuple[str, bool]:
    """A finding that asks for every person, and how many of them classes lack."""
    told, good = found
    notes = [
        f"class {k} lacks {n} {'person' if n == 1 else 'persons'}" for k, n in lacking.items() if n
    ]
    return "; ".join([told, *notes]), good and not notes


def _mean(gain: Sequence[float]) -> float:
    return float(np.mean(gain)) if gain else float("nan")


def _named(classes: Sequence[int]) -> str:
    """Classes in words: 'class 4', 'classes 2 to 7' or 'classes 2, 4, 5'."""
    if len(classes) == 1:
        return f"class {classes[0]}"
    if list(classes) == list(range(classes[0], classes[-1] + 1)):
        return f"classes {classes[0]} to {classes[-1]}"
    return f"classes {', '.join(map(str, classes))}"


def _of_class_1(rows: Sequence[dict]) -> Iterator[Claim]:
    gain = _mean(paired_gain(rows, "psnr", "cubic", 1))
    yield Claim("class 1: PSNR not below cubic by 0.05 dB", f"{gain:+.3f} dB", gain > -TIE)


def _of_fidelity(rows: Sequence[dict], noisy: bool) -> Iterator[Claim]:
    """Of the classes that are to gain."""
    classes = [k for k in classes_of(rows) if k > 1]
    named = _named(classes)
    lacking = {k: _lacking(rows, k) for k in classes}
    for metric in ("psnr", "ssim", "correlation"):
        better = partial(_better, rows, metric, ("linear", "cubic"))
        found = _with_all(_where(better, classes), lacking)
        text = f"better than linear and cubic in {metric}, every person, interval above 0"
        yield Claim(f"{named}: {text}", *found)
    for profile, least in ABOVE_CUBIC.items():
        own = [row for row in rows if row["profile"] == profile and int(row["class"]) > 1]
        if own:  # every class counts alike, however many of its scans have the profile
            gain = _mean([_mean(paired_gain(own, "psnr", "cubic", k)) for k in classes_of(own)])
            text = f"{_named(classes_of(own))}, {profile} profile: PSNR above cubic by {least} dB"
            yield Claim(text, f"{gain:+.2f} dB", gain >= least)
    gains = {k: paired_gain(rows, "psnr", "back-projection", k) for k in classes}

    def ahead(k: int) -> bool:
        return _mean(gains[k]) > TIE and bootstrap_interval(gains[k])[0] > 0

    text = f"{named}: PSNR above back-projection by more than {TIE} dB, interval above 0"
    yield Claim(text, *_with_all(_where(ahead, classes), lacking))
    least, mean = ABOVE_BACK_PROJECTION[noisy], _mean([_mean(gain) for gain in gains.values()])
    yield Claim(f"in their mean by {least} dB", f"{mean:+.2f} dB", mean >= least)


def _of_experts(rows: Sequence[dict]) -> Iterator[Claim]:
    """Seven against one, network against network."""
    classes = classes_of(rows)
    gains = {k: _mean(paired_gain(rows, "psnr", GENERAL, k, EXPERT)) for k in classes}
    better = [k for k in classes if gains[k] > TIE]
    ties = [k for k in classes if abs(gains[k]) <= TIE]
    found = f"{len(better)} of {len(classes)}, {len(ties)} ties"
    least = max(1, len(classes) - 1)
    text = f"better than the general network in PSNR in {least} of {len(classes)} classes"
    yield Claim(text, found, len(better) >= least)


def _of_dice(rows: Sequence[dict], lacking: dict[int, int]) -> Iterator[Claim]:
    """``rows``: those that were segmented; ``lacking``: persons of a class that were not."""
    classes = classes_of(rows)

    def dice(method: str, k: int, metric: str = "dice") -> float:
        return _mean(list(by_person(rows, metric, method=method, **{"class": k}).values()))

    gains = {k: dice(EXPERT, k) - dice(GENERAL, k) for k in classes}
    better = [k for k in classes if gains[k] > DICE_TIE]
    ties = [k for k in classes if abs(gains[k]) <= DICE_TIE]
    wanted = max(1, len(classes) - 1)
    text = f"better than the general network in Dice in {wanted} of {len(classes)} classes"
    told = f"{len(better)} of {len(classes)}, {len(ties)} ties"
    yield Claim(text, *_with_all((told, len(better) >= wanted), lacking))
    for k, least in GAP_CLOSED.items():
        if k in classes:
            low, floor = dice("linear", k), dice("linear", k, "dice_floor")
            gain, gap = dice(SHIPS, k) - low, floor - low
            counts = gain > 2 * (1 - floor)  # what the segmenter itself may be off
            text = f"class {k}: Dice gap from linear to the segmenter's floor closed by {least:.0%}"
            told = f"{gain / gap:.2%}" if gap > 0 else "linear is at the floor"
            told += "" if counts else "; the gain is below twice what the segmenter is off"
            found = told, counts and gap > 0 and gain >= least * gap
            yield Claim(text, *_with_all(found, {k: lacking[k]}))
    if all(row["dice_manual"] not in (None, "") for row in rows):

        def not_below(k: int) -> bool:
            return dice(SHIPS, k, "dice_manual") >= dice("linear", k, "dice_manual")

        found = _with_all(_where(not_below, classes), lacking)
        yield Claim("Dice with the manual classes not below linear", *found)


def _of_heads(rows: Sequence[dict]) -> Iterator[Claim]:
    """``rows``: those of heads."""
    detail = {
        method: _mean(list(by_person(rows, "head_detail", method=method).values()))
        for method in (SHIPS, "cubic")
    }
    found = f"{detail[SHIPS]:.2f}, cubic {detail['cubic']:.2f}"
    text = f"head outside the brain: detail at least cubic's, at most {MOST_DETAIL} of the truth's"
    yield Claim(text, found, detail["cubic"] <= detail[SHIPS] <= MOST_DETAIL)


def claims(rows: Sequence[dict]) -> list[Claim]:
    """Every claim that rows of one noise level can decide."""
    noisy = float(rows[0]["noise"]) > 0
    classes = classes_of(rows)
    found = [*_of_fidelity(rows, noisy)] if max(classes) > 1 else []
    found += [*_of_class_1(rows)] if 1 in classes else []
    found += _of_experts(rows)
    segmented, heads = with_metric("dice", rows), with_metric("head_detail", rows)
    if {"linear", GENERAL, EXPERT, SHIPS} <= {row["method"] for row in segmented}:
        brains = [row for row in rows if row.get("head_detail") in (None, "")]
        lacking = {k: len(_persons(brains, k) - _persons(segmented, k)) for k in classes}
        found += _of_dice(segmented, lacking)
    found += [*_of_heads(heads)] if heads else []
    return found


def to_markdown(rows: Sequence[dict]) -> str:
    """A table of the claims for each noise level."""
    lines: list[str] = []
    for noise in sorted({float(row["noise"]) for row in rows}):
        title = noise_title(noise)
        mine = [row for row in rows if float(row["noise"]) == noise]
        body = [[c.text, c.found, "yes" if c.holds else "no"] for c in claims(mine)]
        persons = {row["person"] for row in mine}
        scans = {(row["person"], row["drawn"], row["number"]) for row in mine}
        head = [f"`{SHIPS}`, {title}: {len(persons)} persons, {len(scans)} scans", "found", "holds"]
        lines += [*markdown_table(head, body), ""]
    return "\n".join(lines)
