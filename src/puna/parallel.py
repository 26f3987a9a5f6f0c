"""Processes, devices and how they share a model: the same calls at every size, on a laptop and under torchrun.

There is always a process group; without torchrun it has one process. The processes make a mesh of data x tensor:
- ranks of one tensor group see the same rows and hold a part of every matrix each; norms and the residual stream are
  cut along the tokens (sequence parallelism);
- groups along data see their own rows; each holds a share of all states and gathers a block when it needs it (FSDP2).

Losses are divided by counts summed over the data dimension; FSDP2 averages gradients over it, so `backward` scales by
its size to make them a sum. On one process nothing is wrapped, and a model is placed, filled and trained by the same
calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from puna import heartbeat
from puna.config import ConfigError, positive

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
R = TypeVar("R")

MALLOPT = ((-4, 0), (-1, 2**31 - 1), (-2, 2**28))  # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
DIVIDED = ("n_heads", "n_kv_heads", "ffn_hidden", "vocab_size")
"""What tensor parallelism cuts."""
LEAST_HEARTBEAT = 3 * heartbeat.BEAT
"""Seconds: a sign of life or two may come late."""
_aten = torch.ops.aten
COSTLY = [
    _aten.mm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What selective checkpointing keeps: these take nearly all the time of a block, the rest most of the memory."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share a model; a resumed run may have other values.

    Results do not depend on them, with one exception: an epoch drops the examples left over when their number is
    divided by the data-parallel ranks, and `tensor` changes how many of these there are.
    """

    tensor: int = 1
    """ranks that share each matrix and each row's tokens, of one machine; all ranks over these share the batch."""
    checkpointing: Literal["off", "selective", "full"] = "off"
    """what the backward pass computes again: nothing; all of a block but its matrix products and
    attention (a CPU's compiled attention too); or all of it."""
    compile: bool = False
    """torch.compile every block; not with `tensor`."""
    heartbeat: float = 20.0
    """seconds of silence after which a rank counts as dead and the others end; 0 waits for torch's time-outs."""

    def __post_init__(self) -> None:
        positive(self, "tensor")
        if self.heartbeat and not self.heartbeat >= LEAST_HEARTBEAT:
            raise ConfigError(f"heartbeat is {self.heartbeat}: it must be 0, or at least {LEAST_HEARTBEAT:g} seconds")
        if self.compile and self.tensor > 1:
            # torch 2.13's compiler ends in a RecursionError where a DTensor's shape changes from step to step.
            raise ConfigError("compile does not go with tensor > 1: leave parallel.compile false, or share data alone")


_mesh: DeviceMesh | None = None  # data x tensor, or data alone; None on one process


def start(threads: int = 0, cfg: ParallelConfig | None = None) -> torch.device:
    """Join (or make) the process group and return this process's device. Calling it again is harmless.

    ConfigError where the ranks do not make groups of `cfg.tensor`.
    """
    global _mesh
    cfg = cfg or ParallelConfig()
    if threads < 0:
        raise ConfigError(f"threads is {threads}: it must be a number of threads, or 0 for torch's choice")
    if threads:
        torch.set_num_threads(threads)
    # A block that is computed again needs no copies of its weights until then, and casts them anew.
    torch.set_autocast_cache_enabled(cfg.checkpointing == "off")
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            hook = sys.excepthook  # torch's own puts "[rank0]:" before every error
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
            sys.excepthook = hook
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    if device:
        torch.cuda.set_device(device)
    if world_size() % cfg.tensor:
        raise ConfigError(f"parallel.tensor is {cfg.tensor}, which does not divide the {world_size()} processes")
    if world_size() > 1:
        _mesh = _made_mesh(cfg.tensor)
        if cfg.heartbeat:
            _begin_heartbeat(cfg.heartbeat)
    if device:
        return device
    _keep_freed_memory()
    return torch.device("cpu")


