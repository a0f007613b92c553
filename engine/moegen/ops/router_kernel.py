"""Which experts a token goes to, on the CPU: the few highest of a row, one row after another, each read once.

torch partially sorts every row, and takes ten times as long. Compiled by Numba at first use.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import threads_for

lock_kernel_cache()


def top_experts(logits_TE: torch.Tensor, top_k: int, among_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` highest logits of each row: their weights `[T, K]`, float32, the highest first, and their ids.

    Weights are their share of the softmax over all experts, or (`among_all` false) over those K alone. Of equal
    logits the one with the lower id comes first. A row in which something is not a number has no other weights.
    """
    tokens, experts = logits_TE.shape
    weights_TK, ids_TK = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int64)
    threads = threads_for(tokens * experts)
    _top_experts(logits_TE.contiguous().numpy(), among_all, weights_TK.numpy(), ids_TK.numpy(), threads)
    return weights_TK, ids_TK


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _top_experts(logits_TE, among_all, weights_TK, ids_TK, threads):  # type: ignore[no-untyped-def]
    tokens, top_k = weights_TK.shape
    for thread in numba.prange(threads):
        for token in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            logits_E, weights_K, ids_K = logits_TE[token], weights_TK[token], ids_TK[token]
            for e in range(len(logits_E)):
                logit, k = logits_E[e], min(e, top_k - 1)
                if e < top_k or logit > weights_K[k]:
                    while k > 0 and logit > weights_K[k - 1]:
                        weights_K[k], ids_K[k] = weights_K[k - 1], ids_K[k - 1]
                        k -= 1
                    weights_K[k], ids_K[k] = logit, e
            _to_shares(logits_E, among_all, weights_K)


@numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _to_shares(logits_E, among_all, weights_K):  # type: ignore[no-untyped-def]
    """`weights`, the highest logits, become shares of the softmax."""
    highest, total = weights_K[0], numba.float32(0)
    for e in range(len(logits_E)):
        if not logits_E[e] <= highest:  # no number at all
            total = numba.float32(np.nan)
        if among_all:
            total += math.exp(logits_E[e] - highest)
    for k in range(len(weights_K)):
        weights_K[k] = math.exp(weights_K[k] - highest)
        if not among_all:
            total += weights_K[k]
    for k in range(len(weights_K)):
        weights_K[k] = weights_K[k] / total
