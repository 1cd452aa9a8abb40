"""Losses by identities; the loop by its promises: it learns, resumes and repeats."""

import csv
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter

from remix_bids.cli.experts import main
from remix_bids.errors import RemixError, UsageError
from remix_bids.experts.registry import GENERAL, load_registry
from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import load_bank, save_bank
from remix_bids.spatial import WORKING_GRID
from remix_bids.training import team
from remix_bids.training.dataset import (
    OFF,
    Augmentation,
    Pair,
    Person,
    Simulator,
    cut_patch,
    draw_cuts,
    sharpened,
    study_shares,
    vary,
)
from remix_bids.training.losses import (
    SHARES,
    RemixLoss,
    correlation_loss,
    gradient_mae,
    mae,
    ssim_loss,
    ssim_map,
)
from remix_bids.training.recipe import (
    EXPERTS,
    NOT_OF_SCHEDULE,
    _starts,
    begin_with,
    class_weights,
    loss_of,
    run_recipe,
)
from remix_bids.training.trainer import (
    Schedule,
    State,
    batches,
    forward_parts,
    is_finished,
    read_metadata,
    save_network,
    train,
)

from .test_spatial import smooth_image

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "mae": mae,
    "gradient": gradient_mae,
    "ssim": ssim_loss,
    "correlation": correlation_loss,
}


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 12, 13, 14, generator=generator)
    return x, y, torch.ones_like(x)


@pytest.mark.parametrize("part", PARTS)
def test_no_loss_between_equals(part, images):
    x, y, weight = images
    assert torch.allclose(PARTS[part](y, y, weight), torch.zeros(3), atol=1e-5)
    assert (PARTS[part](x, y, weight) > 0.01).all()


@pytest.mark.parametrize("part", PARTS)
def test_what_has_no_weight_does_not_count(part, images):
    x, y, weight = images
    weight[:, :6] = 0
    change = x.clone()
    change[:, :3] += 5  # further from the seam than the SSIM window
    before, after = (PARTS[part](i, y, weight) for i in (x, change))
    torch.testing.assert_close(before, after)


def test_what_the_scan_has_not_seen_costs_nothing(images):
    """Nor does it by a window that reaches there."""
    x, y, covered = images
    covered[:, :6] = 0
    x = torch.where(covered > 0, y, x)
    parts = RemixLoss().parts(x, y, covered, torch.ones(3))
    torch.testing.assert_close(parts, torch.zeros(4, 3), atol=1e-5, rtol=0)


def test_a_constant_costs_mae_only(images):
    x, _, weight = images
    assert torch.allclose(mae(x + 0.3, x, weight), torch.full((3,), 0.3), atol=1e-5)
    assert gradient_mae(x + 0.3, x, weight).max() < 1e-6
    assert correlation_loss(x + 0.3, x, weight).abs().max() < 1e-5


def test_a_factor_costs_no_correlation(images):
    x, _, weight = images
    assert correlation_loss(2 * x, x, weight).abs().max() < 1e-5
    assert torch.allclose(correlation_loss(-x, x, weight), torch.full((3,), 2.0), atol=1e-4)


def test_correlation_of_a_flat_target_is_skipped(images):
    x, _, weight = images
    assert correlation_loss(x, torch.ones_like(x), weight).abs().max() == 0


def test_ssim_is_bounded_and_symmetric(images):
    x, y, _ = images
    torch.testing.assert_close(ssim_map(x, y), ssim_map(y, x))
    assert ssim_map(x, y).abs().max() <= 1


def test_ssim_of_one_window_by_hand(images):
    """The textbook formula on a single 7-voxel window, weights from scipy's Gaussian."""
    from scipy.ndimage import gaussian_filter

    x, y = (i[0, :7, :7, :7].double().numpy() for i in images[:2])
    spike = np.zeros((7, 7, 7))
    spike[3, 3, 3] = 1
    w = gaussian_filter(spike, 1.5, radius=3)
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
    vxy = (w * (x - mx) * (y - my)).sum()
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert float(ssim_map(*(i[:1] for i in images[:2]))[0, 0, 0, 0]) == pytest.approx(
        expected, abs=1e-5
    )


