"""Reward models from comparisons: the mixes, the margins, the measurements."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from puna import losses, parallel
from puna.config import ConfigError, DataError
from puna.data import comparisons, readers
from puna.formats import export, huggingface
from puna.formats.export import ExportConfig
from puna.generate.scoring import Scorer, open_scorer
from puna.model.reward import RewardModel
from puna.run_folder import read_metrics
from puna.stages import dpo, reward
from puna.types import Preference
from tests import helpers


def preference(i: int, **changes: object) -> Preference:
    return Preference(**({"prompt": [helpers.user(f"{i}?")], "chosen": "yes", "rejected": "no"} | changes))


def test_comparisons_become_a_reward_model(tmp_path: Path) -> None:
    cfg = helpers.reward_config(tmp_path, epochs=6, test=(tmp_path / "pairs.jsonl",))
    model_path = reward.run(cfg)
    lines = read_metrics(tmp_path / "reward/metrics.jsonl")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    evaluation = json.loads((tmp_path / "reward/evaluation.json").read_text())
    assert evaluation["pairs"] == 54 and evaluation["accuracy"] > 0.9
    assert set(evaluation["accuracy_by_grade"]) == set(evaluation["pairs_by_grade"]) == set(losses.MARGINS["small"])
    assert evaluation["accuracy_by_safety_label"] == {"chosen_safe_rejected_unsafe": evaluation["accuracy"]}
    assert evaluation["mean_score_chosen"] > evaluation["mean_score_rejected"]
    done = json.loads((tmp_path / "reward/done/reward.json").read_text())
    counts = {"pairs": 54, "left_out": 0, "set_aside": 0, "prefer_harm": 0, "other_share": 0.0}
    assert done == {**counts, "accuracy": evaluation["accuracy"]}
    provenance = json.loads((model_path / "puna.json").read_text())
    assert provenance == {"stage": "reward", "parent": str(cfg.init), "scale": provenance["scale"]}
    scorer = Scorer(huggingface.load_reward_model(model_path), helpers.tokenizer())
    rows = readers.read(cfg.data, "preferences").records
    chosen = scorer([[*row.prompt, helpers.assistant(row.chosen)] for row in rows])
    rejected = scorer([[*row.prompt, helpers.assistant(row.rejected)] for row in rows])
    assert float((chosen > rejected).float().mean()) == pytest.approx(evaluation["accuracy"])


def test_the_scale_is_that_of_the_held_out_answers_and_survives_an_export(tmp_path: Path) -> None:
    cfg = helpers.reward_config(tmp_path, test=(tmp_path / "pairs.jsonl",))
    reward.run(cfg)
    export.run(ExportConfig(cfg.out / "model", tmp_path / "exported"))
    rows = [comparisons.tokens(p, helpers.tokenizer()) for p in readers.read(cfg.data, "preferences").records]
    answers = [answer for pair in rows for answer in pair]
    for folder in (cfg.out, tmp_path / "exported"):
        plain, normalised = (open_scorer(folder, torch.device("cpu"), normalise=flag) for flag in (False, True))
        raw, standard = plain.raw(answers), normalised.raw(answers)
        assert float(raw.std()) < 0.9, "the scale must have something to do"
        assert (len(standard), float(standard.mean())) == (108, pytest.approx(0, abs=1e-5))
        assert float(standard.std(correction=0)) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(normalised.score_tokens(answers), standard.sigmoid())
        assert torch.equal(plain.score_tokens(answers), raw.sigmoid())


def test_reference_dialogs_give_the_scale(tmp_path: Path) -> None:
    dialogs = [*helpers.dialogs(5), [helpers.user("a " * 200), helpers.assistant("b " * 200)]]  # the last is too long
    data = helpers.write_lines(tmp_path / "dialogs.jsonl", ({"messages": dialog} for dialog in dialogs))
    folder = reward.run(helpers.reward_config(tmp_path, reference=(data,)))
    raw = open_scorer(folder, torch.device("cpu"), normalise=True)(dialogs[:5]).logit()
    assert float(raw.mean()) == pytest.approx(0, abs=1e-4)
    assert json.loads((folder / "puna.json").read_text())["scale"]["n"] == 5


def test_measurements_have_the_precision_and_the_passes_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogs = helpers.write_lines(tmp_path / "dialogs.jsonl", ({"messages": d} for d in helpers.dialogs(20)))
    cfg = helpers.reward_config(tmp_path, precision="bf16", micro_batch_tokens=150, reference=(dialogs,))
    model, asked, sizes = helpers.reward_model(), [], []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].numel()))
    real = parallel.autocast
    monkeypatch.setattr(parallel, "autocast", lambda *how: [asked.append(how[0]), real(*how)][1])
    reward.held_out_scores(cfg, model, helpers.tokenizer(), readers.read(cfg.data, "preferences").records)
    reward.reference_scores(cfg, model, helpers.tokenizer())
    assert set(asked) == {"bf16"} and max(sizes) <= 150


def test_one_rank_writes_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"checkpoint_every": 0}
    runs = [(reward, helpers.reward_config(tmp_path, **none)), (dpo, helpers.dpo_config(tmp_path, **none))]
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    for stage, cfg in runs:
        stage.run(cfg)
        assert (cfg.out / "metrics.jsonl").exists() and not (cfg.out / "evaluation.json").exists()


def test_a_tenth_is_held_out_without_test_files(tmp_path: Path) -> None:
    cfg = helpers.reward_config(tmp_path)
    train, test, _ = reward.prepare(cfg, helpers.tokenizer())
    assert len(train) + len(test) == 54 and 1 <= len(test) <= 12
    held_out = [tuple(reward.as_pair(p, helpers.tokenizer(), "small").chosen) for p in test]
    assert not set(held_out) & {tuple(pair.chosen) for pair in train}


def test_all_comparisons_of_a_prompt_are_held_out_or_none(tmp_path: Path) -> None:
    rows = helpers.preferences(40)
    again = [row | {"chosen": [helpers.assistant(f"again {i}")]} for i, row in enumerate(rows)]
    data = helpers.write_lines(tmp_path / "twice.jsonl", [*rows, *again])
    train, test, _ = reward.prepare(helpers.reward_config(tmp_path, data=(data,), other=()), helpers.tokenizer())
    prompts = [str(p.prompt) for p in test]
    assert test and len(train) + len(test) == 80 and all(prompts.count(prompt) == 2 for prompt in prompts)


@pytest.mark.parametrize(
    ("share", "n_own", "n_other", "expected"),
    [
        (0.5, 40, 100, 40),  # helpfulness: 1 : 1
        (0.1, 90, 100, 10),  # safety: 90 : 10
        (0.5, 40, 30, 30),  # not enough of the other kind: all of it
        (0.0, 40, 30, 0),
    ],
)
def test_mixes(share: float, n_own: int, n_other: int, expected: int) -> None:
    own = [preference(i, domain="helpfulness") for i in range(n_own)]
    other = [preference(i, domain="safety") for i in range(n_other)]
    mixed = reward.mix(own, other, share, np.random.default_rng(0))
    assert Counter(p.domain for p in mixed) == Counter(helpfulness=n_own) + Counter(safety=expected)
    questions = [(p.domain, p.prompt[0]["content"]) for p in mixed]
    assert len(set(questions)) == len(questions), "drawn without replacement"
    assert [p for p in mixed if p.domain == "helpfulness"] != own, "shuffled"


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"batch_size": 0}, "batch_size is 0: it must be positive"),
        ({"epochs": -1}, "epochs is -1"),
        ({"other_share": 1.0}, r"other_share is 1\.0: it must be at least 0 and less than 1"),
        ({"other_share": -0.1}, "other_share is -0.1"),
    ):
        with pytest.raises(ConfigError, match=said):
            helpers.reward_config(tmp_path, **changes)


def test_margins_follow_the_grade() -> None:
    tokenizer = helpers.tokenizer()
    for name, grades in losses.MARGINS.items():
        for grade, margin in grades.items():
            assert reward.as_pair(preference(0, grade=grade), tokenizer, name).margin == margin
    assert reward.as_pair(preference(0, margin=0.7), tokenizer, "small").margin == 0.7
    assert reward.as_pair(preference(0), tokenizer, "large").margin == 0.0


def expected_loss(model: RewardModel, rows: list[Preference], margin: str, weight: float) -> float:
    """The loss one pair and one label at a time, in Python's own numbers."""
    ranking, labels = 0.0, []
    for row in rows:
        pair = reward.as_pair(row, helpers.tokenizer(), margin)
        chosen, rejected = (
            float(model(torch.tensor([ids]), torch.tensor([len(ids)])).detach()) for ids in (pair.chosen, pair.rejected)
        )
        ranking += np.log1p(np.exp(rejected - chosen + pair.margin))
        for score, is_safe in ((chosen, row.chosen_is_safe), (rejected, row.rejected_is_safe)):
            if is_safe is not None:
                labels.append(np.log1p(np.exp(-score if is_safe else score)))
    return float(ranking / len(rows) + weight * np.mean(labels))


