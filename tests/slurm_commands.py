"""A very small Slurm for tests: sbatch, squeue, scontrol and scancel over one folder.

Jobs really run, one after the other, in the order of their submission. Called as
``slurm_commands.py FOLDER COMMAND ARGUMENT...``; the file FOLDER/away makes that many calls fail
as if the controller did not answer; while FOLDER/broken is there, jobs fail before they begin.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")


def install(folder: Path) -> Path:
    """Make the commands; return the folder to put in front of PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in COMMANDS:
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{folder}" {name} "$@"\n')
        path.chmod(0o755)
    return programs


def main(folder: Path, command: str, args: list[str]) -> int:
    """Run one command; return its exit status."""
    with (folder / "calls.txt").open("a") as file:
        file.write(" ".join([command, *args]) + "\n")
    away = folder / "away"
    left = int(away.read_text()) if away.exists() else 0
    if left:
        away.write_text(str(left - 1))
        print(f"{command}: error: Unable to contact slurm controller", file=sys.stderr)
        return 1
    if command == "sbatch":
        return sbatch(folder, args)
    if command == "squeue":
        jobs = re.search(r"--jobs=([\d,]+)", " ".join(args))[1].split(",")
        known = [job for job in jobs if (folder / job).exists()]
        if len(jobs) == 1 and not known:  # of several, Slurm leaves out those that it does not know
            print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
            return 1
        for job in known:
            if (folder / job).read_text() in ("PENDING", "RUNNING"):
                print(job)
    if command == "scontrol":
        print(f"JobId={args[-1]} JobState={(folder / args[-1]).read_text()} Reason=None")
    if command == "scancel":
        for job in args:
            (folder / job).write_text("CANCELLED")
    return 0


def sbatch(folder: Path, args: list[str]) -> int:
    """Run the script to its end, as the state that the queue then shows."""
    if "--partition=none" in args:
        print("sbatch: error: invalid partition specified: none", file=sys.stderr)
        return 1
    job = str(1 + sum(path.name.isdigit() for path in folder.iterdir()))
    log = next(a for a in args if a.startswith("--output="))
    program = ["false"] if (folder / "broken").exists() else ["bash", args[-1]]
    with open(log.partition("=")[2].replace("%j", job), "w") as file:
        done = subprocess.run(program, stdout=file, stderr=file, check=False)
    killed = done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    state = "OUT_OF_MEMORY" if killed else "FAILED" if done.returncode else "COMPLETED"
    part = folder / f"part-{os.getpid()}"
    part.write_text(state)
    part.rename(folder / job)
    print(f"Submitted batch job {job}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
