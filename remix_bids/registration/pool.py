"""Child processes that run ANTs on one thread each, side by side.

Plain subprocesses and not a multiprocessing pool: the environment that makes ANTs reproducible must
stand before the child imports it, and the caller may itself be a pool's worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from remix_bids.errors import RemixError
from remix_bids.registration._ants_worker import DONE


def environment(seed: int) -> dict[str, str]:
    """Environment of a child: ANTs' seed, one thread, this package importable."""
    # 0 tells ANTs to take the clock's seed.
    seed = seed or 2**31 - 1
    package_root = str(Path(__file__).resolve().parents[2])
    paths = (package_root, os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "ANTS_RANDOM_SEED": str(seed),
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }


class Pool:
    """At most ``n_procs`` children, started when first needed, ended on leaving the context.

    Parameters
    ----------
    n_procs : int
        Children side by side.
    seed : int
        ANTs' seed, the same in every child.
    log_dir : Path
        Where the children's messages go.
    """

    def __init__(self, n_procs: int, seed: int, log_dir: Path) -> None:
        self.n_procs = max(1, n_procs)
        self.seed = seed
        self.log_dir = log_dir
        self.children: list[tuple[subprocess.Popen[str], Path]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for child, _log in self.children:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                with suppress(OSError):  # what was to be sent to a child that has ended by itself
                    if pipe:
                        pipe.close()
            child.wait()

    def _start(self) -> None:
        log = self.log_dir / f"child_{len(self.children)}.log"
        with log.open("w") as messages:
            child = subprocess.Popen(
                [sys.executable, "-m", "remix_bids.registration._ants_worker"],
                env=environment(self.seed),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )
        self.children.append((child, log))

    def run(self, jobs: list[dict[str, Any]]) -> None:
        """Run jobs (see `_ants_worker`); returns when all are done.

        Raises
        ------
        RemixError
            A child died.
        """
        n = min(self.n_procs, len(jobs))
        while len(self.children) < n:
            self._start()
        for rank in range(n):
            child, log = self.children[rank]
            try:
                for job in jobs[rank::n]:
                    _pipe(child.stdin).write(json.dumps(job) + "\n")
                _pipe(child.stdin).flush()
            except BrokenPipeError:
                raise self._died(child, log) from None
        for rank in range(n):
            child, log = self.children[rank]
            for _job in jobs[rank::n]:
                # ANTs itself may print; only our own line counts.
                while (line := _pipe(child.stdout).readline()).strip() != DONE:
                    if not line:
                        raise self._died(child, log)

    def _died(self, child: subprocess.Popen[str], log: Path) -> RemixError:
        return RemixError(
            f"a registration process ended with status {child.wait()} (killed for memory?): "
            f"{log.read_text()[-2000:]}"
        )


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RemixError("a registration process has no pipe")
    return stream
