"""Prompts for sampling: records `{"id", "messages", "is_safety", ...}`, or the prompts of comparison files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.data import readers
from puna.types import Preference

Prompt = dict[str, Any]


def read_prompts(paths: Sequence[Path], format: str, limit: int = 0) -> list[Prompt]:
    """Prompt records of files in the format "prompts", or made of the comparisons (or dialogs) of any other format.

    A comparison's prompt counts as a safety prompt where its domain is safety. Doubles are left out.
    """
    prompts: dict[str, Prompt] = {}
    for record in readers.read(paths, format).records:
        prompt = record if format == "prompts" else _prompt(record)
        prompts.setdefault(prompt["id"], prompt)
        if limit and len(prompts) == limit:
            break
    return list(prompts.values())


def _prompt(record: Any) -> Prompt:
    if isinstance(record, Preference):
        messages, is_safety = record.prompt, record.domain == "safety"
    else:
        messages, is_safety = record["messages"], bool(record.get("is_safety", False))
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    text = json.dumps(messages, ensure_ascii=False)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], "messages": messages, "is_safety": is_safety}
