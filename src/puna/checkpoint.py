"""Checkpoints of a run in progress: save, find the latest, load; on any number of processes.

A checkpoint is a folder `step_000123` of torch.distributed.checkpoint files and a manifest.json: the sha256 of each
file, the step, the versions that wrote it and the caller's `extra`. A model and optimizer saved on n processes load
on m, however they share it. The way of a save:

1. every rank copies its part of the state; a `Saver` does the rest in a thread while training goes on;
2. every rank writes its part into `step_000123.tmp-<pid>`, synced to the disk;
3. every rank hashes its part, rank 0 writes the manifest;
4. the folder gets its name; what `keep` does not cover is removed.

Killed at any point, the checkpoints before it stand as they were. Loading trusts nothing: hashes first, then pickles
read by unpicklers that know a fixed list of classes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import pickle
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from puna import parallel
from puna.config import ConfigError, DataError
from puna.run_folder import sync_folder, write_atomically

T = TypeVar("T")

MANIFEST = "manifest.json"
STEP = re.compile(r"step_(\d+)")
_METADATA = "torch.distributed.checkpoint.metadata"
# All that a .metadata needs, as exact pairs: a prefix would let dotted names escape into whole modules.
ALLOWED_IN_METADATA = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    *(("torch", dtype) for dtype in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")),
}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write `folder`/step_NNNNNN and return it; keep it and the `keep` - 1 newest before it.

    `extra` is JSON-ready (random states, the loader's place, ...). All ranks call it. Where writing fails (a full
    disk: OSError) the error passes on and the checkpoints before it are intact. One process at a time saves here.
    """
    return _write(folder, _manifest(step, extra), _state(model, optimizer), keep)


class Saver:
    """Saves a training's checkpoints while it goes on; use it in a `with` around the loop, on all ranks.

    One save runs at a time. An error of one (as `save`) is raised at the next, or when the `with` ends. One is due
    every `every` steps and after step `last`, for what follows training may be killed as well; with `every` 0 none is.
    On SIGTERM the step is finished, saved, and the signal raised again, to do what it did before; heard after the last
    step, it is raised when the `with` ends.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, every: int, keep: int = 2, last: int = 0
    ) -> None:
        self.folder, self.model, self.optimizer, self.every, self.keep = folder, model, optimizer, every, keep
        self.last = last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None
        self._stopped = False
        self._before: Any = None

    def __enter__(self) -> Saver:
        _group()  # made by all ranks together, before one is ahead of the others
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def after(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """`step` steps are done: save where one is due. All ranks call it after each step."""
        stopped = bool(parallel.largest(self._stopped))  # whoever heard it first, all stop after the same step
        if stopped or (self.every and (step % self.every == 0 or step == self.last)):
            self._wait()
            state = BlockingAsyncStager().stage(_state(self.model, self.optimizer))
            self._running = self._thread.submit(_write, self.folder, _manifest(step, extra), state, self.keep)
        if stopped:
            self._wait()
            self._stopped = False
            signal.signal(signal.SIGTERM, self._before)
            signal.raise_signal(signal.SIGTERM)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        self._thread.shutdown()
        self._wait()
        if kind is None and parallel.largest(self._stopped):
            signal.raise_signal(signal.SIGTERM)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._stopped = True

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()


def _manifest(step: int, extra: dict[str, Any] | None) -> dict[str, Any]:
    manifest = {"step": step, "puna": _puna_version(), "torch": str(torch.__version__), "extra": extra or {}}
    json.dumps(manifest)  # What is not JSON must fail before anything is written.
    return manifest


def _write(folder: Path, manifest: dict[str, Any], state: dict[str, Any], keep: int) -> Path:
    """2 to 4, on all ranks, in any thread."""
    assert keep >= 1, keep
    final = folder / f"step_{manifest['step']:06d}"
    (pid,) = set(_on_all_ranks(lambda: os.getpid() if parallel.is_main() else None)) - {None}
    temporary = folder / f"{final.name}.tmp-{pid}"
    try:
        if parallel.is_main():
            _remove_leftovers(folder)
        with _plain_errors():
            writer = _Writer(temporary, overwrite=False)
            state_dict_saver.save(state, storage_writer=writer, process_group=_group(), no_dist=_alone())
        hashes = _on_all_ranks(lambda: _hashes(temporary, sorted(path.name for path in _own_files(temporary))))
        files = {name: digest for part in hashes for name, digest in part.items()}
        _on_all_ranks(lambda: _publish(temporary, final, manifest | {"files": files}, keep))
    except BaseException:
        if parallel.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint in the folder, None where there is none."""
    return max(_finished(folder), key=_step, default=None)


def steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in the folder, in order."""
    return sorted(map(_step, _finished(folder)))


def load(path: Path, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Fill the model (and optimizer) from a checkpoint and return its `extra`. All ranks call it.

    DataError where the checkpoint is damaged or not what it says; ConfigError where it holds another model.
    """
    manifest = read_manifest(path)
    names = sorted(manifest["files"])[parallel.rank() :: parallel.world_size()]
    _on_all_ranks(lambda: _verify(path, names, manifest["files"]))
    reader, state = _Reader(path, manifest["files"]), _state(model, optimizer)
    try:
        with _plain_errors():
            state_dict_loader.load(
                state, storage_reader=reader, planner=_Planner(), process_group=_group(), no_dist=_alone()
            )
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: refused, a setting of the optimizer is more than a plain value") from error
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path} does not fit this model and optimizer: {reason}") from error
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return manifest["extra"]  # type: ignore[no-any-return]


