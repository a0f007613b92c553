"""The expert stage: every expert, one after another, meets all tokens that were routed to it.

Shape suffixes: T tokens, K experts per token, S = T * K routed pairs sorted by expert, E experts, D hidden, F expert
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from moegen.ops.expert_kernel import add_weighted_rows
from moegen.ops.expert_weights import UP, ExpertGroup, ExpertSupply, empty_rows, with_gaps
from moegen.ops.gate_kernel import silu_gated
from moegen.ops.micro_batch import MicroBatch
from moegen.ops.routing import Ints, Routing
from moegen.ops.threads import numba_threads


def grouped_experts(
    module: Any,
    supply: ExpertSupply,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    expert_tokens: int | MicroBatch,
) -> torch.Tensor:
    """The experts' weighted sum for every token, `[T, D]`.

    `module` is a transformers experts module (`use_experts_implementation`), which knows the activation and the biases;
    `supply` lends its weights, group by group. Pairs are worked off in chunks of at most `expert_tokens`, so the
    intermediate activations are bounded; in smaller ones where the device has no room. A token's experts are added in
    the order of their ids, in float32, whatever else is in the pass: the sum does not depend on the batch.
    """
    routing = Routing.of(expert_ids_TK, weights_TK, module.num_experts)
    out_TD = empty_rows(hidden_TD, torch.float32)
    at_once, laid_TD = MicroBatch.of(expert_tokens, "expert"), hidden_TD
    for group in supply.lend(routing.counts_E):
        laid_TD = group.up.lay_out(laid_TD)
        starts_E1 = routing.starts_E1[group.first : group.first + group.experts + 1]
        done, end = int(starts_E1[0]), int(starts_E1[-1])
        while done < end:
            work = partial(_answer, module, group, laid_TD, routing, starts_E1, done, out_TD)
            chunk, answer_SD = at_once.run(work, end - done)
            if answer_SD is not None:
                _add_rows(out_TD, routing, chunk, answer_SD)
            done = chunk.pairs.stop
    return (out_TD if routing.starts_E1[-1] else out_TD.zero_()).to(hidden_TD.dtype)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some of the routed pairs of a group's experts, in expert order."""

    counts: Ints  # pairs per expert of the group
    pairs: slice  # where they are among the sorted pairs


def _answer(
    module: Any, group: ExpertGroup, hidden_TD: torch.Tensor, routing: Routing, starts_E1: Ints, first: int,
    out_TD: torch.Tensor, most: int,
) -> tuple[_Chunk, torch.Tensor | None]:  # fmt: skip
    """The next `most` pairs from `first` on, and what the group's experts answer to them; None: it is in `out`.

    Nothing is added there but at the very end, since what a device has no room for begins anew (`MicroBatch.run`).
    """
    end = min(first + most, int(starts_E1[-1]))
    chunk = _Chunk(np.diff(starts_E1.clip(first, end)), slice(first, end))
    tokens_S, ids_S, weights_S = (own[chunk.pairs] for own in (routing.tokens_S, routing.ids_S, routing.weights_S))
    hidden_SF = _hidden(module, group, hidden_TD, tokens_S, ids_S, chunk.counts)
    has_norm = getattr(module, "has_post_expert_norm", False)  # transformers before 5.20 has no such experts
    plain = not module.has_bias and not has_norm
    if plain and group.down.add_to(out_TD, hidden_SF, chunk.counts, tokens_S, weights_S, anew=first == 0):
        return chunk, None
    out_SD = group.down.linear(hidden_SF, chunk.counts)
    if module.has_bias:
        out_SD += module.down_proj_bias[ids_S]
    if has_norm:
        out_SD = module.post_expert_norm(out_SD)
    if out_SD.device.type != "cpu":  # a CPU's kernel weights rows as it adds them
        out_SD = out_SD.float() * weights_S[:, None]
    return chunk, out_SD


def _hidden(
    module: Any, group: ExpertGroup, hidden_TD: torch.Tensor, tokens_S: torch.Tensor, ids_S: torch.Tensor,
    counts: Ints,
) -> torch.Tensor:  # fmt: skip
    """The rows of the second projection; in its dtype where our kernel makes them, at once if it can."""
    row_dtype, by_kernel = group.down.row_dtype, module.has_gate and module._apply_gate is silu_gated
    if by_kernel and not module.has_bias:
        rows_SF = group.up.gated(hidden_TD, counts, tokens_S, row_dtype)
        if rows_SF is not None:
            return rows_SF
    hidden_SF = group.up.linear(hidden_TD, counts, tokens_S)
    if module.has_bias:
        hidden_SF += getattr(module, f"{UP[module.has_gate]}_bias")[ids_S]
    if by_kernel:
        return silu_gated(hidden_SF, row_dtype)
    return module._apply_gate(hidden_SF) if module.has_gate else module.act_fn(hidden_SF)


def _add_rows(out_TD: torch.Tensor, routing: Routing, chunk: _Chunk, answer_SD: torch.Tensor) -> None:
    """Adds in float32, expert after expert, the first pairs to 0; `answer_SD` is weighted already but on a CPU."""
    if out_TD.device.type == "cpu":
        weights_S, places_TK = routing.weights_S.numpy(), routing.places_TK.numpy()
        threads = numba_threads()
        answer_SW = with_gaps(answer_SD.float())
        out, features = with_gaps(out_TD).numpy(), out_TD.shape[1]
        add_weighted_rows(out, features, places_TK, weights_S, answer_SW.numpy(), chunk.pairs.start, threads)
        return
    if chunk.pairs.start == 0:
        out_TD.zero_()
    tokens_S = routing.tokens_S[chunk.pairs]
    counts = chunk.counts.tolist()
    for tokens, answer in zip(tokens_S.split(counts), answer_SD.split(counts), strict=True):
        out_TD.index_add_(0, tokens, answer)  # one expert has a token at most once: no two adds race
