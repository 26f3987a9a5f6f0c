"""Our reward update and TRL's RewardTrainer have the same loss and the same gradients on the same comparisons.

TRL reads each answer in a padded row of its own; ours reads what two answers have in common once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.formats import huggingface
from puna.model.reward import RewardModel
from puna.stages import reward
from puna.stages.reward import Pair
from tests import helpers

trl = pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.parity

PAIRS = [
    Pair([1, 300, 301, 302, 310, 2], [1, 300, 301, 302, 311, 312, 313, 2], 1.0, (None, None)),
    Pair([1, 303, 304, 320, 321, 322, 2], [1, 303, 304, 330, 2], 2 / 3, (None, None)),
    Pair([1, 305, 340, 2], [1, 305, 341, 342, 2], 0.0, (None, None)),
    Pair([1, 306, 307, 308, 309, 350, 351, 2], [1, 306, 307, 308, 309, 352, 2], 1 / 3, (None, None)),
]


def trainer(folder: Path, with_margins: bool) -> Any:
    """TRL's, on the model in the folder and the pairs as ids."""
    import datasets
    import tokenizers
    import transformers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"word{i}": i for i in range(3, helpers.VOCAB)}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="</s>")
    rows = [{"chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in PAIRS]
    if with_margins:
        rows = [row | {"margin": pair.margin} for row, pair in zip(rows, PAIRS, strict=True)]
    arguments = trl.RewardConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(PAIRS),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return trl.RewardTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )


def in_their_names(model: RewardModel) -> dict[str, Tensor]:
    """Our gradients as Hugging Face lays weights out, which is a reordering of rows."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    score = gradients.pop("score.weight")
    body = {name.removeprefix("body."): gradient for name, gradient in gradients.items()}
    return huggingface._to_hugging_face(body, model.config) | {"score.weight": score}


@pytest.mark.parametrize("with_margins", [True, False])
def test_loss_and_gradients(tmp_path: Path, with_margins: bool) -> None:
    model, folder = helpers.reward_model(), tmp_path / "model"
    huggingface.save_reward_model(model, helpers.tokenizer(), folder)
    pairs = PAIRS if with_margins else [pair._replace(margin=0.0) for pair in PAIRS]
    cfg = helpers.reward_config(tmp_path, safety_auxiliary=0.0)
    ours, _, _ = reward.update(cfg, model, pairs, torch.device("cpu"))

    theirs = trainer(folder, with_margins)
    (batch,) = theirs.get_train_dataloader()
    assert ("margin" in batch) == with_margins
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, batch)
    loss.backward()
    assert ours == pytest.approx(float(loss.detach()), rel=1e-5)
    found, expected = in_their_names(model), dict(theirs.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
