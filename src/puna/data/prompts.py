"""Prompts for sampling: records `{"id", "messages", "is_safety", ...}`, or the prompts of comparison files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.data import readers
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Preference

Prompt = dict[str, Any]


def read_prompts(paths: Sequence[Path], format: str, safety: Sequence[Path] = ()) -> list[Prompt]:
    """Prompt records of files in the format "prompts", or made of the comparisons (or dialogs) of any other format.

    A comparison's prompt counts as a safety prompt where its domain is safety; those of the files in `safety` all do:
    the paper's "prompts tagged in advance". Doubles are left out.
    """
    prompts: dict[str, Prompt] = {}
    for files, tagged in ((paths, False), (safety, True)):
        for record in readers.read(files, format).records:
            prompt = {"is_safety": False} | record if format == "prompts" else _prompt(record)
            if tagged:
                prompts[prompt["id"]] = prompt | {"is_safety": True}
            prompts.setdefault(prompt["id"], prompt)
    return list(prompts.values())


def fitting(prompts: Sequence[Prompt], tokenizer: Tokenizer, max_tokens: int) -> list[Prompt]:
    """The prompts of at most so many tokens; all of them where max_tokens is 0."""
    if not max_tokens:
        return list(prompts)
    return [p for p in prompts if len(chat.encode_prompt(p["messages"], tokenizer)) <= max_tokens]


def _prompt(record: Any) -> Prompt:
    if isinstance(record, Preference):
        messages, is_safety = record.prompt, record.domain == "safety"
    else:
        messages, is_safety = record["messages"], bool(record.get("is_safety", False))
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    text = json.dumps(messages, ensure_ascii=False)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], "messages": messages, "is_safety": is_safety}
