"""What the documents say exists: commands, flags, targets, links, the folder map; and what they must not say."""

from __future__ import annotations

import importlib
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from puna import cli, config
from puna.data.readers import READERS

FOREIGN = {
    r"\bsessions?\b": "the project speaks of itself alone",
    r"\bhelpers?\b": "the project speaks of itself alone",
    r"\bpull requests?\b|\bissues?\b|(?<![&\w])#\d+": "a tracker's words say nothing to a reader of the code",
    r"/tmp\b|/work\b": "a path of one machine",
    r"\bTODO\b|\bFIXME\b|\bXXX\b": "what is missing is said in words",
}


def documents(root: Path) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes signals and the excepthook for itself; here they stay pytest's."""
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(scope="module")
def texts(root: Path) -> dict[str, str]:
    """Every document by its path."""
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in documents(root)}


@pytest.fixture(scope="module")
def readme(texts: dict[str, str]) -> str:
    return texts["README.md"]


def shell_commands(text: str) -> list[list[str]]:
    """The `puna` commands of a document's shell blocks, as words without `puna`."""
    blocks = re.findall(r"```(?:sh|bash|shell|console)\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in lines if words and words[0].rpartition("/")[2] == "puna"]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Commands ------------------------------------------------------------------------------------------------------------


def test_every_command_that_is_named_exists(texts: dict[str, str]) -> None:
    mention = re.compile(r"`(?:\.venv/bin/)?puna ([a-z][\w-]*(?: [a-z][\w-]*)?)")
    named = {(name, cli.split(words.split())[0]) for name, text in texts.items() for words in mention.findall(text)}
    named |= {(name, cli.split(words)[0]) for name, text in texts.items() for words in shell_commands(text)}
    assert {word for _, word in named} > {"run", "chat"}
    assert not [(name, word) for name, word in sorted(named) if word not in cli.COMMANDS]


def test_the_readme_names_every_stage(readme: str) -> None:
    stages = {name for name, command in cli.COMMANDS.items() if command.module.startswith("puna.stages.")}
    assert not [name for name in sorted(stages) if f"`puna {name}`" not in readme]


def test_every_command_line_is_accepted(texts: dict[str, str], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flags and values make a config; nothing is run."""
    monkeypatch.chdir(root)
    for name, text in texts.items():
        for words in shell_commands(text):
            with monkeypatch.context() as patch:
                seen: list[Any] = []
                patch.setattr(importlib.import_module(cli.COMMANDS[cli.split(words)[0]].module), "run", seen.append)
                assert cli.main(words) == 0 and seen, f"{name}: puna {shlex.join(words)}"


def test_every_make_target_that_is_named_exists(texts: dict[str, str], root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    mention = re.compile(r"^make (.+)$|`make ([^`]+)`", re.MULTILINE)
    lines = ["".join(words).split("#")[0] for text in texts.values() for words in mention.findall(text)]
    named = {word for line in lines for word in line.split() if "=" not in word}
    assert named >= {"demo", "test"}
    assert named <= targets
    assert set(re.search(r"\.PHONY: (.+)", makefile)[1].split()) <= targets  # type: ignore[index]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_every_field(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leaving:
        cli.main([*name.split(), "--help"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    command = cli.COMMANDS[name]
    fields = config._leaves(getattr(importlib.import_module(command.module), command.config))
    assert not [key for key in fields if f"--{key.replace('_', '-')}" not in printed]


# The house -----------------------------------------------------------------------------------------------------------


def test_the_folder_map_is_the_tree(readme: str, root: Path) -> None:
    house = re.search(r"```\n?src/puna/\n(.*?)```", readme, re.DOTALL)
    assert house, "README has no block that begins with src/puna/"
    drawn = re.findall(r"^  (\S+)  ", house[1], re.MULTILINE)
    tree = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (root / "src/puna").iterdir()
        if path.name not in ("__init__.py", "__main__.py", "py.typed", "__pycache__")
    }
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == tree


def test_the_map_names_every_stage(readme: str, root: Path) -> None:
    stages = {path.stem for path in (root / "src/puna/stages").glob("*.py")} - {"__init__"}
    line = re.search(r"^  stages/ +(.+)$", readme, re.MULTILINE)
    assert line and set(line[1].split()) == stages


def test_the_six_files_to_read_exist(readme: str, root: Path) -> None:
    paragraph = re.search(r"^Six files to read.*?(?=\.\s|\n\n)", readme, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    assert paragraph, "README has no paragraph that begins with: Six files to read"
    files = re.findall(r"\]\((src/puna/[^)]+\.py)\)", readme[paragraph.start() :].split("\n\n")[0])
    assert len(files) == len(set(files)) == 6
    assert not [file for file in files if not (root / file).is_file()]


# Links ---------------------------------------------------------------------------------------------------------------


def test_every_link_resolves(texts: dict[str, str], root: Path) -> None:
    broken = []
    for name, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if re.match(r"[a-z]+://|mailto:", target):
                continue
            file, _, anchor = target.partition("#")
            path = (root / name).parent / file if file else root / name
            there = path.exists() and path.resolve().is_relative_to(root)
            if not there or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
                broken.append(f"{name}: {target}")
    assert not broken


def test_the_index_has_every_guide_and_decision(texts: dict[str, str]) -> None:
    pages = [name.removeprefix("docs/") for name in texts if name.startswith(("docs/guides/", "docs/decisions/"))]
    assert len(pages) >= 9
    assert not [page for page in pages if f"({page})" not in texts["docs/index.md"]]


def test_decisions_are_numbered_and_have_three_parts(texts: dict[str, str]) -> None:
    decisions = {Path(name).name: text for name, text in sorted(texts.items()) if name.startswith("docs/decisions/")}
    for number, (name, text) in enumerate(decisions.items(), start=1):
        assert re.fullmatch(rf"{number:04d}-[a-z0-9-]+\.md", name)
        assert text.startswith(f"# {number:04d}: ")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]


# Words ---------------------------------------------------------------------------------------------------------------


def test_the_documents_speak_of_the_project_alone(texts: dict[str, str]) -> None:
    found = [
        f"{name}: {match[0]!r}: {reason}"
        for name, text in texts.items()
        for pattern, reason in FOREIGN.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]
    assert not found


def test_every_format_has_a_line(texts: dict[str, str]) -> None:
    table = texts["docs/guides/real-data.md"].split("\n## Formats\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(READERS)
