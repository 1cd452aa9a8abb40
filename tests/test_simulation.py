"""The simulator against analytic answers."""

import numpy as np
import pytest
import torch

from remix_bids.evaluation.metrics import eroded, psnr
from remix_bids.experts.registry import effective_voxel_volume
from remix_bids.simulation.acquisition import (
    CLASS_RANGES,
    Acquisition,
    SyntheticShape,
    draw,
    draw_shape,
    geometries,
    load_bank,
    place,
    sampling,
    save_bank,
    slice_axis,
    turn_about,
)
from remix_bids.simulation.degrade import (
    acquire,
    add_rician_noise,
    kernel_width,
    profile,
    restore_grid,
)
from remix_bids.simulation.noise import scan_noise
from remix_bids.spatial import Grid, index_map

from .test_spatial import affine_of, smooth_image


def degrade(image, acquisition, grid, order="cubic"):
    """There and back."""
    native = acquire(image, acquisition, grid, order=order)
    return restore_grid(native, acquisition.grid, acquisition.world, grid, order=order)


def axial(thickness, spacing, n=20, box=True, fine=100):
    """An axial acquisition of a (fine x 20 x 20 mm, 1 mm) image, slices along the first axis."""
    image = Grid((fine, 20, 20), np.eye(4))
    native = Grid((n, 20, 20), affine_of(np.eye(3), [spacing, 1, 1], [2, 0, 0]))
    return image, Acquisition(native, np.eye(4), (thickness, 0.0, 0.0), (box, False, False))


@pytest.mark.parametrize("box", [True, False])
def test_a_ramp_stays_a_ramp(box):
    grid, acquisition = axial(4.0, 4.5, box=box)
    ramp = torch.arange(100.0)[:, None, None].expand(100, 20, 20).contiguous() + 1
    seen = acquire(ramp, acquisition, grid, voxel_width=0)
    centres = 2 + 4.5 * np.arange(20) + 1
    np.testing.assert_allclose(seen[2:-2, 10, 10], centres[2:-2], atol=1e-3)


@pytest.mark.parametrize("box", [True, False])
def test_a_thin_plate_gives_the_profile(box):
    """A plate of 1 mm seen by slices 0.5 mm apart traces the profile; its area is kept."""
    grid, acquisition = axial(6.0, 0.5, n=180, box=box)
    plate = torch.zeros(100, 20, 20)
    plate[50] = 1
    seen = acquire(plate, acquisition, grid, order="linear", voxel_width=0)[:, 10, 10].numpy()
    z = 2 + 0.5 * np.arange(180) - 50
    fine = np.linspace(-20, 20, 4001)
    weights = profile(fine, 6.0, box)
    weights /= weights.sum() * (fine[1] - fine[0])
    triangle = np.clip(1 - np.abs(fine), 0, None)  # linear interpolation's own shape of the plate
    expected = np.interp(z, fine, np.convolve(weights, triangle, "same") * (fine[1] - fine[0]))
    np.testing.assert_allclose(seen, expected, atol=0.01)
    assert seen.sum() * 0.5 == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize(
    ("thickness", "spacing"),
    [(1.1, 1.1), (1.25, 1.25), (1.5, 1.5), (1.6, 2.0), (2.0, 2.5), (3.0, 3.0), (5.0, 6.0)],
)
def test_a_wave_loses_what_the_profile_takes(thickness, spacing, box):
    """By the profile's Fourier transform, however thin the slices are."""
    grid, acquisition = axial(thickness, spacing, n=int(90 / spacing), box=box)
    width = kernel_width(thickness)
    fine = np.linspace(-1.5 * width, 1.5 * width, 4001)
    weights = profile(fine, width, box) / profile(fine, width, box).sum()
    z = np.arange(100.0)
    centres = 2 + spacing * np.arange(acquisition.grid.shape[0])
    for frequency in (0.04, 0.12, 0.19):
        wave = torch.from_numpy(np.cos(2 * np.pi * frequency * z) + 2).float()
        seen = acquire(wave[:, None, None].expand(100, 20, 20).contiguous(), acquisition, grid)
        inner = (centres > 15) & (centres < 85)
        phase = 2 * np.pi * frequency * centres[inner]
        basis = np.stack([np.cos(phase), np.sin(phase), np.ones_like(phase)], axis=1)
        found = np.linalg.lstsq(basis, seen[inner, 10, 10].numpy(), rcond=None)[0]
        left = float((weights * np.cos(2 * np.pi * frequency * fine)).sum())
        np.testing.assert_allclose(found, [left, 0, 2], atol=0.04)  # our own interpolation: 0.03


def test_a_gap_hides_a_plate_between_slices():
    grid, with_gap = axial(2.0, 8.0, n=10)
    _, without = axial(8.0, 8.0, n=10)
    plate = torch.zeros(100, 20, 20)
    plate[38] = 1  # slices lie at 2, 10, 18, ..., 34, 42: half-way
    assert acquire(plate, with_gap, grid, voxel_width=0).max() < 1e-3
    assert acquire(plate, without, grid, voxel_width=0).max() > 0.05


