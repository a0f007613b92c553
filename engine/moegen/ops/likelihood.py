"""What the model thinks of tokens: log-probabilities from raw logits, before masks, penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from moegen.schedule.sequence import Sequence, TokenLogprob


@torch.inference_mode()
def rate_continuations(logits_SV: torch.Tensor, scored: Rows[tuple[Sequence, int]]) -> None:
    """Tells each sequence's scoring what the logits `[S, V]` at its position make of the continuations' next tokens."""
    found = [
        (row, token_id, sequence.scoring, position, index)
        for row, (sequence, position) in enumerate(scored)
        if sequence.scoring is not None
        for index, token_id in sequence.scoring.targets(position)
    ]
    rows = torch.tensor([row for row, *_ in found], device=logits_SV.device)
    token_ids = torch.tensor([token_id for _, token_id, *_ in found], device=logits_SV.device)
    log_probs = logits_SV.float().log_softmax(dim=-1)[rows, token_ids].tolist()
    for (_, _, scoring, position, index), log_prob in zip(found, log_probs, strict=True):
        scoring.add(position, index, log_prob)


@torch.inference_mode()
def token_logprobs(logits_SV: torch.Tensor, sequences: Rows[Sequence], tokens: Rows[int]) -> None:
    """Adds to each sequence that wants it the log-probability of the token that it got, and those of the likeliest."""
    wanted = [i for i, sequence in enumerate(sequences) if sequence.request.logprobs is not None]
    if not wanted:
        return
    log_probs_WV = logits_SV[wanted].float().log_softmax(dim=-1)
    own = torch.tensor([tokens[i] for i in wanted], device=logits_SV.device)
    own_W = log_probs_WV.gather(1, own[:, None])[:, 0].tolist()
    most = max(sequences[i].request.logprobs or 0 for i in wanted)
    best_WK, ids_WK = (part.tolist() for part in log_probs_WV.topk(min(most, log_probs_WV.shape[1]), dim=-1))
    for i, log_prob, best, ids in zip(wanted, own_W, best_WK, ids_WK, strict=True):
        count = sequences[i].request.logprobs or 0
        sequences[i].logprobs.append(
            TokenLogprob(tokens[i], log_prob, tuple(zip(ids[:count], best[:count], strict=True)))
        )
