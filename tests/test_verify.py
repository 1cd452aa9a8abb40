"""Checksums and reference outputs: what was exported passes, what was changed does not."""

import hashlib
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch

from remix_bids.cli.experts import main
from remix_bids.experts.inference import load_expert
from remix_bids.experts.reference import (
    TOLERANCE,
    difference,
    reference_input,
    reference_output,
)
from remix_bids.experts.registry import load_registry
from remix_bids.experts.unet import INPUTS, SCAN, ResidualUNet
from remix_bids.training.recipe import EXPERTS, export_experts
from remix_bids.training.trainer import save_network
from tests.commands import BIN

NAMES = (*EXPERTS, "general")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Eight small random networks, exported."""
    folder = tmp_path_factory.mktemp("exported")
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        network = ResidualUNet(widths=(4, 8, 8))
        torch.nn.init.normal_(network.out.weight, std=0.05)
        (folder / "trained" / name).mkdir(parents=True)
        provenance = {"step": 1, "validation_gain_db": 0.5}
        save_network(network, folder / "trained" / name / "best.safetensors", **provenance)
    export_experts(folder / "trained", folder / "experts")
    return folder / "experts"


@pytest.fixture
def experts(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "experts")


def test_the_reference_input_is_drawn_again_and_has_all_channels():
    inputs, scan = reference_input()
    assert torch.equal(inputs, reference_input()[0])
    assert inputs.shape[0] == len(INPUTS)
    assert scan.shape == (4,)
    image, covered, *_, phase, rest = inputs
    assert 0 < covered.mean() < 1
    assert (image[covered == 0] == 0).all()
    assert image.min() >= 0
    assert 0.5 < image.max() < 2
    assert phase.min() == pytest.approx(-1)
    assert 0 < rest.abs().max() <= 0.01


def test_the_reference_input_is_the_same_on_every_machine():
    """The raw bits are those of PCG64 by its own definition."""
    raw = np.random.PCG64(1).random_raw(2)
    assert [hex(int(v)) for v in raw] == ["0x8306bdf37922e4ff", "0xf35196bbc152a866"]


def test_what_was_exported_passes(experts, capsys):
    assert main(["verify", "--experts-dir", str(experts)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(NAMES)
    assert all(line.startswith("ok ") and "reference output" in line for line in lines)


def test_a_changed_file_is_noticed_and_the_others_are_checked(experts, capsys):
    path = experts / "expert-3.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", "--experts-dir", str(experts)]) == 78
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines].count("ok") == len(NAMES) - 1
    assert "expert 3" in lines[2]
    assert "sha256" in lines[2]
    assert "1 of 8 experts failed" in said.err


def test_experts_that_the_table_lacks_are_noticed(experts, capsys):
    table = experts / "experts.toml"
    whole = table.read_text()
    table.write_text(whole[: whole.index("[expert.7]")])
    assert main(["verify", "--experts-dir", str(experts)]) == 78
    assert "experts.toml lacks 7, general" in capsys.readouterr().out
    table.write_text(whole.replace("lower = 3.5", "lower = 3.6"))
    assert main(["verify", "--experts-dir", str(experts)]) == 78
    assert "expert 4 serves volumes from 3.6 mm3 on" in capsys.readouterr().out
    table.write_text(whole.replace("upper = 1000000000.0", "upper = 9.0"))
    assert main(["verify", "--experts-dir", str(experts)]) == 78
    assert "expert 7 serves volumes up to 9 mm3 only" in capsys.readouterr().out


def verified_with_its_checksum(experts, record, capsys):
    """What `verify` says once a file's own checksum stands in the table; one line each."""
    digest = hashlib.sha256(record.path.read_bytes()).hexdigest()
    table = experts / "experts.toml"
    table.write_text(table.read_text().replace(record.sha256, digest))
    assert main(["verify", "--experts-dir", str(experts)]) == 78
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("network", "scan", "said"),
    [
        (ResidualUNet(5, (4, 8, 8)), SCAN, "takes 5 channels, not 6"),
        (ResidualUNet(6, (4, 8, 8)), SCAN[::-1], "its scan are noise, "),
    ],
)
def test_a_network_of_other_inputs_is_refused_and_stops_no_other(
    experts, capsys, monkeypatch, network, scan, said
):
    record = load_registry(experts)["3"]
    with monkeypatch.context() as other:
        other.setattr("remix_bids.training.trainer.SCAN", scan)
        save_network(network, record.path)
    lines = verified_with_its_checksum(experts, record, capsys)
    assert said in lines[2]
    assert sum(line.startswith("ok ") for line in lines) == len(NAMES) - 1


def test_one_changed_weight_is_noticed_by_what_it_computes(experts, capsys):
    """Whoever changes a weight and its checksum still computes something else."""
    record = load_registry(experts)["5"]
    network = load_expert(record)
    with torch.no_grad():
        network.down[0].first.weight[0, 0, 1, 1, 1] += 0.05
    save_network(network, record.path)
    lines = verified_with_its_checksum(experts, record, capsys)
    assert "computes something else" in lines[4]
    assert sum(line.startswith("ok ") for line in lines) == len(NAMES) - 1


def test_half_precision_is_noticed_and_another_order_of_summing_is_not(exported):
    network = load_expert(load_registry(exported)["1"])
    stored = reference_output(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert difference(reference_output(network), stored) > TOLERANCE
    # Channels in reverse order: the same sums, added up the other way.
    network = load_expert(load_registry(exported)["1"])
    first = network.down[0]
    for layer, axis in ((first.first, 0), (first.second, 1)):
        layer.weight.data = layer.weight.data.flip(axis)
    first.first.bias.data = first.first.bias.data.flip(0)
    assert difference(reference_output(network), stored) < TOLERANCE / 10


def test_differences_are_relative_and_never_silent():
    assert difference((1.0, 2.0), (1.0, 2.0)) == 0
    assert difference((100.0, 2.0), (50.0, 2.0)) == 1
    assert difference((1.0,), (1.0, 2.0)) == float("inf")
    assert difference((float("nan"), 2.0), (1.0, 2.0)) == float("inf")


def test_a_table_without_references_is_told(experts, capsys):
    table = experts / "experts.toml"
    rows = [r for r in table.read_text().splitlines() if not r.startswith("reference")]
    table.write_text("\n".join(rows))
    assert main(["verify", "--experts-dir", str(experts)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(NAMES) + 1
    assert "no reference outputs" in lines[-1]


def test_a_folder_without_experts_is_told(tmp_path, capsys):
    assert main(["verify", "--experts-dir", str(tmp_path)]) == 78
    assert "is missing" in capsys.readouterr().err


def test_whoever_reads_the_output_may_stop_reading(experts):
    read, write = os.pipe()
    os.close(read)
    args = [BIN / "remix-experts", "verify", "--experts-dir", experts]
    done = subprocess.run(args, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
