-- Publish definitions on top of a version, if that is the newest: otherwise somebody was faster, and nothing is done.
-- KEYS: what names of keys begin with. ARGV: that version, the next one, the operator's key or '', names and definitions.

local policy = KEYS[1] .. 'policy'
if (redis.call('HGET', policy, 'version') or '0') ~= ARGV[1] then return 0 end
for at = 4, #ARGV, 2 do
  redis.call('HSET', KEYS[1] .. 'definitions', ARGV[at], ARGV[at + 1])
  redis.call('RPUSH', KEYS[1] .. 'history', ARGV[at], ARGV[at + 1])
  redis.call('ZADD', KEYS[1] .. 'versions', ARGV[1] + at / 2 - 1, ARGV[at])
end
redis.call('HSET', policy, 'version', ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', policy, 'operator', ARGV[3]) end
return 1
