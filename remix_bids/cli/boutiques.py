"""The Boutiques descriptor of remix-bids, made from its parser so that the two cannot differ.

    python -m remix_bids.cli.boutiques > remix_bids/data/boutiques.json

Format: https://github.com/boutiques/boutiques, schema version 0.5.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from remix_bids import __version__
from remix_bids.cli import parser as options

# Types of the parser, and what they are called in a descriptor. A folder that the app makes is a
# string: Boutiques expects a File to be there before.
_TYPES: dict[Any, dict[str, Any]] = {
    options.existing_file: {"type": "File"},
    options._folder: {"type": "File"},
    options.positive: {"type": "Number", "integer": True, "minimum": 1},
    options.seed: {"type": "Number", "integer": True, "minimum": 0, "maximum": 2**31 - 1},
    options._positive_number: {"type": "Number", "minimum": 0, "exclusive-minimum": True},
    options._megabytes: {"type": "Number", "minimum": 0, "exclusive-minimum": True},
}


def describe_option(action: argparse.Action) -> dict[str, Any]:
    """One input of the descriptor."""
    flag = next((o for o in action.option_strings if o.startswith("--")), None)
    name = (flag or action.dest).lstrip("-").replace("-", "_")
    item: dict[str, Any] = {
        "id": name,
        "name": name,
        "description": " ".join(str(action.help).replace("%%", "%").split()),
        "value-key": f"[{name.upper()}]",
        "optional": flag is not None,
    }
    if flag:
        item["command-line-flag"] = flag
    if action.nargs == 0:
        return {**item, "type": "Flag"}
    item.update(_TYPES.get(action.type, {"type": "String"}))
    if action.choices:
        item["value-choices"] = [str(choice) for choice in action.choices]
    if action.nargs == "+":
        item["list"] = True
    return item


def build_descriptor() -> dict[str, Any]:
    """The whole descriptor."""
    parser = options.build_parser()
    skipped = (argparse._HelpAction, argparse._VersionAction)
    actions = [action for action in parser._actions if not isinstance(action, skipped)]
    inputs = [describe_option(action) for action in actions]
    # Options that set the same thing exclude each other.
    shared = [dest for dest, n in Counter(action.dest for action in actions).items() if n > 1]
    groups = [
        {
            "id": f"{dest}_options",
            "name": f"one of the options for {dest}",
            "members": [i["id"] for i, a in zip(inputs, actions, strict=True) if a.dest == dest],
            "mutually-exclusive": True,
        }
        for dest in shared
    ]
    return {
        "name": parser.prog,
        "tool-version": __version__,
        "schema-version": "0.5",
        "description": parser.description,
        "command-line": " ".join([parser.prog, *(item["value-key"] for item in inputs)]),
        "container-image": {"type": "docker", "image": f"{parser.prog}:{__version__}"},
        "inputs": inputs,
        "groups": groups,
        "output-files": [
            {
                "id": "derivatives",
                "name": "BIDS derivatives",
                "description": "the folder for the results",
                "path-template": "[OUTPUT_DIR]",
            },
        ],
        "error-codes": [
            {"code": 1, "description": "some scan or report failed, the others are done"},
            {"code": 2, "description": "wrong arguments"},
            {"code": 66, "description": "nothing to do: no image was found"},
            {"code": 70, "description": "the workflow could not be built"},
            {"code": 78, "description": "a template or an expert is missing"},
        ],
        "tags": {"domain": ["neuroinformatics", "neuroimaging", "mri", "bids"]},
    }


def main() -> None:
    """Print the descriptor."""
    print(json.dumps(build_descriptor(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
