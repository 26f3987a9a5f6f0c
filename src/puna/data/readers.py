"""Readers: a function for each file format that people keep dialogs, comparisons and text in.

`read(paths, format)` gives the records of files: a dict with "messages" for a dialog, a `Preference` for a comparison,
a string for text. The canonical formats are `dialogs`, `prompts` (dialogs with an "id" that end with the user's turn)
and `preferences`, a JSON object a line:

    {"messages": [{"role": "system|user|assistant", "content": "..."}], ...provenance}
    {"prompt": [messages], "chosen": [message], "rejected": [message], "grade": "...",
     "chosen_is_safe": bool|null, "rejected_is_safe": bool|null, "domain": "helpfulness|safety", "batch": n, ...}

A line that cannot be used is reported with its file, number and reason, set aside and counted; a file with more than
1 % of such lines stops the run. A comparison that says nothing (two identical answers, a tie, three annotators who all
differ, an empty answer in a set of models' outputs) is skipped and counted by its reason.
Lines end at U+000A alone, since text may hold U+2028.

A new format is a function of one row (puna.data.rows) or of one path, and its line in READERS.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from puna.config import ConfigError, DataError
from puna.data import rows
from puna.data.rows import BadRow, Row, Skipped
from puna.run_folder import write_atomically
from puna.types import Dialog, Preference, Reader

LARGEST_BAD_SHARE = 0.01
LINES_NAMED = 5  # of a file's bad lines, in the log; the quarantine holds all
LINES_TRIED = 1000  # a file none of whose first lines is good is given up
LONGEST_KEPT = 4000  # characters of a bad line: a folder of the wrong files would fill the memory
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadLine:
    """A line that was set aside. For a .json list or Parquet `line` counts rows, for what a check refused records."""

    file: Path
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class ReadResult:
    """What files held: the records in order, the lines set aside, and how many rows were skipped for which reason."""

    records: list[Any] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def counts(*results: ReadResult) -> dict[str, int]:
    """How many lines could not be used, and how many rows say nothing, by reason: for a stage's marker."""
    skipped = sum((result.skipped for result in results), Counter[str]())
    bad = {"set_aside": sum(len(result.bad) for result in results)}
    return bad | {f"skipped: {reason}": n for reason, n in skipped.items()}


def read(
    paths: Path | Sequence[Path],
    format: str,
    *,
    kind: str | None = None,
    check: Callable[[Any], object] | None = None,
    quarantine: Path | None = None,
) -> ReadResult:
    """The records of all files, in order. Lines set aside are also kept in `quarantine`, a JSONL file.

    `kind`, a key of KINDS, is what the records must be. A record that `check` refuses with a DataError is a bad line.
    Raises ConfigError on an unknown format or one of another kind, on no file or a missing one, DataError where more
    than 1 % of a file's lines (and more than one), or all of them, are bad.
    """
    result, files = ReadResult(), [paths] if isinstance(paths, Path) else paths
    result.records.extend(stream(files, format, result, kind=kind, check=check))
    if quarantine is not None and result.bad:
        keep_bad_lines(result.bad, quarantine)
    return result


def stream(
    files: Sequence[Path],
    format: str,
    result: ReadResult,
    *,
    kind: str | None = None,
    check: Callable[[Any], object] | None = None,
) -> Iterator[Any]:
    """`read`, a record at a time: `result` gets what is set aside or skipped, and no records. Errors come as found."""
    check_files(files, format)

    def sound(record: Any) -> None:
        if kind is not None and not KINDS[kind].holds(record):
            formats = ", ".join(KINDS[kind].formats)
            raise ConfigError(f"format {format!r} does not give {kind}, which are needed here; {formats} do")
        if check is not None:
            check(record)

    for path in files:
        yield from _read_file(path, READERS[format], result, sound)


def check_files(files: Sequence[Path], format: str) -> None:
    """ConfigError on an unknown format, and where there is no file or one is missing."""
    if format not in READERS:
        raise ConfigError(f"unknown data format {format!r}; there are {', '.join(READERS)}")
    if not files:
        raise ConfigError(f"no data file of the format {format!r} is given")
    for path in files:
        if not path.is_file():
            raise ConfigError(f"no such data file: {path}")


