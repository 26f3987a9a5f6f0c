"""Experts and the loss by chunks are the same on two processes as on one, from pretraining to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from puna import parallel
from puna.data import shards
from puna.formats import huggingface
from puna.model import transformer
from puna.model.moe import MixtureOfExperts, MoEConfig
from puna.parallel import ParallelConfig
from puna.stages import pretrain
from tests import helpers

CPU = torch.device("cpu")


def settings(folder: Path, **changes: Any) -> pretrain.PretrainConfig:
    # The load-balancing loss is of a micro-batch: without it, how a batch is split changes nothing.
    moe = MoEConfig(experts=4, top_k=2, balance=changes.pop("balance", 0.0))
    return helpers.pretrain_config(folder, model=helpers.config(moe=moe), micro_batch_size=4, steps=4, **changes)


def update(
    cfg: pretrain.PretrainConfig, data: Path, large: int, tensor: int = 1
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradients of the first global batch; logits beyond `large` are made by chunks."""
    kept, transformer.LARGE = transformer.LARGE, large
    model = helpers.placed(helpers.model(moe=cfg.model.moe), ParallelConfig(tensor=tensor))
    loss = pretrain.update(cfg, model, shards.read_shard(data / "train", helpers.tokenizer()), 0, CPU)
    transformer.LARGE = kept
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss, {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def work(cfg: pretrain.PretrainConfig, data: Path, out: Path) -> None:
    found = {tensor: update(cfg, data, 0, tensor) for tensor in (1, 2)}
    if parallel.is_main():
        torch.save(found, out)


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Each with half of the batch, and each with half of every matrix."""
    helpers.tokenizer().save(tmp_path)
    cfg = settings(tmp_path, tokenizer=tmp_path / "tokenizer.model")
    pretrain.prepare(cfg, tmp_path / "data")
    loss, expected = update(cfg, tmp_path / "data", 2**24)
    helpers.in_processes(work, cfg, tmp_path / "data", tmp_path / "found.pt")
    for their_loss, found in torch.load(tmp_path / "found.pt", weights_only=True).values():
        assert their_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_pretraining_balances_what_no_later_stage_drops(tmp_path: Path) -> None:
    cfg = settings(tmp_path, balance=0.05)
    model = huggingface.load_model(pretrain.run(cfg))
    assert model.config.moe == cfg.model.moe
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 300, 301]]))
    assert logits.isfinite().all()
    assert sum(isinstance(module, MixtureOfExperts) for module in model.modules()) == 2
