-- Bring a slot's copy of the policy's version and of the operator's key up to these; it never goes back.
-- KEYS: what names of keys begin with. ARGV: the version, the operator's key or ''.

local policy = KEYS[1] .. 'policy'
if tonumber(redis.call('HGET', policy, 'version') or -1) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', policy, 'version', ARGV[1])
if ARGV[2] ~= '' then redis.call('HSET', policy, 'operator', ARGV[2]) end
return 1
