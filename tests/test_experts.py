"""Network, gate and inference."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from remix_bids.errors import InputImageError, MissingResourceError
from remix_bids.experts.inference import enhance, load_expert, predict
from remix_bids.experts.registry import (
    ExpertRecord,
    effective_voxel_volume,
    load_registry,
    voxel_volume,
)
from remix_bids.experts.unet import (
    ResidualUNet,
    depth_to_space,
    residual_scale,
    space_to_depth,
)
from remix_bids.simulation.acquisition import Sampling
from remix_bids.simulation.estimate import Estimate
from remix_bids.simulation.intensity import intensity_scale
from remix_bids.training.trainer import save_network

SIZES = np.array([1.0, 1.0, 4.0])
NOISE = 0.01
SCAN = torch.tensor([[*SIZES, NOISE]], dtype=torch.float32)
SAMPLING = Sampling(np.eye(3, 4), np.ones(3))


def estimate(image, covered, sampling=SAMPLING, rest=None):
    """What a network is fed, from arrays."""
    image = torch.tensor(np.ascontiguousarray(image))
    rest = torch.zeros_like(image) if rest is None else torch.tensor(np.ascontiguousarray(rest))
    return Estimate(image, torch.tensor(np.ascontiguousarray(covered)), sampling, rest, NOISE)


def test_depth_to_space_undoes_space_to_depth():
    x = torch.rand(2, 3, 4, 6, 8)
    assert torch.equal(depth_to_space(space_to_depth(x)), x)


def test_an_untrained_network_is_the_identity():
    x = torch.rand(1, 6, 16, 16, 24)
    assert torch.equal(ResidualUNet(widths=(4, 8, 8))(x, SCAN), x[:, :1])


def test_every_weight_learns():
    network = ResidualUNet(widths=(4, 8, 8))
    for layer in (network.out, network.scan[2]):
        torch.nn.init.normal_(layer.weight, std=0.01)
    network(torch.rand(1, 6, 16, 16, 16), SCAN).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_any_size_is_padded_and_cut_back():
    network = ResidualUNet(widths=(4, 8, 8))
    inputs = torch.rand(6, 13, 17, 9)
    assert torch.equal(predict(network, inputs, SCAN[0]), inputs[0])


def trained_by_chance():
    """A network that does something, and something else for another scan."""
    torch.manual_seed(0)
    network = ResidualUNet(widths=(4, 8, 8)).eval()
    for layer in (network.out, network.scan[2]):
        torch.nn.init.normal_(layer.weight, std=0.05)
    return network


def test_what_is_seen_in_a_mirror_is_restored_in_a_mirror():
    network, inputs = trained_by_chance(), torch.rand(6, 13, 17, 9)
    mirrored = predict(network, inputs.flip(1, 2, 3), SCAN[0]).flip(0, 1, 2)
    assert torch.equal(predict(network, inputs, SCAN[0]), mirrored)
    alone = network(F.pad(inputs, (0, 7, 0, 7, 0, 3))[None], SCAN[:1])[0, 0, :13, :17, :9]
    assert not torch.allclose(alone, mirrored, atol=1e-4)  # one pass has its direction


@pytest.mark.parametrize("other", [[1.0, 1.0, 6.0, 0.01], [1.0, 1.0, 4.0, 0.03]])
def test_voxel_sizes_and_noise_matter(other):
    network = trained_by_chance()
    x = torch.rand(1, 6, 16, 16, 16)
    assert (network(x, SCAN) - network(x, torch.tensor([other]))).abs().max() > 1e-4


def test_the_rest_matters():
    network = trained_by_chance()
    x = torch.rand(1, 6, 16, 16, 16)
    other = x.clone()
    other[:, 5] = 0
    assert (network(x, SCAN) - network(other, SCAN)).abs().max() > 1e-4


def test_thick_slices_and_noise_leave_much_to_add():
    scans = [
        [1.0, 1, 1, 0],
        [1, 1, 2, 0],
        [1, 1, 4, 0],
        [4, 1, 1, 0],
        [1, 1, 4, 0.05],
        [1, 1, 12, 0],
    ]
    fine, two, four, turned, noisy, beyond = residual_scale(torch.tensor(scans)).tolist()
    assert 0 < fine < two < four == turned < noisy < beyond
    assert beyond == residual_scale(torch.tensor([[1.0, 1, 9, 0]])).item()


def test_slices_may_be_stacked_along_any_axis():
    """Turning a scan turns the result: which way slices lie in the head does not matter."""
    network, record = trained_by_chance(), None
    generator = np.random.default_rng(0)
    image = generator.random((16, 24, 32), dtype=np.float32)
    covered = np.ones(image.shape, bool)
    rows = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.25, 0]])
    rest = generator.normal(0, 0.01, image.shape).astype(np.float32)
    axial = enhance(estimate(image, covered, Sampling(rows, SIZES), rest), record, network=network)
    order = [2, 1, 0]  # the first and the last axis swapped
    turned = Sampling(rows[order][:, [*order, 3]], SIZES[order])
    swap = (2, 1, 0)
    swapped = (image.transpose(swap), covered.transpose(swap), turned, rest.transpose(swap))
    sagittal = enhance(estimate(*swapped), record, network=network)
    np.testing.assert_allclose(sagittal.transpose(swap), axial, atol=1e-6)
    assert np.abs(axial - image).max() > 1e-3


# The truth table of the gate: voxel sizes, plain volume, effective volume, expert of each.
GATE = [
    ((1.0, 1.0, 1.0), 1.0, 1.0, "1", "1"),
    ((0.7, 0.7, 0.7), 0.343, 1.0, "1", "1"),
    ((1.0, 1.0, 1.499), 1.499, 1.499, "1", "1"),
    ((1.0, 1.0, 1.5), 1.5, 1.5, "2", "2"),
    ((0.91, 0.91, 3.0), 2.484, 3.0, "2", "3"),
    ((0.46875, 0.46875, 6.0), 1.318, 6.0, "1", "6"),
    ((0.78125, 0.78125, 6.5), 3.967, 6.5, "4", "7"),
    ((2.0, 2.0, 2.0), 8.0, 8.0, "7", "7"),
    ((1.0, 1.0, 6.4999), 6.5, 6.5, "7", "7"),
    ((3.0, 3.0, 3.0), 27.0, 27.0, "7", "7"),
]


@pytest.mark.parametrize(("sizes", "plain", "effective", "by_plain", "by_effective"), GATE)
def test_the_gate(sizes, plain, effective, by_plain, by_effective):
    registry = load_registry()
    assert voxel_volume(sizes) == plain
    assert effective_voxel_volume(sizes) == effective
    assert registry.select(plain).name == by_plain
    assert registry.select(effective).name == by_effective


@pytest.mark.parametrize("volume", [0.0, -1.0, float("nan")])
def test_the_gate_refuses_nonsense(volume):
    with pytest.raises(ValueError, match="positive"):
        load_registry().select(volume)


def test_shipped_experts_load_and_are_trained():
    registry = load_registry()
    assert [r.name for r in registry] == [*"1234567", "general"]
    assert sum(r.path.stat().st_size for r in registry) < 60e6
    weights = {record.name: load_expert(record).out.weight.detach().numpy() for record in registry}
    assert all(np.abs(w).max() > 1e-4 for w in weights.values())  # zero is the identity
    assert len({w.tobytes() for w in weights.values()}) == 8


def expert_file(folder, **changes):
    path = folder / "expert.safetensors"
    save_network(ResidualUNet(widths=(4, 8, 8)), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ExpertRecord(
        **{"name": "3", "path": path, "sha256": digest, "lower": 2.5, "upper": 3.5} | changes
    )


def test_a_changed_file_is_refused(tmp_path):
    record = expert_file(tmp_path)
    load_expert(record)
    record.path.write_bytes(record.path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(MissingResourceError, match="sha256"):
        load_expert(record)


def test_a_missing_table_and_a_missing_file_are_told(tmp_path):
    with pytest.raises(MissingResourceError, match=r"experts\.toml is missing"):
        load_registry(tmp_path)
    with pytest.raises(MissingResourceError, match="is missing"):
        expert_file(tmp_path, path=tmp_path / "gone").check()


@pytest.mark.parametrize(
    "text", ["[[expert]]", "expert = 5", 'expert = "a"', '[expert]\n5 = "a"', "[expert.5]"]
)
def test_a_table_of_another_form_is_told(tmp_path, text):
    (tmp_path / "experts.toml").write_text(text)
    with pytest.raises(MissingResourceError, match=r"experts\.toml cannot be read"):
        load_registry(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "expert.safetensors"
    path.write_bytes(b"not weights")
    record = expert_file(tmp_path, path=path, sha256=hashlib.sha256(b"not weights").hexdigest())
    path.write_bytes(b"not weights")
    with pytest.raises(MissingResourceError, match="does not load"):
        load_expert(record)


def test_intensities_stay_the_scanners(tmp_path):
    """An identity network gives the image back in its own units, whatever they are."""
    record = expert_file(tmp_path)
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 3000, (20, 22, 18)).astype(np.float32)
    covered = np.ones(image.shape, bool)
    covered[:3] = False
    for factor in (1.0, 1e-4, 1e5):
        scaled = (image * factor * covered).astype(np.float32)
        out = enhance(estimate(scaled, covered), record)
        np.testing.assert_allclose(out, image * factor * covered, rtol=1e-4)
        assert out.dtype == np.float32
    assert not torch.backends.cudnn.allow_tf32  # a GPU computes what the reference tells
    offset = ((image - 1000) * covered).astype(np.float32)  # no magnitude, but nothing is cut off
    np.testing.assert_allclose(enhance(estimate(offset, covered), record), offset, atol=0.5)


def test_scale_ignores_air():
    tissue = torch.full((30, 30, 30), 100.0)
    padded = torch.zeros(60, 60, 60)
    padded[:30, :30, :30] = tissue
    everywhere = torch.ones(60, 60, 60, dtype=torch.bool)
    assert intensity_scale(padded, everywhere) == pytest.approx(100)
    assert intensity_scale(tissue, everywhere[:30, :30, :30]) == pytest.approx(100)


@pytest.mark.parametrize("covered", [True, False])
def test_an_empty_image_is_refused(covered, tmp_path):
    zeros = np.zeros((8, 8, 8), np.float32)
    with pytest.raises(InputImageError):
        enhance(estimate(zeros, np.full(zeros.shape, covered)), expert_file(tmp_path))
