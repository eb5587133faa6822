-- Rows: reservations and the entries that end them, alerts, and what the answers tell of them.
--
-- The hash `i:ID` is the row under an id: `held`, lines of key, unit and amount; `begun`, the time of the reserve, the digest and
-- the draft, as the elements of a JSON array; `until`, when it expires and what then; once it has ended `entry`, a JSON array whose
-- first element is its kind. `due` orders the open ones by expiry, the stream `records` the ended ones by their end. JSON in a
-- command is written down as it came, digests too.

local function rejected(why, detail)
  return cjson.encode({'rejected', why, detail})
end

-- Lines of a key, a unit and an amount: JSON text and words, in which no line ends.
local function lines_of(held)
  local found = {}
  for key, unit, amount in held:gmatch('([^\n]*)\n([^\n]*)\n([^\n]*)\n') do
    found[#found + 1] = {key = key, unit = unit, amount = num(amount)}
  end
  return found
end

-- A row that is there, with all that is needed to say what a command means to it: the caller runs the law on what has ended.
local function found(id)
  local row = redis.call('HGETALL', P .. 'i:' .. id)
  local correction = redis.call('HGETALL', P .. 'i:' .. id .. '~')
  local held, accounts = redis.call('HGET', P .. 'i:' .. id, 'held'), {}
  for _, line in ipairs(lines_of(held)) do
    local a = account(line.key)
    if a then accounts[#accounts + 1] = ready(a) end
  end
  local operator = redis.call('HGET', P .. 'policy', 'operator') or cjson.null
  return '["found",' .. now_text .. ',' .. cjson.encode({row, #correction > 0 and correction or cjson.null, operator})
    .. ',[' .. table.concat(accounts, ',') .. ']]'
end

local function begun_of(digest, draft)
  return now_text .. ',' .. digest .. ',' .. draft
end

-- Write an entry under its id, with what belongs to it beside its text.
local function record(id, entry, ...)
  redis.call('HSET', P .. 'i:' .. id, 'entry', entry, ...)
  redis.call('XADD', P .. 'records', '*', 'id', id)
end

-- An entry's text: what the caller says of it, its amounts in the order of `held`, its time.
local function entry_of(head, amounts, facts)
  local texts = {}
  for at, amount in ipairs(amounts) do texts[at] = stored(amount) end
  return '[' .. head .. ',[' .. table.concat(texts, ',') .. '],' .. now_text .. ',' .. facts .. ']'
end

local function put_out(alert)
  local key = P .. 't:' .. alert.id
  if redis.call('EXISTS', key) == 1 then return false end
  redis.call('HSET', key, 'kind', alert.kind, 'at_us', now_text, 'facts', alert.facts, 'claims', '0')
  redis.call('ZADD', P .. 'outbox', 0, alert.id)
  redis.call('ZADD', P .. 'alerts', now, alert.id)
  return true
end

-- List those of the accounts that are new, and count them against their budgets.
local function make(accounts)
  for _, a in ipairs(accounts) do
    if a.fresh then
      redis.call('SADD', P .. 'accounts', a.key)
      redis.call('HINCRBY', P .. 'counts', a.budget, 1)
    end
  end
end

-- A rule's account as it was left, new where there is none, or why there cannot be one. `made`: how many, by budget.
local function standing(key, rule, at_us, made, max)
  local a = account(key)
  if a then
    if a.rule ~= rule then under(a, rule) end
  else
    a = {key = key, spent = 0, reserved = 0, overrun = 0, refused = 0, minute = 0, in_minute = 0, level = 0, remainder = 0,
      at = at_us, crossed = 0, buckets = {}, changed = true, fresh = true}
    ruled(a, rule)
    if a.kind == 'refill' then a.level = a.limit end
  end
  if a.till and (at_us < a.from or at_us >= a.till) then return nil, 'moved' end
  if a.fresh then
    local budget = fields_of(rule)[9]
    if not made[budget] then made[budget] = tonumber(redis.call('HGET', P .. 'counts', budget) or 0) end
    if made[budget] >= max then return nil, 'accounts' end
    made[budget] = made[budget] + 1
    a.budget = budget
  end
  return a
end

-- Book on an account; the alerts of the marks that this reaches are added to `alerts`.
local function move(a, held, actual, begun, overrun, id, alerts)
  local told = 0
  if a.marked > 0 then
    opened(a)
    age(a)
    told = still_crossed(a)
  end
  book(a, held, actual, tonumber(begun:match('^%d+')), overrun)
  if a.marked == 0 then return end
  local now_reached = reached(a)
  for index = told, now_reached - 1 do
    local rule, mark = fields_of(a.rule), marks(a)[index + 1]
    local text = cjson.encode
    alerts[#alerts + 1] = {id = id .. '^' .. a.key .. '^' .. index, kind = 'threshold', facts = table.concat({
      '{"account":', text(a.key), ',"budget":', text(rule[9]), ',"scope":', text(rule[10]), ',"unit":', text(rule[11]),
      ',"limit":', dec(a.limit), ',"spent":', dec(a.spent), ',"mark":', index, ',"at":', dec(mark[1]),
      ',"action":', text(mark[2]), ',"enforce":', tostring(a.enforce), ',"until_us":', a.till and dec(a.till) or 'null',
      ',"call":', text(id), ',"tags":', text(cjson.decode('[' .. begun .. ']')[3].tags), '}',
    })}
  end
  if now_reached > told then a.crossed = now_reached end
end

local function alerts_text(alerts)
  local texts = {}
  for at, alert in ipairs(alerts) do
    texts[at] = '[' .. cjson.encode(alert.id) .. ',"' .. alert.kind .. '",' .. now_text .. ',' .. alert.facts .. ']'
  end
  return '[' .. table.concat(texts, ',') .. ']'
end
