"""Which tokens each expert meets: the routed pairs of a pass, sorted by expert.

On a CPU they are sorted by counting, by a kernel compiled with Numba at first use: torch's sort takes twenty times as
long. On other devices torch does it.

Shape suffixes: T tokens, K experts per token, S = T * K routed pairs, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import torch

from moegen.ops.kernel_cache import lock_kernel_cache

Ints = npt.NDArray[np.int64]

lock_kernel_cache()


@dataclass(frozen=True, slots=True)
class Routing:
    """The pairs, expert after expert, an expert's in the order of their tokens."""

    counts_E: Ints  # pairs of each expert
    starts_E1: Ints  # where each expert's pairs begin, and where the last one's end
    tokens_S: torch.Tensor
    ids_S: torch.Tensor
    weights_S: torch.Tensor  # float32 on a CPU
    places_TK: torch.Tensor  # of a token's pairs among them, in the order of its experts

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, experts: int) -> Routing:
        """Pairs of an id that is no expert's, `experts` or above, are the last ones and no expert's."""
        if expert_ids_TK.device.type == "cpu":
            ids, weights = expert_ids_TK.contiguous().numpy(), weights_TK.float().contiguous().numpy()
            counts_E, starts_E1, *sorted_pairs = _sorted_by_counting(ids, weights, experts)
            return cls(counts_E, starts_E1, *map(torch.from_numpy, sorted_pairs))
        return cls._by_torch(expert_ids_TK, weights_TK, experts)

    @classmethod
    def _by_torch(cls, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, experts: int) -> Routing:
        ids_S, order_S = expert_ids_TK.flatten().sort(stable=True)
        places_S = torch.empty_like(order_S)
        places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        places_TK = places_S.view(expert_ids_TK.shape).sort(dim=1).values
        counts_E = torch.bincount(ids_S, minlength=experts)[:experts].cpu().numpy()
        tokens_S, weights_S = order_S // expert_ids_TK.shape[1], weights_TK.flatten()[order_S]
        return cls(counts_E, np.append(0, counts_E).cumsum(), tokens_S, ids_S, weights_S, places_TK)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _sorted_by_counting(ids_TK, weights_TK, experts):  # type: ignore[no-untyped-def]
    """What `Routing` has, in its order. One thread has it done before a second one has woken."""
    tokens, top_k = ids_TK.shape
    counts = np.zeros(experts + 1, np.int64)  # the last are no expert's
    for t in range(tokens):
        for k in range(top_k):
            counts[min(ids_TK[t, k], experts)] += 1
    starts = np.cumsum(counts) - counts
    following = starts.copy()
    tokens_S, ids_S = np.empty(tokens * top_k, np.int64), np.empty(tokens * top_k, np.int64)
    weights_S, places_TK = np.empty(tokens * top_k, np.float32), np.empty((tokens, top_k), np.int64)
    for t in range(tokens):
        for k in range(top_k):
            expert = min(ids_TK[t, k], experts)
            place = following[expert]
            following[expert] += 1
            tokens_S[place], ids_S[place], weights_S[place] = t, ids_TK[t, k], weights_TK[t, k]
            at = k
            while at and places_TK[t, at - 1] > place:
                places_TK[t, at] = places_TK[t, at - 1]
                at -= 1
            places_TK[t, at] = place
    return counts[:experts], starts, tokens_S, ids_S, weights_S, places_TK
