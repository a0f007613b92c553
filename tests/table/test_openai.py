"""OpenAI's batch files in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from moegen.errors import SpecError
from moegen.row import RowError, RowResult, Status
from moegen.spec import Input, JobSpec, Output
from moegen.table.columns import columns_with
from moegen.table.inspect import inspect_output
from moegen.table.openai_lines import encode_lines
from moegen.table.part import Totals, read_footer
from moegen.table.reader import TableReader
from moegen.table.schema import output_schema, to_table
from moegen.table.writer import TableWriter
from table_job import FINGERPRINT, read_all, values

HI = [{"role": "user", "content": "hi ü"}]


def request(custom_id: Any, **body: Any) -> dict[str, Any]:
    body = {"model": "gpt-x", "messages": HI, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def batch_file(folder: Path, *lines: Any) -> str:
    path = folder / "batch.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_requests_are_rows_and_their_parameters_have_our_names(tmp_path: Path) -> None:
    plain = {"n": 1, "stream": False, "frequency_penalty": 0.0, "user": "u", "response_format": {"type": "text"}}
    path = batch_file(
        tmp_path,
        request("a", max_completion_tokens=7, temperature=0.5, stop="\n", top_p=None, **plain),
        request("b", presence_penalty=1, tools=[{"type": "function"}]),
        request("c", max_tokens=3, seed=4),
    )
    (batch,) = read_all(path, ["messages", "params"], format="openai_jsonl")
    assert batch.carried.column_names == ["custom_id", "method", "url", "model", "messages", "params"]
    assert batch.carried["custom_id"].to_pylist() == ["a", "b", "c"]
    rows = [row for row in batch.values if not isinstance(row, RowError)]
    assert [json.loads(row["messages"]) for row in rows] == [HI] * 3
    assert [json.loads(row["params"]) for row in rows] == [
        {"max_tokens": 7, "temperature": 0.5, "stop": "\n"},
        {"presence_penalty": 1, "tools": [{"type": "function"}]},
        {"max_tokens": 3, "seed": 4},
    ]


def test_lines_that_are_no_requests_are_rows_with_an_error(tmp_path: Path) -> None:
    path = batch_file(
        tmp_path, request("a"), "{broken", {"custom_id": "b"}, request(5), {"custom_id": "c", "body": {}},
        {**request("d"), "url": "/v1/embeddings"}, "[]", "", {"custom_id": "e", "body": {"messages": HI}},
    )  # fmt: skip
    batches = read_all(path, ["messages"], format="openai_jsonl")
    bad = ["malformed_json", *["bad_request"] * 4, "malformed_json"]
    assert [row if isinstance(row, str) else "ready" for row in values(batches)] == ["ready", *bad, "ready"]
    assert batches[0].carried["custom_id"].to_pylist() == ["a", None, "b", None, "c", "d", None, "e"]


def test_a_specification_needs_to_say_little() -> None:
    spec = {"input": {"uri": "x", "format": "openai_jsonl"}, "model": {"uri": "m"}, "output": {"uri": "out"}}
    full = JobSpec.from_mapping({**spec, "sampling": {"max_tokens": 9}})
    assert full.prompt.messages_column == "messages"
    assert (full.sampling.params_column, full.input.id_column) == ("params", "custom_id")
    assert JobSpec.from_mapping(json.loads(full.to_json())) == full
    own = {**spec, "prompt": {"column": "params"}, "sampling": {"max_tokens": 9, "params_column": None}}
    assert JobSpec.from_mapping(own).sampling.params_column is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": "classify", "choices": ["a", "b"]}, "places for answers only"),
        ({"sampling": {"max_tokens": 1, "logprobs": 1}}, "sampling.logprobs"),
        ({"output": {"uri": "o", "format": "openai_jsonl", "include": ["token_ids"]}}, "output.include"),
    ],
)
def test_what_lines_have_no_place_for_is_refused(fields: dict[str, Any], said: str) -> None:
    spec = {"input": {"uri": "x"}, "prompt": {"column": "p"}, "model": {"uri": "m"}, "sampling": {"max_tokens": 1}}
    with pytest.raises(SpecError, match=said):
        JobSpec.from_mapping({**spec, "output": {"uri": "o", "format": "openai_jsonl"}, **fields})


RESULTS = [
    RowResult(0, Status.OK, "fine ü\ud800", finish_reason="stop", prompt_tokens=3, completion_tokens=2),
    RowResult(1, Status.LENGTH, None, "cu", finish_reason="length", prompt_tokens=4, completion_tokens=1),
    RowResult(2, Status.TOO_LONG, error=RowError("too_long", "900 tokens", "prompt"), prompt_tokens=900),
    RowResult(3, Status.SKIPPED_NULL),
    RowResult(4, Status.INVALID_OUTPUT, None, "{}", RowError("invalid_output", "no", "generate"), "stop", 5, 6),
]


def write(folder: Path, results: list[RowResult], output: Output) -> tuple[TableWriter, TableReader]:
    reader = TableReader(Input(batch_file(folder, *map(request, "abcde")), format="openai_jsonl"), ["messages"])
    writer = TableWriter(output, reader.schema, reader.rows, FINGERPRINT, "key")
    for batch in reader.batches():
        wanted = set(writer.add_batch(batch))
        for result in results:
            if result.row_index in wanted:
                writer.add(result)
    return writer, reader


def test_answers_are_lines_that_openais_readers_know(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), format="openai_jsonl", rows_per_part=3)
    writer, reader = write(tmp_path, RESULTS, output)
    writer.finish(job_name="", model_digest="m", input_files=reader.files, started_at=0.0)
    parts = sorted((tmp_path / "out").glob("part-*.jsonl"))
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert len(parts) == 2
    assert [line["custom_id"] for line in lines] == list("abcde")
    body = lines[0]["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "gpt-x")
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "fine ü\ufffd", "refusal": None}, "logprobs": None,
         "finish_reason": "stop"}
    ]  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert [line["error"] for line in lines] == [
        None, None, {"code": "too_long", "message": "900 tokens"},
        {"code": "skipped_null", "message": "the row has no prompt"}, {"code": "invalid_output", "message": "no"},
    ]  # fmt: skip
    assert lines[1]["response"]["body"]["choices"][0]["message"]["content"] == "cu"
    assert [line["response"] is None for line in lines] == [False, False, True, True, False]
    found = inspect_output(output.uri)
    assert found.totals == Totals.of(RESULTS) == sum((read_footer(str(part)).totals for part in parts), Totals())
    assert found.errors["too_long"][0].row_index == 2


def test_a_job_goes_on_from_parts_of_lines(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), format="openai_jsonl", rows_per_part=3)
    writer, _ = write(tmp_path, RESULTS[:4], output)
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")}
    assert len(content) == 1
    again, _ = write(tmp_path, RESULTS, output)
    assert again.resumed == writer.totals == Totals.of(RESULTS[:3])
    assert again.complete
    assert content.items() <= {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")}.items()
    (part, *_) = sorted((tmp_path / "out").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(SpecError, match="was not written by moegen"):
        write(tmp_path, RESULTS, output)


def test_several_answers_are_choices_and_no_rows_are_no_lines(tmp_path: Path) -> None:
    two = RowResult(0, Status.LENGTH, ("a", None), (None, "b"), None, ("stop", "length"), 1, 2)
    spec, columns = Output("out", format="openai_jsonl", prefix="m_"), columns_with({}, (), 2)
    carried = pa.table({"custom_id": ["x"]})
    assert output_schema(carried.schema, spec, columns)
    (line,) = encode_lines(to_table(carried, ["f"], [two], spec, columns), FINGERPRINT, "m_").splitlines()
    choices = json.loads(line)["response"]["body"]["choices"]
    assert [(c["message"]["content"], c["finish_reason"]) for c in choices] == [("a", "stop"), ("b", "length")]
    nothing = Output(str(tmp_path / "out"), format="openai_jsonl")
    for _ in range(2):
        writer = TableWriter(nothing, pa.schema([]), 0, FINGERPRINT, "key")
        manifest = writer.finish(job_name="", model_digest="m", input_files=[], started_at=0.0)
        assert [(part.rows, part.size_bytes) for part in manifest.parts] == [(0, 0)]
