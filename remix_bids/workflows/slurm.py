"""Nipype's SLURM plugin, with its three known faults mended.

Every node is a Slurm job. In Nipype 1.11 a job that Slurm ends (out of memory, out of time,
cancelled) aborts the whole run; a controller that does not answer for some seconds makes it take
live jobs for dead, or fail to submit; and it needs ``LOGNAME``. Here the first is one failed node
with a crash file, the second is waited for, and nothing needs the third.
"""

from __future__ import annotations

import logging
import math
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from nipype.pipeline.plugins.slurm import SLURMPlugin

LOGGER = logging.getLogger("remix_bids")

ENDED = (
    "The process that ran node {node} was ended by Slurm (job {job}: {state}). "
    "Ask for more in sbatch_args of the plugin file (--mem, --time) when that was why; a second "
    "run does only what is missing.\n"
)
# States in which a job has not come to its end by itself, so that there is no result to wait for.
CUT_SHORT = (
    *("BOOT_FAIL", "CANCELLED", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
UNREACHABLE = re.compile(
    r"unable to contact|socket timed out|not available at the moment|connection refused"
    r"|connect failure|temporarily unavailable|zero bytes were transmitted",
    re.IGNORECASE,
)


class SlurmError(RuntimeError):
    """Slurm has refused, or has not answered for longer than we are willing to wait."""


class RemixSLURMPlugin(SLURMPlugin):
    """One Slurm job for every node that is not run by the parent.

    Besides Nipype's (``sbatch_args``, ``template``, ``max_jobs``), ``plugin_args`` may hold
    ``controller_patience`` (seconds without an answer after which the run is given up, default
    1800), ``job_finished_timeout`` (seconds that a result may take to appear on a slow shared
    file system, default 60) and ``poll_sleep_duration`` (seconds between two looks at the queue,
    default 10). Every job asks for as many processors as its node uses; what
    ``sbatch_args`` says wins.
    """

    # Unlike MultiProc it does not count.
    n_run: int | None = None
    n_cached: int | None = None

    def __init__(self, plugin_args: dict[str, Any] | None = None) -> None:
        args = dict(plugin_args or {})
        super().__init__(plugin_args=args)
        self._patience = float(args.get("controller_patience", 1800))
        self._result_timeout = str(args.get("job_finished_timeout", 60))
        self._poll = float(args.get("poll_sleep_duration", 10))
        self._pending: dict[int, str] = {}  # job: working folder of its node
        self._asked_for: set[int] = set()  # jobs of the last look at the queue,
        self._queued: set[str] = set()  # those of them that were in it,
        self._asked_at = -math.inf  # and when
        self._silent_since: float | None = None
        self._names: dict[int, str] = {}

    def run(self, graph: Any, config: Any, updatehash: bool = False) -> None:
        """Run the graph; whatever ends it, no job is left behind."""
        config["execution"]["job_finished_timeout"] = self._result_timeout
        config["execution"]["poll_sleep_duration"] = str(self._poll)
        try:
            super().run(graph, config, updatehash=updatehash)
        finally:
            self.close()

    def close(self) -> None:
        """Cancel the jobs that are still waiting or running."""
        if self._pending:
            _call("scancel", *map(str, self._pending))
        self._pending = {}

    def _answered(self) -> None:
        if self._silent_since is not None:
            LOGGER.warning("Slurm answers again")
        self._silent_since = None

    def _unanswered(self, what: str, said: str) -> None:
        """Wait for the controller a little; give up when that has been tried for too long."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
            LOGGER.warning("Slurm does not answer %s, waiting: %s", what, said)
        if now - self._silent_since > self._patience:
            raise SlurmError(
                f"Slurm has not answered {what} for {self._patience:.0f} s ({said}); run again "
                "when it does, which does only what is missing"
            )
        time.sleep(min(5.0, self._patience / 4))

    def _is_pending(self, taskid: int) -> bool:
        """One look at the queue serves all jobs of a round: many would burden the controller."""
        recent = time.monotonic() - self._asked_at < self._poll / 2
        if recent and taskid in self._asked_for:
            return str(taskid) in self._queued
        jobs = {taskid, *self._pending}
        listed = ",".join(map(str, sorted(jobs)))
        done = _call("squeue", "--noheader", "--format=%i", f"--jobs={listed}")
        if done.returncode == 0:
            self._answered()
            self._asked_for, self._queued = jobs, {*done.stdout.split()}
            self._asked_at = time.monotonic()
            return str(taskid) in self._queued
        if "invalid job id" in done.stderr.lower():  # so long ago that it is forgotten
            self._answered()
            return False
        self._unanswered("squeue", done.stderr.strip())
        return True

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        if self._is_pending(taskid):
            return None
        state = _state(taskid)
        node = self._names.get(taskid, "?")
        if state.startswith(CUT_SHORT):
            return {"result": None, "traceback": [ENDED.format(node=node, job=taskid, state=state)]}
        result = super()._get_result(taskid)
        if result and isinstance(result["traceback"], str):  # there is no result
            said = ENDED.format(node=node, job=taskid, state=state or "it left no result")
            result["traceback"] = [result["traceback"], said]
        return result

    def _report_crash(self, node: Any, result: Any = None) -> Any:
        # Nipype makes some tracebacks one string, and then adds a list to it.
        if result is not None and isinstance(result["traceback"], str):
            result = {**result, "traceback": result["traceback"].splitlines(keepends=True)}
        return super()._report_crash(node, result)

    def _clear_task(self, taskid: int) -> None:
        super()._clear_task(taskid)
        self._names.pop(taskid, None)

    def _submit_batchtask(self, scriptfile: str, node: Any) -> int:
        log = Path(scriptfile).parent / "slurm-%j.out"
        command = ["sbatch", f"--job-name={node.name}", f"--output={log}"]
        command += [f"--cpus-per-task={node.n_procs}"]
        own = node.plugin_args or {}
        if not own.get("overwrite"):
            command += shlex.split(self._sbatch_args or "")
        command += shlex.split(own.get("sbatch_args", ""))
        for old in Path(node.output_dir()).glob("result_*.pklz"):
            old.unlink()  # or it would be taken for that of a job that ends before it begins
        done = _call(*command, scriptfile)
        while done.returncode != 0 and UNREACHABLE.search(done.stderr):
            self._unanswered("sbatch", done.stderr.strip())
            done = _call(*command, scriptfile)
        match = re.search(self._jobid_re, done.stdout)
        if done.returncode != 0 or match is None:
            raise SlurmError(
                f"sbatch has refused the job of {node.fullname}: "
                f"{(done.stderr or done.stdout).strip()}; sbatch_args is {self._sbatch_args!r}"
            )
        self._answered()
        taskid = int(match[1])
        self._pending[taskid] = node.output_dir()
        self._names[taskid] = node.fullname
        return taskid


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; an absent one is an error like any other."""
    try:
        return subprocess.run(  # noqa: S603 - a list of arguments, no shell
            command, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not installed here: plugin SLURM needs Slurm's own commands (it does "
            "not work from inside a container); use a job array instead, see docs/hpc.md"
        ) from None


def _state(taskid: int) -> str:
    """What became of a job, '' when Slurm does not tell."""
    done = _call("scontrol", "--oneliner", "show", "job", str(taskid))
    match = re.search(r"\bJobState=(\S+)", done.stdout)
    return match[1] if done.returncode == 0 and match else ""
