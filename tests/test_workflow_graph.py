"""Graphs built from BIDS skeletons, without data: one branch per scan, nothing crosses."""

from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch
from nipype import IdentityInterface

from remix_bids.config import RunConfig
from remix_bids.errors import GraphError
from remix_bids.inputs import collect_scans
from remix_bids.interfaces.bids import DerivativesSink
from remix_bids.spatial import _tabulate
from remix_bids.templates import NILEARN_SPACE, Template
from remix_bids.workflows.base import init_remix_wf, static_metadata
from remix_bids.workflows.memory import Footprint
from tests.bids_skeletons import make_dataset, save_image

SKELETONS = {
    "plain": ["sub-01_T1w.nii.gz"],
    "sessions": ["sub-01_ses-a_T1w.nii.gz", "sub-01_ses-b_T1w.nii.gz"],
    "runs": ["sub-01_run-1_T1w.nii.gz", "sub-01_run-2_T1w.nii.gz", "sub-01_T1w.nii.gz"],
    "acquisitions": ["sub-01_acq-ax_T1w.nii.gz", "sub-01_acq-cor_T1w.nii.gz"],
    "contrast": ["sub-01_T1w.nii.gz", "sub-01_ce-gad_T1w.nii.gz", "sub-01_ce-gad_rec-x_T1w.nii"],
    "odd": ["sub-01_echo-1_part-mag_T1w.nii.gz", "sub-01_echo-1_part-mag_chunk-2_T1w.nii.gz"],
    "many": ["sub-01_ses-a_T1w.nii.gz", "sub-02_T1w.nii.gz", "sub-1_T1w.nii.gz"],
}
# The way of one T1w image: DESIGN section 3.
STEPS = ["validate", "register", "to_mni", "select_expert", "enhance", "enforce", "describe"]
STEPS += ["check_header", "consistency", "quality", "collect"]
ARROWS = [
    ("validate", "register"),
    ("register", "to_mni"),
    ("to_mni", "enhance"),
    ("select_expert", "enhance"),
    ("enhance", "enforce"),
    ("select_expert", "enforce"),
    ("enforce", "derivatives_wf"),
    ("enforce", "figures_wf"),
    ("enhance", "consistency"),
    ("enforce", "quality"),
    ("collect", "derivatives_wf"),
]


def build(root, names, **settings):
    bids = make_dataset(root / "bids", names)
    for name in ("T1w.nii.gz", "mask.nii.gz", "experts.toml"):
        (root / name).open("a").close()  # leaves the time of an existing file alone
    config = RunConfig(
        bids, root / "out", work_dir=root / "work", run_uuid="run", mem_gb=8.0, nprocs=2, **settings
    )
    template = Template("MNI152Lin", root / "T1w.nii.gz", root / "mask.nii.gz", False)
    scans = collect_scans(config, {})
    workflow = init_remix_wf(
        config=config, scans=scans, template=template, experts_table=root / "experts.toml"
    )
    return workflow, scans, config


def real_nodes(workflow):
    nodes = {name: workflow.get_node(name) for name in workflow.list_node_names()}
    return {
        n: node for n, node in nodes.items() if not isinstance(node.interface, IdentityInterface)
    }


@pytest.mark.parametrize("names", SKELETONS.values(), ids=SKELETONS)
def test_one_complete_branch_per_scan(tmp_path, names):
    workflow, scans, _ = build(tmp_path, names)
    assert sorted(scan.path.name for scan in scans) == sorted(names)
    nodes = real_nodes(workflow)
    branches = {tuple(name.split(".")[:2]) for name in nodes}
    assert len(branches) == len(names)
    for subject, scan in branches:
        steps = {name.split(".")[2] for name in nodes if name.startswith(f"{subject}.{scan}.")}
        assert steps == {*STEPS, "derivatives_wf", "figures_wf"}
    # Nothing is written twice: image, sidecar, two transforms, figures of quality, ten reportlets.
    targets = [
        n.inputs.out_path for n in nodes.values() if isinstance(n.interface, DerivativesSink)
    ]
    assert len(targets) == len(set(targets)) == 15 * len(names)
    # The expanded graph has as many connected parts as there are scans: nothing crosses.
    import networkx as nx

    graph = workflow._create_flat_graph()
    assert nx.number_weakly_connected_components(graph) == len(names)


def names_of(workflow):
    return {
        Path(node.inputs.out_path).name
        for node in real_nodes(workflow).values()
        if isinstance(node.interface, DerivativesSink)
    }


