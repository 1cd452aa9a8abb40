"""Run a graph and say what became of every scan."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nipype import IdentityInterface, Workflow

from remix_bids.config import NATIVE, RunConfig
from remix_bids.errors import UsageError
from remix_bids.inputs import Scan
from remix_bids.naming import output_names, workflow_name
from remix_bids.reports.individual import read_warnings
from remix_bids.workflows.plugin import RemixMultiProcPlugin
from remix_bids.workflows.slurm import RemixSLURMPlugin

LOGGER = logging.getLogger("remix_bids")


@dataclass
class Outcome:
    """What became of a run.

    Attributes
    ----------
    done : list of Scan
    failed : dict
        Reason (one sentence) of every scan that is not done.
    broken : list of Scan
        Of those, the ones that failed themselves; the others were not run.
    missing_resource : bool
        Nothing was done, because a template or expert is missing.
    crash_files : list of Path
    n_run, n_cached : int or None
        Nodes computed and nodes found up to date; None when the plugin does not tell.
    """

    done: list[Scan] = field(default_factory=list)
    failed: dict[Scan, str] = field(default_factory=dict)
    broken: list[Scan] = field(default_factory=list)
    missing_resource: bool = False
    crash_files: list[Path] = field(default_factory=list)
    n_run: int | None = None
    n_cached: int | None = None


class _Progress:
    """Follows the nodes of every scan, and says when a scan is done or has failed."""

    def __init__(self, workflow: Workflow, scans: Sequence[Scan], config: RunConfig) -> None:
        self._config = config
        self._scans = {workflow_name(scan.path): scan for scan in scans}
        self._open: dict[str, set[str]] = {name: set() for name in self._scans}
        self._failed: set[str] = set()
        self.heard = False  # some plugins never call
        for node_name in workflow.list_node_names():
            if not isinstance(workflow.get_node(node_name).interface, IdentityInterface):
                owner = self._owner(f"{workflow.name}.{node_name}")
                if owner is not None:
                    self._open[owner].add(f"{workflow.name}.{node_name}")

    def _owner(self, full_name: str) -> str | None:
        return next((part for part in full_name.split(".") if part in self._scans), None)

    def __call__(self, node: Any, status: str) -> None:
        """Nipype's status callback: 'start', 'end' (also of cached nodes) or 'exception'."""
        self.heard = True
        owner = self._owner(node.fullname)
        if owner is None or owner in self._failed:
            return
        scan = self._scans[owner]
        if status == "start":
            LOGGER.info("%s: %s", scan.label, node.name)
        elif status == "exception":
            self._failed.add(owner)
            self._say(f"{scan.label} FAILED at {node.name}")
        elif status == "end":
            self._open[owner].discard(node.fullname)
            if not self._open[owner]:
                self._say(f"{scan.label} done")
                names = output_names(scan.path, self._config.space)
                standard = self._config.output_spaces != (NATIVE,)
                sidecar = names.sidecar if standard else names.native_sidecar
                sidecar = self._config.output_dir / sidecar
                for warning in read_warnings(sidecar):
                    LOGGER.warning("    %s: WARNING: %s", scan.label, warning)

    def _say(self, text: str) -> None:
        finished = sum(not nodes or name in self._failed for name, nodes in self._open.items())
        LOGGER.warning("[%d/%d] %s", finished, len(self._open), text)

    def is_done(self, scan: Scan) -> bool:
        """Whether all nodes of a scan have come to their end."""
        name = workflow_name(scan.path)
        return name not in self._failed and not self._open[name]

    def has_failed(self, scan: Scan) -> bool:
        """Whether one of its nodes has."""
        return workflow_name(scan.path) in self._failed

    def scan_of(self, node_name: str) -> Scan | None:
        """The scan that a node works on."""
        owner = self._owner(node_name)
        return self._scans[owner] if owner else None


