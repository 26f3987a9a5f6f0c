"""Programs that people use, against the server as they find it: llm, and schemathesis on the schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.serve.stand_in import StandIn, serving, state_of

ANSWER = "Llamas are herded by shepherds."
LLM_ENTRY = """\
- model_id: puna
  model_name: llama
  api_base: URL/v1
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(state_of(StandIn(), rewards={"safety": lambda dialogs: torch.tensor([0.5])})) as url:
        yield url


@pytest.mark.parametrize("flags", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_llm(url: str, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(LLM_ENTRY.replace("URL", url))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", "-m", "puna", "--no-log", *flags, "-s", "Be kind.", "Who herds llamas?"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.stderr) == (ANSWER, "")


def test_schemathesis_finds_nothing(url: str, tmp_path: Path) -> None:
    """Its own requests by the schema, sound and broken, to a model that exists: no 5xx, nothing undocumented.

    What it calls acceptance is left out: a schema cannot say that roles alternate.
    """
    schema = httpx.get(f"{url}/openapi.json").json()
    for name in ("ChatRequest", "CompletionRequest"):
        schema["components"]["schemas"][name]["properties"]["model"] = {"type": "string", "enum": ["llama"]}
    (tmp_path / "openapi.json").write_text(json.dumps(schema))
    command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url, "--seed", "1"]
    settings = ["--max-examples", "30", "--exclude-checks", "positive_data_acceptance", "--no-color"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert httpx.get(f"{url}/ready").status_code == 200
