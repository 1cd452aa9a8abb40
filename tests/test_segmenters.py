"""Overlap by known answers; external commands run for real."""

import sys

import numpy as np
import pytest
import torch

from remix_bids.errors import RemixError, UsageError
from remix_bids.evaluation.external import parse_command, run_command
from remix_bids.evaluation.run import TrueClasses
from remix_bids.evaluation.segmenters import (
    atropos,
    dice,
    external,
    moved_and_back,
    nearest,
    tissue_means,
)
from remix_bids.spatial import Grid

GRID = Grid((20, 22, 24), np.diag([1.0, 1, 1, 1]))
COPY = f"{sys.executable} -c 'import shutil, sys; shutil.copy(*sys.argv[1:])' {{input}} {{output}}"


def brain():
    """Three shells around each other, of 0.3, 0.6 and 0.9, with a little noise."""
    radius = np.linalg.norm(
        np.indices(GRID.shape) - np.array([[[[10]]], [[[11]]], [[[12]]]]), axis=0
    )
    truth = np.select([radius < 4, radius < 7, radius < 9], [3, 2, 1], 0)
    image = np.array([0, 0.3, 0.6, 0.9])[truth]
    noise = np.random.default_rng(0).normal(0, 0.02, truth.shape)
    return truth, (image + noise * (truth > 0)).astype(np.float32)


def test_dice():
    one = np.array([0, 1, 1, 2, 2, 2])
    other = np.array([0, 1, 2, 2, 2, 0])
    everywhere = np.ones(6, bool)
    assert dice(one, one, everywhere) == 1
    assert dice(one, other, everywhere) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert dice(one, other, np.array([1, 1, 0, 1, 1, 0], bool)) == 1
    assert np.isnan(dice(0 * one, 0 * one, everywhere))


def test_atropos_finds_the_shells():
    truth, image = brain()
    mask = truth > 0
    found = atropos(image, mask, [0.2, 0.5, 1.0])
    assert dice(found, truth, mask) > 0.97
    assert not found[~mask].any()


def test_the_floor_is_below_one_and_high():
    truth, image = brain()
    mask, means = truth > 0, [0.3, 0.6, 0.9]
    again = moved_and_back(image, np.random.default_rng(0))
    floor = dice(atropos(image, mask, means), atropos(again, mask, means), mask)
    assert 0.8 < floor < 1


def test_means_ascend():
    truth, image = brain()
    means = tissue_means(image, truth > 0)
    assert means == sorted(means)


def test_the_floor_counts_where_dice_does():
    """Where the two segmentations of the truth differ outside the mask, nothing is lost."""
    truth, image = brain()
    again = truth.copy()
    again[:10] = np.where(truth[:10] == 2, 3, truth[:10])
    inside = truth > 0
    inside[:10] = False
    person = TrueClasses(lambda *_: truth, "any", truth > 0, [], truth, again, None, "")
    told = person.compare(torch.from_numpy(image), inside)
    assert told["dice"] == told["dice_floor"] == 1
    assert person.compare(torch.from_numpy(image), truth > 0)["dice_floor"] < 0.95


def test_an_external_segmenter_may_answer_on_another_grid(tmp_path):
    script = tmp_path / "half.py"
    script.write_text(
        "import sys, nibabel as nb, numpy as np\n"
        "image = nb.load(sys.argv[1])\n"
        "labels = (np.asanyarray(image.dataobj)[::2, ::2, ::2] > 0.5).astype(np.int16)\n"
        "nb.save(nb.Nifti1Image(labels, image.affine @ np.diag([2, 2, 2, 1])), sys.argv[2])\n"
    )
    truth, image = brain()
    segment = external(f"{sys.executable} {script} {{input}} {{output}}", GRID)
    labels = segment(image, truth > 0, [])
    assert labels.shape == image.shape
    inside = (truth > 1).astype(int)
    assert dice(labels, inside, np.ones(GRID.shape, bool)) > 0.8


def test_a_command_copies():
    _, image = brain()
    result, grid = run_command(COPY, image, GRID)
    np.testing.assert_array_equal(result, image)
    np.testing.assert_allclose(grid.affine, GRID.affine)


def test_a_bad_command_is_told():
    for template in ("", "tool --i {input}", "tool"):
        with pytest.raises(UsageError, match="must hold"):
            parse_command(template)
    with pytest.raises(UsageError, match="No closing quotation"):
        parse_command("tool 'my file {input} {output}")
    _, image = brain()
    with pytest.raises(RemixError, match="ended with 3"):
        run_command(f"{sys.executable} -c 'raise SystemExit(3)' {{input}} {{output}}", image, GRID)
    with pytest.raises(RemixError, match="no-such-tool"):
        run_command("no-such-tool {input} {output}", image, GRID)
    with pytest.raises(RemixError, match="output"):
        run_command(f"{sys.executable} -c '' {{input}} {{output}}", image, GRID)
    twice = "import sys, nibabel as nb; i = nb.load(sys.argv[1]); j = nb.concat_images([i, i])"
    with pytest.raises(RemixError, match="cannot reshape"):
        run_command(
            f"{sys.executable} -c '{twice}; nb.save(j, sys.argv[2])' {{input}} {{output}}",
            image,
            GRID,
        )


def test_what_a_command_prints_and_writes_is_no_riddle(tmp_path):
    _, image = brain()
    script = tmp_path / "tool.py"

    def result(make):
        script.write_text(
            "import sys, nibabel as nb, numpy as np\n"
            "sys.stdout.buffer.write(bytes([0xe9]))\n"
            f"image = nb.load(sys.argv[1]); data = image.get_fdata(); data = {make}\n"
            "nb.save(nb.Nifti1Image(data, image.affine), sys.argv[2])\n"
        )
        return run_command(f"{sys.executable} {script} {{input}} {{output}}", image, GRID)

    np.testing.assert_allclose(result("data")[0], image)  # whatever its letters
    with pytest.raises(RemixError, match="expected 3, got 2"):
        result("data[0]")
    with pytest.raises(RemixError, match="no finite number"):
        result("data * np.nan")
    with script.open("a") as file:
        file.write("import os; os.truncate(sys.argv[2], os.path.getsize(sys.argv[2]) - 100)\n")
    with pytest.raises(RemixError, match="ended before"):
        run_command(f"{sys.executable} {script} {{input}} {{output}}", image, GRID)


@pytest.mark.parametrize("most", [3, 4, 6, 30])
def test_labels_that_a_program_has_scaled_are_rounded(tmp_path, most):
    """Floats written as uint8 come back as 2.9999 or so."""
    labels = np.random.default_rng(most).integers(0, most + 1, GRID.shape)
    script = tmp_path / "tool.py"
    script.write_text(
        "import sys, nibabel as nb, numpy as np\n"
        "image = nb.Nifti1Image(nb.load(sys.argv[1]).get_fdata(), np.eye(4))\n"
        "image.set_data_dtype(np.uint8); nb.save(image, sys.argv[2])\n"
    )
    command = f"{sys.executable} {script} {{input}} {{output}}"
    found, _ = run_command(command, labels, GRID, np.int32)
    np.testing.assert_array_equal(found, labels)


def test_file_names_reach_no_shell():
    assert parse_command("tool {input} {output}; rm x") == [
        "tool",
        "{input}",
        "{output};",
        "rm",
        "x",
    ]


def test_labels_move_by_nearest_neighbour():
    labels = np.zeros((6, 6, 6), int)
    labels[2] = 5
    shifted = np.eye(4)
    shifted[0, 3] = 1
    assert (nearest(labels, shifted, labels.shape)[1] == 5).all()