def _read_file(path: Path, reader: Reader, result: ReadResult, check: Callable[[Any], object]) -> Iterator[Any]:
    """A file's records; the rest of what a reader yields is sorted into `result`."""
    bad: list[BadLine] = []
    n_good = 0
    try:
        for item in reader(path):
            if n_good == 0 and len(bad) == LINES_TRIED:
                break
            if isinstance(item, BadLine):
                bad.append(replace(item, text=item.text[:LONGEST_KEPT]))
                continue
            try:
                if isinstance(item, Skipped):
                    result.skipped[item.reason] += 1
                else:
                    check(item)
            except DataError as reason:
                bad.append(
                    BadLine(path, n_good + len(bad) + 1, str(reason), json.dumps(to_record(item))[:LONGEST_KEPT])
                )
                continue
            n_good += 1
            if not isinstance(item, Skipped):
                yield item
    except (zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the decompressor's
            raise
        raise DataError(f"{path}: broken {COMPRESSED.get(path.suffix, 'compressed')} file: {error}") from None
    for line in bad[:LINES_NAMED]:
        _warn_once(f"{line}; set aside")
    if len(bad) > LINES_NAMED:
        _warn_once(f"{path}: {len(bad) - LINES_NAMED} more lines set aside")
    if bad and (n_good == 0 or len(bad) > max(1, LARGEST_BAD_SHARE * (n_good + len(bad)))):
        raise DataError(f"{path}: {len(bad)} of {n_good + len(bad)} lines are bad; line {bad[0].line}: {bad[0].reason}")
    result.bad.extend(bad)


@functools.cache
def _warn_once(message: str) -> None:
    """Many stages of a run read the same file."""
    log.warning(message)


def keep_bad_lines(bad: Sequence[BadLine], quarantine: Path) -> None:
    """Adds lines to the quarantine, each once, however often a run is resumed."""
    kept = quarantine.read_text(encoding="utf-8").split("\n")[:-1] if quarantine.exists() else []
    new = [json.dumps({**vars(line), "file": str(line.file)}) for line in bad]
    write_atomically(quarantine, "".join(line + "\n" for line in dict.fromkeys([*kept, *new])))


# Rows of files


def _by_row(parse: Callable[[Row], Iterable[Any]]) -> Reader:
    """A reader of .jsonl (also compressed), .json (a list) and .parquet, of a function from a row to its records."""

    def reader(path: Path) -> Iterator[Any]:
        for number, source in _sources(path):
            try:
                yield from list(parse(_row(source)))
            except BadRow as reason:
                text = source if isinstance(source, bytes) else json.dumps(source, default=str).encode()
                yield BadLine(path, number, str(reason), text.decode("utf-8", "backslashreplace"))

    return reader


def _sources(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and line (bytes), or row number and row."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    elif path.suffix == ".json":
        try:
            listed = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from None
        if not isinstance(listed, list):
            raise DataError(f"{path}: a .json data file is a list of rows; one row a line is .jsonl")
        yield from enumerate(listed, start=1)
    else:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip(b"\n")


def _open(path: Path) -> Any:
    """A file's bytes, decompressed as its name asks."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_pyarrow(path, "zstd").input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _pyarrow(path: Path, what: str) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: {what} needs pyarrow: pip install -e '.[data]' in Puna's folder") from None
    return pyarrow


def _parquet_rows(path: Path) -> Iterator[Row]:
    pyarrow = _pyarrow(path, "Parquet")
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a sound Parquet file: {error}") from None


def _row(source: Any) -> Row:
    """A line as a JSON object of sound text."""
    row = source
    if isinstance(source, bytes):
        try:
            row = json.loads(source.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadRow(f"not UTF-8 at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise BadRow("not JSON: nested too deep") from None
        except ValueError:  # Python's own limit, against numbers that take it minutes
            raise BadRow("a number has too many digits") from None
    if not isinstance(row, dict):
        raise BadRow(f"a {type(row).__name__}, not an object")
    return row


# Files of text


def _whole_text(path: Path) -> Iterator[str | BadLine]:
    """A .txt or .md file (also compressed) as one text."""
    with _open(path) as file:
        data: bytes = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield BadLine(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8", "")
    else:
        if text.strip():
            yield text


def _paragraphs(path: Path) -> Iterator[str | BadLine]:
    """The same, a text a paragraph: what blank lines part. No more than a paragraph is held."""
    held: list[str] = []
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield BadLine(
                    path, number, f"not UTF-8 at byte {error.start}", line.decode("utf-8", "backslashreplace")
                )
                continue
            if text.strip(" \t\r\n"):
                held.append(text)
            elif held:
                yield from _paragraph(held)
    yield from _paragraph(held)


def _paragraph(lines: list[str]) -> Iterator[str]:
    """What lines say together, if it is anything; they are taken out of the list."""
    text = "".join(lines).strip("\n")
    lines.clear()
    if text.strip():
        yield text


READERS: dict[str, Reader] = {
    "dialogs": _by_row(rows.dialog),
    "prompts": _by_row(rows.prompt),
    "preferences": _by_row(rows.preference),
    "text": _whole_text,
    "paragraphs": _paragraphs,
    "jsonl_text": _by_row(rows.jsonl_text),
    "records": _by_row(lambda row: [row]),  # as they are
    "trl": _by_row(rows.trl),
    "hh": _by_row(rows.hh),
    "alpaca": _by_row(rows.alpaca),
    "oasst": _by_row(rows.oasst),
    "oasst_preferences": _by_row(rows.oasst_preferences),
    "pku": _by_row(rows.pku("better_response_id", "helpfulness")),
    "pku_safety": _by_row(rows.pku("safer_response_id", "safety")),
    "pandalm": _by_row(rows.pandalm),
    "llmbar": _by_row(rows.llmbar),
    "autoj": _by_row(rows.autoj),
    "shp": _by_row(rows.shp),
    "webgpt": _by_row(rows.webgpt),
    "alpaca_eval": _by_row(rows.alpaca_eval),
}


class Kind(NamedTuple):
    """What a stage needs: whether a record is that, and which formats give such records."""

    holds: Callable[[Any], bool]
    formats: Sequence[str]


def _holds_messages(record: Any) -> bool:
    return isinstance(record, dict) and "messages" in record


_DIALOGS = ("dialogs", "alpaca", "oasst", "trl")
_JUDGED = ("pandalm", "llmbar", "autoj", "shp", "webgpt", "alpaca_eval")
_COMPARISONS = ("preferences", "hh", "trl", "oasst_preferences", "pku", "pku_safety", *_JUDGED)
KINDS: dict[str, Kind] = {
    "dialogs": Kind(_holds_messages, _DIALOGS),
    "comparisons": Kind(lambda record: isinstance(record, Preference), _COMPARISONS),
    "prompts": Kind(
        lambda record: isinstance(record, Preference) or _holds_messages(record),
        tuple(dict.fromkeys(("prompts", *_DIALOGS, *_COMPARISONS))),
    ),
    "texts": Kind(lambda record: isinstance(record, str), ("jsonl_text", "text", "paragraphs")),
}


# Writing


def to_record(item: Preference | Dialog | Mapping[str, Any]) -> Row:
    """A preference, a dialog, or a row as a canonical JSONL row."""
    if isinstance(item, list):
        return {"messages": item}
    if not isinstance(item, Preference):
        return dict(item)
    row: Row = {
        "prompt": item.prompt,
        "chosen": [{"role": "assistant", "content": item.chosen}],
        "rejected": [{"role": "assistant", "content": item.rejected}],
        "grade": item.grade,
        "chosen_is_safe": item.chosen_is_safe,
        "rejected_is_safe": item.rejected_is_safe,
        "domain": item.domain,
        "batch": item.batch,
    }
    margin = {} if item.margin is None else {"margin": item.margin}
    return {**row, **margin, **item.provenance}


def write_jsonl(path: Path, records: Iterable[Preference | Dialog | Mapping[str, Any]]) -> None:
    """Writes canonical rows, one a line, whole or not at all; compressed where the name ends in .gz."""
    data = "".join(json.dumps(to_record(record), ensure_ascii=False) + "\n" for record in records).encode("utf-8")
    write_atomically(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
