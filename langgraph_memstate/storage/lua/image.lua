-- Let an image stand for the beginning of the log, and drop that.
-- KEYS: head, log, the image's chunks, those of the image before, the claim on making one.
-- ARGV: store id, position of the image, id of the entry there, bytes up to there, name, chunks, bytes of the image,
-- name of the image before.
-- Answers "landed", also where an earlier call did and its answer was lost, or "outdated" where there is a later image
-- already, or the log is another.
local now = redis.call('HMGET', KEYS[1], 'store', 'length', 'last', 'trimmed', 'image')
if now[1] == ARGV[1] and now[5] == ARGV[5] then
    return 'landed'
end
local length, trimmed, position = tonumber(now[2]), tonumber(now[4]), tonumber(ARGV[2])
local fits = now[1] == ARGV[1] and now[5] == ARGV[8] and trimmed < position and position <= length
    and redis.call('LLEN', KEYS[2]) == length - trimmed and redis.call('LLEN', KEYS[3]) == tonumber(ARGV[6])
if fits then
    -- An entry begins with its format, the id of the one before and its own; see redis_log.py.
    local entry = redis.call('LINDEX', KEYS[2], position - trimmed - 1)
    fits = string.sub(entry, 18, 33) == ARGV[3]
end
if not fits then
    redis.call('DEL', KEYS[3])
    return 'outdated'
end
redis.call('PERSIST', KEYS[3])
redis.call('HSET', KEYS[1], 'trimmed', position, 'trimmed_bytes', ARGV[4], 'image', ARGV[5], 'chunks', ARGV[6],
    'image_bytes', ARGV[7])
redis.call('LTRIM', KEYS[2], position - trimmed, -1)
if ARGV[8] ~= '' then
    redis.call('DEL', KEYS[4])
end
redis.call('DEL', KEYS[5])
return 'landed'
