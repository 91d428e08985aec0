"""TypedReducer: a channel that holds a Pydantic model, or a list of them, and nothing else.

A reducer function is not called for the first write of a channel, so this is a channel of its own, which LangGraph
takes from an annotation just as well. Whatever is written, by whichever way, `update` sees it before a checkpoint does.

A channel that refuses a value keeps the value it had, and tells the checkpointer, which forgets the write, and does not
save the step: other channels may have taken their part of it.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, get_args, get_origin

from langchain_core.messages import BaseMessage
from langgraph.channels.base import BaseChannel
from langgraph.errors import EmptyChannelError
from pydantic import BaseModel, RootModel, TypeAdapter, ValidationError

from langgraph_memstate.errors import SchemaError
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.outputs import Reading, read_output
from langgraph_memstate.graph.pregel import MISSING
from langgraph_memstate.graph.refusals import Scope, current
from langgraph_memstate.schemas import faults, fields_at_fault, shown

logger = logging.getLogger("langgraph_memstate")

typed_names: set[str] = set()
"""The names of all typed channels in this process."""

Merge = Literal["replace", "update"] | Callable[[Any, Any], Any]


class _Unusable(Exception):
    """Why an output is no value of the schema."""

    def __init__(self, reason: str, fields: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.fields = fields


class TypedReducer(BaseChannel[Any, Any, Any]):
    """``Annotated[Profile, TypedReducer(Profile)]``: what does not validate never reaches a checkpoint.

    Writes may be what models return: an instance, a dict, a text with JSON in it, an `AIMessage` with tool calls or
    content blocks, or the ``{"raw", "parsed", "parsing_error"}`` of a structured-output call. `Overwrite` replaces the
    value however writes are merged, and ``Overwrite(None)`` takes it away. Readers get a copy of the value, so changing
    it in place changes nothing.

    An instance is validated again, since it may have been changed in place, and so is every field by ``"update"``: the
    validators of a model have to take what they returned, and to leave it as it is.

    A stored value that its class does not accept any more is handed out as it is stored, with a warning in the log: the
    thread goes on, and the next write has to be valid.

    Args:
        schema: a Pydantic model class, or ``list[Model]``.
        merge: ``"replace"``: a write is the new value, and two different ones in a step are an error. ``"update"``: a
            write sets the fields it names (the first must be a whole value). A function of the current value (None
            if there is none) and the validated write: what it returns is validated.
        key: for ``list[Model]``: a write is an item or a list of items, each of which replaces the one with the same
            value in this field, or is appended.
        tool: the name of the tool call that holds the value; default: the model's name or its title.

    Raises:
        SchemaError: `schema`, `merge` and `key` do not fit together.
    """

    def __init__(
        self, schema: Any, *, merge: Merge = "replace", key: str | None = None, tool: str | None = None
    ) -> None:
        super().__init__(schema)
        self.is_list = get_origin(schema) is list and len(get_args(schema)) == 1
        model = get_args(schema)[0] if self.is_list else schema
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise SchemaError(f"a typed channel holds a Pydantic model or a list of one, not {schema!r}")
        if merge not in ("replace", "update") and not callable(merge):
            raise SchemaError(f"merge is 'replace', 'update' or a function, not {merge!r}")
        if merge == "update" and self.is_list:
            raise SchemaError("merge='update' sets fields of a model; a list takes key=… to replace items")
        if merge == "update" and issubclass(model, RootModel):
            raise SchemaError("merge='update' sets fields of a model, and a RootModel has none")
        if key is not None and (not self.is_list or merge != "replace" or key not in model.model_fields):
            raise SchemaError(f"key={key!r} is a field of the items of a list, and a way to merge of its own")
        self.model: type[BaseModel] = model
        self.merge = merge
        self.item_key = key
        self.tool = tool
        self._tool_names = frozenset(
            (tool,) if tool else (model.__name__, model.model_config.get("title") or model.__name__)
        )
        self.value: Any = MISSING
        self._adapter: TypeAdapter[Any] = TypeAdapter(schema)
        self._scope: Scope | None = None
        self._is_live = False
        self._is_loaded = False

    # -- what LangGraph asks of a channel -----------------------------------------------------------

    _names: list[str]

    @property
    def key(self) -> str:
        """The name of its channel. LangGraph gives it; one instance that serves several has all of their names."""
        return " or ".join(self._names)

    @key.setter
    def key(self, name: str) -> None:
        names = self.__dict__.setdefault("_names", [])
        if name and name not in names:
            names.append(name)
            typed_names.add(name)

    @property
    def ValueType(self) -> Any:
        return self.typ

    @property
    def UpdateType(self) -> Any:
        return self.typ

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TypedReducer) and self._spec() == other._spec()

    def __hash__(self) -> int:
        return hash((self.model, self.is_list, self.item_key, self.tool))

    def _spec(self) -> tuple[Any, ...]:
        return self.typ, self.merge, self.item_key, self.tool

    def copy(self) -> Self:
        twin = object.__new__(type(self))
        twin.typ = self.typ
        twin.__dict__.update(self.__dict__, _names=list(self._names), _is_live=False)
        return twin

    def holding(self, value: Any, name: str) -> Self:
        """A channel by itself, to try a write on."""
        channel = self.copy()
        channel.value, channel._scope, channel._names = value, None, [name]
        return channel

    def from_checkpoint(self, checkpoint: Any) -> Self:
        channel = self.copy()
        channel.value = checkpoint if checkpoint is MISSING else self._stored(checkpoint)
        channel._scope = scope = current()
        channel._is_live = True
        channel._is_loaded = channel.is_available()
        if scope is not None:
            for name in self._names:
                scope.ledger.add_channel(scope.place, name, channel.copy())
        return channel

    def _stored(self, value: Any) -> Any:
        """A stored value, which an untyped channel may have written."""
        models = value if self.is_list and isinstance(value, list) else [value]
        if all(isinstance(one, self.model) for one in models) and isinstance(value, list) is self.is_list:
            return value
        try:
            return self._adapter.validate_python(copy.deepcopy(value))
        except Exception as error:
            logger.warning("%s: the stored value is no valid %s any more: %r", self.key, self._schema_name, error)
            return value

    def checkpoint(self) -> Any:
        return self.value

    def is_available(self) -> bool:
        return self.value is not MISSING

    def get(self) -> Any:
        if self.value is MISSING:
            raise EmptyChannelError()
        return copy.deepcopy(self.value)

    def update(self, values: Sequence[Any]) -> bool:
        """Merge the writes of a step, in order, or none of them.

        Raises:
            SchemaError: a write is no value of the schema, or does not go with the value or the other writes.
        """
        if not values:
            return False
        merged: Any = self.value
        overwrites = [value for value in values if pregel.overwritten(value)[0]]
        written: list[Any] = []
        for output in overwrites or values:
            try:
                if written and (overwrites or (self.merge == "replace" and self.item_key is None)):
                    merged = self._agreed(merged, output)
                else:
                    merged = self._merged(merged, output)
            except _Unusable as unusable:
                raise self._refuse(output, unusable) from (unusable.__cause__ or None)
            written.append(output)
        self.value, self._is_loaded = merged, False
        return True

    # -- merging ------------------------------------------------------------------------------------

    def _agreed(self, merged: Any, output: Any) -> Any:
        if self._replacement(pregel.overwritten(output)[1] if pregel.overwritten(output)[0] else output) == merged:
            return merged
        raise _Unusable(
            "another task of the same step wrote another value, and only one can replace the old: write it in one "
            "place, or merge with merge='update', key=… or a function"
        )

    def _merged(self, value: Any, output: Any) -> Any:
        """The value after a write."""
        is_overwrite, content = pregel.overwritten(output)
        if is_overwrite:
            return MISSING if content is None else self._replacement(content)
        if self.merge == "update":
            return self._one_of(output, lambda content, is_json: self._with_fields(value, content, is_json))
        written = self._replacement(output)
        if self.item_key is not None:
            return self._with_items([] if value is MISSING else value, written)
        if callable(self.merge):
            return self._combined(self.merge, value, written)
        return written

    def _combined(self, merge: Callable[[Any, Any], Any], value: Any, written: Any) -> Any:
        before = None if value is MISSING else copy.deepcopy(value)
        try:
            result = merge(before, written)
        except Exception as error:
            raise _Unusable(f"the merge function failed: {error!r}") from error
        return self._valid(result, is_json=False)

    def _with_items(self, items: Any, written: list[BaseModel]) -> list[BaseModel]:
        key = self.item_key or ""
        if self._is_loaded:
            items = self._valid(items, is_json=False)
        try:
            new: dict[Any, BaseModel] = {}
            for item in written:
                if new.setdefault(getattr(item, key), item) != item:
                    raise _Unusable(f"it has two different items with {key}={getattr(item, key)!r}", (key,))
            kept = [new.pop(getattr(item, key, None), item) for item in items]
        except TypeError as error:
            raise _Unusable(f"{key}: {error}, so it cannot tell items apart", (key,)) from error
        return [*kept, *new.values()]

    def _with_fields(self, value: Any, content: Any, is_json: bool) -> Any:
        if value is MISSING:
            return self._valid(content, is_json)
        if isinstance(content, self.model):
            content = {name: getattr(self._valid(content, is_json), name) for name in content.model_fields_set}
        if not isinstance(content, Mapping):
            raise _Unusable(f"an update is an object with some of its fields, not a {type(content).__name__}")
        aliases = {alias: name for name, field in self.model.model_fields.items() for alias in _aliases(field)}
        named = {aliases.get(name, name): field for name, field in content.items()}
        takes_any = not named or self.model.model_config.get("extra") == "allow"
        if not takes_any and named.keys().isdisjoint(self.model.model_fields):
            raise _Unusable(f"it names none of the fields {', '.join(self.model.model_fields)}")
        if is_json and isinstance(value, BaseModel) and self.model.model_config.get("strict"):
            named = self._decoded(value, named)
        before = _fields(value) if isinstance(value, BaseModel) else value if isinstance(value, Mapping) else {}
        merged = self._valid({**before, **named}, is_json=False)
        if isinstance(value, BaseModel):
            merged.model_fields_set.intersection_update(value.model_fields_set | named.keys())
        return merged

    def _decoded(self, value: BaseModel, named: Mapping[Any, Any]) -> dict[Any, Any]:
        """Fields that came as JSON as the objects that a strict model wants: a date is a text there."""
        try:
            others = value.model_dump(mode="json", by_alias=False, round_trip=True)
        except ValueError as error:
            raise _Unusable(f"the value it updates is no JSON: {error}") from error
        whole = self._valid({**others, **named}, is_json=True)
        return {name: getattr(whole, name, content) for name, content in named.items()}

    # -- validation ---------------------------------------------------------------------------------

    def _replacement(self, output: Any) -> Any:
        return self._one_of(output, self._valid)

    def _one_of(self, output: Any, accept: Callable[[Any, bool], Any]) -> Any:
        """The one value that an output means."""
        reading = read_output(output, names=self._tool_names, fields=self.model.model_fields)
        if self.is_list:
            reading = self._items(reading)
        accepted: list[Any] = []
        problem = _Unusable(reading.problem)
        for content in reading.values:
            try:
                value = accept(content, reading.is_json)
            except _Unusable as unusable:
                problem = unusable
                continue
            if accepted and accepted[0] != value:
                raise _Unusable("it holds two different objects that are both valid: give one")
            accepted.append(value)
        if not accepted:
            raise problem
        return accepted[0]

    def _items(self, reading: Reading) -> Reading:
        """An item stands for a list of one; several tool calls are an item each."""
        values = reading.values
        if len(values) > 1 and reading.is_tool and not any(isinstance(value, list) for value in values):
            values = (list(values),)
        listed = tuple([value] if isinstance(value, Mapping | BaseModel) else value for value in values)
        return Reading(listed, reading.problem, reading.is_json)

    def _valid(self, content: Any, is_json: bool) -> Any:
        """The content as a validated value that shares nothing with it."""
        try:
            if is_json:
                text = json.dumps(content, allow_nan=False)
                return self._adapter.validate_json(text, by_alias=True, by_name=True)
            content = copy.deepcopy(content)
            for instance in _instances(content):
                given = instance.root if isinstance(instance, RootModel) else _fields(instance)
                type(instance).__pydantic_validator__.validate_python(given, by_alias=True, by_name=True)
            return self._adapter.validate_python(content, by_alias=True, by_name=True)
        except ValidationError as error:
            raise _Unusable("; ".join(faults(error)), fields_at_fault(error)) from error
        except Exception as error:  # a validator's own, a value that cannot be copied, recursion
            raise _Unusable(f"validating it failed: {error!r}") from error

    def _refuse(self, output: Any, unusable: _Unusable) -> SchemaError:
        text = shown(output)
        if isinstance(output, BaseMessage):
            text = shown(getattr(output, "tool_calls", None) or output.content)
        error = SchemaError(
            f"{self.key}: the output is no valid {self._schema_name}: {unusable}. Output was: {text}",
            where=self.key,
            output=text,
            fields=unusable.fields,
        )
        if self._scope is not None:
            self._scope.ledger.refuse(self._names, output)
            if self._is_live:
                self._scope.ledger.leave_half(self._scope.place, error)
        return error

    @property
    def _schema_name(self) -> str:
        return f"list of {self.model.__name__}" if self.is_list else self.model.__name__


def _fields(model: BaseModel) -> dict[str, Any]:
    """The fields that make the model again. A default that was not given is not validated (`name: str = None`)."""
    known, given = type(model).model_fields, model.model_fields_set
    stored = {
        name: value
        for name, value in model.__dict__.items()
        if name in known and (name in given or value is not known[name].default)
    }
    return {**stored, **(model.__pydantic_extra__ or {})}


def _aliases(field: Any) -> list[str]:
    choices = getattr(field.validation_alias, "choices", [field.validation_alias])
    return [alias for alias in (*choices, field.alias) if isinstance(alias, str)]


def _instances(value: Any) -> Iterator[BaseModel]:
    """Every model instance in a value: one made without validation, or changed since, is taken for valid otherwise."""
    waiting = [value]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, BaseModel):
            yield one
            waiting += _fields(one).values()
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
