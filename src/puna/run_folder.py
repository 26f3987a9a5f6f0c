"""A run's folder: its lock, its done-markers, its metrics, and progress on the screen.

    runs/laptop/
      run.lock            held while a process works here; holds its pid and host
      done/sft.json       a marker a finished stage, with what it wants to tell the next ones
      sft/metrics.jsonl   a line of numbers a step

Nothing here is ever half written: a file gets its name only after its bytes are on the disk, and metrics.jsonl loses
at most a torn last line, which is cut off when it is opened again.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from puna.config import ConfigError

if TYPE_CHECKING:
    import rich.progress

SECONDS_BETWEEN_LINES = 10.0
TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
"""What `write_atomically` calls a file that is not whole yet."""


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a whole file under a temporary name, syncs it to the disk and renames it; folders are made.

    A reader sees the old file or the new one. Where writing fails (OSError), the old one stands as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sha256(path: Path) -> str:
    """The sha256 of a file, or of a model folder's weights: of its safetensors file, or of the joined hex digests of
    several in the order of their names.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digests = [sha256(file) for file in sorted(path.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def fingerprint(model: Path) -> str:
    """What a record calls the model that wrote it: the start of its weights' sha256, wherever the folder stands."""
    return sha256(model)[:16]


def sync_folder(folder: Path) -> None:
    """Puts a rename on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_synced(source: str, target: str) -> None:
    """shutil.copy2, on the disk when it returns."""
    shutil.copy2(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed writes left; folders in it that another run holds are left alone."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_held(Path(root, name))]
        for name in names:
            if TEMPORARY.fullmatch(name):
                Path(root, name).unlink(missing_ok=True)


def _is_held(folder: Path) -> bool:
    """Whether a run is at work in this folder."""
    if not (folder / "run.lock").is_file():
        return False
    with (folder / "run.lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class RunFolder:
    """A run's folder, held by one run at a time; use it in a `with`.

    A second run gets a ConfigError that names the first. The lock goes with its process, however that ends.
    Under torchrun rank 0 alone locks and writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: TextIO | None = None

    def __enter__(self) -> RunFolder:
        if not _is_rank_0():
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "run.lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise ConfigError(f"{self.path} is in use by {holder}; wait for it or use another folder") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock
        _remove_leftovers(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()  # the file stays: were it removed, two runs could lock two files of one name

    def done(self, name: str) -> bool:
        """Whether the step `name` ("sft", "v1/reward_helpfulness") is finished."""
        return self._marker(name).exists()

    def mark_done(self, name: str, **info: Any) -> None:
        """Marks a step as finished; `info` (JSON-ready) is kept in the marker."""
        if _is_rank_0():
            write_atomically(self._marker(name), json.dumps(info, indent=2) + "\n")

    def take_over(self, other: Path, steps: Sequence[str]) -> None:
        """Copies what another run has of these steps, all finished there, unless it is here already.

        What is only kept to resume a step is left. Raises ConfigError where the other run has not finished one of them.
        """
        left = [step for step in steps if not self.done(step)]
        for step in left:
            if not (other / f"done/{step}.json").exists():
                raise ConfigError(f"{other} has not finished {step}: run its recipe first, or leave `start` out")
        for folder in dict.fromkeys(step.split("/")[0] for step in left):
            needless = shutil.ignore_patterns("checkpoints", "parts", "run.lock")
            shutil.copytree(
                other / folder, self.path / folder, ignore=needless, copy_function=_copy_synced, dirs_exist_ok=True
            )
            for root, _, _ in os.walk(self.path / folder):
                sync_folder(Path(root))
        for step in left:
            write_atomically(self._marker(step), (other / f"done/{step}.json").read_bytes())

    def _marker(self, name: str) -> Path:
        assert name and not name.startswith("/") and ".." not in name.split("/"), name
        return self.path / "done" / f"{name}.json"


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Metrics:
    """Appends a line {"stage": ..., "step": ..., numbers} a step to a metrics.jsonl; under torchrun rank 0 alone does.

    `stage` is the name of the file's folder unless given. With `resume_step` (the last step whose effect is kept) the
    stage's lines of later steps are dropped first: the run was killed past its last checkpoint and does them again.
    """

    def __init__(self, path: Path, resume_step: int | None = None, *, stage: str | None = None) -> None:
        self.path = path
        self.stage = path.absolute().parent.name if stage is None else stage
        if _is_rank_0() and path.exists():
            kept = [line for line in read_metrics(path) if not self._is_undone(line, resume_step)]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _is_undone(self, line: dict[str, Any], resume_step: int | None) -> bool:
        return resume_step is not None and line["stage"] == self.stage and line["step"] > resume_step

    def log(self, *, step: int, **numbers: Any) -> None:
        """One line. A number that is not finite is written as null, for JSON has no word for it."""
        if not _is_rank_0():
            return
        line = {"stage": self.stage, "step": step, **{name: _plain(value) for name, value in numbers.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a torn last line (of a killed run) is left out."""
    read: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            read.append(json.loads(line))
        except ValueError:
            raise ConfigError(f"{path}, line {len(read) + 1}: no JSON; take the line out to go on") from None
    return read


class Progress:
    """Says on stderr how far a stage is: a bar on a terminal, else a line every ten seconds. Only rank 0 speaks.

    `start` is where a resumed stage goes on.
    """

    def __init__(self, stage: str, total: int, unit: str = "step", *, start: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self._done = self._start = start
        self._began = self._last_said = time.monotonic()
        self._bar = _bar(f"{stage} ({unit}s)", total, start) if _is_rank_0() and sys.stderr.isatty() else None

    def update(self, n: int = 1, **numbers: float) -> None:
        """`n` more are done. `numbers` (loss=, reward=, tokens_per_second=) are shown as they are."""
        self._done += n
        if self._bar is not None or time.monotonic() - self._last_said >= SECONDS_BETWEEN_LINES:
            self._say(numbers)

    def warn(self, sentence: str) -> None:
        """A line of its own, at once."""
        if self._bar is not None:
            self._bar.console.print(f"{self.stage}: warning: {sentence}", markup=False)
        elif _is_rank_0():
            sys.stderr.write(f"{self.stage}: warning: {sentence}\n")

    def close(self, **numbers: float) -> None:
        """The last word: leaves the bar, or a last line, with `numbers`."""
        self._say(numbers)
        if self._bar is not None:
            self._bar.stop()

    def _say(self, numbers: dict[str, float]) -> None:
        self._last_said = time.monotonic()
        seconds = self._last_said - self._began
        left = round(seconds / max(self._done - self._start, 1) * max(self.total - self._done, 0))
        words = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items()]
        said = "  ".join([*words, f"{left // 60}:{left % 60:02d} left"])
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, said=said)
        elif _is_rank_0():
            sys.stderr.write(f"{self.stage} {self._done}/{self.total} {self.unit}s  {said}\n")
            sys.stderr.flush()


def _bar(description: str, total: int, start: int) -> rich.progress.Progress | None:
    """A started bar; None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError:
        return None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}")
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task(description, total=total, completed=start, said="")
    bar.start()
    atexit.register(bar.stop)  # an error leaves the terminal as it was
    return bar
