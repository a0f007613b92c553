"""The expert stage: every expert, one after another, meets all tokens that were routed to it.

Shape suffixes: T tokens, K experts per token, S = T * K routed pairs sorted by expert, E experts, D hidden, F expert
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class ExpertChunk:
    """Routed pairs of experts `first .. first + len(counts)`, in expert order."""

    first: int
    counts: tuple[int, ...]  # pairs per expert
    pairs: slice  # where they are among the sorted pairs


def grouped_experts(
    module: Any,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    expert_tokens: int,
) -> torch.Tensor:
    """The experts' weighted sum for every token, `[T, D]`.

    `module` is a transformers experts module (`use_experts_implementation`): fused `gate_up_proj` or `up_proj`,
    `down_proj`, optional biases, optionally transposed. Pairs are worked off in chunks of at most `expert_tokens`, so
    the intermediate activations are bounded. A token's experts are added in the order of their ids, in float32,
    whatever else is in the pass: the sum does not depend on the batch.
    """
    top_k = expert_ids_TK.shape[1]
    ids_S, order_S = expert_ids_TK.flatten().sort(stable=True)
    tokens_S = order_S // top_k
    weights_S = weights_TK.flatten()[order_S]
    counts_E = torch.bincount(ids_S, minlength=module.num_experts)[: module.num_experts].tolist()
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    for chunk in _chunks(counts_E, expert_tokens):
        rows = tokens_S[chunk.pairs]
        answer = _expert_mlp(module, hidden_TD[rows], ids_S[chunk.pairs], chunk).float()
        answer *= weights_S[chunk.pairs, None]
        _add_rows(out_TD, rows, answer, chunk.counts)
    return out_TD.to(hidden_TD.dtype)


def _chunks(counts_E: list[int], expert_tokens: int) -> Iterator[ExpertChunk]:
    """Cuts the sorted pairs: whole experts while they fit, an expert with more tokens than that in pieces."""
    expert = start = 0
    while expert < len(counts_E):
        first, total = expert, 0
        while expert < len(counts_E) and total + counts_E[expert] <= expert_tokens:
            total += counts_E[expert]
            expert += 1
        if total:
            yield ExpertChunk(first, tuple(counts_E[first:expert]), slice(start, start + total))
            start += total
        if expert == first:
            for done in range(0, counts_E[expert], expert_tokens):
                take = min(expert_tokens, counts_E[expert] - done)
                yield ExpertChunk(expert, (take,), slice(start, start + take))
                start += take
            expert += 1


def _expert_mlp(module: Any, x_SD: torch.Tensor, ids_S: torch.Tensor, chunk: ExpertChunk) -> torch.Tensor:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    hidden_SF = _grouped_linear(module, up, x_SD, ids_S, chunk)
    hidden_SF = module._apply_gate(hidden_SF) if module.has_gate else module.act_fn(hidden_SF)
    out_SD = _grouped_linear(module, "down_proj", hidden_SF, ids_S, chunk)
    return module.post_expert_norm(out_SD) if module.has_post_expert_norm else out_SD


def _grouped_linear(
    module: Any, name: str, x_SI: torch.Tensor, ids_S: torch.Tensor, chunk: ExpertChunk
) -> torch.Tensor:
    """Each expert's linear layer on its own consecutive rows, `[S, in] -> [S, out]`."""
    weight_EIO = getattr(module, name)[chunk.first : chunk.first + len(chunk.counts)]
    if not module.is_transposed:
        weight_EIO = weight_EIO.transpose(1, 2)
    offsets_E = torch.tensor(chunk.counts, device=x_SI.device).cumsum(0).to(torch.int32)
    if x_SI.dtype in (torch.float32, torch.bfloat16):
        out_SO = F.grouped_mm(x_SI, weight_EIO, offs=offsets_E)
    else:
        out_SO = torch.cat([x @ w for x, w in zip(x_SI.split(chunk.counts), weight_EIO, strict=True)])
    if module.has_bias:
        out_SO += getattr(module, f"{name}_bias")[ids_S]
    return out_SO


def _add_rows(out_TD: torch.Tensor, rows_S: torch.Tensor, answer_SD: torch.Tensor, counts: tuple[int, ...]) -> None:
    if out_TD.device.type == "cpu":
        out_TD.index_add_(0, rows_S, answer_SD)  # adds row after row: in expert order
        return
    for rows, answer in zip(rows_S.split(counts), answer_SD.split(counts), strict=True):
        out_TD.index_add_(0, rows, answer)  # one expert has a token at most once: no two adds race