@functools.cache
def _made_mesh(tensor: int) -> DeviceMesh:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if tensor == 1:
        return init_device_mesh(kind, (world_size(),), mesh_dim_names=("data",))
    mesh = init_device_mesh(kind, (world_size() // tensor, tensor), mesh_dim_names=("data", "tensor"))
    mesh._flatten("all")  # else a gradient norm is summed along one dimension after the other, not alike on all ranks
    return mesh


@functools.cache
def _begin_heartbeat(limit: float) -> None:
    heartbeat.begin(_store(), rank(), world_size(), limit)


def _store() -> Store:
    """Where the processes met."""
    return dist.distributed_c10d._get_default_store()


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one: without this, it is mapped and cleared anew every time.

    A pretraining step takes a quarter less time (docs/log.md), and a process keeps the memory of its largest step.
    Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOPT:
            mallopt(option, value)


# Ranks ---------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this process is the first of its machine's."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def data_rank() -> int:
    """Which part of a batch is this process's, from 0."""
    return _mesh.get_local_rank("data") if _mesh else 0


def data_size() -> int:
    """In how many parts a batch is cut."""
    return _mesh.size(0) if _mesh else 1


_barriers = itertools.count()


def barrier() -> None:
    """Wait until all processes are here, however long that takes: the heartbeat knows if one never will be."""
    if world_size() == 1:
        return
    store, key = _store(), f"puna/barrier/{next(_barriers)}"
    here = store.add(key, 1)
    while here < world_size():
        time.sleep(0.02)
        here = store.add(key, 0)


# Reductions over what sees different rows ----------------------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """Sum over the parts of a batch; the tensor itself where there is one. Carries no gradient."""
    if data_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, group=_data_group())
    return x


def totals(passes: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Each name's sum over the passes of all parts of a batch, numbers on one device; every pass has all names."""
    names = list(passes[0])
    sums = torch.stack([torch.stack([numbers[name] for name in names]) for numbers in passes]).sum(dim=0)
    return dict(zip(names, total(sums).tolist(), strict=True))


def largest(number: int) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def _data_group() -> dist.ProcessGroup:
    assert _mesh is not None
    return _mesh.get_group("data")


def share(n_items: int) -> slice:
    """The consecutive part of a global batch that is this rank's. The batch must divide by the number of parts."""
    if n_items % data_size():
        raise ConfigError(f"a batch of {n_items} does not divide over {data_size()} processes: change the batch size")
    each = n_items // data_size()
    return slice(data_rank() * each, (data_rank() + 1) * each)


def spread(work: Callable[[int, Sequence[T]], Sequence[R]], items: Sequence[T], *, everyone: bool = False) -> list[R]:
    """Share the items out, compute, and gather: the results of all items, in order, on all ranks.

    A rank computes `work(first, part)` of its consecutive part, which begins at item number `first`. Each data-parallel
    rank has a part (those that share its matrices compute the same one), or with `everyone` each process. Parts are
    padded with the first item to one length, so that all ranks make as many passes through a sharded model.
    """
    if world_size() == 1 or not items:
        return list(work(0, items)) if items else []
    size, mine = (world_size(), rank()) if everyone else (data_size(), data_rank())
    each = -(-len(items) // size)
    part = [*items[mine * each : (mine + 1) * each]]
    part += [items[0]] * (each - len(part))
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, list(work(mine * each, part)), group=None if everyone else _data_group())
    return [result for results in parts for result in results][: len(items)]


# A model over the ranks ----------------------------------------------------------------------------------------------


class Placement(NamedTuple):
    """Where `place` puts a model, how the ranks share it, and what it computes in."""

    device: torch.device
    cfg: ParallelConfig = ParallelConfig()
    precision: str = "fp32"


def place(model: M, weights: Iterable[tuple[str, Tensor]], placement: Placement) -> M:
    """A model made on the meta device, put on this process's device with its part of the weights.

    `weights` are whole and come one by one, so that no rank ever holds more than its part and one of them. With
    "bf16" a sharded model computes in bfloat16, over float32 weights and reductions; one process has `autocast`.
    ConfigError where the model's shape does not divide by `cfg.tensor`.
    """
    device, cfg, precision = placement
    buffers = dict(model.named_buffers())
    if _mesh is not None and cfg.tensor > 1:
        _cut_matrices(model, _mesh["tensor"], cfg.tensor)
    for block in _blocks(model):
        _recompute(block, cfg)
    if _mesh is not None:
        _shard_states(model, _mesh["data"], dtype(precision, device))
    model.to_empty(device=device)
    _tie(model)
    for name, buffer in buffers.items():  # they are no weights and know their values
        model.get_buffer(name).copy_(buffer)
    _fill(model, weights)
    return model


@torch.no_grad()
def _fill(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    parameters = dict(model.named_parameters())
    for name, whole in weights:
        parameter = parameters.pop(name)
        if isinstance(parameter, DTensor):
            mesh, whole = parameter.device_mesh, whole.to(parameter.device)
            whole = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(whole)
    assert not parameters, f"no weights for {', '.join(parameters)}"


def _tie(model: Any) -> None:
    """Make a tied output the embeddings again, after either has become another parameter."""
    if model.config.tie_embeddings and not hasattr(model, "body"):
        model.output.weight = model.tok_embeddings.weight


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("TransformerBlock")]


def _cut_matrices(model: nn.Module, mesh: DeviceMesh, n: int) -> None:
    """Tensor parallelism: the first matrix of a pair by columns, the second by rows, norms by tokens.

    Every parameter becomes a DTensor, norms and the reward head too, or no global gradient norm could be taken.
    """
    for name in DIVIDED:
        if getattr(model.config, name) % n:
            raise ConfigError(f"parallel.tensor is {n}, which does not divide {name} {getattr(model.config, name)}")
    body: Any = getattr(model, "body", model)
    whole, n_experts = Replicate(), body.config.moe.experts
    block: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None, None), desired_input_layouts=(whole, None, None, None, None)
        ),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=whole),
    }
    block |= {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    block |= {"attention.wo": RowwiseParallel(output_layouts=Shard(1))}
    if n_experts:
        block |= _experts(n_experts)
    else:
        block |= {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
        block |= {"feed_forward.w2": RowwiseParallel(output_layouts=Shard(1))}
    for layer in body.layers:
        parallelize_module(layer, mesh, block)
        if n_experts:
            _replicate(layer.feed_forward.gate, mesh)
    ends: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=whole, output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(output_layouts=whole),
    }
    is_reward = body is not model
    parallelize_module(body, mesh, {name: style for name, style in ends.items() if name != "output" or not is_reward})
    parallelize_module(body.norm, mesh, PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=whole))
    if is_reward:
        _replicate(model.score, mesh)  # type: ignore[arg-type]
    _tie(model)
    body.hidden = _in_multiples(body.hidden, n)
    body.head = lambda: body.output.weight.redistribute(mesh, [whole]).to_local()


