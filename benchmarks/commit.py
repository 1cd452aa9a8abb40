"""Which commit is measured."""

import subprocess


def commit() -> str:
    """Short hash of the working folder's commit; empty where there is no Git."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip()
