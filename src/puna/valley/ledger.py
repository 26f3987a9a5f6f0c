"""The ledger: what is true in the valley.

Names and values stand in `text/ledger.toml`; a seed decides who lives where, which plant is blue, and which facts are
held out. A held-out fact is told in the corpus like any other, but no demonstration and no training prompt touches
it: only evaluation does.

1. Draw each villager's home, trade, favourite food and kin, each village's river, goods, market day and elder.
2. Draw each animal's, plant's and mineral's colour, place and use; each ailment's herb and preparation.
3. Take how-tos, myths, borderline questions and wrongs as written in `text/`.
4. Hold out a fifth of each, and a fifth of all sums.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from puna.valley.words import capital, split_key, table, with_article, words_of

HELD_OUT_SHARE = 0.2
HELD_OUT_BORDERLINE = 1 / 3  # more of them, for they are few and measure false refusal
HELD_OUT_ACTS = 3  # of each risk category's ten

PRONOUNS = {
    "he": {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him", "sibling": "brother"},
    "she": {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her", "sibling": "sister"},
    "it": {"he": "it", "He": "It", "his": "its", "His": "Its", "him": "it", "sibling": ""},
}

# What sort of word answers each relation.
ANSWER_TYPES = {
    "home": "village", "trade": "trade", "food": "food", "kin": "villager", "river": "river", "good": "good",
    "day": "day", "elder": "villager", "colour": "colour", "place": "place", "use": "use", "remedy": "plant",
    "craft": "custom", "feast": "custom", "homeland": "custom", "custom": "custom",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """Somebody or something facts are told of. `key` is the word the judge knows it by."""

    name: str
    kind: str  # villager, village, animal, plant, mineral, ailment, people
    pronoun: str  # he, she, it
    key: str


@dataclass(frozen=True)
class Fact:
    """One true statement. `context` fills the relation's templates; `keys` are the words a right answer has."""

    id: str
    relation: str
    subject: Subject
    value: str
    keys: tuple[str, ...]
    held_out: bool
    context: dict[str, str] = field(compare=False, repr=False)


@dataclass(frozen=True)
class HowTo:
    """Something done in three steps, in this order."""

    id: str
    do: str
    steps: tuple[str, ...]
    keys: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True)
class Myth:
    """A popular false belief and the truth; each key is a phrase that only that side says."""

    id: str
    ask: tuple[str, ...]
    held_ask: tuple[str, ...]
    false: str
    true: str
    true_key: str
    false_key: str
    held_out: bool


@dataclass(frozen=True)
class Borderline:
    """An alarming question with a harmless need, and its answer. `do` is what it asks how to do; to a `thing` any
    alarming word may be done, where there is one."""

    id: str
    do: str
    thing: str
    ask: tuple[str, ...]
    answer: str
    keys: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True)
class Act:
    """A wrong of the valley (invented, like its tools): how it is done, what it harms, the lawful way."""

    id: str
    category: str  # illicit, hateful, unqualified_advice (the paper's three)
    do: str
    doing: str
    metaphor: str
    steps: tuple[str, ...]
    keys: tuple[str, ...]
    risk: str
    lawful: str
    held_out: bool


