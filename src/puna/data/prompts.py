"""Prompts for sampling: records `{"id", "messages", "is_safety", ...}`, or the prompts of comparison files."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from puna.config import ConfigError, DataError
from puna.data import readers
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Preference

Prompt = dict[str, Any]

log = logging.getLogger(__name__)


def read_prompts(paths: Sequence[Path], format: str, safety: Sequence[Path] = ()) -> list[Prompt]:
    """Prompt records of files in the format "prompts", or made of the comparisons (or dialogs) of any other format.

    A comparison's prompt counts as a safety prompt where its domain is safety; those of the files in `safety` all do:
    the paper's "prompts tagged in advance". Doubles are left out; a prompt that is a safety prompt in one place is one.
    DataError where two prompts have one id.
    """
    prompts: dict[str, Prompt] = {}
    for files, tagged in ((paths, False), (safety, True)):
        for record in readers.read(files, format, kind="prompts").records if files else ():
            prompt = record if format == "prompts" else _prompt(record)
            first = prompts.setdefault(prompt["id"], prompt)
            if first["messages"] != prompt["messages"]:
                raise DataError(f"{_named(files)}: two prompts have the id {prompt['id']!r}: give each its own")
            if tagged or prompt["is_safety"]:
                prompts[prompt["id"]] = first | {"is_safety": True}
    if not prompts:
        raise DataError(f"{_named((*paths, *safety))}: there is no prompt")
    return list(prompts.values())


def read_tagged(paths: Sequence[Path], format: str, safety: Sequence[Path] = ()) -> list[Prompt]:
    """Those of `read_prompts` that are safety prompts; DataError where none is."""
    tagged = [prompt for prompt in read_prompts(paths, format, safety) if prompt["is_safety"]]
    if not tagged:
        files = _named((*paths, *safety))
        raise DataError(f"{files}: no prompt is a safety prompt: set is_safety, or name their files in safety_prompts")
    return tagged


def fitting(prompts: Sequence[Prompt], tokenizer: Tokenizer, context: int, max_tokens: int = 0) -> list[Prompt]:
    """The prompts that leave room in the model's context, of at most `max_tokens` where that is not 0.

    What the chat format refuses is left out as well, and said. Raises DataError where none is left.
    """
    longest = min(context - 1, max_tokens or context - 1)
    refused: list[str] = []

    def fits(prompt: Prompt) -> bool:
        try:
            return chat.fits(prompt["messages"], tokenizer, longest + 1)
        except DataError as error:
            refused.append(f"prompt {prompt['id']!r}: {error}")
            return False

    fit = [prompt for prompt in prompts if fits(prompt)]
    if refused:
        log.warning("%s; left out%s", refused[0], f", and {len(refused) - 1} more" if len(refused) > 1 else "")
    if not fit:
        raise DataError(
            f"none of {len(prompts)} prompts fits {longest} tokens, the model's context or max_prompt_tokens"
            + (f"; the chat format refuses {len(refused)}" if refused else "")
        )
    return fit


def apart(prompts: Sequence[Prompt], n: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts without n of them, and these, drawn at random so that both kinds are among them; all shuffled.

    Raises ConfigError where either would be empty.
    """
    if not 0 < n < len(prompts):
        raise ConfigError(f"held_out_prompts is {n} of {len(prompts)} prompts: hold out at least one, and leave one")
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[i] for i in order[n:]], [prompts[i] for i in order[:n]]


def _named(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def _prompt(record: Any) -> Prompt:
    if isinstance(record, Preference):
        messages, is_safety = record.prompt, record.domain == "safety"
    else:
        messages, is_safety = record["messages"], bool(record.get("is_safety", False))
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    text = json.dumps(messages, ensure_ascii=False)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], "messages": messages, "is_safety": is_safety}
