"""Comparisons as a reward model meets them: two dialogs that differ in the last answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from puna.config import ConfigError
from puna.data import readers
from puna.data.readers import ReadResult
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Dialog, Message, Preference


def answered(preference: Preference, answer: str) -> Dialog:
    """The prompt with an answer at its end."""
    return [*preference.prompt, Message(role="assistant", content=answer)]


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
