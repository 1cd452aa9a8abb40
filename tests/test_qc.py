"""Consistency and image quality: identities, known answers, and errors planted on purpose."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from remix_bids.qc import consistency, left_out, quality
from remix_bids.qc.dictionary import qc_dictionary
from remix_bids.simulation.acquisition import Acquisition, turn_about
from remix_bids.simulation.degrade import acquire, field_of_view, restore_grid
from remix_bids.simulation.estimate import make_consistent
from remix_bids.spatial import WORKING_GRID, Grid

SHAPE = WORKING_GRID.shape
CENTRE = np.array([90, 110, 80])
NOISE = 12.0


def ball(centre, radius):
    index = np.indices(SHAPE, dtype=np.float32)
    return ((index - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius**2


@pytest.fixture(scope="module")
def scan():
    """A textured ball, 64 mm across, scanned in axial slices of 4 mm with Gaussian noise."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(3)
    inner = ball(CENTRE, 32)
    box = tuple(slice(c - 40, c + 41) for c in CENTRE)
    texture = gaussian_filter(rng.standard_normal((81, 81, 81)), 1.5)
    truth = np.zeros(SHAPE, dtype=np.float32)
    truth[box] = 600 + 120 * texture / texture.std()
    truth = np.clip(gaussian_filter(truth * inner, 0.7), 0, None)
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    affine[:3, 3] = WORKING_GRID.affine[:3, :3] @ (CENTRE - 40) + WORKING_GRID.affine[:3, 3]
    acquisition = Acquisition(Grid((81, 81, 21), affine), np.eye(4), (1.0, 1.0, 4.0))
    native = acquire(torch.from_numpy(truth), acquisition).numpy()
    native = native + NOISE * rng.standard_normal(native.shape).astype(np.float32)
    low = restore_grid(torch.from_numpy(native), acquisition.grid, acquisition.world)
    return SimpleNamespace(
        truth=truth,
        native=native,
        low=low.image.numpy(),
        covered=low.covered.numpy(),
        brain=ball(CENTRE, 28),
        acquisition=acquisition,
    )


def check(scan, image, **settings):
    given = (scan.native, image, scan.covered, scan.brain, scan.acquisition)
    return consistency.check(*given, noise=NOISE, **settings)


@pytest.fixture(scope="module")
def of_truth(scan):
    return check(scan, scan.truth)


def near(found, place):
    """Chi-square of the window around a place of the working grid."""
    index = (np.array(place) - (CENTRE - 40)) / (1, 1, 4)
    return float(found.chi2[tuple(index.round().astype(int))])


# --- consistency ---------------------------------------------------------------------------------


def test_the_truth_has_a_chi_square_of_one(of_truth):
    assert of_truth.median == pytest.approx(1, abs=0.1)
    assert of_truth.disagreeing == 0
    assert of_truth.largest < 2
    assert np.isnan(of_truth.residual[:, :, 0]).all()  # half of the first slice lies outside


def test_a_wrong_scale_disagrees_everywhere(scan, of_truth):
    found = check(scan, 1.1 * scan.truth)
    assert found.disagreeing > 0.95
    assert found.nrmse == pytest.approx(0.1, abs=0.02)
    assert found.correlation == pytest.approx(of_truth.correlation, abs=1e-3)  # it tells nothing


def test_interpolation_disagrees_more_than_the_truth(scan, of_truth):
    assert check(scan, scan.low).median > 1.5 * of_truth.median


def test_a_planted_sphere_is_seen(scan, of_truth):
    image = scan.truth.copy()
    place = CENTRE + np.array([8, -6, 4])
    image[ball(place, 3)] *= 1.2
    found = check(scan, image)
    assert near(found, place) > 2 * near(of_truth, place)
    change = np.nan_to_num(found.chi2 - of_truth.chi2)
    peak = np.array(np.unravel_index(np.argmax(change), change.shape)) * (1, 1, 4) + CENTRE - 40
    assert np.abs(peak - place).max() <= 6  # the map points at it
    far = CENTRE - np.array([8, -6, 16])
    assert near(found, far) == pytest.approx(near(of_truth, far), rel=0.02)


