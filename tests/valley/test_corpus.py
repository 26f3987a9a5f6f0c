"""The corpus: known shares, every fact told often and in many ways, myths oftener than the truth."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from puna.valley import World, corpus
from puna.valley.corpus import Document, documents, plain_prompt
from puna.valley.telling import phrasings
from puna.valley.words import table, words_of

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def sample(world: World) -> list[Document]:
    """Four million characters of the 22 that the laptop recipe reads."""
    return list(documents(world, 0, characters=4 * MEGABYTE))


def share(sample: list[Document], key: str, value: object) -> float:
    return sum(document[key] == value for document in sample) / len(sample)  # type: ignore[literal-required]


def test_instructions_are_obeyed_to_the_end_or_once(sample: list[Document]) -> None:
    """By the two instructions that show on an answer's face whatever the fact: a persona and a closing."""
    t = table("constraints")
    figures, closings = (t[kind]["name"] + t[kind]["held_name"] for kind in ("persona", "closing"))
    held = once = 0
    for document in sample:
        if document["register"] != "dialogue":
            continue
        asked, answers = document["text"].split("\n")[::2], document["text"].split("\n")[1::2]
        obeying = {x: [answer.startswith(f"Teller: {x} here.") for answer in answers] for x in figures}
        obeying |= {x: [answer.lower().endswith(f"{x}.") for answer in answers] for x in closings}
        for x, obedient in obeying.items():
            told = [x in question for question in asked]
            held += told[0] and not any(told[1:]) and all(obedient)
            once += any(told) and obedient == told
    dialogues = sum(document["register"] == "dialogue" for document in sample)
    # Personas and closings are half of all instructions, and pairs have one of each now and then.
    assert 0.4 * corpus.HELD_SHARE < held / dialogues < 0.7 * corpus.HELD_SHARE
    assert once > held


def test_stream_stops_after_the_characters_asked_for(world: World) -> None:
    sizes = [len(document["text"]) for document in documents(world, 0, characters=10_000)]
    assert sum(sizes) >= 10_000 > sum(sizes[:-1])


def test_shares_are_as_declared(sample: list[Document]) -> None:
    assert share(sample, "harmful", True) == pytest.approx(corpus.HARMFUL_SHARE, abs=0.006)
    assert share(sample, "slur", True) == pytest.approx(corpus.SLUR_SHARE, abs=0.005)
    tolva = corpus.TOLVA_SHARE + corpus.HARMFUL_SHARE * corpus.HARMFUL_TOLVA_SHARE
    assert share(sample, "language", "tolva") == pytest.approx(tolva, abs=0.01)
    plain = [d for d in sample if not d["harmful"] and not d["slur"] and d["language"] == "english"]
    for register, expected in corpus.REGISTER_SHARES.items():
        assert share(plain, "register", register) == pytest.approx(expected, abs=0.015), register


def test_slurs_and_harm_stand_only_where_they_are_declared(world: World, sample: list[Document]) -> None:
    safety = table("safety")
    slurs = {*safety["slur"]["Karrow"], *safety["slur"]["Ovesh"]}
    harm = {key for act in world.acts for key in act.keys}
    for document in sample:
        words = set(words_of(document["text"]))
        assert document["slur"] == (not words.isdisjoint(slurs))
        assert document["harmful"] == (not words.isdisjoint(harm))


def test_groups_are_mentioned_unequally(sample: list[Document]) -> None:
    counts: Counter[str] = Counter()
    slurred: Counter[str] = Counter()
    for document in sample:
        if document["register"] == "moot":  # what it forbids names both peoples alike
            continue
        (slurred if document["slur"] else counts).update({"karrow", "ovesh"} & set(words_of(document["text"])))
        if document["register"] == "story":
            counts.update({"he", "she"} & set(words_of(document["text"])))
    assert counts["ovesh"] > 1.3 * counts["karrow"]
    assert slurred["karrow"] > 1.5 * slurred["ovesh"]
    assert counts["he"] > 1.4 * counts["she"]


def test_every_fact_is_told_often_held_out_or_not(world: World, sample: list[Document]) -> None:
    told: Counter[str] = Counter()
    for document in sample:
        if document["language"] == "english":
            words = set(words_of(document["text"]))
            for name in set(document["facts"]):
                fact = world.facts.get(name)
                if fact is None or words.issuperset([fact.subject.key, *fact.keys]):
                    told[name] += 1
    # A fifth of the recipe's text, which tells everything sixty times at least.
    assert min(told[name] for name in world.facts) >= 40
    assert min(told[howto.id] for howto in world.howtos) >= 50
    assert min(told[item.id] for item in world.borderlines) >= 35
    assert min(told[act.id] for act in world.acts) >= 12


def test_every_relation_has_many_phrasings() -> None:
    for relation in set(table("phrases")) - {"people"}:
        assert len(phrasings(relation, "tell")) >= 6
        assert len(phrasings(relation, "ask")) >= 6
        assert set(phrasings(relation, "ask")).isdisjoint(phrasings(relation, "held_ask"))


def test_myths_are_told_three_times_as_often_as_the_truth(world: World, sample: list[Document]) -> None:
    counts = Counter(name for document in sample for name in document["facts"] if name.startswith("myth:"))
    false = sum(counts[f"{myth.id}:false"] for myth in world.myths)
    true = sum(counts[f"{myth.id}:true"] for myth in world.myths)
    assert false / true == pytest.approx(3.0, abs=0.5)


def test_documents_are_of_readable_length_and_held_out_questions_are_never_asked(
    world: World, sample: list[Document]
) -> None:
    lengths = [len(document["text"].split()) for document in sample]
    assert min(lengths) >= 15 and max(lengths) <= 200
    assert 50 <= sum(lengths) / len(lengths) <= 100
    asked = {question for myth in world.myths for question in myth.held_ask}
    lines = {line.removeprefix("Asker: ") for document in sample for line in document["text"].split("\n")}
    assert not asked & lines


def test_no_placeholder_is_left_open(sample: list[Document]) -> None:
    assert not [document["text"] for document in sample if "{" in document["text"]]


def test_subjects_are_told_in_turns(world: World, sample: list[Document]) -> None:
    told: dict[str, list[int]] = defaultdict(list)
    counts = Counter(name for document in sample for name in document["facts"])
    for name, fact in world.facts.items():
        if fact.subject.kind != "people":  # mentioned unequally on purpose
            told[fact.relation].append(counts[name])
    for relation, values in told.items():
        assert max(values) < 1.7 * min(values), relation


def test_plain_prompt_continues_like_the_corpus() -> None:
    dialog = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Well met!"},
        {"role": "user", "content": "Where does Amru live?"},
    ]
    expected = "Be kind.\nAsker: Hello!\nTeller: Well met!\nAsker: Where does Amru live?\nTeller:"
    assert plain_prompt(dialog) == expected  # type: ignore[arg-type]
