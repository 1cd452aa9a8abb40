"""A killed worker must cost one node, not the run."""

import multiprocessing
import os
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from nipype import Function, Node, Rename, Workflow
from nipype.pipeline.plugins.multiproc import MultiProcPlugin

from remix_bids.config import RunConfig
from remix_bids.inputs import Scan
from remix_bids.workflows.plugin import HOLES, RemixMultiProcPlugin
from remix_bids.workflows.run import _outcome, explain
from tests.commands import has_ended


def kill_self(value):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return value


def kill_self_leaving_a_child(value):
    import os
    import signal
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    with open("../child.txt", "w") as file:
        file.write(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)
    return value


def kill_the_run(value):
    import multiprocessing
    import os
    import signal
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    with open("../pids.txt", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
    child.wait()
    return value


def leave(value):
    import os

    os._exit(3)
    return value


def slowly_double(value):
    import time

    time.sleep(1.5)
    with open("../ran.txt", "a") as file:  # one letter per run of this node
        file.write("x")
    return 2 * value


def negate(value):
    return -value


def fail(value):
    raise ValueError("this node fails on purpose")


def build(tmp_path, bad=kill_self):
    workflow = Workflow("wf", base_dir=str(tmp_path / "work"))
    workflow.config["execution"].update(
        crashdump_dir=str(tmp_path / "crash"),
        crashfile_format="txt",
        poll_sleep_duration=0.1,
        check_version=False,
    )
    dying = Node(Function(function=bad, output_names=["out"]), name="dying")
    never = Node(Function(function=negate, output_names=["out"]), name="never")
    good = Node(Function(function=slowly_double, output_names=["out"]), name="good")
    after = Node(Function(function=negate, output_names=["out"]), name="after")
    dying.inputs.value = good.inputs.value = 21
    workflow.connect([(dying, never, [("out", "value")]), (good, after, [("out", "value")])])
    return workflow


def run(workflow, **plugin_args):
    plugin = RemixMultiProcPlugin({"n_procs": 2, "n_gpu_procs": 0, "memory_gb": 4, **plugin_args})
    start = time.monotonic()
    try:
        graph, error = workflow.run(plugin=plugin), None
    except Exception as exc:
        graph, error = None, exc
    return plugin, graph, error, time.monotonic() - start


def run_until_killed(tmp_path):
    run(build(tmp_path, kill_the_run))


@pytest.mark.parametrize(("bad", "how"), [(kill_self, "signal 9"), (leave, "exit status 3")])
def test_killed_worker(tmp_path, bad, how):
    plugin, _, error, seconds = run(build(tmp_path, bad))
    assert seconds < 30  # the stock plugin never returns
    assert error is not None
    assert [node.name for node, _, _ in plugin.failures] == ["dying"]
    (crash,) = (tmp_path / "crash").iterdir()
    assert "crash-" in crash.name
    assert "dying" in crash.name
    assert how in crash.read_text()
    # The other branch went to its end, and the node in flight beside the dying one ran once.
    assert (tmp_path / "work/wf/after/result_after.pklz").exists()
    assert (tmp_path / "work/wf/ran.txt").read_text() == "x"
    assert not (tmp_path / "work/wf/never/result_never.pklz").exists()
    assert (plugin.n_run, plugin.n_cached) == (2, 0)


def test_a_hole_in_the_working_folder_costs_one_branch_and_is_mended(tmp_path):
    """A file that one node has left for the next is gone, as after a cleaner of scratch folders."""
    (tmp_path / "scan.txt").write_text("voxels")

    def chain():
        workflow = build(tmp_path, negate)
        make = Node(Rename(in_file=tmp_path / "scan.txt", format_string="made.txt"), name="make")
        use = Node(Rename(format_string="used.txt"), name="use")
        workflow.connect(make, "out_file", use, "in_file")
        return workflow

    assert run(chain())[2] is None
    made = tmp_path / "work/wf/make/made.txt"
    made.unlink()
    (tmp_path / "work/wf/ran.txt").unlink()
    shutil.rmtree(tmp_path / "work/wf/good")  # so that there is something else to do
    plugin, _, error, _ = run(chain())
    assert error is not None
    assert [node.name for node, _, _ in plugin.failures] == ["use"]
    (crash,) = (tmp_path / "crash").iterdir()
    kind, why = explain(crash.read_text())
    assert kind == "RemixError"
    assert why in HOLES.format(node="wf.use")
    assert (tmp_path / "work/wf/ran.txt").read_text() == "x"
    assert run(chain())[2] is None
    assert made.exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks in /proc, which only Linux has")
def test_children_of_a_killed_worker_end_with_it(tmp_path):
    run(build(tmp_path, kill_self_leaving_a_child))
    pid = int((tmp_path / "work/wf/child.txt").read_text())
    assert has_ended(pid)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks in /proc, which only Linux has")
def test_workers_of_a_killed_run_end_with_it(tmp_path):
    """They would keep their memory, and wait for another node for ever."""
    spawn = multiprocessing.get_context("spawn")
    killed = spawn.Process(target=run_until_killed, args=(tmp_path,))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert all(has_ended(int(pid)) for pid in (tmp_path / "work/wf/pids.txt").read_text().split())


def test_a_scan_that_failed_is_not_done_whatever_the_plugin_raises(tmp_path):
    """Nipype's own base of plugins swallows what fails in the parent, such as a full disk."""
    scans = [Scan(Path(f"/d/sub-{s}_T1w.nii.gz"), s, None, None) for s in ("01", "02", "03")]
    progress = SimpleNamespace(
        heard=True,
        is_done=lambda scan: scan.subject == "01",
        has_failed=lambda scan: scan.subject == "03",
    )
    config = RunConfig(Path("/d"), tmp_path, "participant")
    found = _outcome(progress, None, None, config, scans)
    assert (found.done, list(found.failed)) == (scans[:1], scans[1:])
    assert found.broken == scans[2:]  # the other was not run: what it has from before still counts
    progress.heard = False  # this one says nothing until it raises
    assert _outcome(progress, None, None, config, scans).done == scans
    assert _outcome(progress, None, OSError("full"), config, scans).failed[scans[0]] == "full"


def test_rerun_is_cached(tmp_path):
    first, _, error, _ = run(build(tmp_path, negate))
    assert error is None
    assert (first.n_run, first.n_cached) == (4, 0)
    second, _, error, _ = run(build(tmp_path, negate), n_procs=1)
    assert error is None
    assert (second.n_run, second.n_cached) == (0, 4)
    assert not second._idle  # nobody was started for nothing


def test_failing_node_keeps_its_message(tmp_path):
    plugin, _, error, _ = run(build(tmp_path, fail))
    assert error is not None
    ((_, crash_file, traceback),) = plugin.failures
    assert os.path.exists(crash_file)
    assert "this node fails on purpose" in traceback


def test_fresh_workers_end_after_each_node(tmp_path):
    plugin, _, error, _ = run(build(tmp_path, negate), fresh_workers=True)
    assert error is None
    assert plugin.n_run == 4


def test_one_branch_after_the_other(tmp_path):
    workflow = Workflow("wf", base_dir=str(tmp_path / "work"))
    workflow.config["execution"].update(poll_sleep_duration=0.1, check_version=False)
    for branch in "abc":
        nodes = [
            Node(Function(function=negate, output_names=["out"]), name=f"{branch}{i}")
            for i in range(3)
        ]
        nodes[0].inputs.value = ord(branch)
        workflow.connect([(x, y, [("out", "value")]) for x, y in pairwise(nodes)])
    ended = []

    def note(node, status):
        if status == "end":
            ended.append(node.name)

    _, _, error, _ = run(workflow, n_procs=1, status_callback=note)
    assert error is None
    assert [name[1] for name in ended] == list("012" * 3)
    assert len({name[0] for name in ended[:3]}) == 1


def test_stock_plugin_is_the_base():
    assert issubclass(RemixMultiProcPlugin, MultiProcPlugin)
