-- Append an entry if the log ends where the caller believes, else say what it has missed; without an entry, only that.
-- KEYS: head, log.  ARGV: store id, position, id of the entry there, most entries to return, [entry, its id].
-- Answers {status, head, entries}:
--   appended  now, or by an earlier call whose answer was lost
--   same      nothing is new
--   news      with the entries that follow the caller's, as many as were asked for
--   trimmed   what follows is in the image
--   lost      the log does not hold what the caller has seen of it
--   torn      it does not hold what its head says
local function head()
    return redis.call('HMGET', KEYS[1], 'format', 'store', 'length', 'last', 'bytes', 'trimmed', 'trimmed_bytes',
        'image', 'chunks', 'image_bytes')
end

local now = head()
if now[2] ~= ARGV[1] then
    return {'lost', now, {}}
end
local length, trimmed, position = tonumber(now[3]), tonumber(now[6]), tonumber(ARGV[2])
if redis.call('LLEN', KEYS[2]) ~= length - trimmed then
    return {'torn', now, {}}
end
if position > length or (position == length and ARGV[3] ~= now[4]) then
    return {'lost', now, {}}
end
if position < trimmed then
    return {'trimmed', now, {}}
end
if position < length then
    local first = position - trimmed
    -- An entry begins with its format, the id of the one before and its own; see redis_log.py.
    if ARGV[6] and string.sub(redis.call('LINDEX', KEYS[2], first), 18, 33) == ARGV[6] then
        redis.call('HSET', KEYS[1], 'store', now[2])  -- WAIT waits for what its own connection has written
        return {'appended', now, {}}
    end
    return {'news', now, redis.call('LRANGE', KEYS[2], first, first + ARGV[4] - 1)}
end
if not ARGV[5] then
    return {'same', now, {}}
end
redis.call('RPUSH', KEYS[2], ARGV[5])
redis.call('HSET', KEYS[1], 'length', length + 1, 'last', ARGV[6])
redis.call('HINCRBY', KEYS[1], 'bytes', #ARGV[5])
return {'appended', head(), {}}
