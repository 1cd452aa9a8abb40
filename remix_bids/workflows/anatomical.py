"""The way of one T1w image.

validate -> register -> to MNI grid -> select expert -> enhance -> [back to native]
-> consistency and quality -> derivatives and figures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nipype import IdentityInterface, Node, Workflow

from remix_bids.config import NATIVE
from remix_bids.interfaces.bids import Describe, ValidateT1w
from remix_bids.interfaces.experts import Enhance, SelectExpert
from remix_bids.interfaces.qc import (
    CheckConsistency,
    CheckHeader,
    CollectQC,
    CompareLeftOut,
    DescribeNative,
    DropSlices,
    EnforceConsistency,
    MeasureQuality,
    ToNative,
)
from remix_bids.interfaces.resample import ToWorkingGrid
from remix_bids.interfaces.timing import TimedEnhance, TimedRegistration
from remix_bids.naming import OutputNames
from remix_bids.templates import Template
from remix_bids.workflows.memory import ENHANCE_GB, UNKNOWN, Footprint
from remix_bids.workflows.outputs import init_derivatives_wf, init_figures_wf


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
    spaces: tuple[str, ...] = ("MNI152Lin",),
    enforce_consistency: bool = False,
    leave_slices_out: bool = False,
    skull_stripped: bool | None = None,
    slice_thickness: float | None = None,
    footprint: Footprint = UNKNOWN,
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
    spaces : tuple of str
        Spaces to write images in: 'T1w' (native) and that of the template.
    enforce_consistency : bool
        A consistency step after every expert, not only after those that ask for one.
    leave_slices_out : bool
        Also restore the scan from half of its slices, as a test.
    skull_stripped : bool, optional
        What the image's own sidecar says.
    slice_thickness : float, optional
        mm, as the image's own sidecar says.
    footprint : Footprint
        Of the scan, as its header says.
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
    validate = Node(ValidateT1w(in_file=str(source)), name="validate", mem_gb=footprint.validate_gb)
    register = Node(
        TimedRegistration(
            fixed_image=str(template.t1w),
            template_skull_stripped=template.skull_stripped,
            random_seed=random_seed,
            num_threads=omp_nthreads,
            sloppy=sloppy,
        ),
        name="register",
        n_procs=omp_nthreads,
        mem_gb=heavy_gb or footprint.register_gb(omp_nthreads),
    )
    to_mni = Node(
        ToWorkingGrid(template=str(template.t1w)),
        name="to_mni",
        mem_gb=heavy_gb or footprint.resample_gb,
    )
    if template.brain_mask is not None:
        register.inputs.fixed_image_mask = str(template.brain_mask)
        to_mni.inputs.template_mask = str(template.brain_mask)
    if skull_stripped is not None:
        register.inputs.skull_stripped = skull_stripped
    if slice_thickness is not None:
        to_mni.inputs.slice_thickness = slice_thickness
    select_expert = Node(
        SelectExpert(
            experts_table=str(experts_table),
            expert=expert,
            gate=gate,
            least_steps=int(enforce_consistency),
        ),
        name="select_expert",
        mem_gb=0.1,
    )
    enhance = Node(
        TimedEnhance(device=device, use_gpu=use_gpu),
        name="enhance",
        n_procs=1,
        mem_gb=heavy_gb or ENHANCE_GB,
    )
    describe = Node(
        Describe(static=static), name="describe", run_without_submitting=True, mem_gb=0.01
    )
    place = {"template": str(template.t1w)}
    if template.brain_mask is not None:
        place["template_mask"] = str(template.brain_mask)
    thick = {} if slice_thickness is None else {"thickness": slice_thickness}
    consistency = Node(
        CheckConsistency(**place, **thick), name="consistency", mem_gb=heavy_gb or footprint.qc_gb
    )
    quality = Node(MeasureQuality(**place), name="quality", mem_gb=heavy_gb or footprint.qc_gb)
    check_header = Node(CheckHeader(), name="check_header", mem_gb=footprint.validate_gb)
    label = source.name.partition(".")[0]
    collect = Node(
        CollectQC(source=label), name="collect", run_without_submitting=True, mem_gb=0.01
    )
    native = NATIVE in spaces
    derivatives = init_derivatives_wf(
        names=names, output_dir=output_dir, standard=spaces != (NATIVE,), native=native
    )
    figures = init_figures_wf(
        names=names, output_dir=output_dir, template=template, source=label, native=native
    )
    enforce = Node(EnforceConsistency(**thick), name="enforce", mem_gb=heavy_gb or footprint.qc_gb)
    workflow = Workflow(name=name)
    scan = [("out_file", "native")]
    affine = [("forward_transform", "transform")]
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
                    ("rest", "rest"),
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
                    ("seconds", "registration_seconds"),
                ],
            ),
            (
                to_mni,
                describe,
                [
                    ("brain_coverage", "brain_coverage"),
                    ("slice_width", "slice_width"),
                    ("warnings", "coverage_warnings"),
                ],
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
                [
                    ("device", "device"),
                    ("intensity_scaling", "intensity_scaling"),
                    ("seconds", "enhancement_seconds"),
                ],
            ),
            # What is written and shown is the network's output after its expert's steps.
            (validate, enforce, scan),
            (register, enforce, affine),
            (to_mni, enforce, [("coverage", "coverage")]),
            (enhance, enforce, [("out_file", "enhanced")]),
            (select_expert, enforce, [("consistency_steps", "steps")]),
            (select_expert, describe, [("consistency_steps", "consistency_steps")]),
            (enforce, describe, [("share", "consistency_share")]),
            (enforce, consistency, [("out_file", "enforced")]),
            (validate, consistency, scan),
            (register, consistency, affine),
            (to_mni, consistency, [("coverage", "coverage")]),
            (enhance, consistency, [("out_file", "enhanced")]),
            (validate, quality, scan),
            (register, quality, affine),
            (
                to_mni,
                quality,
                [("out_file", "before"), ("estimate", "estimate"), ("coverage", "coverage")],
            ),
            (enhance, quality, [("out_file", "enhanced")]),
            (enforce, quality, [("out_file", "after")]),
            (validate, check_header, [("out_file", "in_file"), ("warnings", "remarks")]),
            (describe, collect, [("out_file", "sidecar")]),
            (consistency, collect, [("out_file", "consistency")]),
            (quality, collect, [("out_file", "quality")]),
            (collect, derivatives, [("out_file", "inputnode.qc")]),
            (
                register,
                derivatives,
                [
                    ("forward_transform", "inputnode.forward_transform"),
                    ("inverse_transform", "inputnode.inverse_transform"),
                ],
            ),
            (validate, figures, [("out_file", "inputnode.native")]),
            (register, figures, [("forward_transform", "inputnode.transform")]),
            (
                to_mni,
                figures,
                [("out_file", "inputnode.registered"), ("coverage", "inputnode.coverage")],
            ),
            (enforce, figures, [("out_file", "inputnode.enhanced")]),
            (
                consistency,
                figures,
                [("chi2", "inputnode.chi2"), ("unknowable", "inputnode.unknowable")],
            ),
            (describe, figures, [("out_file", "inputnode.sidecar")]),
            (check_header, figures, [("out_file", "inputnode.header")]),
            (collect, figures, [("out_file", "inputnode.qc")]),
        ]
    )
    if spaces != (NATIVE,):
        workflow.connect(
            [
                (enforce, derivatives, [("out_file", "inputnode.image")]),
                (describe, derivatives, [("out_file", "inputnode.sidecar")]),
            ]
        )
    if native:
        to_native = Node(ToNative(), name="to_native", mem_gb=heavy_gb or footprint.qc_gb)
        describe_native = Node(
            DescribeNative(), name="describe_native", run_without_submitting=True, mem_gb=0.01
        )
        workflow.connect(
            [
                (validate, to_native, scan),
                (register, to_native, affine),
                (to_mni, to_native, [("out_file", "before")]),
                (enforce, to_native, [("out_file", "after")]),
                (describe, describe_native, [("out_file", "in_file")]),
                (
                    to_native,
                    describe_native,
                    [("shape", "shape"), ("enhanced_fraction", "enhanced_fraction")],
                ),
                (to_native, derivatives, [("out_file", "inputnode.native_image")]),
                (describe_native, derivatives, [("out_file", "inputnode.native_sidecar")]),
                (
                    to_native,
                    figures,
                    [
                        ("out_file", "inputnode.in_native"),
                        ("part", "inputnode.part"),
                        ("enhanced_fraction", "inputnode.enhanced_fraction"),
                    ],
                ),
            ]
        )
    if leave_slices_out:
        left_out = init_leave_out_wf(
            template=template,
            experts_table=experts_table,
            expert=expert,
            gate=gate,
            enforce_consistency=enforce_consistency,
            slice_thickness=slice_thickness,
            device=device,
            heavy_gb=heavy_gb,
            footprint=footprint,
        )
        workflow.connect(
            [
                (validate, left_out, [("out_file", "inputnode.native")]),
                (register, left_out, [("forward_transform", "inputnode.transform")]),
                (left_out, collect, [("compare.out_file", "left_out")]),
            ]
        )
    return workflow


def init_leave_out_wf(
    *,
    template: Template,
    experts_table: Path,
    expert: str = "auto",
    gate: str = "effective",
    enforce_consistency: bool = False,
    slice_thickness: float | None = None,
    device: str = "cpu",
    heavy_gb: float | None = None,
    footprint: Footprint = UNKNOWN,
    name: str = "leave_out_wf",
) -> Workflow:
    """Restore a scan from every second slice, and hold the others against that.

    Parameters
    ----------
    template, experts_table, expert, gate, enforce_consistency, slice_thickness, device, heavy_gb,
    footprint
        As in `init_anat_remix_wf`; the gate sees the doubled spacing.

    Inputs
    ------
    native, transform
        The whole scan, and its affine from the template.
    """
    inputnode = Node(IdentityInterface(fields=["native", "transform"]), name="inputnode")
    drop = Node(DropSlices(), name="drop", mem_gb=footprint.validate_gb)
    to_mni = Node(
        ToWorkingGrid(template=str(template.t1w)),
        name="to_mni",
        mem_gb=heavy_gb or footprint.resample_gb,
    )
    select_expert = Node(
        SelectExpert(
            experts_table=str(experts_table),
            expert=expert,
            gate=gate,
            least_steps=int(enforce_consistency),
        ),
        name="select_expert",
        mem_gb=0.1,
    )
    enhance = Node(
        Enhance(device=device, use_gpu=device.startswith("cuda")),
        name="enhance",
        n_procs=1,
        mem_gb=heavy_gb or ENHANCE_GB,
    )
    enforce = Node(EnforceConsistency(), name="enforce", mem_gb=heavy_gb or footprint.qc_gb)
    compare = Node(
        CompareLeftOut(template=str(template.t1w)),
        name="compare",
        mem_gb=heavy_gb or footprint.qc_gb,
    )
    if template.brain_mask is not None:
        to_mni.inputs.template_mask = compare.inputs.template_mask = str(template.brain_mask)
    workflow = Workflow(name=name)
    if slice_thickness is not None:
        drop.inputs.thickness = compare.inputs.thickness = slice_thickness
    workflow.connect(
        [
            (inputnode, drop, [("native", "in_file")]),
            (inputnode, to_mni, [("transform", "transform")]),
            (inputnode, compare, [("native", "native"), ("transform", "transform")]),
            (drop, to_mni, [("out_file", "in_file"), ("thickness", "slice_thickness")]),
            (drop, enforce, [("thickness", "thickness")]),
            (drop, select_expert, [("out_file", "in_file")]),
            (drop, compare, [("out_file", "kept")]),
            (
                to_mni,
                enhance,
                [
                    ("out_file", "in_file"),
                    ("estimate", "estimate"),
                    ("rest", "rest"),
                    ("coverage", "coverage"),
                ],
            ),
            (drop, enhance, [("out_file", "native")]),
            (inputnode, enhance, [("transform", "transform")]),
            (
                select_expert,
                enhance,
                [
                    ("expert", "expert"),
                    ("expert_file", "expert_file"),
                    ("expert_sha256", "expert_sha256"),
                ],
            ),
            (to_mni, compare, [("coverage", "coverage")]),
            (drop, enforce, [("out_file", "native")]),
            (inputnode, enforce, [("transform", "transform")]),
            (to_mni, enforce, [("coverage", "coverage")]),
            (enhance, enforce, [("out_file", "enhanced")]),
            (select_expert, enforce, [("consistency_steps", "steps")]),
            (enforce, compare, [("out_file", "enhanced")]),
        ]
    )
    return workflow
