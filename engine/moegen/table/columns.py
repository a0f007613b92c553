"""The columns that the engine adds to a table: which a job has, in their order, and their types."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pyarrow as pa

from moegen.answer.form import json_type
from moegen.spec import JobSpec

Columns = Mapping[str, pa.DataType]

ERROR_TYPE = pa.struct(
    [("code", pa.string()), ("message", pa.string()), ("stage", pa.string()), ("retryable", pa.bool_())]
)
LOGPROB_TYPE = pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())])
# One for every generated token; `top` are the likeliest tokens in its place, best first.
LOGPROBS_TYPE = pa.list_(pa.struct([*LOGPROB_TYPE, ("top", pa.list_(LOGPROB_TYPE))]))


def result_columns(spec: JobSpec) -> Columns:
    """Of this job. With `sampling.n` above 1, the columns that hold answers are lists of `n`."""
    own: dict[str, pa.DataType] = {}
    if spec.output_schema and (form := json_type(spec)) is not None:
        own["output_json"] = form.type
    if spec.sampling.logprobs is not None:
        own["logprobs"] = LOGPROBS_TYPE
    if spec.task == "classify":
        own |= {"label": pa.string(), "label_prob": pa.float64(), "label_probs": pa.list_(pa.float64())}
    if spec.task == "score":
        own |= {"score": pa.float64(), "score_tokens": pa.int32()}
    return columns_with(own, spec.output.include, spec.sampling.n)


def columns_with(own: Columns, include: Collection[str] = (), answers: int = 1) -> Columns:
    """What every job has, with what a job has of its own (by `include` among it), in the order of the contract."""
    available = {
        "row_index": pa.int64(),
        "output": pa.string(),
        "output_json": None,
        "output_raw": pa.string(),
        "label": None,
        "label_prob": None,
        "label_probs": None,  # of every choice, in the order of `choices`
        "score": None,
        "score_tokens": None,
        "status": pa.string(),
        "error": ERROR_TYPE,
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int32(),
        "completion_tokens": pa.int32(),
        "dedup_of": pa.int64(),
        "attempts": pa.int32(),
        "seed": pa.int64(),
        "input_truncated": pa.bool_(),
        "input_file": pa.string(),
        "token_ids": pa.list_(pa.int32()) if "token_ids" in include else None,
        "prompt_rendered": pa.string() if "prompt_rendered" in include else None,
        "logprobs": None,
    }
    types = {name: own.get(name, type_) for name, type_ in available.items()}
    return {
        name: pa.list_(type_) if answers > 1 and name in PER_ANSWER else type_
        for name, type_ in types.items()
        if type_ is not None
    }


PER_ANSWER = frozenset({"output", "output_json", "output_raw", "finish_reason", "token_ids", "logprobs"})
"""The columns that say something of each answer, where a row has several."""
