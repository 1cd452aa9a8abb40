"""Metrics by known answers; the protocol keeps its promises."""

import tomllib
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch

from remix_bids.errors import UsageError
from remix_bids.evaluation import claims
from remix_bids.evaluation.cases import (
    cases,
    fine_enough,
    segmented_first,
    told_sizes,
    with_every_expert,
)
from remix_bids.evaluation.methods import back_project, interpolate
from remix_bids.evaluation.metrics import (
    correlation,
    detail_ratio,
    eroded,
    grown,
    matched,
    psnr,
    ssim,
)
from remix_bids.evaluation.plot import plot
from remix_bids.evaluation.rows import finished, joined, read_rows, write_rows
from remix_bids.evaluation.run import _measure, _restored, evaluate
from remix_bids.evaluation.settings import (
    ALL_METHODS,
    BACK_PROJECTIONS,
    BLIND,
    METHODS,
    Settings,
)
from remix_bids.evaluation.table import (
    SHIPS,
    best_back_projection,
    bootstrap_interval,
    paired_gain,
    to_markdown,
)
from remix_bids.experts.registry import load_registry
from remix_bids.registration.affine import Templates
from remix_bids.simulation.acquisition import (
    CLASS_RANGES,
    Acquisition,
    load_bank,
    save_bank,
    slice_axis,
)
from remix_bids.simulation.degrade import acquire
from remix_bids.spatial import Grid
from remix_bids.training.dataset import Person

from .test_spatial import affine_of, smooth_image


def test_psnr_of_a_known_error():
    truth = torch.linspace(0, 1, 1000).reshape(10, 10, 10)
    mask = torch.ones(10, 10, 10, dtype=torch.bool)
    peak = float(truth.flatten()[994])
    assert psnr(truth + 0.1, truth, mask) == pytest.approx(20 * np.log10(peak / 0.1), abs=1e-3)


def test_psnr_counts_only_the_mask_and_clips_negatives():
    truth = torch.rand(8, 8, 8) + 0.5
    mask = torch.zeros(8, 8, 8, dtype=torch.bool)
    mask[:4] = True
    worse = truth + 0.1
    worse[4:] = 99
    assert psnr(worse, truth, mask) == psnr(truth + 0.1, truth, mask)
    zero = torch.zeros(8, 8, 8)
    zero[0] = 1
    everywhere = torch.ones(8, 8, 8, dtype=torch.bool)
    assert psnr(zero - 0.2 * (zero == 0), zero, everywhere) > 60


def test_correlation_and_ssim_of_equals():
    image = smooth_image((20, 20, 20))
    mask = torch.ones(20, 20, 20, dtype=torch.bool)
    assert correlation(2 * image + 1, image, mask) == pytest.approx(1)
    assert correlation(-image, image, mask) == pytest.approx(-1)
    assert ssim(image, image, mask) == pytest.approx(1)
    noisy = image + 0.2 * torch.rand(20, 20, 20, generator=torch.Generator().manual_seed(0))
    assert ssim(noisy, image, mask) < 0.999


def test_what_was_not_covered_costs_a_perfect_image_nothing():
    truth = smooth_image((24, 24, 24)) + 1
    covered = torch.ones(24, 24, 24, dtype=torch.bool)
    covered[:, :, :8] = False
    brain = eroded(covered, 2)
    image = truth * covered
    masks = brain, covered, torch.zeros_like(brain)
    found = _measure(people(1)[0], image, truth, masks, Grid((24, 24, 24), np.eye(4)), None, False)
    assert found["ssim"] == found["correlation"] == 1
    assert found["psnr"] == np.inf


def test_matching_undoes_gain_and_offset():
    truth = smooth_image((16, 16, 16))
    mask = truth > truth.mean()
    torch.testing.assert_close(matched(3 * truth + 7, truth, mask), truth, atol=1e-4, rtol=1e-4)
    # It never makes the error in the mask larger.
    noisy = 0.8 * truth + torch.rand(truth.shape)
    error, after = (((x - truth)[mask] ** 2).mean() for x in (noisy, matched(noisy, truth, mask)))
    assert after < error


