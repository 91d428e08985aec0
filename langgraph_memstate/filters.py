"""Filters over values, compared by type: 9 < 10 everywhere, a number never equals a string or a boolean.

A filter maps fields to values or to operators: ``{"kind": "note", "score": {"$gte": 3}}``. A dict without operators
matches the fields it names, at any depth; a list matches a list of the same length. `$eq` and `$ne` compare whole
values. A missing field compares as None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

from langgraph_memstate.errors import FilterError
from langgraph_memstate.facts import is_unicode


class Condition(NamedTuple):
    """What every matching value fulfils at a path of fields, compared as a database compares: not by type."""

    path: tuple[str, ...]
    operator: Literal["=", ">=", "<="]
    operand: str | int | float


@dataclass(frozen=True, slots=True)
class Filter:
    """Says whether a value matches. A storage may leave out values that do not fulfil its `conditions`.

    A large filter has conditions for its first fields alone.
    """

    wanted: Mapping[str, Any]
    conditions: tuple[Condition, ...]

    def __call__(self, value: Mapping[str, Any]) -> bool:
        return all(_matches(value.get(key), wanted) for key, wanted in self.wanted.items())


def compile_filter(filter: Mapping[str, Any] | None) -> Filter | None:
    """A filter, checked; None for none.

    Raises:
        FilterError: an operator is unknown or its operand cannot be compared.
    """
    if filter is None:
        return None
    if not isinstance(filter, Mapping):
        raise FilterError(f"a filter is a dict from fields to values, not {type(filter).__name__}")
    if misplaced := [key for key in filter if key in _OPERATORS]:
        raise FilterError(f"filter: {misplaced[0]} belongs under the field it compares: {{'field': {{'$eq': 1}}}}")
    try:
        _check(filter, "filter")
    except RecursionError as error:
        raise FilterError("the filter is nested too deep") from error
    if not filter:
        return None
    return Filter(filter, tuple(islice(_conditions((), filter), _MOST_CONDITIONS)))


def _conditions(path: tuple[str, ...], wanted: object) -> Iterator[Condition]:
    if not isinstance(wanted, Mapping):
        yield from _condition(path, "$eq", wanted)
    elif path and any(key.startswith("$") for key in wanted):
        for operator, operand in wanted.items():
            yield from _condition(path, operator, operand)
    else:
        for key, inner in wanted.items():
            if key and key.isprintable() and not set(key) & {'"', "\\"}:  # a JSON path spells others in several ways
                yield from _conditions((*path, key), inner)


_MOST_CONDITIONS = 100  # each nests SQL one level deeper, and SQLite takes 1,000
_SLACK = 1e-12  # a database may read a decimal fraction one bit off
_EXACT = 2**53  # integers up to here are the same number everywhere


def _condition(path: tuple[str, ...], operator: str, operand: object) -> Iterator[Condition]:
    sides: dict[str, Literal["=", ">=", "<="]] = {"$eq": "=", "$gt": ">=", "$gte": ">=", "$lt": "<=", "$lte": "<="}
    side = sides.get(operator)
    if side is None:
        return
    if isinstance(operand, str):
        if "\0" not in operand and is_unicode(operand):
            yield Condition(path, side, operand)
    elif isinstance(operand, int):
        if abs(operand) < _EXACT:
            yield Condition(path, side, int(operand))
    elif isinstance(operand, float):
        least, most = operand - abs(operand) * _SLACK, operand + abs(operand) * _SLACK
        if side in ("=", ">=") and math.isfinite(least):
            yield Condition(path, ">=", least)
        if side in ("=", "<=") and math.isfinite(most):
            yield Condition(path, "<=", most)


def _check(wanted: Any, path: str) -> None:
    if isinstance(wanted, Mapping):
        operators = [key for key in wanted if isinstance(key, str) and key.startswith("$")]
        for key, inner in wanted.items():
            if not isinstance(key, str):
                raise FilterError(f"{path}: field {key!r} is not a string")
            if operators and key not in _OPERATORS:
                known = ", ".join(_OPERATORS)
                raise FilterError(f"{path}: unknown operator {key!r}; there are {known}")
            if key in _ORDERED and not isinstance(inner, int | float | str):
                raise FilterError(f"{path}: {key} compares numbers or strings, not {inner!r}")
            (_check_operand if operators else _check)(inner, f"{path}.{key}")
    elif isinstance(wanted, list | tuple):
        for position, inner in enumerate(wanted):
            _check(inner, f"{path}[{position}]")
    else:
        _check_operand(wanted, path)


def _check_operand(wanted: Any, path: str) -> None:
    """Operands of `$eq` and `$ne` are plain values, in which a dict is a dict."""
    if isinstance(wanted, Mapping):
        for key, inner in wanted.items():
            if not isinstance(key, str):
                raise FilterError(f"{path}: field {key!r} is not a string")
            _check_operand(inner, f"{path}.{key}")
    elif isinstance(wanted, list | tuple):
        for position, inner in enumerate(wanted):
            _check_operand(inner, f"{path}[{position}]")
    elif wanted is not None and not isinstance(wanted, str | int | float | bool):
        raise FilterError(f"{path}: {wanted!r} is not a JSON value")


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        if any(key.startswith("$") for key in wanted):
            return all(_OPERATORS[op](value, operand) for op, operand in wanted.items())
        return isinstance(value, Mapping) and all(_matches(value.get(key), inner) for key, inner in wanted.items())
    if isinstance(wanted, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(wanted) and all(map(_matches, value, wanted))
    return equal(value, wanted)


def equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0, and neither equals True."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else None


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def operator(value: Any, operand: Any) -> bool:
        kind = _kind(value)
        return kind is not None and kind == _kind(operand) and compare(value, operand)

    return operator


_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": _ordered(lambda value, operand: value > operand),
    "$gte": _ordered(lambda value, operand: value >= operand),
    "$lt": _ordered(lambda value, operand: value < operand),
    "$lte": _ordered(lambda value, operand: value <= operand),
}
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": equal,
    "$ne": lambda value, operand: not equal(value, operand),
    **_ORDERED,
}
