"""The linear estimate that feeds the network, by identities and known answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from remix_bids.evaluation.methods import back_project
from remix_bids.simulation.acquisition import Acquisition, from_header, turn_about
from remix_bids.simulation.degrade import acquire, field_of_view, restore_grid
from remix_bids.simulation.estimate import (
    _covariance,
    estimate_image,
    estimator,
    linear_estimate,
    make_consistent,
    trust,
    unexplained,
)
from remix_bids.simulation.noise import freedom_from_noise
from remix_bids.spatial import Grid

GRID = Grid((48, 40, 48), np.eye(4))


def thick(spacing=4.0, width=4.0, axis=2):
    """Slices of some thickness, a little turned."""
    sizes = np.ones(3)
    sizes[axis] = spacing
    angle = np.deg2rad(5)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    shape = [48, 40, 48]
    shape[axis] = round(48 / spacing)
    widths = [1.0, 1.0, 1.0]
    widths[axis] = width
    x, y, z = shape
    return Acquisition(Grid((x, y, z), np.diag([*sizes, 1.0])), turn, tuple(widths))


@pytest.fixture(scope="module")
def texture():
    """A random field that is positive and smooth at the scale of a few voxels."""
    noise = torch.randn((1, 1, *GRID.shape), generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)
    smooth = torch.nn.functional.avg_pool3d(smooth, 3, stride=1, padding=1)[0, 0]
    return 1 + smooth / smooth.std() * 0.2


@pytest.mark.parametrize(("n", "spacing", "width"), [(1, 5, 5), (2, 3, 3), (30, 5, 4), (200, 1, 1)])
def test_a_constant_comes_back_as_itself(n, spacing, width):
    positions = np.linspace(-spacing / 2, (n - 0.5) * spacing, 77)
    np.testing.assert_allclose(estimator(n, spacing, width, positions).sum(axis=1), 1, atol=1e-9)


def test_thin_samples_are_interpolated():
    """Where an image is sampled as finely as it is estimated, the samples stay what they are."""
    samples = np.sin(np.arange(40) * 2 * np.pi / 8)
    matrix = estimator(40, 1.0, 1.0, np.arange(40.0))
    assert np.abs(matrix @ samples - samples).max() < 0.02


def test_covariance_falls_off_and_blur_lowers_it():
    distance = np.linspace(0, 60, 200)
    sharp, blurred = _covariance(distance, 1e-6), _covariance(distance, 6.0)
    assert sharp[0] == pytest.approx(1)
    assert (np.diff(sharp) < 0).all()
    assert blurred[0] < sharp[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_scan_that_is_stored_the_other_way_round_is_estimated_alike(texture, axis):
    acquisition = thick(spacing=3.7)
    native = acquire(texture, acquisition, GRID)
    grid = acquisition.grid
    mirrored = np.eye(4)
    mirrored[axis, axis], mirrored[axis, 3] = -1, grid.shape[axis] - 1
    other = replace(acquisition, grid=Grid(grid.shape, grid.affine @ mirrored))
    one = estimate_image(native, acquisition, GRID)
    two = estimate_image(native.flip(axis), other, GRID)
    assert float((one - two).abs().max()) < 1e-4


def test_a_part_is_estimated_as_the_whole_is(texture):
    acquisition = thick(spacing=3.7)
    native = acquire(texture, acquisition, GRID)
    shift = np.eye(4)
    shift[:3, 3] = 7, 5, 9
    part = estimate_image(native, acquisition, Grid((20, 20, 20), GRID.affine @ shift))
    whole = estimate_image(native, acquisition, GRID)[7:27, 5:25, 9:29]
    assert float((part - whole).abs().max()) < 1e-4


def test_the_estimate_predicts_its_own_measurements(texture):
    """Seen through the same acquisition again, it gives the scan back, far better than a spline."""
    acquisition = thick()
    native = acquire(texture, acquisition, GRID)
    inner = (slice(6, -6), slice(6, -6), slice(2, -2))

    def missing(image):
        return (acquire(image, acquisition, GRID) - native)[inner].std() / native[inner].std()

    spline = restore_grid(native, acquisition.grid, acquisition.world, GRID).image
    once = estimate_image(native, acquisition, GRID)
    assert missing(once) < 0.5 * missing(spline)
    assert missing(linear_estimate(native, acquisition, GRID).image) < 0.7 * missing(once)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_it_is_nearer_to_the_truth_than_a_spline(texture, axis):
    acquisition = thick(3.0, 3.0, axis)
    native = acquire(texture, acquisition, GRID)
    low = linear_estimate(native, acquisition, GRID)
    spline = restore_grid(native, acquisition.grid, acquisition.world, GRID).image
    inner = (slice(8, -8),) * 3
    errors = [((x - texture)[inner] ** 2).mean() for x in (low.image, spline)]
    assert errors[0] < 0.8 * errors[1]
    assert low.sampling.axis == axis
    assert torch.equal(
        low.covered, restore_grid(native, acquisition.grid, acquisition.world, GRID).covered
    )


def test_estimate_of_a_part_is_part_of_the_estimate(texture):
    acquisition = thick()
    native = acquire(texture, acquisition, GRID)
    whole = estimate_image(native, acquisition, GRID)
    shift = np.eye(4)
    shift[:3, 3] = 8, 4, 12
    part = estimate_image(native, acquisition, Grid((24, 30, 20), shift))
    assert (whole[8:32, 4:34, 12:32] - part).abs().max() < 0.02 * whole.abs().max()


def test_consistency_steps_explain_the_scan(texture):
    acquisition = thick()
    native = acquire(texture, acquisition, GRID)
    flat = torch.full_like(texture, float(texture.mean()))
    inner = (slice(6, -6), slice(6, -6), slice(2, -2))
    left = []
    for steps in (0, 1, 3):
        image, share = make_consistent(flat, native, acquisition, GRID, steps)
        assert share == 1
        left.append(float((acquire(image, acquisition, GRID) - native)[inner].std()))
    assert max(left[1:]) < 0.3 * left[0]  # no nearer: the profile is not known


@pytest.mark.parametrize(("level", "expected"), [(0, 1), (0.006, 1), (0.008, 0.44), (0.01, 0)])
@pytest.mark.parametrize("bright", [1.0, 250.0])
def test_noise_is_what_texture_cannot_be(level, expected, bright):
    """In units of the image: 0.009 is the most that pixels of 1 mm may hold of texture."""
    grid = thick().grid
    found = freedom_from_noise(level * bright, np.full(grid.shape, bright), grid)
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("spacing", [1.2, 2.0, 4.0])
def test_steps_bend_nothing_along_the_edge_of_the_field_of_view(spacing):
    """An output is 0 beyond it."""
    world = np.eye(4)
    world[:3, :3] = turn_about(np.array([1.0, 1, 0]), 10.0)
    affine = np.diag([1.0, 1.0, spacing, 1.0])
    affine[:3, 3] = 8, 4, 14
    shape = (30, 30, round(24 / spacing))
    acquisition = Acquisition(Grid(shape, affine), world, (1.0, 1.0, spacing))
    covered = field_of_view(acquisition, GRID)
    assert 0.1 < covered.float().mean() < 0.5
    native = torch.full(shape, 100.0)
    found, share = make_consistent(100.0 * covered, native, acquisition, GRID, 2)
    assert share == 1
    torch.testing.assert_close(
        found[covered], torch.full_like(found[covered], 100), atol=0.1, rtol=0
    )
    *_, found = back_project(native, acquisition, GRID, 100.0 * covered, 3, 1.0)
    torch.testing.assert_close(found, 100.0 * covered, atol=0.1, rtol=0)


def test_the_noisier_a_scan_the_less_it_is_made_consistent():
    """However many steps: they do not add up to more than their share."""
    acquisition = thick()
    noise = torch.randn(acquisition.grid.shape, generator=torch.Generator().manual_seed(1))
    image = torch.full(GRID.shape, 0.5)
    shares = []
    for level in (0.002, 0.008, 0.03):
        native = 1 + level * noise
        for steps in (1, 4):
            found, share = make_consistent(image, native, acquisition, GRID, steps)
            assert float(found[24, 20, 24]) == pytest.approx(0.5 + 0.5 * share, abs=0.02)
        assert torch.equal(found, image) == (share == 0)
        shares.append(share)
    assert shares[0] == 1 > shares[1] > shares[2] == 0


def test_what_is_unexplained_is_where_the_scan_differs(texture):
    """A wrong voxel of the scan, alone; nothing where a profile reaches beyond the image."""
    acquisition = thick()
    native = acquire(texture, acquisition, GRID)
    assert unexplained(texture, native, acquisition, GRID).abs().max() < 1e-5
    native[24, 20, 6] += 3
    native[24, 20, 0] += 3
    found = unexplained(texture, native, acquisition, GRID)
    assert found[24, 20, 6] == pytest.approx(3, abs=1e-5)
    found[24, 20, 6] = 0
    assert found.abs().max() < 1e-5


@pytest.mark.parametrize(("left", "expected"), [(0.0, 0), (0.5, 0), (0.8, 0.75), (1, 1), (5, 1)])
def test_what_noise_explains_is_not_added(left, expected):
    native = torch.full((8, 8, 8), 100.0)
    missing = left * torch.tensor([-1.0, 1]).repeat(8, 8, 4)
    assert trust(missing, native, noise=1.0) == pytest.approx(expected)


def test_what_a_header_tells():
    grid = Grid((256, 256, 30), np.diag([0.5, 1.0, 5.0, 1.0]))
    widths = from_header(grid, np.eye(4), 4.0).widths
    assert widths[2] == pytest.approx(0.975 * 4)
    assert widths[1] == pytest.approx(0.975)
    assert widths[0] > 0.95  # zero-filled: what was acquired is coarser than the voxel
    for unknown in (None, 0.0, 7.0):
        assert from_header(grid, np.eye(4), unknown).widths[2] == pytest.approx(0.975 * 5)
    # Of two sides that are as long, which one is stacked?
    even = Grid((50, 60, 60), np.diag([1.0, 1.333, 1.333, 1.0]))
    assert from_header(even, np.eye(4), 1.0).widths[1:] == pytest.approx([0.975 * 1.333] * 2)