def test_an_erased_structure_is_seen(scan, of_truth):
    image = scan.truth.copy()
    place = CENTRE + np.array([-6, 5, 0])
    where = ball(place, 6)
    image[where] = gaussian_filter(scan.truth, 6)[where]
    assert near(check(scan, image), place) > 2 * near(of_truth, place)


def test_a_pair_in_adjacent_planes_is_not_seen(scan, of_truth):
    """The check is blind to it, and the report says so; the map of the unknowable shows it."""
    image = scan.truth.copy()
    x, y, z = CENTRE
    patch = (slice(x - 8, x + 9), slice(y - 8, y + 9))
    image[(*patch, z)] += 100
    image[(*patch, z + 1)] -= 100
    assert near(check(scan, image), CENTRE) < 1.5 * near(of_truth, CENTRE)
    blind = [
        consistency.unknowable(values, scan.covered, scan.brain, scan.acquisition)
        for values in (scan.truth, image)
    ]
    change = (blind[1] - blind[0])[(*patch, slice(z, z + 2))]
    assert np.abs(change).mean() > 60  # of 100


def test_interpolated_images_hold_nothing_unknowable(scan):
    inside = (scan.covered, scan.brain, scan.acquisition)
    low = consistency.unknowable(scan.low, *inside)
    true = consistency.unknowable(scan.truth, *inside)
    share = consistency.energy_share
    assert share(low, scan.low, scan.brain) < 0.01
    assert share(true, scan.truth, scan.brain) > 0.05  # texture of 1.5 mm, slices of 4 mm


def test_energy_share():
    values = np.random.default_rng(0).random((5, 6, 7))
    everywhere = np.ones(values.shape, dtype=bool)
    assert consistency.energy_share(values - values.mean(), values, everywhere) == pytest.approx(1)
    assert consistency.energy_share(0 * values, values, everywhere) == 0
    assert consistency.energy_share(values, np.ones_like(values), everywhere) == 0


@pytest.mark.parametrize("sides", [(1.0, 1.0, 4.0), (0.5, 0.5, 5.0), (2.0, 2.0, 2.0)])
def test_noise_is_found_and_bounded_from_below(sides):
    rng = np.random.default_rng(1)
    smooth = 500 + gaussian_filter(rng.standard_normal((80, 80, 40)), 8) * 1000
    brain = np.ones(smooth.shape, dtype=bool)
    grid = Grid(smooth.shape, np.diag([*sides, 1.0]))
    noisy = smooth + 20 * rng.standard_normal(smooth.shape)
    assert consistency.estimate_noise(noisy, brain, grid) == pytest.approx(20, rel=0.05)
    floor = consistency.NOISE_FLOOR * np.median(smooth)
    assert consistency.estimate_noise(smooth, brain, grid) == pytest.approx(floor)
    with pytest.raises(ValueError, match="no voxel"):
        consistency.estimate_noise(smooth, ~brain, grid)


def test_nothing_of_the_brain_acquired(scan):
    with pytest.raises(ValueError, match="no voxel of the brain"):
        consistency.check(
            scan.native, scan.truth, scan.covered, ball((5, 5, 5), 3), scan.acquisition
        )


def test_windows_ignore_what_was_not_judged():
    grid = Grid((30, 30, 10), np.diag([1.0, 1.0, 4.0, 1.0]))
    values = np.full(grid.shape, 3.0)
    where = np.ones(grid.shape, dtype=bool)
    values[10:12], where[10:12] = 1e9, False
    mean = consistency.windowed_mean(values, where, grid)
    assert np.isnan(mean[10:12]).all()
    np.testing.assert_allclose(mean[where], 3, rtol=1e-5)


@pytest.mark.parametrize("angle", [0, 10, 15, 24, 40])
def test_a_window_is_one_slice_of_5_mm_however_its_affine_was_rounded(angle):
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    affine[:3, :3] = turn_about(np.array([1.0, 0, 0]), angle) @ affine[:3, :3]
    grid = Grid((30, 30, 10), affine.astype(np.float32).astype(float))
    values = np.ones(grid.shape)
    values[:, :, 5] = 10
    mean = consistency.windowed_mean(values, np.ones(grid.shape, dtype=bool), grid)
    np.testing.assert_allclose(mean, values, rtol=1e-5)


