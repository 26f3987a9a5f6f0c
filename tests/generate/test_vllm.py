"""The adapter against a stand-in that speaks vLLM's protocol: its answers are LocalEngine's, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puna.config import ConfigError
from puna.formats import huggingface
from puna.generate.engine import LocalEngine, open_engine
from puna.generate.vllm import VLLMEngine, request_seed
from puna.parallel import start
from puna.stages import ppo, sample
from puna.stages.sample import SampleConfig
from puna.types import Completion, Dialog
from tests import helpers
from tests.generate.stand_in_vllm import StandIn, serving

PROMPTS = [[1, *range(300, 300 + n)] for n in (3, 20, 1, 7, 12, 5, 31, 2)]


@pytest.fixture
def known() -> StandIn:
    return StandIn(LocalEngine(helpers.talker(end=0.05), helpers.tokenizer()))


@pytest.fixture
def url(known: StandIn) -> Iterator[str]:
    with serving(known) as url:
        yield url


def one_by_one(local: LocalEngine, **settings: Any) -> list[list[Completion]]:
    """What a LocalEngine says to each prompt alone: in a batch the last digits may differ."""
    return [row for prompt in PROMPTS for row in local.generate_ids([prompt], **settings)]


def test_greedy_answers_are_the_local_engines(url: str, known: StandIn) -> None:
    known.engine.update_weights(helpers.model())
    engine, local = VLLMEngine(url, helpers.tokenizer()), known.engine
    assert engine.context == local.context == 256
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.0}
    found = engine.generate_ids(PROMPTS, **settings)
    assert found == one_by_one(local, **settings)
    assert any(len(row[0].tokens) == 30 and not row[0].finished for row in found)
    dialogs: list[Dialog] = [[helpers.user("hello")], [helpers.system("be kind"), helpers.user("and who are you?")]]
    assert engine.generate(dialogs, **settings) == [
        row for each in dialogs for row in local.generate([each], **settings)
    ]
    assert engine.generate([]) == []


@pytest.mark.parametrize("cut", [
    {}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.9}, {"repetition_penalty": 2.0}, {"stop_ids": (301, 320)},
    {"stop": ("er", "g")}, {"stop": ("er", "g"), "stop_ids": (301, 320)},
])  # fmt: skip
def test_draws_are_the_local_engines_by_the_requests_seed(url: str, known: StandIn, cut: dict[str, Any]) -> None:
    heat = [0.7 + 0.1 * i for i in range(len(PROMPTS))]
    settings = {"n": 3, "max_new_tokens": 20, **cut}
    found = VLLMEngine(url, helpers.tokenizer()).generate_ids(PROMPTS, temperature=heat, seed=5, **settings)
    expected = [
        known.engine.generate_ids([prompt], temperature=heat[i], seed=request_seed(5, i), **settings)[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert found == expected
    assert any(answer.finished for row in found for answer in row)


def test_seeds_of_neighbours_lie_far_apart() -> None:
    """vLLM seeds sample s of a request with the request's seed + s."""
    seeds = [request_seed(seed, place) for seed in (-1, 0, 1, 2) for place in range(500)]
    assert min(b - a for a, b in zip(sorted(seeds), sorted(seeds)[1:], strict=False)) > 2**16
    assert min(seeds) >= 0 and max(seeds) < 2**62


def test_new_weights_are_loaded_while_nobody_generates(url: str, known: StandIn, tmp_path: Path) -> None:
    engine, new = VLLMEngine(url, helpers.tokenizer(), tmp_path / "weights"), helpers.talker(seed=1, end=0.05)
    engine.update_weights(new)
    folder = str(tmp_path / "weights")
    assert known.asked == [
        ("/pause?mode=wait", {}),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
        ("/reset_prefix_cache", {}),
        ("/resume", {}),
    ]
    greedy: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0}
    expected = one_by_one(LocalEngine(new, helpers.tokenizer()), **greedy)
    assert [row[0].tokens for row in engine.generate_ids(PROMPTS, **greedy)] == [row[0].tokens for row in expected]


