"""The command line of remix-bids: options and their checks, no work.

Only light modules are imported here, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from remix_bids import __version__
from remix_bids.config import DEFAULT_SEED, DEFAULT_SPACE, NATIVE, RunConfig, read_settings
from remix_bids.errors import UsageError
from remix_bids.resources import parse_memory
from remix_bids.templates import SPACES

EXPERTS = ("auto", "1", "2", "3", "4", "5", "6", "7", "general")


class _Parser(argparse.ArgumentParser):
    """Accepts ``--some-option`` and ``--some_option`` alike."""

    def parse_known_args(self, args=None, namespace=None):
        spelled = []
        for token in args or []:
            name, equals, value = token.partition("=")
            if name.startswith("--") and re.fullmatch(r"--[a-z][a-z_-]*", name):
                token = name.replace("_", "-") + equals + value
            spelled.append(token)
        return super().parse_known_args(spelled, namespace)


def _memory(text: str) -> float:
    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _megabytes(text: str) -> float:
    return _positive_number(text) / 1024


def seed(text: str) -> int:
    if not text.isdigit() or not 0 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 0 to 2147483647, not {text!r}"
        )
    return int(text)


def _space(text: str) -> str:
    name = text.removesuffix(":res-1").removesuffix(":res-01")
    if name not in (NATIVE, *SPACES):
        raise argparse.ArgumentTypeError(
            f"unknown space {text!r}; one of {NATIVE}, {', '.join(SPACES)} (all at 1 mm)"
        )
    return name


def device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, not {text!r}")
    return text


def _path(text: str) -> Path:
    if not text:  # an unset variable of a script; it would mean the current folder
        raise argparse.ArgumentTypeError("the path is empty")
    # Absolute, without "..", but links stay what they are.
    return Path(os.path.abspath(Path(text).expanduser()))


def existing_file(text: str) -> Path:
    path = _path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def _folder(text: str) -> Path:
    path = _path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return path


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``remix-bids``."""
    parser = _Parser(
        prog="remix-bids",
        description="Super-resolve every T1w image of a BIDS dataset to 1 mm isotropic, in MNI "
        "space, with a mixture of seven expert networks.",
        allow_abbrev=False,
        # Absent options stay absent, so that a configuration file can supply them.
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("bids_dir", type=_folder, help="root folder of a valid BIDS dataset")
    parser.add_argument("output_dir", type=_path, help="folder for the results")
    parser.add_argument(
        "analysis_level",
        choices=["participant", "group"],
        help="participant: super-resolve the images; group: gather the quality figures of all "
        "participants in output_dir, or of those chosen, in a table that is written anew",
    )
    parser.add_argument("--version", action="version", version=f"remix-bids {__version__}")

    what = parser.add_argument_group("what to work on")
    what.add_argument(
        "--participant-label",
        nargs="+",
        metavar="LABEL",
        help="participants to process, with or without sub- (default: all)",
    )
    what.add_argument(
        "--session-label",
        nargs="+",
        metavar="LABEL",
        help="sessions to process, with or without ses- (default: all)",
    )
    what.add_argument(
        "--bids-filter-file",
        type=existing_file,
        metavar="FILE",
        help='JSON file with PyBIDS filters under the key "t1w", '
        'for example {"t1w": {"acquisition": "axial"}}',
    )
    what.add_argument(
        "--bids-database-dir",
        type=_path,
        metavar="DIR",
        help="folder of a PyBIDS database, made there when it does not exist yet; to be removed "
        "when the dataset changes",
    )
    what.add_argument(
        "--skip-bids-validation",
        action="store_true",
        help="do not run bids-validator-deno, even where it is installed",
    )
    what.add_argument(
        "--offline",
        action="store_true",
        help="never fetch a missing template (nothing else ever uses the network)",
    )

    how = parser.add_argument_group("how to work")
    how.add_argument(
        "--output-spaces",
        type=_space,
        nargs="+",
        metavar="SPACE",
        help=f"spaces to write images in (default: {DEFAULT_SPACE}): {NATIVE} (native space, 1 mm) "
        f"and/or the MNI space to register to, one of {', '.join(SPACES)}. MNI152NLin2009aSym is "
        "the brain that nilearn carries, for skull-stripped scans",
    )
    how.add_argument(
        "--enforce-consistency",
        action="store_true",
        help="at least one step of back-projection after the network, which brings the output back "
        "to the acquired voxels; less or none if the scan is noisy (default: as many as the table "
        "of experts tells: the shipped seven have one or two, the general network none)",
    )
    how.add_argument(
        "--leave-slices-out",
        action="store_true",
        help="also restore every scan from half of its slices and report how near the others "
        "come to the truth",
    )
    how.add_argument(
        "--expert",
        choices=EXPERTS,
        help="the network to use; auto (default) selects by the voxel volume",
    )
    how.add_argument(
        "--gate",
        choices=["effective", "paper"],
        help="how auto selects: by the effective voxel volume, each side counted as at least "
        "1 mm (default), or by the plain product of the sides as in the paper",
    )
    how.add_argument(
        "--experts-dir",
        type=_folder,
        metavar="DIR",
        help="folder with experts.toml and weights (default: those shipped)",
    )
    how.add_argument(
        "--random-seed",
        type=seed,
        metavar="N",
        help=f"seed of the registration (default: {DEFAULT_SEED})",
    )
    how.add_argument("--sloppy", action="store_true", help="bad quality, fast; for tests only")

    means = parser.add_argument_group("resources")
    means.add_argument(
        "--nprocs",
        type=positive,
        metavar="N",
        help="processors to use in all (default: what the control group or Slurm allows)",
    )
    means.add_argument(
        "--omp-nthreads",
        type=positive,
        metavar="N",
        help="processors for one step of one scan (default: at most 4)",
    )
    memory = means.add_mutually_exclusive_group()
    memory.add_argument(
        "--mem",
        dest="mem_gb",
        type=_memory,
        metavar="SIZE",
        help="memory to use in all, with its unit: 8G, 8000M (default: 90 %% of what is allowed)",
    )
    memory.add_argument(
        "--mem-gb", dest="mem_gb", type=_positive_number, metavar="N", help="same, in GB"
    )
    memory.add_argument("--mem-mb", dest="mem_gb", type=_megabytes, metavar="N", help="same, in MB")
    means.add_argument(
        "--low-mem",
        action="store_true",
        help="one heavy step at a time, and every step in a fresh process",
    )
    means.add_argument("--device", type=device, help="auto (default), cpu, cuda or cuda:N")
    means.add_argument(
        "--n-gpu-procs",
        type=positive,
        metavar="N",
        help="steps that may use the graphics card at the same time (default: 1)",
    )
    means.add_argument(
        "--use-plugin",
        type=existing_file,
        metavar="FILE",
        help="Nipype plugin file (YAML with plugin and plugin_args), for example for a cluster",
    )

    run = parser.add_argument_group("running")
    run.add_argument(
        "-w", "--work-dir", type=_path, metavar="DIR", help="intermediate files (default: ./work)"
    )
    run.add_argument(
        "--clean-workdir",
        action="store_true",
        help="remove what earlier runs of remix-bids left in the working folder, before running",
    )
    run.add_argument(
        "--config-file",
        type=existing_file,
        metavar="FILE",
        help="TOML file with settings, such as the remix_bids.toml of an earlier run; "
        "the command line wins",
    )
    run.add_argument("--write-graph", action="store_true", help="draw the workflow's graph")
    run.add_argument(
        "--resource-monitor",
        action="store_true",
        help="record memory and processor use of every step (needs psutil)",
    )
    run.add_argument(
        "--stop-on-first-crash", action="store_true", help="stop at the first scan that fails"
    )
    run.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and write no result"
    )
    run.add_argument(
        "--reports-only",
        action="store_true",
        help="only build the HTML reports anew, from what earlier runs have written",
    )
    run.add_argument(
        "--boilerplate-only",
        action="store_true",
        help="only write the methods text of these options, logs/CITATION.md and .bib",
    )
    run.add_argument(
        "--notrack", action="store_true", help="accepted for compatibility: nothing is ever sent"
    )
    run.add_argument("-v", "--verbose", action="count", help="say more (-v), say everything (-vv)")
    return parser


