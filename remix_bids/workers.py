"""Processes that work for another one end with it, and take along what they have started.

A pool's worker whose parent is gone would finish what it has begun and then wait for more for ever,
with the memory that it holds: nobody tells it. So every worker watches its parent, and leads a
process group that can be ended as a whole, such as ANTs or an external command in it. (A call that
does not let other threads run, such as Atropos, is waited for when the parent was killed.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess


def lead_a_group() -> None:
    """Make a fresh worker the leader of a process group that ends when its parent does."""
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os.killpg(0, signal.SIGKILL)


def end(workers: Iterable[BaseProcess]) -> None:
    """End workers and their groups; some may be gone, or lead none (those of torch)."""
    for worker in workers:
        if worker.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
        worker.kill()
