"""What this process may use: processors, memory, graphics card."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from remix_bids.errors import UsageError

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _control_groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's control group and of all above it, whose limits hold as well.

    Parameters
    ----------
    controller : {'cpu', 'memory'}
    root : Path
        Where control groups are mounted: version 2, version 1 (one folder for each controller), or
        both (version 2 in ``unified``).
    own : Path
        ``/proc/self/cgroup``. In a container it may tell the host's path, while only the
        container's own part is mounted: what is not there is passed over.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    places = {root: "/", root / controller: "/"}
    for line in lines:
        _, names, path = ([*line.split(":", 2), "", ""])[:3]
        if not names:
            places.update({root: path, root / "unified": path})
        elif controller in names.split(","):
            places.update({root / controller: path, root / names: path})
    for mount, path in places.items():
        inside = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(inside), -1, -1):
            yield mount.joinpath(*inside[:depth])


def cgroup_cpus(root: Path = CGROUP, own: Path = OWN_CGROUP) -> int | None:
    """Processors that the control groups (v1 or v2) allow, None when there is no limit."""
    limits = []
    for group in _control_groups("cpu", root, own):
        try:
            quota, period = (int(word) for word in (group / "cpu.max").read_text().split())
        except (OSError, ValueError):  # not version 2, or "max"
            quota = _read_int(group / "cpu.cfs_quota_us") or -1
            period = _read_int(group / "cpu.cfs_period_us") or 0
        if quota > 0 and period > 0:
            limits.append(max(1, math.ceil(quota / period)))
    return min(limits, default=None)


def cgroup_memory_gb(root: Path = CGROUP, own: Path = OWN_CGROUP) -> float | None:
    """Memory (GiB) that the control groups (v1 or v2) allow, None when there is no limit."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    groups = _control_groups("memory", root, own)
    limits = [_read_int(group / name) for group in groups for name in names]
    return min((limit / 1024**3 for limit in limits if limit), default=None)


def _slurm(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of some Slurm variables that holds a number above 0 (0 means a whole node)."""
    for name in names:
        match = re.match(r"[0-9]+", environ.get(name, ""))  # also of "2(x3)": 2 on each of 3 nodes
        if match and int(match[0]):
            return int(match[0])
    return None


def slurm_cpus(environ: Mapping[str, str] = os.environ) -> int | None:
    """Processors that Slurm has allotted to this task, None when it is not a Slurm job."""
    return _slurm(environ, "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE")


def slurm_memory_gb(environ: Mapping[str, str] = os.environ) -> float | None:
    """Memory (GiB) that Slurm has allotted to this job on this node, None when it does not say."""
    per_node = _slurm(environ, "SLURM_MEM_PER_NODE")
    if per_node:
        return per_node / 1024
    per_cpu = _slurm(environ, "SLURM_MEM_PER_CPU")
    cpus = _slurm(environ, "SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK") or 1
    return per_cpu * cpus / 1024 if per_cpu else None


def available_cpus(
    environ: Mapping[str, str] = os.environ,
    root: Path = CGROUP,
    own: Path = OWN_CGROUP,
    affinity: int | None = None,
) -> int:
    """Processors allotted to this process: the least of affinity, control groups and Slurm."""
    if affinity is None:
        get = getattr(os, "sched_getaffinity", None)
        affinity = len(get(0)) if get else (os.cpu_count() or 1)
    limits = (affinity, cgroup_cpus(root, own), slurm_cpus(environ))
    return min(limit for limit in limits if limit)


def available_memory_gb(
    environ: Mapping[str, str] = os.environ,
    root: Path = CGROUP,
    own: Path = OWN_CGROUP,
    host: float | None = None,
) -> float:
    """Memory allotted to this process (GiB): the least of host, control groups and Slurm."""
    if host is None:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    limits = (host, cgroup_memory_gb(root, own), slurm_memory_gb(environ))
    return min(limit for limit in limits if limit)


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
