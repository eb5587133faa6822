-- The short way of most calls: accounts that are there, under the rules that they have, with room, no marks and no rolling
-- windows, in figures that a double holds. Whatever else there is, these say nil before anything is written, and the law decides.
--
-- What counts is how much is made anew with each call, functions and what they see of each other too: so these see little, and
-- name what they use themselves. `+ 0` makes a number of a text, which tonumber reads twice. Tables have room for four lines.

local NUMBER = 18 -- digits of a rule's number
local STANDS = '^(%-?%d+),(%-?%d+),()' -- spent and reserved of an account, after the number of its rule; where the rest begins
-- Whole numbers, told without floating point where that tells all that a double holds: on servers of 64 bits.
local D = string.format('%d', 2 ^ 53 - 1) == '9007199254740991' and '%d' or '%.0f'

-- The keys of the accounts of those lines, the texts that stand there, units and amounts.
local function read(held)
  local find, sub = string.find, string.sub
  local keys, units, amounts, count, from = {nil, nil, nil, nil}, {nil, nil, nil, nil}, {nil, nil, nil, nil}, 0, 1
  local till = find(held, '\n', 1, true)
  while till do
    local middle = find(held, '\n', till + 1, true)
    local last = find(held, '\n', middle + 1, true)
    count = count + 1
    keys[count], units[count] = P .. 'a:' .. sub(held, from, till - 1), sub(held, till + 1, middle - 1)
    amounts[count] = sub(held, middle + 1, last - 1)
    from = last + 1
    till = find(held, '\n', from, true)
  end
  return keys, count > 0 and redis.call('MGET', unpack(keys)), units, amounts
end

-- The rest of a rate as it is now, its level moved by that; nil where it would be below 0.
local function refilled(rest, limit, period, change)
  local level, remainder, at, others = rest:match('^(%-?%d+),(%d+),(%d+)()')
  level, remainder, at, others = level + 0, remainder + 0, at + 0, rest:sub(others)
  local elapsed, half = now - at, 2251799813685248
  if level < 0 or level >= half or limit >= half then return nil end
  if elapsed >= period then
    level, remainder, at = limit, 0, now
  elseif elapsed > 0 then
    local gained = elapsed * limit + remainder
    if gained >= half then return nil end
    remainder = math.fmod(gained, period)
    level, at = level + (gained - remainder) / period, now
    if level >= limit then level, remainder = limit, 0 end
  end
  level = level + change
  if level < 0 then return nil end
  if level >= limit then level, remainder = limit, 0 end
  return string.format(D .. ',' .. D .. ',' .. D, level, remainder, at) .. others
end

local function short_reserve(c)
  local id, held, half = c[2], c[12], 2251799813685248 -- 2^51: sums of four figures below it are exact
  local call, format, match, sub = redis.call, string.format, string.match, string.sub
  if c[9] ~= '' or c[6] + 0 < version or call('EXISTS', P .. 'i:' .. id) == 1 then return nil end
  local puts, told = {nil, nil, nil, nil, nil, nil, nil, nil}, {nil, nil, nil, nil}
  local keys, stands, _, amounts = read(held)
  if not stands then return nil end
  for at = 1, #keys do
    local text, rule = stands[at], c[12 + at]
    local number = sub(rule, 1, NUMBER)
    if not text or sub(text, 1, NUMBER) ~= number then return nil end
    local spent, reserved, rest = match(text, STANDS, NUMBER + 2)
    local kind, period
    local limit, from, till = match(rule, '^%["window",(%d+),%d+,0,%d,(%-?%d+),(%w+),', NUMBER + 1) -- most have no marks
    if not limit then
      kind, limit, period, from, till = match(rule, '^%["(%a+)",(%d+),(%d+),0,%d,(%-?%d+),(%w+),', NUMBER + 1)
    end
    if not limit or kind == 'rolling' or till ~= 'null' and (now < from + 0 or now >= till + 0) then return nil end
    local paid, amount = spent + 0, amounts[at] + 0
    limit, reserved, rest = limit + 0, reserved + 0, sub(text, rest)
    if limit >= half or amount >= half or paid >= half or paid <= -half or reserved >= half then return nil end
    reserved = reserved + amount
    if kind == 'refill' then
      rest = refilled(rest, limit, period + 0, -amount)
      if not rest then return nil end
    elseif paid + reserved > limit then
      return nil
    end
    text = number .. ',' .. spent .. ',' .. format(D, reserved) .. ',' .. rest
    told[at], puts[2 * at - 1], puts[2 * at] = text, keys[at], text
  end
  call('MSET', unpack(puts))
  local till = format(D, now + c[4])
  call('HSET', P .. 'i:' .. id, 'held', held, 'begun', now_text .. ',' .. c[3] .. ',' .. c[10], 'until', till .. ',' .. c[5])
  call('ZADD', P .. 'due', till, id)
  return '["granted",' .. now_text .. ',[[' .. table.concat(told, '],[') .. ']],[]]'
end

local function short_settle(c)
  if not c[8] then return nil end
  local id, half = c[2], 2251799813685248
  local call, format, match, sub = redis.call, string.format, string.match, string.sub
  local row = call('HMGET', P .. 'i:' .. id, 'held', 'entry')
  if not row[1] or row[2] then return nil end
  local puts, told, booked = {nil, nil, nil, nil, nil, nil, nil, nil}, {nil, nil, nil, nil}, {nil, nil, nil, nil}
  local actuals, keys, stands, units, amounts = cjson.decode(c[7]), read(row[1])
  if not stands then return nil end
  for at = 1, #keys do
    local text, rule = stands[at], c[7 + at]
    local number = rule and sub(rule, 1, NUMBER)
    if not text or sub(text, 1, NUMBER) ~= number then return nil end
    local kind, limit, period
    if #rule > NUMBER then kind, limit, period = match(rule, '^(%a+),(%d+),(%d+)', NUMBER + 1) end
    local spent, reserved, rest = match(text, STANDS, NUMBER + 2)
    booked[at] = units[at] == 'slots' and '0' or actuals[units[at]] or amounts[at]
    local actual, amount = booked[at] + 0, amounts[at] + 0
    spent, reserved, rest = spent + 0, reserved + 0, sub(text, rest)
    if amount >= half or actual > amount or actual < 0 or reserved < amount or reserved >= half or spent >= half
      or spent <= -half then return nil end
    if kind == 'refill' then
      rest = refilled(rest, limit + 0, period + 0, amount - actual)
      if not rest then return nil end
    end
    if kind ~= 'slots' then spent = spent + actual end
    text = number .. ',' .. format(D, spent) .. ',' .. format(D, reserved - amount) .. ',' .. rest
    told[at], puts[2 * at - 1], puts[2 * at] = text, keys[at], text
  end
  local texts = '[' .. table.concat(booked, ',') .. '],' .. now_text
  call('ZREM', P .. 'due', id) -- first, because a server that is full still takes it, and with it what follows
  call('MSET', unpack(puts))
  call('HSET', P .. 'i:' .. id, 'entry', '[' .. c[3] .. ',' .. texts .. ',' .. c[4] .. ']')
  call('XADD', P .. 'records', '*', 'id', id)
  return '["booked",' .. texts .. ',[[' .. table.concat(told, '],[') .. ']]]'
end