def test_calibration_gives_the_shares(images):
    x, y, weight = images
    detail = torch.ones(3)
    parts = RemixLoss().parts(x, y, weight, detail)
    loss = RemixLoss().calibrated(parts)
    each = torch.tensor(loss.factors) * parts.mean(dim=1)
    torch.testing.assert_close(each / each.sum(), torch.tensor(SHARES))
    assert loss.factors[0] == 1


def test_coarse_targets_do_not_teach_detail(images):
    x, y, weight = images
    full, less = (RemixLoss().parts(x, y, weight, torch.full((3,), d)) for d in (1.0, 0.3))
    torch.testing.assert_close(less[[1, 2]], 0.3 * full[[1, 2]])
    torch.testing.assert_close(less[[0, 3]], full[[0, 3]])


def person(seed=0, head=True):
    image = smooth_image(WORKING_GRID.shape, seed)
    image[:40] = image[-40:] = 0
    image[:, :50] = image[:, -50:] = 0
    image[:, :, :40] = image[:, :, -40:] = 0
    return Person(f"p{seed}", (image / image.max()).half(), head, (1.0,) * 3, np.eye(4), "train")


def simulator(augment=OFF, bank=None, **settings):
    return Simulator(
        persons=[person(0), person(1, head=False)],
        bank=bank or [g for g in load_bank() if not g.held_out],
        strip_mask=torch.ones(WORKING_GRID.shape, dtype=torch.bool),
        class_weights=(0, 0, 0, 0, 1, 0, 0),
        seed=5,
        patch=16,
        cube=64,
        patches_per_volume=4,
        augment=augment,
        **settings,
    )


def test_a_volume_is_the_same_whenever_it_is_asked_for():
    one, two = simulator(Augmentation()), simulator(Augmentation())
    two[0]
    for key, value in one[3].items():
        assert torch.equal(value, two[3][key])
    assert not torch.equal(one[2]["volume"], one[3]["volume"])


def test_patches_are_parts_of_their_volume_mirrored_and_swapped():
    """Every voxel is told apart by its number, and the channels go with the axes."""
    numbers = torch.arange(7 * 8**3).reshape(7, 8, 8, 8)
    sizes = torch.tensor([1.0, 2.0, 4.0, 0.01])
    how = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1]]  # mirrored, swapped
    cuts = torch.tensor([[1, 2, 3, *one] for one in how])
    sample = {"volume": numbers, "scan": sizes, "detail": torch.tensor(0.3), "cuts": cuts}
    patches = [cut_patch(sample, i, 4) for i in range(4)]
    plain = numbers[:, 1:5, 2:6, 3:7]
    assert torch.equal(patches[0]["inputs"], plain[:-1])
    assert torch.equal(patches[0]["targets"], plain[-1])
    assert torch.equal(patches[1]["targets"], plain[-1].flip(0))
    assert torch.equal(patches[2]["targets"], plain[-1].flip(1))
    swapped = plain.flip(1, 3).transpose(1, 2)  # mirrored first
    assert torch.equal(patches[3]["targets"], swapped[-1])
    assert torch.equal(patches[3]["inputs"], swapped[[0, 1, 3, 2, 4, 5]])
    assert [p["scan"].tolist() for p in patches[:3]] == [sizes.tolist()] * 3
    assert patches[3]["scan"].tolist() == sizes[[1, 0, 2, 3]].tolist()
    assert float(patches[0]["detail"]) == pytest.approx(0.3)


def test_both_images_of_a_pair_share_contrast_and_scale():
    pair, _ = simulator().pair(1)
    inside = (pair.inputs[1] > 0) & (pair.target > 0.3)
    ratio = float(pair.inputs[0][inside].mean() / pair.target[inside].mean())
    assert ratio == pytest.approx(1, abs=0.05)


def test_volumes_come_from_slabs_that_most_cubes_miss():
    """A bank of one scan of two slices."""
    slab = next(g for g in load_bank() if g.plane == "axial")
    x, y, _ = slab.shape
    thin = replace(simulator(bank=[replace(slab, shape=(x, y, 2))]), cube=32)
    pairs = [thin.pair(i)[0] for i in range(4)]
    assert all(float(pair.inputs[0].max()) > 0.2 for pair in pairs)
    assert torch.equal(pairs[3].target, thin.pair(3)[0].target)


