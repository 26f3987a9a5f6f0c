"""PPO killed by SIGKILL at random moments and started again is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from puna import config
from puna.run_folder import read_metrics
from tests import helpers

KILLER = """
import multiprocessing, random, shutil, sys, time
from dataclasses import replace
from pathlib import Path

import torch

from puna import config
from puna.stages import ppo

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
cfg = config.load(ppo.PPOConfig, [str(folder / "ppo.json")])
torch.set_num_threads(1)
start = multiprocessing.get_context("fork").Process


def lives(out, seconds=None):
    process = start(target=ppo.run, args=(replace(cfg, out=out),))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


began = time.perf_counter()
assert lives(folder / "whole") == 0
whole = time.perf_counter() - began
rng, killed = random.Random(0), 0
while killed < kills:
    out, moment = folder / str(killed), rng.uniform(0, whole)
    if lives(out, moment) == 0:
        whole = moment  # it had ended already: other work had slowed the first run down
        shutil.rmtree(out)
        continue
    assert lives(out) == 0
    print(f"killed after {moment:.2f} of {whole:.2f} s")
    killed += 1
"""


def state(out: Path) -> dict[str, Any]:
    """All that a run leaves but its clocks: numbers, answers, the model, the last checkpoint's hashes and memory."""
    lines = [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per_second"))}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    manifest = json.loads(sorted(out.glob("checkpoints/*/manifest.json"))[-1].read_text())
    return {
        "metrics": lines,
        "held_out": {path.name: path.read_text() for path in sorted((out / "held_out").iterdir())},
        "model": (out / "model/model.safetensors").read_bytes(),
        "checkpoint": manifest["files"],
        "memory": manifest["extra"],
        "done": (out / "done/ppo.json").read_text(),
    }


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_z_killed_at_random_moments(kills: int, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"whiten": "running", "kl_target": 0.2, "kl_horizon": 80, "evaluate_every": 2}
    cfg = helpers.ppo_config(tmp_path, iterations=5, checkpoint_every=1, patience=0, **choices)
    config.save(cfg, tmp_path / "ppo.json")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(kills)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    whole = state(tmp_path / "whole")
    assert len(whole["metrics"]) == 5
    for i in range(kills):
        assert state(tmp_path / str(i)) == whole, done.stdout
