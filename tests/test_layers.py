"""Imports go down only, nothing heavy is imported early, and no file names a folder of a machine.

science (arrays and torch) <- interfaces (files) <- workflows, reports, command line
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "remix_bids"

SCIENCE = (
    "spatial",
    "native",
    "simulation",
    "registration",
    "experts",
    "training",
    "evaluation",
    "qc",
    "toml_file",
)
BELOW = ("errors", "workers", "data")  # for all layers: they import nothing of ours
PIPELINES_AND_BIDS = {"nipype", "niworkflows", "nireports", "bids", "templateflow"}
HEAVY = {"torch", "ants"}
# What a run needs in its parent process: to say --help, to build the graph, to run and to report.
PARENT = ("cli.app", "workflows", "reports", "__main__")


def _name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(tree, *, everywhere):
    """Dotted names that a module imports; only those run at its import unless ``everywhere``."""
    out = set()
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            out.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            out.add(node.module)
            out.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif everywhere or not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        ):
            todo += ast.iter_child_nodes(node)
    return out


AT_IMPORT, ANYWHERE = (
    {
        name: _imports(ast.parse(path.read_text()), everywhere=everywhere)
        for name, path in MODULES.items()
    }
    for everywhere in (False, True)
)


def _within(name, parts):
    own = name.removeprefix("remix_bids").removeprefix(".")
    return any(own == part or own.startswith(part + ".") for part in parts)


def _loaded_with(name):
    """Every name that is imported, directly or not, when a module of the package is."""
    seen, todo = set(), [name]
    while todo:
        now = todo.pop()
        if now in seen:
            continue
        seen.add(now)
        todo += AT_IMPORT.get(now, ())
        if now.startswith("remix_bids."):
            todo.append(now.rpartition(".")[0])
    return seen


def _tops(names):
    return {name.partition(".")[0] for name in names}


def _modules(*parts):
    return [name for name in MODULES if _within(name, parts)]


def test_the_tree_is_what_these_tests_believe():
    for part in (*SCIENCE, *PARENT, "interfaces"):
        assert _modules(part), f"there is no remix_bids.{part}"
    assert "torch" in _tops(_loaded_with("remix_bids.experts.unet"))


@pytest.mark.parametrize("name", _modules(*BELOW))
def test_what_lies_below_all_layers_stands_alone(name):
    assert not {i for i in ANYWHERE[name] if i.startswith("remix_bids")}


@pytest.mark.parametrize("name", _modules(*SCIENCE))
def test_science_knows_no_pipeline_and_no_bids(name):
    assert not _tops(ANYWHERE[name]) & PIPELINES_AND_BIDS
    own = {i for i in ANYWHERE[name] if i.startswith("remix_bids.")} & set(MODULES)
    above = {i for i in own if not _within(i, (*SCIENCE, *BELOW))}
    assert not above, "science imports only science"


@pytest.mark.parametrize("name", _modules("interfaces"))
def test_interfaces_know_no_graph(name):
    above = [i for i in ANYWHERE[name] if i.startswith("remix_bids.")]
    assert not [i for i in above if _within(i, ("workflows", "reports", "cli", "demo"))]


@pytest.mark.parametrize("name", _modules("workflows", "reports"))
def test_graphs_know_no_command_line(name):
    above = [i for i in ANYWHERE[name] if i.startswith("remix_bids.")]
    assert not [i for i in above if _within(i, ("cli", "demo"))]


@pytest.mark.parametrize("name", _modules(*PARENT, "interfaces"))
def test_parent_process_imports_neither_torch_nor_ants(name):
    assert not _tops(_loaded_with(name)) & HEAVY


@pytest.mark.parametrize("name", _modules("cli", "config", "__main__"))
def test_help_needs_no_pipeline(name):
    slow = {"nibabel", "numpy", "nilearn"} | PIPELINES_AND_BIDS | HEAVY
    assert not _tops(_loaded_with(name)) & slow


def test_no_file_names_a_folder_of_a_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are the repository's, git tells")
    # Another owner of the folder, as in a container, is no reason to look away.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|mnt|opt|tmp)/\w")
    found = []
    for name in filter(None, done.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode().splitlines(), 1):
            if pattern.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
