-- What a commit does in the database itself, so that it need not wait for an answer to know what to send next. Functions
-- that change the state of a thread say so by its id if it has to be swept afterwards, as something may be free.
-- An error of class MS is one of the package's own; see postgres_link.py.

-- The turn of a commit: where the tables are, how long (milliseconds) it waits for others and others for it, its locks,
-- and its number in the row that says what has landed. All end with the transaction. Without `threads` (keys of locks, in
-- one order for all) it waits for everybody, else for those only. `durability` is NULL where the server's own is enough,
-- and `writer` where nobody will ask what has landed.
CREATE FUNCTION take_turn(
    path text, patience text, durability text, everybody bigint, threads bigint[], writer text, number bigint
) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('search_path', path, true), set_config('lock_timeout', patience, true),
        set_config('idle_in_transaction_session_timeout', patience, true);
    IF durability IS NOT NULL THEN
        PERFORM set_config('synchronous_commit', durability, true);
    END IF;
    IF threads IS NULL THEN
        PERFORM pg_advisory_xact_lock(everybody);
    ELSE
        PERFORM pg_advisory_xact_lock_shared(everybody);
        PERFORM pg_advisory_xact_lock(thread) FROM unnest(threads) AS thread;
    END IF;
    UPDATE writers SET committed = number, seen_at = now() WHERE id = writer;
    RETURN NULL;
END
$$;

