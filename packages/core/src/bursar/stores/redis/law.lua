-- The law: what every command does to the rows, as bursar.law.decide has it.

return function(c)
  local name = c[1]
  if name == 'reserve' then return reserve(c) end
  if name == 'settle' then return settle(c) end
  if name == 'release' then return release(c) end
  if name == 'extend' then return extend(c) end
  if name == 'expire' then return expire(c) end
  if name == 'charge' then return charge(c) end
  if name == 'draw' then return draw(c) end
  return put_out({id = c[2], kind = c[3], facts = c[4]}) and '["told",false]' or '["told",true]'
end
