"""Folders that are written whole or not at all (under a temporary name, synced, renamed), and their SHA256SUMS."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from puna.config import DataError
from puna.run_folder import sha256, sync_folder

SUMS = "SHA256SUMS"
"""A line a file, as `sha256sum -c` takes it."""


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


def write_digests(folder: Path, pattern: str) -> None:
    """Write SHA256SUMS of the files that a pattern means."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.glob(pattern))]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_digests(folder: Path) -> dict[str, str]:
    """File name -> sha256; {} without a SHA256SUMS. DataError where it is damaged or names a file elsewhere."""
    path, digests = folder / SUMS, {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if not found:
            raise DataError(f"{path}, line {number}: not a sha256 and the name of a file, as sha256sum writes them")
        name = Path(found[2])
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{path}, line {number}: refused, {found[2]!r} does not lie in its folder")
        digests[str(name)] = found[1].lower()
    return digests


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
