"""What the README and the guide to real data tell people to type, run on small files and the tiny recipe's run."""

from __future__ import annotations

import bz2
import io
import json
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from puna import cli
from puna.data import readers, shards
from puna.text import tokenizer as tokenizers
from tests import helpers, tiny_run

SMALL = {
    "pretrain": "--model.dim 32 --model.n-layers 1 --model.n-heads 2 --model.n-kv-heads 1 --model.vocab-size 384 "
    "--model.ffn-hidden 64 --steps 4 --seq-len 64 --batch-size 8 --micro-batch-size 8 --optim.lr 1e-2",
    "sft": "--epochs 8 --batch-size 2 --optim.lr 2e-2",
    "reward": "--batch-size 8",
    "rejection-sampling": "--samples 2 --search-prompts 2 --max-new-tokens 24",
    "context-distillation": "--max-new-tokens 24",
    "ghost-attention": "--max-new-tokens 24",
    "ppo": "--iterations 2 --batch-size 4 --mini-batch-size 2 --held-out-prompts 4 --max-new-tokens 24",
    "chat": "--max-new-tokens 8",
}
"""What makes each command of the guide a matter of a second."""


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def block(path: Path, heading: str, language: str) -> str:
    """The first code block of a language under a heading."""
    section = path.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found, f"{path}: no {language} under {heading}"
    return found[1]


def write_files(folder: Path) -> None:
    """The files the guide speaks of."""
    for name, seed in (("books.txt", 0), ("notes.txt", 1)):
        (folder / name).write_text("\n\n".join(" ".join(helpers.sentences(4, 100 * seed + i)) for i in range(80)))
    helpers.write_lines(folder / "dialogs.jsonl", ({"messages": dialog} for dialog in helpers.dialogs(60)))
    helpers.write_lines(folder / "helpful.jsonl", helpers.preferences(40))
    safety = {"domain": "safety", "chosen_is_safe": True, "rejected_is_safe": False}
    helpers.write_lines(folder / "harmless.jsonl", helpers.preferences(20, seed=1, **safety))
    helpers.write_lines(folder / "prompts.jsonl", helpers.prompts(16))
    script = {"turns": helpers.sentences(3), "instruction": "Act as a ferryman.", "short": "Figure: a ferryman."}
    helpers.write_lines(folder / "scripts.jsonl", ({"id": str(i), **script} for i in range(4)))


def test_ones_own_data_from_text_to_a_chat_model(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    script = block(root / "docs/guides/real-data.md", "From text to a chat model", "sh").replace("\\\n", " ")
    commands = [line for line in script.splitlines() if line]
    assert len(commands) == 10
    for line in commands:
        _, name, *flags = shlex.split(line)
        assert cli.main([name, *flags, *SMALL[name].split()]) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (tmp_path / "runs/mine/v1/ppo/model/model.safetensors").exists()


def test_the_readmes_python(
    root: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny run, whose second version stands for the laptop's fifth."""
    run = tiny_run.finished(tmp_path_factory) / "run"
    laptop = tmp_path / "runs/laptop"
    laptop.mkdir(parents=True)
    for path in run.iterdir():
        (laptop / path.name.replace("v2", "v5")).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    source = block(root / "README.md", "From Python", "python")
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def test_comparisons_and_reward_models(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    helpers.talker_folder(tmp_path / "runs/chat/model")
    safety = {"domain": "safety", "chosen_is_safe": True, "rejected_is_safe": False}
    helpers.write_lines(tmp_path / "helpful_test.jsonl", helpers.preferences(12, seed=2))
    helpers.write_lines(tmp_path / "harmless_test.jsonl", helpers.preferences(12, seed=3, **safety))
    judged = {"output_1": "yes", "output_2": "no", "label": 1}
    helpers.write_lines(tmp_path / "llmbar.jsonl", ({"input": text, **judged} for text in helpers.sentences(12)))
    monkeypatch.chdir(tmp_path)
    text = (root / "docs/guides/preferences.md").read_text(encoding="utf-8")
    (layout,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    helpers.write_lines(tmp_path / "layout.jsonl", [json.loads(layout)])
    (read,) = readers.read(tmp_path / "layout.jsonl", "preferences").records
    assert (read.chosen, read.grade, read.batch, read.safety_label) == ("Shepherds do.", "better", 1, "both_safe")
    script = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in script.splitlines() if line]
    assert len(commands) == 10
    for words in commands:
        small = ["--batch-size", "8"] if words[0] == "reward" and words[1] != "evaluate" else []
        assert cli.main([*words, *small]) == 0, f"{words}\n{capsys.readouterr().err}"
    found = json.loads((tmp_path / "runs/compared/evaluation.json").read_text())
    assert found["models"].keys() == {"runs/helpfulness", "runs/safety"} and found["rules"].keys() == {
        "length",
        "words",
    }
    assert len(helpers.read_lines(tmp_path / "runs/scored/dialogs.jsonl")) == 60


def prepare_lines(root: Path, heading: str) -> list[list[str]]:
    """The commands of a section of the guide to text, as words without `puna`."""
    return [shlex.split(line)[1:] for line in block(root / "docs/guides/data.md", heading, "sh").splitlines()]


def test_text_for_pretraining(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/guides/data.md from the tokenizer to a model, and the mixture that its recipe describes."""
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(root / "recipes")
    documents = [{"text": " ".join(helpers.sentences(30, seed))} for seed in range(40)]
    helpers.write_lines(tmp_path / "books.jsonl", documents)
    readers.write_jsonl(tmp_path / "encyclopedia.jsonl.gz", documents[:20])
    for name, part in (("book-one.txt", documents[20:30]), ("book-two.txt", documents[30:])):
        (tmp_path / name).write_text("\n\n".join(document["text"] for document in part))
    for i in range(2):
        lines = "".join(
            json.dumps({"text": " ".join(helpers.sentences(30, 100 + 40 * i + j))}) + "\n" for j in range(9)
        )
        (tmp_path / f"web-{i:02d}.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    exec(compile(block(root / "docs/guides/data.md", "Prepare", "python"), "data.md", "exec"), {})
    for words in [*prepare_lines(root, "Prepare"), *prepare_lines(root, "Mixtures")]:
        small = SMALL["pretrain"].split() if words[0] == "pretrain" else ["--repeated-tokens", "0"]
        assert cli.main([*words, *small]) == 0, f"{words}\n{capsys.readouterr().err}"
    assert (tmp_path / "runs/pretrain/model/model.safetensors").exists()
    mixture = shards.read_prepared(tmp_path / "runs/more-books", "train", tokenizers.load(tmp_path / "tokenizer.model"))
    assert {name: weight for name, (weight, _) in mixture.items()} == {"encyclopedia": 2.5, "books": 4.0, "web": 0.5}
