"""Affine files, scores and the registration itself."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from remix_bids.errors import InputImageError, MissingResourceError, RemixError
from remix_bids.registration import score, search
from remix_bids.registration.affine import FIRST, Templates, prepare, register_affine
from remix_bids.registration.itk import read_itk_affine, write_itk_affine
from remix_bids.registration.pool import Pool
from remix_bids.registration.volumes import (
    Volume,
    depth_profile,
    load_volume,
    sample,
    save_volume,
    squeeze_intensities,
    to_isotropic,
)


def affine(rotation=(0, 0, 0), shift=(0, 0, 0), scales=(1, 1, 1)):
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix() @ np.diag(scales)
    out[:3, 3] = shift
    return out


def displacement(a, b, points):
    change = (a - b)[:3]
    return np.linalg.norm(change[:, :3] @ points + change[:, 3:], axis=0).mean()


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """ICBM 2009a brain as nilearn carries it, as a template without skull."""
    from nilearn.datasets import load_mni152_template

    path = tmp_path_factory.mktemp("template") / "brain.nii.gz"
    nb.save(load_mni152_template(resolution=1), path)
    return Templates(path, None, skull_stripped=True)


def acquire(template: Path, world, zooms, shape, out: Path, noise=0.0):
    """The template moved by ``world`` (template to native), on a native grid around it."""
    image = load_volume(template)
    middle = world[:3, :3] @ np.array([0, -18, 10]) + world[:3, 3]
    grid = np.diag([*zooms, 1.0])
    grid[:3, 3] = middle - grid[:3, :3] @ ((np.array(shape) - 1) / 2)
    mapping = np.linalg.inv(image.affine) @ np.linalg.inv(world) @ grid
    # A box profile across the slices: the mean of sub-slices.
    n = int(np.ceil(zooms[2]))
    data = np.zeros(shape)
    for offset in (np.arange(n) - (n - 1) / 2) / n:
        at = mapping @ np.array([0, 0, offset, 1])
        data += ndimage.affine_transform(image.data, mapping[:3, :3], at[:3], shape, order=1) / n
    data += np.random.default_rng(0).normal(0, noise, shape) * (data > 0)
    nb.save(nb.Nifti1Image(data.astype(np.float32), grid), out)


# Files


def test_itk_text_round_trip(tmp_path):
    matrix = affine((10, -20, 30), (5, -100, 200), (0.9, 1.1, 1.2))
    write_itk_affine(tmp_path / "a.txt", matrix)
    np.testing.assert_allclose(read_itk_affine(tmp_path / "a.txt"), matrix, atol=1e-12)


def test_itk_centre_and_lps(tmp_path):
    """y = A (x - c) + t + c in LPS; by hand."""
    (tmp_path / "a.txt").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 2 0 0 0 1 0 0 0 1 10 20 30\nFixedParameters: 1 2 3\n"
    )
    lps = np.array([5.0, 6.0, 7.0])
    expected = np.diag([2, 1, 1]) @ (lps - [1, 2, 3]) + [10, 20, 30] + [1, 2, 3]
    flip = np.array([-1, -1, 1])
    found = read_itk_affine(tmp_path / "a.txt") @ np.append(lps * flip, 1)
    np.testing.assert_allclose(found[:3], expected * flip)


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "#Insight Transform File V1.0\nTransform: Euler3DTransform_double_3_3\n"
        "Parameters: 0 0 0 0 0 0\nFixedParameters: 0 0 0\n",
        "#Insight Transform File V1.0\nTransform: AffineTransform_double_2_2\n"
        "Parameters: 1 0 0 1 0 0\nFixedParameters: 0 0\n",
    ],
)
def test_itk_refuses_what_is_no_affine(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=r"a\.txt"):
        read_itk_affine(tmp_path / "a.txt")


@pytest.mark.parametrize("orientation", [(-1, 1, 1), (1, -1, -1)])
def test_matrix_means_what_ants_means(tmp_path, orientation):
    """Resampling through our matrix is what antsApplyTransforms does, on oblique grids."""
    import ants

    rng = np.random.default_rng(0)
    data = ndimage.gaussian_filter(rng.random((24, 26, 20)), 2).astype(np.float32)
    moving_grid = affine((8, -15, 22), (-30, 12, 40)) @ np.diag([*np.multiply(orientation, 2), 1.0])
    fixed_grid = affine((-5, 10, 3), (-25, 5, 30)) @ np.diag([2, 2, 2, 1.0])
    centre = moving_grid @ np.array([11.5, 12.5, 9.5, 1])
    fixed_grid[:3, 3] += (centre - fixed_grid @ np.array([9.5, 9.5, 9.5, 1]))[:3]
    matrix = affine((4, -6, 5), (3, -2, 1), (1.05, 0.95, 1.1))
    matrix[:3, 3] += (centre - matrix @ centre)[:3]
    moving, fixed = Volume(data, moving_grid), Volume(np.zeros((20, 20, 20)), fixed_grid)
    save_volume(moving, tmp_path / "moving.nii.gz")
    save_volume(fixed, tmp_path / "fixed.nii.gz")
    write_itk_affine(tmp_path / "affine.txt", matrix)
    theirs = ants.apply_transforms(
        ants.image_read(str(tmp_path / "fixed.nii.gz")),
        ants.image_read(str(tmp_path / "moving.nii.gz")),
        [str(tmp_path / "affine.txt")],
    ).numpy()
    points = fixed.points()
    at = np.tensordot(matrix[:3, :3], points, 1) + matrix[:3, 3].reshape(3, 1, 1, 1)
    ours, inside = sample(moving, at)
    inner = inside & (theirs != 0)
    assert inner.mean() > 0.2
    assert np.abs(ours - theirs)[inner].max() < 1e-3 * np.ptp(data)
    # ANTs' own binary file
    transform = ants.read_transform(str(tmp_path / "affine.txt"))
    ants.write_transform(transform, str(tmp_path / "affine.mat"))
    np.testing.assert_allclose(read_itk_affine(tmp_path / "affine.mat"), matrix, atol=1e-4)


def test_unusable_images(tmp_path):
    for name, data in (("flat", np.ones((9, 9, 9))), ("series", np.zeros((9, 9, 9, 2)))):
        nb.save(nb.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii.gz")
        with pytest.raises(InputImageError, match=name):
            load_volume(tmp_path / f"{name}.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputImageError, match="broken"):
        load_volume(tmp_path / "broken.nii.gz")


# Scores


def test_isotropic_keeps_world_coordinates():
    """The centre of mass stays where it was."""
    data = np.zeros((30, 40, 12), dtype=np.float32)
    data[10:20, 15:22, 4:9] = 1
    grid = affine((10, 20, -30), (100, 5, 7)) @ np.diag([-1.0, 1.0, 5.0, 1.0])
    volume = Volume(data, grid)

    def centre(v):
        return (v.points() * v.data).sum(axis=(1, 2, 3)) / v.data.sum()

    np.testing.assert_allclose(centre(to_isotropic(volume, 3.0)), centre(volume), atol=0.2)


def test_shear_is_undone_for_itk():
    """It reads no axes but those at right angles: what it is given has such, in the same world."""
    rng = np.random.default_rng(0)
    data = ndimage.gaussian_filter(rng.random((40, 44, 30)), 4).astype(np.float32)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, :3] = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix() @ (
        np.array([[1, 0.2, 0], [0, 1, 0], [0, 0.1, 1]]) @ affine[:3, :3]
    )
    affine[:3, 3] = -40, 30, -20
    sheared = Volume(data, affine)
    straight = to_isotropic(sheared, 3.0)
    axes = straight.affine[:3, :3] / 3
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    found, inside = sample(sheared, straight.points())
    deep = ndimage.binary_erosion(inside, iterations=2)
    assert deep.sum() > 5000
    np.testing.assert_allclose(straight.data[deep], found[deep], atol=0.1 * np.ptp(data))


@pytest.mark.parametrize(
    ("scales", "fine"),
    [
        ((1, 1, 1), True),
        ((0.76, 1.0, 1.29), True),
        ((0.7, 1, 1), False),
        ((1, 1.35, 1), False),
        ((-1, 1, 1), False),
    ],
)
def test_possible_scales(scales, fine):
    assert score.possible(affine((20, 10, 5), (1, 2, 3), scales)) is fine


def test_neighbourhood_correlation():
    rng = np.random.default_rng(0)
    x = ndimage.gaussian_filter(rng.random((24, 24, 24)), 1).astype(np.float32) * 5
    everywhere = np.ones(x.shape, dtype=bool)
    bias = 1 + np.linspace(0, 0.5, 24)[:, None, None]
    other = ndimage.gaussian_filter(rng.random((24, 24, 24)), 1).astype(np.float32) * 5

    def of(y):
        return score.neighbourhood_correlation(x, y.astype(np.float32), everywhere, everywhere)

    assert of(x) > 0.99
    assert of(3 * x + 7) > 0.99
    assert of(bias * x) > 0.8
    assert of(-x) < -0.99
    assert abs(of(other)) < 0.2
    assert of(np.zeros_like(x)) == 0


def test_score_picks_the_right_affine(brain):
    levels = prepare(brain)[score.SPACING]
    image = to_isotropic(squeeze_intensities(load_volume(brain.t1w)), score.SPACING)
    values = [
        score.agreement(image, levels.kinds[True], levels.near, m)[0]
        for m in (
            np.eye(4),
            affine(shift=(0, 0, 5)),
            affine(rotation=(10, 0, 0)),
            affine(rotation=(0, 0, 180)),
        )
    ]
    assert values[0] > 0.95
    assert values[0] > values[1] > values[3]
    assert values[0] > values[2] > values[3]


def test_brain_looks_like_a_brain_and_a_head_like_a_head(brain):
    volume = load_volume(brain.t1w)
    assert depth_profile(volume).head < -0.5
    mask = volume.data > 0
    distance = ndimage.distance_transform_edt(~np.pad(mask, 20))
    head = np.pad(volume.data / volume.data.max(), 20)
    head[(distance > 6) & (distance < 14)] = 1  # scalp over dark skull
    grid = volume.affine.copy()
    grid[:3, 3] -= grid[:3, :3] @ np.full(3, 20)
    assert depth_profile(Volume(head, grid)).head > 0.5


@pytest.mark.parametrize("height", [None, 45.0])
def test_search_finds_any_origin(brain, height):
    """Where the header puts the brain does not matter, nor how it lies, nor that it is a slab."""
    level = prepare(brain)[search.SPACING]
    points = level.near.points()[:, level.near.data > 0.5]
    centre = points.mean(axis=1)
    true = affine((25, -15, 10), (150, -90, 120), (0.95, 0.95, 0.95))
    image = load_volume(brain.t1w)
    data, grid = squeeze_intensities(image).data, true @ image.affine
    if height is not None:
        middle = round((centre[2] - image.affine[2, 3]) / image.affine[2, 2])
        first, last = middle - round(height / 2), middle + round(height / 2)
        grid = grid @ affine((0, 0, 0), (0, 0, first), (1, 1, 1))
        data = data[:, :, first:last]
    small = to_isotropic(Volume(data, grid), 8.0)
    start = search.search(small, {True: level.kinds[True]}, level.wide, centre)[True][0]
    better = search.polish(start, small, level.kinds[True], level.wide, centre)
    assert displacement(better.matrix, true, points) < (4 if height is None else 8)


# The whole


def test_refuses_a_head_without_skull_in_the_template(brain, tmp_path):
    with pytest.raises(MissingResourceError, match="MNI152Lin"):
        register_affine(brain.t1w, brain, skull_stripped=False, work_dir=tmp_path)
    with pytest.raises(MissingResourceError, match="mask"):
        register_affine(brain.t1w, Templates(brain.t1w, None), work_dir=tmp_path)


@pytest.mark.parametrize("seed", [0, 1])  # 0 is the clock to ANTs
def test_number_of_processes_changes_nothing(brain, tmp_path, seed):
    """Same job, first or second in its process, alone or beside another: same bits."""
    level = prepare(brain)[4.0]
    save_volume(level.kinds[True], tmp_path / "fixed.nii")
    save_volume(level.near, tmp_path / "mask.nii")
    moved = Volume(level.kinds[True].data, affine((5, 0, 3), (9, 0, 0)) @ level.kinds[True].affine)
    save_volume(moved, tmp_path / "moving.nii")

    def matrices(n_procs):
        jobs = []
        for i, turn in enumerate((0, 4, 8)):
            write_itk_affine(tmp_path / f"{i}.txt", affine((turn, 0, 0), (9, 0, 0)))
            jobs.append(
                {
                    "name": str(i),
                    "fixed": str(tmp_path / "fixed.nii"),
                    "moving": str(tmp_path / "moving.nii"),
                    "mask": str(tmp_path / "mask.nii"),
                    "initial": str(tmp_path / f"{i}.txt"),
                    "output": str(tmp_path / f"{i}.json"),
                    "options": {**FIRST, "aff_iterations": (20, 10)},
                }
            )
        with Pool(n_procs, seed, tmp_path) as pool:
            pool.run(jobs)
        return [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)]

    one = matrices(1)
    assert None not in one
    assert one == matrices(2)


def test_a_dead_child_is_an_error(tmp_path):
    with Pool(1, 1, tmp_path) as pool, pytest.raises(RemixError, match="ended with status"):
        pool.run([{"options": {}, "output": "nowhere"}])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_brain_moved_and_thickened(brain, tmp_path, seed):
    rng = np.random.default_rng(seed)
    true = affine(rng.uniform(-20, 20, 3), rng.uniform(-150, 150, 3), rng.uniform(0.9, 1.1, 3))
    acquire(brain.t1w, true, (1, 1, 5), (200, 220, 36), tmp_path / "low.nii.gz", noise=0.01)
    found = register_affine(
        tmp_path / "low.nii.gz", brain, n_procs=2, random_seed=1, work_dir=tmp_path / "work"
    )
    level = prepare(brain)[4.0]
    points = level.near.points()[:, level.near.data > 0.5]
    assert found.plausible, found.warnings
    assert found.skull_stripped
    assert displacement(found.matrix, true, points) < 2
    assert found.determinant == pytest.approx(np.linalg.det(true[:3, :3]), rel=0.05)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
def test_no_brain_is_warned_about(brain, tmp_path):
    """A ball is no brain; it registers somehow, and says so."""
    grid = np.indices((50, 50, 50)) * 4.0 - 100
    ball = ((grid**2).sum(axis=0) < 70**2) * (100 + 10 * np.random.default_rng(0).random((50,) * 3))
    image = nb.Nifti1Image(ball.astype(np.float32), np.diag([4.0, 4.0, 4.0, 1.0]))
    nb.save(image, tmp_path / "ball.nii.gz")
    found = register_affine(
        tmp_path / "ball.nii.gz", brain, skull_stripped=True, random_seed=1, work_dir=tmp_path
    )
    assert not found.plausible
    assert found.warnings
