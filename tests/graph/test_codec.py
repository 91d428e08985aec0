"""The serializer of the checkpointer: what is stored comes back as it was, and no row makes reading run code."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import threading
import time as clock
import types
import typing
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_address, ip_interface, ip_network
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import numpy
import ormsgpack
import pydantic
import pydantic.dataclasses
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    ChatMessageChunk,
    FunctionMessage,
    FunctionMessageChunk,
    HumanMessage,
    HumanMessageChunk,
    RemoveMessage,
    SystemMessage,
    SystemMessageChunk,
    ToolMessage,
    ToolMessageChunk,
)
from langchain_core.runnables.utils import AddableDict
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.event_hooks import register_serde_event_listener
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import GetOp, Item, SearchItem
from langgraph.types import Command, Interrupt, Overwrite, PregelTask, Send, interrupt
from pydantic import v1

from langgraph_memstate.errors import (
    CorruptRowError,
    DeserializationError,
    MemStateError,
    SerializationError,
    StagingError,
)
from langgraph_memstate.graph.codec import MemStateSerializer

serde = MemStateSerializer()
upstream = JsonPlusSerializer()


def again(value: Any) -> Any:
    return serde.loads_typed(serde.dumps_typed(value))


def row(code: int, *parts: Any) -> tuple[str, bytes]:
    return "msgpack", ormsgpack.packb(ormsgpack.Ext(code, ormsgpack.packb(list(parts))))


# --- Types that applications keep in their state -----------------------------------------------------------


class Color(enum.Enum):
    RED = "red"
    PAIR = (1, 2)


class Level(enum.IntEnum):
    LOW = 1


class Kind(enum.StrEnum):
    FACT = "fact"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: tuple[int, ...] = ()


Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Plain:
    a: int
    b: Any = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    a: int
    b: tuple[int, ...] = (1,)


@dataclasses.dataclass
class Derived:
    a: int
    double: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.double = self.a * 2
        self.index = {"of": self.a}

    @functools.cached_property
    def slow(self) -> int:
        return self.a


@dataclasses.dataclass
class Locked:
    a: int

    def __post_init__(self) -> None:
        self.lock = threading.Lock()


@pydantic.dataclasses.dataclass
class Checked:
    a: int
    b: list[Point] = dataclasses.field(default_factory=list)


class Inner(pydantic.BaseModel):
    n: int = 0


class Wider(Inner):
    more: str = "more"


class Outer(pydantic.BaseModel):
    inner: Inner = Inner()
    anything: Any = None
    many: list[Inner] = []
    when: datetime | None = None

    class Nested(pydantic.BaseModel):
        kind: Kind = Kind.FACT


class Aliased(pydantic.BaseModel):
    x: int = pydantic.Field(alias="theX")
    y: int = pydantic.Field(1, validation_alias=pydantic.AliasChoices("yy", "why"))


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)
    a: int = 1

    @pydantic.computed_field
    def b(self) -> int:
        return self.a + 1


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    a: int = 1


class Hashed(pydantic.BaseModel):
    """Its validator is not idempotent: validating what was stored would change it."""

    password: str

    @pydantic.field_validator("password", mode="before")
    @classmethod
    def hash(cls, value: str) -> str:
        return "#" + value


class Private(pydantic.BaseModel):
    a: int
    _count: int = pydantic.PrivateAttr(0)
    _lock: Any = pydantic.PrivateAttr(default_factory=threading.Lock)

    def model_post_init(self, context: Any) -> None:
        self._count = 7


class Secrets(pydantic.BaseModel):
    text: pydantic.SecretStr
    data: pydantic.SecretBytes
    url: pydantic.HttpUrl
    day: pydantic.Secret[date]


class Numbers(pydantic.RootModel[list[int]]):
    pass


T = TypeVar("T")


class Box(pydantic.BaseModel, Generic[T]):
    value: T


class Tree(pydantic.BaseModel):
    name: str
    children: list[Tree] = []
    counts: dict[int, int] = {}


class Frame:
    """A type that only the field serializer of a model can store."""

    def __init__(self, cells: list[int]) -> None:
        self.cells = cells

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and self.cells == other.cells

    __hash__ = None


class Report(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    frame: Frame

    @pydantic.field_serializer("frame")
    def dump(self, frame: Frame) -> list[int]:
        return frame.cells

    @pydantic.field_validator("frame", mode="before")
    @classmethod
    def parse(cls, value: Any) -> Frame:
        return value if isinstance(value, Frame) else Frame(value)


class Excluding(pydantic.BaseModel):
    name: str
    client: Any = pydantic.Field(None, exclude=True)

    @pydantic.model_validator(mode="after")
    def connect(self) -> Excluding:
        self.client = self.client or object()
        return self


class Old(v1.BaseModel):
    a: int
    other: Old | None = None
    secret: v1.SecretStr = v1.SecretStr("s")
    _note: str = v1.PrivateAttr("n")


Old.update_forward_refs()


class Made(pydantic.BaseModel):
    """As SQLModel does, it makes its instances itself."""

    a: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Made:
        made = super().__new__(cls)
        object.__setattr__(made, "made", True)
        return made


class OldLocked(v1.BaseModel):
    a: int
    _lock: Any = v1.PrivateAttr(default_factory=threading.Lock)
    _note: str = v1.PrivateAttr("n")


class Labelled(Point):
    pass


@dataclasses.dataclass
class Failure(Exception):
    code: int


class Text(str):
    pass


class Number(int):
    pass


class Ratio(float):
    pass


class Table(dict):
    pass


class Row(list):
    pass


class Bag(set):
    pass


class Identity(uuid.UUID):
    pass


class Moment(datetime):
    pass


def labelled(obj: Any, **attributes: Any) -> Any:
    vars(obj).update(attributes)
    return obj


PARIS = ZoneInfo("Europe/Paris")
NOON = datetime(2024, 10, 27, 2, 30, tzinfo=PARIS)
CET = timezone(timedelta(hours=1), "CET")
NOW = datetime(2024, 5, 1, 12, 30, 1, 5, tzinfo=UTC)

CALL = {"name": "search", "args": {"q": "x", "when": (1, 2)}, "id": "c1", "type": "tool_call"}

VALUES: dict[str, Any] = {
    "none": [None],
    "numbers": [0, -1, True, 1.5, float("inf"), -0.0, 2**63, 2**64, -(2**63) - 1, 10**5000, 3 + 4j, Fraction(1, 3)],
    "decimal": [Decimal("1.10"), Decimal("-Infinity"), Decimal("1E+30")],
    "text": ["", "\x00", "ü" * 40, "\U0001f600"],
    "bytes": [b"", b"\xff" * 300],
    "tuple": (1, ("a", (), [(2,)]), {"k": (3,)}),
    "sets": [{1, "a", (2, 3)}, frozenset({frozenset({1})}), set()],
    "deque": [collections.deque([1, (2,)]), collections.deque([1], maxlen=3)],
    "mappings": [
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.Counter("aab"),
        collections.defaultdict(list, {"a": [1]}),

    ],
    "keys": {2: "a", None: "b", 1.5: "c", True: "d", b"x": "e", (1, "2"): "f"},
    "typed keys": {Color.RED: 1, Kind.FACT: 2, Level.LOW: 3, NOW: 4, uuid.UUID(int=1): 5, 2**70: 6, frozenset([1]): 7},
    "keys of counters": [collections.Counter([Color.RED]), collections.OrderedDict([(Color.RED, 1)])],
    "datetime": [NOW, NOW.replace(tzinfo=None), NOON, NOON.replace(fold=1), datetime(2024, 1, 1, fold=1), datetime.min],
    "datetime in a zone with a name": [NOW.replace(tzinfo=zone) for zone in (CET, timezone(timedelta(0), "Z"))],
    "date and time": [date(2024, 2, 29), time(1, 2, 3, 4), time(1, tzinfo=UTC), time(2, fold=1), timedelta(-1, 3, 5)],
    "zones": [UTC, timezone(timedelta(hours=-3, minutes=-30)), CET, PARIS],
    "uuid": uuid.UUID(int=2**100),
    "paths": [pathlib.Path("/a/b"), pathlib.Path(), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("d:/e")],
    "patterns": [re.compile(r"a+", re.I | re.M), re.compile(rb"\x00")],
    "addresses": [ip_address("1.2.3.4"), ip_address("::1"), ip_network("10.0.0.0/8"), ip_interface("10.0.0.1/8")],
    "enums": [Color.RED, Color.PAIR, Level.LOW, Kind.FACT, Rights.READ | Rights.WRITE],
    "named tuples": [Point(1), Point(1, (2, 3)), Pair([1], None)],
    "dataclasses": [Plain(1, Plain(2, (3,))), Frozen(a=1), Derived(2), Checked(1, [Point(1)])],
    "models": [Outer(inner=Wider(n=3), anything=(Inner(n=1), Plain(2)), many=[Wider()], when=NOW), Outer.Nested()],
    "model options": [Aliased(theX=1, yy=2), Strict(a=5), Open(a=2, extra=Inner()), Numbers([1, 2])],
    "validators": [Hashed(password="p"), Report(frame=Frame([1, 2]))],
    "secrets": Secrets(text="t", data=b"d", url="https://example.org/a?b=c", day=pydantic.Secret(date(2024, 1, 1))),
    "generic models": [
        Box[int](value=1),
        Box[Inner](value=Wider()),
        Box[Box[list[int]]](value=Box[list[int]](value=[1])),
        Box[typing.List[int]](value=[1]),  # noqa: UP006
        Box[dict[str, int | None]](value={"a": None}),
        Box[typing.Literal["a", 1]](value="a"),
        Box[tuple[int, ...]](value=(1,)),
        Box[Annotated[int, pydantic.Field(gt=0)]](value=1),
        Box(value="unbound"),
    ],
    "trees": Tree(name="a", children=[Tree(name="b", counts={1: 2}), Tree(name="c")]),
    "partial models": Aliased.model_construct(y=3),
    "pydantic v1": Old(a=1, other=Old(a=2)),
    "subclasses of values": [
        Text("t"), Number(5), Number(2**80), Ratio(0.5), Table(a=(1,)), Table({Color.RED: 1}), Row([1]), Bag([1]),
        Identity(int=5), Moment(2024, 1, 1, fold=1), labelled(Text("t"), note=Plain(1)),
    ],
    "messages": [
        HumanMessage("hi", id="1", name="n", additional_kwargs={"k": (1,)}),
        AIMessage("yo", tool_calls=[CALL], usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}),
        AIMessage([{"type": "text", "text": "t"}]),
        AIMessage("z", invalid_tool_calls=[{"name": "n", "args": "{", "id": "i", "error": "e"}]),
        SystemMessage("s"), ChatMessage("c", role="r"), FunctionMessage("f", name="fn"),
        ToolMessage("t", tool_call_id="c1", artifact={"frame": numpy.zeros(2), "p": Point(1)}, status="error"),
        AIMessageChunk("a", tool_call_chunks=[{"name": "n", "args": "{}", "id": "i", "index": 0}]),
        HumanMessageChunk("h"), SystemMessageChunk("s"), ChatMessageChunk("c", role="r"),
        FunctionMessageChunk("f", name="fn"), ToolMessageChunk("t", tool_call_id="c1"),
        RemoveMessage(id="1"), AIMessage("extra", custom="kept"),
    ],
    "documents": Document("text", metadata={"source": pathlib.Path("a"), "at": NOW}, id="d"),
    "langgraph": [
        Send("node", {"m": HumanMessage("x")}), Send("node", (1,), timeout=3.5), Command(goto=["a"], update=[("k", 1)]),
        Command(resume={"id": (1,)}, graph=Command.PARENT), Interrupt(value=Point(1), id="i"), Overwrite([1]),
        PregelTask("id", "name", ("p", 1), None, (), None, None), GetOp(("ns",), "k"),
        Item(value={"a": 1}, key="k", namespace=("a", "b"), created_at=NOW, updated_at=NOW),
        SearchItem(("a",), "k", {"v": 1}, NOW, NOW, score=0.5), _DeltaSnapshot([HumanMessage("x", id="1")]),
    ],
    "arrays": [
        numpy.arange(6).reshape(2, 3), numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)), numpy.arange(9)[::2],
        numpy.array(["2020-01-01"], dtype="M8[D]"), numpy.array(["é", "bc"]), numpy.array([], dtype="f4"),
        numpy.array(5), numpy.array([True, False]), numpy.array([1 + 2j]),
    ],
    "array scalars": [
        numpy.float64(1.5), numpy.float32(0.1), numpy.int8(-3), numpy.bool_(True), numpy.str_("é"), numpy.str_(""),
    ],
}  # fmt: skip
FLAT = [
    pytest.param(value, id=f"{name}-{index}")
    for name, values in VALUES.items()
    for index, value in enumerate(values if type(values) is list else [values])
]


def assert_same(got: Any, want: Any) -> None:
    """Equal, and of the same types all the way down."""
    assert type(got) is type(want)
    if isinstance(want, numpy.ndarray):
        assert got.dtype == want.dtype
        assert got.flags.writeable
        assert got.flags.f_contiguous == (want.flags.f_contiguous or want.ndim < 2)
        assert numpy.array_equal(got, want)
    elif isinstance(want, dict):
        assert_same(list(got.items()), list(want.items()))
        assert getattr(got, "default_factory", None) is getattr(want, "default_factory", None)
    elif isinstance(want, (list, tuple, collections.deque)):
        assert len(got) == len(want)
        assert getattr(got, "maxlen", None) == getattr(want, "maxlen", None)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, (set, frozenset)):
        assert got == want
        assert sorted(type(each).__name__ for each in got) == sorted(type(each).__name__ for each in want)
    elif isinstance(want, (pydantic.BaseModel, v1.BaseModel)) or dataclasses.is_dataclass(want):
        state, other = (
            {k: v for k, v in (vars(each) if hasattr(each, "__dict__") else dataclasses.asdict(each)).items()}
            for each in (got, want)
        )
        assert_same(state, other)
        if isinstance(want, pydantic.BaseModel):
            assert got.model_fields_set == want.model_fields_set
            assert_same(got.__pydantic_extra__, want.__pydantic_extra__)
    else:
        assert got == want
        if isinstance(want, (float, Decimal)):
            assert str(got) == str(want)  # -0.0, 1.10
        if isinstance(want, (datetime, time)):
            assert (got.tzinfo, got.tzname(), got.fold) == (want.tzinfo, want.tzname(), want.fold)


@pytest.mark.parametrize("value", FLAT)
def test_what_is_stored_comes_back_as_it_was(value: Any) -> None:
    assert_same(again(value), value)
    assert_same(again({"channel": [value]}), {"channel": [value]})


def stable_upstream(value: Any) -> bool:
    try:
        back = upstream.loads_typed(upstream.dumps_typed(value))
        assert_same(back, value)
    except (AssertionError, TypeError, ValueError, AttributeError):
        return False
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "value", [each for each in FLAT if "partial" not in str(each.id) and stable_upstream(each.values[0])]
)
def test_rows_of_the_upstream_serializer_are_read(value: Any) -> None:
    assert_same(serde.loads_typed(upstream.dumps_typed(value)), value)


keys = st.one_of(
    st.integers(), st.text(), st.booleans(), st.none(), st.binary(), st.uuids(), st.dates(),
    st.sampled_from([Color.RED, Kind.FACT, Level.LOW]), st.decimals(allow_nan=False),
)  # fmt: skip
hashable = st.recursive(keys, lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)))
leaves = st.one_of(
    hashable,
    st.floats(allow_nan=False),
    st.datetimes(timezones=st.sampled_from([None, UTC, PARIS, timezone(timedelta(minutes=90))])),
    st.times(),
    st.timedeltas(),
    st.builds(Point, st.integers(), st.tuples(st.integers())),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(hashable, inner, max_size=3),
        st.builds(Plain, st.integers(), inner),
        st.builds(Open, a=st.integers(), extra=inner),
        st.builds(Outer, anything=inner),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(hashable, max_size=3),
    ),
    max_leaves=12,
)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=200, deadline=None)
@given(values)
def test_any_nesting_comes_back_as_it_was(value: Any) -> None:
    first = serde.dumps_typed(value)
    back = serde.loads_typed(first)
    assert_same(back, value)
    assert serde.dumps_typed(back) == first


def test_bytes_and_none_have_a_type_of_their_own() -> None:
    assert serde.dumps_typed(None) == ("null", b"")
    assert serde.dumps_typed(b"x") == ("bytes", b"x")
    assert_same(again(b"x"), b"x")
    assert_same(again(bytearray(b"x")), bytearray(b"x"))


def test_what_the_encoder_hides_is_stored_as_upstream_stores_it() -> None:
    for value in ({"a": bytearray(b"x")}, "\ud800", ValueError("x"), {"error": KeyError("y")}):
        assert again(value) == upstream.loads_typed(upstream.dumps_typed(value))


def test_state_is_put_back_without_running_validators_or_constructors() -> None:
    assert again(Hashed(password="p")).password == "#p"
    invalid = Inner.model_construct(n="not a number")
    assert again(invalid).n == "not a number"
    changed = Derived(1)
    changed.double, changed.index = 5, {"mine": 1}
    assert vars(again(changed)) == vars(changed)


def test_private_attributes_come_back_and_those_that_cannot_be_stored_are_made_anew() -> None:
    value = Private(a=1)
    value._count = 42
    back = again(value)
    assert back._count == 42
    assert type(back._lock) is type(threading.Lock())
    assert type(again(Locked(1)).lock) is type(threading.Lock())
    old = Old(a=1)
    old._note = "changed"
    assert again(old)._note == "changed"


def test_excluded_fields_are_not_stored_and_the_class_computes_them_again() -> None:
    value = Excluding(name="a")
    assert type(again(value).client) is object
    assert again(value).name == "a"
    assert b"token" not in serde.dumps_typed(Excluding(name="a", client="token"))[1]


def test_models_and_dataclasses_that_must_be_made_by_their_constructor() -> None:
    assert vars(again(Made(a=1))) == vars(Made(a=1))
    assert again(Failure(5)) == Failure(5)
    old = OldLocked(a=1)
    old._note = "changed"
    back = again(old)
    assert (back, back._note, type(back._lock)) == (old, "changed", type(threading.Lock()))
    unchanged = Excluding.model_construct(name="a")
    assert_same(again(unchanged), unchanged)
    assert_same(vars(again(labelled(Labelled(1), note=(1,)))), {"note": (1,)})


def test_the_offset_of_an_unknown_time_zone_is_kept() -> None:
    parse = pydantic.TypeAdapter(datetime | time).validate_python
    for value in (parse("2024-01-01T00:00:00+02:00"), parse("12:00:00-03:30")):
        assert again(value) == value
        assert again(value).utcoffset() == value.utcoffset()
    with pytest.raises(SerializationError, match="no offset"):
        serde.dumps_typed(time(1, tzinfo=Vague()))


class Vague(tzinfo):
    def utcoffset(self, when: datetime | None) -> None:
        return None


def test_a_zone_is_found_in_the_tzdata_package(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tzdata")
    monkeypatch.setattr("zoneinfo.TZPATH", (str(tmp_path),))
    assert again([PARIS])[0] is PARIS


def test_classes_that_fields_do_not_declare_are_kept() -> None:
    back = again(Outer(inner=Wider(more="x"), anything=Inner(n=1)))
    assert type(back.inner) is Wider
    assert type(back.anything) is Inner


# --- What cannot be stored ---------------------------------------------------------------------------------


def local_class() -> Any:
    @dataclasses.dataclass
    class Local:
        a: int = 1

    return Local()


def local_parameter() -> Any:
    return Box[Annotated[int, pydantic.Field(lt=9)]](value=1)


class Opaque:
    pass


class SlottedText(str):
    __slots__ = ("note",)


class Required(pydantic.BaseModel):
    secret: str = pydantic.Field(exclude=True)


class Holder(pydantic.BaseModel):
    anything: Any


Impostor = type("Impostor", (Inner,), {"__qualname__": "Somewhere.Else"})
cycle: list[Any] = []
cycle.append(cycle)

UNSTORABLE = {
    "function": (lambda: 1, "builtins.function"),
    "class": (Inner, "the class .*Inner itself"),
    "module": (os, "builtins.module"),
    "generator": ((i for i in ()), "builtins.generator"),
    "opaque": (Opaque(), r"Opaque is not a data type"),
    "local": (local_class(), r"local_class\.<locals>\.Local.*top level"),
    "unreachable": (Impostor(), r"Somewhere\.Else"),
    "slots": (SlottedText("x"), r"SlottedText is not a data type"),
    "cycle": (cycle, "contains itself"),
    "objects in an array": (numpy.array([object()]), "dtype object"),
    "structured array": (numpy.zeros(1, dtype=[("a", "i4")]), "dtype"),
    "masked array": (numpy.ma.masked_array([1]), "MaskedArray"),
    "lambda as a factory": (collections.defaultdict(lambda: 1), "default factory"),
    "required but excluded": (Required(secret="s"), r"'secret' of .*Required is required and excluded"),
    "ellipsis": (..., "ellipsis"),
    "struct sequence": (clock.gmtime(0), "struct_time is not a data type"),
    "unnamed type argument": (local_parameter(), r"Box could not be loaded again: .*typing\.Annotated"),
    "in a set": ({print}, "builtin_function_or_method"),
}


@pytest.mark.parametrize(("value", "message"), UNSTORABLE.values(), ids=UNSTORABLE)
def test_what_could_not_be_loaded_is_refused_when_written(value: Any, message: str) -> None:
    with pytest.raises(SerializationError, match=message):
        serde.dumps_typed(value)
    with pytest.raises(SerializationError, match=message):
        serde.dumps_typed({"channel": [Plain(1, value)]})


def test_the_error_says_where_the_value_is() -> None:
    value = {"messages": [HumanMessage("a"), ToolMessage("b", tool_call_id="1", artifact={"cb": print})]}
    with pytest.raises(SerializationError, match=re.escape("at ['messages'][1].artifact['cb'] cannot be stored")):
        serde.dumps_typed(value)
    with pytest.raises(SerializationError, match=re.escape("at ['x'].anything[0].b cannot")):
        serde.dumps_typed({"x": Holder(anything=(Plain(1, Opaque()),))})


def test_an_open_file_is_refused(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "f").open("w") as file, pytest.raises(SerializationError, match="TextIOWrapper"):
        serde.dumps_typed([file])


class Interrupting(tzinfo):
    def utcoffset(self, when: datetime | None) -> timedelta:
        raise KeyboardInterrupt


def test_a_signal_while_writing_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        serde.dumps_typed([Plain(1, datetime(2024, 1, 1, tzinfo=Interrupting()))])


def test_deep_nesting_is_an_error_and_not_a_crash() -> None:
    nested: Any = 1
    for _ in range(3000):
        nested = [nested]
    with pytest.raises(SerializationError):
        serde.dumps_typed(nested)
    nested = 1
    for _ in range(400):
        nested = Plain(1, nested)
    with pytest.raises(SerializationError, match="nest"):
        serde.dumps_typed(nested)
    nested = 1
    for _ in range(90):
        nested = Plain(1, (nested,))
    assert again(nested) == nested
    wide: Any = 1
    for _ in range(20):
        for _ in range(150):
            wide = [wide]
        wide = (wide,)
    with pytest.raises(SerializationError, match="nests deeper"):
        serde.dumps_typed(wide)


def test_a_row_that_is_too_deep_for_the_stack_is_an_error() -> None:
    value: Any = 1
    for _ in range(80):
        value = (value,)
    stored = serde.dumps_typed(value)

    def from_below(depth: int) -> Any:
        return serde.loads_typed(stored) if depth == 0 else from_below(depth - 1)

    assert from_below(0) == value
    frames = len(inspect.stack(0))
    with pytest.raises(DeserializationError, match="too deeply"):
        from_below(sys.getrecursionlimit() - frames - 50)


# --- What a row may do -------------------------------------------------------------------------------------

ran: list[str] = []


class Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        ran.append("metaclass call")
        return super().__call__(*args, **kwargs)

    def __getattribute__(cls, name: str) -> Any:
        if name not in ("__class__",):
            ran.append(f"metaclass attribute {name}")
        return super().__getattribute__(name)

    def __hash__(cls) -> int:
        ran.append("metaclass hash")
        return 1

    def __eq__(cls, other: object) -> bool:
        ran.append("metaclass eq")
        return False


class Trap(metaclass=Meta):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ran.append("constructor")

    @classmethod
    def model_construct(cls, **kwargs: Any) -> None:
        ran.append("classmethod")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        ran.append("init_subclass")


class Callable_:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        ran.append("call")


class Proxy:
    @property
    def __class__(self) -> Any:
        ran.append("class property")
        return type


class Namespace:
    inner = property(lambda self: ran.append("property"))
    function = staticmethod(lambda *a: ran.append("static"))
    instance = Plain(1)


class LazyModule(types.ModuleType):
    def __getattribute__(self, name: str) -> Any:
        ran.append(f"module attribute {name}")
        return super().__getattribute__(name)


def shout(*args: Any, **kwargs: Any) -> None:
    ran.append("function")


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A loaded module in which everything that could run leaves a trace."""
    module = types.ModuleType("attacked")
    module.__getattr__ = lambda name: ran.append(f"module getattr {name}") or shout
    vars(module).update(
        Trap=Trap, function=shout, Color=shout, instance=Plain(1), callable=Callable_(), proxy=Proxy(),
        Namespace=Namespace, model=Inner(), member=Color.RED, partial=functools.partial(shout), Abstract=typing.Any,
    )  # fmt: skip
    lazy = LazyModule("lazily")
    vars(types.ModuleType)["__dict__"].__get__(lazy)["Trap"] = Trap
    monkeypatch.setitem(sys.modules, "attacked", module)
    monkeypatch.setitem(sys.modules, "lazily", lazy)
    monkeypatch.setitem(sys.modules, "not_a_module", Proxy())
    ran.clear()
    return module


