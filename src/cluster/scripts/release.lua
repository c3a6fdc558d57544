-- Takes off connections that have ended, or those of a node that has.
-- KEYS: nodes, all, details, those of the node; then user and name for each connection
-- ARGV: the life that is over, if it is the node that has ended; then their ids
-- Answers 0 if the node lives after all.
local life = ARGV[1]
if life ~= '' then
  local time = redis.call('TIME')
  local ends = redis.call('ZSCORE', KEYS[1], life)
  if not ends or tonumber(ends) > time[1] * 1000000 + time[2] then
    return 0
  end
end
for i = 0, (#KEYS - 4) / 2 - 1 do
  local id = ARGV[2 + i]
  redis.call('ZREM', KEYS[5 + 2 * i], id)
  redis.call('ZREM', KEYS[6 + 2 * i], id)
  redis.call('ZREM', KEYS[2], id)
  redis.call('HDEL', KEYS[3], id)
  redis.call('SREM', KEYS[4], id)
end
if life ~= '' and redis.call('SCARD', KEYS[4]) == 0 then
  redis.call('ZREM', KEYS[1], life)
end
return 1
