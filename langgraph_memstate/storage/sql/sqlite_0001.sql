-- One database of langgraph-memstate. Namespaces are encoded so that a prefix is a range; see facts.py.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

-- The LangGraph side -------------------------------------------------------------------------------

CREATE TABLE checkpoints (
    thread_id     TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL,
    checkpoint_id TEXT NOT NULL,
    parent_id     TEXT,
    run_id        TEXT,
    seq           INTEGER NOT NULL,   -- the log's last sequence when the checkpoint committed
    ts            TEXT NOT NULL,      -- when it was made: ISO 8601
    head_type     TEXT NOT NULL,
    head          BLOB NOT NULL,
    metadata      TEXT NOT NULL,      -- JSON
    manifest      TEXT NOT NULL,      -- JSON: channel -> value_id
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX checkpoints_by_id ON checkpoints (checkpoint_id);
CREATE INDEX checkpoints_by_run ON checkpoints (run_id) WHERE run_id IS NOT NULL;

-- Equal values of a thread are stored once; value_id is a hash of type and bytes, or of a list's elements.
-- Serialised values are packed; see packing.py.
CREATE TABLE channel_values (
    thread_id TEXT NOT NULL,
    value_id  TEXT NOT NULL,
    type      TEXT NOT NULL,
    data      BLOB NOT NULL,
    PRIMARY KEY (thread_id, value_id)
) STRICT;

-- A version of a list: the first `keep` elements of another version (`base`), then these.
CREATE TABLE lists (
    id        INTEGER PRIMARY KEY,
    thread_id TEXT NOT NULL,
    value_id  TEXT NOT NULL,
    kind      TEXT NOT NULL,
    depth     INTEGER NOT NULL,       -- how many versions led here; says which one is the base
    base      INTEGER,                -- id; its depth is smaller
    keep      INTEGER NOT NULL,
    elements  BLOB NOT NULL,          -- ids, as packed JSON of their differences
    UNIQUE (thread_id, value_id)
) STRICT;

-- Equal elements of a thread are stored once; digest is a hash of type and bytes.
CREATE TABLE elements (
    id        INTEGER PRIMARY KEY,
    thread_id TEXT NOT NULL,
    digest    BLOB NOT NULL,
    type      TEXT NOT NULL,
    data      BLOB NOT NULL,
    UNIQUE (thread_id, digest)
) STRICT;

CREATE TABLE writes (
    thread_id     TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL,
    checkpoint_id TEXT NOT NULL,
    task_path     TEXT NOT NULL,
    task_id       TEXT NOT NULL,
    idx           INTEGER NOT NULL,
    channel       TEXT NOT NULL,
    type          TEXT NOT NULL,
    data          BLOB NOT NULL,
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, idx)
) STRICT, WITHOUT ROWID;

-- Memory writes of finished tasks whose step has not landed.
CREATE TABLE staged (
    thread_id     TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL,
    checkpoint_id TEXT NOT NULL,
    task_id       TEXT NOT NULL,
    ord           INTEGER NOT NULL,
    task_path     TEXT NOT NULL,
    version       TEXT NOT NULL,
    ns            TEXT NOT NULL,
    key           TEXT NOT NULL,
    draft         TEXT NOT NULL,      -- JSON
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, ord)
) STRICT, WITHOUT ROWID;

-- Memory -------------------------------------------------------------------------------------------

-- Append-only, without gaps.
CREATE TABLE facts (
    seq            INTEGER PRIMARY KEY,
    version        TEXT NOT NULL UNIQUE,
    commit_id      INTEGER NOT NULL,  -- the first sequence of the commit
    ns             TEXT NOT NULL,
    key            TEXT NOT NULL,
    op             TEXT NOT NULL CHECK (op IN ('put', 'delete')),
    type           TEXT,
    value          TEXT,              -- JSON; NULL for a delete, and where the content was forgotten
    supersedes     TEXT,
    undoes         INTEGER,           -- the sequence that a rollback went back to
    created_at     REAL,              -- when the item came to be; NULL for a delete
    index_paths    TEXT,              -- JSON: null, false or a list of paths
    ttl            REAL,
    schema         TEXT,
    schema_version INTEGER,
    thread_id      TEXT,
    checkpoint_ns  TEXT,
    checkpoint_id  TEXT,
    task_id        TEXT,
    node           TEXT,
    run_id         TEXT,
    actor          TEXT,
    reason         TEXT,
    ts             REAL NOT NULL,     -- when it was written
    committed_at   REAL NOT NULL
) STRICT;
CREATE INDEX facts_by_time ON facts (committed_at);
CREATE INDEX facts_by_key ON facts (ns, key, seq);
CREATE INDEX facts_by_thread ON facts (thread_id, seq) WHERE thread_id IS NOT NULL;
CREATE TRIGGER facts_stay BEFORE DELETE ON facts BEGIN
    SELECT raise(ABORT, 'the log is append-only');
