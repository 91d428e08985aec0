"""From values to unit vectors: which texts of a value are embedded, and by whatever model the user gave."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import json
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from langchain_core.embeddings import Embeddings

from langgraph_memstate.errors import EmbeddingError, IndexConfigError
from langgraph_memstate.hooks.base import Vector

home_loop: ContextVar[asyncio.AbstractEventLoop | None] = ContextVar("home_loop", default=None)
"""The event loop that awaits the current call, so that an async model runs where its clients live."""

_LOOK = 0.1  # seconds between looks whether that loop can still answer
_held_up: set[asyncio.AbstractEventLoop] = set()


class Embedder:
    """A model as a function from texts to float32 vectors of length 1, shape (dims,) each.

    Args:
        source: a LangChain `Embeddings`, a function from texts to vectors (sync or async), or a provider string
            such as ``"openai:text-embedding-3-small"`` (needs the `langchain` package).
        dims: length of a vector; None learns it from a first call.
        model: the name under which embeddings are cached; two models must not share one.
    """

    def __init__(self, source: Any, *, dims: int | None = None, model: str | None = None) -> None:
        if isinstance(source, str):
            model = model or source
            source = _provider(source)
        if not isinstance(source, Embeddings) and not callable(source):
            raise IndexConfigError(
                f"embed is a {type(source).__name__}; give a LangChain Embeddings or a function from texts to vectors"
            )
        self._source = source
        self.fixed_dims = dims  # None until the first vector shows it
        named = model or _given_name(source)
        self._is_named = named is not None
        self.model = named or (type(source).__name__ if isinstance(source, Embeddings) else "function")

    @property
    def dims(self) -> int:
        if self.fixed_dims is None:
            self.documents(["dimension"])
        assert self.fixed_dims is not None
        return self.fixed_dims

    def is_confused_with(self, other: Embedder) -> bool:
        """Whether another model goes by the same name, so that embeddings of one would be taken for the other's."""
        if self.model != other.model or self._source == other._source:
            return False
        return not (self._is_named and other._is_named) or self.fixed_dims != other.fixed_dims

    def answers(self) -> bool:
        """Whether the model is there at all: tells an outage from a text it refuses."""
        try:
            self.documents(["dimension"])
        except EmbeddingError:
            return False
        return True

    def documents(self, texts: Sequence[str]) -> list[Vector | None]:
        """Embed texts; None for one without direction (a zero vector), which cosine cannot rank.

        Raises:
            EmbeddingError: the model failed, or returned a wrong count, a wrong length, NaN or infinity.
        """
        return self._embed(list(texts), query=False)

    def query(self, text: str) -> Vector | None:
        """Embed a search query, by the model's query side where it has one."""
        return self._embed([text], query=True)[0]

    def _embed(self, texts: list[str], *, query: bool) -> list[Vector | None]:
        try:
            vectors = list(self._call(texts, query=query))
        except Exception as error:
            raise EmbeddingError(f"the embedding model failed: {error!r}; nothing was written") from error
        if len(vectors) != len(texts):
            raise EmbeddingError(f"the embedding model returned {len(vectors)} vectors for {len(texts)} texts")
        return [self._unit(vector) for vector in vectors]

    def _call(self, texts: list[str], *, query: bool) -> Any:
        if isinstance(self._source, Embeddings):
            return [self._source.embed_query(texts[0])] if query else self._source.embed_documents(texts)
        answer = self._source(texts)
        return _wait(answer) if inspect.isawaitable(answer) else answer

    def _unit(self, raw: Any) -> Vector | None:
        import numpy as np

        try:
            vector = np.asarray(raw, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise EmbeddingError(f"the embedding model returned no vector of numbers: {error}") from error
        if vector.ndim != 1 or vector.size == 0:
            raise EmbeddingError(f"the embedding model returned an array of shape {vector.shape}, not (dims,)")
        if self.fixed_dims is None:
            self.fixed_dims = int(vector.size)
        if vector.size != self.fixed_dims:
            raise EmbeddingError(
                f"the embedding model returned {vector.size} dimensions; the index has dims={self.fixed_dims}"
            )
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        if not np.isfinite(norm):
            raise EmbeddingError("the embedding model returned NaN or infinity")
        return None if norm == 0.0 else (vector / np.float32(norm)).astype(np.float32)


def _wait(awaitable: Any) -> Any:
    """The result of an async model, for a caller that is not async itself."""

    async def run() -> Any:
        return await awaitable

    loop = home_loop.get()
    if loop is not None and loop.is_running():
        return _result_of(run(), loop)
    # A loop of this thread is busy waiting for us, so the model gets a thread and a loop of its own.
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(asyncio.run(run()))
        except BaseException as error:  # handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=target, name="memstate-embed")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _result_of(call: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Any:
    """What a call returns that another thread's loop runs; an error once that loop will not get to it."""
    future = asyncio.run_coroutine_threadsafe(call, loop)
    while True:
        try:
            return future.result(_LOOK)
        except TimeoutError:
            if future.done():
                raise  # it is the model's own
        if loop.is_closed():
            raise RuntimeError("the event loop that it ran on is closed")
        if loop in _held_up:
            future.cancel()
            raise RuntimeError("the memory is being closed on the event loop that it runs on: use aclose() there")


@contextmanager
def holding_up() -> Iterator[None]:
    """While the caller waits for threads: if it runs an event loop, no model on that can answer them."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        yield
        return
    _held_up.add(loop)
    try:
        yield
    finally:
        _held_up.discard(loop)


def _provider(name: str) -> Embeddings:
    try:
        init_embeddings = importlib.import_module("langchain.embeddings").init_embeddings
    except ImportError as error:
        raise IndexConfigError(
            f"embed={name!r} names a provider, which needs the langchain package: pip install langchain"
        ) from error
    source: Embeddings = init_embeddings(name)
    return source


def _given_name(source: Any) -> str | None:
    for attribute in ("model", "model_name"):
        if isinstance(name := getattr(source, attribute, None), str) and name:
            return name
    return None


# -- texts ------------------------------------------------------------------------------------------


def text_hash(text: str) -> bytes:
    """16 bytes that stand for a text among the embeddings of one model (BLAKE2b)."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def texts_of(value: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
    """The texts at `paths`, in order, without empty ones. Paths are LangGraph's.

    ``a.b``, ``a[0]``, ``a[-1]``, ``a[*].b``, ``a.*``, ``{a,b.c}``; ``$`` is the whole value as JSON.
    """
    found = (text for path in paths for text in _texts_at(dict(value), _tokens(path), 0))
    return [text for text in found if text.strip()]


def check_paths(paths: object) -> tuple[str, ...]:
    """Return `paths` if they are paths into a value.

    Raises:
        IndexConfigError: they are not a list of strings, or one of them cannot be read.
    """
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        raise IndexConfigError(f"{paths!r} is not a list of paths into a value")
    for path in paths:
        _tokens(path)
    return tuple(paths)


@lru_cache(maxsize=1024)
def _tokens(path: str) -> tuple[str, ...]:
    if not path or path == "$":
        return ()
    tokens: list[str] = []
    current = ""
    closing = {"[": "]", "{": "}"}
    position = 0
    while position < len(path):
        char = path[position]
        if char in closing:
            end = path.find(closing[char], position)
            if end < 0:
                raise IndexConfigError(f"index path {path!r}: {char!r} is not closed")
            tokens.extend([current] if current else [])
            tokens.append(path[position : end + 1])
            current, position = "", end
        elif char == ".":
            tokens.extend([current] if current else [])
            current = ""
        else:
            current += char
        position += 1
    tokens.extend([current] if current else [])
    return tuple(tokens)


def _texts_at(value: Any, tokens: tuple[str, ...], position: int) -> list[str]:
    if position == len(tokens):
        return _as_text(value)
    token = tokens[position]
    inner: Sequence[Any] = ()
    if token.startswith("{"):
        fields = (_tokens(name.strip()) for name in token[1:-1].split(","))
        return [text for field in fields for text in _texts_at(value, field, 0)]
    if token.startswith("["):
        inner = _elements(value, token[1:-1])
    elif token == "*":
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    elif isinstance(value, dict) and token in value:
        inner = (value[token],)
    return [text for element in inner for text in _texts_at(element, tokens, position + 1)]


def _elements(value: Any, index: str) -> Sequence[Any]:
    if not isinstance(value, list):
        return ()
    if index == "*":
        return value
    try:
        return (value[int(index)],)
    except (ValueError, IndexError):
        return ()


def _as_text(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str | int | float | bool):
        return [str(value)]
    return [json.dumps(value, sort_keys=True, ensure_ascii=False)]
