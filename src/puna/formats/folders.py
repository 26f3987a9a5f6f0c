"""Folders that are written whole or not at all: under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from puna.run_folder import sync_folder


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill; it gets the name of `folder` when all went well, in place of an older one."""
    _tidy(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        _tidy(folder)


def standing(folder: Path) -> Path:
    """Where the folder's files are: in itself, or, should a save have been killed between its two renames, aside."""
    return folder if folder.exists() else next(iter(_leftovers(folder, "old")), folder)


def _tidy(folder: Path) -> None:
    """After a save, finished or killed: an older folder that has lost its name gets it back, the rest is removed."""
    for old in _leftovers(folder, "old"):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)
    for temporary in _leftovers(folder, "tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def _leftovers(folder: Path, what: str) -> list[Path]:
    return sorted(folder.parent.glob(f".{glob.escape(folder.name)}.{what}-*"))
