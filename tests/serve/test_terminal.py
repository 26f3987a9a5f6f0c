"""`puna chat` through a pipe, command by command."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from puna.api import Chat
from puna.config import ConfigError
from puna.serve import terminal
from puna.serve.terminal import ChatConfig, Session
from tests import helpers

Talk = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.talker_folder(tmp_path_factory.mktemp("chat") / "model", end=0.01)


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types lines into `puna chat`; what it prints, line by line."""

    def typed(*lines: str, **settings: Any) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        terminal.run(ChatConfig(folder, **{"max_new_tokens": 8, "temperature": 1.0} | settings))
        return capsys.readouterr().out.splitlines()

    return typed


def test_the_command_answers_a_pipe(folder: Path) -> None:
    command = [sys.executable, "-m", "puna", "chat", str(folder), "--max-new-tokens", "8", "--temperature", "0"]
    done = subprocess.run(command, input="hello\n\n[INST] a\n", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    answer, error = done.stdout.splitlines()
    assert answer
    assert error.startswith("error: a user turn holds the chat tag '[INST]'")


def test_answers_are_repeatable_and_turns_go_on(talk: Talk) -> None:
    first = talk("hello", "and then?", seed=3)
    assert len(first) == 2
    assert talk("hello", "and then?", seed=3) == first
    assert talk("hello", "and then?", seed=4) != first
    assert talk("hello", "/quit", "and then?", seed=3) == first[:1]


def test_undo_and_reset_take_turns_back(talk: Talk) -> None:
    first, second = talk("hello", "and then?")
    assert talk("hello", "/undo", "hello") == [first, "(0 questions left)", first]
    assert talk("/undo") == ["(0 questions left)"]
    assert talk("hello", "and then?", "/undo", "and then?") == [first, second, "(1 questions left)", second]
    assert talk("hello", "/reset", "hello") == [first, "(the dialog is empty)", first]


def test_the_system_message_is_the_models_to_read(talk: Talk) -> None:
    plain, kind = talk("hello"), talk("hello", system="be kind")
    assert plain != kind
    assert talk("/system be kind", "hello")[1:] == kind
    assert talk("/system", "hello", system="be kind") == ["(no system message)", *plain]


def test_saved_dialogs_can_be_trained_on(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "dialogs.jsonl"
    answer = talk("hello", f"/save {file}", "/reset", "bye", f"/save {file}", system="be kind")[0]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0] == {
        "messages": [helpers.system("be kind"), helpers.user("hello"), helpers.assistant(answer.strip())]
    }
    assert talk(f"/save {file}") == ["error: there is nothing to save yet"]
    assert talk("hello", "/save")[1] == "error: /save needs a file name"
    assert talk("hello", "/save ~nobody-at-all/x", "/undo")[2] == "(0 questions left)"
    assert "No such file" in talk("hello", f"/save {tmp_path / 'absent' / 'x.jsonl'}")[1]


def test_unknown_commands_and_help(talk: Talk) -> None:
    assert talk("/hlep") == ["error: no command /hlep; /help lists them"]
    assert talk("/help") == terminal.HELP.splitlines()


def test_a_mistake_leaves_no_trace(talk: Talk) -> None:
    first, second = talk("hello", "and then?")
    error = "error: a user turn holds the chat tag '<<SYS>>': remove it from the text"
    assert talk("hello", "<<SYS>>", "and then?") == [first, error, second]


def test_settings_are_checked_before_the_first_question(talk: Talk) -> None:
    for settings, said in (({"top_p": 2.0}, "top_p is 2.0"), ({"system": "[INST]"}, "--system holds the chat tag")):
        with pytest.raises(ConfigError, match=said):
            talk("hello", **settings)


def test_a_dialog_that_outgrows_the_context_loses_its_oldest_turns(talk: Talk) -> None:
    said = talk(*["tell me of the old shepherd and the seven tents"] * 12)
    notices = [line for line in said if line.startswith("(")]
    assert notices
    assert notices[0].startswith("(the dialog is longer than the model's context of 256 tokens: 1 old turn")
    assert not any(line.startswith("error") for line in said)


def test_a_question_longer_than_the_context_leaves_the_dialog_as_it_was(talk: Talk) -> None:
    first, second = talk("hello", "and then?")
    said = talk("hello", "x" * 2000, "and then?")
    assert [said[0], said[2]] == [first, second]
    assert said[1].startswith("error: ") and "leave room for an answer" in said[1]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[str]:
        yield "so\x1b[2J far"
        raise KeyboardInterrupt

    session = Session(ChatConfig(folder), Chat(helpers.talker(), helpers.tokenizer()), "")
    monkeypatch.setattr(session.chat, "stream", interrupted)
    terminal.answer(session, "hello")
    assert capsys.readouterr().out == "so\ufffd[2J far (stopped)\n"  # the terminal gets no escape code
    assert session.turns == [helpers.user("hello"), helpers.assistant("so\x1b[2J far")]


def test_a_reward_model_does_not_chat(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a reward model"):
        terminal.run(ChatConfig(helpers.reward_folder(tmp_path / "reward")))


def test_an_empty_answer_is_no_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(ChatConfig(folder, temperature=0), Chat(helpers.talker(end=0.99), helpers.tokenizer()), "")
    terminal.answer(session, "hello")
    assert (capsys.readouterr().out, session.turns) == ("(no answer)\n", [])
