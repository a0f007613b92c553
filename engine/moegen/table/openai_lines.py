"""Parts as OpenAI's batch answers: one line per row with its `custom_id`, a chat completion and an error.

Every line ends with `moegen`: what the other formats' footers and columns say, so that a part tells by itself which
work it belongs to and what it counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from moegen.row import Status

Row = Mapping[str, Any]


def encode_lines(table: pa.Table, fingerprint: str, prefix: str) -> bytes:
    """The rows of an output table; `prefix` stands before the names of its result columns.

    `custom_id` is the column of that name, else the row's index; `model` the column of that name. `created` is 0: a
    part's bytes depend on the work alone.
    """
    names = [name for name in table.column_names if name in ("custom_id", "model")]
    own = table.select([*names, *(prefix + name for name in _RESULT)])
    return b"".join(
        json.dumps(_line(row, fingerprint, prefix), ensure_ascii=False).encode() + b"\n" for row in own.to_pylist()
    )


_RESULT = (
    "row_index", "output", "output_raw", "status", "error", "finish_reason", "prompt_tokens", "completion_tokens",
    "attempts", "seed", "input_file",
)  # fmt: skip
_KEPT = ("row_index", "status", "prompt_tokens", "completion_tokens", "attempts", "seed", "input_file")


def _line(row: Row, fingerprint: str, prefix: str) -> dict[str, Any]:
    cells = {name: row[prefix + name] for name in _RESULT}
    custom_id = row.get("custom_id")
    return {
        "id": f"moegen-{fingerprint[:16]}-{cells['row_index']}",
        "custom_id": str(cells["row_index"]) if custom_id is None else str(custom_id),
        "response": _response(row, cells, fingerprint) if cells["finish_reason"] is not None else None,
        "error": _error(cells),
        "moegen": {"fingerprint": fingerprint, "code": (cells["error"] or {}).get("code")}
        | {name: cells[name] for name in _KEPT},
    }


def _response(row: Row, cells: Row, fingerprint: str) -> dict[str, Any]:
    name = f"moegen-{fingerprint[:16]}-{cells['row_index']}"
    used = {"prompt_tokens": cells["prompt_tokens"] or 0, "completion_tokens": cells["completion_tokens"] or 0}
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (content, reason) in enumerate(_answers(cells))
    ]
    body = {
        "id": name,
        "object": "chat.completion",
        "created": 0,
        "model": row.get("model") or "moegen",
        "choices": choices,
        "usage": {**used, "total_tokens": sum(used.values())},
    }
    return {"status_code": 200, "request_id": name, "body": body}


def _answers(cells: Row) -> Iterator[tuple[str | None, str]]:
    """Content and finish reason of each; an answer that was cut is in `output_raw`."""
    reasons, texts, raw = cells["finish_reason"], cells["output"], cells["output_raw"]
    if isinstance(reasons, str):
        yield raw if texts is None else texts, reasons
        return
    for index, reason in enumerate(reasons):
        text = None if texts is None else texts[index]
        yield (raw[index] if text is None and raw is not None else text), reason


def _error(cells: Row) -> dict[str, Any] | None:
    if cells["status"] in (Status.OK, Status.LENGTH):
        return None
    known = cells["error"] or {"code": cells["status"], "message": "the row has no prompt"}
    return {"code": known["code"], "message": known["message"]}


def read_totals(data: bytes) -> tuple[str, dict[str, Any]]:
    """The fingerprint that the lines name ("" where there are none), and what they add up to, as `Totals` has it.

    Raises:
        KeyError, TypeError, ValueError: a line is not one of `encode_lines`, or the last one has no end.
    """
    if data and not data.endswith(b"\n"):
        raise ValueError("the last line has no end")
    kept = [json.loads(line)["moegen"] for line in data.splitlines()]
    fingerprints = {line["fingerprint"] for line in kept} or {""}
    if len(fingerprints) > 1:
        raise ValueError("its lines are of different work")
    return fingerprints.pop(), {
        "rows": len(kept),
        "statuses": dict(sorted(Counter(line["status"] for line in kept).items())),
        "prompt_tokens": sum(line["prompt_tokens"] or 0 for line in kept),
        "completion_tokens": sum(line["completion_tokens"] or 0 for line in kept),
        "errors": dict(sorted(Counter(line["code"] for line in kept if line["code"] is not None).items())),
    }


def read_rows(data: bytes) -> Iterator[dict[str, Any]]:
    """Each line's row in the columns' words: index, status, output and error."""
    for text in data.splitlines():
        line = json.loads(text)
        choices = line["response"]["body"]["choices"] if line["response"] else []
        yield {
            "row_index": line["moegen"]["row_index"],
            "custom_id": line["custom_id"],
            "status": line["moegen"]["status"],
            "output": [choice["message"]["content"] for choice in choices],
            "error": line["error"],
        }
