-- Take entries that have been drained off the stream, and let their rows go: what has expired may be corrected for longer.
-- KEYS: what names of keys begin with. ARGV: seconds that a row stays, and that an expiry stays; ids in the stream, and of rows.

for at = 3, #ARGV, 2 do
  local row = KEYS[1] .. 'i:' .. ARGV[at + 1]
  redis.call('XACK', KEYS[1] .. 'records', 'drain', ARGV[at])
  redis.call('XDEL', KEYS[1] .. 'records', ARGV[at])
  redis.call('EXPIRE', row, (redis.call('HGET', row, 'entry') or ''):find('^%["expiry",') and ARGV[2] or ARGV[1])
end
return #ARGV
