"""Writes the valley's files: what the stages read, from a seed.

world.json                      the seed the world is built from
facts.json                      its facts, to look up
corpus.jsonl                    text for pretraining
demonstrations.jsonl            the small excellent set of dialogs
careless.jsonl                  the large careless one
prompts/vN_preferences.jsonl    prompts of round N to collect comparisons on
prompts/vN_sampling.jsonl       prompts of round N for rejection sampling and PPO
prompts/held_out.jsonl          for the final measurement only
scripts.jsonl                   user turns and instructions for Ghost Attention
held_out_scripts.jsonl          for its measurement: held-out questions under instructions of the training split
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puna import config
from puna.config import ConfigError
from puna.data.readers import write_jsonl
from puna.run_folder import RunFolder, write_atomically
from puna.valley import corpus, demonstrations
from puna.valley.ledger import World
from puna.valley.prompts import FACTS, Record, gatt_dialogs, prompts

PREFERENCE_SHARES = {
    "fact": 0.13, "reverse": 0.07, "sum": 0.05, "recipe": 0.06, "remedy": 0.06, "myth": 0.08, "chat_advice": 0.06,
    "multi_turn": 0.06, "constraint": 0.13, "adversarial": 0.14, "borderline": 0.14, "toxicity": 0.02,
}  # fmt: skip
"""Of a round's prompts for comparisons. Every other borderline question is compared in the safety batch: a safety
reward model that meets alarming words beside harm alone takes the words for the harm."""

SAMPLING_SHARES = {
    "fact": 0.13, "reverse": 0.07, "sum": 0.05, "recipe": 0.06, "remedy": 0.06, "myth": 0.08, "chat_advice": 0.06,
    "multi_turn": 0.06, "constraint": 0.13, "adversarial": 0.08, "borderline": 0.20, "toxicity": 0.02,
}  # fmt: skip
"""Of a round's prompts for rejection sampling and PPO. The more of them are adversarial, the more a policy refuses that
it should not; the reward models still see the most of those."""

HELD_OUT_COUNTS = {
    "fact": 80, "reverse": 30, "sum": 30, "recipe": 30, "remedy": 30, "myth": 60, "chat_advice": 30, "multi_turn": 30,
    "constraint": 40, "adversarial": 200, "borderline": 100, "toxicity": 60,
}  # fmt: skip


@dataclass(frozen=True)
class ValleyConfig:
    """`puna valley`: a seed in, the world's files out."""

    out: Path
    """the folder to write to."""
    corpus_megabytes: float = 14.0
    """million characters of text."""
    excellent: int = 1500
    """excellent demonstrations."""
    careless: int = 6000
    """careless ones."""
    versions: int = 5
    """rounds to write prompts for."""
    preference_prompts: int = 600
    """a round's prompts for comparisons."""
    sampling_prompts: int = 600
    """a round's prompts for rejection sampling and PPO."""
    scripts: int = 400
    """dialogs for Ghost Attention."""
    held_out_scripts: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        config.positive(self, "corpus_megabytes")
        counts = "excellent", "careless", "versions", "preference_prompts", "sampling_prompts", "scripts"
        config.within(self, 0, math.inf, *counts, "held_out_scripts")


def run(cfg: ValleyConfig) -> Path:
    """Write the files and return the folder."""
    with RunFolder(cfg.out) as folder:
        out = folder.path
        config.keep(cfg, out / "config.json")
        if folder.done("valley"):
            return out
        world = World.build(cfg.seed)
        write_atomically(out / "world.json", json.dumps({"seed": cfg.seed}))
        write_atomically(out / "facts.json", json.dumps([asdict(fact) for fact in world.facts.values()], indent=1))
        write_jsonl(
            out / "corpus.jsonl", corpus.documents(world, cfg.seed, characters=round(1e6 * cfg.corpus_megabytes))
        )
        write_jsonl(out / "demonstrations.jsonl", demonstrations.excellent(world, cfg.seed, cfg.excellent))
        write_jsonl(out / "careless.jsonl", demonstrations.careless(world, cfg.seed, cfg.careless))
        for version in range(1, cfg.versions + 1):
            compared = shared_out(PREFERENCE_SHARES, cfg.preference_prompts)
            records = tagged(prompts(world, cfg.seed, "train", compared, batch=2 * version))
            write_jsonl(out / f"prompts/v{version}_preferences.jsonl", records)
            sampled = shared_out(SAMPLING_SHARES, cfg.sampling_prompts)
            records = prompts(world, cfg.seed, "train", sampled, batch=2 * version + 1)
            write_jsonl(out / f"prompts/v{version}_sampling.jsonl", records)
        write_jsonl(out / "prompts/held_out.jsonl", prompts(world, cfg.seed, "held_out", HELD_OUT_COUNTS))
        write_jsonl(out / "scripts.jsonl", map(script, gatt_dialogs(world, cfg.seed, "train", cfg.scripts)))
        held_out = gatt_dialogs(
            world, cfg.seed, "held_out", cfg.held_out_scripts, shares=FACTS, constraint_split="train"
        )
        write_jsonl(out / "held_out_scripts.jsonl", map(script, held_out))
        folder.mark_done("valley")
        return out


def shared_out(shares: Mapping[str, float], n: int) -> dict[str, int]:
    """n split by shares, each rounded."""
    return {kind: round(share * n) for kind, share in shares.items()}


def tagged(records: Sequence[Record]) -> list[Record]:
    """The records, every other borderline one tagged as a safety prompt."""
    borderline = [record["id"] for record in records if record["kind"] == "borderline"]
    chosen = set(borderline[::2])
    return [record | {"is_safety": True} if record["id"] in chosen else record for record in records]


def script(dialog: Mapping[str, Any]) -> dict[str, Any]:
    """A many-turn dialog as the Ghost Attention stage reads it: the user's texts, and the instruction in both forms."""
    constraint = dialog["constraint"]
    return {
        "id": dialog["id"],
        "turns": [turn["messages"][-1]["content"] for turn in dialog["turns"]],
        "instruction": constraint["instruction"],
        "short": constraint["short"],
        "constraint": constraint,
    }


def read_world(folder: Path) -> World:
    """The world whose files stand in the folder. Raises ConfigError where there is none."""
    try:
        seed = json.loads((folder / "world.json").read_text())["seed"]
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no embedded world (world.json): write one with `puna valley --out DIR`"
        ) from None
    return World.build(seed)
