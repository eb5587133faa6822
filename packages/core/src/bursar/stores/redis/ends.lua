-- How reservations end: bursar.law's `settle`, `release`, `expire`, `extend`.

-- Write what a command has done: accounts, the entry, alerts. The answer tells of them.
local function ended(accounts, texts, alerts, id, entry, ...)
  for _, a in ipairs(accounts) do put(a) end
  record(id, entry, ...)
  for _, alert in ipairs(alerts) do put_out(alert) end
  return ',[' .. table.concat(texts, ',') .. '],' .. alerts_text(alerts) .. ',' .. entry
end

-- Replace an open reservation by its entry, and move every account of it. `actual_of(line)`: what is booked of a line.
local function finish(c, row, actual_of)
  local id, accounts, texts, amounts, alerts = c[2], {}, {}, {}, {}
  for at, line in ipairs(lines_of(row.held)) do
    local a = account(line.key)
    if not a then error('I2 broken: ' .. line.key .. ' is missing', 0) end
    if less(a.reserved, line.amount) then error('I2 broken: ' .. line.key .. ' holds less than its reservations', 0) end
    local actual = actual_of(line, at)
    move(a, line.amount, actual, row.begun, most(0, sub(actual, line.amount)), id, alerts)
    accounts[at], amounts[at], texts[at] = a, actual, ready(a)
  end
  local entry = entry_of(c[3], amounts, c[4])
  redis.call('ZREM', P .. 'due', id) -- first, because a server that is full still takes it, and with it what follows
  return '["ended",' .. row.begun .. ended(accounts, texts, alerts, id, entry) .. ']'
end

-- Settle or release what has expired: a further entry of the amounts that the caller has worked out from the expiry.
local function correct(c, row)
  local id, accounts, texts, amounts, alerts, booked = c[2] .. '~', {}, {}, {}, {}, cjson.decode(c[5])
  for at, line in ipairs(lines_of(row.held)) do
    local a = account(line.key)
    if not a then error('I2 broken at ' .. line.key, 0) end
    amounts[at] = num(booked[at])
    move(a, 0, amounts[at], row.begun, most(0, amounts[at]), id, alerts)
    accounts[at], texts[at] = a, ready(a)
  end
  local entry = entry_of(c[3], amounts, c[4])
  redis.call('ZREM', P .. 'due', id) -- as above
  return '["ended",' .. row.begun .. ended(accounts, texts, alerts, id, entry, 'held', row.held, 'begun', row.begun) .. ']'
end

local function row_of(id)
  local values = redis.call('HMGET', P .. 'i:' .. id, 'held', 'begun', 'until', 'entry')
  if not values[1] then return nil end
  return {held = values[1], begun = values[2], till = values[3], entry = values[4]}
end

-- Whether what has ended is an expiry that was not corrected yet.
local function expired(id, row)
  return row.entry:find('^%["expiry",') and redis.call('EXISTS', P .. 'i:' .. id .. '~') == 0
end

-- c: "settle", id, head, facts, amounts, operator, actuals (by unit), and the rules if they are known. `amounts`: of a correction,
-- else empty.
local function settle(c)
  local row = row_of(c[2])
  if not row then return rejected('unknown', c[2]) end
  if row.entry then
    return c[5] ~= '' and expired(c[2], row) and correct(c, row) or found(c[2])
  end
  local actuals = cjson.decode(c[7])
  return finish(c, row, function(line)
    if line.unit == 'slots' then return 0 end
    local actual = actuals[line.unit]
    return actual and num(actual) or line.amount
  end)
end

-- c: as of settle. `operator`: whose signature the caller has verified, for a correction.
local function release(c)
  local row = row_of(c[2])
  if not row then return rejected('unknown', c[2]) end
  if row.entry then
    local corrects = c[5] ~= '' and expired(c[2], row) and (redis.call('HGET', P .. 'policy', 'operator') or '') == c[6]
    return corrects and correct(c, row) or found(c[2])
  end
  local actuals = cjson.decode(c[7])
  return finish(c, row, function(line)
    local actual = actuals[line.unit]
    return actual and num(actual) or 0
  end)
end

-- c: "expire", id, head, facts, amounts. Without amounts the row is told, of which the caller makes them.
local function expire(c)
  local row = row_of(c[2])
  if not row then return rejected('unknown', c[2]) end
  if row.entry then return found(c[2]) end
  if now < tonumber(row.till:match('^%d+')) then return rejected('live', c[2]) end
  if c[5] == '' then return found(c[2]) end
  local booked = cjson.decode(c[5])
  return finish(c, row, function(_, at) return num(booked[at]) end)
end

-- c: "extend", id, ttl_us.
local function extend(c)
  local row = row_of(c[2])
  if not row then return rejected('unknown', c[2]) end
  if row.entry then return found(c[2]) end
  local till, on_expiry = row.till:match('^(%d+)(,.*)$')
  local expires = math.max(tonumber(till), now + tonumber(c[3]))
  redis.call('HSET', P .. 'i:' .. c[2], 'until', dec(expires) .. on_expiry)
  redis.call('ZADD', P .. 'due', expires, c[2])
  return '["extended",' .. dec(expires) .. ']'
end
