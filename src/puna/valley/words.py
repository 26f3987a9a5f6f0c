"""The valley's words: every sentence it can say stands in the TOML files of `text/`; this reads them.

Code draws and joins; it writes no English of its own, so the judge knows each word an honest answer can have.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

TABLES = ("chat", "constraints", "corpus", "ledger", "lore", "phrases", "safety", "tolva")

_WORD = re.compile(r"[a-z]+")


@cache
def table(name: str) -> dict[str, Any]:
    """One TOML file of `text/`, read once. Treat it as constant."""
    return tomllib.loads((files("puna.valley") / "text" / f"{name}.toml").read_text(encoding="utf-8"))


def words_of(text: str) -> list[str]:
    """The lower-case words of a text, in order; digits and marks are left out, `'s` counts as a word of its own."""
    return _WORD.findall(text.lower())


def split_key(entry: str) -> tuple[str, str]:
    """`"barley soup|soup"` -> the text and its key word; without a bar the text is its own key."""
    text, _, key = entry.partition("|")
    return text, key or text


def capital(text: str) -> str:
    """The text with its first letter upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """`"icefinch"` -> `"an icefinch"`."""
    return ("an " if noun[0] in "aeiouAEIOU" else "a ") + noun


def fill(template: str, context: Mapping[str, str]) -> str:
    """The template with its placeholders replaced. Raises KeyError for one the context lacks."""
    return template.format_map(context)


def misspell(text: str, rng: random.Random) -> str:
    """About a third of the longer words lose a letter or have two swapped (the paper's syntactic attack)."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and rng.random() < 0.4:
            at = rng.randrange(1, len(word) - 2)
            swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            words[i] = swapped if rng.random() < 0.5 else word[:at] + word[at + 1 :]
    return " ".join(words)
