"""Where keys and values live: per layer, one tensor of pages for keys and one for values, or one for latents.

Pages of int8 have a tensor of scales beside each. Layers of different groups (`moegen.schedule.pages`) share tensors:
which group's layer a page is of, its id says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moegen.errors import SpecError
from moegen.ops.host_memory import host_zeros, make_present
from moegen.ops.hosted_attention import HostedAttention
from moegen.ops.kv_pages import CodedPages, LatentPages, LayerPages
from moegen.schedule.pages import LayerGroup, layer_groups


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer keeps per token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False  # one KV head, whose value is the first `value_dim` elements of its key
    window: int | None = None  # a query sees itself and the `window - 1` tokens before it

    @property
    def elements_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + (0 if self.latent else self.value_dim))


def groups_of(shapes: Iterable[KVShape]) -> tuple[LayerGroup, ...]:
    """The groups of these layers; a single one, which keeps all tokens, unless all keep as much of a token."""
    kept = list(shapes)
    alike = len({replace(shape, window=None) for shape in kept}) <= 1
    return layer_groups([shape.window if alike else None for shape in kept])


class KVPool:
    """Pages of every layer, under whatever names the layer. A page id means the same tokens in each layer of a group.

    Attributes:
        layers: the pages of each.
        group_of: the group of each.
        hosted: how the device that computes reaches the pages, where they are on the host and it is not; else None.
    """

    def __init__(
        self, shapes: Mapping[Any, KVShape], pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device,
        hosted: HostedAttention | None = None, groups: Sequence[LayerGroup] = (),
    ) -> None:  # fmt: skip
        """`device` has the pages: the host, if `hosted` is given. `dtype` may be int8, but not for latents.

        `groups`: of layers, in the order of `shapes`; none: all are one.

        Raises:
            SpecError: int8 of what is not kept so.
        """
        self.hosted = hosted
        self.layers: dict[Any, LayerPages] = {}
        self.group_of: dict[Any, int] = {}
        names, tables = list(shapes), dict[int, LayerPages]()
        for number, group in enumerate(groups or [LayerGroup(None, tuple(range(len(names))))]):
            for place, layer in enumerate(group.layers):
                if place not in tables:
                    tables[place] = _layer(shapes[names[layer]], pages, page_tokens, dtype, device)
                self.layers[names[layer]], self.group_of[names[layer]] = tables[place], number

    def make_present(self, pages: int, threads: int) -> None:
        """The memory of the first pages of every layer, where it is the host's: the ledger gives those first."""
        shared = {id(layer): layer for layer in self.layers.values()}
        tables = [table[:pages] for layer in shared.values() for table in layer.tables]
        make_present([table for table in tables if table.device.type == "cpu"], threads)


def _layer(shape: KVShape, pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device) -> LayerPages:
    keys = _pages((pages, shape.kv_heads, page_tokens, shape.key_dim), dtype, device)
    if shape.latent:
        if dtype == torch.int8:
            raise SpecError(
                "engine.plan.kv_dtype: 'int8' is for keys and values of heads, and this model keeps latents or an "
                "indexer's keys; leave it out"
            )
        return LatentPages.of(keys, shape.value_dim)
    values = _pages((pages, shape.kv_heads, page_tokens, shape.value_dim), dtype, device)
    if dtype != torch.int8:
        return LayerPages(keys, values)
    scales = (_pages((pages, shape.kv_heads, page_tokens), torch.float32, device) for _ in range(2))
    return CodedPages(keys, values, *scales)


def _pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Only what was written is ever read; on a host, pages that are never used cost no memory."""
    return host_zeros(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