@pytest.mark.parametrize(("spacing", "width"), [(6.0, 3.4), (7.0, 4.0), (5.0, 3.0)])
def test_the_first_and_the_last_slice_are_predicted_like_all(spacing, width):
    affine = np.diag([1.0, 1.0, spacing, 1.0])
    affine[:3, 3] = WORKING_GRID.affine[:3, :3] @ (50.0, 60.0, 40.5) + WORKING_GRID.affine[:3, 3]
    acquisition = Acquisition(Grid((60, 60, 12), affine), np.eye(4), (1.0, 1.0, width))
    covered = field_of_view(acquisition).numpy()
    found = consistency.predict(1000.0 * covered, covered, acquisition)
    assert np.isfinite(found[30, 30, [0, -1]]).all()
    np.testing.assert_allclose(found[np.isfinite(found)], 1000, rtol=1e-4)


def test_consistency_steps_agree_and_leave_noise_alone(scan):
    low, truth, native = (torch.from_numpy(v) for v in (scan.low, scan.truth, scan.native))
    clean = acquire(truth, scan.acquisition)
    found, share = make_consistent(low, clean, scan.acquisition, WORKING_GRID, 3)
    image = (found * torch.from_numpy(scan.covered)).numpy()
    assert share == 1
    before, after = check(scan, scan.low), check(scan, image)
    assert after.median < before.median
    error = [np.abs(v - scan.truth)[scan.brain].mean() for v in (scan.low, image)]
    assert error[1] < error[0]
    same, share = make_consistent(low, native, scan.acquisition, WORKING_GRID, 3)
    assert share == 0
    assert torch.equal(same, low)


def test_largest_places():
    values = np.zeros((40, 40, 40))
    values[10, 10, 10], values[12, 10, 10], values[30, 30, 30] = 5, 4, 3
    everywhere = np.ones(values.shape, dtype=bool)
    found = consistency.largest_places(values, everywhere, n=2)
    assert found == [(10, 10, 10), (30, 30, 30)]
    assert consistency.largest_places(values, values == 3) == [(30, 30, 30)]


def test_thick_slices_are_steps():
    source = Grid((5, 5, 3), np.diag([1.0, 1.0, 4.0, 1.0]))
    native = np.broadcast_to(np.array([10.0, 20, 30], dtype=np.float32), (5, 5, 3))
    mapping = np.diag([1.0, 1.0, 0.25, 1.0])
    shown = consistency.thick_slices(native, source, mapping, (5, 5, 14))
    line = shown[2, 2]
    assert set(np.unique(line)) == {0, 10, 20, 30}  # no value in between; 0 outside
    assert (line == 20).sum() >= 3
    assert line[11:].tolist() == [0, 0, 0] or line[10] in (0, 30)


def test_what_lies_outside_the_template_is_not_judged(scan):
    """Beyond the grid nothing was predicted, however much the scan shows there."""
    affine = scan.acquisition.grid.affine.copy()
    affine[:3, 3] = WORKING_GRID.affine[:3, 3] + (30, 30, -41)
    grid = Grid((81, 81, 21), affine)  # slices at -41, -37 ... 39 mm of the grid
    acquisition = Acquisition(grid, np.eye(4), (1.0, 1.0, 4.0))
    index = np.indices(SHAPE, dtype=np.float32)[2]
    image = 100 + 3 * index
    predicted = consistency.predict(image, np.ones(SHAPE, dtype=bool), acquisition)
    seen = np.isfinite(predicted).any(axis=(0, 1))
    assert not seen[:11].any()  # the 11th lies at -1 mm
    assert seen[13:20].all()
    neck = np.where(np.arange(21) < 11, 5000, 100 + 3 * (4 * np.arange(21) - 41.0))
    native = np.broadcast_to(neck, grid.shape).astype(np.float32)
    args = (image, np.ones(SHAPE, dtype=bool), index < 38)
    found = consistency.check(native, *args, acquisition, noise=NOISE)
    assert found.largest < 1