FORBIDDEN = [
    ("os", "system"), ("os", "remove"), ("posix", "system"), ("subprocess", "Popen"), ("subprocess", "run"),
    ("builtins", "eval"), ("builtins", "exec"), ("builtins", "open"), ("builtins", "getattr"), ("builtins", "print"),
    ("builtins", "__import__"), ("builtins", "type"), ("builtins", "object"), ("builtins", "super"),
    ("builtins", "bytearray"), ("builtins", "range"), ("builtins", "memoryview"), ("builtins", "Exception"),
    ("importlib", "import_module"), ("pickle", "loads"), ("pickle", "Unpickler"), ("operator", "attrgetter"),
    ("functools", "partial"), ("functools", "reduce"), ("types", "FunctionType"), ("types", "CodeType"),
    ("pathlib", "Path.unlink"), ("pathlib", "Path.write_text"), ("pathlib", "os.system"), ("threading", "Thread"),
    ("socket", "socket"), ("sqlite3", "connect"), ("tempfile", "NamedTemporaryFile"), ("logging", "FileHandler"),
    ("re", "Pattern"), ("re", "_compile"), ("sys", "exit"), ("enum", "Enum"), ("enum", "EnumType"),
    ("attacked", "Trap"), ("attacked", "function"), ("attacked", "Color"), ("attacked", "instance"),
    ("attacked", "callable"), ("attacked", "proxy"), ("attacked", "missing"), ("attacked", "Namespace"),
    ("attacked", "Namespace.inner"), ("attacked", "Namespace.function"), ("attacked", "Namespace.instance"),
    ("attacked", "Namespace.__class__"), ("attacked", "Namespace.__init_subclass__"),
    ("attacked", "model"), ("attacked", "model.n"), ("attacked", "member"), ("attacked", "partial"),
    ("attacked", "partial.func"), ("attacked", "Trap.model_construct"), ("attacked", "Trap.__class__"),
    ("attacked", ""), ("attacked", "."), ("attacked", "__getattr__"), ("lazily", "Trap"), ("", "x"),
    ("not_a_module", "x"), ("antigravity", "fly"), ("xmlrpc.server", "SimpleXMLRPCServer"), ("this", "s"),
]  # fmt: skip
PAYLOADS: list[tuple[int, list[Any]]] = [
    (0, ["touch ran"]), (1, [["touch ran"]]), (1, [[]]), (2, [{}]), (2, [{"a": 1}, {}]), (2, [{"a": 1}, None]),
    (3, ["touch ran", "__call__"]), (3, ["touch ran", "__init_subclass__"]), (3, ["x", "model_construct"]),
    (4, [{}]), (4, [{}, [], {}]), (5, [{}, "model_validate_json"]), (5, [{}, None, [], None, None]),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), FORBIDDEN, ids=map(".".join, FORBIDDEN))
