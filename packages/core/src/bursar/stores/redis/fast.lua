-- The short way of most calls: accounts that are there, under the rules that they have, with room, no marks and no rolling
-- windows, in figures that a double holds. Whatever else there is, these say nil before anything is written, and the law decides.

local FIGURES = '^%["(%a+)",([-%d]+),(%d+),(%d+),(%d),([-%d]+),([-%w]+),' -- of the text of a rule
local PLAIN = '^%["(%a+)",(%d+),(%d+),0,%d,([-%d]+),([-%w]+),' -- the same, of one that has no marks
local WINDOW = '^%["window",(%d+),%d+,0,%d,([-%d]+),([-%w]+),' -- the same, of a window, which most accounts are
local HALF = 2251799813685248 -- 2^51: sums of four such figures are exact

local call, format = redis.call, string.format
-- Whole numbers, told without floating point where that tells all that a double holds: on servers of 64 bits.
local D = format('%d', 2 ^ 53 - 1) == '9007199254740991' and '%d' or '%.0f'
local REST_OF = D .. ',' .. D .. ',' .. D .. ',%s'

-- Level, remainder of a rate as they are now, and the rest of its fields.
local function refilled(rest, limit, period)
  local level, remainder, at, others = rest:match('^([-%d]+),(%d+),(%d+),(.*)$')
  level, remainder, at = tonumber(level), tonumber(remainder), tonumber(at)
  local elapsed = now - at
  if level < 0 or level >= HALF then return nil end
  if elapsed <= 0 then return level, remainder, others, at end
  if elapsed >= period then return limit, 0, others, now end
  local gained = elapsed * limit + remainder
  if gained >= HALF then return nil end
  remainder = math.fmod(gained, period)
  level = level + (gained - remainder) / period
  if level >= limit then return limit, 0, others, now end
  return level, remainder, others, now
end

local function short_reserve(c)
  local id, held, expires = c[2], c[12], now + c[4]
  if c[9] ~= '' or tonumber(c[6]) < version or call('EXISTS', P .. 'i:' .. id) == 1 then return nil end
  local keys, reserveds, rests, told, count = {}, {}, {}, {}, 0
  for key, amount in held:gmatch('([^\n]*)\n[^\n]*\n([^\n]*)\n') do
    count = count + 1
    key = P .. 'a:' .. key
    local rule, stored = c[12 + count], call('HMGET', key, 'rule', 'spent', 'reserved', 'rest')
    if stored[1] ~= rule then return nil end
    local kind, period
    local limit, from, till = rule:match(WINDOW)
    if not limit then kind, limit, period, from, till = rule:match(PLAIN) end
    if not limit or kind == 'rolling' or till ~= 'null' and (now < tonumber(from) or now >= tonumber(till)) then return nil end
    local spent, reserved, rest = tonumber(stored[2]), tonumber(stored[3]), stored[4]
    limit, amount = tonumber(limit), tonumber(amount)
    if limit >= HALF or amount >= HALF or spent >= HALF or spent <= -HALF or reserved >= HALF then return nil end
    reserved = reserved + amount
    if kind == 'refill' then
      local level, remainder, others, at = refilled(rest, limit, tonumber(period))
      if not level or level < amount then return nil end
      rest = format(REST_OF, level - amount, remainder, at, others)
    elseif spent + reserved > limit then
      return nil
    end
    reserved = format(D, reserved)
    keys[count], reserveds[count], rests[count] = key, reserved, rest
    told[count] = '[0,' .. stored[2] .. ',' .. reserved .. ',' .. rest .. ']'
    if rest == stored[4] then rests[count] = nil end
  end
  for at = 1, count do
    if rests[at] then call('HSET', keys[at], 'reserved', reserveds[at], 'rest', rests[at])
    else call('HSET', keys[at], 'reserved', reserveds[at]) end
  end
  local until_text = format(D, expires)
  call('HSET', P .. 'i:' .. id, 'held', held, 'reserved_us', now_text, 'expires_us', until_text, 'on_expiry', c[5],
    'digest', c[3], 'draft', c[10])
  call('ZADD', P .. 'due', until_text, id)
  return '["granted",' .. now_text .. ',[' .. table.concat(told, ',') .. '],[]]'
end

local function short_settle(c)
  local id = c[2]
  local row = call('HMGET', P .. 'i:' .. id, 'held', 'reserved_us', 'digest', 'draft', 'kind')
  if not row[1] or row[5] then return nil end
  local keys, spents, reserveds, rests, told, amounts, count = {}, {}, {}, {}, {}, {}, 0
  local actuals = cjson.decode(c[7])
  for key, unit, amount in row[1]:gmatch('([^\n]*)\n([^\n]*)\n([^\n]*)\n') do
    count = count + 1
    key = P .. 'a:' .. key
    local stored = call('HMGET', key, 'rule', 'spent', 'reserved', 'rest')
    if not stored[1] then return nil end
    local kind, limit, period = 'window', 0, nil -- whose limit does not matter here
    if not stored[1]:find('^%["window",%d+,%d+,0,') then kind, limit, period = stored[1]:match(PLAIN) end
    if not kind or kind == 'rolling' then return nil end
    local spent, reserved, rest = tonumber(stored[2]), tonumber(stored[3]), stored[4]
    local booked = unit == 'slots' and '0' or actuals[unit] or amount
    local actual = tonumber(booked)
    limit, amount = tonumber(limit), tonumber(amount)
    if limit >= HALF or amount >= HALF or actual > amount or actual < 0 or reserved < amount or reserved >= HALF
      or spent >= HALF or spent <= -HALF then return nil end
    if kind == 'refill' then
      local level, remainder, others, at = refilled(rest, limit, tonumber(period))
      if not level then return nil end
      level = level + amount - actual
      if level >= limit then level, remainder = limit, 0 end
      rest = format(REST_OF, level, remainder, at, others)
    end
    if kind ~= 'slots' then spent = spent + actual end
    spents[count], reserveds[count] = format(D, spent), format(D, reserved - amount)
    keys[count], rests[count], amounts[count] = key, rest, booked
    told[count] = '[' .. stored[1] .. ',' .. spents[count] .. ',' .. reserveds[count] .. ',' .. rest .. ']'
    if rest == stored[4] then rests[count] = nil end
  end
  local entry = '[' .. c[3] .. ',[' .. table.concat(amounts, ',') .. '],' .. now_text .. ',' .. c[4] .. ']'
  call('ZREM', P .. 'due', id) -- first, because a server that is full still takes it, and with it what follows
  for at = 1, count do
    if rests[at] then call('HSET', keys[at], 'spent', spents[at], 'reserved', reserveds[at], 'rest', rests[at])
    else call('HSET', keys[at], 'spent', spents[at], 'reserved', reserveds[at]) end
  end
  call('HSET', P .. 'i:' .. id, 'kind', 'settlement', 'entry', entry)
  call('XADD', P .. 'records', '*', 'id', id)
  return '["ended",' .. row[2] .. ',' .. cjson.encode(row[3]) .. ',' .. row[4] .. ',[' .. table.concat(told, ',') .. '],[],' .. entry
    .. ']'
end
