"""Lesions and gates by identities: what nothing is lost of is kept, what is known comes back."""

import hashlib
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from remix_bids.cli.experts import main
from remix_bids.evaluation import gates, lesions
from remix_bids.evaluation.lesions import (
    CONTRASTS,
    DIAMETERS,
    METHODS,
    Lesion,
    add_lesions,
    all_lesions,
    kept,
    place_lesions,
)
from remix_bids.evaluation.rows import read_rows, write_rows
from remix_bids.evaluation.settings import BLIND, CUBIC, SHIPS
from remix_bids.experts.registry import load_registry
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import load_bank, save_bank
from remix_bids.spatial import WORKING_GRID
from remix_bids.training.trainer import save_network
from tests.commands import has_ended, run


def ball(shape, radius):
    """Bright tissue in air."""
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij", sparse=True)
    return (sum(a**2 for a in axes) <= radius**2).astype(np.float32)


@pytest.mark.parametrize("diameter", DIAMETERS)
def test_a_sphere_has_its_volume(diameter):
    volume = Lesion(diameter, 0.2).fraction().sum()
    assert volume == pytest.approx(np.pi / 6 * diameter**3, rel=0.02)


@pytest.mark.parametrize("diameter", DIAMETERS)
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_of_the_truth_all_is_kept(diameter, contrast):
    image = torch.rand(40, 40, 40, generator=torch.Generator().manual_seed(1)) + 0.5
    lesion = Lesion(diameter, contrast, (20, 18, 22))
    true = add_lesions(image, [lesion]) - image
    assert kept(true, true, lesion) == (1.0, 1.0)
    assert kept(0.5 * true, true, lesion) == (pytest.approx(0.5), 1.0)
    assert kept(0 * true, true, lesion) == (0.0, 0.0)
    assert kept(-true, true, lesion) == (pytest.approx(-1.0), 0.0)


def test_the_mean_inside_changes_by_the_contrast():
    image = torch.rand(40, 40, 40, generator=torch.Generator().manual_seed(1)) + 0.5
    lesion = Lesion(8.0, -0.4, (20, 20, 20))
    inside = torch.zeros(40, 40, 40, dtype=torch.bool)
    inside[lesion.box()] = torch.tensor(lesion.fraction() == 1)
    changed = add_lesions(image, [lesion])
    assert float((changed - image)[inside].mean()) == pytest.approx(-0.4, rel=0.02)
    assert float((changed - image)[lesion.box()].sum()) == pytest.approx(
        -0.4 * np.pi / 6 * 8**3, rel=0.05
    )


def test_blur_takes_contrast_and_spreads_volume():
    lesion = Lesion(3.0, 0.4, (20, 20, 20))
    true = add_lesions(torch.ones(40, 40, 40), [lesion]) - 1
    blurred = torch.from_numpy(ndimage.gaussian_filter(true.numpy(), 2.0))
    contrast, volume = kept(blurred, true, lesion)
    # Two Gaussians that share their centre, the sphere's with the same variance, d^2 / 20.
    assert contrast == pytest.approx(0.12, abs=0.02)
    # 10.9 mm3 is what the sphere itself has above half, on voxels of 1 mm.
    spread = np.pi / 6 * (2.355 * np.sqrt(4 + 9 / 20)) ** 3
    assert volume == pytest.approx(spread / 10.9, rel=0.1)


def test_only_what_hangs_together_with_the_lesion_counts():
    lesion = Lesion(5.0, 0.4, (20, 20, 20))
    true = add_lesions(torch.ones(40, 40, 40), [lesion]) - 1
    other = true.clone()
    other[20, 20, 26:28] += 5  # an artefact within the box, brighter than the lesion
    assert kept(other, true, lesion) == (1.0, 1.0)


def test_a_lesion_near_the_edge_is_measured():
    lesion = Lesion(8.0, 0.4, (5, 34, 20))
    true = add_lesions(torch.ones(40, 40, 40), [lesion]) - 1
    assert kept(true, true, lesion) == (1.0, 1.0)


