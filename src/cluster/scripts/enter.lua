-- Enters connections of a node: the lease of their user, and what administrators are shown.
-- KEYS: nodes, all, details, those of the node; then user and name for each connection
-- ARGV: the node's life, limit, policy, channel; then id, milliseconds since its beginning, details
-- Answers -1 for a life that is over, 0 for a user who has enough, else 1.
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  return -1
end
local limit, policy = tonumber(ARGV[2]), ARGV[3]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local replaced = {}
for i = 0, (#KEYS - 4) / 2 - 1 do
  local user, name = KEYS[5 + 2 * i], KEYS[6 + 2 * i]
  local id, age, details = ARGV[5 + 3 * i], ARGV[6 + 3 * i], ARGV[7 + 3 * i]
  local leased = redis.call('ZSCORE', user, id)
  if not leased and policy == 'kick_oldest' and redis.call('SISMEMBER', KEYS[4], id) == 1 then
    -- It was replaced while its node did not hear of it.
    table.insert(replaced, id)
  elseif not leased then
    if policy == 'reject_new' and redis.call('ZCARD', user) >= limit then
      return 0
    end
    local since = now - age * 1000
    redis.call('ZADD', user, since, id)
    redis.call('ZADD', name, since, id)
    redis.call('ZADD', KEYS[2], since, id)
    redis.call('SADD', KEYS[4], id)
    if policy == 'kick_oldest' then
      for _, oldest in ipairs(redis.call('ZRANGE', user, 0, -1 - limit)) do
        redis.call('ZREM', user, oldest)
        table.insert(replaced, oldest)
      end
    end
  end
  redis.call('HSET', KEYS[3], id, details)
end
if #replaced > 0 then
  local ids = table.concat(replaced, '","')
  redis.call('PUBLISH', ARGV[4], '{"node":"","events":[{"replaced":["' .. ids .. '"]}]}')
end
return 1