def resume(folder: Path, model: nn.Module, optimizer: Optimizer | None = None) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint of a folder; the step to go on with and its `extra`, (0, {}) where there is none."""
    path = latest(folder)
    return (0, {}) if path is None else (_step(path), load(path, model, optimizer))


def tensors(path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Name, type and size of each of the model's tensors, from the .metadata alone. Errors as `load`."""
    files = read_manifest(path)["files"]
    _verify(path, sorted({".metadata"} & files.keys()), files)
    stored = _Reader(path, files).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): (tensor.properties.dtype, tensor.size)
        for name, tensor in stored.items()
        if name.startswith("model.") and isinstance(tensor, TensorStorageMetadata)
    }


class _Writer(FileSystemWriter):
    """Leaves the folder's name and a random id out of the metadata: the same state gives the same bytes."""

    def storage_meta(self) -> StorageMeta | None:
        return None


class _Reader(FileSystemReader):
    """Reads .metadata with an unpickler that knows ALLOWED_IN_METADATA and nothing else, before anything else.

    DataError where that is not a checkpoint's, or where it or a file that it names is none of the manifest's `files`.
    """

    def __init__(self, path: Path, files: Container[str]) -> None:
        super().__init__(path)
        try:
            self._metadata: Metadata = _MetadataUnpickler(io.BytesIO((path / ".metadata").read_bytes())).load()
            names = {".metadata", *(part.relative_path for part in self._metadata.storage_data.values())}
        except (
            pickle.UnpicklingError,
            AttributeError,
            EOFError,
            ImportError,
            IndexError,
            OSError,
            TypeError,
            ValueError,
        ) as error:
            raise DataError(f"{path / '.metadata'}: refused, it is not a checkpoint's: {error}") from error
        for name in names:
            if name not in files or Path(name).name != name:
                raise DataError(f"{path}: refused, {name} is no file of this folder in its {MANIFEST}")
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_IN_METADATA:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's .metadata")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    """Reads what is no tensor (the optimizer's settings) without running it; torch's own does not."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))


def _state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """Model and optimizer by parameter name, in place: tensors are shared, not copied."""
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        fresh = not optimizer.state
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        if fresh:
            # torch fills an unused optimizer's state by a step with zero gradients: it must not count as one.
            for moments in optimizer.state.values():
                moments["step"].zero_()
    return state


def _publish(temporary: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    """Rank 0: the manifest, the rename, and the removal of old checkpoints."""
    if not parallel.is_main():
        return
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    if final.exists():
        # The same step again: out of the way under a name that the next save cleans up, should this one die here.
        final.rename(final.with_name(f"{final.name}.tmp-old"))
    temporary.rename(final)
    sync_folder(final.parent)
    _remove_leftovers(final.parent)
    for path in sorted(_finished(final.parent), key=_step)[:-keep]:
        shutil.rmtree(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest: step, versions, files with their sha256, extra. Errors as `load`."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such checkpoint")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        manifest["files"].items(), manifest["extra"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path / MANIFEST} is missing or damaged{_way_out(path)}") from error
    return manifest


def _verify(path: Path, names: list[str], expected: dict[str, str]) -> None:
    for name in names:
        if not (path / name).is_file():
            raise DataError(f"{path / name} is missing{_way_out(path)}")
        if _hashes(path, [name])[name] != expected[name]:
            raise DataError(f"{path / name} is damaged: its sha256 is not the manifest's{_way_out(path)}")


def _way_out(path: Path) -> str:
    """What to do about a damaged checkpoint: the newest one before it, if there is one."""
    earlier = [other for other in _finished(path.parent) if other != path and _step(other) < _step(path)]
    if not earlier:
        return "; there is no earlier checkpoint to go on from"
    return f"; remove {path} to go on from {max(earlier, key=_step).name}"


def _finished(folder: Path) -> list[Path]:
    """The checkpoints whose manifest exists, in no order."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if STEP.fullmatch(path.name) and (path / MANIFEST).is_file()]


def _step(path: Path) -> int:
    match = STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed saves left."""
    for path in folder.glob("step_*.tmp-*"):
        shutil.rmtree(path)


def _own_files(folder: Path) -> list[Path]:
    """What this rank wrote; the .metadata is rank 0's."""
    own = list(folder.glob(f"__{parallel.rank()}_*"))
    return [folder / ".metadata", *own] if parallel.is_main() else own


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    digests = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _alone() -> bool:
    """Whether nobody else takes part. Collectives of one process would cost the training its spinning threads:
    gloo's thread copies with OpenMP threads of its own, and more threads than cores do not spin (docs/log.md).
    """
    return parallel.world_size() == 1


@functools.cache
def _group() -> dist.ProcessGroup | None:
    """All ranks, for what goes on beside the training's collectives."""
    return None if _alone() else dist.new_group(backend="gloo")


def _on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Every rank's result; if the work fails on one rank it fails on all, so that none waits for another."""
    if _alone():
        return [work()]
    outcome: T | Exception
    try:
        outcome = work()
    except Exception as error:  # noqa: BLE001  raised again below, on every rank
        outcome = error
    outcomes: list[Any] = [None] * parallel.world_size()
    dist.all_gather_object(outcomes, outcome, group=_group())
    for other in outcomes:
        if isinstance(other, Exception):
            raise other
    return outcomes


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """torch's checkpoint calls as others are: the first rank's own error, no word about a missing process group."""
    try:
        with contextlib.ExitStack() as stack:
            if _alone():
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:  # A BaseException, which no `except Exception` would see.
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def _puna_version() -> str:
    try:
        return importlib.metadata.version("puna")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
