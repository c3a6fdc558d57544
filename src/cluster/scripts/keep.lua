-- Keeps logouts, and forgets those whose time is over.
-- KEYS: revocations
-- ARGV: seconds that the last of them lasts, the second of now; then the second of its end and the logout for each
for i = 3, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[2])
return 1