def test_native_space(tmp_path):
    native, standard = "sub-01_desc-remix_T1w", "sub-01_space-MNI152Lin_res-1_desc-remix_T1w"
    both, _, _ = build(tmp_path, SKELETONS["plain"], output_spaces=("MNI152Lin", "T1w"))
    expected = {f"{stem}{end}" for stem in (native, standard) for end in (".nii.gz", ".json")}
    assert expected <= names_of(both)
    assert "sub-01_desc-native_T1w.svg" in names_of(both)
    alone, _, _ = build(tmp_path, SKELETONS["plain"], output_spaces=("T1w",))
    assert names_of(both) - names_of(alone) == {f"{standard}.nii.gz", f"{standard}.json"}
    alone, _, _ = build(tmp_path, SKELETONS["plain"])
    assert not {name for name in names_of(alone) if name.startswith(native)}


def test_consistency_is_checked_before_it_is_enforced(tmp_path):
    workflow, _, _ = build(tmp_path, SKELETONS["plain"])
    scan_wf = workflow.get_node("sub_01_wf.sub_01_T1w_wf")
    edges = {
        (a.name, b.name, target)
        for a, b, data in scan_wf._graph.edges(data=True)
        for _, target in data["connect"]
    }
    assert ("enhance", "consistency", "enhanced") in edges
    assert ("enforce", "consistency", "enforced") in edges
    # What is written and shown is the enforced image, and nothing else.
    assert ("enforce", "derivatives_wf", "inputnode.image") in edges
    assert ("enforce", "figures_wf", "inputnode.enhanced") in edges
    assert ("enforce", "quality", "after") in edges
    assert not {edge for edge in edges if edge[:2] == ("enhance", "derivatives_wf")}


@pytest.mark.parametrize("asked", [False, True])
def test_a_step_of_consistency_may_be_asked_for(tmp_path, asked):
    workflow, _, _ = build(
        tmp_path, SKELETONS["plain"], enforce_consistency=asked, leave_slices_out=True
    )
    for name in ("sub_01_wf.sub_01_T1w_wf", "sub_01_wf.sub_01_T1w_wf.leave_out_wf"):
        assert workflow.get_node(f"{name}.select_expert").inputs.least_steps == asked


def test_leaving_slices_out_is_a_way_of_its_own(tmp_path):
    plain, _, _ = build(tmp_path, SKELETONS["plain"])
    workflow, _, _ = build(tmp_path, SKELETONS["plain"], leave_slices_out=True)
    more = set(real_nodes(workflow)) - set(real_nodes(plain))
    assert {name.split(".", 2)[2] for name in more} == {
        f"leave_out_wf.{name}"
        for name in ("drop", "to_mni", "select_expert", "enhance", "enforce", "compare")
    }
    assert names_of(workflow) == names_of(plain)


@pytest.mark.parametrize("sides", [(0.45, 0.45, 6.0), (1.0, 1.0, 1.2), (2.0, 2.0, 2.0)])
def test_the_table_is_as_large_as_declared(tmp_path, sides):
    scan = save_image(
        tmp_path / "scan.nii.gz", np.ones((30, 32, 8), np.uint8), np.diag([*sides, 1])
    )
    to_scan = np.diag([*(1 / np.array(sides)), 1.0])
    table, _ = _tabulate(torch.ones(30, 32, 8), to_scan, (100, 100, 100))
    assert table.numel() == Footprint.of(scan).nodes


def test_the_affine_tells_sizes_where_the_header_says_otherwise(tmp_path):
    scan = save_image(
        tmp_path / "scan.nii", np.ones((30, 32, 8), np.uint8), np.diag([0.5, 0.5, 5, 1])
    )
    right = Footprint.of(scan)
    with scan.open("r+b") as file:
        file.seek(76 + 4)  # pixdim[1:4]
        file.write(np.ones(3, "<f4").tobytes())
    assert nb.load(scan).header.get_zooms() == (1, 1, 1)
    assert Footprint.of(scan) == right


def test_large_matrices_ask_for_more_memory(tmp_path):
    """Thick slices on a fine matrix are tabulated at every half millimetre, too."""
    spaces = ("MNI152Lin", "T1w")
    names = ("validate", "register", "to_mni", "consistency", "enforce", "to_native")
    names = (*names, "leave_out_wf.to_mni", "leave_out_wf.compare")

    def asked(**settings):
        more = {"leave_slices_out": True, "output_spaces": spaces, **settings}
        workflow = build(tmp_path, SKELETONS["plain"], **more)[0]
        nodes = (workflow.get_node(f"sub_01_wf.sub_01_T1w_wf.{name}") for name in names)
        return {name: node.mem_gb for name, node in zip(names, nodes, strict=True)}

    small = asked()
    path = tmp_path / "bids/sub-01/anat/sub-01_T1w.nii.gz"
    save_image(path, np.zeros((512, 512, 28), np.uint8), np.diag([0.45, 0.45, 6, 1]))
    thick = asked()
    assert all(small[name] < thick[name] for name in names)
    # What was measured of the functions in them, in GB.
    assert thick["to_mni"] > 1.9
    assert thick["to_native"] > 2.1
    assert thick["consistency"] > 1.9
    low = asked(low_mem=True)
    assert {low[name] for name in names} == {8.0, low["validate"]}