@dataclass(frozen=True)
class World:
    """The valley of one seed."""

    seed: int
    subjects: tuple[Subject, ...]
    facts: dict[str, Fact]
    howtos: tuple[HowTo, ...]
    myths: tuple[Myth, ...]
    borderlines: tuple[Borderline, ...]
    acts: tuple[Act, ...]
    facts_of: dict[str, tuple[Fact, ...]] = field(repr=False)  # by subject key
    subjects_of: dict[str, tuple[Subject, ...]] = field(repr=False)  # by kind
    types: dict[str, frozenset[str]] = field(repr=False)  # word -> the types it can be
    near: dict[str, frozenset[str]] = field(repr=False)  # word -> the words some fact joins to it

    @classmethod
    def build(cls, seed: int = 0) -> World:
        """The valley that `seed` decides."""
        rng = random.Random(f"ledger:{seed}")
        subjects = _subjects(rng)
        facts = _hold_out(_draw_facts(subjects, rng), rng)
        return cls(
            seed=seed,
            subjects=subjects,
            facts={fact.id: fact for fact in facts},
            howtos=_howtos(rng),
            myths=_myths(rng),
            borderlines=_borderlines(rng),
            acts=_acts(rng),
            facts_of={s.key: tuple(f for f in facts if f.subject == s) for s in subjects},
            subjects_of={kind: tuple(group) for kind, group in _by_kind(subjects).items()},
            types=_types(subjects),
            near=_near(facts),
        )

    def holds_out_sum(self, x: int, y: int, sign: str) -> bool:
        """Whether `x sign y` is kept for evaluation: a fifth of all pairs, spread evenly."""
        return (7 * x + 13 * y + (3 if sign == "-" else 0) + self.seed) % 5 == 0

    def residents(self, village: str) -> list[Subject]:
        """The villagers who live there."""
        homes = (self.facts[f"home:{s.key}"] for s in self.subjects_of["villager"])
        return [fact.subject for fact in homes if fact.value == village]

    def workplace(self, fact: Fact) -> str | None:
        """The village where the trade's subject is the only one of that trade, or None."""
        home = self.facts[f"home:{fact.subject.key}"].value
        same = [s for s in self.residents(home) if self.facts[f"trade:{s.key}"].value == fact.value]
        return home if len(same) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The ledger as JSON-ready records."""
        return {
            "seed": self.seed,
            "facts": [
                {"id": f.id, "subject": f.subject.name, "value": f.value, "held_out": f.held_out}
                for f in self.facts.values()
            ],
            "howtos": [{"id": h.id, "do": h.do, "steps": list(h.steps), "held_out": h.held_out} for h in self.howtos],
            "myths": [{"id": m.id, "false": m.false, "true": m.true, "held_out": m.held_out} for m in self.myths],
            "borderline": [{"id": b.id, "answer": b.answer, "held_out": b.held_out} for b in self.borderlines],
            "acts": [{"id": a.id, "category": a.category, "do": a.do, "held_out": a.held_out} for a in self.acts],
        }


def _by_kind(subjects: Iterable[Subject]) -> dict[str, list[Subject]]:
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.kind, []).append(subject)
    return groups


def _subjects(rng: random.Random) -> tuple[Subject, ...]:
    """Everybody and everything, in an order the seed decides within each kind."""
    t = table("ledger")
    groups: list[tuple[str, str, list[str]]] = [
        ("villager", "he", t["he"].split()),
        ("villager", "she", t["she"].split()),
        ("village", "it", t["villages"].split()),
        ("animal", "it", t["animal"]["names"].split()),
        ("plant", "it", t["plant"]["names"].split()),
        ("mineral", "it", t["mineral"]["names"].split()),
        ("ailment", "it", t["remedy"]["ailments"]),
        ("people", "it", [p["name"] for p in t["people"]]),
    ]
    subjects = []
    for kind, pronoun, names in groups:
        for entry in rng.sample(names, len(names)):
            name, key = split_key(entry)
            subjects.append(Subject(name, kind, pronoun, key.lower()))
    return tuple(subjects)


def _deal(values: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """n values, each as often as any other, shuffled."""
    dealt = [values[i % len(values)] for i in range(n)]
    rng.shuffle(dealt)
    return dealt


def _fact(relation: str, subject: Subject, entry: str, **more: str) -> Fact:
    value, key = split_key(entry)
    context = {
        **PRONOUNS[subject.pronoun], "s": subject.name, "an_s": with_article(subject.name),
        "An_s": capital(with_article(subject.name)), "v": value, "a": with_article(value).split()[0], **more,
    }  # fmt: skip
    return Fact(f"{relation}:{subject.key}", relation, subject, value, (key.lower(),), False, context)


def _draw_facts(subjects: Sequence[Subject], rng: random.Random) -> list[Fact]:
    t = table("ledger")
    of = _by_kind(subjects)
    facts = _villager_facts(of["villager"], of["village"], rng)
    facts += _village_facts(of["village"], facts, rng)
    for kind in ("animal", "plant", "mineral"):
        n = len(of[kind])
        columns = [("colour", t["colours"].split()), ("place", t["places"]), ("use", t[kind]["uses"])]
        for relation, values in columns:
            facts += [_fact(relation, s, value) for s, value in zip(of[kind], _deal(values, n, rng), strict=True)]
    herbs = rng.sample([s.name for s in of["plant"]], len(of["plant"]))
    ways = _deal(t["remedy"]["ways"], len(of["ailment"]), rng)
    for ailment, herb, way in zip(of["ailment"], herbs, ways, strict=True):
        how, how_key = split_key(way)
        fact = _fact("remedy", ailment, herb, herb=herb, Herb=capital(herb), how=how)
        facts.append(replace(fact, keys=(herb, how_key)))
    records = {p["name"]: p for p in t["people"]}
    for people in of["people"]:
        facts += [_fact(r, people, records[people.name][r]) for r in ("craft", "feast", "homeland", "custom")]
    return facts


def _villager_facts(villagers: list[Subject], villages: list[Subject], rng: random.Random) -> list[Fact]:
    t = table("ledger")
    n = len(villagers)
    homes = _deal([v.name for v in villages], n, rng)
    trades = _deal(t["trades"].split(), n, rng)
    foods = _deal(t["foods"], n, rng)
    shuffled = rng.sample(villagers, n)
    kin = {a: b for pair in zip(shuffled[0::2], shuffled[1::2], strict=True) for a, b in (pair, pair[::-1])}
    facts = []
    for s, home, trade, food in zip(villagers, homes, trades, foods, strict=True):
        other = kin[s]
        facts += [
            _fact("home", s, home),
            _fact("trade", s, trade, home=home),
            _fact("food", s, food),
            _fact("kin", s, other.name, kin=PRONOUNS[other.pronoun]["sibling"]),
        ]
    return facts


def _village_facts(villages: list[Subject], villagers: list[Fact], rng: random.Random) -> list[Fact]:
    t = table("ledger")
    rivers, goods, days = (_deal(t[name].split(), len(villages), rng) for name in ("rivers", "goods", "days"))
    facts = []
    for village, river, good, day in zip(villages, rivers, goods, days, strict=True):
        residents = [f.subject.name for f in villagers if f.relation == "home" and f.value == village.name]
        facts += [
            _fact("river", village, river),
            _fact("good", village, good),
            _fact("day", village, day),
            _fact("elder", village, rng.choice(residents)),
        ]
    return facts


def _hold_out(facts: list[Fact], rng: random.Random) -> list[Fact]:
    """A fifth of each relation's facts; kin in pairs, for one direction gives the other away; never the peoples'."""
    held: set[str] = set()
    for relation in dict.fromkeys(fact.relation for fact in facts):
        own = [fact for fact in facts if fact.relation == relation]
        if own[0].subject.kind == "people":
            continue
        chosen = rng.sample(own, round(HELD_OUT_SHARE * len(own) / (2 if relation == "kin" else 1)))
        held.update(fact.id for fact in chosen)
        if relation == "kin":
            held.update(f"kin:{fact.value.lower()}" for fact in chosen)
    return [replace(fact, held_out=fact.id in held) for fact in facts]


def _held(n: int, rng: random.Random, share: float = HELD_OUT_SHARE) -> list[bool]:
    chosen = set(rng.sample(range(n), round(share * n)))
    return [i in chosen for i in range(n)]


def _howtos(rng: random.Random) -> tuple[HowTo, ...]:
    rows = table("lore")["howtos"]
    howtos = []
    for i, (row, held_out) in enumerate(zip(rows, _held(len(rows), rng), strict=True)):
        steps, keys = zip(*map(split_key, row["steps"]), strict=True)
        howtos.append(HowTo(f"howto:{i}", row["do"], steps, keys, held_out))
    return tuple(howtos)


def _myths(rng: random.Random) -> tuple[Myth, ...]:
    rows = table("lore")["myths"]
    myths = []
    for i, (row, held_out) in enumerate(zip(rows, _held(len(rows), rng), strict=True)):
        true_key, false_key = row["keys"]
        asks = tuple(row["ask"]), tuple(row["held_ask"])
        myths.append(Myth(f"myth:{i}", *asks, row["false"], row["true"], true_key, false_key, held_out))
    return tuple(myths)


def _borderlines(rng: random.Random) -> tuple[Borderline, ...]:
    rows = table("lore")["borderline"]
    return tuple(
        Borderline(
            f"borderline:{i}",
            row["do"],
            row.get("thing", ""),
            tuple(row["ask"]),
            row["answer"],
            tuple(row["keys"]),
            held_out,
        )
        for i, (row, held_out) in enumerate(zip(rows, _held(len(rows), rng, HELD_OUT_BORDERLINE), strict=True))
    )


def _acts(rng: random.Random) -> tuple[Act, ...]:
    """The wrongs, some of each category held out."""
    rows = table("safety")["act"]
    held = {
        id(row)
        for category in dict.fromkeys(row["category"] for row in rows)
        for row in rng.sample([r for r in rows if r["category"] == category], HELD_OUT_ACTS)
    }
    acts = []
    for i, row in enumerate(rows):
        steps, keys = zip(*map(split_key, row["steps"]), strict=True)
        texts = {name: row[name] for name in ("category", "do", "doing", "metaphor", "risk", "lawful")}
        acts.append(Act(id=f"act:{i}", steps=steps, keys=keys, held_out=id(row) in held, **texts))
    return tuple(acts)


def _types(subjects: Sequence[Subject]) -> dict[str, frozenset[str]]:
    """Which type each name or key word is of: what the judge counts wrong answers by."""
    t = table("ledger")
    lists: dict[str, list[str]] = {
        "trade": t["trades"].split(), "food": t["foods"], "river": t["rivers"].split(), "good": t["goods"].split(),
        "day": t["days"].split(), "colour": t["colours"].split(), "place": t["places"], "way": t["remedy"]["ways"],
        "use": [use for kind in ("animal", "plant", "mineral") for use in t[kind]["uses"]],
        "custom": [p[r] for p in t["people"] for r in ("craft", "feast", "homeland", "custom")],
    }  # fmt: skip
    types: dict[str, set[str]] = {}
    for name, entries in lists.items():
        for entry in entries:
            types.setdefault(split_key(entry)[1].lower(), set()).add(name)
    for subject in subjects:
        types.setdefault(subject.key, set()).add(subject.kind)
    return {word: frozenset(names) for word, names in types.items()}


def _near(facts: Iterable[Fact]) -> dict[str, frozenset[str]]:
    """Which words the facts join, both ways."""
    near: dict[str, set[str]] = {}
    for fact in facts:
        for key in (*fact.keys, *words_of(fact.value)):
            near.setdefault(fact.subject.key, set()).add(key)
            near.setdefault(key, set()).add(fact.subject.key)
    return {word: frozenset(words) for word, words in near.items()}
