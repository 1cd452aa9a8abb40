"""The way of one T1w image.

validate -> register -> to MNI grid -> select expert -> enhance -> derivatives and figures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nipype import Node, Workflow

from remix_bids.interfaces.ants import AffineRegistration
from remix_bids.interfaces.bids import Describe, ValidateT1w
from remix_bids.interfaces.experts import Enhance, SelectExpert
from remix_bids.interfaces.resample import ToWorkingGrid
from remix_bids.naming import OutputNames
from remix_bids.templates import Template
from remix_bids.workflows.outputs import init_derivatives_wf, init_figures_wf

# Peak memory in GB, measured with --resource-monitor on the seven clinical scans at hand (0.1, 0.8
# with two starts side by side, 0.8, 1.6), and a margin for larger images.
VALIDATE_GB, RESAMPLE_GB, ENHANCE_GB = 0.3, 1.5, 2.5
REGISTER_GB, REGISTER_GB_PER_START = 0.5, 0.4


def init_anat_remix_wf(
    *,
    source: Path,
    names: OutputNames,
    output_dir: Path,
    template: Template,
    experts_table: Path,
    static: dict[str, Any],
    expert: str = "auto",
    gate: str = "effective",
    skull_stripped: bool | None = None,
    slice_thickness: float | None = None,
    random_seed: int = 0,
    device: str = "cpu",
    omp_nthreads: int = 1,
    heavy_gb: float | None = None,
    sloppy: bool = False,
    name: str = "anat_remix_wf",
) -> Workflow:
    """Super-resolve one T1w image.

    Parameters
    ----------
    source : Path
        The T1w image.
    names : OutputNames
        Where everything goes, below ``output_dir``.
    output_dir : Path
    template : Template
        What to register to.
    experts_table : Path
        ``experts.toml``.
    static : dict
        Sidecar keys known before the run.
    expert, gate : str
        As on the command line.
    skull_stripped : bool, optional
        What the image's own sidecar says.
    slice_thickness : float, optional
        mm, as the image's own sidecar says.
    random_seed : int
    device : str
        'cpu', 'cuda' or 'cuda:N'.
    omp_nthreads : int
        Processors for one heavy node.
    heavy_gb : float, optional
        Declare this much memory for heavy nodes, so that only one runs at a time.
    sloppy : bool
        For tests.
    """
    use_gpu = device.startswith("cuda")
    validate = Node(ValidateT1w(in_file=str(source)), name="validate", mem_gb=VALIDATE_GB)
    register = Node(
        AffineRegistration(
            fixed_image=str(template.t1w),
            template_skull_stripped=template.skull_stripped,
            random_seed=random_seed,
            num_threads=omp_nthreads,
            sloppy=sloppy,
        ),
        name="register",
        n_procs=omp_nthreads,
        mem_gb=heavy_gb or REGISTER_GB + REGISTER_GB_PER_START * omp_nthreads,
    )
    to_mni = Node(ToWorkingGrid(template=str(template.t1w)), name="to_mni", mem_gb=RESAMPLE_GB)
    if template.brain_mask is not None:
        register.inputs.fixed_image_mask = str(template.brain_mask)
        to_mni.inputs.template_mask = str(template.brain_mask)
    if skull_stripped is not None:
        register.inputs.skull_stripped = skull_stripped
    if slice_thickness is not None:
        to_mni.inputs.slice_thickness = slice_thickness
    select_expert = Node(
        SelectExpert(experts_table=str(experts_table), expert=expert, gate=gate),
        name="select_expert",
        mem_gb=0.1,
    )
    enhance = Node(
        Enhance(device=device, use_gpu=use_gpu),
        name="enhance",
        n_procs=1,
        mem_gb=heavy_gb or ENHANCE_GB,
    )
    describe = Node(
        Describe(static=static), name="describe", run_without_submitting=True, mem_gb=0.01
    )
    derivatives = init_derivatives_wf(names=names, output_dir=output_dir)
    figures = init_figures_wf(
        names=names,
        output_dir=output_dir,
        template=template,
        source=source.name.partition(".")[0],
    )
    workflow = Workflow(name=name)
    workflow.connect(
        [
            (validate, register, [("out_file", "moving_image")]),
            (validate, to_mni, [("out_file", "in_file")]),
            (register, to_mni, [("forward_transform", "transform")]),
            (validate, select_expert, [("out_file", "in_file")]),
            (
                to_mni,
                enhance,
                [
                    ("out_file", "in_file"),
                    ("estimate", "estimate"),
                    ("coverage", "coverage"),
                ],
            ),
            (validate, enhance, [("out_file", "native")]),
            (register, enhance, [("forward_transform", "transform")]),
            (
                select_expert,
                enhance,
                [
                    ("expert", "expert"),
                    ("expert_file", "expert_file"),
                    ("expert_sha256", "expert_sha256"),
                ],
            ),
            (validate, describe, [("warnings", "validation_warnings")]),
            (
                register,
                describe,
                [
                    ("skull_stripped", "skull_stripped"),
                    ("score", "registration_score"),
                    ("determinant", "affine_determinant"),
                    ("warnings", "registration_warnings"),
                ],
            ),
            (
                to_mni,
                describe,
                [("brain_coverage", "brain_coverage"), ("warnings", "coverage_warnings")],
            ),
            (
                select_expert,
                describe,
                [
                    ("expert", "expert"),
                    ("expert_sha256", "expert_sha256"),
                    ("voxel_size", "voxel_size"),
                    ("voxel_volume", "voxel_volume"),
                    ("effective_voxel_volume", "effective_voxel_volume"),
                    ("warnings", "expert_warnings"),
                ],
            ),
            (
                enhance,
                describe,
                [("device", "device"), ("intensity_scaling", "intensity_scaling")],
            ),
            (enhance, derivatives, [("out_file", "inputnode.image")]),
            (describe, derivatives, [("out_file", "inputnode.sidecar")]),
            (
                register,
                derivatives,
                [
                    ("forward_transform", "inputnode.forward_transform"),
                    ("inverse_transform", "inputnode.inverse_transform"),
                ],
            ),
            (
                to_mni,
                figures,
                [("out_file", "inputnode.registered"), ("coverage", "inputnode.coverage")],
            ),
            (enhance, figures, [("out_file", "inputnode.enhanced")]),
            (describe, figures, [("out_file", "inputnode.sidecar")]),
        ]
    )
    return workflow