def test_kernel_width_takes_off_the_images_own():
    assert kernel_width(5.0, 3.0) == pytest.approx(4.0)
    assert kernel_width(0.9) == 0.0


@pytest.mark.parametrize(("order", "floor", "ceiling"), [("cubic", 40, 80), ("linear", 20, 40)])
def test_there_and_back_is_nearly_nothing(order, floor, ceiling):
    """A real brain on a 1 mm grid turned by 20 degrees, without profile, and back.

    Our own interpolation must not become the degradation that the experts learn to undo; linear
    interpolation would.
    """
    from nilearn.datasets import load_mni152_template

    brain = load_mni152_template(resolution=1)
    grid = Grid(brain.shape, brain.affine)
    image = torch.from_numpy(np.asarray(brain.dataobj, dtype=np.float32))
    shape = SyntheticShape(1.0, 1.0, 0.0)
    there = place(load_bank()[0], np.eye(4), np.random.default_rng(0), shape=shape, obliquity=20.0)
    back = degrade(image, there.without_profile(), grid, order=order)
    inside = eroded(back.covered & (image > 0), 2)
    assert inside.float().mean() > 0.1
    assert floor < psnr(back.image, image, inside) < ceiling


def test_degradation_is_linear():
    grid, acquisition = axial(5.0, 5.0)
    a, b = smooth_image((100, 20, 20), 1), smooth_image((100, 20, 20), 2)
    both = acquire(a + 2 * b, acquisition, grid)
    apart = acquire(a, acquisition, grid) + 2 * acquire(b, acquisition, grid)
    assert torch.allclose(both, apart, atol=1e-3)


def test_outside_the_field_of_view_is_zero():
    grid, acquisition = axial(5.0, 5.0, n=10)
    low = degrade(torch.ones(100, 20, 20), acquisition, grid)
    assert not low.covered[60:].any()
    assert low.image[60:].abs().max() == 0
    assert torch.allclose(low.image[5:45], torch.ones(1), atol=1e-3)


def test_noise_is_drawn_again_by_its_seed():
    image = torch.ones(20, 20, 20)
    one, two = (add_rician_noise(image, 0.1, torch.Generator().manual_seed(s)) for s in (4, 4))
    assert torch.equal(one, two)
    assert float(one.std()) == pytest.approx(0.1, rel=0.1)
    air = add_rician_noise(0 * image, 0.1, torch.Generator().manual_seed(4))
    assert float(air.mean()) == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.05)


def test_phase_is_one_where_the_scan_has_measured():
    source = Grid((10, 10, 6), affine_of(np.eye(3), [1, 1, 4], [0, 0, 0]))
    output = Grid((10, 10, 21), np.eye(4))
    seen = sampling(index_map(output, source), source)
    phases = seen.phases(output.shape)
    np.testing.assert_allclose(phases[2, 5, 5, ::4], 1, atol=1e-5)
    np.testing.assert_allclose(phases[2, 5, 5, 2::4], -1, atol=1e-5)
    assert not phases[:2].any()  # as fine as the output
    assert seen.axis == 2


def test_sampling_sorts_the_axes_of_a_scan_by_those_of_the_output():
    """A sagittal scan stored slices last: its last axis is the output's first."""
    turn = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    source = Grid((10, 12, 6), affine_of(turn, [1.0, 1.2, 5], [0, 0, 0]))
    seen = sampling(index_map(Grid((30, 10, 14), np.eye(4)), source), source)
    np.testing.assert_allclose(seen.sizes, [5, 1.0, 1.2])
    assert seen.axis == 0
    np.testing.assert_allclose(seen.rows[0], [0.2, 0, 0, 0], atol=1e-9)


def test_slice_axis():
    assert slice_axis(Grid((4, 4, 4), affine_of(np.eye(3), [1, 5, 1], [0, 0, 0]))) == 1
    assert slice_axis(Grid((4, 4, 4), np.diag([2.0, 2, 2, 1]))) == 2


def test_restoring_a_magnitude_is_never_negative():
    grid, acquisition = axial(5.0, 5.0)
    native = torch.zeros(acquisition.grid.shape)
    native[10] = 1
    assert restore_grid(native, acquisition.grid, acquisition.world, grid).image.min() == 0


def test_the_bank(tmp_path):
    bank = load_bank()
    assert len(bank) > 350
    sides = {g.group: {h.held_out for h in bank if h.group == g.group} for g in bank}
    assert all(len(side) == 1 for side in sides.values())  # a person is on one side of the split
    share = np.mean([g.held_out for g in bank])
    assert 0.15 < share < 0.25
    assert {g.plane for g in bank if g.held_out} == {"axial", "sagittal", "coronal"}
    assert not any("sub-" in g.source + g.group for g in bank)
    assert all(g.licence not in ("none stated", "CC BY-NC 4.0") for g in bank)
    save_bank(bank[:3], tmp_path / "bank.json")
    assert load_bank(tmp_path / "bank.json") == bank[:3]


