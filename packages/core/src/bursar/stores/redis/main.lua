-- The script's beginning and end: time, the policy's version, each command, and the answer.
--
-- KEYS: what the names of all keys of one slot begin with. ARGV: the time ('' for the server's own), the largest time that the
-- caller has seen, "1" where the policy's version is a copy, and the commands: of each, how many texts it has, and those. A
-- command reads and reckons first, and may fail meanwhile; then it writes. The answer is JSON: the time, and what each command
-- has come to.

local policy = redis.call('HMGET', P .. 'policy', 'version', 'clock', 'layout')
local seen = math.max(tonumber(policy[2] or 0), tonumber(ARGV[2]))
if ARGV[1] == '' then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
  if now < seen - 60000000 then return string.format('["clock",%d]', (seen - now) / 1000000) end
else
  now = tonumber(ARGV[1])
end
now = math.max(now, seen)
if not policy[1] and ARGV[3] == '1' then return '["join"]' end
version = tonumber(policy[1] or 0)
now_text = string.format(D, now)

local law -- made when it is needed, since making its functions takes as long as a call that goes the short way
local answers, at = {'[' .. now_text, nil}, 4
while at <= #ARGV do
  local texts = tonumber(ARGV[at])
  local c = {unpack(ARGV, at + 1, at + texts)}
  local short, well, told = c[1] == 'reserve' and short_reserve or c[1] == 'settle' and short_settle, true, nil
  if short then well, told = pcall(short, c) end
  if well and not told then
    law = law or whole()
    well, told = pcall(law, c)
  end
  if not well then told = cjson.encode({'failed', type(told) == 'table' and told.err or tostring(told)}) end
  answers[#answers + 1] = told
  at = at + texts + 1
end
-- What others have seen of the time, to a tenth of a second: each caller knows what it has seen itself. A server that takes no
-- writes has said so above, where there was anything to write.
if not policy[3] or now >= tonumber(policy[2]) + 100000 then redis.pcall('HSET', P .. 'policy', 'clock', now_text, 'layout', '1') end
return table.concat(answers, ',') .. ']'
