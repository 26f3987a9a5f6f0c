"""The command line: `puna COMMAND [RECIPE.toml] [--flags]`.

A command is a row of COMMANDS: the module, its config dataclass, the recipe's table. Its name is a word or two
("data stats"). The module is imported when its command is named, so `puna --help` needs no torch.

Exit codes: 0 done; 1 an error (`--debug` shows the traceback); 2 a mistake in a recipe, a flag, a path or a data file;
130 stopped by Ctrl-C; 143 stopped by SIGTERM. A stopped run goes on when the same command is given again; `puna serve`,
which either signal ends as it should, gives 0.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import puna
from puna import config
from puna.config import ConfigError, DataError

USERS_OSERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What a path that cannot be read or written raises."""
STOPPED = "puna: stopped; run the same command to go on"


class Command(NamedTuple):
    """A command: `module.run(cfg)` with cfg of the class `config`, read from the recipe's table `section`.

    `section` None reads the whole recipe. `help` is its line in `puna --help`. `positional` is the config's field that
    the first argument sets where it is neither a flag nor a recipe.
    """

    module: str
    config: str
    section: str | None
    help: str
    positional: str | None = None


COMMANDS = {
    "run": Command("puna.recipe", "RecipeConfig", None, "the whole recipe: pretrain, SFT, V1 to V5, report"),
    "valley": Command("puna.valley.write", "ValleyConfig", "valley", "write the embedded world's data"),
    "data prepare": Command(
        "puna.corpus.prepare", "PrepareConfig", "prepare", "write text of many sources as token shards"
    ),
    "pretrain": Command("puna.stages.pretrain", "PretrainConfig", "pretrain", "train a model on raw text"),
    "sft": Command("puna.stages.sft", "SFTConfig", "sft", "fine-tune a model on dialogs"),
    "collect": Command("puna.stages.collect", "CollectConfig", "collect", "collect preferences over answer pairs"),
    "reward": Command("puna.stages.reward", "RewardConfig", "reward", "train a reward model on preferences"),
    "reward evaluate": Command(
        "puna.evals.reward_models",
        "RewardEvaluateConfig",
        "reward_evaluate",
        "measure reward models on held-out comparisons",
    ),
    "rejection-sampling": Command(
        "puna.stages.rejection_sampling",
        "RejectionSamplingConfig",
        "rejection_sampling",
        "sample answers and write the best as dialogs",
    ),
    "ppo": Command("puna.stages.ppo", "PPOConfig", "ppo", "train a chat model against the reward models"),
    "dpo": Command("puna.stages.dpo", "DPOConfig", "dpo", "train a chat model on preferences, without a reward model"),
    "grpo": Command("puna.stages.grpo", "GRPOConfig", "grpo", "train a chat model on groups of answers (GRPO, RLOO)"),
    "conformance": Command(
        "puna.evals.conformance", "ConformanceConfig", "conformance", "check a PPO trainer's dump", "rollout"
    ),
    "critique": Command(
        "puna.stages.critique", "CritiqueConfig", "critique", "revise or compare answers by principles"
    ),
    "ghost-attention": Command(
        "puna.stages.ghost_attention",
        "GhostAttentionConfig",
        "ghost_attention",
        "write dialogs that keep an instruction",
    ),
    "context-distillation": Command(
        "puna.stages.context_distillation",
        "ContextDistillationConfig",
        "context_distillation",
        "write safe answers without their preprompt",
    ),
    "data stats": Command("puna.data.stats", "StatsConfig", None, "count what comparisons hold", "files"),
    "sample": Command("puna.stages.sample", "SampleConfig", "sample", "write answers to prompts in bulk", "prompts"),
    "score": Command("puna.stages.score", "ScoreConfig", "score", "write reward models' scores of dialogs", "data"),
    "evaluate": Command("puna.evals.valley", "EvaluateConfig", "evaluate", "measure a model with the gold judge"),
    "report": Command("puna.report.html", "ReportConfig", "report", "write a run's report", "run"),
    "compare": Command("puna.report.compare", "CompareConfig", "compare", "runs side by side: a table, a page", "runs"),
    "plan": Command("puna.plan", "PlanConfig", "plan", "what pretraining takes on a cluster", "recipe"),
    "bench memory": Command(
        "puna.report.memory", "MemoryBenchConfig", "bench_memory", "what heads and experts cost in memory and speed"
    ),
    "import": Command(
        "puna.formats.convert", "ImportConfig", "import", "import a model (GGUF, Hugging Face, Meta)", "path"
    ),
    "export": Command(
        "puna.formats.export", "ExportConfig", "export", "export a model (Hugging Face, GGUF, Meta)", "checkpoint"
    ),
    "inspect": Command("puna.formats.inspect", "InspectConfig", "inspect", "say what a file or folder holds", "path"),
    "serve": Command("puna.serve.server", "ServeConfig", "serve", "serve OpenAI's API and a web chat", "checkpoint"),
    "chat": Command("puna.serve.terminal", "ChatConfig", "chat", "talk to a model in the terminal", "path"),
}


