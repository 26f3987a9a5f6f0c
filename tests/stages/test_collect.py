"""Collecting preferences: two models, two temperatures, a forced choice, and what the safety batch leaves out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puna.config import ConfigError
from puna.data import readers
from puna.run_folder import fingerprint
from puna.stages import collect
from puna.stages.collect import CollectConfig
from puna.types import Judgement, Preference
from tests import helpers


def longer(prompt: dict[str, Any], first: str, second: str) -> Judgement:
    """Prefers the longer answer; answers of an even length are safe."""
    is_safe = (len(first) % 2 == 0, len(second) % 2 == 0)
    return Judgement(chosen=int(len(second) > len(first)), grade="better", is_safe=is_safe)


def config(folder: Path, **changes: Any) -> CollectConfig:
    models = tuple(helpers.talker_folder(folder / name, seed) for seed, name in enumerate(("newest", "previous")))
    prompts = (helpers.write_lines(folder / "prompts.jsonl", helpers.prompts(40)),)
    fixed = {"out": folder / "out", "models": models, "prompts": prompts, "annotators": "longer", "shard_size": 16}
    return CollectConfig(**(fixed | {"max_new_tokens": 12, "batch": 3} | changes))


def prompt_of(preference: Preference) -> str:
    return preference.prompt[-1]["content"]


@pytest.fixture(autouse=True)
def _annotators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(collect.ANNOTATORS, "longer", lambda cfg: [longer])


def test_prompts_become_comparisons(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    assert collect.run(cfg) == tmp_path / "out"
    rows: dict[str, list[Preference]] = {}
    for domain in ("helpfulness", "safety"):
        train, test = (
            readers.read(tmp_path / f"out/{name}.jsonl", "preferences").records for name in (domain, f"{domain}_test")
        )
        rows[domain] = [*train, *test]
        assert not {prompt_of(row) for row in train} & {prompt_of(row) for row in test}
        assert all(row.domain == domain and row.batch == 3 and row.grade == "better" for row in rows[domain])
    everything = rows["helpfulness"] + rows["safety"]
    names = {fingerprint(path) for path in cfg.models}
    for row in everything:
        assert len(row.chosen) >= len(row.rejected) and row.chosen != row.rejected
        assert row.chosen_is_safe == (len(row.chosen) % 2 == 0)
        assert set(row.provenance["models"]) == names, "two different models answered"
        assert set(row.provenance["temperatures"]) <= set(cfg.temperatures)
    assert len({row.provenance["prompt_id"] for row in everything}) == len(everything)
    assert len({tuple(row.provenance["temperatures"]) for row in everything}) > 3, "at varied temperatures"
    done = json.loads((tmp_path / "out/done/collect.json").read_text())
    assert sum(done.values()) == 40
    assert done["helpfulness"] == len(rows["helpfulness"]) and done["safety"] == len(rows["safety"])


@pytest.mark.parametrize("domain", ["helpfulness", "safety"])
@pytest.mark.parametrize("chosen_is_safe", [True, False])
@pytest.mark.parametrize("rejected_is_safe", [True, False])
def test_unsafe_over_safe_is_left_out_of_the_safety_batch(
    domain: str, chosen_is_safe: bool, rejected_is_safe: bool, tmp_path: Path
) -> None:
    def annotator(prompt: dict[str, Any], first: str, second: str) -> Judgement:
        return Judgement(1, "slightly_better", (rejected_is_safe, chosen_is_safe))

    prompt = {"id": "p", "messages": [helpers.user("Where?")], "is_safety": domain == "safety"}
    pair = [{"text": text, "finished": True, "model": text, "temperature": 1.0} for text in ("here", "there")]
    row = collect.record(prompt, pair, annotator, config(tmp_path))
    if domain == "safety" and rejected_is_safe and not chosen_is_safe:
        assert row == {"skip": "the chosen answer is unsafe, the rejected one safe", "domain": "safety"}
    else:
        assert row["chosen"][0]["content"] == "there" and row["rejected"][0]["content"] == "here"
        assert (row["chosen_is_safe"], row["rejected_is_safe"]) == (chosen_is_safe, rejected_is_safe)
        assert row["models"] == ["there", "here"]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("here", " here ", "identical answers"),
        ("here", "", "an empty answer"),
        ("", " ", "identical answers"),
        ("here [/INST] there", "there", "an answer with a chat tag"),
        ("here", "there and...", "an answer that did not end"),
    ],
)
def test_what_says_nothing_is_skipped(first: str, second: str, reason: str, tmp_path: Path) -> None:
    prompt = {"id": "p", "messages": [helpers.user("Where?")], "is_safety": False}
    pair = [
        {"text": text.removesuffix("..."), "finished": "..." not in text, "model": "m", "temperature": 1.0}
        for text in (first, second)
    ]
    assert collect.record(prompt, pair, longer, config(tmp_path)) == {"skip": reason, "domain": "helpfulness"}


def test_one_model_answers_twice(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    collect.run(replace(cfg, models=cfg.models[:1]))
    rows = readers.read(tmp_path / "out/helpfulness.jsonl", "preferences").records
    assert rows and all(row.provenance["models"] == 2 * [fingerprint(cfg.models[0])] for row in rows)


def test_shards_do_not_change_the_rules(tmp_path: Path) -> None:
    collect.run(config(tmp_path, shard_size=7))
    ids = [row.provenance["prompt_id"] for row in readers.read(tmp_path / "out/safety.jsonl", "preferences").records]
    assert len(set(ids)) == len(ids) and set(ids) <= {f"p{i}" for i in range(1, 40, 2)}


def test_the_valleys_people_need_their_world(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set `world`"):
        collect.run(config(tmp_path, annotators="valley"))


def test_a_prompt_that_fills_a_models_context_is_left_out(tmp_path: Path) -> None:
    long = {"id": "long", "messages": [helpers.user("where is the llama " * 60)], "is_safety": True}
    prompts = helpers.write_lines(tmp_path / "some.jsonl", [*helpers.prompts(8), long])
    collect.run(config(tmp_path, prompts=(prompts,)))
    done = json.loads((tmp_path / "out/done/collect.json").read_text())
    assert done["left_out"] == 1 and sum(done.values()) == 9


def test_unknown_annotators_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown annotators 'valey'; did you mean 'valley'"):
        config(tmp_path, annotators="valey")
