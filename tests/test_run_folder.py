"""A run's folder: the lock, the markers, the metrics, the progress lines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from puna import run_folder
from puna.config import ConfigError
from puna.run_folder import Metrics, Progress, RunFolder, read_metrics, write_atomically


def test_write_atomically_makes_folders_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.txt", "one")
    write_atomically(tmp_path / "a" / "b.txt", b"two")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.txt"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_markers(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        assert not folder.done("v1/reward")
        folder.mark_done("v1/reward", accuracy=0.5)
        assert folder.done("v1/reward") and not folder.done("v1")
        assert json.loads((folder.path / "done/v1/reward.json").read_text()) == {"accuracy": 0.5}
        with pytest.raises(AssertionError):
            folder.mark_done("../reward")
    with RunFolder(tmp_path / "run") as folder:
        assert folder.done("v1/reward")


HOLD = """
import sys, time
from pathlib import Path
from puna.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"in use by process {first.pid} on "), RunFolder(tmp_path):
            pass
        first.send_signal(signal.SIGKILL)
    with RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):  # and it is given back at the end of a `with`
        pass


def test_what_killed_writes_left_is_removed(tmp_path: Path) -> None:
    left, kept = ".config.json.tmp-0123abcd", (".notes.tmp-of-mine", "config.json.tmp-0123abcd")
    for folder in (tmp_path, tmp_path / "v1/sft", tmp_path / "v1/ppo"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (left, *kept):
            (folder / name).touch()
    with RunFolder(tmp_path / "v1/ppo"):
        (tmp_path / "v1/ppo" / left).touch()  # another run's, which is writing it
        with RunFolder(tmp_path):
            assert [path.parent.name for path in tmp_path.rglob(left)] == ["ppo"]
    with RunFolder(tmp_path):
        assert not list(tmp_path.rglob(left))
    assert all(len(list(tmp_path.rglob(name))) == 3 for name in kept)


def test_only_rank_0_locks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with RunFolder(tmp_path) as folder:
            folder.mark_done("sft")
            assert not folder.done("sft")
            Metrics(tmp_path / "metrics.jsonl").log(step=0, loss=1.0)
            assert not (tmp_path / "metrics.jsonl").exists()
            progress = Progress("sft", 1)
            progress.update()
            progress.warn("answers grow")
            progress.close()
            assert capsys.readouterr().err == ""


def test_metrics_go_on_where_a_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "sft" / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(4):
        metrics.log(step=step, loss=step / 2)
    with path.open("a") as file:
        file.write('{"stage": "sft", "st')  # killed while it wrote
    metrics = Metrics(path, resume_step=1)
    metrics.log(step=2, loss=7.0)
    assert read_metrics(path) == [
        {"stage": "sft", "step": 0, "loss": 0.0},
        {"stage": "sft", "step": 1, "loss": 0.5},
        {"stage": "sft", "step": 2, "loss": 7.0},
    ]


def test_metrics_of_other_stages_in_one_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path, stage="a").log(step=9)
    Metrics(path, resume_step=-1, stage="b").log(step=0)
    Metrics(path, resume_step=-1, stage="b").log(step=0)
    assert read_metrics(path) == [{"stage": "a", "step": 9}, {"stage": "b", "step": 0}]


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe"])
def test_damaged_metrics_are_named(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + damage + b'\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=rf"^{path}, line 2: no JSON; take the line out to go on$"):
        read_metrics(path)


def test_metrics_are_json_whatever_the_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path).log(step=0, loss=float("nan"), norm=float("inf"), count=3)
    line = read_metrics(path)[0]
    assert (line["loss"], line["norm"], line["count"]) == (None, None, 3)


def test_progress_in_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)
    progress = Progress("sft", 100, start=50)
    for _ in range(25):
        now += 1.0
        progress.update(loss=1.23456, tokens_per_second=1000.0)
    progress.warn("answers grow")
    progress.close(loss=2.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sft 60/100 steps  loss 1.235  tokens per second 1000  0:40 left",
        "sft 70/100 steps  loss 1.235  tokens per second 1000  0:30 left",
        "sft: warning: answers grow",
        "sft 75/100 steps  loss 2  0:25 left",
    ]


def test_progress_as_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("ppo", 3, unit="update")
    progress.update(reward=0.5)
    progress.warn("answers [bold]grow[/bold]")
    progress.update(2, reward=0.75)
    progress.close(reward=0.875)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "ppo (updates)" in shown and "3/3" in shown and "reward 0.875" in shown
    assert "ppo: warning: answers [bold]grow[/bold]" in shown


def test_what_is_taken_over_is_on_the_disk_before_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = RunFolder(tmp_path / "other")
    write_atomically(other.path / "v1/model/model.safetensors", "weights")
    write_atomically(other.path / "v1/checkpoints/step", "only to resume")
    other.mark_done("v1/sft")
    synced: set[int] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with RunFolder(tmp_path / "new") as folder:
        folder.take_over(other.path, ["v1/sft"])
        assert folder.done("v1/sft")
    copied = [folder.path / "v1", *(folder.path / "v1").rglob("*")]
    assert [path.name for path in copied] == ["v1", "model", "model.safetensors"]
    assert {path.stat().st_ino for path in copied} <= synced
