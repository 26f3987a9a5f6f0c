"""Hugging Face folders: what a published model is, readable by transformers, vLLM and llama.cpp's converter.

    config.json             LlamaForCausalLM, or LlamaForSequenceClassification with one label for a reward model;
                            with experts, Mixtral's of the same ending
    model.safetensors       read from several files too, where model.safetensors.index.json names them
    SHA256SUMS              of the safetensors files, as `sha256sum -c` takes it
    generation_config.json  a chat model's BOS, EOS and padding
    tokenizer.model | tokenizer.json + tokenizer_config.json
    puna.json               where the model comes from: whatever the caller says
    README.md               of an export: the model card; a tokenizer.json beside tokenizer.model comes with it

Two things differ from Meta's layout: the names, and the rows of wq and wk. Meta rotates neighbouring pairs of a
head's numbers, Hugging Face the first half with the second, so that rows are reordered on the way in and out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from puna import parallel
from puna.config import ConfigError, DataError, read_json_object
from puna.formats import LARGEST, build, check_shapes, check_vocabulary, shape_of
from puna.formats.folders import SUMS, read_digests, replacing, standing, write_digests
from puna.model.moe import MoEConfig
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from puna.run_folder import sha256
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer

Weights = Iterator[tuple[str, Tensor]]
"""Names (Meta's) and whole tensors."""
Stored = dict[str, tuple[str, tuple[int, ...]]]
"""Hugging Face's name -> Meta's, and the shape."""
CAUSAL, CLASSIFIER = "LlamaForCausalLM", "LlamaForSequenceClassification"
SCORE = "score.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9
"""Bytes of a weight file; a model of more is written as several, with an index (ours)."""
PROVENANCE = "puna.json"
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)
LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
EXPERTS = ("num_local_experts", "num_experts_per_tok")


def save_model(
    model: Transformer,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    provenance: dict[str, Any] | None = None,
    texts: dict[str, str] | None = None,
) -> None:
    """Write a chat model's folder, whole or not at all; an older one of that name is replaced. All ranks call it.

    `dtype` None keeps the weights' own. `provenance` (JSON-ready: parents, stage, step, ...) becomes puna.json.
    `texts` are further files by name, such as the model card.
    """
    weights = _full_weights(model)
    if parallel.is_main():
        ids = _control_ids(tokenizer)
        files = {"config.json": _describe(model.config, tokenizer, CAUSAL), "generation_config.json": ids}
        _write(folder, files, _to_hugging_face(weights, model.config), tokenizer, dtype, provenance, texts)
    parallel.barrier()


def save_reward_model(
    model: RewardModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    provenance: dict[str, Any] | None = None,
    texts: dict[str, str] | None = None,
) -> None:
    """Write a reward model's folder as `save_model` does.

    transformers takes the score at the last token that is not padding: rows must be padded with `tokenizer.pad_id`.
    """
    weights = _full_weights(model)
    if parallel.is_main():
        score = weights.pop("score.weight")
        body = {name.removeprefix("body."): tensor for name, tensor in weights.items()}
        files = {"config.json": _describe(model.config, tokenizer, CLASSIFIER) | {"num_labels": 1}}
        tensors = _to_hugging_face(body, model.config) | {"score.weight": score}
        _write(folder, files, tensors, tokenizer, dtype, provenance, texts)
    parallel.barrier()


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Weights]:
    """A Llama of a Hugging Face folder without its weights, and these one by one, for `parallel.place`.

    ConfigError where it is another kind of model, DataError where a tensor is missing or damaged.
    """
    folder = standing(folder)
    config = read_config(folder, CAUSAL)
    names = _stored(folder, config)
    check_shapes(config, dict(names.values()), folder)
    return Transformer.without_weights(config), _stream(folder, config, names, dtype)


