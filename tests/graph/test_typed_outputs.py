"""What models really return: each shape is either the value it means or an error that says what is wrong with it."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk
from langgraph.errors import EmptyChannelError
from langgraph.types import Overwrite
from pydantic import BaseModel, ConfigDict, Field, RootModel, SecretStr, field_validator

from langgraph_memstate import TypedReducer
from langgraph_memstate.errors import SchemaError
from langgraph_memstate.graph import outputs


class Diet(enum.Enum):
    VEGAN = "vegan"
    ANY = "any"


class Address(BaseModel):
    street: str = ""


class Profile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    age: int | None = None
    diet: Diet = Diet.ANY
    born: date | None = None
    height: float | None = None
    address: Address = Address()
    tags: list[str] = []


ANN = Profile(name="Ann", age=30)
JSON = '{"name": "Ann", "age": 30}'


def calls(*args: Any, name: str = "Profile", text: str = "") -> AIMessage:
    return AIMessage(text, tool_calls=[{"name": name, "args": each, "id": str(n)} for n, each in enumerate(args)])


def result(raw: Any = None, parsed: Any = None, error: Any = None) -> dict[str, Any]:
    return {"raw": raw, "parsed": parsed, "parsing_error": error}


BLOCKS: list[Any] = [
    {"type": "thinking", "thinking": 'maybe {"name": "Bob"}?', "signature": "s"},
    {"type": "text", "text": "Here it is:"},
    {"type": "text", "text": JSON},
]
TOOL_USE: list[Any] = [
    {"type": "text", "text": "I will save it."},
    {"type": "tool_use", "id": "1", "name": "Profile", "input": {"name": "Ann", "age": 30}},
]

VALID: dict[str, tuple[Any, Profile]] = {
    "an instance": (Profile(name="Ann", age=30), ANN),
    "a dict": ({"name": "Ann", "age": 30}, ANN),
    "JSON": (JSON, ANN),
    "JSON in white space": (f"\n\n  {JSON}\n", ANN),
    "fenced": (f"```json\n{JSON}\n```", ANN),
    "fenced without a language": (f"```\n{JSON}\n```", ANN),
    "fenced, with prose around": (f"Sure! Here it is:\n\n```json\n{JSON}\n```\nAnything else?", ANN),
    "prose around": (f"The profile is {JSON}. I hope {{this}} helps {{ }}!", ANN),
    "braces in strings": ('Here: {"name": "A{n}n \\"}\\" {", "age": 30} :-}', Profile(name='A{n}n "}" {', age=30)),
    "a fence inside a string": ('```json\n{"name": "```", "age": 30}\n```', Profile(name="```", age=30)),
    "the same object twice": (f"Draft: {JSON}\nFinal: {JSON}", ANN),
    "the same value, spelt twice": (f'{JSON} or {{"age": 30.0, "name": "Ann"}}', ANN),
    "another object that is no profile": (f'Given {{"query": "ann"}} the answer is {JSON}', ANN),
    "a byte order mark": (f"\ufeff{JSON}", ANN),
    "a line break inside a string": ('{"name": "Ann\nLee"}', Profile(name="Ann\nLee")),
    "unicode": ('{"name": "Žofie \\u00e9 🥕 \\ud83e\\udd55"}', Profile(name="Žofie é 🥕 🥕")),
    "an enum and a date": ('{"name": "Ann", "diet": "vegan", "born": "1990-02-28"}',
                           Profile(name="Ann", diet=Diet.VEGAN, born=date(1990, 2, 28))),
    "a number as a text": ('{"name": "Ann", "age": "30"}', ANN),
    "nested objects": ('{"name": "Ann", "address": {"street": "Low {3}"}, "tags": ["a", "}"]}',
                       Profile(name="Ann", address=Address(street="Low {3}"), tags=["a", "}"])),
    "a message": (AIMessage(JSON), ANN),
    "a message chunk": (AIMessageChunk(content=JSON), ANN),
    "content blocks": (AIMessage(BLOCKS), ANN),
    "a tool call": (calls({"name": "Ann", "age": 30}), ANN),
    "a tool call with a text": (calls({"name": "Ann", "age": 30}, text='I called it with {"name": "Bob"}'), ANN),
    "a tool_use block": (AIMessage(TOOL_USE), ANN),
    "a tool call among others": (
        AIMessage("", tool_calls=[
            {"name": "search", "args": {"name": "Bob"}, "id": "1"},
            {"name": "Profile", "args": {"name": "Ann", "age": 30}, "id": "2"},
        ]), ANN),
    "two equal tool calls": (calls({"name": "Ann", "age": 30}, {"name": "Ann", "age": 30}), ANN),
    "a tool call nested": (calls({"name": "Ann", "address": {"street": "Low"}}),
                           Profile(name="Ann", address=Address(street="Low"))),
    "tool arguments with a text for JSON": (
        AIMessage("", invalid_tool_calls=[{"name": "Profile", "args": JSON, "id": "1", "error": None}]), ANN),
    "a structured result": (result(AIMessage(""), ANN), ANN),
    "a structured result as a dict": (result(AIMessage(""), {"name": "Ann", "age": 30}), ANN),
    "a structured result that was not parsed": (result(AIMessage(f"```{JSON}```"), None, ValueError("no")), ANN),
    "a megabyte": (f'{"so {on} " * 130_000}{JSON}', ANN),
    "a megabyte inside": (json.dumps({"name": "x" * 1_000_000}), Profile(name="x" * 1_000_000)),
    "an overwrite": (Overwrite(JSON), ANN),
    "an overwrite as a dict": ({"__overwrite__": {"name": "Ann", "age": 30}}, ANN),
}  # fmt: skip

INVALID: dict[str, tuple[Any, str]] = {
    "nothing": (None, "valid dictionary"),
    "an empty text": ("", "it is empty"),
    "white space": (" \n\t", "it is empty"),
    "an empty message": (AIMessage(""), "it is empty"),
    "prose": ("I could not find anything about {Ann}.", "no JSON object"),
    "a number": ("42", "no JSON object"),
    "null": ("null", "no JSON object"),
    "single quotes": ("{'name': 'Ann'}", "double quotes"),
    "truncated": ('{"name": "Ann", "age": ', "cut off"),
    "truncated in a string": ('```json\n{"name": "Ann', "cut off"),
    "truncated, fence closed": ('```json\n{"name": "Ann", "address": {"street": "Low"}\n```', "cut off"),
    "truncated by the token limit": (AIMessage('{"name": "A', response_metadata={"finish_reason": "length"}), "limit"),
    "a trailing comma": ('{"name": "Ann", "age": 30,}', "malformed at line 1, column 27"),
    "a comment": ('{"name": "Ann" // her name\n}', "malformed"),
    "malformed, with a whole object inside": ('{"name": "Ann",, "x": {"name": "Bob"}}', "malformed"),
    "a missing field": ('{"age": 30}', "name: Field required"),
    "a wrong type": ('{"name": "Ann", "age": "old"}', "age: Input should be a valid integer"),
    "a wrong enum": ('{"name": "Ann", "diet": "keto"}', "diet: Input should be 'vegan' or 'any'"),
    "a wrong nested type": ('{"name": "Ann", "address": {"street": 5}}', "address.street: Input should be"),
    "an extra field": ('{"name": "Ann", "mood": "good"}', "mood: Extra inputs are not permitted"),
    "no number": ('{"name": "Ann", "height": NaN}', "NaN is no JSON value"),
    "an infinite number": ('{"name": "Ann", "height": -Infinity}', "-Infinity is no JSON value"),
    "a key given twice": ('{"name": "Ann", "name": "Bob"}', "'name' is given twice"),
    "a list": (f"[{JSON}]", "should be an object"),
    "a list of values": ([{"name": "Ann"}], "valid dictionary"),
    "two objects": (f'{JSON} or {{"name": "Bob"}}', "two different objects"),
    "two tool calls": (calls({"name": "Ann"}, {"name": "Bob"}), "two different objects"),
    "another tool called": (calls({"name": "Ann"}, name="search"), "it calls 'search' and no tool named 'Profile'"),
    "a wrong tool call": (calls({"name": 5}), "name: Input should be a valid string"),
    "tool arguments that break off": (
        AIMessage("", invalid_tool_calls=[{"name": "Profile", "args": '{"name": "A', "id": "1", "error": "e"}]),
        "tool call cannot be read: it ends before"),
    "a refusal": (AIMessage("", additional_kwargs={"refusal": "I cannot help."}), "refused to answer: I cannot help"),
    "a refusal block": (AIMessage([{"type": "refusal", "refusal": "Not that."}]), "refused to answer: Not that"),
    "thoughts only": (AIMessage([BLOCKS[0]]), "it is empty"),
    "a failed structured result": (result(AIMessage("no"), None, ValueError("bad")), "parsing failed: bad"),
    "an empty structured result": (result(), "valid dictionary|no valid Profile"),
    "an instance of another class": (Address(street="Low"), "valid dictionary or instance of Profile"),
    "an instance made without validation": (Profile.model_construct(name=5), "name: Input should be a valid string"),
    "a nested instance made without validation": (
        {"name": "Ann", "address": Address.model_construct(street=5)}, "street: Input should be"),
    "a lone surrogate": ('{"name": "\\ud800"}', "hex escape"),
    "a long number": ('{"name": "Ann", "age": ' + "9" * 5000 + "}", "cannot be read"),
    "deep nesting": ('{"name": ' + '{"a":' * 200_000, "nested too deeply"),
    "a megabyte of braces": ("{" * 1_000_000, "no JSON object"),
    "a megabyte of nothing": ("lorem " * 170_000, "no JSON object"),
    "an overwrite with nonsense": (Overwrite("nonsense"), "no JSON object"),
    "an overwrite as a dict with nonsense": ({"type": "__overwrite__", "value": 5}, "valid dictionary"),
}  # fmt: skip


def channel(schema: Any = Profile, before: Any = None, **options: Any) -> TypedReducer:
    made = TypedReducer(schema, **options)
    made.key = "profile"
    return made if before is None else made.from_checkpoint(before)


@pytest.mark.parametrize("shape", VALID)
def test_a_shape_that_means_a_value(shape: str) -> None:
    output, expected = VALID[shape]
    holder = channel()
    assert holder.update([output])
    assert holder.get() == expected
    assert type(holder.get()) is Profile


@pytest.mark.parametrize("before", [None, Profile(name="Zoe", age=1)], ids=["first write", "later write"])
@pytest.mark.parametrize("shape", INVALID)
def test_a_shape_that_means_none(shape: str, before: Profile | None) -> None:
    output, reason = INVALID[shape]
    holder = channel(before=before)
    with pytest.raises(SchemaError, match=reason) as caught:
        holder.update([output])
    assert str(caught.value).startswith("profile: the output is no valid Profile: ")
    assert caught.value.where == "profile"
    assert len(str(caught.value)) < 2500
    if before is None:
        with pytest.raises(EmptyChannelError):
            holder.get()
    else:
        assert holder.get() == before
        assert holder.checkpoint() is before


@pytest.mark.parametrize("shape", [*VALID, *INVALID])
def test_reading_leaves_what_was_handed_in_alone(shape: str) -> None:
    output = {**VALID, **INVALID}[shape][0]
    before = repr(output)
    holder = channel(before=Profile(name="Zoe"))
    try:
        holder.update([output])
    except SchemaError:
        assert holder.get() == Profile(name="Zoe")
    assert repr(output) == before


def test_the_error_can_be_sent_back_to_the_model() -> None:
    with pytest.raises(SchemaError) as caught:
        channel().update(['{"name": "Ann", "age": "old", "diet": "keto"}'])
    assert str(caught.value) == (
        "profile: the output is no valid Profile: age: Input should be a valid integer, unable to parse string as an "
        "integer; diet: Input should be 'vegan' or 'any'. "
        'Output was: {"name": "Ann", "age": "old", "diet": "keto"}'
    )
    assert caught.value.fields == ("age", "diet")


def test_an_error_shows_a_long_output_cut() -> None:
    with pytest.raises(SchemaError) as caught:
        channel().update([json.dumps({"name": 5, "tags": ["x" * 1_000_000]})])
    assert caught.value.output.endswith("(1000025 characters)")
    assert len(str(caught.value)) < 1000


def test_what_was_handed_in_and_what_is_stored_share_nothing() -> None:
    given = Profile(name="Ann", tags=["a"])
    holder = channel()
    holder.update([given])
    given.tags.append("changed by the giver")
    taken = holder.get()
    taken.tags.append("changed by the taker")
    taken.name = "Bob"
    assert holder.get() == Profile(name="Ann", tags=["a"])
    assert holder.checkpoint() == Profile(name="Ann", tags=["a"])


def test_a_nested_dict_is_not_shared_either() -> None:
    class Free(BaseModel):
        content: dict[str, Any]

    given: dict[str, Any] = {"content": {"a": [1]}}
    holder = channel(Free)
    holder.update([given])
    given["content"]["a"].append(2)
    assert holder.get() == Free(content={"a": [1]})


def test_a_model_changed_in_place_is_validated_again() -> None:
    holder = channel(before=Profile(name="Ann", age=3))
    changed = holder.get()
    changed.age = "unknown"
    with pytest.raises(SchemaError, match="age: Input should be a valid integer"):
        holder.update([changed])
    assert holder.get() == Profile(name="Ann", age=3)


class Tags(RootModel[list[str]]):
    pass


def test_an_instance_of_a_root_model() -> None:
    class Tagged(BaseModel):
        tags: Tags

    for schema, value in ((Tags, Tags(["a"])), (Tagged, Tagged(tags=Tags(["a"])))):
        holder = channel(schema)
        holder.update([value])
        assert holder.get() == value
    changed = Tags(["a"])
    changed.root.append(5)  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="Input should be a valid string"):
        channel(Tags).update([changed])


@pytest.mark.parametrize("merge", ["replace", "update"])
def test_a_default_that_is_not_of_its_type(merge: Any) -> None:
    class Loose(BaseModel):
        name: str = None  # type: ignore[assignment]
        age: int = 0

    holder = channel(Loose, merge=merge)
    for output in ({"age": 3}, Loose(age=3), Loose(age=4), {"age": 4}):
        holder.update([output])
    assert holder.get() == Loose(age=4)
    assert holder.get().model_fields_set == {"age"}
    with pytest.raises(SchemaError, match="name: Input should be a valid string"):
        holder.update([{"name": None}])


# -- how much work a text makes -------------------------------------------------------------------


class Counting(json.JSONDecoder):
    """Counts how often it is asked, and how many characters it gets through."""

    attempts = 0
    decoded = 0

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.attempts += 1
        try:
            value, end = super().raw_decode(s, idx)
        except json.JSONDecodeError as error:
            self.decoded += error.pos - idx
            raise
        self.decoded += end - idx
        return value, end


@pytest.mark.parametrize(
    ("text", "attempts"),
    [
        ("{" * 1_000_000, 0),
        ("{ " * 500_000, 0),
        ("{" + " " * 1_000_000, 0),
        ("[" * 1_000_000, 0),
        ("[{" * 500_000, 0),
        ('{"' * 500_000, 0),
        ('{"a"' * 250_000, 0),
        ('{"\\"' * 250_000, 0),
        ("{}" * 500_000, 500_000),
        ('{"a":' * 200_000, 1),
        ('{"a":1,' * 140_000, 1),
        ('{"a":1} ' * 125_000, 125_000),
        ('{"a":"' + "x{" * 500_000, 1),
        ('[{"a":1},' * 110_000, 1),
    ],
    ids=lambda value: repr(value[:9]) if isinstance(value, str) else "",
)
def test_no_text_is_decoded_twice(text: str, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(strict=False)
    monkeypatch.setattr(outputs, "_DECODER", counting)
    outputs.read_text(text)
    assert counting.attempts == attempts
    assert counting.decoded <= len(text)


def test_nothing_is_evaluated() -> None:
    holder = channel()
    for text in ("__import__('os').abort()", "dict(name='Ann')", "{'name': __import__('os').abort()}", "Profile()"):
        with pytest.raises(SchemaError, match="no JSON object"):
            holder.update([text])


# -- schemas --------------------------------------------------------------------------------------


def test_a_strict_model_reads_dates_from_json() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True)
        born: date
        kind: Diet

    for output in ('{"born": "1990-02-28", "kind": "any"}', AIMessage("", tool_calls=[
        {"name": "Strict", "args": {"born": "1990-02-28", "kind": "any"}, "id": "1"}
    ])):  # fmt: skip
        holder = channel(Strict)
        holder.update([output])
        assert holder.get() == Strict(born=date(1990, 2, 28), kind=Diet.ANY)
    with pytest.raises(SchemaError, match="born: Input should be a valid date"):
        channel(Strict).update([{"born": "1990-02-28", "kind": Diet.ANY}])


@pytest.mark.parametrize("update", ['{"dateOfBirth": "1815-12-10", "langs": ["en"]}', calls({"born": "1815-12-10"})])
def test_a_strict_model_is_updated_from_json(update: Any) -> None:
    class Profile(BaseModel):
        model_config = ConfigDict(strict=True)

        name: str
        key: SecretStr = SecretStr("")
        born: date | None = Field(None, alias="dateOfBirth")
        langs: set[str] = {"en"}

    holder = channel(Profile, merge="update")
    holder.update([{"name": "Ada", "key": SecretStr("secret"), "langs": {"en"}}])
    holder.update([update])
    assert holder.get().born == date(1815, 12, 10)
    assert (holder.get().langs, holder.get().key.get_secret_value()) == ({"en"}, "secret")
    for wrong in ('{"name": 5}', '{"born": "soon"}'):
        with pytest.raises(SchemaError, match="Input should be a valid"):
            holder.update([wrong])


def test_a_model_with_secrets_private_state_and_aliases() -> None:
    class Account(BaseModel):
        user_name: str = Field(alias="userName")
        password: SecretStr
        _seen: int = 0

    holder = channel(Account)
    given = Account(userName="ann", password=SecretStr("s3cret"))
    given._seen = 4
    holder.update([given])
    assert (holder.get(), holder.get()._seen) == (given, 4)
    for output in ('{"userName": "bob", "password": "p"}', '{"user_name": "bob", "password": "p"}'):
        holder.update([output])
        assert holder.get().user_name == "bob"
    with pytest.raises(SchemaError) as caught:
        holder.update([Account.model_construct(user_name=4, password=SecretStr("s3cret"))])
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("k"), RuntimeError("r"), RecursionError("deep")])
def test_whatever_a_validator_raises_is_a_refusal(error: Exception) -> None:
    class Angry(BaseModel):
        name: str

        @field_validator("name")
        @classmethod
        def check(cls, name: str) -> str:
            if name == "bad":
                raise error
            return name

    holder = channel(Angry, before=Angry(name="good"))
    with pytest.raises(SchemaError, match="validating it failed"):
        holder.update(['{"name": "bad"}'])
    assert holder.get() == Angry(name="good")


def test_a_tool_of_another_name_and_a_title() -> None:
    class Titled(BaseModel):
        model_config = ConfigDict(title="save_titled")
        n: int

    for name in ("Titled", "save_titled"):
        holder = channel(Titled)
        holder.update([calls({"n": 1}, name=name)])
        assert holder.get() == Titled(n=1)
    holder = channel(Titled, tool="keep")
    holder.update([calls({"n": 2}, name="keep")])
    assert holder.get() == Titled(n=2)
    with pytest.raises(SchemaError, match="no tool named 'keep'"):
        holder.update([calls({"n": 3}, name="Titled")])


def test_a_model_with_the_fields_of_a_structured_result() -> None:
    class Parse(BaseModel):
        raw: str
        parsed: str
        parsing_error: str | None

    holder = channel(Parse)
    holder.update([result("r", "p", None)])
    assert holder.get() == Parse(raw="r", parsed="p", parsing_error=None)


Make = Callable[[], Any]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TypedReducer(int), "holds a Pydantic model"),
        (lambda: TypedReducer(list[int]), "holds a Pydantic model"),
        (lambda: TypedReducer(Profile, merge="append"), "merge is 'replace'"),  # type: ignore[arg-type]
        (lambda: TypedReducer(list[Profile], merge="update"), "a list takes key="),
        (lambda: TypedReducer(Tags, merge="update"), "a RootModel has none"),
        (lambda: TypedReducer(Profile, key="name"), "items of a list"),
        (lambda: TypedReducer(list[Profile], key="nickname"), "items of a list"),
    ],
)
def test_a_channel_that_makes_no_sense(make: Make, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        make()
