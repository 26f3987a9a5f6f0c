"""Many processes are one: the same losses, gradients, samples and models, however they share a batch and a model."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from puna import checkpoint, parallel
from puna.config import ConfigError
from puna.data import shards
from puna.formats import huggingface
from puna.generate.held_out import policy_path
from puna.optim import OptimConfig
from puna.parallel import ParallelConfig
from puna.run_folder import read_metrics
from puna.stages import dpo, grpo, ppo, pretrain, rejection_sampling, reward, sample, sft
from puna.stages.rejection_sampling import RejectionSamplingConfig
from puna.stages.sample import SampleConfig
from tests import helpers

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")
STAGES: dict[str, Any] = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "grpo": grpo}
LAYOUTS = {"two": 1, "tensor": 2, "four": 1, "two_by_two": 2}
"""The ranks of a tensor group: twice of two processes, twice of four."""
RUNS = {"one": 1, "four_as_two_by_two": 2} | LAYOUTS
CHECKPOINTING = {"tensor": "selective", "two_by_two": "full"}
"""What is recomputed in the backward pass, where it is not nothing: it changes no number either."""


def configs(folder: Path, out: str) -> dict[str, Any]:
    """About ten steps of each stage, of rows that divide by no number of ranks."""
    layout = ParallelConfig(tensor=RUNS[out], checkpointing=CHECKPOINTING.get(out, "off"))
    how: dict[str, Any] = {"optim": OptimConfig(lr=3e-4, warmup_steps=1), "parallel": layout, "checkpoint_every": 5}

    def at(name: str) -> dict[str, Any]:
        return how | {"out": folder / out / name}

    return {
        "pretrain": helpers.pretrain_config(folder, micro_batch_size=4, seq_len=23, steps=10, **at("pretrain")),
        "sft": helpers.sft_config(folder, micro_batch_size=2, seq_len=229, epochs=3, **at("sft")),
        # So few tokens a pass that the ranks would make different numbers of them. Full batches, for one process
        # spreads the pairs of a short one over the steps in ones, two do in twos.
        "reward": helpers.reward_config(
            folder, test=(folder / "pairs.jsonl",), micro_batch_tokens=700, limit=40, epochs=2, **at("reward")
        ),
        "ppo": helpers.ppo_config(folder, **at("ppo") | {"evaluate_every": 3}),
        "dpo": helpers.dpo_config(folder, micro_batch_tokens=700, limit=40, epochs=2, **at("dpo")),
        "grpo": helpers.grpo_config(folder, **at("grpo") | {"evaluate_every": 3}),
    }


def sampling(folder: Path, out: str) -> dict[str, Any]:
    chat, prompts = folder / "chat", (folder / "prompts.jsonl",)
    scorers = {"reward_helpfulness": folder / "helpfulness", "reward_safety": folder / "safety"}
    shape: dict[str, Any] = {"prompts": prompts, "max_new_tokens": 8, "shard_size": 7}
    return {
        "sample": SampleConfig(out=folder / out / "sample", init=chat, n=2, **shape),
        "rejection": RejectionSamplingConfig(
            out=folder / out / "v1/rejection", init=chat, samples=3, search_prompts=5, **scorers, **shape
        ),
    }


def run(cfgs: dict[str, Any], bulk: dict[str, Any] | None = None) -> None:
    for stage in list(STAGES)[: None if bulk else 4]:
        STAGES[stage].run(cfgs[stage])
    if bulk:
        sample.run(bulk["sample"])
        rejection_sampling.run(bulk["rejection"])
        first = bulk["rejection"].out
        pooled = replace(
            bulk["rejection"], out=first.parents[1] / "v2/rejection", earlier=(first / "best.jsonl",), seed=1
        )
        rejection_sampling.run(pooled)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients, gathered where they are sharded."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items() if g is not None}


def first_updates(
    cfgs: dict[str, Any], data: Path, layout: ParallelConfig | None = None
) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of the first global batch, of embeddings that are the output too."""
    how, tokenizer = layout or cfgs["pretrain"].parallel, helpers.tokenizer()
    results = {}
    for tied in (False, True):
        model = helpers.placed(helpers.model(tie_embeddings=tied), how)
        train = shards.read_shard(data / "train", tokenizer)
        results[f"tied {tied}"] = pretrain.update(cfgs["pretrain"], model, train, 0, CPU), gradients(model)
    scorer = helpers.placed(helpers.reward_model(), how)
    pairs, _, _ = reward.prepare(cfgs["reward"], tokenizer)
    loss, _, _ = reward.update(cfgs["reward"], scorer, pairs[:8][parallel.share(8)], CPU)
    results["reward"] = (loss, gradients(scorer))
    return results


