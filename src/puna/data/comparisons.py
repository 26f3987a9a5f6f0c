"""Comparisons as a reward model meets them: two dialogs that differ in the last answer."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from puna.config import ConfigError
from puna.data import readers
from puna.data.readers import ReadResult
from puna.data.rows import Row
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Dialog, Preference

T = TypeVar("T")

HELD_OUT = 0.1
"""The share of prompts that is held out where no test files are given."""


def answered(preference: Preference, answer: str) -> Dialog:
    """The prompt with an answer at its end."""
    return chat.with_answer(preference.prompt, answer)


def tokens(preference: Preference, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of prompt and chosen answer, and of prompt and rejected answer. Raises DataError as `chat.encode`."""
    chosen, rejected = (
        chat.encode(answered(preference, answer), tokenizer).tokens
        for answer in (preference.chosen, preference.rejected)
    )
    return chosen, rejected


def check(preference: Preference, tokenizer: Tokenizer) -> None:
    """Raise DataError where the chat format refuses one of the two dialogs."""
    for answer in (preference.chosen, preference.rejected):
        chat.check(answered(preference, answer), tokenizer, ends_with="assistant")


def rewards_harm(preference: Preference) -> bool:
    """Whether a safety comparison prefers an unsafe answer to a safe one: the paper trains on none (3.2.1)."""
    unsafe_won = preference.chosen_is_safe is False and preference.rejected_is_safe is True
    return preference.domain == "safety" and unsafe_won


def read(files: Sequence[Path], format: str, tokenizer: Tokenizer, out: Path) -> ReadResult:
    """The comparisons of files; what cannot be used, or the chat format refuses, is set aside in the folder `out`.

    Errors as in `readers.read`.
    """
    sound = functools.partial(check, tokenizer=tokenizer)
    return readers.read(files, format, kind="comparisons", check=sound, quarantine=out / "bad_lines.jsonl")


def read_apart(
    data: Sequence[Path], test: Sequence[Path], format: str, tokenizer: Tokenizer, out: Path
) -> tuple[list[Preference], list[Preference], list[ReadResult]]:
    """The comparisons to train on, those to measure on, and what was read; without test files the second are those of a
    HELD_OUT share of the prompts of `data`. Else as `read`.
    """
    own = read(data, format, tokenizer, out)
    if not test:
        return *split(own.records, HELD_OUT, operator.attrgetter("prompt")), [own]
    apart = read(test, format, tokenizer, out)
    return own.records, apart.records, [own, apart]


def split(records: Sequence[T], share: float, prompt: Callable[[T], Dialog]) -> tuple[list[T], list[T]]:
    """Those to train on, and those of a share of the prompts, held out: by a prompt's text alone, so that what is
    measured on in one round or file is trained on in none. None is held out where that would leave none.
    """
    train: list[T] = []
    test: list[T] = []
    for record in records:
        text = json.dumps([[message["role"], message["content"]] for message in prompt(record)])
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        (test if place < share * 2**64 else train).append(record)
    return (train, test) if train else (test, [])


def write(folder: Path, name: str, rows: Sequence[Row], share: float) -> None:
    """`split`, as NAME.jsonl and NAME_test.jsonl."""
    for file, part in zip((name, f"{name}_test"), split(rows, share, operator.itemgetter("prompt")), strict=True):
        readers.write_jsonl(folder / f"{file}.jsonl", part)


def read_each(
    files: Sequence[Path],
    formats: Sequence[str],
    check: Callable[[Preference], object] | None = None,
    quarantine: Path | None = None,
) -> list[ReadResult]:
    """What each file holds, `formats` being one for all files or one for each; else a ConfigError.

    `check`, `quarantine` and other errors as in `readers.read`.
    """
    if len(formats) not in (1, len(files)):
        raise ConfigError(f"{len(formats)} formats for {len(files)} files: give one for all, or one for each in order")
    each = formats if len(formats) > 1 else [*formats] * len(files)
    return [
        readers.read(file, format, kind="comparisons", check=check, quarantine=quarantine)
        for file, format in zip(files, each, strict=True)
    ]


def names(files: Sequence[Path]) -> list[str]:
    """What to call each file: its name without endings, its whole path where two are alike.

    Raises ConfigError where one is given twice.
    """
    if len({file.resolve() for file in files}) < len(files):
        raise ConfigError(f"a file is given twice: {', '.join(map(str, files))}")
    short = [file.name.removesuffix(".gz").rpartition(".")[0] or file.name for file in files]
    return [name if short.count(name) == 1 else str(file) for file, name in zip(files, short, strict=True)]
