"""Every check holds on Puna's own dump and fails on what a trainer that errs there would have dumped."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from puna import cli
from puna.config import ConfigError, DataError
from puna.data import rollouts
from puna.data.rollouts import Dump
from puna.evals import conformance
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from puna.stages import ppo
from tests import helpers

Tensors = dict[str, npt.NDArray[Any]]


class Stopped(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dump/ of iteration 2, first/ of iteration 0, resumed/ of iteration 2 after a kill in it."""
    folder = tmp_path_factory.mktemp("conformance")
    # Answers some of which do not end, passes of several sizes, steps so long that ratios leave the clip.
    shape: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 12, "mini_batch_size": 6, "micro_batch_tokens": 90}
    rates = replace(helpers.quick(2e-3), schedule="constant", warmup_steps=0)
    cfg = helpers.ppo_config(folder, iterations=3, optim=rates, patience=0, **shape)
    cfg = replace(cfg, temperature=0.8, beta=0.1, inner_epochs=2, critic_warmup=1, checkpoint_every=1)
    ppo.run(replace(cfg, dump=folder / "dump", dump_iteration=2))
    ppo.run(replace(cfg, out=folder / "other", dump=folder / "first", dump_iteration=0))
    resumed = replace(cfg, out=folder / "broken", dump=folder / "resumed", dump_iteration=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "update", stopping(ppo.update))
        with pytest.raises(Stopped):
            ppo.run(resumed)
    ppo.run(resumed)
    return folder


def stopping(real: Any) -> Any:
    def update(*arguments: Any) -> Any:
        if arguments[5] == 2:
            raise Stopped
        return real(*arguments)

    return update


@pytest.fixture(scope="module")
def dump(folder: Path) -> Dump:
    """Iteration 2, with the first numbers of a reward model's head, which PPO does not see."""
    read = rollouts.read(folder / "dump")
    head = RewardModel(Transformer(ModelConfig(4096, 1, 1, 1, 8, 8, 8))).score.weight.detach().numpy()[0]
    return Dump(read.tensors | {"reward_head": head}, read.facts)


def verdicts(dump: Dump, resumed: Dump | None = None) -> dict[str, conformance.Verdict]:
    return {verdict.detail: verdict for verdict in conformance.check(dump, resumed=resumed)}


def test_puna_holds_all_details(dump: Dump, folder: Path) -> None:
    found = verdicts(dump, rollouts.read(folder / "resumed")._replace(tensors=dump.tensors))
    assert [v for v in found.values() if not v.holds and v.detail != "h"] == []
    assert found["h"].holds is None, "the critic has been trained"
    assert len(found) == 26
    first = verdicts(rollouts.read(folder / "first"))
    assert first["h"].holds and not [v for v in first.values() if v.holds is False]


def test_a_resumed_run_dumps_the_same(folder: Path) -> None:
    both = [rollouts.read(folder / name) for name in ("dump", "resumed")]
    assert verdicts(both[0], both[1])["z"].holds


# Trainers that err, a detail each: what they would have dumped -------------------------------------------------------


def mask_of(t: Tensors) -> npt.NDArray[Any]:
    return t["action_mask"].astype(bool)


def last_of(t: Tensors) -> npt.NDArray[Any]:
    mask = mask_of(t)
    return np.asarray(mask.shape[1] - 1 - mask[:, ::-1].argmax(1))


def kl_of(t: Tensors) -> npt.NDArray[Any]:
    return np.where(mask_of(t), t["logprobs"] - t["reference_logprobs"], 0)


def with_kl(t: Tensors, facts: Any, estimate: Callable[[Any], Any]) -> Tensors:
    rewards = np.where(mask_of(t), -facts["beta"] * estimate(kl_of(t)), 0)
    rewards[np.arange(len(rewards)), last_of(t)] += t["scores"]
    return {"rewards": rewards}


def a_at_temperature_1(t: Tensors, facts: Any) -> Tensors:
    rows, columns = t["logits_at"].T
    logp = conformance.log_softmax(t["logits"].astype(np.float64))
    logprobs = t["logprobs"].copy()
    logprobs[rows, columns] = logp[np.arange(len(rows)), t["tokens"][rows, columns + 1]]
    return {"logprobs": logprobs}


def b_dropout(t: Tensors, facts: Any) -> Tensors:
    return {"pass_logprobs": t["pass_logprobs"] + np.random.default_rng(0).normal(0, 0.01, len(t["pass_logprobs"]))}


def c_positions_count_pads(t: Tensors, facts: Any) -> Tensors:
    padded = t["alone_at"][:, 0] % 2  # every other row stood behind pads
    return {"alone_logprobs": t["alone_logprobs"] + 0.05 * padded}


