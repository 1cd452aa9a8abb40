"""The group level: a table that programs read, reasons that people understand."""

import csv
import json

import numpy as np
import pytest

from remix_bids.errors import NothingToDoError
from remix_bids.reports.group import LIMIT, collect, flag, group_html, write_group
from tests.commands import run
from tests.pages import figures_of


def write(out, rows):
    for row in rows:
        subject = row["bids_name"].split("_")[0]
        path = out / subject / "anat" / f"{row['bids_name'][:-4]}_desc-remix_qc.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))


def cohort(n, experts=("3", "5")):
    rng = np.random.default_rng(1)
    names = [f"sub-{i:04d}_T1w" for i in range(n)]
    return [figures_of(name, rng, experts[i % len(experts)]) for i, name in enumerate(names)]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_an_ordinary_cohort_is_hardly_flagged():
    reasons = flag(cohort(400))
    assert sum(map(bool, reasons)) <= 4


def test_outliers_are_flagged_with_their_reason():
    rows = cohort(40)
    rows[4]["consistency_chi2_median"] = 9.0
    rows[7]["registration_score"] = 0.1
    rows[8]["registration_score"] = 0.99  # the good side
    rows[9]["brain_coverage"] = 80.0
    rows[11]["warnings"] = 2
    rows[13]["snr_after"] = rows[13]["cnr_after"] = None
    reasons = flag(rows)
    assert [i for i, why in enumerate(reasons) if why] == [4, 7, 9, 11]
    assert reasons[4][0].startswith("Disagreement with the scan, typical is high: 9, median of")
    assert "Registration score is low: 0.1" in reasons[7][0]
    assert reasons[9] == ["Only 80.0 % of the brain in the field of view"]
    assert reasons[11] == ["2 warning(s) in the report"]


def test_a_scan_is_compared_with_its_own_kind():
    """What is usual for one expert may be odd for another."""
    rows = cohort(40)
    for row in rows:
        row["unknowable"] += 20 * (row["expert"] == "5")
    assert not any(flag(rows))
    rows[0]["unknowable"] = rows[1]["unknowable"]
    assert "median of expert 3" in flag(rows)[0][0]


def test_a_few_scans_of_an_expert_are_only_held_against_all_by_what_thickness_does_not_change():
    rows = cohort(40, ("7",))
    few = cohort(3, ("3",))
    for row in few:
        row |= {"unknowable": 0.0, "residual_energy": 500.0, "network_energy": 500.0}
    assert not any(flag([*rows, *few]))
    few[0]["registration_score"] = 0.1
    assert flag([*rows, *few])[40][0].startswith("Registration score is low")


def test_links_lead_to_sections_whatever_the_order_of_entities(tmp_path):
    rows = cohort(1)
    rows[0]["bids_name"] = "sub-0000_run-1_acq-x_T1w"
    write(tmp_path, rows)
    page, *_ = write_group(tmp_path)
    assert "sub-0000.html#sub-0000_acq-x_run-1_T1w" in page.read_text()
    rows[0]["bids_name"] = "ses-x_sub-0000_T1w"
    assert "./sub-0000.html#sub-0000_ses-x_T1w" in group_html(rows, ["bids_name"], {})


@pytest.mark.parametrize("n", [1, 2, 7])
def test_few_scans_are_not_compared(tmp_path, n):
    rows = cohort(n)
    rows[0]["unknowable"] = 1000 * LIMIT
    assert not any(flag(rows))
    write(tmp_path, rows)
    page, n_scans, n_flagged = write_group(tmp_path)
    assert (n_scans, n_flagged) == (n, 0)
    assert page.is_file()


def test_table_and_dictionary(tmp_path):
    rows = cohort(12)
    rows[3]["snr_after"] = None
    rows[5]["left_out_psnr"] = 25.0  # only some scans have it
    rows[6]["warnings"] = 1
    write(tmp_path, rows)
    write_group(tmp_path)
    table = read(tmp_path / "group_T1w.tsv")
    assert [row["bids_name"] for row in table] == sorted(row["bids_name"] for row in rows)
    assert table[3]["snr_after"] == "n/a"
    assert (table[5]["left_out_psnr"], table[4]["left_out_psnr"]) == ("25.0", "n/a")
    assert float(table[0]["unknowable"]) == rows[0]["unknowable"]
    assert (table[6]["flagged"], table[6]["reasons"]) == ("1", "1 warning(s) in the report")
    dictionary = json.loads((tmp_path / "group_T1w.json").read_text())
    assert list(dictionary) == list(table[0])
    assert all(entry["Description"] != "n/a" for entry in dictionary.values())
    assert dictionary["snr_before"]["LongName"].endswith("of the interpolated image")


def test_only_the_participants_and_sessions_asked_for(tmp_path, caplog):
    write(tmp_path, cohort(5))
    assert [row["bids_name"] for row in collect(tmp_path, ["0002"])] == ["sub-0002_T1w"]
    assert not caplog.text
    assert len(collect(tmp_path, ["0002", "99"])) == 1
    assert "not in the table, for there is no *_desc-remix_qc.json of them: sub-99" in caplog.text
    with pytest.raises(NothingToDoError, match=r"qc.json of sub-9 below .*participant level first"):
        collect(tmp_path, ["9"])
    with pytest.raises(NothingToDoError, match="of sub-0002, ses-a below"):
        collect(tmp_path, ["0002"], ["a"])
    write(tmp_path, [cohort(1)[0] | {"bids_name": f"sub-0000_ses-{s}_T1w"} for s in "ab"])
    assert [row["bids_name"] for row in collect(tmp_path, (), ["b"])] == ["sub-0000_ses-b_T1w"]


def test_damaged_files_are_left_out(tmp_path):
    write(tmp_path, cohort(3))
    next(tmp_path.glob("sub-0001/anat/*.json")).write_text("{")
    next(tmp_path.glob("sub-0002/anat/*.json")).write_text("[]")
    assert len(collect(tmp_path)) == 1


def test_the_page_holds_all_and_asks_nothing(tmp_path):
    rows = cohort(5000)
    rows[0]["voxel_size"] = "</script><script>alert(1)</script>"
    write(tmp_path, rows)
    page = write_group(tmp_path)[0].read_text()
    assert page.count("</script>") == 2  # the data's and the program's
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert len(page) < 5_000_000
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert len(data["rows"]) == 5000
    assert data["links"][0] == "./sub-0000.html#sub-0000_T1w"
    assert data["rows"][0][data["columns"].index("voxel_size")] == rows[0]["voxel_size"]


def test_from_the_command_line(tmp_path):
    bids, out = tmp_path / "bids", tmp_path / "out"
    bids.mkdir()
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    nothing = run("remix-bids", bids, out, "group")
    assert nothing.returncode == 66
    assert "participant level first" in nothing.stderr
    write(out, cohort(3))
    done = run("remix-bids", bids, out, "group", "-w", tmp_path / "work")
    assert done.returncode == 0
    assert "3 scan(s), 0 flagged" in done.stdout
    written = {path.name for path in out.glob("group*")}
    assert written == {"group_T1w.tsv", "group_T1w.json", "group_T1w.html"}
    assert not (tmp_path / "work").exists()
