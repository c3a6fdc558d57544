-- Tells what connections have done since, unless they have ended.
-- KEYS: details
-- ARGV: id and details for each
for i = 1, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return 1
