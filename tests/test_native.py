"""Native space: one grid in the scanner's world, whatever the input's orientation."""

import nibabel as nb
import numpy as np
import pytest
import torch
from nibabel.affines import from_matvec
from scipy.ndimage import center_of_mass, gaussian_filter

from remix_bids.native import TAPER, enhanced_part, native_grid, to_native_space
from remix_bids.spatial import WORKING_GRID, Grid, coverage, index_map


def rotation(*degrees):
    x, y, z = np.deg2rad(degrees)
    c, s = np.cos, np.sin
    about_x = np.array([[1, 0, 0], [0, c(x), -s(x)], [0, s(x), c(x)]])
    about_y = np.array([[c(y), 0, s(y)], [0, 1, 0], [-s(y), 0, c(y)]])
    about_z = np.array([[c(z), -s(z), 0], [s(z), c(z), 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


def grid(codes, sides, shape, turn=(0, 0, 0)):
    """A grid around the origin with axes that point along ``codes`` and are then turned."""
    axes = nb.orientations.inv_ornt_aff(nb.orientations.axcodes2ornt(codes), shape)[:3, :3]
    axes = np.linalg.inv(axes)
    matrix = rotation(*turn) @ np.linalg.inv(axes) @ np.diag(sides)
    centre = matrix @ ((np.array(shape) - 1) / 2)
    return Grid(shape, from_matvec(matrix, np.array([4.0, -11, 7]) - centre))


GRIDS = {
    "LAS": grid("LAS", (1.0, 1.0, 5.0), (160, 180, 30)),
    "RSA": grid("RSA", (0.9, 0.9, 4.0), (180, 170, 40)),
    "oblique": grid("LPS", (0.8, 0.8, 6.0), (200, 220, 24), (12, -9, 20)),
    "anisotropic": grid("RAS", (0.6, 1.4, 3.0), (250, 130, 50), (0, 5, 0)),
}
LANDMARKS = np.array([[20.0, 10, 15], [-30, 5, -10], [5, -40, 20], [-12, 30, 5.0]])


@pytest.mark.parametrize("source", GRIDS.values(), ids=GRIDS)
def test_grid_is_isotropic_straight_and_covers_the_scan(source):
    out = native_grid(source)
    matrix = out.affine[:3, :3]
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-9)  # no shear, no scaling
    directions = source.affine[:3, :3] / source.voxel_sizes
    np.testing.assert_allclose(matrix, directions, atol=1e-6)  # the scan's own axes
    assert nb.aff2axcodes(out.affine) == nb.aff2axcodes(source.affine)
    extent = np.array(source.shape) * source.voxel_sizes
    assert (np.array(out.shape) >= extent - 1e-3).all()
    assert (np.array(out.shape) < extent + 1).all()
    middle = [
        g.affine[:3, :3] @ ((np.array(g.shape) - 1) / 2) + g.affine[:3, 3] for g in (source, out)
    ]
    np.testing.assert_allclose(*middle, atol=1e-6)


def test_sheared_axes_are_made_straight():
    sheared = GRIDS["LAS"].affine.copy()
    sheared[:3, 1] += 0.1 * sheared[:3, 0]
    source = Grid(GRIDS["LAS"].shape, sheared)
    out = native_grid(source)
    np.testing.assert_allclose(out.affine[:3, :3].T @ out.affine[:3, :3], np.eye(3), atol=1e-9)
    inside = coverage(index_map(source, out), out.shape, source.shape)
    assert inside.all()  # every acquired voxel lies in the output


def test_a_scan_of_1_mm_keeps_its_grid_and_its_voxels():
    source = grid("LPS", (1.0, 1.0, 1.0), (60, 70, 50), (3, 8, -4))
    out = native_grid(source)
    assert out.shape == source.shape
    np.testing.assert_allclose(out.affine, source.affine, atol=1e-6)
    native = torch.from_numpy(np.random.default_rng(0).random(source.shape, dtype=np.float32))
    image, part, _ = to_native_space(native, source, np.eye(4), torch.zeros(WORKING_GRID.shape))
    np.testing.assert_allclose(image, native, atol=2e-3)
    assert not part.any()  # nothing was there to be added


@pytest.mark.parametrize("source", GRIDS.values(), ids=GRIDS)
def test_landmarks_stay_in_the_world(source):
    """Blobs put into the scan are found at the same place of the scanner's world, within .5 mm."""
    world_of = index = None
    native = np.zeros(source.shape, dtype=np.float32)
    places = np.indices(source.shape).reshape(3, -1)
    world_of = (source.affine[:3, :3] @ places).T + source.affine[:3, 3]
    for mark in LANDMARKS:
        distance = ((world_of - mark) ** 2).sum(axis=1)
        native += np.exp(-distance / (2 * 4.0**2)).reshape(source.shape).astype(np.float32)
    affine = from_matvec(1.05 * rotation(5, -3, 8), [10, -20, 5])  # template to scanner
    image, part, out = to_native_space(
        torch.from_numpy(native), source, affine, torch.zeros(WORKING_GRID.shape)
    )
    for mark in LANDMARKS:
        index = (np.linalg.inv(out.affine) @ [*mark, 1])[:3].round().astype(int)
        corner = index - 8
        window = image.numpy()[tuple(slice(c, c + 17) for c in corner)]
        found = out.affine[:3, :3] @ (corner + center_of_mass(window)) + out.affine[:3, 3]
        assert np.linalg.norm(found - mark) < 0.5
    assert ((part >= 0) & (part <= 1)).all()


@pytest.mark.parametrize("source", GRIDS.values(), ids=GRIDS)
def test_the_residual_lands_where_the_affine_says(source):
    template_to_scanner = from_matvec(0.95 * rotation(-4, 6, 10), [-6, 9, 3])
    residual = np.zeros(WORKING_GRID.shape, dtype=np.float32)
    place = np.array([95, 120, 80])
    residual[tuple(place)] = 1
    residual = gaussian_filter(residual, 2)
    native = torch.full(source.shape, 100.0)
    image, _, out = to_native_space(
        native, source, template_to_scanner, 1000 * torch.from_numpy(residual)
    )
    expected = (template_to_scanner @ WORKING_GRID.affine @ [*place, 1])[:3]
    added = image.numpy() - 100
    added[added < 0.05] = 0  # rounding, in a million voxels
    index = np.array(center_of_mass(added))
    found = out.affine[:3, :3] @ index + out.affine[:3, 3]
    assert np.linalg.norm(found - expected) < 0.5


def test_outside_the_working_grid_is_the_interpolated_scan():
    source = grid("LAS", (1.0, 1.0, 2.0), (120, 120, 60))
    shift = from_matvec(np.eye(3), [0, 0, 100])  # half of the scan lies beyond the grid
    noise = 5 + torch.from_numpy(np.random.default_rng(1).random(source.shape, dtype=np.float32))
    residual = torch.full(WORKING_GRID.shape, 50.0)
    plain, _, _ = to_native_space(noise, source, shift, 0 * residual)
    image, part, _ = to_native_space(noise, source, shift, residual)
    assert 0.05 < part.mean() < 0.95
    assert torch.equal(image[part == 0], plain[part == 0])
    np.testing.assert_allclose(image[part == 1], plain[part == 1] + 50, atol=1e-3)
    ramp = part[60, 60]
    steps = torch.diff(ramp).abs()
    assert steps.max() <= 1 / TAPER + 1e-4  # no visible edge


def test_what_is_added_is_whole_up_to_the_edge_of_the_field_of_view():
    tilt = from_matvec(rotation(15, 10, 5), [0, 0, 0])
    source = grid("LAS", (1.0, 1.0, 3.0), (90, 90, 20))
    seen = coverage(index_map(WORKING_GRID, source, tilt), source.shape, WORKING_GRID.shape)
    native = torch.full(source.shape, 100.0)
    image, part, _ = to_native_space(native, source, tilt, 10.0 * seen)
    assert (part == 1).sum() > 100_000
    np.testing.assert_allclose(image[part == 1], 110, atol=0.01)


def test_the_taper_is_a_ramp():
    part = enhanced_part(np.eye(4), (20, 217, 181))[:, 100, 90]
    np.testing.assert_allclose(part[:8], [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1], atol=1e-6)
    shifted = np.eye(4)
    shifted[0, 3] = -3
    assert (enhanced_part(shifted, (4, 217, 181))[:3] == 0).all()
