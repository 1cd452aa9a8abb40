"""What one scan leaves in the output folder."""

from __future__ import annotations

from pathlib import Path

from nipype import IdentityInterface, Node, Workflow

from remix_bids.interfaces.bids import DerivativesSink
from remix_bids.interfaces.reports import (
    PlotConsistency,
    PlotDifference,
    PlotEnhancement,
    PlotNative,
    PlotRegistration,
    Summarize,
    Tabulate,
)
from remix_bids.naming import OutputNames
from remix_bids.templates import Template

FIGURE_GB = 1.0


def _sink(name: str, path: Path) -> Node:
    return Node(
        DerivativesSink(out_path=str(path)), name=name, run_without_submitting=True, mem_gb=0.01
    )


def init_derivatives_wf(
    *,
    names: OutputNames,
    output_dir: Path,
    standard: bool = True,
    native: bool = False,
    name: str = "derivatives_wf",
) -> Workflow:
    """Write images, their sidecars, both transforms and the figures of quality.

    Parameters
    ----------
    names : OutputNames
        Where everything goes, below ``output_dir``.
    output_dir : Path
    standard, native : bool
        Write the image in template space, in native space.

    Inputs
    ------
    image, sidecar, native_image, native_sidecar, forward_transform, inverse_transform, qc
        Files.
    """
    fields = ["forward_transform", "inverse_transform", "qc"]
    fields += ["image", "sidecar"] * standard + ["native_image", "native_sidecar"] * native
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
    native: bool = False,
    name: str = "figures_wf",
) -> Workflow:
    """Draw and write the figures and tables of the report.

    Parameters
    ----------
    names : OutputNames
        Where everything goes, below ``output_dir``.
    output_dir : Path
    template : Template
    source : str
        What the scan is called in the summary.
    native : bool
        Also the output in native space.

    Inputs
    ------
    native, transform
        The scan, and its affine from the template.
    registered, enhanced, coverage, chi2, unknowable
        Volumes on the working grid.
    in_native, part, enhanced_fraction
        The output in native space, and what of it was enhanced.
    sidecar, qc, header
        JSON, JSON, HTML.
    """
    fields = ["native", "transform", "registered", "enhanced", "coverage", "chi2", "unknowable"]
    fields += ["in_native", "part", "enhanced_fraction"] * native + ["sidecar", "qc", "header"]
    inputnode = Node(IdentityInterface(fields=fields), name="inputnode")
    place = {"template": str(template.t1w)}
    if template.brain_mask is not None:
        place["template_mask"] = str(template.brain_mask)
    plot_registration = Node(PlotRegistration(**place), name="plot_registration", mem_gb=FIGURE_GB)
    plot_enhancement = Node(PlotEnhancement(**place), name="plot_enhancement", mem_gb=FIGURE_GB)
    plot_difference = Node(PlotDifference(**place), name="plot_difference", mem_gb=FIGURE_GB)
    plot_consistency = Node(PlotConsistency(**place), name="plot_consistency", mem_gb=FIGURE_GB)
    tabulate = Node(Tabulate(), name="tabulate", run_without_submitting=True, mem_gb=0.01)
    summarize = Node(
        Summarize(source=source), name="summarize", run_without_submitting=True, mem_gb=0.01
    )
    workflow = Workflow(name=name)
    covered = ("coverage", "coverage")
    workflow.connect(
        [
            (inputnode, plot_registration, [("registered", "in_file")]),
            (
                inputnode,
                plot_enhancement,
                [("native", "native"), ("transform", "transform"), ("enhanced", "after"), covered],
            ),
            (
                inputnode,
                plot_difference,
                [("registered", "before"), ("enhanced", "after"), covered],
            ),
            (
                inputnode,
                plot_consistency,
                [
                    ("enhanced", "after"),
                    ("chi2", "chi2"),
                    ("unknowable", "unknowable"),
                    covered,
                ],
            ),
            (inputnode, summarize, [("sidecar", "sidecar")]),
            (inputnode, tabulate, [("qc", "in_file")]),
        ]
    )
    drawn = [
        ("summary", summarize, "out_file"),
        ("header", inputnode, "header"),
        ("registration", plot_registration, "out_file"),
        ("enhancement", plot_enhancement, "out_file"),
        ("difference", plot_difference, "out_file"),
        ("changes", plot_difference, "changes"),
        ("consistency", tabulate, "consistency"),
        ("consistency_map", plot_consistency, "out_file"),
        ("unknowable", plot_consistency, "unknowable"),
        ("quality", tabulate, "quality"),
    ]
    if native:
        plot_native = Node(PlotNative(), name="plot_native", mem_gb=FIGURE_GB)
        workflow.connect(
            [
                (
                    inputnode,
                    plot_native,
                    [("native", "native"), ("in_native", "after"), ("part", "part")],
                ),
                (inputnode, summarize, [("enhanced_fraction", "enhanced_fraction")]),
            ]
        )
        drawn.append(("native", plot_native, "out_file"))
    for field, node, port in drawn:
        sink = _sink(f"ds_{field}", output_dir / getattr(names, field))
        workflow.connect(node, port, sink, "in_file")
    return workflow
