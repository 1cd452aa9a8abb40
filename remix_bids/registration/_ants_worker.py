"""One process, one ITK thread, one affine registration after the other (see `pool`).

ANTs reads its seed and its thread count from the environment, once, so whoever starts this module
sets ``ANTS_RANDOM_SEED`` and ``ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from remix_bids.registration.itk import read_itk_affine

DONE = "remix-bids: job done"


def register(job: dict[str, Any]) -> None:
    """Run one job and write its matrix (RAS+, fixed to moving) to ``job['output']`` as JSON.

    A registration that fails (no overlap, for instance) writes ``null``.
    """
    import ants

    # JSON knows no tuples, and antspyx ignores schedules given as lists.
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in job["options"].items()}
    scratch = tempfile.mkdtemp(dir=os.path.dirname(job["output"]))
    try:
        result = ants.registration(
            fixed=ants.image_read(job["fixed"]),
            moving=ants.image_read(job["moving"]),
            mask=ants.image_read(job["mask"]),
            initial_transform=[job["initial"]],
            outprefix=os.path.join(scratch, "affine_"),
            **options,
        )
        matrix = read_itk_affine(result["fwdtransforms"][0]).tolist()
    except RuntimeError as error:
        print(f"{job['name']}: {error}", file=sys.stderr)
        matrix = None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    Path(job["output"]).write_text(json.dumps(matrix))


def main() -> None:
    """Run jobs, one JSON line each on standard input, and answer each with `DONE`."""
    for line in sys.stdin:
        register(json.loads(line))
        print(f"\n{DONE}", flush=True)


if __name__ == "__main__":
    main()
