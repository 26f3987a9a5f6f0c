"""Puna raises a chat model the Llama 2 way. `puna.load(path)` opens what a run made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.api import Chat, RewardScorer

__version__ = "0.1.0"


def load(path: str | Path) -> Chat | RewardScorer:
    """A chat model or a reward model from a run folder, a model folder or a GGUF file; see `puna.api.load`."""
    from puna import api  # torch takes a second to import, which `puna --help` need not spend

    return api.load(path)
