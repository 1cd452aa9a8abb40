"""Nipype's SLURM plugin with its three known faults (docs/evidence shows it on a real Slurm)."""

import pytest

from remix_bids.errors import UsageError
from remix_bids.workflows.run import explain, read_plugin_file
from remix_bids.workflows.slurm import RemixSLURMPlugin
from tests import slurm_commands
from tests.test_plugin import build, kill_self, negate


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    monkeypatch.setenv("PATH", str(slurm_commands.install(folder)), prepend=":")
    monkeypatch.delenv("LOGNAME", raising=False)  # the third fault: KeyError
    return folder


def run(workflow, **plugin_args):
    plugin = RemixSLURMPlugin(
        {"job_finished_timeout": 1, "poll_sleep_duration": 0.1, **plugin_args}
    )
    try:
        workflow.run(plugin=plugin)
    except Exception as error:
        return error
    return None


def test_nodes_are_jobs(tmp_path, slurm):
    assert run(build(tmp_path, negate), sbatch_args="--mem=1G") is None
    calls = (slurm / "calls.txt").read_text()
    assert calls.count("sbatch ") == 4
    assert "--cpus-per-task=1 --mem=1G" in calls
    assert "scancel" not in calls
    assert run(build(tmp_path, negate)) is None  # a rerun submits nothing
    assert (slurm / "calls.txt").read_text() == calls


def test_killed_job_costs_one_node(tmp_path, slurm):
    error = run(build(tmp_path, kill_self))
    assert "OUT_OF_MEMORY" in str(error)
    (crash,) = (tmp_path / "crash").iterdir()
    kind, reason = explain(crash.read_text())
    assert kind == "Killed"
    assert "wf.dying was ended by Slurm (job 1: OUT_OF_MEMORY)" in reason
    assert (tmp_path / "work/wf/after/result_after.pklz").exists()  # the other branch went on
    assert not (tmp_path / "work/wf/never/result_never.pklz").exists()


def test_the_result_of_an_earlier_run_is_not_that_of_a_job_that_failed(tmp_path, slurm):
    assert run(build(tmp_path, negate)) is None
    workflow = build(tmp_path, negate)
    workflow.get_node("good").inputs.value = 22
    (slurm / "broken").touch()  # as a node of the cluster whose environment is missing
    assert "good" in str(run(workflow))


def test_one_look_at_the_queue_serves_all_jobs(tmp_path, slurm):
    plugin = RemixSLURMPlugin({"poll_sleep_duration": 60})
    for job in ("1", "2", "3"):
        (slurm / job).write_text("RUNNING" if job != "2" else "COMPLETED")
        plugin._pending[int(job)] = str(tmp_path)
    assert [plugin._is_pending(job) for job in (1, 2, 3)] == [True, False, True]
    assert (slurm / "calls.txt").read_text().count("squeue") == 1
    (slurm / "4").write_text("RUNNING")
    plugin._pending[4] = str(tmp_path)
    assert plugin._is_pending(4)  # it was not there at the last look


def test_controller_that_is_away_is_waited_for(tmp_path, slurm):
    (slurm / "away").write_text("3")
    assert run(build(tmp_path, negate), controller_patience=30) is None
    assert (slurm / "away").read_text() == "0"


def test_patience_has_an_end(tmp_path, slurm):
    (slurm / "away").write_text("1000")
    error = run(build(tmp_path, negate), controller_patience=0.2)
    assert "Slurm has not answered sbatch" in str(error)


def test_refused_job(tmp_path, slurm):
    error = run(build(tmp_path, negate), sbatch_args="--partition=none")
    assert "invalid partition specified" in str(error)
    assert "sbatch_args is '--partition=none'" in str(error)


def test_absent_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch is not installed here" in str(run(build(tmp_path, negate)))


@pytest.mark.parametrize("name", ["SLURMGraph", "SGEGraph", "CondorDAGMan"])
def test_plugins_that_do_not_wait_are_refused(tmp_path, name):
    path = tmp_path / "plugin.yml"
    path.write_text(f"plugin: {name}\n")
    with pytest.raises(UsageError, match="returns at once"):
        read_plugin_file(path)
