"""What a process may use, on planted trees of a node with 128 processors and 512 GiB."""

import subprocess
import sys

import pytest

from remix_bids.resources import available_cpus, available_memory_gb

HOST_CPUS, HOST_GB = 128, 512.0
UNLIMITED_V1 = 9223372036854771712  # what version 1 says when there is no limit


class Node:
    """A machine: files under ``/sys/fs/cgroup`` and ``/proc/self/cgroup``, and a process's view."""

    def __init__(self, folder):
        self.root, self.own = folder / "sys", folder / "own"
        self.environ = {}
        self.affinity = HOST_CPUS

    def plant(self, own="", **files):
        self.own.write_text(own)
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return self

    @property
    def cpus(self):
        return available_cpus(self.environ, self.root, self.own, self.affinity)

    @property
    def memory(self):
        return available_memory_gb(self.environ, self.root, self.own, HOST_GB)


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


GB = 1024**3
STEP = "/slurm/uid_1000/job_7/step_batch/task_0"
TREES = {
    "nothing is limited": ("", {}, HOST_CPUS, HOST_GB),
    "version 2, no limit": (
        "0::/user.slice",
        {"user.slice/cpu.max": "max 100000", "user.slice/memory.max": "max", "cpu.max": "max 1000"},
        HOST_CPUS,
        HOST_GB,
    ),
    "version 2, the container's own root": (
        "0::/",
        {"cpu.max": "200000 100000", "memory.max": 8 * GB},
        2,
        8.0,
    ),
    "version 2, the host's path although only the own part is mounted": (
        "0::/../../machine.slice/other",
        {"cpu.max": "200000 100000", "memory.max": 8 * GB},
        2,
        8.0,
    ),
    "version 2, a Slurm job: the limits stand above the step": (
        "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0",
        {
            "system.slice/slurmstepd.scope/job_7/step_0/user/task_0/cpu.max": "max 100000",
            "system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.max": "max",
            "system.slice/slurmstepd.scope/job_7/cpu.max": "200000 100000",
            "system.slice/slurmstepd.scope/job_7/memory.max": 8 * GB,
            "system.slice/slurmstepd.scope/job_8/memory.max": 1 * GB,  # somebody else's
        },
        2,
        8.0,
    ),
    "version 2, throttled before it is killed": (
        "0::/a",
        {"a/memory.high": 6 * GB, "a/memory.max": 8 * GB},
        HOST_CPUS,
        6.0,
    ),
    "version 1, a Slurm job": (
        f"4:memory:{STEP}\n3:cpu,cpuacct:{STEP}\n0::/",
        {
            f"memory{STEP}/memory.limit_in_bytes": UNLIMITED_V1,
            "memory/slurm/uid_1000/job_7/memory.limit_in_bytes": 8 * GB,
            "memory/memory.limit_in_bytes": UNLIMITED_V1,
            "cpu,cpuacct/slurm/uid_1000/job_7/cpu.cfs_quota_us": 200000,
            "cpu,cpuacct/slurm/uid_1000/job_7/cpu.cfs_period_us": 100000,
            "cpu,cpuacct/cpu.cfs_quota_us": -1,
            "cpu,cpuacct/cpu.cfs_period_us": 100000,
        },
        2,
        8.0,
    ),
    "version 1, a container": (
        "4:memory:/docker/abc\n3:cpu:/docker/abc",
        {
            "memory/memory.limit_in_bytes": 8 * GB,
            "cpu/cpu.cfs_quota_us": 150000,
            "cpu/cpu.cfs_period_us": 100000,
        },
        2,
        8.0,
    ),
    "both versions": (
        "4:memory:/job\n0::/job",
        {"memory/job/memory.limit_in_bytes": 8 * GB, "unified/job/cpu.max": "200000 100000"},
        2,
        8.0,
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_control_groups(node, name):
    own, files, cpus, memory = TREES[name]
    node.plant(own, **files)
    assert (node.cpus, node.memory) == (cpus, memory)


@pytest.mark.parametrize(
    ("environ", "cpus", "memory"),
    [
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_NODE": "8192"}, 2, 8.0),
        ({"SLURM_CPUS_ON_NODE": "2", "SLURM_MEM_PER_CPU": "4096"}, 2, 8.0),
        ({"SLURM_JOB_CPUS_PER_NODE": "2(x3),4"}, 2, HOST_GB),
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "64"}, 2, HOST_GB),
        ({"SLURM_CPUS_PER_TASK": "256"}, HOST_CPUS, HOST_GB),  # no more than there are
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_NODE": "0"}, 2, HOST_GB),  # --mem=0: all
        ({"SLURM_CPUS_PER_TASK": "", "SLURM_MEM_PER_CPU": "many"}, HOST_CPUS, HOST_GB),
    ],
)
def test_slurm(node, environ, cpus, memory):
    node.environ = environ
    assert (node.plant().cpus, node.memory) == (cpus, memory)


def test_the_least_of_all_limits(node):
    node.plant("0::/", **{"cpu.max": "300000 100000", "memory.max": 16 * GB})
    assert node.cpus == 3
    node.environ = {"SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_NODE": "8192"}
    assert (node.cpus, node.memory) == (2, 8.0)
    node.affinity = 1
    assert node.cpus == 1


def test_affinity_of_this_machine():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from remix_bids.resources import available_cpus; print(available_cpus({}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