CREATE FUNCTION refuse_race(reason text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'MS001', MESSAGE = reason;
END
$$;

-- Checkpoints --------------------------------------------------------------------------------------

-- An id as bytes: a UUID, and a hash in 32 digits, take half the room. The first byte says what it is.
CREATE FUNCTION id_key(id text) RETURNS bytea IMMUTABLE STRICT PARALLEL SAFE LANGUAGE plpgsql AS $$
BEGIN
    IF octet_length(id) = 32 AND ltrim(id, '0123456789abcdef') = '' THEN
        RETURN '\x01'::bytea || decode(id, 'hex');
    ELSIF octet_length(id) = 36 AND id LIKE '________-____-____-____-____________'
        AND translate(id, '0123456789abcdef', '') = '----'  -- in a third of the time that a regular expression takes
    THEN
        RETURN '\x02'::bytea || uuid_send(id::uuid);
    END IF;
    RETURN '\x00'::bytea || convert_to(id, 'UTF8');
END
$$;

CREATE FUNCTION id_text(key bytea) RETURNS text STABLE PARALLEL SAFE LANGUAGE sql AS $$
    SELECT CASE get_byte(key, 0)
        WHEN 1 THEN encode(substring(key FROM 2), 'hex')
        WHEN 2 THEN encode(substring(key FROM 2), 'hex')::uuid::text
        ELSE convert_from(substring(key FROM 2), 'UTF8')
    END
$$;

-- The number of a thread, which it gets with its first row.
CREATE FUNCTION number_of(name text) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    number integer := (SELECT id FROM threads WHERE thread_id = name);
BEGIN
    IF number IS NULL THEN
        INSERT INTO threads (thread_id) VALUES (name) RETURNING id INTO number;
    END IF;
    RETURN number;
END
$$;

-- A version of a list whose base is there, and whose elements are, or come with it. `tail` and `digests` hold digests.
-- Each row is looked up by its key: a plan that is kept since the tables were empty is as good when they are large.
CREATE FUNCTION put_list(
    thread_id text, list text, kind text, depth integer, base_list text, keep integer, tail bytea[],
    digests bytea[], packed bytea[]
) RETURNS text LANGUAGE plpgsql SET plan_cache_mode TO force_generic_plan AS $$
DECLARE
    number integer := number_of(thread_id);
    key bytea := id_key(list);
    based_on bigint;
    ids bigint[];
    id bigint;
    before bigint := 0;
    steps text[] := '{}';
BEGIN
    IF EXISTS (SELECT 1 FROM lists WHERE thread = number AND value_id = key) THEN
        RETURN NULL;
    END IF;
    IF base_list IS NOT NULL THEN
        based_on := (SELECT lists.id FROM lists WHERE thread = number AND value_id = id_key(base_list));
    END IF;
    INSERT INTO elements (thread, digest, value)
    SELECT number, fresh.digest, fresh.value FROM unnest(digests, packed) AS fresh (digest, value)
    WHERE (SELECT held.id FROM elements AS held WHERE held.thread = number AND held.digest = fresh.digest) IS NULL;
    ids := ARRAY(
        SELECT (SELECT elements.id FROM elements WHERE elements.thread = number AND elements.digest = wanted)
        FROM unnest(tail) AS wanted
    );
    IF array_position(ids, NULL) IS NOT NULL OR (based_on IS NULL AND base_list IS NOT NULL) THEN
        PERFORM refuse_race('values of the checkpoint before this one were deleted meanwhile');
    END IF;
    FOREACH id IN ARRAY ids LOOP
        steps := steps || (id - before)::text;
        before := id;
    END LOOP;
    INSERT INTO lists (thread, value_id, kind, depth, base, keep, elements) VALUES (
        number, key, kind, depth, based_on, keep,
        '\x00'::bytea || convert_to('[' || array_to_string(steps, ',') || ']', 'UTF8')
    );
    RETURN NULL;
END
$$;

-- A checkpoint, of whose values some are there (`reused`: ids) and some come with it (`fresh`). Where it takes the place
-- of one with other values, these may be free.
CREATE FUNCTION put_checkpoint(
    thread_id text, ns text, id text, parent text, run text, new_manifest text, packed_head bytea, reused text[],
    fresh text[], packed bytea[]
) RETURNS text LANGUAGE plpgsql SET plan_cache_mode TO force_generic_plan AS $$
DECLARE
    number integer := number_of(thread_id);
    wanted text;
    key bytea;
    replaced text;
    put checkpoints;
BEGIN
    IF fresh IS NOT NULL THEN
        INSERT INTO channel_values
        SELECT number, id_key(given.id), given.value FROM unnest(fresh, packed) AS given (id, value)
        ON CONFLICT DO NOTHING;
    END IF;
    FOREACH wanted IN ARRAY reused LOOP
        key := id_key(wanted);
        IF NOT EXISTS (SELECT 1 FROM channel_values WHERE thread = number AND value_id = key)
            AND NOT EXISTS (SELECT 1 FROM lists WHERE thread = number AND value_id = key)
        THEN
            PERFORM refuse_race('values of the checkpoint before this one were deleted meanwhile');
        END IF;
    END LOOP;
    put := ROW(
        (SELECT coalesce(max(seq), 0) FROM facts), number, ns, id, id_key(parent), run, new_manifest, packed_head
    );
    INSERT INTO checkpoints SELECT put.* ON CONFLICT DO NOTHING;
    IF FOUND THEN
        RETURN NULL;
    END IF;
    DELETE FROM checkpoints WHERE thread = number AND checkpoint_ns = ns AND checkpoint_id = id
    RETURNING manifest INTO replaced;
    INSERT INTO checkpoints SELECT put.*;
    IF EXISTS (
        SELECT value FROM json_each_text(replaced::json) EXCEPT SELECT value FROM json_each_text(new_manifest::json)
    ) THEN
        RETURN thread_id;
    END IF;
    RETURN NULL;
END
$$;

-- Writes of a task: the first regular one of an index stays, special ones (below 0) are replaced. Those that come with a
-- digest are kept as elements.
CREATE FUNCTION put_writes(
    thread_id text, ns text, id text, task text, path text, idxs integer[], channels text[], digests bytea[],
    packed bytea[]
) RETURNS text LANGUAGE plpgsql SET plan_cache_mode TO force_generic_plan AS $$
DECLARE
    number integer := number_of(thread_id);
    step bytea := id_key(id);
    task_key bytea := id_key(task);
BEGIN
    WITH given AS (
        SELECT * FROM unnest(idxs, channels, digests, packed) AS one (idx, channel, digest, value)
    ), fresh AS (
        INSERT INTO writes (thread, idx, checkpoint_ns, checkpoint_id, task_id, task_path, channel, digest, value)
        SELECT number, given.idx, ns, step, task_key, path, channel, digest, CASE WHEN digest = '' THEN value ELSE '' END
        FROM given
        ON CONFLICT (thread, checkpoint_ns, checkpoint_id, task_id, idx) DO UPDATE
        SET task_path = EXCLUDED.task_path, channel = EXCLUDED.channel, value = EXCLUDED.value WHERE writes.idx < 0
        RETURNING writes.idx
    )
    INSERT INTO elements (thread, digest, value)
    SELECT DISTINCT ON (digest) number, digest, value FROM given JOIN fresh USING (idx)
    WHERE digest <> ''
    AND (SELECT held.id FROM elements AS held WHERE held.thread = number AND held.digest = given.digest) IS NULL;
    RETURN NULL;
END
$$;

-- Forget writes of a task. Where they referred to elements, these may be free.
CREATE FUNCTION drop_writes(thread_id text, ns text, id text, task text, idxs integer[])
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    number integer := number_of(thread_id);
    shared bigint;
BEGIN
    WITH gone AS (
        DELETE FROM writes
        WHERE thread = number AND checkpoint_ns = ns AND checkpoint_id = id_key(id) AND task_id = id_key(task)
        AND idx = ANY(idxs)
        RETURNING digest
    )
    SELECT count(*) INTO shared FROM gone WHERE digest <> '';
    RETURN CASE WHEN shared > 0 THEN thread_id END;
END
$$;

-- Staged work --------------------------------------------------------------------------------------

-- Keep the memory writes of a task, but for those that are in the log; the first account of a finished task stays.
CREATE FUNCTION stage(
    thread text, ns text, id text, task text, path text, versions text[], namespaces text[], keys text[], drafts text[]
) RETURNS text LANGUAGE plpgsql SET plan_cache_mode TO force_generic_plan AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM staged
        WHERE thread_id = thread AND checkpoint_ns = stage.ns AND checkpoint_id = stage.id AND task_id = task
    ) THEN
        INSERT INTO staged (
            thread_id, checkpoint_ns, checkpoint_id, task_id, ord, task_path, version, ns, key, draft
        )
        SELECT thread, stage.ns, stage.id, task, given.ord - 1, path, given.version, given.ns, given.key, given.draft
        FROM unnest(versions, namespaces, keys, drafts) WITH ORDINALITY AS given (version, ns, key, draft, ord)
        WHERE (SELECT 1 FROM facts WHERE facts.version = given.version) IS NULL;
    END IF;
    RETURN NULL;
