-- Costs that have been incurred, and are booked whatever the limits say: bursar.law's `charge` and `draw`.

-- As `standing`, of an account on which a cost has been incurred already.
local function incurring(line, rule, command_version, made, max)
  if command_version < version then -- a cost is booked by whatever policy, but an older one changes no limit
    rule = redis.call('GET', P .. 'r:' .. line.key) or rule
  end
  -- what was incurred in a window belongs to it, however late it is told, or however far this clock is behind
  local from, till = select(6, rule:match(FIGURES))
  from, till = tonumber(from), tonumber(till)
  local a, why = standing(line.key, rule, till and math.max(from, math.min(now, till - 1)) or now, made, max)
  if not a then return nil, rejected(why, fields_of(rule)[9]) end
  return a
end

-- c: "charge", id, digest, head, facts, version, max_accounts, draft, held, rules ...
local function charge(c)
  local id, begun = c[2], begun_of(c[3], c[8])
  if redis.call('EXISTS', P .. 'i:' .. id) == 1 then return found(id) end
  local accounts, texts, amounts, alerts, made = {}, {}, {}, {}, {}
  for at, line in ipairs(lines_of(c[9])) do
    local a, refusal = incurring(line, c[9 + at], tonumber(c[6]), made, tonumber(c[7]))
    if not a then return refusal end
    age(a)
    local uncovered = most(0, sub(line.amount, most(0, available(a))))
    move(a, 0, line.amount, begun, uncovered, id, alerts)
    accounts[at], amounts[at], texts[at] = a, line.amount, ready(a)
  end
  local entry = entry_of(c[4], amounts, c[5])
  redis.call('ZREM', P .. 'due', id) -- first, because a server that is full still takes it, and with it what follows
  make(accounts)
  return '["ended",' .. begun .. ended(accounts, texts, alerts, id, entry, 'held', c[9], 'begun', begun) .. ']'
end

-- What is still held after a draw, in the row of the lease; and its draft, which tells what an expiry would cost.
local function keep_lease(id, row, lines, left)
  local held, cost = {}, 0
  for at, line in ipairs(lines) do
    held[at] = line.key .. '\n' .. line.unit .. '\n' .. stored(left[line.key]) .. '\n'
    if line.unit == 'USD' then cost = most(cost, left[line.key]) end
  end
  local begun = row.begun:gsub(',"cost_nanos":%d+}$', '}'):sub(1, -2) .. ',"cost_nanos":' .. dec(cost) .. '}'
  redis.call('HSET', P .. 'i:' .. id, 'held', table.concat(held), 'begun', begun)
end

-- c: "draw", id, version, max_accounts, overruns, entries, held, rules ... Each entry: id, its JSON, reserved_us, digest, draft,
-- held. The amounts of `held` are the sums of the entries; where some are on the books already, the answer tells which.
local function draw(c)
  local known, left, row, lines = {}, nil, row_of(c[2]), {}
  local overruns, entries = cjson.decode(c[5]), cjson.decode(c[6])
  for _, entry in ipairs(entries) do
    local there = redis.call('HGETALL', P .. 'i:' .. entry[1])
    if #there > 0 then known[#known + 1] = {entry[1], there} end
  end
  if #known > 0 then return '["known",' .. cjson.encode(known) .. ']' end
  if row and not row.entry then
    left, lines = {}, lines_of(row.held)
    for _, line in ipairs(lines) do left[line.key] = line.amount end
  end
  local accounts, texts, alerts, made = {}, {}, {}, {}
  for at, line in ipairs(lines_of(c[7])) do
    if #entries == 0 then
      local a = account(line.key)
      if a then texts[#texts + 1] = ready(a) end
    else
      local a, refusal = incurring(line, c[7 + at], tonumber(c[3]), made, tonumber(c[4]))
      if not a then return refusal end
      local held = left and left[line.key]
      local paid = held and (less(held, line.amount) and held or line.amount) or 0
      local over = most(0, sub(sub(line.amount, paid), most(0, available(a))))
      if overruns[line.key] then over = most(over, num(overruns[line.key])) end
      local last = entries[#entries]
      move(a, paid, line.amount, begun_of(last[4], last[5]), over, last[1], alerts)
      if held then left[line.key] = sub(held, paid) end
      accounts[at], texts[at] = a, ready(a)
    end
  end
  if #entries > 0 then
    redis.call('ZREM', P .. 'due', '') -- as in charge
    for _, a in ipairs(accounts) do put(a) end
    make(accounts)
    for _, entry in ipairs(entries) do
      record(entry[1], entry[2], 'held', entry[6], 'begun', table.concat(entry, ',', 3, 5))
    end
    for _, alert in ipairs(alerts) do put_out(alert) end
    if left then keep_lease(c[2], row, lines, left) end
  end
  local still = {}
  for key, amount in pairs(left or {}) do still[#still + 1] = cjson.encode(key) .. ':' .. dec(amount) end
  return '["drawn",' .. (left and '{' .. table.concat(still, ',') .. '}' or 'null') .. ',[' .. table.concat(texts, ',') .. '],'
    .. alerts_text(alerts) .. ']'
end
