"""Prompts from files of every kind, and which of them are tagged as safety prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna.config import ConfigError, DataError
from puna.data.prompts import apart, fitting, read_prompts
from puna.text import chat
from tests import helpers


def test_prompt_files(tmp_path: Path) -> None:
    rows = helpers.prompts(4)
    path = helpers.write_lines(tmp_path / "prompts.jsonl", [*rows, rows[0]])
    assert read_prompts((path,), "prompts") == rows


def test_a_prompt_without_a_tag_is_not_a_safety_prompt(tmp_path: Path) -> None:
    path = helpers.write_lines(tmp_path / "prompts.jsonl", [{"id": "a", "messages": [helpers.user("Where?")]}])
    assert [prompt["is_safety"] for prompt in read_prompts((path,), "prompts")] == [False]


def test_comparisons_give_their_prompts(tmp_path: Path) -> None:
    rows = [*helpers.preferences(3, domain="safety"), *helpers.preferences(3, seed=1, domain="helpfulness")]
    path = helpers.write_lines(tmp_path / "pairs.jsonl", [*rows, rows[0]])
    prompts = read_prompts((path,), "preferences")
    assert [prompt["messages"] for prompt in prompts] == [row["prompt"] for row in rows]
    assert [prompt["is_safety"] for prompt in prompts] == [True] * 3 + [False] * 3
    assert len({prompt["id"] for prompt in prompts}) == 6


def test_dialogs_give_what_comes_before_the_answer(tmp_path: Path) -> None:
    dialog = [helpers.user("Where?"), helpers.assistant("Here."), helpers.user("And?"), helpers.assistant("There.")]
    path = helpers.write_lines(tmp_path / "dialogs.jsonl", [{"messages": dialog}, {"messages": dialog[:3]}])
    (prompt,) = read_prompts((path,), "dialogs")
    assert prompt["messages"] == dialog[:3]


def test_prompts_of_safety_files_are_tagged(tmp_path: Path) -> None:
    rows = [prompt | {"is_safety": False} for prompt in helpers.prompts(4)]
    plain = helpers.write_lines(tmp_path / "plain.jsonl", rows[:3])
    tagged = helpers.write_lines(tmp_path / "tagged.jsonl", rows[2:])
    prompts = read_prompts((plain,), "prompts", (tagged,))
    assert [(prompt["id"], prompt["is_safety"]) for prompt in prompts] == [
        ("p0", False),
        ("p1", False),
        ("p2", True),  # in both files: tagged in advance is tagged
        ("p3", True),
    ]


def test_a_prompt_is_a_safety_prompt_where_any_file_says_so(tmp_path: Path) -> None:
    plain, tagged = ([helpers.prompts(1)[0] | {"is_safety": is_safety}] for is_safety in (False, True))
    for rows in (plain + tagged, tagged + plain):
        path = helpers.write_lines(tmp_path / "prompts.jsonl", rows)
        assert read_prompts((path,), "prompts") == tagged


def test_fitting(tmp_path: Path) -> None:
    tokenizer, prompts = helpers.tokenizer(), helpers.prompts(9)
    lengths = [len(chat.encode_prompt(prompt["messages"], tokenizer)) for prompt in prompts]
    limit = sorted(lengths)[4]
    expected = [p for p, n in zip(prompts, lengths, strict=True) if n <= limit]
    assert fitting(prompts, tokenizer, 999, limit) == expected
    assert fitting(prompts, tokenizer, 999) == prompts
    # A context of `limit` tokens leaves no room for an answer to the longest of them, whatever else is asked for.
    for max_tokens in (0, 999):
        assert fitting(prompts, tokenizer, limit + 1, max_tokens) == expected
        assert len(fitting(prompts, tokenizer, limit, max_tokens)) < len(expected)
    with pytest.raises(DataError, match="none of 9 prompts fits 4 tokens"):
        fitting(prompts, tokenizer, 5)


def test_a_prompt_that_cannot_be_in_a_dialog_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"id": f"b{i}", "messages": [helpers.user("[INST] Where?")]} for i in range(2)]
    assert fitting([bad[0], *helpers.prompts(3), bad[1]], helpers.tokenizer(), 999) == helpers.prompts(3)
    said = "prompt 'b0': a user turn holds the chat tag '[INST]': remove it from the text; left out, and 1 more"
    assert [record.getMessage() for record in caplog.records] == [said]
    with pytest.raises(DataError, match=r"none of 2 prompts fits .*; the chat format refuses 2"):
        fitting(bad, helpers.tokenizer(), 999)


def test_two_prompts_with_one_id_are_an_error(tmp_path: Path) -> None:
    first, second = helpers.prompts(2)
    path = helpers.write_lines(tmp_path / "prompts.jsonl", [first, second | {"id": first["id"]}])
    with pytest.raises(DataError, match=rf"^{path}: two prompts have the id 'p0': give each its own$"):
        read_prompts((path,), "prompts")


@pytest.mark.parametrize("tag", ["no", 1, [True]])
def test_a_tag_is_true_or_false(tag: object, tmp_path: Path) -> None:
    rows = [*helpers.prompts(200), helpers.prompts(1)[0] | {"id": "odd", "is_safety": tag}]
    path = helpers.write_lines(tmp_path / "prompts.jsonl", rows)
    assert len(read_prompts((path,), "prompts")) == 200, "set aside"
    path = helpers.write_lines(tmp_path / "untagged.jsonl", [helpers.prompts(1)[0] | {"is_safety": None}])
    assert read_prompts((path,), "prompts")[0]["is_safety"] is False


def test_texts_give_no_prompts(tmp_path: Path) -> None:
    path = helpers.write_lines(tmp_path / "texts.jsonl", [{"text": "The llama."}])
    with pytest.raises(ConfigError, match="does not give prompts, which are needed here; prompts, dialogs, alpaca"):
        read_prompts((path,), "jsonl_text")


def test_some_are_kept_apart() -> None:
    every = helpers.prompts(20)
    rest, some = apart(every, 6, seed=3)
    assert len(some) == 6 and sorted(p["id"] for p in [*rest, *some]) == sorted(p["id"] for p in every)
    assert apart(every, 6, seed=3) == (rest, some) != apart(every, 6, seed=4)
    for n in (0, 20):
        with pytest.raises(ConfigError, match=f"held_out_prompts is {n} of 20 prompts"):
            apart(every, n, seed=3)
