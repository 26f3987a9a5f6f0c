"""The ledger: every artefact's hash, what each step read and wrote, and what two runs have in common."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from puna.report import ledger, tables
from puna.run_folder import fingerprint
from tests import helpers, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's finished run."""
    return tiny_run.finished(tmp_path_factory) / "run"


@pytest.fixture(scope="module")
def told(run: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((run / "ledger.json").read_text())
    return written


def step(told: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in told["steps"] if each["step"] == name]
    return found


def test_every_artefact_has_its_hash(run: Path, told: dict[str, Any]) -> None:
    hashes = told["artefacts"]
    weights = (run / "v2/reward_safety/model/model.safetensors").read_bytes()
    assert hashes["v2/reward_safety/model"] == hashlib.sha256(weights).hexdigest()
    for name in (
        "valley/corpus.jsonl",
        "valley/facts.json",
        "v1/preferences/safety.jsonl",
        "v2/ppo/held_out/0000.jsonl",
    ):
        assert hashes[name] == hashlib.sha256((run / name).read_bytes()).hexdigest(), name
    timed = ("config.json", "metrics.jsonl", "ledger.json")
    assert not [name for name in hashes if name.split("/")[-1] in timed]
    assert not [name for name in hashes if {"done", "report", "checkpoints", "parts"} & set(name.split("/"))]


def test_a_version_is_traced(run: Path, told: dict[str, Any]) -> None:
    assert [each["step"] for each in told["steps"]][
        :5
    ] == "valley pretrain pretrain/evaluation sft sft/evaluation".split()
    compared = step(told, "v2/preferences")
    assert compared["read"]["models"] == ["v1/model", "sft/model"]
    rows = helpers.read_lines(run / "v2/preferences/helpfulness.jsonl")
    assert compared["records"]["v2/preferences/helpfulness.jsonl"] == len(rows)
    answered = {told["artefacts"][name][:16] for name in compared["read"]["models"]}
    assert {model for row in rows for model in row["models"]} == answered
    sampled = step(told, "v2/rejection_sampling")
    assert sampled["read"]["reward_safety"] == ["v2/reward_safety/model"]
    pool = helpers.read_lines(run / "v2/rejection_sampling/pool.jsonl")
    assert sampled["rounds"] == {name: sum(r["round"] == name for r in pool) for name in ("v1", "v2")}
    assert {r["model"] for r in pool if r["round"] == "v2"} == {fingerprint(run / "v1/model")}
    tuned = step(told, "v2")
    assert tuned["read"]["init"] == ["pretrain/model"] and "v2/rejection_sampling/pool.jsonl" in tuned["read"]["data"]
    assert tuned["wrote"] == ["v2/model"], "what lies below is other steps'"
    assert step(told, "v2/ppo")["wrote"][-1] == "v2/ppo/model"


def test_the_reports_table(told: dict[str, Any]) -> None:
    first, second = tables.ledger(told).rows
    assert [cell.text for cell in first[:2]] == ["V1", "sft/model"]
    assert second[3].text == "v2/reward_helpfulness/model, v2/reward_safety/model"
    assert "of V1" in second[4].text and "of V2" in second[4].text
    assert second[5].small == "v2/model, v2/ppo/model"
    assert second[5].text.split(", ")[0] == told["artefacts"]["v2/model"][:12]


def test_what_differs_is_named(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "moved"
    shutil.copytree(run, other)
    n, changed = ledger.differences(run, other, "v1")
    assert n > 8 and changed == []
    with (other / "v1/rejection_sampling/pool.jsonl").open("a") as file:
        file.write("{}\n")
    shutil.rmtree(other / "v1/model")
    assert ledger.differences(run, other, "v1") == (n, ["v1/model", "v1/rejection_sampling/pool.jsonl"])
    assert ledger.differences(run, other, "v2")[1] == []


def test_weights_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name, content in (("a.safetensors", b"1"), ("b.safetensors", b"2")):
        (tmp_path / "model" / name).write_bytes(content)
    digests = "".join(hashlib.sha256(content).hexdigest() for content in (b"1", b"2"))
    assert fingerprint(tmp_path / "model") == hashlib.sha256(digests.encode()).hexdigest()[:16]
