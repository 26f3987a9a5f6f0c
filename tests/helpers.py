"""Tiny things that many tests need: a tokenizer, models that end their answers, dialogs, files, several processes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from puna import kernels, parallel
from puna.data.shards import Shard
from puna.formats import huggingface
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from puna.optim import OptimConfig
from puna.parallel import ParallelConfig, Placement
from puna.stages.dpo import DPOConfig
from puna.stages.grpo import GRPOConfig
from puna.stages.ppo import PPOConfig
from puna.stages.pretrain import PretrainConfig
from puna.stages.reward import RewardConfig
from puna.stages.sft import SFTConfig
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer
from puna.types import Dialog, Message

WHO = ("the llama", "a herder", "the old shepherd", "her dog", "the white goat", "a vicuña", "the neighbour")
WHAT = ("crosses", "watches", "likes", "leaves", "counts", "remembers", "hides behind")
WHERE = (
    "the cold river",
    "the high grassland",
    "a stone wall",
    "7 tents",
    "the road to Puno",
    "3 hills",
    "the salt lake",
)
VOCAB = 384
M = TypeVar("M", Transformer, RewardModel)


def documents(shard: Shard) -> list[list[int]]:
    """Each document's ids, in order."""
    return [shard.tokens[a:b].tolist() for a, b in itertools.pairwise(shard.offsets)]


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{rng.choice(WHO)} {rng.choice(WHAT)} {rng.choice(WHERE)}." for _ in range(n)]


@functools.cache
def tokenizer() -> Tokenizer:
    """SentencePiece trained on the sentences above."""
    with tempfile.TemporaryDirectory() as folder:
        return tokenizers.train([*sentences(300), "[INST] <<SYS>> <</SYS>> [/INST]"], VOCAB, Path(folder))


def config(**changes: Any) -> ModelConfig:
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB, "ffn_hidden": 48}
    return ModelConfig(**(shape | {"max_seq_len": 256} | changes))


def model(seed: int = 0, **changes: Any) -> Transformer:
    made = Transformer(config(**changes))
    made.init_weights(torch.Generator().manual_seed(seed))
    return made


def placed(whole: M, cfg: ParallelConfig | None = None, precision: str = "fp32") -> M:
    """The same model over the processes there are."""
    weights = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    bare: Any = type(whole).without_weights(whole.config)
    return parallel.place(
        bare, iter(weights.items()), Placement(parallel.start(cfg=cfg), cfg or ParallelConfig(), precision)
    )  # type: ignore[no-any-return]


def talker(seed: int = 0, end: float = 0.25) -> Transformer:
    """A model that says random words and ends its answer with probability `end` at every step.

    One number of the residual stream is held constant, and EOS alone listens to it: a bias where the model has none.
    """
    made = model(seed)
    with torch.no_grad():
        made.tok_embeddings.weight[:, 0] = 3.0
        for name, parameter in made.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                parameter[0] = 0.0
        made.output.weight[:, 0] = 0.0
        made.output.weight[:259] *= 0.0  # control ids and bytes: no broken UTF-8 among the likely words
        made.output.weight[:259, 0] = -2.0
        constant = made.hidden(torch.tensor([[1]]))[0, 0, 0]
        made.output.weight[2] = 0.0
        made.output.weight[2, 0] = math.log(end / (1 - end) * (VOCAB - 259)) / constant
    return made


def reward_model(seed: int = 0, **changes: Any) -> RewardModel:
    made = RewardModel(model(seed, **changes))
    made.init_head(torch.Generator().manual_seed(seed + 1))
    return made


def talker_folder(path: Path, seed: int = 0, end: float = 0.25) -> Path:
    huggingface.save_model(talker(seed, end), tokenizer(), path)
    return path


def reward_folder(path: Path, seed: int = 1) -> Path:
    huggingface.save_reward_model(reward_model(seed), tokenizer(), path)
    return path


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def dialogs(n: int, seed: int = 0) -> list[Dialog]:
    """Dialogs of one to three questions with their answers."""
    rng = random.Random(seed)
    made: list[Dialog] = []
    for i in range(n):
        said = sentences(6, seed + 1000 * i)
        turns = [turn for q, a in zip(said[::2], said[1::2], strict=True) for turn in (user(q), assistant(a))]
        made.append(turns[: 2 * rng.randint(1, 3)])
    return made


def prompts(n: int, seed: int = 0, safety_every: int = 2) -> list[dict[str, Any]]:
    """Prompt records; every second one is a safety prompt."""
    return [
        {"id": f"p{i}", "messages": [user(f"{i}: {text}")], "is_safety": i % safety_every == 1}
        for i, text in enumerate(sentences(n, seed))
    ]