def test_detail_ratio_counts_its_band_only():
    mask = torch.ones(40, 40, 40, dtype=torch.bool)
    z = torch.arange(40.0)
    wave = {period: 2 + torch.cos(2 * np.pi * z / period).expand(40, 40, 40) for period in (4, 20)}
    truth = wave[4] + wave[20]
    assert detail_ratio(truth, truth, mask) == pytest.approx(1)
    assert detail_ratio(wave[20], truth, mask) < 0.1
    assert detail_ratio(2 * wave[4], truth, mask) == pytest.approx(4, rel=0.1)


def test_growing_and_erosion():
    point = torch.zeros(9, 9, 9, dtype=torch.bool)
    point[4, 4, 4] = True
    assert grown(point, 2).sum() == 125
    mask = torch.zeros(9, 9, 9, dtype=torch.bool)
    mask[2:7, 2:7, 2:7] = True
    assert eroded(mask, 2).sum() == 1
    assert eroded(mask, 1).sum() == 27


def test_back_projection_explains_the_acquired_voxels_better():
    grid = Grid((40, 24, 24), np.eye(4))
    native = Grid((8, 24, 24), affine_of(np.eye(3), [5, 1, 1], [2, 0, 0]))
    acquisition = Acquisition(native, np.eye(4), (5.0, 0.0, 0.0))
    truth = smooth_image(grid.shape) + torch.rand(grid.shape)
    seen = acquire(truth, acquisition, grid)
    start = interpolate(seen, acquisition, grid, "cubic")
    residuals = [
        float((seen - acquire(x, acquisition, grid)).abs().mean())
        for x in (start, *back_project(seen, acquisition, grid, start, 6, 1.0))
    ]
    assert residuals[-1] < 0.5 * residuals[0]
    assert residuals == sorted(residuals, reverse=True)


def test_back_projection_as_told_knows_no_more_than_the_app(monkeypatch):
    """It equals that of the true profile where that is told, and differs where a header is."""
    grid = Grid((40, 24, 24), np.eye(4))
    native = Grid((10, 24, 24), affine_of(np.eye(3), [4, 1, 1], [2, 0, 0]))
    acquisition = Acquisition(native, np.eye(4), (4.0, 1.0, 1.0), (True, False, False))
    seen = acquire(smooth_image(grid.shape) + torch.rand(grid.shape), acquisition, grid)
    settings = Settings(protocol(), methods=("back-projection", BLIND))
    (case,) = cases(people(1), settings.protocol | {"geometries_per_person": 1}, [4], [0.0])
    told = _restored(case, seen, acquisition, grid, settings)
    monkeypatch.setattr("remix_bids.evaluation.run.as_told", lambda native, true: true)
    known = _restored(case, seen, acquisition, grid, settings)
    assert torch.equal(known["back-projection"], told["back-projection"])
    assert torch.equal(known[BLIND], known["back-projection"])
    assert not torch.allclose(told[BLIND], known[BLIND], atol=1e-3)


def protocol():
    text = resources.files("remix_bids.data").joinpath("protocol.toml").read_text()
    return tomllib.loads(text)


def people(n=6):
    image = torch.zeros(1).half()
    return [Person(f"p{i}", image, False, (1.0,) * 3, np.eye(4), "held_out") for i in range(n)]


def test_cases_are_held_out_in_class_and_drawn_again():
    todo = cases(people(), protocol(), range(1, 8), [0.0])
    assert len(todo) == 252
    for k in range(1, 8):
        assert {c.kind for c in todo if c.drawn == k} == set(protocol()["kinds"])
    for case in todo:
        low, high = CLASS_RANGES[case.drawn]
        one, two = case.acquisition(), case.acquisition()
        assert low - 0.01 <= one.volume <= high + 0.01
        np.testing.assert_array_equal(one.grid.affine, two.grid.affine)
        assert one.widths == two.widths


def test_a_real_geometry_is_called_real_only_where_there_is_one():
    todo = [c for c in cases(people(), protocol(), range(1, 8), [0.0]) if c.kind == "real"]
    real = {float(np.prod(np.maximum(g.grid.voxel_sizes, 1))) for g in load_bank() if g.held_out}
    for case in todo:
        low, high = CLASS_RANGES[case.drawn]
        assert (case.source == "real") == any(low <= volume < high for volume in real)
    assert {c.source for c in todo} == {"real", "any plane"}


def planes(todo):
    """Planes of cases, but for those that are as coarse along all axes."""
    names, grids = ("sagittal", "coronal", "axial"), [case.acquisition().grid for case in todo]
    thick = [grid for grid in grids if np.ptp(grid.voxel_sizes) > 0.1]
    return {names[np.abs(grid.affine[:3, slice_axis(grid)]).argmax()] for grid in thick}