def test_stages_sample_on_a_server(url: str, known: StandIn, tmp_path: Path) -> None:
    init = helpers.talker_folder(tmp_path / "chat", seed=1)
    prompts = helpers.write_lines(tmp_path / "prompts.jsonl", helpers.prompts(6))
    cfg = SampleConfig(out=tmp_path / "sample", init=init, prompts=(prompts,), max_new_tokens=40, vllm=url)
    folder = sample.run(cfg)
    assert helpers.read_lines(folder / "dialogs.jsonl")
    paths = [path for path, _ in known.asked]
    assert paths.count("/collective_rpc") == 1 and paths.count("/v1/completions") == 6

    known.asked.clear()
    ppo.run(helpers.ppo_config(tmp_path, iterations=2, vllm=url))
    paths = [path for path, _ in known.asked]
    assert paths[0] == "/pause?mode=wait" and paths.count("/collective_rpc") == 4  # two rollouts, two measurements
    assert paths.count("/v1/completions") == 2 * 8 + 2 * 6


def test_prompts_must_fit_the_servers_context(known: StandIn, tmp_path: Path) -> None:
    init = helpers.talker_folder(tmp_path / "chat", seed=1)
    prompts = helpers.write_lines(
        tmp_path / "prompts.jsonl", [{"id": f"{n}", "messages": [helpers.user("a " * n)]} for n in (1, 60)]
    )
    known.card["max_model_len"] = 40
    with serving(known) as url:
        cfg = SampleConfig(out=tmp_path / "sample", init=init, prompts=(prompts,), max_new_tokens=4, vllm=url)
        folder = sample.run(cfg)
    assert json.loads((folder / "done/sample.json").read_text())["left_out"] == 1


def test_the_local_engine_is_opened_without_a_server(tmp_path: Path, url: str) -> None:
    folder = helpers.talker_folder(tmp_path / "chat")
    assert isinstance(open_engine(folder, start()), LocalEngine)
    assert isinstance(open_engine(folder, start(), url), VLLMEngine)


def test_settings_and_prompts_out_of_range_are_refused_before_anything_is_sent(url: str, known: StandIn) -> None:
    engine = VLLMEngine(url, helpers.tokenizer())
    for settings, named in (
        ({"n": 0}, "n is 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": [1.0]}, "1 temperatures"),
    ):
        with pytest.raises(ConfigError, match=named):
            engine.generate_ids(PROMPTS, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prompt 1 has 256 tokens and the model's context 256"):
        engine.generate_ids([[1], [1] * 256])
    assert not known.asked


def test_servers_that_are_none_are_named(known: StandIn, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no vLLM server answers at http://127.0.0.1:9: .*refused"):
        VLLMEngine("http://127.0.0.1:9", helpers.tokenizer())
    with pytest.raises(ConfigError, match="unknown url type"):
        VLLMEngine("127.0.0.1:9", helpers.tokenizer())
    with pytest.raises(ConfigError, match="nonnumeric port"):
        VLLMEngine("http://127.0.0.1:port", helpers.tokenizer())
    with serving(StandIn(known.engine, card={"id": "gpt"})) as url, pytest.raises(ConfigError, match="max_model_len"):
        VLLMEngine(url, helpers.tokenizer())
    huggingface.save_model(helpers.model(), helpers.tokenizer(), tmp_path / "model")
    with serving(known) as url:
        engine = VLLMEngine(f"{url}/v1/", helpers.tokenizer())
        known.card = {"id": "another"}
        with pytest.raises(ConfigError, match=r"/v1/completions refused: 400 .*llama"):
            engine.generate_ids(PROMPTS)
        known.card = {"id": "llama"}
        known.changes = {"token_ids": None}
        with pytest.raises(ConfigError, match="return_token_ids"):
            engine.generate_ids(PROMPTS)
        known.changes = {"finish_reason": "abort"}
        with pytest.raises(OSError, match="cut an answer off: abort"):
            engine.generate_ids(PROMPTS)
        known.post = lambda path, body: (404, "Not Found")  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match=r"/pause.* refused: 404 .*VLLM_SERVER_DEV_MODE"):
            engine.load(tmp_path / "model")
        known.post = lambda path, body: (200, [])  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="no vLLM server's address: it answers a list"):
            engine.load(tmp_path / "model")
        known.post = lambda path, body: (500, "out of memory")  # type: ignore[method-assign]
        with pytest.raises(OSError, match=r"failed: 500 .*out of memory"):
            engine.generate_ids(PROMPTS)
