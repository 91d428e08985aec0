"""Every error this package raises on purpose.

    MemStateError
    +-- StorageError                  the database cannot do what was asked
    |   +-- TransientError            may succeed when tried again
    |   |   +-- CommitRaced       prepared from an outdated view; internal, tried again
    |   |       +-- FactRaced     a fact it builds on was written meanwhile
    |   +-- DatabaseOpenError         unknown URL, not a database, no access
    |   |   +-- NewerSchemaError      written by a newer release
    |   |   +-- UnfinishedCopyError   a memory is being moved to it, or that was broken off
    |   +-- MigrationError            a memory cannot be moved from there, or not to there
    |   +-- ReadOnlyError             the database cannot be written
    |   +-- DiskFullError             no space left
    |   +-- StorageClosedError        used after close()
    |   +-- CorruptRowError           bytes no writer of ours wrote
    +-- SerializationError            a value that cannot be stored
    +-- DeserializationError          a stored value whose type is unknown or refused
    +-- NamespaceError, KeyTypeError  an address that cannot be stored
    +-- FilterError                   a filter that cannot be evaluated
    +-- SchemaError                   a value its Pydantic schema rejects
    +-- ConstraintError               a write that a schema's constraint forbids
    +-- NotFoundError                 an update of a fact that is not there
    +-- VectorSyncError               the step was not committed: vectors could not follow
    |   +-- EmbeddingError            the embedding model failed or returned nonsense
    +-- RollbackError                 there is nothing to go back to, or not from here
    |   +-- RollbackConflict          another thread has changed what would be undone
    +-- ForgetError                   nobody was named
    +-- UnknownMomentError            a checkpoint, sequence or time that the memory does not have
    +-- IndexConfigError              dims, fields or collection do not fit together
    +-- StagingError                  LangGraph's internals are not what this release expects

Where a built-in exception has the same meaning (``ValueError``, ``TypeError``), the class derives from it too,
so that code written against the upstream stores keeps catching it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class MemStateError(Exception):
    """Base of every error this package raises on purpose."""


class StorageError(MemStateError):
    """The database could not do what was asked; nothing of the failed commit is visible."""


class TransientError(StorageError):
    """The same call may succeed later: the database was busy, or another process won a race."""


class CommitRaced(TransientError):
    """The commit was prepared from what the database held a moment ago; prepare it again."""


class FactRaced(CommitRaced):
    """A fact that the commit builds on or replaces was written meanwhile; build it again."""


class DatabaseOpenError(StorageError):
    """The URL names no database this process can open."""


class NewerSchemaError(DatabaseOpenError):
    """A newer release of this package wrote the database; it is left untouched."""


class UnfinishedCopyError(DatabaseOpenError):
    """A memory is being moved to the database, or that was broken off: what is there is not all of it."""


class MigrationError(StorageError):
    """A memory cannot be moved from there, or not to there; the source is as it was."""


class ReadOnlyError(StorageError):
    """The database cannot be written by this process."""


class DiskFullError(StorageError):
    """No space is left for the commit; it was rolled back."""


class StorageClosedError(StorageError):
    """The memory was used after `close()`."""


class CorruptRowError(StorageError):
    """A row holds bytes that no writer of this package wrote. It is never read as a wrong value."""


class SerializationError(MemStateError, TypeError):
    """A value cannot be stored; the message names the path inside it and its type."""


class DeserializationError(MemStateError):
    """A stored value cannot be loaded safely; the message names its type. It never becomes None."""


class NamespaceError(MemStateError, ValueError):
    """A namespace is not a non-empty tuple of non-empty strings."""


class KeyTypeError(MemStateError, TypeError):
    """A key, an id or a word of provenance is not a string that can be stored."""


class FilterError(MemStateError, ValueError):
    """A filter uses an operator or operand that has no meaning."""


class SchemaError(MemStateError, ValueError):
    """A value its Pydantic schema rejects; nothing was written.

    `where` is the namespace or channel, `fields` the paths at fault, `output` the offending value, cut to a readable
    length. The message says all of it, so that it can be sent back to the model that made the value.
    """

    def __init__(self, message: str, *, where: str = "", output: str = "", fields: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.where = where
        self.output = output
        self.fields = fields


class ConstraintError(MemStateError, ValueError):
    """A write that a constraint of its schema forbids; nothing was written. `where` is the namespace and key."""

    def __init__(self, message: str, *, where: str = "") -> None:
        super().__init__(message)
        self.where = where


class NotFoundError(MemStateError, LookupError):
    """An update names a fact that is not there."""


class VectorSyncError(MemStateError):
    """The vector database failed, so the commit was taken back; state, facts and vectors are as before."""


class EmbeddingError(VectorSyncError):
    """The embedding model failed or returned vectors of the wrong shape; nothing was written."""


class RollbackError(MemStateError, ValueError):
    """What was asked for cannot be undone; nothing changed."""


class RollbackConflict(RollbackError):
    """Another thread has since changed what a rollback would take back; nothing changed.

    `conflicts` has one entry for each such fact.
    """

    def __init__(self, message: str, conflicts: Sequence[Conflict] = ()) -> None:
        super().__init__(message)
        self.conflicts = tuple(conflicts)


class Conflict(NamedTuple):
    """A fact that another thread changed: our last version, and theirs, which is current."""

    namespace: tuple[str, ...]
    key: str
    ours: str
    theirs: str


class ForgetError(MemStateError, ValueError):
    """What is to be forgotten was not named; nothing was erased."""


class UnknownMomentError(MemStateError, LookupError):
    """A moment of the past that names no checkpoint, sequence or time of this memory."""


class IndexConfigError(MemStateError, ValueError):
    """An index configuration is incomplete or contradicts what the database holds."""


class StagingError(MemStateError, RuntimeError):
    """The running LangGraph task cannot be found where this release of LangGraph keeps it."""
