"""The tools behind the experts: acquisitions, training, checks and evaluation."""

from __future__ import annotations

import argparse
import csv
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import NoReturn

from remix_bids import __version__, workers
from remix_bids.cli.parser import device, existing_file, positive, seed
from remix_bids.errors import MissingResourceError, RemixError, UsageError
from remix_bids.toml_file import read_toml

CLASSES = list(range(1, 8))


def _rows(text: str) -> Path:
    """Where rows go; tables and plot come beside them, and must not take their place."""
    path = Path(text)
    if path.suffix in (".md", ".svg"):
        raise argparse.ArgumentTypeError(f"{text}: rows are a .tsv, the tables come beside it")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a .tsv in it")
    return path


def _noise(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on below 1, not {text!r}")
    return value


def _workers(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, not {text!r}")
    return int(text)


def _recipe(path: Path | None) -> Path:
    return path or Path(str(resources.files("remix_bids.data").joinpath("recipe.toml")))


def _coverage(table: Path) -> dict[str, bool]:
    """Who is skull-stripped, by the column ``coverage`` ('brain', 'head, ...') if there is one."""
    if not table.is_file():
        return {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return {
                row["participant_id"].removeprefix("sub-"): row["coverage"].startswith("brain")
                for row in csv.DictReader(file, delimiter="\t")
                if row.get("coverage") not in (None, "", "n/a")
            }
    except (ValueError, KeyError) as error:
        raise UsageError(f"{table} cannot be read: {type(error).__name__}: {error}") from error


def harvest(args: argparse.Namespace) -> None:
    """Write a bank of acquisitions: geometries of real scans, without identifiers or dates."""
    from remix_bids.harvest import SUFFIXES, geometries_from_bids, geometries_from_records
    from remix_bids.simulation.acquisition import save_bank

    if args.output.is_dir():
        raise UsageError(f"{args.output} is a folder: name the bank to write, a file, last")
    if args.source.is_file():
        if args.derivatives or args.suffix or args.licence:
            raise UsageError(
                f"{args.source} is a list of header records: DERIVATIVES, --suffix and --licence "
                "go with a BIDS dataset"
            )
        bank = geometries_from_records(args.source)
    else:
        bank = geometries_from_bids(
            args.source,
            args.derivatives,
            suffixes=args.suffix or SUFFIXES,
            licence=args.licence,
        )
    save_bank(bank, args.output)
    contrasts = ", ".join(f"{n} {name}" for name, n in Counter(g.contrast for g in bank).items())
    assumed = sum(not g.exact for g in bank)
    held_out = sum(g.held_out for g in bank)
    placed = sum(g.world is not None for g in bank)
    persons = len({g.group for g in bank})
    print(
        f"{len(bank)} geometries ({contrasts}) of {persons} persons, {assumed} in part assumed, "
        f"{placed} with an affine to MNI, {held_out} held out: {args.output}"
    )


def prepare(args: argparse.Namespace) -> None:
    """Register high-resolution scans to the working grid."""
    from remix_bids.registration.affine import Templates
    from remix_bids.training.prepare import prepare as run
    from remix_bids.training.recipe import read_recipe

    recipe = read_recipe(_recipe(args.recipe), "persons")["persons"]
    scans: dict[str, Path] = {}
    for path in sorted(args.bids_dir.glob("sub-*/**/anat/*_T1w.nii*")):
        person = path.name.split("_")[0].removeprefix("sub-")
        if person in scans:
            print(f"{path.name}: left out, sub-{person} is there by {scans[person].name}")
        scans.setdefault(person, path)
    if not scans:
        raise UsageError(f"{args.bids_dir} holds no sub-*/anat/*_T1w.nii*; name a BIDS dataset")
    run(
        scans,
        Templates(args.template, args.template_mask),
        args.output,
        validation=[] if args.test else recipe["validation"],
        held_out=list(scans) if args.test else recipe["held_out"],
        skull_stripped=_coverage(args.bids_dir / "participants.tsv"),
        n_procs=args.nprocs,
    )


def train(args: argparse.Namespace) -> None:
    """Train the stages of a recipe in their order."""
    from remix_bids.resources import resolve_device
    from remix_bids.training import team
    from remix_bids.training.recipe import read_recipe, run_recipe

    args.output.mkdir(parents=True, exist_ok=True)
    own = args.output / "recipe.toml"
    recipe = _recipe(args.recipe or (own if own.is_file() else None))
    # Before it is copied: a copy of one that cannot be read would stand in the next run's way.
    read_recipe(recipe, "network", "data", "stages")
    if team.LEADS and recipe.resolve() != own.resolve():
        shutil.copy(recipe, own)
    run_recipe(
        recipe,
        args.prepared,
        args.output,
        only=args.stage,
        bank=args.bank,
        device=resolve_device(args.device),
        workers=args.workers,
    )


def export(args: argparse.Namespace) -> None:
    """Collect trained stages into a folder of experts with its table."""
    from remix_bids.training.recipe import export_experts, read_recipe

    own = args.trained / "recipe.toml"  # that `train` went by
    recipe = _recipe(args.recipe or (own if own.is_file() else None))
    steps = read_recipe(recipe, "consistency")["consistency"]["steps"]
    print(export_experts(args.trained, args.output, steps))


def verify(args: argparse.Namespace) -> None:
    """Check the experts: checksums, and that this machine computes what they should."""
    from remix_bids.experts.verify import verify as run

    findings = []
    for finding in run(args.experts_dir):
        print(finding.text, flush=True)
        findings.append(finding)
    good = [f for f in findings if f.good]
    if good and not all(f.compared for f in good):
        print(
            "experts.toml holds no reference outputs (older than `remix-experts verify`): only "
            "checksums were compared."
        )
    if len(good) < len(findings):
        raise MissingResourceError(f"{len(findings) - len(good)} of {len(findings)} experts failed")


def _beside(path: Path, suffix: str) -> Path:
    """Where a table goes that belongs to ``path``; of a name like ``v1.2`` nothing is cut off."""
    stem = path.stem if path.suffix in (".tsv", ".md", ".svg") else path.name
    return path.with_name(stem + suffix)


def write_tables(rows: list[dict], path: Path) -> None:
    """Write tables (.md) and plot (.svg) of an evaluation beside ``path``; print the tables."""
    from remix_bids.evaluation import claims, table
    from remix_bids.evaluation.plot import plot

    tables = claims.to_markdown(rows) + "\n" + table.to_markdown(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    _beside(path, ".md").write_text(tables + "\n")
    plot(rows, _beside(path, ".svg"))
    print(tables)


def table(args: argparse.Namespace) -> None:
    """Tables and plot of rows that `evaluate` has written, in one go or in several."""
    from remix_bids.evaluation.rows import joined, read_rows, write_rows
    from remix_bids.evaluation.settings import METHODS

    for path in args.rows:
        if not path.is_file():
            raise UsageError(f"{path} is no file; name TSV files that evaluate has written")
    tables, target = [read_rows(path) for path in args.rows], _beside(args.output, ".tsv")
    rows = joined(tables)
    if not rows:
        raise UsageError(
            "there are no rows; name TSV files that remix-experts evaluate has written"
        )
    methods = {row["method"] for row in rows}
    if lacking := [method for method in METHODS if method not in methods]:
        raise UsageError(f"no row of {', '.join(lacking)}: name the file that holds them, too")
    if len(tables) > 1 and target.resolve() in [path.resolve() for path in args.rows]:
        raise UsageError(f"{target} is one of the files to be joined: name another output")
    if len(tables) > 1:
        write_rows(target, [rows])
    write_tables(rows, args.output)


def _named_commands(options: list[str]) -> dict[str, str]:
    """``NAME=COMMAND`` options."""
    from remix_bids.evaluation.external import parse_command
    from remix_bids.evaluation.settings import ALL_METHODS

    commands: dict[str, str] = {}
    for option in options:
        name, _, command = option.partition("=")
        if not name or not command:
            raise UsageError(f"--method-command {option!r}: write NAME=COMMAND")
        if name in ALL_METHODS or name in commands:
            raise UsageError(f"--method-command {option!r}: the name {name} is taken, use another")
        parse_command(command)
        commands[name] = command
    return commands


def evaluate(args: argparse.Namespace) -> None:
    """Compare the experts with interpolation and back-projection, by the protocol."""
    from remix_bids.evaluation.cases import (
        Case,
        cases,
        fine_enough,
        segmented_first,
        with_every_expert,
    )
    from remix_bids.evaluation.external import parse_command
    from remix_bids.evaluation.run import evaluate as run
    from remix_bids.evaluation.settings import (
        ALL_METHODS,
        ATROPOS,
        BACK_PROJECTIONS,
        METHODS,
        Settings,
    )
    from remix_bids.evaluation.table import best_back_projection
    from remix_bids.experts.registry import load_registry
    from remix_bids.registration.affine import Templates
    from remix_bids.simulation.acquisition import geometries
    from remix_bids.training.dataset import load_persons

    if unknown := set(args.methods or ()) - set(ALL_METHODS):
        names = ", ".join(sorted(unknown))
        raise UsageError(f"--methods {names}: choose from {', '.join(map(quote, ALL_METHODS))}")
    segmenter = args.segmenter_command or (ATROPOS if args.dice else None)
    if (args.methods or segmenter) and args.tune:
        raise UsageError("--tune measures PSNR of back-projection only: no --methods, no Dice")
    if args.tune and args.split == "held_out":
        raise UsageError("--tune: choices are made on other persons, add --split validation")
    protocol = _protocol(args.protocol)
    most = protocol["geometries_per_person"]
    if args.geometries:
        protocol["geometries_per_person"] = args.geometries
    persons = load_persons(args.prepared, args.split)[: args.persons]
    if not persons:
        raise UsageError(f"{args.prepared} holds no persons of the split {args.split!r}")
    if args.segmenter_command:
        parse_command(args.segmenter_command)
    noise = protocol["noise"] if args.noise is None else args.noise
    methods = args.methods or METHODS
    untuned = {*map(float, noise)} - {*map(float, protocol["noise"])}
    if untuned and {*BACK_PROJECTIONS} & {*methods} and not args.tune:
        raise UsageError(
            f"--noise {', '.join(f'{level:g}' for level in sorted(untuned))}: back-projection is "
            "not tuned for it; leave it out by --methods, or name a --protocol that is"
        )
    if args.bank:
        geometries(args.bank, held_out=args.split == "held_out")  # refuses a bank without any
        protocol["bank"] = hashlib.sha256(args.bank.read_bytes()).hexdigest()  # decides the rows
    registry = load_registry(args.experts_dir)

    def expert(volume: float) -> str:
        return registry.select(volume).name

    def drawn(number: int) -> list[Case]:
        often = protocol | {"geometries_per_person": number}
        return fine_enough(cases(persons, often, args.classes, noise, args.bank), expert)

    todo = drawn(protocol["geometries_per_person"])
    if args.every_expert:
        todo = with_every_expert(todo, drawn(most), expert)
    todo = segmented_first(todo, expert, args.dice_scans)
    if not todo:
        raise UsageError("no person is fine enough for these classes: nothing to evaluate")
    mask = args.prepared / "strip_mask.npy"
    if args.labels and not segmenter:
        raise UsageError("--labels are compared with those of a segmenter: add --dice")
    if args.dice_scans > 1 and not segmenter:
        raise UsageError("--dice-scans are segmented where Dice is asked for: add --dice")
    if (args.template is None) != (args.template_mask is None):
        raise UsageError("--template and --template-mask go together: name both, or none")
    if args.template and segmenter:
        raise UsageError(
            "--template moves the truth for every scan: leave Dice to a run without it"
        )
    settings = Settings(
        protocol,
        brain=mask if mask.is_file() else None,
        experts_dir=args.experts_dir,
        tune=args.tune,
        commands=_named_commands(args.method_command),
        segmenter=segmenter,
        labels=args.labels,
        templates=Templates(args.template, args.template_mask) if args.template else None,
        methods=methods,
    )
    for person in persons:
        file = settings.manual_labels(person.name)
        if file and not file.is_file() and not person.head:
            raise UsageError(f"--labels: there is no {file}; use --persons, or leave --labels out")
    rows = run(todo, settings, args.output, nprocs=args.nprocs)
    if args.tune:
        print(best_back_projection(rows))
        return
    if args.methods:
        print(f"{args.output}: join it with the other methods' rows (remix-experts table)")
        return
    write_tables(rows, args.output)


def _protocol(path: Path | None = None) -> dict:
    """A protocol, by default the shipped one."""
    shipped = resources.files("remix_bids.data").joinpath("protocol.toml").read_text()
    protocol = tomllib.loads(shipped)
    if path is not None:
        own = read_toml(path, "--protocol")
        if lacking := [key for key in protocol if key not in own]:
            raise UsageError(f"--protocol {path} lacks {', '.join(lacking)}")
        protocol = own
    return protocol


def _protocol_and_persons(args: argparse.Namespace) -> tuple[dict, list]:
    from remix_bids.training.dataset import load_persons

    # Nothing tells brain from scalp in a head: lesions might come to lie there.
    persons = [p for p in load_persons(args.prepared, args.split) if not p.head]
    if not persons:
        raise UsageError(f"{args.prepared} holds no brains of the split {args.split!r}")
    return _protocol(), persons[: args.persons]


def _write_experiment(
    output: Path, batches: Iterable[Sequence[dict]], to_markdown: Callable[[Sequence[dict]], str]
) -> None:
    """Write rows and their table when all have been measured; an earlier run's stay till then."""
    from remix_bids.evaluation.rows import write_rows

    rows = write_rows(output, [[row for batch in batches for row in batch]])
    table = to_markdown(rows)
    _beside(output, ".md").write_text(table + "\n")
    print(table)


def lesions(args: argparse.Namespace) -> None:
    """Measure what is left of lesions of known size and contrast."""
    from remix_bids.evaluation.cases import cases
    from remix_bids.evaluation.lesions import run_cases, to_markdown

    protocol, persons = _protocol_and_persons(args)
    once = protocol | {"geometries_per_person": 1}  # every one holds 16 lesions
    todo = cases(persons, once, args.classes, [args.noise], args.bank)
    _write_experiment(args.output, run_cases(todo, args.experts_dir), to_markdown)


def gates(args: argparse.Namespace) -> None:
    """Compare the two gates on the real geometries of the bank where they differ."""
    from remix_bids.evaluation.gates import run_gates, to_markdown

    protocol, persons = _protocol_and_persons(args)
    batches = run_gates(
        persons,
        experts_dir=args.experts_dir,
        bank=args.bank,
        limit=args.geometries,
        noise=args.noise,
        seed=protocol["seed"],
        erosion=protocol["erosion"],
    )
    _write_experiment(args.output, batches, to_markdown)


def simulate(args: argparse.Namespace) -> None:
    """Make a one-subject BIDS dataset whose truth is known; it needs no data."""
    from remix_bids.demo import write_example

    print(write_example(args.folder, args.seed))


def compare(args: argparse.Namespace) -> None:
    """Hold a run of remix-bids on the simulated dataset against its truth."""
    from remix_bids.demo import compare as run

    print(run(args.folder, args.output))


def _add_origins(p: argparse.ArgumentParser) -> None:
    """Whose experts, on whose held-out acquisitions."""
    p.add_argument("--experts-dir", type=Path, help="default: the shipped experts")
    p.add_argument(
        "--bank", type=Path, help="of `harvest`, its held-out geometries; default: the shipped one"
    )


def _add_experiment(p: argparse.ArgumentParser, persons: int | None) -> None:
    """Arguments that `lesions` and `gates` share."""
    p.add_argument("prepared", type=Path, help="folder that `prepare --test` wrote")
    p.add_argument("output", type=_rows, help="TSV of all rows; the table goes to .md beside it")
    p.add_argument("--split", default="held_out", choices=["held_out", "validation"])
    p.add_argument(
        "--persons",
        type=positive,
        default=persons,
        help=f"only so many (default: {persons or 'all'})",
    )
    p.add_argument("--noise", type=_noise, default=0.0, help="Rician, 0.02 for 2 %%; default: none")
    _add_origins(p)


def get_parser() -> argparse.ArgumentParser:
    """The parser of ``remix-experts``."""
    parser = argparse.ArgumentParser(prog="remix-experts", description=__doc__)
    parser.add_argument("--version", action="version", version=f"remix-experts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("harvest", help=harvest.__doc__)
    p.add_argument("source", type=Path, help="BIDS dataset, or a JSON list of header records")
    p.add_argument(
        "derivatives",
        type=Path,
        nargs="?",
        help="what remix-bids wrote for this dataset: its affines to MNI go into the bank",
    )
    p.add_argument("output", type=Path, help="bank to write")
    p.add_argument("--suffix", action="append", help="only this contrast (can be repeated)")
    p.add_argument("--licence", help="of the dataset; default: what its description says")
    p.set_defaults(run=harvest)

    p = commands.add_parser("prepare", help=prepare.__doc__)
    p.add_argument("bids_dir", type=Path, help="BIDS dataset of high-resolution T1w scans")
    p.add_argument("output", type=Path)
    p.add_argument("--template", type=existing_file, required=True, help="T1w template with skull")
    p.add_argument("--template-mask", type=existing_file, required=True, help="its brain mask")
    p.add_argument("--recipe", type=Path, help="default: the shipped one")
    p.add_argument("--test", action="store_true", help="all persons are held out: for `evaluate`")
    p.add_argument("--nprocs", type=positive, default=1)
    p.set_defaults(run=prepare)

    p = commands.add_parser("train", help=train.__doc__)
    p.add_argument("prepared", type=Path, help="folder that `prepare` wrote")
    p.add_argument("output", type=Path, help="one folder per stage; run again to go on")
    p.add_argument("--recipe", type=Path, help="default: that in the output, or the shipped one")
    p.add_argument("--stage", action="append", help="only this stage (can be repeated)")
    p.add_argument("--bank", type=Path, help="acquisitions of `harvest`; default: the shipped ones")
    p.add_argument("--device", type=device, default="cpu", help="cpu or cuda; several by torchrun")
    p.add_argument(
        "--workers",
        type=_workers,
        help="processes that simulate on CPUs; 0: on the device (default: 0 on a GPU, else 1)",
    )
    p.set_defaults(run=train)

    p = commands.add_parser("export", help=export.__doc__)
    p.add_argument("trained", type=Path, help="folder that `train` wrote")
    p.add_argument("output", type=Path)
    p.add_argument("--recipe", type=Path, help="default: that of `trained`, or the shipped one")
    p.set_defaults(run=export)

    p = commands.add_parser("verify", help=verify.__doc__)
    p.add_argument("--experts-dir", type=Path, help="default: the shipped experts")
    p.set_defaults(run=verify)

    p = commands.add_parser("evaluate", help=evaluate.__doc__)
    p.add_argument("prepared", type=Path, help="folder that `prepare --test` wrote")
    p.add_argument("output", type=_rows, help="TSV of rows, tables beside it; run again to go on")
    p.add_argument("--protocol", type=Path, help="default: the shipped one")
    p.add_argument("--split", default="held_out", choices=["held_out", "validation"])
    p.add_argument("--classes", type=int, nargs="+", default=CLASSES, choices=CLASSES)
    p.add_argument("--persons", type=positive, help="only so many")
    p.add_argument("--noise", type=_noise, nargs="+", help="default: the protocol's levels")
    p.add_argument(
        "--geometries", type=positive, help="per person and class; default: the protocol's"
    )
    p.add_argument(
        "--every-expert",
        action="store_true",
        help="and further ones of the protocol's six, until they give every expert every person",
    )
    p.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="measure only these of linear, cubic, estimate, back-projection, general, expert, "
        "'expert + steps', and 'back-projection, as told' (what the app knows, instead of the true "
        "slice profile); no tables, `table` joins the rows with those of other runs",
    )
    p.add_argument("--tune", action="store_true", help="find the iterations of back-projection")
    p.add_argument(
        "--dice",
        action="store_true",
        help="segment with ANTs Atropos: one scan of each person and class, and for every expert",
    )
    p.add_argument(
        "--dice-scans",
        type=positive,
        default=1,
        metavar="N",
        help="segment the first N scans of each person and class",
    )
    p.add_argument(
        "--segmenter-command", help="or with this: 'mri_synthseg --i {input} --o {output}'"
    )
    p.add_argument(
        "--labels",
        type=Path,
        help="BIDS derivatives with manual tissue classes (1 to 3, CSF to white matter); a command "
        "must number its labels likewise",
    )
    p.add_argument(
        "--template",
        type=existing_file,
        help="register every acquired image to this T1w, as the app does",
    )
    p.add_argument("--template-mask", type=existing_file, help="its brain mask")
    p.add_argument(
        "--method-command",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="also this program: 'synthsr=mri_synthsr --i {input} --o {output}'",
    )
    _add_origins(p)
    p.add_argument("--nprocs", type=positive, default=1)
    p.set_defaults(run=evaluate)

    p = commands.add_parser("lesions", help=lesions.__doc__)
    _add_experiment(p, persons=2)
    p.add_argument("--classes", type=int, nargs="+", default=CLASSES, choices=CLASSES)
    p.set_defaults(run=lesions)

    p = commands.add_parser("gates", help=gates.__doc__)
    _add_experiment(p, persons=None)
    p.add_argument("--geometries", type=positive, help="only so many, spread over all")
    p.set_defaults(run=gates)

    p = commands.add_parser("table", help=table.__doc__)
    p.add_argument(
        "output",
        type=Path,
        help="without extension: .md and .svg are written, and .tsv if several are joined",
    )
    p.add_argument(
        "rows",
        type=Path,
        nargs="+",
        help="TSV files of `evaluate`; of a row in several, the last file's counts",
    )
    p.set_defaults(run=table)

    p = commands.add_parser("simulate", help=simulate.__doc__)
    p.add_argument("folder", type=Path, help="bids/ and truth/ are written into it")
    p.add_argument("--seed", type=seed, default=1, help="of the random affine (default: 1)")
    p.set_defaults(run=simulate)

    p = commands.add_parser("compare", help=compare.__doc__)
    p.add_argument("folder", type=Path, help="folder that `simulate` wrote to")
    p.add_argument("--output", type=Path, help="results of remix-bids (default: out/ in it)")
    p.set_defaults(run=compare)
    return parser


def _end_workers(number: int, frame: FrameType | None) -> NoReturn:
    """End what works for us, too: the end would wait for it, and what it has started go on."""
    workers.end(multiprocessing.active_children())
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    if argv is None:  # as a command: scancel, timeout and kill; Ctrl-C
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end_workers)
    args = get_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.run(args)
        sys.stdout.flush()
    except RemixError as error:
        print(f"remix-experts: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # of `remix-experts ... | head`; what is left must not be flushed again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder where a file should be
        print(f"remix-experts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