@pytest.mark.parametrize("allowed", [True, "listed"])
def test_a_row_that_names_no_data_type_is_refused_and_nothing_runs(
    module: str, name: str, allowed: Any, target: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    permissive = MemStateSerializer(
        allowed_msgpack_modules=True if allowed is True else [(module, name)], allowed_json_modules=True
    )
    before = set(sys.modules)
    for code, parts in PAYLOADS:
        with pytest.raises(DeserializationError, match=re.escape(f"{module}.{name}")):
            permissive.loads_typed(row(code, module, name, *parts))
    old = {"lc": 2, "type": "constructor", "id": [*module.split("."), name], "args": ["touch ran"], "method": "system"}
    with pytest.raises(DeserializationError):
        permissive.loads_typed(("json", json.dumps([old]).encode()))
    assert ran == []
    assert set(sys.modules) == before
    assert list(tmp_path.iterdir()) == []


class LoudText(str):
    def __new__(cls, *args: Any) -> LoudText:
        ran.append("new")
        return super().__new__(cls, *args)

    def __init__(self, *args: Any) -> None:
        ran.append("init")


class LoudTable(dict):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ran.append("init")

    def __setitem__(self, key: Any, value: Any) -> None:
        ran.append("setitem")

    update = __setitem__


class LoudModel(pydantic.BaseModel):
    a: int

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        ran.append("init")

    def model_post_init(self, context: Any) -> None:
        ran.append("post_init")

    @pydantic.model_validator(mode="before")
    @classmethod
    def check(cls, value: Any) -> Any:
        ran.append("validator")
        return value


@dataclasses.dataclass
class LoudClass:
    a: int

    def __post_init__(self) -> None:
        ran.append("post_init")

    def __setattr__(self, name: str, value: Any) -> None:
        ran.append("setattr")
        super().__setattr__(name, value)


@pytest.mark.parametrize("make", [lambda: LoudText("x"), LoudTable, lambda: LoudModel(a=1), lambda: LoudClass(1)])
def test_reading_runs_no_code_of_a_type_that_has_not_changed(make: Any) -> None:
    value = make()
    stored = serde.dumps_typed(value)
    ran.clear()
    back = serde.loads_typed(stored)
    assert ran == []
    assert type(back) is type(value)
    assert back == value


METHODS = [
    (datetime, "strptime"), (datetime, "now"), (datetime, "__init_subclass__"), (uuid.UUID, "__init__"),
    (Inner, "model_validate"), (Inner, "model_construct"), (Inner, "__init_subclass__"), (Inner, "parse_file"),
    (Plain, "__init__"), (Color, "__call__"), (pathlib.Path, "unlink"), (pathlib.Path, "cwd"), (dict, "fromkeys"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "method"), METHODS)
def test_a_row_cannot_choose_a_method(cls: type, method: str) -> None:
    for arg in ("2024", ["2024"], {"n": 1}):
        with pytest.raises(DeserializationError, match="Refused to call the method"):
            serde.loads_typed(row(3, cls.__module__, cls.__qualname__, arg, method))
    assert serde.loads_typed(row(3, "datetime", "datetime", "2024-01-01", "fromisoformat")) == datetime(2024, 1, 1)


ODD_ARGUMENTS = [
    (1, "builtins", "str", [b"x", "idna"]),  # would import a codec
    (2, "builtins", "str", {"object": b"x", "encoding": "idna"}),
    (0, "builtins", "bytes", 10**12),
    (0, "builtins", "int", "9" * 10),  # decimal digits are hexadecimal here, but no other text is taken
    (1, "builtins", "int", ["11", 2]),
    (1, "fractions", "Fraction", ["1e999999999"]),
    (1, "builtins", "complex", ["1"]),
    (1, "re", "compile", [["a"], 0]),
    (1, "zoneinfo", "ZoneInfo", ["UTC", "x"]),
    (0, "zoneinfo", "ZoneInfo", "../../etc/passwd"),
    (0, "zoneinfo", "ZoneInfo", "Atlantis/Capital"),  # would import tzdata.zoneinfo.Atlantis
    (0, "zoneinfo", "ZoneInfo", "Europe/Atlantis"),
    (0, "zoneinfo", "ZoneInfo", "UTC\x00"),
    (1, "collections", "defaultdict", ["print", {}]),
    (2, "datetime", "datetime", {"year": 1, "month": 1, "day": 1, "hook": 1}),
    (1, "datetime", "timedelta", [10**18, 0, 0]),
    (0, "uuid", "UUID", 5),
    (0, "ipaddress", "IPv4Network", ["10.0.0.0", 99]),
]


@pytest.mark.parametrize(("code", "module", "name", "payload"), ODD_ARGUMENTS)
def test_a_constructor_gets_only_the_arguments_a_writer_gives_it(
    code: int, module: str, name: str, payload: Any
) -> None:
    before = set(sys.modules)
    if (name, payload) == ("int", "9" * 10):
        assert serde.loads_typed(row(code, module, name, payload)) == int("9" * 10, 16)
        return
    with pytest.raises(DeserializationError, match=f"{module}.{name} cannot be made"):
        serde.loads_typed(row(code, module, name, payload))
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "described",
    [
        ["os", "system"], ["builtins", "type"], ["attacked", "Trap"], ["attacked", "missing"], [["os"], "x"], "int", 5,
        [__name__, "Plain", [["builtins", "int"]]], [__name__, "Inner", [["builtins", "int"]]], ["builtins", "int", []],
        ["typing", "Literal", ormsgpack.Ext(0, ormsgpack.packb(["ipaddress", "IPv6Network", "::/0"]))],
    ],
)  # fmt: skip
def test_a_type_argument_that_is_no_data_type_is_refused(described: Any, target: types.ModuleType) -> None:
    before = set(sys.modules)
    for stamp in (None, 1):
        with pytest.raises(DeserializationError):
            serde.loads_typed(row(5, __name__, "Box", {"value": 1}, stamp, ["value"], None, None, [], [described]))
    assert ran == []
    assert set(sys.modules) == before