@pytest.mark.parametrize("k", range(1, 8))
def test_drawn_shapes_lie_in_their_class(k):
    rng = np.random.default_rng(k)
    for _ in range(50):
        shape = draw_shape(rng, k)
        volume = effective_voxel_volume([shape.in_plane, shape.in_plane, shape.spacing])
        low, high = CLASS_RANGES[k]
        assert low - 1e-3 <= volume <= high + 1e-3
        assert shape.spacing >= shape.in_plane - 1e-9


def test_a_bank_of_one_plane_will_do():
    bank = [g for g in load_bank() if g.plane == "sagittal"]
    rng = np.random.default_rng(5)
    drawn = [draw(rng, bank, [np.eye(4)], k) for k in (1, 4, 4, 4, 6, 6)]
    assert {plane_of(a) for a in drawn if a.anisotropy > 1.1} == {"sagittal"}


def plane_of(acquisition):
    normal = acquisition.grid.affine[:3, slice_axis(acquisition.grid)]
    return ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())]


def test_slices_of_an_isotropic_scan_lie_along_any_axis():
    rng = np.random.default_rng(0)
    bank = geometries(held_out=False)
    shape = SyntheticShape(1.5, 1.5, 0.0)
    drawn = [place(bank[0], np.eye(4), rng, shape=shape, box=True) for _ in range(60)]
    assert np.sum([a.box for a in drawn], axis=0).min() > 10
    for a in drawn:
        assert sum(a.box) == 1


def test_planes_are_drawn_as_often_as_documented():
    rng, bank = np.random.default_rng(6), geometries(held_out=False)
    drawn = [draw(rng, bank, [np.eye(4)], 2) for _ in range(500)]  # no real one is of this class
    found = [plane_of(a) for a in drawn if a.anisotropy > 1.1]
    shares = [found.count(plane) / len(found) for plane in ("axial", "sagittal", "coronal")]
    np.testing.assert_allclose(shares, [0.45, 0.35, 0.20], atol=0.08)


def test_drawn_acquisitions_look_at_the_brain():
    rng = np.random.default_rng(0)
    bank = geometries(held_out=False)
    person = np.diag([1.1, 1.05, 1.2, 1.0])
    for k in range(1, 8):
        found = draw(rng, bank, [person], k)
        grid = found.grid
        middle = grid.affine @ np.array([*((np.array(grid.shape) - 1) / 2), 1])
        brain = found.world @ np.array([0, -18, 10, 1])
        assert np.linalg.norm((middle - brain)[:3]) < 30
        np.testing.assert_allclose(np.linalg.svd(found.world[:3, :3])[1], [1.2, 1.1, 1.05])


def test_obliquity_is_what_was_asked_for():
    rng = np.random.default_rng(3)
    shape = SyntheticShape(1.0, 5.0, 0.0)
    found = place(load_bank()[0], np.eye(4), rng, shape=shape, obliquity=30.0)
    cosines = found.grid.affine[:3, :3] / found.grid.voxel_sizes
    signs = np.sign(cosines) * (np.abs(cosines) == np.abs(cosines).max(axis=0))
    angle = np.rad2deg(np.arccos((np.trace(cosines @ signs.T) - 1) / 2))
    assert angle == pytest.approx(30.0, abs=0.01)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("in_plane", [0.45, 1.0])
def test_the_noise_of_a_scan_is_told_from_the_scan(axis, in_plane):
    """Noise on a smooth head in thick slices; a fine matrix holds the same voxels four times."""
    rng = np.random.default_rng(axis)
    fine = round(1 / in_plane)
    shape = [60, 60, 60]
    shape[axis] = 20
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    head = 800 * np.exp(-3 * (x**2 + y**2 + z**2)) * (x**2 + y**2 + z**2 < 0.8)
    noisy = head + rng.normal(0, 25, shape) * (head > 0)
    for other in {0, 1, 2} - {axis}:
        noisy = noisy.repeat(fine, axis=other)
    sizes = np.full(3, in_plane)
    sizes[axis] = 5.0
    a, b, c = noisy.shape
    grid = Grid((a, b, c), np.diag([*sizes, 1]))
    assert scan_noise(noisy, grid) == pytest.approx(25, rel=0.05)
    assert scan_noise(np.zeros(grid.shape), grid) == 0


def test_noise_does_not_hang_on_how_a_header_rounds():
    """Whether 2/3 mm and 0.4 mm are thinned once more."""
    data = 500 + 25 * np.random.default_rng(0).standard_normal((60, 60, 20))
    for pixel in (2 / 3, 0.4):
        found = set()
        for angle in (0, 7, 10, 33):
            affine = np.diag([pixel, pixel, 5.0, 1.0])
            affine[:3, :3] = turn_about(np.array([1.0, 0.3, 0]), angle) @ affine[:3, :3]
            found.add(scan_noise(data, Grid((60, 60, 20), affine.astype(np.float32).astype(float))))
        assert len(found) == 1
