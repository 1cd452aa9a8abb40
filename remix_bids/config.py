"""The settings of one run: one frozen object, from arguments and to and from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from remix_bids import __version__
from remix_bids.errors import UsageError

DEFAULT_SPACE = "MNI152Lin"
NATIVE = "T1w"  # the space of the scan itself, as other NiPreps call it
DEFAULT_SEED = 20260  # any fixed number will do; it is recorded in every sidecar


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does.

    Resources left at None are filled in by `remix_bids.resources` before the graph is built.
    """

    bids_dir: Path
    output_dir: Path
    analysis_level: str = "participant"
    # what to work on
    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    bids_filter_file: Path | None = None
    bids_database_dir: Path | None = None
    skip_bids_validation: bool = False
    offline: bool = False
    # how
    output_spaces: tuple[str, ...] = (DEFAULT_SPACE,)
    enforce_consistency: bool = False
    leave_slices_out: bool = False
    expert: str = "auto"
    gate: str = "effective"
    experts_dir: Path | None = None
    random_seed: int = DEFAULT_SEED
    sloppy: bool = False
    # with what
    device: str = "auto"
    nprocs: int | None = None
    omp_nthreads: int | None = None
    mem_gb: float | None = None
    low_mem: bool = False
    n_gpu_procs: int | None = None
    use_plugin: Path | None = None
    # where and how it is run
    work_dir: Path = Path("work")
    clean_workdir: bool = False
    write_graph: bool = False
    resource_monitor: bool = False
    stop_on_first_crash: bool = False
    dry_run: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    notrack: bool = False
    verbose: int = 0
    run_uuid: str = ""

    @property
    def space(self) -> str:
        """The MNI space to register to: the one asked for, or the default."""
        return next((name for name in self.output_spaces if name != NATIVE), DEFAULT_SPACE)

    def with_(self, **changes: Any) -> RunConfig:
        """A copy with some settings changed."""
        return replace(self, **changes)

    def to_toml(self) -> str:
        """The settings as TOML; those that are None are left out."""
        lines = [f"# remix-bids {__version__}", "[settings]"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                lines.append(f"{field.name} = {_toml_value(value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> RunConfig:
        """Read back what `to_toml` wrote."""
        return cls(**read_settings(text))


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return '"' + "".join(_ESCAPES.get(c, c) for c in str(value)) + '"'


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\x7f": "\\u007F"}
_ESCAPES.update({chr(code): f"\\u{code:04X}" for code in range(32)})


def read_settings(text: str) -> dict[str, Any]:
    """Settings out of a TOML text, with the types of `RunConfig`.

    Raises
    ------
    UsageError
        Not TOML, no such setting, or a value of the wrong type.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the configuration file is not valid TOML: {error}") from None
    settings = table.get("settings", table)
    if not isinstance(settings, Mapping):
        raise UsageError("the configuration file's settings are no table: [settings]")
    types = {field.name: str(field.type) for field in fields(RunConfig)}
    unknown = sorted(set(settings) - set(types))
    if unknown:
        raise UsageError(
            f"the configuration file has unknown settings: {', '.join(unknown)}; "
            f"known: {', '.join(types)}"
        )
    return {name: _from_toml(name, value, types[name]) for name, value in settings.items()}


def _from_toml(name: str, value: Any, kind: str) -> Any:
    """Check one value against the annotation of its field."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind.startswith("bool") and isinstance(value, bool):
        return value
    if kind.startswith("int") and is_number and isinstance(value, int):
        return value
    if kind.startswith("float") and is_number:
        return float(value)
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(str(item) for item in value)
    if kind.startswith("Path") and isinstance(value, str):
        return Path(value)
    if kind.startswith("str") and isinstance(value, str):
        return value
    raise UsageError(f"the configuration file has {name} = {value!r}; expected {kind}")
