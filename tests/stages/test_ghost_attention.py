"""Ghost Attention: the instruction on every turn when answers are sampled, on the first alone when they are learned."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puna.config import ConfigError, DataError
from puna.stages import ghost_attention, sft
from puna.stages.ghost_attention import GhostAttentionConfig
from puna.text import chat
from puna.types import Completion, Dialog
from tests import helpers


def scripts(n: int, turns: int = 4) -> list[dict[str, Any]]:
    said = helpers.sentences(n * turns)
    return [
        {
            "id": f"g{i}",
            "turns": said[i * turns : (i + 1) * turns],
            "instruction": f"From now on speak as herder {i}.",
            "short": f"Figure: herder {i}.",
        }
        for i in range(n)
    ]


def config(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> GhostAttentionConfig:
    files = (helpers.write_lines(folder / "scripts.jsonl", rows),)
    init = helpers.talker_folder(folder / "chat", end=0.15)
    fixed = {"out": folder / "out", "init": init, "scripts": files, "max_new_tokens": 40, "shard_size": 10}
    return GhostAttentionConfig(**(fixed | changes))


class Echo:
    """An engine that answers with the number of the turn, and remembers what it was asked."""

    tokenizer = helpers.tokenizer()

    def __init__(self, silent_at: int = 0, context: int = 256) -> None:
        self.context = context
        self.asked: list[Dialog] = []
        self.silent_at = silent_at

    def generate(self, dialogs: Sequence[Dialog], **_: Any) -> list[list[Completion]]:
        self.asked += [list(dialog) for dialog in dialogs]
        turns = [(len(dialog) + 1) // 2 for dialog in dialogs]
        return [[Completion(f"answer {turn}", [5], [-1.0], turn != self.silent_at)] for turn in turns]


def test_scripts_become_dialogs(tmp_path: Path) -> None:
    rows = scripts(50)
    cfg = config(tmp_path, rows)
    ghost_attention.run(cfg)
    records = helpers.read_lines(tmp_path / "out/dialogs.jsonl")
    done = json.loads((tmp_path / "out/done/ghost_attention.json").read_text())
    assert done == {"dialogs": len(records), "left_out": 50 - len(records)} and len(records) > 15
    by_id = {row["id"]: row for row in rows}
    for record in records:
        script, messages = by_id[record["id"]], record["messages"]
        assert record["loss_on"] == "last_answer"
        users = [message["content"] for message in messages[::2]]
        first = [f"{script[form]} {script['turns'][0]}" for form in ("instruction", "short")]
        assert users[0] in first
        assert users[1:] == script["turns"][1 : len(users)], "later turns are the user's own words"
        assert all(message["role"] == "assistant" for message in messages[1::2])
        assert 2 <= len(users) <= 4
    assert len({len(record["messages"]) for record in records}) == 3, "cut at every depth"
    shortened = [record["messages"][0]["content"].startswith("Figure: ") for record in records]
    assert 0.2 < sum(shortened) / len(shortened) < 0.8


def test_answers_are_sampled_with_the_instruction_on_every_turn(tmp_path: Path) -> None:
    rows, engine = [*scripts(2), *scripts(1, turns=2)], Echo()
    answers = ghost_attention.sample(config(tmp_path, rows), engine, rows, 0)
    assert answers == [[f"answer {t}" for t in (1, 2, 3, 4)]] * 2 + [["answer 1", "answer 2"]]
    assert len(engine.asked) == 4 + 4 + 2
    for dialog in engine.asked:
        script = next(row for row in rows if dialog[0]["content"].endswith(row["turns"][0]))
        asked = [message["content"] for message in dialog[::2]]
        assert asked == [f"{script['instruction']} {text}" for text in script["turns"][: len(asked)]]
        assert [m["content"] for m in dialog[1::2]] == [f"answer {t + 1}" for t in range(len(asked) - 1)]


def test_a_failed_answer_ends_its_dialog(tmp_path: Path) -> None:
    rows, engine = scripts(1), Echo(silent_at=2)
    answers = ghost_attention.sample(config(tmp_path, rows), engine, rows, 0)
    assert answers == [["answer 1"]] and len(engine.asked) == 2
    assert ghost_attention.written(rows[0], answers[0], short=False) is None


def test_a_dialog_that_outgrows_the_context_ends(tmp_path: Path) -> None:
    rows, engine = scripts(2), Echo(context=100)
    answers = ghost_attention.sample(config(tmp_path, rows), engine, rows, 0)
    assert all(0 < len(given) < 4 for given in answers)
    assert all(len(chat.encode_prompt(dialog, engine.tokenizer)) < 100 for dialog in engine.asked)


def test_loss_is_zero_on_all_earlier_turns(tmp_path: Path) -> None:
    tokenizer, script = helpers.tokenizer(), scripts(1, turns=3)[0]
    record = ghost_attention.written(script, ["one.", "two.", "three."], short=True)
    assert record is not None
    assert [m["content"] for m in record["messages"]] == [
        f"Figure: herder 0. {script['turns'][0]}",
        "one.",
        script["turns"][1],
        "two.",
        script["turns"][2],
        "three.",
    ]
    data = helpers.write_lines(tmp_path / "one.jsonl", [record])
    rows, _ = sft.prepare(helpers.sft_config(tmp_path, data=(data,)), tokenizer)
    last = [*tokenizer.encode("three. "), tokenizer.eos_id]
    assert rows.tokens[rows.mask].tolist() == last
    assert chat.encode(record["messages"], tokenizer).mask.count(True) > len(last)


def test_short_dialogs_are_used_as_they_are(tmp_path: Path) -> None:
    rows = scripts(12, turns=1)
    ghost_attention.run(config(tmp_path, rows))
    records = helpers.read_lines(tmp_path / "out/dialogs.jsonl")
    assert records and all(len(record["messages"]) == 2 for record in records)


def test_the_share_of_short_forms_is_a_setting(tmp_path: Path) -> None:
    cfg = config(tmp_path, scripts(10))
    for share, form in ((0.0, "From now on"), (1.0, "Figure:")):
        ghost_attention.run(replace(cfg, out=tmp_path / form, short_share=share))
        records = helpers.read_lines(tmp_path / form / "dialogs.jsonl")
        assert records and all(record["messages"][0]["content"].startswith(form) for record in records)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"turns": []}, "'turns' must be a list of one text or more"),
        ({"turns": None}, "'turns' must be a list of one text or more"),
        ({"turns": ["Where?", " "]}, "none of them empty"),
        ({"instruction": ""}, "'instruction' is missing"),
        ({"short": None}, "'short' is missing"),
    ],
)
def test_a_script_that_lacks_something_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    good, bad = scripts(2)
    with pytest.raises(DataError, match=rf"scripts.jsonl, script 2 \(g1\): .*{said}"):
        ghost_attention.run(config(tmp_path, [good, bad | change]))


class Lister(Echo):
    """Names figures and hobbies, some of them twice, in lists and at length."""

    def generate(self, dialogs: Sequence[Dialog], **settings: Any) -> list[list[Completion]]:
        if "Name one" not in dialogs[0][-1]["content"]:
            return super().generate(dialogs, **settings)
        said = ["- Napoleon.", "1) Sappho\nand others", "Napoleon", "well, that is not so easy to say", "[INST]", ""]
        hobbies = ["chess", "Tennis."] * 3
        texts = said if "figure" in dialogs[0][-1]["content"] else hobbies
        return [[Completion(text, [5], [-1.0], True) for text in texts]]


def test_the_model_lists_what_instructions_are_made_of(tmp_path: Path) -> None:
    cfg = config(tmp_path, scripts(1), invent=("figure", "hobby"), combined_share=0.5)
    lists = ghost_attention.invent(cfg, Lister())
    assert lists == {"figure": ["Napoleon", "Sappho"], "hobby": ["chess", "Tennis"]}
    assert ghost_attention.invent(replace(cfg, invented=1), Lister())["figure"] == ["Napoleon"]
    made = [ghost_attention.drawn(cfg, lists, random.Random(seed)) for seed in range(200)]
    assert {"instruction": "Always act as Sappho.", "short": "Figure: Sappho."} in made
    pair = {
        "instruction": "Always act as Napoleon. Answer as one who enjoys chess.",
        "short": "Figure: Napoleon. Hobby: chess.",
    }
    assert pair in made
    both = [forms for forms in made if "Figure" in forms["short"] and "Hobby" in forms["short"]]
    assert 70 < len(both) < 130


def test_invented_instructions_take_the_place_of_the_scripts_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ghost_attention, "open_engine", lambda *_: Lister())
    rows = [{"id": row["id"], "turns": row["turns"]} for row in scripts(12)]
    cfg = config(tmp_path, rows, invent=("figure", "hobby"), short_share=1.0)
    ghost_attention.run(cfg)
    assert json.loads((tmp_path / "out/lists.json").read_text())["figure"] == ["Napoleon", "Sappho"]
    records = helpers.read_lines(tmp_path / "out/dialogs.jsonl")
    assert len(records) > 9, "those that outgrow the context are left out"
    assert all(record["messages"][0]["content"].startswith(("Figure: ", "Hobby: ")) for record in records)
    with pytest.raises(DataError, match=r"script 1 .*'instruction' is missing"):
        ghost_attention.run(replace(cfg, out=tmp_path / "own", invent=()))


def test_lists_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="invent knows no kind 'colour'; there are figure, hobby, language"):
        config(tmp_path, scripts(1), invent=("colour",))
    silent = Lister(silent_at=1)
    with pytest.raises(DataError, match="lists nothing of the kind 'figure'"):
        silent.generate = lambda dialogs, **settings: [[Completion("", [5], [-1.0], True)]]  # type: ignore[method-assign]
        ghost_attention.invent(config(tmp_path, scripts(1), invent=("figure",)), silent)


@pytest.mark.parametrize("answer", ["**Napoleon**", "- *Napoleon*.", "1. __Napoleon__", "Napoleon\nfor one"])
def test_an_item_is_bare(answer: str) -> None:
    assert ghost_attention.item(answer) == "Napoleon"
