"""Held-out measurements of a policy in training: answers for later judges, their mean reward, the best policy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna import losses
from puna.formats import huggingface
from puna.model.transformer import Transformer
from puna.run_folder import write_atomically
from puna.text.tokenizer import Tokenizer
from puna.types import Completion


class Best(NamedTuple):
    """The best held-out measurement so far."""

    iteration: int = 0
    reward: float = -math.inf

    def or_this(
        self, iteration: int, reward: float, policy: Transformer, tokenizer: Tokenizer, folder: Path, **provenance: Any
    ) -> Best:
        """This measurement, its policy saved, where it is better; itself otherwise, and where that is no number."""
        if not reward > self.reward:
            return self
        provenance["iteration"] = iteration
        huggingface.save_model(policy, tokenizer, kept_policy(folder, iteration), provenance=provenance)
        return Best(iteration, reward)


def kept_policy(folder: Path, iteration: int) -> Path:
    """Where the policy of a measurement that was the best is kept: a killed run may need the one before it."""
    return folder / "best" / f"{iteration:04d}"


def measured(
    prompts: Sequence[dict[str, Any]], completions: Sequence[Completion], rewards: Tensor, penalty: float, path: Path
) -> float:
    """The mean logit of rewards (P,), less the penalty where EOS is missing; the answers are written to `path`."""
    lines = [
        {"prompt_id": prompt["id"], "answer": completion.text, "finished": completion.finished, "reward": reward}
        for prompt, completion, reward in zip(prompts, completions, rewards.tolist(), strict=True)
    ]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    finished = torch.tensor([completion.finished for completion in completions])
    return float((losses.logit(rewards) - penalty * ~finished).mean())
