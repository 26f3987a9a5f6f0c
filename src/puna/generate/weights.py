"""A model's weights held for fast decoding: float32 or bfloat16 as they are, int8 or 4-bit through torch's kernels.

`pack` makes a copy of a Transformer whose linear layers hold packed weights; norms stay float32, embeddings have the
type of the activations. int8 has a scale an output channel, int4 a scale and a zero every `group` inputs; activations
are never quantised. A few rows a step are bound by reading the weights, and stock products leave half the memory's
rate unused on a CPU; many rows through a small model are bound by what stands between the products. There a packed
model decodes with one compiled call a step (kernel.py), where the cache shows its pages. Other passes, and machines
without a compiler, go through torch.

Shapes: N outputs, D inputs of a layer; B rows, T tokens, L layers, K key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from puna import kernels, parallel
from puna.config import ConfigError
from puna.generate import kernel
from puna.model.transformer import Cache, Documents, Transformer

Kind = Literal["fp32", "bf16", "int8", "int4"]

PACKED_ROWS = 16
"""Rows up to which torch's int8 kernel beats a bfloat16 product with the weights written out."""

NORMS = ("attention_norm", "ffn_norm")
LINEARS = tuple(f"attention.w{x}" for x in "qkvo") + tuple(f"feed_forward.w{x}" for x in "123")
"""A block's weights in the order of kernel.Layer."""

GROUPS = (32, 64, 128, 256)
"""Inputs that may share a scale, as torch's 4-bit kernel has it."""


class Pages(NamedTuple):
    """Where a cache holds what: position s of row b is at place s % P of the page table[b, s // P]."""

    keys: Sequence[Tensor]  # of each layer (pages, K, P, E), all strided alike, a head's numbers side by side
    values: Sequence[Tensor]  # as the keys
    table: Tensor  # (B, M) int64


@runtime_checkable
class PagedCache(Protocol):
    """A cache that the compiled step can read and write: each row's tokens see all of its positions up to their own.

    Pages that neighbouring rows begin with together are read once for all of them.
    """

    def pages(self) -> Pages:
        """The pages of the rows of the pass that comes, with room for its tokens."""
        ...


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in x's type; of many rows, where a CPU has no bfloat16 arithmetic, by a float32 product: it is faster."""
    few = x.numel() <= PACKED_ROWS * x.shape[-1]
    if x.dtype == torch.bfloat16 and not few and parallel.dtype("bf16", x.device) == torch.float32:
        return F.linear(x.float(), weight.float()).to(x.dtype)
    return F.linear(x, weight.to(x.dtype))


class BFloat16Linear(nn.Linear):
    """y = x W^T with W in bfloat16, by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class Int8Linear(nn.Module):
    """y = x W^T with W = scales * int8, a scale an output channel."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scales = (weight.float().abs().amax(1) / 127).bfloat16().float()  # (N,), rounded as torch's kernel takes them
        unit = scales.clamp(min=torch.finfo(torch.float32).tiny)
        numbers = (weight.float() / unit[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", numbers.to(torch.int8))  # (N, D)
        self.register_buffer("scales", scales)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether torch's kernel reads rows of this length rightly; it checks nothing itself."""
        return weight.shape[1] % 16 == 0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) > PACKED_ROWS:
            return product(x, self.weight) * self.scales.to(x.dtype)
        packed: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales.to(x.dtype))
        return packed.view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """y = x W^T with W = scale * (4 bits - 8) + zero, a scale and a zero every `group` inputs of an output."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, group: int) -> None:
        super().__init__()
        self.group = group
        groups = weight.float().reshape(len(weight), -1, group)  # (N, D / group, group)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = ((high - low) / 15).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        unit = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
        numbers = ((groups - zero.float()) / unit).round().add(8).clamp(0, 15).flatten(1).to(torch.int32)
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1))
        self.register_buffer("scales", torch.cat((scale, zero), 2).transpose(0, 1).contiguous())  # (D / group, N, 2)

    @staticmethod
    def takes(weight: Tensor, group: int) -> bool:
        """Whether torch's kernel takes this shape."""
        return weight.shape[0] % 16 == 0 and weight.shape[1] % group == 0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        packed: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, self.group, self.scales.to(x.dtype)
        )
        return packed.view(*x.shape[:-1], -1)


