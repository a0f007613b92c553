"""`input.filter` over Arrow columns, and over what is known of rows without reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moegen import condition as words
from moegen.condition import All, Among, Compare, Condition, Flag, IsNull, Not, columns
from moegen.errors import SpecError

_COMPARE = {
    "==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """What is known of a column's values in some rows: those that are not null lie between two scalars.

    Arrow's comparisons with NaN are false, and Parquet's bounds do not count NaNs.
    """

    least: pa.Scalar | None  # None: not known
    most: pa.Scalar | None
    nulls: bool = True  # there may be nulls
    values: bool = True  # there may be other values than null

    @classmethod
    def of(cls, value: pa.Scalar) -> Bounds:
        """Of rows that all have this value."""
        return cls(value, value, not value.is_valid, value.is_valid)


class Filter:
    """A condition bound to columns of known types.

    With `partial`, columns that the schema lacks are left open: `may_pass` then judges by the others alone.

    Raises:
        SpecError: a column that does not exist, or a literal that its column cannot be compared with.
    """

    def __init__(self, condition: Condition, schema: pa.Schema, *, partial: bool = False) -> None:
        self.columns = tuple(dict.fromkeys(columns(condition)))
        self._condition, self._literals = condition, dict[tuple[str, Any, type], pa.Scalar]()
        self._types = {name: schema.field(name).type for name in self.columns if name in schema.names}
        missing = [name for name in self.columns if name not in self._types]
        if missing and not partial:
            known = ", ".join(map(repr, schema.names[:30])) or "none"
            raise SpecError(f"input.filter: the input has no column {missing[0]!r}; its columns are {known}")
        self._bind(condition)

    def mask(self, table: pa.Table) -> np.ndarray:
        """A bool per row of a table that has the columns: whether it passes."""
        passed = pc.fill_null(self._evaluate(self._condition, table), False)
        return passed.to_numpy(zero_copy_only=False) if isinstance(passed, pa.Array) else passed.to_numpy()

    def may_pass(self, known: Mapping[str, Bounds]) -> bool:
        """False only if none of the rows of which this is known can pass."""
        return self._outcomes(self._condition, known)[0]

    def _bind(self, condition: Condition) -> None:
        if isinstance(condition, Not):
            self._bind(condition.part)
        elif isinstance(condition, (All, words.Any)):
            for part in condition.parts:
                self._bind(part)
        elif condition.column in self._types:
            values = (condition.value,) if isinstance(condition, Compare) else getattr(condition, "values", ())
            for value in values:
                key = condition.column, value, type(value)
                self._literals[key] = _literal(condition.column, self._types[condition.column], value)
            if isinstance(condition, Flag) and not pa.types.is_boolean(self._types[condition.column]):
                raise SpecError(
                    f"input.filter: column {condition.column!r} is {self._types[condition.column]}, which is not true "
                    "or false by itself; compare it with something"
                )

    def _evaluate(self, condition: Condition, table: pa.Table) -> Any:
        if isinstance(condition, Not):
            return pc.invert(self._evaluate(condition.part, table))
        if isinstance(condition, (All, words.Any)):
            joined = pc.and_kleene if isinstance(condition, All) else pc.or_kleene
            result = self._evaluate(condition.parts[0], table)
            for part in condition.parts[1:]:
                result = joined(result, self._evaluate(part, table))
            return result
        column = table[condition.column]
        if isinstance(condition, IsNull):
            return pc.is_null(column)
        if pa.types.is_null(column.type):
            return pa.nulls(len(column), pa.bool_())
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        if isinstance(condition, Compare):
            return _COMPARE[condition.operator](column, self._scalar(condition.column, condition.value))
        if isinstance(condition, Among):
            result = pc.if_else(pc.is_valid(column), False, None)
            for value in condition.values:
                result = pc.or_kleene(result, pc.equal(column, self._scalar(condition.column, value)))
            return result
        return column

    def _scalar(self, column: str, value: words.Literal) -> pa.Scalar:
        return self._literals[column, value, type(value)]

    def _outcomes(self, condition: Condition, known: Mapping[str, Bounds]) -> tuple[bool, bool]:
        """Whether the condition may be true, and whether it may be false, for some row."""
        if isinstance(condition, Not):
            may_be_true, may_be_false = self._outcomes(condition.part, known)
            return may_be_false, may_be_true
        if isinstance(condition, (All, words.Any)):
            trues, falses = zip(*(self._outcomes(part, known) for part in condition.parts), strict=True)
            return (all(trues), any(falses)) if isinstance(condition, All) else (any(trues), all(falses))
        bounds = known.get(condition.column)
        if bounds is None or condition.column not in self._types:
            return True, True
        if isinstance(condition, IsNull):
            return bounds.nulls, bounds.values
        if not bounds.values:
            return False, False
        if isinstance(condition, Compare):
            return _compared(bounds, condition.operator, self._scalar(condition.column, condition.value))
        if isinstance(condition, Among):
            each = [_compared(bounds, "==", self._scalar(condition.column, value)) for value in condition.values]
            return any(true for true, _ in each), all(false for _, false in each)
        return _compared(bounds, "==", pa.scalar(True))


def _compared(bounds: Bounds, operator: str, value: pa.Scalar) -> tuple[bool, bool]:
    """Whether a value within the bounds may compare as true, and whether one may as false."""
    least, most = bounds.least, bounds.most
    if least is None or most is None or not value.is_valid:
        return True, True

    def holds(left: pa.Scalar, sign: str) -> bool:
        return bool(_COMPARE[sign](left, value).as_py())

    may_be_nan = pa.types.is_floating(least.type)
    if operator in ("<", "<="):
        return holds(least, operator), not holds(most, operator) or may_be_nan
    if operator in (">", ">="):
        return holds(most, operator), not holds(least, operator) or may_be_nan
    equal = holds(least, "<=") and holds(most, ">=")
    differs = not (holds(least, "==") and holds(most, "==")) or may_be_nan
    return (equal, differs) if operator == "==" else (differs, equal)


def _literal(column: str, type_: pa.DataType, value: words.Literal) -> pa.Scalar:
    """The value as a scalar that a column of this type can be compared with."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    text = isinstance(value, str)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        if pa.types.is_null(type_):
            return pa.scalar(value)
        if text and (_is_text(type_) or pa.types.is_temporal(type_)):
            return pa.scalar(value, pa.string()).cast(type_)
        if number and pa.types.is_integer(type_) and isinstance(value, int):
            return pa.scalar(value, type_) if _fits(value, type_) else pa.scalar(float(value))
        if number and (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_)):
            return pa.scalar(float(value))
        if isinstance(value, bool) and pa.types.is_boolean(type_):
            return pa.scalar(value)
    except (pa.ArrowException, OverflowError, ValueError) as error:
        raise SpecError(f"input.filter: column {column!r} is {type_}, and {value!r} is none: {error}") from error
    hint = "; the columns of CSV files are all text" if number and _is_text(type_) else ""
    raise SpecError(f"input.filter: column {column!r} is {type_}, which cannot be compared with {value!r}{hint}")


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _fits(value: int, type_: pa.DataType) -> bool:
    try:
        pa.scalar(value, type_)
    except (pa.ArrowException, OverflowError):
        return False
    return True
