"""Held-out measurements of a policy in training: answers for later judges, their mean score, the best policy."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna import checkpoint, parallel
from puna.config import DataError
from puna.formats import folders, huggingface
from puna.model.transformer import Transformer
from puna.run_folder import RunFolder, write_atomically
from puna.text.tokenizer import Tokenizer
from puna.types import Completion


class Best(NamedTuple):
    """The best held-out measurement so far."""

    iteration: int = 0
    reward: float = -math.inf


def policy_path(folder: Path, iteration: int) -> Path:
    """Where the policy of a measurement that was the best is kept: a killed run may need the one before it."""
    return folder / "best" / f"{iteration:04d}"


def save_answers(
    prompts: Sequence[dict[str, Any]], completions: Sequence[Completion], rewards: Tensor, path: Path
) -> None:
    """Write the answers to P prompts and their rewards (P,), a line each, for later judges; of all ranks one does."""
    if not parallel.is_main():
        return
    lines = [
        {"prompt_id": prompt["id"], "answer": completion.text, "finished": completion.finished, "reward": reward}
        for prompt, completion, reward in zip(prompts, completions, rewards.tolist(), strict=True)
    ]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def save_policy(
    policy: Transformer, tokenizer: Tokenizer, folder: Path, iteration: int, provenance: dict[str, Any]
) -> None:
    """Save the policy of a measurement that is the best so far; all ranks call this.

    Earlier ones stay as far as a run that is killed may go back to them: to its oldest checkpoint.
    """
    path = policy_path(folder, iteration)
    huggingface.save_model(policy, tokenizer, path, provenance=provenance | {"iteration": iteration})
    if parallel.is_main():
        oldest = min(checkpoint.steps(folder / "checkpoints"), default=0)
        known = sorted(best for best in path.parent.glob("[0-9]*") if int(best.name) < oldest)
        for surpassed in known[:-1]:
            shutil.rmtree(surpassed)


def mean_score(scores: Tensor, completions: Sequence[Completion], penalty: float) -> float:
    """The mean of scores (P,), of which a penalty is subtracted where EOS is missing."""
    finished = torch.tensor([completion.finished for completion in completions])
    return float((scores - penalty * ~finished).mean())


def publish(folder: RunFolder, stage: str, best: Best, *, left_out: int) -> None:
    """Make the best policy the stage's model and mark the stage done; of all ranks one does, and all wait for it.

    DataError where no measurement gave a number.
    """
    if best.reward == -math.inf:
        raise DataError("no held-out measurement gave a number: the reward models' scores are not finite")
    if parallel.is_main():
        with folders.replacing(folder.path / "model") as model:
            shutil.copytree(policy_path(folder.path, best.iteration), model, dirs_exist_ok=True)
        folder.mark_done(stage, best_iteration=best.iteration, held_out_reward=best.reward, left_out=left_out)
        shutil.rmtree(folder.path / "best")
    parallel.barrier()