END
$$;

-- Forget what was staged for a step, or for one task of it.
CREATE FUNCTION unstage(thread text, ns text, id text, task text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM staged WHERE thread_id = thread AND checkpoint_ns = unstage.ns AND checkpoint_id = unstage.id
    AND (task IS NULL OR task_id = task);
    RETURN NULL;
END
$$;

-- Remove what was staged for a step. What of it is not in the log must be among `expected`.
CREATE FUNCTION drain(thread text, ns text, id text, expected text[]) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    unknown bigint;
BEGIN
    WITH gone AS (
        DELETE FROM staged WHERE thread_id = thread AND checkpoint_ns = drain.ns AND checkpoint_id = drain.id
        RETURNING version
    )
    SELECT count(*) INTO unknown FROM gone
    WHERE version <> ALL(expected) AND NOT EXISTS (SELECT 1 FROM facts WHERE facts.version = gone.version);
    IF unknown > 0 THEN
        PERFORM refuse_race(unknown || ' memory writes were staged while the step was committed');
    END IF;
    RETURN NULL;
END
$$;

-- The log ------------------------------------------------------------------------------------------

-- Append a draft to the log and make it current, unless it is there already, or `if_expired` leaves it out: then it has
-- to replace one of these versions, whose time to live is over. `known`: indexes that the commit itself takes care of.
CREATE FUNCTION append(draft facts, if_expired text[], known text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    old items;
    is_over boolean;
BEGIN
    IF EXISTS (SELECT 1 FROM facts WHERE version = draft.version) THEN
        RETURN;
    END IF;
    SELECT * INTO old FROM items WHERE ns = draft.ns AND key = draft.key;
    is_over := coalesce(old.expires_at <= draft.ts, false);
    IF if_expired IS NOT NULL AND NOT (is_over AND old.version = ANY(if_expired)) THEN
        RETURN;
    END IF;
    draft.seq := (SELECT coalesce(max(seq), 0) + 1 FROM facts);
    draft.supersedes := old.version;
    IF draft.op = 'put' THEN
        draft.created_at := coalesce(draft.created_at, CASE WHEN is_over THEN NULL ELSE old.created_at END, draft.ts);
    END IF;
    INSERT INTO facts SELECT draft.*;
    IF old.version IS NOT NULL THEN
        PERFORM retire(old.version);
    END IF;
    IF draft.op = 'delete' THEN
        DELETE FROM items WHERE ns = draft.ns AND key = draft.key;
        RETURN;
    END IF;
    INSERT INTO items (ns, key, version, seq, type, value, created_at, updated_at, ttl, expires_at)
    VALUES (
        draft.ns, draft.key, draft.version, draft.seq, draft.type, draft.value, draft.created_at, draft.ts, draft.ttl,
        draft.ts + draft.ttl * 60
    )
    ON CONFLICT (ns, key) DO UPDATE SET
        version = EXCLUDED.version, seq = EXCLUDED.seq, type = EXCLUDED.type, value = EXCLUDED.value,
        created_at = EXCLUDED.created_at, updated_at = EXCLUDED.updated_at, ttl = EXCLUDED.ttl,
        expires_at = EXCLUDED.expires_at;
    IF draft.index_paths IS DISTINCT FROM 'false' THEN
        INSERT INTO outbox (index_name, op, vector_id, version, retry_at)
        SELECT name, 'embed', draft.version, draft.version, 0 FROM indexes WHERE name <> ALL(known) ORDER BY name;
    END IF;
END
$$;

-- The vectors of a version that is current no more have to go. Work that a process has claimed is its own.
CREATE FUNCTION retire(retired text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    place vector_tables;
BEGIN
    FOR place IN SELECT * FROM vector_tables LOOP
        EXECUTE format(
            'DELETE FROM %I WHERE vector_id IN (SELECT vector_id FROM vectors WHERE version = $1 AND index_name = $2)',
            'vectors_' || place.number
        ) USING retired, place.index_name;
    END LOOP;
    DELETE FROM outbox WHERE version = retired AND op <> 'delete'
    AND NOT coalesce(claimed_until > extract(epoch FROM clock_timestamp()), false);
    INSERT INTO outbox (index_name, op, vector_id, version, retry_at)
    SELECT index_name, 'delete', vector_id, version, 0 FROM vectors
    WHERE version = retired AND index_name <> 'exact' AND index_name NOT IN (SELECT index_name FROM vector_tables)
    ORDER BY id;
END
$$;