def test_geometries_come_from_the_bank_that_is_named(tmp_path):
    """Whatever plane is asked for: held-out persons have the only scan that is held out."""
    sagittal, axial = (next(g for g in load_bank() if g.plane == p) for p in ("sagittal", "axial"))
    bank, none = tmp_path / "bank.json", tmp_path / "none.json"
    save_bank([replace(sagittal, held_out=True), replace(axial, held_out=False)], bank)
    save_bank([replace(g, held_out=False) for g in (sagittal, axial)], none)
    kinds = {"kinds": ["axial", "sagittal"]}
    todo = cases(people(2), protocol() | kinds, [3, 4], [0.0], bank)
    assert {c.kind for c in todo} == {"axial", "sagittal"}
    assert planes(todo) == {"sagittal"}
    chosen = [replace(person, split="validation") for person in people(2)]
    assert planes(cases(chosen, protocol() | kinds, [3, 4], [0.0], bank)) == {"axial"}
    with pytest.raises(UsageError, match="no geometry is held out"):
        cases(people(1), protocol(), [3], [0.0], none)[0].acquisition()


def test_what_is_asked_for_twice_is_measured_once():
    twice = cases(people(), protocol(), [4, 4], [0, 0.0])
    assert [c.key for c in twice] == [c.key for c in cases(people(), protocol(), [4], [0.0])]


def test_choices_are_made_on_other_acquisitions_than_those_reported():
    told = cases(people(), protocol(), range(1, 8), [0.02])
    chosen = [replace(person, split="validation") for person in people()]
    for one, two in zip(told, cases(chosen, protocol(), range(1, 8), [0.02]), strict=True):
        assert one.seed != two.seed
        assert not np.allclose(one.acquisition().grid.affine, two.acquisition().grid.affine)


def test_further_geometries_until_every_expert_has_a_scan_of_every_person():
    select = load_registry().select
    few = cases(people(), protocol() | {"geometries_per_person": 1}, range(1, 8), [0.0])
    many = cases(people(), protocol(), range(1, 8), [0.0])

    def served(todo):
        return {(c.person.name, select(c.acquisition().volume).name) for c in todo}

    todo = with_every_expert(few, many, lambda volume: select(volume).name)
    assert todo[: len(few)] == few
    assert served(todo) == served(many) > served(few)
    assert len(todo) == len(few) + len(served(many) - served(few))


def test_dice_needs_as_many_scans_however_many_geometries_are_read():
    select = load_registry().select

    def expert(volume):
        return select(volume).name

    few = cases(people(), protocol() | {"geometries_per_person": 1}, range(1, 8), [0.0])
    many = cases(people(), protocol(), range(1, 8), [0.0])
    least = segmented_first(with_every_expert(few, many, expert), expert)
    marked = [c for c in segmented_first(many, expert) if c.segmented]
    assert all(c.segmented for c in least)
    assert len(few) < len(least) < len(many)
    assert {c.key for c in marked} == {c.key for c in least}
    three = {c.key for c in segmented_first(many, expert, 3) if c.segmented}
    assert {c.key for c in many} > three >= {c.key for c in many if c.number < 3}
    assert all(c.segmented for c in segmented_first(many, expert, 6))


def test_a_coarse_image_is_no_truth_for_thin_slices():
    person = replace(people(1)[0], voxel_sizes=(1.0, 1.333, 1.333))
    todo = cases([person], protocol(), range(1, 8), [0.0])
    assert {c.drawn for c in todo} == {3, 4, 5, 6, 7}
    # What class 3 draws from reaches down to scans of expert 2.
    fine = fine_enough(todo, lambda volume: "2" if volume < 3 else "3")
    assert {c.key for c in fine} == {c.key for c in todo if c.acquisition().volume >= 3}
    assert 0 < len(fine) < len(todo)


def test_no_training_geometry_is_held_out():
    bank = load_bank()
    train = {g.group for g in bank if not g.held_out}
    test = {g.group for g in bank if g.held_out}
    assert not train & test