def parse_args(argv: Sequence[str]) -> RunConfig:
    """Arguments, and the configuration file they name, as a checked `RunConfig`.

    Raises
    ------
    UsageError
        Contradictory or impossible settings (argparse itself exits with 2 on wrong syntax).
    """
    given: dict[str, Any] = vars(build_parser().parse_args(argv))
    settings: dict[str, Any] = {}
    config_file = given.pop("config_file", None)
    if config_file is not None:
        try:
            settings = read_settings(config_file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--config-file {config_file} cannot be read: {error}") from None
        for name in ("bids_dir", "output_dir", "analysis_level", "run_uuid"):
            settings.pop(name, None)
        _check_settings(settings)
    for name in ("participant_label", "session_label"):
        if name in given:
            given[name] = tuple(given[name])
    if "output_spaces" in given:
        given["output_spaces"] = tuple(given["output_spaces"])
    settings.update(given)
    if "output_spaces" in settings:
        settings["output_spaces"] = _check_spaces(settings["output_spaces"])
    for prefix, name in (("sub-", "participant_label"), ("ses-", "session_label")):
        labels = (str(label).removeprefix(prefix) for label in settings.get(name, ()))
        settings[name] = tuple(dict.fromkeys(labels))
    settings.setdefault("work_dir", _path("work"))
    settings["run_uuid"] = f"{time.strftime('%Y%m%d-%H%M%S')}_{uuid.uuid4()}"
    config = RunConfig(**settings)
    _check_dry_run(config)
    check_folders(config)
    read_filters(config)
    return config


def _check_spaces(names: Sequence[str]) -> tuple[str, ...]:
    """Sorted, each one once; at most one of them MNI."""
    spaces = tuple(sorted(set(names), key=lambda name: (name == NATIVE, name)))
    standard = [name for name in spaces if name != NATIVE]
    if len(standard) > 1 or not spaces:
        raise UsageError(
            f"--output-spaces {' '.join(standard)}: one MNI space per run, and {NATIVE}; run once "
            "for each, with an output folder of its own"
        )
    return spaces


def _check_settings(settings: dict[str, Any]) -> None:
    """Put values from a configuration file through the checks of their options."""
    actions = {action.dest: action for action in build_parser()._actions}
    for field in fields(RunConfig):
        action = actions.get(field.name)
        if field.name not in settings or action is None or field.name == "mem_gb":
            continue
        value = settings[field.name]
        try:
            if isinstance(value, tuple) and callable(action.type):
                settings[field.name] = tuple(action.type(item) for item in value)
            elif callable(action.type):
                settings[field.name] = action.type(str(value))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"the configuration file: {field.name} {error}") from None
        if action.choices is not None and value not in action.choices:
            known = ", ".join(str(choice) for choice in action.choices)
            raise UsageError(
                f"the configuration file: {field.name} = {value!r}, not one of {known}"
            )
    if not 0 < settings.get("mem_gb", 1) < math.inf:
        raise UsageError("the configuration file: mem_gb must be above 0")


