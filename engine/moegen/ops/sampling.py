"""From logits to tokens: vectorised over rows, each with its own parameters.

The random draw for a row's token is a pure function of (seed, row, which of its answers, position), so an answer does
not depend on batch, order, preemption or restart. A token is the inverse of the filtered distribution's cumulative sum
at that draw.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence as Rows

import numpy as np
import torch
import torch.nn.functional as F

from moegen.answer.grammar import Bits
from moegen.schedule.sequence import Sequence
from moegen.spec import Sampling


def uniform(seed: int, row_index: int, position: int, sample: int = 0) -> float:
    """A draw in [0, 1) with 53 random bits, from a hash of its coordinates. `sample`: which of the row's answers."""
    digest = hashlib.blake2b(struct.pack("<QQQQ", seed, row_index, sample, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@torch.inference_mode()
def sample(logits_SV: torch.Tensor, sequences: Rows[Sequence], masks_SB: Bits | None = None) -> list[int]:
    """The next token id of each sequence, from its logits `[S, V]` (any dtype; worked on in float32).

    `masks_SB` has a bit for every token, the lowest first: only tokens whose bit is set can be drawn.
    """
    logits_SV = _penalise(logits_SV.float(), sequences)
    if masks_SB is not None:
        logits_SV = logits_SV.masked_fill(_forbidden(masks_SB, logits_SV), -math.inf)
    tokens = _highest(logits_SV)
    drawn = [i for i, s in enumerate(sequences) if s.request.params.temperature > 0]
    if drawn:
        own = [sequences[i] for i in drawn]
        tokens[torch.tensor(drawn, device=tokens.device)] = _draw(logits_SV[drawn], own)
    return tokens.tolist()


_BLOCK = 64  # tokens of which the highest is found first


def _highest(logits_SV: torch.Tensor) -> torch.Tensor:
    """`logits.argmax(dim=-1)`: on CPUs torch finds where the highest is three times as slowly as how high it is."""
    if logits_SV.device.type != "cpu" or logits_SV.shape[1] % _BLOCK:
        return logits_SV.argmax(dim=-1)
    logits_SBb = logits_SV.unflatten(1, (-1, _BLOCK))
    block_S = logits_SBb.amax(dim=-1).argmax(dim=-1)
    return block_S * _BLOCK + logits_SBb[torch.arange(len(block_S)), block_S].argmax(dim=-1)


def _forbidden(masks_SB: Bits, logits_SV: torch.Tensor) -> torch.Tensor:
    """`[S, V]` of bool: the tokens whose bit is not set, or that have no bit."""
    vocabulary, device = logits_SV.shape[1], logits_SV.device
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(masks_SB, axis=1, count=vocabulary, bitorder="little")) == 0
    return unpacked(torch.from_numpy(np.ascontiguousarray(masks_SB)).to(device), vocabulary) == 0


def unpacked(masks_SB: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """`[S, V]` of 0 where a token's bit is not set, or where it has none. For devices: an eighth crosses the link."""
    powers = 1 << torch.arange(8, device=masks_SB.device, dtype=torch.uint8)
    bits_SV = (masks_SB[:, :, None] & powers).flatten(1)[:, :vocabulary]
    return F.pad(bits_SV, (0, vocabulary - bits_SV.shape[1]))


def _penalise(logits_SV: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Divides positive and multiplies negative logits of seen tokens (Keskar et al. 2019, CTRL)."""
    if all(sequence.request.params.repetition_penalty == 1 for sequence in sequences):
        return logits_SV
    logits_SV = logits_SV.clone()
    for row_V, sequence in zip(logits_SV, sequences, strict=True):
        penalty = sequence.request.params.repetition_penalty
        if penalty != 1:
            seen = torch.tensor(sequence.tokens, device=row_V.device).unique()
            scores = row_V[seen]
            row_V[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits_SV


def _draw(logits_SV: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    params = [s.request.params for s in sequences]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_SV.device)[:, None]

    probs_SV = (logits_SV / column([p.temperature for p in params])).softmax(dim=-1)
    if any(p.min_p > 0 for p in params):
        floor_S1 = probs_SV.amax(dim=-1, keepdim=True) * column([p.min_p for p in params])
        probs_SV = probs_SV.masked_fill(probs_SV < floor_S1, 0)
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        probs_SV = _keep_top(probs_SV, params)
    cumulative_SV = probs_SV.double().cumsum(dim=-1)
    draws = [uniform(s.request.params.seed, s.request.row_index, len(s.tokens), s.request.sample) for s in sequences]
    targets_S1 = torch.tensor(draws, dtype=torch.float64, device=logits_SV.device)[:, None] * cumulative_SV[:, -1:]
    # The first token whose cumulative probability exceeds the target; it always has probability above 0.
    return torch.searchsorted(cumulative_SV, targets_S1, right=True)[:, 0].clamp(max=logits_SV.shape[1] - 1)


def _keep_top(probs_SV: torch.Tensor, params: Rows[Sampling]) -> torch.Tensor:
    """Zeroes what top_k and then top_p leave out; ties are broken by token id, lower first."""
    vocabulary = probs_SV.shape[1]
    sorted_SV, ids_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(vocabulary, device=probs_SV.device)
    top_k_S1 = torch.tensor([p.top_k or vocabulary for p in params], device=probs_SV.device)[:, None]
    sorted_SV = sorted_SV.masked_fill(ranks_V >= top_k_S1, 0)
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV  # probability of the better tokens
    top_p_S1 = torch.tensor([p.top_p for p in params], dtype=torch.float32, device=probs_SV.device)[:, None]
    total_S1 = sorted_SV.sum(dim=-1, keepdim=True)
    cut_SV = (before_SV >= top_p_S1 * total_S1) & (top_p_S1 < 1)
    sorted_SV = sorted_SV.masked_fill(cut_SV, 0)
    return torch.zeros_like(probs_SV).scatter(-1, ids_SV, sorted_SV)