def test_places_are_in_tissue_apart_and_found_again():
    image = ball((120, 120, 100), 48)
    covered = np.ones(image.shape, bool)
    covered[:, :, :30] = False
    volumes = place_lesions(image, covered, all_lesions(), np.random.default_rng(5))
    assert volumes == place_lesions(image, covered, all_lesions(), np.random.default_rng(5))
    found = [lesion for volume in volumes for lesion in volume]
    assert sorted((f.diameter, f.contrast) for f in found) == sorted(
        (f.diameter, f.contrast) for f in all_lesions()
    )
    for volume in volumes:
        for i, one in enumerate(volume):
            assert image[one.box(2)].all()
            assert covered[one.box(2)].all()
            for other in volume[:i]:
                apart = np.linalg.norm(np.subtract(one.centre, other.centre))
                assert apart >= (one.diameter + other.diameter) / 2 + 12


def test_what_fits_nowhere_is_left_out(caplog):
    image = ball((40, 40, 40), 7)
    volumes = place_lesions(image, image > 0, all_lesions(), np.random.default_rng(5))
    assert {f.diameter for v in volumes for f in v} <= {3.0, 5.0}
    assert "no place" in caplog.text


def test_the_lesion_table():
    rows = [
        {"person": p, "class": 4, "method": m, "diameter": d, "contrast": c,
         "contrast_kept": d / 10 + 0.2 * (p == "b"), "volume_kept": 2.0}
        for p in "ab" for m in METHODS for d in DIAMETERS for c in CONTRASTS
    ]  # fmt: skip
    table = lesions.to_markdown(rows)
    assert "| 4 | expert | 0.40 | 0.60 | 0.90 | 1.30 |" in table
    assert "| 4 | cubic | 2.00 | 2.00 | 2.00 | 2.00 |" in table
    assert "| class | method | -40% | -20% | +20% | +40% |" in table


# --- gates ---------------------------------------------------------------------------------------


def test_gates_disagree_where_matrices_are_fine():
    bank = [g for g in load_bank() if g.held_out]
    found = gates.disagreements(load_registry(), bank)
    assert len(found) > 20
    for one in found:
        assert one.geometry.held_out
        assert one.geometry.grid.voxel_sizes.min() < 1
        assert int(one.paper) < int(one.effective)
    agreed = [g for g in bank if g.grid.voxel_sizes.min() >= 1]
    assert not gates.disagreements(load_registry(), agreed)


def test_the_gate_table():
    def row(person, gate, psnr, experts="1 or 6"):
        return {"person": person, "experts": experts, "gate": gate, "psnr": psnr}

    rows = [
        row(p, gate, v + i)
        for i, p in enumerate("abc")
        for gate, v in (("none", 24.0), ("paper", 25.0), ("effective", 25.5))
    ]
    table = gates.to_markdown(rows)
    assert "| 1 or 6 | 3 | 25.00 | 26.00 | 26.50 | +0.50 [+0.50, +0.50] | 3/3 |" in table
    assert "| all | 3 |" in table


def test_rows_are_written_as_they_come(tmp_path):
    def batches():
        yield [{"a": 1, "b": "x"}]
        assert (tmp_path / "rows.tsv").read_text() == "a\tb\n1\tx\n"
        yield [{"a": 2, "b": "y"}]

    assert len(write_rows(tmp_path / "rows.tsv", batches())) == 2


@pytest.mark.parametrize("command", ["lesions", "gates"])
def test_a_folder_without_the_persons_is_told(command, tmp_path, capsys):
    (tmp_path / "persons.json").write_text('{"persons": []}')
    assert main([command, str(tmp_path), str(tmp_path / "out.tsv")]) == 2
    assert "no brains of the split 'held_out'" in capsys.readouterr().err
    assert not (tmp_path / "out.tsv").exists()


