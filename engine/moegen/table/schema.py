"""The output table's schema, fixed before the first row, and rows made into a table of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from moegen.errors import SpecError
from moegen.row import RowError, RowResult
from moegen.spec import Output
from moegen.table.columns import ERROR_TYPE, Columns, columns_with

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def output_schema(input_schema: pa.Schema, output: Output, columns: Columns | None = None) -> pa.Schema:
    """The input columns unchanged, then the result columns with `output.prefix` before each name.

    Args:
        columns: the result columns by `result_columns`; None: those of a job of free text.

    Raises:
        SpecError: a result column has the name of an input column, or folders cannot be named after a column.
    """
    _check_partition_columns(input_schema, output.partition_by)
    results = _result_schema(output, columns)
    carried = set(input_schema.names)
    for name in results.names:
        if name in carried:
            raise SpecError(
                f"output.prefix: {output.prefix!r} gives a result column the name {name!r}, which an input column has;"
                " set another output.prefix, or leave the input column out with input.columns"
            )
    return pa.schema([*input_schema, *results])


def _check_partition_columns(schema: pa.Schema, partition_by: Sequence[str]) -> None:
    """Raises `SpecError` when folders cannot be named after one of the columns."""
    for name in partition_by:
        if name not in schema.names:
            raise SpecError(
                f"output.partition_by: no input column {name!r} is carried to the output; name one of "
                f"{', '.join(map(repr, schema.names)) or 'none'} (results are not known before they are there)"
            )
        type_ = schema.field(name).type
        plain = type_.value_type if pa.types.is_dictionary(type_) else type_
        text = pa.types.is_string(plain) or pa.types.is_large_string(plain)
        if not (text or pa.types.is_integer(plain) or pa.types.is_boolean(plain) or pa.types.is_date(plain)):
            raise SpecError(
                f"output.partition_by: column {name!r} is {type_}; folders are named after text, whole numbers, "
                "dates, true and false"
            )


def _result_schema(output: Output, columns: Columns | None) -> pa.Schema:
    columns = columns_with({}, output.include) if columns is None else columns
    return pa.schema([(output.prefix + name, type_) for name, type_ in columns.items()])


def to_table(
    carried: pa.Table,
    files: Sequence[str],
    results: Sequence[RowResult],
    output: Output,
    columns: Columns | None = None,
) -> pa.Table:
    """Row by row, the carried columns beside the result: carried, `files` and `results` have equal lengths."""
    results_schema = _result_schema(output, columns)
    arrays = list(carried.columns)
    for field in results_schema:
        name = field.name.removeprefix(output.prefix)
        cells = list(files) if name == "input_file" else [_cell(getattr(result, name)) for result in results]
        arrays.append(pa.array(cells, field.type))
    return pa.Table.from_arrays(arrays, schema=pa.schema([*carried.schema, *results_schema]))


def _cell(value: object) -> object:
    if isinstance(value, RowError):
        return {name: _cell(getattr(value, name)) for name in ERROR_TYPE.names}
    if isinstance(value, dict):
        return {name: _cell(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cell(part) for part in value]
    return valid_utf8(value) if isinstance(value, str) else value


def valid_utf8(text: str) -> str:
    """The text with U+FFFD for each lone surrogate: Arrow's strings are UTF-8, which cannot hold one."""
    return _LONE_SURROGATE.sub("\ufffd", text)
