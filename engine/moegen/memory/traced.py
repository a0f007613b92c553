"""Tensors that are not read yet and remember how they are made of stored ones.

transformers' own loader is run over `Traced` tensors in the place of a checkpoint's: what it does to them (stack, cat,
transpose, ...) is done to shapes alone, on the meta device, and recorded. Afterwards each parameter of the model is
either read and made by replaying what was recorded, or, where only whole blocks were moved, known as `Block`s of the
files, so that any part of it can be read straight into its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from moegen.coding import CodedTensor
from moegen.shape import StoredTensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

Read = Callable[[StoredTensor | CodedTensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a traced tensor, filled from one stored tensor: element `i` of the box is at `start + i @ strides`."""

    origin: tuple[int, ...]  # where the box begins in the traced tensor
    shape: tuple[int, ...]
    stored: StoredTensor | CodedTensor
    start: int  # elements into the stored tensor
    strides: tuple[int, ...]  # elements

    def cut(self, dim: int, first: int, end: int) -> Block | None:
        """What of the box lies in `first .. end` of `dim`, seen from `first`."""
        low = max(first, self.origin[dim])
        high = min(end, self.origin[dim] + self.shape[dim])
        if low >= high:
            return None
        skipped = (low - self.origin[dim]) * self.strides[dim]
        return replace(
            self,
            origin=_set(self.origin, dim, low - first),
            shape=_set(self.shape, dim, high - low),
            start=self.start + skipped,
        )

    def moved(self, dim: int, by: int) -> Block:
        return replace(self, origin=_set(self.origin, dim, self.origin[dim] + by))

    def swapped(self, a: int, b: int) -> Block:
        return replace(
            self,
            origin=_swap(self.origin, a, b),
            shape=_swap(self.shape, a, b),
            strides=_swap(self.strides, a, b),
        )

    def with_dim(self, dim: int, at: int) -> Block:
        return replace(
            self,
            origin=(*self.origin[:dim], at, *self.origin[dim:]),
            shape=(*self.shape[:dim], 1, *self.shape[dim:]),
            strides=(*self.strides[:dim], 0, *self.strides[dim:]),
        )


class Traced(torch.Tensor):
    """A tensor on the meta device that knows its making. Made by `trace` and by functions of traced tensors.

    Attributes:
        blocks: what it is made of, if only whole blocks of stored tensors were moved; else None.
    """

    blocks: tuple[Block, ...] | None
    _make: Callable[[Read], torch.Tensor]

    def realise(self, read: Read) -> torch.Tensor:
        """The tensor itself: `read` gives the stored ones."""
        return self._make(read)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            args, kwargs = args[:1], {"dtype": _wanted_dtype(args, kwargs)}  # it is on no device yet
            if args[0].dtype == kwargs["dtype"]:
                return args[0]
        if func is torch.Tensor.__getitem__ and args[1] is ...:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, tuple | list) and result and all(type(item) is torch.Tensor for item in result):
            return type(result)(
                _traced(item, _blocks(func, args, kwargs, index), _replay(func, args, kwargs, index))
                for index, item in enumerate(result)
            )
        if type(result) is torch.Tensor and result.is_meta:
            return _traced(result, _blocks(func, args, kwargs, 0), _replay(func, args, kwargs, None))
        return result


def trace(stored: StoredTensor | CodedTensor) -> Traced:
    """A stored tensor that is not read; a coded one has the dtype of its values, and lies as the model has it."""
    dtype = torch.float32 if isinstance(stored, CodedTensor) else DTYPES[stored.dtype]
    tensor = torch.empty(stored.shape, dtype=dtype, device="meta")
    block = Block((0,) * tensor.dim(), stored.shape, stored, 0, tensor.stride())
    traced = _traced(tensor, (block,), lambda read: read(stored))
    if isinstance(stored, CodedTensor) and stored.transposed:
        return cast(Traced, traced.transpose(-1, -2))
    return traced


def _traced(tensor: torch.Tensor, blocks: tuple[Block, ...] | None, make: Any) -> Traced:
    traced = tensor.as_subclass(Traced)
    traced.blocks, traced._make = blocks, make
    return traced


def _wanted_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    given = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
    return given[0] if given else args[0].dtype


def _replay(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int | None) -> Any:
    def make(read: Read) -> torch.Tensor:
        def real(value: Any) -> Any:
            if isinstance(value, Traced):
                return value.realise(read)
            return type(value)(map(real, value)) if isinstance(value, tuple | list) else value

        result = func(*map(real, args), **{name: real(value) for name, value in kwargs.items()})
        return result if index is None else result[index]

    return make


# How functions move blocks ------------------------------------------------------------------------------------------


def _blocks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> tuple[Block, ...] | None:
    """The blocks of result `index`; None when the function is not known to move whole blocks."""
    rule = _RULES.get(func)
    return rule(index, *args, **kwargs) if rule else None


def _same(index: int, x: Traced, *args: Any, **kwargs: Any) -> tuple[Block, ...] | None:
    return x.blocks


def _stack(index: int, tensors: list[Traced], dim: int = 0) -> tuple[Block, ...] | None:
    if any(not isinstance(t, Traced) or t.blocks is None for t in tensors):
        return None
    dim %= tensors[0].dim() + 1
    return tuple(block.with_dim(dim, at) for at, tensor in enumerate(tensors) for block in tensor.blocks or ())


def _cat(index: int, tensors: list[Traced], dim: int = 0) -> tuple[Block, ...] | None:
    if any(not isinstance(t, Traced) or t.blocks is None for t in tensors):
        return None
    dim, at, blocks = dim % tensors[0].dim(), 0, []
    for tensor in tensors:
        blocks += [block.moved(dim, at) for block in tensor.blocks or ()]
        at += tensor.shape[dim]
    return tuple(blocks)


def _transpose(index: int, x: Traced, dim0: int, dim1: int) -> tuple[Block, ...] | None:
    if x.blocks is None:
        return None
    return tuple(block.swapped(dim0 % x.dim(), dim1 % x.dim()) for block in x.blocks)


def _chunk(index: int, x: Traced, chunks: int, dim: int = 0) -> tuple[Block, ...] | None:
    if x.blocks is None:
        return None
    size = -(-x.shape[dim] // chunks)
    cuts = (block.cut(dim % x.dim(), index * size, (index + 1) * size) for block in x.blocks)
    return tuple(block for block in cuts if block is not None)


_RULES: dict[Any, Callable[..., tuple[Block, ...] | None]] = {
    torch.Tensor.to: _same,
    torch.Tensor.contiguous: _same,
    torch.Tensor.detach: _same,
    torch.stack: _stack,
    torch.cat: _cat,
    torch.transpose: _transpose,
    torch.Tensor.transpose: _transpose,
    torch.chunk: _chunk,
    torch.Tensor.chunk: _chunk,
}


def _set(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _swap(values: tuple[int, ...], a: int, b: int) -> tuple[int, ...]:
    items = list(values)
    items[a], items[b] = items[b], items[a]
    return tuple(items)