def open_reward_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[RewardModel, Weights]:
    """A reward model, a LlamaForSequenceClassification with one label, without its weights, and these one by one."""
    folder = standing(folder)
    config = read_config(folder, CLASSIFIER)
    names = _stored(folder, config, {SCORE: SCORE})
    shapes = dict(names.values())
    if shapes.pop(SCORE, None) != (1, config.dim):
        raise DataError(f"{folder}: {SCORE} is missing or not of shape (1, {config.dim}): a reward has one label")
    check_shapes(config, shapes, folder, has_output=False)
    weights = _stream(folder, config, names, dtype)
    return RewardModel.without_weights(config), ((name if name == SCORE else f"body.{name}", w) for name, w in weights)


def open_body(folder: Path, head: Tensor) -> tuple[RewardModel, Weights]:
    """A reward model of a chat model's body and a new head (1, D), as `open_model`."""
    body, weights = open_model(folder)
    of_body = ((f"body.{name}", weight) for name, weight in weights if name != "output.weight")
    return RewardModel.without_weights(body.config), itertools.chain(of_body, [(SCORE, head)])


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Read a Llama in a Hugging Face folder, whole. Errors as `open_model`."""
    model, weights = open_model(folder, dtype)
    return build(model.config, dict(weights), folder)


def load_reward_model(folder: Path, dtype: torch.dtype = torch.float32) -> RewardModel:
    """Read a reward model, whole. Errors as `open_model`."""
    model, weights = open_reward_model(folder, dtype)
    model.load_state_dict(dict(weights), assign=True)
    return model.requires_grad_()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a chat or a reward model's folder, whose weights are not read.

    ConfigError, naming the folder, where there is none or it is another model's.
    """
    folder = standing(folder)
    tokenizer = tokenizers.load(folder)
    is_reward = any(map(is_classifier, named_architectures(_read_object(folder))))
    check_vocabulary(tokenizer, read_config(folder, CLASSIFIER if is_reward else CAUSAL), folder)
    return tokenizer


def verify(folder: Path) -> None:
    """DataError where a weight file is not the one that SHA256SUMS, if there is one, was made of."""
    folder = standing(folder)
    digests = read_digests(folder)
    for path in weight_files(folder) if digests else []:
        if path.name in digests and sha256(path) != digests[path.name]:
            raise DataError(
                f"{path} is damaged or was changed: its sha256 is not that of {SUMS}; "
                f"get or write the folder again, or remove {SUMS} if the change is meant"
            )


def check_alike(folder: Path, tokenizer: Tokenizer, context: int, architecture: str = CLASSIFIER) -> None:
    """ConfigError where a folder's model reads other tokens than a policy writes, or fewer than its context."""
    folder = standing(folder)
    if load_tokenizer(folder).sha256 != tokenizer.sha256:
        raise ConfigError(f"{folder}: this model has another tokenizer than the policy that it is to read")
    own = read_config(folder, architecture).max_seq_len
    if own < context:
        raise ConfigError(f"{folder}: this model's context is {own} tokens, the policy's that it is to read {context}")


def read_config(folder: Path, architecture: str = CAUSAL) -> ModelConfig:
    """The model's shape from config.json. ConfigError where it asks for what Llama 2's architecture does not have."""
    path, config = folder / "config.json", _read_object(folder)
    named = named_architectures(config)
    has_experts = any(name.startswith("Mixtral") for name in named)
    if architecture not in named and of_mixtral(architecture) not in named:
        raise ConfigError(f"{path}: architectures is {config.get('architectures')}, expected {architecture}")
    if missing := [key for key in REQUIRED + (EXPERTS if has_experts else ()) if key not in config]:
        raise ConfigError(f"{path}: {', '.join(missing)} is missing")
    unsupported = {
        "rope_scaling": _is_scaled(config.get("rope_scaling")),
        "rope_parameters": _is_scaled(config.get("rope_parameters")),
        "attention_bias": config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        "quantization_config": config.get("quantization_config"),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "sliding_window": has_experts and config.get("sliding_window"),
        "head_dim": _has_own_head_dim(config),
    }
    for key, present in unsupported.items():
        if present:
            raise ConfigError(f"{path}: {key} {config[key]} is not supported: Llama 2 has none like it")
    tied = config.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise ConfigError(f"{path}: tie_word_embeddings is {tied!r}: it must be true or false")
    rope = config.get("rope_parameters") or {}
    return shape_of(
        path,
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        ffn_hidden=config["intermediate_size"],
        max_seq_len=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        tie_embeddings=tied,
        moe=_read_experts(path, config) if has_experts else None,
    )


