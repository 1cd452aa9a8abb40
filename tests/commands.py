"""Running the installed commands as a user does."""

import os
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent


def run(name, *args, **environ):
    """Run a console script beside this Python; show what it said when a test fails.

    One that hangs, or leaves processes that hold its output, fails in the end.
    """
    done = subprocess.run(
        [BIN / name, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **{key: str(value) for key, value in environ.items()}},
        check=False,
        timeout=1200,
    )
    print("$", name, *args, f"-> {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def last_line(done):
    """The last line on standard output."""
    return done.stdout.strip().splitlines()[-1]


def assert_valid(dataset):
    """The real BIDS validator finds no error (it says so with its exit status)."""
    done = run("bids-validator-deno", "--ignoreWarnings", dataset)
    assert done.returncode == 0, done.stdout


def has_ended(pid, within=10):
    """Whether a process ends within so many seconds, by ``/proc``: it may be nobody's child."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
