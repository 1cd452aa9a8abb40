"""remix-bids: parse -> check -> build -> run -> report -> one exit code.

======  ==================================================
status  meaning
======  ==================================================
0       all done
1       some scan or report failed, the others are done
2       wrong arguments
66      nothing to do
70      the graph could not be built
78      a template or an expert is missing
======  ==================================================
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remix_bids import __version__
from remix_bids.cli.parser import parse_args, read_filters
from remix_bids.config import NATIVE, RunConfig
from remix_bids.errors import GraphError, RemixError, UsageError

if TYPE_CHECKING:  # nothing heavy is imported before the arguments are known to be right
    from remix_bids.inputs import Scan
    from remix_bids.templates import Template
    from remix_bids.workflows.run import Outcome

LOGGER = logging.getLogger("remix_bids")


@dataclass(frozen=True)
class Job:
    """A checked run: all that is needed to build its graph."""

    config: RunConfig
    scans: tuple[Scan, ...]
    template: Template
    experts_table: Path
    complaints: str  # of the validator


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``remix-bids`` command."""
    # Neither Nipype nor anything else may call home; both are read when Nipype is imported.
    os.environ["NO_ET"] = os.environ["NIPYPE_NO_ET"] = "1"
    os.environ.setdefault("MPLBACKEND", "Agg")
    # Sums in another order are other sums: only torch, which is told how many, uses threads.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    signal.signal(signal.SIGTERM, _interrupt)  # docker stop, scancel: end the workers, too
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Do everything; return the exit code."""
    try:
        config = parse_args(argv)
    except (UsageError, OSError) as error:  # or a folder that cannot be entered, say
        print(f"remix-bids: error: {error}", file=sys.stderr)
        return UsageError.exit_code
    start_logging(config)
    try:
        other = without_scans(config)
        if other is not None:
            return other
        job = check(config)
        if job.config.dry_run:
            return describe(job)
        outcome = work(job)
    except RemixError as error:
        print(f"remix-bids: error: {error}", file=sys.stderr, flush=True)
        if not isinstance(error, UsageError):
            print("0 done, 0 failed", flush=True)
        return error.exit_code
    except OSError as error:
        print(f"remix-bids: error: {error}", file=sys.stderr, flush=True)
        return UsageError.exit_code
    except KeyboardInterrupt:
        print("remix-bids: interrupted", file=sys.stderr, flush=True)
        return 130
    remove_stale(job, outcome)
    failed_reports = report(job, outcome)
    return conclude(outcome, failed_reports)


def without_scans(config: RunConfig) -> int | None:
    """Do what needs no scan: the group level, reports or methods text alone; None otherwise.

    Raises
    ------
    RemixError
    """
    if config.boilerplate_only:
        from remix_bids.reports.boilerplate import write_boilerplate

        check_and_write_dataset(config)
        print(f"methods: {write_boilerplate(config)}", flush=True)
        return 0
    if config.analysis_level == "group":
        from remix_bids.derivatives import check_output_dataset
        from remix_bids.reports.group import write_group

        check_output_dataset(config.output_dir)
        try:
            page, n_scans, n_flagged = write_group(
                config.output_dir, config.participant_label, config.session_label
            )
        except OSError as error:
            raise UsageError(f"cannot write: {error}") from error
        print(f"group report: {page}\n{n_scans} scan(s), {n_flagged} flagged", flush=True)
        return 0
    return rebuild_reports(config) if config.reports_only else None


def check_and_write_dataset(config: RunConfig) -> None:
    """Make the output folder a dataset of ours, or refuse it.

    Raises
    ------
    UsageError
        It holds another dataset, or cannot be written to.
    """
    from remix_bids.derivatives import check_output_dataset, write_dataset_files

    check_output_dataset(config.output_dir)
    try:
        write_dataset_files(config.output_dir, config.bids_dir)
    except OSError as error:
        raise UsageError(f"cannot write: {error}") from error


def rebuild_reports(config: RunConfig) -> int:
    """Build pages anew from the figures that are there (``--reports-only``).

    Raises
    ------
    NothingToDoError
        No participant asked for has been run.
    """
    from remix_bids.derivatives import check_output_dataset
    from remix_bids.errors import NothingToDoError

    check_output_dataset(config.output_dir)
    # Of a participant all of whose scans have failed there are logs, and no figures.
    folders = {
        path.parent.name
        for what in ("figures", "log")
        for path in config.output_dir.glob(f"sub-*/{what}")
    }
    subjects = sorted(name.removeprefix("sub-") for name in folders)
    lacking = [label for label in config.participant_label if label not in subjects]
    if config.participant_label:
        subjects = [label for label in subjects if label in config.participant_label]
    if not subjects:
        raise NothingToDoError(
            f"no participant asked for has figures or logs in {config.output_dir}; run without "
            "--reports-only first"
        )
    if lacking:
        LOGGER.warning("no report: %s have not been run", ", ".join(f"sub-{x}" for x in lacking))
    failed = build_reports(config, subjects)
    print(f"{len(subjects) - len(failed)} done, {len(failed)} failed", flush=True)
    return 1 if failed else 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def start_logging(config: RunConfig) -> None:
    """Say progress and warnings on standard output; more with -v."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if config.verbose else logging.WARNING)