@pytest.mark.parametrize("name", ["set", "frozenset", "tuple", "list"])
def test_an_endless_value_is_not_unrolled(name: str) -> None:
    endless = ormsgpack.Ext(0, ormsgpack.packb(["ipaddress", "IPv6Network", "::/0"]))
    with pytest.raises(DeserializationError, match="wrong types"):
        serde.loads_typed(row(0, "builtins", name, endless))
    with pytest.raises(MemStateError):
        serde.loads_typed(row(5, __name__, "Inner", {"n": 1}, None, endless))
    item = {"namespace": endless, "key": "k", "value": {}, "created_at": "2024-01-01", "updated_at": "2024-01-01"}
    with pytest.raises(DeserializationError, match="namespace"):
        serde.loads_typed(row(2, "langgraph.store.base", "Item", item))


def nested(levels: int, width: int, lead: bytes = b"\x91") -> bytes:
    data = b"\x01"
    for _ in range(levels):
        data = lead * width + b"\xc9" + len(data).to_bytes(4, "big") + b"\x20" + data
    return data


@pytest.mark.parametrize(
    "data",
    [
        nested(20, 1000), nested(200, 200), nested(5000, 1), nested(30, 900, b"\x81\xa1a"), b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"", b"\xc1",
    ],
)  # fmt: skip
def test_bombs_are_errors(data: bytes) -> None:
    with pytest.raises(MemStateError):
        serde.loads_typed(("msgpack", data))


