"""The report's tables, and what the terminal says at a run's end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from puna.config import ConfigError
from puna.report import html, summary, tables
from puna.report.tables import Cell, Table


def test_versions_have_intervals_and_the_best_chat_model_stands_out(finished: Path) -> None:
    table = tables.versions(summary.build(finished))
    assert [row[0].text for row in table.rows][:3] == ["Pretrained", "SFT", "V1"]
    assert table.rows[-1][0].text == "V5 + PPO"
    assert table.rows[-1][1] == Cell("0.90", "0.88 – 0.92", best=True)
    assert table.rows[-1][2] == Cell("8.0 %", "4.2 – 11.8 %", best=True)
    false_refusals = [row[3] for row in table.rows]
    assert [cell.best for cell in false_refusals] == [False, True] + 6 * [False]  # the pretrained one's does not count
    assert [row[6].text for row in table.rows[:3]] == ["–", "–", "64.4 %"]


def test_what_was_measured_on_nothing_is_a_dash() -> None:
    nothing = {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    assert tables.interval_of({"intervals": {"toxicity": nothing}}, "toxicity") is None
    assert tables.interval_of({"win_rate_vs_sft": None}, "win_rate_vs_sft") is None


def test_what_prompts_are_about_is_counted(finished: Path) -> None:
    found = summary.build(finished)
    assert tables.evidence(found) == "", "an evaluation that did not count it"
    last = found["versions"][-1]
    last["intervals"]["myth_rate"] |= {"clusters": 12}
    last["win_rate_vs_sft"] |= {"clusters": 310}
    assert tables.evidence(found) == "Myths told 200 about 12, Wins vs SFT 600 about 310"
    last["helpfulness_by_kind"]["fact"] |= {"n": 90, "clusters": 70}
    counted = {row[0].text: row[0].small for row in tables.helpfulness_by_kind(found).rows}
    assert (counted["fact"], counted["sum"]) == ("n = 90 about 70", "n = 80")
    assert "Wins vs SFT 600 about 310" in html.render(finished, found, {})


def test_reward_models_stand_beside_the_papers_table_8(finished: Path) -> None:
    table = tables.reward_grades(summary.build(finished), "helpfulness")
    assert table is not None
    assert table.head[1:] == ("Significantly better", "Better", "Slightly better", "Negligibly better", "All")
    assert [cell.text for cell in table.rows[-1]] == ["The paper", "80.7 %", "67.5 %", "60.9 %", "54.7 %", "63.2 %"]
    assert [row[0].text for row in table.rows] == ["V1", "V2", "V3", "V4", "V5", "The paper"]


def test_ungraded_comparisons_have_an_accuracy_in_all(on_files: Path) -> None:
    found = summary.build(on_files)
    model = found["reward_models"]["helpfulness"]["by_version"][0]
    model |= {"accuracy_by_grade": {"ungraded": 0.63}, "pairs_by_grade": {"ungraded": 250}}
    table = tables.reward_grades(found, "helpfulness")
    assert table is not None
    assert [[cell.text for cell in row] for row in table.rows] == [["V1", "63.0 %"], ["The paper", "63.2 %"]]


def test_ghost_attention_stands_beside_the_papers_table_30(finished: Path) -> None:
    table = tables.ghost_attention(summary.build(finished))
    assert table is not None
    assert table.head == ("Turn", "V3, without", "V5 + PPO, with", "Paper, without", "Paper, with")
    assert [cell.text for cell in table.rows[3]] == ["4", "5.6 %", "90.0 %", "10.0 %", "100.0 %"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.6, "60 s"),
        (99.6, "1 min 40 s"),
        (3599.7, "1 h 00 min"),
        (7260, "2 h 01 min"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert tables.duration(seconds) == said


def test_plain_tables_are_aligned() -> None:
    table = Table(("", "Reward"), [[Cell("SFT"), Cell("0.5", "small")], [Cell("V1"), Cell("0.75")]])
    assert tables.plain(table) == "     Reward\nSFT     0.5\nV1     0.75"


def test_the_last_word_of_a_run(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tables.final(reported)
    lines = said.splitlines()
    assert (
        lines[0].split() == "Helpfulness Violations False refusals Slurs Myths told Wins vs SFT Words Finished".split()
    )
    assert sum(line.startswith(("SFT", "V5 + PPO", "asked")) for line in lines) == 2 + 3 * 3
    assert said.endswith(f"report  {reported}/report/index.html\nchat    puna chat {reported}")
    assert "\x1b" not in said
    monkeypatch.setattr(sys, "argv", [".venv/bin/puna", "run"])
    assert tables.final(reported).endswith(f"chat    .venv/bin/puna chat {reported}")


def test_the_last_word_of_a_run_without_a_judge(on_files: Path) -> None:
    html.run(html.ReportConfig(on_files))
    said = tables.final(on_files)
    assert said.count("The paper") == 2
    assert "helpfulness model  63.0 % right (57.1 – 68.9 %) of 250 held-out pairs" in said
    assert "rejection sampling  reward at temperature 1.0: mean 0.50 of 1 -> 0.65 best of 8" in said
    assert "PPO  reward 0.50 -> 0.79, KL 0.00 -> 5.80 from the first to the last of 30 iterations" in said
    assert "Helpfulness model" in said


def test_the_last_word_needs_the_report(finished: Path) -> None:
    with pytest.raises(ConfigError, match="puna report"):
        tables.final(finished)
