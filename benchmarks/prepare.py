"""Preparing text, `puna data prepare` on all cores beside a loop over SentencePiece's encode.

    python benchmarks/prepare.py TEXT.jsonl.gz ... --tokenizer tokenizer.model [--rounds 5] [--workers 0]

All contenders take turns, a process each, so that what else the machine does falls on each; numbers are medians over
the rounds, MB of UTF-8 text a second of wall time, start of the process included. Every contender reads the files and
writes the tokens with BOS and EOS as uint16 to a disk, and the tokens of all are compared.

The loop is what most scripts do: a text after the other through `encode`. The second loop encodes lines, which is
faster, for SentencePiece's time a character grows with a text's length, but gives other tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from puna.data import readers
from puna.text import tokenizer as tokenizers


def texts(files: Sequence[Path]) -> Iterator[str]:
    """The texts, as `puna data prepare` reads them."""
    for file in files:
        format = "jsonl_text" if ".jsonl" in file.suffixes else "paragraphs"
        yield from readers.stream([file], format, readers.ReadResult(), kind="texts")


def loop(files: Sequence[Path], tokenizer: Path, out: Path, *, lines: bool) -> None:
    """One process, a text (or a line of it) after the other."""
    model = tokenizers.load(tokenizer)
    with out.open("wb") as file:
        for text in texts(files):
            parts = text.split("\n") if lines else [text]
            ids = [i for part in parts for i in model.encode(part)]
            file.write(np.array([model.bos_id, *ids, model.eos_id], np.uint16).tobytes())
        file.flush()
        os.fsync(file.fileno())


def recipe(files: Sequence[Path], tokenizer: Path, out: Path) -> Path:
    """A recipe of these files, nothing held out, so that the tokens are in the loop's order."""
    text = f'[prepare]\ntokenizer = "{tokenizer.absolute()}"\nvalidation_share = 0.0\n'
    for i, file in enumerate(files):
        format = "jsonl_text" if ".jsonl" in file.suffixes else "paragraphs"
        text += f'[prepare.sources.source{i}]\npaths = ["{file.absolute()}"]\nformat = "{format}"\n'
    out.write_text(text)
    return out


def digest(path: Path) -> str:
    """sha256 of a file's tokens, or of all of a prepared folder's in order."""
    whole = hashlib.sha256()
    for file in sorted(path.glob("train/*.tokens")) if path.is_dir() else [path]:
        whole.update(file.read_bytes())
    return whole.hexdigest()


def seconds(command: Sequence[str | Path]) -> float:
    """Wall time of a process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure, or be one of the loops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--loop", choices=["texts", "lines"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.loop:
        loop(settings.texts, settings.tokenizer, settings.out, lines=settings.loop == "lines")
        return
    megabytes = sum(len(text.encode()) for text in texts(settings.texts)) / 1e6
    workers = settings.workers or len(os.sched_getaffinity(0))
    script = [sys.executable, __file__, *settings.texts, "--tokenizer", settings.tokenizer]
    times: dict[str, list[float]] = {}
    tokens: dict[str, str] = {}
    for turn in range(settings.rounds):
        with tempfile.TemporaryDirectory() as folder:
            table = recipe(settings.texts, settings.tokenizer, Path(folder) / "recipe.toml")
            prepare = [sys.executable, "-m", "puna", "data", "prepare", table, "--workers"]
            contenders = {
                "loop over texts": [*script, "--loop", "texts"],
                "loop over lines": [*script, "--loop", "lines"],
                "puna, 1 worker": [*prepare, "1"],
                f"puna, {workers} workers": [*prepare, str(workers)],
            }
            for name, command in contenders.items():
                out = Path(folder) / name
                times.setdefault(name, []).append(seconds([*command, "--out", out]))
                tokens[name] = digest(out)
        print(f"round {turn + 1} of {settings.rounds}", flush=True)
    first = next(iter(tokens))
    print(f"\n{megabytes:.1f} MB of text\n\n{'':20}{'MB/s':>8}{'(range)':>16}{'times':>8}{'same tokens':>14}")
    for name, each in times.items():
        speeds = sorted(megabytes / t for t in each)
        ratio = statistics.median(times[first]) / statistics.median(each)
        spread = f"({speeds[0]:.1f}-{speeds[-1]:.1f})"
        same = "yes" if tokens[name] == tokens[first] else "no"
        print(f"{name:20}{statistics.median(speeds):8.1f}{spread:>16}{ratio:8.1f}{same:>14}")


if __name__ == "__main__":
    main()