def test_a_changed_upstream_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonPlusSerializer, "__init__", lambda self, **arguments: None)
    with pytest.raises(StagingError, match="langgraph-checkpoint"):
        MemStateSerializer()


def test_other_kinds_of_rows_are_refused(tmp_path: pathlib.Path) -> None:
    for code in (*range(8, 32), *range(33, 128)):
        with pytest.raises(CorruptRowError, match=f"code {code}"):
            serde.loads_typed(row(code, "datetime", "date", [2024, 1, 1]))
    for parts in ([], ["x"], [1, 2, 3], [["os"], "system", 1], ["os", None, 1]):
        with pytest.raises(CorruptRowError):
            serde.loads_typed(row(0, *parts))
    pickled = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    with pytest.raises(DeserializationError, match="pickle"):
        serde.loads_typed(("pickle", pickled))
    with pytest.raises(DeserializationError, match="msgpack\\+aes"):
        serde.loads_typed(("msgpack+aes", b"x"))
    with pytest.raises(CorruptRowError, match="instead of bytes"):
        serde.loads_typed(("msgpack", "text"))
    with pytest.raises(SerializationError, match="pickle_fallback"):
        MemStateSerializer(pickle_fallback=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "parts",
    [
        ["|O", [1], "C", b"\0" * 8], ["<i8", [2**40], "C", b""], ["<U0", [2**50], "C", b""],
        ["<i8", [-1], "C", b"\0" * 8],
        ["os.system", [1], "C", b"x"], ["<i4", [1], "C", b"\0" * 8], ["<i4", [1], "X", b"\0" * 4], "<i4",
        ["i4,i4", [1], "C", b"\0" * 8], [["<i4"], [1], "C", b""],
    ],
)  # fmt: skip
def test_a_row_that_describes_no_array_is_an_error(parts: Any) -> None:
    with pytest.raises(DeserializationError, match="ndarray"):
        serde.loads_typed(("msgpack", ormsgpack.packb(ormsgpack.Ext(6, ormsgpack.packb(parts)))))