def test_slice_thickness_of_the_sidecar_is_used(tmp_path):
    bids = make_dataset(tmp_path / "bids", SKELETONS["plain"])
    (bids / "sub-01/anat/sub-01_T1w.json").write_text('{"SliceThickness": 4.5}')
    workflow, scans, _ = build(tmp_path, SKELETONS["plain"])
    assert scans[0].slice_thickness == 4.5
    node = workflow.get_node("sub_01_wf.sub_01_T1w_wf.consistency")
    assert node.inputs.thickness == 4.5


def test_the_sidecar_tells_where_the_template_is(tmp_path):
    """A name is no address: BIDS asks for one that leads somewhere, or for none."""
    _, scans, config = build(tmp_path, SKELETONS["plain"])
    file = Path("tpl-MNI152Lin_res-01_T1w.nii.gz")
    for space, address in (
        ("MNI152Lin", f"https://templateflow.s3.amazonaws.com/tpl-MNI152Lin/{file}"),
        (NILEARN_SPACE, None),
    ):
        template = Template(space, file, None, skull_stripped=False)
        told = static_metadata(config=config, scan=scans[0], template=template)
        assert told["TemplateFile"] == file.name
        assert told.get("SpatialReference") == address


def test_reads_like_the_design(tmp_path):
    workflow, _, _ = build(tmp_path, SKELETONS["plain"])
    scan_wf = workflow.get_node("sub_01_wf.sub_01_T1w_wf")
    edges = {(a.name, b.name) for a, b in scan_wf._graph.edges()}
    assert set(ARROWS) <= edges
    import networkx as nx

    assert nx.is_directed_acyclic_graph(scan_wf._graph)


def test_crash_files_go_to_the_subject(tmp_path):
    workflow, _, config = build(tmp_path, SKELETONS["many"])
    for name, node in real_nodes(workflow).items():
        label = {"sub_01_wf": "01", "sub_02_wf": "02", "sub_1_wf": "1"}[name.split(".")[0]]
        folder = node.config["execution"]["crashdump_dir"]
        assert folder == str(config.output_dir / f"sub-{label}" / "log" / "run")
        assert node.config["execution"]["crashfile_format"] == "txt"


def test_resources_do_not_enter_the_hash(tmp_path):
    def hashes(root, **settings):
        workflow, _, _ = build(root, SKELETONS["plain"], **settings)
        return {n: node.inputs.get_hashval()[1] for n, node in real_nodes(workflow).items()}

    few = hashes(tmp_path, omp_nthreads=1, device="cpu")
    many = hashes(tmp_path, omp_nthreads=8, device="cuda:0", low_mem=True)
    assert few == many
    other = hashes(tmp_path, random_seed=1)
    assert {name.split(".")[2] for name in few if few[name] != other[name]} >= {"register"}


def test_resources_are_declared(tmp_path):
    workflow, _, _ = build(tmp_path, SKELETONS["plain"], omp_nthreads=2)
    nodes = real_nodes(workflow)
    heavy = {name.split(".")[-1]: node for name, node in nodes.items()}
    assert heavy["register"].n_procs == 2
    assert heavy["enhance"].n_procs == 1  # more threads would round otherwise
    assert not heavy["enhance"].is_gpu_node()
    assert heavy["enhance"].mem_gb > 1
    assert all(heavy[n].run_without_submitting for n in heavy if n.startswith("ds_"))
    workflow, _, _ = build(tmp_path, SKELETONS["plain"], omp_nthreads=2, device="cuda")
    enhance = workflow.get_node("sub_01_wf.sub_01_T1w_wf.enhance")
    assert enhance.is_gpu_node()
    assert enhance.n_procs == 1


def test_low_mem_runs_heavy_nodes_alone(tmp_path):
    workflow, _, config = build(tmp_path, SKELETONS["plain"], low_mem=True)
    scan_wf = workflow.get_node("sub_01_wf.sub_01_T1w_wf")
    for name in ("register", "enhance"):
        assert scan_wf.get_node(name).mem_gb == config.mem_gb


def test_collision(tmp_path):
    with pytest.raises(GraphError, match=r"sub-01_T1w\.nii.*sub-01_T1w\.nii\.gz"):
        build(tmp_path, ["sub-01_T1w.nii", "sub-01_T1w.nii.gz"])
