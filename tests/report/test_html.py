"""The report's page: whole, from parts of a run, safe to open, the same every time."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from puna.config import ConfigError
from puna.report import figures, summary
from puna.report.html import ReportConfig, headline, lanes, run

SECTIONS = "recipe versions losses reward sampling distillation ppo ghost changes samples time ledger".split()


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order, and keeps what a page holds."""

    VOID = frozenset(("meta", "link", "br", "img", "hr", "input"))

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def test_a_finished_run(reported: Path) -> None:
    path = reported / "report/index.html"
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert "Not there yet" not in text and "Nothing of this" not in text
    assert page.tags.count("svg") == 6 + 5 + (3 + 2) + 5 + 2 + 3 + 2 + 3 + 1
    assert page.tags.count("details") == 8
    assert json.loads((reported / "report/summary.json").read_text())["name"] == "laptop"


def test_the_page_asks_for_nothing_outside_itself(reported: Path) -> None:
    path = reported / "report/index.html"
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_of_one_element_each_and_found(reported: Path) -> None:
    path = reported / "report/index.html"
    page = Page(path)
    assert len(page.ids) == len(set(page.ids))
    referred = {address[1:] for address in page.addresses if address.startswith("#")}
    referred |= set(re.findall(r"url\(#([^)]+)\)", path.read_text(encoding="utf-8")))
    assert referred <= set(page.ids)


def test_what_a_model_says_is_text(reported: Path) -> None:
    text = (reported / "report/index.html").read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;alert(" in text
    assert "\x1b" not in text and "$x_1$" in text


def test_a_second_report_is_the_same(on_files: Path) -> None:
    path = run(ReportConfig(on_files))
    first = path.read_bytes(), (on_files / "report/summary.json").read_bytes()
    (on_files / "done/report.json").write_text('{"seconds": 2.5, "peak_memory_bytes": 1}')
    run(ReportConfig(on_files))
    assert first == (path.read_bytes(), (on_files / "report/summary.json").read_bytes())


def test_colors_and_type_are_the_pages(reported: Path) -> None:
    text = (reported / "report/index.html").read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#ffffff", "#000000"}
    assert "DejaVu" not in drawings and "var(--sans)" in drawings and "<text" in drawings
    declared = set(re.findall(r"--(\w+):", text))
    assert set(figures.VARIABLES.values()) <= declared


def test_half_a_run_says_what_is_not_there_yet(finished: Path) -> None:
    for n in (3, 4, 5):
        shutil.rmtree(finished / f"v{n}")
        shutil.rmtree(finished / f"done/v{n}")
        (finished / f"done/v{n}.json").unlink()
    path = run(ReportConfig(finished))
    Page(path)
    text = path.read_text(encoding="utf-8")
    assert "Not there yet: v3/evaluation, v4/evaluation, v5/evaluation, v5/ppo/evaluation." in section(text, "versions")
    assert "Not there yet: v5/ppo." in section(text, "ppo")
    assert "Not there yet: v3/rejection_sampling, v4/rejection_sampling" in section(text, "sampling")
    assert "V2" in section(text, "versions")
    assert "next is v3/preferences." in text


def test_a_run_that_has_just_begun(finished: Path) -> None:
    begun = finished.parent / "begun"
    begun.mkdir()
    shutil.copy(finished / "config.json", begun)
    path = run(ReportConfig(begun))
    page = Page(path)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert "svg" not in page.tags
    text = path.read_text(encoding="utf-8")
    for name in SECTIONS[1:]:
        assert 'class="missing"' in section(text, name), name


@pytest.mark.parametrize(
    "removed",
    [("config.json", "sft", "v2/reward_safety"), ("done", "pretrain", "v5/ppo"), ("v3", "v3/evaluation/answers.jsonl")],
)
def test_a_run_without_some_of_its_parts(finished: Path, removed: tuple[str, ...]) -> None:
    for part in removed:
        if (finished / part).is_dir():
            shutil.rmtree(finished / part)
        else:
            (finished / part).unlink(missing_ok=True)
    Page(run(ReportConfig(finished)))


def test_a_run_on_files_has_no_judges_sections(on_files: Path) -> None:
    path = run(ReportConfig(on_files))
    page = Page(path)
    assert [name for name in page.ids if name in SECTIONS] == "recipe losses reward sampling ppo time ledger".split()
    assert page.tags.count("svg") == 3 + (3 + 2) + 1 + 3 + 1


def test_the_headline_is_careful(finished: Path) -> None:
    found = summary.build(finished)
    said = " ".join(headline(found))
    assert said.startswith("All 44 steps are done, in ")
    assert "helpfulness go up from 0.55 to 0.90, violations go down from 36.0 % to 8.0 %" in said
    assert "false refusals go from 4.8 % to 6.5 % (the intervals overlap)" in said
    assert "At turn 6 the first turn's instruction holds in 90.0 % of dialogs" in said


def test_the_picture_of_the_recipe(finished: Path) -> None:
    drawn = dict(lanes(summary.build(finished)))
    assert list(drawn) == ["Start", "V1", "V2", "V3", "V4", "V5"]
    assert [step.title for step in drawn["Start"]] == ["World", "Pretraining", "Evaluation", "SFT", "Evaluation"]
    assert [step.column for step in drawn["V1"]] == [1, 2, 3, 4, 5, 7, 8]
    assert [step.column for step in drawn["V5"]] == list(range(1, 11))
    assert drawn["Start"][1].share == 1.0


def test_long_loss_curves_are_thinned_to_their_means() -> None:
    steps, means = figures._thinned([(i, float(i)) for i in range(1000)])
    assert len(steps) == figures.POINTS
    assert steps == means
    assert steps[:2] == [2.0, 7.0]  # means of 0 to 4 and 5 to 9
    assert figures._thinned([(0, 1.0), (1, 3.0)]) == ([0.0, 1.0], [1.0, 3.0])


def test_what_the_gate_did_is_drawn_over_all_versions(finished: Path) -> None:
    told = summary.build(finished)
    first, *_ = told["context_distillation"]
    first["gate"] = [first["gate"][0] | {"prompts": 0, "kept": 1.0}, *first["gate"][1:]]
    titles = [panel.title for panel in figures.context_distillation(told)]
    assert titles == ["Scores under the preprompt", "Kept by the gate"]
    assert figures.context_distillation(told | {"context_distillation": []}) == []


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        run(ReportConfig(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_report_needs_no_torch_and_draws_when_asked(root: Path) -> None:
    program = "import sys, puna.report.html; print({'torch', 'matplotlib', 'jinja2', 'puna.stages'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "set()", done.stderr


def test_what_ppos_numbers_warn_of_is_said(finished: Path) -> None:
    assert "answers grow" not in section(run(ReportConfig(finished)).read_text(encoding="utf-8"), "ppo")
    lines = [{"stage": "ppo", "step": i, "reward": 0.5, "kl": 0.1, "length": 20.0 + 2 * i} for i in range(30)]
    (finished / "v5/ppo/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = section(run(ReportConfig(finished)).read_text(encoding="utf-8"), "ppo")
    assert "V5: answers grow from 24 to 74 tokens: the reward may like length, not what is said." in text
