"""A run's ledger: what each step read and wrote, and the sha256 of every artefact, so that a version can be traced.

`ledger.json` holds `artefacts` (name -> sha256; of a model folder that of its weights) and `steps`, in the run's order:
what a step read, by the field of its config, and what it wrote. So a version's entry says which models answered, which
comparisons were new, which reward models scored, and what was trained on; the records of comparisons and samples name
the model behind each by the start of its hash, and a pool's samples their round. What times or places a run, and what
is only kept to resume it, is no artefact: two runs of one recipe have the same hashes wherever they stand.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.run_folder import sha256, write_atomically

FILE = "ledger.json"
NOT_FOLDERS = {"done", "report", "checkpoints", "parts", "best", "data"}
NOT_FILES = {"config.json", "metrics.jsonl", "started.json", "bad_lines.jsonl"}


def write(run: Path) -> dict[str, Any]:
    """Write the ledger of whatever is there of the run, and return it."""
    artefacts = dict(hashes(run))
    told = {"artefacts": artefacts, "steps": [_step(run, name, artefacts) for name in finished(run)]}
    write_atomically(run / FILE, json.dumps(told, indent=1) + "\n")
    return told


def finished(run: Path) -> list[str]:
    """The run's finished steps in the order in which they ended; the report is none."""
    done = [path for path in (run / "done").rglob("*.json") if path.name != "report.json"]
    done.sort(key=lambda path: (path.stat().st_mtime_ns, str(path)))
    return [str(path.relative_to(run / "done").with_suffix("")) for path in done]


def hashes(run: Path) -> Iterator[tuple[str, str]]:
    """Name and sha256 of every artefact: model folders, and files of records and of measurements."""
    for root, folders, files in os.walk(run):
        folders[:] = sorted(name for name in folders if name not in NOT_FOLDERS and not name.startswith("."))
        folder = Path(root)
        paths = [folder / name for name in sorted(files) if name not in NOT_FILES and not name.startswith(".")]
        if any(path.suffix == ".safetensors" for path in paths):
            folders.clear()
            paths = [folder]
        for path in paths:
            if (path == folder or path.suffix in (".json", ".jsonl")) and path != run / FILE:
                yield str(path.relative_to(run)), sha256(path)


def differences(run: Path, other: Path, version: str) -> tuple[int, list[str]]:
    """How many artefacts a version has in either run, and which of them are not the same in both."""
    both = [{name: digest for name, digest in hashes(each) if name.split("/")[0] == version} for each in (run, other)]
    names = sorted(both[0].keys() | both[1].keys())
    return len(names), [name for name in names if both[0].get(name) != both[1].get(name)]


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; {} without the file."""
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return read


def _step(run: Path, name: str, artefacts: dict[str, str]) -> dict[str, Any]:
    """One step: the artefacts that its config names, by field, and those in its folder that are no other step's."""
    settings = _object(run / name / "config.json")
    values = {key: value if isinstance(value, list) else [value] for key, value in settings.items() if key != "out"}
    named = {key: [found for value in each if (found := _within(value, artefacts))] for key, each in values.items()}
    others = [other for other in finished(run) if other.startswith(f"{name}/")]
    wrote = [
        artefact
        for artefact in artefacts
        if artefact.startswith(f"{name}/") and not any(artefact.startswith(f"{other}/") for other in others)
    ]
    records = {artefact: _records(run / artefact) for artefact in wrote if artefact.endswith(".jsonl")}
    told = {"step": name, "read": {key: each for key, each in named.items() if each}, "wrote": wrote}
    pool = f"{name}/pool.jsonl"
    return told | {"records": records} | ({"rounds": _rounds(run / pool)} if pool in wrote else {})


def _within(value: Any, artefacts: dict[str, str]) -> str | None:
    """The artefact that a path in a config means, wherever the run stood when it was written; None for other values."""
    parts = Path(value).parts if isinstance(value, str) else ()
    return next((name for i in range(len(parts)) if (name := "/".join(parts[i:])) in artefacts), None)


def _records(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _rounds(path: Path) -> dict[str, int]:
    """How many of a pool's samples came from which round."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return dict(sorted(Counter(json.loads(line)["round"] for line in lines).items()))
