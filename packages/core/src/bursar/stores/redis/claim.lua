-- Take due alerts of the outbox, so that nobody else gets them for a while.
-- KEYS: what names of keys begin with. ARGV: now, until when nobody else gets them, how many at most.

local found = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1] .. 'outbox', '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])) do
  local key = KEYS[1] .. 't:' .. id
  local claims = redis.call('HINCRBY', key, 'claims', 1)
  redis.call('ZADD', KEYS[1] .. 'outbox', ARGV[2], id)
  found[#found + 1] = {id, claims - 1, redis.call('HGETALL', key)}
end
return found
