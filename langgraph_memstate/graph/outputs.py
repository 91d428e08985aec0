"""What a model returned, as plain values: from text, a message, its tool calls, or a structured-output result.

Nothing is guessed. A text holds JSON or it does not: what looks like a JSON object and breaks off or is malformed is an
error, not a reason to look inside of it. Only tool calls that are named for the schema are read. Who asks gets every
value that the output may mean, and decides whether they agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage

_RAW_RESULT = frozenset(("raw", "parsed", "parsing_error"))  # of `with_structured_output(include_raw=True)`

# An object up to the colon after its first key, an empty one, or a list that begins with an object. Possessive, so that
# text that only resembles JSON is passed over once.
_START = re.compile(
    r'\{\s*+(?:\}|"(?:[^"\\]|\\.)*+"\s*+:)|\[\s*+(?:\]|\{\s*+["}])',
    re.DOTALL,
)
_SINGLE_QUOTED = re.compile(r"\{\s*+'")
_CUT_OFF = frozenset(("length", "max_tokens", "MAX_TOKENS"))


@dataclass(frozen=True, slots=True)
class Reading:
    """The values an output may mean. Where there is none, `problem` says why."""

    values: tuple[Any, ...] = ()
    problem: str = ""
    is_json: bool = False
    """the values were decoded from JSON, so a date is a text and a tuple a list"""
    is_tool: bool = False
    """each value is what one tool call was given"""


def read_output(output: Any, *, names: Collection[str], fields: Collection[str] = ()) -> Reading:
    """Read what a model returned.

    Args:
        names: tool calls with one of these names hold the value in their arguments.
        fields: the schema's fields: a dict of `raw`, `parsed` and `parsing_error` is no result wrapper if it has those.
    """
    if isinstance(output, str):
        return read_text(output)
    if isinstance(output, BaseMessage):
        return _read_message(output, names)
    if isinstance(output, Mapping) and output.keys() == _RAW_RESULT and not set(fields) >= _RAW_RESULT:
        return _read_result(output, names, fields)
    return Reading((output,))


def _read_result(result: Mapping[str, Any], names: Collection[str], fields: Collection[str]) -> Reading:
    if result["parsed"] is not None:
        return Reading((result["parsed"],))
    reading = Reading() if result["raw"] is None else read_output(result["raw"], names=names, fields=fields)
    if reading.values or result["parsing_error"] is None:
        return reading
    problem = f"parsing failed: {result['parsing_error']}"
    return Reading(problem=f"{reading.problem}; {problem}" if reading.problem else problem)


# -- messages ---------------------------------------------------------------------------------------


def _read_message(message: BaseMessage, names: Collection[str]) -> Reading:
    calls = list(_tool_calls(message))
    named = tuple(args for name, args in calls if name in names)
    if named:
        readings = [read_text(args) if isinstance(args, str) else Reading((args,), is_json=True) for args in named]
        broken = next((one for one in readings if one.problem), None)
        if broken is not None:
            return Reading(problem=f"the arguments of its tool call cannot be read: {broken.problem}")
        return Reading(tuple(value for one in readings for value in one.values), is_json=True, is_tool=True)
    if refusal := _refusal(message):
        return Reading(problem=f"the model refused to answer: {refusal}")
    reading = read_text("\n".join(_texts(message.content)))
    if reading.values:
        return reading
    problem = reading.problem
    if calls:
        called = ", ".join(sorted({repr(name) for name, _ in calls}))
        problem = f"it calls {called} and no tool named {' or '.join(map(repr, sorted(names)))}; {problem}"
    metadata = message.response_metadata
    if metadata.get("finish_reason", metadata.get("stop_reason")) in _CUT_OFF:
        problem += " (the model reached its token limit)"
    return Reading(problem=problem)


def _tool_calls(message: BaseMessage) -> Iterable[tuple[str, Any]]:
    """Name and arguments of each tool call; arguments that the provider's library could not decode are a text."""
    calls = getattr(message, "tool_calls", None) or ()
    invalid = getattr(message, "invalid_tool_calls", None) or ()
    yield from ((call["name"], call["args"]) for call in calls)
    yield from ((call.get("name") or "", call.get("args") or "") for call in invalid)
    if not calls and not invalid:
        for block in _blocks(message.content):
            if block.get("type") in ("tool_use", "tool_call"):
                yield str(block.get("name", "")), block.get("input", block.get("args"))


def _refusal(message: BaseMessage) -> str:
    refusals = [block.get("refusal") for block in _blocks(message.content) if block.get("type") == "refusal"]
    return str(next(filter(None, (message.additional_kwargs.get("refusal"), *refusals)), ""))


def _texts(content: str | list[Any]) -> Iterable[str]:
    """The text of a message's content, without what the model thought on the way."""
    if isinstance(content, str):
        yield content
        return
    for block in content:
        if isinstance(block, str):
            yield block
        elif isinstance(block, Mapping) and block.get("type") in ("text", "output_text"):
            yield str(block.get("text", ""))


def _blocks(content: str | list[Any]) -> Iterable[Mapping[str, Any]]:
    return () if isinstance(content, str) else (block for block in content if isinstance(block, Mapping))


# -- text -------------------------------------------------------------------------------------------


def read_text(text: str) -> Reading:
    """The JSON objects, and lists of objects, of a text, whatever prose or fence is around them.

    Linear in the length of the text: no part of it is decoded twice.
    """
    if not text.strip("\ufeff \t\r\n"):
        return Reading(problem="it is empty")
    values: list[Any] = []
    empty: list[Any] = []
    position = 0
    while match := _START.search(text, position):
        try:
            value, position = _DECODER.raw_decode(text, match.start())
        except RecursionError:
            return Reading(problem="its JSON is nested too deeply to be read")
        except ValueError as error:
            return Reading(problem=_broken(text, error))
        (values if value else empty).append(value)
    if values or empty:
        return Reading(tuple(values or empty[:1]), is_json=True)
    hint = "; JSON needs double quotes" if _SINGLE_QUOTED.search(text) else ""
    return Reading(problem=f"there is no JSON object in it{hint}")


def _broken(text: str, error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"its JSON cannot be read: {error}"
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip().rstrip("`").rstrip()):
        return "it ends before its JSON does: the output was cut off"
    return f"its JSON is malformed at line {error.lineno}, column {error.colno}: {error.msg}"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) < len(pairs):
        for key, value in pairs:
            if decoded[key] != value:
                raise ValueError(f"the key {key!r} is given twice, with different values")
    return decoded


# Not strict: a line break inside a JSON string is not JSON, but it is what models write, and means one thing only.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant, object_pairs_hook=_object)
