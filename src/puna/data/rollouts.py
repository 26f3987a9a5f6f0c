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

from puna.config import ConfigError, DataError, read_json_object
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

SHAPES = {
    "B T": "tokens",
    "B T-1": "action_mask logprobs reference_logprobs values rewards raw_advantages advantages returns",
    "B": "finished scores bounded combined helpfulness",
    "N": "sampled sampled_logprobs",
    "L V": "logits",
    "L 2": "logits_at",
    "S 2": "alone_at",
    "S": "alone_logprobs alone_rewards",
    "R": "alone_score",
    "P 2": "pass_at",
    "P": "pass_logprobs pass_values pass_entropies",
    "M": "pass_size",
    "U": "update_size update_policy_loss update_value_loss update_clip_fraction update_approximate_kl update_entropy",
    "2 W": "policy_weights",
    "2 C": "critic_weights",
    "D": "reward_head",
    "K": "reference_scores",
}
"""The tensors of a dump by shape. A letter has one size; T is the tokens of the longest row."""

INTEGERS = "tokens sampled logits_at alone_at pass_at pass_size update_size".split()
NUMBERS = "temperature gamma lam beta kl_target kl_horizon clip value_clip score_clip advantage_clip".split()
NUMBERS += "missing_eos_penalty critic_warmup iteration top_p top_k pad_id eos_id lr adam_eps beta_after".split()
"""Tensors of ids, places and counts; facts that are numbers."""


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
    said = read_json_object(facts)
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


def check(dump: Dump) -> None:
    """DataError where tensors disagree about a size, a place lies outside the rollout, or a kind or count is wrong."""
    _check_shapes(dump)
    _check_kinds(dump)
    _check_counts(dump)


def _check_shapes(dump: Dump) -> None:
    """DataError where two tensors disagree about a size, or a place is outside the rollout."""
    missing = [name for name in ("tokens", "action_mask") if name not in dump.tensors]
    if missing:
        raise DataError(f"the dump has no {' and no '.join(missing)}: nothing can be checked without")
    sizes: dict[str, tuple[int, str]] = {}
    for shape, names in SHAPES.items():
        letters = shape.split()
        for name in [name for name in names.split() if name in dump.tensors]:
            x, said = dump.tensors[name], f"expected ({', '.join(letters)})"
            if x.ndim != len(letters):
                raise DataError(f"{name} has {x.ndim} dimensions, {said}")
            for letter, size in zip(letters, x.shape, strict=True):
                letter, size = ("T", size + 1) if letter == "T-1" else (letter, size)
                known, where = sizes.setdefault(letter, (int(letter) if letter.isdigit() else size, name))
                if size != known:
                    raise DataError(f"{name} is {x.shape}, {said} where {letter} is {known} ({where})")
    for name in ("logits_at", "alone_at", "pass_at"):
        at = dump.tensors.get(name, np.zeros((0, 2)))
        if at.size and ((at < 0).any() or (at >= (sizes["B"][0], sizes["T"][0] - 1)).any()):
            raise DataError(f"{name} names places outside the rollout of {sizes['B'][0]} rows")


def _check_kinds(dump: Dump) -> None:
    """DataError where ids, places or counts are no integers, an id is outside the vocabulary, a fact is no number."""
    for name in (name for name in INTEGERS if name in dump.tensors):
        if dump.tensors[name].dtype.kind not in "iu":
            raise DataError(f"{name} is {dump.tensors[name].dtype}: expected integers")
    for name in (name for name in ("tokens", "sampled") if name in dump.tensors and "logits" in dump.tensors):
        ids, size = dump.tensors[name], dump.tensors["logits"].shape[1]
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise DataError(f"{name} has ids outside the vocabulary of {size} (logits)")
    for name in (name for name in NUMBERS if name in dump.facts):
        if isinstance(dump.facts[name], bool) or not isinstance(dump.facts[name], int | float):
            raise DataError(f"rollout.json: {name} is {dump.facts[name]!r}: expected a number")


def _check_counts(dump: Dump) -> None:
    """DataError where there is no pass or no gradient step, a pass of fewer than 0 actions or a step of none."""
    for name, least in (("pass_size", 0), ("update_size", 1)):
        counts = dump.tensors.get(name)
        if counts is not None and (not counts.size or counts.min() < least):
            raise DataError(f"{name} is empty, or has a count below {least}")