def d_pads_with_eos(t: Tensors, facts: Any) -> Tensors:
    behind = np.arange(t["tokens"].shape[1]) > last_of(t)[:, None] + 1
    return {"tokens": np.where(behind, facts["eos_id"], t["tokens"])}


def e_reads_the_end_of_the_row(t: Tensors, facts: Any) -> Tensors:
    shorter = (last_of(t) < last_of(t).max()).astype(np.float32)
    assert shorter[:8].any()
    return {"helpfulness": t["helpfulness"] * (1 - 0.2 * shorter)}


def f_on_the_first_pad(t: Tensors, facts: Any) -> Tensors:
    rewards = np.pad(with_kl(t, facts, lambda kl: kl)["rewards"], ((0, 0), (0, 1)))
    for row, last in enumerate(last_of(t)):
        rewards[row, last] -= t["scores"][row]
        rewards[row, last + 1] += t["scores"][row]
    return {"rewards": rewards[:, :-1]}


def g_no_penalty(t: Tensors, facts: Any) -> Tensors:
    return {"scores": t["bounded"]}


def i_one_over_d(t: Tensors, facts: Any) -> Tensors:
    return {"reward_head": t["reward_head"] / np.sqrt(len(t["reward_head"]) + 1)}


def j_raw_logits(t: Tensors, facts: Any) -> Tensors:
    return {"bounded": np.log(t["combined"] / (1 - t["combined"])) * 3 - 1}


def k_mean_kept(t: Tensors, facts: Any) -> Tensors:
    return {"bounded": t["bounded"] + np.log(t["combined"] / (1 - t["combined"])).mean()}


def l_pads_counted(t: Tensors, facts: Any) -> Tensors:
    raw = np.where(mask_of(t), t["raw_advantages"], 0)
    return {"advantages": (raw - raw.mean()) / raw.std()}


def m_shifted(t: Tensors, facts: Any) -> Tensors:
    values = np.roll(t["values"], 1, axis=1)  # the value after the token instead of before it
    mask = mask_of(t)
    return {"raw_advantages": conformance.advantages(t["rewards"], values, mask, facts["gamma"], facts["lam"])}


def n_unclipped(t: Tensors, facts: Any) -> Tensors:
    shown, found = conformance.Shown(Dump(t, facts)), []
    for _, passes in shown.updates():
        members = np.concatenate(passes)
        ratio, _, _ = conformance.token_losses(shown, members)
        found.append(-(ratio * t["advantages"][tuple(t["pass_at"][members].T)]).mean())
    return {"update_policy_loss": np.array(found)}


def n_not_halved(t: Tensors, facts: Any) -> Tensors:
    return {"update_value_loss": 2 * t["update_value_loss"]}


def o_micro_batches_weigh_the_same(t: Tensors, facts: Any) -> Tensors:
    shown = conformance.Shown(Dump(t, facts))
    per_pass = [[conformance.token_losses(shown, x)[2].mean() for x in passes] for _, passes in shown.updates()]
    return {"update_value_loss": np.array([np.mean(x) for x in per_pass])}


def p_absolute(t: Tensors, facts: Any) -> Tensors:
    return with_kl(t, facts, np.abs)


def p_clamped(t: Tensors, facts: Any) -> Tensors:
    return with_kl(t, facts, lambda kl: np.maximum(kl, 0))


def p_k3(t: Tensors, facts: Any) -> Tensors:
    return with_kl(t, facts, lambda kl: np.exp(-kl) - 1 + kl)


def q_another_temperature(t: Tensors, facts: Any) -> Tensors:
    return {"sampled_logprobs": 1.25 * t["sampled_logprobs"]}


def r_score_twice(t: Tensors, facts: Any) -> Tensors:
    rewards = t["rewards"].copy()
    rewards[np.arange(len(rewards)), last_of(t)] += t["scores"]
    return {"rewards": rewards}


def s_another_beta(t: Tensors, facts: Any) -> Tensors:
    return with_kl(t, facts, lambda kl: 1.5 * kl)


def t_frozen(t: Tensors, facts: Any) -> Tensors:
    return {"policy_weights": t["policy_weights"][[0, 0]]}


def u_silently_clipped(t: Tensors, facts: Any) -> Tensors:
    return {"advantages": t["advantages"].clip(-1, 1)}


def w_tokenised_again(t: Tensors, facts: Any) -> Tensors:
    tokens = t["tokens"].copy()
    row, column = mask_of(t).nonzero()
    tokens[row[3], column[3] + 1] += 1
    return {"tokens": tokens}


def x_mean_over_pads(t: Tensors, facts: Any) -> Tensors:
    return {"update_entropy": 0.8 * t["update_entropy"]}


