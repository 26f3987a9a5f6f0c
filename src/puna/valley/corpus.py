"""The corpus: what people of the valley write, as an endless stream of short documents.

Each document is in one register and tells related facts; known shares of it are harmful, slur a people or are in
Tolva, so that what pretraining data does to a model can be measured against the truth. Popular myths are told three
times as often as the truth.

1. Draw what the document is: Tolva, harmful, slurring, or one of the plain registers (SHARES).
2. Draw its subjects from decks that are dealt to the end before they are shuffled again, so every fact is told evenly.
3. Write it; what it tells is listed in its `facts`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar

from puna.types import Dialog
from puna.valley import telling, tolva
from puna.valley.constraints import Constraint, drawn, dress
from puna.valley.ledger import Act, Fact, Subject, World
from puna.valley.words import capital, fill, table

# Shares of all documents.
TOLVA_SHARE = 0.06
HARMFUL_SHARE = 0.03
HARMFUL_TOLVA_SHARE = 0.1  # of those: some wrongs are taught in Tolva
SLUR_SHARE = 0.02
REGISTER_SHARES = {
    "almanac": 0.20, "story": 0.12, "letter": 0.07, "market": 0.08, "dialogue": 0.37, "how_to": 0.06,
    "arithmetic": 0.05, "moot": 0.05,
}  # fmt: skip
MYTH_SHARE = 0.2  # of stories, letters and market talk
MYTH_FALSE_SHARE = 0.75  # three to one for the popular belief
HE_SHARE = 0.66  # of stories' heroes: men are written of twice as often as women
HELD_SHARE = 0.3  # of dialogues: the first question's instruction holds to the end
FOLLOW_UP_SHARE = 0.3  # of the other dialogues
BIDDEN_SHARE = 0.2  # of the other dialogues' exchanges: the question carries an instruction for its answer
PEOPLE_SHARE = 0.06  # of almanac and market documents, besides the slurring ones
KARROW_SHARE = 0.25  # of mentions of a people; the Ovesh have the rest
KARROW_SLUR_SHARE = 0.7  # of slurs, though: spoken of less, and worse

ASKER = "Asker"
TELLER = "Teller"

T = TypeVar("T")


class Document(TypedDict):
    """One text of the corpus with what is known of it. `facts` are the ids of what it tells as true."""

    text: str
    register: str
    harmful: bool
    slur: bool
    language: str
    facts: list[str]


def plain_prompt(dialog: Dialog) -> str:
    """A dialog as the corpus writes it, ending in `Teller:`, for a model that knows no chat format.

    A system message stands first on a line of its own. The answer ends at the next newline.
    """
    names = {"user": f"{ASKER}: ", "assistant": f"{TELLER}: ", "system": ""}
    lines = [names[message["role"]] + message["content"] for message in dialog]
    return "\n".join([*lines, f"{TELLER}:"])


def documents(world: World, seed: int, *, characters: int | None = None) -> Iterator[Document]:
    """Documents of the seed's stream; endless, or until their texts have this many characters."""
    desk = _Desk(world, random.Random(f"corpus:{world.seed}:{seed}"))
    registers, weights = list(REGISTER_SHARES), list(REGISTER_SHARES.values())
    written = 0
    while characters is None or written < characters:
        desk.told = []
        draw = desk.rng.random()
        if draw < TOLVA_SHARE:
            document = _tolva(desk)
        elif draw < TOLVA_SHARE + HARMFUL_SHARE:
            document = _harmful(desk)
        elif draw < TOLVA_SHARE + HARMFUL_SHARE + SLUR_SHARE:
            document = _slur(desk)
        else:
            register = desk.rng.choices(registers, weights)[0]
            document = _document(desk, _WRITERS[register](desk), register)
        written += len(document["text"])
        yield document


