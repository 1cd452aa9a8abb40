"""How the group page grows with the cohort, in a real browser.

    python -m benchmarks.group_page --out docs/evidence/group

Synthetic figures of 20 to 5,000 scans; pages are opened in turn, several times over, and what
counts is the page's own clock: from the start of navigation to the load event, a click on a heading
until the sorted rows are laid out, and another figure drawn. It writes a Markdown table of medians;
on a noisy machine only the ratios in it mean something. Needs chromium and chromedriver, as
`make test-browser` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.commit import commit
from remix_bids.reports.group import write_group
from tests.pages import figures_of, open_browser

COUNTS = (20, 200, 2000, 5000)
LAID_OUT = "document.body.offsetHeight; return performance.now() - t"
OPENED = "const n = performance.getEntriesByType('navigation')[0]; return n.loadEventEnd"
SORTED = (
    "const t = performance.now();"
    "document.querySelector(\"#table th[data-column='consistency_chi2_median']\").click();"
)
DRAWN = (
    "const t = performance.now(); const s = document.getElementById('metric');"
    "s.selectedIndex = (s.selectedIndex + 1) % s.length; s.onchange();"
)


def cohort(out: Path, count: int) -> Path:
    """A folder of results of so many scans, and its group page."""
    rng = np.random.default_rng(0)
    for i in range(count):
        name = f"sub-x{i:04d}"
        path = out / name / "anat" / f"{name}_desc-remix_qc.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(figures_of(f"{name}_T1w", rng, str(1 + i % 7))))
    write_group(out)
    return out / "group_T1w.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="without extension")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = {n: cohort(Path(folder) / str(n), n) for n in COUNTS}
        sizes = {n: page.stat().st_size / 1e6 for n, page in pages.items()}
        took: dict[int, list[tuple[float, float, float]]] = {n: [] for n in COUNTS}
        browser = open_browser()
        for _ in range(given.repeats):
            for n, page in pages.items():
                browser.get(page.as_uri())
                loaded = browser.execute_script(OPENED)
                both = [browser.execute_script(part + LAID_OUT) for part in (SORTED, DRAWN)]
                took[n].append((loaded, *both))
        browser.quit()
    lines = [
        "# The group page in a browser\n\n`python -m benchmarks.group_page --repeats "
        f"{given.repeats} --out {given.out}` at {commit()}: medians "
        f"of {given.repeats}, headless Chromium, pages opened in turn.\n",
        "| scans | page, MB | open, ms | sort, ms | draw another figure, ms |",
        "|" + " --- |" * 5,
    ]
    for n in COUNTS:
        medians = [statistics.median(values) for values in zip(*took[n], strict=True)]
        lines.append(f"| {n} | {sizes[n]:.2f} | " + " | ".join(f"{m:.0f}" for m in medians) + " |")
    text = "\n".join(lines) + "\n"
    given.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
