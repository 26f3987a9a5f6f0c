"""Training that is stopped, killed or bereft of a rank, started again, is training that never was: by hash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from puna import checkpoint, config
from puna.parallel import ParallelConfig
from puna.run_folder import read_metrics
from puna.stages import pretrain
from puna.stages.pretrain import PretrainConfig
from tests import helpers

pytestmark = pytest.mark.distributed
SECONDS = 60
"""Within which the others must have noticed a dead rank."""


def small(folder: Path, out: str) -> PretrainConfig:
    """42 steps; checkpoints after 20, 40 and 42."""
    return helpers.pretrain_config(
        folder,
        out=folder / out,
        steps=42,
        batch_size=8,
        micro_batch_size=2,
        checkpoint_every=20,
        parallel=ParallelConfig(heartbeat=8),
    )


Start = Callable[[], list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """The command of recipe.json as torchrun starts it, on two processes; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def launch() -> list[subprocess.Popen[str]]:
        started.extend(processes := launched(tmp_path))
        return processes

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def launched(folder: Path) -> list[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(helpers.free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "puna", "pretrain", str(folder / "recipe.json")]
    return [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Until a line of this step is written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        path = run / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_metrics(path)):
            return
        time.sleep(0.01)
    raise AssertionError([process.communicate() for process in processes if process.poll() is not None])


def ends(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit codes and what was said on stderr."""
    said = [process.communicate(timeout=seconds)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def manifest(run: Path, step: int) -> dict[str, str]:
    """The hashes of all weights and moments after a step."""
    path = run / f"checkpoints/step_{step:06d}/manifest.json"
    files: dict[str, str] = json.loads(path.read_text())["files"]
    return files


def test_stopped_killed_and_resumed_is_uninterrupted(tmp_path: Path, start: Start) -> None:
    helpers.in_processes(pretrain.run, small(tmp_path, "whole"))
    run = tmp_path / "run"
    config.save(small(tmp_path, "run"), tmp_path / "recipe.json")

    stopped = start()
    wait_for_step(run, 3, stopped)
    stopped[1].send_signal(signal.SIGTERM)  # one hears it, all stop
    for code, said in ends(stopped):
        assert code == 143, said
    [saved] = (run / "checkpoints").iterdir()
    step = len(read_metrics(run / "metrics.jsonl"))
    assert 3 < step < 20 and saved.name == f"step_{step:06d}", "after the step that was being done"

    killed = start()
    wait_for_step(run, 22, killed)
    began = time.monotonic()
    killed[1].kill()
    code, said = ends(killed[:1], SECONDS)[0]
    assert time.monotonic() - began < SECONDS
    assert code == 1 and [line for line in said.splitlines() if "rank 1 is gone" in line], said
    assert not (run / "model").exists()

    for code, said in ends(start()):
        assert code == 0, said
    whole = tmp_path / "whole"
    assert manifest(run, 40) == manifest(whole, 40)
    assert len(manifest(run, 40)) == 3
    lines = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, whole)
    ]
    assert lines[0] == lines[1]
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]


def test_the_rank_that_keeps_the_store_may_die_too(tmp_path: Path, start: Start) -> None:
    config.save(small(tmp_path, "run"), tmp_path / "recipe.json")
    processes = start()
    wait_for_step(tmp_path / "run", 1, processes)
    processes[0].kill()
    code, said = ends(processes[1:], SECONDS)[0]
    assert code == 1 and "rank 0 is gone" in said