def check_bfloat16() -> None:
    """Activations and the weights they meet are bfloat16, what is kept and summed is float32."""
    compute = parallel.dtype("bf16", CPU)
    model = helpers.placed(helpers.model(), precision="bf16")
    seen: list[torch.dtype] = []
    model.layers[0].register_forward_hook(lambda module, inputs, output: seen.extend((output.dtype, inputs[1].dtype)))
    model(torch.zeros(1, 4, dtype=torch.int64)).float().sum().backward()
    assert seen == [compute, torch.float32], "a rotary table in bfloat16 would turn far positions wrongly"
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}  # type: ignore[union-attr]
    scorer = helpers.placed(helpers.reward_model(), precision="bf16")
    assert scorer.values(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.float32


def two(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Everything that two processes are asked for."""
    results: dict[str, Any] = {}
    for name in ("two", "tensor"):
        cfgs = runs[name]
        parallel.start(cfg=cfgs["pretrain"].parallel)
        results[name] = first_updates(cfgs, folder / "data")
        run(cfgs, sampling(folder, name) if name == "two" else None)
    parallel.start()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        results["compiled"] = first_updates(runs["two"], folder / "data", ParallelConfig(compile=True))
    check_bfloat16()
    model = helpers.placed(helpers.model())
    held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    assert held == pytest.approx(model.config.n_params() / 2, rel=0.01), "each rank holds its share"
    with pytest.raises(ConfigError, match="a batch of 3 does not divide over 2 processes"):
        parallel.share(3)
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 3, which does not divide the 2 processes"):
        parallel.start(cfg=ParallelConfig(tensor=3))
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 2, which does not divide n_kv_heads 1"):
        helpers.placed(helpers.model(n_kv_heads=1), ParallelConfig(tensor=2))
    if parallel.is_main():
        torch.save(results, folder / "two.pt")


def four(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Two by two, and four side by side, whose stages are resumed as two by two."""
    run(runs["two_by_two"])
    run(runs["four"])
    if parallel.is_main():
        killed(folder / "four", folder / "four_as_two_by_two")
    parallel.barrier()
    run(runs["four_as_two_by_two"])


def killed(run: Path, copy: Path) -> None:
    """A copy of a run whose stages are as if they had been killed after the first of their checkpoints."""
    shutil.copytree(run, copy)
    best = json.loads((copy / "ppo/done/ppo.json").read_text())["best_iteration"]
    shutil.copytree(copy / "ppo/model", policy_path(copy / "ppo", best))
    for stage in list(STAGES)[:4]:
        shutil.rmtree(copy / stage / "model")
        (copy / stage / f"done/{stage}.json").unlink()
        for later in sorted((copy / stage / "checkpoints").iterdir())[1:]:
            shutil.rmtree(later)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/, two/, tensor/, two_by_two/: the same runs on so many processes; two.pt: what two found."""
    folder = tmp_path_factory.mktemp("processes")
    shards.write_shard(folder / "data/train", helpers.sentences(300), helpers.tokenizer())
    runs = {name: configs(folder, name) for name in RUNS}
    run(runs["one"], sampling(folder, "one"))
    helpers.in_processes(two, folder, runs)
    helpers.in_processes(four, folder, runs, world_size=4)
    return folder


@pytest.mark.parametrize("layout", ["two", "tensor", "compiled"])
def test_o_two_processes_have_the_gradients_of_one(layout: str, folder: Path) -> None:
    one, many = first_updates(configs(folder, "one"), folder / "data"), torch.load(folder / "two.pt")[layout]
    for name, (loss, expected) in one.items():
        assert many[name][0] == pytest.approx(loss, rel=1e-5)
        assert many[name][1].keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(many[name][1][parameter], gradient, rtol=0, atol=1e-6, msg=f"{name} {parameter}")


def same_lines(folder: Path, one: str, many: str, stage: str) -> None:
    lines = [read_metrics(folder / name / stage / "metrics.jsonl") for name in (one, many)]
    assert len(lines[0]) == len(lines[1]) >= (5 if stage in ("ppo", "grpo") else 10)  # of two gradient steps each
    for first, second in zip(*lines, strict=True):
        measured = {name for name in first if not name.startswith("seconds")}
        for name in measured - {"stage", "tokens_per_second", "warnings"}:
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-5), (first["step"], name)


@pytest.mark.parametrize(
    ("layout", "stage"),
    [(layout, stage) for layout in LAYOUTS for stage in list(STAGES)[: 6 if layout == "two" else 4]],
)
def test_many_processes_go_the_way_of_one(layout: str, stage: str, folder: Path) -> None:
    # PPO's lines are those of whitening over all ranks: a rank's own answers have another mean and deviation.
    same_lines(folder, "one", layout, stage)
    load = huggingface.load_reward_model if stage == "reward" else huggingface.load_model
    models = [load(folder / name / stage / "model").state_dict() for name in ("one", layout)]
    for name in models[0]:
        torch.testing.assert_close(models[1][name], models[0][name], rtol=0, atol=1e-4, msg=name)


def test_a_run_over_four_goes_on_as_two_by_two_and_on_one(folder: Path) -> None:
    killed(folder / "four", folder / "four_on_one")
    for stage in list(STAGES)[:4]:
        same_lines(folder, "one", "four_as_two_by_two", stage)
        assert checkpoint.latest(folder / "four_on_one" / stage / "checkpoints") is not None
        STAGES[stage].run(replace(configs(folder, "one")[stage], out=folder / "four_on_one" / stage))
        same_lines(folder, "one", "four_on_one", stage)


@pytest.mark.parametrize(
    "file", ["sample/dialogs.jsonl", "v1/rejection/curve.json", "v1/rejection/best.jsonl", "v2/rejection/pool.jsonl"]
)
def test_many_processes_write_the_samples_of_one(file: str, folder: Path) -> None:
    one, many = ((folder / name / file).read_text() for name in ("one", "two"))
    assert many == one


def test_sharded_over_one_process_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel.start()
    cfg = configs(tmp_path, "one")["sft"]
    rows, _ = sft.prepare(cfg, helpers.tokenizer())
    plain = helpers.placed(helpers.model())
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "_mesh", parallel._made_mesh(1))  # so that it is sharded at all
        sharded = helpers.placed(helpers.model())
    assert isinstance(sharded.output.weight, DTensor) and not isinstance(plain.output.weight, DTensor)
    batch = sft.Packed(*(field[:4] for field in rows))
    assert sft.update(cfg, sharded, batch, CPU) == sft.update(cfg, plain, batch, CPU)
    expected = gradients(plain)
    for name, actual in gradients(sharded).items():
        assert torch.equal(actual, expected[name]), name
