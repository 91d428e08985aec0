"""Serialised values as they lie in the database: compressed where that pays, and marked as such.

Checkpoints and messages are small, and most of their bytes are the same names again, so compression starts from a
dictionary of them. A dictionary is part of the format: rows name the one they need by their first byte, and it is
never edited, only followed by another.

What is written now is a frame of Zstandard (RFC 8878) without its magic number. `zstd/0002.zdict` was trained, with
the trainer of that library, on messages of every kind around English sentences, on heads of checkpoints and on lists:
it brings the codes for their letters, which a small frame could not afford to. `zstd/0003.zdict` is the same and then
times and metadata of checkpoints, for a head that has its own before it. Rows of before are deflated.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from typing import Generic, TypeVar

import zstandard

from langgraph_memstate.errors import CorruptRowError

_PLAIN, _DEFLATED, _ZSTD, _ZSTD_HEAD = b"\x00", b"\x01", b"\x02", b"\x03"
_WORTHWHILE = 48  # bytes; what is shorter is stored as it is
_LARGEST = 1_000_000_000  # bytes; SQLite holds no longer value, so nothing longer was packed
_LEVEL = 3
_MAGIC = zstandard.FRAME_HEADER


@cache
def _dictionary(name: str) -> zstandard.ZstdCompressionDict:
    content = resources.files("langgraph_memstate.storage.zstd").joinpath(name).read_bytes()
    dictionary = zstandard.ZstdCompressionDict(content)
    dictionary.precompute_compress(level=_LEVEL)
    return dictionary


_TRAINED = {_ZSTD: "0002.zdict", _ZSTD_HEAD: "0003.zdict"}

# Of deflated rows (RFC 1950, FDICT), which are still read.
_NAMES = (
    b"\xaahide_input\xabfinish_reason\xa4stop\xaamodel_name\xabtoken_usage\xb1completion_tokens\xadprompt_tokens"
    b"\xacinput_tokens\xadoutput_tokens\xactotal_tokens\xb3input_token_details\xb4output_token_details\xaacache_read"
    b"\xa9reasoning\xaemodel_provider\xa6openai\xa9anthropic\xb1system_fingerprint\xa7refusal\xa8logprobs"
    b"\xbalangchain_core.documents.base\xa8Document\xacpage_content\xa8metadata\xa6source\xa5title\xa3url"
    b"\xbflanggraph.types\xa4Send\xa9Interrupt\xa5value\xa2id\xa6resume\xa4node\xa4text\xa4kind\xa4user\xa7content"
    b"\xd9\x20langchain_core.messages.function\xafFunctionMessage\xbclangchain_core.messages.chat\xabChatMessage\xa4role"
    b"\xbelangchain_core.messages.system\xadSystemMessage\x86\xa7content\xa6system"
    b"\xbclangchain_core.messages.tool\xabToolMessage\x89\xa7content\xb1additional_kwargs\x80\xb1response_metadata\x80"
    b"\xa4type\xa4tool\xa4name\xa2id\xactool_call_id\xa8artifact\xc0\xa6status\xa7success\xa4args\xa9tool_call\xa5call_"
    b"\xbalangchain_core.messages.ai\xa9AIMessage\x89\xa7content\xda\x02\x00 \xb1additional_kwargs\x80"
    b"\xb1response_metadata\x80\xa4type\xa2ai\xa4name\xc0\xa2id\xd9$\xaatool_calls\x90\xb2invalid_tool_calls\x90"
    b"\xaeusage_metadata\xc0\xce\x92\xa7content\xa2id\x80\xc0"
    b" you are have with this that for and the to of in is it I can not be on as "
    b"\x91\xc8\x02\xab\x05\x97\xbdlangchain_core.messages.human\xacHumanMessage\x86\xa7content\xda\x02\x00 "
    b"\xb1additional_kwargs\x80\xb1response_metadata\x80\xa4type\xa5human\xa4name\xc0\xa2id\xd9$\xce\x92\xa7content"
    b"\xa2id\x80\xc0"
    b"\xb1__pregel_tasks\xa9__error__\xad__interrupt__\xaa__resume__\xafpending_sends\xa5tools\xa5model\xa5agent"
    b"\x86\xa1v\x04\xa2ts\xd9 2026-01-01T00:00:00.000000+00:00\xa2id\xd9$1f10000-0000-6000-8000-000000000000"
    b"\xb0channel_versions\x83\xa9__start__\xd9300000000000000000000000000000001.0.0000000000000000\xa8messages"
    b"\xd9300000000000000000000000000000010.0.000000000\xb0branch:to:\xd9300000000000000000000000000000100.0.00000"
    b"\xadversions_seen\x83\xa9__input__\x80\xa9__start__\x81\xa9__start__\xd9300000000000000000000000000000000."
    b"\x81\xb0branch:to:\xd9300000000000000000000000000000000.0.\xb0updated_channels\x92\xa9__start__\x91\xa8messages"
)


Context = TypeVar("Context")


class _Idle(Generic[Context]):
    """Contexts of Zstandard that nobody uses now: one is for one thread at a time, and runs come in new threads."""

    def __init__(self, make: Callable[[], Context]) -> None:
        self._make = make
        self._idle: deque[Context] = deque()

    def take(self) -> Context:
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()

    def give_back(self, context: Context) -> None:
        self._idle.append(context)


def _compressor(trained: str) -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(
        level=_LEVEL,
        dict_data=_dictionary(trained),
        write_checksum=True,
        write_content_size=True,
        write_dict_id=False,
    )


def _decompressor(trained: str) -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(dict_data=_dictionary(trained))


_compressors = {mark: _Idle(partial(_compressor, trained)) for mark, trained in _TRAINED.items()}
_decompressors = {mark: _Idle(partial(_decompressor, trained)) for mark, trained in _TRAINED.items()}


def packed(content: bytes) -> bytes:
    """How `content` is stored."""
    return _packed(_ZSTD, content)


def packed_head(content: bytes) -> bytes:
    """How the head of a checkpoint is stored that has time and metadata before it."""
    return _packed(_ZSTD_HEAD, content)


def _packed(mark: bytes, content: bytes) -> bytes:
    if len(content) >= _WORTHWHILE:
        compressor = _compressors[mark].take()
        frame = compressor.compress(content)
        _compressors[mark].give_back(compressor)
        if len(frame) - len(_MAGIC) < len(content):
            return mark + frame[len(_MAGIC) :]
    return _PLAIN + content


def unpacked(stored: object) -> bytes:
    """What `packed` or `packed_head` was given.

    Raises:
        CorruptRowError: these bytes are not of our making, or damaged where that shows.
    """
    if not isinstance(stored, bytes) or not stored:
        raise CorruptRowError(f"a value is stored as {type(stored).__name__}, which is no packed value")
    mark, content = stored[:1], stored[1:]
    if mark in _TRAINED:
        frame = _MAGIC + content
        try:
            if 0 <= zstandard.frame_content_size(frame) <= _LARGEST:
                decompressor = _decompressors[mark].take()
                content = decompressor.decompress(frame, allow_extra_data=False)
                _decompressors[mark].give_back(decompressor)
                return content
        except zstandard.ZstdError as error:
            raise CorruptRowError(f"a compressed value is damaged: {error}") from error
        raise CorruptRowError("a compressed value does not say how long it is, or is too long")
    if mark == _PLAIN:
        return content
    if mark == _DEFLATED:
        return _inflated(content)
    raise CorruptRowError(f"a value is packed in a way that this release does not know ({stored[0]})")


def _inflated(deflated: bytes) -> bytes:
    inflate = zlib.decompressobj(zdict=_NAMES)
    try:
        content = inflate.decompress(deflated, _LARGEST)
    except zlib.error as error:
        raise CorruptRowError(f"a compressed value is damaged: {error}") from error
    if not inflate.eof or inflate.unused_data:
        raise CorruptRowError("a compressed value is cut off, or followed by something else")
    return content
