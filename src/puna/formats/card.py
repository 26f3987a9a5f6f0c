"""The model card of an export: what the files behind the model say, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import puna
from puna.formats.lineage import Step
from puna.model.reward import RewardModel
from puna.model.transformer import Transformer

PUE, KG_A_KWH = 1.1, 0.385  # puna.plan says why

HIDDEN = {
    "out",
    "path",
    "init",
    "threads",
    "parallel",
    "micro_batch_size",
    "micro_batch_tokens",
    "checkpoint_every",
    "checkpoints_kept",
    "dump",
    "dump_iteration",
    "vllm",
    "model.dim",
    "model.n_layers",
    "model.n_heads",
    "model.n_kv_heads",
    "model.vocab_size",
    "model.max_seq_len",
    "model.moe.experts",
    "model.moe.top_k",
}
"""Settings, or tables of them, that change nothing in a stage's result or that the card says elsewhere."""


def card(
    model: Transformer | RewardModel, name: str, steps: list[Step], license: str, library: str = "transformers"
) -> str:
    """README.md with Hugging Face's front matter; `library` is what opens the files there, "" names none.

    `steps` is what `lineage.trace` makes, this model last.
    """
    is_reward = isinstance(model, RewardModel)
    front = {
        "license": license,
        "library_name": library,
        "pipeline_tag": "text-classification" if is_reward else "text-generation",
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items() if value)]
    lines += ["tags:", "- llama", "- puna", *(["- reward-model"] if is_reward else []), "---", "", f"# {name}", ""]
    lines += [_what(model), ""]
    if any(step.provenance for step in steps):
        lines += ["## How it was made", "", *_stages(steps), ""]
    if seconds := sum(step.seconds or 0 for step in steps):
        lines += ["## Time and carbon", "", _carbon(seconds), ""]
    if steps and steps[-1].evaluation:
        lines += ["## Evaluation", "", "| Measure | Value |", "|---|---|", *_measures(steps[-1].evaluation), ""]
    none = "The files that were found behind this model name no licence."
    known = f"The base's licence is {license}." if license else none
    return "\n".join([*lines, "## Licence", "", known, ""])


def n_params(model: Transformer | RewardModel) -> int:
    """Number of parameters; a tied output is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _what(model: Transformer | RewardModel) -> str:
    config = model.config
    moe = config.moe
    experts = f"{moe.experts} experts, {moe.top_k} a token, " if moe.experts else ""
    kind = "reward model: one score for a dialog, read at its last token" if isinstance(model, RewardModel) else "model"
    return (
        f"A Llama {kind}, of {n_params(model):,} parameters: {config.n_layers} layers of width {config.dim}, "
        f"{config.n_heads} heads ({config.n_kv_heads} of keys and values), {experts}vocabulary {config.vocab_size}, "
        f"context {config.max_seq_len}. Written by Puna {puna.__version__}."
    )


def _stages(steps: list[Step]) -> list[str]:
    """A numbered line a stage, the first one first, and below it a line for each table of its settings."""
    lines: list[str] = []
    for number, step in enumerate(steps, start=1):
        said = {key: value for key, value in step.provenance.items() if key not in ("stage", "license")}
        stage = step.provenance.get("stage", "of unknown origin")
        lines.append(f"{number}. {stage}{': ' if said else ''}{_listed(said)}")
        for table, settings in _shown(step.settings).items():
            lines.append(f"   - {table}: {_listed(settings)}")
    return lines


def _shown(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that HIDDEN does not name, by table; what is empty, and experts that there are none of, left out."""
    tables: dict[str, dict[str, Any]] = {}
    leaves = _leaves(settings)
    for key, value in leaves.items():
        table, _, name = key.rpartition(".")
        unused = table == "model.moe" and not leaves.get("model.moe.experts")
        if not unused and value not in (None, "", []) and HIDDEN.isdisjoint((key, table)):
            tables.setdefault(table or "settings", {})[name] = value
    return tables


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} `{_plain(value)}`" for key, value in settings.items())


def _carbon(seconds: float) -> str:
    """What can be said without a meter."""
    kilograms = seconds / 3600 * 0.1 * PUE * KG_A_KWH
    return (
        f"These stages took {seconds / 3600:.3g} hours. Their power was not measured: every 100 W of it make "
        f"{kilograms:.2g} kg of CO2eq, by a PUE of {PUE} and {KG_A_KWH} kg a kWh (Llama 1's; Llama 2's Table 2 agrees)."
    )


def _measures(evaluation: dict[str, Any]) -> list[str]:
    """A row for each number and each mean with its interval; what lies deeper stays in evaluation.json."""
    rows = []
    for key, value in evaluation.items():
        name = key.replace("_", " ")
        if isinstance(value, int | float) and not isinstance(value, bool):
            rows.append(f"| {name} | {value:.4g} |")
        elif isinstance(value, dict) and isinstance(value.get("mean"), int | float):
            interval = f" ({value['low']:.3g} to {value['high']:.3g})" if {"low", "high"} <= value.keys() else ""
            rows.append(f"| {name} | {value['mean']:.3g}{interval} |")
    return rows


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables."""
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _plain(value: Any) -> str:
    """A setting as it stands between backquotes of one line."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.replace("`", "'").split())
