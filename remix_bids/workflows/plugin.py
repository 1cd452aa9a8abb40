"""Nipype's MultiProc, made to survive a killed worker.

Stock Nipype keeps one pool for all nodes and waits for ever when one of its processes is killed,
which is what an out-of-memory kill looks like. Here every slot is a pool of a single process, so
a death is attributed to exactly one node, which fails with a crash file, and the nodes in flight
beside it are not disturbed. Workers are started when they are first needed, and the one used last
is used next: it still holds the expert it has loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import networkx
from nipype import config, logging
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node

from remix_bids import workers
from remix_bids.errors import RemixError

KILLED = (
    "The process that ran node {node} was killed{how}. Most often the system ran out of memory: "
    "give the run more memory, or use --low-mem or a smaller --nprocs.\n"
)

HOLES = (
    "{node} lacks intermediate files that an earlier run has left; was the working folder moved, "
    "or cleaned? What is broken in it was removed: run the same again."
)


def _start_worker(cwd: str, log_level: int, resource_monitor: bool) -> None:
    """Prepare a fresh worker process (it shares no state with the parent)."""
    workers.lead_a_group()
    os.chdir(cwd)
    os.environ["NIPYPE_NO_ET"] = os.environ["NO_ET"] = "1"
    os.environ.setdefault("MPLBACKEND", "Agg")
    for name in ("nipype.workflow", "nipype.interface", "nipype.utils"):
        logging.getLogger(name).setLevel(log_level)
    if resource_monitor:
        config.enable_resource_monitor()


class RemixMultiProcPlugin(MultiProcPlugin):
    """MultiProc in which a killed worker is one failed node, not the end of the world.

    Besides Nipype's, ``plugin_args`` may hold ``fresh_workers`` (bool): end a worker after every
    node, which gives its memory back; and ``worker_log_level`` (int), what workers print.

    Attributes
    ----------
    failures : list of (node, crash file, traceback)
    n_run, n_cached : int
        Nodes computed in this run, and nodes taken from the working directory.
    """

    def __init__(self, plugin_args: dict[str, Any] | None = None) -> None:
        super().__init__(plugin_args=plugin_args)
        self.pool.shutdown(wait=False)  # never used: the slots below take its place
        # "fork" would copy whatever threads the parent has by then; a fork server does not.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["nipype.pipeline.engine"])
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[int, ProcessPoolExecutor] = {}
        self._fresh_workers = bool(self.plugin_args.get("fresh_workers", False))
        self.failures: list[tuple[Any, str, str]] = []
        self.n_run = self.n_cached = 0
        self._branch: list[int] = []  # of every node: which of the graph's separate parts

    def _generate_dependency_list(self, graph: Any) -> None:
        super()._generate_dependency_list(graph)
        branches = networkx.weakly_connected_components(graph)
        of_node = {node: i for i, nodes in enumerate(branches) for node in nodes}
        self._branch = [of_node[node] for node in self.procs]

    def _sort_jobs(self, jobids: Any, scheduler: str | None = "tsort") -> Any:
        """Bring one scan to its end before the next is begun: results come early."""
        jobids = super()._sort_jobs(jobids, scheduler=scheduler)
        if scheduler not in (None, "tsort"):
            return jobids
        last = len(self._branch)
        return sorted(jobids, key=lambda job: self._branch[job] if job < last else -1)

    def _local_hash_check(self, jobid: int, graph: Any) -> bool:
        """Whether a node needs not run; one whose inputs are gone fails alone.

        A folder that was moved, or that a cleaner has been through, would end the run. What is
        broken in it is removed, so that the next run makes it anew.
        """
        node = self.procs[jobid]
        try:
            node.is_cached()
        except Exception as cause:
            for earlier in graph.predecessors(node):
                if not _can_be_read(earlier):
                    shutil.rmtree(earlier.output_dir(), ignore_errors=True)
            error = RemixError(HOLES.format(node=node.fullname))
            error.__cause__ = cause
            trace = traceback.format_exception(error)
            self._run_errors.append(trace)
            self._clean_queue(jobid, graph, result={"result": None, "traceback": trace})
            self.proc_pending[jobid] = False
            return True
        return super()._local_hash_check(jobid, graph)

    def _new_slot(self) -> ProcessPoolExecutor:
        level = self.plugin_args.get("worker_log_level", logging.getLogger("nipype.workflow").level)
        return ProcessPoolExecutor(
            max_workers=1,
            initializer=_start_worker,
            initargs=(self._cwd, level, config.resource_monitor),
            mp_context=self._context,
        )

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        if getattr(node.interface, "terminal_output", "") == "stream":
            node.interface.terminal_output = "allatonce"
        while True:
            slot = self._idle.pop() if self._idle else self._new_slot()
            try:
                future = slot.submit(run_node, node, updatehash, self._taskid)
                break
            except BrokenProcessPool:  # killed while it was idle: no node has suffered
                slot.shutdown(wait=False)
        processes = dict(slot._processes)
        self._busy[self._taskid] = slot
        self._task_obj[self._taskid] = future
        future.add_done_callback(
            partial(self._finished, taskid=self._taskid, name=node.fullname, processes=processes)
        )
        return self._taskid

    def _finished(
        self, future: Future, *, taskid: int, name: str, processes: dict[int, Any]
    ) -> None:
        """Note the result of a task, also when its process died (runs in the slot's thread)."""
        try:
            result = future.result()
        except Exception as error:
            died = isinstance(error, BrokenProcessPool)
            how = _exit_reason(processes) if died else ""
            workers.end(processes.values())
            message = KILLED.format(node=name, how=how) if died else f"{error!r}\n"
            result = {
                "result": None,
                "traceback": [message, f"{type(error).__name__}: {error}\n"],
                "taskid": taskid,
            }
        self._taskresult[taskid] = result

    def _clear_task(self, taskid: int) -> None:
        super()._clear_task(taskid)
        slot = self._busy.pop(taskid)
        if self._fresh_workers or slot._broken:
            slot.shutdown(wait=False)
        else:
            self._idle.append(slot)

    def _task_finished_cb(self, jobid: int, cached: bool = False) -> None:
        failed = any(node is self.procs[jobid] for node, _, _ in self.failures)
        if not failed:  # nodes run in the parent come by here even when they failed
            self.n_cached += cached
            self.n_run += not cached
        super()._task_finished_cb(jobid, cached=cached)

    def _report_crash(self, node: Any, result: dict[str, Any] | None = None) -> str:
        crash_file = super()._report_crash(node, result=result)
        trace = (result or {}).get("traceback") or ""
        self.failures.append((node, crash_file, "".join(trace)))
        return crash_file

    def _postrun_check(self) -> None:
        self.close()

    def close(self) -> None:
        """End all workers (also called when the run was broken off)."""
        for slot in [*self._idle, *self._busy.values()]:
            slot.shutdown(wait=False, cancel_futures=True)
        for slot in self._busy.values():
            workers.end(dict(slot._processes or {}).values())
        self._idle, self._busy = [], {}


def _can_be_read(node: Any) -> bool:
    """Whether an earlier run has left the outputs of a node, and all of their files."""
    try:
        return node.result.outputs is not None
    except Exception:  # Nipype raises many kinds for what is broken
        return False


def _exit_reason(processes: dict[int, Any], patience: float = 2.0) -> str:
    """Say how a slot's process ended, if that can be found out."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        codes = [p.exitcode for p in processes.values() if p.exitcode is not None]
        if codes:
            return f" (signal {-codes[0]})" if codes[0] < 0 else f" (exit status {codes[0]})"
        time.sleep(0.05)
    return ""
