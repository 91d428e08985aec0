"""Values to msgpack and back. The encoder and the decoder hide what their hooks raise; here it is kept."""

from __future__ import annotations

import re
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import ormsgpack
from langgraph.checkpoint.serde.event_hooks import emit_serde_event

from langgraph_memstate.errors import (
    CorruptRowError,
    DeserializationError,
    MemStateError,
    SerializationError,
    StagingError,
)
from langgraph_memstate.graph.codec.models import ModelShape, loaded_shape, shape_of, writable_shape
from langgraph_memstate.graph.codec.shapes import (
    DELTA_SNAPSHOT,
    METHOD,
    NUMPY_ARRAY,
    PYDANTIC_V2,
    SINGLE,
    TUPLE,
    Key,
    Row,
    Shape,
    dotted,
    exactly,
    key_of,
)
from langgraph_memstate.graph.codec.values import FIXED_CLASSES
from langgraph_memstate.graph.slices import packed_array

try:
    from langgraph.checkpoint.serde.types import _DeltaSnapshot
except ImportError as exc:
    raise StagingError(
        f"This release of langgraph-checkpoint keeps its types elsewhere ({exc}); "
        "install one that this release of langgraph-memstate supports."
    ) from exc

DeltaSnapshot = _DeltaSnapshot

# How deep typed values may nest. The decoder takes about 550 bytes of stack for each open container and a few
# kilobytes for each typed value, and does not limit their sum: 20 kB of a hostile row would end the process.
MAX_TYPED_DEPTH = 200
FREE_TYPED_DEPTH = 4  # up to here the decoder's own limit of 1,024 containers a level is enough
MAX_OPEN_CONTAINERS = 2_000
CONTAINERS_A_LEVEL = 255  # what the encoder allows

# --- Writing ------------------------------------------------------------------------------------------------

_TEXT_KEYS = (
    ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
    | ormsgpack.OPT_REPLACE_SURROGATES
)
_ANY_KEYS = _TEXT_KEYS | ormsgpack.OPT_NON_STR_KEYS
_PLAIN_KEYS = {str, float, bool, types.NoneType, bytes}


class _OtherKeys(Exception):
    """Some dictionary has other keys than text: left alone, the encoder turns an enum, UUID or date into text."""


def dumps(value: Any) -> bytes:
    writer = _Writer()
    try:
        try:
            data = writer.pack(value)
        except _OtherKeys:
            writer = _Writer(any_keys=True)
            data = writer.pack(value)
        if (writer.deepest - FREE_TYPED_DEPTH) * CONTAINERS_A_LEVEL > MAX_OPEN_CONTAINERS:
            _Measure().value(data)
        return data
    except RecursionError as exc:
        raise SerializationError("The value cannot be stored: it nests too deeply, or contains itself.") from exc
    except Exception as exc:
        path = "" if writer.culprit is None else _path_to(value, writer.culprit)
        where = f"The value at {path}" if path else "The value"
        raise SerializationError(f"{where} cannot be stored: {str(exc).rstrip('.')}.") from exc


