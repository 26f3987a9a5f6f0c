"""Constitutional AI: what the model is asked, what is written, who chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puna.config import ConfigError, DataError
from puna.data import readers
from puna.generate.engine import LocalEngine
from puna.generate.scoring import sequence_logprobs
from puna.stages import critique
from puna.stages.critique import GENERAL, CritiqueConfig
from puna.text import chat
from puna.types import Completion, Dialog
from puna.valley.words import table
from tests import helpers


def config(folder: Path, **changes: Any) -> CritiqueConfig:
    files = (helpers.write_lines(folder / "prompts.jsonl", helpers.prompts(40)),)
    init = helpers.talker_folder(folder / "chat")
    fixed = {"out": folder / "out", "init": init, "prompts": files, "max_new_tokens": 12, "shard_size": 8}
    return CritiqueConfig(**(fixed | changes))


class Scripted:
    """An engine that says these words one call after the other; "" is an answer that did not end."""

    tokenizer = helpers.tokenizer()
    context = 1000

    def __init__(self, *said: Sequence[str]) -> None:
        self.said = list(said)
        self.asked: list[list[Dialog]] = []

    def generate(self, dialogs: Sequence[Dialog], **_: Any) -> list[list[Completion]]:
        self.asked.append([list(dialog) for dialog in dialogs])
        return [[Completion(text, [5], [-1.0], bool(text))] for text in self.said.pop(0)]


def test_answers_are_revised(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    critique.run(cfg)
    records = helpers.read_lines(tmp_path / "out/dialogs.jsonl")
    asked = {prompt["id"]: prompt["messages"] for prompt in helpers.prompts(40) if prompt["is_safety"]}
    assert len(records) > 5 and {record["prompt_id"] for record in records} <= asked.keys()
    for record in records:
        assert record["messages"][:-1] == asked[record["prompt_id"]], "no principle stands in what is learned"
        assert all(record[part] for part in ("draft", "critique")) and record["messages"][-1]["role"] == "assistant"
    assert json.loads((tmp_path / "out/done/critique.json").read_text()) == {"prompts": 20, "written": len(records)}


def test_the_model_sees_its_draft_and_its_critique(tmp_path: Path) -> None:
    engine = Scripted(["bad", "worse"], ["it harms", ""], ["better"])
    prompts = helpers.prompts(2)
    records = critique.revised(config(tmp_path), engine, prompts, GENERAL[:2], 0)  # type: ignore[arg-type]
    drafted, criticised, rewritten = engine.asked
    assert drafted == [prompt["messages"] for prompt in prompts]
    assert [turn["content"] for turn in criticised[1][1:]] == ["worse", GENERAL[1].critique]
    assert [turn["content"] for turn in rewritten[0][1:]] == ["bad", GENERAL[0].critique, "it harms", GENERAL[0].revise]
    assert len(rewritten) == 1, "what failed on the way is not asked on"
    (record,) = records
    assert [turn["content"] for turn in record["messages"][1:]] == ["better"]
    assert (record["draft"], record["critique"]) == ("bad", "it harms")


def test_several_revisions(tmp_path: Path) -> None:
    engine = Scripted(["one"], ["no"], ["two"], ["no, no"], ["three"])
    cfg = replace(config(tmp_path), revisions=2)
    (record,) = critique.revised(cfg, engine, helpers.prompts(1), GENERAL[:1], 0)  # type: ignore[arg-type]
    assert (record["draft"], record["critique"], record["messages"][-1]["content"]) == ("one", "no, no", "three")
    assert [len(asked[0]) for asked in engine.asked] == [1, 3, 5, 7, 9]


def test_answers_are_compared(tmp_path: Path) -> None:
    critique.run(config(tmp_path, task="compare", test_share=0.25))
    train, test = (
        readers.read(tmp_path / f"out/{name}.jsonl", "preferences").records for name in ("safety", "safety_test")
    )
    assert len(train) > 5 and not {str(row.prompt) for row in train} & {str(row.prompt) for row in test}
    for row in [*train, *test]:
        assert row.domain == "safety" and row.chosen != row.rejected
        assert row.grade is None and row.chosen_is_safe is None, "nobody has graded or labelled it"
        assert 0.5 <= row.provenance["certainty"] <= 1


def test_a_letter_that_is_likelier_for_its_own_sake_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def letters(engine: Any, dialogs: Sequence[Dialog]) -> list[float]:
        # "A" is likelier by 5 whatever stands there, and by 2 where a kind answer does.
        return [5.0 + (2.0 if "(A) kind" in dialog[0]["content"] else -2.0) for dialog in dialogs]

    monkeypatch.setattr(critique, "letters", letters)
    engine = Scripted(["rude", "kind 1", "same", ""], ["kind 0", "rude", "same", "kind"])
    records = critique.compared(config(tmp_path), engine, helpers.prompts(4), GENERAL[:1] * 4, 0)  # type: ignore[arg-type]
    chosen = [(record["chosen"][0]["content"], record["rejected"][0]["content"]) for record in records]
    assert chosen == [("kind 0", "rude"), ("kind 1", "rude")]
    assert records[0]["certainty"] == pytest.approx(0.880797)  # sigmoid of 2, half of (7 - 3)


def test_the_letters_are_weighed_as_whole_answers() -> None:
    engine = LocalEngine(helpers.model(), helpers.tokenizer())
    question = critique.choice(helpers.prompts(1)[0], "the llama", "her dog", GENERAL[0])
    assert question[0]["content"].endswith(f"\n\n(A) the llama\n(B) her dog\n\n{GENERAL[0].compare} Say A or B.")
    begins = len(chat.encode_prompt(question, engine.tokenizer))
    expected = []
    for letter in "AB":
        row = chat.encode([*question, helpers.assistant(letter)], engine.tokenizer).tokens
        assert len(row) <= begins + critique.LETTER and row[-1] == engine.tokenizer.eos_id
        expected.append(float(sequence_logprobs(engine.model, [row])[0][begins - 1 :].sum()))
    assert critique.letters(engine, [question]) == pytest.approx([expected[0] - expected[1]], abs=1e-4)
    assert critique.letters(engine, []) == []


def test_principles_have_three_questions() -> None:
    for name, principles in critique.PRINCIPLES.items():
        assert len(principles()) > 2 and all(map(all, principles())), name
    assert len(critique.valley_principles()) == len(table("constitution")["principle"])


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown principles 'valey'; did you mean 'valley'"):
        config(tmp_path, principles="valey")
    endless = helpers.talker_folder(tmp_path / "endless", end=1e-9)
    with pytest.raises(DataError, match=r"no prompt got answers that ended: raise max_new_tokens \(12\)"):
        critique.run(config(tmp_path, init=endless))