def test_loss_is_ranking_plus_the_weighted_labels(tmp_path: Path) -> None:
    rows = [
        preference(0, grade="significantly_better", chosen_is_safe=True, rejected_is_safe=False),
        preference(1, grade="better", chosen="yes, by the cold river"),
        preference(2, chosen_is_safe=False, rejected_is_safe=False, rejected="no " * 9),
    ]
    cfg, model = helpers.reward_config(tmp_path, safety_auxiliary=0.3), helpers.reward_model()
    pairs = [reward.as_pair(row, helpers.tokenizer(), "large") for row in rows]
    loss, accuracy, n_tokens = reward.update(cfg, model, pairs, torch.device("cpu"))
    assert loss == pytest.approx(expected_loss(model, rows, "large", 0.3), rel=1e-5)
    assert n_tokens == sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    assert accuracy * 3 == pytest.approx(round(accuracy * 3))
    in_parts, _, _ = reward.update(replace(cfg, micro_batch_tokens=1), model, pairs, torch.device("cpu"))
    assert in_parts == pytest.approx(loss, rel=1e-6)


def test_gradients_are_those_of_each_answer_in_a_row_of_its_own(tmp_path: Path) -> None:
    rows = [preference(i, chosen="yes " * (i + 1), rejected="yes no" + " no" * i) for i in range(4)]
    cfg, model = helpers.reward_config(tmp_path), helpers.reward_model()
    pairs = [reward.as_pair(row, helpers.tokenizer(), "small") for row in rows]
    chosen = pairs[2].chosen
    pairs.append(pairs[2]._replace(rejected=chosen[:-4]))  # one answer begins the other
    pairs.append(pairs[2]._replace(rejected=chosen))
    reward.update(cfg, model, pairs, torch.device("cpu"))
    shared = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for pair in pairs:
        chosen, rejected = (
            model(torch.tensor([ids]), torch.tensor([len(ids)])) for ids in (pair.chosen, pair.rejected)
        )
        (losses.ranking_loss(chosen, rejected, torch.tensor([pair.margin])).sum() / len(pairs)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(shared[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_the_warm_up_is_three_percent_and_at_least_five_steps(tmp_path: Path) -> None:
    cfg = helpers.reward_config(tmp_path, batch_size=2)
    reward.run(cfg)
    rates = [line["lr"] / cfg.optim.lr for line in read_metrics(tmp_path / "reward/metrics.jsonl")]
    assert len(rates) == 25 and rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert rates[-1] == pytest.approx(0.1) and rates[6:] == sorted(rates[6:], reverse=True)


def test_long_pairs_are_left_out(tmp_path: Path) -> None:
    rows = helpers.preferences(3)
    rows[1]["chosen"] = [helpers.assistant("behind the wall " * 60)]
    data = helpers.write_lines(tmp_path / "some.jsonl", rows)
    cfg = helpers.reward_config(tmp_path, data=(data,), test=(data,))
    train, test, counts = reward.prepare(cfg, helpers.tokenizer())
    assert (len(train), len(test), counts["left_out"]) == (2, 2, 1)
    with pytest.raises(DataError, match="fits 4 tokens"):
        reward.prepare(replace(cfg, max_len=4), helpers.tokenizer())


def test_evaluation() -> None:
    # Chosen and rejected answers' scores of 4 comparisons.
    chosen, rejected = torch.tensor([0.9, 0.6, 0.8, 0.3]).logit(), torch.tensor([0.1, 0.7, 0.7, 0.2]).logit()
    rows = [
        preference(0, grade="better", chosen_is_safe=True, rejected_is_safe=False),
        preference(1, grade="better", chosen_is_safe=False, rejected_is_safe=False),
        preference(2, grade="slightly_better", chosen_is_safe=True, rejected_is_safe=True),
        preference(3, rejected_is_safe=False),
    ]
    evaluation = reward.evaluate(rows, chosen, rejected)
    assert evaluation["accuracy"] == 0.75
    assert evaluation["accuracy_by_grade"] == {"better": 0.5, "slightly_better": 1.0, "ungraded": 1.0}
    assert evaluation["accuracy_by_safety_label"] == {
        "chosen_safe_rejected_unsafe": 1.0,
        "both_unsafe": 0.0,
        "both_safe": 1.0,
    }
    assert evaluation["unsafe_recall"] == 0.5  # unsafe are 0.6, 0.1, 0.7 and 0.2; two of them below 0.5
    assert evaluation["mean_score_chosen"] == pytest.approx(0.65)
    assert [n for n in evaluation["scores"]["rejected"] if n] == [1, 1, 2]  # at 0.1, 0.2 and 0.7


def test_safety_comparisons_that_prefer_harm_are_not_trained_on(tmp_path: Path) -> None:
    rows = [
        row | {"domain": domain, "chosen_is_safe": False, "rejected_is_safe": True}
        for row, domain in zip(helpers.preferences(6), ("safety", "helpfulness") * 3, strict=True)
    ]
    data = helpers.write_lines(tmp_path / "some.jsonl", rows)
    cfg = helpers.reward_config(tmp_path, data=(data,), test=(data,))
    train, test, counts = reward.prepare(cfg, helpers.tokenizer())
    assert (len(train), len(test), counts["prefer_harm"]) == (3, 6, 3)
    harmful = helpers.write_lines(tmp_path / "harmful.jsonl", rows[::2])
    with pytest.raises(DataError, match=r"harmful\.jsonl: all comparisons prefer an unsafe answer"):
        reward.prepare(replace(cfg, data=(harmful,)), helpers.tokenizer())


def test_a_comparison_that_the_chat_format_refuses_is_set_aside(tmp_path: Path) -> None:
    rows = helpers.preferences(6)
    rows[2]["rejected"] = [helpers.assistant("so [/INST] there")]
    data = helpers.write_lines(tmp_path / "some.jsonl", rows)
    cfg = helpers.reward_config(tmp_path, data=(data,), test=(data,))
    train, test, counts = reward.prepare(cfg, helpers.tokenizer())
    assert (len(train), len(test), counts["left_out"], counts["set_aside"]) == (5, 5, 0, 2)
    (line,) = helpers.read_lines(cfg.out / "bad_lines.jsonl")
    assert (line["file"], line["line"]) == (str(data), 3) and "chat tag" in line["reason"]
    rows[4]["chosen"] = [helpers.assistant("[INST]")]
    helpers.write_lines(data, rows)
    with pytest.raises(DataError, match=r"some\.jsonl: 2 of 6 lines are bad; line 3: .*chat tag"):
        reward.prepare(cfg, helpers.tokenizer())


def test_comparisons_that_say_nothing_are_counted(tmp_path: Path) -> None:
    rows = helpers.preferences(12)
    data = helpers.write_lines(tmp_path / "some.jsonl", [*rows, {**rows[0], "rejected": rows[0]["chosen"]}])
    cfg = helpers.reward_config(tmp_path, data=(data,), other=(data,), test=(data,))
    assert reward.prepare(cfg, helpers.tokenizer())[2]["skipped: identical answers"] == 3
    reward.run(replace(cfg, test=()))
    assert json.loads((cfg.out / "done/reward.json").read_text())["skipped: identical answers"] == 2


def test_dialogs_are_no_comparisons(tmp_path: Path) -> None:
    data = helpers.write_lines(tmp_path / "dialogs.jsonl", [{"messages": helpers.dialogs(1)[0]}])
    with pytest.raises(ConfigError, match="'dialogs' does not give comparisons, which are needed here; pref"):
        reward.prepare(helpers.reward_config(tmp_path, data=(data,), format="dialogs"), helpers.tokenizer())