def test_augmentation_off_changes_nothing():
    mask = torch.zeros(WORKING_GRID.shape, dtype=torch.bool)
    p = person()
    assert torch.equal(vary(np.random.default_rng(0), p, OFF, mask), p.image.float())


def test_sharpness_is_what_a_blur_takes_away():
    image = smooth_image((24, 24, 24)) + torch.rand(24, 24, 24)
    image[:8] = 0
    blurred = torch.from_numpy(gaussian_filter(image.numpy(), 1, radius=3, mode="constant"))
    weaker = sharpened(image, -0.5)
    inner = (slice(8, -4), slice(4, -4), slice(4, -4))
    torch.testing.assert_close(weaker[inner], (0.5 * (image + blurred))[inner], rtol=0, atol=1e-5)
    assert torch.equal(sharpened(image, 0.0), image)
    assert not sharpened(image, 0.5)[:8].any()  # air stays air
    assert sharpened(image, 0.5).min() >= 0


def test_persons_of_large_studies_are_drawn_less():
    """Nine persons of one study, one of another: three to one."""
    one = Person("one", torch.zeros(1).half(), False, (1.0,) * 3, np.eye(4), "train")
    many = [replace(one, name=f"site{i:02d}") for i in range(9)]
    alone = replace(one, name="alone")
    assert {p.study for p in many} == {"site"}
    assert replace(alone, name="ds002748x07").study == "ds002748"
    shares = study_shares([*many, alone])
    assert shares[:9].sum() == pytest.approx(3 * shares[9])
    assert shares.sum() == pytest.approx(1)


def test_a_new_input_begins_at_zero():
    old, new = ResidualUNet(5, (4, 8, 8)), ResidualUNet(6, (4, 8, 8))
    torch.nn.init.normal_(old.out.weight)
    begin_with(new, old.state_dict())
    x = torch.rand(1, 6, 16, 16, 16)
    scan = torch.tensor([[1.0, 1, 4, 0.01]])
    torch.testing.assert_close(new(x, scan), old(x[:, :5], scan))


def test_a_wider_network_begins_as_the_narrow_one():
    old, new = ResidualUNet(6, (4, 8, 8)), ResidualUNet(6, (4, 16, 24))
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    begin_with(new, old.state_dict())
    x = torch.rand(1, 6, 16, 16, 16)
    scan = torch.tensor([[1.0, 1, 4, 0.01]])
    torch.testing.assert_close(new(x, scan), old(x, scan))
    assert not torch.equal(old(x, scan), x[:, :1])
    new(x, scan).sum().backward()  # what was added learns
    assert new.up[0].first.weight.grad[:8, 8:16].any()
    assert new.down[2].first.weight.grad[:8, 8:].any()


class Constant(torch.nn.Module):
    """An error of the same size everywhere."""

    widths = ()

    def forward(self, x, scan):
        return x[:, :1] + 0.01


def test_a_patch_counts_relative_to_what_its_scan_lacks():
    image = torch.rand(1, 1, 16, 16, 16).expand(2, 6, 16, 16, 16)
    batch = {
        "inputs": torch.cat([image[:, :1], torch.ones(2, 1, 16, 16, 16), image[:, 2:]], dim=1),
        "scan": torch.tensor([[1.0, 1, 2, 0], [1, 1, 6, 0]]),
        "targets": image[:, 0],
        "detail": torch.ones(2),
    }
    mae_of = forward_parts(Constant(), batch, RemixLoss(), 2)[0]
    assert float(mae_of[0] / mae_of[1]) == pytest.approx((6 - 0.9) / (2 - 0.9), rel=0.02)


def test_class_weights_follow_the_recipe():
    assert class_weights("1", {}, 0.85) == pytest.approx((0.85, 0.15, 0, 0, 0, 0, 0))
    assert class_weights("4", {}, 0.85) == pytest.approx((0, 0, 0.075, 0.85, 0.075, 0, 0))
    assert class_weights("trunk", {"classes": [1, 2, 3, 4, 5, 6, 7]}, 0.85)[6] == 7