def preferences(n: int, seed: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """Comparison rows in the canonical form, of every grade in turn."""
    grades = ("significantly_better", "better", "slightly_better", "negligibly_better")
    said = sentences(3 * n, seed)
    return [
        {
            "prompt": [user(f"{i}: {said[3 * i]}")],
            "chosen": [assistant(f"yes, {said[3 * i + 1]}")],
            "rejected": [assistant(f"no, {said[3 * i + 2]} {said[i]}")],
            "grade": grades[i % 4],
            **columns,
        }
        for i in range(n)
    ]


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_processes(work: Callable[..., Any], *arguments: Any, world_size: int = 2) -> None:
    """`work(*arguments)` on several gloo processes, as torchrun starts them; an error on any is raised here."""
    mp.spawn(_join, (world_size, free_port(), work, arguments), nprocs=world_size)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _join(rank: int, world_size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    rendezvous, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)  # a hang is an error
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    work(*arguments)
    dist.barrier()  # or the first to leave may abort the other
    dist.destroy_process_group()


def two_workers(cluster: str) -> dict[str, Any]:
    """Settings of a run whose work two processes share; skips where Ray is asked for and absent."""
    if cluster == "ray":
        pytest.importorskip("ray", reason="ray is not installed")
    return {"workers": 2, "cluster": cluster}


# Configs of tiny runs; each writes the files it needs into the folder.


def quick(lr: float = 3e-3) -> OptimConfig:
    return OptimConfig(lr=lr, warmup_steps=1)


def pretrain_config(folder: Path, **changes: Any) -> PretrainConfig:
    """7 steps of 8 windows."""
    data = write_lines(folder / "text.jsonl", [{"text": text} for text in sentences(300)])
    shape = {"seq_len": 24, "batch_size": 8, "micro_batch_size": 8, "steps": 7, "validation_share": 0.1}
    fixed = {"out": folder / "pretrain", "data": (data,), "model": config(), "optim": quick(), "checkpoint_every": 2}
    return PretrainConfig(**(fixed | shape | {"precision": "fp32"} | changes))


def sft_config(folder: Path, **changes: Any) -> SFTConfig:
    """About 10 steps of 4 rows."""
    data = write_lines(folder / "dialogs.jsonl", [{"messages": dialog} for dialog in dialogs(40)])
    shape = {"seq_len": 200, "batch_size": 4, "micro_batch_size": 4, "checkpoint_every": 2}
    fixed = {"out": folder / "sft", "init": talker_folder(folder / "base"), "data": (data,), "optim": quick()}
    return SFTConfig(**(fixed | shape | {"precision": "fp32"} | changes))


def reward_config(folder: Path, **changes: Any) -> RewardConfig:
    """6 steps of 8 pairs, labelled for safety."""
    labels = {"chosen_is_safe": True, "rejected_is_safe": False, "domain": "safety"}
    data = write_lines(folder / "pairs.jsonl", preferences(54, **labels))
    shape = {"max_len": 200, "batch_size": 8, "micro_batch_tokens": 1024, "checkpoint_every": 2}
    fixed = {"out": folder / "reward", "init": talker_folder(folder / "chat"), "data": (data,), "optim": quick()}
    return RewardConfig(**(fixed | shape | {"safety_auxiliary": 0.5, "precision": "fp32"} | changes))


def dpo_config(folder: Path, **changes: Any) -> DPOConfig:
    """6 steps of 8 pairs."""
    data = write_lines(folder / "pairs.jsonl", preferences(54))
    shape = {"max_len": 200, "batch_size": 8, "micro_batch_tokens": 1024, "checkpoint_every": 2}
    fixed = {"out": folder / "dpo", "init": talker_folder(folder / "chat"), "data": (data,), "optim": quick()}
    return DPOConfig(**(fixed | shape | {"precision": "fp32"} | changes))


def ppo_config(folder: Path, **changes: Any) -> PPOConfig:
    """5 iterations of 8 answers in 2 gradient steps."""
    models = {
        "init": talker_folder(folder / "chat"),
        "reward_helpfulness": reward_folder(folder / "helpfulness", 1),
        "reward_safety": reward_folder(folder / "safety", 2),
    }
    data = write_lines(folder / "prompts.jsonl", prompts(30))
    held_out = write_lines(folder / "held_out.jsonl", prompts(6, seed=1))
    shape = {"iterations": 5, "batch_size": 8, "mini_batch_size": 4, "micro_batch_tokens": 4096, "max_new_tokens": 8}
    files = {"out": folder / "ppo", "prompts": (data,), "held_out": (held_out,)}
    rates = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    intervals = {"evaluate_every": 2, "checkpoint_every": 2, "optim": rates}
    return PPOConfig(**(models | files | shape | intervals | changes))


def grpo_config(folder: Path, **changes: Any) -> GRPOConfig:
    """5 iterations of 2 groups of 4 answers in 2 gradient steps."""
    models = {
        "init": talker_folder(folder / "chat"),
        "reward_helpfulness": reward_folder(folder / "helpfulness", 1),
        "reward_safety": reward_folder(folder / "safety", 2),
    }
    data = write_lines(folder / "prompts.jsonl", prompts(30))
    shape = {"iterations": 5, "batch_size": 8, "group_size": 4, "mini_batch_size": 4, "max_new_tokens": 8}
    rates = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    intervals = {"held_out_prompts": 6, "evaluate_every": 2, "checkpoint_every": 2, "optim": rates}
    return GRPOConfig(**(models | {"out": folder / "grpo", "prompts": (data,)} | shape | intervals | changes))


BUILDS = ["native", "-mno-amx-bf16", "-mno-avx512f"]
"""The compiled calls as this processor has them, as one without matrix tiles would, and as one without AVX512."""


@contextlib.contextmanager
def compiled_in(cache: Path, build: str = "native") -> Iterator[None]:
    """The compiled calls made anew in a cache folder, as one of BUILDS; skips where this machine cannot."""
    if "amx" in build and "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no matrix tiles: native is without them")
    flags = () if build == "native" else (build,)
    with contextlib.ExitStack() as stack:
        stack.callback(kernels.library.cache_clear)  # last, when all is as it was
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(kernels, "FLAGS", (*kernels.FLAGS, *flags))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        kernels.library.cache_clear()
        if kernels.library() is None:
            pytest.skip("no g++, or no AVX2")
        yield
