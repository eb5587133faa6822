-- Numbers: integers exact beyond what a double holds. One below 2^53 is a Lua number, any other its decimal text.

local SAFE = 9007199254740992
local LIMBS = 10000000 -- long numbers are reckoned in digits of this base, whose products a double holds

local function num(text)
  local n = tonumber(text)
  if n < SAFE and n > -SAFE then return n end
  return text
end

local function dec(n)
  if type(n) == 'number' then return string.format('%.0f', n) end
  return n
end

local function limbs(n)
  local text = dec(n)
  local negative = text:sub(1, 1) == '-'
  local found = {}
  local stop = negative and 2 or 1
  for at = #text, stop, -7 do found[#found + 1] = tonumber(text:sub(math.max(at - 6, stop), at)) end
  return negative, found
end

local function whole(negative, found)
  local top = #found
  while top > 1 and found[top] == 0 do top = top - 1 end
  local parts = {string.format('%d', found[top])}
  for at = top - 1, 1, -1 do parts[#parts + 1] = string.format('%07d', found[at]) end
  local text = table.concat(parts)
  return num(negative and text ~= '0' and '-' .. text or text)
end

-- -1, 0 or 1, of two magnitudes.
local function compared(a, b)
  for at = math.max(#a, #b), 1, -1 do
    local x, y = a[at] or 0, b[at] or 0
    if x ~= y then return x < y and -1 or 1 end
  end
  return 0
end

local function long_add(a, b)
  local minus_a, x = limbs(a)
  local minus_b, y = limbs(b)
  local sign = 1
  if minus_a ~= minus_b then
    sign = -1
    if compared(x, y) < 0 then x, y, minus_a = y, x, minus_b end
  end
  local found, carry = {}, 0
  for at = 1, math.max(#x, #y) do
    local sum = (x[at] or 0) + sign * (y[at] or 0) + carry
    carry = math.floor(sum / LIMBS)
    found[at] = sum - carry * LIMBS
  end
  if carry > 0 then found[#found + 1] = carry end
  return whole(minus_a, found)
end

local function add(a, b)
  if type(a) == 'number' and type(b) == 'number' then
    local sum = a + b
    if sum < SAFE and sum > -SAFE then return sum end
  end
  return long_add(a, b)
end

local function minus(a)
  if type(a) == 'number' then return 0 - a end
  return a:sub(1, 1) == '-' and a:sub(2) or '-' .. a
end

local function sub(a, b)
  if type(a) == 'number' and type(b) == 'number' then
    local rest = a - b
    if rest < SAFE and rest > -SAFE then return rest end
  end
  return long_add(a, minus(b))
end

local function less(a, b)
  if type(a) == 'number' and type(b) == 'number' then return a < b end
  local rest = long_add(a, minus(b))
  if type(rest) == 'number' then return rest < 0 end
  return rest:sub(1, 1) == '-'
end

local function most(a, b)
  return less(a, b) and b or a
end

local function mul(a, b)
  if type(a) == 'number' and type(b) == 'number' then
    local product = a * b
    if product < SAFE and product > -SAFE then return product + 0 end
  end
  local minus_a, x = limbs(a)
  local minus_b, y = limbs(b)
  local found = {}
  for at = 1, #x + #y do found[at] = 0 end
  for i = 1, #x do
    local carry = 0
    for j = 1, #y do
      local sum = found[i + j - 1] + x[i] * y[j] + carry
      carry = math.floor(sum / LIMBS)
      found[i + j - 1] = sum - carry * LIMBS
    end
    found[i + #y] = found[i + #y] + carry
  end
  return whole(minus_a ~= minus_b, found)
end

-- Quotient and rest of what is not negative by what is above 0.
local function divide(a, b)
  if type(a) == 'number' and type(b) == 'number' then
    local rest = math.fmod(a, b)
    return (a - rest) / b, rest
  end
  local digits, rest = {}, 0
  for digit in dec(a):gmatch('%d') do
    rest = add(mul(rest, 10), tonumber(digit))
    local times = 0
    while not less(rest, b) do
      rest = sub(rest, b)
      times = times + 1
    end
    digits[#digits + 1] = times
  end
  return num((table.concat(digits):gsub('^0+(%d)', '%1'))), rest
end

-- The decimal text of what is to be stored: as in every store, it has to fit 64 bits.
local function stored(n)
  if type(n) == 'number' then return string.format('%.0f', n) end
  if less('9223372036854775807', n) or less(n, '-9223372036854775808') then error('OVERFLOW', 0) end
  return n
end
