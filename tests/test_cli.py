"""The command line: the table, the exit codes, and one line for each mistake."""

from __future__ import annotations

import errno
import importlib
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import puna
from puna import cli
from puna.cli import Command
from puna.config import DataError


@dataclass(frozen=True)
class FakeConfig:
    """A stage's config."""

    out: Path
    """where to write."""
    steps: int = 1


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A command `fake` whose run is `stage.run`; signal handlers and excepthook are put back."""
    module = types.SimpleNamespace(FakeConfig=FakeConfig, run=lambda cfg: cfg.out / "model")
    monkeypatch.setitem(sys.modules, "puna_fake_stage", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", Command("puna_fake_stage", "FakeConfig", "fake", "a fake stage", "out"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)
    return module


def test_every_command_has_a_config_and_a_run() -> None:
    for name, command in cli.COMMANDS.items():
        module = importlib.import_module(command.module)
        assert callable(module.run), name
        assert isinstance(getattr(module, command.config), type), name


def test_help_lists_every_command_and_imports_no_torch() -> None:
    program = "import sys; from puna import cli; cli.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, command in cli.COMMANDS.items():
        assert name in done.stdout and command.help in done.stdout


def test_version_and_no_arguments(stage: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"puna {puna.__version__}\n"
    assert cli.main([]) == 0
    assert "usage: puna COMMAND" in capsys.readouterr().out


def test_a_command_runs_and_says_where_its_result_is(
    stage: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fake", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert cli.main(["fake", str(tmp_path), "--steps", "3"]) == 0  # its first argument is --out


def test_a_first_argument_is_a_recipe_or_its_field(
    stage: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.COMMANDS["fake"]._replace(section="fake"))
    (tmp_path / "x.toml").write_text('[fake]\nout = "a"\n')
    seen: list[FakeConfig] = []
    stage.run = seen.append
    assert cli.main(["fake", str(tmp_path / "x.toml"), "--steps", "3"]) == 0
    assert cli.main(["fake", "a", "--steps", "3"]) == 0
    assert seen == [FakeConfig(Path("a"), 3)] * 2


def test_a_command_may_have_two_words(stage: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fake data", cli.COMMANDS["fake"])
    assert cli.split(["fake", "data", "--out", "a"]) == ("fake data", ["--out", "a"])
    assert cli.split(["fake", "--out", "data"]) == ("fake", ["--out", "data"])
    assert cli.main(["fake", "data", str(tmp_path)]) == 0


def test_a_recipe_with_flags(stage: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fake", Command("puna_fake_stage", "FakeConfig", "fake", "a fake stage"))
    (tmp_path / "x.toml").write_text('[fake]\nout = "a"\nsteps = 2\n')
    seen = []
    stage.run = seen.append
    assert cli.main(["fake", str(tmp_path / "x.toml"), "--steps", "3"]) == 0
    assert seen == [FakeConfig(Path("a"), 3)]


def test_a_command_takes_another_table_of_the_recipe(
    stage: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "x.toml"
    recipe.write_text('[fake]\nsteps = 2\n\n[fake_safety]\nout = "a"\nsteps = 3\n')
    seen: list[FakeConfig] = []
    stage.run = seen.append
    assert cli.main(["fake", str(recipe), "--table", "fake_safety"]) == 0
    assert cli.main(["fake", str(recipe), "--steps", "4", "--table=fake_safety"]) == 0
    assert seen == [FakeConfig(Path("a"), 3), FakeConfig(Path("a"), 4)]
    for wrong in (
        ["a", "--table", "fake_safety"],
        ["--table", "fake_safety"],
        [str(recipe), "--table"],
        [str(recipe), "--table", "--steps", "3"],
    ):
        assert cli.main(["fake", *wrong]) == 2
        assert capsys.readouterr().err == (
            "puna: error: --table names a table of a recipe: puna fake RECIPE.toml --table NAME\n"
        )
    assert cli.main(["fake", str(recipe), "--table", "fkae"]) == 2
    assert "no table [fkae]; tables there: [fake], [fake_safety]\n" in capsys.readouterr().err
    resolved = tmp_path / "config.json"
    resolved.write_text('{"out": "a", "steps": 3}')
    assert cli.main(["fake", str(resolved), "--table", "fkae"]) == 2
    assert "config.json: no table [fkae]" in capsys.readouterr().err


def test_a_shipped_recipes_reward_models_have_tables(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    seen: list[Any] = []
    monkeypatch.setattr(importlib.import_module("puna.stages.reward"), "run", seen.append)
    files = ["--init", "sft", "--data", "a.jsonl", "--other", "b.jsonl", "--out", "out"]
    recipe = str(root / "recipes/llama2-7b.toml")
    assert cli.main(["reward", recipe, "--table", "reward_safety", *files]) == 0
    assert (seen[0].safety_auxiliary, seen[0].max_len, seen[0].out) == (1.0, 4096, Path("out"))


UNKNOWN = "puna: error: unknown command {!r}; did you mean {!r}? (puna --help lists them)\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fkae"], UNKNOWN.format("fkae", "fake")),
        (["data", "perpare"], UNKNOWN.format("data perpare", "data prepare")),
        (["reward", "evalaute", "--out", "a"], UNKNOWN.format("reward evalaute", "reward evaluate")),
        (["fake", "--out", "a", "--step", "3"], "puna: error: unknown flag --step; did you mean --steps?\n"),
        (["fake"], "puna: error: missing --out: it has no default\n"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    stage: object, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == message


def test_errors_of_a_run(stage: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def raise_(error: BaseException) -> None:
        raise error

    stage.run = lambda cfg: raise_(DataError("x.jsonl, line 3:\nbad"))
    assert cli.main(["fake", "a"]) == 2
    assert capsys.readouterr().err == "puna: error: x.jsonl, line 3: bad\n"
    with pytest.raises(DataError):
        cli.main(["fake", "a", "--debug"])
    stage.run = lambda cfg: raise_(OSError(errno.ENOSPC, "No space left on device", "runs/x"))
    assert cli.main(["fake", "a"]) == 1
    assert "the disk is full (writing runs/x)" in capsys.readouterr().err
    stage.run = lambda cfg: (cfg.out / "x").read_text()
    assert cli.main(["fake", "absent"]) == 2
    assert capsys.readouterr().err == "puna: error: absent/x: No such file or directory\n"
    stage.run = lambda cfg: raise_(PermissionError(errno.EACCES, "Permission denied", "runs/x"))
    assert cli.main(["fake", "a"]) == 2
    assert capsys.readouterr().err == "puna: error: runs/x: Permission denied\n"
    with pytest.raises(PermissionError):
        cli.main(["fake", "a", "--debug"])
    stage.run = lambda cfg: raise_(KeyboardInterrupt())
    assert cli.main(["fake", "a"]) == 130
    assert capsys.readouterr().err == "puna: stopped; run the same command to go on\n"


FAKE = """
import sys, time, types
from dataclasses import dataclass
from puna import cli
@dataclass(frozen=True)
class C:
    steps: int = 1
def run(cfg):
    try:
        {body}
    finally:
        print("left", flush=True)
sys.modules["fake"] = types.SimpleNamespace(C=C, run=run)
cli.COMMANDS["fake"] = cli.Command("fake", "C", None, "")
sys.exit(cli.main(sys.argv[1:]))
"""


def test_another_error_is_one_line_and_with_debug_a_traceback() -> None:
    program = [sys.executable, "-c", FAKE.format(body="1 / 0"), "fake"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "puna: ZeroDivisionError: division by zero; run again with --debug for the traceback\n"
    done = subprocess.run([*program, "--debug"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_run_in_order(signum: int, code: int) -> None:
    # A shell starts its background jobs with SIGINT ignored, and the test may run in one.
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    body = f"{restore}; print('began', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", FAKE.format(body=body), "fake"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "began\n"
        time.sleep(0.1)
        process.send_signal(signum)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == "left\n"
    assert err == "puna: stopped; run the same command to go on\n"
