"""Processes and devices: always a process group, one process or many, and the same calls at every size.

Under torchrun each process joins the group it describes; without it a group of one is made. Losses are divided by
counts summed over all ranks; FSDP2 averages gradients, so `backward` scales by the number of ranks to make it a sum.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from puna.config import ConfigError

M = TypeVar("M", bound=nn.Module)

MALLOPT = ((-4, 0), (-1, 2**31 - 1), (-2, 2**28))  # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def start(threads: int = 0) -> torch.device:
    """Join (or make) the process group and return this process's device. Calling it again is harmless."""
    if threads:
        torch.set_num_threads(threads)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one: without this, it is mapped and cleared anew every time.

    A pretraining step takes a quarter less time (docs/log.md), and a process keeps the memory of its largest step.
    Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOPT:
            mallopt(option, value)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def total(x: Tensor) -> Tensor:
    """Sum over ranks; the tensor itself on one process. Carries no gradient."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def largest(number: int) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def share(n_items: int) -> slice:
    """The consecutive part of a global batch that is this rank's. The batch must divide by the number of ranks."""
    if n_items % world_size():
        raise ConfigError(f"a batch of {n_items} does not divide over {world_size()} processes: change the batch size")
    each = n_items // world_size()
    return slice(rank() * each, (rank() + 1) * each)


def shard(model: M) -> M:
    """FSDP2 over all ranks, a unit a block; the model as it is on one process, where sharding only costs."""
    if world_size() > 1:
        for module in model.modules():
            if type(module).__name__ == "TransformerBlock":
                fully_shard(module)
        fully_shard(model)
        if hasattr(model, "values"):
            register_fsdp_forward_method(model, "values")
    return model


def backward(loss: Tensor) -> None:
    """Back-propagate a loss that was divided by a global count."""
    torch.autograd.backward(loss * world_size())


def only_one_process(stage: str) -> None:
    """Refuse to run a stage that is not sharded yet."""
    if world_size() > 1:
        raise ConfigError(f"{stage} runs on one process today: start it without torchrun")


def dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that "bf16" or "fp32" asks for; float32 on a CPU that has no bfloat16 arithmetic."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if precision == "bf16" and fast else torch.float32


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 matrix products over float32 weights where `dtype` says so, nothing otherwise."""
    if dtype(precision, device) == torch.bfloat16:
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
