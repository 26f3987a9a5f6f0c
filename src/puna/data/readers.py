"""Readers: a function for each file format that people keep dialogs, comparisons and text in.

`read(paths, format)` gives the records of files: a dict with "messages" for a dialog, a `Preference` for a comparison,
a string for text. The canonical formats are `dialogs`, `prompts` (dialogs with an "id" that end with the user's turn)
and `preferences`, a JSON object a line:

    {"messages": [{"role": "system|user|assistant", "content": "..."}], ...provenance}
    {"prompt": [messages], "chosen": [message], "rejected": [message], "grade": "...",
     "chosen_is_safe": bool|null, "rejected_is_safe": bool|null, "domain": "helpfulness|safety", "batch": n, ...}

A line that cannot be used is reported with its file, number and reason, set aside and counted; a file with more than
1 % of such lines stops the run. A comparison of two identical answers says nothing: it is skipped and counted.
Lines end at U+000A alone, since text may hold U+2028.

A new format is a function of one row, or of one path, and its line in READERS.
"""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

from puna.config import ConfigError, DataError
from puna.run_folder import write_atomically
from puna.types import GRADES, Dialog, Domain, Message, Preference, Reader, Role

LARGEST_BAD_SHARE = 0.01
LINES_NAMED = 5  # of a file's bad lines, in the log; the quarantine holds all

log = logging.getLogger(__name__)

Row = dict[str, Any]


class _BadRow(Exception):
    """A row that cannot be used, with the reason."""


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
class Skipped:
    """A sound row that says nothing, with the reason."""

    reason: str


@dataclass(frozen=True)
class ReadResult:
    """What files held: the records in order, the lines set aside, and how many rows were skipped for which reason."""

    records: list[Any] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


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
    if format not in READERS:
        raise ConfigError(f"unknown data format {format!r}; there are {', '.join(READERS)}")

    def sound(record: Any) -> None:
        if kind is not None and not KINDS[kind].holds(record):
            formats = ", ".join(KINDS[kind].formats)
            raise ConfigError(f"format {format!r} does not give {kind}, which are needed here; {formats} do")
        if check is not None:
            check(record)

    result, files = ReadResult(), [paths] if isinstance(paths, Path) else paths
    if not files:
        raise ConfigError(f"no data file of the format {format!r} is given")
    for path in files:
        if not path.is_file():
            raise ConfigError(f"no such data file: {path}")
        _read_file(path, READERS[format], result, sound)
    if quarantine is not None and result.bad:
        _keep(result.bad, quarantine)
    return result


def _read_file(path: Path, reader: Reader, result: ReadResult, check: Callable[[Any], object]) -> None:
    """Sorts what a reader yields into `result`."""
    bad, n_good = [], 0
    try:
        for item in reader(path):
            if isinstance(item, BadLine):
                bad.append(item)
                continue
            try:
                if isinstance(item, Skipped):
                    result.skipped[item.reason] += 1
                else:
                    check(item)
                    result.records.append(item)
                n_good += 1
            except DataError as reason:
                bad.append(BadLine(path, n_good + len(bad) + 1, str(reason), json.dumps(to_record(item))))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: broken gzip file: {error}") from None
    for line in bad[:LINES_NAMED]:
        log.warning("%s; set aside", line)
    if len(bad) > LINES_NAMED:
        log.warning("%s: %d more lines set aside", path, len(bad) - LINES_NAMED)
    if bad and (n_good == 0 or len(bad) > max(1, LARGEST_BAD_SHARE * (n_good + len(bad)))):
        raise DataError(f"{path}: {len(bad)} of {n_good + len(bad)} lines are bad; line {bad[0].line}: {bad[0].reason}")
    result.bad.extend(bad)


def _keep(bad: Sequence[BadLine], quarantine: Path) -> None:
    """Adds lines to the quarantine, each once, however often a run is resumed."""
    kept = quarantine.read_text(encoding="utf-8").split("\n")[:-1] if quarantine.exists() else []
    new = [json.dumps({**vars(line), "file": str(line.file)}) for line in bad]
    write_atomically(quarantine, "".join(line + "\n" for line in dict.fromkeys([*kept, *new])))


