-- Renews the life of a node, or begins one, which ends those that it had before.
-- KEYS: nodes
-- ARGV: the life, its microseconds, what all lives of the node begin with if it is to begin
-- Answers with the lives that are over, after one word; with nothing if this one is.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local life, node = ARGV[1], ARGV[3]
if node ~= '' then
  for _, other in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if string.sub(other, 1, #node) == node then
      redis.call('ZREM', KEYS[1], other)
    end
  end
elseif not redis.call('ZSCORE', KEYS[1], life) then
  return {}
end
redis.call('ZADD', KEYS[1], now + ARGV[2], life)
local over = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
table.insert(over, 1, 'lives')
return over
