-- How amounts are held, or refused: bursar.law's `reserve`.

-- When time alone makes room for all that lack it, if ever; and whether the end of calls in flight may help.
local function relief(accounts, lines, short, mark)
  local retry, hopeless, some_free, all_ease = 0, false, false, true
  local function consider(a, asked, limit)
    local wait = wait_of(a, asked, limit)
    local free = a.kind ~= 'refill' and less(0, a.reserved) and not less(sub(limit, a.spent), asked)
    if wait then retry = most(retry, wait) else hopeless = true end
    some_free = some_free or free
    all_ease = all_ease and (free or wait ~= nil)
  end
  for at, a in ipairs(accounts) do
    if a.enforce and less(available(a), lines[at].amount) then consider(a, lines[at].amount, a.limit) end
  end
  if mark then consider(accounts[short], 1, marks(accounts[short])[mark][1]) end -- below it, it lets calls through again
  return hopeless and 'null' or dec(retry), some_free and all_ease
end

-- Record a refusal, at most 60 times a minute and account; what it would have made is made for the refusing budget alone.
local function record_refusal(c, accounts, lines, short, mark)
  local a = accounts[short]
  local minute, kept, budgets, made = math.floor(now / 60000000), {a}, {}, false
  opened(a)
  local recorded = a.minute == minute and a.in_minute or 0
  a.refused, a.minute, a.in_minute = a.refused + 1, minute, recorded + 1
  for at, other in ipairs(accounts) do budgets[at] = fields_of(other.rule)[9] end
  for at, other in ipairs(accounts) do made = made or other.fresh and budgets[at] == budgets[short] end
  for at, other in ipairs(accounts) do
    if made and at ~= short and budgets[at] == budgets[short] then kept[#kept + 1] = other end
  end
  for _, one in ipairs(kept) do ready(one) end
  for _, one in ipairs(kept) do put(one) end
  make(kept)
  if recorded >= 60 then return end
  local facts = {'{"account":' .. cjson.encode(a.key), '"asked":' .. dec(lines[short].amount), '"available":' .. dec(available(a))}
  if c[9] ~= '' then facts[#facts + 1] = '"behind":' .. cjson.encode(c[9]) end
  if mark then facts[#facts + 1] = '"mark":' .. cjson.encode(marks(a)[mark][2]) end
  local head = '"refusal",null,"blocked",false,' .. cjson.encode(budgets[short]) .. ',0,{}'
  record(c[2] .. '!' .. now_text .. '.' .. dec(a.refused), entry_of(head, {}, table.concat(facts, ',') .. '}'), 'held', '',
    'begun', begun_of('""', c[10]))
end

local function refuse(c, accounts, lines, short, mark)
  local texts = {}
  for at, a in ipairs(accounts) do
    texts[at] = '[0,' .. dec(a.spent) .. ',' .. dec(a.reserved) .. ',' .. rest_of(a) .. ']'
  end
  local retry, free = relief(accounts, lines, short, mark)
  if c[8] == '' then record_refusal(c, accounts, lines, short, mark) end
  return '["refused",' .. now_text .. ',' .. (short - 1) .. ',' .. retry .. ',' .. tostring(free) .. ','
    .. (mark and mark - 1 or 'null') .. ',[' .. table.concat(texts, ',') .. ']]'
end

-- What the marks in force say: the first line that one stops and that mark, the steps to take, who would have acted.
local function marked(c, accounts)
  local steps, would, complied = {}, {}, nil
  for line, a in ipairs(accounts) do
    local held = a.marked > 0 and in_force(a) or {}
    if #held > 0 and not a.enforce then
      would[#would + 1] = a.key
    elseif #held > 0 then
      for _, mark in ipairs(held) do
        local action = marks(a)[mark][2]
        if action == 'ask' or action == 'block' or action == 'kill' then return line, mark, {}, would end
      end
      complied = complied or cjson.decode(c[11])
      if held[#held] > (complied[a.key] or 0) then steps[a.key] = held[#held] end
    end
  end
  return nil, nil, steps, would
end

-- c: "reserve", id, digest, ttl_us, on_expiry, version, max_accounts, quiet, behind, draft, complied, held, rules ...
local function reserve(c)
  local id, ttl, draft = c[2], tonumber(c[4]), c[10]
  if redis.call('EXISTS', P .. 'i:' .. id) == 1 then return found(id) end
  if tonumber(c[6]) < version then return rejected('stale', dec(version)) end
  local lines, accounts, made, any_marks = lines_of(c[12]), {}, {}, false
  for at, line in ipairs(lines) do
    local a, why = standing(line.key, c[12 + at], now, made, tonumber(c[7]))
    if not a then return rejected(why, fields_of(c[12 + at])[9]) end
    age(a)
    accounts[at] = a
    any_marks = any_marks or a.marked > 0
  end
  local shadowed, short = {}, nil
  for at, a in ipairs(accounts) do
    if less(available(a), lines[at].amount) or a.key == c[9] then
      if not a.enforce then shadowed[#shadowed + 1] = a.key
      else short = short or at end
    end
  end
  if any_marks then
    local line, mark, steps, would = marked(c, accounts)
    if line then return refuse(c, accounts, lines, line, mark) end
    if next(steps) then return '["stepped",' .. cjson.encode(steps) .. ']' end
    for _, key in ipairs(would) do
      local there = false
      for _, other in ipairs(shadowed) do there = there or other == key end
      if not there then shadowed[#shadowed + 1] = key end
    end
  end
  if short then return refuse(c, accounts, lines, short) end
  if #shadowed > 0 then draft = draft:sub(1, -2) .. ',"shadowed":' .. cjson.encode(shadowed) .. '}' end
  local texts = {}
  for at, a in ipairs(accounts) do
    hold(a, lines[at].amount)
    texts[at] = ready(a, '0')
  end
  for _, a in ipairs(accounts) do put(a) end
  make(accounts)
  redis.call('HSET', P .. 'i:' .. id, 'held', c[12], 'begun', begun_of(c[3], draft), 'until', dec(now + ttl) .. ',' .. c[5])
  redis.call('ZADD', P .. 'due', now + ttl, id)
  return '["granted",' .. now_text .. ',[' .. table.concat(texts, ',') .. '],'
    .. (#shadowed > 0 and cjson.encode(shadowed) or '[]') .. ']'
end
