-- The law: what every command does to the rows, as bursar.law.decide has it, all of it in one call of this script.
--
-- KEYS: what the names of all keys of one slot begin with. ARGV: the time ('' for the server's own), the largest time that the
-- caller has seen, "1" where the policy's version is a copy, and the commands, each a JSON array of texts.
-- A command reads and reckons first, and may fail meanwhile; then it writes. The answer: the time, and JSON for each command.

local function decide(c)
  local name = c[1]
  if name == 'reserve' then return reserve(c) end
  if name == 'settle' then return settle(c) end
  if name == 'release' then return release(c) end
  if name == 'extend' then return extend(c) end
  if name == 'expire' then return expire(c) end
  if name == 'charge' then return charge(c) end
  return put_out({id = c[2], kind = c[3], facts = c[4]}) and '["told",false]' or '["told",true]'
end

local seen = math.max(tonumber(redis.call('GET', P .. 'clock') or 0), tonumber(ARGV[2]))
if ARGV[1] == '' then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
  if now < seen - 60000000 then return {'clock', dec(math.floor((seen - now) / 1000000))} end
else
  now = tonumber(ARGV[1])
end
now = math.max(now, seen)
local policy = redis.call('HGET', P .. 'policy', 'version')
if not policy and ARGV[3] == '1' then return {'join'} end
version = tonumber(policy or 0)

local answers = {dec(now)}
for at = 4, #ARGV do
  local well, told = pcall(decide, cjson.decode(ARGV[at]))
  if not well then told = cjson.encode({'failed', type(told) == 'table' and told.err or tostring(told)}) end
  answers[at - 2] = told
end
redis.pcall('SET', P .. 'clock', dec(now)) -- a server that takes no writes has said so above, where there was anything to write
return answers
