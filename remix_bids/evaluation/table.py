"""The table of an evaluation: means by class, and paired gains with the person as the unit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from remix_bids.evaluation.settings import EXPERT, METHODS, SHIPS
from remix_bids.experts.registry import GENERAL

METRICS = {
    "psnr": "PSNR in dB, inside the brain",
    "psnr_whole": "PSNR in dB, all that the scan covers of the head's bounding box",
    "psnr_matched": "PSNR in dB, inside the brain, after the best gain and offset",
    "ssim": "SSIM, inside the brain",
    "correlation": "Correlation, inside the brain",
}
WHERE_KNOWN = {
    "dice": "Dice of tissue classes with those of the true image",
    "dice_manual": "Dice of tissue classes with the manual ones",
    "head_detail": "Gradient energy at 0.2 to 0.4 cycles/mm outside the brain, of the truth's",
}
COMPARED = ("psnr", "ssim", "correlation", "dice", "dice_manual")
"""Metrics of which paired gains are given."""
ANISOTROPY = ((1.0, 2.0), (2.0, 4.0), (4.0, 20.0))


def noise_title(level: float) -> str:
    """How tables and plots name a noise level."""
    return "without noise" if level == 0 else f"with {100 * level:g}% Rician noise"


def by_person(rows: Sequence[dict], metric: str, **where: object) -> dict[str, float]:
    """Mean of a metric for each person over the rows that match."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if all(str(row[key]) == str(value) for key, value in where.items()):
            values.setdefault(row["person"], []).append(float(row[metric]))
    return {person: float(np.mean(v)) for person, v in values.items()}


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over persons."""
    rng = np.random.default_rng(seed)
    means = rng.choice(np.asarray(values), (10000, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def best_back_projection(rows: Sequence[dict]) -> dict[float, dict[int, list[float]]]:
    """Of the tuning rows: iterations and step with the best PSNR, by noise and class."""
    best: dict[float, dict[int, list[float]]] = {}
    for noise in sorted({float(row["noise"]) for row in rows}):
        best[noise] = {}
        for k in sorted({int(row["class"]) for row in rows}):
            where = {"noise": noise, "class": k}
            methods = sorted({row["method"] for row in rows})
            means = [
                np.mean(list(by_person(rows, "psnr", method=m, **where).values())) for m in methods
            ]
            iterations, step = methods[int(np.argmax(means))].split(" x ")
            best[noise][k] = [int(iterations), float(step)]
    return best


def to_markdown(rows: Sequence[dict]) -> str:
    """Tables of each metric by class, and paired gains of what ships; the person is the unit."""
    lines: list[str] = []
    for noise in sorted({float(row["noise"]) for row in rows}):
        title = noise_title(noise)
        mine = [row for row in rows if float(row["noise"]) == noise]
        for metric, label in METRICS.items():
            lines += [f"**{label}, {title}**", "", *_means(mine, metric), ""]
        for metric, label in WHERE_KNOWN.items():
            if known := with_metric(metric, mine):
                lines += [f"**{label}, {title}**", "", *_means(known, metric), ""]
        segmented = with_metric("dice_floor", mine)
        if segmented:
            floors = {
                k: np.mean(list(by_person(segmented, "dice_floor", **{"class": k}).values()))
                for k in classes_of(segmented)
            }
            told = ", ".join(f"{floor:.4f} in class {k}" for k, floor in floors.items())
            lines += [f"Dice of the segmenter with itself: {told}", ""]
        told = "(mean over persons, 95 % bootstrap interval, persons better)"
        for metric in COMPARED:
            known = with_metric(metric, mine)
            if SHIPS in methods_of(known):
                lines += [f"**Gain of `{SHIPS}` in {metric}, {title}** {told}", ""]
                lines += [*_gains(known, metric), ""]
        lines += [f"**Gain of `{EXPERT}` over `{GENERAL}`, network alone, {title}** {told}", ""]
        lines += [*_network_against_network(mine), ""]
        lines += [f"**Gain of `{SHIPS}` in psnr by kind of acquisition, {title}**", ""]
        lines += [*_by_kind(mine), ""]
    return "\n".join(lines)


def with_metric(metric: str, rows: Sequence[dict]) -> list[dict]:
    """The rows in which a metric was measured."""
    return [row for row in rows if row.get(metric) not in (None, "")]


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    rule = "|" + " --- |" * len(head)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in body)]


def methods_of(rows: Sequence[dict]) -> list[str]:
    """The methods of a table, ours first."""
    found = dict.fromkeys(str(row["method"]) for row in rows)
    return [m for m in METHODS if m in found] + [m for m in found if m not in METHODS]


def classes_of(rows: Sequence[dict]) -> list[int]:
    """The classes of a table."""
    return sorted({int(row["class"]) for row in rows})


def _means(rows: Sequence[dict], metric: str) -> list[str]:
    """Mean over persons for each class and method."""
    digits = 2 if metric.startswith("psnr") else 4
    values = np.array(
        [
            [
                np.mean(list(by_person(rows, metric, method=m, **{"class": k}).values()))
                for m in methods_of(rows)
            ]
            for k in classes_of(rows)
        ]
    )
    body = [
        [name, *(f"{v:.{digits}f}" for v in line)]
        for name, line in zip(
            [*map(str, classes_of(rows)), "mean"], [*values, values.mean(axis=0)], strict=True
        )
    ]
    return markdown_table(["class", *methods_of(rows)], body)


def paired_gain(
    rows: Sequence[dict], metric: str, base: str, klass: int | None = None, method: str = SHIPS
) -> list[float]:
    """Gain of a method, by default what ships, over another, one value a person."""
    where: dict[str, object] = {} if klass is None else {"class": klass}
    expert = by_person(rows, metric, method=method, **where)
    other = by_person(rows, metric, method=base, **where)
    return [expert[person] - other[person] for person in expert]


def _cell(gain: Sequence[float], digits: int) -> str:
    if not gain:
        return ""
    low, high = bootstrap_interval(gain)
    better = sum(g > 0 for g in gain)
    mean = float(np.mean(gain))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {better}/{len(gain)}"


def _gains(rows: Sequence[dict], metric: str) -> list[str]:
    others = [m for m in methods_of(rows) if m != SHIPS]
    digits = 2 if metric == "psnr" else 4
    body = [
        [str(k), *(_cell(paired_gain(rows, metric, m, k), digits) for m in others)]
        for k in classes_of(rows)
    ]
    return markdown_table(["class", *others], body)


def _network_against_network(rows: Sequence[dict]) -> list[str]:
    """Seven networks against one, by class and metric."""
    known = {metric: with_metric(metric, rows) for metric in COMPARED}
    shown = [m for m, own in known.items() if {EXPERT, GENERAL} <= {*methods_of(own)}]
    body = [
        [
            str(k),
            *(
                _cell(paired_gain(known[m], m, GENERAL, k, EXPERT), 3 if m == "psnr" else 4)
                for m in shown
            ),
        ]
        for k in classes_of(rows)
    ]
    return markdown_table(["class", *shown], body)


def _by_kind(rows: Sequence[dict]) -> list[str]:
    """Gains split by profile, anisotropy and where the geometry comes from, class 1 left out.

    With how many voxel sizes each is of: several persons may be seen through one real geometry.
    """
    rest = [row for row in rows if int(row["class"]) > 1]
    groups = {
        "Gaussian profile": [row for row in rest if row["profile"] == "gaussian"],
        "box profile": [row for row in rest if row["profile"] == "box"],
        "geometry of a real scan": [row for row in rest if row["kind"] == "real"],
        "rescaled geometry": [row for row in rest if row["kind"] != "real"],
    }
    for low, high in ANISOTROPY:
        groups[f"anisotropy {low:g} to {high:g}"] = [
            row for row in rest if low <= float(row["anisotropy"]) < high
        ]
    bases = ("cubic", "back-projection", GENERAL)
    body = [
        [
            name,
            str(len({row["voxel_sizes"] for row in group})),
            *(_cell(paired_gain(group, "psnr", m), 2) for m in bases),
        ]
        for name, group in groups.items()
    ]
    return markdown_table(["acquisitions", "voxel sizes", *bases], body)
