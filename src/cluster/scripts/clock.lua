-- The time of Redis: seconds since 1970, and microseconds.
-- KEYS: revocations, which makes all nodes ask the same server of a Redis Cluster
return redis.call('TIME')
