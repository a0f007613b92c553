"""OpenAI batch files: lines of `{"custom_id", "method", "url", "body"}`, each a request for one chat completion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from moegen.row import RowError
from moegen.table.filter import Bounds
from moegen.table.jsonl_source import Line, lines_of, parsed_line
from moegen.table.schema import valid_utf8
from moegen.table.source import Chunk, View, Wanted
from moegen.table.text_file import cut

_SCHEMA = pa.schema([(name, pa.string()) for name in ("custom_id", "method", "url", "model", "messages", "params")])
_CHAT = "/v1/chat/completions"
# Of a body, what says nothing about the answer, and what says nothing where it has this value.
_ABOUT = {"model", "messages", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}
_OUR_NAMES = {"max_completion_tokens": "max_tokens"}


class OpenAiSource:
    """A batch file: one row per line, every column text; `messages` and `params` are JSON.

    `params` are the body's sampling parameters by our names. What the engine does not offer stays among them, so that
    the row gets `invalid_params` and not another answer than was asked for.
    """

    schema = _SCHEMA

    def __init__(self, uri: str, limit: int | None) -> None:
        self.uri = uri
        self.rows = sum(1 for _ in islice(lines_of(uri), limit))

    def chunks(self, view: View, rows: int, wanted: Wanted) -> Iterator[Chunk]:
        """See `Source`."""
        first_row = 0
        for lines in cut(islice(lines_of(self.uri), rows), lambda line: len(line.data)):
            if wanted(first_row, len(lines)):
                requests = [_request(line) for line in lines]
                columns = [
                    pa.array([_text(cells.get(field.name)) for cells, _ in requests], field.type)
                    for field in view.carried
                ]
                values = [error or {name: cells.get(name) for name in view.needed} for cells, error in requests]
                yield Chunk(first_row, pa.Table.from_arrays(columns, schema=view.carried), values)
            first_row += len(lines)

    def bounds(self, first_row: int, names: Sequence[str]) -> dict[str, Bounds]:
        """Nothing: see `Source`."""
        return {}


def _text(value: str | None) -> str | None:
    return None if value is None else valid_utf8(value)


def _request(line: Line) -> tuple[dict[str, str], RowError | None]:
    """The row's columns, and what is wrong with it."""
    row = parsed_line(line)
    if isinstance(row, RowError):
        return {}, row
    body = row.get("body")
    cells = {name: row[name] for name in ("custom_id", "method", "url") if isinstance(row.get(name), str)}
    if not isinstance(body, dict):
        return cells, _refused(line, "has no body, which is a mapping")
    if isinstance(body.get("model"), str):
        cells["model"] = body["model"]
    if "custom_id" not in cells:
        return cells, _refused(line, "has no custom_id, which is text")
    if cells.get("url", _CHAT) != _CHAT:
        return cells, _refused(line, f"asks for another url than {_CHAT}")
    if "messages" not in body:
        return cells, _refused(line, "has no messages in its body")
    params = {_OUR_NAMES.get(name, name): value for name, value in body.items() if _matters(name, value)}
    return {**cells, "messages": json.dumps(body["messages"]), "params": json.dumps(params)}, None


def _matters(name: str, value: Any) -> bool:
    return value is not None and name not in _ABOUT and not any(value == plain for plain in _NEUTRAL.get(name, ()))


def _refused(line: Line, what: str) -> RowError:
    return RowError("bad_request", f"line {line.number}: {what}", "read")
