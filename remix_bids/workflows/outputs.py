"""What one scan leaves in the output folder."""

from __future__ import annotations

from pathlib import Path

from nipype import IdentityInterface, Node, Workflow

from remix_bids.interfaces.bids import DerivativesSink
from remix_bids.interfaces.reports import PlotEnhancement, PlotRegistration, Summarize
from remix_bids.naming import OutputNames
from remix_bids.templates import Template


def _sink(name: str, path: Path) -> Node:
    return Node(
        DerivativesSink(out_path=str(path)), name=name, run_without_submitting=True, mem_gb=0.01
    )


def init_derivatives_wf(
    *, names: OutputNames, output_dir: Path, name: str = "derivatives_wf"
) -> Workflow:
    """Write the image, its sidecar and both transforms.

    Parameters
    ----------
    names : OutputNames
        Where everything goes, below ``output_dir``.
    output_dir : Path

    Inputs
    ------
    image, sidecar, forward_transform, inverse_transform
        Files.
    """
    fields = ["image", "sidecar", "forward_transform", "inverse_transform"]
    inputnode = Node(IdentityInterface(fields=fields), name="inputnode")
    workflow = Workflow(name=name)
    for field in fields:
        sink = _sink(f"ds_{field}", output_dir / getattr(names, field))
        workflow.connect(inputnode, field, sink, "in_file")
    return workflow


def init_figures_wf(
    *,
    names: OutputNames,
    output_dir: Path,
    template: Template,
    source: str,
    name: str = "figures_wf",
) -> Workflow:
    """Draw and write the figures of the report.

    Parameters
    ----------
    names : OutputNames
        Where everything goes, below ``output_dir``.
    output_dir : Path
    template : Template
    source : str
        What the scan is called in the summary.

    Inputs
    ------
    registered, enhanced, coverage
        Volumes on the working grid.
    sidecar
        JSON.
    """
    inputnode = Node(
        IdentityInterface(fields=["registered", "enhanced", "coverage", "sidecar"]),
        name="inputnode",
    )
    place = {"template": str(template.t1w)}
    if template.brain_mask is not None:
        place["template_mask"] = str(template.brain_mask)
    plot_registration = Node(PlotRegistration(**place), name="plot_registration", mem_gb=0.8)
    plot_enhancement = Node(PlotEnhancement(**place), name="plot_enhancement", mem_gb=0.8)
    summarize = Node(
        Summarize(source=source), name="summarize", run_without_submitting=True, mem_gb=0.01
    )
    workflow = Workflow(name=name)
    workflow.connect(
        [
            (inputnode, plot_registration, [("registered", "in_file")]),
            (
                inputnode,
                plot_enhancement,
                [("registered", "before"), ("enhanced", "after"), ("coverage", "coverage")],
            ),
            (inputnode, summarize, [("sidecar", "sidecar")]),
        ]
    )
    for field, node in (
        ("registration", plot_registration),
        ("enhancement", plot_enhancement),
        ("summary", summarize),
    ):
        sink = _sink(f"ds_{field}", output_dir / getattr(names, field))
        workflow.connect(node, "out_file", sink, "in_file")
    return workflow
