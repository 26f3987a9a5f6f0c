"""One iteration of PPO as files: what another program needs to check it (docs/guides/conformance.md has the format).

A dump is a folder of two files: tensors by name (rollout.safetensors or rollout.npz) and facts (rollout.json).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from puna.config import ConfigError, DataError
from puna.run_folder import write_atomically
from puna.types import Tokenizer

SHOWN = 64
"""Actions of a micro-batch whose logits are kept: those of a large vocabulary fill a disk."""


ALONE = 8
"""Rows that are read a second time, without pads."""


SETTINGS = (
    "temperature",
    "gamma",
    "lam",
    "beta",
    "kl",
    "kl_target",
    "kl_horizon",
    "clip",
    "value_clip",
    "whiten",
    "logit_scores",
    "score_clip",
    "advantage_clip",
    "missing_eos_penalty",
    "critic",
    "critic_warmup",
)
"""The fields of PPO's config that a dump states."""


class Dump(NamedTuple):
    """A dump as it was read."""

    tensors: dict[str, npt.NDArray[Any]]
    facts: dict[str, Any]


class Record(Protocol):
    """What the parts of an iteration tell their tensors to."""

    def __call__(self, **tensors: Tensor) -> None:
        """Keep these, or not."""
        ...


def ignore(**tensors: Tensor) -> None:
    """The record of an iteration that is not dumped."""


class Recorder:
    """Keeps copies of all that it is told; what comes under one name more than once is joined."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def __call__(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.parts[name].append(tensor.detach().cpu().clone())

    def write(self, folder: Path, cfg: Any, tokenizer: Tokenizer, **facts: Any) -> None:
        """Write the dump; its facts are some of PPO's settings, the tokenizer's ids and these. Numbers are float32."""
        said = {key: getattr(cfg, key) for key in SETTINGS} | {"lr": cfg.optim.lr, "adam_eps": cfg.optim.eps}
        said |= {"top_p": 1.0, "top_k": 0, "pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id} | facts
        joined = {name: torch.cat(parts) for name, parts in self.parts.items()}
        arrays = {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in joined.items()}
        write_atomically(folder / "rollout.safetensors", safetensors.numpy.save(arrays))
        write_atomically(folder / "rollout.json", json.dumps(said, indent=1) + "\n")


def places(rows: Sequence[int], mask: Tensor) -> Tensor:
    """Row and column of each action, (N, 2): in the rollout, of which the mask (B, T - 1) shows these B rows."""
    at = mask.nonzero()
    return torch.stack((torch.tensor(rows, device=mask.device)[at[:, 0]], at[:, 1]), dim=1)


def read(folder: Path) -> Dump:
    """A dump's tensors and facts. ConfigError where a file is missing, DataError where it is not what it should be."""
    facts = folder / "rollout.json"
    if not facts.is_file():
        raise ConfigError(f"{folder}: no rollout.json: not a dump of a rollout (docs/guides/conformance.md)")
    try:
        said = json.loads(facts.read_bytes())
    except ValueError as error:
        raise DataError(f"{facts}: not JSON: {error}") from error
    if not isinstance(said, dict):
        raise DataError(f"{facts}: not a JSON object")
    return Dump(_tensors(folder), said)


def _tensors(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of whichever of the two files there is."""
    path = next((path for path in map(folder.joinpath, ("rollout.safetensors", "rollout.npz")) if path.is_file()), None)
    if path is None:
        raise ConfigError(f"{folder}: neither rollout.safetensors nor rollout.npz")
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array without a name")
            return dict(file)
    except (safetensors.SafetensorError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged, or not tensors alone: {error}") from error
