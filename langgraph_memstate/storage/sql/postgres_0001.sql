-- One database of langgraph-memstate, in a schema of its own. Namespaces are encoded so that a prefix is a range; see
-- facts.py. Texts sort by code point (COLLATE "C"), in every database alike.

CREATE TABLE meta (
    key   text COLLATE "C" PRIMARY KEY,
    value text NOT NULL
);

-- Which transaction each open storage has committed last: the answer to "did my COMMIT arrive?" after a lost connection.
CREATE TABLE writers (
    id        text COLLATE "C" PRIMARY KEY,
    committed bigint NOT NULL,
    seen_at   timestamptz NOT NULL
);

-- The LangGraph side -------------------------------------------------------------------------------

-- Rows name their thread by its number. Ids that are only ever compared are bytes; see `id_key` in postgres_0002.sql.
-- A serialised value and its type are one column; see postgres_packing.py.
CREATE TABLE threads (
    id        integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    thread_id text COLLATE "C" NOT NULL UNIQUE
);

CREATE TABLE checkpoints (
    seq           bigint NOT NULL,    -- the log's last sequence when the checkpoint committed
    thread        integer NOT NULL,
    checkpoint_ns text COLLATE "C" NOT NULL,
    checkpoint_id text COLLATE "C" NOT NULL,
    parent_id     bytea,
    run_id        text COLLATE "C",
    manifest      text NOT NULL,      -- JSON: channel -> value_id, as text
    head          bytea NOT NULL,     -- with its time and metadata
    PRIMARY KEY (thread, checkpoint_ns, checkpoint_id)
);
CREATE INDEX checkpoints_by_id ON checkpoints (checkpoint_id);
CREATE INDEX checkpoints_by_run ON checkpoints (run_id) WHERE run_id IS NOT NULL;

-- Equal values of a thread are stored once; value_id is a hash of type and bytes, or of a list's elements.
CREATE TABLE channel_values (
    thread   integer NOT NULL,
    value_id bytea NOT NULL,
    value    bytea NOT NULL,
    PRIMARY KEY (thread, value_id)
);

-- A version of a list: the first `keep` elements of another version (`base`), then these.
CREATE TABLE lists (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    base     bigint,                  -- id; its depth is smaller
    thread   integer NOT NULL,
    depth    integer NOT NULL,        -- how many versions led here; says which one is the base
    keep     integer NOT NULL,
    value_id bytea NOT NULL,
    kind     text NOT NULL,
    elements bytea NOT NULL,          -- ids, as packed JSON of their differences
    UNIQUE (thread, value_id)
);

-- Equal elements of a thread's lists, and of its writes, are stored once; digest is a hash of type and bytes.
CREATE TABLE elements (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    thread integer NOT NULL,
    digest bytea NOT NULL,
    value  bytea NOT NULL,
    UNIQUE (thread, digest)
);

-- What a task writes to a list is an element of it soon. So the value of a write is an element, by its digest, unless it
-- is small or may be replaced.
CREATE TABLE writes (
    thread        integer NOT NULL,
    idx           integer NOT NULL,
    checkpoint_ns text COLLATE "C" NOT NULL,
    checkpoint_id bytea NOT NULL,
    task_id       bytea NOT NULL,
    task_path     text COLLATE "C" NOT NULL,
    channel       text COLLATE "C" NOT NULL,
    digest        bytea NOT NULL,     -- empty where the value is here
    value         bytea NOT NULL,     -- empty where it is an element
    PRIMARY KEY (thread, checkpoint_ns, checkpoint_id, task_id, idx)
);

-- Memory writes of finished tasks whose step has not landed.
CREATE TABLE staged (
    thread_id     text COLLATE "C" NOT NULL,
    checkpoint_ns text COLLATE "C" NOT NULL,
    checkpoint_id text COLLATE "C" NOT NULL,
    task_id       text COLLATE "C" NOT NULL,
    ord           integer NOT NULL,
    task_path     text COLLATE "C" NOT NULL,
    version       text COLLATE "C" NOT NULL,
    ns            text COLLATE "C" NOT NULL,
    key           text COLLATE "C" NOT NULL,
    draft         text NOT NULL,      -- JSON
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, ord)
);

-- Memory -------------------------------------------------------------------------------------------