PAYLOAD = serde.dumps_typed({"state": [each.values[0] for each in FLAT]})[1]
SMALL = [serde.dumps_typed(each.values[0])[1] for each in FLAT]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.sampled_from(SMALL)), st.data())
def test_garbage_is_a_value_or_an_error_of_ours(data: bytes, draw: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 3))):
        if changed:
            changed[draw.draw(st.integers(0, len(changed) - 1))] = draw.draw(st.integers(0, 255))
    changed = changed[: draw.draw(st.integers(0, len(changed)))] if draw.draw(st.booleans()) else changed
    kind = draw.draw(st.sampled_from(["msgpack", "json"]))
    before = set(sys.modules)
    with contextlib.suppress(MemStateError):
        serde.loads_typed((kind, bytes(changed)))
    assert set(sys.modules) == before


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1))
def test_a_truncated_row_is_an_error(length: int) -> None:
    with pytest.raises(MemStateError):
        serde.loads_typed(("msgpack", PAYLOAD[:length]))


# --- Types that change, move and vanish --------------------------------------------------------------------


def module_with(source: str, name: str = "vanishing") -> types.ModuleType:
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(textwrap.dedent(source), vars(module))
    return module


@pytest.fixture
def vanishing() -> typing.Iterator[Any]:
    yield module_with
    sys.modules.pop("vanishing", None)


HEADER = "import dataclasses, enum, typing, pydantic\n"
KINDS = {
    "model": "class Thing(pydantic.BaseModel):\n    a: int = 1\nvalue = Thing()",
    "dataclass": "@dataclasses.dataclass\nclass Thing:\n    a: int = 1\nvalue = Thing()",
    "enum": "class Thing(enum.Enum):\n    A = 1\nvalue = Thing.A",
    "named tuple": "class Thing(typing.NamedTuple):\n    a: int = 1\nvalue = Thing()",
    "text": "class Thing(str): pass\nvalue = Thing('x')",
    "generic": "T = typing.TypeVar('T')\n"
    "class Thing(pydantic.BaseModel, typing.Generic[T]):\n    a: T\nvalue = Thing[int](a=1)",
}


@pytest.mark.parametrize("source", KINDS.values(), ids=KINDS)
def test_a_type_that_is_not_loaded_is_an_error_that_names_it(source: str, vanishing: Any) -> None:
    module = vanishing(HEADER + source)
    stored = serde.dumps_typed({"channel": [module.value]})
    assert type(serde.loads_typed(stored)["channel"][0]) is type(module.value)
    del sys.modules["vanishing"]
    with pytest.raises(DeserializationError, match=r"vanishing\.Thing.*import the module 'vanishing'"):
        serde.loads_typed(stored)
    vanishing("")
    with pytest.raises(DeserializationError, match=r"vanishing\.Thing.*no class 'Thing'"):
        serde.loads_typed(stored)
    vanishing("def Thing(*a, **k): raise SystemExit")
    with pytest.raises(DeserializationError, match=r"vanishing\.Thing"):
        serde.loads_typed(stored)
    back = vanishing(HEADER + source)  # loaded again: another class of the same name
    assert type(serde.loads_typed(stored)["channel"][0]) is type(back.value)
    assert type(module.value) is not type(back.value)
    assert again(module.value) == back.value  # as when the cell of a notebook is run twice


def test_a_moved_type_is_found_under_its_old_name(vanishing: Any) -> None:
    stored = serde.dumps_typed(vanishing(HEADER + KINDS["dataclass"]).value)
    vars(vanishing(""))["Thing"] = Plain
    assert serde.loads_typed(stored) == Plain(1)


def model(fields: str) -> str:
    return f"{HEADER}class Thing(pydantic.BaseModel):\n    {fields}\n"


def test_a_changed_model_validates_what_was_stored(vanishing: Any) -> None:
    old = vanishing(model("a: int = pydantic.Field(alias='A')\n    gone: int = 3\n    _p: int = 1")).Thing(A=5)
    old._p = 9
    stored = serde.dumps_typed(old)
    new = vanishing(
        model("a: str = pydantic.Field(alias='A', coerce_numbers_to_str=True)\n    new: int = 7\n    _p: int = 2")
    )
    back = serde.loads_typed(stored)
    assert type(back) is new.Thing
    assert (back.a, back.new, back._p, back.model_fields_set) == ("5", 7, 9, {"a"})
    vanishing(model("a: dict\n    required: int"))
    with pytest.raises(DeserializationError, match=r"vanishing\.Thing.*a: Input should be.*required: Field required"):
        serde.loads_typed(stored)


