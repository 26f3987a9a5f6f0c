"""Import and export: what other programs read and write, as Transformer and Tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.config import ConfigError, DataError
from puna.model.moe import MoEConfig
from puna.model.transformer import ModelConfig, Transformer
from puna.types import Tokenizer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What commands call the types of weights."""
LARGEST = {"n_layers": 1024, "max_seq_len": 1 << 22}
"""Beyond any Llama. Layers are modules and positions a table, made before a tensor could prove a shape wrong."""
RATES = ("norm_eps", "rope_theta")


def shape_of(
    source: Path, *, tie_embeddings: bool = False, moe: MoEConfig | None = None, **numbers: Any
) -> ModelConfig:
    """The ModelConfig that a file describes. ConfigError, naming it, where a number is no size of a Llama."""
    for key, value in numbers.items():
        kinds = (int, float) if key in RATES else (int,)
        most = LARGEST.get(key, (1 << 31) - 1)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
            raise ConfigError(f"{source}: {key} is {value!r}: a Llama has a number above 0 and up to {most}")
    try:
        return ModelConfig(**numbers, tie_embeddings=tie_embeddings, moe=moe or MoEConfig())
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def check_dense(config: ModelConfig, target: Path) -> None:
    """ConfigError where a model has experts, for which the format to write has no place."""
    if config.moe.experts:
        raise ConfigError(f"{target}: a mixture of experts is written as a Hugging Face folder alone: use --format hf")


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
    check_shapes(config, {name: tensor.shape for name, tensor in weights.items()}, source, has_output=has_output)
    model = Transformer.without_weights(config)
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


def check_shapes(
    config: ModelConfig, shapes: Mapping[str, Sequence[int]], source: Path, *, has_output: bool = True
) -> None:
    """DataError, naming `source`, where a tensor (Meta's names) is missing, of another shape, or unknown."""
    with torch.device("meta"):  # its rotary table too: an absurd size must not be made
        expected = {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
    if not has_output:
        expected.pop("output.weight", None)
    for name, shape in expected.items():
        if name not in shapes:
            raise DataError(f"{source}: the tensor {name} is missing")
        if tuple(shapes[name]) != shape:
            raise DataError(f"{source}: {name} has shape {tuple(shapes[name])}, its config says {shape}")
    if unknown := shapes.keys() - expected.keys():
        raise DataError(
            f"{source}: tensors that a Llama of this config does not have: {', '.join(sorted(unknown)[:3])}"
        )