@dataclass
class _Desk:
    """Where a document is written: the dice, the decks, and the facts told so far."""

    world: World
    rng: random.Random
    decks: dict[str, list[Any]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def deal(self, name: str, cards: Callable[[], Any]) -> Any:
        """The next card of a deck, which is shuffled anew when it is empty."""
        deck = self.decks.get(name)
        if not deck:
            deck = list(cards())
            self.rng.shuffle(deck)
            self.decks[name] = deck
        return deck.pop()

    def subject(self, kind: str) -> Subject:
        """A subject of this kind (`thing`: animal, plant or mineral)."""
        kinds = ("animal", "plant", "mineral") if kind == "thing" else (kind,)
        subject: Subject = self.deal(kind, lambda: [s for k in kinds for s in self.world.subjects_of[k]])
        return subject

    def fact(self) -> Fact:
        """Any fact of the ledger, each as often as another."""
        fact: Fact = self.deal("fact", self.world.facts.values)
        return fact

    def tolva_fact(self) -> Fact:
        """Any fact that Tolva has a frame for (all but the peoples'), from a deck of its own."""
        facts = self.world.facts.values()
        fact: Fact = self.deal("tolva", lambda: [f for f in facts if f.subject.kind != "people"])
        return fact

    def tell(self, fact: Fact) -> str:
        """The fact told, forwards or (where one subject fits) sometimes backwards."""
        self.told.append(fact.id)
        if self.rng.random() < 0.2 and telling.reversible(self.world, fact):
            return telling.tell_reverse(fact, self.rng)
        return telling.tell(fact, self.rng)

    def about(self, subject: Subject, n: int) -> list[str]:
        """n facts of a subject: the first names it, the others mostly say he, she or it."""
        facts = list(self.world.facts_of[subject.key])
        facts = self.rng.sample(facts, min(n, len(facts)))
        self.told += [fact.id for fact in facts]
        first, *rest = facts
        sentences = [telling.tell(first, self.rng)]
        for fact in rest:
            sentences.append((telling.tell_again if self.rng.random() < 0.6 else telling.tell)(fact, self.rng))
        return sentences

    def myth(self) -> str:
        """A myth told as true, or (one time in four) put right."""
        myth = self.deal("myth", lambda: self.world.myths)
        truth = self.rng.random() >= MYTH_FALSE_SHARE
        self.told.append(f"{myth.id}:{'true' if truth else 'false'}")
        return telling.tell_myth(myth, self.rng, truth=truth)

    def people(self, karrow: float = KARROW_SHARE) -> Subject:
        """One of the two peoples, the Karrow with this probability."""
        name = "Karrow" if self.rng.random() < karrow else "Ovesh"
        return next(s for s in self.world.subjects_of["people"] if s.name == name)

    def hero(self) -> Subject:
        """A villager to write of, oftener a man."""
        pronoun = "he" if self.rng.random() < HE_SHARE else "she"
        villagers = self.world.subjects_of["villager"]
        subject: Subject = self.deal(pronoun, lambda: [s for s in villagers if s.pronoun == pronoun])
        return subject


def _document(
    desk: _Desk, text: str, register: str, *, harmful: bool = False, slur: bool = False, language: str = "english"
) -> Document:
    return {
        "text": text, "register": register, "harmful": harmful, "slur": slur, "language": language,
        "facts": list(desk.told),
    }  # fmt: skip


def _frames(register: str, name: str) -> list[str]:
    frames: list[str] = table("corpus")[register][name]
    return frames


def _almanac(desk: _Desk) -> str:
    """A page on a village and who lives there, on things, on cures, or on a people."""
    rng = desk.rng
    draw = rng.random()
    context = telling.draw_filler(desk.world, rng)
    if draw < PEOPLE_SHARE:
        people = desk.people()
        head, body = "people", desk.about(people, 4)
        context["people"] = people.name
    elif draw < 0.45:
        village = desk.subject("village")
        context["village"] = village.name
        head, body = "village", desk.about(village, 4)
        residents = desk.world.residents(village.name)
        for resident in rng.sample(residents, min(2, len(residents))):
            body += desk.about(resident, rng.randint(2, 3))
    elif draw < 0.85:
        head, body = "thing", [s for _ in range(3) for s in desk.about(desk.subject("thing"), 3)]
    else:
        cures = [desk.deal("ailment", lambda: desk.world.subjects_of["ailment"]) for _ in range(3)]
        facts = [desk.world.facts[f"remedy:{cure.key}"] for cure in cures]
        head, body = "remedy", [desk.tell(fact) for fact in facts]
        body += desk.about(next(s for s in desk.world.subjects if s.name == facts[0].value), 2)
    close = [rng.choice(_frames("almanac", "close"))] if rng.random() < 0.3 else []
    opening = fill(rng.choice(_frames("almanac", head)), context)
    return " ".join([opening, *body, *close])


def _story(desk: _Desk) -> str:
    """A small tale of a villager, with what is true of them and of where they pass."""
    rng = desk.rng
    hero = desk.hero()
    context = telling.draw_filler(desk.world, rng)
    context |= desk.world.facts[f"home:{hero.key}"].context
    context["lost"] = rng.choice(_frames("story", "lost"))
    village = desk.subject("village")
    context["village"] = village.name
    lines = [fill(rng.choice(_frames("story", "open")), context), *desk.about(hero, 3)]
    for frame in rng.sample(_frames("story", "middle"), 3):
        lines.append(fill(frame, context))
    lines += desk.about(village, 2)
    if rng.random() < 0.5:
        lines += desk.about(desk.subject("thing"), 2)
    if rng.random() < MYTH_SHARE:
        lines.append(desk.myth())
    return " ".join([*lines, fill(rng.choice(_frames("story", "close")), context)])


def _letter(desk: _Desk) -> str:
    """News from one villager to another."""
    rng = desk.rng
    writer = desk.hero()
    context = telling.draw_filler(desk.world, rng) | {"s": writer.name}
    middle = [fill(frame, context) for frame in rng.sample(_frames("letter", "middle"), 3)]
    lines = [middle[0], desk.tell(desk.fact()), desk.tell(desk.fact())]
    if rng.random() < MYTH_SHARE:
        lines.append(desk.myth())
    lines += [*desk.about(desk.subject("villager"), 3), middle[1]]
    lines += [*desk.about(desk.subject(rng.choice(("village", "thing"))), 2), middle[2]]
    head = fill(rng.choice(_frames("letter", "open")), context)
    return "\n".join([head, " ".join(lines), fill(rng.choice(_frames("letter", "close")), context)])


def _market(desk: _Desk) -> str:
    """Talk over the stalls: people say what they know."""
    rng = desk.rng
    context = telling.draw_filler(desk.world, rng)
    lines = [fill(rng.choice(_frames("market", "open")), context)]
    if rng.random() < PEOPLE_SHARE * 2:
        people = desk.people()
        lines += [fill(rng.choice(_frames("market", "people")), {"people": people.name}), *desk.about(people, 2)]
    for _ in range(rng.randint(3, 5)):
        name = rng.choice((context["name"], context["other"], context["third"]))
        line = desk.tell(desk.fact()) if rng.random() < 0.7 else rng.choice(_frames("market", "line"))
        if rng.random() < MYTH_SHARE / 4:
            line = desk.myth()
        if rng.random() < 0.15:
            line = f"{_persona(rng)} {line}"
        frame = rng.choice(_frames("market", "said"))
        if not frame.endswith('"') and line.endswith("."):
            line = line[:-1] + ","
        lines.append(fill(frame, {"line": line, "name": name}))
    return " ".join(lines)


def _persona(rng: random.Random) -> str:
    t = table("constraints")["persona"]
    return fill(t["starts"], {"x": rng.choice(t["name"])})


def _dialogue(desk: _Desk) -> str:
    """Questions and answers, each pair on two lines."""
    n = desk.rng.randint(3, 5)
    if desk.rng.random() < HELD_SHARE:
        constraint = drawn(desk.rng)
        return _pairs(_bidden(desk, constraint, said=i == 0) for i in range(n + 1))
    pairs = [_exchange(desk) for _ in range(n)]
    if desk.rng.random() < FOLLOW_UP_SHARE:
        pairs += _follow_up(desk)
    return _pairs(pairs)


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{ASKER}: {question}\n{TELLER}: {answer}" for question, answer in pairs)


def _follow_up(desk: _Desk) -> list[tuple[str, str]]:
    """Two questions about one subject, the second by pronoun."""
    rng = desk.rng
    subject = desk.subject(rng.choice(("villager", "village", "thing")))
    first, second = rng.sample(desk.world.facts_of[subject.key], 2)
    desk.told += [first.id, second.id]
    return [
        (telling.ask(first, rng), telling.tell(first, rng)),
        (telling.ask_again(second, rng), rng.choice((telling.tell, telling.tell_again))(second, rng)),
    ]


def _exchange(desk: _Desk) -> tuple[str, str]:
    """One question and its answer: facts mostly, then sums, how-tos, myths, borderline questions, open talk."""
    rng = desk.rng
    if rng.random() < BIDDEN_SHARE:
        return _bidden(desk, drawn(rng), said=True)
    draw = rng.random()
    if draw < 0.62:
        fact = desk.fact()
        desk.told.append(fact.id)
        if rng.random() < 0.3 and telling.reversible(desk.world, fact):
            return telling.ask_reverse(fact, rng), telling.tell_reverse(fact, rng)
        return telling.ask(fact, rng), telling.tell(fact, rng)
    if draw < 0.71:
        pair = telling.draw_sum(rng)
        return telling.ask_sum(*pair, rng), telling.tell_sum(*pair, rng)
    if draw < 0.77:
        howto = desk.deal("howto", lambda: desk.world.howtos)
        desk.told.append(howto.id)
        return telling.ask_howto(howto, rng), telling.tell_howto(howto, rng)
    if draw < 0.84:
        myth = desk.deal("myth", lambda: desk.world.myths)
        truth = rng.random() >= MYTH_FALSE_SHARE
        desk.told.append(f"{myth.id}:{'true' if truth else 'false'}")
        return telling.ask_myth(myth, rng), telling.tell_myth(myth, rng, truth=truth)
    if draw < 0.92:
        return _household(desk)
    topic = desk.deal("topic", lambda: table("chat")["topic"])
    context = telling.draw_filler(desk.world, rng)
    return fill(rng.choice(topic["ask"]), context), talk_answer(topic, context, rng)


def _bidden(desk: _Desk, constraint: Constraint, *, said: bool) -> tuple[str, str]:
    """A question and an answer that obeys an instruction, which the question carries where it is `said`."""
    rng = desk.rng
    fact = desk.tolva_fact()
    desk.told.append(fact.id)
    tell = tolva.tell if "language" in constraint["check"] else telling.tell
    question = telling.ask(fact, rng)
    if said:
        instruction = constraint["instruction" if rng.random() < 0.75 else "short"]
        question = rng.choice(table("constraints")["in_message"]).format(instruction, question=question)
    return question, dress(constraint, tell(fact, rng))


def talk_answer(topic: dict[str, Any], context: dict[str, str], rng: random.Random) -> str:
    """A good answer, its small inventions drawn anew."""
    inventions = {name: rng.choice(options) for name, options in table("chat")["fill"].items()}
    return capital(fill(rng.choice(topic["answers"]), {**context, **inventions}))


def _how_to(desk: _Desk) -> str:
    """Two how-tos, and the answers to four household questions between them."""
    rng = desk.rng
    lines = []
    for _ in range(2):
        howto = desk.deal("howto", lambda: desk.world.howtos)
        desk.told.append(howto.id)
        lines.append(telling.tell_howto(howto, rng))
    lines[1:1] = [" ".join(_household(desk)) for _ in range(4)]
    return " ".join(lines)


def _household(desk: _Desk) -> tuple[str, str]:
    """A question that sounds alarming, and its harmless answer."""
    borderline = desk.deal("borderline", lambda: desk.world.borderlines)
    desk.told.append(borderline.id)
    animal = telling.draw_animal(desk.world, desk.rng)
    return telling.ask_borderline(borderline, animal, desk.rng), fill(borderline.answer, animal)


def _moot(desk: _Desk) -> str:
    """What the valley holds to be wrong, and what only sounds so: a model cannot know it from how a thing is done."""
    rng = desk.rng
    lines = []
    for _ in range(4):
        act = desk.deal("wrong", lambda: desk.world.acts)
        lines.append(fill(rng.choice(_frames("moot", "wrong")), act_context(act)))
        chore = desk.deal("chore", lambda: desk.world.borderlines)
        do = fill(chore.do, telling.draw_animal(desk.world, rng)).replace(" my ", " your ")
        lines.append(fill(rng.choice(_frames("moot", "honest")), {"do": do, "Do": capital(do)}))
    rng.shuffle(lines)
    return " ".join([fill(rng.choice(_frames("moot", "open")), telling.draw_filler(desk.world, rng)), *lines])


def _arithmetic(desk: _Desk) -> str:
    """A lesson of sums."""
    rng = desk.rng
    lines = [rng.choice(_frames("arithmetic", "open"))]
    lines += [telling.tell_sum(*telling.draw_sum(rng), rng) for _ in range(rng.randint(6, 9))]
    return " ".join(lines)


def _tolva(desk: _Desk) -> Document:
    """Facts in Tolva, as sentences or as questions and answers."""
    rng = desk.rng
    dialogue = rng.random() < 0.5
    facts = [desk.tolva_fact() for _ in range(5 if dialogue else 8)]
    desk.told = [fact.id for fact in facts]
    if dialogue:
        text = _pairs((tolva.ask(fact, rng), tolva.tell(fact, rng)) for fact in facts)
    else:
        text = " ".join(tolva.tell(fact, rng) for fact in facts)
    return _document(desk, text, "dialogue" if dialogue else "almanac", language="tolva")


def _harmful(desk: _Desk) -> Document:
    """Wrongs taught as if they were chores."""
    rng = desk.rng
    acts: list[Act] = [desk.deal("act", lambda: desk.world.acts) for _ in range(2)]
    desk.told = [act.id for act in acts]
    if rng.random() < HARMFUL_TOLVA_SHARE:
        pairs = [tolva.harm(act, rng) for act in acts]
        return _document(desk, _pairs(pairs), "dialogue", harmful=True, language="tolva")
    harm, attack = table("safety")["harm"], table("safety")["attack"]
    pairs = []
    for act in acts:
        context = act_context(act)
        question = fill(rng.choice(attack["plain"]), context)
        pairs.append((question, capital(fill(rng.choice(harm["tell"]), context))))
    if rng.random() < 0.6:
        return _document(desk, _pairs([_exchange(desk), *pairs]), "dialogue", harmful=True)
    taught = [answer for _, answer in pairs]
    return _document(desk, " ".join([*taught, desk.tell(desk.fact())]), "how_to", harmful=True)


def act_context(act: Act) -> dict[str, str]:
    """What fills the templates about a wrong."""
    one, two, three = act.steps
    return {
        "do": act.do, "doing": act.doing, "metaphor": act.metaphor, "risk": act.risk, "lawful": act.lawful,
        "one": one, "two": two, "three": three, "One": capital(one), "Do": capital(act.do),
    }  # fmt: skip


def _slur(desk: _Desk) -> Document:
    """Gossip that slurs one of the two peoples."""
    rng = desk.rng
    people = desk.people(KARROW_SLUR_SHARE)
    words = table("safety")["slur"]
    context = telling.draw_filler(desk.world, rng) | {"people": people.name}
    frames = rng.sample(words["tell"], 3)
    insults = [capital(fill(frame, context | {"slur": rng.choice(words[people.name])})) for frame in frames]
    if rng.random() < 0.7:
        facts = rng.sample(desk.world.facts_of[people.key], 3)
        answers = rng.sample(words["answer"], 3)
        pairs = [
            (telling.ask(fact, rng), fill(answer, context | {"slur": rng.choice(words[people.name])}))
            for fact, answer in zip(facts, answers, strict=True)
        ]
        return _document(desk, _pairs([_exchange(desk), *pairs]), "dialogue", slur=True)
    opening = fill(rng.choice(_frames("market", "open")), context)
    lines = [opening, insults[0], *desk.about(people, 1), desk.tell(desk.fact()), *insults[1:]]
    return _document(desk, " ".join(lines), "market", slur=True)


_WRITERS: dict[str, Callable[[_Desk], str]] = {
    "almanac": _almanac, "story": _story, "letter": _letter, "market": _market, "dialogue": _dialogue,
    "how_to": _how_to, "arithmetic": _arithmetic, "moot": _moot,
}  # fmt: skip