class BlurredNoise:
    """A task for the loop itself: bring back the half of the detail that a blur has taken."""

    patches_per_volume = 16
    patch = 16

    def __init__(self, seed=5):
        self.seed = seed

    def __len__(self):
        return 1000

    def pair(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        target = torch.rand(1, 1, 32, 32, 32, generator=generator)
        blurred = torch.nn.functional.avg_pool3d(target, 3, stride=1, padding=1)
        low = (0.5 * (target + blurred))[0, 0]
        ones = torch.ones_like(low)
        inputs = torch.stack([low, ones, *torch.zeros(4, *low.shape)])
        pair = Pair(inputs, torch.tensor([1.0, 1.0, 3.0, 0.0]), target[0, 0], 1.0)
        return pair, np.random.default_rng([self.seed, index])

    def __getitem__(self, index):
        pair, rng = self.pair(index)
        return pair.sample(draw_cuts(rng, pair, self.patches_per_volume, self.patch))


SETTINGS = {
    "batch": 4,
    "warmup": 2,
    "rim": 2,
    "volumes_per_round": 2,
    "validation_volumes": 1,
    "workers": 0,
}


def run(folder, steps, validate_every, task=BlurredNoise, network=None, **more):
    torch.manual_seed(0)
    network = network or ResidualUNet(widths=(4, 8, 8))
    schedule = Schedule(steps=steps, validate_every=validate_every, rate=2e-3, **SETTINGS, **more)
    train(network, task(), BlurredNoise(7), schedule, folder, progress=False)
    return load_file(str(folder / "checkpoint.safetensors"))


def kill_after(monkeypatch, steps):
    """Break off in the middle of a step, as a kill would."""
    rate_at, calls = Schedule.rate_at, []

    def rate_or_stop(schedule, step):
        calls.append(step)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return rate_at(schedule, step)

    monkeypatch.setattr(Schedule, "rate_at", rate_or_stop)


def test_training_resumes_to_the_step_and_repeats(tmp_path, monkeypatch):
    """Broken off after 13 of 20 steps, in the middle of a round: the same weights in the end."""
    whole = run(tmp_path / "whole", 20, 5)
    stopped = tmp_path / "stopped"
    kill_after(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, 20, 5)
    monkeypatch.undo()
    resumed = run(stopped, 20, 5)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    with (stopped / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "5", "10", "15", "20"]
    assert (stopped / "log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()


def test_little_is_lost_between_validations(tmp_path, monkeypatch):
    """Broken off after 11 of 20 steps, of which only the last is validated: 8 are kept."""
    whole = run(tmp_path / "whole", 20, 20)
    kill_after(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 20, 20, checkpoint_every=4)
    monkeypatch.undo()
    kept = read_metadata(tmp_path / "stopped" / "checkpoint.safetensors", "progress")
    assert kept["step"] == 8
    resumed = run(tmp_path / "stopped", 20, 20, checkpoint_every=4)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert (tmp_path / "stopped/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()


def test_moments_lie_as_their_weights_do_after_a_pause(tmp_path):
    """What a fused optimiser asks for."""
    run(tmp_path, 4, 2)
    state = State(
        ResidualUNet(widths=(4, 8, 8)),
        Schedule(steps=4, batch=4, volumes_per_round=2),
        torch.device("cpu"),
        16,
    )
    state.load(tmp_path / "checkpoint.safetensors")
    assert len(state.optimiser.state) == len([*state.network.parameters()])
    for weight, moments in state.optimiser.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == weight.stride()


def test_volumes_are_divided_as_they_were_at_first(tmp_path, monkeypatch):
    run(tmp_path, 4, 2)
    monkeypatch.setattr(team, "SIZE", 2)
    with pytest.raises(UsageError, match="processes was 1 at first and is 2 now"):
        run(tmp_path, 6, 2)
    monkeypatch.undo()
    monkeypatch.setattr(BlurredNoise, "patches_per_volume", 32)
    with pytest.raises(UsageError, match="patches_per_volume was 16 at first and is 32 now"):
        run(tmp_path, 6, 2)


class Twice(BlurredNoise):
    """Gives two processes the volumes that one process would see."""

    def pair(self, index):
        return super().pair(index // 4 * 2 + index % 2)


def run_in_a_team(folder, task):
    """`run` in each process of torchrun; every process leaves the weights that it has learned."""
    team.join("cpu")
    torch.manual_seed(0)
    network = ResidualUNet(widths=(4, 8, 8))
    run(folder, 6, 3, task, network)
    learned = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(learned, str(folder / f"of_process_{team.RANK}.safetensors"))


@pytest.mark.parametrize("task", ["Twice", "BlurredNoise"])
def test_two_processes_hold_the_same_weights(tmp_path, task):
    """Their mean gradient on the same volumes is the gradient of one of them, to the last bit; on
    volumes of their own it is another one, but the same in both."""
    (tmp_path / "program.py").write_text(
        "import sys; from pathlib import Path; from tests import test_training; "
        "test_training.run_in_a_team(Path(sys.argv[1]), getattr(test_training, sys.argv[2]))"
    )
    two = tmp_path / "two"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(tmp_path / "program.py"), str(two), task),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
    )
    of_first, of_second = (load_file(str(two / f"of_process_{i}.safetensors")) for i in (0, 1))
    assert all(torch.equal(of_first[key], of_second[key]) for key in of_first)
    one, both = run(tmp_path / "one", 6, 3), load_file(str(two / "checkpoint.safetensors"))
    assert all(torch.equal(one[key], both[key]) for key in one) == (task == "Twice")


class Recorded(BlurredNoise):
    """Remembers which volumes were asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


def test_processes_simulate_volumes_of_their_own(monkeypatch):
    seen = {}
    for rank in range(3):
        monkeypatch.setattr(team, "RANK", rank)
        monkeypatch.setattr(team, "SIZE", 3)
        task = Recorded()
        next(batches(task, Schedule(steps=16, **SETTINGS), 0, torch.device("cpu")))
        seen[rank] = task.asked
    assert seen == {0: [0, 1], 1: [2, 3], 2: [4, 5]}


def test_training_learns(tmp_path):
    run(tmp_path, 300, 100)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss"]) < float(rows[1]["loss"])
    assert float(rows[-1]["validation_gain_db"]) > 0.1


def test_weights_tell_the_loss_of_the_next_stage(tmp_path):
    network = ResidualUNet(widths=(4, 8, 8))
    save_network(network, tmp_path / "new.safetensors", loss_factors=[1.0, 0.4, 0.1, 0.3])
    assert loss_of(tmp_path / "new.safetensors").factors == (1.0, 0.4, 0.1, 0.3)
    save_network(network, tmp_path / "old.safetensors", step=3)
    with pytest.raises(UsageError, match="calibrate = true"):
        loss_of(tmp_path / "old.safetensors")


def test_a_finished_stage_needs_no_start(tmp_path):
    """What it began with may be gone, or of a time when weights did not tell their loss."""
    run(tmp_path / "out" / "last", 4, 2)
    (tmp_path / "persons.json").write_text('{"persons": []}')
    np.save(tmp_path / "strip_mask.npy", np.ones((2, 2, 2), bool))
    recipe = tmp_path / "recipe.toml"
    data = (
        "patch = 64\ncube = 96\npatches_per_volume = 8\nhead_share = 0.5\nown_share = 1.0\nseed = 1"
    )
    stage = 'steps = {}\nstart = "gone"\nclasses = [1, 0, 0, 0, 0, 0, 0]'
    design = f"[network]\ninputs = 6\nwidths = [4, 8, 8]\n[data]\n{data}\n[stages.last]\n{stage}"
    recipe.write_text(design.format(4))
    run_recipe(recipe, tmp_path, tmp_path / "out")
    recipe.write_text(design.format(6))
    with pytest.raises(UsageError, match="no persons of the split 'train'"):
        run_recipe(recipe, tmp_path, tmp_path / "out")


def test_a_network_does_not_begin_as_a_wider_or_deeper_one():
    narrow = ResidualUNet(6, (4, 8, 8))
    for other in (ResidualUNet(6, (4, 8, 16)), ResidualUNet(6, (4, 8, 8, 8))):
        with pytest.raises(UsageError, match="as wide, or narrower"):
            begin_with(narrow, other.state_dict())


@pytest.fixture
def prepared(tmp_path):
    """Two persons, and a recipe of two stages of one step each beside them."""
    folder, rows = tmp_path / "prepared", []
    folder.mkdir()
    for p, split in ((person(0), "train"), (person(1, head=False), "validation")):
        np.save(folder / f"{p.name}.npy", p.image.numpy())
        told = {"name": p.name, "file": f"{p.name}.npy", "split": split, "head": p.head}
        rows.append(told | {"voxel_sizes": [1.0] * 3, "world": np.eye(4).tolist()})
    (folder / "persons.json").write_text(json.dumps({"persons": rows}))
    np.save(folder / "strip_mask.npy", np.ones(WORKING_GRID.shape, dtype=bool))
    stage = "steps = 1\nvolumes_per_round = 1\nvalidation_volumes = 1\n"
    (tmp_path / "recipe.toml").write_text(
        "[network]\ninputs = 6\nwidths = [4, 8, 8]\n"
        "[data]\npatch = 32\ncube = 64\npatches_per_volume = 2\nhead_share = 0.5\n"
        "own_share = 1.0\nseed = 1\n[consistency]\nsteps = [1, 1, 1, 1, 1, 1, 1]\n"
        f"[stages.trunk]\n{stage}classes = [0, 0, 0, 0, 1, 0, 0]\nwidths = [4, 8, 16]\n"
        f'[stages.5]\n{stage}start = "trunk"\nbatch = 4\npatches_per_volume = 4\n'
    )
    return folder


def test_stages_take_their_width_from_their_start_and_their_patches_from_the_recipe(
    prepared, tmp_path
):
    """From prepared persons to weights; called again, training goes on by the recipe it began."""
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    first = ["train", str(prepared), str(out), "--recipe", str(recipe), "--stage", "trunk"]
    assert main(first) == 0
    assert not (out / "5").exists()
    assert main(first[:3]) == main([*first[:4], str(out / "recipe.toml")]) == 0
    assert (out / "recipe.toml").read_text() == recipe.read_text()
    for name in ("trunk", "5"):
        best = out / name / "best.safetensors"
        assert read_metadata(best, "network")["widths"] == [4, 8, 16]
        assert read_metadata(out / name / "checkpoint.safetensors", "progress")["step"] == 1


def test_export_goes_by_the_recipe_of_the_training(tmp_path, capsys):
    out = tmp_path / "out"
    for name in (*EXPERTS, "general"):
        (out / name).mkdir(parents=True)
        told = {"step": 1, "validation_gain_db": 0.5}
        save_network(ResidualUNet(6, (4, 8, 8)), out / name / "best.safetensors", **told)
    (out / "recipe.toml").write_text("[consistency]\nsteps = [3, 0, 0, 0, 0, 0, 4]\n")
    assert main(["export", str(out), str(tmp_path / "experts")]) == 0
    experts = load_registry(tmp_path / "experts")
    assert [experts[name].consistency_steps for name in ("1", "2", "7")] == [3, 0, 4]
    (out / "recipe.toml").write_text("[consistency]\nsteps = [3, 0, 4]\n")
    assert main(["export", str(out), str(tmp_path / "none")]) == 2
    assert "name 7 whole numbers" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    # What is there stays whole if one of the new ones is damaged.
    before = {path: path.read_bytes() for path in (tmp_path / "experts").iterdir()}
    for wrong in ("2", "[1, 1, 1, 1, 1, 1, -1]", '[1, 1, 1, 1, 1, 1, "1"]'):
        (out / "recipe.toml").write_text(f"[consistency]\nsteps = {wrong}\n")
        assert main(["export", str(out), str(tmp_path / "experts")]) == 2
    (out / "recipe.toml").write_text("[consistency]\nsteps = [0, 0, 0, 0, 0, 0, 0]\n")
    (out / "5/best.safetensors").write_bytes((out / "5/best.safetensors").read_bytes()[:500])
    assert main(["export", str(out), str(tmp_path / "experts")]) == 78
    assert "expert 5: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "experts").iterdir()} == before


def test_a_stage_begins_with_the_mean_of_several(prepared, tmp_path):
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    for name, widths in (("a", (4, 8, 8)), ("b", (4, 8, 8)), ("wide", (4, 8, 16))):
        (out / name).mkdir(parents=True)
        network = ResidualUNet(6, widths)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        save_network(network, out / name / "best.safetensors", loss_factors=[1.0] * 4)
    stage = "steps = 0\nvalidation_volumes = 1\n"
    text = recipe.read_text() + f'[stages.6]\n{stage}start = ["a", "b"]\n'
    recipe.write_text(text + f'[stages.7]\n{stage}start = ["a", "wide"]\n')
    run_recipe(recipe, prepared, out, only=["6"], workers=0)
    assert is_finished(out / "6", Schedule(steps=0))
    a, b, six = (load_file(str(out / name / "best.safetensors")) for name in ("a", "b", "6"))
    for name, weight in six.items():
        mean = (a[name].float() + b[name].float()) / 2
        torch.testing.assert_close(weight.float(), mean, rtol=1e-3, atol=1e-3)
    with pytest.raises(UsageError, match=r"same widths: .*a.*wide"):
        run_recipe(recipe, prepared, out, only=["7"], workers=0)


def test_what_training_lacks_is_told(prepared, tmp_path, capsys):
    """One sentence and exit code 2, whatever is missing, and no folder for a stage."""
    everybody = tmp_path / "bank.json"
    save_bank([replace(g, held_out=True) for g in load_bank()], everybody)
    out, common = tmp_path / "out", ["--recipe", str(tmp_path / "recipe.toml")]
    recipe = (tmp_path / "recipe.toml").read_text()
    named = tmp_path / "named.toml"
    named.write_text(recipe + f'[persons]\nvalidation = ["sub-{person(0).name}"]\n')
    for options, said in (
        ([str(prepared), str(out), "--recipe", str(named)], "names them as validation or held_out"),
        ([str(prepared), str(out), *common, "--device", "cuda:99"], "CUDA device.s. here"),
        ([str(prepared), str(out), *common, "--stage", "6"], "--stage 6: .* holds trunk, 5"),
        ([str(prepared), str(out), *common, "--stage", "5"], "stage 5 begins with trunk"),
        ([str(out), str(out), *common], "there is no .*persons.json"),
        ([str(prepared), str(out), *common, "--bank", str(out / "b")], "there is no bank"),
        ([str(prepared), str(out), *common, "--bank", str(everybody)], "all of its persons"),
        ([str(prepared), str(out), *common, "--bank", str(tmp_path / "recipe.toml")], "not a bank"),
    ):
        assert main(["train", *options]) == 2
        assert re.search(said, capsys.readouterr().err)
    assert main(["export", str(out), str(tmp_path / "experts"), *common]) == 2
    assert "lacks the stages 1, 2, 3" in capsys.readouterr().err
    assert not (tmp_path / "experts").exists()
    assert [path.name for path in out.iterdir()] == ["recipe.toml"]


def test_a_mistake_in_a_recipe_is_told_and_not_copied(prepared, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    text = recipe.read_text()
    for wrong, said in (
        ("[", "recipe.toml: "),
        (text.replace("[data]", "[date]"), r"lacks \[data\]"),
        (text.replace("cube = ", "cubes = "), r"\[data\] lacks cube"),
        (text + "\n[stages.6]\nsteps = 1\nstep = 2\n", "has no setting step; there are batch, "),
        (text + "\n[stages.mine]\nsteps = 1\n", "stage 'mine' lacks its classes"),
        (text + '\n[stages.6]\nsteps = "1"\n', "stage '6': steps must be a whole number"),
        (text + "\n[stages.6]\nsteps = 1\nvalidation_volumes = 0\n", "of at least 1, not 0"),
        (text + "\n[stages.6]\nsteps = 1\nrate = nan\n", "rate must be a number"),
        (text + "\n[stages.6]\nsteps = 1\nbatch = 9999\n", "batch is larger than"),
        (text + "\n[stages.6]\nsteps = 1\nclasses = [1, 1]\n", "shares of classes 1 to 7"),
        (text + f"\n[stages.6]\nsteps = 1\nclasses = {[0] * 7}\n", "shares of classes 1 to 7"),
        (re.sub(r"(?m)^patch = .*", "patch = 9999", text), "larger than the cube"),
        (re.sub(r"(?m)^patch = .*", "patch = 6", text), "patch must be a multiple of 4"),
    ):
        recipe.write_text(wrong)
        assert main(["train", str(prepared), str(out), "--recipe", str(recipe)]) == 2
        assert re.search(said, capsys.readouterr().err)
        assert not (out / "recipe.toml").exists()
    masks = ["--template", __file__, "--template-mask", __file__]
    assert main(["prepare", str(out), str(out), "--recipe", "no.toml", *masks]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_stage_that_has_not_taken_its_steps_is_told(tmp_path, caplog):
    run(tmp_path / "trunk", 5, 5)
    _starts("5", {"start": "trunk"}, tmp_path)
    assert not caplog.text
    (tmp_path / "trunk/schedule.json").write_text('{"steps": 90}')
    _starts("5", {"start": "trunk"}, tmp_path)
    assert "trunk has taken 5 of its 90 steps" in caplog.text


def test_persons_too_coarse_for_a_class_are_told(prepared, tmp_path):
    persons = json.loads((prepared / "persons.json").read_text())
    for person in persons["persons"]:
        person["voxel_sizes"] = [1.25, 1.25, 1.25]
    (prepared / "persons.json").write_text(json.dumps(persons))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[0, 0, 0, 0, 1,", "[0, 1, 0, 0, 1,"))
    with pytest.raises(UsageError, match=r"'trunk' draws class 2, .*'train' .* too coarse"):
        run_recipe(recipe, prepared, tmp_path / "out", only=["trunk"], workers=0)


def test_the_shipped_recipe_is_whole():
    """Every stage has settings that exist, begins with one before it, and the experts ship."""
    recipe = tomllib.loads((ROOT / "remix_bids" / "data" / "recipe.toml").read_text())
    before: set[str] = set()
    for name, settings in recipe["stages"].items():
        start = settings.get("start", name)
        assert {start} <= before | {name} if isinstance(start, str) else {*start} <= before
        assert ("start" in settings) == bool(before)
        Schedule(**{k: v for k, v in settings.items() if k not in NOT_OF_SCHEDULE})
        assert sum(class_weights(name, settings, 1.0)) > 0
        before.add(name)
    assert {*EXPERTS, GENERAL} <= before


def test_a_stage_is_never_worse_than_what_it_begins_with(tmp_path):
    run(tmp_path / "good", 300, 100)
    good = load_file(str(tmp_path / "good" / "best.safetensors"))
    network = ResidualUNet(widths=(4, 8, 8))
    begin_with(network, good)
    schedule = Schedule(steps=10, validate_every=5, rate=0.03, **SETTINGS)
    train(network, BlurredNoise(), BlurredNoise(7), schedule, tmp_path / "bad", progress=False)
    best = load_file(str(tmp_path / "bad" / "best.safetensors"))
    assert all(torch.equal(best[key], good[key]) for key in good)


def test_numbers_that_are_none_end_a_stage_before_its_checkpoint(tmp_path):
    class Broken(BlurredNoise):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            sample["volume"][-1] = np.nan
            return sample

    schedule = Schedule(steps=10, validate_every=5, **SETTINGS)
    network = ResidualUNet(widths=(4, 8, 8))
    with pytest.raises(RemixError, match="weights are no finite numbers at step 5 or before"):
        train(network, Broken(), BlurredNoise(7), schedule, tmp_path, progress=False)
    kept = load_file(str(tmp_path / "checkpoint.safetensors"))
    assert all(tensor.isfinite().all() for tensor in kept.values())