-- Append-only, without gaps, in the order of commits: who appends holds the lock of the log.
CREATE TABLE facts (
    seq            bigint PRIMARY KEY,
    version        text COLLATE "C" NOT NULL UNIQUE,
    commit_id      bigint NOT NULL,   -- the first sequence of the commit
    ns             text COLLATE "C" NOT NULL,
    key            text COLLATE "C" NOT NULL,
    op             text NOT NULL CHECK (op IN ('put', 'delete')),
    type           text COLLATE "C",
    value          text,              -- JSON; NULL for a delete, and where the content was forgotten
    supersedes     text COLLATE "C",
    undoes         bigint,            -- the sequence that a rollback went back to
    created_at     double precision,  -- when the item came to be; NULL for a delete
    index_paths    text,              -- JSON: null, false or a list of paths
    ttl            double precision,
    schema         text,
    schema_version integer,
    thread_id      text COLLATE "C",
    checkpoint_ns  text COLLATE "C",
    checkpoint_id  text COLLATE "C",
    task_id        text COLLATE "C",
    node           text COLLATE "C",
    run_id         text COLLATE "C",
    actor          text COLLATE "C",
    reason         text COLLATE "C",
    ts             double precision NOT NULL,  -- when it was written
    committed_at   double precision NOT NULL
);
CREATE INDEX facts_by_time ON facts (committed_at);
CREATE INDEX facts_by_key ON facts (ns, key, seq);
CREATE INDEX facts_by_thread ON facts (thread_id, seq) WHERE thread_id IS NOT NULL;
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the log is append-only';
END
$$;
CREATE TRIGGER facts_stay BEFORE DELETE ON facts FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER facts_do_not_change BEFORE UPDATE ON facts FOR EACH ROW WHEN (NEW.value IS NOT NULL)
    EXECUTE FUNCTION refuse_change();

-- The current version of each (namespace, key). `value` is the truth; `doc` is what filters look into, and NULL where
-- JSONB cannot hold the value: it knows no NUL character.
CREATE TABLE items (
    ns         text COLLATE "C" NOT NULL,
    key        text COLLATE "C" NOT NULL,
    version    text COLLATE "C" NOT NULL UNIQUE,
    seq        bigint NOT NULL,
    type       text COLLATE "C",
    value      text NOT NULL,
    created_at double precision NOT NULL,
    updated_at double precision NOT NULL,
    ttl        double precision,
    expires_at double precision,
    doc        jsonb GENERATED ALWAYS AS
               (CASE WHEN position('\u0000' IN value) > 0 THEN NULL ELSE value::jsonb END) STORED,
    PRIMARY KEY (ns, key)
);
CREATE INDEX items_by_expiry ON items (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX items_by_seq ON items (seq);
CREATE INDEX items_by_content ON items USING gin (doc jsonb_path_ops);
CREATE INDEX items_without_doc ON items (seq) WHERE doc IS NULL;

-- Vectors ------------------------------------------------------------------------------------------

CREATE TABLE indexes (
    name       text COLLATE "C" PRIMARY KEY,
    model      text COLLATE "C" NOT NULL,
    dims       integer NOT NULL,
    generation bigint NOT NULL
);

CREATE TABLE embeddings (
    model     text COLLATE "C" NOT NULL,
    text_hash bytea NOT NULL,
    vector    bytea NOT NULL,         -- float32, little endian, length 1
    PRIMARY KEY (model, text_hash)
);

-- Kept for every version, so that an undo never embeds again.
CREATE TABLE vectors (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,  -- grows in the order of commits
    version    text COLLATE "C" NOT NULL,
    index_name text COLLATE "C" NOT NULL,
    ord        integer NOT NULL,
    vector_id  text COLLATE "C" NOT NULL,
    text_hash  bytea NOT NULL,
    UNIQUE (version, index_name, ord)
);
CREATE INDEX vectors_by_id ON vectors (vector_id, index_name);
CREATE INDEX vectors_by_text ON vectors (text_hash);

CREATE TABLE outbox (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    index_name text COLLATE "C" NOT NULL,
    op         text NOT NULL CHECK (op IN ('upsert', 'delete', 'embed')),
    vector_id  text COLLATE "C" NOT NULL,
    version    text COLLATE "C",
    attempts   integer NOT NULL DEFAULT 0,
    retry_at   double precision,      -- NULL: quarantined
    error      text,
    claimed_by text,                  -- who applies it, until then (seconds since 1970, by this server's clock)
    claimed_until double precision
);
CREATE INDEX outbox_by_index ON outbox (index_name, id);
CREATE INDEX outbox_to_embed ON outbox (index_name, id) WHERE op = 'embed';
CREATE INDEX outbox_by_vector ON outbox (vector_id);
CREATE INDEX outbox_by_version ON outbox (version);

-- Indexes that are kept in here (pgvector), each in a table `vectors_<number>`: exactly the vectors of what is current.
CREATE TABLE vector_tables (
    index_name text COLLATE "C" PRIMARY KEY,
    number     bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    element    text NOT NULL CHECK (element IN ('vector', 'halfvec')),
    store_id   text NOT NULL,
    generation bigint NOT NULL,
    dims       integer NOT NULL,
    model      text COLLATE "C" NOT NULL
);

CREATE TABLE prepared (
    id         text COLLATE "C" PRIMARY KEY,
    index_name text COLLATE "C" NOT NULL,
    vector_ids text[] COLLATE "C" NOT NULL,
    owner      text NOT NULL,
    expires_at double precision NOT NULL
);