# Rows of files


def _by_row(parse: Callable[[Row], Iterable[Any]]) -> Reader:
    """A reader of .jsonl, .jsonl.gz, .json (a list) and .parquet, of a function from a row to its records."""

    def reader(path: Path) -> Iterator[Any]:
        for number, source in _sources(path):
            try:
                yield from list(parse(_row(source)))
            except _BadRow as reason:
                text = source if isinstance(source, bytes) else json.dumps(source, default=str).encode()
                yield BadLine(path, number, str(reason), text.decode("utf-8", "backslashreplace"))

    return reader


def _sources(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and line (bytes), or row number and row."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise DataError(f"{path}: a .json data file is a list of rows; one row a line is .jsonl")
        yield from enumerate(rows, start=1)
    else:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip(b"\n")


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: Parquet needs pyarrow: pip install 'puna[data]'") from None
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _row(source: Any) -> Row:
    """A line as a JSON object of sound text."""
    row = source
    if isinstance(source, bytes):
        try:
            row = json.loads(source.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _BadRow(f"not UTF-8 at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise _BadRow(f"not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise _BadRow("not JSON: nested too deep") from None
    if not isinstance(row, dict):
        raise _BadRow(f"a {type(row).__name__}, not an object")
    return row


# Parts of rows


def _text(row: Mapping[str, Any], key: str) -> str:
    """A row's text, which must be there, hold something and be writable as UTF-8."""
    value = row.get(key)
    if not isinstance(value, str):
        raise _BadRow(f"{key!r} is missing" if value is None else f"{key!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise _BadRow(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow(f"{key!r} holds a lone surrogate") from None
    return value


def _choice(row: Mapping[str, Any], key: str, choices: Sequence[str], default: str | None) -> Any:
    """A row's word out of `choices`."""
    value = row.get(key)
    if value is None:
        return default
    if value not in choices:
        raise _BadRow(f"{key!r} is {value!r}, not one of {', '.join(choices)}")
    return value


def _of_type(row: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """A row's value of one of the exact types, or None."""
    value = row.get(key)
    if value is not None and type(value) not in kinds:
        raise _BadRow(f"{key!r} is {value!r}, not a {kinds[0].__name__}")
    return value


def _messages(row: Mapping[str, Any], key: str) -> Dialog:
    """A row's list of messages: perhaps a system message, then user and assistant by turns."""
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        raise _BadRow(f"{key!r} is missing or holds no messages")
    return _alternating([_message(message, f"{key}[{i}]") for i, message in enumerate(messages)])


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in get_args(Role):
        raise _BadRow(f"{name} has no role out of {', '.join(get_args(Role))}")
    try:
        return {"role": message["role"], "content": _text(message, "content")}
    except _BadRow as reason:
        raise _BadRow(f"{name}: {reason}") from None


def _alternating(dialog: Dialog) -> Dialog:
    turns = dialog[1:] if dialog[0]["role"] == "system" else dialog
    roles = [turn["role"] for turn in turns]
    if not roles or roles != list(itertools.islice(itertools.cycle(("user", "assistant")), len(roles))):
        raise _BadRow("the turns do not go user, assistant, user, ...")
    return dialog


def _answer(row: Mapping[str, Any], key: str) -> str:
    """A row's single answer: text, or a list of one assistant message."""
    value = row.get(key)
    if not isinstance(value, list):
        return _text(row, key)
    if len(value) != 1 or (message := _message(value[0], f"{key}[0]"))["role"] != "assistant":
        raise _BadRow(f"{key!r} is not one assistant message")
    return message["content"]


def _ends_with_user(prompt: Dialog) -> Dialog:
    if prompt[-1]["role"] != "user":
        raise _BadRow("the prompt does not end with the user's turn")
    return prompt


def _split_pair(chosen: Dialog, rejected: Dialog) -> tuple[Dialog, str, str]:
    """Two whole dialogues as their common prompt and the two answers."""
    if chosen[:-1] != rejected[:-1]:
        raise _BadRow("the two dialogues differ before the last turn")
    if not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        raise _BadRow("a dialogue does not end with the assistant's turn")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _compared(preference: Preference) -> Preference | Skipped:
    return Skipped("identical answers") if preference.chosen == preference.rejected else preference


# Formats, a row at a time


def _dialog(row: Row) -> Iterator[Row]:
    yield {**row, "messages": _messages(row, "messages")}


def _prompt(row: Row) -> Iterator[Row]:
    yield {**row, "id": _text(row, "id"), "messages": _ends_with_user(_messages(row, "messages"))}


def _preference(row: Row) -> Iterator[Preference | Skipped]:
    known = set(Preference.__dataclass_fields__) - {"provenance"}
    yield _compared(
        Preference(
            prompt=_ends_with_user(_messages(row, "prompt")),
            chosen=_answer(row, "chosen"),
            rejected=_answer(row, "rejected"),
            grade=_choice(row, "grade", GRADES, None),
            margin=_of_type(row, "margin", float, int),
            chosen_is_safe=_of_type(row, "chosen_is_safe", bool),
            rejected_is_safe=_of_type(row, "rejected_is_safe", bool),
            domain=_choice(row, "domain", get_args(Domain), "helpfulness"),
            batch=_of_type(row, "batch", int) or 0,
            provenance={key: value for key, value in row.items() if key not in known},
        )
    )


def _trl(row: Row) -> Iterator[Row | Preference | Skipped]:
    """TRL and Hugging Face rows: messages; prompt, chosen, rejected; or two whole dialogues."""
    if "messages" in row:
        yield from _dialog(row)
    elif "prompt" not in row:
        prompt, chosen, rejected = _split_pair(_messages(row, "chosen"), _messages(row, "rejected"))
        yield from _preference({**row, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    elif isinstance(row["prompt"], str):
        yield from _preference({**row, "prompt": [{"role": "user", "content": row["prompt"]}]})
    else:
        yield from _preference(row)


def _jsonl_text(row: Row) -> Iterator[str]:
    yield _text(row, "text")


def _alpaca(row: Row) -> Iterator[Row]:
    instruction, answer = _text(row, "instruction"), _text(row, "output")
    prompt = f"{instruction}\n\n{_text(row, 'input')}" if row.get("input") else instruction
    yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _hh(row: Row) -> Iterator[Preference | Skipped]:
    """Anthropic's helpful and harmless pairs: two whole dialogues that share all but the last turn."""
    yield _compared(Preference(*_split_pair(_hh_dialog(row, "chosen"), _hh_dialog(row, "rejected"))))


def _hh_dialog(row: Row, key: str) -> Dialog:
    """One dialogue. A speaker named twice in a row goes on with the same turn."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", _text(row, key))
    if before.strip() or not parts:
        raise _BadRow(f"{key!r} does not begin with a Human's turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = itertools.groupby(zip(parts[::2], parts[1::2], strict=True), key=lambda part: part[0])
    messages = [{"role": roles[who], "content": "\n\n".join(text.strip() for _, text in turn)} for who, turn in turns]
    return _messages({key: messages}, key)


def _oasst(row: Row) -> Iterator[Row | Skipped]:
    """An OpenAssistant tree's dialog along the best-ranked replies."""
    dialog: Dialog = []
    node: Row | None = row.get("prompt")
    while node:
        dialog.append(_oasst_message(node))
        node = next(iter(_oasst_replies(node)), None)
    if dialog and dialog[-1]["role"] == "user":
        dialog.pop()
    if not dialog:
        yield Skipped("no answer in the tree")
    else:
        yield {"messages": _alternating(dialog), "id": row.get("message_tree_id")}


def _oasst_preferences(row: Row) -> Iterator[Preference | Skipped]:
    """Every pair of ranked answers to one turn of an OpenAssistant tree, the better-ranked one preferred."""
    pending: list[tuple[Dialog, Row]] = [([], row.get("prompt") or {})]
    while pending:
        above, node = pending.pop()
        dialog = _alternating([*above, _oasst_message(node)])
        replies = _oasst_replies(node)
        if dialog[-1]["role"] == "user":
            ranked = [reply for reply in replies if reply.get("rank") is not None]
            for better, worse in itertools.combinations(ranked, 2):
                if better["rank"] < worse["rank"]:
                    yield _compared(Preference(dialog, _text(better, "text"), _text(worse, "text")))
        pending += [(dialog, reply) for reply in replies]


def _oasst_message(node: Row) -> Message:
    roles: dict[Any, Role] = {"prompter": "user", "assistant": "assistant"}
    if node.get("role") not in roles:
        raise _BadRow("a node has no role out of prompter, assistant")
    return {"role": roles[node["role"]], "content": _text(node, "text")}


def _oasst_replies(node: Row) -> list[Row]:
    """A node's replies that were neither deleted nor failed review, the best-ranked first and the unranked last."""
    replies = [
        reply
        for reply in node.get("replies") or []
        if not reply.get("deleted") and reply.get("review_result") is not False
    ]
    return sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))


def _pku(id_key: str, domain: Domain) -> Callable[[Row], Iterator[Preference | Skipped]]:
    """PKU-SafeRLHF: two answers, which is better, which is safer, and whether each is safe."""

    def parse(row: Row) -> Iterator[Preference | Skipped]:
        chosen = _of_type(row, id_key, int)
        if chosen not in (0, 1):
            raise _BadRow(f"{id_key!r} is {chosen!r}, neither 0 nor 1")
        rejected = 1 - chosen
        yield _compared(
            Preference(
                prompt=[{"role": "user", "content": _text(row, "prompt")}],
                chosen=_text(row, f"response_{chosen}"),
                rejected=_text(row, f"response_{rejected}"),
                chosen_is_safe=_of_type(row, f"is_response_{chosen}_safe", bool),
                rejected_is_safe=_of_type(row, f"is_response_{rejected}_safe", bool),
                domain=domain,
            )
        )

    return parse


# Formats, a file at a time


def _whole_text(path: Path) -> Iterator[str | BadLine]:
    """A .txt or .md (or .gz) file as one text."""
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
    """The same, a text a paragraph: what blank lines part."""
    for text in _whole_text(path):
        if isinstance(text, BadLine):
            yield text
        else:
            yield from (paragraph.strip("\n") for paragraph in re.split(r"\n[ \t\r]*\n", text) if paragraph.strip())


READERS: dict[str, Reader] = {
    "dialogs": _by_row(_dialog),
    "prompts": _by_row(_prompt),
    "preferences": _by_row(_preference),
    "text": _whole_text,
    "paragraphs": _paragraphs,
    "jsonl_text": _by_row(_jsonl_text),
    "records": _by_row(lambda row: [row]),  # as they are
    "trl": _by_row(_trl),
    "hh": _by_row(_hh),
    "alpaca": _by_row(_alpaca),
    "oasst": _by_row(_oasst),
    "oasst_preferences": _by_row(_oasst_preferences),
    "pku": _by_row(_pku("better_response_id", "helpfulness")),
    "pku_safety": _by_row(_pku("safer_response_id", "safety")),
}


class Kind(NamedTuple):
    """What a stage needs: whether a record is that, and which formats give such records."""

    holds: Callable[[Any], bool]
    formats: Sequence[str]


def _holds_messages(record: Any) -> bool:
    return isinstance(record, dict) and "messages" in record


_DIALOGS = ("dialogs", "alpaca", "oasst", "trl")
_COMPARISONS = ("preferences", "hh", "trl", "oasst_preferences", "pku", "pku_safety")
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
