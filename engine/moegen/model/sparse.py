"""Sparse attention by an indexer (DeepSeek-V3.2, arXiv 2512.02556): each token attends to the few that score highest.

An indexer keeps a small key of every token, in pages of its own; its forward, transformers' own, scores them and hands
on the positions of the best. To attention functions other than transformers' own they come as `indices`, so the choice
reaches `moegen.ops.attention` without a mask of all pairs.

Sequences are scored one after another, for each has other keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moegen.memory.kv_pool import KVShape
from moegen.ops.kv_pages import LayerPages
from moegen.schedule.step import AttentionBatch, Span


class Unmasked:
    """Stands for the mask that attention modules with an indexer cut a piece of; the engine keeps causality itself."""

    def __getitem__(self, index: object) -> Unmasked:
        return self


class IndexView:
    """What an indexer takes for its cache: its sequence's keys, the new ones among them."""

    def __init__(self, keys_of: Any) -> None:
        self._keys_of = keys_of

    def update_indexer(self, new_1nD: torch.Tensor, layer_idx: int) -> torch.Tensor:
        keys: torch.Tensor = self._keys_of(new_1nD)
        return keys


class PagedIndexer(nn.Module):
    """Takes an indexer's place.

    Attributes:
        current: the pass, or the micro-batch of it, in which the module is called: see `moegen.model.recurrent`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.current: Any = None
        self._names = list(inspect.signature(module.forward).parameters)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        chosen: torch.Tensor = self.current.choose(self, given)
        return chosen

    def one_token(self, given: Mapping[str, Any]) -> tuple[KVShape, torch.Tensor]:
        """What the module keeps of a token, and its choice where there is only that one."""
        kept: list[torch.Tensor] = []

        def keep(new_11D: torch.Tensor) -> torch.Tensor:
            kept.append(new_11D)
            return new_11D

        chosen = self._score(given, torch.ones(1, 1, dtype=torch.bool, device=_device(given)), keep)
        return KVShape(1, kept[0].shape[-1], 0, latent=True), chosen

    def choose(self, given: Mapping[str, Any], pages: LayerPages, batch: AttentionBatch) -> torch.Tensor:
        """Of each of the micro-batch's T tokens the positions that it attends to, `[1, T, K]`."""
        found = [self._of_span(given, pages, batch, span) for span in batch.spans]
        most = max(chosen.shape[-1] for chosen in found)
        return torch.cat([as_wide(chosen, most) for chosen in found], dim=1)

    def _of_span(self, given: Mapping[str, Any], pages: LayerPages, batch: AttentionBatch, span: Span) -> torch.Tensor:
        own = slice(span.first, span.first + span.length)
        alone = AttentionBatch(0, span.length, (span,), batch.write_pages[own], batch.write_slots[own])

        def keep(new_1nD: torch.Tensor) -> torch.Tensor:
            keys_n1D = new_1nD[0][:, None]
            pages.write(keys_n1D, keys_n1D[..., :0], alone)
            return pages.gather(span, 0)[0].to(new_1nD)

        before = span.kv_length - span.length
        visible_nL = torch.ones(span.length, span.kv_length, dtype=torch.bool, device=_device(given)).tril(before)
        return self._score({name: cut(value, own, batch.length) for name, value in given.items()}, visible_nL, keep)

    def _score(self, given: Mapping[str, Any], visible_nL: torch.Tensor, keep: Any) -> torch.Tensor:
        chosen: torch.Tensor = self.module(
            **{**given, "attention_mask": visible_nL[None], "past_key_values": IndexView(keep)}
        )
        return chosen.long()


def place_indexers(model: nn.Module) -> list[PagedIndexer]:
    """Puts a `PagedIndexer` in the place of every indexer that keeps keys of its own."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _keeps_keys(child)
    ]
    for parent, name, child in places:
        setattr(parent, name, PagedIndexer(child))
    return [module for module in model.modules() if isinstance(module, PagedIndexer)]


def unmask(model: nn.Module) -> None:
    """Modules that cut a piece of their mask for an indexer get one to cut, where the engine gives none."""
    for module in model.modules():
        if hasattr(module, "indexer"):
            module.register_forward_pre_hook(_give_mask, with_kwargs=True)


def _give_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    return args, {**kwargs, "attention_mask": Unmasked() if mask is None else mask}


def cut(value: Any, own: slice, tokens: int) -> Any:
    """Per-token arguments (`[1, T, ...]`: hidden states, rotary embeddings) cut to some of the tokens."""
    if isinstance(value, (tuple, list)):
        return type(value)(cut(item, own, tokens) for item in value)
    if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[1] == tokens:
        return value[:, own]
    return value


def _keeps_keys(module: nn.Module) -> bool:
    functions = (inspect.unwrap(f) for f in vars(type(module)).values() if callable(f) and not isinstance(f, type))
    return any("update_indexer" in f.__code__.co_names for f in functions if hasattr(f, "__code__"))


def as_wide(chosen_1nk: torch.Tensor, most: int) -> torch.Tensor:
    """A choice of fewer names one of them again."""
    return torch.cat([chosen_1nk, chosen_1nk[..., :1].expand(-1, -1, most - chosen_1nk.shape[-1])], dim=-1)


def _device(given: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in given.values() if isinstance(value, torch.Tensor))
