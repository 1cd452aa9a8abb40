"""The width of slices, found in scans whose width is known."""

from itertools import permutations

import numpy as np
import pytest
import torch

from remix_bids.simulation.acquisition import (
    BRAIN_CENTRE,
    Acquisition,
    coarsest_axes,
    draw,
    from_header,
    geometries,
    turn_about,
)
from remix_bids.simulation.degrade import acquire, add_rician_noise
from remix_bids.simulation.slices import (
    ERROR_MM,
    as_if_measured,
    expected_width,
    from_scan,
    measurable,
    measure_slices,
    true_width,
    weighed,
    width_of_slices,
)
from remix_bids.spatial import Grid

SIDE = 112
SPACING = 4.0


def centred(shape, sizes):
    """A grid around the middle of the brain."""
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = BRAIN_CENTRE - np.array(sizes) * (np.array(shape) - 1) / 2
    return Grid(tuple(shape), affine)


GRID = centred((SIDE, SIDE, SIDE), (1.0, 1.0, 1.0))


def stacked(width, box=False, axis=2, spacing=SPACING):
    sizes, shape, widths, boxes = [1.0] * 3, [SIDE] * 3, [1.0] * 3, [False] * 3
    sizes[axis], shape[axis] = spacing, round(SIDE / spacing)
    widths[axis], boxes[axis] = width, box
    return Acquisition(centred(shape, sizes), np.eye(4), tuple(widths), tuple(boxes))