def test_a_changed_root_model_validates_what_was_stored(vanishing: Any) -> None:
    stored = serde.dumps_typed(vanishing(f"{HEADER}class Thing(pydantic.RootModel[list[int]]): pass").Thing([1]))
    new = vanishing(f"{HEADER}class Thing(pydantic.RootModel[tuple[float, ...]]): pass").Thing
    assert_same(serde.loads_typed(stored), new((1.0,)))
    vanishing(f"{HEADER}class Thing(pydantic.RootModel[int]): pass")
    with pytest.raises(DeserializationError, match=r"vanishing\.Thing.*valid integer"):
        serde.loads_typed(stored)


def test_a_changed_v1_model_validates_what_was_stored(vanishing: Any) -> None:
    start = "from pydantic import v1\nclass Thing(v1.BaseModel):\n    "
    stored = serde.dumps_typed(vanishing(start + "a: int = v1.Field(alias='A')\n    gone: int = 1").Thing(A=2))
    new = vanishing(start + "a: str = v1.Field(alias='A')\n    b: int = 3").Thing
    assert serde.loads_typed(stored) == new(A="2", b=3)
    vanishing(start + "needed: int")
    with pytest.raises(DeserializationError, match=r"(?s)vanishing\.Thing.*field required"):
        serde.loads_typed(stored)


def test_a_changed_dataclass_takes_the_defaults_of_its_new_fields(vanishing: Any) -> None:
    start = f"{HEADER}@dataclasses.dataclass\nclass Thing:\n    "
    stored = serde.dumps_typed(vanishing(start + "a: int\n    gone: int = 0").Thing(4))
    new = vanishing(start + "a: int\n    more: list = dataclasses.field(default_factory=list)\n    b: int = 2").Thing
    assert serde.loads_typed(stored) == new(4, [], 2)
    vanishing(start + "a: int\n    needed: int")
    with pytest.raises(DeserializationError, match=r"vanishing\.Thing.*'needed' is new and has no default"):
        serde.loads_typed(stored)


def test_a_changed_named_tuple_and_enum(vanishing: Any) -> None:
    stored = serde.dumps_typed(vanishing(HEADER + KINDS["named tuple"]).value)
    vanishing(f"{HEADER}class Thing(typing.NamedTuple):\n    b: str = 'b'\n    a: int = 0")
    assert serde.loads_typed(stored) == ("b", 1)
    vanishing(f"{HEADER}class Thing(typing.NamedTuple):\n    b: str")
    with pytest.raises(DeserializationError, match="'b' is new"):
        serde.loads_typed(stored)
    stored = serde.dumps_typed(vanishing(HEADER + KINDS["enum"]).value)
    vanishing(f"{HEADER}class Thing(enum.Enum):\n    B = 2")
    with pytest.raises(DeserializationError, match=r"vanishing\.Thing.*1 is not a valid Thing"):
        serde.loads_typed(stored)


def test_numpy_that_is_not_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = serde.dumps_typed(numpy.zeros(2))
    monkeypatch.delitem(sys.modules, "numpy")
    with pytest.raises(DeserializationError, match=r"numpy\.ndarray.*import the module 'numpy'"):
        serde.loads_typed(stored)


# --- Rows in the format of LangGraph before msgpack --------------------------------------------------------


def old_row(path: str, *, version: int = 2, **arguments: Any) -> tuple[str, bytes]:
    value = {"lc": version, "type": "constructor", "id": path.split("."), **arguments}
    return "json", json.dumps({"channel": [value]}).encode()


@pytest.mark.parametrize(
    ("stored", "value"),
    [
        (old_row("uuid.UUID", args=["0" * 31 + "1"]), uuid.UUID(int=1)),
        (old_row("decimal.Decimal", args=["1.5"]), Decimal("1.5")),
        (old_row("datetime.datetime", args=["2024-01-01T00:00:00"], method="fromisoformat"), datetime(2024, 1, 1)),
        (old_row("datetime.timedelta", args=[1, 2, 3]), timedelta(1, 2, 3)),
        (old_row("datetime.time", kwargs={"hour": 1, "minute": 2}), time(1, 2)),
        (old_row("builtins.set", args=[[1, 2]]), {1, 2}),
        (old_row("re.compile", args=["a", 2]), re.compile("a", 2)),
        (old_row("pathlib.PosixPath", args=["/", "a"]), pathlib.Path("/a")),
        (old_row("langgraph.types.Send", kwargs={"node": "n", "arg": 1}), Send("n", 1)),
        (old_row(f"{__name__}.Plain", kwargs={"a": 1, "b": 2}), Plain(1, 2)),
        (old_row(f"{__name__}.Point", kwargs={"x": 1, "y": []}), Point(1, [])),
        (old_row(f"{__name__}.Color", args=["red"]), Color.RED),
        (old_row(f"{__name__}.Inner", kwargs={"n": 4}, method=[None, "model_construct"]), Inner(n=4)),
        (old_row(f"{__name__}.Old", kwargs={"a": 4}, method=[None, "construct"]), Old(a=4)),
        (old_row("langchain.schema.messages.AIMessage", version=1, kwargs={"content": "x"}), AIMessage("x")),
        (old_row("langchain_core.documents.base.Document", version=1, kwargs={"page_content": "x"}), Document("x")),
    ],
)
def test_rows_in_json_are_read(stored: tuple[str, bytes], value: Any) -> None:
    assert_same(serde.loads_typed(stored), {"channel": [value]})


@pytest.mark.parametrize(
    "stored",
    [
        old_row("langchain.llms.openai.OpenAI", version=1, kwargs={}),
        old_row("langchain_core.prompts.prompt.PromptTemplate", version=1, kwargs={"template": "{{x}}"}),
        old_row("builtins.ValueError", args=["x"]),
        ("json", b'{"lc": 1, "type": "secret", "id": ["OPENAI_API_KEY"]}'),
        ("json", b'{"lc": 1, "type": "not_implemented", "id": ["os", "system"]}'),
        ("json", b'{"lc": 2, "type": "constructor", "id": "os.system"}'),
        ("json", b'{"lc": 2, "type": "constructor", "id": [["os"], "system"]}'),
        ("json", b"[" * 100_000),
        ("json", b"\xff{"),
    ],
)
def test_rows_in_json_that_name_no_data_type_are_refused(stored: tuple[str, bytes]) -> None:
    before = set(sys.modules)
    with pytest.raises(MemStateError):
        serde.loads_typed(stored)
    assert set(sys.modules) == before


# --- LangGraph's allowlist ---------------------------------------------------------------------------------


def test_an_allowlist_admits_what_it_names_and_what_its_fields_declare() -> None:
    listed = MemStateSerializer(allowed_msgpack_modules=[(__name__, "Outer"), Tree])
    for value in (Outer(many=[Inner()]), Tree(name="a"), HumanMessage("x"), [(1,), {2}, 2**70, pathlib.Path("a")]):
        assert_same(listed.loads_typed(serde.dumps_typed(value)), value)
    for value in (Outer(anything=Plain(1)), Wider(), Plain(1), Color.RED, Point(1), Text("x"), Box[int](value=1)):
        with pytest.raises(DeserializationError, match=rf"Refused to load {__name__}\.\w+.*allowed_msgpack_modules"):
            listed.loads_typed(serde.dumps_typed(value))


