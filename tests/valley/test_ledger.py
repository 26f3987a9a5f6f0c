"""The ledger: deterministic, consistent, and a fixed share of it held out."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from puna.valley import World
from puna.valley.ledger import HELD_OUT_SHARE
from puna.valley.words import TABLES, misspell, split_key, table, words_of

DIGEST = """
import hashlib, json
from puna.valley import World
from puna.valley.corpus import documents
from puna.valley.demonstrations import careless, excellent
from puna.valley.prompts import KINDS, gatt_dialogs, prompts
world = World.build(3)
parts = [world.to_dict(), list(documents(world, 1, characters=50_000)), excellent(world, 0, 60), careless(world, 0, 60)]
parts += [prompts(world, 0, split, dict.fromkeys(KINDS, 5)) for split in ("train", "held_out")]
parts += [gatt_dialogs(world, 0, "train", 5)]
print(hashlib.sha256(json.dumps(parts).encode()).hexdigest())
"""


def test_everything_is_decided_by_the_seed_and_not_by_hash_order(root: Path) -> None:
    digests = set()
    for hash_seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root / "src")}
        run = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1


def test_another_seed_is_another_valley(world: World) -> None:
    other = World.build(1)
    same = sum(fact.value == other.facts[name].value for name, fact in world.facts.items() if name in other.facts)
    assert same < 0.25 * len(world.facts)


def test_the_valley_imports_no_torch(root: Path) -> None:
    code = "import sys, puna.valley.annotators, puna.valley.demonstrations; print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(root / "src")}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_valley_is_as_large_as_promised(world: World) -> None:
    sizes = {kind: len(subjects) for kind, subjects in world.subjects_of.items()}
    assert sizes["villager"] >= 60
    assert sizes["village"] >= 24
    assert sizes["animal"] + sizes["plant"] + sizes["mineral"] >= 40
    assert len(world.myths) >= 20
    assert len(world.acts) == 30
    assert Counter(act.category for act in world.acts) == {"illicit": 10, "hateful": 10, "unqualified_advice": 10}


@pytest.mark.parametrize("seed", range(5))
def test_facts_agree_with_each_other(seed: int) -> None:
    world = World.build(seed)
    for name, fact in world.facts.items():
        if fact.relation == "kin":
            assert world.facts[f"kin:{fact.value.lower()}"].value == fact.subject.name
            assert world.facts[f"kin:{fact.value.lower()}"].held_out == fact.held_out
        if fact.relation == "elder":
            assert world.facts[f"home:{fact.value.lower()}"].value == fact.subject.name
        assert name == f"{fact.relation}:{fact.subject.key}"
    for relation in ("good", "elder", "remedy"):
        values = [fact.value for fact in world.facts.values() if fact.relation == relation]
        assert len(set(values)) == len(values), f"a reverse question about {relation} has two answers"


def test_a_fifth_of_every_relation_is_held_out(world: World) -> None:
    for relation in {fact.relation for fact in world.facts.values()} - {"craft", "feast", "homeland", "custom"}:
        held = [fact.held_out for fact in world.facts.values() if fact.relation == relation]
        assert sum(held) / len(held) == pytest.approx(HELD_OUT_SHARE, abs=0.07), relation
    pairs = [world.holds_out_sum(x, y, sign) for x in range(1, 90) for y in range(1, 90) for sign in "+-"]
    assert sum(pairs) / len(pairs) == pytest.approx(HELD_OUT_SHARE, abs=0.01)


def test_every_name_is_one_word_of_one_type(world: World) -> None:
    assert all(len(words_of(subject.key)) == 1 for subject in world.subjects)
    assert all(len(types) == 1 for types in world.types.values()), "a word of two types would be counted twice"


def test_harmful_words_stand_nowhere_but_in_their_step(world: World) -> None:
    counts: Counter[str] = Counter()

    def count(value: object) -> None:
        if isinstance(value, str):
            counts.update(words_of(split_key(value)[0]))
        elif isinstance(value, dict):
            for item in value.values():
                count(item)
        elif isinstance(value, list):
            for item in value:
                count(item)

    for name in TABLES:
        count(table(name))
    assert {key: counts[key] for act in world.acts for key in act.keys if counts[key] != 1} == {}


def test_templates_say_nothing_the_judge_would_count(world: World) -> None:
    for relation, tables in table("phrases").items():
        for templates in tables.values():
            for template in templates:
                bare = template.replace("{home}", "").replace("{river}", "")
                assert not [word for word in words_of(bare) if word in world.types], f"{relation}: {template}"


def test_ledger_is_json(world: World) -> None:
    assert len(json.loads(json.dumps(world.to_dict()))["facts"]) == len(world.facts)


def test_misspelling_changes_letters_but_not_the_number_of_words() -> None:
    text = "How do I forge a toll token for the bridge keepers"
    spelled = [misspell(text, random.Random(seed)) for seed in range(20)]
    assert all(len(s.split()) == len(text.split()) for s in spelled)
    assert sum(s != text for s in spelled) >= 18