def check(config: RunConfig) -> Job:
    """Find scans, template, experts and resources; stop early when something is not right.

    Raises
    ------
    RemixError
    """
    from remix_bids.derivatives import check_output_dataset
    from remix_bids.experts.registry import load_registry
    from remix_bids.inputs import collect_scans, run_validator
    from remix_bids.templates import find_template

    check_output_dataset(config.output_dir)
    config = with_resources(config)
    scans = collect_scans(config, read_filters(config))
    complaints = run_validator(config)
    if complaints:
        LOGGER.warning("bids-validator-deno has complaints; going on:\n%s\n", complaints)
    template = find_template(config.space, offline=config.offline)
    registry = load_registry(config.experts_dir)
    records = list(registry) if config.expert == "auto" else [registry[config.expert]]
    for record in records:
        record.check()
    table = records[0].path.parent / "experts.toml"
    return Job(config, tuple(scans), template, table, complaints)


def with_resources(config: RunConfig) -> RunConfig:
    """Fill in what the command line leaves open about processors, memory and graphics card."""
    from remix_bids.resources import available_cpus, available_memory_gb, resolve_device

    nprocs = config.nprocs or available_cpus()
    submits = _submits(config)
    if submits and config.device.startswith("cuda"):
        device = config.device  # the card is where the jobs run, and missing there if it is missing
    else:
        device = resolve_device(config.device)
    if config.resource_monitor:
        try:
            import psutil  # noqa: F401
        except ImportError:
            raise UsageError("--resource-monitor needs psutil: pip install psutil") from None
    return config.with_(
        nprocs=nprocs,
        omp_nthreads=min(config.omp_nthreads or 4, nprocs),
        mem_gb=config.mem_gb or 0.9 * available_memory_gb(),
        device=device,
        n_gpu_procs=(config.n_gpu_procs or 1) if device.startswith("cuda") else None,
    )


def _submits(config: RunConfig) -> bool:
    """Whether nodes run elsewhere, as jobs of a scheduler; refuses a plugin file that is wrong."""
    if config.use_plugin is None:
        return False
    from remix_bids.workflows.run import read_plugin_file

    return read_plugin_file(config.use_plugin)["plugin"] not in ("MultiProc", "Linear")


def build(job: Job) -> Any:
    """The graph of the run.

    Raises
    ------
    GraphError
    """
    from nipype import logging as nipype_logging

    from remix_bids.workflows.base import init_remix_wf

    level = {0: logging.CRITICAL, 1: logging.INFO}.get(job.config.verbose, logging.DEBUG)
    for name in ("nipype.workflow", "nipype.interface", "nipype.utils"):
        nipype_logging.getLogger(name).setLevel(level)
    try:
        return init_remix_wf(
            config=job.config,
            scans=job.scans,
            template=job.template,
            experts_table=job.experts_table,
        )
    except RemixError:
        raise
    except Exception as error:
        raise GraphError(f"the graph cannot be built: {type(error).__name__}: {error}") from error


def describe(job: Job) -> int:
    """Say what would be done (``--dry-run``)."""
    from remix_bids.naming import output_names

    config, workflow = job.config, build(job)
    if config.write_graph:
        draw(workflow, config)
    for scan in job.scans:
        names = output_names(scan.path, job.template.space)
        for space in config.output_spaces:
            image = names.native_image if space == NATIVE else names.image
            print(f"{scan.path} -> {config.output_dir / image}")
    print(
        f"dry run: {len(job.scans)} scan(s), template {job.template.t1w}, experts of "
        f"{job.experts_table.parent}, {config.nprocs} processor(s), {config.mem_gb:.1f} GB, "
        f"device {config.device}; nothing was done"
    )
    print("0 done, 0 failed", flush=True)
    return 0


def draw(workflow: Any, config: RunConfig) -> None:
    """Write one graph per subject to the working folder, drawn where graphviz is installed."""
    program = shutil.which("dot")
    for name in sorted({full_name.partition(".")[0] for full_name in workflow.list_node_names()}):
        subject_wf = workflow.get_node(name)
        folder = config.work_dir / workflow.name
        (folder / name).mkdir(parents=True, exist_ok=True)
        subject_wf.base_dir = str(folder)
        subject_wf.write_graph(dotfilename="graph.dot", graph2use="colored", format="dot")
        subject_wf.base_dir = None
        dot, svg = folder / name / "graph.dot", folder / name / "graph.svg"
        if program is None:
            LOGGER.warning("graph: %s (install graphviz to have it drawn)", dot)
            continue
        command = [program, "-Tsvg", "-o", str(svg), str(dot)]
        subprocess.run(command, check=False)  # noqa: S603 - a list of arguments, no shell
        LOGGER.warning("graph: %s", svg)