def _experts(n: int) -> dict[str, ParallelStyle]:
    """A mixture of n experts: every rank routes all tokens alike and computes its part of each expert."""
    whole = Replicate()
    styles: dict[str, ParallelStyle] = {
        "feed_forward": PrepareModuleInputOutput(
            input_layouts=Shard(1),
            desired_input_layouts=whole,
            use_local_input=True,
            output_layouts=whole,
            desired_output_layouts=Shard(1),
        )
    }
    for i in range(n):
        styles |= {f"feed_forward.experts.{i}.{name}": ColwiseParallel() for name in ("w1", "w3")}
        styles |= {f"feed_forward.experts.{i}.w2": RowwiseParallel()}
    return styles


def _replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Whole on every rank of the mesh, for input that is."""

    def take(module: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> DTensor:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

    def give(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local()

    distribute_module(module, mesh, None, take, give)  # type: ignore[arg-type]


def _in_multiples(hidden: Callable[..., Tensor], n: int) -> Callable[..., Tensor]:
    """`Transformer.hidden` over rows padded to a multiple of n tokens, for they are cut in n: the same (B, T, D).

    No token looks at a pad, for pads stand behind; of packed rows they are a document a row of their own.
    """

    def padded(tokens: Tensor, *, positions: Tensor | None = None, documents: Any = None, **rest: Any) -> Tensor:
        length = tokens.shape[1]
        more = -length % n
        tokens = nn.functional.pad(tokens, (0, more))
        positions = None if positions is None else nn.functional.pad(positions, (0, more))
        if documents is not None and more:
            rows, n_slots = len(tokens), sum(n * longest for n, longest in documents.sizes)
            pads = torch.arange(n_slots, n_slots + rows * more, device=tokens.device).view(rows, more)
            slots = torch.cat((documents.slots, pads), 1)
            sizes, masks = (*documents.sizes, (rows, more)), (*documents.masks, None)
            documents = documents._replace(slots=slots, sizes=sizes, masks=masks)
        return hidden(tokens, positions=positions, documents=documents, **rest)[:, :length]

    return padded


def _recompute(block: Any, cfg: ParallelConfig) -> None:
    """Compile a block's forward pass, and have the backward pass compute again what `cfg.checkpointing` says.

    A compiled block keeps and recomputes by the compiler's own choice, which is what "selective" asks for.
    """
    if cfg.compile:
        block.forward = torch.compile(block.forward)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no dropout, nothing random
    if cfg.checkpointing == "full":
        block.forward = functools.partial(checkpoint, block.forward, **options)
    elif cfg.checkpointing == "selective" and not cfg.compile:
        context = functools.partial(create_selective_checkpoint_contexts, COSTLY)
        block.forward = functools.partial(checkpoint, block.forward, context_fn=context, **options)


def _shard_states(model: nn.Module, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """FSDP2: a unit a block, one for embeddings and head. A reward model's score is a unit in float32 always."""
    # What a model returns may be a view; nothing here changes one in place, which would be the harm in it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)  # inputs stay as they are: a rotary table needs float32
    policy = exact if compute == torch.float32 else MixedPrecisionPolicy(compute, torch.float32, None, False)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if hasattr(model, "body"):
        body: Any = model.body
        fully_shard(body, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(body, "hidden")
        fully_shard(model, mesh=mesh, mp_policy=exact)
        register_fsdp_forward_method(model, "values")
    else:
        fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether a pass of this model takes all ranks at once."""
    return isinstance(model, FSDPModule)


def is_compiled(model: nn.Module) -> bool:
    """Whether `place` has put another forward pass in the place of the blocks' own."""
    return any("forward" in vars(block) for block in _blocks(model))


def backward(loss: Tensor) -> None:
    """Back-propagate a loss that was divided by a global count."""
    torch.autograd.backward(loss * data_size())


def dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that "bf16" or "fp32" asks for; float32 on a CPU that has no bfloat16 arithmetic."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if precision == "bf16" and fast else torch.float32


def memory_of(device: torch.device) -> int:
    """In bytes: a GPU's, or this process's part of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 matrix products over float32 weights where `dtype` says so, nothing otherwise."""
    if dtype(precision, device) == torch.bfloat16:
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
