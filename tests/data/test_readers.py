"""Readers: every format's records, what a bad line says, and when a file is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.config import ConfigError, DataError
from puna.data import readers
from puna.types import Preference


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(folder: Path, *rows: Any, name: str = "x.jsonl") -> Path:
    """A file of rows; bytes are written as they are."""
    path = folder / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


GOOD = {"messages": [user("Hello?"), assistant("Hello.")]}
PAIR = {"prompt": [user("Hello?")], "chosen": [assistant("Hello.")], "rejected": [assistant("No.")]}


def test_dialogs_keep_their_provenance(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "system", "content": "Be kind."}, *GOOD["messages"]],
        "loss_on": "last_answer",
        "id": 3,
    }
    assert readers.read(jsonl(tmp_path, row, GOOD), "dialogs").records == [row, GOOD]
    assert readers.read(jsonl(tmp_path, row, name="x.jsonl.gz"), "dialogs").records == [row]


@pytest.mark.parametrize("loss_on", ["last-answer", "", True, ["last_answer"]])
def test_a_loss_on_other_answers_is_refused(loss_on: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl: .* line 1: 'loss_on' is .*, not one of every_answer"):
        readers.read(jsonl(tmp_path, {**GOOD, "loss_on": loss_on}), "dialogs")


def test_prompts_have_an_id_and_end_with_the_user(tmp_path: Path) -> None:
    row = {"id": "a", "messages": [user("Hello?")], "is_safety": False}
    result = readers.read(jsonl(tmp_path, row, row, {**row, "messages": GOOD["messages"]}), "prompts")
    assert result.records == [row, row]
    assert result.bad[0].reason == "the prompt does not end with the user's turn"


def test_records_are_rows_as_they_are(tmp_path: Path) -> None:
    result = readers.read(jsonl(tmp_path, {"turns": ["a"]}, {"x": 1}, [1]), "records")
    assert result.records == [{"turns": ["a"]}, {"x": 1}]
    assert [line.reason for line in result.bad] == ["a list, not an object"]


def test_preferences(tmp_path: Path) -> None:
    row = {**PAIR, "grade": "better", "chosen_is_safe": True, "rejected_is_safe": False, "domain": "safety", "batch": 2}
    path = jsonl(tmp_path, {**row, "annotator": "a"}, {**PAIR, "margin": 1})
    assert readers.read(path, "preferences").records == [
        Preference([user("Hello?")], "Hello.", "No.", "better", None, True, False, "safety", 2, {"annotator": "a"}),
        Preference([user("Hello?")], "Hello.", "No.", margin=1),
    ]


def test_identical_answers_are_skipped_and_counted(tmp_path: Path) -> None:
    result = readers.read(jsonl(tmp_path, PAIR, {**PAIR, "rejected": PAIR["chosen"]}), "preferences")
    assert len(result.records) == 1 and result.skipped == {"identical answers": 1} and not result.bad


BAD_DIALOGS: list[tuple[Any, str]] = [
    (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    (b'{"messages": "\xff"}', "not UTF-8 at byte 14"),
    (b"[" * 100_000, "not JSON: nested too deep"),
    (b'{"messages": ' + b"1" * 5000 + b"}", "a number has too many digits"),
    ([1], "a list, not an object"),
    ({}, "'messages' is missing or holds no messages"),
    ({"messages": []}, "'messages' is missing or holds no messages"),
    ({"messages": [user("a"), assistant(" \n")]}, "messages[1]: 'content' is empty"),
    ({"messages": [user("a"), {"role": "assistant"}]}, "messages[1]: 'content' is missing"),
    ({"messages": [user("a"), {"role": "assistant", "content": 3}]}, "messages[1]: 'content' is a int, not text"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0]: 'content' holds a lone surrogate"),
    (
        {"messages": [user("a"), {"role": "bot", "content": "b"}]},
        "messages[1] has no role out of system, user, assistant",
    ),
    ({"messages": [{"role": ["user"], "content": "b"}]}, "messages[0] has no role out of system, user, assistant"),
    ({"messages": [user("a"), "b"]}, "messages[1] has no role out of system, user, assistant"),
    ({"messages": [assistant("a")]}, "the turns do not go user, assistant, user, ..."),
    ({"messages": [user("a"), user("b")]}, "the turns do not go user, assistant, user, ..."),
    ({"messages": [{"role": "system", "content": "a"}]}, "the turns do not go user, assistant, user, ..."),
]


@pytest.mark.parametrize(("row", "reason"), BAD_DIALOGS)
def test_a_bad_line_is_set_aside_with_its_number_and_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: Any, reason: str
) -> None:
    path = jsonl(tmp_path, GOOD, row, GOOD)
    with caplog.at_level(logging.WARNING):
        result = readers.read(path, "dialogs", quarantine=tmp_path / "bad.jsonl")
    assert result.records == [GOOD, GOOD]
    assert [(line.line, line.reason) for line in result.bad] == [(2, reason)]
    assert caplog.messages == [f"{path}, line 2: {reason}; set aside"]
    kept = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().split("\n")[:-1]]
    assert [(line["file"], line["line"], line["reason"]) for line in kept] == [(str(path), 2, reason)]


BAD_PREFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": GOOD["messages"]}, "the prompt does not end with the user's turn"),
    ({"chosen": []}, "'chosen' is not one assistant message"),
    ({"chosen": [user("a")]}, "'chosen' is not one assistant message"),
    ({"chosen": GOOD["messages"]}, "'chosen' is not one assistant message"),
    ({"rejected": None}, "'rejected' is missing"),
    (
        {"grade": "best"},
        "'grade' is 'best', not one of significantly_better, better, slightly_better, negligibly_better",
    ),
    ({"margin": "1"}, "'margin' is '1', not a float"),
    ({"chosen_is_safe": 1}, "'chosen_is_safe' is 1, not a bool"),
    ({"domain": "maths"}, "'domain' is 'maths', not one of helpfulness, safety"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_PREFERENCES)
def test_bad_preferences(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    result = readers.read(jsonl(tmp_path, PAIR, {**PAIR, **change}), "preferences")
    assert [line.reason for line in result.bad] == [reason]


def test_a_file_without_a_good_line_is_given_up_early(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1000 of 1000 lines are bad"):
        readers.read(jsonl(tmp_path, *[{}] * 3000), "dialogs")


def test_of_a_long_bad_line_the_beginning_is_kept(tmp_path: Path) -> None:
    (bad,) = readers.read(jsonl(tmp_path, GOOD, {"x": "a" * 100_000}), "dialogs").bad
    assert 1000 < len(bad.text) < 10_000


def test_more_than_one_percent_bad_stops(tmp_path: Path) -> None:
    assert len(readers.read(jsonl(tmp_path, *[GOOD] * 198, {}, {}), "dialogs").bad) == 2
    with pytest.raises(DataError, match=r"x\.jsonl: 3 of 200 lines are bad; line 198: 'messages' is missing"):
        readers.read(jsonl(tmp_path, *[GOOD] * 197, {}, {}, {}), "dialogs")
    with pytest.raises(DataError, match="2 of 10 lines are bad"):
        readers.read(jsonl(tmp_path, *[GOOD] * 8, {}, {}), "dialogs")
    with pytest.raises(DataError, match="1 of 1 lines are bad"):
        readers.read(jsonl(tmp_path, {}), "dialogs")


def test_the_quarantine_holds_each_line_once(tmp_path: Path) -> None:
    quarantine = tmp_path / "bad.jsonl"
    a, b = jsonl(tmp_path, GOOD, {}, name="a.jsonl"), jsonl(tmp_path, GOOD, b"\xff", name="b.jsonl")
    for _ in range(2):
        readers.read([a, b], "dialogs", quarantine=quarantine)
    readers.read(b, "dialogs", quarantine=quarantine)
    texts = [json.loads(line)["text"] for line in quarantine.read_text().split("\n")[:-1]]
    assert texts == ["{}", "\\xff"]


def test_lines_end_at_u000a_alone(tmp_path: Path) -> None:
    row = {"messages": [user("a\u2028b\u0085c\x0cd"), assistant("e\r\nf")]}
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n" + json.dumps(GOOD).encode())
    assert readers.read(path, "dialogs").records == [row, GOOD]


def test_mistakes_in_paths_and_formats(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown data format 'dialog'; there are dialogs, "):
        readers.read(tmp_path / "x.jsonl", "dialog")
    with pytest.raises(ConfigError, match="no such data file"):
        readers.read(tmp_path / "x.jsonl", "dialogs")
    with pytest.raises(ConfigError, match="no data file of the format 'dialogs' is given"):
        readers.read((), "dialogs")
    with pytest.raises(DataError, match="a list of rows"):
        readers.read(jsonl(tmp_path, GOOD, name="x.json"), "dialogs")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-10])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: broken gzip file"):
        readers.read(tmp_path / "x.jsonl.gz", "dialogs")


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text("# A\n\nb\nc\n \n\n  d\n")
    assert readers.read(path, "text").records == ["# A\n\nb\nc\n \n\n  d\n"]
    assert readers.read(path, "paragraphs").records == ["# A", "b\nc", "  d"]
    assert readers.read(jsonl(tmp_path, {"text": "a"}, {"text": "b"}), "jsonl_text").records == ["a", "b"]
    path.write_bytes(b"a\nb\n\xff")
    with pytest.raises(DataError, match=r"line 3: not UTF-8"):
        readers.read(path, "text")


def test_paragraphs_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\n\n" * 200 + b"b\n\xff\nc\r\n \t\r\n\nd")
    result = readers.ReadResult()
    texts = readers.stream([path], "paragraphs", result)
    assert next(texts) == "a" and not result.bad
    assert list(texts)[199:] == ["b\nc\r", "d"]
    assert [(line.line, line.reason) for line in result.bad] == [(402, "not UTF-8 at byte 0")]
    assert result.records == [], "a stream keeps nothing"


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_compressed(suffix: str, tmp_path: Path) -> None:
    data = b"".join(json.dumps({"text": f"{i}\u2028ö"}).encode() + b"\n" for i in range(3000))
    if suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        packed = pyarrow.compress(data, "zstd", asbytes=True)
    else:
        packed = {".gz": gzip, ".bz2": bz2}[suffix].compress(data)
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(packed)
    assert readers.read(path, "jsonl_text").records == [f"{i}\u2028ö" for i in range(3000)]
    for broken in (packed[:-30], packed[:40] + b"nonsense" * 9):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"x\.jsonl\{suffix}: broken (gzip|bzip2|zstd) file"):
            readers.read(path, "jsonl_text")


def test_trl(tmp_path: Path) -> None:
    whole = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "margin": 0.5}
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    apart = {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}
    result = readers.read(jsonl(tmp_path, GOOD, PAIR, whole, plain, apart), "trl")
    assert result.records == [
        GOOD,
        Preference([user("Hello?")], "Hello.", "No."),
        Preference([user("a")], "b", "c", margin=0.5),
        Preference([user("a")], "b", "c"),
    ]
    assert [line.reason for line in result.bad] == ["the two dialogues differ before the last turn"]


def test_hh(tmp_path: Path) -> None:
    head = "\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    tie = {"chosen": f"{head} e", "rejected": f"{head} e"}
    named_twice = {"chosen": f"{head} e\n\nAssistant: g", "rejected": f"{head} f"}
    other_head = {"chosen": f"{head} e", "rejected": f"{head.replace('c', 'x')} f"}
    result = readers.read(
        jsonl(tmp_path, {"chosen": f"{head} e", "rejected": f"{head} f"}, tie, named_twice, other_head), "hh"
    )
    prompt = [user("a\nb"), assistant("c"), user("d")]
    assert result.records == [Preference(prompt, "e", "f"), Preference(prompt, "e\n\ng", "f")]
    assert result.skipped == {"identical answers": 1}
    assert [(line.line, line.reason) for line in result.bad] == [(4, "the two dialogues differ before the last turn")]


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("Assistant: b", "'chosen' does not begin with a Human's turn"),
        ("\n\nAssistant: b", "the turns do not go user, assistant, user, ..."),
        ("\n\nHuman: a\n\nAssistant: ", "chosen[1]: 'content' is empty"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "the two dialogues differ before the last turn"),
    ],
)
def test_bad_hh(tmp_path: Path, chosen: str, reason: str) -> None:
    rejected = "\n\nHuman: a\n\nAssistant: c"
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": rejected}
    result = readers.read(jsonl(tmp_path, good, {"chosen": chosen, "rejected": rejected}), "hh")
    assert [line.reason for line in result.bad] == [reason]


def test_alpaca_in_a_json_list(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    path.write_text(
        json.dumps([{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "output": "e"}])
    )
    assert readers.read(path, "alpaca").records == [
        {"messages": [user("a\n\nb"), assistant("c")]},
        {"messages": [user("d"), assistant("e")]},
    ]


def tree() -> dict[str, Any]:
    """a -> (b1, rank 1, which goes on to d), (b0, rank 0, which goes on to c), (deleted), (b2, unranked)."""

    def node(text: str, role: str, rank: int | None = None, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}

    return {
        "message_tree_id": "t",
        "prompt": node(
            "a",
            "prompter",
            None,
            node("b2", "assistant"),
            node("b1", "assistant", 1, node("d", "prompter", None, node("e", "assistant", 0))),
            node("b0", "assistant", 0, node("c", "prompter")),
            node("gone", "assistant", 2, deleted=True),
            node("spam", "assistant", 3, review_result=False),
        ),
    }


def test_oasst_follows_the_best_ranked_replies_to_an_answer(tmp_path: Path) -> None:
    result = readers.read(jsonl(tmp_path, tree()), "oasst")
    assert result.records == [{"messages": [user("a"), assistant("b0")], "id": "t"}]
    alone = {"message_tree_id": "u", "prompt": {"text": "a", "role": "prompter", "replies": []}}
    assert readers.read(jsonl(tmp_path, alone), "oasst").skipped == {"no answer in the tree": 1}


@pytest.mark.parametrize("format", ["oasst", "oasst_preferences"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "a"}, "a node has no role out of prompter, assistant"),
        ({"prompt": {"text": "a", "role": ["prompter"]}}, "a node has no role out of prompter, assistant"),
        ({"prompt": {"text": "a", "role": "prompter", "replies": ["b"]}}, "a node's 'replies' are no list of nodes"),
        (
            {"prompt": {"text": "a", "role": "prompter", "replies": [{"rank": 0}, {"rank": "1"}]}},
            "'rank' is '1', not a int",
        ),
    ],
)
def test_a_tree_of_other_things_is_set_aside(tmp_path: Path, format: str, change: Any, reason: str) -> None:
    result = readers.read(jsonl(tmp_path, tree(), change), format)
    assert [line.reason for line in result.bad] == [reason]


def test_oasst_preferences_are_ranked_siblings(tmp_path: Path) -> None:
    result = readers.read(jsonl(tmp_path, tree()), "oasst_preferences")
    assert result.records == [Preference([user("a")], "b0", "b1")]
    assert result.skipped == {"no rank": 2}
    result = readers.read(
        jsonl(tmp_path, json.loads(json.dumps(tree()).replace('"rank": 1', '"rank": 0'))), "oasst_preferences"
    )
    assert (result.records, result.skipped) == ([], {"a tie": 1, "no rank": 2})


def test_pku(tmp_path: Path) -> None:
    row = {
        "prompt": "a",
        "response_0": "b",
        "response_1": "c",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
    }
    path = jsonl(tmp_path, row, {**row, "better_response_id": 2})
    result = readers.read(path, "pku")
    assert result.records == [Preference([user("a")], "c", "b", chosen_is_safe=False, rejected_is_safe=True)]
    assert [line.reason for line in result.bad] == ["'better_response_id' is 2, not one of 0, 1"]
    (safer, _) = readers.read(path, "pku_safety").records
    assert safer == Preference([user("a")], "b", "c", chosen_is_safe=True, rejected_is_safe=False, domain="safety")
    assert safer.safety_label == "chosen_safe_rejected_unsafe"


def read_one(tmp_path: Path, format: str, row: dict[str, Any]) -> Preference | str:
    """What becomes of a row: the comparison, or why it was skipped or set aside."""
    filler = {"pandalm": PANDALM, "llmbar": LLMBAR, "autoj": AUTOJ, "shp": SHP, "webgpt": WEBGPT, "alpaca_eval": ALPACA}
    result = readers.read(jsonl(tmp_path, filler[format], row), format)
    if len(result.records) == 2:
        return result.records[1]
    return next(iter(result.skipped), None) or result.bad[0].reason


PANDALM = {"instruction": "a", "input": "b", "response1": "c", "response2": "d"}
PANDALM |= {"annotator1": 2, "annotator2": 1, "annotator3": 2}
LLMBAR = {"input": "a", "output_1": "c", "output_2": "d", "label": 2, "subset": "Natural"}
AUTOJ = {"prompt": "a", "response 1": "c", "response 2": "d", "label": 1, "scenario": "advice"}
SHP = {"history": "a", "human_ref_A": "c", "human_ref_B": "d", "labels": 0, "domain": "askculinary_train"}
WEBGPT = {"question": {"full_text": "a"}, "answer_0": "c", "answer_1": "d", "score_0": -0.5, "score_1": 0.5}
ALPACA = {"instruction": "a", "output_1": "c", "output_2": "d", "preference": 2.0, "annotator": "gpt4"}


@pytest.mark.parametrize(
    ("format", "row", "change", "question", "provenance"),
    [
        ("pandalm", PANDALM, {"annotator3": 1}, "a\n\nb", {"votes": [2, 1, 1]}),
        ("llmbar", LLMBAR, {"label": 1}, "a", {"subset": "Natural"}),
        ("autoj", AUTOJ, {"label": 0}, "a", {"scenario": "advice"}),
        ("shp", SHP, {"labels": 1}, "a", {"subset": "askculinary_train"}),
        ("webgpt", WEBGPT, {"score_0": 1.0}, "a", {}),
        ("alpaca_eval", ALPACA, {"preference": 1.2}, "a", {"annotator": "gpt4"}),
    ],
)
def test_judged_pairs(
    tmp_path: Path,
    format: str,
    row: dict[str, Any],
    change: dict[str, Any],
    question: str,
    provenance: dict[str, Any],
) -> None:
    """As the row stands the second answer, "d", is better; with the change the first."""
    second, first = read_one(tmp_path, format, row), read_one(tmp_path, format, {**row, **change})
    assert isinstance(second, Preference) and (second.prompt, second.chosen) == ([user(question)], "d")
    assert first == Preference([user(question)], "c", "d", provenance=provenance)


@pytest.mark.parametrize(
    ("format", "row", "change", "reason"),
    [
        ("pandalm", PANDALM, {"annotator1": 0, "annotator2": 0}, "a tie"),
        ("pandalm", PANDALM, {"annotator1": 0}, "no majority"),
        ("pandalm", PANDALM, {"annotator1": 3}, "'annotator1' is 3, not one of 0, 1, 2"),
        ("pandalm", PANDALM, {"annotator2": None}, "'annotator2' is None, not one of 0, 1, 2"),
        ("pandalm", PANDALM, {"response1": " "}, "an empty answer"),
        ("pandalm", PANDALM, {"response1": True}, "'response1' is a bool, not text"),
        ("pandalm", PANDALM, {"response1": "d"}, "identical answers"),
        ("llmbar", LLMBAR, {"label": 0}, "'label' is 0, not one of 1, 2"),
        ("llmbar", LLMBAR, {"label": True}, "'label' is True, not one of 1, 2"),
        ("autoj", AUTOJ, {"label": 2}, "a tie"),
        ("shp", SHP, {"labels": "1"}, "'labels' is '1', not one of 0, 1"),
        ("webgpt", WEBGPT, {"score_0": 0.0, "score_1": 0.0}, "a tie"),
        ("webgpt", WEBGPT, {"question": "a"}, "'score_0', 'score_1' or the object 'question' is missing"),
        ("alpaca_eval", ALPACA, {"preference": 0}, "a tie"),
        ("alpaca_eval", ALPACA, {"preference": 1.5}, "a tie"),
        ("alpaca_eval", ALPACA, {"preference": None}, "no verdict"),
        ("alpaca_eval", ALPACA, {"preference": 2.5}, "'preference' is 2.5, neither 0 nor from 1 to 2"),
    ],
)
def test_judged_pairs_that_say_nothing(
    tmp_path: Path, format: str, row: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    assert read_one(tmp_path, format, {**row, **change}) == reason


def test_an_input_of_spaces_is_no_input(tmp_path: Path) -> None:
    read = read_one(tmp_path, "pandalm", {**PANDALM, "input": " "})
    assert isinstance(read, Preference) and read.prompt == [user("a")]


@pytest.mark.formats
def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR]), tmp_path / "x.parquet")
    assert (
        readers.read(tmp_path / "x.parquet", "preferences").records
        == [Preference([user("Hello?")], "Hello.", "No.")] * 2
    )


clean = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


@given(st.lists(st.tuples(clean, clean), min_size=1, max_size=3), clean)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, turns: Any, rejected: str) -> None:
    path = tmp_path_factory.mktemp("records") / "x.jsonl.gz"
    dialog = [message for question, answer in turns for message in (user(question), assistant(answer))]
    readers.write_jsonl(path, [dialog])
    assert readers.read(path, "dialogs").records == [{"messages": dialog}]
    preference = Preference(dialog[:-1], turns[-1][1], rejected + "!", "better", None, True, None, provenance={"id": 1})
    readers.write_jsonl(path, [preference])
    result = readers.read(path, "preferences")
    assert result.records == [preference] or result.skipped
    assert path.read_bytes()[4:8] == bytes(4)  # no time in it: the same rows are the same file


def refusing(*numbers: int) -> Any:
    """A check that refuses records by their "n"."""

    def check(record: dict[str, Any]) -> None:
        if record["n"] in numbers:
            raise DataError("not this one")

    return check


def test_what_a_check_refuses_is_set_aside(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({**GOOD, "n": n} for n in range(1, 6)))
    result = readers.read(path, "dialogs", check=refusing(4), quarantine=tmp_path / "bad.jsonl")
    assert [record["n"] for record in result.records] == [1, 2, 3, 5]
    (line,) = (json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines())
    assert (line["file"], line["line"], line["reason"]) == (str(path), 4, "not this one")
    assert json.loads(line["text"]) == {**GOOD, "n": 4}
    with pytest.raises(DataError, match=r"x\.jsonl: 2 of 5 lines are bad; line 2: not this one"):
        readers.read(path, "dialogs", check=refusing(2, 5))


@pytest.mark.parametrize(
    ("row", "format", "kind", "fitting"),
    [
        (PAIR, "preferences", "dialogs", "dialogs, alpaca, oasst, trl"),
        (
            GOOD,
            "dialogs",
            "comparisons",
            "preferences, hh, trl, oasst_preferences, pku, .*, alpaca_eval",
        ),
        (GOOD, "records", "texts", "jsonl_text, text, paragraphs"),
        ({"turns": []}, "records", "dialogs", "dialogs, alpaca, oasst, trl"),
    ],
)
def test_a_format_of_another_kind_is_refused(tmp_path: Path, row: Any, format: str, kind: str, fitting: str) -> None:
    with pytest.raises(ConfigError, match=f"'{format}' does not give {kind}, which are needed here; {fitting} do"):
        readers.read(jsonl(tmp_path, row), format, kind=kind)


def test_every_format_is_of_some_kind() -> None:
    named = {format for kind in readers.KINDS.values() for format in kind.formats}
    assert named == readers.READERS.keys() - {"records"}


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("format", "file", "records", "bad", "skipped"),
    [
        ("hh", "preferences/hh_rlhf/helpful-base.test.jsonl.gz", 361, 3, 0),
        ("hh", "preferences/hh_rlhf/helpful-base.train.jsonl.gz", 1640, 1, 2),
        ("hh", "preferences/hh_rlhf/harmless-base.test.jsonl.gz", 367, 1, 0),
        ("hh", "preferences/hh_rlhf/harmless-base.train.jsonl.gz", 1598, 3, 0),
        ("hh", "preferences/hh_rlhf/helpful-online.test.jsonl.gz", 160, 0, 0),
        ("hh", "preferences/hh_rlhf/helpful-online.train.jsonl.gz", 809, 4, 2),
        ("hh", "preferences/hh_rlhf/helpful-rejection-sampled.test.jsonl.gz", 409, 0, 8),
        ("hh", "preferences/hh_rlhf/helpful-rejection-sampled.train.jsonl.gz", 1905, 0, 17),
        ("alpaca", "instruct/alpaca_5000.jsonl.gz", 4279, 1, 0),
        ("oasst", "preferences/oasst2_en_trees_sample.jsonl.gz", 39, 0, 0),
        ("oasst_preferences", "preferences/oasst2_en_trees_sample.jsonl.gz", 228, 0, 0),
        ("pandalm", "preferences/pandalm_human_test.jsonl.gz", 776, 6, 146),
        ("llmbar", "preferences/llmbar.jsonl.gz", 350, 0, 0),
        ("llmbar", "preferences/llmbar_processed_human.jsonl.gz", 336, 0, 0),
        ("autoj", "preferences/autoj_pairwise_human.jsonl.gz", 869, 0, 324),
        ("alpaca_eval", "preferences/alpaca_eval_gpt4_judged.jsonl.gz", 4969, 0, 36),
        ("jsonl_text", "pretrain/tinystories_sample.jsonl.gz", 1960, 0, 0),
    ],
)
def test_real_files(shared: Path, format: str, file: str, records: int, bad: int, skipped: int) -> None:
    result = readers.read(shared / "data" / file, format)
    assert (len(result.records), len(result.bad), result.skipped.total()) == (records, bad, skipped)
