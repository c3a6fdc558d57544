-- Keeps logouts and tells the nodes that are there, in one step, so that none misses what the key has; forgets
-- those whose time is over. Times are by the clock of Redis, and none is made shorter.
-- KEYS: revocations
-- ARGV: channel, what the nodes are told; then the seconds that are left and the logout for each
local now = tonumber(redis.call('TIME')[1])
for i = 3, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], 'GT', now + ARGV[i], ARGV[i + 1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
-- The key goes with the last of them.
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if last[2] then
  redis.call('EXPIRE', KEYS[1], last[2] - now + 1)
end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1