def rows():
    values = dict(zip(METHODS, range(24, 24 + len(METHODS)), strict=True))
    return [
        {"person": f"p{i}", "drawn": 4, "class": 4, "noise": 0.0, "method": method, "kind": "real",
         "number": 0, "voxel_sizes": "1.00 x 1.00 x 4.00",
         "profile": "box", "anisotropy": 4.0, "psnr": values[method] + i + 0.0,
         "psnr_whole": 30.0, "psnr_matched": 30.0, "ssim": 0.9, "correlation": 0.99}
        for i in range(4)
        for method in METHODS
    ]  # fmt: skip


def test_the_table_gives_paired_gains():
    table = to_markdown(rows())
    assert METHODS.index(SHIPS) == 6
    assert "| 4 | 25.50 | 26.50 | 27.50 | 28.50 | 29.50 | 30.50 | 31.50 |" in table
    assert "| 4 | +6.00 [+6.00, +6.00] 4/4 | +5.00 [+5.00, +5.00] 4/4 |" in table
    # Split by kind: cubic, back-projection, general.
    cells = "+5.00 [+5.00, +5.00] 4/4 | +3.00 [+3.00, +3.00] 4/4 | +2.00 [+2.00, +2.00] 4/4"
    assert f"| box profile | 1 | {cells} |" in table
    assert f"| anisotropy 4 to 20 | 1 | {cells} |" in table
    assert "| Gaussian profile | 0 |  |  |  |" in table
    _, seven = table.split("**Gain of `expert` over `general`, network alone, without noise**")
    assert METHODS.index("expert") - METHODS.index("general") == 1
    same = "+0.0000 [+0.0000, +0.0000] 0/4"
    assert f"| 4 | +1.000 [+1.000, +1.000] 4/4 | {same} | {same} |" in seven


def test_the_person_is_the_unit():
    """One has two scans, both worse, the other one that is better by as much as both together."""
    gains = {("p0", 0): -1.0, ("p0", 1): -3.0, ("p1", 0): 4.0}
    found = [
        row | {"person": person, "number": number}
        | ({"psnr": row["psnr"] + gain} if row["method"] == SHIPS else {})
        for row in rows()[: len(METHODS)]
        for (person, number), gain in gains.items()
    ]  # fmt: skip
    one, other = paired_gain(found, "psnr", "expert", 4)
    assert (one, other) == (1.0 - 2.0, 1.0 + 4.0)
    assert "| 4 | " in to_markdown(found)
    assert f"`{SHIPS}`, without noise: 2 persons, 3 scans" in claims.to_markdown(found)


def test_bootstrap_interval_holds_the_mean():
    values = [0.1, 0.5, 0.9, 1.3]
    low, high = bootstrap_interval(values)
    assert min(values) <= low < np.mean(values) < high <= max(values)
    assert bootstrap_interval(values) == (low, high)
    # Of the mean of 200 values 0 and 1: 1.96 standard errors to both sides.
    found = bootstrap_interval([0.0, 1.0] * 100)
    reach = 1.96 * 0.5 / np.sqrt(200)
    np.testing.assert_allclose(found, [0.5 - reach, 0.5 + reach], atol=0.01)


def test_tuning_takes_the_best_iteration():
    found = [
        {"person": "p", "class": k, "noise": 0.0, "method": f"{i} x {step}"}
        | {"psnr": -abs(i - k) - abs(step - 0.5)}
        for k in (0, 1, 2, 11)
        for step in (0.5, 1)
        for i in range(12)
    ]
    best = {0: [0, 0.5], 1: [1, 0.5], 2: [2, 0.5], 11: [11, 0.5]}
    assert best_back_projection(found) == {0.0: best}


