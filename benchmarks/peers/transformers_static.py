"""transformers' `generate` over padded batches of rows of similar prompt length.

Settings: `batch` rows, `dtype`. Each batch runs as long as its longest answer needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from turn import Generate, Outcome, Row, Turn, take


def open_engine(turn: Turn) -> Generate:
    model = load_model(turn)
    return lambda rows: generate(model, rows, turn.settings["batch"])


def load_model(turn: Turn) -> PreTrainedModel:
    """The model in `dtype`, with one of transformers' ways to compute experts where `experts` names it."""
    model = AutoModelForCausalLM.from_pretrained(turn.checkpoint, dtype=getattr(torch, turn.settings["dtype"]))
    if "experts" in turn.settings:
        model.set_experts_implementation(turn.settings["experts"])
    return model


def generate(model: PreTrainedModel, rows: Sequence[Row], batch_size: int) -> Outcome:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].token_ids))
    answers: list[list[int]] = [[] for _ in rows]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, answer in zip(batch, _batch(model, [rows[i] for i in batch]), strict=True):
            answers[i] = answer[: rows[i].answer_tokens]
    return Outcome(answers)


def _batch(model: PreTrainedModel, rows: Sequence[Row]) -> list[list[int]]:
    width = max(len(row.token_ids) for row in rows)
    longest = max(row.answer_tokens for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):  # padded on the left
        ids[place, width - len(row.token_ids) :] = torch.tensor(row.token_ids)
        mask[place, width - len(row.token_ids) :] = 1
    config = GenerationConfig(max_new_tokens=longest, min_new_tokens=longest, do_sample=False, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()


if __name__ == "__main__":
    take(open_engine)
