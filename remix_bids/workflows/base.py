"""The whole graph of a run: one branch per T1w image."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import IO, Any
from zlib import crc32

from nipype import Workflow

import remix_bids
from remix_bids.config import RunConfig
from remix_bids.errors import GraphError, UsageError
from remix_bids.inputs import Scan
from remix_bids.interfaces.bids import DerivativesSink, is_as_written
from remix_bids.naming import check_collisions, output_names, workflow_name
from remix_bids.templates import Template
from remix_bids.workflows.anatomical import init_anat_remix_wf
from remix_bids.workflows.memory import Footprint

LOGGER = logging.getLogger("remix_bids")


def _digest_of_code() -> str:
    """First digits of a sha256 of the package's own code."""
    folder, digest = Path(remix_bids.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


ROOT = f"remix_bids_{_digest_of_code()}_wf"
"""Other code computes anew: Nipype does not see that it has changed."""
ANY_ROOT = "remix_bids_????????_wf"
"""Pattern of `ROOT`, of whatever code."""


def init_remix_wf(
    *, config: RunConfig, scans: Sequence[Scan], template: Template, experts_table: Path
) -> Workflow:
    """Build the graph of a run.

    Parameters
    ----------
    config : RunConfig
        With its resources filled in.
    scans : sequence of Scan
    template : Template
    experts_table : Path
        ``experts.toml``.

    Raises
    ------
    GraphError
        Two scans would write the same file.
    """
    check_collisions([scan.path for scan in scans], template.space)
    workflow = Workflow(name=ROOT, base_dir=str(config.work_dir))
    workflow.config["execution"].update(
        crashfile_format="txt",
        stop_on_first_crash=str(config.stop_on_first_crash).lower(),
        poll_sleep_duration="0.1",  # the default of 2 s costs more than the work of small nodes
        remove_unnecessary_outputs="false",
        create_report="false",
        check_version="false",
    )
    for subject in sorted({scan.subject for scan in scans}):
        subject_wf = init_single_subject_wf(
            config=config,
            scans=[scan for scan in scans if scan.subject == subject],
            subject=subject,
            template=template,
            experts_table=experts_table,
        )
        subject_wf.config["execution"] = {
            **workflow.config["execution"],
            "crashdump_dir": str(log_dir(config, subject)),
        }
        for node in subject_wf._get_all_nodes():
            node.config = deepcopy(subject_wf.config)
        workflow.add_nodes([subject_wf])
    return workflow


def log_dir(config: RunConfig, subject: str) -> Path:
    """Where the settings and crash files of one subject go in this run."""
    return config.output_dir / f"sub-{subject}" / "log" / config.run_uuid


def subject_workflow_name(subject: str) -> str:
    """Name of the workflow of one subject."""
    return re.sub(r"\W", "_", f"sub-{subject}") + "_wf"


def init_single_subject_wf(
    *,
    config: RunConfig,
    scans: Sequence[Scan],
    subject: str,
    template: Template,
    experts_table: Path,
) -> Workflow:
    """All scans of one subject, side by side."""
    workflow = Workflow(name=subject_workflow_name(subject))
    for scan in scans:
        scan_wf = init_anat_remix_wf(
            source=scan.path,
            names=output_names(scan.path, template.space),
            output_dir=config.output_dir,
            template=template,
            experts_table=experts_table,
            static=static_metadata(config=config, scan=scan, template=template),
            expert=config.expert,
            gate=config.gate,
            spaces=config.output_spaces,
            enforce_consistency=config.enforce_consistency,
            leave_slices_out=config.leave_slices_out,
            skull_stripped=scan.skull_stripped,
            slice_thickness=scan.slice_thickness,
            footprint=Footprint.of(scan.path),
            random_seed=config.random_seed,
            device=config.device,
            omp_nthreads=config.omp_nthreads or 1,
            heavy_gb=config.mem_gb if config.low_mem else None,
            sloppy=config.sloppy,
            name=workflow_name(scan.path),
        )
        if workflow.get_node(scan_wf.name) is not None:
            raise GraphError(f"two scans are both called {scan.label}: {scan.path}")
        workflow.add_nodes([scan_wf])
    return workflow


def static_metadata(*, config: RunConfig, scan: Scan, template: Template) -> dict[str, Any]:
    """Sidecar keys that are known before the run."""
    rules = {
        "effective": "effective voxel volume (each side counted as at least 1 mm)",
        "paper": "voxel volume (plain product of the sides, as in the paper)",
    }
    chosen = config.expert != "auto"
    return {
        "Sources": [bids_uri(scan.path, config.bids_dir)],
        "Resolution": "1 mm isotropic, 181 x 217 x 181 voxels, origin -90, -126, -72",
        "TemplateFile": template.t1w.name,
        **({"SpatialReference": template.address} if template.address else {}),
        "SelectionRule": f"--expert {config.expert}" if chosen else rules[config.gate],
        "RandomSeed": config.random_seed,
    }


def bids_uri(path: Path, bids_dir: Path) -> str:
    """BIDS URI of an input file; ``raw`` is defined by DatasetLinks of the output."""
    if not path.is_relative_to(bids_dir):  # one of the two goes through a link
        path, bids_dir = path.parent.resolve() / path.name, bids_dir.resolve()
    return f"bids:raw:{path.relative_to(bids_dir).as_posix()}"


def claim_work_dir(config: RunConfig, scans: Sequence[Scan]) -> IO[bytes]:
    """Keep other runs from the intermediate files of the same scans, while the file is open.

    They would put theirs in their place: one run would write what the other has computed.

    Raises
    ------
    UsageError
        Another run has claimed one of the scans, or, with ``--clean-workdir``, any.
    """
    config.work_dir.mkdir(parents=True, exist_ok=True)
    file = (config.work_dir / ".remix_bids.lock").open("ab")
    try:
        if config.clean_workdir:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for scan in scans:  # a byte each, of a file that stays empty
            name = f"sub-{scan.subject} {workflow_name(scan.path)}"
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, crc32(name.encode()))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UsageError(
                f"another run is at work in {config.work_dir}, on the same scans or with "
                "--clean-workdir; wait for it, or give this one a folder of its own (-w)"
            ) from None
        LOGGER.warning("%s cannot be locked: %s", file.name, error)  # some file systems
    return file


def renew_missing_outputs(workflow: Workflow) -> None:
    """Let sinks write again whose file is gone or has been replaced since they wrote it."""
    base = Path(workflow.base_dir)
    for full_name in workflow.list_node_names():
        node = workflow.get_node(full_name)
        if isinstance(node.interface, DerivativesSink):
            node_dir = base.joinpath(workflow.name, *full_name.split("."))
            if not is_as_written(node_dir, Path(node.inputs.out_path)):
                node.overwrite = True
