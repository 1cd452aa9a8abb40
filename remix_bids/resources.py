"""What this process may use: processors, memory, graphics card."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from remix_bids.errors import UsageError

CGROUP = Path("/sys/fs/cgroup")


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def cgroup_cpus(root: Path = CGROUP) -> int | None:
    """Processors that the control group allows (v2, then v1), None when there is no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    limit = _read_int(root / "cpu/cpu.cfs_quota_us")
    period_us = _read_int(root / "cpu/cpu.cfs_period_us")
    if limit and period_us and limit > 0:
        return max(1, math.ceil(limit / period_us))
    return None


def available_cpus(
    environ: Mapping[str, str] = os.environ, root: Path = CGROUP, affinity: int | None = None
) -> int:
    """Processors allotted to this process: the least of affinity, control group and Slurm."""
    if affinity is None:
        get = getattr(os, "sched_getaffinity", None)
        affinity = len(get(0)) if get else (os.cpu_count() or 1)
    limits = [affinity, cgroup_cpus(root)]
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if environ.get(name, "").isdigit():
            limits.append(int(environ[name]))
            break
    return max(1, min(limit for limit in limits if limit))


def available_memory_gb(
    environ: Mapping[str, str] = os.environ, root: Path = CGROUP, n_cpus: int = 1
) -> float:
    """Memory allotted to this process (GiB): the least of host, control group and Slurm."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        value = _read_int(root / name)
        if value:
            limits.append(value / 1024**3)
    if environ.get("SLURM_MEM_PER_NODE", "").isdigit() and int(environ["SLURM_MEM_PER_NODE"]):
        limits.append(int(environ["SLURM_MEM_PER_NODE"]) / 1024)
    elif environ.get("SLURM_MEM_PER_CPU", "").isdigit() and int(environ["SLURM_MEM_PER_CPU"]):
        limits.append(int(environ["SLURM_MEM_PER_CPU"]) * n_cpus / 1024)
    return min(limits)


def parse_memory(text: str) -> float:
    """Memory in GiB from a number with a suffix: '8G', '8GB', '8000M', '1T'.

    Raises
    ------
    ValueError
        Without a suffix: programs disagree whether a bare number means MB or GB.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt])(i?b)?\s*", text.lower())
    if not match:
        bare = re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", text) is not None
        hint = f"write {text.strip()}G or {text.strip()}M" if bare else "write for example 8G"
        raise ValueError(f"memory needs a number and a unit (K, M, G or T), not {text!r}: {hint}")
    value = float(match[1]) * {"k": 1 / 1024**2, "m": 1 / 1024, "g": 1, "t": 1024}[match[2]]
    if value <= 0:
        raise ValueError("memory must be more than nothing")
    return value


def resolve_device(device: str) -> str:
    """Turn 'auto' into 'cpu' or 'cuda', and check that a card asked for is there.

    The parent process never imports torch, so a child is asked, and only where there may be a card.

    Raises
    ------
    UsageError
        The card asked for is not there.
    """
    if device == "cpu":
        return "cpu"
    if device == "auto" and not (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        return "cpu"
    found = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        check=False,
    )
    n_cards = int(found.stdout.strip() or 0) if found.returncode == 0 else 0
    if device == "auto":
        return "cuda" if n_cards else "cpu"
    wanted = int(device.partition(":")[2] or 0)
    if wanted >= n_cards:
        raise UsageError(
            f"--device {device}: torch finds {n_cards} CUDA device(s) here; use --device auto or "
            "cpu, or install a torch build with CUDA"
        )
    return device
