"""Two processes are one: the same losses, gradients and models, whichever rank saw which part of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna import losses, parallel
from puna.config import ConfigError
from puna.data import shards
from puna.formats import huggingface
from puna.run_folder import read_metrics
from puna.stages import pretrain, reward, sft
from tests import helpers

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")


def configs(folder: Path, out: str) -> dict[str, Any]:
    return {
        "pretrain": helpers.pretrain_config(folder, out=folder / out / "pretrain", micro_batch_size=2, steps=4),
        "sft": helpers.sft_config(folder, out=folder / out / "sft", micro_batch_size=1, seq_len=230),
        # So few tokens a pass that the ranks would make different numbers of them. Six full batches, for one process
        # spreads the pairs of a short one over the steps in ones, two do in twos.
        "reward": helpers.reward_config(
            folder, out=folder / out / "reward", test=(folder / "pairs.jsonl",), micro_batch_tokens=260, limit=48
        ),
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients, gathered where they are sharded."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items() if g is not None}


def first_updates(cfgs: dict[str, Any], data: Path) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each stage's first global batch."""
    tokenizer, model = helpers.tokenizer(), parallel.shard(helpers.model())
    train = shards.read_shard(data / "train", tokenizer)
    results = {"pretrain": (pretrain.update(cfgs["pretrain"], model, train, 0, CPU), gradients(model))}
    model = parallel.shard(helpers.model())
    rows, _ = sft.prepare(cfgs["sft"], tokenizer)
    assert len(rows.tokens) % 4 == 0, "else two processes cut the batches otherwise"
    batch = sft.Packed(*(field[:4] for field in rows))
    results["sft"] = (sft.update(cfgs["sft"], model, batch, CPU), gradients(model))
    scorer = parallel.shard(helpers.reward_model())
    pairs, _, _ = reward.prepare(cfgs["reward"], tokenizer)
    loss, _, _ = reward.update(cfgs["reward"], scorer, pairs[:8][parallel.share(8)], CPU)
    results["reward"] = (loss, gradients(scorer))
    return results


def whitened() -> Tensor:
    """This rank's part of whitened numbers."""
    x, mask = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + 3, torch.ones(4, 6, dtype=torch.bool)
    mask[0, 2:] = False
    mine = parallel.share(4)
    return losses.whiten(x[mine], mask[mine], parallel.total)


def work(cfgs: dict[str, Any], folder: Path) -> None:
    results: dict[str, Any] = dict(first_updates(cfgs, folder / "data"))
    parts = [torch.empty(2, 6) for _ in range(2)]
    torch.distributed.all_gather(parts, whitened())
    results["whitened"] = torch.cat(parts)
    for stage, module in (("pretrain", pretrain), ("sft", sft), ("reward", reward)):
        module.run(cfgs[stage])
    with pytest.raises(ConfigError, match="a batch of 3 does not divide over 2 processes"):
        parallel.share(3)
    if parallel.is_main():
        torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What one process and what two found, and the folder with one/ and two/ of their runs."""
    folder = tmp_path_factory.mktemp("processes")
    shards.write_shard(folder / "data/train", helpers.sentences(300), helpers.tokenizer())
    cfgs = configs(folder, "one")
    one: dict[str, Any] = dict(first_updates(cfgs, folder / "data"))
    one["whitened"] = whitened()
    for stage, module in (("pretrain", pretrain), ("sft", sft), ("reward", reward)):
        module.run(cfgs[stage])
    helpers.in_processes(work, folder, configs(folder, "two"), folder)
    return one, torch.load(folder / "results.pt"), folder


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_o_two_processes_have_the_gradients_of_one(stage: str, both: Any) -> None:
    one, two, _ = both
    assert two[stage][0] == pytest.approx(one[stage][0], rel=1e-5)
    assert two[stage][1].keys() == one[stage][1].keys()
    for name, expected in one[stage][1].items():
        torch.testing.assert_close(two[stage][1][name], expected, rtol=0, atol=1e-6, msg=name)


def test_l_whitening_is_over_all_ranks(both: Any) -> None:
    one, two, _ = both
    torch.testing.assert_close(two["whitened"], one["whitened"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_two_processes_make_the_model_of_one(stage: str, both: Any) -> None:
    *_, folder = both
    lines = [read_metrics(folder / name / stage / "metrics.jsonl") for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) > 3
    for one, two in zip(*lines, strict=True):
        for name in set(one) - {"stage", "tokens_per_second"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), (one["step"], name)
    load = huggingface.load_reward_model if stage == "reward" else huggingface.load_model
    models = [load(folder / name / stage / "model").state_dict() for name in ("one", "two")]
    for name in models[0]:
        torch.testing.assert_close(models[1][name], models[0][name], rtol=0, atol=2e-3, msg=name)


def test_sharded_over_one_process_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel.start()
    cfg = configs(tmp_path, "one")["sft"]
    rows, _ = sft.prepare(cfg, helpers.tokenizer())
    plain, sharded = helpers.model(), helpers.model()
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "world_size", lambda: 2)  # so that it is sharded at all
        parallel.shard(sharded)
    assert hasattr(sharded.output.weight, "full_tensor")
    batch = sft.Packed(*(field[:4] for field in rows))
    assert sft.update(cfg, sharded, batch, CPU) == sft.update(cfg, plain, batch, CPU)
    expected = gradients(plain)
    for name, actual in gradients(sharded).items():
        assert torch.equal(actual, expected[name]), name
