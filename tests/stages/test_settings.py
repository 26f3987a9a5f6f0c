"""What stages refuse before they begin."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest

from puna.config import ConfigError
from puna.stages import collect, context_distillation, ghost_attention, pretrain, rejection_sampling, reward, sample
from puna.valley import write


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (rejection_sampling.RejectionSamplingConfig, {"temperatures": ()}, "temperatures is empty"),
        (rejection_sampling.RejectionSamplingConfig, {"search_prompts": 0}, "search_prompts is 0"),
        (rejection_sampling.RejectionSamplingConfig, {"threshold": 7.0}, "threshold is 7.0"),
        (collect.CollectConfig, {"temperatures": (0.7, -1.0)}, "temperatures is -1.0"),
        (collect.CollectConfig, {"test_share": 2.0}, "test_share is 2.0"),
        (context_distillation.ContextDistillationConfig, {"limit": -3}, "limit is -3"),
        (ghost_attention.GhostAttentionConfig, {"short_share": 7.0}, "short_share is 7.0"),
        (reward.RewardConfig, {"limit": -5}, "limit is -5"),
        (pretrain.PretrainConfig, {"steps": -3}, "steps is -3"),
        (sample.SampleConfig, {"top_p": 0.0}, "top_p is 0.0"),
        (sample.SampleConfig, {"min_p": 1.1}, "min_p is 1.1: it must be from 0 to 1"),
        (sample.SampleConfig, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        (sample.SampleConfig, {"stop": ("###", "")}, "stop holds an empty text"),
        (write.ValleyConfig, {"corpus_megabytes": -1.0}, "corpus_megabytes is -1.0"),
    ],
)
def test_a_stage_refuses_what_it_cannot_run(stage: type[Any], changes: dict[str, Any], message: str) -> None:
    paths = {f.name: Path("x") for f in dataclasses.fields(stage) if f.default is f.default_factory is MISSING}
    with pytest.raises(ConfigError, match=rf"^{re.escape(message)}"):
        stage(**paths | changes)
