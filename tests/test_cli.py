"""The command line: every option means what it says, every refusal has its exit code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remix_bids.cli.app import run, with_resources
from remix_bids.cli.parser import parse_args
from remix_bids.config import RunConfig
from remix_bids.errors import NothingToDoError, UsageError
from remix_bids.inputs import DATABASE, Scan, collect_scans
from remix_bids.naming import output_names
from remix_bids.resources import parse_memory
from remix_bids.workflows.base import claim_work_dir
from tests.bids_skeletons import make_dataset

NAMES = [
    "sub-01_ses-a_T1w.nii.gz",
    "sub-01_ses-b_acq-ax_run-1_T1w.nii.gz",
    "sub-01_ses-b_acq-ax_run-2_T1w.nii.gz",
    "sub-02_T1w.nii",
]


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "bids", NAMES)


@pytest.fixture
def parse(dataset, tmp_path):
    def call(*options, out=None):
        out = out or tmp_path / "out"
        work = [] if "-w" in options else ["-w", str(tmp_path / "work")]
        return parse_args([str(dataset), str(out), "participant", *work, *map(str, options)])

    return call


def names(config, filters=None):
    return [scan.path.name for scan in collect_scans(config, filters or {})]


# --- light start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option):
    command = [sys.executable, "-X", "importtime", "-m", "remix_bids", option]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - start
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported  # the list is real
    assert not imported & {"torch", "ants", "nipype", "numpy", "bids", "nibabel", "templateflow"}
    assert seconds < 3  # well under one second on an idle machine
    assert "remix-bids" in done.stdout


def test_parent_imports_neither_torch_nor_ants(dataset, tmp_path):
    code = (
        "import sys\n"
        "from remix_bids.cli.app import run\n"
        "status = run(sys.argv[1:])\n"
        "assert status == 0, status\n"
        "assert 'nipype' in sys.modules\n"
        "assert not {'torch', 'ants', 'templateflow', 'nilearn'} & set(sys.modules)\n"
    )
    experts = fake_experts(tmp_path)
    arguments = [dataset, tmp_path / "out", "participant", "-w", tmp_path / "work"]
    arguments += ["--output-spaces", "MNI152NLin2009aSym", "--offline", "--dry-run"]
    arguments += ["--experts-dir", experts, "--skip-bids-validation", "--device", "cpu"]
    environment = {**os.environ, "TEMPLATEFLOW_HOME": str(tmp_path / "tf")}
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, env=environment)
    assert not (tmp_path / "out").exists()  # a dry run writes nothing
    assert not (tmp_path / "tf").exists()


@pytest.mark.parametrize("spaces", [["MNI152NLin2009aSym"], ["MNI152NLin2009aSym", "T1w"]])
def test_a_dry_run_names_what_would_be_written(dataset, tmp_path, capsys, spaces):
    arguments = [dataset, tmp_path / "out", "participant", "-w", tmp_path / "work", "--dry-run"]
    arguments += ["--experts-dir", fake_experts(tmp_path), "--skip-bids-validation", "--offline"]
    assert run([*map(str, arguments), "--output-spaces", *spaces]) == 0
    told = [
        line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines() if "->" in line
    ]
    assert told[:1] == ["sub-01_ses-a_space-MNI152NLin2009aSym_res-1_desc-remix_T1w.nii.gz"]
    native = [name for name in told if "_space-" not in name]
    assert len(native) == (len(NAMES) if "T1w" in spaces else 0)
    assert len(told) == len(NAMES) * len(spaces)


@pytest.mark.parametrize("mode", ["--reports-only", "--boilerplate-only", "group"])
def test_modes_that_write_have_no_dry_run(dataset, tmp_path, mode):
    level, *option = ("group",) if mode == "group" else ("participant", mode)
    with pytest.raises(UsageError, match=f"{mode}.* writes: leave one out"):
        parse_args([str(dataset), str(tmp_path / "out"), level, *option, "--dry-run"])


def fake_experts(tmp_path: Path) -> Path:
    import hashlib

    folder = tmp_path / "experts"
    folder.mkdir()
    (folder / "e.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    rows = []
    for name in [*"1234567", "general"]:
        rows.append(
            f'[expert.{name}]\nfile = "e.safetensors"\nsha256 = "{digest}"\nlower = 0\nupper = 9'
        )
    (folder / "experts.toml").write_text("\n".join(rows))
    return folder


# --- syntax --------------------------------------------------------------------------------------


def test_both_spellings(parse):
    dashes = parse("--participant-label", "01", "--omp-nthreads", 2, "--low-mem")
    underscores = parse("--participant_label", "sub-01", "--omp_nthreads=2", "--low_mem")
    assert dashes.with_(run_uuid="") == underscores.with_(run_uuid="")
    assert dashes.participant_label == ("01",)
    assert dashes.omp_nthreads == 2
    assert dashes.low_mem


@pytest.mark.parametrize(
    ("text", "gigabytes"), [("8G", 8), ("8gb", 8), ("512M", 0.5), ("1T", 1024), ("1.5 GiB", 1.5)]
)
def test_memory(text, gigabytes):
    assert parse_memory(text) == pytest.approx(gigabytes)


def test_memory_options_agree(parse):
    assert parse("--mem", "8G").mem_gb == parse("--mem-gb", 8).mem_gb == 8
    assert parse("--mem-mb", 8192).mem_gb == 8


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--mem", "8"], "8G"),
        (["--mem", "lots"], "8G"),
        (["--mem", "8G", "--mem-gb", "8"], "not allowed"),
        (["--nprocs", "0"], "at least 1"),
        (["--device", "tpu"], "cuda"),
        (["--expert", "8"], "general"),
        (["--output-spaces", "T2w"], "MNI152Lin"),
        (["--output-spaces", "MNI152Lin:res-2"], "1 mm"),
        (["--bids-filter-file", "/nowhere.json"], "no file"),
        (["--reports"], "unrecognized"),
    ],
)
def test_wrong_syntax(parse, capsys, options, hint):
    with pytest.raises(SystemExit) as stop:
        parse(*options)
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def test_two_spaces(parse):
    with pytest.raises(UsageError, match="one MNI space per run"):
        parse("--output-spaces", "MNI152Lin", "MNI152NLin6Asym")
    assert parse("--output-spaces", "MNI152Lin:res-1", "MNI152Lin").space == "MNI152Lin"
    both = parse("--output-spaces", "T1w", "MNI152NLin6Asym")
    assert both.output_spaces == ("MNI152NLin6Asym", "T1w")
    assert both.space == "MNI152NLin6Asym"
    native = parse("--output-spaces", "T1w")
    assert (native.output_spaces, native.space) == (("T1w",), "MNI152Lin")


def test_spaces_from_a_configuration_file(parse, tmp_path):
    file = tmp_path / "earlier.toml"
    file.write_text(parse("--output-spaces", "T1w", "MNI152Lin").to_toml())
    assert parse("--config-file", file).output_spaces == ("MNI152Lin", "T1w")
    file.write_text('output_spaces = ["T1w", "T2w"]')
    with pytest.raises(UsageError, match="T2w"):
        parse("--config-file", file)


def test_config_file_gives_way_to_the_command_line(parse, tmp_path):
    earlier = parse("--nprocs", 3, "--expert", "5", "--participant-label", "01")
    file = tmp_path / "earlier.toml"
    file.write_text(earlier.to_toml())
    later = parse("--config-file", file, "--nprocs", 7)
    assert (later.nprocs, later.expert, later.participant_label) == (7, "5", ("01",))
    assert later.run_uuid != earlier.run_uuid
    file.write_text("expert = '9'")
    with pytest.raises(UsageError, match="expert"):
        parse("--config-file", file)
    file.write_text("speed = 1")
    with pytest.raises(UsageError, match="speed"):
        parse("--config-file", file)


def test_the_settings_of_a_run_can_be_given_to_the_next(parse, tmp_path):
    """As they are written: with what the machine has filled in."""
    file = tmp_path / "remix_bids.toml"
    first = with_resources(parse("--random-seed", 7, "--device", "cpu"))
    file.write_text(first.to_toml())
    assert parse("--config-file", file).random_seed == 7


def test_relative_paths_and_links(dataset, tmp_path, monkeypatch):
    from remix_bids.workflows.base import bids_uri

    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(dataset)
    monkeypatch.chdir(tmp_path / "here")
    for name in ("../bids", "../link", "../here/../bids"):
        config = parse_args([name, "../out", "participant"])
        assert config.output_dir == tmp_path / "out"
        assert config.work_dir == tmp_path / "here/work"
        scan = collect_scans(config, {})[0]
        assert bids_uri(scan.path, config.bids_dir) == f"bids:raw:sub-01/ses-a/anat/{NAMES[0]}"
    assert bids_uri(dataset / "sub-02/x.nii", tmp_path / "link") == "bids:raw:sub-02/x.nii"


# --- folders -------------------------------------------------------------------------------------


def test_output_is_input(parse, dataset):
    with pytest.raises(UsageError, match="derivatives"):
        parse(out=dataset)
    link = dataset.parent / "link"
    link.symlink_to(dataset)
    with pytest.raises(UsageError, match="derivatives"):
        parse(out=link)


@pytest.mark.parametrize("place", ["bids/work", "bids", "out/work", "out", "bids/sub-01/x/y"])
def test_work_dir_inside(parse, tmp_path, place):
    with pytest.raises(UsageError, match="for example -w"):
        parse("-w", tmp_path / place)
    parse("-w", tmp_path / "bids-work")  # a name that only begins alike is fine
    parse("-w", tmp_path / place, "--reports-only")  # without intermediate files


@pytest.mark.parametrize("name", ["w [2]", "w*", "a?/w"])
def test_a_work_dir_that_would_be_a_pattern(parse, tmp_path, name):
    """Nipype would find none of its results again, and compute all of them each time."""
    with pytest.raises(UsageError, match="name another one by -w"):
        parse("-w", tmp_path / name)


@pytest.mark.parametrize("empty", [0, 1, 4])
def test_an_empty_path_is_not_the_current_folder(dataset, tmp_path, capsys, empty):
    arguments = [str(dataset), str(tmp_path / "out"), "participant", "-w", str(tmp_path / "w")]
    arguments[empty] = ""
    with pytest.raises(SystemExit) as exit:
        run(arguments)
    assert exit.value.code == 2
    assert "the path is empty" in capsys.readouterr().err


def test_a_folder_that_cannot_be_entered(dataset, tmp_path, capsys, monkeypatch):
    """One sentence, wherever it is noticed first."""
    arguments = [str(dataset), str(tmp_path / "out"), "participant", "-w", str(tmp_path / "w")]
    exists = Path.exists

    def closed(path):
        if path.name == "out":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", closed)
    assert run(arguments) == 2
    assert f"Permission denied: '{tmp_path / 'out'}'" in capsys.readouterr().err


def test_output_of_another_program(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    description = {"Name": "fMRIPrep", "GeneratedBy": [{"Name": "fMRIPrep"}]}
    (out / "dataset_description.json").write_text(json.dumps(description))
    assert run([str(dataset), str(out), "participant", "-w", str(tmp_path / "w")]) == 2
    assert "fMRIPrep" in capsys.readouterr().err


# --- what is worked on ---------------------------------------------------------------------------


def test_everything_by_default(parse):
    assert names(parse()) == NAMES


def test_labels(parse):
    assert names(parse("--participant-label", "sub-02")) == NAMES[3:]
    assert names(parse("--session-label", "ses-b")) == NAMES[1:3]
    with pytest.raises(UsageError, match=r"--participant-label 03.*01 02"):
        names(parse("--participant-label", "01", "03"))
    with pytest.raises(UsageError, match="--session-label c"):
        names(parse("--session-label", "c"))


def test_nothing_left(parse):
    with pytest.raises(NothingToDoError, match=r"subject=.*02.*session=.*a"):
        names(parse("--participant-label", "02", "--session-label", "a"))


def test_labels_that_pybids_would_cut_off(parse, tmp_path, caplog):
    odd = ["sub-ABC-001_ses-m-1_T1w.nii.gz", "sub-é1_T1w.nii.gz", "sub-01+A_T1w.nii.gz"]
    bids = make_dataset(
        tmp_path / "odd", [*odd, "sub-03_acq-1.5mm_T1w.nii.gz", "sub-04_T2w.nii.gz"]
    )
    for extra in ((), ("--bids-database-dir", tmp_path / "db")):
        config = parse(*extra).with_(bids_dir=bids)
        assert sorted(names(config)) == sorted(odd)
        assert "a label holds a dot" in caplog.text
        for label, name in zip(("ABC-001", "é1", "01+A"), odd, strict=True):
            assert names(config.with_(participant_label=(label,))) == [name]
        assert names(config.with_(session_label=("m-1",))) == odd[:1]
    assert "has no files" not in caplog.text
    # Asked for, and there is no T1w image: the others are done.
    assert names(parse().with_(bids_dir=bids, participant_label=("é1", "04"))) == odd[1:2]
    assert "no T1w image that is asked for: sub-04" in caplog.text


def test_filters_that_are_lists(parse, tmp_path):
    made = [f"sub-01_{acq}T1w.nii.gz" for acq in ("", "acq-a_", "acq-ax_")]
    config = parse().with_(bids_dir=make_dataset(tmp_path / "made", made))
    for none in (None, "Query.NONE"):
        found = names(config, {"acquisition": ["ax", none]})
        assert sorted(found) == sorted([made[0], made[2]])
    assert len(names(config, {"acquisition": "*"})) == 2
    assert len(names(config, {"suffix": ["T1w"]})) == 3
    for some in ("^a", "*"):
        assert len(names(config, {"acquisition": some, "regex_search": True})) == 2
    with pytest.raises(UsageError, match=r"acquisition '\[' is no regular expression"):
        names(config, {"acquisition": ["ax", "["], "regex_search": True})


def test_filter_file(parse, tmp_path):
    from remix_bids.cli.parser import read_filters

    file = tmp_path / "filter.json"
    file.write_text(json.dumps({"t1w": {"run": 2}}))
    config = parse("--bids-filter-file", file)
    assert names(config, read_filters(config)) == NAMES[2:3]
    file.write_text(json.dumps({"t1w": {"session": None}}))
    assert names(config, read_filters(config)) == NAMES[3:]
    file.write_text(json.dumps({"t1w": {"colour": "red"}}))
    with pytest.raises(UsageError, match="colour"):
        names(config, read_filters(config))
    file.write_text(json.dumps({"t1w": {"suffix": "T1w", "datatype": "anat", "run": 1}}))
    assert names(config, read_filters(config)) == NAMES[1:2]
    file.write_text(json.dumps({"t1w": {"suffix": "T2w"}}))
    with pytest.raises(UsageError, match="only T1w"):
        names(config, read_filters(config))
    file.write_text(json.dumps({"bold": {}}))
    with pytest.raises(UsageError, match="bold"):
        parse("--bids-filter-file", file)
    file.write_text("{")
    with pytest.raises(UsageError, match="JSON"):
        parse("--bids-filter-file", file)


def test_database_is_made_and_used(parse, tmp_path):
    config = parse("--bids-database-dir", tmp_path / "db")
    assert names(config) == NAMES
    assert (tmp_path / "db").is_dir()
    assert names(config) == NAMES


def test_a_database_appears_whole(parse, tmp_path, monkeypatch):
    """Neither an index that was killed, nor one that another run is making, is trusted."""
    from bids import BIDSLayout

    folder = tmp_path / "db"
    config = parse("--bids-database-dir", folder)
    before = []

    def watched(*args, database_path, **settings):
        before.append((folder / DATABASE).exists())
        if len(before) == 1:
            (database_path / "half").touch()
            raise KeyboardInterrupt
        return BIDSLayout(*args, database_path=database_path, **settings)

    monkeypatch.setattr("bids.BIDSLayout", watched)
    with pytest.raises(KeyboardInterrupt):
        names(config)
    assert list(folder.iterdir()) == []
    assert names(config) == NAMES
    assert before == [False, False, True]
    assert [path.name for path in folder.iterdir()] == [DATABASE]
    (folder / DATABASE).write_bytes(b"no database")
    with pytest.raises(UsageError, match=r"by --bids-database-dir .*remove that folder"):
        names(config)


def test_a_database_that_cannot_be_written(parse, tmp_path):
    (tmp_path / "file").touch()
    config = parse("--bids-database-dir", tmp_path / "file" / "db")
    with pytest.raises(UsageError, match=r"--bids-database-dir .*db cannot be written"):
        names(config)


@pytest.mark.parametrize("closed", ["sub-02", "sub-01/ses-b"])
def test_folders_that_cannot_be_entered_are_left_out(parse, dataset, caplog, monkeypatch, closed):
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != dataset / closed and allowed(path, mode)
    )
    left = [name for name in NAMES if not name.startswith(closed.replace("/", "_"))]
    assert names(parse()) == left != NAMES
    assert f"{dataset / closed} cannot be entered and is left out" in caplog.text


def test_a_database_that_does_not_fit_the_dataset(parse, tmp_path, dataset, caplog):
    config = parse("--bids-database-dir", tmp_path / "db")
    names(config)
    make_dataset(dataset, ["sub-03_T1w.nii.gz"])
    assert names(config) == NAMES
    assert "no files of sub-03; remove that folder" in caplog.text
    other = make_dataset(tmp_path / "other", NAMES)
    with pytest.raises(UsageError, match="is of another dataset"):
        names(config.with_(bids_dir=other))


@pytest.mark.parametrize("above", ["pet", "func", "anat/sub-77", "ses-z/acq-x", "a b (c)+[d]"])
def test_folders_above_the_dataset_are_no_entities(parse, tmp_path, above):
    config = parse().with_(bids_dir=make_dataset(tmp_path / above / "bids", NAMES))
    assert names(config) == NAMES
    assert names(config.with_(participant_label=("02",))) == NAMES[3:]
    assert names(config.with_(session_label=("b",))) == NAMES[1:3]
    assert names(config, {"acquisition": None}) == [NAMES[0], NAMES[3]]
    assert names(config, {"acquisition": "ax", "run": 2}) == NAMES[2:3]


def test_derivatives_and_other_folders_are_left_alone(parse, dataset):
    for place in ("derivatives/x/sub-01/anat", "sourcedata/sub-01/anat", "sub-01/ses-a/func"):
        folder = dataset / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sub-01_ses-a_acq-no_T1w.nii.gz").touch()
    (dataset / "sub-01/ses-a/anat/sub-01_ses-a_desc-x_T1w.nii.gz").touch()
    assert names(parse()) == NAMES


def test_skull_stripped_comes_from_the_sidecar(parse, dataset):
    sidecar = dataset / "sub-01/ses-a/anat/sub-01_ses-a_T1w.json"
    sidecar.write_text(json.dumps({"SkullStripped": True}))
    scans = collect_scans(parse(), {})
    assert [scan.skull_stripped for scan in scans] == [True, None, None, None]


def test_the_filter_file_does_not_widen_the_choice(parse, tmp_path):
    for options, told in (
        (("--session-label", "a"), {"session": "b"}),
        (("--participant-label", "02"), {"subject": "01"}),
    ):
        with pytest.raises(NothingToDoError):
            names(parse(*options), told)
    with pytest.raises(NothingToDoError):
        names(parse(), {"extension": ".json"})


@pytest.mark.parametrize(
    "name",
    [
        "sub-01/ses-a/anat/orig/sub-01_ses-a_acq-no_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-02_acq-no_T1w.nii.gz",
        "old/sub-01/ses-a/anat/sub-01_ses-a_acq-no_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_part-phase_T1w.nii.gz",
    ],
)
def test_images_out_of_place_and_phases_are_left_alone(parse, dataset, caplog, name):
    (dataset / name).parent.mkdir(parents=True, exist_ok=True)
    (dataset / name).touch()
    assert names(parse()) == NAMES
    if not name.startswith("old"):
        assert f"ignored {dataset / name}" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{bad", None])
def test_a_broken_sidecar_stops_nobody(parse, dataset, caplog, content):
    """Neither one of a scan, nor one at the top, nor one of an image that is not asked for."""
    anat = dataset / "sub-02/anat"
    (anat / "sub-02_T2w.nii.gz").touch()
    for sidecar in (anat / "sub-02_T1w.json", anat / "sub-02_T2w.json", dataset / "T1w.json"):
        if content is None:
            sidecar.symlink_to(dataset / "nowhere")
        else:
            sidecar.write_bytes(content)
    assert names(parse()) == NAMES
    assert f"{anat / 'sub-02_T1w.json'} is not read" in caplog.text


def test_sidecars_are_inherited_whatever_their_encoding(parse, dataset):
    (dataset / "T1w.json").write_bytes(b'\xef\xbb\xbf{"SliceThickness": 5.0}')
    own = '{"InstitutionName": "Universitätsklinik", "SliceThickness": 4}'
    (dataset / "sub-02/anat/sub-02_T1w.json").write_bytes(own.encode("latin-1"))
    assert [scan.slice_thickness for scan in collect_scans(parse(), {})] == [5.0, 5.0, 5.0, 4.0]


# --- exit codes ----------------------------------------------------------------------------------


def test_exit_66_prints_the_query(tmp_path, capsys):
    bids = make_dataset(tmp_path / "bids", ["sub-01_T2w.nii.gz"])
    assert run([str(bids), str(tmp_path / "out"), "participant", "-w", str(tmp_path / "w")]) == 66
    printed = capsys.readouterr()
    assert "suffix='T1w'" in printed.err
    assert printed.out.splitlines()[-1] == "0 done, 0 failed"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_exit_78_without_a_template(dataset, tmp_path, capsys, monkeypatch, content):
    home = tmp_path / "tf"
    if content is not None:
        folder = home / "tpl-MNI152Lin"
        folder.mkdir(parents=True)
        for stem in ("T1w", "desc-brain_mask"):
            (folder / f"tpl-MNI152Lin_res-01_{stem}.nii.gz").write_bytes(content)
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    arguments = [str(dataset), str(tmp_path / "out"), "participant", "--offline"]
    assert run([*arguments, "-w", str(tmp_path / "w"), "--skip-bids-validation"]) == 78
    printed = capsys.readouterr()
    assert "api.get('MNI152Lin'" in printed.err
    assert printed.out.splitlines()[-1] == "0 done, 0 failed"
    assert content is not None or not home.exists()  # offline nothing is written


def test_exit_78_with_damaged_experts(dataset, tmp_path, capsys):
    experts = fake_experts(tmp_path)
    (experts / "e.safetensors").write_bytes(b"other weights")
    arguments = [dataset, tmp_path / "out", "participant", "-w", tmp_path / "w", "--offline"]
    arguments += ["--output-spaces", "MNI152NLin2009aSym", "--experts-dir", experts]
    assert run([*map(str, arguments), "--skip-bids-validation"]) == 78
    assert "sha256" in capsys.readouterr().err


def test_exit_70_on_collision(tmp_path, capsys):
    bids = make_dataset(tmp_path / "bids", ["sub-01_T1w.nii", "sub-01_T1w.nii.gz"])
    arguments = [bids, tmp_path / "out", "participant", "-w", tmp_path / "w", "--offline"]
    arguments += ["--output-spaces", "MNI152NLin2009aSym", "--experts-dir", fake_experts(tmp_path)]
    assert run([*map(str, arguments), "--skip-bids-validation"]) == 70
    assert "both be written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failed_scans_are_reported_one_by_one(tmp_path, capsys):
    """A real run in which every scan is bad: nothing is registered, so it is quick."""
    bids = make_dataset(tmp_path / "my bids", NAMES[:1] + NAMES[3:])  # empty files
    experts = fake_experts(tmp_path)
    out = tmp_path / "my out"
    arguments = [bids, out, "participant", "-w", tmp_path / "w", "--offline", "--nprocs", 2]
    arguments += ["--output-spaces", "MNI152NLin2009aSym", "--experts-dir", experts]
    figures = out / output_names("sub-02_T1w.nii", "MNI152NLin2009aSym").qc
    figures.parent.mkdir(parents=True)
    figures.write_text("{}")  # of a run when this scan was good
    (out / "dataset_description.json").write_text(
        json.dumps({"Name": "o", "GeneratedBy": [{"Name": "remix-bids"}]})
    )
    assert run([*map(str, arguments), "--skip-bids-validation"]) == 1
    assert not figures.exists()
    lines = capsys.readouterr().out.splitlines()
    crashes = sorted(out.glob("sub-*/log/*/crash-*.txt"))
    assert len(crashes) == 2
    assert lines[-1].startswith("0 done, 2 failed: ")
    assert all(str(crash) in lines[-1] for crash in crashes)
    assert lines[-2] == "nodes: 0 run, 0 cached"
    reasons = [line for line in lines if "cannot be read" in line]
    assert [line.partition(":")[0] for line in reasons] == ["sub-01_ses-a_T1w", "sub-02_T1w"]
    for crash in crashes:
        subject = crash.relative_to(out).parts[0]
        page = (out / f"{subject}.html").read_text()
        assert "cannot be read" in page
        settings = RunConfig.from_toml((crash.parent / "remix_bids.toml").read_text())
        assert settings.bids_dir == bids
    assert (out / "dataset_description.json").exists()
    assert not list(out.rglob("*.nii.gz"))


def test_stop_on_first_crash_and_clean_workdir(tmp_path, capsys):
    from remix_bids.workflows.base import ROOT

    bids = make_dataset(tmp_path / "bids", NAMES[:1] + NAMES[3:])
    of_other_code = tmp_path / "w/remix_bids_01234567_wf"
    for place in (f"w/{ROOT}/old", "w/mine", of_other_code):
        (tmp_path / place).mkdir(parents=True)
    arguments = [bids, tmp_path / "out", "participant", "-w", tmp_path / "w", "--offline"]
    arguments += ["--output-spaces", "MNI152NLin2009aSym", "--experts-dir", fake_experts(tmp_path)]
    arguments += ["--nprocs", 1, "--stop-on-first-crash", "--clean-workdir"]
    assert run([*map(str, arguments), "--skip-bids-validation"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(list(tmp_path.glob("out/sub-*/log/*/crash-*.txt"))) == 1
    assert lines[-1].startswith("0 done, 2 failed: ")
    assert any("not run" in line for line in lines)
    assert not (tmp_path / "w" / ROOT / "old").exists()
    assert not of_other_code.exists()
    assert (tmp_path / "w/mine").exists()  # only what is ours is removed


def test_runs_do_not_share_the_intermediate_files_of_a_scan(tmp_path):
    """Another process has claimed one of them: of two scans the other is free."""
    images = {s: Path(f"/d/sub-{s}/anat/sub-{s}_T1w.nii.gz") for s in ("01", "02")}
    scans = [Scan(path, subject, None, None) for subject, path in images.items()]
    config = RunConfig(Path("/d"), Path("/o"), "participant", work_dir=tmp_path)
    program = (
        "import sys; from pathlib import Path; "
        "from remix_bids.workflows.base import claim_work_dir; "
        "from remix_bids.config import RunConfig; from remix_bids.inputs import Scan; "
        "scan = Scan(Path('/d/sub-01/anat/sub-01_T1w.nii.gz'), '01', None, None); "
        "config = RunConfig(Path('/d'), Path('/p'), 'participant', work_dir=Path(sys.argv[1])); "
        "lock = claim_work_dir(config, [scan]); print('claimed', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "claimed\n"
    with pytest.raises(UsageError, match="another run is at work"):
        claim_work_dir(config, scans)
    with pytest.raises(UsageError, match="another run is at work"):
        claim_work_dir(config.with_(clean_workdir=True), scans[1:])
    claim_work_dir(config, scans[1:]).close()
    other.communicate("\n")
    claim_work_dir(config, scans).close()


def test_plugin_file(dataset, tmp_path):
    from remix_bids.workflows.run import read_plugin_file

    file = tmp_path / "plugin.yml"
    file.write_text("plugin: Linear\n")
    assert read_plugin_file(file) == {"plugin": "Linear", "plugin_args": {}}
    for text, complaint in [
        ("plugin: Magic", "Magic"),
        ("speed: 1", "must name"),
        ("plugin: [", "cannot be read"),
        ("plugin: Linear\nplugin_args: 3", "table"),
    ]:
        file.write_text(text)
        with pytest.raises(UsageError, match=complaint):
            read_plugin_file(file)
    arguments = [str(dataset), str(tmp_path / "out"), "participant", "-w", str(tmp_path / "w")]
    assert run([*arguments, "--use-plugin", str(file), "--offline"]) == 2


def test_exit_code_is_decided_in_one_place(capsys):
    from remix_bids.cli.app import conclude
    from remix_bids.inputs import Scan
    from remix_bids.workflows.run import Outcome, explain

    good, bad = (Scan(Path(f"sub-0{i}_T1w.nii"), f"0{i}", None, None) for i in (1, 2))
    assert conclude(Outcome(done=[good]), []) == 0
    assert capsys.readouterr().out == "1 done, 0 failed\n"
    assert conclude(Outcome(done=[good]), ["01"]) == 1  # its report failed
    assert conclude(Outcome(done=[good], failed={bad: "why"}), []) == 1
    assert conclude(Outcome(failed={bad: "why"}, missing_resource=True), []) == 78
    text = "Traceback:\n\tremix_bids.errors.MissingResourceError: no template.\n\n"
    assert explain(text) == ("MissingResourceError", "no template.")
    assert explain("Traceback:\n\tValueError: x\n") == ("ValueError", "ValueError: x")


# --- resources -----------------------------------------------------------------------------------


def test_cuda_that_is_not_there(parse, tmp_path):
    from remix_bids.resources import resolve_device

    with pytest.raises(UsageError, match="CUDA device"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == "cpu"
    file = tmp_path / "slurm.yml"  # the card is where the jobs run
    file.write_text("plugin: SLURM")
    config = parse("--device", "cuda:99", "--use-plugin", file)
    assert with_resources(config).device == "cuda:99"
    file.write_text("plugin: MultiProc")
    with pytest.raises(UsageError, match="--device cuda:99"):
        with_resources(config)


def test_defaults_are_the_documented_ones():
    config = RunConfig(Path("a"), Path("b"))
    assert (config.space, config.expert, config.gate) == ("MNI152Lin", "auto", "effective")
