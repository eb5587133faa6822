-- Accounts: the arithmetic of bursar.accounts, on texts. Each function is named as it is there.
--
-- `r:KEY` is the text of its rule: a number of 18 digits that tells it from others, and a JSON array of its fields, figures first.
-- `a:KEY` is that number, spent, reserved, and `rest`, which is opened when needed: level, remainder, at_us, crossed, overrun,
-- refused, refused_minute, refused_in_minute, buckets. All that changes is thus written by one MSET, and is told as it stands.

local FIGURES = '^%d+%["(%a+)",([-%d]+),(%d+),(%d+),(%d),([-%d]+),([-%w]+),' -- of the text of a rule
local REST = '^([-%d]+),([-%d]+),([-%d]+),([-%d]+),([-%d]+),([-%d]+),([-%d]+),([-%d]+),(.*)$'

-- Take the figures of a rule's text. `marked`: how many marks it has.
local function ruled(a, rule)
  local kind, limit, period, marked, enforce, from, till = rule:match(FIGURES)
  a.rule, a.kind, a.limit, a.period, a.marked = rule, kind, num(limit), tonumber(period), tonumber(marked)
  a.enforce, a.from, a.till = enforce == '1', tonumber(from), tonumber(till)
end

local function account(key)
  local found = redis.call('MGET', P .. 'r:' .. key, P .. 'a:' .. key)
  if not found[1] and not found[2] then return nil end
  if not found[1] or not found[2] then error('I2 broken: part of ' .. key .. ' is missing', 0) end
  local spent, reserved, rest = found[2]:match(STANDS, NUMBER + 2)
  if not spent then error('I2 broken: ' .. key .. ' was written by something else', 0) end
  local a = {key = key, spent = num(spent), reserved = num(reserved), rest = found[2]:sub(rest)}
  ruled(a, found[1])
  return a
end

