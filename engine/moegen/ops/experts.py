"""The expert stage: every expert, one after another, meets all tokens that were routed to it.

Shape suffixes: T tokens, K experts per token, S = T * K routed pairs sorted by expert, E experts, D hidden, F expert
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moegen.ops.expert_kernel import add_weighted_rows
from moegen.ops.expert_weights import UP, ExpertGroup, ExpertSupply
from moegen.ops.threads import numba_threads


@dataclass(frozen=True, slots=True)
class ExpertChunk:
    """Routed pairs of experts `first .. first + len(counts)` of a group, in expert order."""

    counts: tuple[int, ...]  # pairs per expert of the group
    pairs: slice  # where they are among the sorted pairs


def grouped_experts(
    module: Any,
    supply: ExpertSupply,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    expert_tokens: int,
) -> torch.Tensor:
    """The experts' weighted sum for every token, `[T, D]`.

    `module` is a transformers experts module (`use_experts_implementation`), which knows the activation and the biases;
    `supply` lends its weights, group by group. Pairs are worked off in chunks of at most `expert_tokens`, so the
    intermediate activations are bounded. A token's experts are added in the order of their ids, in float32, whatever
    else is in the pass: the sum does not depend on the batch.
    """
    top_k = expert_ids_TK.shape[1]
    ids_S, order_S = expert_ids_TK.flatten().sort(stable=True)
    tokens_S = order_S // top_k
    weights_S = weights_TK.flatten()[order_S]
    counts_E = torch.bincount(ids_S, minlength=module.num_experts)[: module.num_experts].tolist()
    starts_E = [0, *torch.tensor(counts_E).cumsum(0).tolist()]
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    laid_TD = hidden_TD
    for group in supply.lend(counts_E):
        laid_TD = group.up.lay_out(laid_TD)
        own_E = counts_E[group.first : group.first + group.experts]
        for chunk in _chunks(own_E, starts_E[group.first], expert_tokens):
            rows = tokens_S[chunk.pairs]
            answer = _expert_mlp(module, group, laid_TD, rows, ids_S[chunk.pairs], chunk.counts)
            _add_rows(out_TD, rows, weights_S[chunk.pairs], answer, chunk.counts)
    return out_TD.to(hidden_TD.dtype)


def _chunks(counts: list[int], start: int, expert_tokens: int) -> Iterator[ExpertChunk]:
    """Cuts a group's pairs, which begin at `start`, into chunks of at most `expert_tokens`."""
    taken = [0] * len(counts)
    total = 0
    for expert, count in enumerate(counts):
        while count:
            take = min(count, expert_tokens - total)
            taken[expert] = take
            total, count = total + take, count - take
            if total == expert_tokens:
                yield ExpertChunk(tuple(taken), slice(start, start + total))
                start, taken, total = start + total, [0] * len(counts), 0
    if total:
        yield ExpertChunk(tuple(taken), slice(start, start + total))


def _expert_mlp(
    module: Any, group: ExpertGroup, hidden_TD: torch.Tensor, tokens_S: torch.Tensor, ids_S: torch.Tensor,
    counts: tuple[int, ...],
) -> torch.Tensor:  # fmt: skip
    hidden_SF = group.up.linear(hidden_TD, counts, tokens_S)
    if module.has_bias:
        hidden_SF += getattr(module, f"{UP[module.has_gate]}_bias")[ids_S]
    hidden_SF = module._apply_gate(hidden_SF) if module.has_gate else module.act_fn(hidden_SF)
    out_SD = group.down.linear(hidden_SF, counts)
    if module.has_bias:
        out_SD += module.down_proj_bias[ids_S]
    return module.post_expert_norm(out_SD) if module.has_post_expert_norm else out_SD


def _add_rows(
    out_TD: torch.Tensor, tokens_S: torch.Tensor, weights_S: torch.Tensor, answer_SD: torch.Tensor,
    counts: tuple[int, ...],
) -> None:  # fmt: skip
    """Adds in float32, expert after expert."""
    if out_TD.device.type == "cpu":
        with numba_threads() as threads:
            add_weighted_rows(
                out_TD.numpy(), tokens_S.numpy(), weights_S.float().numpy(), answer_SD.float().numpy(), threads
            )
        return
    answer_SD = answer_SD.float() * weights_S[:, None]
    for tokens, answer in zip(tokens_S.split(counts), answer_SD.split(counts), strict=True):
        out_TD.index_add_(0, tokens, answer)  # one expert has a token at most once: no two adds race
