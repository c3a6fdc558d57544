-- The newest connections: how many there are, then the details of some.
-- KEYS: all, or those of a name; details
-- ARGV: how many to pass over, and how many to show, at least one
local page = { tostring(redis.call('ZCARD', KEYS[1])) }
local ids = redis.call('ZREVRANGE', KEYS[1], ARGV[1], ARGV[1] + ARGV[2] - 1)
for _, id in ipairs(ids) do
  local details = redis.call('HGET', KEYS[2], id)
  if details then
    table.insert(page, details)
  end
end
return page
