"""Import and export: what other programs read and write, as Transformer and Tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from puna.config import ConfigError, DataError
from puna.model.transformer import ModelConfig, Transformer, rotary_table
from puna.types import Tokenizer

LARGEST = {"n_layers": 1024, "max_seq_len": 1 << 24}
"""Beyond any Llama. Layers are modules and positions a table, made before a tensor could prove a shape wrong."""


def check_shape(config: ModelConfig, source: Path) -> None:
    """ConfigError where a file asks for more layers or positions than any model has."""
    for key, most in LARGEST.items():
        if getattr(config, key) > most:
            raise ConfigError(f"{source}: {key} {getattr(config, key)} is absurd: no Llama has more than {most}")


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: Path) -> None:
    """ConfigError where the tokenizer has ids that the model has not: it is another model's."""
    ids, most = tokenizer.vocab_size, config.vocab_size
    if ids > most:
        raise ConfigError(f"{source}: its tokenizer has {ids} ids, the model only {most}: it is another model's")


def build(config: ModelConfig, weights: dict[str, Tensor], source: Path, *, has_output: bool = True) -> Transformer:
    """A Transformer that holds these tensors (Meta's names) as they are, without a first random initialisation.

    A tied model needs no "output.weight". With `has_output=False` the output head is left empty, for a reward model to
    drop. DataError, naming `source`, where a tensor is missing, of another shape, or unknown.
    """
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if not has_output:
        expected.pop("output.weight", None)
    for name, shape in expected.items():
        if name not in weights:
            raise DataError(f"{source}: the tensor {name} is missing")
        if weights[name].shape != shape:
            raise DataError(f"{source}: {name} has shape {tuple(weights[name].shape)}, its config says {tuple(shape)}")
    if unknown := weights.keys() - expected.keys():
        raise DataError(
            f"{source}: tensors that a Llama of this config does not have: {', '.join(sorted(unknown)[:3])}"
        )
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.rotary = rotary_table(config.head_dim, config.max_seq_len, config.rope_theta)
    return model