def work(job: Job) -> Outcome:
    """Build the graph, prepare the folders, run."""
    from nipype import config as nipype_config

    from remix_bids.derivatives import write_dataset_files, write_text
    from remix_bids.reports.boilerplate import write_boilerplate
    from remix_bids.reports.individual import note_run
    from remix_bids.workflows.base import (
        ANY_ROOT,
        claim_work_dir,
        log_dir,
        renew_missing_outputs,
    )
    from remix_bids.workflows.run import execute

    config = job.config
    workflow = build(job)
    try:
        lock = claim_work_dir(config, job.scans)
        for earlier in config.work_dir.glob(ANY_ROOT) if config.clean_workdir else ():
            shutil.rmtree(earlier)
        write_dataset_files(config.output_dir, config.bids_dir)
        write_boilerplate(config)
        if job.complaints:
            log = config.output_dir / "logs" / f"bids-validator_{config.run_uuid}.txt"
            write_text(log, job.complaints + "\n")
        about = {"Template": str(job.template.t1w), "Experts": str(job.experts_table.parent)}
        for subject in sorted({scan.subject for scan in job.scans}):
            note_run(log_dir(config, subject), config, about)
    except OSError as error:
        raise UsageError(f"cannot write: {error}") from error
    if config.write_graph:
        draw(workflow, config)
    if config.resource_monitor:
        nipype_config.enable_resource_monitor()
    renew_missing_outputs(workflow)
    LOGGER.warning(
        "remix-bids %s: %d scan(s) of %d subject(s), template %s, device %s, %d processor(s)",
        __version__,
        len(job.scans),
        len({scan.subject for scan in job.scans}),
        job.template.space,
        config.device,
        config.nprocs,
    )
    with lock:
        return execute(workflow, config, job.scans)


def remove_stale(job: Job, outcome: Outcome) -> None:
    """Remove what earlier runs have left for group table and page, and what is no longer so."""
    from remix_bids.naming import output_names

    stale = [output_names(scan.path, job.template.space).qc for scan in outcome.broken]
    if NATIVE not in job.config.output_spaces:
        stale += [output_names(scan.path, job.template.space).native for scan in outcome.done]
    for path in stale:
        with suppress(OSError):
            (job.config.output_dir / path).unlink()


def report(job: Job, outcome: Outcome) -> list[str]:
    """Rebuild the page of every subject; return those that could not be built."""
    from remix_bids.reports.individual import note_done
    from remix_bids.workflows.base import log_dir

    for subject in sorted({scan.subject for scan in outcome.done}):
        done = [scan.path for scan in outcome.done if scan.subject == subject]
        try:
            note_done(log_dir(job.config, subject), done)
        except OSError as error:  # must not hide the result of the run
            LOGGER.error("sub-%s: cannot note what was done: %s", subject, error)
    return build_reports(job.config, sorted({scan.subject for scan in job.scans}))


def build_reports(config: RunConfig, subjects: Sequence[str]) -> list[str]:
    """Build the pages of subjects; return those that could not be built."""
    from remix_bids.reports.individual import build_report

    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    about = {"Page made": f"{now}, by remix-bids {__version__}"}
    failed = []
    for subject in subjects:
        try:
            page = build_report(config.output_dir, subject, config.run_uuid, about)
            LOGGER.warning("report: %s", page)
        except Exception as error:  # a page that fails must not hide the result of the run
            LOGGER.error("report of sub-%s FAILED: %s: %s", subject, type(error).__name__, error)
            LOGGER.debug("", exc_info=True)
            failed.append(subject)
    return failed


def conclude(outcome: Outcome, failed_reports: list[str]) -> int:
    """Print the last lines; the one place where the exit code of a run is decided."""
    for scan, reason in outcome.failed.items():
        LOGGER.error("%s: %s", scan.label, reason)
    if outcome.n_run is not None:
        LOGGER.warning("nodes: %d run, %d cached", outcome.n_run, outcome.n_cached)
    line = f"{len(outcome.done)} done, {len(outcome.failed)} failed"
    if outcome.crash_files:
        line += ": " + " ".join(str(path) for path in outcome.crash_files)
    print(line, flush=True)
    if outcome.missing_resource:
        return 78
    return 1 if outcome.failed or failed_reports else 0


if __name__ == "__main__":
    main()
