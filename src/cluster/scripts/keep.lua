-- Keeps logouts and tells the nodes that are there, in one step, so that none misses what the key has; forgets
-- those whose time is over.
-- KEYS: revocations
-- ARGV: seconds that the last of them lasts, the second of now, channel, what the nodes are told; then the second
-- of its end and the logout for each
for i = 5, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[2])
redis.call('PUBLISH', ARGV[3], ARGV[4])
return 1