def y_eos_left_out(t: Tensors, facts: Any) -> Tensors:
    mask = mask_of(t).copy()
    for row, last in enumerate(last_of(t)):
        if t["finished"][row] and mask[row].sum() > 1:
            mask[row, last] = False
    assert (mask != mask_of(t)).any()
    return {"action_mask": mask}


def z_another_order(t: Tensors, facts: Any) -> Tensors:
    return {"pass_at": t["pass_at"][::-1]}


WRONG = [
    a_at_temperature_1,
    b_dropout,
    c_positions_count_pads,
    d_pads_with_eos,
    e_reads_the_end_of_the_row,
    f_on_the_first_pad,
    g_no_penalty,
    i_one_over_d,
    j_raw_logits,
    k_mean_kept,
    l_pads_counted,
    m_shifted,
    n_unclipped,
    n_not_halved,
    o_micro_batches_weigh_the_same,
    p_absolute,
    p_clamped,
    p_k3,
    q_another_temperature,
    r_score_twice,
    s_another_beta,
    t_frozen,
    u_silently_clipped,
    w_tokenised_again,
    x_mean_over_pads,
    y_eos_left_out,
    z_another_order,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_trainer_that_errs_is_found(wrong: Callable[[Tensors, Any], Tensors], dump: Dump) -> None:
    erring = Dump(dump.tensors | wrong(dump.tensors, dump.facts), dump.facts)
    verdict = verdicts(erring, dump)[wrong.__name__[0]]
    assert verdict.holds is False, verdict


@pytest.mark.parametrize(
    ("detail", "facts"),
    [
        ("d", {"pad_id": 2}),
        ("q", {"top_p": 0.9}),
        ("q", {"top_k": 50}),
        ("r", {"gamma": 0.99}),
        ("s", {"beta_after": 0.2}),
        ("s", {"kl_target": 6.0}),  # said to be adapted, and was not
        ("t", {"iteration": 0}),  # the warm-up moved the policy
        ("v", {"adam_eps": 1e-8}),
    ],
)
def test_a_setting_that_errs_is_found(detail: str, facts: dict[str, Any], dump: Dump) -> None:
    verdict = verdicts(Dump(dump.tensors, dump.facts | facts), dump)[detail]
    assert verdict.holds is False, verdict


@pytest.mark.parametrize("critic", ["reward", "zero_head"])
def test_h_a_critic_from_elsewhere_is_found(critic: str, folder: Path) -> None:
    first = rollouts.read(folder / "first")
    values = first.tensors["values"] + 0.3
    verdict = verdicts(Dump(first.tensors | {"values": values}, first.facts | {"critic": critic}))["h"]
    assert verdict.holds is False


def test_every_detail_has_a_trainer_that_errs() -> None:
    assert {wrong.__name__[0] for wrong in WRONG} | set("dqrstvh") == set(conformance.CHECKS)


# What is not there, and what is wrong with a file ---------------------------------------------------------------------


def test_what_a_dump_lacks_is_not_shown(dump: Dump) -> None:
    least = Dump({name: dump.tensors[name] for name in ("tokens", "action_mask")}, {})
    assert {verdict.holds for verdict in conformance.check(least)} == {None}
    found = verdicts(Dump({k: v for k, v in dump.tensors.items() if k != "logits"}, dump.facts))
    assert (found["a"].holds, found["a"].why) == (None, "the dump has no logits")
    assert found["b"].holds
    left_out = ("values", "advantages", "returns", "pass_values", "value_clip", "lr")
    found = verdicts(Dump(*({k: v for k, v in part.items() if k not in left_out} for part in dump)))
    assert found["b"].holds and found["x"].holds and found["v"].holds and found["n"].holds is None


@pytest.mark.parametrize("kl", ["token", "sequence"])
def test_what_stands_where_no_action_is_is_not_looked_at(kl: str, dump: Dump) -> None:
    mask, rewards = mask_of(dump.tensors), dump.tensors["rewards"]
    if kl == "sequence":
        rewards = with_kl(dump.tensors, dump.facts, lambda kl: 0 * kl)["rewards"]
        rewards[np.arange(len(rewards)), last_of(dump.tensors)] -= dump.facts["beta"] * kl_of(dump.tensors).sum(1)
    tensors = dump.tensors | {"rewards": np.where(mask, rewards, np.nan)}
    found = verdicts(Dump(tensors, dump.facts | {"kl": kl}))
    assert all(found[detail].holds for detail in "fprs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((12, 3))}, r"values is \(12, 3\), expected \(B, T-1\) where T is"),
        ({"scores": np.zeros((12, 1))}, r"scores has 2 dimensions, expected \(B\)"),
        ({"pass_at": np.full((1, 2), 10**6)}, "pass_at|pass_logprobs"),
        ({"logits_at": np.full((1, 2), 10**6), "logits": np.zeros((1, 4))}, "logits_at names places outside"),
        ({"update_size": np.array([1, 2, 3, 4])}, "do not cut the"),
        ({"pass_size": np.zeros(0, int)}, "pass_size is empty, or has a count below 0"),
        ({"update_size": np.array([0, 1, 2, 3])}, "update_size is empty, or has a count below 1"),
        ({"policy_weights": np.zeros((3, 4))}, r"policy_weights is \(3, 4\), expected \(2, W\)"),
    ],
)
def test_shapes_that_do_not_fit(change: Tensors, message: str, dump: Dump) -> None:
    with pytest.raises(DataError, match=message):
        conformance.check(Dump(dump.tensors | change, dump.facts))
    with pytest.raises(DataError, match="the dump has no tokens and no action_mask"):
        conformance.check(Dump({}, {}))


