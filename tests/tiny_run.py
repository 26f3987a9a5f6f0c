"""The recipe of tiny.toml: run once for all tests that look at what a run leaves behind, or killed on the way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puna import config, recipe
from puna.recipe import RecipeConfig

BASELINES = ("instructgpt", "best_of_n", "dpo", "grpo", "constitutional")
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
    with _shared(factory) as folder:
        if not (folder / "run/done/report.json").exists():
            done = start(folder)
            assert done.returncode == 0, done.stderr
    return folder


def baselines(factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each other method, begun with the tiny recipe's own beginning; made as `finished` is."""
    run = finished(factory) / "run"
    with _shared(factory) as folder:
        return {method: recipe.run(baseline(method, folder / method, run)) for method in BASELINES}


def baseline(method: Any, out: Path, begun: Path | None) -> RecipeConfig:
    """The tiny recipe by another method."""
    cfg = config.load(RecipeConfig, [str(RECIPE), "--out", str(out)])
    groups = {"iterations": 3, "batch_size": 8, "group_size": 4, "mini_batch_size": 4, "max_new_tokens": 24}
    text: dict[str, Any] = {"pretrain_data": recipe.SET_BY_RECIPE, "pretrain_coefficient": 0.5, "pretrain_windows": 2}
    return replace(
        cfg,
        method=method,
        start=begun,
        ppo=replace(cfg.ppo, **text) if method == "instructgpt" else cfg.ppo,
        critique=replace(cfg.critique, principles="valley", max_new_tokens=120),
        rejection_sampling=replace(cfg.rejection_sampling, temperatures=(1.0,)),  # where the KL of a best of n is known
        dpo=replace(cfg.dpo, batch_size=16),
        grpo=replace(cfg.grpo, advantage="rloo", held_out_prompts=4, evaluate_every=2, checkpoint_every=2, **groups),
    )


@contextlib.contextmanager
def _shared(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that all workers share, held by one of them at a time."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