def write_experts(folder, expert, general, steps=0):
    """A folder of seven equal experts and a general network."""
    folder.mkdir()
    lines = []
    for name, network in [(str(k), expert) for k in range(1, 8)] + [("general", general)]:
        file = folder / f"{name}.safetensors"
        save_network(network, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        low, high = (0, 1e9) if name == "general" else (int(name) - 0.5, int(name) + 0.5)
        lines += [f"[expert.{name}]", f'file = "{file.name}"', f'sha256 = "{digest}"']
        lines += [f"lower = {0 if name == '1' else low}", f"upper = {1e9 if name == '7' else high}"]
        lines += [f"consistency_steps = {steps}"]
    (folder / "experts.toml").write_text("\n".join(lines))
    return folder


def by_chance(seed):
    """A network that adds something."""
    torch.manual_seed(seed)
    network = ResidualUNet(widths=(4, 8, 8))
    torch.nn.init.normal_(network.out.weight, std=0.01)
    return network


@pytest.fixture
def prepared(tmp_path):
    """One person made of a ball, and untrained experts, which give back the linear estimate."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    np.save(folder / "p.npy", ball(WORKING_GRID.shape, 45).astype(np.float16))
    (folder / "persons.json").write_text(
        '{"persons": [{"name": "p", "file": "p.npy", "split": "held_out", "head": false, '
        '"voxel_sizes": [1, 1, 1], "world": [[1,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]]}]}'
    )
    untrained = ResidualUNet(widths=(4, 8, 8))
    return folder, write_experts(tmp_path / "experts", untrained, untrained)


@pytest.mark.slow
def test_lesions_end_to_end(prepared, tmp_path):
    folder, experts = prepared
    out = tmp_path / "lesions.tsv"
    args = ["lesions", folder, out, "--classes", "1", "--experts-dir", experts]
    assert main([str(a) for a in args]) == 0
    header, *lines = (line.split("\t") for line in out.read_text().splitlines())
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert len(rows) == len(METHODS) * len(DIAMETERS) * len(CONTRASTS)
    values = {m: [float(r["contrast_kept"]) for r in rows if r["method"] == m] for m in METHODS}
    np.testing.assert_allclose(values["expert"], values["estimate"], atol=1e-3)
    large = [float(r["contrast_kept"]) for r in rows if r["diameter"] == "12.0"]
    np.testing.assert_allclose(large, 1, atol=0.06)  # class 1 is nearly the truth
    assert (tmp_path / "lesions.md").read_text().count("| 1 | expert |") == 3
    persons = folder / "persons.json"
    persons.write_text(persons.read_text().replace('"head": false', '"head": true'))
    assert main([str(a) for a in args]) == 2  # no lesions in scalps


@pytest.mark.slow
def test_gates_end_to_end(prepared, tmp_path):
    folder, experts = prepared
    out = tmp_path / "gates.tsv"
    args = ["gates", folder, out, "--geometries", "1", "--experts-dir", experts]
    assert main([str(a) for a in args]) == 0
    header, *lines = (line.split("\t") for line in out.read_text().splitlines())
    rows = {line[header.index("gate")]: line[header.index("psnr")] for line in lines}
    assert set(rows) == {"none", "paper", "effective"}
    assert rows["paper"] == rows["effective"]  # both experts are the identity
    assert {line[header.index("method")] for line in lines} >= {CUBIC}


@pytest.mark.slow
def test_an_evaluation_in_two_runs_is_that_in_one(prepared, tmp_path, capsys):
    folder, _ = prepared
    experts = write_experts(tmp_path / "other", by_chance(1), by_chance(2), steps=1)

    def run(name, *methods):
        options = ["--classes", "4", "--geometries", "1", "--noise", "0", "--experts-dir", experts]
        options += ["--methods", *methods] if methods else []
        return main([str(a) for a in ("evaluate", folder, tmp_path / name, *options)])

    assert run("plain.tsv", "linear", CUBIC, "estimate", "back-projection") == 0
    assert run("networks.tsv", "general", "expert", "expert + steps") == 0
    assert run("whole.tsv") == 0
    assert run("ships.tsv", "expert + steps") == 0
    found = {n: read_rows(tmp_path / f"{n}.tsv") for n in ("plain", "networks", "whole", "ships")}
    assert [len(rows) for rows in found.values()] == [4, 3, 7, 1]
    assert len({row["psnr"] for row in found["whole"]}) == 7  # no method stands in for another
    assert found["ships"] == found["whole"][-1:]
    assert not (tmp_path / "plain.md").exists()
    parts = [str(tmp_path / "plain.tsv"), str(tmp_path / "networks.tsv")]
    assert main(["table", str(tmp_path / "joined"), *parts]) == 0
    assert main(["table", str(tmp_path / "v1.2"), str(tmp_path / "whole.tsv")]) == 0
    assert (tmp_path / "v1.2.md").read_text() == (tmp_path / "whole.md").read_text()
    # Told less than the truth, back-projection is another method, with a column of its own.
    assert run("told.tsv", BLIND) == 0
    (told,) = read_rows(tmp_path / "told.tsv")
    assert told["psnr"] not in {row["psnr"] for row in found["whole"]}
    columns = [str(tmp_path / "whole.tsv"), str(tmp_path / "told.tsv")]
    assert main(["table", str(tmp_path / "both"), *columns]) == 0
    assert f"| {SHIPS} | {BLIND} |" in (tmp_path / "both.md").read_text()
    for kind in ("tsv", "md"):
        joined, whole = (tmp_path / f"{name}.{kind}" for name in ("joined", "whole"))
        assert joined.read_text() == whole.read_text()
    header, *rows = (tmp_path / "whole.tsv").read_text().splitlines(keepends=True)
    more = [row.replace("\t4\t0\t", "\t4\t1\t", 1) for row in rows]
    (tmp_path / "cut.tsv").write_text("".join([header, *rows, *more[:-1]]))
    assert main(["table", str(tmp_path / "cut"), str(tmp_path / "cut.tsv")]) == 2
    assert "1 of 2 cases lack methods that others have" in capsys.readouterr().err
    assert run("whole.tsv", "expert") == 2
    assert "rows of other methods" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "one"), parts[1]]) == 2
    assert "no row of linear, cubic" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "plain"), *parts]) == 2
    assert "name another output" in capsys.readouterr().err
    assert run("none.tsv", "magic") == 2
    assert "magic: choose from linear, cubic" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_ends_the_evaluation(prepared, tmp_path, capsys):
    """As out of memory: nothing waits for it for ever, and the rows that were there stay."""
    folder, experts = prepared
    args = ["evaluate", folder, tmp_path / "rows.tsv", "--classes", "4", "--geometries", "1"]
    args += ["--experts-dir", experts, "--methods", "linear", "--noise"]
    assert main([str(a) for a in (*args, 0)]) == 0
    before = (tmp_path / "rows.tsv").read_text()
    killer = ["--method-command", "killer=sh -c 'kill -9 $PPID' {input} {output}"]
    args[2] = tmp_path / "other.tsv"
    assert main([str(a) for a in (*args, 0, *killer)]) == 1
    assert "a process of the evaluation was killed" in capsys.readouterr().err
    assert (tmp_path / "rows.tsv").read_text() == before


def test_what_evaluate_and_table_refuse(prepared, tmp_path, capsys):
    folder, experts = prepared

    def told(*arguments):
        assert main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err

    def evaluate(*options, methods=("--methods", "linear")):
        begin = ("evaluate", folder, tmp_path / "rows.tsv", "--experts-dir", experts)
        return told(*begin, *methods, *options)

    with pytest.raises(SystemExit) as refused:
        main(["evaluate", str(folder), str(tmp_path / "table1.md")])
    assert refused.value.code == 2
    assert "rows are a .tsv" in capsys.readouterr().err
    noise = [("--noise", value) for value in ("-0.02", "nan", "2", "none")]
    for wrong in (("--classes", "9"), ("--nprocs", "0"), ("--geometries", "-1"), *noise):
        with pytest.raises(SystemExit) as refused:
            evaluate(*wrong)
        assert refused.value.code == 2
    assert "add --dice" in evaluate("--labels", folder)
    assert "add --dice" in evaluate("--dice-scans", "2")
    assert "_desc-tissues_dseg.nii.gz" in evaluate("--dice", "--labels", folder)
    assert "there is no bank" in evaluate("--bank", folder)
    copy = ("--method-command", "copy=cp {input} {output}")
    assert "name copy is taken" in evaluate(*copy, *copy)
    named = ("--method-command", "expert=cp {input} {output}")
    assert "name expert is taken" in evaluate(*named)
    assert "--noise 0.01: back-projection is not" in evaluate("--noise", "0.01", methods=())
    assert "add --split validation" in evaluate("--tune", methods=())
    assert "no Dice" in evaluate("--tune", "--dice", methods=())
    own = tmp_path / "protocol.toml"
    assert "go together" in evaluate("--template", __file__)
    assert "No such file" in evaluate("--protocol", own)
    own.write_text("noise = [0")
    assert f"--protocol {own}: " in evaluate("--protocol", own)
    own.write_text("noise = [0]")
    assert "lacks revision, seed" in evaluate("--protocol", own)
    assert not (tmp_path / "rows.tsv").exists()
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    table = told("table", tmp_path / "t", tmp_path / "participants.tsv")
    assert re.search(r"participants.tsv lacks affine, .* name another file", table)
    agreed = tmp_path / "agreed.json"
    coarse = [g for g in load_bank() if g.grid.voxel_sizes.min() >= 1]
    save_bank([replace(g, held_out=True) for g in coarse], agreed)
    gates = ("gates", folder, tmp_path / "gates.tsv", "--experts-dir", experts, "--bank", agreed)
    assert "both gates choose alike" in told(*gates)
    assert not (tmp_path / "gates.tsv").exists()
    # An earlier result stays until the new one is whole.
    (tmp_path / "gates.tsv").write_text("of before")
    told(*gates)
    assert (tmp_path / "gates.tsv").read_text() == "of before"


@pytest.mark.parametrize("go_on", [True, False])
def test_rows_that_were_there_stay_until_they_are_written_again(tmp_path, go_on):
    rows = [{"person": "p", "psnr": "1"}]
    write_rows(tmp_path / "rows.tsv", [rows])
    before = (tmp_path / "rows.tsv").read_text()

    def killed():
        yield []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "rows.tsv", killed(), rows if go_on else ())
    assert (tmp_path / "rows.tsv").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rows.tsv"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks in /proc, which only Linux has")
@pytest.mark.parametrize(
    ("how", "status"), [("TERM", 128 + signal.SIGTERM), ("INT", 128 + signal.SIGINT), ("KILL", -9)]
)
def test_a_killed_evaluation_ends_its_processes(prepared, tmp_path, how, status):
    """They would go on with their case, and then wait for another one for ever."""
    folder, experts = prepared
    args = ["evaluate", folder, tmp_path / "rows.tsv", "--classes", "4", "--geometries", "1"]
    args += ["--experts-dir", experts, "--methods", "linear", "--noise", 0, "--method-command"]
    script = tmp_path / "killer.sh"  # of what started the process that starts it
    script.write_text(
        f"echo $PPID $$ > {tmp_path}/pids\n"
        f"kill -{how} $(cut -d ' ' -f 4 /proc/$PPID/stat)\nsleep 600\n"
    )
    done = run("remix-experts", *args, f"killer=sh {script} {{input}} {{output}}")
    assert done.returncode == status
    assert all(has_ended(int(pid)) for pid in (tmp_path / "pids").read_text().split())