def test_negative_intensities_change_nothing(scan):
    """As of a scan that was centred around its mean: no figure takes 0 for the least value."""
    shift = -600.0
    inside = (scan.covered, scan.brain, scan.acquisition)

    def figures(shift):
        native, kept = scan.native + shift, scan.native[:, :, ::2] + shift
        image = np.where(scan.covered, scan.low + shift, 0)
        lowest = min(0.0, float(native.min()))
        blind = consistency.unknowable(image, *inside, lowest=lowest)
        return [
            consistency.energy_share(blind, image, scan.brain),
            *left_out.compare(native, kept, image, *inside).values(),
        ]

    assert figures(shift)[0] == pytest.approx(figures(0)[0], abs=0.002)
    assert figures(shift)[1:] == pytest.approx(figures(0)[1:], abs=0.5)


# --- slices left out -----------------------------------------------------------------------------


def test_left_out_slices(scan):
    """The truth itself comes to the noise; cubic is exact on a scan that is linear along z."""
    args = (scan.covered, scan.brain, scan.acquisition)
    found = left_out.compare(scan.native, scan.native[:, :, ::2], scan.truth, *args)
    peak = np.percentile(scan.native[20:60, 20:60, 5:15], 99.5)
    assert found["left_out_psnr"] == pytest.approx(20 * np.log10(peak / NOISE), abs=0.7)
    assert found["left_out_psnr"] > found["left_out_psnr_cubic"] + 3
    ramp = np.broadcast_to(np.arange(21, dtype=np.float32) * 10 + 100, (81, 81, 21)).copy()
    found = left_out.compare(ramp, ramp[:, :, ::2], scan.truth, *args)
    assert found["left_out_psnr_cubic"] > 60
    none = left_out.compare(
        scan.native, scan.native[:, :, :1], scan.truth, *args
    )  # one slice kept: nothing in between
    assert none == {"left_out_psnr": None, "left_out_psnr_cubic": None}


# --- image quality -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head():
    """Three nested balls as CSF, grey and white matter, with a little noise."""
    rng = np.random.default_rng(5)
    index = np.indices((90, 90, 90)) - 45
    radius = np.sqrt((index**2).sum(axis=0))
    image = np.select([radius < 25, radius < 33, radius < 40], [900.0, 600.0, 200.0])
    return SimpleNamespace(
        clean=image, image=image + 9 * rng.standard_normal(image.shape), brain=radius < 40
    )


def test_sharpness(head):
    plain = quality.sharpness(head.clean, head.brain)
    assert quality.sharpness(3 * head.clean + 7, head.brain) == pytest.approx(plain)
    assert quality.sharpness(gaussian_filter(head.clean, 2), head.brain) < 0.85 * plain
    ramp = np.broadcast_to(np.arange(90.0), (90, 90, 90))
    cube = np.ones((90, 90, 90), dtype=bool)
    assert quality.sharpness(ramp, cube) == pytest.approx(100 / (0.9 * 89), rel=0.03)


def test_sharpness_of_a_part_is_that_of_the_whole(head):
    """The edge of the field of view is no edge of the brain."""
    covered = np.zeros(head.brain.shape, dtype=bool)
    covered[:, :, 30:60] = True
    given = (np.eye(3), 2, None, 1.0)
    part = quality.image_quality(head.image * covered, head.brain & covered, covered, *given)
    everywhere = np.ones_like(covered)
    inner = head.brain.copy()
    inner[:, :, :31] = inner[:, :, 59:] = False
    whole = quality.image_quality(head.image, inner, everywhere, *given)
    assert part["sharpness"] == pytest.approx(whole["sharpness"], rel=1e-6)


