"""Losses by identities; the loop by its promises: it learns, resumes and repeats."""

import csv

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from remix_bids.experts.unet import ResidualUNet
from remix_bids.simulation.acquisition import load_bank
from remix_bids.spatial import WORKING_GRID
from remix_bids.training.dataset import OFF, Augmentation, Person, Simulator, vary
from remix_bids.training.losses import (
    SHARES,
    RemixLoss,
    correlation_loss,
    gradient_mae,
    mae,
    ssim_loss,
    ssim_map,
)
from remix_bids.training.recipe import class_weights
from remix_bids.training.trainer import Schedule, train

from .test_spatial import smooth_image

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


def test_ssim_against_scikit_image(images):
    from skimage.metrics import structural_similarity

    x, y, _ = images
    _, expected = structural_similarity(
        x[0].numpy(),
        y[0].numpy(),
        win_size=7,
        gaussian_weights=True,
        sigma=1.5,
        truncate=2.0,
        use_sample_covariance=False,
        data_range=1.0,
        full=True,
    )
    np.testing.assert_allclose(ssim_map(x, y)[0], expected[3:-3, 3:-3, 3:-3], atol=1e-4)


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


def simulator(augment=OFF, **settings):
    return Simulator(
        persons=[person(0), person(1, head=False)],
        bank=[g for g in load_bank() if not g.held_out],
        strip_mask=torch.ones(WORKING_GRID.shape, dtype=torch.bool),
        class_weights=(0, 0, 0, 0, 1, 0, 0),
        seed=5,
        patch=16,
        cube=64,
        patches_per_volume=8,
        augment=augment,
        **settings,
    )


def test_a_volume_is_the_same_whenever_it_is_asked_for():
    one, two = simulator(Augmentation()), simulator(Augmentation())
    two[0]
    for key, value in one[3].items():
        assert torch.equal(value, two[3][key])
    assert not torch.equal(one[2]["inputs"], one[3]["inputs"])


def test_both_images_of_a_pair_share_contrast_and_scale():
    pair, _ = simulator().pair(1)
    inside = (pair.inputs[1] > 0) & (pair.target > 0.3)
    ratio = float(pair.inputs[0][inside].mean() / pair.target[inside].mean())
    assert ratio == pytest.approx(1, abs=0.05)


def test_augmentation_off_changes_nothing():
    mask = torch.zeros(WORKING_GRID.shape, dtype=torch.bool)
    p = person()
    assert torch.equal(vary(np.random.default_rng(0), p, OFF, mask), p.image.float())


def test_class_weights_follow_the_recipe():
    assert class_weights("1", {}, 0.85) == pytest.approx((0.85, 0.15, 0, 0, 0, 0, 0))
    assert class_weights("4", {}, 0.85) == pytest.approx((0, 0, 0.075, 0.85, 0.075, 0, 0))
    assert class_weights("trunk", {"classes": [1, 2, 3, 4, 5, 6, 7]}, 0.85)[6] == 7


SETTINGS = {
    "batch": 4,
    "warmup": 2,
    "rim": 2,
    "volumes_per_round": 2,
    "validation_volumes": 1,
    "workers": 0,
}


def run(folder, steps, validate_every, total=None):
    torch.manual_seed(0)
    network = ResidualUNet(widths=(4, 8, 8))
    schedule = Schedule(steps=steps, validate_every=validate_every, rate=2e-3, **SETTINGS)
    train(network, simulator(), simulator().for_validation(3), schedule, folder, progress=False)
    return load_file(str(folder / "checkpoint.safetensors"))


def test_training_resumes_to_the_step_and_repeats(tmp_path, monkeypatch):
    """Stopped after 3 of 6 steps, in the middle of a round, and gone on: the same weights."""
    whole = run(tmp_path / "whole", 6, 3)
    stopped = tmp_path / "stopped"
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return 1e-3

    monkeypatch.setattr(Schedule, "rate_at", stop)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, 6, 3)
    monkeypatch.undo()
    monkeypatch.setattr(Schedule, "rate_at", lambda *a: 1e-3)
    resumed = run(stopped, 6, 3)
    again = run(tmp_path / "again", 6, 3)
    assert all(torch.equal(resumed[k], again[k]) for k in again)
    assert not all(torch.equal(whole[k], again[k]) for k in again)  # the rate differs: they can
    with (stopped / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6"]


def test_training_learns(tmp_path):
    run(tmp_path, 60, 30)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["validation_gain_db"]) > 0.1