def _is_scaled(rope: Any) -> bool:
    """Whether rotary positions are more than a rope_theta; older folders call a scaling's rope_type its type."""
    if not isinstance(rope, dict):
        return bool(rope)
    unscaled = "default" if rope.keys() <= {"rope_theta"} else None
    return bool(rope.get("rope_type", rope.get("type", unscaled)) != "default")


def _has_own_head_dim(config: dict[str, Any]) -> bool:
    """Whether a head's width is not the model's over its heads; `shape_of` refuses what is no number of these."""
    dim, heads, width = (config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if width in (None, 0) or not isinstance(dim, int) or not isinstance(heads, int):
        return False
    return not isinstance(width, int) or width * heads != dim


def named_architectures(config: dict[str, Any]) -> list[str]:
    """What a config.json says its folder holds; [] where that is no list."""
    named = config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def _read_object(folder: Path) -> dict[str, Any]:
    """The folder's config.json. ConfigError where there is none, DataError where it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: no config.json: not a Hugging Face model folder")
    return read_json_object(path)


def is_classifier(architecture: str) -> bool:
    """Whether it is a reward model's."""
    return architecture.replace("Mixtral", "Llama") == CLASSIFIER


def of_mixtral(architecture: str) -> str:
    """Mixtral's name for what is Llama's with experts."""
    return architecture.replace("Llama", "Mixtral")


def _read_experts(path: Path, config: dict[str, Any]) -> MoEConfig:
    """The experts that config.json describes; `shape_of` looks at the numbers of a Llama alone."""
    experts, top_k = (config[key] for key in EXPERTS)
    if type(experts) is not int or type(top_k) is not int or not 0 < top_k <= experts <= LARGEST["n_layers"]:
        raise ConfigError(f"{path}: {top_k!r} of {experts!r} experts a token is no mixture of experts")
    balance = config.get("router_aux_loss_coef", MoEConfig.balance)
    return MoEConfig(experts, top_k, balance=float(balance) if isinstance(balance, int | float) else MoEConfig.balance)


def to_half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of wq or wk (n_heads * E, D) from Meta's neighbouring pairs to Hugging Face's halves."""
    return weight.view(n_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """`to_half_split`, undone."""
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _names(config: ModelConfig) -> dict[str, str]:
    """Meta's name -> Hugging Face's, for every tensor of the model."""
    names = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    inner = LAYER_NAMES | _expert_names(config.moe.experts) if config.moe.experts else LAYER_NAMES
    for i in range(config.n_layers):
        names |= {f"layers.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight" for ours, theirs in inner.items()}
    return names


def _expert_names(experts: int) -> dict[str, str]:
    """What stands in the feed-forward's place, whose names no tensor has then."""
    matrices = (f"experts.{i}.w{n}" for i in range(experts) for n in (1, 2, 3))
    return {f"feed_forward.{name}": f"block_sparse_moe.{name}" for name in ("gate", *matrices)}


def _rotated_heads(name: str, config: ModelConfig) -> int:
    """How many heads of this tensor (Meta's name) are rotated: 0 where rotary positions do not concern it."""
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2], 0)