WAITING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""Environment variables that set how OpenMP's threads wait for work: spin briefly, then sleep (docs/log.md).

Spinning for long makes a run many times slower beside another process that uses the cores; never spinning puts threads
to sleep between small matrix products. GNU's OpenMP spins GOMP_SPINCOUNT times, or under ACTIVE a third as often where
several threads of the process start parallel work, as a server's do; LLVM's reads KMP_BLOCKTIME.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; a mistake of the user's is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)  # read when torch is loaded, by the import of the command's module
    signal.signal(signal.SIGTERM, _stop)
    if not debug:
        sys.excepthook = _say_briefly
    try:
        return _run([argument for argument in arguments if argument != "--debug"])
    except (ConfigError, DataError) as error:
        if debug:
            raise
        _say(f"puna: error: {error}")
        return 2
    except USERS_OSERRORS as error:
        if debug or error.filename is None:
            raise
        _say(f"puna: error: {error.filename}: {error.strerror}")
        return 2
    except OSError as error:
        if debug or error.errno != errno.ENOSPC:
            raise
        where = f" (writing {error.filename})" if error.filename else ""
        _say(f"puna: error: the disk is full{where}; make room and run the same command to go on")
        return 1
    except KeyboardInterrupt:
        _say(STOPPED)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"puna {puna.__version__}")
        return 0
    name, rest = split(arguments)
    if misspelt := _misspelt(name, rest):
        (nearest,) = difflib.get_close_matches(misspelt, COMMANDS, n=1, cutoff=0.0)
        raise ConfigError(f"unknown command {misspelt!r}; did you mean {nearest!r}? (puna --help lists them)")
    command = COMMANDS[name]
    field, section = command.positional, command.section
    has_table = section is not None and field != "recipe"
    takes = "recipe.toml [--table NAME]" if has_table else "recipe.toml"
    if field and field != "recipe":
        takes = f"{takes} | {field}"
    is_recipe = bool(rest) and field != "recipe" and rest[0].endswith((".toml", "config.json"))
    if field and rest and not rest[0].startswith("-") and not is_recipe:
        rest.insert(0, f"--{field}")
    table = _take_table(name, rest) if has_table else None
    module, prog = importlib.import_module(command.module), f"puna {name} [{takes}]"
    cfg: Any = config.load(getattr(module, command.config), rest, table or section, prog=prog, named=table is not None)
    result = module.run(cfg)
    if result is not None:
        print(result)
    return 0


def _take_table(name: str, rest: list[str]) -> str | None:
    """Takes `--table NAME` out of a command's arguments and returns NAME; None where it is not there."""
    place = next((i for i, word in enumerate(rest) if word.partition("=")[0] == "--table"), None)
    if place is None:
        return None
    flag, _, table = rest.pop(place).partition("=")
    table = table or (rest.pop(place) if place < len(rest) else "")
    if not table or table.startswith("-") or not rest or rest[0].startswith("-"):
        raise ConfigError(f"{flag} names a table of a recipe: puna {name} RECIPE.toml {flag} NAME")
    return table


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command that arguments begin with, a word or two of them, and the rest."""
    name, *rest = arguments
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name = f"{name} {rest.pop(0)}"
    return name, rest


def _misspelt(name: str, rest: Sequence[str]) -> str | None:
    """The misspelt command, of one word or two; None where `name` is a command."""
    takes_words = name in COMMANDS and COMMANDS[name].positional
    if rest and rest[0].isalpha() and not takes_words and any(other.startswith(f"{name} ") for other in COMMANDS):
        return f"{name} {rest[0]}"  # a recipe's name has a dot
    return None if name in COMMANDS else name


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    return f"""\
usage: puna COMMAND [RECIPE.toml] [--flags]

{rows}

puna COMMAND --help lists a command's flags; a flag outdoes the recipe.
  --table NAME  take that table of the recipe, not the command's own: puna reward RECIPE.toml --table reward_safety
  --debug       show the traceback of an error
  --version     print the version"""


def _stop(signum: int, frame: FrameType | None) -> None:
    """SIGTERM: leaves through every `finally`, like Ctrl-C."""
    _say(STOPPED)
    raise SystemExit(128 + signum)


def _say_briefly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error that is not the user's mistake, in one line."""
    _say(f"puna: {kind.__name__}: {error}; run again with --debug for the traceback")


def _say(message: str) -> None:
    """One line on stderr."""
    print(" ".join(message.split()), file=sys.stderr)
