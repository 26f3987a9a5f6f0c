"""`puna.load` on every kind of path, and what it gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna import api, checkpoint
from puna.api import Chat, RewardScorer
from puna.config import ConfigError, DataError
from puna.stages import ppo, pretrain, reward, sft
from puna.text import chat as chat_format
from puna.types import Dialog
from tests import helpers

DIALOGS: list[Dialog] = [
    [helpers.user("hello"), helpers.assistant("the llama counts 3 hills.")],
    [helpers.user("hello"), helpers.assistant("her dog"), helpers.user("and?"), helpers.assistant("the cold river")],
]
TOO_LONG = [helpers.user("Where? " * 300), helpers.assistant("There.")]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    loaded = puna.load(helpers.talker_folder(tmp_path_factory.mktemp("chat") / "model"))
    assert isinstance(loaded, Chat)
    return loaded


def test_importing_puna_needs_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import puna, sys; assert 'torch' not in sys.modules"], check=True)


def test_generate_takes_a_question_a_dialog_or_many(chat: Chat) -> None:
    dialog: Dialog = [helpers.user("hello")]
    answers = chat.generate([dialog, "hello", "bye"], n=3, max_new_tokens=8)
    assert [len(row) for row in answers] == [3, 3, 3]
    assert chat.generate(dialog, n=3, max_new_tokens=8) == chat.generate("hello", n=3, max_new_tokens=8) == answers[:1]
    assert chat.generate([], max_new_tokens=8) == []
    assert chat.generate("hello", max_new_tokens=8, seed=1, temperature=1.0) != chat.generate(
        "hello", max_new_tokens=8, seed=2, temperature=1.0
    )


def test_the_stream_is_the_answer(chat: Chat) -> None:
    assert "".join(chat.stream("hello", max_new_tokens=8)) == chat.generate("hello", max_new_tokens=8)[0][0]


def test_logprobs_are_the_models(chat: Chat) -> None:
    for dialog, scored in zip(DIALOGS, chat.logprobs(DIALOGS), strict=True):
        tokens, mask = chat_format.encode(dialog, chat.tokenizer)
        assert (scored.tokens, scored.mask) == (tokens, mask)
        with torch.inference_mode():
            full = chat.model(torch.tensor([tokens]))[0].log_softmax(-1)
        expected = full[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
        assert scored.logprobs[0] == 0
        torch.testing.assert_close(torch.tensor(scored.logprobs[1:]), expected, atol=1e-5, rtol=0)
    assert chat.logprobs(DIALOGS[0])[0].tokens == chat.logprobs(DIALOGS)[0].tokens


def test_a_dialog_that_cannot_be_encoded_is_refused(chat: Chat) -> None:
    with pytest.raises(DataError, match="must end with the user"):
        chat.generate(DIALOGS[0])
    with pytest.raises(DataError, match="must end with the assistant"):
        chat.logprobs([[helpers.user("hello")]])
    with pytest.raises(DataError, match=r"^dialog \d has \d+ tokens, the model reads 256$"):
        chat.logprobs([TOO_LONG])


def test_a_reward_model_scores(tmp_path: Path) -> None:
    scorer = puna.load(helpers.reward_folder(tmp_path / "reward"))
    assert isinstance(scorer, RewardScorer)
    scores = scorer.score(DIALOGS)
    assert scores.shape == (2,)
    tokens = torch.tensor([chat_format.encode(DIALOGS[1], scorer.tokenizer).tokens])
    with torch.inference_mode():
        raw = scorer.model(tokens, torch.tensor([tokens.shape[1]]))
    torch.testing.assert_close(scores[1:], raw.sigmoid(), atol=1e-5, rtol=0)
    torch.testing.assert_close(scorer.score(DIALOGS[1]), scores[1:], atol=1e-6, rtol=0)
    with pytest.raises(DataError, match=r"^dialog \d has \d+ tokens, the model reads 256$"):
        scorer.score([*DIALOGS, TOO_LONG])


def test_a_run_folder_gives_its_newest_chat_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 0}')  # a run's own, which is no model's
    with pytest.raises(ConfigError, match=r"holds no model.*v\*/ppo/model"):
        puna.load(tmp_path)
    for stage in ("pretrain", "sft", "v1", "v2", "v2/reward_helpfulness", "v10", "v2/ppo", "v10/ppo"):
        if stage.endswith("helpfulness"):
            helpers.reward_folder(tmp_path / stage / "model")
            continue
        folder = helpers.talker_folder(tmp_path / stage / "model")
        newest = tmp_path / ("v10" if stage == "v2/ppo" else stage) / "model"
        assert api.newest_model(tmp_path) == newest
        assert api.newest_model(tmp_path / stage) in (folder, tmp_path / stage / "ppo" / "model")
    assert isinstance(puna.load(str(tmp_path)), Chat)
    assert isinstance(puna.load(tmp_path / "v2" / "reward_helpfulness"), RewardScorer)


def test_an_imported_model_is_a_runs_last_resort(tmp_path: Path) -> None:
    folder = helpers.talker_folder(tmp_path / "base/model")
    assert api.newest_model(tmp_path) == folder
    tuned = helpers.talker_folder(tmp_path / "v1/model")
    assert api.newest_model(tmp_path) == tuned


@pytest.mark.parametrize(
    ("stage", "kind", "made"),
    [
        (pretrain, Chat, helpers.pretrain_config),
        (sft, Chat, helpers.sft_config),
        (reward, RewardScorer, helpers.reward_config),
        (ppo, Chat, helpers.ppo_config),
    ],
)
def test_a_checkpoint_opens_as_what_it_trains(
    stage: Any, kind: type[Chat | RewardScorer], made: Callable[[Path], Any], tmp_path: Path
) -> None:
    cfg = made(tmp_path)
    stage.run(cfg)
    path = checkpoint.latest(cfg.out / "checkpoints")
    assert path is not None
    loaded = puna.load(path)
    assert type(loaded) is kind and loaded.tokenizer.vocab_size == helpers.VOCAB
    weights = dict(loaded.model.named_parameters())
    final = dict(puna.load(cfg.out / "model").model.named_parameters())
    assert weights.keys() == final.keys()
    change = max(float((weights[name] - final[name]).abs().max().detach()) for name in weights)
    assert change < 0.05 if stage is ppo else change == 0, "PPO's published model may be an earlier one"
    (cfg.out / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing or damaged: it says what .*step_"):
        puna.load(path)


def test_a_checkpoint_opens_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.sft_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    relative = {name: path.relative_to(tmp_path) for name, path in (("init", cfg.init), ("out", cfg.out))}
    sft.run(replace(cfg, **relative))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = checkpoint.latest(cfg.out / "checkpoints")
    assert path is not None and isinstance(puna.load(path), Chat)


def test_a_path_to_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        puna.load(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"absent\.gguf"):
        puna.load(tmp_path / "absent.gguf")
