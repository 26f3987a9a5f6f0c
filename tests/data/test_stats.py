"""What files of comparisons hold, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from puna.config import ConfigError
from puna.data import stats
from puna.data.stats import StatsConfig
from tests import helpers
from tests.helpers import assistant, user


def row(prompt: list[Any], chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **columns}


TALK = [helpers.system("be brief now"), user("one two"), assistant("three four five"), user("six")]
A = row([user("a b")], "c", "d e f", grade="better", batch=1)
B = row(
    TALK, "one two three", "four", grade="significantly_better", batch=2, chosen_is_safe=True, rejected_is_safe=True
)


def files(tmp_path: Path) -> tuple[Path, Path]:
    turned = A | {"chosen": A["rejected"], "rejected": A["chosen"]}
    first = helpers.write_lines(tmp_path / "first.jsonl", [A, A, B, row([user("x")], "same", "same")])
    return first, helpers.write_lines(tmp_path / "second.jsonl", [turned, row([user("a b")], "z", "y")])


def test_lengths_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "stats.json"
    stats.run(StatsConfig(files(tmp_path), out=out))
    found = json.loads(out.read_text())
    assert found["unit"] == "words"
    first = found["sources"]["first"]
    assert (first["comparisons"], first["turns"]) == (3, pytest.approx((1 + 1 + 2) / 3))
    # A's examples have 3 and 5 words, B's 9 of the prompt and 3 or 1: the system message counts here alone.
    assert first["per_example"] == pytest.approx((3 + 5 + 3 + 5 + 12 + 10) / 6)
    assert first["in_prompt"] == pytest.approx((2 + 2 + 2 + 1) / 4)
    assert first["in_response"] == pytest.approx((1 + 3 + 1 + 3 + 3 + 1) / 6)
    assert first["grades"] == pytest.approx({"better": 2 / 3, "significantly_better": 1 / 3})
    assert first["safety_labels"] == pytest.approx({"none": 2 / 3, "both_safe": 1 / 3})
    assert (first["left_out"], first["bad_lines"], first["doubles"]) == ({"identical answers": 1}, 0, 1)
    assert {batch: m["comparisons"] for batch, m in found["batches"].items()} == {"0": 1, "1": 3, "2": 1}
    assert found["batches"]["2"]["turns"] == 2
    assert found["total"]["comparisons"] == 5 and found["total"]["doubles"] == 2
    assert found["shared"] == [{"sources": ["first", "second"], "comparisons": 1, "prompts": 1}]


def test_a_tokenizer_counts_tokens(tmp_path: Path) -> None:
    helpers.tokenizer().save(tmp_path)
    cfg = StatsConfig(files(tmp_path), tokenizer=tmp_path, out=tmp_path / "stats.json")
    assert "tokens per example" in stats.run(cfg)
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found["batches"]["1"]["in_prompt"] == len(helpers.tokenizer().encode("a b"))


def test_the_table(tmp_path: Path) -> None:
    assert (
        stats.run(StatsConfig(files(tmp_path)))
        == """\
source  comparisons  turns  words per example  in prompt  in response
first             3    1.3                6.3        1.8          2.0
second            2    1.0                3.5        2.0          1.5
total             5    1.2                5.2        1.8          1.8

batch  comparisons  turns  words per example  in prompt  in response
0                1    1.0                3.0        2.0          1.0
1                3    1.0                4.0        2.0          2.0
2                1    2.0               11.0        1.5          2.0

grades  significantly_better  better  slightly_better  negligibly_better   none
first                  33.3%   66.7%             0.0%               0.0%   0.0%
second                  0.0%   50.0%             0.0%               0.0%  50.0%
total                  20.0%   60.0%             0.0%               0.0%  20.0%

safety labels  chosen_safe_rejected_unsafe  both_safe  both_unsafe   none
first                                 0.0%      33.3%         0.0%  66.7%
total                                 0.0%      20.0%         0.0%  80.0%

first: identical answers 1, doubles 1
in both first and second: comparisons 1, prompts 1"""
    )


def test_files_and_formats_go_together(tmp_path: Path) -> None:
    first, second = files(tmp_path)
    llmbar = helpers.write_lines(tmp_path / "l.jsonl", [{"input": "a", "output_1": "b", "output_2": "c", "label": 1}])
    assert "llm" not in stats.run(StatsConfig((first, llmbar), format=("preferences", "llmbar")))
    with pytest.raises(ConfigError, match="2 formats for 3 files: give one for all, or one for each in order"):
        stats.run(StatsConfig((first, second, llmbar), format=("preferences", "llmbar")))
    with pytest.raises(ConfigError, match=r"a file is given twice: .*first\.jsonl, .*first\.jsonl"):
        stats.run(StatsConfig((first, first)))
    with pytest.raises(ConfigError, match="'dialogs' does not give comparisons"):
        stats.run(StatsConfig((helpers.write_lines(tmp_path / "d", [{"messages": TALK}]),), format=("dialogs",)))


def test_files_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    paths = tuple(helpers.write_lines(tmp_path / folder / "train.jsonl", [A]) for folder in "ab")
    assert str(paths[1]) in stats.run(StatsConfig(paths))