def test_dice_and_other_programs_get_their_columns(tmp_path):
    found = rows()
    for row in found:
        row |= {"dice": 0.8 if row["method"] == "expert" else 0.7, "dice_floor": 0.95}
        row |= {"dice_manual": "", "head_detail": ""}
    other = [row | {"method": "other", "psnr": 1.0} for row in found if row["method"] == "cubic"]
    table = to_markdown([*found, *other])
    assert "0.7000 | 0.8000 | 0.7000 | 0.7000 |" in table
    assert "Dice of the segmenter with itself: 0.9500 in class " in table
    assert "manual" not in table
    assert "| expert | other |" in table
    plot([*found, *other], tmp_path / "one.svg")
    plot([*found, *other], tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "PSNR gain over cubic" in (tmp_path / "one.svg").read_text()


def measured(todo, digest=None):
    """Two rows of each case, as a TSV gives them back."""
    settings = Settings(protocol())
    return [
        {"person": c.person.name, "image": c.person.digest, "drawn": str(c.drawn),
         "number": str(c.number), "noise": str(c.noise), "affine": "true",
         "setup": digest or settings.setup(method, "3"), "method": method, "psnr": "30",
         "dice": "", "dice_manual": "", "segmenter": "", "labels": "", "class": "3", "kind": c.kind,
         "voxel_sizes": told_sizes(c.acquisition()), "volume": "3.0", "profile": "box"}
        for c in todo
        for method in ("cubic", "expert")
    ]  # fmt: skip


def first_segmented(todo):
    return [replace(c, segmented=c.number == 0) for c in todo]


def test_a_stopped_evaluation_goes_on(tmp_path):
    often = protocol() | {"geometries_per_person": 7}  # one more than kinds
    todo = first_segmented(cases(people(2), often, [3], [0.0, 0.02]))
    assert len({c.key for c in todo}) == len(todo) == 28
    assert [c.key for c in cases(people(2), often, [3], [0, 0.02])] == [c.key for c in todo]
    rows = measured(todo)
    settings = Settings(often, methods=("cubic", "expert"))
    assert finished(rows, todo, settings) == rows
    with pytest.raises(UsageError, match="other methods"):
        finished(rows, todo, replace(settings, methods=METHODS))
    with pytest.raises(UsageError, match="other methods"):
        finished(rows, todo, replace(settings, methods=("cubic",)))
    # The last case was cut off.
    assert finished(rows[:-1], todo, settings) == rows[:-2]
    # Dice is asked for, of the first geometries, and was not found yet.
    atropos = replace(settings, segmenter="atropos")
    with pytest.raises(UsageError, match=r"without the Dice .* the first p0, class 3, geometry 0"):
        finished(rows, todo, atropos)
    later = [row for row in rows if row["number"] != "0"]
    assert finished(later, todo, atropos) == later
    # What is there is not run again: these persons have no voxels to run on.
    write_rows(tmp_path / "rows.tsv", [], rows)
    assert evaluate(todo, settings, tmp_path / "rows.tsv") == rows
    assert read_rows(tmp_path / "rows.tsv") == rows


def test_a_file_of_rows_is_looked_at(tmp_path):
    rows, file = measured(cases(people(1), protocol(), [3], [0.0])), tmp_path / "rows.tsv"
    write_rows(file, [rows])
    text = file.read_text()
    # The last row was cut off: in its middle, in its last field, before its end.
    for cut in (25, 2, 1):
        file.write_text(text[:-cut])
        assert read_rows(file) == rows[:-1]
    lines = text.splitlines(keepends=True)
    file.write_text("".join([*lines[:2], lines[2].replace("\t", "", 1), *lines[3:]]))
    with pytest.raises(UsageError, match=r"rows.tsv, line 3 has more or fewer fields"):
        read_rows(file)
    for other in ("person\tmethod\np0\tcubic\n", "some notes\n"):
        file.write_text(other)
        with pytest.raises(UsageError, match=r"rows.tsv lacks .* name another file"):
            read_rows(file)
    file.write_bytes(b"\xff\xfe")
    for unreadable in (file, tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_rows(unreadable)


def test_no_row_is_lost_by_resuming():
    todo = cases(people(2), protocol(), [3], [0.0])
    rows, settings = measured(todo), Settings(protocol(), methods=("cubic", "expert"))
    with pytest.raises(UsageError, match="not asked for now, the first p0, class 3, geometry 0"):
        finished(rows, todo[1:], settings)
    # One more person, who comes first: the others' geometries are not those of before.
    first, second = people(2)
    others = cases([replace(first, name="a"), first, second], protocol(), [3], [0.0])
    with pytest.raises(UsageError, match="not asked for now"):
        finished(rows, others, settings)
    # As many as there are kinds: those agree, but other acquisitions are drawn.
    before = [replace(first, name=f"a{i}") for i in range(6)]
    with pytest.raises(UsageError, match="not asked for now"):
        finished(rows, cases([*before, first, second], protocol(), [3], [0.0]), settings)


def test_rows_of_another_preparation_are_not_mixed_in():
    """The same scan, prepared anew on another processor, differs by more than rounding."""
    todo = cases(people(2), protocol(), [3], [0.0])
    turned = [replace(c, person=replace(c.person, world=c.person.world + 1e-6)) for c in todo]
    settings = Settings(protocol(), methods=("cubic", "expert"))
    with pytest.raises(UsageError, match="another preparation of p0"):
        finished(measured(todo), turned, settings)
    with pytest.raises(UsageError, match="several preparations of p1"):
        joined([measured(todo[:6]), measured(todo[6:8]), measured(turned[8:])])
    one = todo[0].person
    assert one.digest != replace(one, image=one.image + 1).digest
    assert one.digest == replace(one, name="q", split="validation").digest


def test_manual_classes_are_found_later(tmp_path):
    todo = first_segmented(cases(people(1), protocol(), [3], [0.0]))
    rows = [row | {"dice": "0.9", "dice_manual": ""} for row in measured(todo)]
    settings = Settings(protocol(), methods=("cubic", "expert"), segmenter="atropos")
    assert finished(rows, todo, settings) == rows
    other = [row | {"segmenter": "command 01234567"} for row in rows]
    with pytest.raises(UsageError, match="another segmenter"):
        finished(other, todo, settings)
    assert finished(other, todo, replace(settings, segmenter=None)) == other
    with pytest.raises(UsageError, match="without the Dice"):
        finished(rows, todo, replace(settings, labels=tmp_path))
    # Mended labels are other labels.
    settings = replace(settings, labels=tmp_path)
    file = settings.manual_labels(todo[0].person.name)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"first")
    digest = settings.labels_digest(todo[0].person.name)
    rows = [row | {"dice_manual": "0.8", "labels": digest} for row in rows]
    assert finished(rows, todo, settings) == rows
    file.write_bytes(b"mended")
    with pytest.raises(UsageError, match="other manual classes"):
        finished(rows, todo, settings)
    mended = [row | {"labels": settings.labels_digest(todo[0].person.name)} for row in rows]
    with pytest.raises(UsageError, match="several files of manual classes of p0"):
        joined([rows, mended])


def test_runs_are_joined():
    todo = cases(people(2), protocol(), [3], [0.0])
    first, again = measured(todo), [row | {"dice": "0.9"} for row in measured(todo[:1])]
    networks = [row for row in first if row["method"] == "expert"]
    others = [row for row in first if row["method"] == "cubic"]
    assert joined([others, networks]) == first
    assert joined([first, again]) == joined([again, first]) == [*again, *first[2:]]
    # Other programs are told by their commands, not by the protocol only.
    program = [row | {"method": "p", "setup": f"{row['setup']}.89abcdef"} for row in others]
    assert len(joined([first, program])) == 3 * len(todo)
    assert joined([]) == []


def test_rows_that_do_not_belong_together_are_not_joined():
    todo = cases(people(2), protocol(), [3], [0.0])
    rows = measured(todo)
    networks = [row for row in rows if row["method"] == "expert"]
    others = [row for row in rows if row["method"] == "cubic"]
    with pytest.raises(UsageError, match="11 of 12 cases lack methods that others have, the first"):
        joined([others, networks[:1]])
    rules = others[0]["setup"]
    for name in ("expert 3", "back-projection in class 3", "cubic"):
        method = name.split()[0]
        own = [row | {"method": method, "setup": f"{rules}.01"} for row in others]
        with pytest.raises(UsageError, match=f"rows of {name} are of several networks"):
            joined([own, [own[0] | {"setup": f"{rules}.02"}]])
    with pytest.raises(UsageError, match="several protocols"):
        joined([[row | {"setup": "0123abcd"} for row in others], networks])
    with pytest.raises(UsageError, match=r"expert for p0, class 3, geometry 0, .* lacks the Dice"):
        joined([[row | {"dice": "0.9"} for row in (rows[0], *rows[2:])], rows[1:2]])
    manual = [row | {"dice": "0.9", "dice_manual": "0.8"} for row in rows]
    with pytest.raises(UsageError, match=r"expert for p0, class 3, geometry 0, .* --labels"):
        joined([[manual[0], manual[1] | {"dice_manual": ""}, *manual[2:]], manual[4:]])
    with pytest.raises(UsageError, match=r"p0, class 3, geometry 0, .* not the same scan"):
        joined([rows, [others[0] | {"volume": "3.1"}]])
    with pytest.raises(UsageError, match="several affines: registered, true"):
        joined([rows, [row | {"affine": "registered"} for row in rows]])
    two = [[row | {"dice": "0.9", "segmenter": name} for row in rows] for name in ("one", "two")]
    with pytest.raises(UsageError, match="several segmenters: one, two"):
        joined(two)
    assert joined([rows, two[0]]) == two[0]


def test_rows_of_other_experts_are_not_mixed_in(tmp_path):
    todo = cases(people(1), protocol(), [3], [0.0])
    settings = Settings(protocol(), methods=("cubic", "expert"))
    with pytest.raises(UsageError, match="other experts"):
        finished(measured(todo, "0123abcd"), todo, settings)
    tuned = replace(settings, protocol=protocol() | {"erosion": 3})
    with pytest.raises(UsageError, match="another protocol"):
        finished(measured(todo), todo, tuned)
    with pytest.raises(UsageError, match="another protocol"):
        finished(measured(todo), todo, Settings(protocol(), tune=True))
    found = []
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
        registered = replace(settings, templates=Templates(tmp_path / name, None))
        with pytest.raises(UsageError, match="of another affine"):
            finished(measured(todo), todo, registered)
        found.append(registered.affine)
    assert len({*found}) == 2


def test_rows_outlive_experts_that_did_not_make_them(tmp_path):
    """One expert is followed by more steps than before: its own rows alone are lost."""
    table = load_registry()["1"].path.with_name("experts.toml").read_text()
    before, own = table.split("[expert.2]")
    assert "consistency_steps = 2" in own
    changed = own.replace("consistency_steps = 2", "consistency_steps = 3", 1)
    (tmp_path / "experts.toml").write_text(f"{before}[expert.2]{changed}")
    shipped = Settings(protocol())
    others = replace(shipped, experts_dir=tmp_path)
    for method in METHODS:
        for klass in "1234567":
            same = shipped.setup(method, klass) == others.setup(method, klass)
            assert same == (method not in ("expert", SHIPS) or klass != "2")
    assert shipped.setup("general", "7") != shipped.setup("expert", "7")
    # A program is its command, whatever its name.
    one, two = (Settings(protocol(), commands={"3": c}).setup("3", "3") for c in ("one", "two"))
    assert len({one, two, shipped.setup("expert", "3"), shipped.setup("cubic", "3")}) == 4


def test_rows_outlive_iterations_that_did_not_make_them():
    changed = protocol()
    changed["back_projection"]["clean"][1] = [99, 1.0]
    before, after = Settings(protocol()), Settings(changed)
    for method in ALL_METHODS:
        for klass in "1234567":
            same = before.setup(method, klass) == after.setup(method, klass)
            assert same == (method not in BACK_PROJECTIONS or klass != "2")
    assert replace(before, tune=True).setup("1 x 1", "3") != before.setup("cubic", "3")


def held(found, part):
    """What was found and whether it holds, of the only claim whose text holds a part."""
    (claim,) = [c for c in found if part in c.text]
    return claim.found, claim.holds


def test_claims_hold_where_they_hold():
    """Methods lie 1 dB apart, all else is equal for all."""
    order = METHODS.index(SHIPS)
    above = {m: float(order - METHODS.index(m)) for m in METHODS}
    found = claims.claims(rows())
    assert [c.holds for c in found if "linear and cubic" in c.text] == [True, False, False]
    assert held(found, "box profile") == (f"{above['cubic']:+.2f} dB", True)
    assert held(found, "above back-projection") == ("1 of 1", True)
    level = METHODS.index("back-projection") + 24
    ties = [
        row | {"psnr": row["psnr"] if row["method"] != SHIPS else level + int(row["person"][1])}
        for row in rows()
    ]
    assert held(claims.claims(ties), "above back-projection") == ("0 of 1, not 4", False)
    # Ahead in the mean by one person: the interval tells that others may not be.
    one = [row | {"psnr": row["psnr"] + 3 * (row["method"] == SHIPS and row["person"] == "p0")}
           for row in ties]  # fmt: skip
    assert held(claims.claims(one), "above back-projection") == ("0 of 1, not 4", False)
    assert held(found, "in their mean by 0.7 dB") == (f"{above['back-projection']:+.2f} dB", True)
    assert held(found, "general network in PSNR") == ("1 of 1, 0 ties", True)
    assert not [c for c in found if "gaussian profile" in c.text]  # there is none
    assert {c.text.split(":")[0] for c in found if c.text.startswith("class")} >= {"class 4"}
    first = claims.claims([row | {"drawn": 1, "class": 1} for row in rows()])
    assert not [c for c in first if "linear and cubic" in c.text]
    assert held(first, "class 1: PSNR not below cubic") == (f"{above['cubic']:+.3f} dB", True)
    noisy = claims.claims([row | {"noise": 0.02} for row in rows()])
    assert held(noisy, "in their mean by 1.0 dB")[1]
    # One person worse is enough.
    other = rows()
    other[METHODS.index(SHIPS)]["psnr"] = 0.0
    assert held(claims.claims(other), "linear and cubic in psnr") == ("0 of 1, not 4", False)
    # So is one of whom there is no scan: the gate has sent it to another class.
    other = [row | {"class": 4 if row["person"] != "p0" else 5} for row in rows()]
    lacking = "2 of 2; class 4 lacks 1 person; class 5 lacks 3 persons"
    assert held(claims.claims(other), "linear and cubic in psnr") == (lacking, False)
    # But not one for whom none was drawn, as of an image too coarse for the class.
    fine = [row | {"drawn": 2, "class": 2} for row in rows() if row["person"] != "p0"]
    assert held(claims.claims([*rows(), *fine]), "linear and cubic in psnr") == ("2 of 2", True)
    # In a class for which any image will do, one of whom there are rows of others only is missed.
    coarse = [row for row in rows() if row["person"] != "p0"]
    fine = [row | {"drawn": 2, "class": 2} for row in rows()]
    lacking = "2 of 2; class 4 lacks 1 person"
    assert held(claims.claims([*coarse, *fine]), "linear and cubic in psnr") == (lacking, False)
    # Nor does anything hold that cannot be told, whoever comes first.
    for order in (1, -1):
        unknown = [row | {"psnr": float("nan") if row["person"] == "p0" else row["psnr"]}
                   for row in rows()[::order]]  # fmt: skip
        told = held(claims.claims(unknown), "linear and cubic in psnr")
        assert told == ("0 of 1, not 4", False)
    other = [row | {"class": 4 if row["person"] != "p0" else 1} for row in rows()]
    lacking = "1 of 1; class 4 lacks 1 person"
    assert held(claims.claims(other), "linear and cubic in psnr") == (lacking, False)


def test_claims_of_dice_and_of_heads():
    dice = {"linear": 0.8, "general": 0.902, "expert": 0.902, SHIPS: 0.902}
    found = [
        row | {"dice": dice.get(row["method"], ""), "dice_floor": 0.97, "dice_manual": 0.7,
               "head_detail": 1.0 if row["method"] == SHIPS else 0.5}
        for row in rows()
    ]  # fmt: skip
    told = claims.claims(found)
    assert held(told, "network in Dice") == ("0 of 1, 1 ties", False)
    assert held(told, "class 4: Dice gap") == ("60.00%", True)
    assert held(told, "manual classes") == ("1 of 1", True)
    assert held(told, "outside the brain") == ("1.00, cubic 0.50", True)
    # A floor below linear, or on it, closes nothing; nor does a gain that the segmenter may be off.
    for floor in (0.75, 0.8):
        lower = claims.claims([row | {"dice_floor": floor} for row in found])
        text = "linear is at the floor; the gain is below twice what the segmenter is off"
        assert held(lower, "class 4: Dice gap") == (text, False)
    little = {"linear": 0.8, SHIPS: 0.81}
    small = [row | {"dice": little.get(row["method"], row["dice"]), "dice_floor": 0.82}
             for row in found]  # fmt: skip
    text = "50.00%; the gain is below twice what the segmenter is off"
    assert held(claims.claims(small), "class 4: Dice gap") == (text, False)
    for row in found[: len(METHODS)]:  # of one person, who has no Dice
        row |= {"dice": "", "dice_floor": "", "dice_manual": "", "head_detail": ""}
    told = claims.claims(found)
    assert held(told, "network in Dice") == ("0 of 1, 1 ties; class 4 lacks 1 person", False)
    assert held(told, "class 4: Dice gap") == ("60.00%; class 4 lacks 1 person", False)
    for row in found:
        row["head_detail"] = 1.1 if row["method"] == SHIPS else 0.5
        row["dice_manual"] = 0.6 if row["method"] == SHIPS else 0.7
    told = claims.claims(found)
    assert held(told, "manual classes") == ("0 of 1, not 4", False)
    assert not held(told, "outside the brain")[1]
    assert "| no |" in claims.to_markdown(found)