def test_what_langchain_puts_into_state_is_always_allowed() -> None:
    strict = MemStateSerializer(allowed_msgpack_modules=None)
    for value in (AIMessage("x").text, AddableDict(a=1), {AIMessage("x").text: 1}):
        assert_same(strict.loads_typed(strict.dumps_typed(value)), value)


def test_named_tuples_and_v1_models_declare_types_too() -> None:
    listed = MemStateSerializer(allowed_msgpack_modules=[(__name__, "OldHolder"), (__name__, "Route")])
    for value in (OldHolder(color=Color.RED), Route(Level.LOW, Box[Wider](value=Wider()))):
        assert_same(listed.loads_typed(serde.dumps_typed(value)), value)


class OldHolder(v1.BaseModel):
    color: Color | None = None


class Route(NamedTuple):
    level: Level
    box: Box[Wider]


def test_an_allowlist_is_merged() -> None:
    strict = MemStateSerializer(allowed_msgpack_modules=None)
    stored = serde.dumps_typed(Plain(1))
    with pytest.raises(DeserializationError, match="Plain"):
        strict.loads_typed(stored)
    merged = strict.with_msgpack_allowlist([(__name__, "Plain")])
    assert type(merged) is MemStateSerializer
    assert merged.loads_typed(stored) == Plain(1)
    more = merged.with_msgpack_allowlist([Color, (__name__, "Box[int]"), (__name__, "Outer.Nested")])
    for value in (Plain(1), Color.RED, Box[int](value=1), Outer.Nested()):
        assert more.loads_typed(serde.dumps_typed(value)) == value
    short = strict.with_msgpack_allowlist([(__name__, "Nested"), Kind])  # as LangGraph lists a nested class
    assert short.loads_typed(serde.dumps_typed(Outer.Nested())) == Outer.Nested()
    for serializer in (strict, merged):
        with pytest.raises(DeserializationError, match="Color"):
            serializer.loads_typed(serde.dumps_typed(Color.RED))
    assert serde.with_msgpack_allowlist([Color]) is serde


def test_events_are_emitted_for_types_that_are_not_registered() -> None:
    events: list[Any] = []
    stop = register_serde_event_listener(events.append)
    try:
        again([Plain(1), Plain(2), HumanMessage("x"), NOW])
        with pytest.raises(DeserializationError):
            MemStateSerializer(allowed_msgpack_modules=None).loads_typed(serde.dumps_typed(Plain(1)))
        with pytest.raises(DeserializationError):
            serde.loads_typed(row(3, "datetime", "datetime", "x", "now"))
    finally:
        stop()
    kinds = [(event["kind"], event["name"]) for event in events]
    assert kinds == [
        ("msgpack_unregistered_allowed", "Plain"), ("msgpack_blocked", "Plain"), ("msgpack_method_blocked", "datetime"),
    ]  # fmt: skip


STRICT = """
import dataclasses, enum, operator, sys, typing
import pydantic
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph_memstate.errors import DeserializationError
from langgraph_memstate.graph.codec import MemStateSerializer

class Item(pydantic.BaseModel):
    n: int = 1
@dataclasses.dataclass
class Declared:
    item: Item
    price: pydantic.SecretStr
class Undeclared(pydantic.BaseModel):
    pass
class State(typing.TypedDict):
    values: typing.Annotated[list[Declared], operator.add]
    messages: list[HumanMessage]

serde = MemStateSerializer()
value = [HumanMessage("x"), (1, {2})]
assert serde.loads_typed(serde.dumps_typed(value)) == value
try:
    serde.loads_typed(serde.dumps_typed(Undeclared()))
except DeserializationError as error:
    assert "__main__.Undeclared" in str(error) and "allowlist" in str(error), error
else:
    sys.exit("loaded in strict mode")

graph = StateGraph(State)
graph.add_node("n", lambda state: {"values": [Declared(Item(), pydantic.SecretStr("s"))]})
graph.add_edge(START, "n")
app = graph.compile(checkpointer=InMemorySaver(serde=serde))
config = {"configurable": {"thread_id": "1"}}
app.invoke({"messages": [HumanMessage("x")]}, config)
state = app.get_state(config).values
assert state["values"] == [Declared(Item(), pydantic.SecretStr("s"))], state
print("done")
"""


@pytest.mark.parametrize("setting", ["true", "1"])
def test_strict_mode_is_honoured(setting: str, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "strict.py"
    script.write_text(STRICT)
    environment = {
        **os.environ,
        "LANGGRAPH_STRICT_MSGPACK": setting,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("done", 0), done.stderr


class Xor:
    def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
        return "xor", bytes(each ^ 0x55 for each in plaintext)

    def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
        assert ciphername == "xor"
        return bytes(each ^ 0x55 for each in ciphertext)


def test_it_may_be_wrapped_in_encryption() -> None:
    encrypted = EncryptedSerializer(Xor(), MemStateSerializer(allowed_msgpack_modules=None))
    value = {"m": HumanMessage("secret"), "t": (1, {2})}
    kind, data = encrypted.dumps_typed(value)
    assert kind == "msgpack+xor"
    assert b"secret" not in data
    assert_same(encrypted.loads_typed((kind, data)), value)
    saver = BaseCheckpointSaver(serde=encrypted).with_allowlist({(__name__, "Plain")})
    assert type(saver.serde) is EncryptedSerializer
    assert type(saver.serde.serde) is MemStateSerializer
    assert saver.serde.loads_typed(encrypted.dumps_typed(Plain(1))) == Plain(1)


def test_a_graph_interrupts_and_resumes_with_typed_state() -> None:
    class State(typing.TypedDict):
        plan: Outer
        seen: set[Color]
        pair: tuple[int, ...]

    def ask(state: State) -> Command[str]:
        answer = interrupt(Point(1, (2,)))
        assert type(state["plan"]) is Outer
        return Command(update={"seen": state["seen"] | {answer}, "pair": (*state["pair"], 3)}, goto=END)

    graph = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    app = graph.compile(checkpointer=InMemorySaver(serde=MemStateSerializer()))
    config: Any = {"configurable": {"thread_id": "1"}}
    first = app.invoke({"plan": Outer(inner=Wider()), "seen": set(), "pair": (1,)}, config)
    assert first["__interrupt__"][0].value == Point(1, (2,))
    app.invoke(Command(resume=Color.RED), config)
    assert_same(dict(app.get_state(config).values), {"plan": Outer(inner=Wider()), "seen": {Color.RED}, "pair": (1, 3)})


# --- Equal bytes -------------------------------------------------------------------------------------------

DIGEST = """
import hashlib, sys, enum
from langchain_core.messages import AIMessage
from langgraph_memstate.graph.codec import MemStateSerializer
value = {"set": {"b", "a", ("c", 1), 3.5, None}, "frozen": frozenset(map(str, range(50))),
         "keys": {frozenset("xyz"): {1, 2}}, "message": AIMessage("x", id="1", name="n", extra_field=1)}
print(hashlib.sha256(MemStateSerializer().dumps_typed(value)[1]).hexdigest())
"""


def test_equal_values_give_equal_bytes_in_every_process() -> None:
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1
    for each in FLAT:
        assert serde.dumps_typed(each.values[0]) == serde.dumps_typed(again(each.values[0]))
