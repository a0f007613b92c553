"""The output table's schema, fixed before the first row, and rows made into a table of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from moegen.errors import SpecError
from moegen.row import RowError, RowResult
from moegen.spec import Output

ERROR_TYPE = pa.struct(
    [("code", pa.string()), ("message", pa.string()), ("stage", pa.string()), ("retryable", pa.bool_())]
)
_COLUMNS = {
    "row_index": pa.int64(),
    "output": pa.string(),
    "output_raw": pa.string(),
    "status": pa.string(),
    "error": ERROR_TYPE,
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int32(),
    "completion_tokens": pa.int32(),
    "attempts": pa.int32(),
    "seed": pa.int64(),
    "input_truncated": pa.bool_(),
    "input_file": pa.string(),
}
_EXTRA_COLUMNS = {"token_ids": pa.list_(pa.int32()), "prompt_rendered": pa.string()}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def result_types() -> dict[str, pa.DataType]:
    """Arrow's type of every field that a `RowResult` has, the columns of `output.include` among them."""
    return {name: type_ for name, type_ in {**_COLUMNS, **_EXTRA_COLUMNS}.items() if name != "input_file"}


def output_schema(input_schema: pa.Schema, output: Output) -> pa.Schema:
    """The input columns unchanged, then the result columns with `output.prefix` before each name.

    Raises:
        SpecError: a result column has the name of an input column.
    """
    results = _result_schema(output)
    for name in results.names:
        if name in input_schema.names:
            raise SpecError(
                f"output.prefix: {output.prefix!r} gives a result column the name {name!r}, which an input column has;"
                " set another output.prefix, or leave the input column out with input.columns"
            )
    return pa.schema([*input_schema, *results])


def _result_schema(output: Output) -> pa.Schema:
    columns = _COLUMNS | {name: _EXTRA_COLUMNS[name] for name in _EXTRA_COLUMNS if name in output.include}
    return pa.schema([(output.prefix + name, type_) for name, type_ in columns.items()])


def to_table(carried: pa.Table, files: Sequence[str], results: Sequence[RowResult], output: Output) -> pa.Table:
    """Row by row, the carried columns beside the result: carried, `files` and `results` have equal lengths."""
    results_schema = _result_schema(output)
    columns = list(carried.columns)
    for field in results_schema:
        name = field.name.removeprefix(output.prefix)
        cells = list(files) if name == "input_file" else [arrow_cell(getattr(result, name)) for result in results]
        columns.append(pa.array(cells, field.type))
    return pa.Table.from_arrays(columns, schema=pa.schema([*carried.schema, *results_schema]))


def arrow_cell(value: object) -> object:
    """A field of a `RowResult` as `pyarrow.array` takes it."""
    if isinstance(value, RowError):
        return {name: arrow_cell(getattr(value, name)) for name in ERROR_TYPE.names}
    return valid_utf8(value) if isinstance(value, str) else value


def valid_utf8(text: str) -> str:
    """The text with U+FFFD for each lone surrogate: Arrow's strings are UTF-8, which cannot hold one."""
    return _LONE_SURROGATE.sub("\ufffd", text)
