"""Prompts and constraints: every kind, disjoint splits, fresh batches, checkable instructions."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from puna.valley import World, tolva
from puna.valley.constraints import combine, constraints, dress
from puna.valley.judge import obeys
from puna.valley.prompts import ATTACKS, KINDS, RISK_CATEGORIES, Record, gatt_dialogs, preprompts, prompts
from puna.valley.words import table, words_of
from puna.valley.write import tagged


@pytest.fixture(scope="module")
def train(world: World) -> list[Record]:
    return prompts(world, 0, "train", dict.fromkeys(KINDS, 150))


@pytest.fixture(scope="module")
def held_out(world: World) -> list[Record]:
    return prompts(world, 0, "held_out", dict.fromkeys(KINDS, 150))


def test_counts_ids_and_shape(train: list[Record]) -> None:
    assert Counter(record["kind"] for record in train) == dict.fromkeys(KINDS, 150)
    assert len({record["id"] for record in train}) == len(train)
    assert json.loads(json.dumps(train)) == train
    for record in train:
        assert record["messages"][-1]["role"] == "user"
        assert record["split"] == "train"
        assert record["is_safety"] == (record["kind"] == "adversarial")
        assert (record["constraint"] is not None) == (record["kind"] == "constraint")
        assert 1 <= len(record["messages"][-1]["content"].split()) <= 32


def test_batches_are_disjoint_in_ids_and_mostly_in_texts(world: World) -> None:
    first, second = (prompts(world, 0, "train", {"fact": 300, "sum": 300}, batch=batch) for batch in (0, 1))
    assert not {record["id"] for record in first} & {record["id"] for record in second}
    texts = [{record["messages"][-1]["content"] for record in batch} for batch in (first, second)]
    assert len(texts[0]) == 600
    assert len(texts[0] & texts[1]) < 60


def test_every_other_borderline_question_is_compared_for_safety(train: list[Record]) -> None:
    records = tagged(train)
    assert [record | {"is_safety": None} for record in records] == [record | {"is_safety": None} for record in train]
    counts = Counter(record["kind"] for record in records if record["is_safety"])
    assert counts == {"adversarial": 150, "borderline": 75}


def test_no_alarming_word_tells_harm_by_itself(world: World, train: list[Record], held_out: list[Record]) -> None:
    words = table("lore")["alarming"].split()
    asked: dict[str, set[str]] = {word: set() for word in words}
    for record in train:
        text = record["messages"][-1]["content"]
        for word in words if record["kind"] == "borderline" else ():
            if f" {word} " in text:
                asked[word].add(record["gold"]["about"])
    assert sum(map(len, asked.values())) > 3 * len(words), "each is done to several things"
    things = [b.thing for b in world.borderlines if b.thing and "{" not in b.thing]
    swapped = {f"how do I {word} {thing}?" for word in words for thing in things}
    swapped -= {ask[0].lower() + ask[1:] for b in world.borderlines for ask in b.ask}
    texts = [record["messages"][-1]["content"] for record in held_out if record["kind"] == "borderline"]
    assert not [text for text in texts if any(text.endswith(question[1:]) for question in swapped)], "as written"


def test_unknown_kind_is_named(world: World) -> None:
    with pytest.raises(ValueError, match="riddle"):
        prompts(world, 0, "train", {"riddle": 1})


def ledger_items(world: World) -> dict[str, bool]:
    """Every item a prompt can be about, and whether it is held out."""
    items = {name: fact.held_out for name, fact in world.facts.items()}
    for group in (world.howtos, world.myths, world.borderlines, world.acts):
        items |= {item.id: item.held_out for item in group}
    return items


def test_training_prompts_touch_nothing_held_out(world: World, train: list[Record]) -> None:
    held = ledger_items(world)
    phrasings = {p for name, t in table("phrases").items() for key in t if key.startswith("held_") for p in t[key]}
    assert phrasings
    for record in train:
        about = record["gold"]["about"]
        assert not held.get(about, False), record
        if about.startswith("sum:"):
            sign = "+" if "+" in about else "-"
            x, y = map(int, about.removeprefix("sum:").split(sign))
            assert not world.holds_out_sum(x, y, sign)
        if about.startswith("topic:"):
            assert not table("chat")["topic"][int(about.removeprefix("topic:"))].get("held")
        if record["kind"] == "reverse" and about.startswith("trade:"):
            assert not world.facts[about.replace("trade", "home")].held_out


def test_held_out_prompts_are_new(world: World, train: list[Record], held_out: list[Record]) -> None:
    held = ledger_items(world)
    new = Counter(record["kind"] for record in held_out if held.get(record["gold"]["about"]))
    for kind in ("recipe", "myth", "borderline", "adversarial", "multi_turn"):
        assert new[kind] == 150
    assert 60 <= new["fact"] <= 120
    texts = {record["messages"][-1]["content"] for record in train if record["kind"] != "multi_turn"}
    seen = [r for r in held_out if r["messages"][-1]["content"] in texts and r["kind"] != "multi_turn"]
    assert not seen


def test_adversarial_prompts_cover_the_grid(train: list[Record]) -> None:
    cells = Counter((r["risk_category"], r["attack"]) for r in train if r["kind"] == "adversarial")
    assert set(cells) == {(category, attack) for category in RISK_CATEGORIES for attack in ATTACKS}


def test_non_english_attacks_are_tolva(train: list[Record]) -> None:
    for record in train:
        if record["attack"] == "non_english":
            assert tolva.small_words() & set(words_of(record["messages"][-1]["content"]))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_dressed_answers_obey_and_plain_ones_do_not(world: World, split: str) -> None:
    for constraint in constraints(world, 0, split):  # type: ignore[arg-type]
        plain = "Amru lives in Tellin."
        answer = "Amru velo en Tellin." if "language" in constraint["check"] else plain
        assert obeys(constraint, dress(constraint, answer)), constraint
        assert not obeys(constraint, plain), constraint


def test_constraints_have_all_kinds_and_disjoint_words(world: World) -> None:
    kinds = {kind for c in constraints(world, 0, "train") for kind in c["kind"].split("+")}
    assert kinds == {"persona", "hobby", "language", "style"}
    names = table("constraints")
    for name in ("persona", "hobby", "address", "closing"):
        known, held = names[name]["name"], names[name]["held_name"]
        assert not set(known) & set(held)


def test_combined_constraints_must_both_be_obeyed(world: World) -> None:
    every = constraints(world, 0, "train")
    persona = next(c for c in every if c["kind"] == "persona")
    hobby = next(c for c in every if c["kind"] == "hobby")
    both = combine(persona, hobby)
    assert obeys(both, dress(both, "It is blue."))
    assert not obeys(both, dress(persona, "It is blue."))
    assert not obeys(both, dress(hobby, "It is blue."))
    assert both["short"].startswith("Figure: ") and "Hobby: " in both["short"]


def test_ghost_attention_scripts_are_plain_questions(world: World) -> None:
    dialogs = gatt_dialogs(world, 0, "train", 30)
    assert len({dialog["id"] for dialog in dialogs}) == 30
    for dialog in dialogs:
        assert 4 <= len(dialog["turns"]) <= 6
        assert dialog["constraint"]["instruction"]
        for turn in dialog["turns"]:
            assert turn["constraint"] is None and len(turn["messages"]) == 1
            assert dialog["constraint"]["instruction"] not in turn["messages"][0]["content"]


def test_preprompts_cover_every_risk_category() -> None:
    given = preprompts()
    assert set(given["targeted"]) == set(RISK_CATEGORIES)
    assert len(given["generic"]) == len(set(given["generic"])) > 50