def _check_dry_run(config: RunConfig) -> None:
    modes = {
        "the group level": config.analysis_level == "group",
        "--reports-only": config.reports_only,
        "--boilerplate-only": config.boilerplate_only,
    }
    for mode, chosen in modes.items():
        if config.dry_run and chosen:
            raise UsageError(f"--dry-run tells what a run would do, {mode} writes: leave one out")


def check_folders(config: RunConfig) -> None:
    """Refuse folders that would make results and inputs mix.

    Raises
    ------
    UsageError
        With a suggestion.
    """
    bids, out, work = (p.resolve() for p in (config.bids_dir, config.output_dir, config.work_dir))
    suggestion = bids / "derivatives" / "remix-bids"
    if out == bids:
        raise UsageError(f"the output folder is the input dataset; use for example {suggestion}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"the output folder {out} is a file")
    if config.analysis_level == "group" or config.reports_only or config.boilerplate_only:
        return  # without intermediate files
    if found := re.search(r"[*?[]", str(config.work_dir)):  # Nipype looks for results by patterns
        raise UsageError(
            f"the working folder {config.work_dir} has {found[0]} in its name, by which nothing "
            "would be found again; name another one by -w"
        )
    for name, folder in (("BIDS dataset", bids), ("output folder", out)):
        if work == folder or folder in work.parents:
            raise UsageError(
                f"the working folder {work} is inside the {name}; use for example "
                f"-w {folder.parent / 'remix-bids-work'}"
            )


def read_filters(config: RunConfig) -> dict[str, Any]:
    """Filters of ``--bids-filter-file`` for T1w images.

    Raises
    ------
    UsageError
        Not JSON, or keys other than ``t1w``.
    """
    if config.bids_filter_file is None:
        return {}
    name = f"--bids-filter-file {config.bids_filter_file}"
    try:
        content = json.loads(config.bids_filter_file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} is not readable JSON: {error}") from None
    unknown = sorted(set(content) - {"t1w"}) if isinstance(content, dict) else ["(no object)"]
    if unknown:
        raise UsageError(f"{name} has the unknown key(s) {', '.join(unknown)}; the only key is t1w")
    filters = content.get("t1w", {})
    if not isinstance(filters, dict):
        raise UsageError(f"{name}: t1w must hold an object of entities and values")
    return filters
