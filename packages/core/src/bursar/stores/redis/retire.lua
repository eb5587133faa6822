-- Take away accounts that nobody has moved since they were read, and that no open reservation names; how many went.
-- KEYS: what names of keys begin with. ARGV: of each account its key, the text that it had, and its budget.

local P, held, gone = KEYS[1], {}, 0
for _, id in ipairs(redis.call('ZRANGE', P .. 'due', 0, -1)) do
  for key in (redis.call('HGET', P .. 'i:' .. id, 'held') or ''):gmatch('([^\n]*)\n[^\n]*\n[^\n]*\n') do held[key] = true end
end
for at = 1, #ARGV, 3 do
  local key, budget = ARGV[at], ARGV[at + 2]
  if not held[key] and redis.call('GET', P .. 'a:' .. key) == ARGV[at + 1] then
    redis.call('DEL', P .. 'a:' .. key, P .. 'r:' .. key)
    redis.call('SREM', P .. 'accounts', key)
    redis.call('ZREM', P .. 'moved', key)
    if redis.call('HINCRBY', P .. 'counts', budget, -1) <= 0 then redis.call('HDEL', P .. 'counts', budget) end
    gone = gone + 1
  end
end
return gone
