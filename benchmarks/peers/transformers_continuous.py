"""transformers' continuous batching, with each row's own `max_new_tokens`.

Settings: `requests` that run at once, `batch_tokens` per pass, `dtype`. Without flash attention each pass masks every
query against every cached token of all running requests, so fewer requests at once can be faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers_static import load_model
from turn import Generate, Outcome, Row, Turn, take

_PAGE_TOKENS = 32


def open_engine(turn: Turn) -> Generate:
    model = load_model(turn)
    return lambda rows: generate(model, rows, turn.settings["requests"], turn.settings["batch_tokens"])


def generate(model: PreTrainedModel, rows: Sequence[Row], requests: int, batch_tokens: int) -> Outcome:
    longest = max(row.answer_tokens for row in rows)
    answers: dict[int, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=_config(rows, requests, batch_tokens),
        warmup=False,
    ) as manager:
        for i, row in enumerate(rows):
            manager.add_request(list(row.token_ids), request_id=str(i), max_new_tokens=row.answer_tokens)
        for result in manager:
            if result.error is not None:
                raise SystemExit(f"transformers' continuous batching failed at row {result.request_id}: {result.error}")
            if result.is_finished():
                answers[int(result.request_id)] = list(result.generated_tokens)
            if len(answers) == len(rows):
                break
    return Outcome([answers[i] for i in range(len(rows))])


def _config(rows: Sequence[Row], requests: int, batch_tokens: int) -> ContinuousBatchingConfig:
    """Room for the longest rows that can run at once: the cache is never the limit."""
    longest_first = sorted((-(-row.tokens // _PAGE_TOKENS) + 1 for row in rows), reverse=True)
    return ContinuousBatchingConfig(
        page_size=_PAGE_TOKENS,
        num_blocks=sum(longest_first[:requests]),
        max_batch_tokens=batch_tokens,
        max_requests_per_batch=requests,
        allow_block_sharing=False,
        use_async_batching=False,
    )


if __name__ == "__main__":
    take(open_engine)