@pytest.fixture(scope="module")
def texture():
    """A random field, as rough along all axes (a brain is calmer from back to front)."""
    noise = torch.randn((1, 1, SIDE, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    smooth = noise
    for _ in range(2):
        smooth = torch.nn.functional.avg_pool3d(smooth, (3, 3, 3), stride=1, padding=1)
    return 1 + 0.15 * smooth[0, 0] / smooth.std()


def header(acquisition):
    return from_header(acquisition.grid, acquisition.world)


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize(("width", "box"), [(2.5, False), (4.0, False), (4.0, True)])
def test_the_width_of_slices_is_found(texture, width, box, axis):
    acquisition = stacked(width, box, axis)
    native = acquire(texture, acquisition, GRID).numpy()
    found = measure_slices(native, header(acquisition))
    assert found == pytest.approx(true_width(acquisition), abs=0.6)


def test_brains_are_calmer_from_back_to_front(texture):
    """What varies as little across coronal slices as elsewhere is taken to be sharper there."""
    coronal, axial = (
        measure_slices(acquire(texture, acquisition, GRID).numpy(), header(acquisition))
        for acquisition in (stacked(4.0, axis=1), stacked(4.0, axis=2))
    )
    assert axial - 1.2 < coronal < axial - 0.4


def test_noise_does_not_move_it(texture):
    acquisition = stacked(3.5)
    native = acquire(texture, acquisition, GRID)
    noisy = add_rician_noise(native, 0.02, torch.Generator().manual_seed(1)).numpy()
    clean = measure_slices(native.numpy(), header(acquisition))
    assert measure_slices(noisy, header(acquisition)) == pytest.approx(clean, abs=0.3)
    # Nor does the scanner's scale.
    assert measure_slices(500 * native.numpy(), header(acquisition)) == pytest.approx(clean)


def test_neither_tilt_nor_unlike_pixels_move_it(texture):
    """Slices 3.5 mm apart, pixels of 0.95 and 1.1 mm, turned in the head and in the scanner."""
    sizes = (0.95, 1.1, 3.5)
    shape = [round(SIDE / size) for size in sizes]
    angle = np.deg2rad(12)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    world = np.eye(4)  # template to scanner: a head that is moved and turned by a quarter
    world[:3] = [[0, -1, 0, 30], [1, 0, 0, -20], [0, 0, 1, 5]]
    there, back = np.eye(4), np.eye(4)
    there[:3, 3], back[:3, 3] = BRAIN_CENTRE, -BRAIN_CENTRE
    affine = world @ there @ turn @ back @ centred(shape, sizes).affine
    acquisition = Acquisition(Grid(tuple(shape), affine), world, (1.0, 1.1, 3.2))
    native = acquire(texture, acquisition, GRID).numpy()
    assert measure_slices(native, header(acquisition)) == pytest.approx(3.2, abs=0.5)


def test_a_box_blurs_less_than_a_gaussian_as_wide():
    assert true_width(stacked(4.0)) == pytest.approx(4.0)
    assert 2.5 < true_width(stacked(4.0, box=True)) < 3.1


@pytest.mark.parametrize("what", ["nothing in it", "thin slices", "beside the brain", "wide gaps"])
def test_where_nothing_can_be_measured_the_header_tells(texture, what):
    acquisition = stacked(1.9, spacing=1.9) if what == "thin slices" else stacked(3.0)
    native = acquire(texture, acquisition, GRID).numpy()
    if what == "nothing in it":
        native[:] = 0
    world = np.eye(4)
    if what == "beside the brain":
        world[0, 3] = 400
    thickness = 1.8 if what in ("thin slices", "wide gaps") else None
    told = from_header(acquisition.grid, world, thickness)
    assert measure_slices(native, told) is None
    found = from_scan(native, acquisition.grid, world, thickness)
    assert width_of_slices(found) == pytest.approx(expected_width(told))
    assert found.widths[:2] == told.widths[:2]


def test_slices_with_gaps_of_three_tenths_are_still_measured():
    grid = centred((SIDE, SIDE, 28), (1.0, 1.0, 7.0))
    assert measurable(from_header(grid, np.eye(4), 5.0))  # a gap of 2 mm
    assert not measurable(from_header(grid, np.eye(4), 4.8))


def test_what_is_used_lies_between_header_and_measurement(texture):
    acquisition = stacked(2.4)
    native = acquire(texture, acquisition, GRID).numpy()
    told = header(acquisition)
    measured = measure_slices(native, told)
    used = width_of_slices(from_scan(native, acquisition.grid, acquisition.world))
    assert measured < used < expected_width(told)


@pytest.mark.parametrize(("wrong", "least", "most"), [(8.0, 1.1, 1.2), (0.1, 0.5, 0.6)])
def test_what_no_slice_can_be_is_not_believed(wrong, least, most):
    """Such as ghosts along the pixels make of a scan."""
    acquisition = stacked(3.0)
    told = from_header(acquisition.grid, acquisition.world, 2.5)
    used = width_of_slices(weighed(wrong, told))
    assert least < used / width_of_slices(told) < most


@pytest.mark.parametrize("sizes", [(2.0, 2.0, 2.0), (1.0, 2.0, 2.0 + 1e-7), (0.9, 0.9, 3.0)])
def test_how_an_array_is_stored_tells_nothing_of_slices(sizes):
    """The same scan with its axes in another order, and turned: the same width along each."""

    def told(order, turn):
        affine = np.eye(4)
        affine[:3, :3] = turn @ np.diag(sizes)[:, order]
        grid = Grid((40, 40, 40), affine)
        found = from_scan(np.ones(grid.shape, np.float32), grid, np.eye(4), 1.5)
        return np.array(found.widths)[np.argsort(order)]

    straight = told([0, 1, 2], np.eye(3))
    for order in permutations(range(3)):
        for angle in np.arange(0, 30, 2.5):
            turned = told(list(order), turn_about(np.array([1.0, 2, 3]), angle))
            np.testing.assert_allclose(turned, straight, rtol=1e-6)


def test_what_is_expected_is_what_slices_have_in_the_mean():
    """Of the scans that training draws: thin slices, thick ones, voxels as long along all axes."""
    rng, bank = np.random.default_rng(0), geometries(held_out=False)
    found = {"one size": [], "thin": [], "thick": []}
    for k in (2, 3, 4, 6) * 150:
        true = draw(rng, bank, [np.eye(4)], k)
        told = from_header(true.grid, true.world, true.thickness)
        spacing = max(true.grid.voxel_sizes)
        axes = coarsest_axes(true.grid)
        kind = "one size" if len(axes) == 3 else "thick" if spacing > 3 else "thin"
        widths = [true_width(true, axis) for axis in axes]
        found[kind].append(np.mean(widths) / expected_width(told))
    for kind, ratios in found.items():
        assert len(ratios) > 50
        assert np.mean(ratios) == pytest.approx(1, abs=0.04), kind


@pytest.mark.parametrize(("sizes", "axes"), [((2.0, 2.0, 2.0), 3), ((1.0, 2.0, 2.0), 2)])
def test_axes_that_are_as_coarse_are_told_alike(sizes, axes):
    grid = centred((40, 40, 40), sizes)
    told = from_header(grid, np.eye(4))
    widths = np.sort(from_scan(np.ones(grid.shape, np.float32), grid, np.eye(4)).widths)
    np.testing.assert_allclose(widths[-axes:], expected_width(told))
    one = expected_width(from_header(centred((40, 40, 40), (1.0, 1.0, 2.0)), np.eye(4)))
    header = width_of_slices(told)
    assert header - expected_width(told) == pytest.approx((header - one) / axes)


def test_training_errs_as_measurements_do():
    rng = np.random.default_rng(0)
    true = stacked(6.0, box=True, spacing=6.0)
    told = header(true)
    widths = [width_of_slices(as_if_measured(rng, told, true)) for _ in range(500)]
    expected = expected_width(told)
    assert true_width(true) < np.mean(widths) < 0.3 * expected + 0.7 * true_width(true)
    assert 0.7 * ERROR_MM < np.std(widths) < ERROR_MM
    # Where slices do not stand out there is no measurement, so nothing is drawn.
    thin = stacked(1.9, spacing=1.9)
    assert width_of_slices(as_if_measured(rng, header(thin), thin)) == pytest.approx(
        expected_width(header(thin))
    )