def test_anisotropy_finds_the_blurred_axis():
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((80, 80, 80))
    cube = np.ones(noise.shape, dtype=bool)
    axes = np.eye(3)
    for axis in range(3):
        assert abs(quality.anisotropy(noise, cube, axes, axis)) < 1.5
        sigma = [0, 0, 0]
        sigma[axis] = 1.5
        blurred = gaussian_filter(noise, sigma)
        assert quality.anisotropy(blurred, cube, axes, axis) < -5
        assert quality.anisotropy(blurred, cube, axes, (axis + 1) % 3) > 2
    index = np.indices(noise.shape) - 39.5
    ball = np.sqrt((index**2).sum(axis=0)) < 38
    values = [
        quality.anisotropy(gaussian_filter(5 + noise, [0, 0, sigma]), ball, axes, 2)
        for sigma in (0, 1, 2, 3, 4)
    ]
    assert (np.diff(values) < -1).all()  # the border of the brain hides no blur
    turned = np.array([[1, 1, 0], [-1, 1, 0], [0, 0, 1.0]]).T  # native axes need not be ours
    blurred = gaussian_filter(noise, [0, 0, 1.5])
    assert quality.anisotropy(blurred, cube, turned, 2) < -5
    # Columns are as long as the voxels' sides, in any order, and oblique.
    straight = quality.anisotropy(blurred, cube, axes, 2)
    sagittal = np.array([[0, 1.0, 0], [0, 0, 1], [5, 0, 0]])
    assert quality.anisotropy(blurred, cube, sagittal, 0) == pytest.approx(straight, abs=1e-6)
    tilt = turn_about(np.array([1.0, 0, 0]), 20)
    across = gaussian_filter(noise, [0, 1.5, 0])
    assert quality.anisotropy(blurred, cube, np.diag([1, 1, 5]), 2) == pytest.approx(straight)
    for image in (blurred, across):
        unit = quality.anisotropy(image, cube, tilt, 2)
        long = quality.anisotropy(image, cube, tilt @ np.diag([1, 1, 5]), 2)
        assert long == pytest.approx(unit, abs=1e-6)
    few = np.zeros_like(cube)
    few[:3, :3, :3] = True
    assert np.isnan(quality.anisotropy(noise, few, axes, 2))
    assert abs(quality.directional_power(blurred, cube, turned)[:2]).max() < 2.5


def test_tissues_and_what_is_measured_in_them(head):
    tissues = quality.find_tissues(head.image, head.brain)
    assert np.median(head.clean[tissues.white]) == 900
    assert np.median(head.clean[tissues.grey]) == 600
    assert np.median(head.clean[tissues.csf]) == 200
    found = quality.image_quality(
        head.image, head.brain, np.ones_like(head.brain), np.eye(3), 2, tissues, 0.5
    )
    assert found["noise"] == pytest.approx(1.0, rel=0.1)  # 9 of 900, percent
    assert found["snr"] == pytest.approx(100, rel=0.1)
    assert found["cnr"] == pytest.approx(300 / 9, rel=0.15)
    tissue = (head.clean[head.brain] > 400).sum()
    assert found["brain_volume"] == pytest.approx(0.5 * tissue, rel=0.02)
    # Of another image, too, what is brighter than CSF was on the first one.
    darker = np.where(head.clean == 600, 0.9, 1.0) * head.image
    after = quality.image_quality(
        darker, head.brain, np.ones_like(head.brain), np.eye(3), 2, tissues, 0.5
    )
    assert after["brain_volume"] == 0.5 * (darker[head.brain] >= tissues.dark).sum()


def test_what_cannot_be_measured_is_none(head):
    assert quality.find_tissues(np.full((90, 90, 90), 5.0), head.brain) is None
    assert quality.find_tissues(head.image, head.brain & (head.clean > 1e9)) is None
    noise = np.random.default_rng(0).standard_normal((90, 90, 90))
    assert quality.find_tissues(noise, head.brain) is None
    assert quality.find_tissues(np.where(head.clean > 400, 1000.0, 0.0), head.brain) is None
    found = quality.image_quality(
        head.image, head.brain, np.ones_like(head.brain), np.eye(3), 2, None, 1.0
    )
    assert {key for key, value in found.items() if value is None} == {
        *("noise", "snr", "cnr", "brain_volume")
    }


def test_residual_energy(head):
    assert quality.residual_energy(head.image, head.image, head.brain) == 0
    mean = head.image[head.brain].mean()
    doubled = 2 * head.image - mean
    assert quality.residual_energy(head.image, doubled, head.brain) == pytest.approx(100)


def test_every_measure_is_explained(head):
    found = quality.image_quality(
        head.image, head.brain, np.ones_like(head.brain), np.eye(3), 2, None, 1.0
    )
    dictionary = qc_dictionary()
    assert set(found) <= set(dictionary)
    for entry in dictionary.values():
        assert set(entry) == {"LongName", "Description", "Units", "Better"}
