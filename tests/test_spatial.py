"""Resampling: identities, and agreement with ANTs on awkward grids."""

import nibabel as nib
import numpy as np
import pytest
import torch

from remix_bids.registration.itk import write_itk_affine
from remix_bids.spatial import Grid, coverage, index_map, resample

ORIENTATIONS = {
    "RAS": np.eye(3),
    "LAS": np.diag([-1.0, 1.0, 1.0]),
    "RSA": np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]),
}


def smooth_image(shape, seed=0):
    """Random blobs without energy near the highest frequencies."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij")
    out = np.zeros(shape)
    for _ in range(12):
        f, p = rng.integers(0, 4, 3), rng.uniform(0, 2 * np.pi, 3)
        out += np.prod(
            [np.cos(2 * np.pi * k * a + q) for k, a, q in zip(f, axes, p, strict=True)], axis=0
        )
    return torch.from_numpy(out - out.min()).float()


def oblique(angle, axis=2):
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    out = np.eye(3)
    i, j = [a for a in range(3) if a != axis]
    out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def affine_of(directions, sizes, origin):
    out = np.eye(4)
    out[:3, :3] = directions * np.asarray(sizes)
    out[:3, 3] = origin
    return out


@pytest.mark.parametrize("order", ["linear", "cubic"])
def test_identity_returns_the_image(order):
    image = torch.rand(11, 9, 13)
    assert torch.allclose(resample(image, np.eye(4), image.shape, order), image, atol=1e-5)


def test_cubic_reproduces_a_cubic_polynomial():
    x = torch.linspace(-1, 1, 21)
    image = (x**3 - x)[:, None, None].expand(21, 6, 6).contiguous()
    mapping = np.diag([0.5, 1, 1, 1])
    found = resample(image, mapping, (41, 6, 6), "cubic")[:, 3, 3]
    y = torch.linspace(-1, 1, 41)
    inner = slice(10, 31)  # mirror boundaries bend the ends
    assert torch.allclose(found[inner], (y**3 - y)[inner], atol=2e-3)


def test_a_whole_voxel_shift_moves_voxels():
    image = torch.rand(8, 8, 8)
    mapping = np.eye(4)
    mapping[0, 3] = 2
    assert torch.allclose(resample(image, mapping, (6, 8, 8), "cubic"), image[2:], atol=1e-5)


@pytest.mark.parametrize("name", ORIENTATIONS)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_linear_agrees_with_ants(name, shift, tmp_path):
    """On an oblique grid of each orientation; half a voxel put in on purpose must be seen."""
    import ants

    directions = ORIENTATIONS[name] @ oblique(20, 0) @ oblique(12, 2)
    source = Grid((40, 36, 30), affine_of(directions, [1.1, 0.9, 2.0], [-15, 12, 5]))
    target = Grid((30, 30, 30), affine_of(np.eye(3), [1.5, 1.5, 1.5], [-20, -18, -14]))
    centre = (source.affine @ np.array([19.5, 17.5, 14.5, 1]))[:3]
    world = np.eye(4)
    world[:3, :3] = oblique(7, 1) * 1.05
    world[:3, 3] = centre - world[:3, :3] @ np.array([1.0, 3.0, 7.0])
    image = smooth_image(source.shape)
    transform = tmp_path / "affine.txt"
    write_itk_affine(transform, world)
    for grid, data, file in ((source, image.numpy(), "m"), (target, np.zeros(target.shape), "f")):
        header = nib.Nifti1Image(data.astype(np.float32), grid.affine)
        nib.save(header, tmp_path / f"{file}.nii.gz")
    expected = ants.apply_transforms(
        ants.image_read(str(tmp_path / "f.nii.gz")),
        ants.image_read(str(tmp_path / "m.nii.gz")),
        [str(transform)],
        interpolator="linear",
    ).numpy()
    mapping = index_map(target, source, world)
    moved = mapping.copy()
    moved[0, 3] += shift
    found = resample(image, moved, target.shape, "linear").numpy()
    inside = coverage(mapping, source.shape, target.shape).numpy()
    index = np.stack(np.meshgrid(*[np.arange(n) for n in target.shape], indexing="ij"), -1)
    where = index @ mapping[:3, :3].T + mapping[:3, 3]
    inside &= ((where >= 1) & (where <= np.array(source.shape) - 2)).all(-1)
    assert inside.mean() > 0.2
    worst = np.abs(found - expected)[inside].max() / float(image.max())
    assert (worst < 1e-3) == (shift == 0.0)


def test_coverage_counts_voxel_edges():
    mask = coverage(np.diag([0.5, 1, 1, 1]), (4, 3, 3), (10, 3, 3))
    assert mask[:, 0, 0].tolist() == [True] * 8 + [False] * 2


def test_grid_refuses_a_singular_affine():
    with pytest.raises(ValueError, match="invertible"):
        Grid((2, 2, 2), np.zeros((4, 4)))
