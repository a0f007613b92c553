"""A condition over a row's columns, as `input.filter` has it: Python's comparisons as a notation, read and never run.

    lang == 'de' and score > 0.5
    not (kind in ['spam', 'test']) and 10 <= words < 500 and reviewed_at is None
    column('a name with spaces') != '' or urgent

A column is compared with a literal: text, a number, True or False; text also stands for dates and times. As in SQL, a
comparison with null is neither true nor false.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from moegen.errors import SpecError

Literal = str | int | float | bool
_LONGEST = 10_000  # characters
_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_TURNED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


@dataclass(frozen=True)
class Compare:
    """`column operator value`; the operator is one of == != < <= > >=."""

    column: str
    operator: str
    value: Literal


@dataclass(frozen=True)
class Among:
    """`column in [values]`."""

    column: str
    values: tuple[Literal, ...]


@dataclass(frozen=True)
class IsNull:
    """`column is None`."""

    column: str


@dataclass(frozen=True)
class Flag:
    """A column of true and false, as it is."""

    column: str


@dataclass(frozen=True)
class Not:
    """The opposite, of null null."""

    part: Condition


@dataclass(frozen=True)
class All:
    """`and`."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Any:
    """`or`."""

    parts: tuple[Condition, ...]


Condition = Compare | Among | IsNull | Flag | Not | All | Any


def parse(text: str) -> Condition:
    """Reads a condition.

    Raises:
        SpecError: the text is none; says what of it is not understood.
    """
    if len(text) > _LONGEST:
        raise SpecError(f"input.filter: has {len(text)} characters; give {_LONGEST} at most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Python would think of running it
            return _condition(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        shown = text if len(text) < 200 else text[:200] + "..."
        raise SpecError(f"input.filter: {shown!r} cannot be read: {error.msg}; write as in lang == 'de'") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise SpecError("input.filter: is nested too deeply; write it shorter, in may help") from error


def columns(condition: Condition) -> Iterator[str]:
    """The columns that it names, in order; some more than once."""
    if isinstance(condition, Not):
        yield from columns(condition.part)
    elif isinstance(condition, (All, Any)):
        for part in condition.parts:
            yield from columns(part)
    else:
        yield condition.column


def _condition(node: ast.expr) -> Condition:
    if isinstance(node, ast.BoolOp):
        parts = tuple(_condition(value) for value in node.values)
        return All(parts) if isinstance(node.op, ast.And) else Any(parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return Not(_condition(node.operand))
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        pairs = zip(sides, node.ops, sides[1:], strict=False)
        found = tuple(_comparison(*pair) for pair in pairs)
        return found[0] if len(found) == 1 else All(found)
    if (column := _column(node)) is not None:
        return Flag(column)
    raise _not_understood(node, "write comparisons, joined by and, or, not")


def _comparison(left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Condition:
    column = _column(left)
    if column is not None and isinstance(operator, (ast.Is, ast.IsNot)):
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise _not_understood(right, "after is comes None; compare with ==")
        return IsNull(column) if isinstance(operator, ast.Is) else Not(IsNull(column))
    if column is not None and isinstance(operator, (ast.In, ast.NotIn)):
        if not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
            raise _not_understood(right, "after in comes a list, as in ['de', 'en']")
        among = Among(column, tuple(_literal(item) for item in right.elts))
        return among if isinstance(operator, ast.In) else Not(among)
    if type(operator) not in _OPERATORS:
        raise _not_understood(left, "before is and in comes a column")
    sign = _OPERATORS[type(operator)]
    if column is not None:
        return Compare(column, sign, _literal(right))
    column = _column(right)
    if column is None:
        raise _not_understood(right, "compare a column with a literal; column('a name') names any column")
    return Compare(column, _TURNED[sign], _literal(left))


def _column(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column":
        if len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Constant):
            name = node.args[0].value
            if isinstance(name, str):
                return name
        raise _not_understood(node, "write column('its name')")
    return None


def _literal(node: ast.expr) -> Literal:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    elif isinstance(node, ast.Constant):
        if node.value is None:
            raise _not_understood(node, "compare with null as in: score is None")
        if isinstance(node.value, (str, int, float)):  # a bool is an int
            return node.value
    raise _not_understood(node, "compare a column with text in quotes, a number, True or False")


def _not_understood(node: ast.AST, remedy: str) -> SpecError:
    text = ast.unparse(node)
    return SpecError(f"input.filter: {text if len(text) < 100 else text[:100] + '...'} is not understood; {remedy}")