def _to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    names = _names(config)
    if config.tie_embeddings:
        weights = {name: tensor for name, tensor in weights.items() if name != "output.weight"}
    tensors = {}
    for name, tensor in weights.items():
        heads = _rotated_heads(name, config)
        tensors[names[name]] = to_half_split(tensor, heads) if heads else tensor
    return tensors


def _stored(folder: Path, config: ModelConfig, more: dict[str, str] | None = None) -> Stored:
    """What the folder's files hold of this model, by Hugging Face's names; no weight is read."""
    names = {theirs: ours for ours, theirs in _names(config).items()} | (more or {})
    stored: Stored = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            for theirs in file.keys():  # noqa: SIM118  not a dict
                if theirs.endswith("rotary_emb.inv_freq"):
                    continue  # A table that early exports stored; it follows from rope_theta.
                if theirs not in names:
                    raise DataError(f"{folder}: {theirs} is no tensor of a {config.n_layers}-layer Llama")
                if theirs in stored:
                    raise DataError(f"{path}: {theirs} is in another file of this folder too: get or export it again")
                if names[theirs] != "output.weight" or not config.tie_embeddings:
                    stored[theirs] = names[theirs], tuple(file.get_slice(theirs).get_shape())
    return stored


def _stream(folder: Path, config: ModelConfig, stored: Stored, dtype: torch.dtype) -> Weights:
    """Every tensor that is `stored`, by Meta's name, read when it is asked for."""
    for path in weight_files(folder):
        with _opened(path) as file:
            for theirs in file.keys():  # noqa: SIM118  not a dict
                if theirs in stored:
                    ours = stored[theirs][0]
                    tensor, heads = file.get_tensor(theirs).to(dtype), _rotated_heads(ours, config)
                    yield ours, to_interleaved(tensor, heads) if heads else tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model. ConfigError where one is missing or lies elsewhere."""
    names = _indexed(folder / INDEX) if (folder / INDEX).is_file() else [WEIGHTS]
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder / name}: no such file: Puna reads weights from safetensors files, never from pickles"
            )
    return [folder / name for name in names]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. DataError where it is truncated or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: truncated or damaged: {error}") from error


def _indexed(path: Path) -> list[str]:
    """The files that an index names, which must lie beside it."""
    try:
        names = sorted(set(read_json_object(path)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or not name.strip(".")]
    except (DataError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not an index of safetensors files: it needs a weight_map of names") from error
    if outside:
        raise ConfigError(f"{path}: refused, it names {outside[0]!r}, which does not lie in its folder")
    return names


def _full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights on the CPU, gathered from all ranks; empty on every rank but the first."""
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def _control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _describe(config: ModelConfig, tokenizer: Tokenizer, architecture: str) -> dict[str, Any]:
    """config.json, with the keys that every version of transformers since 4.31 reads."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    moe = config.moe
    family: dict[str, Any] = {"architectures": [architecture], "model_type": "llama"}
    if moe.experts:
        family = {"architectures": [of_mixtral(architecture)], "model_type": "mixtral", "sliding_window": None}
        family |= dict(zip(EXPERTS, (moe.experts, moe.top_k), strict=True)) | {"router_aux_loss_coef": moe.balance}
    return {
        **family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        **_control_ids(tokenizer),
    }


def _write(
    folder: Path,
    files: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype | None,
    provenance: dict[str, Any] | None,
    texts: dict[str, str] | None,
) -> None:
    tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    files["config.json"]["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    files[PROVENANCE] = provenance or {}
    with replacing(folder) as made:
        for name, content in files.items():
            (made / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, text in (texts or {}).items():
            (made / name).write_text(text, encoding="utf-8")
        tokenizer.save(made)
        _save_shards(tensors, made)
        write_digests(made, "*.safetensors")


def _save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """One file, or an index and files of SHARD bytes at most (a larger tensor has its own)."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _save_tensors(tensors, folder / WEIGHTS)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _save_tensors(shard, folder / name)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' own writer, which needs no second copy in memory; the system's errors become OSErrors again."""
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
