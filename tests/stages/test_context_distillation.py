"""Context distillation: a preprompt when answers are sampled, none when they are learned, and the gate between."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import ConfigError, DataError
from puna.formats import huggingface
from puna.generate.scoring import Scorer
from puna.stages import context_distillation
from puna.stages.context_distillation import ADJECTIVES, TARGETED, ContextDistillationConfig
from puna.text import chat
from puna.types import Completion, Dialog
from puna.valley.prompts import preprompts
from tests import helpers


def config(folder: Path, **changes: Any) -> ContextDistillationConfig:
    prompts = (helpers.write_lines(folder / "prompts.jsonl", helpers.prompts(30)),)
    models = {"init": helpers.talker_folder(folder / "chat"), "reward_safety": helpers.reward_folder(folder / "safety")}
    fixed = {"out": folder / "out", "prompts": prompts, "max_new_tokens": 30, "shard_size": 10}
    return ContextDistillationConfig(**(fixed | models | changes))


class Obedient:
    """An engine that answers "calm" under a preprompt and "plain" without."""

    tokenizer = helpers.tokenizer()
    context = 256

    def __init__(self, finished: bool = True) -> None:
        self.asked: list[Dialog] = []
        self.finished = finished

    def generate(self, dialogs: Sequence[Dialog], **_: Any) -> list[list[Completion]]:
        self.asked += list(dialogs)
        under = [dialog[0]["role"] == "system" for dialog in dialogs]
        return [[Completion("calm" if yes else "plain", [5], [-1.0], not yes or self.finished)] for yes in under]


def scorer(calm: float, plain: float) -> Any:
    """A safety reward model that must never see the preprompt."""

    def score(dialogs: Sequence[Dialog]) -> torch.Tensor:
        assert all(dialog[0]["role"] == "user" for dialog in dialogs)
        return torch.tensor([calm if dialog[-1]["content"] == "calm" else plain for dialog in dialogs])

    return score


def test_prompts_become_dialogs(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    context_distillation.run(cfg)
    kept = helpers.read_lines(tmp_path / "out/dialogs.jsonl")
    done = json.loads((tmp_path / "out/done/context_distillation.json").read_text())
    assert done == {"kept": len(kept), "prompts": 15, "left_out": 0} and 0 < len(kept) < 15
    safety = Scorer(huggingface.load_reward_model(cfg.reward_safety), helpers.tokenizer())
    for record in kept:
        assert int(record["prompt_id"][1:]) % 2 == 1, "adversarial prompts alone"
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"], "without the preprompt"
        assert record["score_after"] > record["score_before"]
        assert record["score_after"] == pytest.approx(float(safety([record["messages"]])), abs=0.01)  # in bfloat16


@pytest.mark.parametrize(
    ("calm", "plain", "gate", "kept"),
    [(0.8, 0.7, True, True), (0.7, 0.7, True, False), (0.6, 0.7, True, False), (0.6, 0.7, False, True)],
)
def test_the_gate(calm: float, plain: float, gate: bool, kept: bool, tmp_path: Path) -> None:
    cfg = config(tmp_path, gate=gate)
    (record,) = context_distillation.distill(cfg, Obedient(), scorer(calm, plain), helpers.prompts(1), 0)
    assert record["kept"] == kept
    assert record["messages"][-1]["content"] == "calm"
    assert (record["score_before"], record["score_after"]) == pytest.approx((plain, calm))


def test_an_unended_distilled_answer_is_not_kept(tmp_path: Path) -> None:
    for gate in (True, False):
        cfg = config(tmp_path, gate=gate)
        (record,) = context_distillation.distill(cfg, Obedient(finished=False), scorer(1, 0), helpers.prompts(1), 0)
        assert not record["kept"]


@pytest.mark.parametrize(("kind", "targeted"), [("generic", 0), ("both", 5), ("targeted", 10)])
def test_kinds_of_preprompts(kind: Any, targeted: int, tmp_path: Path) -> None:
    engine, prompts = Obedient(), [p | {"risk_category": "illicit"} for p in helpers.prompts(10)]
    records = context_distillation.distill(config(tmp_path, kind=kind), engine, scorer(1, 0), prompts, 0)
    assert sum(record["targeted"] for record in records) == targeted
    preprompts = [dialog[0]["content"] for dialog in engine.asked if dialog[0]["role"] == "system"]
    assert sum(TARGETED["illicit"] in text for text in preprompts) == targeted
    assert [dialog for dialog in engine.asked if dialog[0]["role"] == "user"] == [p["messages"] for p in prompts]


def test_what_the_gate_decided_by_score() -> None:
    scores = [(0.0, 0.9, True), (0.1, 0.9, True), (0.15, 0.05, False), (0.2, 0.6, True), (1.0, 0.4, False)]
    records = [{"score_before": before, "score_after": after, "kept": kept} for before, after, kept in scores]
    low, next_fifth, high = context_distillation.by_score(records)
    assert low == {
        "from": 0.0,
        "prompts": 2,
        "kept": 0.5,
        "score_before": pytest.approx(0.125),
        "score_after": pytest.approx(0.475),
    }
    assert (next_fifth["from"], next_fifth["prompts"], next_fifth["kept"]) == (0.2, 1, 1.0)
    assert (high["from"], high["kept"]) == (0.8, 0.0), "a score of 1 is in the last fifth"


def test_general_preprompts_are_templated_with_adjectives() -> None:
    rng, prompt = random.Random(0), {"risk_category": "hateful"}
    texts = {context_distillation.general_preprompt(prompt, False, rng) for _ in range(200)}
    assert len(texts) > 20
    assert all(any(adjective in text for text in texts) for adjective in ADJECTIVES)
    assert TARGETED["hateful"] in context_distillation.general_preprompt(prompt, True, rng)
    context_distillation.general_preprompt({}, True, rng)  # no category: the generic one


def test_a_system_message_gives_way_to_the_preprompt(tmp_path: Path) -> None:
    engine = Obedient()
    prompt = helpers.prompts(1)[0] | {"messages": [helpers.system("Be rude."), helpers.user("Where?")]}
    context_distillation.distill(config(tmp_path), engine, lambda dialogs: torch.ones(len(dialogs)), [prompt], 0)
    assert [message["role"] for message in engine.asked[1]] == ["system", "user"]
    assert engine.asked[1][0]["content"] != "Be rude."


def test_a_limit(tmp_path: Path) -> None:
    context_distillation.run(replace(config(tmp_path), limit=4))
    done = json.loads((tmp_path / "out/done/context_distillation.json").read_text())
    assert done["prompts"] == 4


def test_a_prompt_that_fills_the_context_is_left_out(tmp_path: Path) -> None:
    long = {"id": "long", "messages": [helpers.user("where is the llama " * 60)], "is_safety": True}
    prompts = helpers.write_lines(tmp_path / "some.jsonl", [*helpers.prompts(8), long])
    context_distillation.run(replace(config(tmp_path), prompts=(prompts,)))
    done = json.loads((tmp_path / "out/done/context_distillation.json").read_text())
    assert (done["prompts"], done["left_out"]) == (4, 1)


def test_prompts_are_tagged_by_their_file_or_none_is_said(tmp_path: Path) -> None:
    harmless = helpers.write_lines(tmp_path / "some.jsonl", [p | {"is_safety": False} for p in helpers.prompts(4)])
    with pytest.raises(DataError, match=r"some\.jsonl: no prompt is a safety prompt"):
        context_distillation.run(config(tmp_path, prompts=(harmless,)))
    context_distillation.run(config(tmp_path, out=tmp_path / "tagged", prompts=(), safety_prompts=(harmless,)))
    assert json.loads((tmp_path / "tagged/done/context_distillation.json").read_text())["prompts"] == 4


def test_a_reward_model_with_a_shorter_context_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short"
    huggingface.save_reward_model(helpers.reward_model(max_seq_len=64), helpers.tokenizer(), short)
    with pytest.raises(ConfigError, match="context is 64 tokens"):
        context_distillation.run(config(tmp_path, reward_safety=short))


def test_a_preprompt_that_leaves_no_room_keeps_nothing(tmp_path: Path) -> None:
    engine, prompts = Obedient(), helpers.prompts(2)
    plain, longer = (len(chat.encode_prompt(prompt["messages"], engine.tokenizer)) for prompt in prompts)
    engine.context = max(plain, longer) + 1
    records = context_distillation.distill(config(tmp_path), engine, scorer(1, 0), prompts, 0)
    assert [record["kept"] for record in records] == [False, False]
    assert all(dialog[0]["role"] == "user" for dialog in engine.asked)


def test_a_prompt_without_a_category_has_a_generic_preprompt() -> None:
    texts = preprompts()
    for prompt in ({}, {"risk_category": "unheard-of"}):
        assert context_distillation.valley_preprompt(prompt, True, random.Random(0)) in texts["generic"]
    named = context_distillation.valley_preprompt({"risk_category": "illicit"}, True, random.Random(0))
    assert named == texts["targeted"]["illicit"]


def test_an_unknown_source_of_preprompts_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown preprompts 'valey'; did you mean 'valley'"):
        config(tmp_path, preprompts="valey")