class PackedTransformer(Transformer):
    """A Transformer for inference. `plain` names the layers that stayed bfloat16: no kernel takes their shape."""

    plain: tuple[str, ...] = ()

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        states = self._step(tokens, positions, cache, head=False)
        return (
            super().hidden(tokens, positions=positions, documents=documents, cache=cache) if states is None else states
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
        only: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        logits = self._step(tokens, positions, cache, head=True) if only is None and targets is None else None
        if logits is None:
            return super().forward(
                tokens, positions=positions, documents=documents, cache=cache, only=only, targets=targets
            )
        return logits

    def _step(self, tokens: Tensor, positions: Tensor | None, cache: object, head: bool) -> Tensor | None:
        """Hidden states (B, T, D), or logits (B, T, V), by the compiled step; None where it cannot run this pass."""
        if positions is None or not isinstance(cache, PagedCache) or tokens.is_cuda:
            return None
        if (model := self._pointers) is None:
            return None
        keys, values, table = cache.pages()
        rows = table.repeat_interleave(tokens.shape[1], 0).contiguous()
        where = positions.flatten().contiguous()
        strides, page = keys[0].stride(), keys[0].shape[2]
        assert all(x.stride() == strides for x in (*keys, *values)) and strides[3] == 1, f"strides {strides}"
        assert page % 2 == 0, f"a page has {page} places: a pair of bfloat16 would be torn"
        assert int(where.max()) < rows.shape[1] * page, f"position {int(where.max())} has no page"
        parts = ((ctypes.c_void_p * len(part))(*(x.data_ptr() for x in part)) for part in (keys, values))
        assert keys[0].dtype in (torch.float32, torch.bfloat16), f"the cache holds {keys[0].dtype}"
        is_bf16 = keys[0].dtype == torch.bfloat16
        paged = kernel.Cache(*parts, rows.data_ptr(), rows.shape[1], page, *strides[:3], is_bf16)
        embedded = self.tok_embeddings(tokens)  # (B, T, D)
        states = embedded.flatten(0, 1).to(torch.float32, copy=True)
        logits = torch.empty(len(states), self.config.vocab_size) if head else None
        kernel.step(model, paged, where, self.rotary[where].float(), states, logits)
        return (states if logits is None else logits).to(embedded.dtype).view(*tokens.shape, -1)

    @functools.cached_property
    def _pointers(self) -> kernel.Model | None:
        """Where the weights are; None where there is no compiled step, or it cannot read some layer or experts."""
        if self.config.moe.experts:
            return None
        if kernels.library() is None or self.norm.weight.is_cuda or self.norm.weight.dtype != torch.float32:
            return None
        layers = []
        for i in range(self.config.n_layers):
            norms = [self.get_parameter(f"layers.{i}.{name}.weight").data_ptr() for name in NORMS]
            matrices = [_matrix(self.get_submodule(f"layers.{i}.{name}")) for name in LINEARS]
            if None in matrices:
                return None
            layers.append(kernel.Layer(*norms, *matrices))
        shape = (self.config.n_layers, self.config.n_heads, self.config.n_kv_heads, self.config.head_dim)
        arrayed, norm, output = (kernel.Layer * len(layers))(*layers), self.norm.weight.data_ptr(), _matrix(self.output)
        return None if output is None else kernel.Model(arrayed, norm, output, *shape, self.config.norm_eps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTransformer:
        self.__dict__.pop("_pointers", None)  # the weights may move
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pointers"}  # a copy's are others


def whole(model: Transformer, dtype: torch.dtype | None = None) -> Transformer:
    """The model itself, or, where it is sharded over processes or compiled, a plain copy with all its weights.

    They are gathered a parameter at a time, on every rank at once, in their own type, matrices in `dtype` if that is
    given. Later changes to the model are not seen by the copy.
    """
    if not parallel.is_sharded(model) and not parallel.is_compiled(model):
        return model
    with torch.device("meta"):
        made = Transformer(model.config)
    made.rotary = model.rotary
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        full = weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()
        full = full if dtype is None or full.ndim < 2 else full.to(dtype)
        made.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(full, requires_grad=False)
    if model.config.tie_embeddings:
        made.output.weight = made.tok_embeddings.weight
    return made.eval()


def pack(model: Transformer, kind: Kind, *, group: int = 32) -> PackedTransformer:
    """A copy of a model for inference. A tensor that already has its type is shared with the model, not copied: "fp32"
    of a float32 model follows its training.

    int8 and int4 are for CPUs. A layer whose shape torch's kernel does not take stays bfloat16 and is named in `plain`;
    with int4 the head is int8. Raises ConfigError for another kind, a group torch has no kernel for, a GPU, or where
    every layer would stay.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"weights are {kind!r}: they can be {', '.join(get_args(Kind))}")
    if group not in GROUPS:
        raise ConfigError(f"a group has {group} inputs: it can have {', '.join(map(str, GROUPS))}")
    device, dtype = model.tok_embeddings.weight.device, torch.float32 if kind == "fp32" else torch.bfloat16
    if device.type != "cpu" and kind in ("int8", "int4"):
        raise ConfigError(f"{kind} weights are for CPUs: hold bf16 on {device.type}")
    with torch.device("meta"):
        packed = PackedTransformer(model.config)
    packed.rotary = model.rotary
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        if module not in linears:
            to = dtype if weight.ndim == 2 else torch.float32
            packed.get_submodule(module).weight = nn.Parameter(weight.detach().to(to), requires_grad=False)
    for name in linears:
        held: Kind = "int8" if kind == "int4" and name == "output" else kind
        packed.set_submodule(name, _linear(model.get_parameter(f"{name}.weight").detach(), held, group))
    if isinstance(packed.output, nn.Linear) and model.config.tie_embeddings:
        packed.output.weight = packed.tok_embeddings.weight
    if kind in ("int8", "int4"):
        packed.plain = tuple(name for name in linears if isinstance(packed.get_submodule(name), nn.Linear))
        if len(packed.plain) == len(linears):
            raise ConfigError(f"no layer of this model has a shape that {kind} weights can have: take bf16")
    return packed.eval()


def _linear(weight: Tensor, kind: Kind, group: int) -> nn.Module:
    """A layer that holds this weight (N, D) as `kind`, or as bfloat16 where no kernel takes its shape."""
    if kind == "int8" and Int8Linear.takes(weight):
        return Int8Linear(weight)
    if kind == "int4" and Int4Linear.takes(weight, group):
        return Int4Linear(weight, group)
    form, dtype = (nn.Linear, torch.float32) if kind == "fp32" else (BFloat16Linear, torch.bfloat16)
    made = form(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return made


def _matrix(layer: nn.Module) -> kernel.Matrix | None:
    """A layer's weight as the compiled step reads it."""
    if isinstance(layer, Int8Linear) and layer.scales.dtype == torch.float32:
        return kernel.Matrix(layer.weight.data_ptr(), layer.scales.data_ptr(), 2, *layer.weight.shape, 0)
    if isinstance(layer, Int4Linear) and layer.scales.dtype == torch.bfloat16 and _packs_in_blocks(len(layer.weight)):
        rows, columns = len(layer.weight), 2 * layer.weight.shape[1]
        return kernel.Matrix(layer.weight.data_ptr(), layer.scales.data_ptr(), 3, rows, columns, layer.group)
    if isinstance(layer, nn.Linear) and layer.weight.is_contiguous():
        kind = {torch.float32: 0, torch.bfloat16: 1}.get(layer.weight.dtype)
        return None if kind is None else kernel.Matrix(layer.weight.data_ptr(), None, kind, *layer.weight.shape, 0)
    return None


@functools.cache
def _packs_in_blocks(rows: int) -> bool:
    """Whether torch lays out 4-bit weights of so many rows as the compiled step expects it for this processor."""
    block = kernel.block()
    if rows % block:
        return False
    numbers = torch.arange(2 * block * 32, dtype=torch.int32).view(2, 2, block // 2, 32) * 7 % 16
    low, high = numbers.transpose(2, 3).unbind(1)  # (2, 32, block / 2): a block, a column, a row
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.view(2 * block, 32), 1)
    return torch.equal(packed.flatten(), (low + 16 * high).flatten().to(torch.uint8))
