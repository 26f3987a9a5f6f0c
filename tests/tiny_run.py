"""The recipe of tiny.toml: run once for all tests that look at what a run leaves behind, or killed on the way."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).with_name("tiny.toml")

KILLED = """
import os, signal, sys
from puna import cli, run_folder

log = run_folder.Metrics.log

def log_and_die(self, *, step, **numbers):
    log(self, step=step, **numbers)
    if f"{self.path.parent}:{step}" == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)

run_folder.Metrics.log = log_and_die
sys.exit(cli.main(sys.argv[2:]))
"""


def start(folder: Path, *, killed_at: str = "") -> subprocess.CompletedProcess[str]:
    """Runs or resumes the recipe in `folder`/run; with `killed_at` ("run/sft:3") to that step of that stage alone.

    Its paths are relative, so that two runs differ in nothing but the folder they stand in.
    """
    program = [sys.executable, "-c", KILLED, killed_at, "run", str(RECIPE), "--out", "run"]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True)


def finished(factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, made by the first test that asks for it, whichever worker that is in."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "run/done/report.json").exists():
            done = start(folder)
            assert done.returncode == 0, done.stderr
    return folder