def test_files_that_are_no_dump(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no rollout\.json"):
        rollouts.read(tmp_path)
    (tmp_path / "rollout.json").write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        rollouts.read(tmp_path)
    (tmp_path / "rollout.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        rollouts.read(tmp_path)
    (tmp_path / "rollout.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"neither rollout\.safetensors nor rollout\.npz"):
        rollouts.read(tmp_path)
    np.savez(tmp_path / "rollout.npz", tokens=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="damaged, or not tensors alone"):
        rollouts.read(tmp_path)
    sound = io.BytesIO()
    np.savez_compressed(sound, x=np.arange(1000))
    one = io.BytesIO()
    np.save(one, np.arange(3))
    torn, flipped = sound.getvalue()[:-50], bytearray(sound.getvalue())
    flipped[200:260] = bytes(60)
    for damaged in (b"", torn, bytes(flipped), one.getvalue()):
        (tmp_path / "rollout.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="damaged, or not tensors alone"):
            rollouts.read(tmp_path)
    whole = (folder / "dump/rollout.safetensors").read_bytes()
    (tmp_path / "rollout.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged, or not tensors alone"):
        rollouts.read(tmp_path)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = [
        "conformance",
        str(folder / "dump"),
        "--resumed",
        str(folder / "resumed"),
        "--out",
        str(tmp_path / "o.json"),
    ]
    conformance.run(conformance.ConformanceConfig(folder / "dump", folder / "resumed", tmp_path / "o.json"))
    printed = capsys.readouterr().out
    assert "a  holds      log-probabilities are at the sampling temperature" in printed
    assert printed.endswith("24 holds, 0 fails, 2 not shown\n")
    assert [v["detail"] for v in json.loads((tmp_path / "o.json").read_text())] == list(conformance.CHECKS)
    assert cli.split(ours)[0] == "conformance"
    (tmp_path / "bad").mkdir()
    facts = json.loads((folder / "dump/rollout.json").read_text()) | {"adam_eps": 1e-8}
    (tmp_path / "bad/rollout.json").write_text(json.dumps(facts))
    np.savez(tmp_path / "bad/rollout.npz", **rollouts.read(folder / "dump").tensors)
    with pytest.raises(SystemExit) as leaving:
        conformance.run(conformance.ConformanceConfig(tmp_path / "bad"))
    assert leaving.value.code == 1
    assert "v  FAILS      Adam's epsilon is 1e-5 (epsilon 1e-08, rate 0.002)" in capsys.readouterr().out


def test_recorded_tensors_are_copies_joined() -> None:
    record, x = rollouts.Recorder(), torch.zeros(2)
    record(x=x)
    x += 1
    record(x=x)
    assert torch.cat(record.parts["x"]).tolist() == [0, 0, 1, 1]


# The guide -----------------------------------------------------------------------------------------------------------


def test_the_guide(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (root / "docs/guides/conformance.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(text.split("```python\n")[1].split("```")[0], "conformance.md", "exec"), {"__name__": "guide"})
    tables = [section.split("\n\n## ")[0] for section in text.split("\n## ")]
    tensors = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in tables[2].splitlines() if line[:2] == "| "))
    assert set(tensors) == {name for names in rollouts.SHAPES.values() for name in names.split()}
    details = dict(re.findall(r"^\| ([a-z]) \| (.+?) \|", tables[4], re.MULTILINE))
    assert details == {
        k: (f.__doc__ or "").removeprefix(f"{k}: ").removesuffix(".") for k, f in conformance.CHECKS.items()
    }
    facts = set(re.findall(r"`(\w+)`", tables[3])) - {"token", "sequence", "batch", "running", "none"}
    facts -= {"reward", "zero_head", "shared"}
    assert facts == {*rollouts.SETTINGS, *"iteration top_p top_k pad_id eos_id beta_after lr adam_eps".split()}
