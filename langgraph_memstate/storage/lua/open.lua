-- Begin a log where there is none.
-- KEYS: head, log.  ARGV: format, store id.
-- Answers {status, head}: "open", or "foreign" where the keys hold something else.
if redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then
    redis.call('HSET', KEYS[1], 'format', ARGV[1], 'store', ARGV[2], 'length', 0, 'last', string.rep('\0', 16),
        'bytes', 0, 'trimmed', 0, 'trimmed_bytes', 0, 'image', '', 'chunks', 0, 'image_bytes', 0)
end
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' or not redis.call('HGET', KEYS[1], 'store') then
    return {'foreign'}
end
return {'open', redis.call('HMGET', KEYS[1], 'format', 'store', 'length', 'last', 'bytes', 'trimmed', 'trimmed_bytes',
    'image', 'chunks', 'image_bytes')}