local function opened(a)
  if a.overrun then return end
  local level, remainder, at, crossed, overrun, refused, minute, in_minute, buckets = a.rest:match(REST)
  a.overrun, a.refused, a.minute, a.in_minute = num(overrun), tonumber(refused), tonumber(minute), tonumber(in_minute)
  a.level, a.remainder, a.at, a.crossed = num(level), num(remainder), tonumber(at), tonumber(crossed)
  a.buckets = {}
  for index, amount in buckets:gmatch('%[([-%d]+),([-%d]+)%]') do
    a.buckets[#a.buckets + 1] = {tonumber(index), num(amount)}
  end
end

local function rest_of(a)
  if not a.overrun then return a.rest end
  local buckets = {}
  for at, bucket in ipairs(a.buckets) do buckets[at] = '[' .. dec(bucket[1]) .. ',' .. stored(bucket[2]) .. ']' end
  return table.concat({
    stored(a.level), stored(a.remainder), dec(a.at), dec(a.crossed), stored(a.overrun), dec(a.refused), dec(a.minute),
    dec(a.in_minute), '[' .. table.concat(buckets, ',') .. ']',
  }, ',')
end

-- The fields of a rule, of which a budget's name is the 9th.
local function fields_of(rule)
  return cjson.decode(rule:sub(NUMBER + 1))
end

-- Make the text that is to be stored, while everything may still fail; and the account as an answer tells it.
local function ready(a, rule)
  local figures = table.concat({stored(a.spent), stored(a.reserved), rest_of(a)}, ',')
  a.text = a.rule:sub(1, NUMBER) .. ',' .. figures
  return '[' .. (rule or a.rule:sub(NUMBER + 1)) .. ',' .. figures .. ']'
end

local function put(a)
  redis.call('SET', P .. 'a:' .. a.key, a.text)
  if a.changed then redis.call('SET', P .. 'r:' .. a.key, a.rule) end
end

-- Each {at, action} of an account that has some; at as a number of ours.
local function marks(a)
  if not a.marks then
    a.marks = fields_of(a.rule)[12]
    for _, mark in ipairs(a.marks) do mark[1] = num(mark[1]) end
  end
  return a.marks
end

local function reached(a)
  local found = 0
  if a.marked == 0 then return 0 end
  for _, mark in ipairs(marks(a)) do
    if not less(a.spent, mark[1]) then found = found + 1 end
  end
  return found
end

local function under(a, rule)
  opened(a)
  ruled(a, rule)
  a.changed, a.marks = true, nil
  a.crossed = math.min(a.crossed, reached(a))
end

local function still_crossed(a)
  if a.kind == 'rolling' then return math.min(a.crossed, reached(a)) end
  return a.crossed
end

local BY_BALANCE = {downgrade = true, clamp = true, throttle = true, block = true}
local BY_CROSSING = {ask = true, kill = true}

local function in_force(a)
  opened(a)
  local balance, crossed, found = add(a.spent, a.reserved), still_crossed(a), {}
  for at, mark in ipairs(marks(a)) do
    if BY_BALANCE[mark[2]] and not less(balance, mark[1]) or BY_CROSSING[mark[2]] and at <= crossed then
      found[#found + 1] = at
    end
  end
  return found
end

local function age(a)
  if a.kind == 'rolling' then
    opened(a)
    local oldest = math.floor((now - a.period) / math.floor(a.period / 60))
    if a.buckets[1] and a.buckets[1][1] < oldest then
      local kept, spent = {}, 0
      for _, bucket in ipairs(a.buckets) do
        if bucket[1] >= oldest then
          kept[#kept + 1] = bucket
          spent = add(spent, bucket[2])
        end
      end
      a.buckets, a.spent = kept, spent
    end
  elseif a.kind == 'refill' then
    opened(a)
    if now <= a.at then return end
    local elapsed = now - a.at
    a.at = now
    local full = elapsed >= a.period and not less(a.level, 0) -- it need not be reckoned how much more than full
    if not full then
      local gained, remainder = divide(add(mul(elapsed, a.limit), a.remainder), a.period)
      a.level, a.remainder = add(a.level, gained), remainder
      full = not less(a.level, a.limit)
    end
    if full then a.level, a.remainder = a.limit, 0 end
  end
end

local function available(a)
  if a.kind == 'refill' then
    opened(a)
    return a.level
  end
  return sub(sub(a.limit, a.spent), a.reserved)
end

-- Hold an amount on an account that is as old as it is now.
local function hold(a, amount)
  a.reserved = add(a.reserved, amount)
  if a.kind == 'refill' then a.level = sub(a.level, amount) end
end

local function book(a, held, actual, reserved_us, overrun)
  a.reserved = sub(a.reserved, held)
  if a.kind == 'slots' then return end
  age(a)
  if overrun ~= 0 then
    opened(a)
    a.overrun = add(a.overrun, overrun)
  end
  if a.kind == 'rolling' then
    local width = math.floor(a.period / 60)
    local index, spent = math.floor(reserved_us / width), 0
    if index >= math.floor((now - a.period) / width) then -- else its bucket has left the window already
      local at = 1
      while a.buckets[at] and a.buckets[at][1] < index do at = at + 1 end
      if a.buckets[at] and a.buckets[at][1] == index then
        a.buckets[at][2] = add(a.buckets[at][2], actual)
      else
        table.insert(a.buckets, at, {index, actual})
      end
    end
    for _, bucket in ipairs(a.buckets) do spent = add(spent, bucket[2]) end
    a.spent = spent
    return
  end
  a.spent = add(a.spent, actual)
  if a.kind == 'refill' then
    a.level = sub(add(a.level, held), actual)
    if not less(a.level, a.limit) then a.level, a.remainder = a.limit, 0 end
  end
end

-- Microseconds until time alone makes room under that limit, or nil.
local function wait_of(a, asked, limit)
  if less(limit, asked) then return nil end
  if a.kind == 'refill' then
    local need = sub(mul(sub(asked, a.level), a.period), a.remainder)
    if less(need, 0) then return minus((divide(minus(need), limit))) end
    return (divide(add(need, sub(limit, 1)), limit))
  elseif a.kind == 'rolling' then
    local room = sub(sub(limit, a.spent), a.reserved)
    for _, bucket in ipairs(a.buckets) do
      room = add(room, bucket[2])
      if not less(room, asked) then return (bucket[1] + 1) * math.floor(a.period / 60) + a.period - now end
    end
    return nil
  end
  return a.till and a.till - now
end