END;
CREATE TRIGGER facts_do_not_change BEFORE UPDATE OF
    seq, version, commit_id, ns, key, op, type, supersedes, undoes, created_at, index_paths, ttl, schema,
    schema_version, thread_id, checkpoint_ns, checkpoint_id, task_id, node, run_id, actor, reason, ts, committed_at
ON facts BEGIN
    SELECT raise(ABORT, 'the log is append-only');
END;
CREATE TRIGGER facts_only_forget BEFORE UPDATE OF value ON facts WHEN NEW.value IS NOT NULL BEGIN
    SELECT raise(ABORT, 'the log is append-only');
END;
-- INSERT OR REPLACE deletes without asking the trigger above.
CREATE TRIGGER facts_are_not_replaced BEFORE INSERT ON facts
WHEN NEW.seq <= (SELECT max(seq) FROM facts) OR EXISTS (SELECT 1 FROM facts WHERE version = NEW.version) BEGIN
    SELECT raise(ABORT, 'the log is append-only');
END;

-- The current version of each (namespace, key).
CREATE TABLE items (
    ns         TEXT NOT NULL,
    key        TEXT NOT NULL,
    version    TEXT NOT NULL UNIQUE,
    seq        INTEGER NOT NULL,
    type       TEXT,
    value      TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    ttl        REAL,
    expires_at REAL,
    PRIMARY KEY (ns, key)
) STRICT;
CREATE INDEX items_by_seq ON items (seq, ns);
CREATE INDEX items_by_expiry ON items (expires_at) WHERE expires_at IS NOT NULL;

-- Vectors ------------------------------------------------------------------------------------------

CREATE TABLE indexes (
    name       TEXT PRIMARY KEY,
    model      TEXT NOT NULL,
    dims       INTEGER NOT NULL,
    generation INTEGER NOT NULL
) STRICT;

CREATE TABLE embeddings (
    model     TEXT NOT NULL,
    text_hash BLOB NOT NULL,
    vector    BLOB NOT NULL,          -- float32, little endian, length 1
    PRIMARY KEY (model, text_hash)
) STRICT;

-- Kept for every version, so that an undo never embeds again.
CREATE TABLE vectors (
    id         INTEGER PRIMARY KEY,   -- grows, but for erasures, which meta counts
    version    TEXT NOT NULL,
    index_name TEXT NOT NULL,
    ord        INTEGER NOT NULL,
    vector_id  TEXT NOT NULL,
    text_hash  BLOB NOT NULL,
    UNIQUE (version, index_name, ord)
) STRICT;
CREATE INDEX vectors_by_id ON vectors (vector_id, index_name);

-- An id is never given twice: who has applied an entry names it by its id, and it may have been replaced meanwhile.
CREATE TABLE outbox (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    index_name TEXT NOT NULL,
    op         TEXT NOT NULL CHECK (op IN ('upsert', 'delete', 'embed')),
    vector_id  TEXT NOT NULL,
    version    TEXT,
    attempts   INTEGER NOT NULL DEFAULT 0,
    retry_at   REAL,                  -- NULL: quarantined
    error      TEXT
) STRICT;
CREATE INDEX outbox_by_index ON outbox (index_name, id);
CREATE INDEX outbox_to_embed ON outbox (index_name, id) WHERE op = 'embed';
CREATE INDEX outbox_by_vector ON outbox (vector_id);
CREATE INDEX outbox_by_version ON outbox (version);

CREATE TABLE prepared (
    id         TEXT PRIMARY KEY,
    index_name TEXT NOT NULL,
    vector_ids TEXT NOT NULL,         -- JSON list
    owner      TEXT NOT NULL,
    expires_at REAL NOT NULL
) STRICT;