class _Writer:
    __slots__ = ("any_keys", "culprit", "deepest", "depth", "error", "shapes")

    def __init__(self, any_keys: bool = False) -> None:
        self.any_keys = any_keys
        self.depth = self.deepest = 0
        self.error: BaseException | None = None
        self.culprit: Any = None
        self.shapes: dict[type, Shape] = {}  # each type is looked up once a value

    def pack(self, value: Any) -> bytes:
        try:
            if not self.any_keys:
                return ormsgpack.packb(value, self.extension, _TEXT_KEYS)
            plain = value if _all_plain(value) else self._with_plain_keys(value)
            return ormsgpack.packb(plain, self.extension, _ANY_KEYS)
        except ormsgpack.MsgpackEncodeError as exc:
            if self.error is None:
                self.error = SerializationError(str(exc)) if self.any_keys else _OtherKeys()
            raise self.error from None

    def packs(self, value: Any) -> bool:
        try:
            self.pack(value)
        except SerializationError:
            self.error = None
            return False
        return True

    def extension(self, obj: Any) -> Any:
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        try:
            if self.depth > MAX_TYPED_DEPTH:
                raise SerializationError(f"typed values nest deeper than {MAX_TYPED_DEPTH} levels")
            cls = type(obj)
            if cls is tuple:
                return ormsgpack.Ext(TUPLE, self.pack(list(obj)))
            if cls is DeltaSnapshot:
                return ormsgpack.Ext(DELTA_SNAPSHOT, self.pack(obj.value))
            shape = self.shapes.get(cls)
            if shape is None:
                shape = FIXED_CLASSES.get(cls) or writable_shape(cls)
                if shape is None:
                    return self._without_shape(obj)
                self.shapes[cls] = shape
            return ormsgpack.Ext(*self._shaped(shape, obj))
        except BaseException as exc:
            if self.error is None:
                self.error, self.culprit = exc, obj
            raise
        finally:
            self.depth -= 1

    def _shaped(self, shape: Shape, obj: Any) -> tuple[int, bytes]:
        code = shape.code
        try:
            code, row = shape.dump(obj, self.pack)
            packed = self.pack(row)
        except SerializationError as exc:
            culprit = obj if self.error is None else self.culprit
            self.error = None
            other = shape.fallback(obj, self.packs)
            if other is None or not self.packs(other):
                self.error, self.culprit = exc, culprit
                raise
            packed = self.pack(other)
        if shape.unproven:
            try:
                Reader(lambda _: None).value(ormsgpack.packb(ormsgpack.Ext(code, packed)))
            except MemStateError as exc:
                raise SerializationError(f"{dotted(shape.key)} could not be loaded again: {exc}") from exc
            shape.unproven = False
        return code, packed

    def _without_shape(self, obj: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(obj, (numpy.ndarray, numpy.generic)):
            return ormsgpack.Ext(NUMPY_ARRAY, self.pack(_array_row(numpy, obj)))
        if isinstance(obj, BaseException):
            return repr(obj)
        is_class = isinstance(obj, type)
        what = f"the class {dotted(key_of(obj))} itself" if is_class else dotted(key_of(type(obj)))
        raise SerializationError(
            f"{what} is not a data type (Pydantic model, dataclass, enum, named tuple or known value type)"
        )

    def _with_plain_keys(self, value: Any) -> Any:
        """`value` with each dictionary that has other keys than plain ones made an extension of pairs."""
        if type(value) is list:
            return [self._with_plain_keys(each) for each in value]
        if type(value) is not dict:
            return value
        if _plain(value):
            return {key: self._with_plain_keys(each) for key, each in value.items()}
        pairs = [[key, each] for key, each in value.items()]
        return ormsgpack.Ext(SINGLE, self.pack(["builtins", "dict", pairs]))


def _plain(keys: Iterable[Any]) -> bool:
    """Whether the encoder keeps these dictionary keys as they are."""
    for key in keys:
        kind = type(key)
        if (kind is int and -(2**63) <= key < 2**64) or (kind is tuple and _plain(key)):
            continue
        if kind not in _PLAIN_KEYS:
            return False
    return True


def _all_plain(value: Any) -> bool:
    if type(value) is dict:
        return _plain(value) and all(map(_all_plain, value.values()))
    return type(value) is not list or all(map(_all_plain, value))


def _path_to(value: Any, culprit: Any) -> str:
    """Where in `value` the culprit is, such as `['messages'][3].artifact`."""
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", value)])
    while waiting:
        path, each = waiting.popleft()
        if each is culprit:
            return path
        if id(each) not in seen:
            seen.add(id(each))
            waiting.extend((path + step, child) for step, child in _children(each))
    return ""


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", child) for key, child in value.items())
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from (("{...}", child) for child in value)
    elif shape_of(type(value)) is not None:
        state = object.__getstate__(value)
        for part in state if type(state) is tuple else (state,):
            for name, child in (part or {}).items():
                if name.startswith("__") and isinstance(child, dict):  # extra and private attributes of a model
                    yield from ((f".{each}", attribute) for each, attribute in child.items())
                else:
                    yield f".{name}", child


# --- Reading ------------------------------------------------------------------------------------------------

_METHOD = ("datetime", "datetime", "fromisoformat")  # the only one a row may name
_TYPED = {b"\x91\xc7": 1, b"\x91\xc8": 2, b"\x91\xc9": 4}  # begins one in an array -> bytes of the length that follows


def _all_typed(contents: Sequence[bytes]) -> tuple[list[int], list[bytes]] | None:
    """The extension codes and payloads, if each packed value is an array of one typed value and of nothing else."""
    codes, payloads = [], []
    for content in contents:
        width = _TYPED.get(content[:2])
        if width is None or len(content) < 3 + width:
            return None
        start = 3 + width
        if int.from_bytes(content[2 : start - 1], "big") != len(content) - start:
            return None
        codes.append(content[start - 1])
        payloads.append(content[start:])
    return codes, payloads


class Reader:
    """Unpacks one value. `allow` is asked once for each type, and raises."""

    __slots__ = ("allow", "depth", "error", "open", "shapes")

    def __init__(self, allow: Callable[[Key], None]) -> None:
        self.allow = allow
        self.depth = 0
        self.open = 0
        self.error: BaseException | None = None
        self.shapes: dict[Key, Shape] = {}  # each type is looked up once a value

    def value(self, data: bytes | bytearray | memoryview) -> Any:
        try:
            return self._unpacked(data)
        except Exception as exc:
            self._explain(exc)

    def values(self, contents: Sequence[bytes]) -> list[Any]:
        """Many values, such as the elements of a list, by few calls, and each type is looked up once."""
        try:
            coded = _all_typed(contents)
            if coded is None:
                return self._together(contents)
            codes, payloads = coded
            self.depth += 1
            rows = self._together(payloads)
            self.depth -= 1
            return [[made] for made in map(self._made_again, codes, rows)]
        except Exception as exc:
            self._explain(exc)

    def _together(self, contents: Sequence[bytes]) -> list[Any]:
        values: list[Any] = self._unpacked(packed_array(contents))
        if len(values) != len(contents):
            raise CorruptRowError("A row holds more than one value.")
        return values

    def _unpacked(self, data: bytes | bytearray | memoryview) -> Any:
        return ormsgpack.unpackb(data, ext_hook=self.extension, option=ormsgpack.OPT_NON_STR_KEYS)

    def _explain(self, exc: Exception) -> NoReturn:
        error = self.error or exc
        if isinstance(error, MemStateError) or not isinstance(error, Exception):
            raise error from error.__cause__
        if isinstance(error, RecursionError):
            raise DeserializationError("A row nests too deeply to be read from here.") from error
        raise CorruptRowError(f"A row is not what a writer of ours stores: {error}.") from error

    def extension(self, code: int, data: bytes) -> Any:
        self.depth += 1
        opened = 0
        try:
            if self.depth > FREE_TYPED_DEPTH:
                opened = _open_containers(data)
                self.open += opened
                if self.depth > MAX_TYPED_DEPTH or self.open > MAX_OPEN_CONTAINERS:
                    raise CorruptRowError("A row nests deeper than any value that is stored.")
            return self.made(code, self._unpacked(data))
        except BaseException as exc:
            if self.error is None:
                self.error = exc
            raise
        finally:
            self.depth -= 1
            self.open -= opened

    def made(self, code: int, row: Any) -> Any:
        if code == TUPLE and type(row) is list:
            return tuple(row)
        if code == DELTA_SNAPSHOT:
            return DeltaSnapshot(row)
        if code == NUMPY_ARRAY:
            return _array(row)
        named = type(row) is list and len(row) > 2 and type(row[0]) is str and type(row[1]) is str
        if not named or not SINGLE <= code <= PYDANTIC_V2:
            raise CorruptRowError(f"Extension code {code} of a row holds nothing that a writer of ours stores.")
        key = (row[0], row[1])
        if code == METHOD and (*key, *row[3:]) != _METHOD:
            method = str(row[3]) if len(row) > 3 else ""
            emit_serde_event({"kind": "msgpack_method_blocked", "module": key[0], "name": key[1], "method": method})
            raise DeserializationError(f"Refused to call the method {method!r} of {dotted(key)}.")
        shape = self.shapes.get(key)
        if shape is None:
            self.allow(key)
            shape = self.shapes[key] = loaded_shape(key)
        return load(shape, key, code, row)

    def _made_again(self, code: int, row: Any) -> Any:
        """The same, faster for a type that was met before."""
        if code == PYDANTIC_V2 and type(row) is list and len(row) > 2:
            key = (row[0], row[1])
            shape = self.shapes.get(key)
            if shape is not None:
                return load(shape, key, code, row)
        return self.made(code, row)


class AsStored(Reader):
    """Makes models of a class that does not accept them any more, too: unvalidated, with the fields they had."""

    __slots__ = ()

    def made(self, code: int, row: Any) -> Any:
        try:
            return super().made(code, row)
        except DeserializationError:
            shape = self.shapes.get((row[0], row[1]))
            if not isinstance(shape, ModelShape):
                raise
            return shape.as_stored(row)


class _Measure(Reader):
    """Nests as reading would, and makes nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(lambda _: None)

    def made(self, code: int, row: Any) -> Any:
        return None


def load(shape: Shape, key: Key, code: int, row: Row) -> Any:
    try:
        return shape.load(code, row)
    except MemStateError:
        raise
    except Exception as exc:
        raise DeserializationError(
            f"{dotted(key)} cannot be made from what is stored: {type(exc).__name__}: {exc}."
        ) from exc


def _open_containers(data: bytes) -> int:
    """How many containers are open at once while this is unpacked, what its extensions hold not counted."""
    if len(data) < 64:
        return len(data)  # cannot be more
    waiting = [(1, ormsgpack.unpackb(data, ext_hook=lambda *_: None, option=ormsgpack.OPT_NON_STR_KEYS))]
    deepest = 1
    while waiting:
        depth, value = waiting.pop()
        deepest = max(deepest, depth)
        if type(value) is dict:
            waiting.extend((depth + 1, each) for each in (*value, *value.values()))
        elif type(value) in (list, tuple):
            waiting.extend((depth + 1, each) for each in value)
    return deepest


# --- Arrays -------------------------------------------------------------------------------------------------

_DTYPE = re.compile(r"[<>|=]?[biufcmMSUV]\d*(\[\w+\])?")


def _array_row(numpy: Any, array: Any) -> Row:
    dtype = array.dtype
    scalar = isinstance(array, numpy.generic)
    if dtype.hasobject or dtype.names or not (scalar or type(array) is numpy.ndarray):
        raise SerializationError(
            f"{dotted(key_of(type(array)))} of dtype {dtype} cannot be stored: only plain arrays of numbers, "
            "text, bytes, dates and booleans can"
        )
    if scalar:
        array = numpy.asarray(array)
        return [array.dtype.str, None, "C", array.tobytes()]
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    return [dtype.str, list(array.shape), order, array.tobytes(order)]


def _array(row: Any) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        raise DeserializationError("numpy.ndarray cannot be loaded: import the module 'numpy' before reading.")
    try:
        dtype_name, shape, order, data = row
        if not _DTYPE.fullmatch(dtype_name) or order not in ("C", "F") or type(data) is not bytes:
            raise ValueError("not the description of an array")
        sizes = tuple(exactly(list, shape or []))
        array = numpy.ndarray(sizes, numpy.dtype(dtype_name), data, order=order)
        if min(sizes, default=0) < 0 or array.nbytes != len(data) or array.size > max(len(data), 1):
            raise ValueError("the buffer has another size")
        return array[()] if shape is None else array.copy("K")
    except Exception as exc:
        raise DeserializationError(f"numpy.ndarray cannot be made from what is stored: {exc}.") from exc