def read_plugin_file(path: Path) -> dict[str, Any]:
    """``plugin`` and ``plugin_args`` of a Nipype plugin file (YAML).

    Raises
    ------
    UsageError
        Not readable, or without ``plugin``.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--use-plugin {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("plugin"), str):
        raise UsageError(f"--use-plugin {path} must name a plugin, for example 'plugin: MultiProc'")
    args = content.get("plugin_args") or {}
    if not isinstance(args, dict):
        raise UsageError(f"--use-plugin {path}: plugin_args must be a table")
    if content["plugin"].endswith(("Graph", "DAGMan")):
        raise UsageError(
            f"--use-plugin {path}: {content['plugin']} hands all jobs over and returns at once, so "
            "that nobody learns what became of them; use a plugin that waits, such as SLURM"
        )
    import nipype.pipeline.plugins as plugins

    if not hasattr(plugins, content["plugin"] + "Plugin"):
        raise UsageError(f"--use-plugin {path}: Nipype has no plugin {content['plugin']!r}")
    return {"plugin": content["plugin"], "plugin_args": args}


def execute(workflow: Workflow, config: RunConfig, scans: Sequence[Scan]) -> Outcome:
    """Run the graph; never raises for a scan that fails."""
    progress = _Progress(workflow, scans, config)
    args: dict[str, Any] = {
        "n_procs": config.nprocs,
        "memory_gb": config.mem_gb,
        "n_gpu_procs": config.n_gpu_procs or 0,
        "raise_insufficient": False,
        "fresh_workers": config.low_mem,
        "worker_log_level": {0: logging.CRITICAL, 1: logging.INFO}.get(
            config.verbose, logging.DEBUG
        ),
        "status_callback": progress,
    }
    name = "MultiProc"
    if config.use_plugin is not None:
        content = read_plugin_file(config.use_plugin)
        name = content["plugin"]
        args = {**(args if name == "MultiProc" else {"status_callback": progress})}
        args.update(content["plugin_args"])
    plugin: RemixMultiProcPlugin | RemixSLURMPlugin | None = None
    if name == "MultiProc":
        plugin = RemixMultiProcPlugin(args)
    elif name == "SLURM":
        plugin = RemixSLURMPlugin(args)
    error: Exception | None = None
    try:
        workflow.run(plugin=plugin or name, plugin_args=None if plugin else args)
    except Exception as caught:  # failed nodes arrive as all kinds
        error = caught
    finally:
        if plugin is not None:
            plugin.close()
    return _outcome(progress, plugin, error, config, scans)


def _outcome(
    progress: _Progress,
    plugin: RemixMultiProcPlugin | RemixSLURMPlugin | None,
    error: Exception | None,
    config: RunConfig,
    scans: Sequence[Scan],
) -> Outcome:
    outcome = Outcome()
    reasons: dict[Scan, str] = {}
    kinds: list[str] = []
    for subject in sorted({scan.subject for scan in scans}):
        folder = config.output_dir / f"sub-{subject}" / "log" / config.run_uuid
        for crash in sorted(folder.glob("crash-*.txt")):
            outcome.crash_files.append(crash)
            text = crash.read_text(errors="replace")
            scan = progress.scan_of(text.partition("\n")[0].partition(": ")[2])
            kind, reason = explain(text)
            kinds.append(kind)
            if scan is not None:
                reasons.setdefault(scan, reason)
    if plugin is not None:
        outcome.n_run, outcome.n_cached = plugin.n_run, plugin.n_cached
    for scan in scans:
        # A plugin may tell of a failed node and yet raise nothing.
        if progress.is_done(scan) if progress.heard else error is None:
            outcome.done.append(scan)
        else:
            why = str(error or "not all of its steps came to an end")
            why = "not run: the run was broken off" if outcome.crash_files else why
            outcome.failed[scan] = reasons.get(scan, why)
            if scan in reasons or progress.has_failed(scan):
                outcome.broken.append(scan)
    outcome.missing_resource = (
        not outcome.done and bool(kinds) and set(kinds) == {"MissingResourceError"}
    )
    return outcome


def explain(crash_text: str) -> tuple[str, str]:
    """Kind and message of the error that a crash file reports.

    >>> explain("Node: x\\nTraceback:\\n\\tremix_bids.errors.InputImageError: a.nii is empty.")
    ('InputImageError', 'a.nii is empty.')
    """
    own = re.findall(r"remix_bids\.errors\.(\w+): (.+)", crash_text)
    if own:
        return own[-1]
    killed = re.search(r"The process that ran node .*", crash_text)
    if killed:
        return "Killed", killed[0]
    lines = [line.strip() for line in crash_text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    return last.partition(":")[0], last
